"""Stores behind a URL, on a real server of the S3 protocol: what is there, and what a crash or damage does."""

import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from factories import TINY_PPO

import tipl.cli
from tipl.collecting.collection import collect
from tipl.collecting.description import describe_store
from tipl.collecting.population import Population
from tipl.collecting.resume import Unfinished
from tipl.collecting.settings import is_complete
from tipl.files.hub_errors import Unreachable
from tipl.files.locations import location
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training import train
from tipl.policy import PolicySpec
from tipl.storing.store import Store
from tipl.verification import verify_store

# Warnings of aiohttp and moto.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")]

TINY = dataclasses.replace(TINY_PPO, hidden_sizes=(64, 64))  # 14 checkpoints a chunk
NUM_ITERATIONS = 30
ARGUMENTS = {
    "env_id": "InvertedPendulum-v5",
    "num_trials": 3,
    "total_timesteps": 32 * NUM_ITERATIONS,
    "ppo": TINY,
    "progress": False,
}


@pytest.fixture
def url(bucket: str, request: pytest.FixtureRequest) -> str:
    return f"{bucket}/{re.sub('[^a-z0-9]', '-', request.node.name.lower())}/store.zarr"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("local") / "store"
    collect(path, **ARGUMENTS)
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def objects(url: str) -> dict[str, bytes]:
    root = location(url)
    return {str(path)[len(str(root)) + 1 :]: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_store_has_the_files_of_a_local_one(url: str, local: dict[str, bytes]) -> None:
    store = collect(url, **ARGUMENTS)
    assert objects(url) == local
    assert is_complete(store)
    assert verify_store(url).problems == []
    assert store.zarr_group()["trial_0002/weights"].shape == (NUM_ITERATIONS + 1, store.policy.num_params)
    size = sum(len(data) for data in local.values())
    assert describe_store(store)["bytes"].startswith(f"{size:,} in files")


def test_chunks_are_written_when_they_are_full(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    append, sizes = Store.append, []

    def counted(store: Store, weights: np.ndarray, *columns: np.ndarray) -> None:
        sizes.append(weights.shape[1])
        append(store, weights, *columns)

    monkeypatch.setattr(Store, "append", counted)
    collect(url, **ARGUMENTS)
    assert sizes == [14, 14, 3]


def cut_off(url: str, after: int = 20) -> None:
    with pytest.MonkeyPatch.context() as patch:
        iterate, count = Population.iterate, itertools.count()

        def interrupted(population: Population):
            if next(count) == after:
                raise KeyboardInterrupt
            return iterate(population)

        patch.setattr(sys.modules["tipl.collecting.collection"], "SAVE_SECONDS", 0.0)
        patch.setattr(Population, "iterate", interrupted)
        with pytest.raises(KeyboardInterrupt, match=f"{after + 1} of 31 checkpoints .* in s3://bucket/.*store.zarr; "):
            collect(url, **ARGUMENTS)


def test_cut_off_and_gone_on_with(url: str, local: dict[str, bytes]) -> None:
    cut_off(url)
    assert any(name.startswith("resume/trial_0000/state_") for name in objects(url))
    assert not is_complete(Store.open(url))
    assert verify_store(url).problems == []
    collect(url, **ARGUMENTS)
    assert objects(url) == local


def test_killed_and_gone_on_with(url: str, local: dict[str, bytes], tmp_path: Path) -> None:
    steps = 32 * 300
    command = ["collect", "--num-trials", "3", "--total-timesteps", str(steps), "--ppo.num-steps", "32"]
    command += ["--ppo.num-minibatches", "2", "--ppo.update-epochs", "1", "--output"]
    tipl_command = [sys.executable, "-c", "from tipl.cli import main; main()", *command]
    with subprocess.Popen([*tipl_command, url], stderr=subprocess.DEVNULL) as killed:
        while not location(url).joinpath("trial_0001/weights/c.1.0").exists():
            assert killed.poll() is None
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
    collect(url, **{**ARGUMENTS, "total_timesteps": steps})
    collect(tmp_path / "store", **{**ARGUMENTS, "total_timesteps": steps})
    path = tmp_path / "store"
    assert objects(url) == {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_damage_is_found_and_named(url: str) -> None:
    cut_off(url)
    place = location(url)
    chunk = bytearray((place / "trial_0001/weights/c.0.0").read_bytes())
    chunk[77] ^= 1
    (place / "trial_0001/weights/c.0.0").write_bytes(bytes(chunk))
    (place / "trial_0002/env_steps/c.0").unlink()
    state = next(place.glob("resume/*/state_*"))
    state.write_bytes(state.read_bytes()[:-1])
    assert [problem.split(" s3://")[0] for problem in verify_store(url).problems] == [
        "trial 1: weights rows 0:14:",
        "trial 2: env_steps rows 0:1024:",
        "resume:",
    ]
    with pytest.raises(RuntimeError, match=r"trial 2: env_steps rows 0:1024: s3://bucket/.*/env_steps/c.0 is missing"):
        collect(url, **ARGUMENTS)


def test_rows_are_appended_across_chunks_and_sessions(url: str) -> None:
    policy = PolicySpec(4, 1)
    rows = np.random.default_rng(0).normal(size=(2, 40, policy.num_params)).astype(np.float32)
    steps = np.tile(np.arange(40), (2, 1))
    Store.create(url, env_id="Env-v0", policy=policy, seeds=[0, 1], config={}).close()
    for start, stop in itertools.pairwise([0, 1, 5, 14, 30, 40]):
        with Store.open(url, writable=True) as store:
            store.append(rows[:, start:stop], steps[:, start:stop], np.zeros((2, stop - start)))
    np.testing.assert_array_equal([Store.open(url).trial(i).weights() for i in range(2)], rows)
    with pytest.raises(FileExistsError, match=r"create: s3://bucket/.* exists"):
        Store.create(url, env_id="Env-v0", policy=policy, seeds=[0, 1], config={})


def test_an_unfinished_collection_is_not_overwritten_by_another(url: str) -> None:
    cut_off(url)
    before = objects(url)
    with pytest.raises(ValueError, match="holds an unfinished collection with seed = 0, got 1"):
        collect(url, **ARGUMENTS, seed=1)
    assert objects(url) == before
    assert Unfinished(Store.open(url)).exists()


def test_a_model_is_trained_from_there(url: str, tmp_path: Path) -> None:
    store = collect(url, **{**ARGUMENTS, "num_trials": 6})
    train(Store.open(url), tmp_path / "model", TrainConfig(steps=2, refine_steps=2), progress=False)
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert repr(store) == f"Store('{url}': 6 trials of InvertedPendulum-v5, p = 4546)"


# A user's mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "--output", "foo://bucket/store"], "foo://bucket/store: Unsupported filesystem: 'foo'"),
        (["collect", "--output", "s3://no-such-bucket/store"], ".*[Bb]ucket does not exist"),
        (["train", "--store", "s3://bucket/none", "--output", "model"], ".*no trajectory store at s3://bucket/none"),
        (
            ["train", "--store", "store", "--output", "s3://bucket/m"],
            "output must be a local path, and s3://.* is a URL",
        ),
        (["import", "runs", "--output", "s3://bucket/store"], "output must be a local path, and s3://... is a URL"),
    ],
)
def test_a_mistake_ends_in_one_line(bucket, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tipl", *arguments])
    with pytest.raises(SystemExit) as ended:
        tipl.cli.main()
    assert ended.value.code == 2
    assert re.fullmatch(f"tipl: error: {message}\n", capsys.readouterr().err)
    assert os.listdir(tmp_path) == []


def test_a_server_that_does_not_answer(forget_connections, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_connections()
    with pytest.raises(OSError, match=r"s3://bucket/store: Could not connect to the endpoint URL"):
        location("s3://bucket/store")
    forget_connections()


class Answering(BaseHTTPRequestHandler):
    """Answers with the status that the path begins with."""

    def do_GET(self) -> None:
        self.send_response(int(self.path[1:4]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_web_server_that_fails_or_is_away_is_not_taken_for_one_without_the_store():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(FileNotFoundError, match=f"there is no trajectory store at {url}/404/s.zarr"):
            Store.open(f"{url}/404/s.zarr")
        with pytest.raises(Unreachable, match=f"{url}/403/s.zarr/zarr.json: access was refused .403, Forbidden"):
            Store.open(f"{url}/403/s.zarr")
        with pytest.raises(Unreachable, match=f"{url}/500/s.zarr: 500, Internal Server Error"):
            Store.open(f"{url}/500/s.zarr")
        server.shutdown()
    with pytest.raises(Unreachable, match=f"{url}/200/s.zarr: Cannot connect to host"):
        Store.open(f"{url}/200/s.zarr")
