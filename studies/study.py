"""What all studies share: the prefixes, the command line, and how they write records and intervals."""

import argparse
import json
from pathlib import Path
from typing import Any

from tipl.files.locations import write_atomically

PREFIXES = (0.2, 0.4, 0.6, 0.8)
"""Shares of a path after which it is forecast."""


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help begins with `description`, a study's docstring, as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def write_record(path: Path, record: Any, *, indent: int | None = None) -> None:
    """Write a record as JSON to `path`, whole or not at all."""
    write_atomically(path, (json.dumps(record, indent=indent) + "\n").encode())


def interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """Return "value [low, high]"."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
