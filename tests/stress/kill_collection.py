"""Kill one collection at random moments, run the same command again each time, and compare with an uninterrupted one.

    python tests/stress/kill_collection.py --kills 50

Every life of the collection is a process of its own, ended by SIGKILL, with a random number of threads. At the end all
files of both stores are compared byte by byte. The exit status is 0 where they are the same.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tipl.collecting.collection import collect
from tipl.collecting.ppo_config import PPOConfig
from tipl.storing.store import Store

STEPS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--env-id", default="InvertedPendulum-v5")
    parser.add_argument("--num-trials", type=int, default=4)
    parser.add_argument("--num-iterations", type=int, default=400)
    parser.add_argument("--save-seconds", type=float, default=0.02, help="between two saved states, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    sys.modules["tipl.collecting.collection"].SAVE_SECONDS = arguments.save_seconds
    rng = random.Random(arguments.seed)

    def life(path: Path) -> Callable[[], object]:
        num_threads = rng.randint(1, 3)
        return lambda: collect(
            path,
            env_id=arguments.env_id,
            num_trials=arguments.num_trials,
            total_timesteps=arguments.num_iterations * STEPS,
            ppo=PPOConfig(num_steps=STEPS, num_minibatches=2, update_epochs=2, hidden_sizes=(16, 16)),
            num_threads=num_threads,
            progress=False,
        )

    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole.zarr"), Path(folder, "killed.zarr")
        started = time.perf_counter()
        child = start(life(whole))
        while not whole.exists():
            time.sleep(0.001)
        until_store = time.perf_counter() - started
        if os.waitpid(child, 0)[1]:
            sys.exit("kill_collection: the uninterrupted collection failed")
        seconds = time.perf_counter() - started - until_store

        without_store = without_state = 0
        for kills in range(arguments.kills):
            without_store += not killed.exists()
            without_state += killed.exists() and not any(killed.glob("resume/*/state_*"))
            # A life may last as long as its share of the work left takes, but for a fifth, which is for the last one.
            left = max(0.0, 0.8 - done(killed) / (arguments.num_iterations + 1))
            child = start(life(killed))
            time.sleep(rng.uniform(0, until_store + left * seconds / (arguments.kills - kills)))
            os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0)[1] != signal.SIGKILL:
                sys.exit(f"kill_collection: the collection had ended before kill {kills + 1}")
        before_last = done(killed)
        if os.waitpid(start(life(killed)), 0)[1]:
            sys.exit("kill_collection: the last life failed")
        files, others = files_of(whole), files_of(killed)
        leftovers = sorted(path.name for path in Path(folder).iterdir() if path not in (whole, killed))
    wrong = sorted(name for name in files.keys() | others.keys() if files.get(name) != others.get(name))
    print(
        f"{arguments.env_id}, {arguments.num_trials} trials x {arguments.num_iterations} iterations: {arguments.kills} "
        f"kills ({without_store} lives began without a store, {without_state} without a state, the last one at "
        f"{before_last} checkpoints); {len(files)} files, {sum(map(len, files.values())):,} bytes: "
        + (f"DIFFERENT {wrong + leftovers}" if wrong or leftovers else "identical")
    )
    sys.exit(bool(wrong or leftovers))


def start(work: Callable[[], object]) -> int:
    """Return the id of a new process that does `work`. This process has no threads, so that it may fork."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def done(path: Path) -> int:
    return Store.open(path).num_checkpoints if path.exists() else 0


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() if file.is_file() else b"" for file in path.rglob("*")}


if __name__ == "__main__":
    main()
