"""Checkpoint files of other libraries: into a store and back, and every file that must be refused."""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign_checkpoints import ACT_DIM, OBS_DIM, CleanRL, RslRl, ppo_zip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tipl
from tipl.collecting.policy_network import mean_action
from tipl.files.sealed import save_arrays
from tipl.policy import ParameterLayout, PolicySpec
from tipl.storing.exporter import export_checkpoint
from tipl.storing.foreign_actors import Actor, find_actor
from tipl.storing.foreign_files import read_checkpoint_file
from tipl.storing.importer import import_checkpoints
from tipl.storing.recorder import Recorder
from tipl.storing.store import Store

OBS = torch.randn(50, OBS_DIM, generator=torch.Generator().manual_seed(0))
FORMATS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "cleanrl": ("ppo_{}.cleanrl_model", lambda i: CleanRL(i).state_dict()),
    "rsl_rl 5, std": ("model_{}.pt", lambda i: RslRl(i).release_5()),
    "rsl_rl 5, log std": ("model_{}.pt", lambda i: RslRl(i).release_5("log_std_param")),
    "rsl_rl 5, not normalised": ("model_{}.pt", lambda i: RslRl(i).release_5(normalised=False)),
    "rsl_rl 3": ("model_{}.pt", lambda i: RslRl(i).release_3()),
    "rsl_rl 2": ("model_{}.pt", lambda i: RslRl(i).release_2()),
}


def save_run(folder: Path, make: Callable[[int], Any], name: str = "model_{}.pt", count: int = 3) -> Path:
    """Save checkpoints 0..count-1, at steps 0, 50, ..., written in an order that is not theirs."""
    folder.mkdir(parents=True)
    for i in reversed(range(count)):
        torch.save(make(i), folder / name.format(50 * i))
    return folder


def tensors(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return every tensor in what torch.load gives."""
    if isinstance(content, Tensor):
        return {prefix: content}
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, tuple) else ()
    return {name: tensor for key, value in items for name, tensor in tensors(value, f"{prefix}/{key}").items()}


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", FORMATS)
def test_mlp_actors_act_in_the_simulators_layout_as_they_did_in_their_library(name: str, tmp_path: Path) -> None:
    pattern, make = FORMATS[name]
    library = CleanRL if name == "cleanrl" else RslRl
    folder, activation = save_run(tmp_path / "run", make, pattern), "tanh" if library is CleanRL else "elu"
    store = import_checkpoints([folder], tmp_path / "store", env_id="Some-v0", activation=activation)
    assert store.policy == PolicySpec(OBS_DIM, ACT_DIM, (8, 8), activation)
    assert (store.env_id, store.num_trials, store.num_checkpoints) == ("Some-v0", 1, 3)
    trial = store.trial(0)
    assert trial.env_steps.tolist() == [0, 50, 100]
    assert np.isnan(trial.episodic_return).all()
    for i, row in enumerate(torch.from_numpy(trial.weights())):
        agent = library(i)
        plain = isinstance(agent, RslRl) and name.endswith("not normalised")
        expected = agent.actor(OBS) if plain else agent.act(OBS)
        torch.testing.assert_close(mean_action(store.policy, row[None], OBS[None])[0], expected, rtol=1e-4, atol=1e-5)
        log_std = agent.actor_logstd[0] if isinstance(agent, CleanRL) else agent.std.log()
        torch.testing.assert_close(store.policy.unflatten(row)["log_std"], log_std)


@pytest.mark.parametrize("name", FORMATS)
def test_export_replaces_the_actor_and_nothing_else(name: str, tmp_path: Path) -> None:
    pattern, make = FORMATS[name]
    folder = save_run(tmp_path / "run", make, pattern)
    store = import_checkpoints([folder], tmp_path / "store", activation="tanh")
    like = folder / pattern.format(0)
    written = export_checkpoint(store.path, like, tmp_path / "out", checkpoint=2)
    before, after, source = tensors(load(like)), tensors(load(written)), tensors(load(folder / pattern.format(100)))
    assert list(after) == list(before)
    actor = find_actor(read_checkpoint_file(like).state)
    in_actor = {key for key in after if any(key.endswith("/" + of_actor) for of_actor in actor.keys)}
    in_actor -= {key for key in in_actor if "critic_state_dict" in key}
    assert len(in_actor) == 7
    exact = "normalised" in name or name == "cleanrl"  # a folded normaliser comes out to within rounding
    for key, tensor in after.items():
        torch.testing.assert_close(tensor, source[key] if key in in_actor and exact else tensor, rtol=0, atol=0)
        if key not in in_actor:
            torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)
    # Read back, the file holds the row.
    again = import_checkpoints([written], tmp_path / "again", activation="tanh")
    np.testing.assert_allclose(again.trial(0).weights()[0], store.trial(0).weights()[2], rtol=1e-5, atol=1e-6)
    if exact:
        np.testing.assert_array_equal(again.trial(0).weights()[0], store.trial(0).weights()[2])


def test_a_checkpoint_with_a_normaliser_is_exported_unchanged_to_within_rounding(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", FORMATS["rsl_rl 5, std"][1])
    import_checkpoints([folder], tmp_path / "store", activation="elu")
    written = export_checkpoint(tmp_path / "store", folder / "model_50.pt", tmp_path / "out.pt", checkpoint=1)
    for key, tensor in tensors(load(written)).items():
        torch.testing.assert_close(tensor, tensors(load(folder / "model_50.pt"))[key], rtol=1e-6, atol=1e-6)
    assert load(written)["iter"] == 50


def plain_state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.Linear(5, 2))
    return dict(model.state_dict())


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file(state, path, {"made_by": "a test"})


@pytest.mark.parametrize(
    ("suffix", "save"),
    [
        (".safetensors", save_safetensors),
        (".pt", torch.save),
        (".pth", lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path)),
        (".cleanrl_model", lambda state, path: torch.save((state, {"weight": torch.ones(2)}), path)),  # its SAC and TD3
    ],
)
def test_any_state_dict_goes_there_and_back_to_the_bit(
    suffix: str, save: Callable[[dict[str, Tensor], Path], None], tmp_path: Path
) -> None:
    for i, name in enumerate(["a", "b", "c"]):
        save(plain_state(i), tmp_path / f"{name}{suffix}")
    store = import_checkpoints([tmp_path], tmp_path / "store")
    state = plain_state(0)
    names = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    assert isinstance(store.policy, ParameterLayout)
    assert list(store.policy.shapes.items()) == (
        sorted(names.items()) if suffix == ".safetensors" else list(names.items())
    )
    assert "cannot run these policies" in store.config["source"]["note"]
    assert store.trial(0).env_steps.tolist() == [0, 1, 2]
    row = torch.from_numpy(store.trial(0).weights()[2])
    for name, tensor in store.policy.unflatten(row).items():
        assert torch.equal(tensor, plain_state(2)[name])
    written = export_checkpoint(store.path, tmp_path / f"a{suffix}", tmp_path / f"out/x{suffix}", checkpoint=2)
    exported = read_checkpoint_file(written)
    for name, tensor in plain_state(2).items():
        expected = tensor if name in names else state[name]
        assert torch.equal(exported.state[name], expected)
    if suffix == ".pth":
        assert load(written)["epoch"] == 3
    if suffix == ".safetensors":
        with safetensors.safe_open(written, "pt") as file:
            assert file.metadata() == {"made_by": "a test"}


def test_a_tensor_under_two_keys_counts_once_and_both_are_written(tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    torch.save({"features.w": shared, "pi.w": shared, "head": torch.ones(2)}, tmp_path / "a.pt")
    store = import_checkpoints([tmp_path], tmp_path / "store")
    assert store.policy.shapes == {"features.w": (3,), "head": (2,)}
    export_checkpoint(np.arange(5, dtype=np.float32) + 7, tmp_path / "a.pt", tmp_path / "b.pt")
    assert {key: tensor.tolist() for key, tensor in load(tmp_path / "b.pt").items()} == {
        "features.w": [7, 8, 9], "pi.w": [7, 8, 9], "head": [10, 11],
    }  # fmt: skip


def test_half_precision_goes_there_and_back(tmp_path: Path) -> None:
    state = {"w": torch.randn(5).bfloat16(), "b": torch.randn(3).half(), "d": torch.randn(2).double()}
    torch.save(state, tmp_path / "a.pt")
    store = import_checkpoints([tmp_path / "a.pt"], tmp_path / "store")
    export_checkpoint(store.path, tmp_path / "a.pt", tmp_path / "b.pt")
    for name, tensor in load(tmp_path / "b.pt").items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name] if name != "d" else state[name].float().double())


def test_folders_are_trials_and_stores_join(tmp_path: Path) -> None:
    make = FORMATS["cleanrl"][1]
    folders = [save_run(tmp_path / f"seed{i}", lambda t, i=i: make(10 * i + t)) for i in range(2)]
    one = import_checkpoints(folders, tmp_path / "one", env_id="Hopper-v5", activation="tanh")
    assert one.num_trials == 2
    assert one.config["source"]["trials"] == [str(folder) for folder in folders]
    assert "CleanRL does not save the statistics" in one.config["source"]["note"]
    apart = [
        import_checkpoints([folder], tmp_path / f"apart{i}", activation="tanh") for i, folder in enumerate(folders)
    ]
    joined = import_checkpoints([one.path, *(store.path for store in apart)], tmp_path / "joined")
    assert (joined.num_trials, joined.env_id) == (4, "Hopper-v5")
    for i in range(4):
        np.testing.assert_array_equal(joined.trial(i).weights(), one.trial(i % 2).weights())
        assert joined.trial(i).env_steps.tolist() == [0, 50, 100]
    assert joined.config["source"]["actor"] == one.config["source"]["actor"]


def test_a_run_has_the_same_seed_wherever_it_is_imported_from(tmp_path: Path) -> None:
    folders = [save_run(tmp_path / f"run{k}", lambda i, k=k: plain_state(10 * k + i)) for k in range(3)]
    store = import_checkpoints(folders, tmp_path / "store")
    assert len(set(store.seeds)) == 3
    copied = [shutil.copytree(folder, tmp_path / "elsewhere" / folder.name) for folder in folders]
    again = import_checkpoints([copied[2], copied[0]], tmp_path / "again", num_checkpoints=2)
    assert again.seeds == [store.seeds[2], store.seeds[0]]
    assert import_checkpoints([store.path], tmp_path / "copy").seeds == store.seeds
    joined = import_checkpoints([again.path, folders[1]], tmp_path / "joined", num_checkpoints=2)
    assert joined.seeds == [*again.seeds, store.seeds[1]]


def test_runs_that_began_alike_and_recordings_have_seeds_of_their_own(tmp_path: Path) -> None:
    def makes(k: int) -> Callable[[int], Any]:
        return lambda i: plain_state(10 * k + i if i else 0)

    alike = [save_run(tmp_path / f"run{k}", makes(k)) for k in range(3)]
    assert len(set(import_checkpoints(alike, tmp_path / "alike").seeds)) == 3
    for k in range(2):
        with Recorder(tmp_path / f"{k}.zarr", env_id="Hopper-v5") as recorder:
            recorder.log(plain_state(k), env_steps=0)
    recorded = [import_checkpoints([tmp_path / f"{k}.zarr"], tmp_path / f"copy{k}").seeds for k in range(2)]
    assert recorded[0] != recorded[1]
    both = import_checkpoints([tmp_path / "0.zarr", tmp_path / "1.zarr"], tmp_path / "both")
    assert both.seeds == [seed for seeds in recorded for seed in seeds]


def test_long_runs_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tipl.storing.importer.BLOCK_BYTES", 1)
    folder = save_run(tmp_path / "run", lambda i: {"w": torch.full((3,), float(i))}, count=7)
    other = save_run(tmp_path / "other", lambda i: {"w": torch.full((3,), float(i))}, count=7)
    store = import_checkpoints([folder, other], tmp_path / "store", num_checkpoints=5)
    assert store.trial(1).weights()[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["rl_model_900_steps.pt", "rl_model_1000_steps.pt", "rl_model_20000_steps.pt"], [900, 1000, 20000]),
        (["s1_100_steps_v5.pt", "s1_99_steps_v5.pt"], [99, 100]),  # the number before _steps
        (["seed7_iter10.pt", "seed7_iter9.pt"], [9, 10]),
        (["b.pt", "a.pt"], [0, 1]),
    ],
)
def test_files_are_ordered_by_the_steps_in_their_names(names: list[str], order: list[int], tmp_path: Path) -> None:
    for name in names:
        torch.save({"w": torch.zeros(2)}, tmp_path / name)
    (tmp_path / "README.md").write_text("not a checkpoint")
    (tmp_path / "train_9_vecnormalize.pkl").write_bytes(b"never read")
    assert import_checkpoints([tmp_path], tmp_path / "store").trial(0).env_steps.tolist() == order
    files = [tmp_path / name for name in names]
    assert import_checkpoints(files, tmp_path / "store2").trial(0).env_steps.tolist() == order


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_what_is_written_is_what_is_read(shapes: list[list[int]], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    state = {f"layer{i}.w": torch.randn(shape, generator=random) for i, shape in enumerate(shapes)}
    other = {key: torch.randn(tensor.shape, generator=random) for key, tensor in state.items()}
    actor = find_actor(state)
    assert Actor.from_dict(json.loads(json.dumps(actor.to_dict()))) == actor
    actor.write(actor.flatten(other), state)
    assert all(torch.equal(state[key], other[key]) for key in state)


class Bomb:
    """A pickle that makes a folder where it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["model_1.pt", "model_1.cleanrl_model", "model_1.zip", "model_1.pth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_never_run(name: str, legacy: bool, tmp_path: Path) -> None:
    bomb, path = tmp_path / "exploded", tmp_path / "run" / name
    path.parent.mkdir()
    payload = {"w": torch.zeros(2), "extra": Bomb(bomb)}
    if path.suffix == ".zip":
        inner = tmp_path / "policy.pth"
        torch.save(payload, inner, _use_new_zipfile_serialization=not legacy)
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(inner, "policy.pth")
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(RuntimeError, match=r"model_1.* was not loaded, because loading it could run code"):
        import_checkpoints([path.parent], tmp_path / "store")
    with pytest.raises(RuntimeError, match="could run code"):
        export_checkpoint(np.zeros(2, np.float32), path, tmp_path / "out")
    assert not bomb.exists()
    assert not (tmp_path / "store").exists()
    torch.load(tmp_path / "policy.pth" if path.suffix == ".zip" else path, weights_only=False)  # the bomb is one
    assert bomb.exists()


def test_pickles_in_the_settings_of_an_sb3_zip_are_not_decoded(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "policy.pth")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "policy.pth", "policy.pth")
        archive.writestr("data", '{"num_timesteps": 12, "policy_kwargs": {":serialized:": "not base64, not a pickle"}}')
    store = import_checkpoints([tmp_path / "a.zip"], tmp_path / "store")
    assert store.trial(0).env_steps.tolist() == [12]


def without_data(path: Path) -> Path:
    """Take the settings out of a zip of SB3's."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != "data"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


UNSAID = {
    "no policy_kwargs": {"policy_kwargs": None},
    "policy_kwargs of another kind": {"policy_kwargs": "dict(activation_fn=nn.ReLU)"},
    "a pickle alone": {"policy_kwargs": {":type:": "<class 'dict'>", ":serialized:": "gASV"}},
}


@pytest.mark.parametrize("kind", ["no data", *UNSAID])
def test_the_activation_of_an_sb3_zip_that_says_none_is_asked_for(kind: str, tmp_path: Path) -> None:
    path = ppo_zip(tmp_path / "a.zip", 1, **UNSAID.get(kind, {}))
    if kind == "no data":
        without_data(path)
    with pytest.raises(
        ValueError, match=r"a\.zip: activation must be given, one of .*; the library's default is tanh$"
    ):
        import_checkpoints([path], tmp_path / "store")
    for activation in ("relu", "tanh"):
        store = import_checkpoints([path], tmp_path / activation, activation=activation)
        assert store.policy == PolicySpec(3, 1, (8, 8), activation)
        again = export_checkpoint(store.path, path, tmp_path / f"{activation}.zip")
        assert torch.equal(read_checkpoint_file(again).state["log_std"], read_checkpoint_file(path).state["log_std"])


@pytest.mark.parametrize("pickled", [False, True])
def test_an_activation_that_contradicts_an_sb3_zip_is_refused(pickled: bool, tmp_path: Path) -> None:
    beside = {":type:": "<class 'dict'>", ":serialized:": "gASV", "net_arch": "[8, 8]"} if pickled else {}

    def zip_of(name: str, said: str | None) -> Path:
        chosen = {} if said is None else {"activation_fn": said}
        return ppo_zip(tmp_path / f"{name}.zip", 1, policy_kwargs=beside | chosen)

    named = "<class 'torch.nn.modules.activation.{}'>"
    for said, activation in ((None, "tanh"), (named.format("ReLU"), "relu"), (named.format("LeakyReLU"), "leakyrelu")):
        path = zip_of("a", said)
        default = ", the default of Stable-Baselines3 for this policy" if said is None else ""
        with pytest.raises(
            ValueError, match=rf"a\.zip: activation says elu, but the zip says {activation}{default}: leave it out$"
        ):
            import_checkpoints([path], tmp_path / "store", activation="elu")
        assert (
            import_checkpoints([path], tmp_path / f"{activation}0").policy
            == import_checkpoints([path], tmp_path / f"{activation}1", activation=activation).policy
        )
    own = zip_of("own", "<class '__main__.Swish'>")  # what it does only the caller can say
    assert isinstance(import_checkpoints([own], tmp_path / "unsaid").policy, ParameterLayout)
    said = import_checkpoints([own], tmp_path / "said", activation="silu")
    assert said.policy == PolicySpec(3, 1, (8, 8), "silu")
    export_checkpoint(said.path, own, tmp_path / "exported.zip")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"policy_kwargs": {"features_extractor_class": "<class 'own.Scaled'>"}},
            r"a features extractor of the run's own, <class 'own\.Scaled'>",
        ),
        ({"observation_space": {":type:": "<class 'gymnasium.spaces.dict.Dict'>"}}, "observations are a Dict"),
        ({"observation_space": {":type:": "<class 'gym.spaces.discrete.Discrete'>"}}, "are of a Discrete space"),
    ],
)
def test_policies_behind_something_without_parameters_are_forecast_but_not_run(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = ppo_zip(tmp_path / "a.zip", 1, **settings)
    store = import_checkpoints([path], tmp_path / "store", env_id="InvertedPendulum-v5")
    assert isinstance(store.policy, ParameterLayout)
    with pytest.raises(ValueError, match=rf"^score: .*{reason}.*cannot run these policies") as refused:
        tipl.score(store, progress=False)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=rf"must be an MLP for ONNX.*{reason}"):
        tipl.export_onnx(store.path, tmp_path / "a.onnx")
    weights = store.trial(0).weights()[0] + 1
    again = export_checkpoint(weights, path, tmp_path / "b.zip")
    np.testing.assert_array_equal(import_checkpoints([again], tmp_path / "again").trial(0).weights()[0], weights)
    kinds = ("box.Box", "dict.Dict")
    box, both = (
        ppo_zip(tmp_path / f"{kind}.zip", 1, observation_space={":type:": f"<class 'gymnasium.spaces.{kind}'>"})
        for kind in kinds
    )
    assert import_checkpoints([box], tmp_path / "box").policy == PolicySpec(3, 1, (8, 8))
    with pytest.raises(ValueError, match="does not fit"):
        import_checkpoints([box, both], tmp_path / "mixed")


@pytest.mark.parametrize("name", ["a.pt", "a.zip", "a.safetensors"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    state = {"w": torch.arange(1000.0)}
    path = tmp_path / name
    if name == "a.safetensors":
        safetensors.torch.save_file(state, path)
    elif name == "a.zip":
        torch.save(state, tmp_path / "policy.pth")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "policy.pth", "policy.pth")
    else:
        torch.save(state, path)
    whole = path.read_bytes()
    read_checkpoint_file(path)
    for damaged in (whole[: len(whole) // 2], whole[:10], b"", b"garbage" * 50):
        path.write_bytes(damaged)
        with pytest.raises(RuntimeError, match=re.escape(str(path)) + " is damaged"):
            import_checkpoints([path], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_every_member_of_an_sb3_zip_is_checked(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "policy.pth")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "policy.pth", "policy.pth")
        archive.writestr("policy.optimizer.pth", b"moments")
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(b"moments", b"mements"))
    with pytest.raises(RuntimeError, match=r"its member policy\.optimizer\.pth fails its checksum"):
        read_checkpoint_file(tmp_path / "a.zip")


def test_a_damaged_file_in_the_middle_leaves_no_store(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", lambda i: {"w": torch.zeros(2)}, count=4)
    (folder / "model_100.pt").write_bytes(b"garbage")
    with pytest.raises(RuntimeError, match=r"model_100\.pt is damaged"):
        import_checkpoints([folder], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def change(seed: int, **changes: Any) -> dict[str, Any]:
    """A CleanRL state with other values, None for a key that is not there."""
    state = CleanRL(seed).state_dict() | changes
    return {key: value for key, value in state.items() if value is not None}


NAN_BIAS = torch.tensor([0.0, float("nan")])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda i: change(i, **{"actor_mean.4.bias": NAN_BIAS}), r"actor_mean\.4\.bias must be finite, got NaN or Inf"),
        (lambda i: change(i, **{"actor_mean.4.bias": None}), r"50\.pt does not fit .*0\.pt: log_std .* is missing"),
        (lambda i: change(i, extra=torch.ones(3)), r"model_50.pt: beside the actor of cleanrl .* lies \[extra\]"),
        (lambda i: {"actor": 3, "iter": 1}, r"holds no state_dict: .* but \['actor', 'iter'\]"),
        (lambda i: [1, 2], r"model_50.pt holds no state_dict but a list"),
        (lambda i: {"critic.0.weight": torch.ones(2)}, r"no floating-point tensor of an actor is there, got the keys"),
    ],
)  # fmt: skip
def test_a_checkpoint_unlike_the_first_is_refused(second: Callable[[int], Any], message: str, tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", lambda i: second(i) if i == 1 else CleanRL(i).state_dict())
    with pytest.raises((ValueError, RuntimeError), match=message):
        import_checkpoints([folder], tmp_path / "store", activation="tanh")
    assert not (tmp_path / "store").exists()


def test_trials_that_differ_are_refused_and_the_difference_is_named(tmp_path: Path) -> None:
    wide = save_run(tmp_path / "wide", lambda i: {"a": torch.zeros(4, 2), "b": torch.zeros(3)})
    thin = save_run(tmp_path / "thin", lambda i: {"a": torch.zeros(2, 2), "b": torch.zeros(3)})
    other = save_run(tmp_path / "other", lambda i: {"a": torch.zeros(4, 2), "c": torch.zeros(3)})
    turned = save_run(tmp_path / "turned", lambda i: {"b": torch.zeros(3), "a": torch.zeros(4, 2)})
    short = save_run(tmp_path / "short", lambda i: {"a": torch.zeros(4, 2), "b": torch.zeros(3)}, count=2)
    for folder, message in (
        (thin, r"thin does not fit .*wide: a has shape \(2, 2\) instead of \(4, 2\)"),
        (other, r"b \(3,\) is missing; c \(3,\) is new"),
        (turned, "the parameters have another order"),
        (short, r"wide holds 3 and .*short 2; num_checkpoints takes the first 2 or fewer"),
    ):
        with pytest.raises(ValueError, match=message):
            import_checkpoints([wide, folder], tmp_path / "store")
    with pytest.raises(ValueError, match="import: num_checkpoints must be at least 1, got 0"):
        import_checkpoints([wide], tmp_path / "store", num_checkpoints=0)
    cleanrl = save_run(tmp_path / "cleanrl", FORMATS["cleanrl"][1])
    elu = save_run(tmp_path / "elu", FORMATS["rsl_rl 5, std"][1])
    tanh = import_checkpoints([cleanrl], tmp_path / "tanh", activation="tanh").path
    with pytest.raises(ValueError, match="the activation is elu instead of tanh"):
        import_checkpoints([tanh, elu], tmp_path / "store", activation="elu")
    with pytest.raises(ValueError, match="the kind of its checkpoints is another"):
        import_checkpoints([cleanrl, elu], tmp_path / "store", activation="tanh")
    assert not (tmp_path / "store").exists()


def test_sources_that_make_no_trial(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", lambda i: {"w": torch.zeros(2)}, count=2)
    store = import_checkpoints([folder], tmp_path / "store", pattern="model_*")
    (tmp_path / "empty").mkdir()
    torch.save({"w": torch.zeros(2)}, folder / "best.pt")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"best\.pt has no number of steps in its name"):
        import_checkpoints([folder], out)
    torch.save({"w": torch.zeros(2)}, folder / "copy_50.pt")
    with pytest.raises(ValueError, match=r"copy_50\.pt and model_50\.pt are named differently, as if of several runs"):
        import_checkpoints([folder], out, pattern="*_*")
    with pytest.raises(ValueError, match=r"copy_50\.pt and model_50\.pt are both of step 50"):
        import_checkpoints([folder], out, pattern="*_*", order="[0-9]+")
    with pytest.raises(FileNotFoundError, match="empty holds no checkpoint"):
        import_checkpoints([tmp_path / "empty"], out)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        import_checkpoints([tmp_path / "nowhere"], out)
    with pytest.raises(ValueError, match="must be folders, or files, not both"):
        import_checkpoints([folder, folder / "best.pt"], out)
    with pytest.raises(ValueError, match="sources must be some folders or files, got none"):
        import_checkpoints([], out)
    with pytest.raises(FileExistsError, match="exists already"):
        import_checkpoints([folder], store.path)
    with pytest.raises(ValueError, match="takes the first 2 or fewer of each, got 3"):
        import_checkpoints([folder], out, pattern="model_*", num_checkpoints=3)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(
        RuntimeError, match=r"is a zip, but neither one of Stable-Baselines3 \(no member policy\.pth\) nor"
    ):
        import_checkpoints([tmp_path / "x.zip"], out)
    for i, name in enumerate("ab"):
        torch.save(RslRl(2 - i).release_5(), folder / f"iter_{name}.pt")
    with pytest.raises(
        ValueError, match=r"iter_b\.pt says that it is of step 50, but comes after .*iter_a\.pt of step 100"
    ):
        import_checkpoints([folder], out, pattern="iter_*", activation="elu", order="name")
    assert not out.exists()


def test_export_refuses_what_does_not_fit(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", FORMATS["cleanrl"][1])
    store = import_checkpoints([folder], tmp_path / "store", activation="tanh").path
    like, out = folder / "model_0.pt", tmp_path / "out.pt"
    p = Store.open(store).policy.num_params
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"w": torch.zeros(p)}, tmp_path / "flat.pt")
    (tmp_path / "f.safetensors").write_bytes(b"garbage")
    save_arrays(tmp_path / "g.safetensors", {"w": np.zeros(p)})
    row = np.zeros(p, np.float32)
    for arguments, error, message in (
        ((store, tmp_path / "other.pt"), ValueError, r"other\.pt does not fit the weights: log_std \(2,\) is missing"),
        ((row, tmp_path / "other.pt"), ValueError, f"holds an actor of 3 parameters, got {p}"),
        ((store, tmp_path / "none.pt"), FileNotFoundError, "there is no checkpoint file"),
        ((tmp_path / "none", like), FileNotFoundError, "there is no forecast and no store"),
        ((tmp_path / "f.safetensors", like), RuntimeError, "is damaged"),
        ((tmp_path / "g.safetensors", like), RuntimeError, "is no forecast: expected weights"),
        ((row.astype(np.float64), like), TypeError, "weights must be float32, got float64"),
        ((row + np.float32(np.nan), like), ValueError, "weights must be finite"),
        ((row[None], like), ValueError, r"must be finite and of shape \(p,\), got \(1, "),
    ):
        with pytest.raises(error, match=message):
            export_checkpoint(*arguments, out)
    with pytest.raises(ValueError, match=r"checkpoint must lie in \[0, 3\) of trial 0, got 3"):
        export_checkpoint(store, like, out, checkpoint=3)
    with pytest.raises(ValueError, match=r"trial must lie in \[0, 1\), got 1"):
        export_checkpoint(store, like, out, trial=1)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export_checkpoint(store, like, out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_bytes": -1}, ValueError, "import: max_bytes must be at least 1, got -1"),
        ({"num_checkpoints": "1"}, TypeError, "import: num_checkpoints must be an int, got '1'"),
        ({"order": None}, TypeError, "import: order must be a str, got None"),
        ({"env_id": None}, TypeError, "import: env_id must be a str, got None"),
    ],
)
def test_an_argument_of_another_kind_is_named(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = save_run(tmp_path / "run", lambda i: {"w": torch.full((3,), float(i))}, count=2)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        import_checkpoints([folder], tmp_path / "store", **arguments)
    with pytest.raises(TypeError, match=r"^import: sources must be a list of paths, got '.*run'$"):
        import_checkpoints(str(folder), tmp_path / "store")
