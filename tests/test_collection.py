"""Collection: what lands in the store, what a failure leaves behind, and what is refused."""

import errno
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from factories import ENV_ID, TINY_PPO, everything

import tipl.collecting.checkpoint_appender
import tipl.storing.zarr_files
from tipl.collecting.collection import collect, trial_seeds
from tipl.collecting.population import Population
from tipl.storing.store import Store


def collect_tiny(output: Path, **arguments) -> Store:
    defaults = {"env_id": ENV_ID, "num_trials": 3, "total_timesteps": 4 * 32, "ppo": TINY_PPO, "progress": False}
    return collect(output, **defaults | arguments)


def test_a_checkpoint_of_the_start_and_of_every_iteration(tmp_path, monkeypatch):
    iterate, seen = Population.iterate, []

    def spy(population: Population):
        if not seen:
            seen.append((population.weights(), np.full(3, np.nan)))
        stats = iterate(population)
        seen.append((population.weights(), stats.episodic_return))
        return stats

    monkeypatch.setattr(Population, "iterate", spy)
    store = collect_tiny(tmp_path / "run" / "store.zarr", total_timesteps=4 * 32 - 1, seed=5)  # rounded up
    assert store.path == tmp_path / "run" / "store.zarr"
    assert store.env_id == ENV_ID
    assert store.seeds == trial_seeds(5, 3)
    assert (store.policy.obs_dim, store.policy.act_dim, store.policy.hidden_sizes) == (4, 1, (16, 16))
    assert store.config["total_timesteps"] == 127
    assert store.config["seed"] == 5
    assert store.config["ppo"]["num_steps"] == 32
    for i in range(3):
        trial = store.trial(i)
        np.testing.assert_array_equal(trial.env_steps, [0, 32, 64, 96, 128])
        np.testing.assert_array_equal(trial.weights(), [weights[i] for weights, _ in seen])
        np.testing.assert_array_equal(trial.episodic_return, [returns[i] for _, returns in seen])
        assert np.isnan(trial.episodic_return[0])
        assert trial.episodic_return[-1] > 0
        assert len(np.unique(trial.weights(), axis=0)) == 5  # the policy moves
    with pytest.raises(ValueError, match="not open for appending"):
        store.append(*(np.zeros(0, dtype) for dtype in (np.float32, np.int64, np.float64)))


def test_a_seed_fixes_the_store_and_another_changes_it(tmp_path):
    one, again, other = (collect_tiny(tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2)))
    for a, b in zip(everything(one), everything(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not set(one.seeds) & set(other.seeds)
    for i in range(3):
        assert not np.array_equal(one.trial(i).weights(0, 1), other.trial(i).weights(0, 1))
        assert not np.array_equal(one.trial(i).weights(0, 1), one.trial((i + 1) % 3).weights(0, 1))


def test_shared_init_starts_all_trials_from_one_policy(tmp_path):
    store = collect_tiny(tmp_path / "store", shared_init=True)
    first = [store.trial(i).weights(0, 1) for i in range(3)]
    assert np.array_equal(first[0], first[1])
    assert np.array_equal(first[0], first[2])
    assert not np.array_equal(store.trial(0).weights(4, 5), store.trial(1).weights(4, 5))


def test_more_runs_from_the_start_of_another_store(tmp_path):
    store = collect_tiny(tmp_path / "store", shared_init=True)
    more = collect_tiny(tmp_path / "more", seed=1, init_seed=store.seeds[0])
    assert more.config["shared_init"]
    for i in range(3):
        assert np.array_equal(more.trial(i).weights(0, 1), store.trial(0).weights(0, 1))
        assert not np.array_equal(more.trial(i).weights(4, 5), store.trial(i).weights(4, 5))
    with pytest.raises(ValueError, match="init_seed must be an int of at least 0, got -1"):
        collect_tiny(tmp_path / "none", init_seed=-1)
    with pytest.raises(ValueError, match=r"init_seed must lie below 2\*\*32, as trial seeds do, got 4294967296"):
        collect_tiny(tmp_path / "none", init_seed=2**32)
    assert not (tmp_path / "none").exists()


def test_trial_seeds_depend_on_the_seed_and_the_trial_alone():
    seeds = trial_seeds(0, 1000)
    assert seeds[:10] == trial_seeds(0, 10)
    assert len(set(seeds + trial_seeds(1, 1000))) == 2000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds[1] == np.random.SeedSequence(0, spawn_key=(1,)).generate_state(1)[0]


def test_the_closing_line_says_what_was_collected(tmp_path, capfd):
    collect_tiny(tmp_path / "store", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    p = 1 + 4 * 16 + 16 + 16 * 16 + 16 + 16 + 1
    line = rf"{tmp_path}/store: {ENV_ID}: 3 trials x 5 checkpoints x {p} weights, .* MB, mean last return [\d.]+; "
    assert re.fullmatch(line + r"\d+ s, [\d,]+ env steps/s\n", err)
    collect_tiny(tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_a_bar(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    monkeypatch.setenv("COLUMNS", "100")
    collect_tiny(tmp_path / "store", progress=True)
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capfd.readouterr().err)
    assert re.search(rf"{ENV_ID} \S+ 4/4 [\d,]+ env steps/s, return [\d.]+ 0:00:00", text)


INTERRUPTED = """
import sys
from tipl.collecting.collection import collect
from tipl.collecting.ppo_config import PPOConfig

ppo = PPOConfig(num_steps=32, num_minibatches=2, update_epochs=1, hidden_sizes=(16, 16))
collect(sys.argv[1], env_id=sys.argv[2], num_trials=3, total_timesteps=10**8, ppo=ppo, progress=False)
"""


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_committed(tmp_path):
    path = tmp_path / "store"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(path), ENV_ID],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (path / "zarr.json").exists() or Store.open(path).num_checkpoints < 4:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT, stderr  # how Python ends on a KeyboardInterrupt
    store = Store.open(path)
    num_rows = store.num_checkpoints
    assert num_rows >= 4
    kept = f"{num_rows} of 3125001 checkpoints of each of 3 trials are kept in {path}"
    end = f"KeyboardInterrupt: collect: interrupted; {kept}; the same command goes on from there"
    assert stderr.splitlines()[-1] == end
    for i in range(3):
        trial = store.trial(i)
        np.testing.assert_array_equal(trial.env_steps, 32 * np.arange(num_rows))
        assert len(np.unique(trial.weights(), axis=0)) == num_rows
        assert not np.isinf(trial.episodic_return).any()
    assert store.zarr_group()["trial_0000/weights"].shape[0] == num_rows  # closed cleanly


def test_a_failing_iteration_keeps_what_was_committed(tmp_path, monkeypatch):
    iterate = Population.iterate

    def failing(population: Population):
        if population.env_steps == 64:
            raise ArithmeticError("the simulation diverged")
        return iterate(population)

    monkeypatch.setattr(Population, "iterate", failing)
    message = (
        r"collect: failed: ArithmeticError: the simulation diverged; 3 of 5 checkpoints of each of 3 trials are kept"
    )
    with pytest.raises(RuntimeError, match=message) as caught:
        collect_tiny(tmp_path / "store")
    assert isinstance(caught.value.__cause__, ArithmeticError)
    np.testing.assert_array_equal(Store.open(tmp_path / "store").trial(2).env_steps, [0, 32, 64])


@pytest.mark.parametrize(
    ("save_seconds", "kept_back", "rows"),
    [(0.0, 2**20, [2, 1, 1, 1]), (9.0, 2**20, [2, 1, 2]), (9.0, 3 * 4 * 370, [1, 1, 1, 1, 1])],
)
def test_checkpoints_are_appended_together_until_a_state_is_saved(tmp_path, monkeypatch, save_seconds, kept_back, rows):
    """Iterations of a second: states are saved after 1, 2, 4 and then every 9 of them."""
    plain, now, iterate = collect_tiny(tmp_path / "plain"), [0.0], Population.iterate

    def slow(population: Population):
        now[0] += 1.0
        return iterate(population)

    monkeypatch.setattr(Population, "iterate", slow)
    monkeypatch.setattr(
        "tipl.collecting.checkpoint_appender.time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0)
    )
    assert plain.policy.num_params == 370
    appended, append = [], Store.append

    def counting(store: Store, weights: np.ndarray, *rest: np.ndarray) -> None:
        appended.append(weights.shape[1])
        append(store, weights, *rest)

    monkeypatch.setattr(Store, "append", counting)
    monkeypatch.setattr(sys.modules["tipl.collecting.collection"], "SAVE_SECONDS", save_seconds)
    monkeypatch.setattr(tipl.collecting.checkpoint_appender, "KEPT_BACK", kept_back)
    store = collect_tiny(tmp_path / "store")
    assert appended == rows
    for a, b in zip(everything(store), everything(plain), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_files", [40, 75])  # in the second append, in the last
def test_a_full_disk_keeps_what_was_committed(tmp_path, monkeypatch, num_files):
    write, count = tipl.storing.zarr_files.write_atomically, iter(range(1000))

    def failing(path: Path, data: bytes) -> None:
        if next(count) >= num_files:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(tipl.storing.zarr_files, "write_atomically", failing)
    monkeypatch.setattr(sys.modules["tipl.collecting.collection"], "SAVE_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match=r"collect: failed: OSError: .*No space left on device; \d of 5") as caught:
        collect_tiny(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    assert f"; {store.num_checkpoints} of 5 checkpoints of each of 3 trials are kept in {store.path}" in str(
        caught.value
    )
    assert 0 < store.num_checkpoints < 5
    np.testing.assert_array_equal(store.trial(0).env_steps[:2], [0, 32][: store.num_checkpoints])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_trials": 0}, ValueError, "collect: num_trials must be an int of at least 1, got 0"),
        ({"num_trials": 2.0}, ValueError, "collect: num_trials must be an int of at least 1, got 2.0"),
        ({"num_trials": 10**13}, ValueError, "collect: num_trials must be at most 1,000,000, got 10,000,000,000,000"),
        ({"total_timesteps": 0}, ValueError, "collect: total_timesteps must be an int of at least 1, got 0"),
        ({"total_timesteps": True}, ValueError, "collect: total_timesteps must be an int of at least 1, got True"),
        ({"seed": -1}, ValueError, "collect: seed must be an int of at least 0, got -1"),
        ({"env_id": "NoSuchEnv-v0"}, ValueError, "NoSuchEnv"),
        ({"env_id": "FrozenLake-v1"}, ValueError, "the observations of FrozenLake-v1 must be a Box"),
    ],
)
def test_collect_refuses_and_writes_nothing(tmp_path, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        collect_tiny(tmp_path / "store", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["tipl.collecting.collection"], "make_vec", None)  # work would fail
    (tmp_path / "store").mkdir()
    with pytest.raises(
        FileExistsError, match=r"collect: .*store exists and is no store; choose another output or remove it"
    ):
        collect_tiny(tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []
