"""tipl: policy weights under PPO as a sequence, and a Transformer that continues it (arXiv 2503.04074)."""

from importlib.metadata import version

from tipl.basis import Basis
from tipl.collect import collect
from tipl.decoder import Decoder
from tipl.evaluate import EvaluateConfig, evaluate
from tipl.model import ModelConfig, TrajectoryTransformer
from tipl.ppo import PPOConfig
from tipl.report import write_report
from tipl.rollout import Forecaster, rollout
from tipl.store import Store
from tipl.svd import StreamingSVD, gram
from tipl.train import TrainConfig, train

__all__ = [
    "Basis",
    "Decoder",
    "EvaluateConfig",
    "Forecaster",
    "ModelConfig",
    "PPOConfig",
    "Store",
    "StreamingSVD",
    "TrainConfig",
    "TrajectoryTransformer",
    "collect",
    "evaluate",
    "gram",
    "rollout",
    "train",
    "write_report",
]
__version__ = version("tipl")
