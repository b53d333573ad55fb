"""Actors of SAC, TD3 and their like among any keys: found where they are meant, and nothing else taken for them."""

import base64
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_checkpoints import damaged, sb3_zip
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tipl.collecting.description import describe_store
from tipl.policy import ACTIVATIONS, ParameterLayout, PolicySpec
from tipl.storing.actor_families import Settings
from tipl.storing.exporter import export_checkpoint
from tipl.storing.foreign_actors import Actor, differences, find_actor
from tipl.storing.foreign_files import find_actor_in, read_checkpoint_file
from tipl.storing.importer import describe_import, import_checkpoints
from tipl.storing.recorder import Recorder
from tipl.storing.store import Store

KINDS = ("SAC", "SAC with gSDE", "SAC with gSDE, clipped", "TD3")


def tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=random) for key, shape in shapes.items()}


def linear(prefix: str, fan_in: int, fan_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (fan_out, fan_in), f"{prefix}.bias": (fan_out,)}


def actor_shapes(kind: str, obs_dim: int, act_dim: int, hidden: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of an SB3 actor, in the order of its state_dict."""
    sizes, shapes = (obs_dim, *hidden), {}
    net = "mu" if kind == "TD3" else "latent_pi"
    if "gSDE" in kind:
        shapes["actor.log_std"] = (sizes[-1], act_dim)
    for i in range(len(hidden)):
        shapes |= linear(f"actor.{net}.{2 * i}", sizes[i], sizes[i + 1])
    head = {"TD3": f"mu.{2 * len(hidden)}", "SAC with gSDE, clipped": "mu.0"}.get(kind, "mu")
    shapes |= linear(f"actor.{head}", sizes[-1], act_dim)
    return shapes | (linear("actor.log_std", sizes[-1], act_dim) if kind == "SAC" else {})


def spec_of(kind: str, obs_dim: int, act_dim: int, hidden: tuple[int, ...], activation: Any = "relu") -> PolicySpec:
    return PolicySpec(
        obs_dim,
        act_dim,
        hidden,
        activation,
        gsde="gSDE" in kind,
        spread={"SAC": "head", "TD3": "none"}.get(kind, "parameter"),  # type: ignore[arg-type]
        squash=True,
        mean_limit=1.5 if "clipped" in kind else None,
    )


def whole(kind: str, seed: int = 0, obs_dim: int = 3, act_dim: int = 2, hidden: tuple[int, ...] = (8, 6)) -> Any:
    """A policy's state: the actor, its target where there is one, critics and their targets."""
    shapes = actor_shapes(kind, obs_dim, act_dim, hidden)
    if kind == "TD3":
        shapes |= {key.replace("actor.", "actor_target."): shape for key, shape in shapes.items()}
    critic = linear("critic.qf0.0", obs_dim + act_dim, 8) | linear("critic.qf1.0", obs_dim + act_dim, 8)
    shapes |= critic | {key.replace("critic.", "critic_target."): shape for key, shape in critic.items()}
    return tensors(shapes, seed)


sizes = st.integers(1, 5)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS),
    sizes,
    sizes,
    st.lists(sizes, max_size=3).map(tuple),
    st.sampled_from(["", "policy.", "agent.net.", "actor."]),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_size_under_any_prefix_is_found_written_and_read(
    kind: str,
    obs_dim: int,
    act_dim: int,
    hidden: tuple[int, ...],
    prefix: str,
    activation: Any,
    whole_key: bool,
    seed: int,
) -> None:
    state = {f"{prefix}{key}": it for key, it in whole(kind, seed, obs_dim, act_dim, hidden).items()}
    other = {f"{prefix}{key}": it for key, it in whole(kind, seed + 1, obs_dim, act_dim, hidden).items()}
    chosen = f"{prefix}actor." if whole_key else prefix or None
    actor = find_actor(state, Settings(activation, mean_limit=1.5), chosen)
    assert actor.policy == spec_of(kind, obs_dim, act_dim, hidden, activation)
    shapes = actor_shapes(kind, obs_dim, act_dim, hidden)
    assert actor.keys == tuple(prefix + key for key in shapes)
    assert Actor.from_dict(json.loads(json.dumps(actor.to_dict()))) == actor
    row = actor.flatten(other)
    np.testing.assert_array_equal(row, torch.cat([other[key].flatten() for key in actor.keys]).numpy())
    before = {key: it.clone() for key, it in state.items()}
    actor.write(row, state)
    for key, it in state.items():
        assert torch.equal(it, (other if key in actor.keys else before)[key])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_zip_says_of_the_actor_is_taken(kind: str, tmp_path: Path) -> None:
    path, state = tmp_path / "m_1.zip", whole(kind)

    def found(**kwargs: Any) -> Any:
        sb3_zip(path, state, policy_kwargs=kwargs)
        return find_actor_in(path, read_checkpoint_file(path)).policy

    assert found(clip_mean=1.5) == spec_of(kind, 3, 2, (8, 6))
    named = "<class 'torch.nn.modules.activation.{}'>"
    assert found(clip_mean=1.5, activation_fn=named.format("Tanh")) == spec_of(kind, 3, 2, (8, 6), "tanh")
    assert isinstance(found(activation_fn=named.format("Mish")), ParameterLayout)
    if "clipped" in kind:
        assert found().mean_limit == 2.0  # the library's default
        assert found(clip_mean=3).mean_limit == 3.0
        for wrong in ("2", -1.0, 0, True, None, [2.0], math.inf, math.nan):
            assert isinstance(found(clip_mean=wrong), ParameterLayout)
    else:
        assert found(clip_mean="2").mean_limit is None


def test_without_its_clip_mean_a_policy_is_not_run(tmp_path: Path) -> None:
    torch.save(whole("SAC with gSDE, clipped"), tmp_path / "m.pt")
    store = import_checkpoints([tmp_path / "m.pt"], tmp_path / "store")
    assert isinstance(store.policy, ParameterLayout)
    assert "cannot run these policies with gSDE, whose clip_mean nothing says" in store.config["source"]["note"]


@pytest.mark.parametrize("kind", ["SAC", "TD3"])
def test_what_no_file_says_is_in_a_note(kind: str, tmp_path: Path) -> None:
    torch.save(whole(kind), tmp_path / "m.pt")
    store = import_checkpoints([tmp_path / "m.pt"], tmp_path / "store", activation="relu")
    assert "actions are taken to be its tanh" in store.config["source"]["note"]


def test_the_roles_of_all_tensors_are_said(tmp_path: Path) -> None:
    lines = describe_import([sb3_zip(tmp_path / "m_1.zip", whole("TD3"))])
    said = "layers 3 -> 8 -> 6 -> 2, relu, no log_std, actions are tanh of the mean, rescaled to the action space"
    assert ("policy", said) in lines
    for line in (
        "actor.mu.4.weight (2, 6): the actor's action_net.weight",
        "actor_target.mu.4.weight (2, 6): a target network's",
        "critic.qf1.0.weight (8, 5): a critic's",
        "critic_target.qf1.0.weight (8, 5): a target network's",
    ):
        assert ("tensor", line) in lines
    assert not any("optimizer" in text for label, text in lines if label == "tensor")


def test_a_target_is_never_the_actor(tmp_path: Path) -> None:
    state = whole("TD3")
    own = find_actor(state)
    assert not any("target" in key for key in own.keys)
    changed = {key: it + 1 if "target" in key else it for key, it in state.items()}
    np.testing.assert_array_equal(own.flatten(changed), own.flatten(state))
    same = state | {key.replace("actor.", "actor_target."): state[key] for key in own.keys}  # tied, as nobody saves it
    assert find_actor(same) == own


def without(state: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {key: it for key, it in state.items() if not key.startswith(parts)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without(whole("SAC"), "actor."), r"no floating-point tensor of an actor is there, got the keys \[critic\.qf0"),
        (
            without(whole("TD3"), "actor."),
            r"no floating-point tensor of an actor is there, got the keys \[actor_target",
        ),
        (whole("SAC") | {"actor2.mu.weight": torch.ones(2)}, r"beside the actor of sb3 .* lies \[actor2\.mu\.weight\]"),
        (whole("TD3") | {"actor.extra": torch.ones(2)}, r"beside the actor of sb3 .* lies \[actor\.extra\]"),
        (whole("TD3") | {"actor_old.mu.0.weight": torch.ones(2)}, r"beside the actor of sb3|may be a critic's"),
        (whole("SAC") | {"actor.mu.bias": torch.tensor([0.0, math.nan])}, r"actor\.mu\.bias must be finite, got NaN"),
    ],
)
def test_a_file_without_a_clear_actor_is_refused(state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    sb3_zip(tmp_path / "m_1.zip", state)
    with pytest.raises(ValueError, match=message):
        import_checkpoints([tmp_path / "m_1.zip"], tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "state",
    [
        without(whole("SAC"), "actor.log_std"),
        without(whole("SAC with gSDE"), "actor.log_std"),
        whole("SAC") | {"actor.log_std.weight": torch.ones(1, 6)},
        whole("SAC with gSDE") | {"actor.log_std": torch.ones(2)},
        whole("TD3") | {"actor.log_std": torch.ones(2)},
        whole("TD3") | {"actor.mu.2.weight": torch.ones(6, 9)},
        whole("SAC") | {"actor.features_extractor.0.weight": torch.ones(3, 3)},
    ],
)
def test_a_network_that_is_nearly_one_of_these_is_not_run(state: dict[str, Tensor], tmp_path: Path) -> None:
    store = import_checkpoints([sb3_zip(tmp_path / "m_1.zip", state)], tmp_path / "store")
    assert isinstance(store.policy, ParameterLayout)
    assert "the simulator cannot run these policies: train" in store.config["source"]["note"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.randoms(use_true_random=False), st.integers(1, 4))
def test_no_tensor_of_a_damaged_file_is_left_out_in_silence(kind: str, random: Any, changes: int) -> None:
    """Keys lost, renamed or of other shapes: it is refused, or every tensor but critics' and targets' is in the row."""
    state = damaged(whole(kind), random, changes)
    expected = {key for key in state if not key.startswith(("critic", "actor_target."))}
    try:
        actor = find_actor(state, Settings(mean_limit=1.5))
    except ValueError:
        return
    assert set(actor.keys) == expected
    assert sum(state[key].numel() for key in actor.keys) == actor.policy.num_params == len(actor.flatten(state))


def array(values: Any) -> dict[str, str]:
    return {":type:": "<class 'numpy.ndarray'>", ":serialized:": base64.b64encode(pickle.dumps(values)).decode()}


@pytest.mark.parametrize(
    ("seen", "original", "normalised"),
    [
        (np.ones((1, 3)), np.zeros((1, 3)), False),  # the environment's own float64
        (np.ones((1, 3), np.float32), np.zeros((1, 3)), True),
        (np.ones((1, 3), np.float32), np.zeros((1, 3), np.float32), None),
        (np.ones((1, 3), np.float32), np.ones((1, 3), np.float32), False),  # norm_obs=False
        ({"a": 1}, {"a": 2}, None),
    ],
)
def test_whether_an_off_policy_run_was_normalised(seen: Any, original: Any, normalised: Any, tmp_path: Path) -> None:
    said = {"_last_obs": array(seen), "_last_original_obs": array(original)}
    path = sb3_zip(tmp_path / "m_1.zip", whole("TD3"), **said)
    assert read_checkpoint_file(path).normalised is normalised
    store = import_checkpoints([path], tmp_path / "store")
    assert store.is_unnormalised == (normalised is True)
    note = store.config["source"].get("note", "")
    assert ("do not say whether observations came through VecNormalize" in note) == (normalised is None)
    for broken in ({":serialized:": "not base64"}, {":serialized:": "gASV"}, 3):
        sb3_zip(path, whole("TD3"), **{**said, "_last_obs": broken})
        assert read_checkpoint_file(path).normalised is None
    assert read_checkpoint_file(sb3_zip(path, whole("TD3"))).normalised is False


def test_differences_of_kind_are_named() -> None:
    sac, tanh = spec_of("SAC", 3, 2, (8,)), spec_of("SAC", 3, 2, (8,), "tanh")
    assert differences(sac, tanh) == "the activation is tanh instead of relu"
    clipped, plain = (spec_of(kind, 3, 2, (8,)) for kind in KINDS[2:0:-1])
    assert differences(clipped, plain) == "the limit of the mean is None instead of 1.5"
    ppo = PolicySpec(3, 2, (8,), "relu", gsde=True)
    assert differences(ppo, plain) == "squashing is True instead of False"
    assert differences(sac, ppo).startswith("log_std.weight (2, 8) is missing")


def test_a_description_says_how_the_policy_acts(tmp_path: Path) -> None:
    said = {
        "SAC": "8 -> 6 -> 2, relu, log_std by a layer of its own",
        "SAC with gSDE, clipped": "relu, gSDE, mean clipped to +-2",
        "TD3": "relu, no log_std",
    }
    for kind, text in said.items():
        path = sb3_zip(tmp_path / kind / "m_1.zip", whole(kind))
        store = import_checkpoints([path], tmp_path / f"{kind}.zarr")
        assert describe_store(store)["policy"].endswith(
            f"{text}, actions are tanh of the mean, rescaled to the action space"
        )


def older(path: Path, state: dict[str, Tensor]) -> Store:
    """A recording by a tipl that knew no actor of SAC's."""
    keys = [key for key in state if key.startswith("actor.")]
    layout = ParameterLayout(tuple((key, tuple(state[key].shape)) for key in keys))
    actor = Actor("other", layout, tuple(keys))
    source = {"format": "recorder", "actor": actor.to_dict()}
    with Store.create(path, env_id="E-v0", policy=layout, seeds=[0], config={"source": source}) as store:
        store.append(actor.flatten(state)[None, None], np.array([[5]]), np.array([[math.nan]]))
    return Store.open(path)


@pytest.mark.parametrize("kind", KINDS)
def test_recordings_of_an_older_tipl_go_on_and_are_exported(kind: str, tmp_path: Path) -> None:
    old = older(tmp_path / "old", whole(kind, 0))
    with Recorder(old.path, env_id="E-v0", resume=True) as recorder:
        assert recorder.holds(whole(kind, 0))
        recorder.log(whole(kind, 1), env_steps=6)
    assert Store.open(old.path).num_checkpoints == 2
    like = sb3_zip(tmp_path / "like_1.zip", whole(kind, 2))
    written = read_checkpoint_file(export_checkpoint(old.path, like, tmp_path / "out.zip")).state
    for key, it in written.items():
        assert torch.equal(it, whole(kind, 1 if key.startswith("actor.") else 2)[key])


def test_a_layout_of_other_weights_is_not_exported_into_an_actor(tmp_path: Path) -> None:
    sac, td3 = (sb3_zip(tmp_path / f"{kind}_1.zip", whole(kind)) for kind in ("SAC", "TD3"))
    store = import_checkpoints([sac], tmp_path / "store")
    with pytest.raises(ValueError, match=r"does not fit the weights: log_std\.weight \(2, 6\) is missing"):
        export_checkpoint(store.path, td3, tmp_path / "out.zip")
    clipped, otherwise = (
        sb3_zip(tmp_path / f"clip{limit}_1.zip", whole(KINDS[2]), policy_kwargs={"clip_mean": limit})
        for limit in (1.0, 3.0)
    )
    gsde = import_checkpoints([clipped], tmp_path / "gsde")
    with pytest.raises(ValueError, match=r"does not fit the weights: the limit of the mean is 3\.0 instead of 1\.0"):
        export_checkpoint(gsde.path, otherwise, tmp_path / "out.zip")
    torch.save(whole(KINDS[2], 3), tmp_path / "bare.pt")  # which does not say its limit
    written = read_checkpoint_file(export_checkpoint(gsde.path, tmp_path / "bare.pt", tmp_path / "out.pt")).state
    for key, it in written.items():
        assert torch.equal(it, whole(KINDS[2], 0 if key.startswith("actor.") else 3)[key])
    tanh = {"activation_fn": "<class 'torch.nn.modules.activation.Tanh'>"}
    other = sb3_zip(tmp_path / "tanh_1.zip", whole("SAC"), policy_kwargs=tanh)
    with pytest.raises(ValueError, match="does not fit the weights: the activation is tanh instead of relu"):
        export_checkpoint(store.path, other, tmp_path / "out.zip")
