"""Import guesses nothing: what could be read in two ways is refused with a way to choose, or said in a note."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_checkpoints import ACT_DIM, OBS_DIM, CleanRL, RslRl, ppo_zip, prefixed, sb3_zip
from torch import Tensor, nn

from tipl.policy import ParameterLayout, PolicySpec
from tipl.storing.exporter import export_checkpoint
from tipl.storing.foreign_actors import find_actor
from tipl.storing.foreign_files import find_actor_in, read_checkpoint_file
from tipl.storing.importer import describe_first_file, describe_import, import_checkpoints
from tipl.storing.recorder import Recorder
from tipl.storing.store import Store


def mlp(prefix: str, *sizes: int, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        state[f"{prefix}{2 * i}.weight"] = torch.randn(fan_out, fan_in)
        state[f"{prefix}{2 * i}.bias"] = torch.randn(fan_out)
    return state


def save(content: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


ACTOR, CRITIC = mlp("", 3, 8, 2), mlp("", 3, 8, 1, seed=1)
NETWORKS: dict[str, tuple[Any, str, str | tuple[str, ...], list[str]]] = {
    # name: content, what is said, what to choose, the parameters then
    "loose tensor beside nested states": (
        {"log_alpha": torch.ones(1), "actor": ACTOR, "critic": CRITIC},
        r"it holds actor \(4 tensors\), the loose tensor log_alpha, and it is not clear which is the policy's",
        "actor.",
        [f"actor.{key}" for key in ACTOR],
    ),
    "statistics beside a known state": (
        {"model_state_dict": ACTOR, "obs_mean": torch.ones(3)},
        r"it holds model_state_dict \(4 tensors\), the loose tensor obs_mean",
        "model_state_dict.",
        [f"model_state_dict.{key}" for key in ACTOR],
    ),
    "two known states": (
        {"model_state_dict": ACTOR, "state_dict": CRITIC},
        r"it holds model_state_dict \(4 tensors\), state_dict \(4 tensors\)",
        "model_state_dict.",
        [f"model_state_dict.{key}" for key in ACTOR],
    ),
    "a state under a name of its own": (
        {"policy": {"net": ACTOR}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        r"it holds policy \(4 tensors\), and it is not clear which is the policy's",
        "policy.net.",
        [f"policy.net.{key}" for key in ACTOR],
    ),
    "a tuple of states that is not CleanRL's": (
        (CRITIC, ACTOR),
        r"it holds 0 \(4 tensors\), 1 \(4 tensors\)",
        "1.",
        [f"1.{key}" for key in ACTOR],
    ),
    "critic behind a prefix that not all share": (
        prefixed("agent.actor.", ACTOR) | prefixed("agent.critic.", CRITIC) | mlp("encoder.", 3, 3),
        r"\[agent\.critic\.0\.weight, .*\] may be a critic's or another network's",
        "agent.actor.",
        [f"agent.actor.{key}" for key in ACTOR],
    ),
    "Q networks": (
        prefixed("pi.", ACTOR) | prefixed("q1.", CRITIC) | prefixed("q2.", CRITIC),
        r"\[q1\.0\.weight, .*\] may be a critic's",
        "pi.",
        [f"pi.{key}" for key in ACTOR],
    ),
    "value head on a shared trunk": (
        prefixed("trunk.", ACTOR) | {"pi_head.weight": torch.ones(2, 2), "v_head.weight": torch.ones(1, 2)},
        r"\[v_head\.weight\] may be a critic's",
        ("trunk.", "pi_head."),
        [*(f"trunk.{key}" for key in ACTOR), "pi_head.weight"],
    ),
    "old policy": (
        prefixed("policy.", ACTOR) | prefixed("policy_old.", mlp("", 3, 8, 2, seed=2)),
        r"\[policy_old\.0\.weight, .*\] may be a critic's or another network's",
        "policy.",
        [f"policy.{key}" for key in ACTOR],
    ),
    "two actors": (
        prefixed("agents.a.", ACTOR) | prefixed("agents.b.", mlp("", 3, 8, 2, seed=2)),
        "a and b are two networks of equal shapes",
        "agents.b.",
        [f"agents.b.{key}" for key in ACTOR],
    ),
    "statistics beside CleanRL's actor": (
        CleanRL().state_dict() | {"obs_stats.mean": torch.ones(OBS_DIM)},
        r"beside the actor of cleanrl \(.*\) lies \[obs_stats\.mean\]",
        ("actor_mean.", "actor_logstd"),
        list(PolicySpec(OBS_DIM, ACT_DIM, (8, 8)).shapes),
    ),
    "actors of two libraries": (
        CleanRL().state_dict() | {"log_std": torch.ones(ACT_DIM)} | mlp("actor.", OBS_DIM, 8, ACT_DIM),
        r"beside the actor of cleanrl \(.*\) lies \[log_std, actor\.0\.weight, ",
        ("log_std", "actor."),
        list(PolicySpec(OBS_DIM, ACT_DIM, (8,)).shapes),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_what_may_hold_more_than_an_actor_is_refused_until_one_is_chosen(name: str, tmp_path: Path) -> None:
    content, message, actor, parameters = NETWORKS[name]
    path = save(content, tmp_path / "model_1.pt")
    with pytest.raises(ValueError, match=rf"model_1\.pt: .*{message}.*: choose with actor \(--actor\) the beginnings"):
        import_checkpoints([path], tmp_path / "store")
    assert not (tmp_path / "store").exists()
    store = import_checkpoints([path], tmp_path / "store", actor=actor, activation="tanh")
    assert list(store.policy.shapes) == parameters
    row = store.trial(0).weights()[0]
    written = export_checkpoint(row + 1, path, tmp_path / "out.pt", actor=actor)
    again = import_checkpoints([written], tmp_path / "again", actor=actor, activation="tanh")
    assert (again.trial(0).weights()[0] == row + 1).all()
    # A forecast of the store knows the keys by itself.
    export_checkpoint(store.path, path, tmp_path / "own.pt")
    everything = import_checkpoints([path], tmp_path / "everything", actor="", activation="tanh")
    assert everything.policy.num_params >= store.policy.num_params


def test_what_is_no_weight_can_be_left_out(tmp_path: Path) -> None:
    content = ACTOR | {"obs_rms.mean": torch.ones(3), "obs_rms.var": torch.ones(3), "log_alpha": torch.ones(1)}
    path = save(content, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"\[obs_rms.mean, obs_rms.var, log_alpha\] may be statistics .*as ignore"):
        import_checkpoints([path], tmp_path / "store")
    with pytest.raises(ValueError, match=r"m\.pt: ignore 'rms\.\*' matches none of its tensors$"):
        import_checkpoints([path], tmp_path / "store", ignore="rms.*")
    store = import_checkpoints([path], tmp_path / "store", ignore=["obs_rms.*", "log_alpha"])
    assert list(store.policy.shapes) == list(ACTOR)
    after = export_checkpoint(store.trial(0).weights()[0] + 1, path, tmp_path / "out.pt", actor=("0.", "2."))
    assert torch.equal(torch.load(after)["obs_rms.mean"], torch.ones(3))
    assert torch.equal(torch.load(after)["2.bias"], ACTOR["2.bias"] + 1)


def test_the_recorder_is_told_the_same_way(tmp_path: Path) -> None:
    agent = nn.ModuleDict({"net": nn.ModuleDict({"pi": nn.Linear(3, 2), "vf": nn.Linear(3, 1)})})
    with (
        Recorder(tmp_path / "run") as recorder,
        pytest.raises(ValueError, match=r"policy: \[net\.vf\.weight, net\.vf\.bias\]"),
    ):
        recorder.log(agent, env_steps=0)
    for resume in (False, True):
        with Recorder(tmp_path / "run", actor="net.pi.", resume=resume) as recorder:
            recorder.log(agent, env_steps=int(resume))
    assert list(Store.open(tmp_path / "run").policy.shapes) == ["net.pi.weight", "net.pi.bias"]
    with pytest.raises(ValueError, match=r"no floating-point tensor of an actor whose key begins with pi\. is there"):
        find_actor(agent.state_dict(), actor="pi.")


@pytest.mark.parametrize(
    "state",
    [
        prefixed("q_net.", ACTOR) | prefixed("q_net_target.", ACTOR),  # SB3's DQN
        {**mlp("features_extractor.", 3, 8), "log_std": torch.ones(2), **mlp("mlp_extractor.policy_net.", 8, 8),
         "action_net.weight": torch.ones(2, 8), "action_net.bias": torch.ones(2), "lstm_critic.weight": torch.ones(2)},
        prefixed("encoder.", mlp("", 3, 8)) | prefixed("actor.", ACTOR) | prefixed("aux_critic.", CRITIC),
        mlp("actor.fusion.", 3, 8) | mlp("actor.goals.", 8, 2) | mlp("critic.fusion.", 3, 1),
        {f"zork{i}.weight": torch.ones(3, 3) for i in range(3)},
        {f"{it}.weight": torch.ones(8, 8) for it in ("affine1", "hidden_layer", "action_mean", "log_std_linear")},
        mlp("preprocess.model.model.", 3, 8) | mlp("mu.model.", 8, 2) | {"sigma_param": torch.ones(2, 1)},  # Tianshou
        mlp("pi.net.", 3, 8) | {f"pi.{it}_layer.weight": torch.ones(2, 8) for it in ("mu", "log_std")},  # Spinning Up
        {f"{it}.weight": torch.ones(8, 8) for it in ("fc1", "fc2", "fc_mean", "fc_logstd")}
        | {f"action_{it}": torch.ones(1, 2) for it in ("scale", "bias")},  # CleanRL's SAC
        {f"block{i}.{key}": tensor for i in range(2) for key, tensor in mlp("", 8, 8, 8).items()},
        {f"h.{i}.{name}.weight": torch.ones(8, 8) for i in range(2) for name in ("query", "key", "value")},
        {"std": torch.ones(2), **mlp("actor.", 3, 8, 2), **{f"memory_{it}.rnn": torch.ones(3) for it in "ac"}},
    ],
)  # fmt: skip
def test_what_is_one_network_needs_no_choice(state: dict[str, Tensor]) -> None:
    actor = find_actor(state)
    assert actor.kind == "other"
    assert not any("critic" in key or "target" in key or "memory_c" in key for key in actor.keys)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "agent.", "module._orig_mod.", "actor_critic.", "a.b."])
@pytest.mark.parametrize("library", ["cleanrl", "rsl_rl 3", "rsl_rl 5", "sb3"])
def test_a_prefix_of_all_keys_changes_nothing(library: str, wrapper: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {} if library == "sb3" else {"activation": "elu"}
    for start in ("", wrapper):
        path = tmp_path / f"model_1.{'zip' if library == 'sb3' else 'pt'}"
        if library == "sb3":
            state = read_checkpoint_file(ppo_zip(path, 5)).state
            sb3_zip(path, prefixed(start, state), num_timesteps=5)
        elif library == "cleanrl":
            save(prefixed(start, dict(CleanRL().state_dict())), path)
        else:
            content = RslRl().release_3() if library == "rsl_rl 3" else RslRl().release_5()
            name = "model_state_dict" if library == "rsl_rl 3" else "actor_state_dict"
            save(content | {name: prefixed(start, content[name])}, path)
        store = import_checkpoints([path], tmp_path / f"store{start}", **arguments)
        if not start:
            plain = store
    assert store.policy == plain.policy
    assert isinstance(store.policy, PolicySpec)
    assert (store.trial(0).weights() == plain.trial(0).weights()).all()
    assert store.config["source"].get("note") == plain.config["source"].get("note")
    row = store.trial(0).weights()[0]
    written = export_checkpoint(store.path, path, tmp_path / f"out{path.suffix}")
    again = import_checkpoints([written], tmp_path / "again", **arguments)
    np.testing.assert_allclose(again.trial(0).weights()[0], row, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("actor", "critic"),
    [("Actor", "Critic"), ("actor", "CRITIC"), ("policy", "criticNet"), ("pi", "critic_1"), ("Policy", "TwinCritic")],
)
def test_a_critic_in_any_case_is_left_out(actor: str, critic: str, tmp_path: Path) -> None:
    path = save(prefixed(f"{actor}.", ACTOR) | prefixed(f"{critic}.", CRITIC), tmp_path / "m_1.pt")
    store = import_checkpoints([path], tmp_path / "store")
    assert list(store.policy.shapes) == [f"{actor}.{key}" for key in ACTOR]
    roles = dict(text.split(": ") for label, text in describe_import([path]) if label == "tensor")
    assert {role for key, role in roles.items() if key.startswith(critic)} == {"a critic's"}


@pytest.mark.parametrize(
    ("actor", "other", "groups"),
    [
        ("policy.", "dynamics.", r"\[policy\., dynamics\.\] have layers of their own, and .* \[dynamics\.\] is the"),
        ("generator.", "disc.", r"\[generator\., disc\.\] have layers of their own"),
        ("net.", "mlp.", r"\[net\., mlp\.\] may each be the actor"),
        ("policy.", "model.", r"\[policy\., model\.\] may each be the actor"),
        ("policy.", "head_target.", r"\[head_target\.0\.weight, .*\] may be a critic's or another network's"),
        ("policy.", "critic_free_head.", r"\[critic_free_head\.0\.weight, .*\] may be a critic's or another network's"),
    ],
)
def test_networks_of_other_names_are_refused_and_can_be_chosen(
    actor: str, other: str, groups: str, tmp_path: Path
) -> None:
    path = save(prefixed(actor, ACTOR) | prefixed(other, CRITIC), tmp_path / "m_1.pt")
    with pytest.raises(ValueError, match=rf"m_1\.pt: {groups}.*\(--actor\).*\(--ignore\)$"):
        import_checkpoints([path], tmp_path / "store")
    chosen = import_checkpoints([path], tmp_path / "chosen", actor=actor)
    left = import_checkpoints([path], tmp_path / "left", ignore=f"{other}*")
    starred = import_checkpoints([path], tmp_path / "starred", actor=f"{actor}*")
    for store in (chosen, left, starred):
        assert list(store.policy.shapes) == [f"{actor}{key}" for key in ACTOR]
    row = starred.trial(0).weights()[0]
    after = torch.load(export_checkpoint(row + 1, path, tmp_path / "out.pt", actor=f"{actor}*"))
    assert torch.equal(after[f"{actor}2.bias"], ACTOR["2.bias"] + 1)
    assert torch.equal(after[f"{other}2.bias"], CRITIC["2.bias"])


def test_layers_in_the_order_of_the_alphabet_are_one_network(tmp_path: Path) -> None:
    """As in safetensors."""
    layers = {"action_out": (2, 8), "fc1": (8, 3), "fc10": (8, 5), "fc2": (5, 8)}
    for names in (["action_out", "fc1", "fc2", "fc10"], ["fc1", "fc10", "fc2"]):
        state = {f"{name}.weight": torch.ones(layers[name]) for name in sorted(names)}
        assert len(find_actor(state).keys) == len(names)
        with pytest.raises(ValueError, match="it may be another head or begin another network"):
            find_actor(state | {"fc3.weight": torch.ones(1, 3)})


def test_names_of_many_parts_are_no_trouble() -> None:
    state = {f"fc{i}." + "1." * 20000 + "weight": torch.ones(3, 3) for i in range(2)}
    assert len(find_actor(state).keys) == 2


def test_two_networks_behind_a_prefix_called_actor_are_refused(tmp_path: Path) -> None:
    path = save(prefixed("actor.pi.", ACTOR) | prefixed("actor.zork.", CRITIC), tmp_path / "m_1.pt")
    with pytest.raises(
        ValueError, match=r"\[actor\.zork\.\] is the actor's: choose .* some of \[actor\.pi\., actor\.zork\.\]"
    ):
        import_checkpoints([path], tmp_path / "store")


def test_a_second_head_is_refused(tmp_path: Path) -> None:
    """As in minimalRL, and where the names of the heads say nothing."""
    trunk = mlp("fc.", 3, 8)
    for pi, v in (("fc_pi", "fc_v"), ("out1", "out2"), ("fc2", "fc3"), ("head", "tail")):
        heads = {f"{name}.weight": torch.ones(size, 8) for name, size in ((pi, 2), (v, 1))}
        path = save(trunk | heads, tmp_path / "m_1.pt")
        with pytest.raises(ValueError, match=rf"m_1\.pt: .*{v}.*choose with actor"):
            import_checkpoints([path], tmp_path / "store")
        store = import_checkpoints([path], tmp_path / pi, actor=["fc.", f"{pi}."])
        assert list(store.policy.shapes) == ["fc.0.weight", "fc.0.bias", f"{pi}.weight"]


def test_an_actor_critic_can_be_chosen(tmp_path: Path) -> None:
    """A container of both is neither a critic nor out of sight."""
    agent, encoder = dict(CleanRL().state_dict()), mlp("enc.", 3, 8, 3)
    for name in ("actor_critic_state_dict", "actor_critic", "ActorCritic"):
        for beside in ({"encoder": encoder}, {"target_state_dict": agent}, {}):
            path = save({name: agent, **beside, "optimizer": {}}, tmp_path / "m_1.pt")
            with pytest.raises(ValueError, match=rf"it holds {name} \(\d+ tensors\).*some of \[{name}\."):
                import_checkpoints([path], tmp_path / "none", activation="tanh")
            store = tmp_path / f"{name}{list(beside)}"
            policy = import_checkpoints([path], store, actor=f"{name}.", activation="tanh").policy
            assert policy == PolicySpec(OBS_DIM, ACT_DIM, (8, 8))


def test_the_table_has_a_part_for_each_tensor(tmp_path: Path) -> None:
    state = prefixed("m.pi.", ACTOR) | prefixed("m.Critic.", CRITIC) | prefixed("m.pi_old.", ACTOR)
    state |= {"m.optimizer.exp_avg": torch.ones(3), "m.steps": torch.tensor(3), "m.return_rms.mean": torch.ones(1)}
    state |= prefixed("m.critic_free.", CRITIC) | {"m.obs_mean": torch.ones(3)} | prefixed("m.zork.", CRITIC)
    path = save({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "m_1.pt")
    with pytest.raises(ValueError, match=r"m_1\.pt: \[m\.pi_old\.0\.weight"):
        describe_import([path])
    expected = {
        "m.pi": "the actor's",
        "m.Critic": "a critic's",
        "m.pi_old": "a target network's",
        "m.optimizer": "an optimiser's",
        "m.steps": "a buffer's, such as a counter",
        "m.return_rms": "statistics of returns or rewards",
        "m.critic_free": "unknown, not chosen",
        "m.obs_mean": "statistics or a temperature, not chosen",
        "m.zork": "not chosen",
    }
    for lines in (describe_import([path], actor="m.pi."), describe_first_file([path])):
        for label, text in lines:
            if label == "tensor":
                key, _, role = text.partition(": ")
                group = ".".join(key.split(" ")[0].split(".")[:2])
                is_chosen = len(lines) > len(state) + 1
                assert role == (expected[group] if is_chosen or group != "m.pi" else "not chosen")


def test_a_long_prefix_may_hold_a_critic_too(tmp_path: Path) -> None:
    """What lies behind the prefix chosen is a critic's by its name, or asked about."""
    state = prefixed("agent.pi.", ACTOR) | prefixed("agent.vf.", CRITIC) | mlp("encoder.", 3, 3)
    path = save(state, tmp_path / "m_1.pt")
    store = import_checkpoints([path], tmp_path / "store", actor="agent.")
    assert list(store.policy.shapes) == [f"agent.pi.{key}" for key in ACTOR]
    path = save(prefixed("agent.", ACTOR) | prefixed("agent.critic_free.", CRITIC), tmp_path / "m_1.pt")
    for actor in ("", "agent."):
        with pytest.raises(ValueError, match=r"m_1\.pt: agent\.critic_free\.0\.weight may be a critic's .*longer"):
            import_checkpoints([path], tmp_path / "none", actor=actor)
    own = import_checkpoints([path], tmp_path / "own", actor=["agent.0.", "agent.2.", "agent.critic_free."])
    assert len(own.policy.shapes) == len(ACTOR) + len(CRITIC)


EXPANDED = torch.ones(1).expand(10**15)
FLAT = torch.zeros(20)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.eye(3).to_sparse()}, r"w is sparse \(torch\.sparse_coo\)"),
        ({"w": torch.empty(3, device="meta")}, r"w is on the device meta: it has a shape, \(3,\), but no values"),
        ({"w": EXPANDED}, r"w repeats its memory: it has fewer numbers than its shape \(1000000000000000,\)"),
        ({"w": torch.ones(3, dtype=torch.complex64)}, r"w is torch\.complex64: a row holds real floating-point"),
        (
            {"0.weight": torch.ones(3, dtype=torch.int8), "b": torch.ones(2)},
            r"0\.weight is torch\.int8: a row holds real",
        ),
        ({"a": FLAT[:10], "b": FLAT[5:]}, "a and b share memory but are not equal"),
        ({"a": (w := torch.randn(2, 3)), "b": w.T}, "a and b share memory but are not equal"),
    ],
)
def test_tensors_that_no_row_can_hold_are_refused(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_actor(state)


def test_disjoint_views_and_counters_are_read() -> None:
    state = {
        "a": FLAT[:10],
        "b": FLAT[10:],
        "num_batches_tracked": torch.tensor(3),
        "mask": torch.ones(2, dtype=torch.bool),
    }
    assert find_actor(state).policy == ParameterLayout((("a", (10,)), ("b", (10,))))


def test_numbers_beyond_a_type_are_not_called_infinite(tmp_path: Path) -> None:
    state = {"w": torch.tensor([1.0, -1e300], dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"w must fit float32, got 1e\+300"):
        find_actor(state).flatten(state)
    half = save({"w": torch.ones(2).half()}, tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"w is torch\.float16, which cannot hold 100000"):
        export_checkpoint(torch.tensor([1e5, 0]).numpy(), half, tmp_path / "out.pt")


@pytest.mark.parametrize("value", [-0.01, 0.0])
def test_a_standard_deviation_must_be_positive(value: float, tmp_path: Path) -> None:
    content = RslRl().release_5()
    content["actor_state_dict"]["distribution.std_param"][1] = value
    path = save(content, tmp_path / "model_3.pt")
    with pytest.raises(ValueError, match=rf"model_3\.pt: distribution\.std_param must be positive, .* got {value:g}"):
        import_checkpoints([path], tmp_path / "store", activation="elu")


OWN_CLASS = {"policy_class": {":type:": "<class 'abc.ABCMeta'>", ":serialized:": "AA==", "__module__": "__main__"}}
SB3_CLASS = {"policy_class": {"__module__": "stable_baselines3.common.policies"}}
KWARGS = {":type:": "<class 'dict'>", ":serialized:": "AA=="}


def test_the_activation_of_an_own_policy_class_is_asked_for(tmp_path: Path) -> None:
    path = ppo_zip(tmp_path / "x.zip", **OWN_CLASS)
    with pytest.raises(
        ValueError, match=r"x\.zip: its policy is of a class of its own, from __main__, .*: pass activation"
    ):
        import_checkpoints([path], tmp_path / "store")
    assert import_checkpoints([path], tmp_path / "store", activation="relu").policy == PolicySpec(3, 1, (8, 8), "relu")
    said = {"policy_kwargs": KWARGS | {"activation_fn": "<class 'torch.nn.modules.activation.ELU'>"}}
    path = ppo_zip(tmp_path / "y.zip", **OWN_CLASS | said)
    assert find_actor_in(path, read_checkpoint_file(path)).policy == PolicySpec(3, 1, (8, 8), "elu")
    path = ppo_zip(tmp_path / "z.zip", **SB3_CLASS)
    assert find_actor_in(path, read_checkpoint_file(path), "relu").policy == PolicySpec(3, 1, (8, 8), "tanh")
    for other in ("<class 'own.Tanh'>", "functools.partial(<class 'torch.nn.modules.activation.ELU'>, alpha=0.5)"):
        path = ppo_zip(tmp_path / "other.zip", policy_kwargs=KWARGS | {"activation_fn": other})
        assert find_actor_in(path, read_checkpoint_file(path)).kind == "other"


def test_an_activation_that_no_file_says_is_asked_for(tmp_path: Path) -> None:

    files = {"tanh": CleanRL().state_dict(), "elu": RslRl().release_5()}
    for default, content in files.items():
        path = save(content, tmp_path / f"{default}.pt")
        message = rf"^import: .*{default}\.pt: activation must be given, one of tanh, .* default is {default}$"
        with pytest.raises(ValueError, match=message):
            import_checkpoints([path], tmp_path / "none")
        assert not (tmp_path / "none").exists()
    assert import_checkpoints([path], tmp_path / "relu", activation="relu").policy.activation == "relu"
    weights_only = save({"w": torch.zeros(3, 2)}, tmp_path / "w.pt")
    import_checkpoints([weights_only], tmp_path / "weights")  # which nothing runs


def test_what_is_lost_is_in_the_note(tmp_path: Path) -> None:
    def note(path: Path, **arguments: Any) -> str:
        name = f"store{len(list(tmp_path.glob('store*')))}"
        return str(import_checkpoints([path], tmp_path / name, **arguments).config["source"].get("note", ""))

    cleanrl, rsl_rl = save(CleanRL().state_dict(), tmp_path / "a.pt"), save(RslRl().release_5(), tmp_path / "b.pt")
    assert "does not save the statistics" in note(cleanrl, activation="tanh")
    assert "activation" not in note(rsl_rl, activation="elu")
    assert note(ppo_zip(tmp_path / "plain.zip", **SB3_CLASS)) == ""
    extractor = {"policy_kwargs": KWARGS | {"features_extractor_class": "<class 'own.Scaled'>"}}
    assert "features extractor of the run's own, <class 'own.Scaled'>" in note(ppo_zip(tmp_path / "e.zip", **extractor))


def test_notes_of_all_trials_are_kept(tmp_path: Path) -> None:
    one = ppo_zip(tmp_path / "one" / "m_1.zip", 1)
    other = ppo_zip(tmp_path / "other" / "m_1.zip", 1, _last_original_obs={})
    stores = [import_checkpoints([path], tmp_path / f"store{i}").path for i, path in enumerate((one, other))]
    assert "VecNormalize" in import_checkpoints(stores, tmp_path / "joined").config["source"]["note"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["seed3_model_10.pt", "seed4_model_20.pt"],
            "names differ in several numbers, like seed3_model_10.pt and seed4_",
        ),
        (["s1_100_steps.pt", "s2_200_steps.pt"], "names differ in several numbers"),
        (["s1_100_steps.pt", "s2_100_steps.pt"], "names differ in a number that does not look like a step"),
        (
            ["seed1.pt", "seed2.pt"],
            "names differ in a number that does not look like a step, like seed1.pt and seed2.pt",
        ),
        (["actor_10.pt", "critic_10.pt"], "actor_10.pt and critic_10.pt are named differently"),
        (["model_10.pt", "model_10.pth"], "model_10.pt and model_10.pth are named differently"),
        (["model_1k.pt", "model_2k.pt"], "the step in model_1k.pt must be a whole number, got 1k"),
        (["model_0.5.pt", "model_0.10.pt"], r"the step in model_0\.10\.pt must be a whole number, got 0\.10"),
        (["model_1e5.pt", "model_1e6.pt"], "the step in model_1e5.pt must be a whole number, got 1e5"),
        (["m_1.pt", "m_99999999999999999999.pt"], r"the step in m_9+\.pt must be below 2\^63"),
        (["model_10_7.pt"], r"neither its name nor the file says the step: say with order \(--order\) which number"),
    ],
)
def test_names_whose_step_is_not_clear_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        save({"w": torch.ones(2)}, tmp_path / "run" / name)
    with pytest.raises(ValueError, match=message):
        import_checkpoints([tmp_path / "run"], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def env_steps(sources: list[Path], output: Path, **arguments: Any) -> tuple[list[int], str]:
    store = import_checkpoints(sources, output, **arguments)
    return store.trial(0).env_steps.tolist(), store.config["source"]["note"]


def test_a_pattern_says_which_number_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("r12.5_iter_20_a.pt", "r3.5_iter_3_b.pt"):
        save({"w": torch.ones(2)}, run / name)
    assert env_steps([run], tmp_path / "a", order=r"iter_([0-9]+)")[0] == [3, 20]
    assert env_steps([run], tmp_path / "b", order=r"(?<=iter_)\d+")[0] == [3, 20]
    for pattern, message in (
        ("(", r"order must be step, stated, name, mtime or a regular expression, got '\('"),
        ("nothing", r"order 'nothing' finds no step in r12\.5_iter_20_a\.pt"),
        ("r([0-9.]+)", r"the step in r12\.5_iter_20_a\.pt must be a whole number, got 12\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            import_checkpoints([run], tmp_path / "out", order=pattern)


def test_one_file_of_a_versioned_task_has_no_step_in_its_name(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "ppo-Hopper-v4.pt")
    assert env_steps([path], tmp_path / "store")[0] == [0]


def test_files_without_numbers_are_taken_as_they_are_given(tmp_path: Path) -> None:
    files = [
        save({"w": torch.full((1,), float(i))}, tmp_path / f"{name}.pt") for i, name in enumerate(("first", "best"))
    ]
    store = import_checkpoints(files, tmp_path / "store")
    assert store.trial(0).weights()[:, 0].tolist() == [0, 1]
    assert "the files are taken in the order of their names" in store.config["source"]["note"]


@pytest.mark.parametrize(
    ("named", "said", "expected", "note"),
    [
        ([64, 128, 192], [64, 64, 64], [64, 128, 192], "which does not grow"),  # learn() anew, three times
        ([512, 576, 640], [512, 64, 64], [512, 576, 640], "which does not grow"),
        (
            [1, 2, 3],
            [2048, 4096, 6144],
            [2048, 4096, 6144],
            "what the files say (num_timesteps), 2048 to 6144, not the",
        ),
        ([64, 128], [64, 128], [64, 128], ""),
    ],
)
def test_sb3s_num_timesteps_count_where_they_grow(
    named: list[int], said: list[int], expected: list[int], note: str, tmp_path: Path
) -> None:
    for name, steps in zip(named, said, strict=True):
        ppo_zip(tmp_path / "run" / f"ppo_{name}.zip", steps, **SB3_CLASS)
    store = import_checkpoints([tmp_path / "run"], tmp_path / "store")
    assert store.trial(0).env_steps.tolist() == expected
    written = store.config["source"].get("note", "")
    assert bool(written) == bool(note)
    assert note in written


@pytest.mark.parametrize("said", [[0, 0, 0, 150], [0, 0, 0, 0], [1, 2, 3, 4]])
def test_rsl_rls_names_count_where_iter_is_another(said: list[int], tmp_path: Path) -> None:
    """rsl_rl 1.0.2 writes where learn() began into all but the last file."""
    for name, steps in zip((0, 50, 100, 150), said, strict=True):
        save(RslRl().release_3() | {"iter": steps}, tmp_path / "run" / f"model_{name}.pt")
    steps, note = env_steps([tmp_path / "run"], tmp_path / "store", activation="elu")
    assert steps == [0, 50, 100, 150]
    assert f"not what the files say (iter), {said[0]} to {said[-1]}" in note


def test_files_go_by_name_or_by_time_where_asked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for i, name in enumerate(("seed1_b_7", "seed2_a_9", "seed1_c")):
        save({"w": torch.full((2,), float(i))}, run / f"{name}.pt")
        os.utime(run / f"{name}.pt", ns=(0, 10**9 * (3 - i)))
    for order, rows in (("name", [0, 2, 1]), ("mtime", [2, 1, 0])):
        store = import_checkpoints([run], tmp_path / order, order=order)
        assert store.trial(0).weights()[:, 0].tolist() == rows
        assert store.trial(0).env_steps.tolist() == [0, 1, 2]
        assert "indices: the files are taken in the order of their" in store.config["source"]["note"]
    os.utime(run / "seed1_c.pt", ns=(0, 3 * 10**9))
    with pytest.raises(ValueError, match=r"seed1_b_7\.pt and seed1_c\.pt were modified at the same moment"):
        import_checkpoints([run], tmp_path / "none", order="mtime")
    for i, steps in enumerate((30, 20)):  # what the files say must agree
        ppo_zip(tmp_path / "said" / f"{i}_{9 - i}.zip", steps)
    with pytest.raises(ValueError, match=r"says that it is of step 20, but comes after .* of step 30"):
        import_checkpoints([tmp_path / "said"], tmp_path / "none", order="name")


@pytest.mark.parametrize("steps", [-5, 2**63, True, "12"])
def test_steps_in_files_must_be_steps(steps: Any, tmp_path: Path) -> None:
    path = ppo_zip(tmp_path / "m_7.zip", steps)
    if isinstance(steps, int) and not isinstance(steps, bool):
        with pytest.raises(RuntimeError, match=rf"m_7\.zip says num_timesteps {steps}, which must lie in \[0, 2\^63\)"):
            import_checkpoints([path], tmp_path / "store")
    else:
        assert import_checkpoints([path], tmp_path / "store").trial(0).env_steps.tolist() == [7]


def test_a_template_of_another_activation_is_refused_for_imported_runs_too(tmp_path: Path) -> None:
    store = import_checkpoints([ppo_zip(tmp_path / "m_1.zip")], tmp_path / "store")
    relu = KWARGS | {"activation_fn": "<class 'torch.nn.modules.activation.ReLU'>"}
    with pytest.raises(ValueError, match="the activation is relu instead of tanh"):
        export_checkpoint(store.path, ppo_zip(tmp_path / "relu.zip", policy_kwargs=relu), tmp_path / "out.zip")


def test_logs_beside_a_state_are_not_asked_about(tmp_path: Path) -> None:
    """Statistics are as many as a layer has inputs."""
    content = {"model_state_dict": ACTOR, "approx_kl": [0.1, 0.2], "fps": [1.5] * (OBS_DIM + 1)}
    path = save(content, tmp_path / "m_1.pt")
    row = import_checkpoints([path], tmp_path / "store", activation="tanh").trial(0).weights()[0]
    export_checkpoint(row + 1, path, tmp_path / "out.pt")
    content["zork"] = [0.5] * next(iter(ACTOR.values())).shape[1]
    save(content, path)
    with pytest.raises(ValueError, match=r"its entry zork may hold statistics of observations, .* pass 'zork' as igno"):
        import_checkpoints([path], tmp_path / "asked", activation="tanh")
    export_checkpoint(row + 1, path, tmp_path / "again.pt")  # which leaves it as it is


def test_a_recurrent_network_may_lie_between_two_layers(tmp_path: Path) -> None:
    gru = {f"gru.{key}": it.detach() for key, it in nn.GRU(8, 4).state_dict().items()}
    state = mlp("fc1.", 3, 8) | gru | mlp("fc2.", 4, 2)
    state = {key.replace(".0.", "."): it for key, it in state.items()}
    store = import_checkpoints([save(state, tmp_path / "m_1.pt")], tmp_path / "store")
    assert list(store.policy.shapes) == list(state)


@pytest.mark.parametrize("name", ["layers", "blocks", "h"])
def test_two_networks_in_one_list_of_layers_are_asked_about(name: str, tmp_path: Path) -> None:
    layers = [mlp("", *sizes) for sizes in ((11, 64), (64, 3), (11, 64), (64, 1))]
    state = {f"{name}.{i}.{key.removeprefix('0.')}": it for i, layer in enumerate(layers) for key, it in layer.items()}
    with pytest.raises(ValueError, match="it may be another head or begin another network"):
        import_checkpoints([save(state, tmp_path / "m_1.pt")], tmp_path / "store")


def test_an_actor_chosen_without_what_may_be_its_statistics_is_not_judged(tmp_path: Path) -> None:
    for name in ("obs_mean", "normalizer.mean"):
        state = prefixed("model.", CleanRL().state_dict()) | {name: torch.ones(OBS_DIM)}
        path = save(state, tmp_path / f"{name}_1.pt")
        chosen = {"actor": "model.", "activation": "tanh"}
        store = import_checkpoints([path], tmp_path / name, **chosen)
        assert f"{name}, which the actor chosen leaves out, may be of" in store.config["source"]["unnormalised"]
        again = import_checkpoints([path], tmp_path / f"{name}2", ignore=f"{name.partition('.')[0]}*", **chosen)
        assert "unnormalised" not in again.config["source"]
