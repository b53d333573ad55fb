"""What a forecast must beat: predictors of a trajectory that learn little or nothing.

Shapes  p weights, k = n_components, h = prefix_end, n horizons; a horizon counts checkpoints ahead of h.

Each predictor is a frozen object whose `forecast(prefix, horizons (n,))` returns weights (n, p). It is fitted for one
prefix_end on the paths of *training* trials alone, and knows nothing of the trial that it continues but the prefix.
`Ridge` and `Nowcaster` forecast only the horizons that they were fitted for."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from tipl.judging.nowcaster import Nowcaster
from tipl.judging.regression import Autoregression, Ridge
from tipl.judging.training_path import TrainingPath
from tipl.subspace.basis import prefix_coordinates
from tipl.subspace.prefix import Prefix


class Predictor(Protocol):
    """Anything that continues a prefix."""

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the forecast weights (n, p) at `horizons` (n,) checkpoints after the prefix."""
        ...


@dataclasses.dataclass(frozen=True)
class Persistence:
    """Nothing changes: every future checkpoint is the last one seen."""

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.repeat(prefix.weights[-1:], len(horizons), axis=0)


@dataclasses.dataclass(frozen=True)
class _Extrapolation(ABC):
    """Every weight goes on along a curve from the last checkpoint, fitted to the `window` checkpoints before it."""

    window: int
    min_window: ClassVar[int]

    @classmethod
    def fit(cls, training: Sequence[TrainingPath], prefix_end: int) -> Self:
        """Choose the window, up to the whole prefix, with the least mean relative error over all futures in training.

        The forecast is a fixed linear combination of the prefix's checkpoints, so its squared error is a quadratic form
        in the trial's Gram matrix, and no work on p weights is needed.
        """
        shares = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
        windows = sorted({max(cls.min_window, round(prefix_end * share)) for share in shares})
        return min(
            map(cls, windows), key=lambda it: float(np.mean([it.errors(path.gram, prefix_end) for path in training]))
        )

    @abstractmethod
    def mixing(self, horizons: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how much of each of theta_{h-window}..theta_{h-1}, less theta_h, is added to theta_h, (n, window)."""

    def errors(self, gram: NDArray[np.float64], prefix_end: int) -> NDArray[np.float64]:
        """Return the relative error at every checkpoint after the prefix, (T-1-h,), of a trial with this `gram`."""
        future = np.arange(prefix_end + 1, len(gram))
        seen = self.mixing(future - prefix_end)
        mixing = np.zeros((len(future), len(gram)))  # forecast - truth, as a mixture of the trial's displacements
        mixing[:, prefix_end - self.window : prefix_end] = seen
        mixing[:, prefix_end] = 1.0 - seen.sum(1)
        mixing[np.arange(len(future)), future] -= 1.0
        squared = np.einsum("ni,ij,nj->n", mixing, gram, mixing, optimize=True)
        return np.asarray(np.sqrt(np.maximum(squared, 0.0) / gram[future, future]))

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        last = prefix.weights[-1]
        before = prefix.weights[-1 - self.window : -1] - last  # (window, p)
        return np.asarray(last + self.mixing(horizons) @ before, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Linear(_Extrapolation):
    """Every weight goes on at its mean speed over the last `window` checkpoints."""

    min_window = 1

    def mixing(self, horizons: NDArray[np.int64]) -> NDArray[np.float64]:
        mixing = np.zeros((len(horizons), self.window))
        mixing[:, 0] = -horizons / self.window
        return mixing


@dataclasses.dataclass(frozen=True)
class Quadratic(_Extrapolation):
    """Every weight goes on along the parabola through theta_h nearest to the `window` checkpoints before it."""

    min_window = 2

    def mixing(self, horizons: NDArray[np.int64]) -> NDArray[np.float64]:
        seen, ahead = np.arange(-self.window, 0) / self.window, horizons / self.window
        return np.asarray(np.stack([ahead, ahead**2], 1) @ np.linalg.pinv(np.stack([seen, seen**2], 1)))


@dataclasses.dataclass(frozen=True)
class RankOne:
    """The prefix's first singular direction, its coordinate continued by regression (RELEX, arXiv 2605.21468)."""

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        weights = prefix.weights
        basis = prefix.basis(1).through(weights[0])  # RELEX's line starts from theta_0
        slope, intercept = np.polyfit(np.arange(len(weights)), basis.encode(weights)[:, 0], 1)
        coordinate = intercept + slope * (prefix.end + horizons)  # (n,)
        return basis.decode(coordinate[:, None].astype(np.float32))


@dataclasses.dataclass(frozen=True)
class MeanPath:
    """The training trials' mean path in canonical coordinates, shifted to start from the last checkpoint seen."""

    coordinates: NDArray[np.float32]
    """Mean canonical coordinates of whole training trials whose prefix ends at the same checkpoint, (T, k)."""

    @classmethod
    def fit(cls, coordinates: NDArray[np.float32]) -> "MeanPath":
        """Average the training trials' canonical coordinates (N, T, k)."""
        return cls(np.asarray(np.mean(coordinates, axis=0, dtype=np.float64), dtype=np.float32))

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        return _follow(self.coordinates, prefix, horizons)


@dataclasses.dataclass(frozen=True)
class NearestPath:
    """The future of the training trial whose prefix is nearest in canonical coordinates, from the last checkpoint on.

    It is what a forecaster that memorises its training trials would predict.
    """

    coordinates: NDArray[np.float32]
    """Canonical coordinates of N whole training trials whose prefix ends at the same checkpoint, (N, T, k)."""

    def nearest(self, prefix: Prefix) -> int:
        """Return which of the N trials it is."""
        observed = prefix.basis(self.coordinates.shape[2]).encode(prefix.weights)
        away = self.coordinates[:, : len(observed)] - observed  # (N, h+1, k)
        return int(np.argmin((away**2).sum((1, 2))))

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        return _follow(self.coordinates[self.nearest(prefix)], prefix, horizons)


@dataclasses.dataclass(frozen=True)
class AnotherRun:
    """The weights of another run: those of the training trial with the nearest prefix, at the same checkpoint.

    In weight space they are nowhere near this run's. But on average they act as well as this run will: to return more,
    a forecast must predict more than that training helps. For a training trial the other run is the run itself."""

    nearest: NearestPath
    path: Callable[[int], NDArray[np.float32]]
    """The weights (T, p) of one of its N trials."""

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.path(self.nearest.nearest(prefix))[prefix.end + horizons]


def _follow(coordinates: NDArray[np.float32], prefix: Prefix, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return weights (n, p) that go from the prefix's end as the path `coordinates` (T, k) goes from there."""
    basis = prefix.basis(coordinates.shape[1])
    shift = coordinates[prefix.end + horizons] - coordinates[prefix.end]  # (n, k)
    return basis.decode(basis.encode(prefix.weights[-1:]) + shift)


def canonical_coordinates(training: Sequence[TrainingPath], prefix_end: int, n_components: int) -> NDArray[np.float32]:
    """Return whole training paths, each in the basis of its own prefix 0..`prefix_end`, (N, T, k)."""
    return np.stack([prefix_coordinates(path.gram, prefix_end, n_components) for path in training])


def fit_baselines(
    training: Sequence[TrainingPath],
    prefix_end: int,
    horizons: NDArray[np.int64],
    n_components: int,
    *,
    path: Callable[[int], NDArray[np.float32]],
    seed: int = 0,
) -> dict[str, Predictor]:
    """Return every baseline by its name in results.json, fitted for prefixes that end at `prefix_end`.

    `horizons` (n,) are those that will be asked for; `path(i)` gives the weights (T, p) of training trial i of N;
    `seed` is the nowcaster's."""
    coordinates = canonical_coordinates(training, prefix_end, n_components)
    nearest = NearestPath(coordinates)
    return {
        "persistence": Persistence(),
        "linear": Linear.fit(training, prefix_end),
        "quadratic": Quadratic.fit(training, prefix_end),
        "rank1": RankOne(),
        "autoregression": Autoregression.fit(training, prefix_end, coordinates),
        "mean_path": MeanPath.fit(coordinates),
        "nearest_path": nearest,
        "ridge": Ridge.fit(training, prefix_end, horizons),
        "nowcaster": Nowcaster.fit(training, prefix_end, horizons, seed),
        "another_run": AnotherRun(nearest, path),
    }
