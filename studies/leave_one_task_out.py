"""How a forecaster does on a task that it never saw: each store's task left out of training in turn.

    python studies/leave_one_task_out.py runs/*/store.zarr --output docs/figures/zero_shot.json

Every trial of the task left out is forecast, at each prefix to the end of the path, and judged by the relative weight
error. How far a forecaster is to be trusted on a strange task, as a share of the displacement that it forecasts, is
chosen for each task on the others: on their results as tasks left out. The record holds that trust, the mean errors
with it, without it and of persistence, and the 95 % bootstrap interval of the ratio to persistence's. The last line
gives the trust that all tasks together choose: `tipl train --trust` for a forecaster that is to meet strange tasks.

`--only N` trains without the N-th store alone, to spread the work over processes; models are kept beside the output.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tipl.files.locations import write_atomically
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.sources import prefix_end_of, thin
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training import train
from tipl.report.intervals import Bootstrap
from tipl.storing.store import Store

PREFIXES = (0.2, 0.4, 0.6, 0.8)
TRUSTS = np.arange(1, 21) / 20
CONFIG = TrainConfig(
    num_checkpoints=51, max_trials=48, steps=2000, refine_steps=6000, heldout_fraction=0.05, confidence_trials=0
)


def error_curves(forecaster: Forecaster, store: Store) -> NDArray[np.float64]:
    """Return relative errors at the end of the path, (prefixes, trials, 1 + trusts), all trials; first persistence's.

    The squared error of a trusted share a of a displacement d is |truth|^2 - 2 a d.truth + a^2 |d|^2.
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
    """Return the index of the trust whose worst error over persistence's, of all tasks and prefixes, is least.

    The worst case, because a strange task may be any of them: the mean is ruled by the most predictable one.
    """
    ratios = [curve.mean(1)[:, 1:] / curve.mean(1)[:, :1] for curve in curves]  # (prefixes, trusts) each
    return int(np.argmin(np.max(ratios, axis=(0, 1))))


def rows_of(curves: NDArray[np.float64], trust: int) -> list[dict[str, float]]:
    """Return a row a prefix for the task with these curves, (prefixes, trials, 1 + trusts)."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path, help="a store a task")
    parser.add_argument("--output", type=Path, required=True, help="the JSON record; models go beside it")
    parser.add_argument("--only", type=int, help="leave out this one of the stores alone")
    arguments = parser.parse_args()
    stores = [Store.open(path) for path in arguments.stores]
    folders = [arguments.output.with_suffix("") / f"without-{store.env_id}" for store in stores]
    for i, (left_out, folder) in enumerate(zip(stores, folders, strict=True)):
        if arguments.only in (None, i) and not (folder / "config.json").exists():
            train([store for store in stores if store is not left_out], folder, CONFIG)
    if not all((folder / "config.json").exists() for folder in folders):
        return  # other processes are still at it
    curves = [error_curves(Forecaster.load(folder), store) for folder, store in zip(folders, stores, strict=True)]
    tasks = []
    for i, store in enumerate(stores):
        trust = chosen(curves[:i] + curves[i + 1 :])
        rows = rows_of(curves[i], trust)
        tasks.append({"env_id": store.env_id, "trials": store.num_trials, "trust": float(TRUSTS[trust]), "rows": rows})
        ratios = (f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in rows)
        print(f"{store.env_id:26} trust {TRUSTS[trust]:.2f}, error over persistence's:", "  ".join(ratios))
    trust = float(TRUSTS[chosen(curves)])
    record = {"train": dataclasses.asdict(CONFIG), "trust": trust, "tasks": tasks}
    write_atomically(arguments.output, (json.dumps(record, indent=1) + "\n").encode())
    print(f"trust {trust:.2f}")


if __name__ == "__main__":
    main()
