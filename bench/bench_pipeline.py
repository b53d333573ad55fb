"""The whole pipeline: `tipl demo`, from the first env step to the report.

No peer does all of it, so it is compared with its first stage in Stable-Baselines3: the time that as many env steps of
PPO take there, by the rate measured in the same run.
"""

import functools
import itertools
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from bench_collect import SB3_STEPS, sb3_learn, seconds_a_step
from measure import Row, clock, rows_of, side_by_side
from record import Record

from tipl import Store, _core
from tipl.stage_seconds import StageSeconds

ENV_ID = "InvertedPendulum-v5"
COMMAND = "from tipl.cli import main; main()"


def demo(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", COMMAND, "demo", "--output", str(folder)], check=True, capture_output=True)


@pytest.mark.filterwarnings("ignore")  # SB3's
def bench_demo(record: Record, tmp_path: Path) -> None:
    """Collect 224 runs, train the forecaster, judge it on 27 held-out runs, write the report."""
    cores = _core.available_cpus()
    with ProcessPoolExecutor(cores, get_context("spawn")) as processes:

        def sb3() -> int:
            return sum(processes.map(sb3_learn, [ENV_ID] * cores))

        sb3()  # imports, and builds the models
        folders = (tmp_path / f"demo{i}" for i in itertools.count())

        def measure() -> list[Row]:
            made = next(folders)
            clocks = {
                "demo": clock(functools.partial(demo, made)),
                "Stable-Baselines3, a step": seconds_a_step(sb3, cores * SB3_STEPS),
            }
            seconds = side_by_side(clocks, rounds=(3, 3))  # the demo runs once, being slow
            parts = ", ".join(f"{stage} {s:.0f}" for stage, s in StageSeconds(made / "seconds.json").read().items())
            record.say(f"demo, seconds: {parts}")
            store = Store.open(made / "store.zarr")
            num_steps = sum(int(store.trial(i).env_steps[-1]) for i in range(store.num_trials))
            peers = {"Stable-Baselines3, collecting alone": num_steps * seconds["Stable-Baselines3, a step"]}
            return rows_of("pipeline", "demo, all stages", "s", seconds["demo"], peers)

        record(measure)
