"""Work on a real Ray cluster of two nodes with one core each, in this machine: the same results as in one process."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from factories import ENV_ID, TINY_EVALUATE, TINY_PPO, TINY_TRAIN
from ray.cluster_utils import Cluster as LocalCluster

from tipl.cluster import Cluster, connected
from tipl.collecting.collection import collect
from tipl.collecting.episodes import run_episodes
from tipl.collecting.resume import Unfinished
from tipl.collecting.settings import is_complete
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training import train
from tipl.judging.evaluation import evaluate
from tipl.policy import PolicySpec
from tipl.storing.store import Store
from tipl.subspace.basis import Basis

# Of Ray's own making, which leaves files and sockets to the garbage collector, and of the S3 server's.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]

ARGUMENTS = {"env_id": ENV_ID, "num_trials": 5, "total_timesteps": 32 * 8, "ppo": TINY_PPO, "progress": False}


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() if file.is_file() else b"" for file in path.rglob("*")}


@pytest.fixture(scope="module")
def address(bucket: str) -> Iterator[str]:
    """The cluster's; its workers know the bucket, since they have the environment in which their node was started."""
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    nodes = LocalCluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    nodes.add_node(**node)
    yield nodes.address
    nodes.shutdown()


@pytest.fixture
def cluster(address: str) -> Iterator[Cluster]:
    with connected(address) as cluster:
        yield cluster


def test_calls_run_on_all_nodes_and_come_back_in_order(cluster: Cluster) -> None:
    def node_of_caller(seconds: float) -> str:
        time.sleep(seconds)
        return str(ray.get_runtime_context().get_node_id())

    assert (cluster.num_cpus, cluster.most_cpus) == (2, 1)
    assert cluster.map(lambda *numbers: sum(numbers), [(7, 2), (), (5,)]) == [9, 0, 5]
    polled: list[int] = []
    assert len(set(cluster.map(node_of_caller, [(0.5,)] * 6, poll=polled.append))) == 2
    assert polled == sorted(polled)
    assert polled[-1] == 6


def test_an_exception_of_a_call_is_raised_here(cluster: Cluster) -> None:
    with pytest.raises(ZeroDivisionError):
        cluster.map(lambda x: 1 / x, [(1,), (0,), (2,)])
    with pytest.raises(ValueError, match="ray: no machine of the cluster has 2 cores; the largest has 1"):
        cluster.map(lambda: 1, [()], num_cpus=2)


def test_a_collection_is_that_of_one_process(tmp_path, address):
    ppo = dataclasses.replace(
        TINY_PPO, num_envs=2, normalize_observations=True, normalize_rewards=True, ortho_init=False, anneal_lr=True
    )
    arguments = {**ARGUMENTS, "ppo": ppo, "total_timesteps": 64 * 8, "shared_init": True}
    collect(tmp_path / "alone", **arguments)
    for trials_per_shard in (None, 1, 4):
        store = collect(tmp_path / f"{trials_per_shard}", **arguments, ray=address, trials_per_shard=trials_per_shard)
        assert files(store.path) == files(tmp_path / "alone")
        assert is_complete(store)
        assert store.num_checkpoints == 9


def test_workers_write_to_a_url(tmp_path, address, bucket):
    collect(tmp_path / "alone", **ARGUMENTS)
    store = collect(f"{bucket}/cluster/store.zarr", **ARGUMENTS, ray=address)
    start = len(f"{store.path}/")
    written = {str(it)[start:]: it.read_bytes() for it in store.path.rglob("*") if it.is_file()}
    assert written == {name: data for name, data in files(tmp_path / "alone").items() if data}


def test_shards_in_one_process_are_no_different_either(tmp_path):
    collect(tmp_path / "alone", **ARGUMENTS)
    collect(tmp_path / "store", **ARGUMENTS, trials_per_shard=2)
    assert files(tmp_path / "store") == files(tmp_path / "alone")


def test_curves_of_every_trial_but_no_mean(tmp_path, address):
    collect(tmp_path / "store", **ARGUMENTS, ray=address, tensorboard=tmp_path / "curves")
    assert sorted(path.name for path in (tmp_path / "curves").iterdir()) == [f"trial_{i:04d}" for i in range(5)]


def workers(name: str) -> list[int]:
    """Return the process ids of Ray's workers that run a function of this name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(f"ray::{name}".encode()):
                found.append(int(folder.name))
    return found


def test_a_killed_worker_loses_and_doubles_nothing(tmp_path, address, monkeypatch):
    monkeypatch.setattr(sys.modules["tipl.collecting.collection"], "SAVE_SECONDS", 0.2)
    ppo = dataclasses.replace(TINY_PPO, num_steps=512, update_epochs=10, num_minibatches=8, hidden_sizes=(64, 64))
    arguments = {**ARGUMENTS, "num_trials": 2, "ppo": ppo, "total_timesteps": 512 * 100}
    collect(tmp_path / "alone", **arguments)
    killed: list[int] = []

    def kill() -> None:
        """Kill both workers once both have saved a state."""
        deadline = time.monotonic() + 300  # of a machine that is busy with other things
        while len({state.parent for state in tmp_path.glob("store/resume/*/state_*")}) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for pid in workers("collect_shard"):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    store = collect(tmp_path / "store", **arguments, ray=address)
    thread.join()
    assert len(killed) == 2
    assert store.num_checkpoints == 101
    assert files(tmp_path / "store") == files(tmp_path / "alone")


def test_a_failure_in_a_worker_is_raised_here(tmp_path, address):
    path = tmp_path / "store"
    collect(path, **ARGUMENTS)
    Unfinished(Store.open(path)).begin(2)  # as if it had been cut off a moment before its end
    (path / "trial_0003/weights/c.0.0").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"trial 3: weights rows 0:177: .* has 0 bytes instead of"):
        collect(path, **ARGUMENTS, ray=address)


def test_ctrl_c_then_the_same_command_without_ray(tmp_path, run_tipl):
    arguments = ["collect", "--num-trials", "4", "--total-timesteps", str(512 * 40), "--ppo.num-steps", "512"]
    assert run_tipl(*arguments, "--output", tmp_path / "alone") == 0
    with subprocess.Popen(
        [
            *(sys.executable, "-c", "from tipl.cli import main; main()", *arguments),
            *("--output", tmp_path / "store", "--ray", "local"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        begun = False
        while not begun:
            assert command.poll() is None
            time.sleep(0.05)
            with contextlib.suppress(FileNotFoundError):
                begun = Store.open(tmp_path / "store").trial(0).num_checkpoints > 3
        command.send_signal(signal.SIGINT)
        _, error = command.communicate(timeout=60)
    assert command.returncode == 130
    assert "tipl: interrupted. collect: interrupted; " in error
    assert "of 41 checkpoints of each of 4 trials are kept in" in error
    assert "Traceback" not in error
    assert not is_complete(Store.open(tmp_path / "store"))
    assert run_tipl(*arguments, "--output", tmp_path / "store") == 0
    assert files(tmp_path / "store") == files(tmp_path / "alone")


def test_returns_and_the_shared_basis_are_those_of_one_process(tmp_path, cluster, address):
    policy = PolicySpec(4, 1, (16, 16))
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.3, (300, policy.num_params)).astype(np.float32)
    seeds = np.arange(3)
    alone = run_episodes(ENV_ID, policy, weights, seeds, num_states=5, num_threads=2)
    spread = run_episodes(ENV_ID, policy, weights, seeds, num_states=5, cluster=cluster)
    np.testing.assert_array_equal(spread.returns, alone.returns)
    one = run_episodes(ENV_ID, policy, weights[7:8], seeds, cluster=cluster)
    np.testing.assert_array_equal(one.returns[0], alone.returns[7])
    for there, here in zip(spread.states, alone.states, strict=True):
        np.testing.assert_array_equal(there, here)

    with Store.create(tmp_path / "store", env_id="Env-v0", policy=policy, seeds=range(40), config={}) as store:
        paths = np.cumsum(rng.normal(size=(40, 9, policy.num_params)), 1, dtype=np.float32)
        store.append(paths, np.tile(np.arange(9), (40, 1)), np.zeros((40, 9)))
    trials = [store.trial(i) for i in range(40)]
    one, many = Basis.from_trials(trials, 4), Basis.from_trials(trials, 4, cluster=cluster)
    for field in ("origin", "directions", "scale"):
        np.testing.assert_array_equal(getattr(many, field), getattr(one, field))


def test_training_and_evaluation_are_those_of_one_process(tmp_path, address, hasty_nowcaster):
    store = collect(tmp_path / "store", **{**ARGUMENTS, "num_trials": 6, "total_timesteps": 32 * 20})
    config = dataclasses.replace(TINY_TRAIN, basis="shared")
    judged = dataclasses.replace(TINY_EVALUATE, num_episodes=2)
    for name, where in (("alone", None), ("cluster", address)):
        train(store, tmp_path / name / "model", config, ray=where, progress=False)
        forecaster = Forecaster.load(tmp_path / name / "model")
        evaluate(store, forecaster, tmp_path / name / "evaluation", judged, ray=where, progress=False)
    for file in ("model/basis.safetensors", "model/model.safetensors", "evaluation/coordinates.safetensors"):
        assert (tmp_path / "cluster" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    alone, spread = (
        json.loads((tmp_path / name / "evaluation/results.json").read_text()) for name in ("alone", "cluster")
    )
    assert spread["rows"] == alone["rows"]
    assert spread["diversity"] == alone["diversity"]
    with pytest.raises(ValueError, match="train: ray is for fitting a shared basis, but basis is 'prefix'"):
        train(store, tmp_path / "model", TrainConfig(steps=1), ray=address)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"ray": "127.0.0.1:9"}, ConnectionError, "ray: no cluster answers at 127.0.0.1:9: .*refused"),
        ({"ray": "nonsense"}, ValueError, r'ray: the address must be HOST:PORT, "auto" or "local", got \'nonsense\''),
        ({"trials_per_shard": 0}, ValueError, "collect: trials_per_shard must be an int of at least 1, got 0"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, wrong, error, message):
    with pytest.raises(error, match=message):
        collect(tmp_path / "store", **ARGUMENTS, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_more_cores_than_a_machine_has_write_nothing(tmp_path, address):
    with pytest.raises(ValueError, match="ray: no machine of the cluster has 2 cores; the largest has 1"):
        collect(tmp_path / "store", **ARGUMENTS, ray=address, num_threads=2)
    assert list(tmp_path.iterdir()) == []


def test_without_ray_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"ray: Ray is not installed: pip install 'tipl\[ray\]'"):
        collect(tmp_path / "store", **ARGUMENTS, ray="local")
