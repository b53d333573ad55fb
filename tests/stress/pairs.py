"""Pairs: the same command twice at once into one output. One makes it; the other is refused and told by whom."""

import os
import random
import shutil
import socket
import time
from typing import ClassVar

from . import children
from .campaign import Campaign
from .children import Ended, Setting
from .content import leftovers
from .disturbed import judge_ending, place
from .pipeline import COMMANDS, Command, work
from .rows import Trial

SLOW = ("store info", "compare")
"""Commands that leave no output that anybody waits for."""


class Pairs(Campaign):
    name = "pairs"
    counts: ClassVar = {"smoke": 14, "full": 100}

    def row(self, number: int) -> str:
        names = [name for name in COMMANDS if name not in SLOW]
        return names[number % len(names)]

    def attempt(self, number: int, rng: random.Random) -> Trial:
        command = COMMANDS[self.row(number)]
        trial = Trial(command.name)
        output = place(self.folder(number), command)
        more = rng.choice(((), command.resume))
        late = rng.choice((0.0, 0.0, 0.01, 0.1, 0.3)) * self.pipeline.seconds[command.name]
        trial.story = f"{' '.join(more)} the second {late:.3f} s later".strip()
        ends, pids, began = self._both(command, output, more, late)
        for ended in ends:
            if ended.status:
                judge_ending(trial, ended, output)
        won = [ended.status == 0 for ended in ends]
        difference = self.pipeline.difference(command.name, output)
        if won == [True, True] and began < min(ended.at for ended in ends):
            trial.add("silent", f"both have made it at once; {difference or 'the output is whole'}")
        elif True not in won:
            trial.add("blocked_rerun", f"neither has made it: {ends[0].message} / {ends[1].message}")
        elif difference:
            trial.add("silent", f"one has made it, and the output is another: {difference}")
        else:
            trial.add("identical")
            if False in won:
                self._judge_refusal(trial, ends[won.index(False)], ends[won.index(True)], pids[won.index(True)])
        if left := leftovers(output):
            trial.add("leftovers", ", ".join(left[:4]))
        shutil.rmtree(output.parent)
        return trial

    def _both(
        self, command: Command, output: os.PathLike[str], more: tuple[str, ...], late: float
    ) -> tuple[list[Ended], list[int], float]:
        """Run it twice from the same moment, or one so many seconds later; return also when the second began."""
        gate = os.pipe()
        both = [
            children.start(work(command, self.pipeline, output, more), Setting(gate=gate, delay=seconds))
            for seconds in (0.0, late)
        ]
        for end in gate:
            os.close(end)
        began = time.monotonic() + late
        return [child.wait(Setting(timeout=240)) for child in both], [child.pid for child in both], began

    def _judge_refusal(self, trial: Trial, loser: Ended, winner: Ended, pid: int) -> None:
        """Count a refusal that says neither who is at it nor that the output, which appears whole, is there already."""
        says_who = str(pid) in loser.message and socket.gethostname() in loser.message
        if loser.at < winner.at and not says_who and "exists already" not in loser.message:
            trial.add("unclear", f"does not say who holds it: {loser.message}")
