"""Are a forecaster's predicted probabilities calibrated on runs that it has never seen?

    tipl collect --env-id Hopper-v4 --seed 1 --output fresh.zarr
    python studies/calibration.py runs/hopper/model=fresh.zarr ... --output docs/figures/calibration.svg

For each forecaster and a store of runs of its task with other seeds: every run that was not used to calibrate it is
forecast at four prefixes and up to four horizons. Each forecast policy is run, and so is the policy at its prefix's
end, on five episodes with the run's own seeds.

The figure has one panel per task: the share of forecasts that had the higher return against the probability predicted,
in ten bins, with 95 % intervals over runs and the expected calibration error (ECE). The printed table adds the skill,
1 - Brier score / Brier score of always predicting the share of forecasts that came true; it is 0 for a confidence that
tells forecasts apart no better than a constant. The JSON beside the figure has every forecast.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study import command_line, interval, write_record

from tipl.files.locations import write_atomically
from tipl.forecasting.calibration import run_forecasts
from tipl.forecasting.forecaster import Forecaster, source_to_judge
from tipl.report.confidence import RELIABILITY_MARKS, Reliability, draw_reliability, reliability_of
from tipl.report.drawing import Panel, Plot
from tipl.report.intervals import Bootstrap, Estimate
from tipl.report.results import FloatArray
from tipl.storing.store import Store

SEED = 1
"""Seed of the episodes; the episodes of training have seed 0."""


def judge(forecaster: Forecaster, store: Store, num_threads: int | None) -> dict[str, Any]:
    """Return the task's record: predicted probabilities and outcomes, (trials, forecasts per trial) each."""
    source = source_to_judge(store, forecaster)
    if not forecaster.confidence or forecaster.source_of(store) is not None:
        raise SystemExit(f"{store.path}: expected a calibrated forecaster and runs that it was not trained on")
    taught = {seed for it in forecaster.config.get("calibrated_on", []) for seed in it["seeds"]}
    trials = [i for i, seed in enumerate(store.seeds) if seed not in taught]
    if not trials:
        raise SystemExit(f"{store.path}: expected runs that the forecaster was not calibrated on")
    outcomes = run_forecasts(forecaster, source, trials, seed=SEED, num_threads=num_threads)
    predicted = forecaster.confidence(outcomes.features).round(4)
    return {"env_id": store.env_id, "predicted": predicted.tolist(), "outcomes": outcomes.beats.tolist()}


def arrays(task: dict[str, Any]) -> tuple[FloatArray, FloatArray]:
    """Return the probabilities and outcomes of a task, (trials, forecasts per trial) each."""
    return np.array(task["predicted"]), np.array(task["outcomes"], float)


def skill(task: dict[str, Any]) -> Estimate:
    """Return 1 - Brier score / Brier score of the best constant."""
    predicted, outcomes = arrays(task)
    score, constant = ((p - outcomes) ** 2 for p in (predicted, outcomes.mean()))
    left = Bootstrap(len(outcomes)).ratio(score.mean(1), constant.mean(1))
    return Estimate(1 - left.value, 1 - left.high, 1 - left.low)


def found_in(task: dict[str, Any]) -> Reliability:
    predicted, outcomes = arrays(task)
    found = reliability_of(predicted, outcomes, Bootstrap(len(outcomes)))
    assert found is not None
    return found


def table(tasks: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the calibration error and skill of every task, and of all tasks together."""
    lines = ["| task | runs | forecasts | mean probability | came true | calibration error | skill |", "|---" * 7 + "|"]
    for task in [*tasks, pooled(tasks)]:
        predicted, outcomes = arrays(task)
        cells = [task["env_id"], f"{len(outcomes)}", f"{outcomes.size}", f"{predicted.mean():.2f}"]
        cells.append(f"{outcomes.mean():.2f}")
        cells += [interval(it.value, it.low, it.high) for it in (found_in(task).error, skill(task))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pooled(tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return all forecasts as one task; every task must have equally many forecasts per run."""
    both = {key: [row for task in tasks for row in task[key]] for key in ("predicted", "outcomes")}
    return {"env_id": "all", **both}


def plot(tasks: Sequence[dict[str, Any]]) -> Plot:
    panels = []
    for task in tasks:
        found = found_in(task)
        name = task["env_id"].rpartition("-v")[0]
        panels.append(Panel(f"{name}, ECE {found.error.value:.3f}", lambda ax, it=found: draw_reliability(ax, it)))
    return Plot("calibration", tuple(panels), RELIABILITY_MARKS, columns=4, panel_inches=(3.3, 2.8))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("pairs", nargs="+", metavar="MODEL=STORE", help="a forecaster and runs of its task")
    parser.add_argument("--output", type=Path, required=True, help="the figure, .svg; its .json goes beside it")
    parser.add_argument("--num-threads", type=int, help="of the simulator; by default all cores")
    arguments = parser.parse_args()
    tasks = []
    for pair in arguments.pairs:
        model, _, store = pair.partition("=")
        tasks.append(judge(Forecaster.load(model), Store.open(store), arguments.num_threads))
        write_record(arguments.output.with_suffix(".json"), tasks)
    write_atomically(arguments.output, plot(tasks).svg())
    print(table(tasks))


if __name__ == "__main__":
    main()
