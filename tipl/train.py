"""Train the forecaster on the canonical coordinates of many trials, and stop where unseen trials say so.

Shapes  N trials, P prefixes a trial, B batch, T checkpoints, k = n_components, h = prefix_end.

Trials are split whole: *training* trials teach, *validation* trials choose when to stop, *held-out* trials are never
read here at all; `evaluate` judges on them.
"""

import copy
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from tipl.basis import MIN_PREFIX_END, Basis, Centre, prefix_coordinates, prefix_rank, trajectory_gram
from tipl.decoder import Decoder
from tipl.model import ModelConfig, TrajectoryTransformer, save_model
from tipl.progress import progress_bar
from tipl.store import Store, write_atomically


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
    steps: int = 600
    """Optimiser steps at most."""
    teacher_forced: float = 0.25
    """Share of the steps that learn one-step predictions of true paths; the rest learn from the model's rollouts."""
    batch_size: int = 32
    """Trajectories a step, each cut at a random prefix of a random training trial."""
    learning_rate: float = 1e-3
    """Peak of a cosine schedule with 10 % warm-up."""
    weight_decay: float = 0.5
    dropout: float = 0.3
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
    """bfloat16 runs matrix products under autocast: worth it for a large model on a GPU, not for this one on a CPU."""
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_components", "n_layer", "n_head", "d_model", "steps", "batch_size", "max_prefixes"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("validation_fraction", "heldout_fraction", "flip_probability"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"TrainConfig: {name} must lie in [0, 1), got {getattr(self, name)}")


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


@dataclasses.dataclass(frozen=True)
class Examples:
    """Trajectories in coordinates, each with the prefix that it is to be continued from."""

    coordinates: Tensor
    """(N, P, T, k) float32, less the centre; P = 1 where the coordinates do not depend on the prefix."""
    prefix_ends: Tensor
    """(P',) int64, the indices h."""
    filled: Tensor
    """(P', k) float32, one where a prefix of that length spans the coordinate and zero where it is padding."""
    norms: Tensor
    """(N, P') float32, |theta_T - theta_0| in the unit of the coordinates: what an error is relative to."""
    centre: Centre
    """The mean path over the N trials, weighted as the loss weighs them."""

    @classmethod
    def of_prefixes(cls, grams: Sequence[NDArray[np.float64]], ends: Sequence[int], n_components: int) -> "Examples":
        """Return every trial in the basis of each of its prefixes."""
        paths = np.array([[prefix_coordinates(gram, end, n_components) for end in ends] for gram in grams])
        norms = np.array([[np.sqrt(gram[-1, -1] / gram[end, end]) for end in ends] for gram in grams])
        filled = [[float(j < prefix_rank(end, n_components)) for j in range(n_components)] for end in ends]
        return cls._centred(paths, np.array(ends), torch.tensor(filled), norms)

    @classmethod
    def of_paths(cls, paths: NDArray[np.float32], norms: NDArray[np.float64], ends: Sequence[int]) -> "Examples":
        """Return every trial (N, T, k) in one shared basis."""
        filled = torch.ones(len(ends), paths.shape[-1])
        return cls._centred(paths[:, None], np.array(ends), filled, np.repeat(norms[:, None], len(ends), 1))

    @classmethod
    def _centred(
        cls, paths: NDArray[np.float32], ends: NDArray[np.int64], filled: Tensor, norms: NDArray[np.float64]
    ) -> "Examples":
        # The constant path with the least relative loss: a mean that counts a trial the less the farther it goes.
        shares = norms[:, : paths.shape[1]] ** -2.0  # (N, P)
        shares /= shares.sum(0)
        mean = np.einsum("np,nptk->ptk", shares, paths, dtype=np.float64).astype(np.float32)  # (P, T, k)
        centre = Centre(ends if len(mean) > 1 else ends[:1], mean)
        coordinates = torch.from_numpy(paths - mean)
        return cls(coordinates, torch.from_numpy(ends), filled, torch.from_numpy(norms).float(), centre)

    def sample(self, config: "TrainConfig", generator: torch.Generator) -> "Batch":
        """Return random trajectories that share one random prefix end."""
        prefix = int(torch.randint(len(self.prefix_ends), (), generator=generator))
        row = prefix if self.coordinates.shape[1] > 1 else 0
        trial = torch.randint(len(self.coordinates), (2, config.batch_size), generator=generator)
        x, norms = self.coordinates[trial, row], self.norms[trial, prefix]  # (2, B, T, k), (2, B)
        if config.mixing > 0.0:
            share = torch.from_numpy(self._beta(config, generator))
            x, norms = torch.lerp(x[0], x[1], share[:, None, None]), torch.lerp(norms[0], norms[1], share)
        else:
            x, norms = x[0], norms[0]
        flip = torch.rand(config.batch_size, 1, x.shape[-1], generator=generator) < config.flip_probability
        return Batch(torch.where(flip, -x, x), int(self.prefix_ends[prefix]), self.filled[prefix], norms)

    @staticmethod
    def _beta(config: "TrainConfig", generator: torch.Generator) -> NDArray[np.float32]:
        """Return shares (B,) from Beta(mixing, mixing); torch's own sampler takes no generator."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return np.random.default_rng(seed).beta(config.mixing, config.mixing, config.batch_size).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples of one optimiser step, all with the same prefix end."""

    x: Tensor
    """(B, T, k) coordinates."""
    prefix_end: int
    filled: Tensor
    """(k,)"""
    norms: Tensor
    """(B,)"""

    def to(self, device: str) -> "Batch":
        return Batch(self.x.to(device), self.prefix_end, self.filled.to(device), self.norms.to(device))


class Validation:
    """The relative weight error at the end of the path, over validation trials and prefixes, by native rollouts."""

    PREFIXES = (0.2, 0.4, 0.6, 0.8)

    def __init__(self, num_checkpoints: int) -> None:
        self.prefix_ends = sorted(
            {max(MIN_PREFIX_END, prefix_end_of(fraction, num_checkpoints)) for fraction in self.PREFIXES}
        )
        self.cases: list[tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]] = []

    def add(self, paths: NDArray[np.float32], outside: NDArray[np.float64], norms: NDArray[np.float64]) -> None:
        """Add the paths (N, T, k), less the centre, of the next prefix end.

        `outside` (N,) is the length of the final displacement outside the basis, `norms` (N,) its whole length, both in
        the unit of the coordinates.
        """
        self.cases.append((paths, outside, norms))

    def error(self, model: TrajectoryTransformer) -> float:
        """Return the mean of |forecast - truth| / |truth - theta_0| at the last checkpoint."""
        errors = []
        for prefix_end, (paths, outside, norms) in zip(self.prefix_ends, self.cases, strict=True):
            decoder = Decoder.from_model(model, batch_size=len(paths), max_len=paths.shape[1])
            decoder.prefill(np.ascontiguousarray(paths[:, : prefix_end + 1]))
            final = decoder.generate(paths.shape[1] - 1 - prefix_end)[:, -1]  # (N, k)
            errors.append(np.hypot(np.linalg.norm(final - paths[:, -1], axis=1), outside) / norms)
        return float(np.mean(errors))


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Everything that training reads, made from the store once."""

    examples: Examples
    validation: Validation
    shared_basis: Basis | None


def load_training_data(store: Store, split: Split, config: TrainConfig) -> TrainingData:
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
    validation = Validation(num_checkpoints)
    spread = np.linspace(MIN_PREFIX_END, last, config.max_prefixes).round().astype(int)
    ends = sorted({*spread.tolist(), *validation.prefix_ends})
    if config.basis == "shared":
        basis = Basis.from_trials([store.trial(i) for i in split.train], config.n_components, seed=config.seed)
        weights = [store.trial(i).weights() for i in split.train]
        norms = np.array([_final_distance(w) for w in weights]) / basis.scale
        examples = Examples.of_paths(np.array([basis.encode(w) for w in weights]), norms, ends)
        weights = [store.trial(i).weights() for i in split.validation]
        paths = np.array([basis.encode(w) for w in weights])
        outside = np.array([basis.residual(w[-1:])[0] for w in weights]) / basis.scale
        norms = np.array([_final_distance(w) for w in weights]) / basis.scale
        for prefix_end in validation.prefix_ends:
            validation.add(paths - examples.centre.at(prefix_end), outside, norms)
        return TrainingData(examples, validation, basis)
    grams = [trajectory_gram(store.trial(i).weights()) for i in split.train]
    examples = Examples.of_prefixes(grams, ends, config.n_components)
    grams = [trajectory_gram(store.trial(i).weights()) for i in split.validation]
    for prefix_end in validation.prefix_ends:
        paths = np.array([prefix_coordinates(gram, prefix_end, config.n_components) for gram in grams])
        norms = np.array([np.sqrt(gram[-1, -1] / gram[prefix_end, prefix_end]) for gram in grams])
        inside = np.linalg.norm(paths[:, -1].astype(np.float64), axis=1)
        outside = np.sqrt(np.maximum(norms**2 - inside**2, 0.0))
        validation.add(paths - examples.centre.at(prefix_end), outside, norms)
    return TrainingData(examples, validation, None)


def _final_distance(weights: NDArray[np.float32]) -> float:
    """Return |theta_T - theta_0| of a trajectory (T, p)."""
    return float(np.linalg.norm(weights[-1].astype(np.float64) - weights[0]))


def loss_of(model: TrajectoryTransformer, batch: Batch, noise: Tensor, *, teacher_forced: bool) -> Tensor:
    """Return the mean squared error relative to how far the paths go.

    noise (B, T, k) is added to what the model observes. Teacher-forced: one-step predictions from the true path, the
    future weighted ten times the past, which is a milder lesson of the same kind. Otherwise the model continues the
    prefix by its own predictions to the end of the path, as it will be used, and gradients flow through all of it.
    Coordinates that the prefix cannot span are padding and count nothing.
    """
    x, h = batch.x, batch.prefix_end
    if not teacher_forced:
        noise = noise.clone()
        noise[:, h] = 0.0  # where the forecast starts from
    observed = (x + noise) * batch.filled
    relative = batch.filled / batch.norms[:, None, None] ** 2  # (B, 1, k)
    error: Tensor
    if teacher_forced:
        prefix_end = torch.full((len(x),), h, device=x.device)
        error = (model(observed[:, :-1], prefix_end) - x[:, 1:]) ** 2 * relative  # (B, T-1, k)
        weight = torch.where(torch.arange(x.shape[1] - 1, device=x.device) >= h, 1.0, 0.1)
        return (error * weight[:, None]).sum() / (len(x) * weight.sum())
    future = x[:, h + 1 :]
    error = (model.unroll(observed[:, : h + 1], future.shape[1]) - future) ** 2 * relative
    return error.sum() / (len(x) * future.shape[1])


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
        """Take one optimiser step and return its loss."""
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
        return float(loss.detach())

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


def train(store: Store, output: Path, config: TrainConfig = TrainConfig(), *, progress: bool = True) -> Path:
    """Train a forecaster on `store` and write it to the folder `output`; return `output`.

    Writes model.safetensors, centre.safetensors, config.json (sizes, the split, the training settings), training.json
    (curves), TensorBoard events in tb/ and, for a shared basis, basis.safetensors.

    Raises FileExistsError where `output` exists, ValueError where the store has too few trials or checkpoints.
    """
    if output.exists():
        raise FileExistsError(f"train: output {output} exists already; choose another folder or remove it")
    split = split_trials(store.num_trials, config)
    data = load_training_data(store, split, config)
    started = time.perf_counter()
    with torch.random.fork_rng():  # the caller's random numbers go on as if nothing had been trained
        torch.manual_seed(config.seed)
        trainer = Trainer(data, config)
        curve = _fit(trainer, output / "tb", progress)
    model = trainer.average.cpu()
    model.load_state_dict(trainer.best.state)
    if data.shared_basis is not None:
        data.shared_basis.save(output / "basis.safetensors")
    data.examples.centre.save(output / "centre.safetensors")
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
    with SummaryWriter(str(events)) as writer, progress_bar(progress) as bar:
        task = bar.add_task("train", total=steps, note="")
        for step in range(1, steps + 1):
            loss = trainer.step()
            writer.add_scalar("losses/train", loss, step)
            bar.update(task, advance=1)
            if step % every and step != steps:
                continue
            error = trainer.validate()
            writer.add_scalar("losses/validation_relative_weight_error", error, step)
            for name, value in zip(curve, (step, loss, error), strict=True):
                curve[name].append(value)
            bar.update(task, note=f"validation error {error:.3f}, best {trainer.best.error:.3f}")
            if step - trainer.best.step >= patience * every:
                break
    return curve
