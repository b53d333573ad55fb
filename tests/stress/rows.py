"""What is counted: a row for each command of a campaign."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

GOOD = {
    "identical": "the output is in the end that of an undisturbed run",
    "resumed": "of these, what the disturbed command had kept was gone on from",
    "refused_clearly": "one line on stderr that names the path, and a status of 1 or 2",
}
BAD = {
    "silent": "no error and no warning, and something else than the truth",
    "crashed": "a traceback, or death by a signal",
    "hung": "no end within the limit of time",
    "blocked_rerun": "the same command does not go through afterwards",
    "unclear": "an error of more than one line, with control characters, or without the path",
    "leftovers": "files left beside or in the output once the command has gone through",
    "escaped": "something written outside the output",
    "oversized": "more memory taken than the limit",
}
COLUMNS = ("tried", *GOOD, *BAD)
EXAMPLES = 2
"""Kept of each kind of failure in a row."""


@dataclass
class Trial:
    """What one trial came to: each of `marks` counts one in the row of `command`; a trial with none did not happen."""

    command: str
    marks: Counter[str] = field(default_factory=Counter)
    story: str = ""
    """What was done, at which operation, on which path."""
    messages: dict[str, str] = field(default_factory=dict)
    """Of each failure, what was seen."""
    happened: bool = True

    def add(self, mark: str, message: str = "") -> None:
        self.marks[mark] += 1
        if mark in BAD:
            self.messages.setdefault(mark, message)

    @property
    def failed(self) -> bool:
        return any(mark in BAD for mark in self.marks)

    def to_json(self) -> str:
        return json.dumps(
            {
                "command": self.command,
                "marks": self.marks,
                "story": self.story,
                "messages": self.messages,
                "happened": self.happened,
            }
        )

    @classmethod
    def from_json(cls, line: str) -> "Trial":
        fields = json.loads(line)
        return cls(**{**fields, "marks": Counter(fields["marks"])})


class Table:
    """The rows of a campaign."""

    def __init__(self, campaign: str, seed: int) -> None:
        self.campaign, self.seed = campaign, seed
        self.counts: dict[str, Counter[str]] = {}
        self.examples: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def add(self, number: int, trial: Trial) -> None:
        if not trial.happened:
            return
        self.counts.setdefault(trial.command, Counter()).update({"tried": 1, **trial.marks})
        for mark, message in trial.messages.items():
            kept = self.examples.setdefault(trial.command, {}).setdefault(mark, [])
            if len(kept) < EXAMPLES and message not in [it["message"] for it in kept]:
                kept.append({"seed": self.seed, "trial": number, "story": trial.story, "message": message})

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "campaign": self.campaign,
                "command": command,
                **{name: counts[name] for name in COLUMNS},
                "examples": self.examples.get(command, {}),
            }
            for command, counts in sorted(self.counts.items())
        ]


def failures(rows: Iterable[dict[str, Any]]) -> int:
    return sum(row[name] for row in rows for name in BAD)


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of the rows, and their sum for each campaign."""
    lines = [("campaign", "command", *COLUMNS)]
    for campaign in dict.fromkeys(row["campaign"] for row in rows):
        of_campaign = [row for row in rows if row["campaign"] == campaign]
        lines += [(campaign, row["command"], *(str(row[name]) for name in COLUMNS)) for row in of_campaign]
        if len(of_campaign) > 1:
            lines.append((campaign, "all", *(str(sum(row[name] for row in of_campaign)) for name in COLUMNS)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
