"""What an unfinished collection needs to go on: the states of its population, in the store until it is complete.

    resume/zarr.json                  group: the versions of what decides the last bits, when the collection began
    resume/state_00000031.safetensors the population when every trial had 31 checkpoints; the last two saved are kept

A state holds what decides how the population goes on (`ppo.PopulationState`), with a checksum over all of it, and is
written whole or not at all, after the checkpoint that it belongs to was committed. While the folder is there, the
collection is unfinished. It is removed last of all, so that the store is then what it would be without any states.
"""

import importlib.metadata
import json
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from tipl import _core
from tipl.ppo import PopulationState
from tipl.zarr_files import read_group, write_group, written_aside

FOLDER = "resume"
FORMAT, VERSION = "tipl-population", "1"
STATES_KEPT = 2


class SavedStates:
    """The states saved in the store at `store_path`."""

    def __init__(self, store_path: Path) -> None:
        self.folder = store_path / FOLDER

    def exist(self) -> bool:
        """Return whether the collection is unfinished, with or without a state."""
        return self.folder.exists()

    def begin(self) -> None:
        """Note that the collection is unfinished, and the versions that it is begun with, unless that was done."""
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / "zarr.json").exists():
            write_group(self.folder, {"versions": _versions()})

    def changed_versions(self) -> dict[str, tuple[str, str]]:
        """Return name -> (version then, version now) of what could change the bits of the rest.

        Raises RuntimeError where the record of then is damaged.
        """
        if not (self.folder / "zarr.json").exists():  # cut off before it was written, and so before any checkpoint
            return {}
        then, now = read_group(self.folder, "resume")["versions"], _versions()
        return {name: (then.get(name, "none"), now[name]) for name in now if then.get(name, "none") != now[name]}

    def save(self, state: PopulationState, num_checkpoints: int) -> None:
        """Write the state in which every trial has `num_checkpoints` checkpoints, all of them committed."""
        described = json.dumps({"env_steps": state.env_steps, "env_rngs": state.env_rngs})
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "population": described,
            "crc32c": _checksum(described, state.arrays),
        }
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

    def problems(self) -> list[str]:
        """Return what is damaged, one line each."""
        found = []
        for path in self._files():
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
        shutil.rmtree(self.folder)

    def _files(self) -> list[Path]:
        """Return the files of the states, the latest first."""
        return sorted(self.folder.glob("state_*.safetensors"), reverse=True)


def read_state(path: Path) -> PopulationState:
    """Return the state in `path`. Raises RuntimeError where it is damaged or of another version."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
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
