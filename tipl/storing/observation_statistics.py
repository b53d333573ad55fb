"""The statistics with which a run normalised its observations: VecNormalize's files, read safely.

    vec_normalize.pkl                       Stable-Baselines3's documentation, and its models on the hub
    rl_model_vecnormalize_64_steps.pkl      CheckpointCallback(save_vecnormalize=True), beside rl_model_64_steps.zip
    <env_id>/vecnormalize.pkl               RL Zoo, one folder below the checkpoints

VecNormalize pickles itself whole. Nothing of that is run (`inert_pickle.py`): the file must be an object of that one
class, of which the numbers are taken and the rest is left.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl.files.locations import read_file
from tipl.storing.actor_families import STATISTICS
from tipl.storing.inert_pickle import MAX_BYTES, Made, Name, PickleError, array_of, number_of, read_inert
from tipl.storing.live_wrappers import is_wrapping, normaliser_in, vars_of
from tipl.storing.tensor_checks import shown

FOLDED_NOTE = (
    "the observation statistics of VecNormalize are folded into the first layer of each checkpoint; what VecNormalize "
    "clips, observations beyond {clip:g} standard deviations, is not clipped"
)

_CLASS = Name("stable_baselines3.common.vec_env.vec_normalize", "VecNormalize")
_PATTERNS = ("*vecnormalize*.pkl", "*vec_normalize*.pkl")
_CHECKPOINT = re.compile(r"(?P<prefix>.+)_(?P<steps>\d+)_steps")  # as CheckpointCallback names its files


@dataclasses.dataclass(frozen=True)
class ObservationStatistics:
    """A policy sees clip((observation - mean) / std, -clip, clip)."""

    mean: NDArray[np.float64]
    """(obs_dim,)"""
    std: NDArray[np.float64]
    """(obs_dim,), positive: the root of VecNormalize's variance + epsilon."""
    clip: float

    def to_state(self) -> dict[str, Tensor]:
        """Return the statistics as tensors of a state, where `Actor` looks for them."""
        return {
            f"{STATISTICS}_mean": torch.from_numpy(self.mean.copy()),
            f"{STATISTICS}_std": torch.from_numpy(self.std.copy()),
        }


def statistics_of(mean: Any, var: Any, *, epsilon: float, clip: float) -> ObservationStatistics:
    """Return the statistics of a running mean and variance (obs_dim,). Raises ValueError where they are none."""
    mean, var = np.asarray(mean, np.float64), np.asarray(var, np.float64)
    if mean.ndim != 1 or mean.shape != var.shape or not mean.size:
        raise ValueError(f"mean and variance must be of one shape (obs_dim,), got {mean.shape} and {var.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0.0).all()):
        raise ValueError("mean and variance must be finite, and the variance not negative")
    if not (0.0 < epsilon < np.inf and clip > 0.0):
        raise ValueError(f"epsilon and clip must be positive, got {epsilon} and {clip}")
    return ObservationStatistics(mean, np.sqrt(var + epsilon), float(clip))


def live_statistics(normaliser: Any) -> ObservationStatistics | None:
    """Return the statistics that a normaliser has now: a VecNormalize, a NormalizeObservation of Gymnasium's, an
    environment or a vector of them that has one such wrapper, or any object with `mean` and `var` (obs_dim,), such as
    their `obs_rms`; None where it leaves observations as they are. Raises ValueError where it has none, or several."""
    normaliser, _ = _found(normaliser)
    if getattr(normaliser, "norm_obs", True) is False:
        return None
    running = getattr(normaliser, "obs_rms", normaliser)
    mean, var = getattr(running, "mean", None), getattr(running, "var", None)
    if mean is None or var is None or callable(mean):  # an array's
        raise ValueError(f"normaliser must have obs_rms, or mean and var, got {type(normaliser).__name__}")
    epsilon, clip = getattr(normaliser, "epsilon", 1e-8), getattr(normaliser, "clip_obs", np.inf)
    try:
        mean, var = (np.asarray(it.cpu() if isinstance(it, Tensor) else it, np.float64) for it in (mean, var))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"normaliser must have mean and var that are arrays, got {mean!r:.40} and {var!r:.40}"
        ) from error
    try:
        return statistics_of(mean, var, epsilon=epsilon, clip=clip)
    except ValueError as error:
        raise ValueError(f"normaliser: {error}") from error


def live_note(normaliser: Any) -> str:
    """Return what a user of policies must know into which the statistics that `live_statistics` gives are folded."""
    found, clips = _found(normaliser)
    if type(found).__name__ == "VecNormalize":
        return "; ".join(filter(None, (FOLDED_NOTE.format(clip=found.clip_obs), clips)))
    lost = clips or "where observations were clipped after that, they are not clipped"
    name = type(found).__name__
    return f"the observation statistics of {name} are folded into the first layer of each checkpoint; {lost}"


def _found(normaliser: Any) -> tuple[Any, str]:
    """Return the object that has the statistics, in an environment the wrapper, and in words what clips behind it."""
    if "obs_rms" in vars_of(normaliser) or "norm_obs" in vars_of(normaliser) or not is_wrapping(normaliser):
        return normaliser, ""
    return normaliser_in(normaliser)


def read_statistics(path: str | Path) -> ObservationStatistics | None:
    """Return the statistics in a file of VecNormalize's, None where it left observations as they are (norm_obs=False).

    Raises RuntimeError where the file is damaged, holds anything but a VecNormalize, or statistics of several
    observations (a Dict space); FileNotFoundError, or another OSError where it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file of VecNormalize's statistics {shown(path)}")
    try:
        return _statistics_in(read_file(path, max_bytes=MAX_BYTES))
    except (PickleError, ValueError) as error:
        raise RuntimeError(f"{shown(path)} {shown(error)}") from error


def _statistics_in(data: bytes) -> ObservationStatistics | None:
    found = read_inert(data)
    name = found.name if isinstance(found, Made) else type(found).__name__
    if name != _CLASS:
        raise PickleError(f"holds no VecNormalize but {shown(name)}, and nothing else is read from a pickle")
    settings = found.state
    if not isinstance(settings, dict):
        raise PickleError("is damaged: its VecNormalize has no settings")
    if settings.get("norm_obs") is False:
        return None
    running = settings.get("obs_rms")
    if isinstance(running, dict):
        raise PickleError("holds statistics of several observations, a Dict space, which no first layer takes in")
    values = running.state if isinstance(running, Made) else None
    if not isinstance(values, dict):
        raise PickleError("is damaged: its obs_rms has no mean and variance")
    mean, var = (array_of(values.get(name)) for name in ("mean", "var"))
    epsilon, clip = (number_of(settings.get(name)) for name in ("epsilon", "clip_obs"))
    if mean is None or var is None or epsilon is None or clip is None:
        raise PickleError("is damaged: it lacks obs_rms.mean, obs_rms.var, epsilon or clip_obs")
    return statistics_of(mean, var, epsilon=epsilon, clip=clip)


def find_statistics(paths: Sequence[Path]) -> dict[Path, Path]:
    """Return which file has the statistics of each of a run's checkpoints, or {} where there is none.

    Those that CheckpointCallback wrote beside a checkpoint are its own. For the others there must be one
    vecnormalize.pkl or vec_normalize.pkl in the checkpoints' folder or one level below. Raises ValueError where there
    are several of these, or only files of other names.
    """
    own = {path: _beside(path) for path in paths}
    own = {path: it for path, it in own.items() if it.is_file()}
    if len(own) == len(paths):
        return own
    folders = sorted({path.parent for path in paths})
    found = {
        it
        for folder in folders
        for name in _PATTERNS
        for place in ("", "*/")
        for it in folder.glob(place + name)
        if it.is_file()
    }
    general = sorted(it for it in found if it.stem in ("vecnormalize", "vec_normalize"))
    if len(general) == 1:
        return dict.fromkeys(paths, general[0]) | own
    if not found:
        return {}
    missing = next(path for path in paths if path not in own)
    several = ", ".join(map(shown, (general or sorted(found))[:4]))
    raise ValueError(
        f"it is not clear which statistics of VecNormalize belong to {shown(missing)}: {several}; choose one for all "
        "with normaliser (--normaliser)"
    )


def _beside(path: Path) -> Path:
    """Return where CheckpointCallback puts the statistics of a checkpoint: .../rl_model_vecnormalize_64_steps.pkl."""
    match = _CHECKPOINT.fullmatch(path.stem)
    if match is None:
        return path.with_name(f"{path.stem}_vecnormalize.pkl")
    return path.with_name(f"{match['prefix']}_vecnormalize_{match['steps']}_steps.pkl")
