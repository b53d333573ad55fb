"""Making a zoo of stores."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tipl.collecting.settings import refuse_unfinished
from tipl.files.locations import Location, local_path, location
from tipl.files.publishing import published
from tipl.files.sealed import save_json
from tipl.sharing.origin import origin_of
from tipl.storing.store import Store
from tipl.storing.store_files import copy_store
from tipl.storing.zoo import FORMAT, INDEX, VERSION, load_zoo, zoo_of
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

    Raises ValueError where there are no stores, one is unfinished, given twice or a zoo, or the index cannot hold it;
    TypeError where `stores` is no list;
    FileExistsError where `output` exists, FileNotFoundError where there is no store, RuntimeError where one is damaged.
    """
    output = local_path(output, "zoo: output")
    if not stores:
        raise ValueError("zoo: there must be at least one store")
    if isinstance(stores, str | Path):
        raise TypeError(f"zoo: stores must be a list of stores, got one path, {stores}")
    opened = [it if isinstance(it, Store) else _opened(it) for it in stores]
    for store in opened:
        refuse_unfinished("zoo", store)
        problems = verify_store(store.path, progress=progress).problems
        if problems:
            raise RuntimeError(f"zoo: {store.path} is damaged: {problems[0]}")
    names = _names([store.env_id for store in opened])
    index = _index(dict(zip(names, opened, strict=True)), license)
    try:
        zoo_of(index, output)  # which refuses what load_zoo would refuse
    except RuntimeError as error:
        raise ValueError(f"zoo: {error}") from error
    with published(output, "zoo", manifest=False) as aside:
        for store, name in zip(opened, names, strict=True):
            copy_store(store, aside / name)
        save_json(aside / INDEX, index)
    return output


def _opened(path: str | Location) -> Store:
    try:
        return Store.open(path)
    except FileNotFoundError as error:
        if not (location(path) / INDEX).exists():
            raise
        inside = [f"{path}/{entry.path}" for entries in load_zoo(path).tasks.values() for entry in entries]
        raise ValueError(f"zoo: {path} is a zoo already: give its stores, {', '.join(inside)}") from error


def _index(stores: dict[str, Store], license: str | None) -> dict[str, Any]:
    """Return the index of stores, by the names of their folders. Raises ValueError where one is there twice."""
    tasks: dict[str, list[dict[str, object]]] = {}
    known: dict[str, Store] = {}
    for name, store in stores.items():
        fingerprint = store.fingerprint()
        if fingerprint in known:
            raise ValueError(f"zoo: {known[fingerprint].path} and {store.path} are the same store")
        known[fingerprint] = store
        tasks.setdefault(store.env_id, []).append(
            {
                "path": name,
                "fingerprint": fingerprint,
                "num_trials": store.num_trials,
                "num_checkpoints": store.num_checkpoints,
                "made_by": origin_of(store),
            }
        )
    return {"format": FORMAT, "version": VERSION, "license": license, "tasks": tasks}


def _names(env_ids: Sequence[str]) -> list[str]:
    """Return a folder's name for each store: its task's, numbered where there are several; no two are the same."""
    stems = [re.sub(r"[^A-Za-z0-9_-]", "-", env_id) or "-" for env_id in env_ids]
    names: list[str] = []
    for stem in stems:
        numbered = (f"{stem}-{i}" for i in itertools.count(1))
        taken = {*stems, *names}
        names.append(stem if stems.count(stem) == 1 else next(name for name in numbered if name not in taken))
    return names
