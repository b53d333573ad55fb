"""Which way of forecasting a path's coordinates is best? Each is compared with the default, trained on rollouts.

    python studies/compare_forecasters.py runs/tasks/Reacher-v4.zarr ... --output docs/figures/forecasters.svg

All ways are judged in the same prefix bases, on the same held-out trials, by the relative weight error at the end of
the path, without the refiner: they differ only in how they continue the coordinates. Training trials teach; validation
trials choose when training stops and how far a departure from the mean path is trusted, as in `tipl.train`.

*rollouts*   the default: a quarter of the steps with a one-step loss, then a loss on the model's own rollouts of the
             whole path
*one step*   teacher forcing throughout: the loss is on the next checkpoint of the true path
*unmixed*    rollouts, but without training examples that are averages of two paths
*heads*      one head for each horizon reads the prefix's last token; there is no rollout
*spread*     predicts a mean and a standard deviation for each coordinate (Gaussian likelihood, one step); the forecast
             is the mean of sampled rollouts
*return*     the run's return so far is an additional coordinate, observed and predicted
*target*     like *return*, and the return to be reached is another coordinate: in training the trial's own last return,
             clamped to the middle 80 % of the training trials'; for a held-out trial, where it is unknown, the median
*ensemble*   the mean of four *rollouts* models with different initial weights and batches

The JSON beside the figure has every mean error, its ratio to the default's with the 95 % interval of a paired
bootstrap, and for *spread* how often the truth lies in the middle 80 % of the sampled rollouts. The figure shows the
ratios; a table is printed. An interrupted study continues with the tasks that the JSON lacks.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from study import PREFIXES, command_line, interval, write_record
from torch import Tensor, nn
from torch.nn import functional as F

from tipl.forecasting.sources import Source, Split, thin
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training import Trainer, fit
from tipl.forecasting.training_data import Batch, Case, TrainingData, Validation, load_training_data
from tipl.forecasting.transformer import KeyValues, ModelConfig, TrajectoryTransformer
from tipl.progress import progress_bar
from tipl.report.intervals import Bootstrap
from tipl.storing.store import Store
from tipl.subspace.prefix_end import prefix_end_of

NUM_MODELS = 4  # in the ensemble
NUM_SAMPLES = 64  # rollouts that *spread* samples
RETURN_SCALE = 0.1  # scale of a standardised return as a coordinate: large enough to see, a small part of the loss
COVERED = 0.8

Singles = NDArray[np.float32]
Floats = NDArray[np.float64]
Continue = Callable[[Validation], list[Singles]]
"""The last checkpoint's coordinates (N, k) of every case's trials."""


# ---- models that end otherwise than the default


class TorchValidation(Validation):
    """Forecasts by the model's own `unroll`, which is not what the native decoder runs."""

    @torch.inference_mode()
    def forecasts(self, model: TrajectoryTransformer) -> list[Singles]:
        ends = []
        for case in self.cases:
            observed = torch.from_numpy(case.paths[:, : case.prefix_end + 1])
            ends.append(model.unroll(observed, case.paths.shape[1] - 1 - case.prefix_end)[:, -1].numpy())
        return ends


class Heads(TrajectoryTransformer):
    """Every horizon has a head of its own, which reads the prefix's last token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.d_model, config.max_len * config.n_components)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def unroll(self, x: Tensor, horizon: int) -> Tensor:
        B, T, _ = x.shape
        diff = F.pad(x[:, 1:] - x[:, :-1], (0, 0, 1, 0))
        z, _ = self._read(x, diff, torch.arange(T), torch.full((B,), T - 1))
        moved = self.head(z[:, -1]).view(B, self.config.max_len, -1)[:, :horizon]
        ahead: Tensor = x[:, -1:] + self.config.out_scale * moved
        return ahead


class Spread(TrajectoryTransformer):
    """Every prediction has a standard deviation beside it, as large as the mean's step at first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.log_spread = nn.Linear(config.d_model, config.n_components)
        nn.init.zeros_(self.log_spread.weight)
        nn.init.constant_(self.log_spread.bias, -3.0)

    def _read(self, *args: Any) -> tuple[Tensor, list[KeyValues]]:
        self._z, present = super()._read(*args)
        return self._z, present

    def spread(self) -> Tensor:
        """Return that of the predictions that were made last, (B, T, k)."""
        spread: Tensor = self.log_spread(self._z).clamp(-8.0, 2.0).exp()
        return spread

    @torch.inference_mode()
    def sample(self, x: Tensor, horizon: int, generator: torch.Generator) -> Tensor:
        """Return the last coordinates (NUM_SAMPLES, B, k) of sampled rollouts of prefixes (B, h+1, k)."""
        h, shape = x.shape[1] - 1, x[:, -1].shape
        x = x.repeat(NUM_SAMPLES, 1, 1)
        prefix_end = torch.full((len(x),), h)
        diff = F.pad(x[:, 1:] - x[:, :-1], (0, 0, 1, 0))
        mean, past = self._advance(x, diff, torch.arange(h + 1), prefix_end)
        last = x[:, -1:]
        for t in range(h + 1, h + 1 + horizon):
            drawn = mean[:, -1:] + self.spread()[:, -1:] * torch.randn(mean[:, -1:].shape, generator=generator)
            if t < h + horizon:
                mean, past = self._advance(drawn, drawn - last, torch.tensor([t]), prefix_end, past)
            last = drawn
        return last.view(NUM_SAMPLES, *shape)


class SpreadTrainer(Trainer):
    """One-step Gaussian likelihood, the future weighted ten times the past as in `loss_of`."""

    def loss(self, batch: Batch, noise: Tensor, *, teacher_forced: bool) -> Tensor:
        x, h = batch.x, batch.prefix_end
        assert isinstance(self.model, Spread)
        mean = self.model(x[:, :-1] * batch.filled, torch.full((len(x),), h))
        spread = self.model.spread()
        likelihood = (((mean - x[:, 1:]) / spread).square() / 2 + spread.log()) * batch.filled
        weight = torch.where(torch.arange(x.shape[1] - 1) >= h, 1.0, 0.1)
        return (likelihood * weight[:, None]).sum() / (len(x) * weight.sum() * batch.filled.sum())


# ---- training and judging


def trained(
    data: TrainingData,
    config: TrainConfig,
    architecture: type[TrajectoryTransformer] = TrajectoryTransformer,
    trainer_class: type[Trainer] = Trainer,
) -> TrajectoryTransformer:
    """Return the averaged weights that did best in validation."""
    if architecture is not TrajectoryTransformer:
        data = dataclasses.replace(data, validation=TorchValidation(data.validation.cases))
    torch.manual_seed(config.seed)
    trainer = trainer_class(data, config, architecture)
    with tempfile.TemporaryDirectory() as events:
        fit(trainer, Path(events), progress=False)
    trainer.average.load_state_dict(trainer.best.state)
    return trainer.average


def sampled(model: Spread, validation: Validation) -> list[Singles]:
    """Return each case's sampled ends, (NUM_SAMPLES, N, k)."""
    generator = torch.Generator().manual_seed(0)
    return [
        model.sample(
            torch.from_numpy(case.paths[:, : case.prefix_end + 1]), case.paths.shape[1] - 1 - case.prefix_end, generator
        ).numpy()
        for case in validation.cases
    ]


def errors_of(case: Case, ends: Singles) -> Floats:
    """Return |forecast - truth| / |truth - theta_0| of each trial (..., N), of ends (..., N, k)."""
    inside = np.linalg.norm((ends - case.paths[:, -1])[..., : case.rank], axis=-1)
    return np.asarray(np.hypot(inside, case.outside) / case.distance)


def judge(go_on: Continue, choosing: Validation, judged: Validation) -> list[Floats]:
    """Return the errors of held-out trials (N,) at each prefix; validation trials choose how far to trust."""
    shares = np.linspace(0.0, 1.0, 11)[:, None, None]
    errors = []
    for chosen, case, known, ends in zip(choosing.cases, judged.cases, go_on(choosing), go_on(judged), strict=True):
        last = chosen.paths[:, chosen.prefix_end]
        best = shares[int(np.argmin(errors_of(chosen, last + shares * (known - last)).mean(1)))]
        last = case.paths[:, case.prefix_end]
        errors.append(errors_of(case, last + best * (ends - last)))
    return errors


def coverage(model: Spread, judged: Validation) -> list[float]:
    """Return, a prefix, how often a coordinate's truth lies in the middle 80 % of the sampled rollouts."""
    covered = []
    for case, ends in zip(judged.cases, sampled(model, judged), strict=True):
        low, high = np.quantile(ends, [(1 - COVERED) / 2, (1 + COVERED) / 2], axis=0)
        truth = case.paths[:, -1]
        covered.append(float(((low <= truth) & (truth <= high))[:, : case.rank].mean()))
    return covered


def only(validation: Validation, length: int) -> Validation:
    ends = {prefix_end_of(share, length) for share in PREFIXES}
    return Validation([case for case in validation.cases if case.prefix_end in ends])


# ---- returns as coordinates


def with_returns(
    data: TrainingData, judged: Validation, source: Source, config: TrainConfig, *, target: bool
) -> tuple[TrainingData, Validation]:
    """Return training and held-out data with the return so far, and perhaps the `target`, behind the coordinates."""
    training, choosing = source.learned(config)
    last = np.array([returns_of(source, trial)[-1] for trial in training])
    mean, deviation = last.mean(), max(float(last.std()), 1e-9)
    low, middle, high = np.quantile(last, [0.1, 0.5, 0.9])

    def channels(trials: Sequence[int], known: bool) -> Singles:
        """Return the extra coordinates (N, T, 1 or 2) of trials."""
        rows = []
        for trial in trials:
            returns = returns_of(source, trial)
            goal = np.full_like(returns, np.clip(returns[-1], low, high) if known else middle)
            rows.append(np.stack([returns, goal][: 1 + target], 1))
        return (RETURN_SCALE * (np.array(rows) - mean) / deviation).astype(np.float32)

    def extended(validation: Validation, trials: Sequence[int]) -> Validation:
        extra = channels(trials, known=False)
        return Validation(
            [dataclasses.replace(case, paths=np.concatenate([case.paths, extra], 2)) for case in validation.cases]
        )

    examples = data.examples
    extra = torch.from_numpy(channels(training, known=True))[:, None].expand(-1, len(examples.prefix_ends), -1, -1)
    examples = dataclasses.replace(
        examples,
        coordinates=torch.cat([examples.coordinates, extra], -1),
        filled=F.pad(examples.filled, (0, extra.shape[-1]), value=1.0),
    )
    data = dataclasses.replace(data, examples=examples, validation=extended(data.validation, choosing))
    return data, extended(judged, source.split.heldout)


def returns_of(source: Source, trial: int) -> Floats:
    """Return the episodic return (T,) at each checkpoint, the first one known where none is yet."""
    returns = thin(source.store.trial(trial).episodic_return, source.num_checkpoints)
    known = np.flatnonzero(np.isfinite(returns))
    return np.interp(np.arange(len(returns)), known, returns[known])


# ---- the study

PLAIN = {
    "rollouts": {},
    "one step": {"teacher_forced": 1.0},
    "unmixed": {"mixing": 0.0},
}


def study(store: Store, config: TrainConfig) -> tuple[dict[str, list[Floats]], list[float]]:
    """Return each way's errors of held-out trials (N,) at every prefix, and the coverage of *spread*."""
    source = Source.of(store, config)
    data = load_training_data([source], config)
    heldout = Source(store, Split(source.split.train, source.split.heldout, []), source.num_checkpoints)
    judged = only(load_training_data([heldout], config).validation, source.num_checkpoints)
    choosing = only(data.validation, source.num_checkpoints)
    stay, floor = [], []
    for case in judged.cases:
        mean = data.examples.centre.at(case.prefix_end)
        stay.append(errors_of(case, case.paths[:, case.prefix_end] + mean[case.prefix_end] - mean[-1]))
        floor.append(errors_of(case, case.paths[:, -1]))
    errors = {"persistence": stay, "floor": floor}
    with progress_bar(True) as bar:
        task = bar.add_task(store.env_id, total=len(PLAIN) + NUM_MODELS - 1 + 4, note="")

        def add(name: str, go_on: Continue, on: Validation = choosing, of: Validation = judged) -> None:
            errors[name] = judge(go_on, on, of)
            bar.update(task, advance=1, note=f"{name}: " + " ".join(f"{it.mean():.3f}" for it in errors[name]))

        for name, change in PLAIN.items():
            model = trained(data, dataclasses.replace(config, **change))
            add(name, functools.partial(Validation.forecasts, model=model))
            if name == "rollouts":
                models = [model]
        for seed in range(1, NUM_MODELS):
            models.append(trained(data, dataclasses.replace(config, seed=config.seed + seed)))
            bar.advance(task)
        add("ensemble", lambda of: list(np.mean([of.forecasts(model) for model in models], 0)))
        heads = trained(data, dataclasses.replace(config, teacher_forced=0.0), Heads)
        add("heads", functools.partial(TorchValidation.forecasts, model=heads))
        spread = trained(data, dataclasses.replace(config, teacher_forced=0.0), Spread, SpreadTrainer)
        assert isinstance(spread, Spread)
        add("spread", lambda of: [ends.mean(0) for ends in sampled(spread, of)])
        for name, target in (("return", False), ("target", True)):
            wider, wider_judged = with_returns(data, judged, source, config, target=target)
            model = trained(wider, config)
            wider_choosing = only(wider.validation, source.num_checkpoints)
            add(name, functools.partial(Validation.forecasts, model=model), wider_choosing, wider_judged)
    return errors, coverage(spread, judged)


def rows_of(errors: dict[str, list[Floats]]) -> list[dict[str, Any]]:
    """Return one row for each way and prefix: the mean error, and its ratio to the default's with a 95 % interval."""
    rows = []
    for name, at_prefixes in errors.items():
        for prefix, own, default in zip(PREFIXES, at_prefixes, errors["rollouts"], strict=True):
            ratio = Bootstrap(len(own)).ratio(own, default)
            rows.append({"way": name, "prefix": prefix, "error": float(own.mean()), "ratio": vars(ratio)})
    return rows


def table(tasks: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the ratios to the default's errors, in bold where the interval lies below 1."""
    lines = ["| task | way | " + " | ".join(f"{prefix:.0%}" for prefix in PREFIXES) + " |", "|---" * 6 + "|"]
    for task in tasks:
        for name in dict.fromkeys(row["way"] for row in task["rows"]):
            cells = []
            for row in (row for row in task["rows"] if row["way"] == name):
                value, low, high = (row["ratio"][key] for key in ("value", "low", "high"))
                text = f"{row['error']:.3f}" if name == "rollouts" else interval(value, low, high)
                cells.append(f"**{text}**" if high < 1 and name not in ("persistence", "floor") else text)
            lines.append(f"| {task['env_id']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(tasks: list[dict[str, Any]], output: Path) -> None:
    """Write one panel per task: the ratio of each way's error to the default's, one marker per prefix."""
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 4.2), sharey=True, squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        names = [name for name in dict.fromkeys(row["way"] for row in task["rows"]) if name != "rollouts"]
        for i, prefix in enumerate(PREFIXES):
            rows = {row["way"]: row["ratio"] for row in task["rows"] if row["prefix"] == prefix}
            value, low, high = (np.array([rows[name][key] for name in names]) for key in ("value", "low", "high"))
            at = np.arange(len(names)) + 0.16 * (i - 1.5)
            ax.errorbar(value, at, xerr=[value - low, high - value], fmt="o", ms=4, lw=1.2, label=f"{prefix:.0%} seen")
        ax.axvline(1, color="#59636e", lw=0.8)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}")
        ax.set_title(task["env_id"], fontsize=11)
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel("error at the path's end over the default's")
        ax.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(output)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("stores", nargs="+", type=Path, help="one store per task")
    parser.add_argument("--output", type=Path, required=True, help="the figure, .svg or .png; its .json goes beside it")
    parser.add_argument("--num-checkpoints", type=int, help="thin longer paths evenly to so many checkpoints")
    parser.add_argument("--steps", type=int, default=TrainConfig.steps, help="most optimiser steps of each model")
    arguments = parser.parse_args()
    record_path = arguments.output.with_suffix(".json")
    tasks = json.loads(record_path.read_text())["tasks"] if record_path.exists() else []  # goes on where it was cut off
    config = TrainConfig(steps=arguments.steps)
    for path in arguments.stores:
        store = Store.open(path)
        length = arguments.num_checkpoints
        if any(task["env_id"] == store.env_id for task in tasks):
            continue
        thinned = length if length is not None and length < store.num_checkpoints else None
        errors, covered = study(store, dataclasses.replace(config, num_checkpoints=thinned))
        heldout = len(errors["rollouts"][0])
        tasks.append({"env_id": store.env_id, "heldout": heldout, "coverage": covered, "rows": rows_of(errors)})
        record = {"train": dataclasses.asdict(config), "covered": COVERED, "tasks": tasks}
        write_record(record_path, record, indent=1)
    draw(tasks, arguments.output)
    print(table(tasks))
    for task in tasks:
        shares = " ".join(f"{share:.2f}" for share in task["coverage"])
        print(f"{task['env_id']}: sampled 80 % intervals contain the truth in {shares} of cases, for each prefix")


if __name__ == "__main__":
    main()
