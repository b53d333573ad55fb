"""python -m tests.stress: run campaigns and write their rows; the exit status is 1 where anything failed."""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from . import faults

FOLDER = Path(__file__).parent
IN_FORKS = ("kills", "io_faults", "damage", "pairs", "hostile")
ALONE = ("fuzz", "ray_kills")
"""Programs of their own, that print rows."""


def main() -> int:
    options = _options()
    build = options.work / f"tipl-stress-{os.getuid()}"
    faults.ensure_loaded(build)
    work = build / str(os.getpid())
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    try:
        _run(options, work, rows)
    except KeyboardInterrupt:
        print("stress: interrupted; what was done until then is counted", file=sys.stderr)
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    _write(options, rows, time.monotonic() - started)
    from .rows import as_text, failures

    print(as_text(rows))
    return 1 if failures(rows) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument(
        "campaigns", nargs="*", help=f"of {', '.join(IN_FORKS + ALONE)}; by default all", metavar="NAME"
    )
    parser.add_argument("--scale", choices=("smoke", "full"), default="full", help="how many trials")
    parser.add_argument("--count", type=int, help="trials of each campaign, instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="make this trial of one campaign alone, and tell all of it")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="trials at once")
    parser.add_argument("--output", type=Path, default=FOLDER / "latest.json", help="where the rows go")
    parser.add_argument("--work", type=Path, default=_scratch(), help="scratch folder")
    parser.add_argument("--keep", action="store_true", help="leave the scratch folder")
    options = parser.parse_args()
    unknown = set(options.campaigns) - {*IN_FORKS, *ALONE}
    if unknown:
        parser.error(f"campaigns are {', '.join(IN_FORKS + ALONE)}, got {', '.join(sorted(unknown))}")
    if options.only is not None and len(options.campaigns) != 1:
        parser.error("--only takes one campaign")
    options.work = options.work.resolve()
    return options


def _scratch() -> Path:
    """Return a folder in memory, where there is a gigabyte of it."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free >= 2**30 else Path("runs")


def _run(options: argparse.Namespace, work: Path, rows: list[dict[str, Any]]) -> None:
    """Run the campaigns that were asked for; `rows` grows as they end."""
    sys.path.append(str(FOLDER.parent))  # for tests/factories.py and tests/hostile_files.py
    from . import alone
    from .damage import Damage
    from .hostile import Hostile
    from .io_faults import IOFaults
    from .kills import Kills
    from .pairs import Pairs
    from .pipeline import Pipeline, make_twins
    from .rows import Table
    from .workers import Workers

    wanted = options.campaigns or [*IN_FORKS, *ALONE]
    twins: tuple[Pipeline, Pipeline] | None = None
    for kind in (Damage, Kills, IOFaults, Pairs, Hostile):
        if kind.name not in wanted:
            continue
        if twins is None:
            twins = make_twins(work.parent / "cache")
        campaign = kind(options.seed, *twins, work / "scratch")
        campaign.prepare()
        if options.only is not None:
            print(campaign.trial(options.only))
            return
        table = Table(kind.name, options.seed)
        workers = Workers(table, campaign.trial, campaign.row, limit=kind.limit, processes=options.processes)
        try:
            workers.make(options.count or kind.counts[options.scale])
        finally:
            rows += table.rows()
    for name in ALONE:
        if name in wanted:
            rows += alone.rows_of(name, options.seed, options.count, options.scale)


def _write(options: argparse.Namespace, rows: list[dict[str, Any]], seconds: float) -> None:
    document = {
        "seed": options.seed,
        "scale": options.scale,
        "seconds": round(seconds, 1),
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "rows": rows,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
