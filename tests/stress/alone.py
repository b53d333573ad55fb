"""Campaigns that are programs of their own: of the native code, and on a Ray cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .rows import COLUMNS

FOLDER = Path(__file__).parent
PROGRAMS = {"fuzz": "fuzz_native.py", "ray_kills": "ray_kills.py"}


def rows_of(name: str, seed: int, count: int | None, scale: str) -> list[dict[str, Any]]:
    """Run the program of a campaign and return the rows that it prints, a line of JSON each.

    It takes --seed, and --count or --scale; what it prints besides is shown. Where it fails the row says so.
    """
    program = FOLDER / PROGRAMS[name]
    if not program.exists():
        print(f"{name}: there is no {program.name}; left out", flush=True)
        return []
    amount = ["--scale", scale] if count is None else ["--count", str(count)]
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    command = [sys.executable, str(program), "--seed", str(seed), *amount]
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
        rows.append({"campaign": name, "command": program.name, **dict.fromkeys(COLUMNS, 0), "crashed": 1, "examples": failed})
    return rows
