"""What the forecaster learns from: trials of one store or several, split whole, each written in its prefixes' bases.

Shapes  N trials, P prefixes for each trial, B batch, T checkpoints, k = n_components, h = prefix_end.

*Training* trials teach, *validation* trials choose when to stop, *held-out* trials are never read here at all:
`evaluate` judges on them (`TrainConfig.in_sample` is the exception). In prefix bases trials of other tasks and network
sizes look alike, so that one forecaster can learn from all of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl.cluster import Cluster
from tipl.forecasting.decoder import continue_paths
from tipl.forecasting.sources import Source
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.transformer import TrajectoryTransformer
from tipl.subspace.basis import Basis, Centre, prefix_coordinates, prefix_rank, trajectory_gram
from tipl.subspace.prefix_end import MIN_PREFIX_END, prefix_end_of

Written = tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]
"""A trial in a basis: its coordinates (T, k) and, in their unit, |theta_t - theta_0| and the distance of theta_t from
the basis, both (T,)."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Trajectories in coordinates, each with the prefix that it is to be continued from."""

    coordinates: Tensor
    """(N, P, T, k) float32, less the centre."""
    distances: Tensor
    """(N, P, T) float32, |theta_t - theta_0| in the unit of the coordinates: what an error is relative to."""
    outside: Tensor
    """(N, P, T) float32, how far theta_t lies outside the basis through theta_h: below it no error can go."""
    prefix_ends: Tensor
    """(P,) int64, the indices h."""
    filled: Tensor
    """(P, k) float32, one where a prefix of that length spans the coordinate and zero where it is padding."""
    centre: Centre
    """The mean path over the N trials."""

    @classmethod
    def of(cls, trials: Sequence[Sequence[Written]], ends: Sequence[int], filled: Tensor) -> "Examples":
        """Return trials, each written in a basis for each of its prefixes."""
        paths, distances, outside = (np.array([[it[j] for it in trial] for trial in trials]) for j in range(3))
        mean = _mean_path(paths, distances, outside)
        return cls(
            coordinates=torch.from_numpy(paths - mean),
            distances=torch.from_numpy(distances).float(),
            outside=torch.from_numpy(outside).float(),
            prefix_ends=torch.tensor(ends),
            filled=filled,
            centre=Centre(np.array(ends), mean, np.ones(len(ends))),
        )

    def to(self, device: str) -> "Examples":
        """Return the examples on a torch device, but for the prefixes' ends, which the host asks for in each step."""
        moved = {name: getattr(self, name).to(device) for name in ("coordinates", "distances", "outside", "filled")}
        return dataclasses.replace(self, **moved)

    def sample(self, config: TrainConfig, draws: "Draws") -> "Batch":
        """Return random trajectories that share one random prefix end."""
        prefix = int(torch.randint(len(self.prefix_ends), (), generator=draws.on_host))
        trial = draws.integers(len(self.coordinates), 2, config.batch_size)
        columns = (self.coordinates[trial, prefix], self.distances[trial, prefix], self.outside[trial, prefix])
        if config.mixing > 0.0:
            share = draws.shares(config.batch_size)
            x, distances, outside = (
                torch.lerp(a, b, share.view(-1, *[1] * (a.ndim - 1))) for a, b in columns
            )  # (B, T, k), (B, T), (B, T)
        else:
            x, distances, outside = (a for a, _ in columns)
        flip = draws.uniform(config.batch_size, 1, x.shape[-1]) < config.flip_probability
        x = torch.where(flip, -x, x)
        return Batch(x, int(self.prefix_ends[prefix]), self.filled[prefix], distances, outside)


class Draws:
    """The random numbers of training, on the device where it runs, so that no step waits for another device.

    What decides shapes is drawn on the host. On the CPU both come from one generator.
    """

    POOL = 2**16
    """Shares that are drawn ahead, of which the steps on another device take theirs."""

    def __init__(self, config: TrainConfig) -> None:
        self.device, self.mixing = config.device, config.mixing
        self.on_host = torch.Generator().manual_seed(config.seed)
        self.on_device: torch.Generator | None = self.on_host
        self._pool: Tensor | None = None
        if self.device != "cpu":
            self.on_device = self.generator_of(self.device, config.seed)
            self._pool = torch.from_numpy(self._beta(self.POOL)).to(self.device) if self.mixing > 0.0 else None

    @staticmethod
    def generator_of(device: str, seed: int) -> torch.Generator | None:
        return torch.Generator(device).manual_seed(seed)

    def integers(self, high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=self.on_device, device=self.device)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self.on_device, device=self.device)

    def normal(self, size: torch.Size) -> Tensor:
        return torch.randn(size, generator=self.on_device, device=self.device)

    def shares(self, count: int) -> Tensor:
        """Return shares (count,) from Beta(mixing, mixing)."""
        if self._pool is None:
            return torch.from_numpy(self._beta(count))
        return self._pool[self.integers(self.POOL, count)]

    def _beta(self, count: int) -> NDArray[np.float32]:
        """Return shares on the host; torch's own sampler takes no generator."""
        seed = int(torch.randint(2**62, (), generator=self.on_host))
        return np.random.default_rng(seed).beta(self.mixing, self.mixing, count).astype(np.float32)


def _mean_path(
    paths: NDArray[np.float32], distances: NDArray[np.float64], outside: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return the mean of the paths (N, P, T, k) over the trials whose relative error at the end is least, (P, T, k).

    That is a geometric median: a mean that weighs each trial by one over its error, found by Weiszfeld's iteration.
    """
    far, unknown = distances[:, :, -1], outside[:, :, -1]  # (N, P)
    errors = far
    for _ in range(20):
        shares = 1.0 / (far * np.maximum(errors, 1e-6 * far))
        shares /= shares.sum(0)
        end = np.einsum("np,npk->pk", shares, paths[:, :, -1])
        errors = np.hypot(np.linalg.norm(paths[:, :, -1] - end, axis=-1), unknown)
    return np.asarray(np.einsum("np,nptk->ptk", shares, paths), dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples of one optimiser step, all with the same prefix end."""

    x: Tensor
    """(B, T, k) coordinates."""
    prefix_end: int
    filled: Tensor
    """(k,)"""
    distances: Tensor
    """(B, T)"""
    outside: Tensor
    """(B, T)"""


@dataclasses.dataclass(frozen=True)
class Case:
    """Validation trials at one prefix end, with what their forecasts are measured by at the last checkpoint."""

    prefix_end: int
    paths: NDArray[np.float32]
    """(N, T, k), less the centre."""
    distance: NDArray[np.float64]
    """(N,)"""
    outside: NDArray[np.float64]
    """(N,)"""
    rank: int
    """Coordinates that the prefix spans; those behind are padding and count nothing."""

    def error(self, forecast: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the mean of |forecast - truth| / |truth - theta_0| over the trials; forecast (..., N, k)."""
        inside = np.linalg.norm((forecast - self.paths[:, -1])[..., : self.rank], axis=-1)
        return np.asarray((np.hypot(inside, self.outside) / self.distance).mean(-1))


class Validation:
    """The relative weight error at the end of the path, over validation trials and prefixes."""

    PREFIXES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = list(cases)

    @classmethod
    def prefix_ends(cls, num_checkpoints: int) -> list[int]:
        return sorted({max(MIN_PREFIX_END, prefix_end_of(share, num_checkpoints)) for share in cls.PREFIXES})

    def forecasts(self, model: TrajectoryTransformer) -> list[NDArray[np.float32]]:
        """Return each case's coordinates (N, k) that the native rollout gives the last checkpoint, all in one batch."""
        observed = [path[: case.prefix_end + 1] for case in self.cases for path in case.paths]
        horizons = [case.paths.shape[1] - 1 - case.prefix_end for case in self.cases for _ in case.paths]
        ends = iter([path[-1] for path in continue_paths(model, observed, horizons)])
        return [np.array([next(ends) for _ in case.paths]) for case in self.cases]

    def error(self, model: TrajectoryTransformer) -> float:
        cases = zip(self.cases, self.forecasts(model), strict=True)
        return float(np.mean([case.error(forecast) for case, forecast in cases]))

    def trust(self, model: TrajectoryTransformer) -> list[float]:
        """Return for each case the share in [0, 1] of the model's departure from the mean path that errs least.

        It is near one where the model knows how these trials go on, and zero where it only guesses.
        """
        shares = np.linspace(0.0, 1.0, 11)
        best = []
        for case, forecast in zip(self.cases, self.forecasts(model), strict=True):
            last = case.paths[:, case.prefix_end]  # (N, k): to stay here is to go on as the mean path
            trusted = last + shares[:, None, None] * (forecast - last)
            best.append(float(shares[np.argmin(case.error(trusted))]))
        return best


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Everything that training reads, made from the store once."""

    examples: Examples
    validation: Validation
    shared_basis: Basis | None


def load_training_data(sources: Sequence[Source], config: TrainConfig, cluster: Cluster | None = None) -> TrainingData:
    """Read the training and validation trials of the sources, and nothing else of them."""
    num_checkpoints = sources[0].num_checkpoints
    for source in sources:
        if source.num_checkpoints != num_checkpoints:
            raise ValueError(
                f"train: the stores must hold paths of one length, {sources[0].store.path} has {num_checkpoints} "
                f"checkpoints, {source.store.path} has {source.num_checkpoints}: choose num_checkpoints "
                "(--num-checkpoints)"
            )
    last = num_checkpoints - 2  # the last prefix that leaves a checkpoint to forecast
    if last < MIN_PREFIX_END:
        raise ValueError(
            f"train: a trial must hold at least {MIN_PREFIX_END + 2} checkpoints, got {num_checkpoints}: "
            "collect with a larger total_timesteps"
        )
    spread = np.linspace(MIN_PREFIX_END, last, config.max_prefixes).round().astype(int)
    judged = Validation.prefix_ends(num_checkpoints)
    ends = sorted({*spread.tolist(), *judged})
    basis, k = None, config.n_components
    if config.basis == "shared":
        if len(sources) > 1:
            raise ValueError(f"train: a shared basis is of one store, got {len(sources)}")
        store = sources[0].store
        basis = Basis.from_trials(
            [store.trial(i) for i in sources[0].split.train], k, seed=config.seed, cluster=cluster
        )

    def write(source: Source, trial: int, prefix_ends: Sequence[int]) -> list[Written]:
        """Return a trial in the basis of each prefix."""
        weights = source.path(trial)
        gram = trajectory_gram(weights)
        if basis is None:
            return [_written(gram, prefix_coordinates(gram, end, k), end) for end in prefix_ends]
        coordinates = basis.encode(weights)
        return [_written(gram, coordinates, end, basis.scale) for end in prefix_ends]

    def rank(prefix_end: int) -> int:
        return k if basis is not None else prefix_rank(prefix_end, k)

    filled = (torch.arange(k) < torch.tensor([rank(end) for end in ends])[:, None]).float()
    learned = [write(source, i, ends) for source in sources for i in source.learned(config)[0]]
    examples = Examples.of(learned, ends, filled)
    chosen = [write(source, i, judged) for source in sources for i in source.learned(config)[1]]
    cases = [
        _case(trials, examples.centre, end, rank(end))
        for end, trials in zip(judged, zip(*chosen, strict=True), strict=True)
    ]
    return TrainingData(examples, Validation(cases), basis)


def _written(
    gram: NDArray[np.float64], coordinates: NDArray[np.float32], prefix_end: int, scale: float | None = None
) -> Written:
    """Return a trial with Gram matrix (T, T) in a basis through its checkpoint `prefix_end`.

    `scale` is the basis's, |theta_h - theta_0| by default. What the coordinates lack of |theta_t - theta_h| is outside.
    """
    unit = gram[prefix_end, prefix_end] if scale is None else scale**2
    squared = np.diag(gram)  # (T,)
    since_prefix = (squared + squared[prefix_end] - 2.0 * gram[prefix_end]) / unit
    inside = np.square(coordinates.astype(np.float64) - coordinates[prefix_end]).sum(1)
    return coordinates, np.sqrt(squared / unit), np.sqrt(np.maximum(since_prefix - inside, 0.0))


def _case(written: Sequence[Written], centre: Centre, prefix_end: int, rank: int) -> Case:
    paths, distances, outside = (np.array(x) for x in zip(*written, strict=True))
    return Case(prefix_end, paths - centre.at(prefix_end), distances[:, -1], outside[:, -1], rank)
