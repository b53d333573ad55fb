"""The saved states from which an unfinished collection continues, kept in its store until the collection is complete.

    resume/zarr.json                group: versions of everything that the last bits depend on; trials per shard
    resume/trial_0000/state_00000031.safetensors
                                    the population of the shard that begins with trial 0, when each of its trials had 31
                                    checkpoints; the last two saved states are kept

A shard's trials learn together, in one process. A state holds everything that their next iterations depend on
(`population.PopulationState`), the store, trials and number of checkpoints that it belongs to, and a checksum over all
of this. It is written whole or not at all, after its checkpoint was committed. As long as the folder exists, the
collection is unfinished. It is removed last, so that a finished store is the same as if no state had been saved.
"""

import contextlib
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import google_crc32c
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import Field

from tipl.collecting.population_records import PopulationState
from tipl.files.locations import Location, exists, local_copy, make_folder, remove_folder, written_aside
from tipl.files.schema import parse
from tipl.files.versions import changed_versions, versions
from tipl.storing.store import Store
from tipl.storing.store_records import trial_name
from tipl.storing.zarr_files import read_group, write_group

FOLDER = "resume"
STATE = "state_*.safetensors"
FORMAT, VERSION = "tipl-population", 2
STATES_KEPT = 2


@dataclass(frozen=True)
class _Begun:
    """The group's attributes, written when the collection began."""

    versions: dict[str, str]
    store: str | None = None
    """The store's digest; None where an older tipl began the collection."""
    trials_per_shard: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class _Saved:
    """The JSON record in a state's file, beside its arrays."""

    format: str
    version: int
    store: str
    trials: list[int]
    """First trial, and last trial + 1."""
    num_checkpoints: int
    env_steps: Annotated[int, Field(ge=0)]
    env_rngs: list[dict[str, Any]]


class Unfinished:
    """The record of an unfinished collection in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.path / FOLDER

    def exists(self) -> bool:
        """Return whether the collection is unfinished, with or without a state."""
        return exists(self.folder)

    def begin(self, trials_per_shard: int) -> int:
        """Mark the collection as unfinished and record its versions and sharding, unless that was done before.

        Returns the number of trials per shard that the collection was begun with; `trials_per_shard` if that record is
        damaged.
        """
        make_folder(self.folder)
        if not (self.folder / "zarr.json").exists():
            record = {"versions": _versions(), "store": self.store.digest, "trials_per_shard": trials_per_shard}
            write_group(self.folder, record)
        with contextlib.suppress(RuntimeError):  # `changed_versions` reports it
            return self._begun().trials_per_shard or trials_per_shard
        return trials_per_shard

    def changed_versions(self) -> dict[str, tuple[str, str]]:
        """Return name -> (version then, version now) of every version that differs and may change the last bits.

        Raises RuntimeError where the record of the versions then is damaged, or belongs to another store.
        """
        if not (self.folder / "zarr.json").exists():  # interrupted before writing it, and so before any checkpoint
            return {}
        return changed_versions(self._begun().versions, _versions())

    def _begun(self) -> _Begun:
        path = self.folder / "zarr.json"
        record = parse(_Begun, read_group(self.folder, "resume"), path)
        if record.store not in (None, self.store.digest):
            raise RuntimeError(f"resume: {path} is of another store, {record.store!r:.20}")
        return record

    def states(self, trials: range) -> "SavedStates":
        """Return the saved states of the shard of these trials."""
        return SavedStates(self.store, trials)

    def problems(self) -> list[str]:
        """Return one line for each file that is damaged or belongs elsewhere."""
        found, trials_per_shard = [], None
        try:
            if (self.folder / "zarr.json").exists():
                trials_per_shard = self._begun().trials_per_shard
        except RuntimeError as error:
            found.append(str(error))
        paths: list[Location] = sorted(self.folder.glob(f"*/{STATE}"), key=str)
        for path in paths:
            try:
                read_state(path, self.store, self._shard(path, trials_per_shard))
            except RuntimeError as error:
                found.append(f"resume: {error}")
        return found

    def _shard(self, path: Location, trials_per_shard: int | None) -> range | None:
        """Return the trials of the shard to which a state's folder belongs, or None if that is not known."""
        starts = range(0, len(self.store), trials_per_shard or len(self.store))
        start = next((i for i in starts if trial_name(i) == path.parent.name), None)
        if trials_per_shard is None or start is None:
            return None
        return range(start, min(start + trials_per_shard, len(self.store)))

    def remove(self) -> None:
        """Remove the states, which marks the collection as complete."""
        remove_folder(self.folder)


class SavedStates:
    """The saved states of one shard, `trials`."""

    def __init__(self, store: Store, trials: range) -> None:
        self.store, self.trials = store, trials
        self.folder = store.path / FOLDER / trial_name(trials.start)

    def save(self, state: PopulationState, num_checkpoints: int) -> None:
        """Write the state; every trial of the shard must have `num_checkpoints` committed checkpoints."""
        described = {
            "format": FORMAT,
            "version": VERSION,
            "store": self.store.digest,
            "trials": [self.trials.start, self.trials.stop],
            "num_checkpoints": num_checkpoints,
            "env_steps": state.env_steps,
            "env_rngs": state.env_rngs,
        }
        described["crc32c"] = _checksum(described, state.arrays)
        make_folder(self.folder)
        path = self.folder / f"state_{num_checkpoints:08d}.safetensors"
        with written_aside(path) as aside:
            try:  # one metadata entry, because safetensors writes several in random order
                safetensors.numpy.save_file(state.arrays, aside, {"population": json.dumps(described, sort_keys=True)})
            except safetensors.SafetensorError as error:  # raised when the disk is full
                raise OSError(f"{path}: {error}") from error
        files = self._files()
        older = [file.name for file in files if file.name < path.name]
        for file in files:
            if file.name not in (path.name, *older[: STATES_KEPT - 1]):  # later states were tried and found unusable
                file.unlink()

    def load(self, max_checkpoints: int) -> Iterator[PopulationState]:
        """Yield the states with at most `max_checkpoints` checkpoints, latest first; warn of each that is unusable."""
        for path in self._files():
            if _number(path) <= max_checkpoints:
                try:
                    yield read_state(path, self.store, self.trials)
                except RuntimeError as error:
                    warnings.warn(f"collect: {error}; an older state is used, or none", stacklevel=4)

    def _files(self) -> list[Location]:
        """Return the states' files, latest first."""
        return sorted(self.folder.glob(STATE), key=str, reverse=True)


def read_state(path: Location, store: Store, trials: range | None) -> PopulationState:
    """Return the state in the file `path`, which must belong to `store` and to `trials`, unless that is None.

    Raises RuntimeError where it is damaged, of another version, or belongs elsewhere.
    """
    try:
        with local_copy(path) as file_path, safetensors.safe_open(file_path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in list(file.keys())}
        described = json.loads(metadata["population"])
        if set(metadata) != {"population"} or (described["format"], described["version"]) != (FORMAT, VERSION):
            raise RuntimeError(f"{path} is no state that this tipl reads")
        if described.pop("crc32c") != _checksum(described, arrays):
            raise ValueError("it fails its checksum")
    except (OSError, safetensors.SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise RuntimeError(f"{path} is damaged: {error}") from error
    saved = parse(_Saved, described, path)
    for what, expected, found in (
        ("store", store.digest, saved.store),
        ("trials", saved.trials if trials is None else [trials.start, trials.stop], saved.trials),
        ("num_checkpoints", _number(path), saved.num_checkpoints),
    ):
        if found != expected:
            raise RuntimeError(f"{path} is a state of other {what}: expected {expected}, got {found!r:.80}")
    return PopulationState(saved.env_steps, arrays, saved.env_rngs)


def _number(path: Location) -> int:
    """Return the number of checkpoints in the name of a state's file; `sys.maxsize` where there is none."""
    number = re.fullmatch(r"state_(\d{8,18})\.safetensors", path.name)
    return int(number[1]) if number else sys.maxsize


def _checksum(described: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    checksum = google_crc32c.value(json.dumps(described, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        checksum = google_crc32c.extend(checksum, f"{name} {array.dtype} {array.shape}".encode())
        checksum = google_crc32c.extend(checksum, array.reshape(-1).view(np.uint8))
    return f"{checksum:08x}"


def _versions() -> dict[str, str]:
    return versions("tipl", "torch", "numpy", "mujoco", "gymnasium")
