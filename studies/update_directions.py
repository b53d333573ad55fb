"""Does the optimizer know at a prefix's end where the weights go? Shares of the displacement ahead, by direction.

    python studies/update_directions.py runs/tasks/HalfCheetah-v4.zarr ... --output docs/figures/update_directions.json

A checkpoint holds weights alone. This runs the first trials of a store again, to the end of each prefix (they have the
same bits, which is checked), and takes what the optimizer holds there: Adam's running mean of the gradient, and that
over the root of its running square, which is the next step's direction. The future comes from the store. Of each
displacement theta_{h+n} - theta_h, the table gives the share of the square that lies along a direction, in the span of
the prefix's 16 singular directions, and in that span with the direction added: what saving the direction with each
checkpoint could bring at most, were its coordinate known. A random direction has a share of 1 / p.
"""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl.collecting.envs import make_vec
from tipl.collecting.population import Population, environment_seeds
from tipl.collecting.ppo_config import PPOConfig
from tipl.files.locations import write_atomically
from tipl.forecasting.sources import prefix_end_of
from tipl.policy import PolicySpec
from tipl.progress import progress_bar
from tipl.report.intervals import Bootstrap
from tipl.storing.store import Store
from tipl.subspace.basis import Basis

PREFIXES = (0.2, 0.4, 0.6)
HORIZONS = (0.0, 0.1, 0.2)
"""Shares of the path; 0 stands for the next checkpoint."""
N_COMPONENTS = 16

Floats = NDArray[np.float64]


def optimizer_states(store: Store, trials: int, ends: list[int]) -> dict[int, tuple[Floats, Floats]]:
    """Return Adam's moments (trials, p), first and second, at each of `ends`, of the first trials run once more."""
    config = PPOConfig(**{**store.config["ppo"], "hidden_sizes": tuple(store.config["ppo"]["hidden_sizes"])})
    seeds = store.seeds[:trials]
    assert isinstance(store.policy, PolicySpec)
    p, states = store.policy.num_params, {}
    num_envs = trials * config.num_envs
    env = make_vec(store.env_id, num_envs, seeds=environment_seeds(seeds, config.num_envs))
    with contextlib.closing(env), progress_bar(True) as bar:
        population = Population(env, config, seeds)
        task = bar.add_task(f"run {store.env_id} again", total=ends[-1], note="")
        for iteration in range(1, ends[-1] + 1):
            population.iterate()
            bar.advance(task)
            if iteration in ends:
                stored = np.stack([store.trial(i).weights(iteration, iteration + 1)[0] for i in range(trials)])
                if not np.array_equal(stored, population.weights()):
                    raise SystemExit(f"{store.path}: another tipl or machine made its trials")
                first, second = population.moments[:, :, :p].astype(np.float64)
                states[iteration] = first, second
    return states


def share(directions: Floats, moved: Floats) -> float:
    """Return the share of |moved|^2, (p,), that lies in the span of directions (k, p)."""
    q, _ = np.linalg.qr(directions.T)
    return float(((q.T @ moved) ** 2).sum() / (moved**2).sum())


def rows_of(store: Store, trials: int) -> list[dict[str, Any]]:
    """Return a row a prefix, horizon and kind of directions: the mean share and its 95 % interval over trials."""
    last = store.num_checkpoints - 1
    ends = [prefix_end_of(prefix, store.num_checkpoints) for prefix in PREFIXES]
    states = optimizer_states(store, trials, ends)
    bootstrap, rows = Bootstrap(trials), []
    for prefix, end in zip(PREFIXES, ends, strict=True):
        for horizon in HORIZONS:
            ahead = max(1, round(horizon * last))
            shares: dict[str, list[float]] = {}
            for i in range(trials):
                path = store.trial(i).weights(0, end + ahead + 1).astype(np.float64)
                moved = path[end + ahead] - path[end]
                span = Basis.from_prefix(path[: end + 1].astype(np.float32), N_COMPONENTS).directions.astype(np.float64)
                span = span[np.any(span != 0, 1)]
                first, second = (moment[i] for moment in states[end])
                singles = {
                    "gradient": first,
                    "Adam": first / (np.sqrt(second) + 1e-8),
                    "last update": path[end] - path[end - 1],
                }
                found = {"span": share(span, moved)}
                for name, direction in singles.items():
                    found[name] = share(direction[None], moved)
                    found[f"span + {name}"] = share(np.concatenate([span, direction[None]]), moved)
                for name, value in found.items():
                    shares.setdefault(name, []).append(value)
            for name, values in shares.items():
                estimate = bootstrap.estimate(np.array(values))
                rows.append({"prefix": prefix, "ahead": ahead, "directions": name, "share": vars(estimate)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path, help="stores that `tipl collect` made, one a task")
    parser.add_argument("--output", type=Path, required=True, help="the JSON record")
    parser.add_argument("--num-trials", type=int, default=16, help="trials of each store that are run again")
    arguments = parser.parse_args()
    tasks = []
    for path in arguments.stores:
        store = Store.open(path)
        rows = rows_of(store, min(arguments.num_trials, store.num_trials))
        tasks.append({"env_id": store.env_id, "num_params": store.policy.num_params, "rows": rows})
        for prefix in PREFIXES:
            for row in (row for row in rows if row["prefix"] == prefix):
                value, low, high = (row["share"][key] for key in ("value", "low", "high"))
                what = f"{row['directions']:20} {value:.4f} [{low:.4f}, {high:.4f}]"
                print(f"{store.env_id:26} {prefix:.0%} + {row['ahead']:3}  {what}")
    write_atomically(arguments.output, (json.dumps({"tasks": tasks}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
