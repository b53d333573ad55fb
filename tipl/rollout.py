"""Continue runs: the weights of a prefix in, the weights of its forecast future out.

Shapes  B trials, p weights, k = n_components, h = prefix_end, n = horizon.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl.basis import Basis, Centre
from tipl.decoder import continue_paths
from tipl.model import TrajectoryTransformer, load_model


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One run continued."""

    basis: Basis
    observed: NDArray[np.float32]
    """Coordinates of the prefix in the basis, (h+1, k)."""
    future: NDArray[np.float32]
    """Coordinates forecast for what follows, (n, k)."""

    def weights(self) -> NDArray[np.float32]:
        """Return the forecast weights, (n, p)."""
        return self.basis.decode(self.future)


@dataclasses.dataclass(frozen=True)
class Forecaster:
    """A trained model and the basis that it speaks in."""

    model: TrajectoryTransformer
    shared_basis: Basis | None = None
    """The basis of all training trials; None where each prefix has its own, the default."""
    centre: Centre | None = None
    """The training trials' mean path; None where the model's coordinates are not centred."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The model folder's config.json."""

    @classmethod
    def load(cls, folder: str | Path) -> "Forecaster":
        """Return the forecaster in a model folder written by `train`.

        Raises FileNotFoundError where a file is missing, RuntimeError where one is damaged.
        """
        folder = Path(folder)
        model, config = load_model(folder)
        shared = config.get("train", {}).get("basis") == "shared"
        basis = Basis.load(folder / "basis.safetensors") if shared else None
        if basis is not None and basis.n_components != model.config.n_components:
            raise RuntimeError(
                f"Forecaster.load: {folder}: the basis has {basis.n_components} components, the model "
                f"{model.config.n_components}"
            )
        centre = Centre.load(folder / "centre.safetensors") if "train" in config else None
        if centre is not None and centre.paths.shape[1:] != (model.config.max_len, model.config.n_components):
            raise RuntimeError(
                f"Forecaster.load: {folder}: the centre's paths {centre.paths.shape} do not fit the model"
            )
        return cls(model, basis, centre, config)

    def basis_of(self, prefix: NDArray[np.float32]) -> Basis:
        """Return the basis in which the forecast of `prefix` (h+1, p) is made."""
        if self.shared_basis is not None:
            return self.shared_basis.through(prefix[-1])
        return Basis.from_prefix(prefix, self.model.config.n_components)

    def forecast(
        self, prefixes: Sequence[NDArray[np.float32]], horizons: Sequence[int], *, num_threads: int | None = None
    ) -> list[Forecast]:
        """Return each run continued, from prefixes (h+1, p) of any lengths by horizons n of their own, in one batch."""
        bases = [self.basis_of(prefix) for prefix in prefixes]
        observed = [basis.encode(prefix) for basis, prefix in zip(bases, prefixes, strict=True)]
        futures = self.continue_coordinates(observed, horizons, num_threads=num_threads)
        return [Forecast(*parts) for parts in zip(bases, observed, futures, strict=True)]

    def continue_coordinates(
        self, observed: Sequence[NDArray[np.float32]], horizons: Sequence[int], *, num_threads: int | None = None
    ) -> list[NDArray[np.float32]]:
        """Return the coordinates (n, k) that follow observed ones (h+1, k), of any lengths: one native batch."""
        if self.centre is None:
            return continue_paths(self.model, observed, horizons, num_threads=num_threads)
        means = [self.centre.at(len(path) - 1) for path in observed]
        departures = [path - mean[: len(path)] for path, mean in zip(observed, means, strict=True)]
        continued = []
        for departure, future, mean in zip(
            departures, continue_paths(self.model, departures, horizons, num_threads=num_threads), means, strict=True
        ):
            length, last = len(departure), departure[-1:]
            trusted = last + self.centre.trust_at(length - 1) * (future - last)
            continued.append(np.asarray(trusted + mean[length : length + len(future)], dtype=np.float32))
        return continued


def rollout(
    model: Forecaster | TrajectoryTransformer | str | Path,
    prefix_weights: NDArray[np.float32],
    horizon: int,
    *,
    num_threads: int | None = None,
) -> NDArray[np.float32]:
    """Return forecast weights (B, n, p) for the n = `horizon` checkpoints after the prefixes (B, h+1, p) or (h+1, p).

    `model` is a forecaster, a bare model (with prefix bases) or a model folder. Row 0 of a prefix must be the run's
    initial weights and its rows one checkpoint apart, as in training. Every trial is written in its basis, continued
    natively, and written back; the future of no trial is seen.

    Raises TypeError for weights that are not float32; ValueError for another shape, NaN or Inf, a prefix that is too
    short for a basis, a path longer than the model's max_len, or weights of another size than the shared basis.
    """
    if isinstance(model, TrajectoryTransformer):
        model = Forecaster(model)
    elif not isinstance(model, Forecaster):
        model = Forecaster.load(model)
    prefixes = check_prefixes(prefix_weights)
    max_len = model.model.config.max_len
    if horizon < 1 or prefixes.shape[1] + horizon > max_len:
        raise ValueError(
            f"rollout: horizon must lie in [1, {max_len - prefixes.shape[1]}] (the model knows paths of {max_len} "
            f"checkpoints and the prefix holds {prefixes.shape[1]}), got {horizon}"
        )
    if model.shared_basis is not None and model.shared_basis.directions.shape[1] != prefixes.shape[2]:
        raise ValueError(
            f"rollout: prefix_weights must hold p = {model.shared_basis.directions.shape[1]} weights a checkpoint, as "
            f"the model's shared basis, got {prefixes.shape[2]}"
        )
    forecasts = model.forecast(list(prefixes), [horizon] * len(prefixes), num_threads=num_threads)
    return np.array([forecast.weights() for forecast in forecasts])


def check_prefixes(prefix_weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return observed weights as (B, h+1, p), or say what is wrong with them."""
    weights = np.asarray(prefix_weights)
    if weights.dtype != np.float32:
        raise TypeError(f"rollout: prefix_weights must be float32, got {weights.dtype}")
    if weights.ndim not in (2, 3) or 0 in weights.shape:
        raise ValueError(f"rollout: prefix_weights must have shape (B, h+1, p) or (h+1, p), got {weights.shape}")
    weights = weights.reshape(-1, *weights.shape[-2:])
    bad = ~np.isfinite(weights).all(axis=2)
    if bad.any():
        trial, row = np.argwhere(bad)[0]
        raise ValueError(f"rollout: prefix_weights must be finite, got NaN or Inf in trial {trial}, checkpoint {row}")
    return weights
