"""Kills on a Ray cluster: workers and whole machines die while they collect; the store is that of one process.

    python tests/stress/ray_kills.py --seed 0 --kills 50      prints a row of JSON for workers and for nodes

A cluster of two machines is started here, of a core each; the one without the head is what dies, and another comes.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tipl.collecting.collection import collect
from tipl.collecting.ppo_config import PPOConfig

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
ARGUMENTS: dict[str, Any] = {
    "env_id": "InvertedPendulum-v5",
    "num_trials": 4,
    "total_timesteps": 256 * 60,
    "ppo": PPOConfig(num_steps=256, num_minibatches=8, update_epochs=4, hidden_sizes=(32, 32)),
    "progress": False,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50, help="of workers; of nodes a fifth as many")
    options = parser.parse_args()
    counts = {"worker": options.kills, "node": options.kills // 5}
    warnings.simplefilter("ignore")
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    folder = Path(tempfile.mkdtemp(prefix="tipl-ray-"))
    try:
        collect(folder / "alone", **ARGUMENTS)
        expected = files(folder / "alone")
        rows = [
            campaign(cluster, folder, expected, kind, counts[kind], options.seed) for kind in counts if counts[kind]
        ]
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        print(json.dumps(row), flush=True)
    return 0


def campaign(
    cluster: Cluster, folder: Path, expected: dict[str, bytes], kind: str, count: int, seed: int
) -> dict[str, Any]:
    """Collect `count` times with a kill in each, and return the row."""
    row: dict[str, Any] = {"campaign": "ray_kills", "command": f"collect, {kind} killed", "tried": 0, "examples": {}}
    for number in range(count):
        rng = random.Random(f"ray_kills {kind} {seed} {number}")
        after = rng.randint(1, 50)
        mark, message = one_kill(cluster, folder / f"{kind}{number}", expected, kind, after)
        if not mark:
            continue  # all was done before
        row["tried"] += 1
        for name in (mark, "resumed") if mark == "identical" else (mark,):
            row[name] = row.get(name, 0) + 1
        if message:
            row["examples"].setdefault(mark, []).append({"seed": seed, "trial": number, "message": message})
        print(f"ray_kills  {kind} {number + 1} of {count}: after {after} checkpoints, {mark}", flush=True)
    return row


def one_kill(cluster: Cluster, output: Path, expected: dict[str, bytes], kind: str, after: int) -> tuple[str, str]:
    """Kill a worker or a node once a trial has `after` checkpoints; return what came of it, and its message."""
    node = cluster.add_node(**NODE)
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while not ended.is_set() and most_checkpoints(output) < after:
            time.sleep(0.02)
        if ended.is_set():
            return
        if kind == "node":
            cluster.remove_node(node, allow_graceful=False)
            killed.append(0)
            return
        for pid in workers("collect_shard")[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    mark, message = "identical", ""
    try:
        collect(output, **ARGUMENTS, ray=cluster.address, trials_per_shard=2)
        if files(output) != expected:
            mark, message = "silent", "the store differs from that of one process"
    except Exception as error:
        mark, message = "blocked_rerun", f"{type(error).__name__}: {error}"[:400]
    finally:
        ended.set()
        thread.join()
        if node in cluster.worker_nodes:
            cluster.remove_node(node)
        shutil.rmtree(output, ignore_errors=True)
    return (mark, message) if killed else ("", "")


def most_checkpoints(store: Path) -> int:
    """Return how many checkpoints the trial with most has committed."""
    found = [0]
    for record in store.glob("trial_*/zarr.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append(json.loads(record.read_text())["attributes"]["num_checkpoints"])
    return max(found)


def workers(name: str) -> list[int]:
    """Return the process ids of this process's Ray workers that run a function of this name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_worker = (folder / "cmdline").read_bytes().startswith(f"ray::{name}".encode())
            if is_worker and os.getpid() in ancestors(int(folder.name)):
                found.append(int(folder.name))
    return found


def ancestors(pid: int) -> list[int]:
    """Return the process ids of a process's parent, its parent and so on."""
    found = []
    while pid > 1:
        state = Path(f"/proc/{pid}/stat").read_text()
        pid = int(state.rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(it.relative_to(folder)): it.read_bytes() for it in sorted(folder.rglob("*")) if it.is_file()}


if __name__ == "__main__":
    sys.exit(main())
