"""The files that a store is made of, to copy it: no others that lie in its folder."""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

from tipl.files.locations import Location, exists, read_file, write_atomically
from tipl.storing.store import Store
from tipl.storing.store_records import trial_name

ROOT = "zarr.json"  # the record of a store, and that of a trial

_PART = re.compile(
    r"zarr\.json"
    r"|trial_(?P<trial>[0-9]{4,18})/zarr\.json"
    r"|trial_(?P<of>[0-9]{4,18})/(?P<array>weights|env_steps|episodic_return)/"
    r"(zarr\.json|c\.(?P<chunk>[0-9]{1,18})(\.0)?)"
    r"|training_state/(zarr\.json|state\.safetensors)"
)


def parts_of(folder: Location, names: Iterable[str]) -> list[str]:
    """Return those of `names`, relative to the folder of a complete store, that are files of it, as its records say.

    Where a record is not there yet, the files that it would name are left out: of the root's all others, of a trial's
    its arrays. Raises RuntimeError where a record is damaged.
    """
    found = [(name, match) for name in names if (match := _PART.fullmatch(name))]
    if not exists(folder / ROOT):
        return [name for name, _ in found if name == ROOT]
    trials = Store.open(folder).trials
    arrays = {array.name: array for array in trials.arrays}

    @functools.cache
    def num_checkpoints(i: int) -> int | None:
        return trials.read_commit(i).num_checkpoints if exists(trials.folder(i) / ROOT) else None

    def is_part(name: str, match: re.Match[str]) -> bool:
        number = match["trial"] or match["of"]
        if number is None:
            return True
        i = int(number)
        if i >= len(trials) or not name.startswith(f"{trial_name(i)}/"):
            return False
        if match["array"] is None:
            return True
        rows, array = num_checkpoints(i), arrays[match["array"]]
        if rows is None or match["chunk"] is None:
            return rows is not None
        chunk = int(match["chunk"])
        return chunk < array.num_chunks(rows) and name.endswith(f"/{array.key(chunk)}")

    return [name for name, match in found if is_part(name, match)]


def files_in(folder: Location) -> list[str]:
    """Return the names of all files in a folder and its subfolders, relative to it, sorted."""
    if isinstance(folder, Path):
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    root = folder.path.rstrip("/")
    return sorted(name[len(root) + 1 :] for name in folder.fs.find(root))


def copy_store(store: Store, target: Path) -> None:
    """Copy the files of a complete store into the new local folder `target`."""
    for name in parts_of(store.path, files_in(store.path)):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, read_file(store.path / name, max_bytes=None))
