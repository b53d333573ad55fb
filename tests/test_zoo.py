"""Zoos: one index, stores by task, opened when asked for, and refused unless they are those in the index."""

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from factories import TINY_PPO, make_store

import tipl
from tipl.cli.commands import Command
from tipl.files.locations import location
from tipl.files.sealed import json_digest
from tipl.policy import PolicySpec
from tipl.sharing.origin import origin_of
from tipl.storing.store import Store
from tipl.storing.zoo import INCLUDED


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """Two of InvertedPendulum-v5, one of Hopper-v5; to be read alone."""
    folder = tmp_path_factory.mktemp("stores")
    tasks = ("InvertedPendulum-v5", "InvertedPendulum-v5", "Hopper-v5")
    return [make_store(folder / str(i), 2, 3, task, seed=i) for i, task in enumerate(tasks)]


@pytest.fixture
def zoo(stores: list[Store], tmp_path: Path) -> Path:
    return tipl.make_zoo(stores, tmp_path / "zoo", license="mit", progress=False)


def make_empty(path: Path, env_id: str, seed: int) -> Store:
    """Make a store of one run without checkpoints."""
    store = Store.create(path, env_id=env_id, policy=PolicySpec(4, 1), seeds=[seed], config={})
    store.close()
    return store


def rewrite(zoo: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool = True) -> None:
    """Change the index, with its checksum or without."""
    document = json.loads((zoo / "zoo.json").read_text())
    seal = document.pop("sha256")
    change(document)
    (zoo / "zoo.json").write_text(json.dumps({**document, "sha256": json_digest(document) if sealed else seal}))


# The zoo that comes with tipl


def test_the_included_zoo_is_small_whole_and_can_run_no_code() -> None:
    files = [path for path in INCLUDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert {path.name for path in files} <= {"README.md", "zoo.json", "zarr.json", "c.0", "c.0.0", "c.1.0"}
    assert tipl.verify(INCLUDED).problems == []


def test_a_newcomer_has_four_runs_at_once() -> None:
    zoo = tipl.load_zoo()
    assert list(zoo.tasks) == ["InvertedPendulum-v5"]
    store = zoo.store("InvertedPendulum-v5")
    assert (store.num_trials, store.num_checkpoints, store.policy.num_params) == (4, 28, 4546)
    last = [store.trial(i).episodic_return[-1] for i in range(4)]
    assert min(last) > 400
    assert zoo.license == "mit"


def test_the_included_zoo_says_by_which_command_it_was_made() -> None:
    (entry,) = tipl.load_zoo().tasks["InvertedPendulum-v5"]
    assert entry.made_by is not None
    assert entry.made_by in (INCLUDED / "README.md").read_text()


def test_the_included_forecaster_never_saw_its_runs() -> None:
    config = tipl.load_pretrained().config
    known = {seed for source in config["stores"] + config["calibrated_on"] for seed in source["seeds"]}
    assert not known & set(tipl.load_zoo().store("InvertedPendulum-v5").seeds)


# Making and opening


def test_a_zoo_holds_copies_by_task(zoo: Path, stores: list[Store]) -> None:
    loaded = tipl.load_zoo(zoo)
    paths = {task: [entry.path for entry in entries] for task, entries in loaded.tasks.items()}
    assert paths == {
        "InvertedPendulum-v5": ["InvertedPendulum-v5-1", "InvertedPendulum-v5-2"],
        "Hopper-v5": ["Hopper-v5"],
    }
    for name, store in (("Hopper-v5", stores[2]), ("InvertedPendulum-v5-2", stores[1])):
        np.testing.assert_array_equal(loaded.store(name).trial(1).weights(), store.trial(1).weights())
    assert repr(loaded) == f"Zoo({str(zoo)!r}: InvertedPendulum-v5, Hopper-v5)"
    with pytest.raises(ValueError, match=r"several stores of InvertedPendulum-v5; .*: InvertedPendulum-v5-1, Inv"):
        loaded.store("InvertedPendulum-v5")
    with pytest.raises(ValueError, match=r"has no 'Walker2d-v5'; it has InvertedPendulum-v5, Hopper-v5"):
        loaded.store("Walker2d-v5")


@pytest.mark.parametrize("tasks", [("x", "x", "x-1"), ("x-1", "x", "x"), ("x", "x-1", "x", "x-1", "x-1-1", "x!1", "")])
def test_the_stores_of_a_zoo_have_folders_of_their_own(tasks: tuple[str, ...], tmp_path: Path) -> None:
    made = [make_empty(tmp_path / f"{i}", task, i) for i, task in enumerate(tasks)]
    zoo = tipl.load_zoo(tipl.make_zoo(made, tmp_path / "zoo", progress=False))
    assert zoo.problems() == []
    found = [zoo.store(entry.path).seeds for entries in zoo.tasks.values() for entry in entries]
    assert sorted(found) == [[i] for i in range(len(tasks))]


def test_a_store_is_in_a_zoo_once(stores: list[Store], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stores[0].path, tmp_path / "copy"))
    for again in (stores[0].path, copy):
        with pytest.raises(ValueError, match=rf"zoo: {stores[0].path} and {again} are the same store"):
            tipl.make_zoo([stores[0], again], tmp_path / "zoo", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_no_weights_are_read_to_open_a_store(zoo: Path) -> None:
    for path in zoo.rglob("c.*"):
        path.write_bytes(b"")
    store = tipl.load_zoo(zoo).store("Hopper-v5")
    with pytest.raises(RuntimeError, match=r"trial 1: weights rows"):
        store.trial(1).weights()


def test_a_file_url(zoo: Path) -> None:
    assert tipl.load_zoo(f"file://{zoo}").store("Hopper-v5").num_checkpoints == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")  # of aiohttp and moto
def test_an_s3_url_read_and_made_into_another_zoo(bucket: str, zoo: Path, tmp_path: Path) -> None:
    for name in ("zoo.json", *(str(it.relative_to(zoo)) for it in (zoo / "Hopper-v5").rglob("*") if it.is_file())):
        (location(f"{bucket}/zoo") / name).write_bytes((zoo / name).read_bytes())
    store = tipl.load_zoo(f"{bucket}/zoo").store("Hopper-v5")
    assert store.trial(1).weights().shape == (3, store.policy.num_params)
    again = tipl.make_zoo([f"{bucket}/zoo/Hopper-v5"], tmp_path / "again", progress=False)
    assert tipl.load_zoo(again).store("Hopper-v5").fingerprint() == store.fingerprint()
    with pytest.raises(FileNotFoundError, match=r"there is no trajectory store at s3://.*/InvertedPendulum-v5-1"):
        tipl.load_zoo(f"{bucket}/zoo").store("InvertedPendulum-v5-1")


def test_the_command(
    stores: list[Store], tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "zoo"
    assert run_tipl("zoo", *(store.path for store in stores[1:]), "--license", "mit", "--output", output) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"zoo        {output}",
        "store      InvertedPendulum-v5: InvertedPendulum-v5, 2 trials x 3 checkpoints",
        "store      Hopper-v5: Hopper-v5, 2 trials x 3 checkpoints",
    ]
    assert tipl.load_zoo(output).license == "mit"
    assert run_tipl("zoo", stores[0].path, "--output", output) == 2
    assert f"zoo: output {output} exists already" in capsys.readouterr().err


# Damage


def test_another_store_in_its_place_is_refused_by_name(zoo: Path, stores: list[Store]) -> None:
    shutil.rmtree(zoo / "Hopper-v5")
    shutil.copytree(zoo / "InvertedPendulum-v5-1", zoo / "Hopper-v5")
    message = r"zoo/Hopper-v5 is not the store in the index: its fingerprint is [0-9a-f]{12}\.\.\. instead of"
    with pytest.raises(RuntimeError, match=message):
        tipl.load_zoo(zoo).store("Hopper-v5")
    (problem,) = tipl.verify(zoo).problems
    assert re.search(message, problem)


def test_a_zoo_behind_a_url_is_verified(zoo: Path, run_tipl: Callable[..., int], capsys) -> None:
    url = location("memory://verified/zoo")
    for file in (it for it in zoo.rglob("*") if it.is_file()):
        (url / str(file.relative_to(zoo))).write_bytes(file.read_bytes())
    for path in (str(url), f"file://{zoo}"):
        assert run_tipl("verify", path) == 0
        assert capsys.readouterr().out.count("2 trials x 3 checkpoints") == 3
    chunk = url / "Hopper-v5/trial_0001/weights/c.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    (url / "InvertedPendulum-v5-1/zarr.json").unlink()
    assert run_tipl("verify", str(url)) == 1
    said = capsys.readouterr().out
    assert re.search(r"Hopper-v5: trial 1: weights rows 0:\d+: .* bytes instead of", said)
    assert "InvertedPendulum-v5-1/zarr.json is missing" in said
    (url / "zoo.json").write_bytes(b"{}")
    assert run_tipl("verify", str(url)) == 1
    assert "zoo.json is damaged: it fails its checksum" in capsys.readouterr().out


def test_damage_in_a_store_is_found(zoo: Path) -> None:
    record = zoo / "Hopper-v5" / "trial_0001" / "zarr.json"
    record.write_text(record.read_text().replace('"num_checkpoints": 3', '"num_checkpoints": 2'))
    with pytest.raises(RuntimeError, match=r"Hopper-v5/trial_0001/zarr.json is damaged"):
        tipl.load_zoo(zoo).store("Hopper-v5")
    assert any("Hopper-v5/trial_0001/zarr.json is damaged" in problem for problem in tipl.verify(zoo).problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it["tasks"]["Hopper-v5"][0].update(num_trials=3), "Hopper-v5 must be Hopper-v5 with 3 trials"),
        (lambda it: it["tasks"].update({"Ant-v5": it["tasks"].pop("Hopper-v5")}), "Hopper-v5 must be Ant-v5 with 2"),
    ],
)
def test_an_index_that_says_something_else_is_refused(
    zoo: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(zoo, change)
    with pytest.raises(RuntimeError, match=message):
        tipl.load_zoo(zoo).store("Hopper-v5")
    assert len(tipl.verify(zoo).problems) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.update(version=2), r"zoo.json: has version 2, this tipl reads version 1"),
        (lambda it: it.update(format="zip"), r"zoo.json: format: "),
        (lambda it: it.pop("license"), r"zoo.json: license: "),
        (lambda it: it.update(more=1), r"zoo.json: more: "),
        (lambda it: it["tasks"].update(Empty=[]), r"zoo.json: tasks.Empty: "),
        (lambda it: it["tasks"].clear(), r"zoo.json: tasks: "),
        (lambda it: it.update(license="mit\x1b[31m"), r"texts must be printable, got 'mit\\x1b"),
        (lambda it: it["tasks"].update({"A\n": it["tasks"].pop("Hopper-v5")}), r"texts must be printable, got 'A\\n'"),
        (lambda it: it["tasks"]["Hopper-v5"][0].update(made_by="\x07"), r"texts must be printable, got '\\x07'"),
        (lambda it: it["tasks"]["Hopper-v5"][0].update(fingerprint="0"), r"tasks.Hopper-v5.0.fingerprint: "),
        *(
            (lambda it, path=path: it["tasks"]["Hopper-v5"][0].update(path=path), r"path must be a relative path")
            for path in ("../other", "/etc", ".hidden", "a//b", "s3://bucket/x", "", "a/../b", "x\n")
        ),
        (lambda it: it["tasks"]["Hopper-v5"][0].update(path="InvertedPendulum-v5-1"), r"must name one store"),
        (lambda it: it["tasks"]["Hopper-v5"][0].update(path="InvertedPendulum-v5"), r"must name one store"),
    ],
)
def test_an_index_of_another_form_is_refused(
    zoo: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(zoo, change)
    with pytest.raises(RuntimeError, match=message):
        tipl.load_zoo(zoo)


def test_a_changed_index_is_refused(zoo: Path) -> None:
    rewrite(zoo, lambda it: it.update(license="cc-by-4.0"), sealed=False)
    with pytest.raises(RuntimeError, match=r"zoo/zoo.json is damaged: it fails its checksum"):
        tipl.load_zoo(zoo)
    assert any("zoo.json is damaged" in problem for problem in tipl.verify(zoo).problems)


def test_a_changed_byte_anywhere_in_the_index_is_refused(zoo: Path) -> None:
    index = zoo / "zoo.json"
    whole = index.read_bytes()
    for i in range(0, len(whole), 7):
        index.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        with pytest.raises(RuntimeError, match=r"zoo/zoo.json"):
            tipl.load_zoo(zoo)


def test_no_zoo(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no zoo in .*: zoo.json is missing"):
        tipl.load_zoo(tmp_path)


def test_a_zoo_is_no_store_and_one_path_no_list(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"zoo: {zoo} is a zoo already: give its stores, {zoo}/InvertedPendulum-v5"):
        tipl.make_zoo([zoo], tmp_path / "another")
    with pytest.raises(TypeError, match="zoo: stores must be a list of stores, got one path"):
        tipl.make_zoo(str(zoo), tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_stores_that_are_no_good_make_no_zoo(stores: list[Store], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zoo: there must be at least one store"):
        tipl.make_zoo([], tmp_path / "zoo")
    copy = Path(shutil.copytree(stores[0].path, tmp_path / "copy"))
    chunk = bytearray((copy / "trial_0000/weights/c.0.0").read_bytes())
    chunk[5] ^= 1
    (copy / "trial_0000/weights/c.0.0").write_bytes(chunk)
    with pytest.raises(RuntimeError, match=r"zoo: .*copy is damaged: trial 0: weights rows"):
        tipl.make_zoo([stores[2], copy], tmp_path / "zoo", progress=False)
    config = tipl.load_zoo().store("InvertedPendulum-v5").config
    begun = tmp_path / "begun"
    Store.create(begun, env_id="Hopper-v5", policy=stores[2].policy, seeds=[1], config=config).close()
    with pytest.raises(ValueError, match=r"zoo: .*begun is an unfinished collection"):
        tipl.make_zoo([begun], tmp_path / "zoo", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "copy"]


# How a store was made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_init": True},
        {"shared_init": True, "init_seed": 12},
        {
            "ppo": dataclasses.replace(
                TINY_PPO, target_kl=0.1, normalize_rewards=True, ortho_init=False, optimizer="sgd", learning_rate=1e-5
            )
        },
    ],
)
def test_the_command_that_made_a_store_makes_it_again(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = {"num_trials": 3, "total_timesteps": 64, "seed": 9, "shared_init": False, "ppo": TINY_PPO} | changes
    config = settings | {"ppo": dataclasses.asdict(settings["ppo"])}
    policy = PolicySpec(4, 1, (16, 16))
    store = Store.create(tmp_path / "store", env_id="Env-v5", policy=policy, seeds=[1, 2, 3], config=config)
    store.close()
    command = origin_of(store)
    assert command is not None
    asked = tyro.cli(Command, prog="tipl", args=shlex.split(command)[1:])
    assert asked.env_id == "Env-v5"
    assert (asked.num_trials, asked.total_timesteps, asked.seed) == (3, 64, 9)
    assert asked.ppo == settings["ppo"]
    assert asked.init_seed == changes.get("init_seed")
    assert asked.shared_init or asked.init_seed is not None or not settings["shared_init"]


@pytest.mark.parametrize(
    ("config", "origin"),
    [
        ({"source": {"format": "recorder"}}, "recorded while training"),
        ({"source": {"format": "zip"}}, "imported checkpoint files"),
        ({"total_timesteps": 3}, None),
        ({"num_trials": 1, "total_timesteps": 1, "seed": 1, "ppo": {}, "part": "critic"}, None),
    ],
)
def test_other_stores_say_what_they_can(config: dict[str, Any], origin: str | None, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", env_id="Env-v5", policy=PolicySpec(4, 1), seeds=[1], config=config)
    store.close()
    assert origin_of(store) == origin
