"""Stores, zoos and models go to the Hugging Face hub and come back the same; what goes wrong is said in one line."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
import yaml
from factories import TINY_PPO, make_store
from hub_server import TOKEN, Hub, Refused, Repository
from huggingface_hub import constants

import tipl
from tipl.files.hub_errors import Unreachable, hub_errors
from tipl.files.manifest import write_manifest
from tipl.files.sealed import json_digest
from tipl.forecasting.forecaster import PRETRAINED
from tipl.forecasting.transformer import ModelConfig, TrajectoryTransformer, save_model
from tipl.sharing import hub as sharing
from tipl.storing.store import Store
from tipl.storing.zoo import INCLUDED

# huggingface_hub gives httpx2 the files of LFS as `data`.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two trials of three checkpoints; to be read alone."""
    return make_store(tmp_path_factory.mktemp("small") / "store.zarr", 2, 3)


@pytest.fixture(scope="module")
def zoo_folder(small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tipl.make_zoo([small_store], tmp_path_factory.mktemp("zoo") / "zoo", license="cc-by-4.0", progress=False)


def head_of(card: bytes) -> dict[str, Any]:
    head = card.decode().split("---\n")[1]
    return dict(yaml.safe_load(head))


# There and back


def test_a_store_comes_back_byte_for_byte(hub: Hub, small_store: Store, tmp_path: Path) -> None:
    source = Path(shutil.copytree(small_store.path, tmp_path / "source"))
    before = files_of(source)
    (source / ".env").write_text("SECRET=1")
    (source / "notes.txt").write_text("mine alone")
    (source / "trial_0000" / "weights" / ".c.9.0.12.partial").write_bytes(b"half")
    url = tipl.push(source, "user/runs", license="mit", progress=False)
    assert url.endswith("/datasets/user/runs")
    assert not hub.repository("user/runs").private
    assert len(hub.repository("user/runs").commits) == 2  # what the hub makes, and one of ours
    pushed = hub.repository("user/runs").files()
    assert pushed.keys() == before.keys() | {"README.md", ".gitattributes"}
    output = tipl.pull("user/runs", tmp_path / "pulled", progress=False)
    assert output == tmp_path / "pulled"
    assert files_of(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pulled", "source"]


def test_a_model_comes_back_and_loads(hub: Hub, tmp_path: Path) -> None:
    assert tipl.push(PRETRAINED, "user/forecaster", progress=False).endswith("/user/forecaster")
    output = tipl.pull("user/forecaster", tmp_path / "model", progress=False)
    assert files_of(output) == {name: data for name, data in files_of(PRETRAINED).items() if name != "README.md"}
    assert tipl.Forecaster.load(output).config == tipl.load_pretrained().config


def test_a_zoo_comes_back_and_is_read_where_it_is(
    hub: Hub, zoo_folder: Path, small_store: Store, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_zoo: there is no zoo in hf://datasets/user/zoo"):
        tipl.load_zoo("hf://datasets/user/zoo")
    tipl.push(zoo_folder, "user/zoo", progress=False)
    assert files_of(tipl.pull("user/zoo", tmp_path / "zoo", progress=False)) == files_of(zoo_folder)
    zoo = tipl.load_zoo("hf://datasets/user/zoo")
    assert not any("/weights/c" in request for request in hub.requests if "resolve/main" in request)
    store = zoo.store(small_store.env_id)
    assert store.fingerprint() == small_store.fingerprint()
    np.testing.assert_array_equal(store.trial(1).weights(), small_store.trial(1).weights())
    assert tipl.verify("hf://datasets/user/zoo").problems == []


def test_a_pushed_store_is_read_where_it_is(hub: Hub, small_store: Store) -> None:
    tipl.push(small_store.path, "user/runs", progress=False)
    store = tipl.Store.open("hf://datasets/user/runs")
    assert store.fingerprint() == small_store.fingerprint()
    assert tipl.verify(store.path).problems == []
    assert tipl.describe_store(store)["bytes"].startswith(
        f"{sum(map(len, hub.repository('user/runs').files().values())):,}"
    )


# Cards


def test_the_card_of_a_store_says_what_it_holds(hub: Hub, tmp_path: Path) -> None:
    ppo = dict(TINY_PPO.__dict__, learning_rate=0.001)
    store = Store.create(
        tmp_path / "store",
        env_id="InvertedPendulum-v5",
        policy=tipl.load_zoo().store("InvertedPendulum-v5").policy,
        seeds=[7, 8],
        config={"num_trials": 2, "total_timesteps": 32, "seed": 5, "shared_init": False, "ppo": ppo},
    )
    weights = tipl.load_zoo().store("InvertedPendulum-v5").trial(0).weights(0, 2)
    store.append(np.stack([weights, weights]), np.array([[0, 32], [0, 32]]), np.array([[np.nan, 10.0], [np.nan, 20.0]]))
    store.close()
    tipl.push(store.path, "user/two", license="mit", progress=False)
    card = hub.repository("user/two").files()["README.md"]
    assert head_of(card) == {
        "license": "mit",
        "library_name": "tipl",
        "tags": ["tipl", "reinforcement-learning", "ppo", "InvertedPendulum-v5"],
    }
    text = card.decode()
    for line in (
        "# 2 PPO runs of InvertedPendulum-v5",
        "| checkpoints | 2 of each run |",
        "| env steps | 32 of each run, 64 in all |",
        "| return at the end | mean 15.0, standard deviation 7.1, from 10.0 to 20.0 over 2 runs |",
        "| learning_rate | 0.001 |",
        'store = tipl.Store.open(tipl.pull("user/two", "two.zarr"))',
    ):
        assert line in text
    made_by = re.search(r"made by \| (.*) \|", text)
    assert made_by is not None
    assert "--seed 5 --ppo.num-steps 32 --ppo.update-epochs 1 --ppo.num-minibatches 2 --ppo.learning-rate" in made_by[1]


def test_the_card_of_a_model_says_what_it_was_trained_on(hub: Hub) -> None:
    tipl.push(PRETRAINED, "user/forecaster", progress=False)
    card = hub.repository("user/forecaster", "model").files()["README.md"]
    assert "license" not in head_of(card)
    assert head_of(card)["tags"][:3] == ["tipl", "reinforcement-learning", "InvertedPendulum-v4"]
    text = card.decode()
    assert "| Reacher-v4 | 5,060 weights, layers 11 -> 64 -> 64 -> 2, tanh | 39 | 7 |" in text
    assert "| InvertedPendulum-v4 | 4,546 weights, layers 4 -> 64 -> 64 -> 1, tanh | 48 | 12 |" in text
    assert "16 runs of Reacher-v4" in text
    assert "| max_prefixes | 64 |" in text


def test_a_bare_model_has_a_card_of_what_it_states(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    save_model(TrajectoryTransformer(ModelConfig(n_layer=1, n_head=2, d_model=16, d_ff=32, max_len=9)), folder)
    write_manifest(folder)
    tipl.push(folder, "user/bare", progress=False)
    text = hub.repository("user/bare", "model").files()["README.md"].decode()
    assert "on paths of at most 9 checkpoints" in text
    assert "## Training" not in text


def test_the_card_of_a_zoo_lists_its_stores_and_has_its_licence(hub: Hub, zoo_folder: Path) -> None:
    tipl.push(zoo_folder, "user/zoo", progress=False)
    card = hub.repository("user/zoo").files()["README.md"]
    assert head_of(card)["license"] == "cc-by-4.0"
    assert "| InvertedPendulum-v5 | InvertedPendulum-v5 | 2 | 3 | not stated |" in card.decode()


# Repositories that are there already


def test_what_a_repository_holds_is_overwritten_only_if_asked(hub: Hub, small_store: Store, tmp_path: Path) -> None:
    tipl.push(INCLUDED / "InvertedPendulum-v5", "user/runs", progress=False)
    repository = hub.repository("user/runs")
    first = repository.branches["main"]
    with pytest.raises(FileExistsError, match=r"push: user/runs holds \d+ other files already \(README.md, ...\)"):
        tipl.push(small_store.path, "user/runs", progress=False)
    assert repository.branches["main"] == first
    tipl.push(small_store.path, "user/runs", overwrite=True, progress=False)
    assert files_of(tipl.pull("user/runs", tmp_path / "new", progress=False)) == files_of(small_store.path)
    old = tipl.pull("user/runs", tmp_path / "old", revision=first, progress=False)
    assert files_of(old) == files_of(INCLUDED / "InvertedPendulum-v5")


def test_a_revision_is_a_branch_of_its_own(hub: Hub, small_store: Store, tmp_path: Path) -> None:
    tipl.push(INCLUDED / "InvertedPendulum-v5", "user/runs", progress=False)
    main = hub.repository("user/runs").files()
    tipl.push(small_store.path, "user/runs", revision="tiny", progress=False)
    assert hub.repository("user/runs").files() == main
    pulled = tipl.pull("user/runs", tmp_path / "tiny", revision="tiny", progress=False)
    assert files_of(pulled) == files_of(small_store.path)
    with pytest.raises(FileExistsError, match="push: user/runs holds"):
        tipl.push(small_store.path, "user/runs", revision="tiny", license="mit", progress=False)


def test_private_means_private(hub: Hub, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tipl.push(small_store.path, "user/hidden", private=True, progress=False)
    assert hub.repository("user/hidden").private
    tipl.pull("user/hidden", tmp_path / "mine", progress=False)
    tipl.push(small_store.path, "user/open", progress=False)
    with pytest.raises(FileExistsError, match="push: user/open exists already and is public"):
        tipl.push(small_store.path, "user/open", private=True, overwrite=True, progress=False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="there is no user/hidden, or it is private"):
        tipl.pull("user/hidden", tmp_path / "theirs", progress=False)


def test_a_push_that_another_one_overtook_is_refused(
    hub: Hub, small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*arguments: Any, **options: Any) -> Any:
        found = branch(*arguments, **options)
        hub.repository("user/runs").commit("main", {"other": b"theirs"})
        return found

    branch = sharing._branch
    monkeypatch.setattr(sharing, "_branch", overtaken)
    with pytest.raises(OSError, match="user/runs: 412, A commit has happened since"):
        tipl.push(small_store.path, "user/runs", progress=False)
    assert hub.repository("user/runs").files() == {"other": b"theirs"}


def test_a_gitignore_in_the_repository_has_no_effect(hub: Hub, small_store: Store, tmp_path: Path) -> None:
    hub.repositories["dataset", "user/runs"] = repository = Repository()
    repository.commit("main", {".gitignore": b"trial_0001/zarr.json trial_0001/weights/c.0.0"})
    tipl.push(small_store.path, "user/runs", overwrite=True, progress=False)
    assert files_of(tipl.pull("user/runs", tmp_path / "out", progress=False)) == files_of(small_store.path)


def test_a_dataset_and_a_model_of_one_name(hub: Hub, small_store: Store, tmp_path: Path) -> None:
    tipl.push(small_store.path, "user/both", progress=False)
    tipl.push(PRETRAINED, "user/both", progress=False)
    with pytest.raises(ValueError, match=r"pull: the hub has a dataset and a model user/both: say which"):
        tipl.pull("user/both", tmp_path / "out", progress=False)
    assert (tipl.pull("user/both", tmp_path / "out", repo_type="model", progress=False) / "config.json").exists()


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("source", "file"),
    [("store", "trial_0001/weights/c.0.0"), ("model", "refiner.safetensors"), ("zoo", "zoo.json")],
)
def test_damage_is_not_pushed(
    hub: Hub, small_store: Store, zoo_folder: Path, tmp_path: Path, source: str, file: str
) -> None:
    folder = {"store": small_store.path, "model": PRETRAINED, "zoo": zoo_folder}[source]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    flip(copy / file)
    with pytest.raises(RuntimeError, match=rf"{re.escape(str(copy))}.*{file.replace('.', '[.]')}"):
        tipl.push(copy, "user/bad", progress=False)
    assert hub.requests == []


@pytest.mark.parametrize("loss", ["flipped", "missing"])
@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("store", "trial_0001/weights/c.0.0"),
        ("store", "zarr.json"),
        ("model", "refiner.safetensors"),
        ("zoo", "zoo.json"),
        ("zoo", "InvertedPendulum-v5/trial_0001/zarr.json"),
    ],
)
def test_damage_is_not_pulled(
    hub: Hub, small_store: Store, zoo_folder: Path, tmp_path: Path, source: str, file: str, loss: str
) -> None:
    kind = "model" if source == "model" else "dataset"
    folder = {"store": small_store.path, "model": PRETRAINED, "zoo": zoo_folder}[source]
    hub.repositories[kind, "user/bad"] = repository = Repository()
    files = files_of(folder)
    if loss == "flipped":
        files[file] = files[file][:77] + bytes([files[file][77] ^ 1]) + files[file][78:]
    else:
        del files[file]
    repository.commit("main", files)
    with pytest.raises((RuntimeError, ValueError), match=r"user/bad") as refused:
        tipl.pull("user/bad", tmp_path / "out", progress=False)
    is_index = file in ("zarr.json", "zoo.json")
    assert (file in str(refused.value)) or (is_index and loss == "missing")
    if file == "trial_0001/weights/c.0.0":
        assert f"what arrived of user/bad for {tmp_path}/out is damaged" in str(refused.value)
    assert ".out.partial" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_only_files_that_belong_there_are_pulled(hub: Hub, small_store: Store, tmp_path: Path) -> None:
    hub.repositories["dataset", "user/evil"] = repository = Repository()
    names = ["run.py", "trial_0000/run.py", "../evil", "trial_0000/../../evil", "trial_0000/weights/../../../c.0"]
    repository.commit("main", files_of(small_store.path) | dict.fromkeys(names, b"evil"))
    output = tipl.pull("user/evil", tmp_path / "folder" / "out", progress=False)
    assert files_of(output) == files_of(small_store.path)
    assert [path.name for path in tmp_path.rglob("*") if "out" not in path.parts] == ["folder"]


@pytest.mark.parametrize("source", ["store", "zoo"])
def test_only_the_trials_arrays_and_chunks_of_a_store_are_pulled(
    hub: Hub, small_store: Store, zoo_folder: Path, tmp_path: Path, source: str
) -> None:
    folder, under = (small_store.path, "") if source == "store" else (zoo_folder, "InvertedPendulum-v5/")
    names = ["trial_0002/zarr.json", "trial_9999/zarr.json", "trial_00001/zarr.json", "trial_0002/weights/c.0.0"]
    names += [f"trial_0000/{name}" for name in ("weights/c.9.9", "weights/c.1.0", "weights/c.0", "weights/c.00.0")]
    names += [f"trial_0000/{name}" for name in ("env_steps/c.1", "env_steps/c.0.0", "junk/zarr.json")]
    names += [f"trial_{'9' * 5000}/zarr.json", f"trial_0000/weights/c.{'9' * 5000}.0"]
    hub.repositories["dataset", "user/evil"] = repository = Repository()
    repository.commit("main", files_of(folder) | {under + name: b"evil" for name in names})
    output = tipl.pull("user/evil", tmp_path / "out", progress=False)
    assert files_of(output) == files_of(folder)
    assert not any(request.endswith(f"/{under}{name}") for request in hub.requests for name in names)


def test_ctrl_c_during_a_pull_ends_what_has_not_begun(
    hub: Hub, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(command: str, num_bytes: int, done: Iterator[int], progress: bool) -> None:
        next(done)
        raise KeyboardInterrupt

    monkeypatch.setattr(sharing, "_show", interrupted)
    monkeypatch.setattr(sharing, "DOWNLOADS", 1)
    monkeypatch.setattr(sharing, "_missing", lambda *_: ["trial_0000/zarr.json"] + 50 * ["trial_0001/zarr.json"])
    hub.repositories["dataset", "user/runs"] = repository = Repository()
    repository.commit("main", files_of(small_store.path))
    with pytest.raises(KeyboardInterrupt):
        tipl.pull("user/runs", tmp_path / "out", progress=False)
    assert sum("resolve" in request for request in hub.requests) < 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["report.html", "../evil.json", ".hidden.json"])
def test_a_model_folder_with_other_files_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    entry = {"bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    listed = {name: entry} | json.loads((PRETRAINED / "manifest.json").read_text())["files"]
    manifest = {"format": "tipl-manifest", "version": 1, "files": listed, "sha256": json_digest(listed)}
    hub.repositories["model", "user/evil"] = repository = Repository()
    written = (json.dumps(manifest, indent=1) + "\n").encode()
    files = files_of(PRETRAINED) | {"manifest.json": written, name: b"evil"}
    repository.commit("main", files)
    message = rf"user/evil/manifest.json lists '{re.escape(name)}', which is no file of a model folder"
    with pytest.raises(RuntimeError, match=message):
        tipl.pull("user/evil", tmp_path / "folder" / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


# Mistakes, each in one line


def test_each_mistake_ends_in_one_line(
    hub: Hub,
    small_store: Store,
    tmp_path: Path,
    run_tipl: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*arguments: object) -> str:
        assert run_tipl(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("tipl: error: ")
        assert error.count("\n") == 1
        assert TOKEN not in error
        return error

    monkeypatch.chdir(tmp_path)
    store, at = small_store.path, f"push: {constants.ENDPOINT}: "
    tipl.push(store, "user/runs", progress=False)
    hub.repositories["dataset", "user/empty"] = Repository()
    hub.repository("user/empty").commit("main", {"README.md": b"# Hello"})
    (tmp_path / "there").mkdir()
    for arguments, message in [
        (["pull", "user/none", "--output", "out"], "there is no user/none, or it is private"),
        (["pull", "user/runs", "--output", "out", "--revision", "no"], "user/runs has no revision no"),
        (["pull", "user/runs", "--output", "there"], "pull: output there exists already"),
        (["pull", "user/runs", "--output", ""], "pull: output must end in the name of what is made"),
        (["pull", "user/none", "--output", "there/a/b"], "there is no user/none, or it is private"),
        (
            ["pull", "user/empty", "--output", "out"],
            "pull: the dataset repository user/empty holds no store, zoo or model of tipl",
        ),
        (["pull", "a/b/c", "--output", "out"], "pull: repo_id must be user/name, got 'a/b/c'"),
        (["push", store, "runs"], "push: repo_id must be user/name, got 'runs'"),
        (["push", store, "user/a..b"], "a..b"),
        (["pull", "user/runs", "--output", "s3://bucket/out"], "output must be a local path"),
        (["push", tmp_path / "none", "user/x"], f"push: there is no folder {tmp_path}/none"),
        (["push", tmp_path, "user/x"], f"push: {tmp_path} must be the folder of a store, of a zoo or of a model"),
        (["push", store, "other/x"], f"{at}other/x: 403, You don't have the rights to create"),
        (
            ["push", store, "user/x", "--license", "mine"],
            'refuses the card: Invalid "license" must be one of',
        ),
        (["push", store, "user/runs", "--license", "mit"], "push: user/runs holds"),
    ]:
        assert message in refused(*arguments)
    hub.tokens.clear()
    assert "401, Invalid credentials in Authorization header" in refused("push", store, "user/x")
    hub.refusal = Refused(403, "This repository is gated", "GatedRepo")
    assert "user/runs is gated: ask for access on its page" in refused("pull", "user/runs", "--output", "out")
    hub.refusal = Refused(418, "I am a teapot")
    assert "user/runs: 418, I am a teapot" in refused("pull", "user/runs", "--output", "out")
    monkeypatch.delenv("HF_TOKEN")
    assert "push: there is no token for the Hugging Face hub: `hf auth login`" in refused("push", store, "user/x")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_python_refuses_urls_where_paths_are_local(
    hub: Hub, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, share in (
        ("push: path", lambda: tipl.push("s3://bucket/x", "user/x")),
        ("pull: output", lambda: tipl.pull("user/x", "s3://bucket/x")),
        ("zoo: output", lambda: tipl.make_zoo([small_store], "s3://bucket/x")),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a local path, and s3://... is a URL"):
            share()
    assert list(tmp_path.iterdir()) == []
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "EntryNotFound", "is missing"),
        (401, None, "user/runs/trial_0000/weights/c.0.0: 401, no; `hf auth login` stores a token, or set HF_TOKEN"),
        (404, "RepoNotFound", "c.0.0: there is no such repository, or the token does not open it: `hf auth login`"),
        (403, "GatedRepo", "user/runs/trial_0000/weights/c.0.0 is gated: ask for access on the repository's page"),
        (418, None, "user/runs/trial_0000/weights/c.0.0: 418, no; try again, or copy all of it first with `tipl pull`"),
        (None, None, "user/runs/trial_0000/weights/c.0.0: the hub does not answer: "),  # the connection is cut
    ],
)
def test_a_read_that_breaks_off_says_where_and_what_to_do(
    hub: Hub, small_store: Store, monkeypatch: pytest.MonkeyPatch, run_tipl: Callable[..., int], capsys,
    status: int | None, code: str | None, said: str,
) -> None:  # fmt: skip
    tipl.push(small_store.path, "user/runs", progress=False)
    store = Store.open("hf://datasets/user/runs")

    def refuse(handler: hub_server.Handler, *_: str) -> None:
        if status is None:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.wfile = io.BytesIO()
        raise Refused(status or 500, "no", code)

    monkeypatch.setattr(hub_server, "ROUTES", [("GET HEAD", "/.*/weights/c.*", refuse), *hub_server.ROUTES])
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(RuntimeError if code == "EntryNotFound" else Unreachable, match=re.escape(said)):
        store.trial(0).weights()
    capsys.readouterr()
    assert run_tipl("verify", "hf://datasets/user/runs") == (1 if code == "EntryNotFound" else 2)
    seen = capsys.readouterr()
    assert said in seen.out + seen.err
    assert seen.err.count("\n") == (0 if code == "EntryNotFound" else 1)  # no server is taken for damage


@pytest.mark.parametrize("token", ["hf_tokén", "hf_\x01"])
def test_a_token_that_no_header_can_hold_is_named_and_not_shown(
    hub: Hub, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_tipl: Callable[..., int], capsys,
    token: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    for who, *arguments in (
        ("pull", "pull", "user/x", "--output", tmp_path / "out"),
        ("push", "push", small_store.path, "user/x"),
        ("hf://datasets/user/x", "store", "info", "hf://datasets/user/x"),
        ("hf://datasets/user/x", "verify", "hf://datasets/user/x"),
    ):
        assert run_tipl(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"tipl: error: {who}: the token for the Hugging Face hub (HF_TOKEN, or that of `hf ")
        assert error.count("\n") == 1
        assert "hf_" not in error
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "refusal", "said"),
    [
        (None, None, ": there is no such repository, or the token does not open it: `hf auth login` stores a token"),
        (
            "hf_old",
            None,
            ": 401, Invalid credentials in Authorization header; `hf auth login` stores a token, or set HF_",
        ),
        (TOKEN, Refused(403, "no", "GatedRepo"), " is gated: ask for access on the repository's page; `hf auth login`"),
        (TOKEN, Refused(403, "no"), ": 403, no; `hf auth login` stores a token, or set HF_TOKEN"),
    ],
)
def test_a_first_access_that_is_refused_says_so(
    hub: Hub, small_store: Store, monkeypatch: pytest.MonkeyPatch, run_tipl: Callable[..., int], capsys,
    token: str | None, refusal: Refused | None, said: str,
) -> None:  # fmt: skip
    tipl.push(small_store.path, "user/runs", private=True, progress=False)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    hub.refusal = refusal
    for read, name in ((Store.open, "zarr"), (tipl.load_zoo, "zoo")):
        with pytest.raises(Unreachable, match=re.escape(f"hf://datasets/user/runs/{name}.json{said}")):
            read("hf://datasets/user/runs")
    capsys.readouterr()
    assert run_tipl("verify", "hf://datasets/user/runs") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not token or token not in error


def test_a_push_that_broke_off_goes_on(hub: Hub, small_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Refused(403, "not now")

    def push(**arguments: Any) -> str:
        hub.requests.clear()
        return tipl.push(small_store.path, "user/runs", progress=False, **arguments)

    with monkeypatch.context() as spoilt:
        spoilt.setattr(hub_server, "ROUTES", [("POST", "/.*/commit/.*", refuse), *hub_server.ROUTES])
        with pytest.raises(PermissionError, match="403, not now"):
            push()
        assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    push()
    assert not any(request.startswith("PUT /lfs/") for request in hub.requests)  # the hub had kept them
    files, commits = hub.repository("user/runs").files(), len(hub.repository("user/runs").commits)
    assert (
        push() == push(overwrite=True) == f"{constants.ENDPOINT}/datasets/user/runs"
    )  # as if the answer had been lost
    assert not any("commit/" in request for request in hub.requests)
    assert (hub.repository("user/runs").files(), len(hub.repository("user/runs").commits)) == (files, commits)
    with pytest.raises(FileExistsError, match=r"user/runs holds .* other files already"):
        push(license="mit")  # another card
    hub.repository("user/runs").branches["begun"] = hub.repository("user/runs").branches["main"]  # and then cut off
    push(revision="begun", license="mit")
    assert b"license: mit" in hub.repository("user/runs").files("begun")["README.md"]


PUSHES = """
import os, signal, sys, threading
import httpx2, huggingface_hub.hf_api, tipl.sharing.hub

count, send, alone = 0, httpx2.Client.send, threading.Lock()

def send_or_die(*arguments, **named):
    global count
    with alone:  # no other request is under way at its death, so that the hub knows of no more
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return send(*arguments, **named)

httpx2.Client.send = send_or_die
for line in sys.stdin:
    nth = int(line)
    child = os.fork()
    if child == 0:
        tipl.push(sys.argv[1], "user/runs", progress=False)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""For every line of its input, pushes in a child that dies at its n-th request, and prints how the child ended."""


@pytest.mark.slow
def test_a_push_that_was_killed_at_any_request_goes_on(hub: Hub, small_store: Store, tmp_path: Path) -> None:
    tipl.push(small_store.path, "user/runs", progress=False)
    whole, num_requests = hub.repository("user/runs").files(), len(hub.requests)
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) > 1
    environment = os.environ | {
        "HF_ENDPOINT": constants.ENDPOINT, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", PUSHES, str(small_store.path)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as pushes:
        assert pushes.stdin is not None
        assert pushes.stdout is not None
        ended, nth = -signal.SIGKILL, 0
        while ended:
            assert ended == -signal.SIGKILL
            nth += 1
            hub.repositories.clear()
            hub.objects.clear()
            print(nth, file=pushes.stdin, flush=True)
            ended = int(pushes.stdout.readline())
            tipl.push(small_store.path, "user/runs", progress=False)
            assert hub.repository("user/runs").files() == whole
            assert len(hub.repository("user/runs").commits) == 2
        assert nth > num_requests


def test_no_network(hub: Hub, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for share in (
        lambda: tipl.push(small_store.path, "user/x", progress=False),
        lambda: tipl.pull("user/x", tmp_path / "out", progress=False),
    ):
        with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9: cannot be reached: \[Errno 111\]"):
            share()
    with pytest.raises(OSError, match=r"hf://datasets/user/zoo: .*\[Errno 111\]"):
        tipl.load_zoo("hf://datasets/user/zoo")
    assert hub.requests == []


def test_an_upload_that_fails_says_why(hub: Hub, small_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Refused(403, "the quota is used up")

    monkeypatch.setattr(hub_server, "ROUTES", [("PUT", "/lfs/(.*)", refuse), *hub_server.ROUTES])
    with pytest.raises(PermissionError, match=r"user/runs: 403, the quota is used up"):
        tipl.push(small_store.path, "user/runs", progress=False)
    assert hub.repository("user/runs").files().keys() == {".gitattributes"}


def test_a_disk_that_fails_is_named_by_the_folder(
    hub: Hub, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write says it, without a file

    tipl.push(small_store.path, "user/runs", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", fail)
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/out'"):
            tipl.pull("user/runs", tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match=rf"No space left on device: '{small_store.path}'"):
        tipl.push(small_store.path, "user/runs", progress=False)


def test_without_the_extra(small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import of it fails
    for share in (
        lambda: tipl.push(small_store.path, "user/x"),
        lambda: tipl.pull("user/x", tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"huggingface_hub is not installed: pip install 'tipl\[hub\]'"):
            share()


def test_an_unfinished_collection_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(INCLUDED / "InvertedPendulum-v5", tmp_path / "store"))
    document = json.loads((copy / "zarr.json").read_text())
    store = Store.create(
        tmp_path / "unfinished",
        env_id="InvertedPendulum-v5",
        policy=Store.open(copy).policy,
        seeds=[1],
        config=document["attributes"]["config"],
    )
    store.close()
    with pytest.raises(ValueError, match=r"push: .*unfinished is an unfinished collection; `tipl collect` finishes it"):
        tipl.push(store.path, "user/x", progress=False)
    config = document["attributes"]["config"] | {"jumps": {"max_jumps": 0}}
    jumping = Store.create(tmp_path / "jumping", env_id=store.env_id, policy=store.policy, seeds=[1], config=config)
    jumping.close()
    for share in (
        lambda: tipl.push(jumping.path, "user/x", progress=False),
        lambda: tipl.make_zoo([jumping.path], tmp_path / "zoo", progress=False),
    ):
        with pytest.raises(ValueError, match=r"jumping is an unfinished collection; `tipl accelerate` finishes it"):
            share()
    assert hub.requests == []


def test_progress_has_the_rate(
    hub: Hub, small_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tipl.progress.LINE_SECONDS", 0.0)
    tipl.push(small_store.path, "user/runs")
    tipl.pull("user/runs", tmp_path / "out")
    lines = capsys.readouterr().err
    assert re.search(r"pull, MB: \d+ of 1, [\d.,]+/s", lines)


def test_the_commands(
    hub: Hub,
    small_store: Store,
    tmp_path: Path,
    run_tipl: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_tipl("push", small_store.path, "user/runs", "--license", "mit", "--private", "--revision", "v1") == 0
    assert re.fullmatch(r"pushed     http://.*/datasets/user/runs\n", capsys.readouterr().out)
    assert hub.repository("user/runs").private
    assert b"license: mit" in hub.repository("user/runs").files("v1")["README.md"]
    assert (
        run_tipl("pull", "user/runs", "--output", tmp_path / "out", "--revision", "v1", "--repo-type", "dataset") == 0
    )
    assert capsys.readouterr().out == f"pulled     {tmp_path}/out\n"
    assert files_of(tmp_path / "out") == files_of(small_store.path)


def test_what_xet_says_gets_a_name_and_a_way_around() -> None:
    message = r"^push: http.*: user/a: Network error: xet-write-token .*HF_HUB_DISABLE_XET=1 goes without Xet$"
    with pytest.raises(OSError, match=message), hub_errors("push", "user/a", None):
        raise RuntimeError("Network error:\n xet-write-token (404 Not Found)")
    with pytest.raises(RuntimeError, match=r"^of tipl$"), hub_errors("push", "user/a", None):
        raise RuntimeError("of tipl")
