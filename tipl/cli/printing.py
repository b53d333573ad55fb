"""What commands print: a line for each result on stdout, one line for a mistake or a warning on stderr."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tipl
from tipl.device import cuda_engine, devices
from tipl.files.manifest import read_listed
from tipl.files.schema import parse_json

if TYPE_CHECKING:
    from tipl.verification import Verification


def one_line(error: Exception) -> str:
    """Return what an error says, with a refused file's name first; control characters are escaped."""
    text = str(error) or f"{type(error).__name__}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_versions() -> None:
    """Print what is installed, and where the engine can compute."""
    from tipl import _core  # late, because it refuses a wrong TIPL_ISA, which then is one line and no traceback

    print(f"tipl {version('tipl')}, Python {platform.python_version()}, torch {version('torch')}")
    print(f"cpu: {_core.isa()}, {_core.available_cpus()} cores")
    for device in devices():
        print(device)
    try:
        if not cuda_engine().devices():
            print("cuda: this process sees no device")
    except RuntimeError as error:
        print(f"cuda: {one_line(error)}")


def print_warning(message: Warning | str, *place: Any) -> None:
    """Print a warning as one line, without the line of code that it came from."""
    if isinstance(message, Exception):
        message = one_line(message).removeprefix(r"\x1b[33mWARN: ").removesuffix(r"\x1b[0m")  # Gymnasium's colours
    print(f"tipl: warning: {message}", file=sys.stderr)


def print_verification(path: str, found: "Verification") -> None:
    """Print what was found, and exit with status 1 where something is wrong."""
    for problem in found.problems:
        print(problem)
    if found.problems:
        number = len(found.problems)
        print(f"damaged    {path}: {number} problem{'s' if number > 1 else ''}")
        sys.exit(1)
    print(f"ok         {path}: {found.summary()}")


def end_of_path_table(results: Path) -> str:
    """Return the mean relative weight error at the end of the path, a line for each predictor and a column for each
    prefix."""
    document = parse_json(read_listed(results), results)
    rows, train = document["rows"], document["settings"]["train"]
    judged = "trials that it was trained on" if train.get("in_sample") else "held-out trials"
    prefixes = sorted({row["prefix"] for row in rows})
    names = list(dict.fromkeys(row["predictor"] for row in rows if row["predictor"] != "return_floor"))
    last = {prefix: max(row["horizon"] for row in rows if row["prefix"] == prefix) for prefix in prefixes}
    lines = [f"relative weight error at the end of the path, mean over {judged}"]
    lines.append(f"{'prefix':<14}" + "".join(f"{prefix:>8.0%}" for prefix in prefixes))
    for name in names:
        errors = [
            np.mean(
                [
                    row["wpe_relative"]
                    for row in rows
                    if (row["predictor"], row["prefix"], row["horizon"]) == (name, prefix, last[prefix])
                ]
            )
            for prefix in prefixes
        ]
        lines.append(f"{name:<14}" + "".join(f"{error:>8.3f}" for error in errors))
    return "\n".join(lines)


def print_stage(kind: str, path: Path | str, *, tables: bool = False) -> None:
    """Print that a stage's output is there, a "store", "model", "results" or "report", and what is in it."""
    note = ""
    if kind == "store":
        note = f": {tipl.Store.open(path).summary()}"
    elif kind == "model":
        note = f": {training_line(Path(path))}"
    print(f"{kind:<10} {path}{note}", flush=True)
    if kind == "results" and tables:
        print(end_of_path_table(Path(path)))


def training_line(model: Path) -> str:
    training = parse_json(read_listed(model / "training.json"), model / "training.json")
    return (
        f"{training['num_parameters'] / 1e6:.2f} M parameters, validation error {training['best_error']:.3f} at step "
        f"{training['best_step']}, {training['seconds']:.0f} s"
    )
