"""The files that a store is made of, to copy it: no others that lie in its folder."""

import re
from pathlib import Path

from tipl.files.locations import Location, read_file, write_atomically
from tipl.storing.store import Store

_PART = re.compile(
    r"zarr\.json"
    r"|trial_\d{4,}/zarr\.json"
    r"|trial_\d{4,}/(weights|env_steps|episodic_return)/(zarr\.json|c(\.\d+)+)"
    r"|training_state/(zarr\.json|state\.safetensors)"
)


def is_part(name: str) -> bool:
    """Return whether `name`, relative to a store's folder, is the name of a file of a complete store."""
    return _PART.fullmatch(name) is not None


def files_in(folder: Location) -> list[str]:
    """Return the names of all files in a folder and its subfolders, relative to it, sorted."""
    if isinstance(folder, Path):
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    root = folder.path.rstrip("/")
    return sorted(name[len(root) + 1 :] for name in folder.fs.find(root))


def copy_store(store: Store, target: Path) -> None:
    """Copy the files of a complete store into the new local folder `target`."""
    for name in filter(is_part, files_in(store.path)):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, read_file(store.path / name, max_bytes=None))
