"""What share of the gain in return do forecasts capture, over the runs of several evaluations of one forecaster?

    tipl collect --env-id HalfCheetah-v4 --seed 1 --init-seed 3757552657 ... --output more.zarr
    tipl evaluate --store store.zarr --model model --fresh more.zarr --output evaluation1
    python studies/pool_gains.py evaluation0 evaluation1 ... --output docs/figures/halfcheetah_gain.svg

A gain is a policy's return less that of the policy at the prefix's end, on the same episodes; every run has its own
episodes. A share is the sum over runs of a predictor's gains, divided by the sum of the true policies' gains, with a
95 % bootstrap interval. The floors are the true weights projected on the forecaster's basis and on the other kind of
basis.

The figure has one panel per horizon, with each evaluation in grey and all runs together in colour; the shaded band is
the difference between two returns of the same true policy, as a share of the gain. The JSON beside it has the return of
every run and predictor; a table is printed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from study import command_line, interval, write_record

from tipl.files.locations import write_atomically
from tipl.report.drawing import THEME, Panel, Plot
from tipl.report.intervals import Bootstrap, Estimate
from tipl.report.predictor_info import BASIS_FLOORS, predictor_info
from tipl.report.results import FloatArray, Results, read_results

PREDICTORS = ("tipl", "tipl_gated", "tipl_tuned", "linear", "ridge", "another_run", *BASIS_FLOORS)


def returns_of(results: Results, prefix: float, share: float) -> dict[str, FloatArray]:
    """Return name -> returns (n,) of the runs: of each predictor, persistence, and the true policy (measured twice)."""
    horizon = max(1, round(share * (results.settings["num_checkpoints"] - 1)))
    if prefix not in results.prefixes or horizon not in results.horizons[prefix]:
        raise SystemExit(f"{results.path}: expected prefix {prefix:g} and horizon {share:g} of the path among its own")
    names = (
        "persistence",
        "return_floor",
        *(name for name in PREDICTORS if results.has_values("return_predicted", name)),
    )
    found = {name: results.at("return_predicted", prefix, name, horizon) for name in names}
    return {"truth": results.at("return_true", prefix, "persistence", horizon), **found}


def pooled(parts: Sequence[dict[str, FloatArray]]) -> dict[str, FloatArray]:
    """Return the returns of all runs together, for the predictors that every evaluation has."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if all(name in p for p in parts)}


def shares(returns: dict[str, FloatArray]) -> dict[str, Estimate]:
    """Return each predictor's share of the gain."""
    start = returns["persistence"]
    bootstrap = Bootstrap(len(start))
    gain = returns["truth"] - start
    return {name: bootstrap.ratio(values - start, gain) for name, values in returns.items() if name in PREDICTORS}


def noise(returns: dict[str, FloatArray]) -> float:
    """Return the mean difference between two returns of the same true policy, as a share of the mean gain."""
    again = np.abs(returns["return_floor"] - returns["truth"]).mean()
    return float(again / (returns["truth"] - returns["persistence"]).mean())


def table(columns: Sequence[tuple[str, dict[str, Estimate]]]) -> str:
    """Return a Markdown table of shares: one column per horizon and set of runs, one row per predictor in all sets."""
    titles, found = zip(*columns, strict=True)
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for name in (name for name in found[0] if all(name in it for it in found)):
        cells = [interval(it[name].value, it[name].low, it[name].high, 2) for it in found]
        lines.append(f"| {predictor_info(name).label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(ax: Axes, parts: Sequence[dict[str, Estimate]], whole: dict[str, Estimate], noise: float) -> None:
    """Draw the `noise`, and for each predictor the interval of each evaluation and that of all runs."""
    ax.axvspan(-noise, noise, color=THEME["grid"][0], zorder=0, linewidth=0)
    for row, name in enumerate(whole):
        places = np.linspace(-0.28, 0.16, len(parts) + 1)
        for place, found in zip(places, (*parts, whole), strict=True):
            color, width = (THEME["faint"][0], 1.2) if found is not whole else (THEME[name][0], 2.6)
            ax.hlines(row - place, found[name].low, found[name].high, color=color, linewidth=width)
            ax.plot(found[name].value, row - place, "o", color=color, markersize=2.5 + width)
    ax.axvline(0, color=THEME["muted"][0], linewidth=0.8)
    ax.axvline(1, color=THEME["muted"][0], linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(whole)), [predictor_info(name).label for name in whole])
    ax.set(ylim=(len(whole) - 0.5, -0.5), xlabel="share of the gain in return")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("evaluations", nargs="+", type=Path, metavar="FOLDER", help="what `tipl evaluate` wrote")
    parser.add_argument("--prefix", type=float, default=0.2, help="share of the path that is seen")
    parser.add_argument("--horizons", type=float, nargs="+", default=[0.1, 0.2], help="as shares of the path")
    parser.add_argument("--output", type=Path, required=True, help="the figure, .svg; its .json goes beside it")
    arguments = parser.parse_args()
    evaluations = [read_results(folder / "results.json") for folder in arguments.evaluations]
    if len({results.env_id for results in evaluations}) > 1:
        parser.error(f"FOLDER: all must be of one task, got {', '.join(it.env_id for it in evaluations)}")
    record: dict[str, Any] = {"env_id": evaluations[0].env_id, "prefix": arguments.prefix, "horizons": {}}
    columns: list[tuple[str, dict[str, Estimate]]] = []
    panels = []
    for share in arguments.horizons:
        parts = [returns_of(results, arguments.prefix, share) for results in evaluations]
        found = [shares(part) for part in parts]
        everything = pooled(parts)
        whole = shares(everything)
        sizes = [len(part["truth"]) for part in parts]
        columns += [(f"{share:.0%} ahead, {n} runs", it) for n, it in zip(sizes, found, strict=True)]
        columns.append((f"{share:.0%} ahead, all {sum(sizes)}", whole))
        title, shown = f"{share:.0%} of the path ahead", (found, whole, noise(everything))
        panels.append(Panel(title, lambda ax, shown=shown: draw(ax, *shown)))
        rounded = [{name: values.round(2).tolist() for name, values in part.items()} for part in parts]
        record["horizons"][f"{share:g}"] = rounded
    write_record(arguments.output.with_suffix(".json"), record)
    write_atomically(arguments.output, Plot("gains", tuple(panels)).svg())
    print(table(columns))


if __name__ == "__main__":
    main()
