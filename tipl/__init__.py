"""tipl: policy weights under PPO as a sequence, and a Transformer that continues it (arXiv 2503.04074)."""

import os
from importlib.metadata import version

# After torch's last parallel loop libgomp's threads spin for up to 16 ms, on the cores that a decoder wants: on two
# cores it ran at 0.6 of its speed. Some tenths of a millisecond serve torch as well. This is read when torch is loaded;
# where torch was imported before tipl, the choice is its importer's.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

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
