"""How well does a forecaster do on a task that it never saw? Each store's task is left out of training in turn.

    python studies/leave_one_task_out.py runs/*/store.zarr --output docs/figures/zero_shot.json

Every trial of the task left out is forecast from each prefix to the end of the path, and judged by the relative weight
error. Trust is the share of the forecast displacement that is used. For each task it is chosen on the other tasks'
results, each obtained with that task left out.

The JSON has each task's trust, its mean errors with that trust, with full trust and of persistence, and the 95 %
bootstrap interval of the ratio to persistence's error. The last line printed is the trust chosen on all tasks together:
use it as `tipl train --trust` for a forecaster of unknown tasks. There is no figure. `--only N` trains only the model
without store N (from 0), to spread the work over processes; models are kept in a folder beside the output.
"""

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from study import PREFIXES, command_line, interval, write_record

from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.sources import thin
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training import train
from tipl.report.intervals import Bootstrap
from tipl.storing.store import Store
from tipl.subspace.prefix_end import prefix_end_of

TRUSTS = np.arange(1, 21) / 20
CONFIG = TrainConfig(
    num_checkpoints=51, max_trials=48, steps=2000, refine_steps=6000, heldout_fraction=0.05, confidence_trials=0
)


def error_curves(forecaster: Forecaster, store: Store) -> NDArray[np.float64]:
    """Return all trials' relative errors at the end of the path, (prefixes, trials, 1 + trusts); persistence is first.

    The squared error of the share a of a forecast displacement d is |truth|^2 - 2 a d.truth + a^2 |d|^2.
    """
    length = forecaster.model.config.max_len
    paths = [thin(store.trial(i).weights(), length) for i in range(store.num_trials)]
    shares = np.append(0.0, TRUSTS)
    errors = np.empty((len(PREFIXES), len(paths), len(shares)))
    for i, prefix in enumerate(PREFIXES):
        end = prefix_end_of(prefix, length)
        horizon = length - 1 - end
        forecasts = forecaster.forecast(
            [path[: end + 1] for path in paths], [horizon] * len(paths), layout=store.policy
        )
        for j, (path, forecast) in enumerate(zip(paths, forecasts, strict=True)):
            moved = forecast.weights([horizon])[0].astype(np.float64) - path[end]
            truth = path[-1].astype(np.float64) - path[end]
            squared = truth @ truth - 2 * shares * (moved @ truth) + shares**2 * (moved @ moved)
            errors[i, j] = np.sqrt(np.maximum(squared, 0.0)) / np.linalg.norm(path[-1] - path[0])
    return errors


def chosen(curves: list[NDArray[np.float64]]) -> int:
    """Return the index of the trust with the smallest worst ratio to persistence's error over all tasks and prefixes.

    The worst case, because an unknown task may be like any of them; the most predictable task would dominate a mean.
    """
    ratios = [curve.mean(1)[:, 1:] / curve.mean(1)[:, :1] for curve in curves]  # (prefixes, trusts) each
    return int(np.argmin(np.max(ratios, axis=(0, 1))))


def rows_of(curves: NDArray[np.float64], trust: int) -> list[dict[str, float]]:
    """Return one row per prefix for the task with these error curves, (prefixes, trials, 1 + trusts)."""
    bootstrap = Bootstrap(curves.shape[1])
    rows = []
    for prefix, errors in zip(PREFIXES, curves, strict=True):
        persistence, trusted, whole = errors[:, 0], errors[:, 1 + trust], errors[:, -1]
        ratio = bootstrap.ratio(trusted, persistence)
        rows.append(
            {
                "prefix": prefix,
                "tipl": float(trusted.mean()),
                "tipl_trusted_fully": float(whole.mean()),
                "persistence": float(persistence.mean()),
                "ratio": ratio.value,
                "low": ratio.low,
                "high": ratio.high,
            }
        )
    return rows


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("stores", nargs="+", type=Path, help="one store per task")
    parser.add_argument("--output", type=Path, required=True, help="the JSON record; models go beside it")
    parser.add_argument("--only", type=int, help="leave out only the store with this index")
    arguments = parser.parse_args()
    stores = [Store.open(path) for path in arguments.stores]
    folders = [arguments.output.with_suffix("") / f"without-{store.env_id}" for store in stores]
    for i, (left_out, folder) in enumerate(zip(stores, folders, strict=True)):
        if arguments.only in (None, i) and not (folder / "config.json").exists():
            train([store for store in stores if store is not left_out], folder, CONFIG)
    if not all((folder / "config.json").exists() for folder in folders):
        return  # other processes are still training
    curves = [error_curves(Forecaster.load(folder), store) for folder, store in zip(folders, stores, strict=True)]
    tasks = []
    for i, store in enumerate(stores):
        trust = chosen(curves[:i] + curves[i + 1 :])
        rows = rows_of(curves[i], trust)
        tasks.append({"env_id": store.env_id, "trials": store.num_trials, "trust": float(TRUSTS[trust]), "rows": rows})
        ratios = (interval(row["ratio"], row["low"], row["high"]) for row in rows)
        print(f"{store.env_id:26} trust {TRUSTS[trust]:.2f}, error over persistence's:", "  ".join(ratios))
    trust = float(TRUSTS[chosen(curves)])
    record = {"train": dataclasses.asdict(CONFIG), "trust": trust, "tasks": tasks}
    write_record(arguments.output, record, indent=1)
    print(f"trust {trust:.2f}")


if __name__ == "__main__":
    main()
