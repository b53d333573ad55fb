"""Which tasks' paths can be predicted, and what that is worth: one figure and one table from evaluations.

    python bench/predictability_map.py runs/*/evaluation --output docs/predictability.svg

For each task, at each prefix and the horizon of 20 % of the path, on held-out trials: the share of the displacement
ahead, 1 - |forecast - truth|^2 / |persistence - truth|^2 summed over trials, that lies in the span of the prefix's
directions (what any forecast within the basis could explain), and that a ridge regression on each weight's own past,
the Transformer alone and TIPL explain; and the share of the gain in return, a ratio of means over trials, that linear
extrapolation and TIPL reach. The table goes to standard output and, as JSON, beside the figure.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tipl.locations import write_atomically
from tipl.report.estimates import Bootstrap, Estimate, captured_gain
from tipl.report.results import Results, read_results

HORIZON = 0.2
EXPLAINED = {"basis_floor": "in span", "ridge": "ridge", "transformer": "Transformer", "tipl": "TIPL"}
GAINED = {"basis_floor": "floor", "linear": "linear", "tipl": "TIPL", "tipl_tuned": "TIPL, tuned"}
COLORS = {
    "basis_floor": "#b4bcc6",
    "ridge": "#661100",
    "transformer": "#f2a65a",
    "tipl": "#d55e00",
    "linear": "#00875f",
}
COLORS["tipl_tuned"] = "#cc3311"


def explained(results: Results, bootstrap: Bootstrap, prefix: float, horizon: int, name: str) -> Estimate:
    """Return the share of the displacement ahead that a predictor explains, with its interval over trials."""
    column = int(np.flatnonzero(results.horizons[prefix] == horizon)[0])
    error, moved = (results.values("wpe", prefix, it)[:, column] for it in (name, "persistence"))
    left = bootstrap.ratio(error, moved)
    return Estimate(1 - left.value, 1 - left.high, 1 - left.low)


def rows_of(results: Results) -> list[dict[str, object]]:
    """Return a row a prefix that leaves the horizon."""
    bootstrap = Bootstrap(len(results.trials))
    horizon = max(1, round(HORIZON * (results.settings["num_checkpoints"] - 1)))
    rows: list[dict[str, object]] = []
    for prefix in results.prefixes:
        if horizon not in results.horizons[prefix]:
            continue
        gain = captured_gain(results, bootstrap, prefix, horizon)
        row: dict[str, object] = {
            "env_id": results.env_id,
            "trials": len(results.trials),
            "checkpoints": results.settings["num_checkpoints"],
            "prefix": prefix,
            "gain": vars(gain.future),
        }
        for key, name in EXPLAINED.items():
            row[f"explained by {name}"] = vars(explained(results, bootstrap, prefix, horizon, key))
        for key, name in GAINED.items():
            row[f"gain of {name}"] = vars(gain.shares[key]) if key in gain.shares else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows as a Markdown table; a share of a gain that does not stand out of the noise is left blank."""
    shares = [f"explained by {name}" for name in EXPLAINED.values()] + [f"gain of {name}" for name in GAINED.values()]
    lines = ["| task | prefix | " + " | ".join(it.removeprefix("explained by ") for it in shares) + " |"]
    lines.append("|---" * (len(shares) + 2) + "|")
    for row in rows:
        cells = []
        for share in shares:
            value = row[share]
            if not isinstance(value, dict):
                cells.append("-")
            elif share.startswith("gain"):
                cells.append(f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]")
            else:
                cells.append(f"{value['value']:.3f}")
        lines.append(f"| {row['env_id']} | {row['prefix']:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, object]], output: Path) -> None:
    """Write a bar chart: a panel for the displacement and one for the return, a group of bars a task and prefix."""
    labels = [f"{str(row['env_id']).removesuffix('-v4')} {row['prefix']:.0%}" for row in rows]
    figure, axes = plt.subplots(2, 1, figsize=(11, 7), sharex=True, layout="constrained")
    panels = (("explained by", EXPLAINED, "share of the displacement ahead"), ("gain of", GAINED, "share of the gain"))
    for ax, (prefix, names, title) in zip(axes, panels, strict=True):
        for i, (key, name) in enumerate(names.items()):
            values = [row[f"{prefix} {name}"] for row in rows]
            x = [j + (i - (len(names) - 1) / 2) * 0.2 for j in range(len(rows))]
            at = [(where, it) for where, it in zip(x, values, strict=True) if isinstance(it, dict)]
            height = np.array([it["value"] for _, it in at])
            error = np.abs(np.array([[it["low"], it["high"]] for _, it in at]).T - height) if at else None
            ax.bar(
                [where for where, _ in at], height, 0.2, yerr=error, label=name, color=COLORS[key], error_kw={"lw": 0.8}
            )
        ax.axhline(0, color="#59636e", lw=0.8)
        ax.set_ylabel(title)
        ax.legend(ncols=4, frameon=False, fontsize=9)
    axes[1].set_ylim(-1.5, 2.5)
    axes[1].axhline(1, color="#59636e", lw=0.8, ls=":")
    axes[1].set_xticks(range(len(rows)), labels, rotation=60, ha="right", fontsize=8)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", type=Path, help="folders that `tipl evaluate` wrote, one a task")
    parser.add_argument("--output", type=Path, required=True, help="the figure, .svg or .png; its .json goes beside it")
    arguments = parser.parse_args()
    rows = [row for folder in arguments.evaluations for row in rows_of(read_results(folder / "results.json"))]
    draw(rows, arguments.output)
    write_atomically(arguments.output.with_suffix(".json"), (json.dumps(rows, indent=1) + "\n").encode())
    print(table(rows))


if __name__ == "__main__":
    main()
