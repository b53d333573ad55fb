"""The settings with which a run was begun: how they differ from others, and whether the run is complete."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from tipl.collecting.ppo_config import PPOConfig
from tipl.collecting.resume import Unfinished
from tipl.files.locations import Location
from tipl.storing.store import Store

NOTHING = "nothing"


def config_of(
    *,
    num_trials: int,
    total_timesteps: int,
    seed: int,
    ppo: PPOConfig,
    shared_init: bool = False,
    init_seed: int | None = None,
    record_critic: bool = False,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the config of a collection's store; `more` are the settings of another population than PPO's own."""
    return {
        "num_trials": num_trials,
        "total_timesteps": total_timesteps,
        "seed": seed,
        "shared_init": shared_init or init_seed is not None,
        **({} if init_seed is None else {"init_seed": init_seed}),
        **({"record_critic": True} if record_critic else {}),
        **dict(more or {}),
        "ppo": dataclasses.asdict(ppo),
    }


def num_checkpoints_asked(store: Store) -> int | None:
    """Return how many checkpoints each trial has once the collection is complete; None for a store not collected."""
    steps, ppo = store.config.get("total_timesteps"), store.config.get("ppo")
    if not isinstance(steps, int) or not isinstance(ppo, dict):  # the config of a `Recorder` may hold anything
        return None
    batch_size = ppo.get("num_steps"), ppo.get("num_envs", 1)  # older stores do not say num_envs; it was 1
    if not all(isinstance(size, int) and size > 0 for size in batch_size):
        return None
    return 1 - (-steps // math.prod(batch_size))


def is_complete(store: Store) -> bool:
    """Return whether the store is final, that is, not an unfinished collection. Imported stores are always final."""
    asked = num_checkpoints_asked(store)
    return not Unfinished(store).exists() and (asked is None or store.num_checkpoints >= asked)


def refuse_unfinished(owner: str, store: Store) -> None:
    """Raise ValueError, which begins with `owner`, where the store is an unfinished collection."""
    if not is_complete(store):
        command = "accelerate" if "jumps" in store.config else "collect"
        raise ValueError(f"{owner}: {store.path} is an unfinished collection; `tipl {command}` finishes it")


def changed_settings(began: dict[str, Any], asked: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted name, value in `began`, value in `asked`) of every setting that differs.

    Both are nested dicts of plain JSON. A setting that one of them lacks has the value `NOTHING` there.
    """
    was, now = flat_config(began), flat_config(asked)
    names = [*now, *(was.keys() - now.keys())]
    pairs = [(name, was.get(name, NOTHING), now.get(name, NOTHING)) for name in names]
    return [(name, before, after) for name, before, after in pairs if before != after]


def reopened(output: Location, asked: dict[str, Any]) -> Store:
    """Return the unfinished collection at `output`, which must have been begun with the settings `asked`."""
    try:
        store = Store.open(output)
    except FileNotFoundError:
        raise FileExistsError(f"collect: {output} exists and is no store; choose another output or remove it") from None
    if is_complete(store):
        raise FileExistsError(f"collect: {output} exists and is complete; choose another output or remove it")
    refuse_other_settings(store, asked)
    return store


def refuse_other_settings(store: Store, asked: dict[str, Any]) -> None:
    """Raise ValueError unless the collection in `store` was begun with the settings `asked`."""
    ppo = dataclasses.asdict(PPOConfig()) | store.config["ppo"]  # an older store lacks settings that had no other value
    began = {"env_id": store.env_id, "env_kwargs": store.env_kwargs, **store.config, "ppo": ppo}
    for name, was, now in changed_settings(began, asked):
        raise ValueError(
            f"collect: {store.path} holds an unfinished collection with {name} = {was}, got {now}; "
            "give its arguments to go on with it, or choose another output"
        )


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return dotted name -> value of a nested dict, with the types that JSON gives the values."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(config)).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": x for inner, x in flat_config(value).items()}
        else:
            flat[name] = value
    return flat
