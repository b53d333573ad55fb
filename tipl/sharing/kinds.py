"""The kinds of folder that can be shared, and which of the files in such a folder belong to it."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tipl.files.manifest import NAME as MANIFEST
from tipl.files.manifest import listed_names
from tipl.storing.store_files import parts_of
from tipl.storing.zoo import INDEX, load_zoo

RepoType = Literal["dataset", "model"]

_OF_MODEL = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.(json|safetensors)")  # none of which a program would run


@dataclass(frozen=True)
class Kind:
    """A kind of folder that can be shared."""

    name: Literal["store", "zoo", "model"]
    repo_type: RepoType
    """The hub's type of repository for it."""
    marks: frozenset[str]
    """The names of files by which a folder is known to be of this kind."""
    index: str
    """The name of the file that says which other files belong to the folder."""

    def parts(self, folder: Path, names: Collection[str]) -> list[str]:
        """Return those of `names`, relative to `folder`, that belong to it, as far as the files that are there say.

        The index must be there; in a store, or a store of a zoo, the records name further files.

        Raises RuntimeError where the index is damaged, or names a file that such a folder does not hold.
        """
        if self.name == "store":
            return parts_of(folder, names)
        if self.name == "model":
            listed = {MANIFEST, *listed_names(folder)}
            for name in sorted(listed):
                if not _OF_MODEL.fullmatch(name):
                    raise RuntimeError(f"{folder / MANIFEST} lists {name!r:.80}, which is no file of a model folder")
            return [name for name in names if name in listed]
        found = [INDEX] if INDEX in names else []
        for path in (entry.path for entries in load_zoo(folder).tasks.values() for entry in entries):
            inside = [name.removeprefix(f"{path}/") for name in names if name.startswith(f"{path}/")]
            found += [f"{path}/{name}" for name in parts_of(folder / path, inside)]
        return found


KINDS = (
    Kind("zoo", "dataset", frozenset({INDEX}), INDEX),
    Kind("store", "dataset", frozenset({"zarr.json"}), "zarr.json"),
    Kind("model", "model", frozenset({"config.json", MANIFEST}), MANIFEST),
)


def kind_among(names: Collection[str]) -> Kind | None:
    """Return the kind of a folder with files of these names, or None where it is none that can be shared."""
    return next((kind for kind in KINDS if kind.marks <= set(names)), None)
