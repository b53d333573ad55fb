"""A collection that was cut off: the same arguments finish it, and no byte of the store tells."""

import contextlib
import dataclasses
import errno
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from factories import TINY_PPO

import tipl.collecting.resume
import tipl.files.locations
import tipl.pipeline
import tipl.storing.zarr_files
from tipl.collecting.collection import collect, trial_seeds
from tipl.collecting.envs import make_vec
from tipl.collecting.population import Population
from tipl.collecting.resume import read_state
from tipl.collecting.settings import is_complete
from tipl.files.sealed import UncheckedWarning
from tipl.judging.evaluate_config import EvaluateConfig
from tipl.storing.store import Store
from tipl.storing.store_records import store_digest
from tipl.verification import verify_store

NUM_ITERATIONS = 8


def run(output: Path, **arguments) -> Store:
    defaults = {"env_id": "InvertedPendulum-v5", "num_trials": 3, "ppo": TINY_PPO, "progress": False}
    return collect(output, **defaults | {"total_timesteps": 32 * NUM_ITERATIONS} | arguments)


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() if file.is_file() else b"" for file in path.rglob("*")}


@pytest.fixture(autouse=True)
def save_every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["tipl.collecting.collection"], "SAVE_SECONDS", 0.0)


@pytest.fixture
def iterations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What iterations were run, by their number, from now on."""
    iterate, seen = Population.iterate, []

    def counted(population: Population):
        seen.append(population.env_steps // population.config.batch_size)
        return iterate(population)

    monkeypatch.setattr(Population, "iterate", counted)
    return seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files(run(tmp_path_factory.mktemp("whole") / "store").path)


def cut_off(output: Path, after: int = 5, **arguments) -> Path:
    """Collect until Ctrl-C comes in the iteration that follows `after` others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tipl.collecting.collection"], "SAVE_SECONDS", 0.0)
        iterate, count = Population.iterate, itertools.count()

        def interrupted(population: Population):
            stats = iterate(population)  # half an iteration is lost
            if next(count) == after:
                raise KeyboardInterrupt
            return stats

        patch.setattr(Population, "iterate", interrupted)
        message = rf"collect: interrupted; {after + 1} of 9 checkpoints of .*; the same command goes on from there"
        with pytest.raises(KeyboardInterrupt, match=message):
            run(output, **arguments)
    return output


@pytest.fixture(scope="module")
def _unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_off(tmp_path_factory.mktemp("unfinished") / "store")


@pytest.fixture
def unfinished(_unfinished: Path, tmp_path: Path) -> Path:
    """A collection that was cut off with six of nine checkpoints, to go on with and to damage."""
    return Path(shutil.copytree(_unfinished, tmp_path / "store"))


@pytest.mark.slow
def test_killed_at_random_moments():
    script = Path(__file__).parent / "stress" / "kill_collection.py"
    command = [sys.executable, script, "--kills", "6", "--num-iterations", "60", "--seed", "2"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert ended.returncode == 0
    assert re.search(r"6 kills .*; 45 files, [\d,]+ bytes: identical\n$", ended.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "HalfCheetah-v5", "Humanoid-v5"])
def test_ctrl_c_then_other_threads(tmp_path, env_id, iterations):
    expected = files(run(tmp_path / "whole", env_id=env_id, num_threads=2).path)
    path = cut_off(tmp_path / "store", 3, env_id=env_id, num_threads=1)
    assert not is_complete(Store.open(path))
    iterations.clear()
    store = run(path, env_id=env_id, num_threads=3)
    assert iterations == [3, 4, 5, 6, 7]  # it went on from the state, not from the start
    assert files(path) == expected
    assert is_complete(store)
    assert not list(tmp_path.glob(".*"))


OPTIONS = {
    "num_envs": 2,
    "anneal_lr": True,
    "target_kl": 0.01,
    "clip_coef_vf": 0.2,
    "normalize_observations": True,
    "normalize_rewards": True,
    "ortho_init": False,
    "activation": "elu",
    "optimizer": "sgd",
    "log_std_init": -0.5,
    "learn_log_std": False,
}


@pytest.mark.slow
def test_every_option_goes_on(tmp_path, iterations):
    arguments = {"env_id": "Hopper-v5", "ppo": dataclasses.replace(TINY_PPO, **OPTIONS), "total_timesteps": 64 * 8 - 5}
    expected = files(run(tmp_path / "whole", **arguments).path)
    path = cut_off(tmp_path / "store", **arguments)
    iterations.clear()
    store = run(path, **arguments, num_threads=3)
    assert iterations == [5, 6, 7]
    assert files(path) == expected
    np.testing.assert_array_equal(store.trial(1).env_steps, 64 * np.arange(9))


@pytest.mark.parametrize("options", [{}, {"normalize_rewards": True, "ortho_init": False}])
def test_every_row_and_the_running_episodes_go_on(tmp_path, options):
    """Episodes last over several iterations here, and a mean return over iterations in which none ended."""
    arguments = {"env_id": "Reacher-v5", "seed": 3}  # 50 steps an episode, 32 an iteration
    arguments["ppo"] = dataclasses.replace(TINY_PPO, **options)
    expected = run(tmp_path / "whole", **arguments)
    path = cut_off(tmp_path / "store", 4, **arguments)
    store = run(path, **arguments)
    for i in range(3):
        np.testing.assert_array_equal(store.trial(i).episodic_return, expected.trial(i).episodic_return)
        np.testing.assert_array_equal(store.trial(i).weights(), expected.trial(i).weights())
    assert files(store.path) == files(expected.path)


def test_without_a_state_all_is_computed_again(unfinished, whole, iterations, capfd):
    path = unfinished
    shutil.rmtree(path / "resume")  # as an older version leaves it
    iterations.clear()
    run(path, progress=True)
    assert iterations == list(range(8))
    assert files(path) == whole
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith(f"{path}: 6 checkpoints are there; goes on after iteration 0, since no state was saved")


def test_environments_that_cannot_be_saved_are_computed_again(tmp_path, iterations):
    expected = files(run(tmp_path / "whole", env_id="Pendulum-v1").path)
    path = cut_off(tmp_path / "store", env_id="Pendulum-v1")
    assert not list(path.glob("resume/*/state_*"))
    iterations.clear()
    run(path, env_id="Pendulum-v1")
    assert iterations == list(range(8))
    assert files(path) == expected


def test_what_comes_out_otherwise_is_refused(unfinished):
    path = unfinished
    store = Store.open(path)
    trials = [store.trial(i) for i in range(3)]
    weights = np.stack([trial.weights() for trial in trials])
    weights[1, 0, 7] += 1e-6
    columns = [np.stack([getattr(trial, name) for trial in trials]) for name in ("env_steps", "episodic_return")]
    shutil.rmtree(path)
    with Store.create(
        path, env_id=store.env_id, policy=store.policy, seeds=store.seeds, config=store.config
    ) as made_elsewhere:
        made_elsewhere.append(weights, *columns)
    before = files(path)
    with pytest.raises(RuntimeError, match="checkpoint 0 of trial 1 comes out otherwise than it is in the store"):
        run(path)
    assert {name: data for name, data in files(path).items() if "resume" not in name} == before


@pytest.mark.parametrize("num_damaged", [1, 2])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_state_is_not_used(unfinished, whole, iterations, num_damaged, damage):
    path = unfinished
    states = sorted(path.glob("resume/*/state_*"), reverse=True)
    assert [state.name for state in states] == ["state_00000006.safetensors", "state_00000005.safetensors"]
    for state in states[:num_damaged]:
        data = bytearray(state.read_bytes())
        data[-100] ^= 4
        state.write_bytes({"flip": data, "cut": data[:-9], "empty": b""}[damage])
    iterations.clear()
    assert [problem.split(" is damaged")[0] for problem in verify_store(path).problems] == [
        f"resume: {state}" for state in sorted(states[:num_damaged])
    ]
    with pytest.warns(UserWarning, match=r"collect: .*state_0000000\d.safetensors is damaged: .*; an older") as caught:
        run(path)
    assert len(caught) == num_damaged
    assert iterations == list(range(4 if num_damaged == 1 else 0, 8))
    assert files(path) == whole


def test_any_flipped_bit_of_a_state_is_found(unfinished):
    store = Store.open(unfinished)
    state = max(store.path.glob("resume/*/state_*"))
    data = state.read_bytes()
    for position in [*range(0, 1500, 7), *range(1500, len(data), 997)]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        state.write_bytes(flipped)
        with pytest.raises(
            RuntimeError, match=r"state_00000006.safetensors is (damaged|no state that this tipl reads)"
        ):
            read_state(state, store, range(3))
    state.write_bytes(data)
    assert read_state(state, store, range(3)).env_steps == 5 * 32
    assert read_state(state, store, None).env_steps == 5 * 32


def test_a_state_of_another_version_is_not_used(unfinished, monkeypatch):
    path = unfinished
    monkeypatch.setattr(tipl.collecting.resume, "VERSION", 3)
    with pytest.raises(RuntimeError, match="is no state that this tipl reads"):
        read_state(max(path.glob("resume/*/state_*")), Store.open(path), range(3))


def test_a_state_ahead_of_the_store_is_not_used(tmp_path, whole, iterations):
    """A power cut on a file system that does not keep renames in order."""
    path, later = cut_off(tmp_path / "store", 2), cut_off(tmp_path / "later_store", 5)
    shutil.rmtree(path / "resume")
    shutil.copytree(later / "resume", path / "resume")
    iterations.clear()
    run(path)
    assert iterations == list(range(8))
    assert files(path) == whole


def test_a_state_of_another_collection_is_not_used(unfinished, tmp_path, whole):
    path, other = unfinished, cut_off(tmp_path / "other_store", seed=1)
    shutil.rmtree(path / "resume")
    shutil.copytree(other / "resume", path / "resume")
    found = verify_store(path).problems
    assert re.fullmatch(r"resume: .*resume/zarr\.json is of another store, '\w{16}'", found[0])
    assert [re.sub(r".*(state_\d+)", r"\1", problem).split(" expected")[0] for problem in found[1:]] == [
        f"state_0000000{k}.safetensors is a state of other store:" for k in (5, 6)
    ]
    with pytest.warns(UserWarning, match="of (an)?other store") as caught:
        run(path)
    messages = "\n".join(str(warning.message) for warning in caught)
    assert len(caught) == 3
    assert (
        len(re.findall(r"state_0000000[56]\.safetensors is a state of other store: .*; an older state", messages)) == 2
    )
    assert re.search(r"is of another store, '\w{16}'; whether versions have changed is not known", messages)
    assert files(path) == whole


def test_a_state_of_another_shard_is_not_used(unfinished, tmp_path, whole, iterations):
    path, other = unfinished, tmp_path / "other"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tipl.collecting.resume.Unfinished, "remove", lambda states: (_ for _ in ()).throw(SystemExit()))
        with pytest.raises(SystemExit):
            run(other, trials_per_shard=1)
    for state in (path / "resume/trial_0000").iterdir():
        shutil.copy(other / "resume/trial_0000/state_00000009.safetensors", state)
    shutil.copytree(other / "resume/trial_0001", path / "resume/trial_0001")
    assert [problem.split(".safetensors ")[1] for problem in verify_store(path).problems] == [
        "is a state of other trials: expected [0, 3], got [0, 1]",
        "is a state of other trials: expected [0, 3], got [0, 1]",
    ]
    iterations.clear()
    with pytest.warns(UserWarning, match=r"is a state of other trials: expected \[0, 3\], got \[0, 1\]; an older"):
        run(path)
    assert iterations == list(range(8))
    assert files(path) == whole


def test_a_state_under_the_name_of_another_is_not_used(unfinished, whole, iterations):
    path = unfinished
    older, newer = sorted(path.glob("resume/*/state_*"))
    newer.write_bytes(older.read_bytes())
    message = r"state_00000006.safetensors is a state of other num_checkpoints: expected 6, got 5"
    assert [re.search(message, problem) is not None for problem in verify_store(path).problems] == [True]
    iterations.clear()
    with pytest.warns(UserWarning, match=message):
        run(path)
    assert iterations == [4, 5, 6, 7]
    assert files(path) == whole


def test_states_that_cannot_be_used_do_not_displace_others(tmp_path, whole, iterations):
    path = cut_off(tmp_path / "store", 2)
    for name in ("state_99999999.safetensors", "state_notes.safetensors"):
        (path / "resume/trial_0000" / name).write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tipl.collecting.resume.Unfinished, "remove", lambda states: (_ for _ in ()).throw(SystemExit()))
        with pytest.raises(SystemExit):
            run(path)
    names = sorted(state.name for state in path.glob("resume/*/*"))
    assert names == ["state_00000008.safetensors", "state_00000009.safetensors"]
    run(path)
    assert files(path) == whole


def test_equal_collections_have_equal_states(tmp_path):
    paths = [cut_off(tmp_path / name, num_threads=threads) for name, threads in (("a", 1), ("b", 2))]
    states = [{name: data for name, data in files(path).items() if "state_" in name} for path in paths]
    assert len(states[0]) == 2
    assert states[0] == states[1]


def test_other_versions_give_a_warning(unfinished, whole):
    path = unfinished
    record = json.loads((path / "resume/zarr.json").read_text())["attributes"]["versions"]
    assert set(record) == {"tipl", "torch", "numpy", "mujoco", "gymnasium", "cpu"}
    tipl.storing.zarr_files.write_group(path / "resume", {"versions": record | {"mujoco": "4.0.0rc1"}})
    with pytest.warns(UserWarning, match=r"was begun with mujoco 4.0.0rc1 and goes on with mujoco \S+: the rest may"):
        run(path)
    assert files(path) == whole


def test_a_damaged_record_of_the_versions_is_no_obstacle(unfinished, whole):
    path = unfinished
    (path / "resume/zarr.json").write_text("{")
    with pytest.warns(UserWarning, match=r"resume/zarr.json is damaged: .*; whether versions have changed is not"):
        run(path)
    assert files(path) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, "seed = 0, got 1"),
        ({"num_trials": 2}, "num_trials = 3, got 2"),
        ({"total_timesteps": 32 * 9}, "total_timesteps = 256, got 288"),
        ({"shared_init": True}, "shared_init = False, got True"),
        ({"init_seed": 7}, "shared_init = False, got True"),
        ({"env_id": "InvertedPendulum-v4"}, "env_id = InvertedPendulum-v5, got InvertedPendulum-v4"),
        ({"ppo": dataclasses.replace(TINY_PPO, gamma=0.9)}, "ppo.gamma = 0.99, got 0.9"),
        ({"ppo": dataclasses.replace(TINY_PPO, optimizer="sgd")}, "ppo.optimizer = adam, got sgd"),
        ({"ppo": dataclasses.replace(TINY_PPO, hidden_sizes=(16,))}, "ppo.hidden_sizes = [16, 16], got [16]"),
    ],
)
def test_other_arguments_are_refused(unfinished, arguments, message):
    path = unfinished
    before = files(path)
    with pytest.raises(ValueError, match=re.escape(f"store holds an unfinished collection with {message}; give its")):
        run(path, **arguments)
    assert files(path) == before


def test_settings_of_ppo_that_an_older_store_lacks_have_their_defaults(unfinished, whole, iterations):
    path = unfinished
    group = tipl.storing.zarr_files.read_group(path, "store")
    for name in ("optimizer", "log_std_init", "learn_log_std", "normalize_rewards", "ortho_init"):
        del group["config"]["ppo"][name]
    tipl.storing.zarr_files.write_group(path, group)
    for i in range(3):
        record = tipl.storing.zarr_files.read_group(path / f"trial_000{i}", "trial")
        del record["store"], record["chunks"]
        tipl.storing.zarr_files.write_group(path / f"trial_000{i}", record)
    shutil.rmtree(path / "resume")
    with (
        pytest.warns(UncheckedWarning),
        pytest.raises(ValueError, match=r"with ppo\.optimizer = adam, got sgd; give its arguments"),
    ):
        run(path, ppo=dataclasses.replace(TINY_PPO, optimizer="sgd"))
    iterations.clear()
    with pytest.warns(UncheckedWarning, match=r"store .*store: an older tipl wrote it, without a record of its chunks"):
        run(path)
    assert iterations == list(range(8))
    trials = [tipl.storing.zarr_files.read_group(path / f"trial_000{i}", "trial") for i in range(3)]
    assert [trial["store"] for trial in trials] == [store_digest(group)] * 3
    assert_equal_but_for_groups(files(path), whole)


def assert_equal_but_for_groups(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    groups = ["zarr.json", *(f"trial_000{i}/zarr.json" for i in range(3))]
    assert found | dict.fromkeys(groups, b"") == expected | dict.fromkeys(groups, b"")


def test_a_complete_store_is_never_touched(tmp_path, whole, iterations):
    path = run(tmp_path / "store").path
    iterations.clear()
    for arguments in ({}, {"seed": 1}):
        with pytest.raises(FileExistsError, match=r"collect: .*store exists and is complete; choose another output"):
            run(path, **arguments)
    assert files(path) == whole
    assert iterations == []


def test_cut_off_after_the_last_checkpoint(tmp_path, whole, iterations, monkeypatch):
    path = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["tipl.storing.store_writer"].Writer, "trim", lambda writer: None
        )  # documents keep too many rows
        patch.setattr(tipl.collecting.resume.Unfinished, "remove", lambda states: (_ for _ in ()).throw(SystemExit()))
        with pytest.raises(SystemExit):
            run(path)
    assert files(path) != whole
    iterations.clear()
    run(path)
    assert iterations == []
    assert files(path) == whole


def test_cut_off_while_the_store_is_created(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed: nothing is tidied
        patch.setattr(sys.modules["tipl.storing.store"], "write_group", lambda *_: (_ for _ in ()).throw(SystemExit()))
        with pytest.raises(SystemExit):
            run(tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == [".store.partial"]
    run(tmp_path / "store")
    assert files(tmp_path / "store") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_run_goes_on_with_its_collection(tmp_path, whole, monkeypatch):
    cut_off(tmp_path / "run" / "store.zarr")
    monkeypatch.setattr(tipl.pipeline.training, "train", lambda *_, **__: (_ for _ in ()).throw(SystemExit()))
    with pytest.raises(SystemExit):
        tipl.pipeline.run(
            tmp_path / "run",
            num_trials=3,
            total_timesteps=32 * NUM_ITERATIONS,
            resume=True,
            ppo=TINY_PPO,
            evaluate=EvaluateConfig(prefixes=(0.5,)),
        )
    assert files(tmp_path / "run" / "store.zarr") == whole


def test_two_at_once_are_refused(unfinished):
    path = unfinished
    with (
        Store.open(path, writable=True),
        pytest.raises(RuntimeError, match=r"store .*store: another writer has it open"),
    ):
        run(path)


# A full disk


@pytest.mark.parametrize("num_files", range(35, 100, 13))
def test_a_full_disk_then_space(tmp_path, monkeypatch, whole, num_files):
    with monkeypatch.context() as patch:
        written_aside, count = tipl.files.locations.written_aside, itertools.count()

        @contextlib.contextmanager
        def failing(path: Path) -> Iterator[Path]:
            with written_aside(path) as aside:
                if next(count) >= num_files:
                    raise OSError(errno.ENOSPC, "No space left on device")
                yield aside

        for module in (tipl.files.locations, tipl.collecting.resume):
            patch.setattr(module, "written_aside", failing)
        with pytest.raises(RuntimeError, match=r"No space left on device: '.*'; \d of 9 .* the same command goes on"):
            run(tmp_path / "store")
    assert verify_store(tmp_path / "store").problems == []
    run(tmp_path / "store")
    assert files(tmp_path / "store") == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_real_full_disk_then_space(small_disk, monkeypatch, whole):
    filler = small_disk / "filler"

    def fill() -> None:
        with filler.open("ab", buffering=0) as file:
            for size in (2**16, 2**12):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    with monkeypatch.context() as patch:
        patch.setattr(Population, "iterate", filling(Population.iterate, fill))
        with pytest.raises(
            RuntimeError, match=r"OSError: .*No space left on device.*; \d of 9 checkpoints .* are kept"
        ):
            run(small_disk / "store")
    assert 0 < Store.open(small_disk / "store").num_checkpoints < 9
    assert verify_store(small_disk / "store").problems == []
    fill()  # what the cut off append gave up
    with pytest.raises(OSError, match="No space left on device"):
        run(small_disk / "new_store")  # a collection that cannot even begin leaves nothing
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "store"]
    filler.unlink()
    run(small_disk / "store")
    assert files(small_disk / "store") == whole


def filling(iterate: Callable, fill: Callable[[], None]) -> Callable:
    def iterate_and_fill(population: Population):
        if population.env_steps >= 32 * 4:  # again and again: removing an older state makes room
            fill()
        return iterate(population)

    return iterate_and_fill


# The population's state


def population(num_trials: int = 2, env_id: str = "Hopper-v5", num_threads: int = 1, **options) -> Population:
    seeds = trial_seeds(0, num_trials)
    ppo = dataclasses.replace(TINY_PPO, **options)
    return Population(make_vec(env_id, num_trials, seeds=seeds), ppo, seeds, num_threads=num_threads)


@pytest.mark.parametrize("options", [{}, {"normalize_rewards": True}])
def test_a_population_goes_on_from_a_state(options):
    one = population(**options)
    one.iterate()
    state = one.get_state()
    assert ("discounted_return" in state.arrays) == ("reward.var" in state.arrays) == bool(options)
    stats = [one.iterate() for _ in range(2)]
    other = population(num_threads=2, **options)
    other.iterate()
    other.iterate()
    other.set_state(state)
    for expected in stats:
        got = other.iterate()
        for field in dataclasses.fields(expected):
            if field.name != "seconds":
                np.testing.assert_array_equal(getattr(got, field.name), getattr(expected, field.name))
    assert (other.params == one.params).all()
    assert other.env_steps == one.env_steps == 3 * 32


def test_set_state_refuses_another_population():
    state = population(3).get_state()
    for others in ({"num_trials": 2}, {"num_trials": 3, "normalize_rewards": True}):
        with pytest.raises(ValueError, match="set_state: state must hold the arrays"):
            population(**others).set_state(state)
    gymnasium_only = population(2, "Pendulum-v1")
    assert gymnasium_only.get_state() is None
    with pytest.raises(ValueError, match="set_state: the environments of Pendulum-v1 cannot be set to a saved state"):
        gymnasium_only.set_state(population(2).get_state())
