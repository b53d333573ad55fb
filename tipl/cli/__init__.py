"""The command line: one command for each stage, `run` for all of them, `demo` for a first look.

Every command prints one line for each result on stdout. A user's mistake ends in one line on stderr and exit status 2,
Ctrl-C in one line and 130.
"""

import dataclasses
import os
import select
import sys
import warnings
from pathlib import Path
from typing import Annotated

import tyro

from tipl.cli.forecast_commands import Calibrate, Evaluate, Report, Rollout, Score, Train, Video
from tipl.cli.jump_commands import Accelerate, Compare
from tipl.cli.printing import one_line, print_versions, print_warning
from tipl.cli.run_commands import Demo, Reproduce, Run
from tipl.cli.share_commands import MakeZoo, Pull, Push
from tipl.cli.store_commands import Collect, Export, Import, StoreCommands, Verify
from tipl.files.locations import local_path
from tipl.progress import hide_progress

Command = (
    Annotated[Collect, tyro.conf.subcommand("collect")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[StoreCommands, tyro.conf.subcommand("store")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Rollout, tyro.conf.subcommand("rollout")]
    | Annotated[Video, tyro.conf.subcommand("video")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Accelerate, tyro.conf.subcommand("accelerate")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Push, tyro.conf.subcommand("push")]
    | Annotated[Pull, tyro.conf.subcommand("pull")]
    | Annotated[MakeZoo, tyro.conf.subcommand("zoo")]
)


def main() -> None:
    """Parse the command line and run the command; the exit status is 0, 1 where `verify` finds damage, 2 for
    a user's mistake, 130 for Ctrl-C, 141 where nobody reads the output any more.
    """
    warnings.showwarning = print_warning  # type: ignore[assignment]
    try:
        arguments = [argument for argument in sys.argv[1:] if argument != "--quiet"]
        if arguments == ["--version"]:
            print_versions()
            return
        if arguments != sys.argv[1:]:
            hide_progress()
        command = tyro.cli(
            Command,
            prog="tipl",
            args=arguments,
            description="Forecast where PPO takes a policy's weights. Start with `tipl demo`; `tipl --version` says "
            "what is installed, and on which devices the engine can compute. With --quiet, a command says nothing of "
            "its progress: on a terminal a bar, elsewhere a line every ten seconds.",
        )
        _refuse_urls(command)
        command.run()
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        print(f"tipl: interrupted. {interrupt}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, FloatingPointError, MemoryError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.exit(141)  # as a program that SIGPIPE ends
        print(f"tipl: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _reader_is_gone() -> bool:
    """Return whether nobody reads any more what is printed, as behind `| head`; what is left to print is dropped."""
    stdout = select.poll()
    stdout.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in stdout.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes at its end
    return True


def _refuse_urls(command: object) -> None:
    """Raise ValueError where a URL was given for an argument that is a local path."""
    for name, value in vars(command).items():
        if dataclasses.is_dataclass(value):
            _refuse_urls(value)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                local_path(path, name)
