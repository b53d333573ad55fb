"""How many coordinates k should a checkpoint have? Floor and forecast error against k, on held-out trials.

    python studies/choose_d.py runs/*/store.zarr --output docs/figures/choose_d.svg

For each store and each k a forecaster is trained as `tipl train` does. It is judged on every held-out trial, from four
prefixes to the end of the path, by the relative weight error |forecast - truth| / |truth - theta_0|. Compared are the
prefix basis (its floor), a basis of k directions shared by all training trials (another floor), the Transformer alone,
TIPL (whose refiner leaves the prefix's span, so that it may go below the floor), and persistence. k is chosen by TIPL's
mean error on validation trials, which also choose when each training stops; held-out trials take no part.

The figure has one row per store and one panel per prefix, with means and 95 % bootstrap intervals over held-out trials;
the chosen k is circled. The JSON beside it has all errors; a table is printed. Forecasters are kept in a folder beside
the output, so that an interrupted study continues. Longer paths are thinned evenly to `--num-checkpoints`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from study import PREFIXES, command_line, interval, write_record

from tipl.files.locations import write_atomically
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.sources import Source
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training import train
from tipl.report.drawing import Panel, Plot, percent
from tipl.report.intervals import Bootstrap, Estimate
from tipl.report.plots import predictor_marks
from tipl.storing.store import Store
from tipl.subspace.basis import Basis
from tipl.subspace.prefix_end import prefix_end_of

COMPONENTS = (2, 4, 8, 16, 32)
NAMES = ("persistence", "shared_floor", "basis_floor", "transformer", "tipl")


def end_errors(
    forecaster: Forecaster, shared: Basis, source: Source, trials: list[int]
) -> dict[str, NDArray[np.float64]]:
    """Return relative errors at the end of the paths of `trials`, name -> (prefixes, trials)."""
    paths = [source.path(trial) for trial in trials]
    errors = {name: np.empty((len(PREFIXES), len(paths))) for name in NAMES}
    for i, prefix in enumerate(PREFIXES):
        end = prefix_end_of(prefix, source.num_checkpoints)
        horizon = np.array([source.num_checkpoints - 1 - end])
        seen = [path[: end + 1] for path in paths]
        forecasts = forecaster.forecast(seen, [int(horizon[0])] * len(paths), layout=source.store.policy)
        for j, (path, forecast) in enumerate(zip(paths, forecasts, strict=True)):
            through = shared.through(path[end])
            ends = {
                "persistence": path[end],
                "shared_floor": through.decode(through.encode(path[-1:]))[0],
                "basis_floor": forecast.basis.decode(forecast.basis.encode(path[-1:]))[0],
                "transformer": forecast.in_basis(horizon)[0],
                "tipl": forecast.weights(horizon)[0],
            }
            for name, weights in ends.items():
                errors[name][i, j] = np.linalg.norm(weights - path[-1]) / np.linalg.norm(path[-1] - path[0])
    return errors


def study(store: Store, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Return a store's record: for every k the errors of held-out trials, and the k chosen."""
    source = Source.of(store, config)
    results = []
    for k in COMPONENTS:
        model = folder / f"k{k}"
        if not (model / "config.json").exists():
            print(f"{store.env_id}: k = {k}")
            train(store, model, dataclasses.replace(config, n_components=k))
        forecaster = Forecaster.load(model)
        shared = Basis.from_trials([store.trial(trial) for trial in source.split.train], k)
        validation = end_errors(forecaster, shared, source, source.split.validation)
        heldout = end_errors(forecaster, shared, source, source.split.heldout)
        results.append(
            {
                "k": k,
                "validation": float(validation["tipl"].mean()),
                "heldout": {name: errors.tolist() for name, errors in heldout.items()},
            }
        )
    return {
        "env_id": store.env_id,
        "num_checkpoints": source.num_checkpoints,
        "trials": len(source.split.heldout),
        "chosen": min(results, key=lambda it: it["validation"])["k"],
        "results": results,
    }


def table(tasks: list[dict[str, Any]]) -> str:
    """Return the mean held-out errors as a Markdown table, the chosen k in bold; floors: shared, prefix."""
    heads = (f"{f:.0%}: floors / Transformer / TIPL" for f in PREFIXES)
    lines = ["| task | k | validation | " + " | ".join(heads) + " |"]
    lines.append("|---" * (3 + len(PREFIXES)) + "|")
    for task in tasks:
        for result in task["results"]:
            k = f"**{result['k']}**" if result["k"] == task["chosen"] else f"{result['k']}"
            means = {name: np.mean(result["heldout"][name], axis=1) for name in NAMES}
            cells = (" / ".join(f"{means[name][i]:.3f}" for name in NAMES[1:]) for i in range(len(PREFIXES)))
            lines.append(f"| {task['env_id']} | {k} | {result['validation']:.3f} | " + " | ".join(cells) + " |")
        still = " | ".join(f"{value:.3f}" for value in means["persistence"])
        lines.append(f"| {task['env_id']} | persistence | | {still} |")
    return "\n".join(lines)


def chosen_to_default(task: dict[str, Any]) -> Estimate:
    """Return the ratio of TIPL's mean held-out error with the chosen k to that with the default k."""
    errors = {result["k"]: np.mean(result["heldout"]["tipl"], axis=0) for result in task["results"]}
    return Bootstrap(task["trials"]).ratio(errors[task["chosen"]], errors[TrainConfig().n_components])


def plot(tasks: list[dict[str, Any]]) -> Plot:
    """Return the figure: one row per task, one panel per prefix."""
    marks = predictor_marks(NAMES)
    panels = []
    for task in tasks:
        bootstrap = Bootstrap(task["trials"])
        ks = np.array([result["k"] for result in task["results"]])

        def draw(ax: Axes, i: int, task: Any = task, bootstrap: Bootstrap = bootstrap, ks: Any = ks) -> None:
            for zorder, name in enumerate(NAMES, 3):
                errors = np.array([result["heldout"][name][i] for result in task["results"]])  # (k, n)
                center, low, high = bootstrap.curve(errors.T)
                marks[name].line(ax, ks, center, zorder=zorder)
                ax.fill_between(ks, low, high, color=marks[name].rgb, alpha=0.12, linewidth=0, zorder=2)
                if name == "tipl":
                    at = int(np.flatnonzero(ks == task["chosen"])[0])
                    ax.plot(ks[at], center[at], "o", ms=11, mfc="none", mec=marks[name].rgb, zorder=9)
            ax.set_xscale("log", base=2)
            ax.set_xticks(ks, [str(k) for k in ks])
            ax.set_xlabel("coordinates k")
            ax.set_ylim(bottom=0.0)
            if i == 0:
                ax.set_ylabel("relative weight error")

        name = task["env_id"].rpartition("-v")[0]
        panels += [
            Panel(f"{name}, {percent(f)}", lambda ax, i=i, draw=draw: draw(ax, i)) for i, f in enumerate(PREFIXES)
        ]
    legend = tuple(marks[name] for name in reversed(NAMES))
    return Plot("choose_d", tuple(panels), legend, columns=len(PREFIXES), panel_inches=(3.1, 2.7))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("stores", nargs="+", type=Path, help="one store per task")
    parser.add_argument(
        "--output", type=Path, required=True, help="the figure, .svg; its .json and models go beside it"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=TrainConfig().steps,
        help="optimiser steps of the Transformer; the refiner's in proportion",
    )
    parser.add_argument("--num-checkpoints", type=int, default=62, help="thin longer paths to so many")
    arguments = parser.parse_args()
    refine_steps = round(TrainConfig().refine_steps * arguments.steps / TrainConfig().steps)
    tasks = []
    for path in arguments.stores:
        store = Store.open(path)
        config = TrainConfig(
            steps=arguments.steps,
            refine_steps=refine_steps,
            confidence_trials=0,
            num_checkpoints=min(arguments.num_checkpoints, store.trial(0).num_checkpoints),
        )
        tasks.append(study(store, config, arguments.output.with_suffix("") / store.env_id))
        record = {"steps": arguments.steps, "refine_steps": refine_steps, "prefixes": PREFIXES, "tasks": tasks}
        write_record(arguments.output.with_suffix(".json"), record)
        write_atomically(arguments.output, plot(tasks).svg())
    print(table(tasks))
    for task in tasks:
        ratio, default = chosen_to_default(task), TrainConfig().n_components
        against = f"TIPL's error {interval(ratio.value, ratio.low, ratio.high)} of that of k = {default}"
        print(f"{task['env_id']}: k = {task['chosen']} by validation trials, {against}")


if __name__ == "__main__":
    main()
