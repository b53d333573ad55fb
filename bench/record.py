"""A session's rows: shown as they come, written to latest.json, held against baseline.json.

Ratios are compared, not times: a slower machine slows the peers too. But each instruction set has a baseline of its
own, since the peers gain other factors from it than we do.
"""

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pytest
from measure import Row

from tipl import _core
from tipl.files.locations import write_atomically

LATEST, BASELINE = (Path(__file__).with_name(f"{name}.json") for name in ("latest", "baseline"))
TOLERATED = 0.85
"""Least share of the baseline's ratio that a new ratio must reach."""


class Record:
    """The rows of a session, and the baseline's ratios by row."""

    def __init__(self, config: pytest.Config) -> None:
        self.baselines: dict[str, Any] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
        baseline = self.baselines.get(_core.isa(), {"machine": {}, "ratios": {}})
        self.capture = config.pluginmanager.getplugin("capturemanager")
        self.updates: bool = config.getoption("--update-baseline")
        self.baseline_machine: dict[str, Any] = baseline["machine"]
        self.baseline: dict[str, float] = baseline["ratios"]
        self.rows: list[Row] = []
        self.fallen: list[Row] = []

    def __call__(self, measure: Callable[[], list[Row]]) -> list[Row]:
        """Return and keep the rows of `measure`; where a ratio fell below the baseline, those of a second measurement.

        What fell both times fails the benchmark.
        """
        rows = measure()
        self.say(*map(str, rows))
        if once := {row.key for row in rows if self.fell(row)}:
            self.say("below the baseline, measured again:")
            rows = measure()
            self.say(*map(str, rows))
        twice = [row for row in rows if row.key in once and self.fell(row)]
        self.rows += rows
        self.fallen += twice
        if twice:
            falls = [
                f"{name_of(row)}: {row.ratio:.2f} x, baseline {self.baseline[name_of(row)]:.2f} x" for row in twice
            ]
            pytest.fail("\n".join(["slower than the baseline", *falls]), pytrace=False)
        return rows

    def fell(self, row: Row) -> bool:
        return not self.updates and row.ratio < TOLERATED * self.baseline.get(name_of(row), 0)

    def say(self, *lines: str) -> None:
        """Print at once, although pytest captures output."""
        with self.capture.global_and_fixture_disabled():
            print("", *lines, sep="\n", flush=True)

    def write(self, roofs: dict[str, dict[str, float]]) -> str:
        """Write the files; return a line that says so."""
        here = machine()
        write_json(LATEST, {"machine": here, "roofs": roofs, "rows": [dataclasses.asdict(row) for row in self.rows]})
        if self.updates:
            ratios = self.baseline | {name_of(row): float(f"{row.ratio:.3g}") for row in self.rows}
            self.baselines[_core.isa()] = {"machine": here, "ratios": dict(sorted(ratios.items()))}
            write_json(BASELINE, dict(sorted(self.baselines.items())))
            return f"wrote {LATEST.name} and {BASELINE.name}"
        if not self.baseline:
            return f"wrote {LATEST.name}; no baseline of a machine with {_core.isa()}: --update-baseline makes one"
        theirs = {name: value for name, value in self.baseline_machine.items() if name in ("cpu", "cores")}
        other = "" if theirs.items() <= here.items() else f", of another machine: {theirs}"
        return f"wrote {LATEST.name}; {len(self.fallen)} of {len(self.rows)} rows fell below the baseline{other}"


def name_of(row: Row) -> str:
    return " | ".join(row.key)


def write_json(path: Path, content: object) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def first_line(*command: str) -> str:
    """Return a command's output; "" where it is missing or fails."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.partition("\n")[0].strip()


def machine() -> dict[str, object]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("tipl", "torch", "numpy", "scikit-learn", "llama_cpp_python", "stable_baselines3")
    here = {distribution.name.lower().replace("-", "_") for distribution in distributions()}
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cores": _core.available_cpus(),
        "isa": _core.isa(),
        "compiler": first_line(os.environ.get("CXX", "c++"), "--version"),
        "git_sha": first_line("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages if name.replace("-", "_") in here},
    }
