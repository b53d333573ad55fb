"""How a forecaster does on a task that it never saw: each store's task left out of training in turn.

    python bench/leave_one_task_out.py runs/*/store.zarr --output docs/zero_shot.json

Every trial of the task left out is forecast, at each prefix to the end of the path. The record holds the mean relative
weight error of TIPL, of the Transformer alone and of persistence, and the 95 % bootstrap interval of the ratio of
TIPL's to persistence's. `--only N` trains the N-th of them alone, to spread the work over processes; the parts are
joined by the call that finds them all.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from tipl.locations import write_atomically
from tipl.report.estimates import Bootstrap
from tipl.rollout import Forecaster
from tipl.store import Store
from tipl.train import train
from tipl.training_data import TrainConfig, prefix_end_of, thin

PREFIXES = (0.2, 0.4, 0.6, 0.8)
CONFIG = TrainConfig(
    num_checkpoints=51, max_trials=48, steps=2000, refine_steps=6000, heldout_fraction=0.05, confidence_trials=0
)


def judge(forecaster: Forecaster, store: Store) -> list[dict[str, object]]:
    """Return a row a prefix: errors at the end of the path over all trials of a store."""
    rows: list[dict[str, object]] = []
    length = forecaster.model.config.max_len
    paths = [thin(store.trial(i).weights(), length) for i in range(store.num_trials)]
    bootstrap = Bootstrap(len(paths))
    for share in PREFIXES:
        end = prefix_end_of(share, length)
        horizon = length - 1 - end
        forecasts = forecaster.forecast(
            [path[: end + 1] for path in paths], [horizon] * len(paths), layout=store.policy
        )
        errors: dict[str, list[float]] = {"tipl": [], "transformer": [], "persistence": []}
        for path, forecast in zip(paths, forecasts, strict=True):
            walked = np.linalg.norm(path[-1] - path[0])
            at_end = np.array([horizon])
            for name, weights in (
                ("tipl", forecast.weights(at_end)[0]),
                ("transformer", forecast.in_basis(at_end)[0]),
                ("persistence", path[end]),
            ):
                errors[name].append(float(np.linalg.norm(weights - path[-1]) / walked))
        ratio = bootstrap.ratio(np.array(errors["tipl"]), np.array(errors["persistence"]))
        means = {name: float(np.mean(values)) for name, values in errors.items()}
        rows.append({"prefix": share, **means, "ratio": ratio.value, "low": ratio.low, "high": ratio.high})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path, help="a store a task")
    parser.add_argument("--output", type=Path, required=True, help="the JSON record; parts and models go beside it")
    parser.add_argument("--only", type=int, help="leave out this one of the stores alone")
    arguments = parser.parse_args()
    stores = [Store.open(path) for path in arguments.stores]
    parts = arguments.output.with_suffix("")
    for i, left_out in enumerate(stores):
        part = parts / f"{left_out.env_id}.json"
        if part.exists() or arguments.only not in (None, i):
            continue
        folder = parts / f"without-{left_out.env_id}-{time.time_ns()}"
        train([store for store in stores if store is not left_out], folder, CONFIG)
        rows = judge(Forecaster.load(folder), left_out)
        write_atomically(
            part, json.dumps({"env_id": left_out.env_id, "trials": left_out.num_trials, "rows": rows}).encode()
        )
        print(part, *(f"{row['prefix']:.0%} {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in rows))
    found = [parts / f"{store.env_id}.json" for store in stores]
    if all(part.exists() for part in found):
        record = {"train": dataclasses.asdict(CONFIG), "tasks": [json.loads(part.read_text()) for part in found]}
        write_atomically(arguments.output, (json.dumps(record, indent=1) + "\n").encode())
        print(arguments.output)


if __name__ == "__main__":
    main()
