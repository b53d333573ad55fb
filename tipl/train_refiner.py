"""Train the refiner: the same trials, prefixes and error as the Transformer's, on a sample of each run's weights.

Shapes  N trials, P prefixes a trial, J horizons a prefix, m sampled weights; k, h, p, T as in `train`.

The sample is the same in all trials of a store, every tensor has its share, and each weight counts for as many as it
stands for, so that the sums over the sample are without bias those over all weights.
"""

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tipl.basis import MIN_PREFIX_END
from tipl.policy import Layout
from tipl.progress import progress_bar
from tipl.refine import Observed, Refiner
from tipl.rollout import Forecaster
from tipl.training_data import Source, TrainConfig

SAMPLE = 1024
"""Weights of a trial that are learned from, about."""
PREFIXES = 10
HORIZONS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
"""Shares of what is left of the path."""
MAX_TRIALS = 256
"""Trials of a store that are learned from: 2 MB each."""
BATCH_SIZE = 16
BATCH_WEIGHTS = 256
"""Weights of each trial in a batch."""
LEARNING_RATE = 3e-3


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
class Examples:
    """Prefixes of N trials of one store, all that end at one checkpoint, and where their weights went."""

    prefix_end: int
    horizons: Tensor
    """(J,) float32"""
    seen: Observed
    """of (N, m) weights"""
    forecast: Tensor
    """(N, J, m), displacements from theta_h that the Transformer forecasts"""
    truth: Tensor
    """(N, J, m), those that came"""
    distance: Tensor
    """(N, J), |theta_{h+n} - theta_0|"""
    count: Tensor
    """(m,)"""

    def errors(
        self, refiner: Refiner, trials: Tensor, horizon: Tensor, columns: Tensor | slice = slice(None)
    ) -> Tensor:
        """Return |refined - truth| / |truth - theta_0| (B,) of trials (B,) at the horizons of index (B,)."""
        seen = self.seen.take(trials).take((slice(None), columns))
        forecast, truth = (x[trials, horizon][:, columns] for x in (self.forecast, self.truth))
        error = (refiner(seen, forecast, self.prefix_end, self.horizons[horizon]) - truth).square()
        count = self.count[columns]
        share = self.count.sum() / count.sum()  # of a sample of the sample
        errors: Tensor = ((error * count).sum(-1) * share + 1e-12).sqrt() / self.distance[trials, horizon]
        return errors


def load_examples(
    source: Source, trials: Sequence[int], forecaster: Forecaster, prefix_ends: Sequence[int], seed: int
) -> list[Examples]:
    """Return the examples of some trials of a store, a list entry a prefix end."""
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
        Examples(
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
    """The same of the Transformer alone."""


def train_refiner(
    forecaster: Forecaster,
    sources: Sequence[Source],
    judged: Sequence[int],
    config: TrainConfig,
    *,
    progress: bool = True,
) -> Refined | None:
    """Return a refiner of what `forecaster` forecasts, judged at the prefix ends `judged`; None for refine_steps = 0.

    Each step learns from random trials of one store at one prefix end, at random horizons.
    """
    if config.refine_steps == 0:
        return None
    num_checkpoints = sources[0].num_checkpoints
    last = num_checkpoints - 2
    spread = np.linspace(max(MIN_PREFIX_END, num_checkpoints // 10), last, PREFIXES).round().astype(int)
    ends = sorted({*spread.tolist(), *judged})
    training, validation = [], []
    trials_of = [source.learned(config) for source in sources]
    with progress_bar(progress) as bar:
        task = bar.add_task("forecast training trials", total=sum(len(it) for it, _ in trials_of), note="")
        for source, (taught, choosing) in zip(sources, trials_of, strict=True):
            training += load_examples(source, taught[:MAX_TRIALS], forecaster, ends, config.seed)
            validation += load_examples(source, choosing, forecaster, judged, config.seed)
            bar.advance(task, len(taught))
    generator = torch.Generator().manual_seed(config.seed)
    refiner = Refiner(config.d_refine, num_checkpoints)
    average = copy.deepcopy(refiner).eval()
    optimizer = torch.optim.AdamW(refiner.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=config.refine_steps)
    unrefined = _validation_error(average, validation)
    best = Refined(copy.deepcopy(average), unrefined, unrefined)
    every = max(1, config.refine_steps // 20)

    def draw(high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=generator)

    with progress_bar(progress) as bar:
        task = bar.add_task("refine", total=config.refine_steps, note="")
        for step in range(1, config.refine_steps + 1):
            examples = training[int(draw(len(training)))]
            num_trials, num_weights = len(examples.distance), len(examples.count)
            loss = examples.errors(
                refiner,
                draw(num_trials, BATCH_SIZE),
                draw(len(HORIZONS), BATCH_SIZE),
                draw(num_weights, min(BATCH_WEIGHTS, num_weights)),
            ).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(refiner.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                decay = min(0.995, step / (step + 10))
                for averaged, current in zip(average.parameters(), refiner.parameters(), strict=True):
                    averaged.lerp_(current, 1.0 - decay)
            bar.advance(task)
            if step % every == 0 or step == config.refine_steps:
                error = _validation_error(average, validation)
                if error < best.error:
                    best = dataclasses.replace(best, refiner=copy.deepcopy(average), error=error)
                bar.update(task, note=f"validation error {error:.3f}, best {best.error:.3f}, unrefined {unrefined:.3f}")
    return best


@torch.inference_mode()
def _validation_error(refiner: Refiner, validation: Sequence[Examples]) -> float:
    errors = []
    for examples in validation:
        trials = torch.arange(len(examples.distance))
        errors.append(examples.errors(refiner, trials, torch.full_like(trials, len(HORIZONS) - 1)).mean().item())
    return float(np.mean(errors))
