"""The manifest of a folder that tipl wrote: size and SHA-256 of every file, checked whenever one of them is read.

    manifest.json   {"format", "version", "files": {name: {"bytes", "sha256"}}, "sha256": that of "files"}

A file that was damaged, cut, left out or taken from another folder is refused by name. What older versions of tipl
wrote has no manifest: it is read, with a warning.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from tipl.files.locations import read_file, write_atomically
from tipl.files.sealed import UncheckedWarning, json_digest

NAME = "manifest.json"
FORMAT, VERSION = "tipl-manifest", 1
DATA_SUFFIXES = (".json", ".safetensors")
"""Of files that tipl reads: one that is not listed does not belong to the folder."""
SUFFIXES = (*DATA_SUFFIXES, ".html", ".png")
"""Of the files that a manifest lists. Others, such as notes of the user's and TensorBoard's events, are not covered."""


def write_manifest(folder: Path) -> None:
    """List all files in `folder`, which is complete."""
    files = {}
    for path in sorted(folder.iterdir()):
        if _is_covered(path):
            files[path.name] = _entry(read_file(path, max_bytes=None))
    document = {"format": FORMAT, "version": VERSION, "files": files, "sha256": json_digest(files)}
    write_atomically(folder / NAME, (json.dumps(document, indent=1) + "\n").encode())


def read_listed(path: Path) -> bytes:
    """Return what is in a file, which must be what its folder's manifest says.

    Raises FileNotFoundError where there is no such file, and RuntimeError where it is not the one listed.
    """
    files = _read_manifest(path.parent)
    return read_file(path, max_bytes=None) if files is None else _read_listed(path, files)


def _read_listed(path: Path, files: dict[str, Any]) -> bytes:
    """Return what is in a file of the folder that holds these `files`."""
    if path.name not in files:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        raise RuntimeError(f"{path} does not belong to its folder: {NAME} does not list it")
    if not path.exists():
        raise RuntimeError(f"{path} is missing: {NAME} lists it")
    data = read_file(path, max_bytes=None)
    expected, found = files[path.name], _entry(data)
    if found != expected:
        raise RuntimeError(f"{path} is damaged or of another folder: {_difference(expected, found)}, as {NAME} says")
    return data


def check_folder(folder: Path) -> bool:
    """Return whether a folder has a manifest, as what an older tipl wrote has not, which is warned of.

    Raises RuntimeError where a file is not what it says, or a file of tipl's kinds is not listed.
    """
    problems = problems_in(folder)
    if problems:
        raise RuntimeError(problems[0])
    return (folder / NAME).exists()


def problems_in(folder: Path) -> list[str]:
    """Return what is wrong with the files of a folder, a line for each; none, with a warning, without a manifest."""
    try:
        files = _read_manifest(folder)
    except RuntimeError as error:
        return [str(error)]
    if files is None:
        return []
    unlisted = {path.name for path in folder.iterdir() if _is_covered(path) and path.suffix in DATA_SUFFIXES}
    problems = []
    for name in sorted(unlisted | set(files)):
        try:
            _read_listed(folder / name, files)
        except (OSError, RuntimeError) as error:
            problems.append(str(error))
    return problems


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return name -> size and hash of the folder's files, or None, with a warning, where an older tipl wrote it."""
    path = folder / NAME
    if not path.exists():
        warnings.warn(UncheckedWarning(folder), stacklevel=1)
        return None
    try:
        document = json.loads(read_file(path))
        files = document["files"]
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format must be {FORMAT!r}, version {VERSION}")
        if document["sha256"] != json_digest(files) or len(document) != 4:
            raise ValueError("it fails its checksum")
        return dict(files)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise RuntimeError(f"{path} is damaged: {error}") from error


def _entry(data: bytes) -> dict[str, Any]:
    """Return what a manifest says of a file with this content."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    if expected["bytes"] != found["bytes"]:
        return f"it has {found['bytes']} bytes instead of {expected['bytes']}"
    return f"its SHA-256 is {found['sha256'][:12]}... instead of {expected['sha256'][:12]}..."


def _is_covered(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.name != NAME and not path.name.startswith(".") and path.is_file()
