"""What an output holds, so that two can be compared: to the byte, but for times, versions and the order of headers.

Left out: TensorBoard's events, which are named after the time; notes of seconds taken and of the machine; and files by
which tipl itself knows whether a folder is whole, whose checksums are of files with times in them.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

NOTES = {"seconds", "machine", "tipl_version"}
"""Keys of JSON objects that say when, how long or on what."""

_STAGE = rb"(?:[\w.-]+/)*(?:collect|train|evaluate|report)"
TIMES = re.compile(
    rb"(?:" + _STAGE + rb" )?(?:\d[\d.e+-]*(?:\xc2\xa0| )(?:s|min|h)\b(?:\xc2\xa0| )?)+(?:, )?"
    rb"|(?:<tr>)?<th>" + _STAGE + rb"</th><td>[\d.e+-]+</td>(?:</tr>)?"
)
"""In a report: durations, with the stage that took them, which a killed command may not have noted."""

SEALS = re.compile(r"\.?(tipl[-_.])?(manifest|checksums?)([-_.].*)?", re.IGNORECASE)
"""Names of files that hold checksums of the others."""

ASIDE = re.compile(r"\..*(partial|lock|claim|tmp|new|old).*")
"""Names of what a command writes before or beside its output."""


def content(path: Path) -> dict[str, str]:
    """Return relative path -> digest of every file of an output, "." for a file; none where there is nothing."""
    if not path.is_dir():
        return {".": _digest(path)} if path.exists() else {}
    return {
        str(file.relative_to(path)): _digest(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and not _is_left_out(file.relative_to(path))
    }


def differences(found: dict[str, str], expected: dict[str, str]) -> str:
    """Return in words where two contents differ, "" where they do not."""
    words = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    words += [f"{name} is too much" for name in sorted(found.keys() - expected.keys())]
    words += [f"{name} differs" for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def leftovers(output: Path) -> list[str]:
    """Return what lies beside the output in its folder, and files in it that no finished output has."""
    beside = [it.name for it in output.parent.iterdir() if it.name != output.name]
    inside = [str(it.relative_to(output.parent)) for it in output.rglob(".*") if ASIDE.fullmatch(it.name)]
    return sorted(beside + inside)


def _is_left_out(path: Path) -> bool:
    return "tb" in path.parts or any(ASIDE.fullmatch(part) or SEALS.fullmatch(part) for part in path.parts)


def _digest(file: Path) -> str:
    data = file.read_bytes()
    try:
        if file.suffix == ".json":
            data = json.dumps(_without_notes(file.name, json.loads(data)), sort_keys=True).encode()
        elif file.suffix == ".html":
            data = TIMES.sub(b"", data)
        elif file.suffix == ".safetensors":
            data = _in_order(data)
    except ValueError:
        pass  # damaged: as it is
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _without_notes(name: str, document: Any) -> Any:
    if name == "seconds.json":
        return {}
    if isinstance(document, dict):
        return {key: _without_notes("", value) for key, value in document.items() if key not in NOTES}
    if isinstance(document, list):
        return [_without_notes("", value) for value in document]
    return document


def _in_order(data: bytes) -> bytes:
    """Return a safetensors file with the keys of its header in order: those of its metadata come in any."""
    length = int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode() + data[8 + length :]
