"""The manifest of a folder that tipl wrote: size and SHA-256 of every file, checked whenever one of them is read.

    manifest.json   {"format", "version", "files": {name: {"bytes", "sha256"}}, "sha256": digest of "files"}

A file that is damaged, truncated, missing or from another folder is refused, and the error names it. Folders that older
versions of tipl wrote have no manifest; their files are read with a warning.
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
"""Suffixes of files that tipl reads: such a file that the manifest does not list is an error."""
SUFFIXES = (*DATA_SUFFIXES, ".html", ".png")
"""Suffixes of files that a manifest lists. Others, such as the user's notes and TensorBoard's events, are ignored."""


def write_manifest(folder: Path) -> None:
    """Write the manifest of `folder`, whose files must be complete."""
    files = {}
    for path in sorted(folder.iterdir()):
        if _is_covered(path):
            files[path.name] = _entry(read_file(path, max_bytes=None))
    document = {"format": FORMAT, "version": VERSION, "files": files, "sha256": json_digest(files)}
    write_atomically(folder / NAME, _text(document))


def read_listed(path: Path) -> bytes:
    """Return the contents of a file, checked against its folder's manifest.

    Raises FileNotFoundError where neither file nor entry exists, RuntimeError where the two do not agree.
    """
    files = _read_manifest(path.parent)
    return read_file(path, max_bytes=None) if files is None else _read_listed(path, files)


def _read_listed(path: Path, files: dict[str, Any]) -> bytes:
    """Return the contents of a file, checked against the entries of its folder's manifest, `files`."""
    if path.name not in files:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        raise RuntimeError(f"{path} does not belong to its folder: {NAME} does not list it")
    if not path.exists():
        raise RuntimeError(f"{path} is missing: {NAME} lists it")
    expected = files[path.name]
    found = {**expected, "bytes": path.stat().st_size}  # first, so that a file of another size is not read at all
    if found == expected:
        data = read_file(path, max_bytes=None)
        found = _entry(data)
    if found != expected:
        raise RuntimeError(f"{path} is damaged or of another folder: {_difference(expected, found)}, as {NAME} says")
    return data


def listed_names(folder: Path) -> list[str]:
    """Return the names of the files that the manifest of `folder` lists; none, with a warning, where there is none.

    Raises RuntimeError where the manifest is damaged.
    """
    return list(_read_manifest(folder) or {})


def check_folder(folder: Path) -> bool:
    """Check all files of a folder against its manifest; return False, with a warning, where an older tipl wrote none.

    Raises RuntimeError where a file differs from its entry, is missing, or has one of DATA_SUFFIXES and no entry.
    """
    problems = problems_in(folder)
    if problems:
        raise RuntimeError(problems[0])
    return (folder / NAME).exists()


def problems_in(folder: Path) -> list[str]:
    """Return one line for each faulty file of a folder; without a manifest, warn and return no lines."""
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
    """Return name -> entry of the folder's files, or None, with a warning, where there is no manifest."""
    path = folder / NAME
    if not path.exists():
        warnings.warn(UncheckedWarning(folder), stacklevel=1)
        return None
    try:
        data = read_file(path)
        document = json.loads(data)
        if document.keys() != {"format", "version", "files", "sha256"}:
            raise ValueError("it must have format, version, files and sha256, and nothing else")
        files = document["files"]
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format must be {FORMAT!r}, version {VERSION}")
        if document["sha256"] != json_digest(files):
            raise ValueError("it fails its checksum")
        if data != _text(document):
            raise ValueError("it is not as it was written")
        return dict(files)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RuntimeError(f"{path} is damaged: {error}") from error


def _text(document: dict[str, Any]) -> bytes:
    """Return the manifest as it is written."""
    return (json.dumps(document, indent=1) + "\n").encode()


def _entry(data: bytes) -> dict[str, Any]:
    """Return the manifest's entry for a file with these contents."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    if expected["bytes"] != found["bytes"]:
        return f"it has {found['bytes']} bytes instead of {expected['bytes']}"
    return f"its SHA-256 is {found['sha256'][:12]}... instead of {expected['sha256'][:12]}..."


def _is_covered(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.name != NAME and not path.name.startswith(".") and path.is_file()
