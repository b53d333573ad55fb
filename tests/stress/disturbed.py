"""What a user finds after a command was disturbed: the state of the output, and how the same command goes then."""

import random
import re
import shutil
from pathlib import Path

from tipl.collecting.settings import is_complete
from tipl.forecasting.forecaster import Forecaster
from tipl.storing.store import Store
from tipl.verification import verify_store

from .children import Ended, Setting
from .content import leftovers
from .pipeline import COMMANDS, Command, Pipeline, run
from .rows import Trial

RERUN_SECONDS = 120.0


def choose_command(rng: random.Random, pipeline: Pipeline) -> Command:
    """Return a command, a quick one rather than a slow one: each gets about as much time as its square root."""
    names = list(COMMANDS)
    return COMMANDS[rng.choices(names, [pipeline.seconds[name] ** -0.5 for name in names])[0]]


def place(folder: Path, command: Command) -> Path:
    """Return where a trial's output is to be, alone in a folder."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder / command.output


def judge_ending(trial: Trial, ended: Ended, folder: Path) -> None:
    """Count how a command ended that failed: clearly or not."""
    if ended.timed_out:
        trial.add("hung", f"no end within {ended.seconds:.0f} s")
    elif ended.crashed:
        trial.add("crashed", _shown(ended))
    elif ended.status:
        fault = unclear(ended, folder)
        if fault:
            trial.add("unclear", f"{fault}: {_shown(ended)}")
        else:
            trial.add("refused_clearly")


def unclear(ended: Ended, *named: Path | str) -> str:
    """Return what is wrong with an error's text, "" if nothing: it must be one line that has one of `named` in it.

    Warnings may stand before it.
    """
    lines = [line for line in ended.err.splitlines() if line.startswith("tipl: ") and "tipl: warning:" not in line]
    after = ended.err[ended.err.find("tipl: error:") :].strip()
    if len(lines) != 1 or "\n" in after:
        return "not one line"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", ended.err):
        return "control characters"
    if named and not any(str(it) in after for it in named):
        return "no path"
    return ""


def judge_left(trial: Trial, command: Command, pipeline: Pipeline, output: Path) -> None:
    """Count an output that is not whole and passes for whole."""
    difference = pipeline.difference(command.name, output)
    if output.exists() and difference and passes_for_whole(command, output):
        trial.add("silent", f"what is left passes for whole: {difference}")


def judge_rerun(trial: Trial, command: Command, pipeline: Pipeline, output: Path) -> None:
    """Run the command once more, undisturbed, and count what comes of it."""
    finished = not pipeline.difference(command.name, output)
    kept = bool(output.exists() or leftovers(output))
    again = run(command, pipeline, output, Setting(timeout=RERUN_SECONDS), more=command.resume)
    if again.timed_out:
        trial.add("hung", f"the rerun has no end within {RERUN_SECONDS:g} s")
    elif again.crashed:
        trial.add("crashed", f"rerun: {_shown(again)}")
    elif again.status and not (finished and "exist" in again.message):
        trial.add("blocked_rerun", _shown(again))
    else:
        difference = pipeline.difference(command.name, output)
        if difference:
            trial.add("silent", f"the rerun's output is another: {difference}")
            return
        trial.add("identical")
        if kept and command.resumes and not finished:
            trial.add("resumed")
        if left := leftovers(output):
            trial.add("leftovers", ", ".join(left[:4]))


def passes_for_whole(command: Command, output: Path) -> bool:
    """Return whether tipl takes an output for a whole one."""
    try:
        if command.output.endswith(".zarr"):
            return is_complete(Store.open(output)) and not verify_store(output).problems
        if command.output in ("model", "shared", "calibrated"):
            Forecaster.load(output)
            return True
    except (RuntimeError, OSError, ValueError):
        return False
    # The rest is judged by the rerun: what passes for whole blocks it, or stays.
    return False


def _shown(ended: Ended) -> str:
    if ended.crashed:
        return f"status {ended.status}: {ended.message[:400]}"
    return ended.err.strip()[-400:]
