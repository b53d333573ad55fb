"""Which numbers should represent a checkpoint? The floor and the forecast error of several representations.

    python studies/compare_representations.py runs/*/store.zarr --output docs/figures/representations.svg

Errors are |forecast - truth| / |truth - theta_0| at the end of the path, on held-out trials; a representation's floor
is the error of the truth, encoded and decoded. All representations reproduce theta_h exactly: the part of a
displacement that they cannot express is taken to be zero. They have k = 16 numbers per checkpoint unless stated:

- *prefix SVD*: directions of the observed prefix, tipl's default. Also with separate directions for each layer, or for
  matrices, biases and log_std, where the k directions are distributed so as to minimise the training trials' floor.
- *shared SVD*: directions of the training trials' theta_t or theta_t - theta_0, whichever is better on validation
  trials.
- *autoencoder, layers*: one MLP per layer, trained on training trials; as many numbers as the prefix SVD per layer.
- *autoencoder, neurons*: 4 numbers per neuron, from its incoming weights, bias and outgoing weights; one MLP per layer.
- *prefix SVD, neurons*: 4 numbers per neuron, on separate directions of its incoming weights and bias.
- *directions cut by tensor*: the prefix's 16 directions, each cut into one direction per tensor.

Representations with 16 numbers are forecast by the same causal Transformer, trained as `tipl train` does. Neurons are
forecast by one ridge regression per layer, from a neuron's numbers at four checkpoints of the prefix to those at the
end of the path, with a penalty chosen on validation trials. Directions cut by tensor are forecast by
`tipl.judging.regression.Ridge`, one linear combination of the prefix's displacements per tensor. In prefix bases the
Transformer's forecast is also *refined* weight by weight, as in `tipl train`; with the plain prefix SVD this is TIPL,
to which all others are compared.

The figure has one row per store and one panel per prefix; a table is printed for each store. Longer paths are thinned
evenly to `--num-checkpoints`. The JSON beside the figure keeps every result as soon as it is known, so that an
interrupted study continues.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from autoencoder import Autoencoder, moved_of, train_autoencoder, weights_of
from matplotlib.axes import Axes
from numpy.typing import NDArray
from representations import (
    Coordinates,
    Errors,
    GroupedForecaster,
    Result,
    Tokens,
    Weights,
    cut_coordinates,
    deal_widths,
    grams_of,
    orthonormal,
    prefix_svd,
    relative_error,
    ridge,
    svd_coordinates,
    tokens_of,
    train_forecaster,
)
from study import PREFIXES, command_line, interval, write_record

from tipl.files.locations import write_atomically
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.refiner_training import train_refiner
from tipl.forecasting.sources import Source
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training_data import Validation, Written
from tipl.judging.regression import Ridge
from tipl.judging.training_path import TrainingPath
from tipl.report.drawing import THEME, Mark, Panel, Plot, percent
from tipl.report.intervals import Bootstrap
from tipl.storing.store import Store
from tipl.subspace.prefix import Prefix
from tipl.subspace.prefix_end import prefix_end_of
from tipl.subspace.streaming_svd import StreamingSVD

WIDTH = 16
NEURON_WIDTH = 4
RAW = "prefix SVD"
PARTS = ("floor", "forecast", "refined")


class Study:
    """One store's trials and what each representation makes of them."""

    def __init__(self, store: Store, config: TrainConfig) -> None:
        self.source, self.config = Source.of(store, config), config
        self.layout, self.length = store.policy, self.source.num_checkpoints
        split = self.source.split
        self.training, self.validation, self.heldout = (
            [self.source.path(trial) for trial in trials] for trials in (split.train, split.validation, split.heldout)
        )
        self.ends = [prefix_end_of(prefix, self.length) for prefix in PREFIXES]

    def representations(self) -> dict[str, Callable[[], Result]]:
        """Return what makes each representation's result, by name."""
        return {
            RAW: lambda: self.prefix_svd(tokens_of(self.layout, "whole"), [WIDTH]),
            "prefix SVD, layers": lambda: self.grouped("layer"),
            "prefix SVD, matrices apart": lambda: self.grouped("kind"),
            "shared SVD": self.shared,
            "autoencoder, layers": self.layers,
            "autoencoder, neurons": self.neurons,
            "prefix SVD, neurons": self.neuron_svd,
            "directions cut by tensor": self.cut,
        }

    def errors(self, forecast: Callable[[Weights, int], Any]) -> Errors:
        """Return the errors of weights (p,) that `forecast(path, h)` gives for the end of the path."""
        return [[relative_error(forecast(path, end), path) for path in self.heldout] for end in self.ends]

    def sides(self, of: Callable[[Weights], Any]) -> list[list[Any]]:
        """Return something of each training, validation and held-out path."""
        return [[of(path) for path in paths] for paths in (self.training, self.validation, self.heldout)]

    def grouped(self, by: str) -> Result:
        tokens = tokens_of(self.layout, by)
        widths = self.widths(tokens)
        print(f"  {WIDTH} = {' + '.join(map(str, widths))} for groups of {[kind.size for kind in tokens]} weights")
        return self.prefix_svd(tokens, widths)

    def widths(self, tokens: Tokens) -> list[int]:
        grams = [grams_of(path, tokens) for path in self.training]
        return deal_widths(grams, self.ends, [kind.shape[1] for kind in tokens], WIDTH)

    def prefix_svd(self, tokens: Tokens, widths: Sequence[int]) -> Result:
        """Return what the Transformer, and the refiner after it, make of prefix bases of groups of weights."""
        trained, result = self.transformer(*prefix_svd(tokens, widths))
        forecaster = GroupedForecaster(trained.model, None, trained.centre, groups=(tokens, widths))
        refined = train_refiner(forecaster, [self.source], Validation.prefix_ends(self.length), self.config)
        assert refined is not None
        forecaster = dataclasses.replace(forecaster, refiner=refined.refiner)

        def forecast(path: Weights, end: int) -> Weights:
            horizon = self.length - 1 - end
            return forecaster.forecast([path[: end + 1]], [horizon], layout=self.layout)[0].weights([horizon])[0]

        return dataclasses.replace(result, refined=self.errors(forecast))

    def shared(self) -> Result:
        results = []
        for of_displacements in (True, False):
            svd = StreamingSVD(WIDTH, center=not of_displacements)
            for path in self.training:
                svd.partial_fit(path - path[0] if of_displacements else path)

            def coordinates(
                path: Weights, ends: Sequence[int], svd: Any = svd, of_displacements: bool = of_displacements
            ) -> list[NDArray[np.float32]]:
                origin = path[0] if of_displacements else svd.mean_.astype(np.float32)
                written = (path - origin) @ svd.components_.T
                return [written / np.linalg.norm(path[end] - path[0]) for end in ends]

            results.append(self.transformer(coordinates, lambda _: WIDTH)[1])
            print(f"  of theta_t{' - theta_0' * of_displacements}: validation error {results[-1].validation:.3f}")
        return min(results, key=lambda it: it.validation or 0.0)

    def layers(self) -> Result:
        tokens = tokens_of(self.layout, "layer")
        model = self.autoencoder(tokens, self.widths(tokens))

        def encode(path: Weights, end: int) -> torch.Tensor:
            return torch.cat([z[:, 0] for z in model.encode(moved_of(path, end))], -1)  # (T, k)

        first = torch.stack([encode(path, end) for path in self.training for end in self.ends])
        scale = (first - first[:, :1]).square().mean((0, 1)).sqrt().clamp(min=1e-6)  # (k,)

        def write(path: Weights, ends: Sequence[int]) -> list[Written]:
            """Only these numbers' own errors count in training, relative to their usual size."""
            still = np.full(self.length, WIDTH**0.5), np.zeros(self.length)
            return [((encode(path, end) / scale).numpy(), *still) for end in ends]

        forecaster, _ = train_forecaster(self.training, self.validation, write, lambda _: WIDTH, self.config)

        def forecast(path: Weights, end: int) -> Weights:
            seen = encode(path[: end + 1], end) / scale
            future = forecaster.continue_coordinates([seen.numpy()], [self.length - 1 - end])[0][-1:]
            last, ahead = (z * scale for z in (seen[-1:], torch.from_numpy(future)))
            split = [[part[:, None] for part in z.split(model.widths, -1)] for z in (ahead, last)]
            return weights_of(model.decode(*split, moved_of(path, end)[end : end + 1]), path, end)

        return Result(WIDTH, self.errors(forecast), self.floor(model))

    def autoencoder(self, tokens: Tokens, widths: list[int]) -> Autoencoder:
        return train_autoencoder(tokens, widths, self.training, self.validation, self.ends, 3 * self.config.steps)

    def floor(self, model: Autoencoder) -> Errors:
        def decoded(path: Weights, end: int) -> Weights:
            moved = moved_of(path, end)
            return weights_of(model(moved[-1:], moved[end : end + 1]), path, end)

        return self.errors(decoded)

    def neurons(self) -> Result:
        tokens = tokens_of(self.layout, "neuron")
        widths = [NEURON_WIDTH] * (len(tokens) - 1) + [tokens[-1].shape[1]]  # what no neuron holds is kept as it is
        model = self.autoencoder(tokens, widths)
        errors: Errors = []
        for end in self.ends:
            forecasts = ridge(
                self.sides(lambda path, end=end: [z.numpy() for z in model.encode(moved_of(path, end))]), end
            )
            errors.append([])
            for path, forecast in zip(self.heldout, forecasts, strict=True):
                last = moved_of(path, end)[end : end + 1]
                moved = model.decode([torch.from_numpy(z[None]) for z in forecast], model.encode(last), last)
                errors[-1].append(relative_error(weights_of(moved, path, end), path))
        numbers = sum(len(kind) * width for kind, width in zip(tokens, widths, strict=True))
        return Result(numbers, errors, self.floor(model))

    def neuron_svd(self) -> Result:
        tokens = tokens_of(self.layout, "row")
        widths = [min(NEURON_WIDTH, kind.shape[1]) for kind in tokens]
        numbers = sum(len(kind) * width for kind, width in zip(tokens, widths, strict=True))
        result = Result(numbers, [], [])
        for end in self.ends:

            def written(path: Weights, end: int = end) -> list[NDArray[np.float32]]:
                unit, grams = float(np.linalg.norm(path[end] - path[0])), grams_of(path, tokens)
                return [svd_coordinates(kind, end, width, unit) for kind, width in zip(grams, widths, strict=True)]

            sides = self.sides(written)
            truths = [np.concatenate([z.reshape(self.length, -1) for z in kinds], 1) for kinds in sides[2]]
            result.add(self.heldout, end, truths, [np.concatenate([z.ravel() for z in it]) for it in ridge(sides, end)])
        return result

    def cut(self) -> Result:
        training, _, heldout = self.sides(lambda path: TrainingPath.of(path, self.layout, seed=0))
        result = Result(0, [], [])
        for end in self.ends:
            horizon = np.array([self.length - 1 - end])
            ridge = Ridge.fit(training, end, horizon)
            written = [cut_coordinates(path.grams, end, WIDTH, float(path.walked(end))) for path in heldout]
            result.add(self.heldout, end, written, [x[-1] for x in written])
            result.forecast[-1] = [
                relative_error(ridge.forecast(Prefix(path[: end + 1]), horizon)[0], path) for path in self.heldout
            ]
        return dataclasses.replace(result, numbers=max(x.shape[1] for x in written))

    def transformer(self, coordinates: Coordinates, rank: Callable[[int], int]) -> tuple[Forecaster, Result]:
        """Return a forecaster in coordinates of orthonormal directions, and what it comes to."""

        def write(path: Weights, ends: Sequence[int]) -> list[Written]:
            return [orthonormal(path, end, x) for end, x in zip(ends, coordinates(path, ends), strict=True)]

        forecaster, validation = train_forecaster(self.training, self.validation, write, rank, self.config)
        result = Result(WIDTH, [], [], validation=validation)
        for end in self.ends:
            written = [coordinates(path, [end])[0] for path in self.heldout]
            seen = [x[: end + 1] for x in written]
            futures = forecaster.continue_coordinates(seen, [self.length - 1 - end] * len(seen))
            spanned = np.arange(WIDTH) < rank(end)  # the others are padding
            result.add(self.heldout, end, written, [future[-1] * spanned for future in futures])
        return forecaster, result


def table(task: dict[str, Any]) -> str:
    """Return the mean errors of a task as a Markdown table, each floor / forecast / refined.

    The last columns are ratios of means over trials and prefixes: of the floor to the prefix SVD's, of the forecast and
    of the refined one to TIPL's, with 95 % intervals.
    """
    bootstrap, results = Bootstrap(task["trials"]), task["results"]
    line = {part: np.mean(results[RAW]["refined" if part != "floor" else part], 0) for part in PARTS}
    ratios = ["floor, of the prefix SVD's", "forecast, of TIPL's", "refined, of TIPL's"]
    lines = [f"| {' | '.join(['representation', 'numbers', *(f'{it:.0%}' for it in PREFIXES), *ratios])} |"]
    lines.append("|---" * (2 + len(PREFIXES) + len(ratios)) + "|")
    for name, it in results.items():
        known = [part for part in PARTS if it[part] is not None]
        means = (" / ".join(f"{np.mean(it[part][i]):.3f}" for part in known) for i in range(len(PREFIXES)))
        cells = [name, str(it["numbers"]), *means]
        for part in PARTS:
            ratio = bootstrap.ratio(np.mean(it[part], 0), line[part]) if part in known else None
            cells.append("" if ratio is None else interval(ratio.value, ratio.low, ratio.high))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(tasks: Sequence[dict[str, Any]]) -> Plot:
    """Return the figure: one row per task, one panel per prefix, one line per representation."""
    marks = {
        "floor": Mark("floor", "basis_floor", 0.0, marker="D"),
        "forecast": Mark("forecast", "transformer", 0.0, marker="o"),
        "refined": Mark("refined (of the prefix SVD: TIPL)", "tipl", 0.0, marker="o"),
        "persistence": Mark("persistence", "persistence", 2.0),
    }

    def draw(ax: Axes, task: dict[str, Any], i: int) -> None:
        results = {name: task["results"][name] for name in tasks[0]["results"]}
        bootstrap = Bootstrap(task["trials"])
        for errors, name in ((task["persistence"], "persistence"), (results[RAW]["refined"], "tipl")):
            line, color = bootstrap.estimate(np.array(errors[i])), THEME[name][0]
            ax.axvline(line.value, color=color, lw=1.2)
            ax.axvspan(line.low, line.high, color=color, alpha=0.1, lw=0)
        for y, it in enumerate(results.values()):
            for place, part in enumerate(PARTS):
                if it[part] is not None:
                    line, at = bootstrap.estimate(np.array(it[part][i])), y + 0.22 * (place - 1)
                    ax.plot([line.low, line.high], [at, at], color=marks[part].rgb, lw=1.4)
                    ax.plot(line.value, at, marks[part].marker, color=marks[part].rgb, ms=5, zorder=3)
        labels = [f"{name} ({it['numbers']})" for name, it in results.items()]
        ax.set_yticks(range(len(results)), labels if i == 0 else [""] * len(results))
        ax.set_ylim(len(results) - 0.4, -0.6)
        ax.set_xlim(left=0.0)
        ax.set_xlabel("relative weight error")

    panels = []
    for task in tasks:
        for i, prefix in enumerate(PREFIXES):
            title = f"{task['env_id'].rpartition('-v')[0]}, {percent(prefix)}"
            panels.append(Panel(title, lambda ax, task=task, i=i: draw(ax, task, i)))
    legend = tuple(marks.values())
    return Plot("representations", tuple(panels), legend, columns=len(PREFIXES), panel_inches=(3.3, 3.6))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("stores", nargs="+", type=Path, help="one store per task")
    parser.add_argument("--output", type=Path, required=True, help="the figure, .svg; its .json goes beside it")
    parser.add_argument(
        "--steps",
        type=int,
        default=TrainConfig().steps,
        help="optimiser steps of the Transformer; other models' in proportion",
    )
    parser.add_argument("--num-checkpoints", type=int, default=62, help="thin longer paths to so many")
    arguments = parser.parse_args()
    record_path = arguments.output.with_suffix(".json")
    record = json.loads(record_path.read_text()) if record_path.exists() else {"steps": arguments.steps, "tasks": {}}
    if record["steps"] != arguments.steps:
        raise SystemExit(f"{record_path} is of {record['steps']} steps: choose another output")
    refine_steps = round(TrainConfig().refine_steps * arguments.steps / TrainConfig().steps)
    for path in arguments.stores:
        store = Store.open(path)
        length = min(arguments.num_checkpoints, store.trial(0).num_checkpoints)
        config = TrainConfig(steps=arguments.steps, refine_steps=refine_steps, num_checkpoints=length)
        study = Study(store, config)
        task = record["tasks"].setdefault(
            store.env_id,
            {
                "env_id": store.env_id,
                "num_checkpoints": length,
                "trials": len(study.heldout),
                "persistence": study.errors(lambda path, end: path[end]),
                "results": {},
            },
        )
        for name, make in study.representations().items():
            if name not in task["results"]:
                print(f"{store.env_id}: {name}", flush=True)
                task["results"][name] = dataclasses.asdict(make())
                write_record(record_path, record)
    write_atomically(arguments.output, plot([*record["tasks"].values()]).svg())
    for task in record["tasks"].values():
        print(f"\n{task['env_id']}, {task['trials']} held-out trials of {task['num_checkpoints']} checkpoints\n")
        print(table(task))


if __name__ == "__main__":
    main()
