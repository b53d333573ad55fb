"""Which tasks' paths can be predicted, and how much return does that give? One figure and one table from evaluations.

    python studies/predictability_map.py runs/*/evaluation --output docs/figures/predictability.svg
    python studies/predictability_map.py SGD=runs/sgd/evaluation ... --output docs/figures/predictability_ppo.svg

For each task and prefix, at the horizon of 20 % of the path, on held-out trials, it shows two shares:

- of the displacement ahead, 1 - |forecast - truth|^2 / |persistence - truth|^2, with squares summed over trials: the
  share in the span of the prefix's directions and in the span of one basis of all training trials, which bound any
  forecast within these bases; and the share that a ridge regression on each weight's own past, the Transformer alone
  and TIPL explain.
- of the gain in return, a ratio of means over trials: the share that forecasts capture, and as noise the difference
  between two returns of the same true policy. Where the gain is not clearly above the noise, no share is given.

The figure has one panel for each share, with one group of bars per task and prefix. The table is printed and, as JSON,
written beside the figure.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from study import command_line, interval, write_record

from tipl.report.drawing import THEME
from tipl.report.intervals import Bootstrap, Estimate, captured_gain
from tipl.report.results import Results, read_results

HORIZON = 0.2
EXPLAINED = {
    "basis_floor": "prefix floor",
    "shared_floor": "shared floor",
    "ridge": "ridge",
    "transformer": "Transformer",
    "tipl": "TIPL",
}
GAINED = {
    "basis_floor": "prefix floor",
    "linear": "linear",
    "tipl": "TIPL",
    "tipl_tuned": "TIPL, tuned",
    "another_run": "another run",
}


def explained(results: Results, bootstrap: Bootstrap, prefix: float, horizon: int, name: str) -> Estimate:
    """Return the share of the displacement ahead that a predictor explains, with its interval over trials."""
    column = int(np.flatnonzero(results.horizons[prefix] == horizon)[0])
    error, moved = (results.values("wpe", prefix, it)[:, column] for it in (name, "persistence"))
    left = bootstrap.ratio(error, moved)
    return Estimate(1 - left.value, 1 - left.high, 1 - left.low)


def rows_of(label: str | None, results: Results) -> list[dict[str, Any]]:
    """Return one row for each prefix at which the horizon was evaluated; by default the label is the environment's."""
    bootstrap = Bootstrap(len(results.trials))
    horizon = max(1, round(HORIZON * (results.settings["num_checkpoints"] - 1)))
    rows: list[dict[str, Any]] = []
    for prefix in results.prefixes:
        if horizon not in results.horizons[prefix]:
            continue
        gain = captured_gain(results, bootstrap, prefix, horizon)
        row: dict[str, Any] = {
            "label": label or results.env_id.removesuffix("-v4"),
            "env_id": results.env_id,
            "trials": len(results.trials),
            "checkpoints": results.settings["num_checkpoints"],
            "prefix": prefix,
            "gain": vars(gain.future),
            "noise": gain.noise / gain.future.value if gain.is_clear else None,
        }
        for key, name in EXPLAINED.items():
            row[f"explained by {name}"] = vars(explained(results, bootstrap, prefix, horizon, key))
        for key, name in GAINED.items():
            row[f"gain of {name}"] = vars(gain.shares[key]) if key in gain.shares else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, with "-" for shares of a gain that is not clearly above the noise."""
    shares = [f"explained by {name}" for name in EXPLAINED.values()] + [f"gain of {name}" for name in GAINED.values()]
    lines = ["| | seen | " + " | ".join(it.removeprefix("explained by ") for it in shares) + " | noise |"]
    lines.append("|---" * (len(shares) + 3) + "|")
    for row in rows:
        cells = []
        for share in shares:
            value = row[share]
            if not isinstance(value, dict):
                cells.append("-")
            elif share.startswith("gain"):
                cells.append(interval(value["value"], value["low"], value["high"], 2))
            else:
                cells.append(f"{value['value']:.3f}")
        cells.append("-" if row["noise"] is None else f"{row['noise']:.2f}")
        lines.append(f"| {row['label']} | {row['prefix']:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """Write a bar chart: one panel for the displacement, one for the return, and one group of bars per row."""
    labels = [f"{row['label']} {row['prefix']:.0%}" for row in rows]
    figure, axes = plt.subplots(2, 1, figsize=(11, 7), sharex=True, layout="constrained")
    panels = (("explained by", EXPLAINED, "share of the displacement ahead"), ("gain of", GAINED, "share of the gain"))
    for ax, (prefix, names, title) in zip(axes, panels, strict=True):
        width = 0.8 / len(names)
        for i, (key, name) in enumerate(names.items()):
            at = [(j, row[f"{prefix} {name}"]) for j, row in enumerate(rows) if row[f"{prefix} {name}"] is not None]
            if not at:
                continue
            height, low, high = (np.array([it[bound] for _, it in at]) for bound in ("value", "low", "high"))
            x = np.array([j for j, _ in at]) + (i - (len(names) - 1) / 2) * width
            error = np.abs(np.stack([low, high]) - height)
            ax.bar(x, height, width, yerr=error, label=name, color=THEME[key][0], error_kw={"lw": 0.7})
        ax.axhline(0, color=THEME["muted"][0], lw=0.8)
        ax.set_ylabel(title)
    for j, row in enumerate(rows):
        if row["noise"] is not None:
            sides = [-row["noise"], row["noise"]]
            axes[1].fill_between(
                [j - 0.45, j + 0.45], *sides, color=THEME["grid"][0], zorder=0, label="noise" * (j == 0)
            )
        else:
            axes[1].text(j, 0.05, "no clear gain", rotation=90, ha="center", fontsize=7, color=THEME["muted"][0])
    axes[0].set_ylim(-0.3, 1.0)
    axes[1].set_ylim(-1.5, 3.0)
    axes[1].axhline(1, color=THEME["muted"][0], lw=0.8, ls=":")
    axes[1].set_xticks(range(len(rows)), labels, rotation=60, ha="right", fontsize=8)
    for ax in axes:
        ax.legend(ncols=6, frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    figure.savefig(output)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "evaluations", nargs="+", metavar="[LABEL=]FOLDER", help="what `tipl evaluate` wrote; by default a task's name"
    )
    parser.add_argument("--output", type=Path, required=True, help="the figure, .svg or .png; its .json goes beside it")
    arguments = parser.parse_args()
    named = [(label or None, Path(folder)) for label, _, folder in (it.rpartition("=") for it in arguments.evaluations)]
    rows = [row for label, folder in named for row in rows_of(label, read_results(folder / "results.json"))]
    draw(rows, arguments.output)
    write_record(arguments.output.with_suffix(".json"), rows, indent=1)
    print(table(rows))


if __name__ == "__main__":
    main()
