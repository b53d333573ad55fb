"""Does the optimizer's state at a prefix's end predict where the weights go?

    python studies/update_directions.py runs/tasks/HalfCheetah-v4.zarr ... --output docs/figures/update_directions.json

A checkpoint holds only weights. This study runs the first trials of a store again to the end of each prefix (checking
that the weights have the same bits) and takes Adam's state there: the running mean of the gradient, and that mean
divided by the root of the running mean square, which is the direction of the next step. The future is in the store. Of
each displacement theta_{h+n} - theta_h it computes the share of the squared length that lies along such a direction, in
the span of the prefix's 16 singular directions, and in that span together with the direction. The last minus the second
bounds what saving the direction with each checkpoint could gain if its coordinate were known. A random direction has an
expected share of 1 / p.

The JSON and the printed table have mean shares with 95 % bootstrap intervals over trials; there is no figure.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study import command_line, interval, write_record

from tipl.collecting.envs import make_vec
from tipl.collecting.population import Population, environment_seeds
from tipl.collecting.ppo_config import PPOConfig
from tipl.policy import PolicySpec
from tipl.progress import progress_bar
from tipl.report.intervals import Bootstrap
from tipl.storing.store import Store
from tipl.subspace.basis import Basis
from tipl.subspace.prefix_end import prefix_end_of

PREFIXES = (0.2, 0.4, 0.6)
HORIZONS = (0.0, 0.1, 0.2)
"""Horizons as shares of the path; 0 stands for the next checkpoint."""
N_COMPONENTS = 16

Floats = NDArray[np.float64]


def optimizer_states(store: Store, trials: int, ends: list[int]) -> dict[int, tuple[Floats, Floats]]:
    """Run the first `trials` trials again; return Adam's first and second moments, (trials, p), at each of `ends`."""
    config = PPOConfig.from_dict(store.config["ppo"])
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
    """Return one row for each prefix, horizon and kind of direction: the mean share, with its 95 % interval."""
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
    parser = command_line(__doc__)
    parser.add_argument("stores", nargs="+", type=Path, help="stores that `tipl collect` made, one per task")
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
                what = f"{row['directions']:20} {interval(value, low, high, 4)}"
                print(f"{store.env_id:26} {prefix:.0%} + {row['ahead']:3}  {what}")
    write_record(arguments.output, {"tasks": tasks}, indent=1)


if __name__ == "__main__":
    main()
