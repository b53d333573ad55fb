"""skrl, rl_games, TorchRL, Flax and state_dicts of discrete actions: taken as their library acts, or asked for.

The files are made by hand, in the layouts that the libraries' own checkpoints have. What they do is computed here in
float64, from their tensors alone.
"""

import dataclasses
import itertools
import random
import zipfile
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import onnxruntime
import pytest
import torch
from foreign_checkpoints import damaged, sb3_zip
from torch import Tensor, nn

import tipl
from tipl.collecting.policy_network import actions_of, mean_action
from tipl.policy import ParameterLayout, PolicySpec
from tipl.storing.actor_families import Settings
from tipl.storing.foreign_actors import Actor, find_actor
from tipl.storing.foreign_files import find_actor_in, read_checkpoint_file
from tipl.storing.importer import describe_import
from tipl.storing.store import Store

State = dict[str, Tensor]
SIZES = (4, 8, 6, 2)
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "elu": nn.functional.elu, "silu": nn.functional.silu}


@dataclasses.dataclass
class Made:
    """A file's content, and what its policy does."""

    content: Any
    layers: list[tuple[Tensor, Tensor]]
    """(weight, bias) of each layer, as torch has them."""
    log_std: Tensor | None = None
    mean: Tensor | None = None
    """What the normaliser subtracts, (obs_dim,) float64."""
    divisor: Tensor | None = None

    def outputs(self, obs: Tensor, activation: str) -> Tensor:
        """The network's outputs (batch, n) float64 for observations as the environment gives them."""
        x = obs.double()
        if self.mean is not None and self.divisor is not None:
            x = (x - self.mean) / self.divisor
        for i, (weight, bias) in enumerate(self.layers):
            x = x @ weight.double().T + bias.double()
            x = ACTIVATIONS[activation](x) if i < len(self.layers) - 1 else x
        return x


def layers_of(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(out, fan_in), torch.randn(out)) for fan_in, out in itertools.pairwise(sizes)]


def named(layers: list[tuple[Tensor, Tensor]], names: list[str]) -> State:
    state: State = {}
    for (weight, bias), name in zip(layers, names, strict=True):
        state |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return state


def numbered(prefix: str, count: int, head: str | None = None) -> list[str]:
    names = [f"{prefix}{2 * i}" for i in range(count)]
    return [*names[:-1], head] if head else names


def skrl(sizes: tuple[int, ...], *, head: str | None = None, discrete: bool = False, seed: int = 0) -> Made:
    """An agent_<step>.pt: `head` is None in a model of one Sequential, "policy_layer" in a shared one."""
    torch.manual_seed(seed)
    layers, critic = layers_of(sizes), layers_of((*sizes[:-1], 1))
    net = "net_container." if head != "mean_layer" else "net."
    log_std = None if discrete else torch.randn(sizes[-1])
    policy = {} if log_std is None else {"log_std_parameter": log_std}
    policy |= named(layers, numbered(net, len(layers), head))
    if head:  # policy and value network are one module, saved twice
        policy |= named(critic[-1:], ["value_layer"])
    value = policy if head else named(critic, numbered(net, len(critic)))
    mean, var = torch.randn(sizes[0]).double(), torch.rand(sizes[0]).double() + 0.1
    count = torch.tensor(9.0).double()
    content = {
        "policy": policy,
        "value": value,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        "observation_preprocessor": {"running_mean": mean, "running_variance": var, "current_count": count},
        "value_preprocessor": {
            "running_mean": mean[:1] + 1,
            "running_variance": var[:1] + 1,
            "current_count": count + 1,
        },
    }
    return Made(content, layers, log_std, mean, var.sqrt() + 1e-8)


def rl_games(
    sizes: tuple[int, ...], *, separate: bool = False, discrete: bool = False, compiled: bool = False, seed: int = 0
) -> Made:
    torch.manual_seed(seed)
    layers, critic = layers_of(sizes), layers_of((*sizes[:-1], 1))
    mean, var = torch.randn(sizes[0]).double(), torch.rand(sizes[0]).double() + 0.1
    log_std = None if discrete else torch.randn(sizes[-1])
    model = {"value_mean_std.running_mean": mean[:1] + 1, "value_mean_std.running_var": var[:1] + 1}
    model |= {"running_mean_std.running_mean": mean, "running_mean_std.running_var": var}
    model |= {"running_mean_std.count": torch.tensor(9.0).double()}
    model |= {} if log_std is None else {"a2c_network.sigma": log_std}
    head = "a2c_network.logits" if discrete else "a2c_network.mu"
    model |= named(layers, numbered("a2c_network.actor_mlp.", len(layers), head))
    critic_names = numbered("a2c_network.critic_mlp.", len(critic), "a2c_network.value")
    model |= named(critic if separate else critic[-1:], critic_names if separate else critic_names[-1:])
    prefix = "_orig_mod." if compiled else ""
    content = {
        "model": {f"{prefix}{key}": value for key, value in model.items()},
        "epoch": 4 + seed,
        "frame": 1000 * (1 + seed),
        "optimizer": {"state": {}, "param_groups": []},
        "last_mean_rewards": np.float32(9.5),
        "env_state": None,
    }
    return Made(content, layers, log_std, mean, (var + 1e-5).sqrt())


def torchrl(sizes: tuple[int, ...], seed: int = 0) -> Made:
    torch.manual_seed(seed)
    layers, log_std = layers_of(sizes), torch.randn(sizes[-1])
    state = named(layers, numbered("module.0.module.0.", len(layers)))
    return Made(state | {"module.0.module.1.state_independent_scale": log_std}, layers, log_std)


def flax_tree(made: Made) -> dict[str, Any]:
    """The parameters as Flax has them: kernels are transposed."""
    tree: dict[str, Any] = {} if made.log_std is None else {"log_std": made.log_std.numpy()}
    for i, (weight, bias) in enumerate(made.layers):
        tree[f"Dense_{i}"] = {"bias": bias.numpy(), "kernel": weight.T.contiguous().numpy()}
    return {"params": tree}


def to_msgpack(tree: Any) -> bytes:
    """What flax.serialization.to_bytes writes."""

    def extension(array: Any) -> msgpack.ExtType:
        packed = msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)
        return msgpack.ExtType(1, packed)

    written: bytes = msgpack.packb(tree, default=extension, strict_types=True)
    return written


def plain(sizes: tuple[int, ...], *, discrete: bool = False, seed: int = 0) -> Made:
    torch.manual_seed(seed)
    return Made(None, layers_of(sizes), None if discrete else torch.randn(sizes[-1]))


def saved(content: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def check(store: Store, made: Made, activation: str) -> None:
    """The store's last policy gives the outputs of what was made."""
    assert isinstance(store.policy, PolicySpec)
    assert store.policy.activation == activation
    obs = torch.randn(100, store.policy.obs_dim, generator=torch.Generator().manual_seed(1))
    row = torch.tensor(store.trial(0).weights()[-1])
    unclipped = dataclasses.replace(store.policy, mean_limit=None, rescale=False)
    outputs = mean_action(unclipped, row[None], obs[None])[0]
    torch.testing.assert_close(outputs.double(), made.outputs(obs, activation), rtol=1e-4, atol=1e-4)
    if made.log_std is not None:
        torch.testing.assert_close(store.policy.unflatten(row)["log_std"], made.log_std)


def check_export(store: Store, like: Path, folder: Path, made: Made, content: Any) -> None:
    """Exported into `like`, the last checkpoint is what was made; what is not the actor's stays as in `like`."""
    written = tipl.export_checkpoint(store.path, like, folder / f"out{like.suffix}")
    before, after = read_checkpoint_file(like).state, read_checkpoint_file(written).state
    again = Actor.from_dict(store.config["source"]["actor"])
    for key, tensor in after.items():
        shared = key.startswith("value.") and key.replace("value.", "policy.", 1) in again.keys  # one tensor of skrl's
        if key not in again.keys and not (
            shared and torch.equal(before[key], before[key.replace("value.", "policy.")])
        ):
            assert torch.equal(tensor, before[key]), key
    np.testing.assert_allclose(again.flatten(after), store.trial(0).weights()[-1], rtol=1e-4, atol=1e-5)


# ---- skrl


@pytest.mark.parametrize("head", [None, "policy_layer", "mean_layer", "output_layer"])
def test_skrl(head: str | None, tmp_path: Path) -> None:
    for seed in (0, 1):
        made = skrl(SIZES, head=head, seed=seed)
        saved(made.content, tmp_path / f"run/checkpoints/agent_{(seed + 1) * 8}.pt")
    with pytest.raises(ValueError, match="activation must be given"):
        tipl.import_checkpoints([tmp_path / "run"], tmp_path / "store")
    store = tipl.import_checkpoints([tmp_path / "run"], tmp_path / "store", activation="elu")
    check(store, made, "elu")
    assert store.trial(0).env_steps.tolist() == [8, 16]
    note = store.config["source"]["note"]
    assert "observations beyond 5 standard deviations, is not clipped" in note
    assert "nothing says what becomes of the network's output" in note
    lines = [text for label, text in describe_import([tmp_path / "run"], activation="elu") if label == "tensor"]
    assert not any("not chosen" in text for text in lines)
    assert sum("normaliser's, folded" in text for text in lines) == 3
    check_export(store, tmp_path / "run/checkpoints/agent_8.pt", tmp_path, made, None)


def test_skrl_files_that_lack_something(tmp_path: Path) -> None:
    made = skrl(SIZES)
    old = dict(made.content)
    old["state_preprocessor"] = old.pop("observation_preprocessor")  # skrl 1
    path = saved(old, tmp_path / "agent_1.pt")
    store = tipl.import_checkpoints([path], tmp_path / "old", activation="elu")
    check(store, made, "elu")
    assert "state_preprocessor is taken for the policy's, as in skrl 1" in store.config["source"]["note"]
    unnormalised = dataclasses.replace(made, mean=None, divisor=None)
    raw = tipl.import_checkpoints([path], tmp_path / "raw", activation="elu", ignore="state_preprocessor.*")
    check(raw, unnormalised, "elu")
    both = old | {"observation_preprocessor": made.content["observation_preprocessor"]}
    both["state_preprocessor"] = {"running_mean": torch.zeros(7), "running_variance": torch.ones(7)}  # the critic's
    store = tipl.import_checkpoints([saved(both, tmp_path / "agent_2.pt")], tmp_path / "both", activation="elu")
    check(store, made, "elu")
    alone = saved(made.content["policy"], tmp_path / "policy_3.pt")
    store = tipl.import_checkpoints([alone], tmp_path / "alone", activation="elu")
    check(store, unnormalised, "elu")
    assert "the files hold skrl's policy alone: observations are taken to be" in store.config["source"]["note"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"actor": "policy."}, r"holds statistics of observations, observation_preprocessor, which the actor chosen"),
        ({"discrete": "logits"}, r"the keys are those of a policy of skrl whose outputs are means$"),
        ({"squash": True}, r"squash is for the policies of TorchRL, .* this one is of kind skrl"),
    ],
)
def test_skrl_refusals(arguments: Any, message: str, tmp_path: Path) -> None:
    path = saved(skrl(SIZES).content, tmp_path / "agent_1.pt")
    with pytest.raises(ValueError, match=message):
        tipl.import_checkpoints([path], tmp_path / "store", activation="elu", **arguments)
    assert not (tmp_path / "store").exists()


def test_skrl_discrete(tmp_path: Path) -> None:
    made = skrl(SIZES, discrete=True)
    path = saved(made.content, tmp_path / "agent_1.pt")
    with pytest.raises(ValueError, match="beside a policy of discrete actions, which discrete would say"):
        tipl.import_checkpoints([path], tmp_path / "store", activation="elu")
    store = tipl.import_checkpoints([path], tmp_path / "store", activation="elu", discrete="logits")
    check(store, made, "elu")
    assert isinstance(store.policy, PolicySpec)
    assert store.policy.outputs == "logits"
    check_export(store, path, tmp_path, made, None)


def test_the_best_agent_among_those_with_a_step_is_asked_about(tmp_path: Path) -> None:
    for name in ("agent_8", "agent_16", "best_agent"):
        saved(skrl(SIZES).content, tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match=r"best_agent\.pt has no number of steps in its name"):
        tipl.import_checkpoints([tmp_path], tmp_path / "store", activation="elu")


# ---- rl_games


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_rl_games(separate: bool, compiled: bool, tmp_path: Path) -> None:
    for seed, name in enumerate(["last_Ant_ep_4_rew_-3.25", "last_Ant_ep_8_rew_11.5"]):
        made = rl_games(SIZES, separate=separate, compiled=compiled, seed=seed)
        saved(made.content, tmp_path / f"run/nn/{name}.pth")
    store = tipl.import_checkpoints([tmp_path / "run"], tmp_path / "store", activation="elu")
    check(store, made, "elu")
    assert store.trial(0).env_steps.tolist() == [1000, 2000]  # the files' frame
    assert "clipped to [-1, 1] and rescaled to the action space, as rl_games does" in store.config["source"]["note"]
    assert isinstance(store.policy, PolicySpec)
    means = np.array([[-3.0, 0.5], [0.0, 2.0]], np.float32).clip(-1, 1)
    actions = actions_of(store.policy, means, np.array([-2.0, 0.0]), np.array([4.0, 1.0]))
    np.testing.assert_allclose(actions, [[-2.0, 0.75], [1.0, 1.0]])
    check_export(store, tmp_path / "run/nn/last_Ant_ep_4_rew_-3.25.pth", tmp_path, made, None)
    content = torch.load(tmp_path / "out.pth", weights_only=False)
    assert content["last_mean_rewards"] == np.float32(9.5)
    assert (content["frame"], list(content)) == (1000, list(made.content))


def test_rl_games_discrete(tmp_path: Path) -> None:
    made = rl_games(SIZES, discrete=True)
    path = saved(made.content, tmp_path / "Cart.pth")
    store = tipl.import_checkpoints([path], tmp_path / "store", activation="elu")
    check(store, made, "elu")
    assert isinstance(store.policy, PolicySpec)
    assert store.policy.outputs == "logits"
    with pytest.raises(ValueError, match=r"keys are those of a policy of rl_games whose outputs are logits$"):
        tipl.import_checkpoints([path], tmp_path / "wrong", activation="elu", discrete="values")


def test_a_rescaled_policy_as_an_onnx_model(tmp_path: Path) -> None:
    made = rl_games((4, 8, 1))
    path = saved(made.content, tmp_path / "Pend.pth")
    store = tipl.import_checkpoints([path], tmp_path / "store", activation="elu", env_id="InvertedPendulum-v5")
    tipl.export_onnx(store.path, tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    obs = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    (actions,) = session.run(["action"], {"observation": obs.numpy()})
    np.testing.assert_allclose(actions, 3 * made.outputs(obs, "elu").clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_a_rescaled_policy_needs_bounds_and_is_no_other() -> None:
    spec = PolicySpec(3, 2, mean_limit=1.0, rescale=True)
    assert PolicySpec.from_dict(spec.to_dict()) == spec
    assert str(spec).endswith("mean clipped to +-1, rescaled to the action space")
    with pytest.raises(ValueError, match="a policy that rescales needs an action space with bounds"):
        actions_of(spec, np.zeros((1, 2), np.float32), np.array([-np.inf, 0.0]), np.ones(2))
    with pytest.raises(ValueError, match=r"squash and mean_limit must be False and 1\.0 with rescale"):
        PolicySpec(3, 2, rescale=True)


# ---- TorchRL


@pytest.mark.parametrize("squash", [False, True])
def test_torchrl(squash: bool, tmp_path: Path) -> None:
    made = torchrl(SIZES)
    path = saved(made.content, tmp_path / "policy.pt")
    with pytest.raises(ValueError, match=r"squash must be given, .*\(TanhNormal\), else False"):
        tipl.import_checkpoints([path], tmp_path / "store", activation="tanh")
    store = tipl.import_checkpoints([path], tmp_path / "store", activation="tanh", squash=squash)
    check(store, made, "tanh")
    assert isinstance(store.policy, PolicySpec)
    assert store.policy.squash is squash
    assert "what TorchRL's transforms, such as VecNorm, do to them is not in" in store.config["source"]["note"]
    check_export(store, path, tmp_path, made, None)
    beside = {"entropy_coeff": torch.tensor(0.01), "clip_epsilon": torch.tensor(0.2)}
    loss = {f"actor_network_params.{key}": it for key, it in made.content.items()} | beside
    loss |= named(layers_of((4, 8, 1)), ["critic_network_params.module.0", "critic_network_params.module.2"])
    whole = saved(loss, tmp_path / "loss.pt")
    store = tipl.import_checkpoints([whole], tmp_path / "of_loss", activation="tanh", squash=squash)
    check(store, made, "tanh")
    written = torch.load(tipl.export_checkpoint(store.path, whole, tmp_path / "loss_out.pt"), weights_only=True)
    assert all(torch.equal(written[key], it) for key, it in loss.items())


def halves(sizes: tuple[int, ...], *, library: str, seed: int = 0) -> Made:
    """A policy whose last layer has two outputs for each action; `layers` are those of the first half."""
    torch.manual_seed(seed)
    layers = layers_of((*sizes[:-1], 2 * sizes[-1]))
    means = [*layers[:-1], (layers[-1][0][: sizes[-1]], layers[-1][1][: sizes[-1]])]
    if library != "rsl_rl":  # a Sequential of layers, or of an MLP, and NormalParamExtractor
        prefix = {"TorchRL": "module.0.module.", "TorchRL's MLP": "module.0.module.0."}[library]
        return Made(named(layers, numbered(prefix, len(layers))), means)
    mean, std = torch.randn(1, sizes[0]), torch.rand(1, sizes[0]) + 0.1
    normaliser = {"_mean": mean, "_var": std**2, "_std": std, "count": torch.tensor(9)}
    actor = named(layers, numbered("mlp.", len(layers)))
    actor |= {f"obs_normalizer.{key}": it for key, it in normaliser.items()}
    critic = named(layers_of((*sizes[:-1], 1)), numbered("mlp.", len(layers)))
    content = {"actor_state_dict": actor, "critic_state_dict": critic, "iter": seed, "infos": None}
    return Made(content, means, mean=mean.double(), divisor=std.double() + 1e-2)


@pytest.mark.parametrize("library", ["TorchRL", "TorchRL's MLP", "rsl_rl"])
def test_a_last_layer_of_two_halves(library: str, tmp_path: Path) -> None:
    made = halves(SIZES, library=library)
    path = saved(made.content, tmp_path / "model_1.pt")
    said: dict[str, Any] = {"activation": "silu", "halves": True}
    said |= {} if library == "rsl_rl" else {"squash": True}
    store = tipl.import_checkpoints([path], tmp_path / "store", **said)
    check(store, made, "silu")
    assert store.policy == PolicySpec(4, 2, (8, 6), "silu", spread="halves", squash=library != "rsl_rl")
    other = halves(SIZES, library=library, seed=1)
    check_export(store, saved(other.content, tmp_path / "other.pt"), tmp_path, made, None)
    ignored: Any = {"ignore": "obs_normalizer.*"} if library == "rsl_rl" else {}
    assert isinstance(tipl.import_checkpoints([path], tmp_path / "unsaid", **ignored).policy, ParameterLayout)


@pytest.mark.parametrize("library", ["TorchRL", "rsl_rl"])
def test_a_recorded_run_of_two_halves_is_judged_as_an_imported_one(library: str, tmp_path: Path) -> None:
    squash = library != "rsl_rl"
    said: dict[str, Any] = {"env_id": "InvertedPendulum-v5", "activation": "silu", "halves": True}
    folder = tmp_path / "run"
    folder.mkdir()
    with tipl.Recorder(tmp_path / "recorded", squash=squash, **said) as recorder:
        for seed in range(2):
            content = halves((4, 8, 1), library=library, seed=seed).content
            saved(content, folder / f"model_{seed}.pt")
            recorder.log(content.get("actor_state_dict", content), env_steps=seed)
    imported = tipl.import_checkpoints([folder], tmp_path / "imported", **said, **({"squash": True} if squash else {}))
    recorded = tipl.Store.open(tmp_path / "recorded")
    assert recorded.policy == PolicySpec(4, 1, (8,), "silu", spread="halves", squash=squash)
    assert recorded.policy == imported.policy
    np.testing.assert_array_equal(recorded.trial(0).weights(), imported.trial(0).weights())
    np.testing.assert_array_equal(
        *(tipl.score(it, num_episodes=2, progress=False).returns for it in (recorded, imported))
    )


def test_a_layer_of_halves_is_refused_where_there_is_none(tmp_path: Path) -> None:
    path = saved(halves((4, 8, 2), library="TorchRL").content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="halves is for continuous actions, and discrete says logits: leave one"):
        tipl.import_checkpoints([path], tmp_path / "store", halves=True, discrete="logits", activation="tanh")
    discrete = tipl.import_checkpoints([path], tmp_path / "discrete", discrete="logits", activation="tanh")
    assert isinstance(discrete.policy, PolicySpec)
    assert (discrete.policy.outputs, discrete.policy.act_dim) == ("logits", 4)
    odd = named(layers_of((4, 8, 3)), ["module.0.module.0", "module.0.module.2"])
    for state in (odd, torchrl(SIZES).content, bare(0, 4, 8, 6, 4)):
        with pytest.raises(ValueError, match="halves says that the last layer has two outputs for each action, but"):
            tipl.import_checkpoints([saved(state, tmp_path / "b.pt")], tmp_path / "store", halves=True)
        with (
            tipl.Recorder(tmp_path / "recorded", halves=True) as recorder,
            pytest.raises(
                ValueError, match="log: policy: halves says that the last layer has two outputs for each action"
            ),
        ):
            recorder.log(state, env_steps=0)
    for discrete in (True, "logits"):
        with pytest.raises(
            ValueError, match=f"halves is for continuous actions, and discrete is {discrete!r}: leave one"
        ):
            tipl.Recorder(tmp_path / "recorded", halves=True, discrete=discrete)


# ---- Flax and .npz


@pytest.mark.parametrize("suffix", [".msgpack", ".npz"])
def test_flax(suffix: str, tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1):
        made, path = plain(SIZES, seed=seed), tmp_path / f"actor_{seed}{suffix}"
        tree = flax_tree(made)
        if suffix == ".npz":
            flat = {"params/log_std": tree["params"]["log_std"]}
            for name in ("Dense_0", "Dense_1", "Dense_2"):
                flat |= {f"params/{name}/{key}": it for key, it in tree["params"][name].items()}
            np.savez(path, **flat)
        else:
            path.write_bytes(to_msgpack(tree))
        paths.append(path)
    store = tipl.import_checkpoints(paths, tmp_path / "store", activation="tanh")
    check(store, made, "tanh")
    check_export(store, paths[0], tmp_path, made, None)
    written = (tmp_path / f"out{suffix}").read_bytes()
    if suffix == ".msgpack":
        assert written == paths[1].read_bytes()
    else:
        for name, array in np.load(paths[1]).items():
            np.testing.assert_array_equal(np.load(tmp_path / "out.npz")[name], array)


def test_flax_files_of_more_than_an_actor(tmp_path: Path) -> None:
    made, critic = plain(SIZES), plain((4, 8, 1), discrete=True, seed=1)
    state = {"step": 3, "params": flax_tree(made), "opt_state": {"0": {"mu": flax_tree(plain(SIZES, seed=2))}}}
    path = tmp_path / "state_1.msgpack"
    path.write_bytes(to_msgpack(state))
    check(tipl.import_checkpoints([path], tmp_path / "a", activation="tanh"), made, "tanh")
    path.write_bytes(to_msgpack({"0": flax_tree(made), "1": flax_tree(critic)}))  # as CleanRL's DDPG for JAX
    with pytest.raises(ValueError, match=r"it holds 0, 1, and it is not clear .*some of \[0\., 1\.\]"):
        tipl.import_checkpoints([path], tmp_path / "b", activation="tanh")
    check(tipl.import_checkpoints([path], tmp_path / "b", activation="tanh", actor="0.params."), made, "tanh")
    half = plain(SIZES, seed=3)
    half.layers = [(weight.bfloat16(), bias.bfloat16()) for weight, bias in half.layers]
    tree = {"log_std": half.log_std.numpy()} if half.log_std is not None else {}
    packed = to_msgpack({"params": tree})
    assert read_checkpoint_file(_written(tmp_path / "c_1.msgpack", packed)).state.keys() == {"log_std"}


def _dense(*shapes: tuple[int, int], log_std: int = 0) -> dict[str, Any]:
    """Parameters of layers (in, out) that one Flax module makes one after the other."""
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {"log_std": np.zeros(log_std, np.float32)} if log_std else {}
    for i, (fan_in, fan_out) in enumerate(shapes):
        kernel, bias = rng.standard_normal((fan_in, fan_out), dtype=np.float32), np.ones(fan_out, np.float32)
        tree[f"Dense_{i}"] = {"kernel": kernel, "bias": bias}
    return {"params": tree}


ACTOR, CRITIC = ((11, 16), (16, 16), (16, 3)), ((11, 16), (16, 16), (16, 1))


@pytest.mark.parametrize(
    ("shapes", "log_std", "arguments", "message"),
    [
        (
            (*ACTOR, *CRITIC),
            3,
            {},
            r"Dense_3.kernel takes 11 numbers and Dense_2.kernel before it gives 3: it may begin a ",
        ),
        ((*ACTOR, *CRITIC), 0, {"discrete": "logits"}, r"Dense_3.kernel takes 11 numbers .*leave keys out with ignore"),
        (((11, 8), (8, 3), (8, 1)), 3, {}, r"Dense_2.kernel takes 8 numbers and Dense_1.kernel before it gives 3"),
        # Two networks that fit one behind the other.
        (((1, 16), (16, 16), (16, 1)) * 2, 1, {}, "Dense_3.kernel has the shape of Dense_0.kernel: it may begin a "),
        (((4, 9), (9, 4), (4, 9), (9, 2)), 0, {"discrete": "logits"}, "Dense_2.kernel has the shape of Dense_0.kernel"),
    ],
)
@pytest.mark.parametrize("suffix", [".msgpack", ".npz"])
def test_an_actor_and_a_critic_in_one_flax_module(shapes, log_std, arguments, message, suffix, tmp_path):  # type: ignore[no-untyped-def]
    """As in PureJaxRL: Flax numbers the layers of both in the order in which the module makes them."""
    tree, path = _dense(*shapes, log_std=log_std), tmp_path / f"ppo_1{suffix}"
    if suffix == ".npz":
        parts = tree["params"].items()
        flat = {f"{name}/{key}": it for name, part in parts if isinstance(part, dict) for key, it in part.items()}
        np.savez(path, **flat, **({"log_std": tree["params"]["log_std"]} if log_std else {}))
    else:
        path.write_bytes(to_msgpack(tree))
    with pytest.raises(ValueError, match=message):
        tipl.import_checkpoints([path], tmp_path / "store", activation="tanh", **arguments)
    if len(shapes) == 6 and shapes[0][0] == 11:
        ignore = [f"Dense_{i}.*" for i in (3, 4, 5)]
        store = tipl.import_checkpoints([path], tmp_path / "store", activation="tanh", ignore=ignore, **arguments)
        assert isinstance(store.policy, PolicySpec)
        assert (store.policy.obs_dim, store.policy.hidden_sizes, store.policy.act_dim) == (11, (16, 16), 3)


def test_the_step_of_a_flax_file_is_told(tmp_path: Path) -> None:
    """It counts updates: the numbers in the names are preferred, and a note says so."""
    paths = []
    for i, step in enumerate((0, 7, 14)):
        path = tmp_path / f"ck_{i}.msgpack"
        path.write_bytes(to_msgpack({"step": step, "params": flax_tree(plain(SIZES, seed=i))["params"]}))
        paths.append(path)
    store = tipl.import_checkpoints(paths, tmp_path / "store", activation="tanh")
    assert store.trial(0).env_steps.tolist() == [0, 1, 2]
    note = store.config["source"]["note"]
    assert (
        "env_steps are the numbers in the names, 0 to 2, not what the files say (step), 0 to 14, which differs" in note
    )


def test_nothing_is_taken_for_the_step_by_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "m_1.npz"
    np.savez(path, **{"step": np.int64(3), "step_net/kernel": np.ones((4, 2), np.float32), "log_std": np.ones(2)})
    assert list(read_checkpoint_file(path).state) == ["step_net.kernel", "log_std"]


def test_whole_numbers_in_a_kernel_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "quantised_1.npz"
    np.savez(path, **{"Dense_0/kernel": np.ones((4, 2), np.int32), "Dense_0/bias": np.ones(2, np.float32)})
    with pytest.raises(
        ValueError, match=r"Dense_0\.kernel is torch\.int32: a row holds real floating-point numbers only"
    ):
        tipl.import_checkpoints([path], tmp_path / "store", activation="tanh", discrete="logits")


def test_a_chosen_part_of_rl_games_does_not_lose_the_statistics(tmp_path: Path) -> None:
    """Nor take the critic, where the spread depends on the state, so that the simulator cannot run the actor."""
    made = rl_games(SIZES)
    state = made.content["model"]
    del state["a2c_network.sigma"]
    state |= {"a2c_network.sigma.weight": torch.ones(2, 8), "a2c_network.sigma.bias": torch.ones(2)}
    path = saved(made.content, tmp_path / "last_ep_1_rew_1.pth")
    with pytest.raises(
        ValueError, match="it holds statistics of observations, running_mean_std, which the actor chosen"
    ):
        tipl.import_checkpoints([path], tmp_path / "store", activation="elu", actor="a2c_network.")
    store = tipl.import_checkpoints(
        [path], tmp_path / "store", activation="elu", actor="a2c_network.", ignore=["running_mean_std.*"]
    )
    assert not any("value" in name or "critic" in name for name in store.policy.shapes)


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _extension(shape: Any, name: str, numbers: bytes) -> bytes:
    packed = msgpack.packb((shape, name, numbers), use_bin_type=True)
    written: bytes = msgpack.packb({"a": msgpack.ExtType(1, packed)})
    return written


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_extension([2**40], "float32", b"1234"), r"an array of shape \(1099511627776,\) of float32 has 4 bytes"),
        (_extension([1], "object", b"1234"), "holds an array of object, which is not read"),
        (_extension([-1], "float32", b"1234"), "an array's shape is none"),
        (_extension({"a": 1}, "float32", b"1234"), "is damaged"),
        (msgpack.packb({"a": 1}), "holds no arrays with names"),
        (msgpack.packb({"a": [[0] * 4000] * 100}), "holds more than 262,144 entries"),
        (msgpack.packb({"a": [0] * 5000}), "is damaged"),
        (b"\x81" * 5000, "is damaged"),
        (b"\xdf\xff\xff\xff\xff", "is damaged"),
    ],
)
def test_a_hostile_msgpack_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=message):
        read_checkpoint_file(_written(tmp_path / "m_1.msgpack", data))


def test_a_hostile_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.array([{}], dtype=object))
    with pytest.raises(RuntimeError, match=r"w\.npy, an array of object: only arrays of plain numbers are read"):
        read_checkpoint_file(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", w=np.ones(3))
    data = (tmp_path / "b.npz").read_bytes()
    np.savez(tmp_path / "c.npz", w=np.frombuffer(data, np.uint8))
    assert read_checkpoint_file(tmp_path / "c.npz").format == "npz"
    sb3_zip(tmp_path / "d.zip", {})
    sbx = {"data": b"{}", "_stable_baselines3_version": b"2.7", "pytorch_variables.pth": b""}
    with zipfile.ZipFile(tmp_path / "sbx.zip", "w") as archive:
        for name, content in sbx.items():
            archive.writestr(name, content)
    with pytest.raises(RuntimeError, match=r"is a zip of SBX, .* its policy is a pickle, which was not loaded"):
        read_checkpoint_file(tmp_path / "sbx.zip")


# ---- discrete actions in a bare state_dict


@pytest.mark.parametrize("outputs", ["logits", "values"])
@pytest.mark.parametrize("prefix", ["", "network.", "q_network.net.", "layers."])
def test_a_bare_mlp_of_discrete_actions(prefix: str, outputs: Any, tmp_path: Path) -> None:
    made = plain(SIZES, discrete=True)
    every = 1 if prefix == "layers." else 2
    state = named(made.layers, [f"{prefix}{every * i}" for i in range(3)])
    path = saved(state, tmp_path / "m_1.pt")
    with pytest.raises(ValueError, match="activation must be given"):
        tipl.import_checkpoints([path], tmp_path / "store", discrete=outputs)
    store = tipl.import_checkpoints([path], tmp_path / "store", activation="relu", discrete=outputs)
    check(store, made, "relu")
    assert isinstance(store.policy, PolicySpec)
    assert store.policy.outputs == outputs
    check_export(store, path, tmp_path, made, None)
    if not prefix.startswith("q_"):
        unsaid = tipl.import_checkpoints([path], tmp_path / "unsaid")
        assert isinstance(unsaid.policy, ParameterLayout)
        assert "unless they choose discrete actions, which discrete says" in unsaid.config["source"]["note"]


def test_a_recording_of_a_bare_mlp_of_discrete_actions(tmp_path: Path) -> None:
    made = plain(SIZES, discrete=True)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    network.load_state_dict(named(made.layers, ["0", "2", "4"]))
    for resume in (False, True):
        with tipl.Recorder(tmp_path / "a", env_id="CartPole-v1", discrete="values", resume=resume) as recorder:
            recorder.log(network, env_steps=int(resume))
    store = Store.open(tmp_path / "a")
    check(store, made, "tanh")
    assert isinstance(store.policy, PolicySpec)
    assert (store.policy.outputs, store.num_checkpoints) == ("values", 2)


def bare(seed: int = 0, *sizes: int) -> State:
    return named(plain(sizes or SIZES, discrete=True, seed=seed).layers, [f"net.{2 * i}" for i in range(3)])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (bare() | {"log_std": torch.zeros(2)}, r"are not the layers of one MLP alone"),
        (bare() | {"net.1.weight": torch.ones(8)}, r"are not the layers of one MLP alone"),
        (bare() | {"net.2.weight": torch.ones(6, 9)}, r"are not the layers of one MLP alone"),
        (bare(0, 4, 8, 6, 1), r"with two actions or more"),
        ({f"net.{3 * i}.{key}": torch.ones(1, 1) for i in range(3) for key in ("weight", "bias")}, "one MLP alone"),
        (bare() | {f"target.{k}": it for k, it in bare(1).items()}, r"target\.net\..* may be a critic's"),
        (bare() | {f"b.{k}": it for k, it in bare(1).items()}, r"are not the layers of one MLP alone|two networks"),
        ({"actor_logstd": torch.zeros(1, 2)} | {k.replace("net.", "actor_mean."): it for k, it in bare().items()},
         "the keys are those of a policy of cleanrl whose outputs are means$"),
        ({k.replace("net.", "q_net.q_net."): it for k, it in bare().items()},
         "the keys are those of a policy of sb3 whose outputs are values$"),
    ],
)  # fmt: skip
def test_discrete_is_refused_where_the_file_contradicts_it(state: State, message: str, tmp_path: Path) -> None:
    path = saved(state, tmp_path / "m_1.pt")
    with pytest.raises(ValueError, match=message):
        tipl.import_checkpoints([path], tmp_path / "store", activation="relu", discrete="logits")
    assert not (tmp_path / "store").exists()


def test_discrete_is_refused_where_a_zip_says_that_actions_are_not(tmp_path: Path) -> None:
    state = {k.replace("net.", "q_net.q_net."): it for k, it in bare().items()}
    path = sb3_zip(tmp_path / "m_1.zip", state, action_space={":type:": "<class 'gymnasium.spaces.box.Box'>"})
    with pytest.raises(ValueError, match="but the zip's action space is not Discrete, or masks choose"):
        tipl.import_checkpoints([path], tmp_path / "store", discrete="values")


# ---- all of them, damaged


@pytest.mark.parametrize("kind", ["skrl", "rl_games", "torchrl"])
def test_no_tensor_of_a_damaged_file_is_left_out_in_silence(kind: str, tmp_path: Path) -> None:
    """It is refused, or every tensor is the actor's, its normaliser's, or known to be a critic's."""
    taken = 0
    for seed in range(120):
        draw = random.Random(seed)
        made = {"skrl": skrl, "rl_games": rl_games, "torchrl": torchrl}[kind](SIZES, seed=seed)
        path = saved(made.content, tmp_path / "m_1.pt")
        file = read_checkpoint_file(path)
        state = damaged({key: it for key, it in file.state.items() if it.ndim}, draw, draw.randint(0, 3))
        try:
            found = find_actor(state, Settings("elu"))
            found.flatten(state)
        except ValueError:
            continue
        known = ("value.", "value_preprocessor.", "value_mean_std.", "a2c_network.value.", "a2c_network.critic_mlp.")
        own = {key for key in state if not key.startswith(known)}
        assert own - set(found.keys) == {key for key in own if found.normaliser and key.startswith(found.normaliser)}
        if isinstance(found.policy, PolicySpec):
            assert found.kind == kind
            taken += 1
    assert taken >= 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_states_of_other_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    made = torchrl(SIZES)
    state = {key: tensor.to(dtype) for key, tensor in made.content.items()}
    path = saved(state, tmp_path / "m_1.pt")
    store = tipl.import_checkpoints([path], tmp_path / "store", activation="tanh", squash=False)
    exact = [state[key].float().flatten() for key in Actor.from_dict(store.config["source"]["actor"]).keys]
    np.testing.assert_array_equal(store.trial(0).weights()[0], torch.cat(exact).numpy())
    written = read_checkpoint_file(tipl.export_checkpoint(store.path, path, tmp_path / "out.pt")).state
    assert all(torch.equal(written[key], state[key]) and written[key].dtype == dtype for key in state)


def test_numbers_of_numpy_beside_a_state(tmp_path: Path) -> None:
    for value in (np.float32(1.5), np.float64(-2.5), np.int64(7), np.bool_(True), np.uint8(3)):
        path = saved({"model_state_dict": bare(), "best": value}, tmp_path / "m_1.pt")
        file = read_checkpoint_file(path)
        assert find_actor_in(path, file, "relu", discrete="logits").kind == "mlp"
        (tmp_path / "again.pt").write_bytes(file.to_bytes())
        again = torch.load(tmp_path / "again.pt", weights_only=False)["best"]
        assert (again, again.dtype) == (value, value.dtype)


# ---- CleanRL with the statistics of Gymnasium's NormalizeObservation, as its pull request 556 describes them


def cleanrl(seed: int = 0) -> Made:
    """The state of CleanRL's continuous PPO, and the statistics that its file may have beside it."""
    torch.manual_seed(seed)
    layers, critic = layers_of(SIZES), layers_of((*SIZES[:-1], 1))
    log_std = torch.randn(1, SIZES[-1])
    state = {"actor_logstd": log_std} | named(critic, numbered("critic.", len(critic)))
    state |= named(layers, numbered("actor_mean.", len(layers)))
    mean, var = torch.randn(SIZES[0]).double(), torch.rand(SIZES[0]).double() + 0.1
    return Made({"model_weights": state, "args": {"seed": 1}}, layers, log_std, mean, (var + 1e-8).sqrt())


def running(kind: str, mean: Tensor, var: Tensor) -> dict[str, Any]:
    """The statistics as entries beside the state."""
    convert = {"tensors": torch.clone, "arrays": Tensor.numpy, "lists": Tensor.tolist}[kind.removesuffix(", flat")]
    values = {"mean": convert(mean), "var": convert(var), "count": np.float64(100.0)}
    return {f"obs_rms_{it}": value for it, value in values.items()} if kind.endswith("flat") else {"obs_rms": values}


@pytest.mark.parametrize("kind", ["tensors", "arrays", "lists", "tensors, flat", "arrays, flat", "lists, flat"])
def test_statistics_of_gymnasium_beside_a_state(kind: str, tmp_path: Path) -> None:
    """Actions are those of the network on (obs - mean) / sqrt(var + 1e-8), and export writes the rest as it was."""
    made = cleanrl()
    content = made.content | running(kind, made.mean, made.divisor**2 - 1e-8)  # type: ignore[arg-type,operator]
    path = saved(content, tmp_path / "ppo_1.cleanrl_model")
    store = tipl.import_checkpoints([path], tmp_path / "store", activation="tanh")
    assert "beyond 10 standard deviations" in store.config["source"]["note"]
    assert isinstance(store.policy, PolicySpec)
    obs = torch.randn(50, SIZES[0])
    row = torch.from_numpy(store.trial(0).weights())
    actions = mean_action(store.policy, row, obs[None])[0]
    torch.testing.assert_close(actions.double(), made.outputs(obs, "tanh"), rtol=1e-5, atol=1e-5)

    exported = torch.load(tipl.export_checkpoint(store.path, path, tmp_path / "out.pt"), weights_only=False)
    for key, tensor in exported.pop("model_weights").items():
        torch.testing.assert_close(tensor, content["model_weights"][key], rtol=1e-5, atol=1e-5)
    assert str(exported) == str({key: content[key] for key in content if key != "model_weights"})


@pytest.mark.parametrize(
    "beside",
    [
        {"obs_rms": [[0.1, 0.2, 0.3], [1.0, 1.0, 1.0]]},
        {"obs_rms": [torch.zeros(4), torch.ones(4)]},
        {"obs_rms": {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}},
        {"obs_rms": {"mean": torch.zeros(4)}},
        {"obs_mean": [0.1, 0.2, 0.3, 0.4], "obs_var": [1.0, 1.0, 1.0, 1.0]},
        {"env_normalization_stats": {"obs": [{"mean": [0.1, 0.2, 0.3, 0.4]}]}},
        {"env_normalization_stats": {"obs": {"mean": [0.1, 0.2, 0.3, 0.4]}}},
        {"anything": np.zeros(4)},
        {"stats": {"of": {"observations": np.zeros(4)}}},
        {"best": {"mean": [0.1, 0.2, 0.3, 0.4], "var": [1.0, 1.0, 1.0, 1.0]}},
        {"args": {"obs_shift": [0.1, 0.2, 0.3, 0.4]}},
        {"scaler": {"mean": torch.zeros(4), "var": torch.ones(4)}},
        {"infos": {"obs_mean": torch.zeros(4)}},
    ],
    ids=str,
)
def test_other_statistics_are_never_left_out_in_silence(beside: dict[str, Any], tmp_path: Path) -> None:
    path = saved(cleanrl().content | beside, tmp_path / "ppo_1.cleanrl_model")
    with pytest.raises(ValueError, match=rf"ppo_1.cleanrl_model.*{next(iter(beside))}"):
        tipl.import_checkpoints([path], tmp_path / "store", activation="tanh")
    assert not (tmp_path / "store").exists()


def test_what_is_no_statistics_is_left_beside_the_state(tmp_path: Path) -> None:
    beside = {"norm_obs": True, "rng_state": np.arange(4), "returns": [1.0, 2.0], "ret_rms": [0.0, 1.0]}
    beside |= {"scaler": {"scale": 65536.0, "growth_factor": 2.0, "growth_interval": 2000, "_growth_tracker": 3}}
    beside |= {
        "args": {"lrs": [0.1, 0.2], "hidden": [64, 64]},
        "eval_history": {"mean": [0.5, 1.5]},
        "return_rms": None,
    }
    path = saved(cleanrl().content | beside, tmp_path / "ppo_1.cleanrl_model")
    assert tipl.import_checkpoints([path], tmp_path / "store", activation="tanh").num_trials == 1
