import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tipl.policy import PolicySpec, activate_, layer_views, mean_action

SPECS = [
    PolicySpec(17, 6),
    PolicySpec(4, 1),
    PolicySpec(3, 2, hidden_sizes=(5,), activation="relu"),
    PolicySpec(11, 3, hidden_sizes=(16, 7, 9)),
    PolicySpec(5, 4, hidden_sizes=()),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_weights(spec: PolicySpec, num_policies: int, seed: int = 0) -> torch.Tensor:
    """Return (N, p) weights with non-zero biases, small enough for tanh not to saturate."""
    return 0.3 * torch.randn(num_policies, spec.num_params, generator=torch.Generator().manual_seed(seed))


def torch_actor(spec: PolicySpec, weights: torch.Tensor) -> torch.nn.Sequential:
    """Return one policy (p,) as ordinary torch modules, filled in the order of the layout."""
    activation = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU, "elu": torch.nn.ELU}[spec.activation]
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
    in_torch = torch.stack([torch_actor(spec, w)(x) for w, x in zip(weights, obs, strict=True)])
    bound = 2 * (in_torch - oracle).abs().max() + 4 * torch.finfo(torch.float32).eps
    assert (actions - oracle).abs().max() <= bound


def test_mean_action_of_one_policy_does_not_depend_on_the_others() -> None:
    spec = PolicySpec(17, 6)
    weights, obs = random_weights(spec, 5), torch.randn(5, 32, 17)
    together = mean_action(spec, weights, obs)
    assert torch.equal(mean_action(spec, weights[2:4].clone(), obs[2:4].clone()), together[2:4])


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
        ({"activation": "gelu"}, r"activation must be one of \('tanh', 'relu', 'elu'\), got 'gelu'"),
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
    with pytest.raises(TypeError, match=r"obs must have the dtype of weights, torch\.float32, got torch\.float64"):
        mean_action(spec, weights, obs.double())
    with pytest.raises(ValueError, match=r"unflatten: weights must have shape \(\.\.\., 28\), got \(2, 29\)"):
        spec.unflatten(torch.zeros(2, 29))


def test_tanh_is_exact_to_an_ulp_or_two() -> None:
    x = torch.linspace(-12, 12, 100_001)
    oracle = torch.tanh(x.double())
    error = (activate_(x.clone(), "tanh").double() - oracle).abs()
    assert (error <= 2 * torch.finfo(torch.float32).eps * oracle.abs()).all()
    assert activate_(torch.tensor([math.nan]), "tanh").isnan().all()


def test_layer_views_leave_the_rest_of_a_row_alone() -> None:
    params = torch.zeros(2, 20)
    for weight, bias in layer_views(params, (3, 2, 1)):
        weight.fill_(1.0)
        bias.fill_(1.0)
    assert torch.equal(params, torch.tensor([1.0] * 11 + [0.0] * 9).expand(2, 20))
