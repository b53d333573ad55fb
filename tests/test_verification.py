"""`tipl store verify` names every problem of a store, `tipl store info` says what is inside."""

import dataclasses
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from factories import TINY_PPO

from tipl.collecting.collection import collect
from tipl.collecting.description import describe_store
from tipl.files.sealed import UncheckedWarning
from tipl.policy import ParameterLayout
from tipl.storing.store import Store
from tipl.storing.store_records import Commit
from tipl.storing.zarr_files import crc32c, read_group, write_group
from tipl.verification import verify_store


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tipl.storing.store"], "CHUNK_BYTES", 3 * 370 * 4)  # three rows a chunk
        path = tmp_path_factory.mktemp("verify") / "store"
        collect(path, env_id="InvertedPendulum-v5", num_trials=3, total_timesteps=6 * 32, ppo=TINY_PPO, progress=False)
    return path


@pytest.fixture
def store(collected: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(collected, tmp_path / "store"))


def flip(path: Path, position: int = 40) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def commit(store: Path, i: int, num_checkpoints: int) -> None:
    """Commit the first rows of trial i alone, as if an append to the others had been cut off."""
    trials = Store.open(store).trials
    checksums = {}
    for array in trials.arrays:
        checksums[array.name] = b""
        for chunk, in_chunk, _ in array.chunks(0, num_checkpoints):
            rows = array.read_chunk(trials.folder(i) / array.name, "", chunk)
            checksums[array.name] += crc32c(rows[in_chunk]).to_bytes(4, "little")
    trials.write_commit(i, Commit(num_checkpoints, checksums))


def commit_wrongly(trial: Path, num_checkpoints: int) -> None:
    """Write a commit record that is whole, and wrong."""
    write_group(trial, read_group(trial, "trial") | {"num_checkpoints": num_checkpoints})


def test_a_whole_store_is_ok(store, run_tipl, capsys):
    found = verify_store(store)
    assert found.problems == []
    assert found.num_chunks == 3 * (3 + 1 + 1)
    assert found.num_bytes == 3 * (9 * 370 * 4 + 2 * 1024 * 8)
    assert run_tipl("store", "verify", store) == 0
    assert capsys.readouterr() == (f"ok         {store}: 3 trials x 7 checkpoints, 15 chunks, 0.1 MB\n", "")


@pytest.mark.parametrize(
    ("damage", "problems"),
    [
        (lambda s: flip(s / "trial_0001/weights/c.1.0"), [r"trial 1: weights rows 3:6: .*c\.1\.0 fails its checksum"]),
        (lambda s: flip(s / "trial_0002/env_steps/c.0"), [r"trial 2: env_steps rows 0:1024: .*0 fails its checksum"]),
        (lambda s: (s / "trial_0000/weights/c.2.0").unlink(), [r"trial 0: weights rows 6:9: .*c\.2\.0 is missing"]),
        (
            lambda s: (s / "trial_0000/weights/c.0.0").write_bytes(b"short"),
            [r"trial 0: weights rows 0:3: .*c\.0\.0 has 5 bytes instead of 4444"],
        ),
        (lambda s: flip(s / "trial_0001/zarr.json", 70), [r"trial 1: .*trial_0001/zarr\.json is damaged: .*"]),
        (lambda s: flip(s / "trial_0001/weights/zarr.json"), [r"trial 1: .*weights/zarr\.json is damaged: .*"]),
        (lambda s: shutil.rmtree(s / "trial_0002"), [r"trial 2: .*trial_0002/zarr\.json is missing"]),
        (lambda s: flip(s / "zarr.json"), [r"store .*store: .*store/zarr\.json is damaged: .*"]),
        (
            lambda s: commit_wrongly(s / "trial_0001", 8),
            [
                r"trial 1: .*weights/zarr\.json is damaged: shape must be 8 rows or more of \[370\], got \[7, 370\]",
                r"trial 1: weights rows 6:9: .*c\.2\.0 is not the chunk that the commit record names: .*",
                r"trial 1: .*env_steps/zarr\.json is damaged: shape must be 8 rows or more of \[\], got \[7\]",
                r"trial 1: env_steps rows 0:1024: .*c\.0 is not the chunk that the commit record names: .*",
                r"trial 1: .*return/zarr\.json is damaged: shape must be 8 rows or more of \[\], got \[7\]",
                r"trial 1: episodic_return rows 0:1024: .*c\.0 is not the chunk that the commit record names: .*",
                r"trial 0: has 7 checkpoints, others have 8: an append was cut off",
                r"trial 2: has 7 checkpoints, others have 8: an append was cut off",
            ],
        ),
        (
            lambda s: commit_wrongly(s / "trial_0001", 2**62),
            [r".*trial_0001/zarr\.json: num_checkpoints: Input should be less than or equal to 1099511627776, got 4.*"],
        ),
        (
            lambda s: commit(s, 1, 5),
            [r"trial 1: has 5 checkpoints, others have 7: an append was cut off"],
        ),
        (
            lambda s: swap(s / "trial_0002/weights/c.0.0", s / "trial_0002/weights/c.1.0"),
            [
                r"trial 2: weights rows 0:3: .*trial_0002/weights/c\.0\.0 is not the chunk that the commit record .*",
                r"trial 2: weights rows 3:6: .*trial_0002/weights/c\.1\.0 is not the chunk that the commit record .*",
            ],
        ),
        (
            lambda s: swap(s / "trial_0000/episodic_return/c.0", s / "trial_0002/episodic_return/c.0"),
            [
                r"trial 0: episodic_return rows 0:1024: .*/c\.0 is not the chunk that the commit record names: .*",
                r"trial 2: episodic_return rows 0:1024: .*/c\.0 is not the chunk that the commit record names: .*",
            ],
        ),
        (
            lambda s: swap(s / "trial_0000", s / "trial_0002"),
            [
                r"trial 0: .*trial_0000 is not trial 0 of this store: its commit record is of trial 2, seed \d+, .*",
                r"trial 2: .*trial_0002 is not trial 2 of this store: its commit record is of trial 0, seed \d+, .*",
            ],
        ),
        (
            lambda s: shutil.copy(s / "trial_0000/zarr.json", s / "trial_0001/zarr.json"),
            [r"trial 1: .*trial_0001 is not trial 1 of this store: its commit record is of trial 0, .*"],
        ),
    ],
)  # fmt: skip
def test_damage_is_named(store: Path, damage: Callable[[Path], object], problems: list[str], run_tipl, capsys):
    damage(store)
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    found = verify_store(store).problems
    assert len(found) == len(problems)
    for problem, expected in zip(found, problems, strict=True):
        assert re.fullmatch(expected, problem)
    assert run_tipl("store", "verify", store) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [*found, f"damaged    {store}: {len(found)} problem{'s' * (len(found) > 1)}"]
    assert err == ""
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory, collected: Path) -> Path:
    """A run with the seeds and the layout of `collected`, and another learning rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tipl.storing.store"], "CHUNK_BYTES", 3 * 370 * 4)
        path = tmp_path_factory.mktemp("another") / "store"
        ppo = dataclasses.replace(TINY_PPO, learning_rate=1e-3)
        collect(path, env_id="InvertedPendulum-v5", num_trials=3, total_timesteps=6 * 32, ppo=ppo, progress=False)
    assert Store.open(path).seeds == Store.open(collected).seeds
    return path


def test_whatever_comes_from_another_run_is_named(store, another):
    """Of a chunk: unless it is the same in both, as the environment steps are."""
    for file in sorted(path for path in another.rglob("*") if path.is_file()):
        name = str(file.relative_to(another))
        before = (store / name).read_bytes()
        shutil.copy(file, store / name)
        problems = verify_store(store).problems
        if file.read_bytes() == before:
            assert problems == []
        elif name == "zarr.json":
            assert len(problems) == 3
            assert all(re.search(r"trial \d: .*trial_000\d is of another store: its commit", text) for text in problems)
        elif file.name == "zarr.json":
            assert re.fullmatch(r"trial (\d): .*trial_000\1 is of another store: its commit record .*", *problems)
        else:
            pattern = (
                r"trial (\d): (\w+) rows .*trial_000\1/\2/c\.[\d.]+ is not the chunk that the commit record names: .*"
            )
            assert re.fullmatch(pattern, *problems)
        (store / name).write_bytes(before)
    shutil.rmtree(store / "trial_0001")
    shutil.copytree(another / "trial_0001", store / "trial_0001")
    assert re.fullmatch(r"trial 1: .*trial_0001 is of another store: .*", *verify_store(store).problems)


def flipped(data: bytes) -> Iterator[bytes]:
    for position in sorted({*range(0, len(data), max(1, len(data) // 12)), *range(len(data) - 6, len(data))}):
        yield data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], Iterable[bytes]]] = {
    "flip": flipped,
    "cut": lambda data: (data[:n] for n in (0, 1, len(data) // 2, len(data) - 4, len(data) - 1)),
    "more": lambda data: (data + b"\0", data + data),
    "zeros": lambda data: (
        bytes(len(data)),
        data[: len(data) // 2] + bytes(len(data) // 2),
        data[:-4096] + bytes(4096),
    ),
}


def content(path: Path) -> list[bytes]:
    store = Store.open(path)
    trials = [store.trial(i) for i in range(len(store))]
    arrays = [array for t in trials for array in (t.weights(), t.env_steps, t.episodic_return)]
    return [repr((store.env_id, store.policy, store.seeds, store.config)).encode(), *(a.tobytes() for a in arrays)]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_is_found_or_without_effect(store, damage):
    expected = content(store)
    for file in sorted(path for path in store.rglob("*") if path.is_file()):
        before = file.read_bytes()
        unseen = 0
        for data in DAMAGES[damage](before):
            file.write_bytes(data)
            if not verify_store(store).problems:
                assert content(store) == expected
                unseen += 1
            else:
                with pytest.raises(RuntimeError):
                    content(store)
        # Of an array's document, another number of rows; of a JSON file, the line's end.
        assert unseen <= (2 if file.name == "zarr.json" else 0), file
        file.write_bytes(before)


def test_every_file_that_is_missing_is_named(store):
    for file in sorted(path for path in store.rglob("*") if path.is_file()):
        before = file.read_bytes()
        file.unlink()
        assert re.fullmatch(rf".*{re.escape(str(file.relative_to(store)))} is missing", *verify_store(store).problems)
        file.write_bytes(before)


def as_older(trial: Path) -> None:
    """Take from a commit record what an older tipl did not write."""
    record = read_group(trial, "trial")
    del record["store"], record["chunks"]
    write_group(trial, record)


def test_a_store_of_an_older_tipl_is_ok_with_a_warning(store, run_tipl, capsys):
    for i in range(3):
        as_older(store / f"trial_000{i}")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run_tipl("store", "verify", store) == 0
    out, err = capsys.readouterr()
    assert out == f"ok         {store}: 3 trials x 7 checkpoints, 15 chunks, 0.1 MB\n"
    assert err == (
        f"tipl: warning: store {store}: an older tipl wrote it, without a record of its chunks: those of another run "
        "cannot be found\n"
    )
    commit_wrongly(store / "trial_0002", 8)
    with pytest.warns(UncheckedWarning):
        problems = verify_store(store).problems
    assert "trial 2: weights rows 6:8 are committed but not on disk" in problems


def test_a_trial_of_an_older_tipl_among_others_is_named(store):
    as_older(store / "trial_0002")
    with pytest.warns(UncheckedWarning):
        problems = verify_store(store).problems
    assert problems == ["trial 2: has no record of its chunks, as others have: it may be of another store"]


def test_every_problem_is_named_not_only_the_first(store):
    for i in range(3):
        flip(store / f"trial_000{i}/weights/c.{i}.0")
    (store / "trial_0000/env_steps/c.0").unlink()
    flip(store / "trial_0001/zarr.json", 70)
    found = verify_store(store)
    named = [
        r"trial 0: weights rows 0:3: .*",
        r"trial 0: env_steps .* is missing",
        r"trial 1: .*",
        r"trial 2: .* 6:9: .*",
    ]
    assert len(found.problems) == 4
    for problem, expected in zip(found.problems, named, strict=True):
        assert re.fullmatch(expected, problem)
    assert found.num_chunks == 3 + 4  # of trials 0 and 2


@pytest.mark.parametrize("name", ["trial_0001/weights/c.1.0", "trial_0001/zarr.json", "zarr.json"])
def test_any_flipped_bit_is_found(store, name):
    data = (store / name).read_bytes()
    for position in range(0, len(data), max(1, len(data) // 60)):
        flip(store / name, position)
        assert verify_store(store).problems
        (store / name).write_bytes(data)
    assert not verify_store(store).problems


def test_a_bar_if_it_takes_long(store, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    monkeypatch.setenv("COLUMNS", "100")
    verify_store(store, progress=True)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.modules["tipl.verification"], "BAR_SECONDS", 0.0)
    verify_store(store, progress=True)
    assert "verify" in capfd.readouterr().err


def test_what_is_no_store(tmp_path, run_tipl, capsys):
    for command in ("verify", "info"):
        assert run_tipl("store", command, tmp_path) == 2
        assert capsys.readouterr().err == f"tipl: error: open: there is no trajectory store at {tmp_path}\n"


def test_info_of_a_complete_store(store, run_tipl, capsys):
    assert run_tipl("store", "info", store) == 0
    lines = capsys.readouterr().out.splitlines()
    opened = Store.open(store)
    last = [opened.trial(i).episodic_return[-1] for i in range(3)]
    spread = f"min {min(last):,.1f}, median {np.median(last):,.1f}, max {max(last):,.1f} over 3 trials"
    for expected in (
        "env         InvertedPendulum-v5",
        f"trials      3, seeds {', '.join(map(str, opened.seeds))}",
        "checkpoints 7 of each trial, complete",
        "policy      p = 370 float32 weights, layers 4 -> 16 -> 16 -> 1, tanh",
        "layout              0 log_std (1,)",
        "                    1 policy_net.0.weight (16, 4)",
        "env steps   192 per trial, 576 in all",
        f"            last known:  {spread}",
        "            ppo.num_steps = 32",
        "            seed = 0",
    ):
        assert expected in lines
    num_bytes = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert f"bytes       {num_bytes:,} in files, {7 * 3 * 370 * 4:,} of weights" in lines


def test_info_of_an_unfinished_store(store):
    (store / "resume").mkdir()
    for i in range(3):
        commit(store, i, 4)
    expected = "4 of each trial, unfinished: 7 were asked for, and the same `tipl collect` goes on"
    assert describe_store(Store.open(store))["checkpoints"] == expected
    assert verify_store(store).problems == []


def test_info_of_a_store_that_was_not_collected(tmp_path):
    layout = ParameterLayout((("w", (2, 3)), ("b", ())))
    with Store.create(tmp_path / "s", env_id="My-v0", policy=layout, seeds=range(5), config={"by": "me"}) as store:
        empty = describe_store(store)
        assert "return" not in empty
        store.append(np.zeros((5, 1, 7), np.float32), np.zeros((5, 1), np.int64), np.full((5, 1), np.nan))
    info = describe_store(Store.open(store.path))
    assert info["trials"] == "5, seeds 0, 1, 2, ..."
    assert info["checkpoints"] == "1 of each trial, complete"
    assert info["policy"] == "p = 7 float32 weights"
    assert info["layout"].splitlines() == ["        0 w (2, 3)", "        6 b ()"]
    assert info["return"].splitlines()[0] == "first known: none"
    assert info["config"] == "by = me"


def test_a_cut_off_collection_is_no_problem(store):
    """While it is being collected, a trial may be one append ahead of the others."""
    (store / "resume").mkdir()
    write_group(store / "resume", {"versions": {}})
    commit(store, 0, 6)
    assert verify_store(store).problems == []
    document = json.loads((store / "resume/zarr.json").read_text())
    document["attributes"]["versions"] = {"torch": "1"}
    (store / "resume/zarr.json").write_text(json.dumps(document))
    assert re.fullmatch(r"resume: .*resume/zarr\.json is damaged: .*", verify_store(store).problems[0])
