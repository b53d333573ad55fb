"""How long each stage of a run took, kept in a file so that a resumed run still knows it."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

from tipl.files.manifest import NAME as MANIFEST
from tipl.files.manifest import read_listed
from tipl.files.publishing import remove
from tipl.files.sealed import load_json, save_json


class StageSeconds:
    """A JSON file of stage -> seconds, in a folder that gets a manifest when it is finished.

    A stage that fails leaves nothing in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, float]:
        """Return stage -> seconds. Raises RuntimeError where the file is damaged."""
        if (self.path.parent / MANIFEST).exists():
            read_listed(self.path)
        if not self.path.exists():
            return {}
        seconds = load_json(self.path, "seconds")
        for stage, value in seconds.items():
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise RuntimeError(f"seconds: {self.path}: {stage} must be a number of seconds, got {value!r}")
        return seconds

    @contextlib.contextmanager
    def of(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove(self.path.parent / MANIFEST)  # until the folder is finished again
        save_json(self.path, {**self.read(), stage: time.perf_counter() - started})
