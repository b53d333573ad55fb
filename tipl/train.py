"""Train the forecaster on the canonical coordinates of many trials, and stop where unseen trials say so.

Shapes  N trials, P prefixes a trial, B batch, T checkpoints, k = n_components, h = prefix_end.

Trials are split whole: *training* trials teach, *validation* trials choose when to stop, *held-out* trials are never
read here at all; `evaluate` judges on them.
"""

import contextlib
import copy
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from tipl.basis import MIN_PREFIX_END, Basis, Centre, prefix_coordinates, prefix_rank, trajectory_gram
from tipl.cluster import Cluster, connected
from tipl.decoder import continue_paths
from tipl.locations import write_atomically
from tipl.model import ModelConfig, TrajectoryTransformer, save_model
from tipl.progress import progress_bar
from tipl.store import Store


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How the forecaster is trained."""

    basis: Literal["prefix", "shared"] = "prefix"
    """prefix: an SVD of each observed prefix, carries over to new runs. shared: one SVD of the training trials."""
    n_components: int = 16
    """Coordinates of a checkpoint, k."""
    n_layer: int = 2
    n_head: int = 4
    d_model: int = 64
    steps: int = 1200
    """Optimiser steps at most."""
    teacher_forced: float = 0.25
    """Share of the steps that learn one-step predictions of true paths; the rest learn from the model's rollouts."""
    batch_size: int = 32
    """Trajectories a step, each cut at a random prefix of a random training trial."""
    learning_rate: float = 1e-3
    """Peak of a cosine schedule with 10 % warm-up."""
    weight_decay: float = 0.5
    dropout: float = 0.4
    noise: float = 0.0
    """Standard deviation of the noise on the inputs. It helps one-step training; trained on its own rollouts the model
    did not need it on InvertedPendulum (0.03 made it worse)."""
    flip_probability: float = 0.0
    """Share of coordinates whose sign is flipped over a whole trajectory. With 0.5 the model can learn odd functions
    only, which on InvertedPendulum left it at the mean path."""
    mixing: float = 1.0
    """Parameter of the Beta distribution by which two training paths are averaged into one example; 0 for none."""
    ema_decay: float = 0.998
    """The forecaster is the running average of the weights over the last 1 / (1 - ema_decay) steps."""
    patience: int = 8
    """Validations (of 20 in all) without an improvement after which training stops."""
    validation_fraction: float = 0.15
    """Share of the trials that choose when to stop."""
    heldout_fraction: float = 0.2
    """Share of the trials that training never reads."""
    max_prefixes: int = 64
    """Prefixes of a trial that are learned from, spread evenly over the path."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs matrix products under autocast, for GPUs: on two CPU cores it took 1.6 times as long a step as
    float32 at d_model 64 and about as long at 256."""
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_components", "n_layer", "n_head", "d_model", "steps", "batch_size", "patience", "max_prefixes"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("validation_fraction", "heldout_fraction", "flip_probability", "dropout", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"TrainConfig: {name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0.0 <= self.teacher_forced <= 1.0:
            raise ValueError(f"TrainConfig: teacher_forced must lie in [0, 1], got {self.teacher_forced}")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"TrainConfig: learning_rate must be positive and finite, got {self.learning_rate}")
        for name in ("weight_decay", "noise", "mixing"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"TrainConfig: {name} must be finite and not negative, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Split:
    """Which trials teach, which choose, which judge: disjoint trial numbers."""

    train: list[int]
    validation: list[int]
    heldout: list[int]


def split_trials(num_trials: int, config: TrainConfig) -> Split:
    """Split whole trials at random by `config.seed`; at least one on each side.

    Raises ValueError where there are fewer than three trials.
    """
    if num_trials < 3:
        raise ValueError(
            f"train: the store must hold at least 3 trials (training, validation, held out), got {num_trials}"
        )
    order = np.random.default_rng(config.seed).permutation(num_trials)
    num_heldout = min(max(1, round(num_trials * config.heldout_fraction)), num_trials - 2)
    num_validation = min(max(1, round(num_trials * config.validation_fraction)), num_trials - num_heldout - 1)
    heldout, validation, train = np.split(order, [num_heldout, num_heldout + num_validation])
    return Split(sorted(train.tolist()), sorted(validation.tolist()), sorted(heldout.tolist()))


def prefix_end_of(fraction: float, num_checkpoints: int) -> int:
    """Return the index h of the last checkpoint seen when `fraction` of a path 0..T-1 has been walked."""
    return round(fraction * (num_checkpoints - 1))


Written = tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]
"""A trial in a basis: coordinates (T, k) and, in their unit, |theta_t - theta_0| and how far theta_t lies outside."""


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

    def sample(self, config: "TrainConfig", generator: torch.Generator) -> "Batch":
        """Return random trajectories that share one random prefix end."""
        prefix = int(torch.randint(len(self.prefix_ends), (), generator=generator))
        trial = torch.randint(len(self.coordinates), (2, config.batch_size), generator=generator)
        columns = (self.coordinates[trial, prefix], self.distances[trial, prefix], self.outside[trial, prefix])
        if config.mixing > 0.0:
            share = torch.from_numpy(self._beta(config, generator))
            x, distances, outside = (
                torch.lerp(a, b, share.view(-1, *[1] * (a.ndim - 1))) for a, b in columns
            )  # (B, T, k), (B, T), (B, T)
        else:
            x, distances, outside = (a for a, _ in columns)
        flip = torch.rand(config.batch_size, 1, x.shape[-1], generator=generator) < config.flip_probability
        x = torch.where(flip, -x, x)
        return Batch(x, int(self.prefix_ends[prefix]), self.filled[prefix], distances, outside)

    @staticmethod
    def _beta(config: "TrainConfig", generator: torch.Generator) -> NDArray[np.float32]:
        """Return shares (B,) from Beta(mixing, mixing); torch's own sampler takes no generator."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return np.random.default_rng(seed).beta(config.mixing, config.mixing, config.batch_size).astype(np.float32)


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

    def to(self, device: str) -> "Batch":
        x, filled, distances, outside = (y.to(device) for y in (self.x, self.filled, self.distances, self.outside))
        return Batch(x, self.prefix_end, filled, distances, outside)


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
        """Return, a case, the share in [0, 1] of the model's departure from the mean path that errs least.

        Near one where the model knows how these trials go on, zero where it only guesses.
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


def load_training_data(store: Store, split: Split, config: TrainConfig, cluster: Cluster | None = None) -> TrainingData:
    """Read the training and validation trials of `store`, and nothing else of it."""
    num_checkpoints = store.trial(split.train[0]).num_checkpoints
    lengths = {trial: store.trial(trial).num_checkpoints for trial in split.train + split.validation}
    for trial, length in lengths.items():
        if length != num_checkpoints:
            raise ValueError(
                f"train: all trials must hold the same number of checkpoints, trial {split.train[0]} has "
                f"{num_checkpoints}, trial {trial} has {length}"
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
        basis = Basis.from_trials([store.trial(i) for i in split.train], k, seed=config.seed, cluster=cluster)

    def write(trial: int, prefix_ends: Sequence[int]) -> list[Written]:
        """Return a trial in the basis of each prefix."""
        weights = store.trial(trial).weights()
        gram = trajectory_gram(weights)
        if basis is None:
            return [_written(gram, prefix_coordinates(gram, end, k), end) for end in prefix_ends]
        coordinates = basis.encode(weights)
        return [_written(gram, coordinates, end, basis.scale) for end in prefix_ends]

    def rank(prefix_end: int) -> int:
        return k if basis is not None else prefix_rank(prefix_end, k)

    filled = (torch.arange(k) < torch.tensor([rank(end) for end in ends])[:, None]).float()
    examples = Examples.of([write(i, ends) for i in split.train], ends, filled)
    chosen = [write(i, judged) for i in split.validation]
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


def loss_of(model: TrajectoryTransformer, batch: Batch, noise: Tensor, *, teacher_forced: bool) -> Tensor:
    """Return the mean relative weight error of the model's rollouts, which is what `evaluate` reports.

    noise (B, T, k) is added to what the model observes of the past. The model continues the prefix by its own
    predictions to the end of the path, as it will be used, and gradients flow through all of it.

    Teacher-forced: squared errors of one-step predictions from the true path, the future weighted ten times the past,
    a milder lesson of the same kind. Coordinates that the prefix cannot span are padding and count nothing.
    """
    x, h = batch.x, batch.prefix_end
    if teacher_forced:
        observed = (x + noise) * batch.filled
        prefix_end = torch.full((len(x),), h, device=x.device)
        error: Tensor = (
            (model(observed[:, :-1], prefix_end) - x[:, 1:]) * batch.filled / batch.distances[:, -1, None, None]
        )
        weight = torch.where(torch.arange(x.shape[1] - 1, device=x.device) >= h, 1.0, 0.1)
        return (error.square() * weight[:, None]).sum() / (len(x) * weight.sum())
    past = x[:, : h + 1] + F.pad(noise[:, :h], (0, 0, 0, 1))  # the forecast starts from the checkpoint h as it is
    future = x[:, h + 1 :]
    inside = ((model.unroll(past * batch.filled, future.shape[1]) - future) * batch.filled).square().sum(-1)  # (B, n)
    outside, distances = (y[:, h + 1 :] for y in (batch.outside, batch.distances))  # (B, n)
    errors: Tensor = (inside + outside.square() + 1e-12).sqrt() / distances  # a root's slope at 0 is infinite
    return errors.mean()


class Trainer:
    """AdamW with a cosine schedule, an average of the weights, and the validation that chooses among them.

    Initial weights and dropout come from torch's global generator, examples and noise from one of our own.
    """

    VALIDATIONS = 20

    def __init__(self, data: TrainingData, config: TrainConfig) -> None:
        self.config = config
        self.data = data
        self.generator = torch.Generator().manual_seed(config.seed)
        self.model = TrajectoryTransformer(
            ModelConfig(
                n_components=config.n_components,
                n_layer=config.n_layer,
                n_head=config.n_head,
                d_model=config.d_model,
                d_ff=4 * config.d_model,
                max_len=data.examples.coordinates.shape[2],
                dropout=config.dropout,
            )
        ).to(config.device)
        self.average = copy.deepcopy(self.model).eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._share_of_peak)
        self.best = Best(0, float("inf"), copy.deepcopy(self.average.state_dict()))
        self.step_count = 0

    def step(self) -> float:
        """Take one optimiser step; return its relative error, one step ahead while teacher-forced, then of rollouts."""
        config = self.config
        batch = self.data.examples.sample(config, self.generator)
        noise = config.noise * torch.randn(batch.x.shape, generator=self.generator)
        teacher_forced = self.step_count < config.teacher_forced * config.steps
        self.model.train()
        with torch.autocast(config.device, torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = loss_of(self.model, batch.to(config.device), noise.to(config.device), teacher_forced=teacher_forced)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step_count += 1
        with torch.no_grad():
            decay = min(config.ema_decay, self.step_count / (self.step_count + 10))  # soon forget the first weights
            for averaged, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
                averaged.lerp_(current, 1.0 - decay)
        return math.sqrt(loss.item()) if teacher_forced else loss.item()

    def _share_of_peak(self, step: int) -> float:
        """Return the learning rate of `step` as a share of its peak: 10 % warm-up, then half a cosine to zero."""
        progress = step / self.config.steps
        return min(1.0, (progress + 1 / self.config.steps) / 0.1) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def validate(self) -> float:
        """Return the validation error of the averaged weights, and remember them if none were better."""
        error = self.data.validation.error(self.average)
        if error < self.best.error:
            self.best = Best(self.step_count, error, copy.deepcopy(self.average.state_dict()))
        return error


@dataclasses.dataclass(frozen=True)
class Best:
    """The weights that did best in validation."""

    step: int
    error: float
    state: dict[str, Tensor]


def train(
    store: Store,
    output: str | Path,
    config: TrainConfig = TrainConfig(),
    *,
    ray: str | None = None,
    progress: bool = True,
) -> Path:
    """Train a forecaster on `store` and write it to the folder `output`; return `output`.

    Writes model.safetensors, centre.safetensors, config.json (sizes, the split, the training settings), training.json
    (curves), TensorBoard events in tb/ and, for a shared basis, basis.safetensors, which with `ray` is fitted on the
    Ray cluster at that address ("local": one that is started here).

    Raises FileExistsError where `output` exists, ValueError where the store has too few trials or checkpoints.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"train: output {output} exists already; choose another folder or remove it")
    if ray is not None and config.basis != "shared":
        raise ValueError(f"train: ray is for fitting a shared basis, but basis is {config.basis!r}")
    split = split_trials(store.num_trials, config)
    with contextlib.nullcontext() if ray is None else connected(ray) as cluster:
        data = load_training_data(store, split, config, cluster)
    started = time.perf_counter()
    with torch.random.fork_rng():  # the caller's random numbers go on as if nothing had been trained
        torch.manual_seed(config.seed)
        trainer = Trainer(data, config)
        curve = _fit(trainer, output / "tb", progress)
    model = trainer.average.cpu()
    model.load_state_dict(trainer.best.state)
    if data.shared_basis is not None:
        data.shared_basis.save(output / "basis.safetensors")
    centre = data.examples.centre
    judged = [case.prefix_end for case in data.validation.cases]
    trust = np.interp(centre.ends, judged, data.validation.trust(model))
    dataclasses.replace(centre, trust=trust).save(output / "centre.safetensors")
    seconds = time.perf_counter() - started
    extra = {
        "env_id": store.env_id,
        "policy": store.policy.to_dict(),
        "seeds": store.seeds,
        "num_checkpoints": data.examples.coordinates.shape[2],
        "split": dataclasses.asdict(split),
        "train": dataclasses.asdict(config),
    }
    summary = {
        **curve,
        "seconds": seconds,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "best_step": trainer.best.step,
        "best_error": trainer.best.error,
    }
    write_atomically(output / "training.json", (json.dumps(summary) + "\n").encode())
    save_model(model, output, extra)  # last: a folder with a config.json is a whole model
    return output


def _fit(trainer: Trainer, events: Path, progress: bool) -> dict[str, list[float]]:
    """Train until the last step or until validation has had enough; return the curves for training.json."""
    steps, patience = trainer.config.steps, trainer.config.patience
    curve: dict[str, list[float]] = {"steps": [], "train_loss": [], "validation_error": []}
    every = max(1, steps // Trainer.VALIDATIONS)
    since_validation: list[float] = []
    with SummaryWriter(str(events)) as writer, progress_bar(progress) as bar:
        task = bar.add_task("train", total=steps, note="")
        for step in range(1, steps + 1):
            since_validation.append(trainer.step())
            writer.add_scalar("losses/train_relative_error", since_validation[-1], step)
            bar.update(task, advance=1)
            if step % every and step != steps:
                continue
            error = trainer.validate()
            writer.add_scalar("losses/validation_relative_weight_error", error, step)
            for name, value in zip(curve, (step, float(np.mean(since_validation)), error), strict=True):
                curve[name].append(value)
            since_validation.clear()
            bar.update(task, note=f"validation error {error:.3f}, best {trainer.best.error:.3f}")
            if step - trainer.best.step >= patience * every:
                break
    return curve
