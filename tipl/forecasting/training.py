"""Train the forecaster: the Transformer on canonical coordinates, then the refiner on what it forecasts.

Shapes  B batch, T checkpoints, k = n_components, h = prefix_end.

`training_data` says what the networks learn from, `sources` how trials are split. Validation trials choose when both
networks stop.
"""

import contextlib
import copy
import dataclasses
import importlib.metadata
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tipl import _core
from tipl.cluster import connected
from tipl.collecting.curves import EventFile
from tipl.files.locations import write_atomically
from tipl.files.publishing import published, remove
from tipl.forecasting.calibration import calibrate
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.refiner_training import train_refiner
from tipl.forecasting.rollout_gradient import RolloutGradient
from tipl.forecasting.sources import Source, warn_if_unfinished
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training_data import Batch, Draws, TrainingData, load_training_data
from tipl.forecasting.training_state import SavedState, pack, part_of, take_step, unpack
from tipl.forecasting.transformer import ModelConfig, TrajectoryTransformer
from tipl.progress import progress_bar
from tipl.storing.store import Store
from tipl.threads import torch_threads


def loss_of(
    model: TrajectoryTransformer | RolloutGradient, batch: Batch, noise: Tensor, *, teacher_forced: bool
) -> Tensor:
    """Return the mean relative weight error of the model's rollouts, which is what `evaluate` reports.

    noise (B, T, k) is added to what the model observes of the past. The model continues the prefix by its own
    predictions to the end of the path, as it will be used, and gradients flow through the whole rollout.

    If teacher-forced, the loss is the squared error of one-step predictions from the true path, with ten times the
    weight on the future: an easier lesson to begin with. Coordinates that the prefix cannot span are padding and count
    nothing.
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


def is_native(config: TrainConfig) -> bool:
    """Return whether the engine computes the Transformer's gradients, and torch only small things beside it."""
    return config.device == "cpu" and config.precision == "float32"


class Trainer:
    """AdamW with a cosine schedule, an average of the weights, and the validation that chooses among them.

    Initial weights come from torch's global generator, examples, noise and what dropout drops from the trainer's own
    (dropout under torch's autograd, on another device than the CPU or in bfloat16, from the global one). On
    another device than the CPU, a step moves nothing there or back, and does not wait for the device.
    """

    VALIDATIONS = 20

    def __init__(
        self,
        data: TrainingData,
        config: TrainConfig,
        architecture: type[TrajectoryTransformer] = TrajectoryTransformer,
        *,
        num_threads: int | None = None,
    ) -> None:
        self.config = config
        self.data = data
        self.draws = Draws(config)
        self.examples = data.examples.to(config.device)
        self.model = architecture(
            ModelConfig(
                n_components=data.examples.coordinates.shape[3],
                n_layer=config.n_layer,
                n_head=config.n_head,
                d_model=config.d_model,
                d_ff=4 * config.d_model,
                max_len=data.examples.coordinates.shape[2],
                dropout=config.dropout,
            )
        ).to(config.device)
        self.average = copy.deepcopy(self.model).eval()
        self.rollouts = self._rollouts(num_threads)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=config.device == "cpu",  # one call for all parameters, which elsewhere torch has anyway
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._share_of_peak)
        self.best = Best(0, float("inf"), copy.deepcopy(self.average.state_dict()))
        self.step_count = 0

    def step(self) -> Tensor:
        """Take one optimiser step; return its relative error (), where it was computed: one step ahead while
        teacher-forced, later of rollouts."""
        config = self.config
        batch = self.examples.sample(config, self.draws)
        noise = config.noise * self.draws.normal(batch.x.shape)
        teacher_forced = self.step_count < config.teacher_forced * config.steps
        self.model.train()
        in_bfloat16 = config.precision == "bfloat16"
        with torch.autocast(self.device_type, torch.bfloat16) if in_bfloat16 else contextlib.nullcontext():
            loss = self.loss(batch, noise, teacher_forced=teacher_forced)
        self.step_count += 1
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        take_step(self.model, self.average, self.optimizer, self.schedule, self.step_count, ema_decay=config.ema_decay)
        return loss.detach().sqrt() if teacher_forced else loss.detach()

    @property
    def device_type(self) -> str:
        return torch.device(self.config.device).type

    def loss(self, batch: Batch, noise: Tensor, *, teacher_forced: bool) -> Tensor:
        return loss_of(self.rollouts, batch, noise, teacher_forced=teacher_forced)

    def _rollouts(self, num_threads: int | None) -> TrajectoryTransformer | RolloutGradient:
        """Return what the loss asks for predictions: on the CPU the engine, which knows this one architecture."""
        if not is_native(self.config) or type(self.model) is not TrajectoryTransformer:
            return self.model
        return RolloutGradient(
            self.model,
            batch_size=self.config.batch_size,
            num_tokens=self.model.config.max_len,
            generator=self.draws.on_host,
            num_threads=num_threads,
        )

    def _share_of_peak(self, step: int) -> float:
        """Return the learning rate of `step` as a share of its peak: 10 % warm-up, then half a cosine to zero."""
        progress = step / self.config.steps
        return min(1.0, (progress + 1 / self.config.steps) / 0.1) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return everything that training needs to go on from here, as arrays and plain JSON."""
        modules: dict[str, nn.Module | Mapping[str, Tensor]] = {
            "model": self.model,
            "average": self.average,
            "best": self.best.state,
        }
        arrays, record = pack(modules, self.optimizer, [self.draws.on_host])
        return arrays, record | {
            "step": self.step_count,
            "best_step": self.best.step,
            "best_error": self.best.error if math.isfinite(self.best.error) else None,
        }

    def set_state(self, arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any]) -> None:
        """Go on from a state of a trainer with the same settings."""
        modules: dict[str, nn.Module] = {"model": self.model, "average": self.average}
        self.step_count = record["step"]
        unpack(arrays, record, modules, self.optimizer, self.schedule, [self.draws.on_host])
        best = {name: torch.from_numpy(array.copy()) for name, array in part_of(arrays, "best").items()}
        error = math.inf if record["best_error"] is None else record["best_error"]
        self.best = Best(record["best_step"], error, best)

    def validate(self) -> float:
        """Return the validation error of the averaged weights, and keep them if they are the best so far."""
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
    store: Store | Sequence[Store],
    output: str | Path,
    config: TrainConfig = TrainConfig(),
    *,
    num_threads: int | None = None,
    ray: str | None = None,
    progress: bool = True,
) -> Path:
    """Train a forecaster on a store, or on several of any tasks, write it to the folder `output`, and return `output`.

    The folder holds model.safetensors, centre.safetensors, refiner.safetensors, config.json (sizes, splits, training
    settings), training.json (curves), TensorBoard events in tb/ and manifest.json (checksums of all files); where the
    simulator can run the policies, confidence.safetensors and strides.safetensors; and for a
    shared basis basis.safetensors, which with `ray` is fitted on the Ray cluster at that address ("local" starts one).

    On the CPU it computes on `num_threads` cores, by default all. After an interruption the same call goes on there
    and gives the same bits if stores and versions are the same, with any number of threads (in bfloat16, with the same
    number of torch's). Otherwise it starts again.

    Of an unfinished collection the checkpoints that are there are used, with a warning.

    Raises FileExistsError where `output` exists; OutputInUse where another process is making it; ValueError where a
    store has too few trials or checkpoints, or paths have different lengths.
    """
    output = Path(output)
    if ray is not None and config.basis != "shared":
        raise ValueError(f"train: ray is for fitting a shared basis, but basis is {config.basis!r}")
    with published(output, "train", manifest=False, resumable=True) as aside:
        stores = [store] if isinstance(store, Store) else store
        for it in stores:
            warn_if_unfinished("train", it)
        sources = [Source.of(it, config) for it in stores]
        if not sources:
            raise ValueError("train: store must be a store or several, got none")
        _refuse_repeated(stores)
        forecaster, summary = _trained(sources, config, aside, num_threads=num_threads, ray=ray, progress=progress)
        write_atomically(aside / "training.json", (json.dumps(summary) + "\n").encode())
        forecaster.save(aside)
    return output


def _trained(
    sources: Sequence[Source],
    config: TrainConfig,
    folder: Path,
    *,
    num_threads: int | None,
    ray: str | None,
    progress: bool,
) -> tuple[Forecaster, dict[str, Any]]:
    """Return the forecaster and the content of training.json; the states of training are saved in `folder`."""
    with contextlib.nullcontext() if ray is None else connected(ray) as cluster:
        data = load_training_data(sources, config, cluster)
    started = time.perf_counter()
    # A GPU's random numbers and sums do not repeat, and training there is quicker: no states are saved.
    settings, states = _settings(sources, config), folder if config.device == "cpu" else None
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():  # left by a call that was interrupted, perhaps with other settings
        if path.name != "tb" and not SavedState.is_one(path):
            remove(path)
    transformer, refining = (SavedState(states, part, settings) for part in ("transformer", "refiner"))
    threads = torch_threads(1) if is_native(config) else contextlib.nullcontext()
    with threads, torch.random.fork_rng():  # training does not change the caller's random numbers
        torch.manual_seed(config.seed)
        trainer = Trainer(data, config, num_threads=num_threads)
        curve = fit(trainer, folder / "tb", progress, transformer)
        model = trainer.average.cpu()
        model.load_state_dict(trainer.best.state)
        centre = data.examples.centre
        judged = [case.prefix_end for case in data.validation.cases]
        trust = np.interp(centre.ends, judged, data.validation.trust(model))
        forecaster = Forecaster(model, data.shared_basis, dataclasses.replace(centre, trust=trust))
        refined = train_refiner(forecaster, sources, judged, config, progress=progress, saved=refining)
    parts: list[nn.Module] = [model]
    if refined is not None:
        forecaster = dataclasses.replace(forecaster, refiner=refined.refiner)
        parts.append(refined.refiner)
    calibration = calibrate(forecaster, sources, config, num_threads=num_threads, progress=progress)
    if calibration is not None:
        forecaster = dataclasses.replace(forecaster, **vars(calibration))
    transformer.remove()
    refining.remove()
    summary: dict[str, Any] = {
        **curve,
        "seconds": time.perf_counter() - started,
        "num_parameters": sum(parameter.numel() for part in parts for parameter in part.parameters()),
        "best_step": trainer.best.step,
        "best_error": trainer.best.error,
    }
    if refined is not None:
        summary |= {"refined_error": refined.error, "unrefined_error": refined.unrefined_error}
    return dataclasses.replace(forecaster, config=_record_of(sources, config)), summary


def _refuse_repeated(stores: Sequence[Store]) -> None:
    """Raise ValueError where two stores hold the same: what one of them holds out, the other might teach."""
    for one, other in itertools.combinations(stores, 2):
        if one.digest == other.digest and one.fingerprint() == other.fingerprint():
            raise ValueError(f"train: the stores {one.path} and {other.path} hold the same runs: give one of them")


def _record_of(sources: Sequence[Source], config: TrainConfig) -> dict[str, Any]:
    """Return what a model folder's config.json says of its training."""
    stores = [
        {
            "env_id": source.store.env_id,
            "policy": source.store.policy.to_dict(),
            "seeds": source.store.seeds,
            "split": dataclasses.asdict(source.split),
            **({} if config.num_checkpoints is None else {"path_length": source.path_length}),
        }
        for source in sources
    ]
    return {"stores": stores, "num_checkpoints": sources[0].num_checkpoints, "train": dataclasses.asdict(config)}


def _settings(sources: Sequence[Source], config: TrainConfig) -> dict[str, Any]:
    """Return what decides the bits of a training, as plain JSON."""
    return {
        "train": dataclasses.asdict(config),
        "stores": [source.store.fingerprint() for source in sources],
        "versions": {name: importlib.metadata.version(name) for name in ("tipl", "torch", "numpy")},
        "cpu": [
            torch.backends.cpu.get_cpu_capability(),
            _core.isa(),
            1 if is_native(config) else torch.get_num_threads(),
        ],
    }


def fit(trainer: Trainer, events: Path, progress: bool, saved: SavedState | None = None) -> dict[str, list[float]]:
    """Train until the last step or until validation has had enough; return the curves for training.json.

    TensorBoard's events go to the folder `events`; what did best is in `trainer.best`. With `saved`, states are kept
    there, and training goes on from the one that is there.
    """
    steps, patience = trainer.config.steps, trainer.config.patience
    curve: dict[str, list[float]] = {"steps": [], "train_loss": [], "validation_error": []}
    every = max(1, steps // Trainer.VALIDATIONS)
    since_validation: list[float] = []
    state = None if saved is None else saved.load()
    if state is None:
        remove(events)  # of other settings
    else:
        trainer.set_state(*state)
        curve, since_validation = state[1]["curve"], state[1]["since_validation"]
    file: EventFile | None = EventFile(events, trainer.step_count + 1)

    def whole_state() -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        arrays, record = trainer.state()
        return arrays, record | {"curve": curve, "since_validation": since_validation}

    unread: list[Tensor] = []  # errors of steps

    with progress_bar(progress) as bar:
        task = bar.add_task("train", total=steps, completed=trainer.step_count, note="")
        for step in range(trainer.step_count + 1, steps + 1):
            if step - 1 - trainer.best.step >= patience * every and (step - 1) % every == 0:
                break
            unread.append(trainer.step())
            validates = step % every == 0 or step == steps
            events_of: dict[int, dict[str, float]] = {}
            if validates or trainer.device_type == "cpu":  # elsewhere reading them would wait for the device
                errors = torch.stack(unread).tolist()
                first = step - len(errors) + 1
                events_of = {first + i: {"losses/train_relative_error": error} for i, error in enumerate(errors)}
                since_validation += errors
                unread.clear()
            if validates:
                error = trainer.validate()
                events_of[step]["losses/validation_relative_weight_error"] = error
                for name, value in zip(curve, (step, float(np.mean(since_validation)), error), strict=True):
                    curve[name].append(value)
                since_validation.clear()
                bar.update(task, note=f"validation error {error:.3f}, best {trainer.best.error:.3f}")
            for at, values in events_of.items():
                if file is not None and not file.write(at, values):
                    file = None
            bar.update(task, advance=1)
            if saved is not None:
                saved.save_if_due(whole_state)
    return curve
