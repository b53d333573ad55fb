"""What a forecast must beat: predictors of a trajectory that learn little or nothing.

Shapes  p weights, k = n_components, h = prefix_end, n horizons; a horizon counts checkpoints ahead of h.

Each predictor is a frozen object whose `forecast(prefix (h+1, p), horizons (n,))` returns weights (n, p), fitted for
one prefix_end on the Gram matrices of the *training* trials alone (`basis.trajectory_gram`): of the trial that it
continues it knows nothing but the prefix.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tipl.basis import Basis, prefix_coordinates


class Predictor(Protocol):
    """Anything that continues a prefix."""

    def forecast(self, prefix: NDArray[np.float32], horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the forecast weights (n, p) at `horizons` (n,) checkpoints after the prefix (h+1, p)."""
        ...


@dataclasses.dataclass(frozen=True)
class Persistence:
    """Nothing changes: every future checkpoint is the last one seen."""

    def forecast(self, prefix: NDArray[np.float32], horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.repeat(prefix[-1:], len(horizons), axis=0)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Every weight goes on at its mean speed over the last `window` checkpoints."""

    window: int

    @classmethod
    def fit(cls, training_grams: Sequence[NDArray[np.float64]], prefix_end: int) -> "Linear":
        """Choose the window, from one checkpoint to the whole prefix, with the least mean relative error in training.

        The squared error of an extrapolation is a quadratic form in the trial's Gram matrix: no p-sized work.
        """

        def mean_error(window: int) -> float:
            return float(np.mean([_linear_error(gram, prefix_end, window) for gram in training_grams]))

        windows = sorted({max(1, round(prefix_end * share)) for share in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)})
        return cls(min(windows, key=mean_error))

    def forecast(self, prefix: NDArray[np.float32], horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        velocity = (prefix[-1] - prefix[-1 - self.window]) / self.window  # (p,)
        return np.asarray(prefix[-1] + horizons[:, None] * velocity, dtype=np.float32)


def _linear_error(gram: NDArray[np.float64], prefix_end: int, window: int) -> float:
    """Return the mean relative error of a linear extrapolation over all checkpoints after the prefix."""
    future = np.arange(prefix_end + 1, len(gram))
    steps = (future - prefix_end) / window
    mixing = np.zeros((len(future), len(gram)))  # forecast - truth, as a mixture of the trial's displacements
    mixing[:, prefix_end] += 1.0 + steps
    mixing[:, prefix_end - window] -= steps
    mixing[np.arange(len(future)), future] -= 1.0
    squared = np.einsum("ni,ij,nj->n", mixing, gram, mixing)
    return float(np.mean(np.sqrt(np.maximum(squared, 0.0) / gram[future, future])))


@dataclasses.dataclass(frozen=True)
class RankOne:
    """The prefix's first singular direction, its coordinate continued by regression (RELEX, arXiv 2605.21468)."""

    def forecast(self, prefix: NDArray[np.float32], horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        basis = Basis.from_prefix(prefix, 1).through(prefix[0])  # RELEX's line starts from theta_0
        slope, intercept = np.polyfit(np.arange(len(prefix)), basis.encode(prefix)[:, 0], 1)
        coordinate = intercept + slope * (len(prefix) - 1 + horizons)  # (n,)
        return basis.decode(coordinate[:, None].astype(np.float32))


@dataclasses.dataclass(frozen=True)
class MeanPath:
    """The training trials' mean path in canonical coordinates, shifted to start from the last checkpoint seen."""

    coordinates: NDArray[np.float32]
    """Mean canonical coordinates of whole training trials whose prefix ends at the same checkpoint, (T, k)."""

    @classmethod
    def fit(cls, training_grams: Sequence[NDArray[np.float64]], prefix_end: int, n_components: int) -> "MeanPath":
        paths = [prefix_coordinates(gram, prefix_end, n_components) for gram in training_grams]
        return cls(np.asarray(np.mean(paths, axis=0, dtype=np.float64), dtype=np.float32))

    def forecast(self, prefix: NDArray[np.float32], horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        prefix_end = len(prefix) - 1
        basis = Basis.from_prefix(prefix, self.coordinates.shape[1])
        shift = self.coordinates[prefix_end + horizons] - self.coordinates[prefix_end]  # (n, k)
        return basis.decode(basis.encode(prefix[-1:]) + shift)


def fit_baselines(
    training_grams: Sequence[NDArray[np.float64]], prefix_end: int, n_components: int
) -> dict[str, Predictor]:
    """Return every baseline by its name in results.json, fitted for prefixes that end at `prefix_end`."""
    return {
        "persistence": Persistence(),
        "linear": Linear.fit(training_grams, prefix_end),
        "rank1": RankOne(),
        "mean_path": MeanPath.fit(training_grams, prefix_end, n_components),
    }
