"""I/O faults: the n-th file operation of a command fails or comes short; then the same command is run again."""

import errno
import random
import shutil
from typing import ClassVar

from .children import Setting
from .disturbed import choose_command, judge_ending, judge_left, judge_rerun, place
from .faults import CHANGES, KINDS
from .kills import Operations
from .pipeline import run
from .rows import Trial

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR, errno.EROFS)


class IOFaults(Operations):
    name = "io_faults"
    counts: ClassVar = {"smoke": 60, "full": 2000}

    def attempt(self, number: int, rng: random.Random) -> Trial:
        command = choose_command(rng, self.pipeline)
        trial = Trial(command.name)
        output = place(self.folder(number), command)
        chosen = rng.choice((*ERRORS, 0))
        if chosen == 0:
            kinds, mode = "w", "short"
        elif chosen == errno.EINTR:
            kinds, mode = "wsor", "once"  # what POSIX lets a signal interrupt
        elif chosen == errno.EIO:
            kinds, mode = "".join(KINDS), rng.choice(("once", "from then on"))
        else:
            kinds, mode = CHANGES.replace("u", "").replace("k", ""), rng.choice(("once", "from then on"))
        fault = self.fault(rng, command.name, kinds, str(output.parent), mode=mode, error=chosen)
        first = run(command, self.pipeline, output, Setting(fault=fault))
        trial.story = f"{fault}: {first.hit.splitlines()[0] if first.hit else 'not reached'}"
        trial.happened = bool(first.hit)
        if trial.happened:
            judge_ending(trial, first, output.parent)
            if first.status == 0 and (difference := self.pipeline.difference(command.name, output)):
                trial.add("silent", f"status 0, and another output: {difference}")
            judge_left(trial, command, self.pipeline, output)
            judge_rerun(trial, command, self.pipeline, output)
        shutil.rmtree(output.parent)
        return trial
