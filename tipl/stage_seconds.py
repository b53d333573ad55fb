"""What each stage of a run took, kept in a file so that a resumed run still knows."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from tipl.locations import write_atomically


class StageSeconds:
    """A JSON file of stage -> seconds; a stage that fails leaves nothing in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, float]:
        return dict(json.loads(self.path.read_text())) if self.path.exists() else {}

    @contextlib.contextmanager
    def of(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.path.parent.mkdir(parents=True, exist_ok=True)
        seconds = {**self.read(), stage: time.perf_counter() - started}
        write_atomically(self.path, (json.dumps(seconds) + "\n").encode())
