"""A description of a store, for a person to read."""

import numpy as np

from tipl.collecting.settings import flat_config, is_complete, num_checkpoints_asked
from tipl.files.locations import num_bytes
from tipl.policy import PolicySpec
from tipl.storing.store import Store


def describe_store(store: Store) -> dict[str, str]:
    """Return label -> text about the store: env, trials, checkpoints, policy, layout, bytes, returns, config.

    A text has one line per entry. Raises RuntimeError where a trial is damaged.
    """
    trials, policy = [store.trial(i) for i in range(len(store))], store.policy
    n = min(trial.num_checkpoints for trial in trials)
    lines = {
        "env": store.env,
        "trials": f"{len(store)}, seeds {_shortened(store.seeds)}",
        "checkpoints": f"{n} of each trial, {_completeness(store)}",
        "policy": f"p = {policy.num_params:,} float32 weights",
    }
    if isinstance(policy, PolicySpec):
        lines["policy"] += f", {policy}"
    lines["layout"] = "\n".join(
        f"{offset:>9,} {name} {shape}" for name, (offset, shape) in policy.layout.items()
    )  # with the index of each parameter's first weight in the flat weights
    lines["bytes"] = f"{num_bytes(store.path):,} in files, {n * len(store) * policy.num_params * 4:,} of weights"
    if n:
        env_steps = [trial.env_steps[n - 1] for trial in trials]
        returns = [trial.episodic_return[:n] for trial in trials]
        known = [row[~np.isnan(row)] for row in returns if not np.isnan(row).all()]
        lines["env steps"] = f"{min(env_steps):,} per trial, {sum(env_steps):,} in all"
        lines["return"] = (
            f"first known: {_spread([row[0] for row in known])}\nlast known:  {_spread([row[-1] for row in known])}"
        )
    lines["config"] = "\n".join(f"{name} = {value}" for name, value in flat_config(store.config).items())
    return lines


def _completeness(store: Store) -> str:
    if is_complete(store):
        return "complete"
    return f"unfinished: {num_checkpoints_asked(store)} were asked for, and the same `tipl collect` goes on"


def _shortened(values: list[int]) -> str:
    return ", ".join(map(str, values[:3])) + (", ..." if len(values) > 3 else "")


def _spread(values: list[float]) -> str:
    if not values:
        return "none"
    return f"min {min(values):,.1f}, median {np.median(values):,.1f}, max {max(values):,.1f} over {len(values)} trials"
