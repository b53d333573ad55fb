"""Kills: a command dies by SIGKILL at some file operation or moment; then the same command is run again."""

import random
import shutil
from typing import ClassVar

from .campaign import Campaign
from .children import Setting
from .disturbed import choose_command, judge_left, judge_rerun, place
from .faults import CHANGES, Fault
from .pipeline import run
from .rows import Trial

AT_AN_OPERATION = 0.7
"""Share of the kills; the others come at a random time."""


class Operations(Campaign):
    """A campaign that disturbs file operations of commands."""

    def row(self, number: int) -> str:
        return choose_command(self.rng(number), self.pipeline).name

    def fault(self, rng: random.Random, name: str, kinds: str, under: str, *, mode: str, error: int = 0) -> Fault:
        """Return a fault at one operation of some kind among `kinds`, each kind as likely as another."""
        counts = self.pipeline.operations[name]
        kind = rng.choice([it for it in kinds if counts.get(it)])
        return Fault(kind, under, rng.randint(1, counts[kind]), mode, error)


class Kills(Operations):
    name = "kills"
    counts: ClassVar = {"smoke": 60, "full": 1000}

    def attempt(self, number: int, rng: random.Random) -> Trial:
        command = choose_command(rng, self.pipeline)
        trial = Trial(command.name)
        output = place(self.folder(number), command)
        if rng.random() < AT_AN_OPERATION:
            fault = self.fault(rng, command.name, CHANGES, str(output.parent), mode="kill")
            setting = Setting(fault=fault)
            trial.story = str(fault)
        else:
            setting = Setting(kill_after=rng.uniform(0.0, 1.1 * self.pipeline.seconds[command.name]))
            trial.story = f"SIGKILL after {setting.kill_after:.3f} s"
        first = run(command, self.pipeline, output, setting)
        trial.story += f": {first.hit}" * bool(first.hit)
        trial.happened = first.killed  # else it was through before, or threads did otherwise than in the count
        if trial.happened:
            judge_left(trial, command, self.pipeline, output)
            judge_rerun(trial, command, self.pipeline, output)
        shutil.rmtree(output.parent)
        return trial
