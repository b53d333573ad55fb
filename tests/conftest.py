"""Fixtures of several files."""

import sys
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def run_tipl() -> Callable[..., int]:
    """Run the command line in this process, and return its exit status."""
    from tipl.cli import main  # not above: it imports all of tipl, torch and MuJoCo

    def run(*arguments: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["tipl", *map(str, arguments)])
            try:
                main()
            except SystemExit as ending:
                return int(ending.code or 0)
        return 0

    return run
