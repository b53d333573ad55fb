"""Making a zoo of stores."""

import re
from collections.abc import Sequence
from pathlib import Path

from tipl.collecting.settings import is_complete
from tipl.files.locations import Location, local_path
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
    output = local_path(output, "zoo: output")
    if not stores:
        raise ValueError("zoo: there must be at least one store")
    opened = [it if isinstance(it, Store) else Store.open(it) for it in stores]
    for store in opened:
        if not is_complete(store):
            raise ValueError(f"zoo: {store.path} is an unfinished collection; `tipl collect` finishes it")
        problems = verify_store(store.path, progress=progress).problems
        if problems:
            raise RuntimeError(f"zoo: {store.path} is damaged: {problems[0]}")
    with published(output, "zoo", manifest=False) as aside:
        tasks: dict[str, list[dict[str, object]]] = {}
        for store, name in zip(opened, _names([store.env_id for store in opened]), strict=True):
            copy_store(store, aside / name)
            tasks.setdefault(store.env_id, []).append(
                {
                    "path": name,
                    "fingerprint": store.fingerprint(),
                    "num_trials": store.num_trials,
                    "num_checkpoints": store.num_checkpoints,
                    "made_by": origin_of(store),
                }
            )
        save_json(aside / INDEX, {"format": FORMAT, "version": VERSION, "license": license, "tasks": tasks})
    return output


def _names(env_ids: Sequence[str]) -> list[str]:
    """Return a folder's name for each store: its task's, numbered where there are several."""
    stems = [re.sub(r"[^A-Za-z0-9_-]", "-", env_id) or "-" for env_id in env_ids]
    count = {stem: iter(range(1, len(stems) + 1)) for stem in stems if stems.count(stem) > 1}
    return [f"{stem}-{next(count[stem])}" if stem in count else stem for stem in stems]
