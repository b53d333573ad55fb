"""Export: flat weights of a forecast or a store, written as a checkpoint file of the user's library."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl.files.locations import write_atomically
from tipl.files.publishing import published
from tipl.files.sealed import load_arrays
from tipl.policy import Layout, PolicySpec, layout_from_dict
from tipl.storing.actor_families import STATISTICS
from tipl.storing.foreign_actors import Actor, differences, prefixes_of
from tipl.storing.foreign_files import CheckpointFile, find_actor_in, read_checkpoint_file
from tipl.storing.observation_statistics import ObservationStatistics, find_statistics, read_statistics
from tipl.storing.store import Store
from tipl.storing.tensor_checks import shown


def export_checkpoint(
    weights: str | Path | NDArray[np.float32],
    like: str | Path,
    output: str | Path,
    *,
    checkpoint: int | None = None,
    trial: int = 0,
    actor: str | Sequence[str] | None = None,
    normaliser: str | Path | None = None,
    max_bytes: int | None = None,
) -> Path:
    """Write flat weights as a checkpoint file of the same kind as the file `like`, and return its path, `output`.

    The actor's tensors are replaced; critics, target networks, optimiser and settings stay as in `like`. A zip of
    Stable-Baselines3 loads with `PPO.load` and the like.

    Args:
        weights: a forecast that `tipl rollout` wrote, a store, or weights (p,) float32, such as one row of the result
            of `tipl.rollout`.
        like: a checkpoint file of a policy with the same layout, best from the run that was forecast.
        checkpoint: index of the checkpoint in the path, as in the forecast's `checkpoint`; by default the last one.
        trial: index of the trial, if `weights` is a store.
        actor: the prefix of the actor's keys in `like`, or several prefixes; needed where `like` holds other networks
            too and `weights` has no record of its actor's keys.
        normaliser: the file of VecNormalize's statistics that the new file will be used with, where statistics are
            folded into the weights' first layer; by default the one that lies beside `like`. "none" leaves them
            folded in, for use with observations as they are.
        max_bytes: limit for `like`, as in `import_checkpoints`.

    Raises FileExistsError where `output` exists; OutputInUse where another process is making it; FileNotFoundError;
    ValueError where the layouts differ, the checkpoint does not exist or the weights are not finite; TypeError where
    they are not float32; RuntimeError where a file is damaged.
    """
    output = Path(output)
    with published(output, "export") as aside:
        write_atomically(aside, _exported(weights, Path(like), checkpoint, trial, actor, normaliser, max_bytes))
    return output


def _exported(
    weights: str | Path | NDArray[np.float32],
    like: Path,
    checkpoint: int | None,
    trial: int,
    actor: str | Sequence[str] | None,
    normaliser: str | Path | None,
    max_bytes: int | None,
) -> bytes:
    """Return the bytes of the file that `export_checkpoint` writes."""
    row, source = row_and_record(weights, checkpoint, trial)
    template = read_checkpoint_file(like, max_bytes=max_bytes)
    template.unread = ()  # stays as it is
    try:
        folded = ((source.get("source") or {}).get("actor") or {}).get("normaliser") == STATISTICS
        if str(normaliser) != "none" and (folded or normaliser is not None):
            template.state |= _statistics_beside(like, normaliser).to_state()
        _actor_of_template(template, like, source, len(row), actor).write(row, template.state)
    except ValueError as error:
        raise ValueError(f"export: {error}") from error
    return template.to_bytes()


def row_and_record(
    weights: str | Path | NDArray[np.float32], checkpoint: int | None, trial: int
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Return one row of flat weights (p,), and what `layout_record` says of it; {} of an array.

    Arguments and errors are those of `export_checkpoint`.
    """
    record: dict[str, Any] = {}
    if isinstance(weights, np.ndarray):
        row = weights
    elif Path(weights).is_dir():
        store = Store.open(weights)
        if not 0 <= trial < store.num_trials:
            raise ValueError(f"export: trial must lie in [0, {store.num_trials}), got {trial}")
        record, path = layout_record(store), store.trial(trial)
        t = path.num_checkpoints - 1 if checkpoint is None else checkpoint
        if not 0 <= t < path.num_checkpoints:
            raise ValueError(f"export: checkpoint must lie in [0, {path.num_checkpoints}) of trial {trial}, got {t}")
        row = path.weights(t, t + 1)[0]
    else:
        row, record = _forecast_row(Path(weights), checkpoint)
    if row.dtype != np.float32:
        raise TypeError(f"export: weights must be float32, got {row.dtype}")
    if row.ndim != 1 or not np.isfinite(row).all():
        raise ValueError(f"export: weights must be finite and of shape (p,), got {row.shape}")
    return row, record


def _statistics_beside(like: Path, normaliser: str | Path | None) -> ObservationStatistics:
    """Return the statistics that the exported file will be used with."""
    path = find_statistics([like]).get(like) if normaliser is None else Path(normaliser)
    if path is None:
        raise ValueError(
            "observation statistics are folded into the weights' first layer: pass as normaliser the file of those that"
            f" belong to {shown(like)}, which divides them out again"
        )
    return needed_statistics(path)


def needed_statistics(path: str | Path) -> ObservationStatistics:
    """Return the statistics in a file of VecNormalize's. Raises ValueError where it left observations as they are, and
    what `read_statistics` raises.
    """
    statistics = read_statistics(path)
    if statistics is None:
        raise ValueError(f"{shown(path)} does not normalise observations (norm_obs=False)")
    return statistics


def layout_record(store: Store) -> dict[str, Any]:
    """Return the record, plain JSON, that a forecast from this store must carry so that it can be exported."""
    record = {"policy": store.policy.to_dict(), "source": store.config.get("source"), "env_id": store.env_id}
    return record | ({"env_kwargs": store.env_kwargs} if store.env_kwargs else {})


def _forecast_row(path: Path, checkpoint: int | None) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Return one row of a forecast that `tipl rollout` wrote, and its record of the layout."""
    if not path.is_file():
        raise FileNotFoundError(f"export: there is no forecast and no store {shown(path)}")
    arrays, record = load_arrays(path, "export")
    try:
        layout_and_actor(record)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RuntimeError(f"export: {shown(path)} is damaged, or no forecast: {shown(error)}") from error
    weights, steps = (arrays.get(name, np.empty(0)) for name in ("weights", "checkpoint"))
    if weights.ndim != 2 or weights.dtype != np.float32 or not 0 < len(weights) == steps.size:
        raise RuntimeError(f"export: {shown(path)} is no forecast: expected weights (n, p) float32 and checkpoint (n,)")
    indices = steps.tolist()
    if checkpoint is not None and checkpoint not in indices:
        raise ValueError(f"export: checkpoint must lie in [{indices[0]}, {indices[-1]}], got {checkpoint}")
    return weights[-1 if checkpoint is None else indices.index(checkpoint)], record


def layout_and_actor(record: dict[str, Any]) -> tuple[Layout | None, Actor | None]:
    """Return the weights' layout and, where they were imported, the actor in the files they came from; else None."""
    imported = (record.get("source") or {}).get("actor")
    return (
        layout_from_dict(record["policy"]) if "policy" in record else None,
        None if imported is None else Actor.from_dict(imported),
    )


def _actor_of_template(
    template: CheckpointFile, like: Path, record: dict[str, Any], num_params: int, keys: str | Sequence[str] | None
) -> Actor:
    """Return the actor in the template: found by the template's keys, or as recorded when the weights were imported."""
    policy, known = layout_and_actor(record)
    activation = policy.activation if isinstance(policy, PolicySpec) else None
    fits = known is not None and known.fits(template.state) and template.activation_of(known) in (None, activation)
    if keys is not None and not (known is not None and known.normaliser):  # its statistics are not in the weights
        chosen = {key: it for key, it in template.state.items() if key.startswith((*prefixes_of(keys), STATISTICS))}
        template = dataclasses.replace(template, state=chosen)
    try:
        squash, halves = (
            (policy.squash, policy.spread == "halves") if isinstance(policy, PolicySpec) else (False, False)
        )
        found = find_actor_in(like, template, activation, keys, squash=squash, halves=halves)
        if isinstance(policy, PolicySpec) and policy.discrete and not isinstance(found.policy, PolicySpec):
            with contextlib.suppress(ValueError):  # the weights say that actions are discrete, and the file does not
                found = find_actor_in(like, template, activation, keys, discrete=policy.outputs)
    except ValueError:
        if known is not None and fits and keys is None:
            return known  # the template holds other networks too; the import recorded which one is the actor
        raise
    if policy is None and found.policy.num_params != num_params:
        raise ValueError(f"{shown(like)} holds an actor of {found.policy.num_params} parameters, got {num_params}")
    difference = "" if policy is None else differences(policy, found.policy)
    if known is not None and known.keys == found.keys and not known.normaliser and found.normaliser != STATISTICS:
        found = dataclasses.replace(found, normaliser="")  # the import ignored it: it is not in the weights
    if not difference:
        return found
    if known is not None and keys is None:
        acts_otherwise = isinstance(policy, PolicySpec) and isinstance(found.policy, PolicySpec)
        if fits and not (known.keys == found.keys and acts_otherwise):
            return known  # the recorder was given a part of the policy that the template holds
        new = found.policy if isinstance(found.policy, PolicySpec) else None
        of_new_kind = new is not None and (
            new.squash or new.discrete or new.activation == "silu" or new.spread == "halves"
        )
        if of_new_kind and known.kind == "other" and known.keys == found.keys and known.fits(template.state):
            return known  # by a tipl that did not know this kind
    raise ValueError(f"{shown(like)} does not fit the weights: {difference}")
