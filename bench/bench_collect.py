"""Collecting trajectories: PPO iterations of a population beside Stable-Baselines3's PPO; the simulator is the roof.

All use all cores; the population and SB3 learn with SB3's default hyperparameters. SB3 runs in its fastest setting
here, one process with one thread on each core. EnvPool with CleanRL's PPO, where it is installed, trains one policy
in 64 environments, with large minibatches. The simulator is `mujoco.batch` alone, without observations, rewards or
resets; from time to time its simulations return to their initial states, so that none stays fallen.
"""

import functools
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from measure import Clock, Row, rows_of, side_by_side
from mujoco.batch import Batch
from record import Record

import tipl
from tipl import PPOConfig, Store, StreamingSVD, _core
from tipl.cluster import connected
from tipl.collecting.envs import MujocoVectorEnv, make_vec
from tipl.collecting.mujoco_tasks import TASKS
from tipl.collecting.population import Population
from tipl.policy import PolicySpec
from tipl.subspace.basis import SKETCH_TRIALS, _sketch

NUM_TRIALS = {
    "HalfCheetah-v5": 64,
    "InvertedPendulum-v5": 64,
    "Hopper-v5": 64,
    "Walker2d-v5": 64,
    "Ant-v5": 16,
    "Humanoid-v5": 16,
}
SB3_STEPS, SIMULATED_STEPS, RESTORED_EVERY = 4096, 512, 16
ENVPOOL_ENVS, ENVPOOL_STEPS = 64, 512


@functools.cache
def sb3_model(env_id: str) -> Any:
    from stable_baselines3 import PPO

    torch.set_num_threads(1)
    return PPO("MlpPolicy", env_id, device="cpu", seed=0)


def sb3_learn(env_id: str) -> int:
    """Train in this process, one of several; return the env steps taken."""
    sb3_model(env_id).learn(SB3_STEPS, reset_num_timesteps=False)
    return SB3_STEPS


def seconds_a_step(work: Callable[[], object], num_steps: int) -> Clock:
    def run() -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) / num_steps

    return run


def simulation(env_id: str, number: int) -> Callable[[], None]:
    """Return a function that steps simulations SIMULATED_STEPS times, with the environment's frame skip."""
    env, task = make_vec(env_id, number, seeds=range(number)), TASKS[env_id]
    assert isinstance(env, MujocoVectorEnv)
    env.reset()
    begin = env.get_state().simulations
    batch = Batch(task.load_model(), number, _core.available_cpus())
    ctrl = batch.bind("ctrl")
    actions = np.random.default_rng(0).uniform(env.action_low, env.action_high, (SIMULATED_STEPS, number, env.act_dim))

    def simulate() -> None:
        for t, action in enumerate(actions):
            if t % RESTORED_EVERY == 0:
                batch.state[:] = begin
            ctrl[:] = action
            batch.step(nstep=task.frame_skip)

    return simulate


def record_beside_simulator(
    record: Record, suite: str, env_id: str, case: str, number: int, clocks: dict[str, Clock], rounds: tuple[int, int]
) -> None:
    """Record env steps/s of "tipl" beside the other clocks' and, as the roof, those of `mujoco.batch` alone with as
    many simulations as it has, `number`."""
    clocks = {**clocks, "mujoco.batch": seconds_a_step(simulation(env_id, number), SIMULATED_STEPS * number)}

    def measure() -> list[Row]:
        rates = {name: 1 / s for name, s in side_by_side(clocks, rounds=rounds).items()}
        ours, roof = rates.pop("tipl"), rates.pop("mujoco.batch")
        record.say(f"{suite} {env_id}: mujoco.batch alone makes {roof:,.0f} env steps/s")
        return rows_of(suite, case, "env steps/s", ours, rates, (100 * ours / roof, "mujoco.batch"))

    record(measure)


@pytest.mark.parametrize("env_id", NUM_TRIALS)
def bench_population(env_id: str, record: Record) -> None:
    number, cores = NUM_TRIALS[env_id], _core.available_cpus()
    seeds = range(number)
    env = make_vec(env_id, number, seeds=seeds)
    population = Population(env, PPOConfig(), seeds)
    before = population.weights()
    seconds = population.iterate().seconds
    assert (population.weights() != before).any(axis=1).all()  # every trial has learned something
    steps = number * PPOConfig().num_steps
    parts = ", ".join(f"{name} {1e6 * s / steps:.2f}" for name, s in seconds.items())
    record.say(f"collect {env_id}, microseconds an env step in the first iteration: {parts}")
    with ProcessPoolExecutor(cores, get_context("spawn")) as processes:

        def sb3() -> int:
            return sum(processes.map(sb3_learn, [env_id] * cores))

        sb3()  # imports, and builds the models
        clocks = {
            "tipl": seconds_a_step(population.iterate, steps),
            "Stable-Baselines3": seconds_a_step(sb3, cores * SB3_STEPS),
        }
        if find_spec("envpool"):
            from envpool_peer import EnvPoolPPO

            peer = EnvPoolPPO(env_id, ENVPOOL_ENVS, ENVPOOL_STEPS)
            clocks["EnvPool, CleanRL's PPO"] = seconds_a_step(peer.iterate, ENVPOOL_ENVS * ENVPOOL_STEPS)
        record_beside_simulator(record, "collect", env_id, f"{env_id} {number}", number, clocks, (5, 20))
    env.close()


# ---- many trials

COLLECTED_ALONE = """
import sys, tempfile, time
import tipl
from tipl.collecting.envs import make_vec

def peak_mb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

def collect(num_trials, iterations):
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        tipl.collect(folder + "/store", env_id="HalfCheetah-v5", num_trials=num_trials,
                     total_timesteps=2048 * iterations, progress=False)
        return time.perf_counter() - start

collect(1, 1)  # imports and other costs that come only once
before = peak_mb()
seconds = [collect(int(sys.argv[1]), iterations) for iterations in (1, 3)]
print((seconds[1] - seconds[0]) / 2, peak_mb() - before)
"""


def bench_trials(record: Record) -> None:
    """Seconds and memory against the number of trials, into docs/figures/collect_trials.svg."""
    trials = (16, 32, 64, 128, 256)
    needed = [n * 2048 * (4 * (17 + 6 + 6) + 2) / 2**20 for n in trials]  # MB in `Transitions` and the update
    said = [
        subprocess.run([sys.executable, "-c", COLLECTED_ALONE, str(n)], capture_output=True, text=True, check=True)
        for n in trials
    ]
    seconds, megabytes = np.array([[float(value) for value in done.stdout.split()] for done in said]).T
    for n, s, mb, least in zip(trials, seconds, megabytes, needed, strict=True):
        rate = n * 2048 / s
        record.say(
            f"collect HalfCheetah-v5, {n} trials: {s:.2f} s an iteration, {rate:,.0f} env steps/s, {mb:.0f} MB, "
            f"of which transitions {least:.0f}"
        )
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": "tipl", "svg.fonttype": "none"}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        left.plot(trials, seconds, "o-", label="measured")
        left.plot(trials, seconds[2] / trials[2] * np.array(trials), ":", color="tab:gray", label="in proportion to 64")
        left.set(xlabel="trials", ylabel="seconds per iteration of 2048 steps", title="HalfCheetah-v5, 2 cores")
        right.plot(trials, megabytes, "o-", label="measured, in addition to one trial's")
        right.plot(trials, needed, ":", color="tab:gray", label="the transitions alone")
        right.set(xlabel="trials", ylabel="MB", title="memory")
        for axes in (left, right):
            axes.set(xlim=0, ylim=0)
            axes.legend()
        figure.savefig(Path(__file__).parents[1] / "docs" / "figures" / "collect_trials.svg", metadata={"Date": None})
        plt.close(figure)
    # In proportion: for no number of trials does a trial take a quarter more time than with 64.
    assert (seconds / trials < 1.25 * seconds[2] / trials[2])[2:].all(), (
        "time does not grow in proportion to the trials"
    )


# ---- reading


def bench_reading(record: Record, tmp_path: Path) -> None:
    """A trial of 20,000 checkpoints, block by block, beside reading the same files' bytes."""
    spec, rows, block = PolicySpec(17, 6), 20_000, 100
    rng = np.random.default_rng(0)
    with Store.create(tmp_path / "store", env_id="HalfCheetah-v5", policy=spec, seeds=[0], config={}) as store:
        for start in range(0, rows, block):
            weights = rng.standard_normal((1, block, spec.num_params), dtype=np.float32)
            steps = np.arange(start, start + block)[None]
            store.append(weights, steps, np.zeros((1, block)))
    files = sorted(path for path in (tmp_path / "store").rglob("*") if path.is_file())
    trial = Store.open(tmp_path / "store").trial(0)
    num_bytes = rows * spec.num_params * 4
    assert sum(len(part) for part in trial.blocks(block)) == rows

    def read_store() -> None:
        for _ in trial.blocks(block):
            pass

    buffer = bytearray(1 << 20)

    def read_files() -> None:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    clocks = {"tipl": seconds_a_step(read_store, num_bytes), "files": seconds_a_step(read_files, num_bytes)}

    def measure() -> list[Row]:
        rates = {name: 1e-9 / s for name, s in side_by_side(clocks, rounds=(5, 20), budget_s=10).items()}
        roof = (100 * rates["tipl"] / rates["files"], "page cache")
        return rows_of(
            "collect", f"read {rows} checkpoints", "GB/s", rates["tipl"], {"reading the files": rates["files"]}, roof
        )

    record(measure)


# ---- a cluster

CLUSTER_TRIALS, CLUSTER_ITERATIONS, SHARD = 16, 12, 4


def bench_cluster(record: Record, tmp_path: Path) -> None:
    """A Ray cluster of two nodes with one core each, beside one such node."""
    from ray.cluster_utils import Cluster as LocalCluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    nodes = LocalCluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    folders = (tmp_path / f"store{i}" for i in itertools.count())

    def collect(total_timesteps: int = CLUSTER_ITERATIONS * PPOConfig().num_steps) -> None:
        tipl.collect(
            next(folders),
            env_id="HalfCheetah-v5",
            num_trials=CLUSTER_TRIALS,
            total_timesteps=total_timesteps,
            ray=nodes.address,
            trials_per_shard=SHARD,
            progress=False,
        )

    def rate() -> float:
        collect(1)  # starts the workers, which import what they need
        clock = seconds_a_step(collect, CLUSTER_TRIALS * CLUSTER_ITERATIONS * PPOConfig().num_steps)
        return 1 / statistics.median(clock() for _ in range(3))

    with connected(nodes.address):
        one = rate()
        nodes.add_node(**node)
        nodes.wait_for_nodes()
        two = rate()
    nodes.shutdown()
    record(lambda: rows_of("collect", "Ray, 2 nodes", "env steps/s", two, {"Ray, 1 node": one}))


def bench_many_trials(record: Record, tmp_path: Path) -> None:
    """What a trial costs besides learning, for estimates of 100,000 trials: HalfCheetah-v5, 147 checkpoints."""
    spec, number, rows = PolicySpec(17, 6), 64, 147
    start = time.perf_counter()
    empty = Store.create(tmp_path / "empty", env_id="HalfCheetah-v5", policy=spec, seeds=range(2000), config={})
    created = time.perf_counter() - start
    empty.close()
    start = time.perf_counter()
    assert Store.open(tmp_path / "empty").num_checkpoints == 0
    counted = time.perf_counter() - start
    record.say(f"creating a trial takes {created / 2:.2f} ms, reading its commit record {counted / 2:.3f} ms")

    rng = np.random.default_rng(0)
    with Store.create(
        tmp_path / "store", env_id="HalfCheetah-v5", policy=spec, seeds=range(number), config={}
    ) as store:
        paths = rng.standard_normal((number, rows, spec.num_params), dtype=np.float32).cumsum(1)
        store.append(paths, np.tile(np.arange(rows), (number, 1)), np.zeros((number, rows)))
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    record.say(f"a trial of {rows} checkpoints has {size / number / 1e6:.2f} MB in {len(files) / number:.1f} files")

    trials = [store.trial(i) for i in range(number)]
    start = time.perf_counter()
    sketches = [_sketch(trials[i : i + SKETCH_TRIALS], 16, 256, 0) for i in range(0, number, SKETCH_TRIALS)]
    sketched = time.perf_counter() - start
    sketches[0].save(tmp_path / "sketch")
    start = time.perf_counter()
    functools.reduce(StreamingSVD.merge, sketches)
    merged = (time.perf_counter() - start) / (len(sketches) - 1)
    sent = (tmp_path / "sketch").stat().st_size
    record.say(
        f"sketching a trial takes {1e3 * sketched / number:.1f} ms; merging the sketch of {SKETCH_TRIALS} trials "
        f"{1e3 * merged:.1f} ms, and it has {sent / 1e6:.2f} MB"
    )
