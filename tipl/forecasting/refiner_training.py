"""Train the refiner: the same trials, prefixes and error as the Transformer's, on a sample of each run's weights.

Shapes  N trials, P prefixes for each trial, J horizons for each prefix, m sampled weights; k, h, p, T as in `train`.

All trials of a store share one sample of weights. Every tensor has its share of it, and each sampled weight counts for
as many weights as it stands for, so that sums over the sample are unbiased estimates of sums over all weights.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tipl import _core
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.refiner import Observed, Refiner, growth_of
from tipl.forecasting.sources import Source
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training_state import SavedState, pack, set_gradient, take_step, unpack
from tipl.policy import Layout
from tipl.progress import progress_bar
from tipl.subspace.prefix_end import MIN_PREFIX_END

SAMPLE = 1024
"""About how many weights of a trial are learned from."""
NUM_PREFIXES = 10
"""Prefixes of a trial that are learned from."""
HORIZONS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
"""Shares of what is left of the path after the prefix."""
MAX_TRIALS = 256
"""Trials of a store that are learned from, at most: 2 MB each."""
BATCH_SIZE = 16
BATCH_WEIGHTS = 256
"""Weights of each trial in a batch."""
LEARNING_RATE = 3e-3
EMA_DECAY = 0.995


def sample_weights(layout: Layout, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return which weights are sampled (m,), ascending, and how many each stands for (m,).

    Small tensors are taken whole, the others in proportion to their size.
    """
    columns, counts = [], []
    for offset, shape in layout.layout.values():
        size = int(np.prod(shape))
        taken = min(size, max(64, round(SAMPLE * size / layout.num_params)))
        columns.append(offset + np.sort(rng.choice(size, taken, replace=False)))
        counts.append(np.full(taken, size / taken, np.float32))
    return np.concatenate(columns), np.concatenate(counts)


@dataclasses.dataclass(frozen=True)
class RefinerExamples:
    """Prefixes of N trials of one store that end at the same checkpoint, and where their weights went from there."""

    prefix_end: int
    horizons: Tensor
    """(J,) float32"""
    seen: Observed
    """What the prefixes show of (N, m) weights."""
    forecast: Tensor
    """Displacements from theta_h that the Transformer forecasts, (N, J, m)."""
    truth: Tensor
    """The true ones, (N, J, m)."""
    distance: Tensor
    """|theta_{h+n} - theta_0|, (N, J)."""
    count: Tensor
    """How many weights each sampled one stands for, (m,)."""

    def errors(
        self, refiner: Refiner, trials: Tensor, horizon: Tensor, columns: Tensor | slice = slice(None)
    ) -> Tensor:
        """Return |refined - truth| / |truth - theta_0| (B,) for trials (B,) at horizons (B,), both given as indices."""
        batch = self.batch(refiner, trials, horizon, columns)
        answers = torch.from_numpy(refiner.engine().answer(refiner.flat(), *batch.inputs()))[:, 0]
        errors: Tensor = torch.linalg.vector_norm(batch.gain * answers + batch.offset, dim=-1)
        return errors

    def batch(self, refiner: Refiner, trials: Tensor, horizon: Tensor, columns: Tensor | slice) -> "Batch":
        """Return what the engine needs for these errors."""
        seen = self.seen.take((trials[:, None], columns) if isinstance(columns, Tensor) else trials)
        forecast, truth = (x[trials, horizon][:, columns] for x in (self.forecast, self.truth))
        count, steps = self.count[columns], self.horizons[horizon]
        share = self.count.sum() / count.sum()  # of a sample of the sample
        weight = (count * share).sqrt() / self.distance[trials, horizon][:, None]
        return Batch(
            seen,
            forecast / seen.unit,
            refiner.place(self.prefix_end, steps),
            gain=weight * seen.scale * growth_of(self.prefix_end, steps)[:, None],
            offset=weight * (forecast - truth),
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """Weights (B, m) of B runs, each at one horizon: a run's error is |gain answer + offset| over its weights."""

    seen: Observed
    forecast: Tensor
    """(B, m), over `seen.unit`."""
    place: Tensor
    """(B, 3)"""
    gain: Tensor
    offset: Tensor

    def inputs(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return features, kinds, forecasts and places as the engine reads them."""
        tensors = (self.seen.features, self.seen.kind, self.forecast[:, None], self.place[:, None])
        features, kinds, forecasts, places = (tensor.contiguous().numpy() for tensor in tensors)
        return features, kinds, forecasts, places


def load_examples(
    source: Source, trials: Sequence[int], forecaster: Forecaster, prefix_ends: Sequence[int], seed: int
) -> list[RefinerExamples]:
    """Return the examples of some trials of a store, one list entry for each prefix end."""
    layout = source.store.policy
    sampled, counts = sample_weights(layout, np.random.default_rng(seed))
    columns = torch.from_numpy(sampled)
    horizons = [_horizons(end, source.num_checkpoints) for end in prefix_ends]
    rows: list[list[tuple[Observed, Tensor, Tensor, Tensor]]] = [[] for _ in prefix_ends]
    for trial in trials:
        weights = source.path(trial)
        prefixes, farthest = [weights[: end + 1] for end in prefix_ends], [int(n[-1]) for n in horizons]
        forecasts = forecaster.forecast(prefixes, farthest, layout=layout)
        for i, (end, forecast) in enumerate(zip(prefix_ends, forecasts, strict=True)):
            future = weights[end + horizons[i]]  # (J, p)
            rows[i].append(
                (
                    Observed.of(weights[: end + 1], layout).take(columns),
                    torch.from_numpy((forecast.in_basis(horizons[i]) - weights[end])[:, sampled]),
                    torch.from_numpy((future - weights[end])[:, sampled]),
                    torch.from_numpy(np.linalg.norm(future - weights[0], axis=1)),
                )
            )
    return [
        RefinerExamples(
            prefix_end=end,
            horizons=torch.from_numpy(horizons[i]).float(),
            seen=Observed.stack([row[0] for row in rows[i]]),
            forecast=torch.stack([row[1] for row in rows[i]]),
            truth=torch.stack([row[2] for row in rows[i]]),
            distance=torch.stack([row[3] for row in rows[i]]),
            count=torch.from_numpy(counts),
        )
        for i, end in enumerate(prefix_ends)
    ]


def _horizons(prefix_end: int, num_checkpoints: int) -> NDArray[np.int64]:
    left = num_checkpoints - 1 - prefix_end
    return np.array([max(1, round(share * left)) for share in HORIZONS])


@dataclasses.dataclass(frozen=True)
class Refined:
    """The refiner that did best on the validation trials."""

    refiner: Refiner
    error: float
    """Mean relative weight error at the end of the validation trials' paths, over prefixes."""
    unrefined_error: float
    """The same error for the Transformer alone."""


def train_refiner(
    forecaster: Forecaster,
    sources: Sequence[Source],
    judged: Sequence[int],
    config: TrainConfig,
    *,
    progress: bool = True,
    saved: SavedState | None = None,
) -> Refined | None:
    """Return a refiner for the forecasts of `forecaster`, validated at the prefix ends `judged`; None for no steps.

    Each step learns from random trials of one store at one prefix end, at random horizons. With `saved`, training saves
    its state there, and goes on from a state that is already there.
    """
    if config.refine_steps == 0:
        return None
    num_checkpoints = sources[0].num_checkpoints
    last = num_checkpoints - 2
    spread = np.linspace(max(MIN_PREFIX_END, num_checkpoints // 10), last, NUM_PREFIXES).round().astype(int)
    ends = sorted({*spread.tolist(), *judged})
    training, validation = [], []
    trials_of = [source.learned(config) for source in sources]
    with progress_bar(progress) as bar:
        task = bar.add_task("forecast training trials", total=sum(len(it) for it, _ in trials_of), note="")
        for source, (taught, choosing) in zip(sources, trials_of, strict=True):
            training += load_examples(source, taught[:MAX_TRIALS], forecaster, ends, config.seed)
            validation += load_examples(source, choosing, forecaster, judged, config.seed)
            bar.advance(task, len(taught))
    training_run = _RefinerTraining(training, validation, config, num_checkpoints)
    state = None if saved is None else saved.load()
    if state is not None:
        training_run.set_state(*state)
    with progress_bar(progress) as bar:
        task = bar.add_task("refine", total=config.refine_steps, completed=training_run.step_count, note="")
        while training_run.step_count < config.refine_steps:
            note = training_run.step()
            bar.advance(task)
            if note is not None:
                bar.update(task, note=note)
            if saved is not None:
                saved.save_if_due(training_run.state)
    return training_run.best


class _RefinerTraining:
    """AdamW with one cycle of the learning rate, an average of the weights, and the validation that chooses."""

    def __init__(
        self,
        training: Sequence[RefinerExamples],
        validation: Sequence[RefinerExamples],
        config: TrainConfig,
        num_checkpoints: int,
    ) -> None:
        self.training, self.validation, self.num_steps = training, validation, config.refine_steps
        self.generator = torch.Generator().manual_seed(config.seed)
        self.refiner = Refiner(config.d_refine, num_checkpoints)
        self.engine = self.refiner.engine(_core.available_cpus())
        self.average = copy.deepcopy(self.refiner).eval()
        self.optimizer = torch.optim.AdamW(self.refiner.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=config.refine_steps
        )
        unrefined = _validation_error(self.average, validation)
        self.best = Refined(copy.deepcopy(self.average), unrefined, unrefined)
        self.step_count = 0

    def step(self) -> str | None:
        """Take one optimiser step; after each twentieth of all steps return what validation says, else None."""
        examples = self.training[int(self._draw(len(self.training)))]
        num_trials, num_weights = len(examples.distance), len(examples.count)
        batch = examples.batch(
            self.refiner,
            self._draw(num_trials, BATCH_SIZE),
            self._draw(len(HORIZONS), BATCH_SIZE),
            self._draw(num_weights, min(BATCH_WEIGHTS, num_weights)),
        )
        _, grad = self.engine.loss(self.refiner.flat(), *batch.inputs(), batch.gain.numpy(), batch.offset.numpy())
        set_gradient(self.refiner, torch.from_numpy(grad))
        self.step_count += 1
        take_step(self.refiner, self.average, self.optimizer, self.schedule, self.step_count, ema_decay=EMA_DECAY)
        if self.step_count % max(1, self.num_steps // 20) and self.step_count != self.num_steps:
            return None
        error = _validation_error(self.average, self.validation)
        if error < self.best.error:
            self.best = dataclasses.replace(self.best, refiner=copy.deepcopy(self.average), error=error)
        return f"validation error {error:.3f}, best {self.best.error:.3f}, unrefined {self.best.unrefined_error:.3f}"

    def _draw(self, high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=self.generator)

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return everything that training needs to go on from here, as arrays and plain JSON."""
        arrays, record = pack(self._modules(), self.optimizer, [self.generator])
        return arrays, record | {"step": self.step_count, "best_error": self.best.error}

    def set_state(self, arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> None:
        """Go on from a state of a training with the same settings."""
        self.step_count = record["step"]
        unpack(arrays, record, self._modules(), self.optimizer, self.schedule, [self.generator])
        self.best = dataclasses.replace(self.best, error=record["best_error"])

    def _modules(self) -> dict[str, nn.Module]:
        return {"refiner": self.refiner, "average": self.average, "best": self.best.refiner}


@torch.inference_mode()
def _validation_error(refiner: Refiner, validation: Sequence[RefinerExamples]) -> float:
    errors = []
    for examples in validation:
        trials = torch.arange(len(examples.distance))
        errors.append(examples.errors(refiner, trials, torch.full_like(trials, len(HORIZONS) - 1)).mean().item())
    return float(np.mean(errors))
