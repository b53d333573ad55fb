"""A zoo: stores of several tasks in one folder, local or behind a URL, with one index that says what is there.

    zoo.json                {"format", "version", "license", "tasks": {env_id: [entry, ...]}, "sha256": digest of these}
    InvertedPendulum-v5/    a store, where its entry says

An entry has the store's path relative to the index, its fingerprint, numbers of trials and checkpoints, and how it was
made. A store is opened when it is asked for, and refused unless it is the one whose fingerprint stands in the index;
the chunks of its arrays are checked as they are read.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tipl.files.hub_errors import Unreachable
from tipl.files.locations import Location, check_access, exists, location, read_file
from tipl.files.schema import parse, parse_json
from tipl.files.sealed import json_digest
from tipl.storing.store import Store

INDEX = "zoo.json"
FORMAT, VERSION = "tipl-zoo", 1
INCLUDED = Path(__file__).with_name("included_zoo")
"""The zoo that comes with tipl."""
MAX_INDEX_BYTES = 2**26

_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")  # no "..", nothing hidden, no URL


@dataclass(frozen=True)
class ZooEntry:
    """What the index of a zoo says of one store."""

    path: str
    """The store's folder, relative to the index."""
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """`Store.fingerprint`: a digest of its settings and of the checksums of all its chunks."""
    num_trials: Annotated[int, Field(ge=1)]
    num_checkpoints: Annotated[int, Field(ge=0)]
    """Of each trial."""
    made_by: str | None
    """The command that made it, or another account in words; None where the store does not say."""

    def __post_init__(self) -> None:
        if not _PATH.fullmatch(self.path):
            raise ValueError(
                f"path must be a relative path of letters, digits, '_', '-' and '.', got {self.path!r:.80}"
            )


@dataclass(frozen=True)
class _Index:
    """What zoo.json holds beside its checksum."""

    format: Literal["tipl-zoo"]
    version: Literal[1]
    license: str | None
    tasks: Annotated[dict[str, Annotated[list[ZooEntry], Field(min_length=1)]], Field(min_length=1)]

    def __post_init__(self) -> None:
        accounts = [entry.made_by for entries in self.tasks.values() for entry in entries]
        for text in (self.license, *self.tasks, *accounts):
            if text is not None and not text.isprintable():
                raise ValueError(f"texts must be printable, got {text!r:.80}")
        paths = [entry.path for entries in self.tasks.values() for entry in entries]
        several = [task for task, entries in self.tasks.items() if len(entries) > 1]
        names = [*paths, *several]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"tasks: {min(doubled)!r:.80} must name one store, not several")


@dataclass(frozen=True)
class Zoo:
    """The stores of a zoo, by task. `load_zoo` opens one."""

    path: Location
    license: str | None
    """The identifier of the licence of all stores; None where none was given."""
    tasks: dict[str, list[ZooEntry]]
    """Gymnasium id -> its stores, one or more."""

    def store(self, name: str) -> Store:
        """Return the store of a task; where the task has several, `name` is the `path` of the entry.

        Raises ValueError for a name that is not there, and for a task with several stores; RuntimeError where the store
        is damaged or is not the one in the index.
        """
        found = [(task, it) for task, entries in self.tasks.items() for it in entries if name in (task, it.path)]
        if not found:
            raise ValueError(f"zoo {self.path}: has no {name!r:.80}; it has {', '.join(self.tasks)}")
        if len(found) > 1:
            paths = ", ".join(entry.path for _, entry in found)
            raise ValueError(f"zoo {self.path}: has several stores of {name}; ask for one by its path: {paths}")
        task, entry = found[0]
        return self._open(task, entry)

    def problems(self) -> list[str]:
        """Return one line for each store that cannot be opened or is not the one in the index; reads no weights."""
        problems = []
        for task, entries in self.tasks.items():
            for entry in entries:
                try:
                    self._open(task, entry)
                except Unreachable:
                    raise
                except (OSError, RuntimeError) as error:
                    problems.append(str(error))
        return problems

    def _open(self, task: str, entry: ZooEntry) -> Store:
        store = Store.open(self.path / entry.path)
        found, expected = store.fingerprint(), entry.fingerprint
        if found != expected:
            difference = f"its fingerprint is {found[:12]}... instead of {expected[:12]}..."
            raise RuntimeError(f"zoo: {store.path} is not the store in the index: {difference}, as {INDEX} says")
        counts = (task, entry.num_trials, entry.num_checkpoints)
        if (store.env_id, store.num_trials, store.num_checkpoints) != counts:
            raise RuntimeError(
                f"zoo: {self.path / INDEX}: {entry.path} must be {task} with {entry.num_trials} trials of "
                f"{entry.num_checkpoints} checkpoints, got {store!r} of {store.num_checkpoints}"
            )
        return store

    def __repr__(self) -> str:
        return f"Zoo({str(self.path)!r}: {', '.join(self.tasks)})"


def load_zoo(path: str | Location | None = None) -> Zoo:
    """Return the zoo in a folder, given as a path or as a URL that fsspec knows, such as hf://datasets/user/name.

    By default it is the zoo that comes with tipl: four PPO runs of InvertedPendulum-v5. Only the index is read.

    Raises FileNotFoundError where there is no zoo, ConnectionError where the server of a URL does not answer or refuses
    access, RuntimeError where the index is damaged or of another version.
    """
    folder = location(INCLUDED if path is None else path)
    index = folder / INDEX
    if not exists(index):
        check_access(index)
        text = str(folder)
        is_model = text.startswith("hf://") and not text.startswith("hf://datasets/")
        hint = f"; a zoo on the hub is hf://datasets/{text.removeprefix('hf://')}" if is_model else ""
        raise FileNotFoundError(f"load_zoo: there is no zoo in {folder}: {INDEX} is missing{hint}")
    document = parse_json(read_file(index, max_bytes=MAX_INDEX_BYTES), index)
    if document.pop("sha256", None) != json_digest(document):
        raise RuntimeError(f"{index} is damaged: it fails its checksum")
    return zoo_of(document, folder)


def zoo_of(document: dict[str, Any], folder: Location) -> Zoo:
    """Return the zoo in `folder` that an index without its checksum describes. Raises RuntimeError for another form."""
    index = folder / INDEX
    if document.get("format") == FORMAT and document.get("version") != VERSION:
        raise RuntimeError(f"{index}: has version {document.get('version')!r:.80}, this tipl reads version {VERSION}")
    found = parse(_Index, document, index)
    return Zoo(folder, found.license, found.tasks)
