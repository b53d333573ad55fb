"""`tipl store verify` names every problem of a store, `tipl store info` says what is inside."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tipl.verify
from tipl.cli import main
from tipl.collect import collect
from tipl.policy import ParameterLayout
from tipl.ppo import PPOConfig
from tipl.store import Store
from tipl.store_info import describe_store
from tipl.verify import verify_store
from tipl.zarr_files import read_group, write_group

TINY = PPOConfig(num_steps=32, num_minibatches=2, update_epochs=1, hidden_sizes=(16, 16))


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["tipl.store"], "CHUNK_BYTES", 3 * 370 * 4)  # three rows a chunk
        path = tmp_path_factory.mktemp("verify") / "store"
        collect(path, env_id="InvertedPendulum-v5", num_trials=3, total_timesteps=6 * 32, ppo=TINY, progress=False)
    return path


@pytest.fixture
def store(collected: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(collected, tmp_path / "store"))


def tipl_store(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tipl", "store", *map(str, arguments)])
    try:
        main()
    except SystemExit as ending:
        return int(ending.code or 0)
    return 0


def flip(path: Path, position: int = 40) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def commit(trial: Path, num_checkpoints: int) -> None:
    """Write a commit record that is whole, and wrong."""
    write_group(trial, read_group(trial, "trial") | {"num_checkpoints": num_checkpoints})


def test_a_whole_store_is_ok(store, monkeypatch, capsys):
    found = verify_store(store)
    assert found.problems == []
    assert found.num_chunks == 3 * (3 + 1 + 1)
    assert found.num_bytes == 3 * (9 * 370 * 4 + 2 * 1024 * 8)
    assert tipl_store(monkeypatch, "verify", store) == 0
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
            lambda s: commit(s / "trial_0001", 8),
            [
                r"trial 1: .*weights/zarr\.json is damaged: it does not describe weights of this store",
                r"trial 1: weights rows 6:8 are committed but not on disk",
                r"trial 1: .*env_steps/zarr\.json is damaged: it does not describe env_steps of this store",
                r"trial 1: env_steps rows 0:8 are committed but not on disk",
                r"trial 1: .*return/zarr\.json is damaged: it does not describe episodic_return of this store",
                r"trial 1: episodic_return rows 0:8 are committed but not on disk",
                r"trial 0: has 7 checkpoints, others have 8: an append was cut off",
                r"trial 2: has 7 checkpoints, others have 8: an append was cut off",
            ],
        ),
        (
            lambda s: commit(s / "trial_0001", 5),
            [r"trial 1: has 5 checkpoints, others have 7: an append was cut off"],
        ),
        (
            lambda s: shutil.copy(s / "trial_0000/zarr.json", s / "trial_0001/zarr.json"),
            [r"trial 1: .*trial_0001 is not trial 1 of this store"],
        ),
    ],
)  # fmt: skip
def test_damage_is_named(store: Path, damage: Callable[[Path], object], problems: list[str], monkeypatch, capsys):
    damage(store)
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    found = verify_store(store).problems
    assert len(found) == len(problems)
    for problem, expected in zip(found, problems, strict=True):
        assert re.fullmatch(expected, problem)
    assert tipl_store(monkeypatch, "verify", store) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [*found, f"damaged    {store}: {len(found)} problem{'s' * (len(found) > 1)}"]
    assert err == ""
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before


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
    monkeypatch.setattr(tipl.verify, "BAR_SECONDS", 0.0)
    verify_store(store, progress=True)
    assert "verify" in capfd.readouterr().err


def test_what_is_no_store(tmp_path, monkeypatch, capsys):
    for command in ("verify", "info"):
        assert tipl_store(monkeypatch, command, tmp_path) == 2
        assert capsys.readouterr().err == f"tipl: error: open: there is no trajectory store at {tmp_path}\n"


def test_info_of_a_complete_store(store, monkeypatch, capsys):
    assert tipl_store(monkeypatch, "info", store) == 0
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
        "env steps   192 a trial, 576 in all",
        f"            last known:  {spread}",
        "            ppo.num_steps = 32",
        "            seed = 0",
    ):
        assert expected in lines
    num_bytes = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    assert f"bytes       {num_bytes:,} in files, {7 * 3 * 370 * 4:,} of weights" in lines


def test_info_of_an_unfinished_store(store):
    (store / "resume").mkdir()
    for trial in store.glob("trial_*"):
        commit(trial, 4)
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
    commit(store / "trial_0000", 6)
    assert verify_store(store).problems == []
    document = json.loads((store / "resume/zarr.json").read_text())
    document["attributes"]["versions"] = {"torch": "1"}
    (store / "resume/zarr.json").write_text(json.dumps(document))
    assert re.fullmatch(r"resume: .*resume/zarr\.json is damaged: .*", verify_store(store).problems[0])
