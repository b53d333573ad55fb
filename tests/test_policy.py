import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tipl import _core
from tipl.collecting.policy_network import actions_of, layer_views, log_stds, mean_action
from tipl.policy import ACTIVATIONS, Activation, PolicySpec, layout_from_dict

SPECS = [
    PolicySpec(17, 6),
    PolicySpec(4, 1),
    PolicySpec(3, 2, hidden_sizes=(5,), activation="relu"),
    PolicySpec(11, 3, hidden_sizes=(16, 7, 9)),
    PolicySpec(5, 4, hidden_sizes=()),
    PolicySpec(1, 1, hidden_sizes=(1,), activation="elu"),
    PolicySpec(27, 8, hidden_sizes=(33, 17), activation="elu"),
    PolicySpec(5, 3, hidden_sizes=(33, 7), activation="silu"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_weights(spec: PolicySpec, num_policies: int, seed: int = 0) -> torch.Tensor:
    """Return (N, p) weights with non-zero biases, small enough for tanh not to saturate."""
    return 0.3 * torch.randn(num_policies, spec.num_params, generator=torch.Generator().manual_seed(seed))


def torch_actor(spec: PolicySpec, weights: torch.Tensor) -> torch.nn.Sequential:
    """Return one policy (p,) as ordinary torch modules, filled in the order of the layout."""
    modules_of = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU, "elu": torch.nn.ELU, "silu": torch.nn.SiLU}
    activation = modules_of[spec.activation]
    modules: list[torch.nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(spec.layer_sizes):
        modules += [torch.nn.Linear(fan_in, fan_out), activation()]
    actor = torch.nn.Sequential(*modules[:-1]).to(weights.dtype)
    torch.nn.utils.vector_to_parameters(weights[spec.act_dim :], actor.parameters())
    return actor


@pytest.mark.parametrize(("spec", "num_params"), [(PolicySpec(17, 6), 5708), (PolicySpec(4, 1), 4546)])
def test_num_params_of_known_tasks(spec: PolicySpec, num_params: int) -> None:
    assert spec.num_params == num_params


def test_layout_is_gapless_and_in_order() -> None:
    assert PolicySpec(3, 2, hidden_sizes=(5, 4)).layout == {
        "log_std": (0, (2,)),
        "policy_net.0.weight": (2, (5, 3)),
        "policy_net.0.bias": (17, (5,)),
        "policy_net.2.weight": (22, (4, 5)),
        "policy_net.2.bias": (42, (4,)),
        "action_net.weight": (46, (2, 4)),
        "action_net.bias": (54, (2,)),
    }


@given(st.integers(1, 9), st.integers(1, 5), st.lists(st.integers(1, 9), max_size=3).map(tuple))
@settings(max_examples=30, deadline=None)
def test_unflatten_round_trip(obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]) -> None:
    spec = PolicySpec(obs_dim, act_dim, hidden_sizes)
    weights = torch.arange(2.0 * spec.num_params).view(2, -1)
    parts = spec.unflatten(weights)
    assert torch.equal(torch.cat([part.flatten(1) for part in parts.values()], 1), weights)
    assert {name: tuple(part.shape[1:]) for name, part in parts.items()} == {
        name: shape for name, (_, shape) in spec.layout.items()
    }


def test_unflatten_gives_views() -> None:
    weights = torch.zeros(4546)
    PolicySpec(4, 1).unflatten(weights)["action_net.bias"].fill_(3.0)
    assert weights[-1] == 3.0
    assert weights.count_nonzero() == 1


@pytest.mark.parametrize("spec", SPECS)
def test_dict_round_trip_through_json(spec: PolicySpec) -> None:
    assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("spec", SPECS)
def test_mean_action_equals_torch_modules(spec: PolicySpec) -> None:
    weights, obs = random_weights(spec, 3), torch.randn(3, 4, spec.obs_dim)
    actions = mean_action(spec, weights, obs)
    oracle = torch.stack([torch_actor(spec, w)(x) for w, x in zip(weights.double(), obs.double(), strict=True)])
    assert ((actions - oracle).abs() <= rounding_bound(spec, weights.double(), obs.double())).all()


def rounding_bound(spec: PolicySpec, weights: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
    """Return how far float32 can lead the mean actions (N, E, act_dim) astray, to first order.

    A sum of k products and a bias loses at most (k + 1) eps of the sum of their absolute values, in any order, and an
    activation 5 eps more, of silu's output where this is larger; what the layers before have lost comes through the
    absolute weights, and through an activation whose slope is at most 1, silu's 1.1.
    """
    eps = torch.finfo(torch.float32).eps
    x, lost = obs, torch.zeros_like(obs)
    *hidden, head = layer_views(weights[:, spec.act_dim :], spec.layer_sizes)
    functional, slope = torch.nn.functional, 1.1 if spec.activation == "silu" else 1.0
    act = {"tanh": torch.tanh, "relu": torch.relu, "elu": functional.elu, "silu": functional.silu}[spec.activation]
    for weight, bias in [*hidden, head]:
        size = weight.abs().mT
        lost = slope * (lost @ size + (weight.shape[2] + 1) * eps * (x.abs() @ size + bias.abs())) + 5 * eps
        x = act(x @ weight.mT + bias)
        lost = lost + 5 * eps * x.abs() if spec.activation == "silu" else lost
    return lost


@pytest.mark.parametrize("spec", SPECS)
def test_an_action_has_the_same_bits_alone_as_in_any_company(spec: PolicySpec) -> None:
    rng = np.random.default_rng(0)
    weights, obs = random_weights(spec, 13), torch.randn(13, 8, spec.obs_dim)
    alone = torch.stack([
        torch.cat([mean_action(spec, w[None], x[None, None])[0] for x in seen])
        for w, seen in zip(weights, obs, strict=True)
    ])  # fmt: skip
    num_threads = torch.get_num_threads()
    try:
        for N, E, threads in itertools.product(range(1, 14), (1, 2, 3, 5, 8), (1, 2)):
            torch.set_num_threads(threads)
            rows, seen = torch.from_numpy(rng.permutation(13)[:N]), torch.from_numpy(rng.permutation(8)[:E])
            actions = mean_action(spec, weights[rows], obs[rows][:, seen])
            assert torch.equal(actions, alone[rows][:, seen])
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_an_action_has_the_same_bits_wherever_the_weights_lie(offset: int) -> None:
    spec = PolicySpec(17, 6)
    weights, obs = random_weights(spec, 3), torch.randn(3, 5, 17)
    expected = mean_action(spec, weights, obs)
    shifted_weights, shifted_obs = (
        torch.cat([torch.zeros(offset), x.flatten()])[offset:].view(x.shape) for x in (weights, obs)
    )
    assert shifted_weights.data_ptr() % 32 != weights.data_ptr() % 32
    assert torch.equal(mean_action(spec, shifted_weights, shifted_obs), expected)
    longer = torch.cat([torch.zeros(3, offset), weights, torch.ones(3, 7)], 1)  # rows that are no block of memory
    assert torch.equal(mean_action(spec, longer[:, offset:-7], obs.mT.contiguous().mT), expected)


def test_an_action_has_the_same_bits_with_other_calls_beside() -> None:
    spec = PolicySpec(17, 6)
    weights, obs = random_weights(spec, 8), torch.randn(8, 64, 17)
    expected = mean_action(spec, weights, obs)
    with ThreadPoolExecutor(8) as pool:
        firsts = [*range(8)] * 8
        for first, actions in zip(
            firsts, pool.map(lambda i: mean_action(spec, weights[i:], obs[i:]), firsts), strict=True
        ):
            assert torch.equal(actions, expected[first:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_action_of_weights_that_are_no_numbers_is_none(activation: Activation) -> None:
    spec = PolicySpec(3, 2, (5, 4), activation)
    weights, obs = random_weights(spec, 2), torch.randn(2, 4, 3)
    spec.unflatten(weights)["policy_net.0.bias"][1, 2] = math.nan
    actions = mean_action(spec, weights, obs)
    assert actions[0].isfinite().all()
    assert actions[1].isnan().all()


def test_policy_is_that_of_stable_baselines3() -> None:
    sb3 = pytest.importorskip("stable_baselines3", reason="compares with stable-baselines3, which is not installed")
    model = sb3.PPO("MlpPolicy", "Pendulum-v1", n_steps=8, batch_size=8, device="cpu", seed=0)
    spec = PolicySpec(3, 1)
    for parameter in model.policy.parameters():  # biases and log_std start at zero, where an order would not show
        torch.nn.init.normal_(parameter, std=0.3)
    state = {name.removeprefix("mlp_extractor."): value for name, value in model.policy.state_dict().items()}
    actor = {name: value for name, value in state.items() if "value_net" not in name}
    weights = torch.cat([value.flatten() for value in actor.values()])
    assert list(actor) == list(spec.layout)
    for name, value in spec.unflatten(weights).items():
        assert torch.equal(value, actor[name])
    # The whole policy's vector is the actor's with the critic's parameters let in between.
    vector = np.concatenate([value.flatten() for value in state.values()])
    np.testing.assert_array_equal(model.policy.parameters_to_vector(), vector)
    obs = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    predicted, _ = model.predict(obs, deterministic=True)
    actions = mean_action(spec, weights[None], torch.from_numpy(obs)[None])[0].numpy()
    np.testing.assert_allclose(np.clip(actions, -2, 2), predicted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"obs_dim": 0}, "PolicySpec: obs_dim must be a positive int, got 0"),
        ({"act_dim": 2.0}, r"PolicySpec: act_dim must be a positive int, got 2\.0"),
        ({"hidden_sizes": [64, 64]}, r"hidden_sizes must be a tuple of positive ints, got \[64, 64\]"),
        ({"hidden_sizes": (64, 0)}, r"hidden_sizes must be a tuple of positive ints, got \(64, 0\)"),
        ({"activation": "gelu"}, r"activation must be one of \('tanh', 'relu', 'elu', 'silu'\), got 'gelu'"),
    ],
)
def test_bad_spec_is_refused(kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PolicySpec(**{"obs_dim": 3, "act_dim": 2} | kwargs)


@pytest.mark.parametrize("change", [{"extra": 1}, {"obs_dim": ...}])
def test_from_dict_refuses_other_keys(change: dict[str, object]) -> None:
    spec = {name: value for name, value in (PolicySpec(3, 2).to_dict() | change).items() if value is not ...}
    with pytest.raises(ValueError, match=r"from_dict: expected the keys \['act_dim', .*\], got \["):
        PolicySpec.from_dict(spec)


def test_bad_arrays_are_refused() -> None:
    spec = PolicySpec(3, 2, hidden_sizes=(4,))
    weights, obs = torch.zeros(2, spec.num_params), torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"mean_action: weights must have shape \(N, 28\), got \(2, 27\)"):
        mean_action(spec, weights[:, :-1], obs)
    with pytest.raises(ValueError, match=r"mean_action: weights must have shape \(N, 28\), got \(28,\)"):
        mean_action(spec, weights[0], obs)
    with pytest.raises(ValueError, match=r"obs must have shape \(N, E, obs_dim\) = \(2, E, 3\), got \(2, 5, 4\)"):
        mean_action(spec, weights, torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match=r"obs must have shape \(N, E, obs_dim\) = \(2, E, 3\), got \(1, 5, 3\)"):
        mean_action(spec, weights, obs[:1])
    with pytest.raises(TypeError, match=r"obs must be torch\.float32 on the CPU, got torch\.float64 on cpu"):
        mean_action(spec, weights, obs.double())
    with pytest.raises(TypeError, match=r"weights must be torch\.float32 on the CPU, got torch\.float32 on meta"):
        mean_action(spec, weights.to("meta"), obs)
    with pytest.raises(ValueError, match="mean_actions: params must have at least 28 columns, got 27"):
        _core.mean_actions(weights.numpy()[:, 1:].copy(), obs.numpy(), act_dim=2, hidden_sizes=(4,), activation="tanh")
    with pytest.raises(ValueError, match="mean_actions: activation must be tanh, relu or elu, got gelu"):
        _core.mean_actions(weights.numpy(), obs.numpy(), act_dim=2, hidden_sizes=(4,), activation="gelu")
    with pytest.raises(ValueError, match="mean_actions: hidden_sizes must be >= 1, got 0"):
        _core.mean_actions(weights.numpy(), obs.numpy(), act_dim=2, hidden_sizes=(0,), activation="tanh")
    with pytest.raises(ValueError, match=r"unflatten: weights must have shape \(\.\.\., 28\), got \(2, 29\)"):
        spec.unflatten(torch.zeros(2, 29))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_exact_to_five_units_in_the_last_place(activation: Activation) -> None:
    spec = PolicySpec(1, 1, (1,), activation)
    weights = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]])  # log_std, then x -> activation(x)
    x = torch.linspace(-12, 12, 100_001)
    functional = torch.nn.functional
    exact = {"tanh": torch.tanh, "relu": torch.relu, "elu": functional.elu, "silu": functional.silu}[activation]
    oracle = exact(x.double())
    error = (mean_action(spec, weights, x.view(1, -1, 1)).flatten() - oracle).abs()
    scale = (
        oracle.abs() if activation in ("tanh", "silu") else torch.ones(())
    )  # exp(x) - 1 keeps its place after the point
    assert (error <= 5 * torch.finfo(torch.float32).eps * scale).all()


def test_layer_views_leave_the_rest_of_a_row_alone() -> None:
    params = torch.zeros(2, 20)
    for weight, bias in layer_views(params, (3, 2, 1)):
        weight.fill_(1.0)
        bias.fill_(1.0)
    assert torch.equal(params, torch.tensor([1.0] * 11 + [0.0] * 9).expand(2, 20))


def test_a_policy_with_gsde_has_a_matrix_of_log_stds_and_the_same_mean_action() -> None:
    spec, plain = PolicySpec(3, 2, (5, 4), "relu", gsde=True), PolicySpec(3, 2, (5, 4), "relu")
    assert spec.shapes["log_std"] == (4, 2)
    assert spec.num_params == plain.num_params + 6
    assert layout_from_dict(spec.to_dict()) == spec
    assert "gsde" not in plain.to_dict()  # the record of a store by an older tipl
    weights, obs = torch.randn(6, spec.num_params), torch.randn(6, 9, 3)
    expected = mean_action(plain, torch.cat([weights[:, :2], weights[:, 8:]], 1), obs)
    assert torch.equal(mean_action(spec, weights, obs), expected)
    with pytest.raises(ValueError, match="gsde must be a bool, got 1"):
        PolicySpec(3, 2, gsde=1)


SAC = PolicySpec(5, 2, (7, 4), "relu", spread="head", squash=True)
KINDS = {
    "SAC": SAC,
    "SAC without hidden layers": PolicySpec(5, 2, (), "relu", spread="head", squash=True),
    "SAC with gSDE": PolicySpec(5, 2, (7, 4), "relu", gsde=True, squash=True, mean_limit=0.5),
    "TD3": PolicySpec(5, 2, (7,), "elu", spread="none", squash=True),
    "TD3 without hidden layers": PolicySpec(5, 2, (), spread="none", squash=True),
    "PPO with squashed gSDE": PolicySpec(5, 2, (3, 3), gsde=True, squash=True),
    "Brax": PolicySpec(5, 2, (7, 4), "silu", spread="halves", squash=True),
    "Brax without hidden layers": PolicySpec(5, 2, (), "silu", spread="halves", squash=True),
}
LOW, HIGH = np.array([-1.0, -0.4]), np.array([3.0, 0.4])


def test_a_layout_has_log_std_where_sb3_registers_it() -> None:
    assert [*SAC.shapes.items()][-4:] == [
        ("action_net.weight", (2, 4)),
        ("action_net.bias", (2,)),
        ("log_std.weight", (2, 4)),
        ("log_std.bias", (2,)),
    ]
    assert [*KINDS["Brax"].shapes.items()][-2:] == [("action_net.weight", (4, 4)), ("action_net.bias", (4,))]
    assert [*KINDS["TD3"].shapes] == [
        "policy_net.0.weight",
        "policy_net.0.bias",
        "action_net.weight",
        "action_net.bias",
    ]
    for spec in (*KINDS.values(), *SPECS):
        num_units = 4 if spec == KINDS["Brax without hidden layers"] else spec.layer_sizes[1]
        assert [*spec.shapes.values()][spec.first_layer] == (num_units, spec.obs_dim)


def test_only_what_is_not_plain_is_written() -> None:
    plain = {"obs_dim": 17, "act_dim": 6, "hidden_sizes": [64, 64], "activation": "tanh"}
    assert PolicySpec(17, 6).to_dict() == plain  # the bytes of stores by an older tipl
    assert PolicySpec(17, 6, gsde=True).to_dict() == plain | {"gsde": True}
    for spec in KINDS.values():
        assert layout_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(ValueError, match=r"expected the keys .* got \['act_dim', .*'squish'\]"):
        PolicySpec.from_dict(plain | {"squish": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"squash": 1}, "squash must be a bool, got 1"),
        ({"spread": "vector"}, r"spread must be one of \('parameter', 'head', 'halves', 'none'\), got 'vector'"),
        ({"spread": "head", "gsde": True}, "spread must be 'parameter' with gsde, got 'head'"),
        ({"mean_limit": 0.0}, "mean_limit must be a finite positive float or None, got 0.0"),
        ({"mean_limit": 2}, "mean_limit must be a finite positive float or None, got 2"),
        ({"mean_limit": math.inf}, "mean_limit must be a finite positive float or None, got inf"),
    ],
)
def test_a_policy_of_no_kind_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"PolicySpec: {message}"):
        PolicySpec(3, 2, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_acts_as_torch_modules(kind: str) -> None:
    spec = KINDS[kind]
    plain = PolicySpec(spec.obs_dim, spec.act_dim, spec.hidden_sizes, spec.activation)
    weights, obs = 2 * random_weights(spec, 9), torch.randn(9, 6, spec.obs_dim)
    parts = spec.unflatten(weights)
    if spec.spread == "halves":
        parts |= {name: parts[name][:, : spec.act_dim] for name in ("action_net.weight", "action_net.bias")}
    mlp = torch.cat([part.flatten(1) for name, part in parts.items() if not name.startswith("log_std")], 1)
    mlp = torch.nn.functional.pad(mlp, (spec.act_dim, 0))
    limit = math.inf if spec.mean_limit is None else spec.mean_limit
    means = mean_action(spec, weights, obs)
    assert torch.equal(means, mean_action(plain, mlp, obs).clamp(-limit, limit))
    assert (means.abs() == limit).any() == (spec.mean_limit is not None)
    oracle = torch.stack([torch_actor(plain, w)(x) for w, x in zip(mlp.double(), obs.double(), strict=True)])
    unit = torch.tanh(oracle.detach().clamp(-limit, limit)).numpy()
    actions = actions_of(spec, means.numpy(), LOW, HIGH)
    bound = rounding_bound(plain, mlp.double(), obs.double()).numpy()  # tanh makes no error larger
    eps = np.finfo(np.float32).eps
    expected = LOW + (unit + 1) / 2 * (HIGH - LOW)
    assert (abs(actions - expected) <= (bound / 2 + 4 * eps) * (HIGH - LOW) + eps).all()
    assert ((actions >= LOW.astype(np.float32)) & (actions <= HIGH.astype(np.float32))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_squashed_action_has_the_same_bits_alone_as_in_any_company(kind: str) -> None:
    spec, rng = KINDS[kind], np.random.default_rng(0)
    weights, obs = random_weights(spec, 13), torch.randn(13, 8, spec.obs_dim)

    def act(rows: Any, seen: Any) -> np.ndarray:
        return actions_of(spec, mean_action(spec, weights[rows], obs[rows][:, seen]).numpy(), LOW, HIGH)

    alone = np.array([[act([i], [j])[0, 0] for j in range(8)] for i in range(13)])
    for N, E in itertools.product(range(1, 14), (1, 2, 3, 5, 8)):
        rows, seen = rng.permutation(13)[:N], rng.permutation(8)[:E]
        np.testing.assert_array_equal(act(rows, seen), alone[rows][:, seen])
    means = mean_action(spec, weights, obs).numpy()
    np.testing.assert_array_equal(actions_of(spec, np.asfortranarray(means), LOW, HIGH), alone)
    np.testing.assert_array_equal(actions_of(spec, means[::2, 1::3], LOW, HIGH), alone[::2, 1::3])


def test_a_policy_that_squashes_needs_bounds() -> None:
    means = np.zeros((1, 1, 2), np.float32)
    with pytest.raises(ValueError, match=r"needs an action space with bounds, got \[-1\.  -0\.4\] to \[inf 0\.4\]"):
        actions_of(SAC, means, LOW, np.array([math.inf, 0.4]))
    plain = actions_of(PolicySpec(5, 2), means + np.float32(9), LOW, np.array([math.inf, 0.4]))
    np.testing.assert_array_equal(plain, [[[9.0, 9.0]]])  # as the network says; the simulator clips


def test_log_stds_are_where_the_kind_has_them() -> None:
    weights, obs = 3 * random_weights(SAC, 3), 3 * torch.randn(3, 9, 5)
    parts = SAC.unflatten(weights)
    found = log_stds(SAC, weights, obs)
    assert found is not None
    for i in range(3):
        x = obs[i]
        for layer in (0, 2):
            x = torch.relu(x @ parts[f"policy_net.{layer}.weight"][i].T + parts[f"policy_net.{layer}.bias"][i])
        expected = x @ parts["log_std.weight"][i].T + parts["log_std.bias"][i]
        torch.testing.assert_close(found[i], expected.clamp(-20, 2), rtol=1e-5, atol=1e-5)
    assert found.max() == 2.0  # SB3's bound
    plain = PolicySpec(5, 2)
    weights = random_weights(plain, 3)
    found = log_stds(plain, weights, obs)
    assert found is not None
    assert torch.equal(found, weights[:, None, :2].expand(3, 9, 2))
    for kind in ("SAC with gSDE", "TD3", "Brax"):
        assert log_stds(KINDS[kind], random_weights(KINDS[kind], 3), obs) is None
