"""Campaigns that are programs of their own: of the native code, and on a Ray cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .rows import COLUMNS

FOLDER = Path(__file__).parent
PROGRAMS = {"fuzz": ("fuzz_native.py", "--calls"), "ray_kills": ("ray_kills.py", "--kills")}
"""Campaign -> its program, and the option that says how many."""
COUNTS = {"fuzz": {"smoke": 20_000, "full": 1_000_000}, "ray_kills": {"smoke": 1, "full": 50}}


def rows_of(name: str, seed: int, count: int | None, scale: str) -> list[dict[str, Any]]:
    """Run the program of a campaign and return the rows that it prints, a line of JSON each.

    What it prints besides is shown. Where it fails a row says so.
    """
    program, option = FOLDER / PROGRAMS[name][0], PROGRAMS[name][1]
    if not program.exists():
        print(f"{name}: there is no {program.name}; left out", flush=True)
        return []
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    command = [sys.executable, str(program), "--seed", str(seed), option, str(count or COUNTS[name][scale])]
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                rows.append({**dict.fromkeys(COLUMNS, 0), "examples": {}, **json.loads(line)})
            except ValueError:
                print(line, end="", flush=True)
    if process.returncode and not any(row["crashed"] for row in rows):
        failed = {"crashed": [{"seed": seed, "message": f"{program.name} ended with {process.returncode}"}]}
        rows.append(
            {"campaign": name, "command": program.name, **dict.fromkeys(COLUMNS, 0), "crashed": 1, "examples": failed}
        )
    return rows
