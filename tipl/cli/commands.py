"""All commands, and how a command line is parsed."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from tipl.cli.forecast_commands import Calibrate, Evaluate, Report, Rollout, Score, Train, Video
from tipl.cli.jump_commands import Accelerate, Compare
from tipl.cli.run_commands import Demo, Reproduce, Run
from tipl.cli.share_commands import MakeZoo, Pull, Push
from tipl.cli.store_commands import Collect, Export, Import, StoreCommands, Verify
from tipl.files.locations import local_path

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


def parsed(arguments: list[str]) -> Command:
    """Return the command that was typed. Raises ValueError where a URL was given for an argument that is a local path;
    exits where a command line cannot be parsed, and after --help.
    """
    command = tyro.cli(
        Command,
        prog="tipl",
        args=arguments,
        description="Forecast where PPO takes a policy's weights. Start with `tipl demo`; `tipl --version` says "
        "what is installed, and on which devices the engine can compute. With --quiet, a command says nothing of "
        "its progress: on a terminal a bar, elsewhere a line every ten seconds.",
    )
    _refuse_urls(command)
    return command


def _refuse_urls(command: object) -> None:
    """Raise ValueError where a URL was given for an argument that is a local path."""
    for name, value in vars(command).items():
        if dataclasses.is_dataclass(value):
            _refuse_urls(value)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                local_path(path, name)
