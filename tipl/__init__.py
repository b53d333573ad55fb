"""tipl: policy weights under PPO as a sequence, and a Transformer that continues it (arXiv 2503.04074)."""

import importlib
import os
import sys
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

# After torch's last parallel loop libgomp's threads spin for up to 16 ms, on the cores that a decoder wants: on two
# cores it ran at 0.6 of its speed. Some tenths of a millisecond serve torch as well. This is read when torch is loaded;
# where torch was imported before tipl, the choice is its importer's.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from tipl.basis import Basis
    from tipl.calibrate import recalibrate
    from tipl.collect import collect
    from tipl.decoder import Decoder
    from tipl.evaluate import EvaluateConfig, evaluate
    from tipl.exporter import export_checkpoint
    from tipl.importer import import_checkpoints
    from tipl.model import ModelConfig, TrajectoryTransformer
    from tipl.ppo import PPOConfig
    from tipl.recorder import Recorder
    from tipl.report import PathSpectrum, path_spectrum, plot_store, write_report
    from tipl.reproduce import reproduce
    from tipl.rollout import Forecaster, load_pretrained, rollout
    from tipl.store import Store
    from tipl.store_info import describe_store
    from tipl.svd import GroupedSVD, RunningGram, StreamingSVD, gram
    from tipl.train import train
    from tipl.training_data import TrainConfig
    from tipl.verify import verify, verify_store

# What each module gives to the package. A name is imported when it is first asked for: StreamingSVD needs neither torch
# nor MuJoCo, which take 1.5 s and 250 MB.
_EXPORTS = {
    "basis": ["Basis"],
    "calibrate": ["recalibrate"],
    "collect": ["collect"],
    "decoder": ["Decoder"],
    "evaluate": ["EvaluateConfig", "evaluate"],
    "exporter": ["export_checkpoint"],
    "importer": ["import_checkpoints"],
    "model": ["ModelConfig", "TrajectoryTransformer"],
    "ppo": ["PPOConfig"],
    "recorder": ["Recorder"],
    "report": ["PathSpectrum", "path_spectrum", "plot_store", "write_report"],
    "reproduce": ["reproduce"],
    "rollout": ["Forecaster", "load_pretrained", "rollout"],
    "store": ["Store"],
    "store_info": ["describe_store"],
    "svd": ["GroupedSVD", "RunningGram", "StreamingSVD", "gram"],
    "train": ["train"],
    "training_data": ["TrainConfig"],
    "verify": ["verify", "verify_store"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "Basis",
    "Decoder",
    "EvaluateConfig",
    "Forecaster",
    "GroupedSVD",
    "ModelConfig",
    "PPOConfig",
    "PathSpectrum",
    "Recorder",
    "RunningGram",
    "Store",
    "StreamingSVD",
    "TrainConfig",
    "TrajectoryTransformer",
    "collect",
    "describe_store",
    "evaluate",
    "export_checkpoint",
    "gram",
    "import_checkpoints",
    "load_pretrained",
    "path_spectrum",
    "plot_store",
    "recalibrate",
    "reproduce",
    "rollout",
    "train",
    "verify",
    "verify_store",
    "write_report",
]
__version__ = version("tipl")


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tipl' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tipl.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing tipl.train binds the module to tipl.train, where the function of that name belongs."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _MODULE_OF:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
