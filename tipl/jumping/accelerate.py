"""Train a population of PPO runs that jump along forecasts of their own weights."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tipl.collecting.collection import collect
from tipl.collecting.ppo_config import PPOConfig
from tipl.collecting.settings import config_of, is_complete, refuse_other_settings
from tipl.files.locations import read_file
from tipl.files.publishing import published
from tipl.forecasting.forecaster import PRETRAINED, Forecaster
from tipl.jumping.jump_config import JumpConfig
from tipl.jumping.jumping_population import JumpingPopulation
from tipl.jumping.jumps import Jumps, warn_if_too_short
from tipl.jumping.learner import PopulationLearner
from tipl.jumping.ledger import Ledger
from tipl.storing.store import Store

STORE, LEDGER = "store.zarr", "ledger.json"


def accelerate(
    output: str | Path,
    *,
    env_id: str,
    env_kwargs: Mapping[str, Any] | None = None,
    num_trials: int,
    total_timesteps: int,
    model: str | Path | None = None,
    jumps: JumpConfig = JumpConfig(),
    seed: int = 0,
    ppo: PPOConfig | None = None,
    num_threads: int | None = None,
    tensorboard: str | Path | None = None,
    progress: bool = True,
) -> Ledger:
    """Train PPO runs that jump along forecasts of their own weights; write `output`, and return its ledger.

    The folder `output` holds store.zarr, the runs' checkpoints, as `collect` writes them; ledger.json, their returns,
    jumps and env steps by purpose (`Ledger`); and manifest.json. Every env step that a jump costs is among
    `total_timesteps`: an iteration that was undone is an iteration less.

    An interrupted call goes on when it is called again with the same arguments, with the same bytes as without the
    interruption.

    Args:
        model: a forecaster's folder, by default the one that comes with tipl. It forecasts the critic well where it was
            trained on critics' paths too (`collect`'s record_critic).
        jumps: when runs jump, how far, and what a jump must hold against; `max_jumps` 0 is plain PPO.
        env_id, env_kwargs, num_trials, total_timesteps, seed, ppo, num_threads, tensorboard, progress: as in `collect`.

    Raises what `collect` and `Forecaster.load` raise; FileExistsError where `output` exists; OutputInUse where another
    process is making it.
    """
    output, folder = Path(output), PRETRAINED if model is None else Path(model)
    forecaster = Forecaster.load(folder) if jumps.max_jumps else None
    known = {} if forecaster is None else {"forecaster": _fingerprint(folder)}
    jumps = jumps.with_start(late=forecaster is None or not forecaster.is_of_task(env_id))
    settings: dict[str, Any] = {"jumps": dataclasses.asdict(jumps), **known}
    ppo = PPOConfig() if ppo is None else ppo
    with published(output, "accelerate", resumable=True) as aside:
        aside.mkdir(exist_ok=True)
        store = aside / STORE
        asked: dict[str, Any] = {"num_trials": num_trials, "total_timesteps": total_timesteps, "seed": seed, "ppo": ppo}
        there = Store.open(store) if store.exists() and (aside / LEDGER).exists() else None
        if there is not None and is_complete(there):  # all but the last rename is done
            made_in = {"env_id": env_id, "env_kwargs": dict(env_kwargs or {})}
            refuse_other_settings(there, made_in | config_of(**asked, more=settings))
        else:
            with _removed_if_empty(aside):
                collect(
                    store,
                    env_id=env_id,
                    env_kwargs=env_kwargs,
                    **asked,
                    num_threads=num_threads,
                    tensorboard=tensorboard,
                    progress=progress,
                    population=functools.partial(
                        JumpingPopulation,
                        jumps=functools.partial(
                            _jumps, forecaster=forecaster, config=jumps, total_timesteps=total_timesteps
                        ),
                        finished=lambda ledger: ledger.save(aside / LEDGER),
                    ),
                    settings=settings,
                    shown_path=output / STORE,
                )
    return Ledger.load(output / LEDGER)


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove the folder after the context if nothing is in it, as where arguments are refused."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _jumps(
    learner: PopulationLearner, forecaster: Forecaster | None, config: JumpConfig, total_timesteps: int
) -> Jumps:
    if forecaster is None:
        return Jumps.none(learner)
    jumps = Jumps.by_forecasts(learner, forecaster, config)
    if learner.population.num_iterations is not None:
        warn_if_too_short(
            "accelerate", "jumps.start", jumps.first_jump, total_timesteps, learner.population.num_iterations
        )
    return jumps


def _fingerprint(folder: Path) -> str:
    """Return a digest of all that the forecasts of the forecaster in a model folder depend on."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode() + read_file(path, max_bytes=None))
    return digest.hexdigest()
