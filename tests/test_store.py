"""The trajectory store: round trips, crashes at every moment, and every kind of damage."""

import base64
import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tipl.files.locations
import tipl.storing.store
import tipl.storing.store_writer
import tipl.storing.zarr_files
from tipl.files.sealed import UncheckedWarning
from tipl.policy import PolicySpec
from tipl.storing.store import Store
from tipl.storing.store_writer import StoreInUse

SPEC = PolicySpec(obs_dim=2, act_dim=1, hidden_sizes=(3,))
P = SPEC.num_params
N = 2
CHUNK_ROWS = 5
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tipl.storing.store, "CHUNK_BYTES", CHUNK_ROWS * 4 * P)


def rows(start: int, stop: int, num_trials: int = N, num_params: int = P) -> Columns:
    """The columns [start, stop) of an endless store, in which every number says where it belongs."""
    t = np.arange(start, stop)
    trial = np.arange(num_trials)[:, None]
    weights = trial[..., None] * 1e6 + t[:, None] * 100.0 + np.linspace(0, 1, num_params)
    returns = trial - 0.5 * t
    returns[:, t == 0] = np.nan
    return weights.astype(np.float32), 10 * t + trial, returns


def create(path: Path, num_rows: int = 0, **config: Any) -> Store:
    store = Store.create(path, env_id="Env-v0", policy=SPEC, seeds=range(7, 7 + N), config=config)
    if num_rows:
        store.append(*rows(0, num_rows))
    return store


def assert_holds(store: Store, num_rows: int, trials: list[int] | None = None) -> None:
    weights, env_steps, episodic_return = rows(0, num_rows)
    for i in range(N) if trials is None else trials:
        trial = store.trial(i)
        assert trial.num_checkpoints == num_rows
        np.testing.assert_array_equal(trial.weights(), weights[i])
        np.testing.assert_array_equal(trial.env_steps, env_steps[i])
        np.testing.assert_array_equal(trial.episodic_return, episodic_return[i])


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def fail_after(monkeypatch, num_writes: int, error: BaseException) -> None:
    """Let `num_writes` more files be written, and every write after them raise."""
    write, count = tipl.storing.zarr_files.write_atomically, itertools.count()

    def failing(path: Path, data: bytes) -> None:
        if next(count) >= num_writes:
            raise error
        write(path, data)

    monkeypatch.setattr(tipl.storing.zarr_files, "write_atomically", failing)


def test_what_was_appended_reads_back(tmp_path):
    with create(tmp_path / "runs" / "a" / "store.zarr", num_rows=12, note="x", sizes=(1, 2)) as store:
        assert_holds(store, 12)  # while it is being written
    store = Store.open(store.path)
    assert_holds(store, 12)
    assert (store.env_id, store.policy, store.seeds) == ("Env-v0", SPEC, [7, 8])
    assert store.config == {"note": "x", "sizes": [1, 2]}
    assert len(store) == store.num_trials == N
    assert store.num_checkpoints == 12
    trial = store.trial(1)
    assert (trial.index, trial.seed, trial.chunk_rows) == (1, 8, CHUNK_ROWS)
    weights = trial.weights()
    assert weights.dtype == np.float32
    assert weights.flags.c_contiguous
    assert weights.flags.writeable
    assert trial.env_steps.dtype == np.int64
    assert trial.episodic_return.dtype == np.float64
    assert repr(store) == f"Store('{store.path}': 2 trials of Env-v0, p = {P})"
    assert store.summary() == f"Env-v0: 2 trials x 12 checkpoints x {P} weights, 0.0 MB, mean last return -5.0"


@pytest.mark.parametrize("block", [1, 3, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 17])
def test_append_in_any_blocks_gives_the_files_of_one_append(tmp_path, block):
    with create(tmp_path / "one") as store:
        store.append(*rows(0, 17))
    with create(tmp_path / "many") as store:
        for start in range(0, 17, block):
            store.append(*rows(start, min(start + block, 17)))

    assert files(tmp_path / "one") == files(tmp_path / "many")


def test_env_steps_and_returns_span_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(tipl.storing.store, "CHUNK_BYTES", 2**18)
    with create(tmp_path / "store") as store:
        for start in range(0, 2500, 700):
            store.append(*rows(start, min(start + 700, 2500)))
    assert_holds(Store.open(tmp_path / "store"), 2500)


@pytest.mark.parametrize("block", [1, 3, 5, 7, 12, 13])
def test_blocks_are_the_rows_in_order(tmp_path, block):
    trial = create(tmp_path / "store", num_rows=12).trial(1)
    blocks = list(trial.blocks(block))
    assert [len(b) for b in blocks[:-1]] == [block] * (len(blocks) - 1)
    np.testing.assert_array_equal(np.concatenate(blocks), rows(0, 12)[0][1])


def test_blocks_read_each_chunk_once(tmp_path, monkeypatch):
    trial = create(tmp_path / "store", num_rows=12).trial(0)
    read, calls = tipl.storing.zarr_files.ZarrArray.read_chunk, []
    monkeypatch.setattr(
        tipl.storing.zarr_files.ZarrArray, "read_chunk", lambda *args, **kw: calls.append(args[3]) or read(*args, **kw)
    )
    assert sum(len(block) for block in trial.blocks(2)) == 12
    assert calls == [0, 1, 2]


def test_blocks_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(tipl.storing.store, "CHUNK_BYTES", 2**18)
    policy = PolicySpec(4, 1)
    p, num_rows = policy.num_params, 1000
    with Store.create(tmp_path / "store", env_id="Env-v0", policy=policy, seeds=[0], config={}) as store:
        store.append(*rows(0, num_rows, 1, p))
    trial = Store.open(tmp_path / "store").trial(0)
    tracemalloc.start()
    assert sum(len(block) for block in trial.blocks(50)) == num_rows
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * 50 * p * 4  # a block being filled, the caller's last one, and chunks; the trial has 20 blocks


def test_a_trial_is_what_it_was_when_opened(tmp_path):
    store = create(tmp_path / "store", num_rows=3)
    before = store.trial(0)
    store.append(*rows(3, 9))
    assert before.num_checkpoints == len(before.weights()) == 3
    assert_holds(store, 9)


def test_an_empty_store_reads(tmp_path):
    store = create(tmp_path / "store")
    store.append(*rows(0, 0))
    trial = store.trial(0)
    assert trial.weights().shape == (0, P)
    assert list(trial.blocks(4)) == []
    assert store.summary() == f"Env-v0: 2 trials x 0 checkpoints x {P} weights, 0.0 MB, mean last return unknown"
    store.close()
    assert_holds(Store.open(store.path), 0)


def test_zarr_python_reads_the_same(tmp_path):
    with create(tmp_path / "store", num_rows=12) as store:
        group = store.zarr_group()
        assert sorted(name for name, _ in group.members()) == ["trial_0000", "trial_0001"]
        assert group.attrs["env_id"] == "Env-v0"
    for i, (weights, env_steps, episodic_return) in enumerate(zip(*rows(0, 12), strict=True)):
        trial = store.zarr_group()[f"trial_{i:04d}"]
        assert trial.attrs["num_checkpoints"] == 12
        assert trial["weights"].chunks == (CHUNK_ROWS, P)
        np.testing.assert_array_equal(trial["weights"][:], weights)
        np.testing.assert_array_equal(trial["env_steps"][:], env_steps)
        np.testing.assert_array_equal(trial["episodic_return"][:], episodic_return)


# Crashes


@pytest.mark.parametrize("num_writes", range(15))
def test_a_crash_at_any_write_keeps_what_was_committed(tmp_path, monkeypatch, num_writes):
    """An append of two rows over a chunk's end writes 12 files, or 18 where the arrays grow."""
    store = create(tmp_path / "store", num_rows=4)
    with monkeypatch.context() as patch:
        fail_after(patch, num_writes, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            store.append(*rows(4, 6))
    store = Store.open(tmp_path / "store")
    for i in range(N):
        num_rows = store.trial(i).num_checkpoints
        assert num_rows in (4, 6)
        assert_holds(store, num_rows, [i])
    with Store.open(tmp_path / "store", writable=True) as store:
        assert store.num_checkpoints == 4
        assert_holds(store, 4)
        store.append(*rows(4, 11))
    assert_holds(Store.open(tmp_path / "store"), 11)


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path, monkeypatch):
    store = create(tmp_path / "store", num_rows=4)
    with monkeypatch.context() as patch:
        fail_after(patch, 3, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space left on device"):
            store.append(*rows(4, 5))
    with pytest.raises(ValueError, match=r"append: .*store is not open for appending"):
        store.append(*rows(4, 5))
    store.close()
    with Store.open(tmp_path / "store", writable=True) as store:
        assert_holds(store, 4)
        store.append(*rows(4, 5))
    assert_holds(store, 5)


def test_a_failed_create_leaves_nothing(tmp_path, monkeypatch):
    fail_after(monkeypatch, 5, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left on device"):
        create(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    tipl.files.locations.write_atomically(tmp_path / "file", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(tipl.files.locations.os, "fsync", lambda file: (_ for _ in ()).throw(OSError("disk on fire")))
        with pytest.raises(OSError, match="disk on fire"):
            tipl.files.locations.write_atomically(tmp_path / "file", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"old")]
    tipl.files.locations.write_atomically(tmp_path / "file", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"new")]


KILLED_WRITER = """
import os, random, signal, struct, sys, time
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import test_store
from tipl.storing.store import Store

path = Path(sys.argv[1])
random.seed(3)
test_store.tipl.storing.store.CHUNK_BYTES = test_store.CHUNK_ROWS * 4 * test_store.P
test_store.create(path).close()
done = 0
for attempt in range(10):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        store = Store.open(path, writable=True)
        for n in range(store.num_checkpoints, 10**6):
            store.append(*test_store.rows(n, n + 1))
            os.write(writer, struct.pack("q", n + 1))
    os.close(writer)
    told = os.read(reader, 8) if attempt % 2 else b""  # every second child gets to its first append
    time.sleep(random.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told += os.read(reader, 10**6)
    os.close(reader)
    done = max([done, *(n for n, in struct.iter_unpack("q", told))])  # these appends had returned
    store = Store.open(path)
    for i in range(test_store.N):
        committed = store.trial(i).num_checkpoints
        assert done <= committed <= done + 1, (done, committed)
        test_store.assert_holds(store, committed, [i])
    done = store.num_checkpoints
assert done >= 5, done
with Store.open(path, writable=True) as store:
    assert store.num_checkpoints == done
    store.append(*test_store.rows(done, done + 30))
test_store.assert_holds(Store.open(path), done + 30)
assert not list(path.rglob("*.partial"))
"""


@pytest.mark.slow
def test_killed_writers_lose_nothing_that_append_returned_for(tmp_path):
    folders = [str(Path(__file__).parent), str(Path(tipl.storing.store.__file__).parent.parent)]
    subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path / "store"), *folders], check=True, timeout=120)


# Damage


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def read_all(path: Path) -> None:
    assert_holds(Store.open(path), 7)


@pytest.fixture
def intact(tmp_path) -> Path:
    with create(tmp_path / "store", num_rows=7, learning_rate=3e-4) as store:
        return store.path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stride", "message"),
    [
        ("zarr.json", 1, r"store .*store: .*store/zarr\.json is damaged"),
        ("trial_0001/zarr.json", 1, r"trial 1: .*trial_0001/zarr\.json is damaged"),
        ("trial_0001/weights/zarr.json", 1, r"trial 1: .*weights/zarr\.json is damaged"),
        ("trial_0001/env_steps/zarr.json", 7, r"trial 1: .*env_steps/zarr\.json is damaged"),
        ("trial_0001/episodic_return/zarr.json", 7, r"trial 1: .*episodic_return/zarr\.json is damaged"),
    ],
)
def test_a_flipped_bit_of_a_document_is_found(intact, name, stride, message):
    file = intact / name
    original = file.read_bytes()
    harmless = 0
    for position in range(0, len(original), stride):
        flip(file, position, position % 8)
        try:
            with pytest.raises(RuntimeError, match=message):
                read_all(intact)
        except pytest.fail.Exception:
            harmless += 1  # all data were read and right
        file.write_bytes(original)
    # Only an array's number of rows can change unseen, to a larger one: the commit record says how many count.
    assert harmless <= name.count("/") // 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights/c.1.0", r"trial 1: weights rows 5:10: .*trial_0001/weights/c\.1\.0 fails its checksum"),
        ("env_steps/c.0", r"trial 1: env_steps rows 0:1024: .*env_steps/c\.0 fails its checksum"),
        ("episodic_return/c.0", r"trial 1: episodic_return rows 0:1024: .*episodic_return/c\.0 fails its checksum"),
    ],
)
def test_a_flipped_bit_of_a_chunk_is_found_and_other_trials_read(intact, name, message):
    file = intact / "trial_0001" / name
    size = file.stat().st_size
    for position in (0, 1, size // 2, size - 5, size - 4, size - 1):
        flip(file, position, position % 8)
        with pytest.raises(RuntimeError, match=message):
            read_all(intact)
        assert_holds(Store.open(intact), 7, trials=[0])
        flip(file, position, position % 8)
    read_all(intact)


def test_a_damaged_unfinished_chunk_is_not_appended_to(intact):
    flip(intact / "trial_0001/weights/c.1.0", 9)
    for _ in range(2):  # the failure gives up the lock
        with pytest.raises(RuntimeError, match=r"trial 1: weights rows 5:10: .*c\.1\.0 fails its checksum"):
            Store.open(intact, writable=True)


def test_rows_beside_a_damaged_chunk_still_read(intact):
    flip(intact / "trial_0001/weights/c.1.0", 9)
    trial = Store.open(intact).trial(1)
    np.testing.assert_array_equal(trial.weights(0, 5), rows(0, 5)[0][1])
    assert len(trial.env_steps) == 7


def remove(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (remove, "weights/c.1.0", r"trial 1: weights rows 5:10: .*c\.1\.0 is missing"),
        (remove, "env_steps/c.0", r"trial 1: env_steps rows 0:1024: .*c\.0 is missing"),
        (remove, "weights", r"trial 1: .*weights/zarr\.json is missing"),
        (remove, "zarr.json", r"trial 1: .*trial_0001/zarr\.json is missing"),
        (remove, "", r"trial 1: .*trial_0001/zarr\.json is missing"),
        (cut, "weights/c.0.0", r"trial 1: weights rows 0:5: .*c\.0\.0 has \d+ bytes instead of \d+"),
        (empty, "weights/c.0.0", r"trial 1: weights rows 0:5: .*c\.0\.0 has 0 bytes instead of \d+"),
        (cut, "zarr.json", r"trial 1: .*trial_0001/zarr\.json is damaged"),
        (empty, "zarr.json", r"trial 1: .*trial_0001/zarr\.json is damaged"),
        (lambda path: path.write_text("[]"), "zarr.json", r"trial 1: .*/zarr\.json is damaged: it holds no JSON"),
    ],
)  # fmt: skip
def test_a_store_cut_short_is_found_and_other_trials_read(
    intact, damage: Callable[[Path], object], name: str, message: str
):
    damage(intact / "trial_0001" / name)
    with pytest.raises(RuntimeError, match=message):
        read_all(intact)
    assert_holds(Store.open(intact), 7, trials=[0])


def test_a_chunk_older_than_its_commit_record_is_found(tmp_path):
    with create(tmp_path / "store", num_rows=6) as store:
        old = (store.path / "trial_0000/weights/c.1.0").read_bytes()
        store.append(*rows(6, 8))
    (store.path / "trial_0000/weights/c.1.0").write_bytes(old)
    with pytest.raises(
        RuntimeError, match=r"trial 0: weights rows 5:10: .*c\.1\.0 is not the chunk that the commit record names"
    ):
        store.trial(0).weights()


def test_a_trial_in_the_place_of_another_is_found(intact):
    shutil.rmtree(intact / "trial_0000")
    shutil.copytree(intact / "trial_0001", intact / "trial_0000")
    with pytest.raises(
        RuntimeError, match=r"trial_0000 is not trial 0 of this store: its commit record is of trial 1, seed 8, not of"
    ):
        Store.open(intact).trial(0)


def foreign(tmp_path: Path, num_rows: int = 7) -> Path:
    """Another run with the same layout and the same seeds."""
    with create(tmp_path / "foreign", learning_rate=1e-3) as store:
        weights, env_steps, episodic_return = rows(0, num_rows)
        store.append(-weights, env_steps + 1, episodic_return - 1)
    return store.path


@pytest.mark.parametrize("name", ["weights/c.0.0", "weights/c.1.0", "env_steps/c.0", "episodic_return/c.0"])
def test_a_chunk_of_elsewhere_is_found(intact, tmp_path, name):
    array, chunk = name.split("/")
    message = (
        rf"trial 1: {array} rows \d+:\d+: .*trial_0001/{array}/{re.escape(chunk)} is not the chunk that the commit"
    )
    place = intact / "trial_0001" / name
    others = [intact / "trial_0000" / name, foreign(tmp_path) / "trial_0001" / name]
    others += [other for other in place.parent.glob("c.*") if other != place]
    for other in others:
        before = place.read_bytes()
        place.write_bytes(other.read_bytes())
        with pytest.raises(RuntimeError, match=message):
            read_all(intact)
        if name != "weights/c.0.0":
            with pytest.raises(RuntimeError, match=message):
                Store.open(intact, writable=True)  # reads the unfinished chunks
        place.write_bytes(before)
    assert_holds(Store.open(intact), 7, [0])


def test_a_trial_of_another_run_is_found(intact, tmp_path):
    other = foreign(tmp_path)
    shutil.rmtree(intact / "trial_0001")
    shutil.copytree(other / "trial_0001", intact / "trial_0001")
    message = (
        r"trial 1: .*store/trial_0001 is of another store: its commit record is of store '\w{16}', this one is '\w{16}'"
    )
    with pytest.raises(RuntimeError, match=message):
        Store.open(intact).trial(1)
    with pytest.raises(RuntimeError, match=message):
        Store.open(intact, writable=True)
    assert_holds(Store.open(intact), 7, trials=[0])
    shutil.copy(other / "zarr.json", intact / "zarr.json")
    with pytest.raises(RuntimeError, match=r"trial 0: .*store/trial_0000 is of another store"):
        Store.open(intact).trial(0)


def test_a_commit_record_has_the_checksums_that_zarr_stores(intact):
    chunks = tipl.storing.zarr_files.read_group(intact / "trial_0001", "")["chunks"]
    sums = np.frombuffer(base64.b64decode(chunks["weights"]), "<u4")
    full = (intact / "trial_0001/weights/c.0.0").read_bytes()
    assert sums[0] == int.from_bytes(full[-4:], "little") == google_crc32c.value(full[:-4])
    assert sums[1] == google_crc32c.value(rows(5, 7)[0][1].tobytes())  # the committed rows of the last
    assert {name: len(base64.b64decode(text)) for name, text in chunks.items()} == {
        "weights": 8,
        "env_steps": 4,
        "episodic_return": 4,
    }


# Stores of an older tipl


def as_older(path: Path, *trials: int) -> None:
    """Take from the commit records what an older tipl did not write."""
    for i in trials:
        record = tipl.storing.zarr_files.read_group(path / f"trial_{i:04d}", "")
        del record["store"], record["chunks"]
        tipl.storing.zarr_files.write_group(path / f"trial_{i:04d}", record)


def test_an_older_store_is_read_with_one_warning(intact):
    as_older(intact, 0, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        read_all(intact)
        Store.open(intact).summary()
    assert [str(warning.message) for warning in caught] == [
        f"store {intact}: an older tipl wrote it, without a record of its chunks: those of another run cannot be found"
    ]
    with pytest.warns(UncheckedWarning):
        read_all(intact)


@pytest.mark.parametrize("older", [(0, 1), (1,)])
@pytest.mark.parametrize("num_rows", [0, 5, 7])
def test_an_older_store_is_appended_to(tmp_path, older, num_rows):
    for name in ("store", "expected"):
        create(tmp_path / name, num_rows=num_rows).close()
    as_older(tmp_path / "store", *older)
    with pytest.warns(UncheckedWarning):
        store = Store.open(tmp_path / "store", writable=True)
    with store, Store.open(tmp_path / "expected", writable=True) as expected:
        for opened in (store, expected):
            opened.append(*rows(num_rows, 13))
    assert_holds(Store.open(tmp_path / "store"), 13)
    assert files(tmp_path / "store") == files(tmp_path / "expected")


def test_damage_of_an_older_store_is_found(intact):
    as_older(intact, 0, 1)
    old = (intact / "trial_0001/weights/c.1.0").read_bytes()
    flip(intact / "trial_0001/weights/c.1.0", 9)
    with pytest.warns(UncheckedWarning), pytest.raises(RuntimeError, match=r"c\.1\.0 fails its checksum"):
        Store.open(intact, writable=True)
    (intact / "trial_0001/weights/c.1.0").write_bytes(old)
    empty = np.full((CHUNK_ROWS, P), np.nan, np.float32).tobytes()
    (intact / "trial_0001/weights/c.0.0").write_bytes(empty + google_crc32c.value(empty).to_bytes(4, "little"))
    with (
        pytest.warns(UncheckedWarning),
        pytest.raises(RuntimeError, match="trial 1: weights rows 0:5 are committed but not on disk"),
    ):
        Store.open(intact).trial(1).weights()


# Documents whose checksums are right, but that cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_rows": 2**62}, r"chunk_rows must be at most 19,173,961, got 4,611,686,018,427,387,904"),
        ({"chunk_rows": 0}, "chunk_rows: Input should be greater than or equal to 1, got 0"),
        ({"chunk_rows": "5"}, "chunk_rows: Input should be a valid integer, got '5'"),
        ({"seeds": []}, r"seeds: List should have at least 1 item.*, got \[\]"),
        ({"seeds": [7, -1]}, "seeds.1: Input should be greater than or equal to 0, got -1"),
        ({"seeds": [7, 2.5]}, "seeds.1: Input should be a valid integer.*, got 2.5"),
        ({"seeds": 2**62}, "seeds: Input should be a valid array, got 4611686018427387904"),
        ({"env_id": None}, "env_id: Input should be a valid string, got None"),
        ({"config": []}, r"config: Input should be an object, got \[\]"),
        (
            {"policy": {"parameters": [["w", [2**20, 2**20]]]}},
            "policy must have at most 2,147,483,648 weights, got 1,0",
        ),
        (
            {"policy": {"parameters": [["w", [3, -1]]]}},
            "policy must be a layout: .* shape of w must be of positive ints",
        ),
        ({"policy": {"parameters": 3}}, "policy must be a layout: 'int' object is not iterable"),
        ({"policy": {"obs_dim": 2}}, "policy must be a layout: PolicySpec.from_dict: expected the keys"),
        ({"shards": 3}, "shards: Unexpected keyword argument, got 3"),
        ({"env_id": ...}, "env_id: Field required"),
    ],
)
def test_a_root_that_cannot_be_is_refused(intact, changes, message):
    attributes = tipl.storing.zarr_files.read_group(intact, "") | changes
    tipl.storing.zarr_files.write_group(intact, {name: value for name, value in attributes.items() if value is not ...})
    with pytest.raises(RuntimeError, match=rf"^{re.escape(str(intact))}/zarr\.json: .*{message}"):
        Store.open(intact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_checkpoints": 2**62}, "num_checkpoints: Input should be less than or equal to 1099511627776, got 46116"),
        (
            {"num_checkpoints": 2**40},
            "chunks.weights must be the checksums of 219902325556 chunks, for 1099511627776 c",
        ),
        ({"num_checkpoints": -1}, "num_checkpoints: Input should be greater than or equal to 0, got -1"),
        ({"num_checkpoints": 5}, "chunks.weights must be the checksums of 1 chunks, for 5 checkpoints, got 8 bytes"),
        ({"num_checkpoints": True}, "num_checkpoints: Input should be a valid integer, got True"),
        ({"chunks": {}}, "chunks.weights must be the checksums of 2 chunks, for 7 checkpoints, got 0 bytes"),
        ({"chunks": {"weights": "Ab!"}}, r"chunks\.weights must be base64"),
        ({"chunks": "many"}, "chunks: Input should be an object, got 'many'"),
        ({"store": 7}, "store: Input should be a valid string, got 7"),
        ({"seed": ...}, "seed: Field required"),
    ],
)
def test_a_commit_record_that_cannot_be_is_refused(intact, changes, message):
    attributes = tipl.storing.zarr_files.read_group(intact / "trial_0001", "") | changes
    attributes = {name: value for name, value in attributes.items() if value is not ...}
    tipl.storing.zarr_files.write_group(intact / "trial_0001", attributes)
    for writable in (False, True):
        with pytest.raises(RuntimeError, match=rf"trial_0001/zarr\.json: {message}"):
            Store.open(intact, writable=writable).trial(1)
    assert_holds(Store.open(intact), 7, trials=[0])


def test_more_rows_than_an_older_store_can_have_are_refused(intact):
    as_older(intact, 0, 1)
    record = tipl.storing.zarr_files.read_group(intact / "trial_0001", "")
    tipl.storing.zarr_files.write_group(intact / "trial_0001", record | {"num_checkpoints": 2**40})
    with pytest.raises(RuntimeError, match="trial 1: 1099511627776 checkpoints are committed but not on disk"):
        Store.open(intact).trial(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2**62, P]}, r"shape must be 7 rows or more of \[14\], got \[4611686018427387904, 14\]"),
        ({"shape": [6, P]}, r"shape must be 7 rows or more of \[14\], got \[6, 14\]"),
        ({"shape": [7, 2**40]}, r"shape must be \[7, 14\], got \[7, 1099511627776\]"),
        ({"shape": []}, r"shape must be 7 rows or more of \[14\], got \[\]"),
        ({"data_type": "float64"}, "data_type must be 'float32', got 'float64'"),
        ({"storage_transformers": [1]}, r"storage_transformers must be None, got \[1\]"),
    ],
)
def test_an_arrays_document_that_cannot_be_is_refused(intact, change, message):
    path = intact / "trial_0001/weights/zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RuntimeError, match=rf"trial 1: .*weights/zarr\.json is damaged: .*{message}"):
        Store.open(intact).trial(1)


def test_a_file_that_is_no_document_is_refused(intact):
    for name, owner in (("trial_0001/zarr.json", "trial 1"), ("zarr.json", "store")):
        for content in (b"[" * 10**6, b"\xff\xfe", b"5"):
            (intact / name).write_bytes(content)
            with pytest.raises(RuntimeError, match=rf"{owner}.*/zarr\.json is damaged: "):
                Store.open(intact).trial(1)
    (intact / "zarr.json").unlink()
    os.mkfifo(intact / "zarr.json")
    with pytest.raises(RuntimeError, match=r"store .*zarr\.json must be a regular file"):
        Store.open(intact)


# The file system


@pytest.mark.parametrize("change", [b"", b"more", None])
def test_a_chunk_that_changes_while_it_is_read_is_an_error(intact, monkeypatch, change):
    readv, path = os.readv, intact / "trial_0001/weights/c.0.0"

    def changing(file: int, buffers: list[Any]) -> int:
        if change is None:
            raise OSError(errno.EIO, "Input/output error")
        with path.open("ab") as stream:
            stream.write(change)
            if not change:
                stream.truncate(100)
        return readv(file, buffers)

    trial = Store.open(intact).trial(1)
    monkeypatch.setattr(tipl.files.locations.os, "readv", changing)
    message = "changed while it was read" if change is not None else "Input/output error: .*c.0.0"
    with pytest.raises(OSError, match=message):
        trial.weights(0, 5)


def test_a_chunk_is_read_in_several_calls(intact, monkeypatch):
    """As the system does for one of more than 2 GiB."""
    readv = os.readv
    monkeypatch.setattr(
        tipl.files.locations.os,
        "readv",
        lambda file, buffers: readv(file, [memoryview(buffers[0])[:100], *buffers[1:]][:1]),
    )
    read_all(intact)


def test_an_error_of_the_system_names_the_file(tmp_path, monkeypatch):
    store = create(tmp_path / "store", num_rows=4)
    with monkeypatch.context() as patch:
        patch.setattr(
            tipl.files.locations.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error"))
        )
        with pytest.raises(OSError, match=r"I/O error: '.*store/trial_000\d/weights/zarr\.json'"):
            store.append(*rows(4, 5))
    with Store.open(tmp_path / "store", writable=True) as store:
        assert_holds(store, 4)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
@pytest.mark.parametrize("writable", [True, range(1)])
def test_without_locks_a_warning_says_so(tmp_path, monkeypatch, number, writable):
    create(tmp_path / "store", num_rows=3).close()
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.warns(UserWarning, match=r"store lies on a file system without locks") as caught:
        Store.open(tmp_path / "store", writable=writable).close()
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="without locks"):
        create(tmp_path / "other", num_rows=3).close()
    assert_holds(Store.open(tmp_path / "other"), 3)


def test_an_error_of_locking_names_the_folder(intact, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match=r"I/O error: '.*store'"):
        Store.open(intact, writable=True)


def test_writers_of_different_trials_share_a_store(intact):
    with Store.open(intact, writable=range(1)) as first:
        with pytest.raises(StoreInUse):
            Store.open(intact, writable=True)
        with pytest.raises(StoreInUse):
            Store.open(intact, writable=range(1))
        with Store.open(intact, writable=range(1, 2)) as second:
            for store, i in ((second, 1), (first, 0)):
                store.append(*(column[i : i + 1] for column in rows(7, 9)))
    assert_holds(Store.open(intact), 9)
    shutil.rmtree(intact / "trial_0001")
    with pytest.raises(RuntimeError, match=r"store .*store: .*trial_0001 is missing"):
        Store.open(intact, writable=range(1, 2))


def test_the_next_writer_removes_what_killed_ones_left(intact):
    (intact / "resume/trial_0000").mkdir(parents=True)
    folders = [intact, *(path for path in intact.rglob("*") if path.is_dir())]
    for folder in folders:
        (folder / ".zarr.json.123.partial").write_bytes(b"half")
        (folder / ".mine").write_bytes(b"a user's")
    Store.open(intact, writable=True).close()
    assert not list(intact.rglob("*.partial"))
    assert len(list(intact.rglob(".mine"))) == len(folders)


KILLED_CREATE = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
import test_store, tipl.storing.zarr_files
write, count = tipl.storing.zarr_files.write_atomically, iter(range(1000))
def killing(path, data):
    if next(count) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)
tipl.storing.zarr_files.write_atomically = killing
test_store.create("store")
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_writes", [0, 3, 8])
def test_a_killed_create_blocks_nothing(tmp_path, num_writes):
    folders = [str(Path(__file__).parent), str(Path(tipl.storing.store.__file__).parent.parent)]
    command = [sys.executable, "-c", KILLED_CREATE, str(num_writes), *folders]
    assert subprocess.run(command, cwd=tmp_path, timeout=60, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".store.partial"]
    create(tmp_path / "store", num_rows=3).close()
    create(tmp_path / "other", num_rows=3).close()
    assert files(tmp_path / "store") == files(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "store"]


def test_a_fingerprint_tells_what_is_in_a_store(intact, tmp_path):
    first = Store.open(intact).fingerprint()
    same = Path(shutil.copytree(intact, tmp_path / "copy"))
    assert Store.open(same).fingerprint() == first
    with Store.open(same, writable=True) as store:
        store.append(*rows(7, 8))
        longer = store.fingerprint()
    assert len({first, longer, Store.open(foreign(tmp_path)).fingerprint()}) == 3
    with create(tmp_path / "moved", learning_rate=3e-4) as store:  # one weight is another
        weights, *others = rows(0, 7)
        weights[1, 2, 3] += 1
        store.append(weights, *others)
        assert store.fingerprint() != first


def test_what_is_no_store_is_refused(tmp_path, intact):
    with pytest.raises(FileNotFoundError, match=r"open: there is no trajectory store at .*nothing"):
        Store.open(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"open: there is no trajectory store at .*folder"):
        Store.open(tmp_path / "folder")
    tipl.storing.zarr_files.write_group(tmp_path / "folder", {"some": "group"})
    with pytest.raises(RuntimeError, match="this Zarr group is no trajectory store of tipl"):
        Store.open(tmp_path / "folder")
    attributes = json.loads((intact / "zarr.json").read_text())["attributes"]
    del attributes["crc32c"]
    tipl.storing.zarr_files.write_group(intact, attributes | {"version": 2})
    with pytest.raises(RuntimeError, match="has version 2, this tipl reads version 1"):
        Store.open(intact)
    (intact / "zarr.json").unlink()
    with pytest.raises(RuntimeError, match=r"zarr\.json is missing"):
        Store.open(intact)


# Bad input


def test_an_existing_path_is_refused_and_not_touched(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError, match=f"create: .*{name} exists"):
            create(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert list((tmp_path / "folder").iterdir()) == []
    store = create(tmp_path / "store", num_rows=3)
    with pytest.raises(FileExistsError, match=r"create: .*store exists"):
        create(tmp_path / "store")
    assert_holds(store, 3)


def test_one_writer_at_a_time(tmp_path):
    store = create(tmp_path / "store", num_rows=3)
    with pytest.raises(RuntimeError, match=r"store .*store: another writer has it open"):
        Store.open(tmp_path / "store", writable=True)
    store.close()
    Store.open(tmp_path / "store", writable=True).close()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seeds": []}, ValueError, r"create: seeds must be one non-negative int a trial, got \[\]"),
        ({"seeds": [1, -1]}, ValueError, r"create: seeds must be one non-negative int a trial, got \[1, -1\]"),
        ({"seeds": [1.5]}, ValueError, r"create: seeds must be one non-negative int a trial, got \[1.5\]"),
        (
            {"config": {"path": Path("x")}},
            TypeError,
            "create: env_kwargs and config must be plain JSON: .*not JSON serializable",
        ),
        ({"config": {"gamma": float("nan")}}, ValueError, "create: env_kwargs and config must be plain JSON"),
        ({"config": {"name": "\ud800"}}, ValueError, "create: env_kwargs and config must be plain JSON"),
        (
            {"env_kwargs": {"deep": json.loads("[" * 400 + "]" * 400)}},
            ValueError,
            "must be plain JSON: recursion limit",
        ),
        ({"config": []}, TypeError, "create: env_id must be a str and config a dict, got str and list"),
        ({"env_id": None}, TypeError, "create: env_id must be a str and config a dict, got NoneType and dict"),
        ({"seeds": [True]}, ValueError, r"create: seeds must be one non-negative int a trial, got \[True\]"),
    ],
)
def test_create_refuses(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        Store.create(tmp_path / "store", **{"env_id": "E", "policy": SPEC, "seeds": [0], "config": {}} | arguments)
    assert not (tmp_path / "store").exists()


def put(column: np.ndarray, value: float) -> np.ndarray:
    column = column.copy()
    column[1, 2] = value
    return column


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (0, lambda w: w.astype(np.float64), TypeError, "weights must be an array of float32, got float64"),
        (0, lambda w: w.tolist(), TypeError, "weights must be an array of float32, got list"),
        (1, lambda s: s.astype(np.int32), TypeError, "env_steps must be an array of int64, got int32"),
        (2, lambda r: r.astype(np.float32), TypeError, "episodic_return must be an array of float64, got float32"),
        (0, lambda w: w[0], ValueError, "weights must have shape (N, b, p) = (2, 1, 14), got (4, 14)"),
        (0, lambda w: w[:1], ValueError, "weights must have shape (N, b, p) = (2, 4, 14), got (1, 4, 14)"),
        (0, lambda w: w[..., 1:], ValueError, "weights must have shape (N, b, p) = (2, 4, 14), got (2, 4, 13)"),
        (1, lambda s: s[:, 1:], ValueError, "env_steps must have shape (N, b) = (2, 4), got (2, 3)"),
        (2, lambda r: r[..., None], ValueError, "episodic_return must have shape (N, b) = (2, 4), got (2, 4, 1)"),
        (0, lambda w: put(w, np.nan), ValueError, "weights must be finite, but row 2 of trial 1 is not"),
        (0, lambda w: put(w, np.inf), ValueError, "weights must be finite, but row 2 of trial 1 is not"),
        (1, lambda s: put(s, -1), ValueError, "env_steps must be non-negative, but row 2 of trial 1 is not"),
        (2, lambda r: put(r, -np.inf), ValueError, "episodic_return must be finite or NaN, but row 2 of trial 1"),
    ],
)  # fmt: skip
def test_append_refuses_and_writes_nothing(tmp_path, index, change, error, message):
    store = create(tmp_path / "store", num_rows=3)
    columns = list(rows(3, 7))
    columns[index] = change(columns[index])
    with pytest.raises(error, match=re.escape(f"append: {message}")):
        store.append(*columns)
    assert_holds(store, 3)
    store.append(*rows(3, 7))  # the store is none the worse
    assert_holds(store, 7)


def test_reading_refuses(tmp_path):
    store = create(tmp_path / "store", num_rows=3)
    with pytest.raises(IndexError, match=r"trial: i must lie in \[0, 2\), got 2"):
        store.trial(2)
    with pytest.raises(ValueError, match="weights: must have 0 <= start <= stop <= 3, got start = 2, stop = 4"):
        store.trial(0).weights(2, 4)
    with pytest.raises(ValueError, match="weights: must have 0 <= start <= stop <= 3, got start = -1, stop = 3"):
        store.trial(0).weights(-1)
    with pytest.raises(ValueError, match="blocks: rows must be positive, got 0"):
        next(store.trial(0).blocks(0))
    store.close()
    with pytest.raises(ValueError, match=r"append: .*store is not open for appending"):
        store.append(*rows(3, 4))


# The model: a store is a list of rows


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(0, 12)),
            st.tuples(st.just("reopen"), st.booleans()),
            st.tuples(st.just("crash"), st.integers(0, 12)),
            st.tuples(st.just("read"), st.integers(1, 12)),
        ),
        max_size=8,
    )
)
def test_a_store_is_a_list_of_rows(operations):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tipl.files.locations.os, "fsync", lambda file: None)
        patch.setattr(tipl.storing.store, "CHUNK_BYTES", CHUNK_ROWS * 4 * P)
        patch.setattr(tipl.storing.store_writer, "WRITE_THREADS", 1)  # the same writes at each run
        path = Path(folder, "store")
        store, length = create(path), 0
        for operation, argument in operations:
            if operation == "append":
                store.append(*rows(length, length + argument))
                length += argument
            elif operation == "reopen":
                if argument:
                    store.close()
                else:  # a writer that did not close
                    store._writer.release()
                store = Store.open(path, writable=True)
            elif operation == "crash":
                with contextlib.suppress(SystemExit), pytest.MonkeyPatch.context() as crash:
                    fail_after(crash, argument, SystemExit())
                    store.append(*rows(length, length + 1))
                    store.close()
                store = Store.open(path, writable=True)
                assert store.num_checkpoints in (length, length + 1)  # undone, or committed in every trial
                length = store.num_checkpoints
            else:
                for i in range(N):
                    blocks = [np.empty((0, P), np.float32), *store.trial(i).blocks(argument)]
                    np.testing.assert_array_equal(np.concatenate(blocks), rows(0, length)[0][i])
        assert_holds(store, length)
        store.close()
