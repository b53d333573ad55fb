"""Making a zoo of stores."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from tipl.collecting.settings import is_complete
from tipl.files.locations import Location
from tipl.files.publishing import published
from tipl.files.sealed import save_json
from tipl.sharing.origin import origin_of
from tipl.storing.store import Store
from tipl.storing.store_files import copy_store
from tipl.storing.zoo import FORMAT, INDEX, VERSION
from tipl.verification import verify_store


def make_zoo(
    stores: Sequence[str | Location | Store],
    output: str | Path,
    *,
    license: str | None = None,
    progress: bool = True,
) -> Path:
    """Make the new folder `output` with a copy of these stores and an index of them, and return it.

    `license` is the licence of all of them, as an identifier such as "mit" or "cc-by-4.0". `progress` shows on stderr
    how far checking is. `load_zoo` opens the folder, wherever it is copied to.

    Raises ValueError where there are no stores or one is unfinished, FileExistsError where `output` exists,
    FileNotFoundError where there is no store, RuntimeError where one is damaged.
    """
    if not stores:
        raise ValueError("zoo: there must be at least one store")
    opened = [it if isinstance(it, Store) else Store.open(it) for it in stores]
    for store in opened:
        if not is_complete(store):
            raise ValueError(f"zoo: {store.path} is an unfinished collection; `tipl collect` finishes it")
        problems = verify_store(store.path, progress=progress).problems
        if problems:
            raise RuntimeError(f"zoo: {store.path} is damaged: {problems[0]}")
    with published(Path(output), "zoo", manifest=False) as aside:
        tasks: dict[str, list[dict[str, object]]] = {}
        for store in opened:
            entries = tasks.setdefault(store.env_id, [])
            folder = _unused(aside, re.sub(r"[^A-Za-z0-9_-]", "-", store.env_id))
            copy_store(store, folder)
            entries.append(
                {
                    "path": folder.name,
                    "fingerprint": store.fingerprint(),
                    "num_trials": store.num_trials,
                    "num_checkpoints": store.num_checkpoints,
                    "made_by": origin_of(store),
                }
            )
        save_json(aside / INDEX, {"format": FORMAT, "version": VERSION, "license": license, "tasks": tasks})
    return Path(output)


def _unused(parent: Path, name: str) -> Path:
    """Return parent/name, or parent/name-2 and so on where that exists."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(path for path in map(parent.joinpath, names) if not path.exists())
