"""How a store was made, as far as its settings say."""

import dataclasses
import json
import shlex
from typing import Any

from tipl.collecting.ppo_config import PPOConfig
from tipl.storing.store import Store

_OPTIONS = {"num_trials", "total_timesteps", "seed", "shared_init", "init_seed", "ppo"}
"""Settings that are options of `tipl collect` alone."""


def origin_of(store: Store) -> str | None:
    """Return the `tipl collect` command that makes the store, or where its checkpoints come from; None if unknown."""
    source = store.config.get("source")
    if isinstance(source, dict):
        return "recorded while training" if source.get("format") == "recorder" else "imported checkpoint files"
    settings = store.config
    if not settings.keys() <= _OPTIONS or not {"num_trials", "total_timesteps", "seed", "ppo"} <= settings.keys():
        return None
    words = ["tipl", "collect", "--env-id", store.env_id]
    if store.env_kwargs:
        words += ["--env-kwargs", json.dumps(store.env_kwargs)]
    for name in ("num_trials", "total_timesteps", "seed"):
        words += [f"--{name.replace('_', '-')}", str(settings[name])]
    if "init_seed" in settings:
        words += ["--init-seed", str(settings["init_seed"])]
    elif settings.get("shared_init"):
        words.append("--shared-init")
    return shlex.join([*words, *_ppo_options(settings["ppo"]), "--output", "store.zarr"])


def _ppo_options(settings: dict[str, Any]) -> list[str]:
    """Return the options of PPO settings that are not the default."""
    default, words = dataclasses.asdict(PPOConfig()), []
    for name, value in dataclasses.asdict(PPOConfig.from_dict(settings)).items():
        option = name.replace("_", "-")
        if value == default[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--ppo.{option}" if value else f"--ppo.no-{option}")
        else:
            words += [f"--ppo.{option}", *map(str, value if isinstance(value, tuple | list) else [value])]
    return words
