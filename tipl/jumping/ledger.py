"""Where the env steps of runs went: what trained, what was undone, what only judged."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tipl.files.manifest import NAME as MANIFEST
from tipl.files.manifest import read_listed
from tipl.files.schema import parse
from tipl.files.sealed import load_json, save_json
from tipl.jumping.jumps import Jump

PURPOSES = ("training", "undone", "judging")
"""training: iterations whose update was kept. undone: iterations that a jump cost which did not hold. judging: episodes
that were run to judge and for nothing else."""


@dataclasses.dataclass
class Ledger:
    """The returns and env steps of runs that learned in lockstep."""

    env_id: str
    seeds: list[int]
    """Of the N runs."""
    steps_per_iteration: int
    """Env steps of one run in one iteration."""
    returns: list[list[float]] = dataclasses.field(default_factory=list)
    """For each iteration, also of those that were undone, the mean return of each run's episodes that ended in it; NaN
    where none did, (T, N)."""
    jumps: list[Jump] = dataclasses.field(default_factory=list)
    judging_steps: int = 0
    """Env steps of all runs in episodes that only judged."""
    env_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of the environment."""

    def add(self, episodic_return: NDArray[np.float64], jumps: list[Jump]) -> None:
        """Add an iteration of all runs (N,), and all jumps so far."""
        self.returns.append(episodic_return.tolist())
        self.jumps = jumps

    @property
    def env_steps(self) -> dict[str, int]:
        """Env steps of all runs together by purpose."""
        undone = sum(jump.lost for jump in self.jumps)
        iterations = len(self.returns) * len(self.seeds)
        counts = (iterations - undone, undone)
        spent = {name: n * self.steps_per_iteration for name, n in zip(PURPOSES, counts, strict=False)}
        return spent | {"judging": self.judging_steps}

    def curves(self) -> NDArray[np.float64]:
        """Return the runs' learning curves (N, T); where no episode ended, the last value, NaN before the first one."""
        curves = np.array(self.returns, np.float64).reshape(-1, len(self.seeds)).T.copy()
        for t in range(1, curves.shape[1]):
            curves[:, t] = np.where(np.isnan(curves[:, t]), curves[:, t - 1], curves[:, t])
        return curves

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "env_id": self.env_id,
            **({"env_kwargs": self.env_kwargs} if self.env_kwargs else {}),
            "seeds": self.seeds,
            "steps_per_iteration": self.steps_per_iteration,
            "env_steps": self.env_steps,
            "returns": [[None if math.isnan(value) else value for value in row] for row in self.returns],
            "jumps": [dataclasses.asdict(jump) for jump in self.jumps],
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        return cls(
            record["env_id"],
            record["seeds"],
            record["steps_per_iteration"],
            [[math.nan if value is None else value for value in row] for row in record["returns"]],
            [Jump(**jump) for jump in record["jumps"]],
            record["env_steps"]["judging"],
            record.get("env_kwargs", {}),
        )

    def save(self, path: Path) -> None:
        """Write the ledger as JSON with a checksum to `path`, whole or not at all."""
        save_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the ledger in `path`, checked against its folder's manifest where there is one.

        Raises FileNotFoundError, or RuntimeError where the file is damaged, or of another folder.
        """
        if not path.exists():
            raise FileNotFoundError(
                f"Ledger.load: {path} does not exist; `tipl accelerate` writes it when all its runs are finished"
            )
        if (path.parent / MANIFEST).exists():
            read_listed(path)
        record = load_json(path, "Ledger.load")
        parse(_Record, record, path)
        return cls.from_dict(record)


@dataclasses.dataclass(frozen=True)
class _Record:
    """What the file of a ledger holds."""

    env_id: str
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    steps_per_iteration: Annotated[int, Field(ge=1)]
    env_steps: dict[str, Annotated[int, Field(ge=0)]]
    returns: Annotated[list[list[Annotated[float, Field(allow_inf_nan=False)] | None]], Field(min_length=1)]
    jumps: list[Jump]
    env_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if odd := [row for row in self.returns if len(row) != len(self.seeds)]:
            raise ValueError(f"returns must hold {len(self.seeds)} numbers a row, one for each seed, got {len(odd[0])}")
        if set(self.env_steps) != set(PURPOSES):
            raise ValueError(f"env_steps must name {', '.join(PURPOSES)}, got {', '.join(self.env_steps)}")
