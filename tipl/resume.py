"""What an unfinished collection needs to go on: the states of its populations, in the store until it is complete.

    resume/zarr.json                group: the versions of what decides the last bits, and how many trials are one shard
    resume/trial_0000/state_00000031.safetensors
                                    the population of the shard that begins with trial 0, when each of its trials had 31
                                    checkpoints; the last two saved are kept

A shard's trials learn together, in one process. A state holds what decides how they go on (`ppo.PopulationState`), with
a checksum over all of it, and is written whole or not at all, after the checkpoint that it belongs to was committed.
While the folder is there, the collection is unfinished. It is removed last of all, so that the store is then what it
would be without any states.
"""

import contextlib
import importlib.metadata
import json
import platform
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import google_crc32c
import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from tipl import _core
from tipl.locations import Location, local_copy, make_folder, remove_folder, written_aside
from tipl.ppo import PopulationState
from tipl.store import trial_name
from tipl.zarr_files import read_group, write_group

FOLDER = "resume"
STATE = "state_*.safetensors"
FORMAT, VERSION = "tipl-population", "1"
STATES_KEPT = 2


class Unfinished:
    """The record of an unfinished collection in the store at `store_path`."""

    def __init__(self, store_path: Location) -> None:
        self.folder = store_path / FOLDER

    def exists(self) -> bool:
        """Return whether the collection is unfinished, with or without a state."""
        return self.folder.exists()

    def begin(self, trials_per_shard: int) -> int:
        """Note that the collection is unfinished, and the versions that it is begun with, unless that was done.

        Returns the trials of a shard that it was begun with or, where that record is damaged, those given.
        """
        make_folder(self.folder)
        if not (self.folder / "zarr.json").exists():
            write_group(self.folder, {"versions": _versions(), "trials_per_shard": trials_per_shard})
        with contextlib.suppress(RuntimeError):  # `changed_versions` tells
            trials_per_shard = read_group(self.folder, "resume").get("trials_per_shard", trials_per_shard)
        return trials_per_shard

    def changed_versions(self) -> dict[str, tuple[str, str]]:
        """Return name -> (version then, version now) of what could change the bits of the rest.

        Raises RuntimeError where the record of then is damaged.
        """
        if not (self.folder / "zarr.json").exists():  # cut off before it was written, and so before any checkpoint
            return {}
        then, now = read_group(self.folder, "resume")["versions"], _versions()
        return {name: (then.get(name, "none"), now[name]) for name in now if then.get(name, "none") != now[name]}

    def states(self, first_trial: int) -> "SavedStates":
        """Return the saved states of the shard that begins with this trial."""
        return SavedStates(self.folder / trial_name(first_trial))

    def problems(self) -> list[str]:
        """Return what is damaged, one line each."""
        found = []
        paths: list[Location] = sorted(self.folder.glob(f"*/{STATE}"), key=str)
        for path in paths:
            try:
                read_state(path)
            except RuntimeError as error:
                found.append(f"resume: {error}")
        try:
            self.changed_versions()
        except RuntimeError as error:
            found.append(str(error))
        return found

    def remove(self) -> None:
        """Say that the collection is complete."""
        remove_folder(self.folder)


class SavedStates:
    """The states of one shard, in `folder`."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder

    def save(self, state: PopulationState, num_checkpoints: int) -> None:
        """Write the state in which every trial has `num_checkpoints` checkpoints, all of them committed."""
        described = json.dumps({"env_steps": state.env_steps, "env_rngs": state.env_rngs})
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "population": described,
            "crc32c": _checksum(described, state.arrays),
        }
        make_folder(self.folder)
        path = self.folder / f"state_{num_checkpoints:08d}.safetensors"
        with written_aside(path) as aside:
            try:
                safetensors.numpy.save_file(state.arrays, aside, metadata)
            except safetensors.SafetensorError as error:  # the disk is full
                raise OSError(f"{path}: {error}") from error
        for older in self._files()[STATES_KEPT:]:
            older.unlink()

    def load(self, max_checkpoints: int) -> Iterator[PopulationState]:
        """Yield the states of at most so many checkpoints, the latest first; warn of each that is damaged."""
        for path in self._files():
            if int(path.stem.removeprefix("state_")) <= max_checkpoints:
                try:
                    yield read_state(path)
                except RuntimeError as error:
                    warnings.warn(f"collect: {error}; an older state is used, or none", stacklevel=4)

    def _files(self) -> list[Location]:
        """Return the files of the states, the latest first."""
        return sorted(self.folder.glob(STATE), key=str, reverse=True)


def read_state(path: Location) -> PopulationState:
    """Return the state in `path`. Raises RuntimeError where it is damaged or of another version."""
    try:
        with local_copy(path) as file_path, safetensors.safe_open(file_path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in list(file.keys())}
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
            raise RuntimeError(f"{path} is no state that this tipl reads")
        if metadata["crc32c"] != _checksum(metadata["population"], arrays):
            raise ValueError("it fails its checksum")
        return PopulationState(arrays=arrays, **json.loads(metadata["population"]))
    except (OSError, safetensors.SafetensorError, LookupError, TypeError, ValueError) as error:
        raise RuntimeError(f"{path} is damaged: {error}") from error


def _checksum(described: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    checksum = google_crc32c.value(described.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        checksum = google_crc32c.extend(checksum, f"{name} {array.dtype} {array.shape}".encode())
        checksum = google_crc32c.extend(checksum, array.reshape(-1).view(np.uint8))
    return f"{checksum:08x}"


def _versions() -> dict[str, str]:
    """Return the versions of the packages, and the instruction sets, on which the last bits of a collection depend."""
    packages = {name: importlib.metadata.version(name) for name in ("tipl", "torch", "numpy", "mujoco", "gymnasium")}
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_core.isa()}"
    return {**packages, "cpu": cpu}
