"""What a campaign is: trials by number, each of which follows from the seed."""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .pipeline import Pipeline
from .rows import Trial

ATTEMPTS = 8


@dataclass
class Campaign(ABC):
    """Trials of one kind. They run in forks of this process, several at once, in folders of their own in `scratch`."""

    seed: int
    pipeline: Pipeline
    twin: Pipeline
    """The same with other trials."""
    scratch: Path

    name: ClassVar[str]
    counts: ClassVar[dict[str, int]]
    """Trials at each scale."""
    limit: ClassVar[float] = 600.0
    """Seconds for a trial, at most, before its worker is killed."""

    def prepare(self) -> None:  # noqa: B027  # most need nothing
        """Do what all trials need."""

    def trial(self, number: int) -> Trial:
        """Make a trial; where it does not come about, as no fault was reached, another in its place."""
        rng = self.rng(number)
        for _ in range(ATTEMPTS):
            trial = self.attempt(number, rng)
            if trial.happened:
                break
        return trial

    @abstractmethod
    def attempt(self, number: int, rng: random.Random) -> Trial:
        """Make a trial of the random numbers of its number."""

    @abstractmethod
    def row(self, number: int) -> str:
        """Return the row in which a trial is counted."""

    def rng(self, number: int) -> random.Random:
        return random.Random(f"{self.name} {self.seed} {number}")

    def folder(self, number: int) -> Path:
        return self.scratch / f"{self.name}{number}"
