"""How far policies act apart: by hand on linear policies, against torch.distributions and slow loops on networks.

The loops have the actions of `mean_action`, as the simulator has; tests/test_policy.py holds those against float64.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tipl.collecting.policy_network import log_stds, mean_action
from tipl.judging.action_metrics import action_bounds, action_differences, action_variance, kl_divergences, unit_actions
from tipl.policy import PolicySpec

LINE = PolicySpec(obs_dim=1, act_dim=1, hidden_sizes=())  # weights: log_std, slope, intercept
STATES = np.array([[0.0], [1.0]], np.float32)
BOUNDS = np.array([[-2.0], [2.0]])

NETWORK = PolicySpec(obs_dim=5, act_dim=3, hidden_sizes=(16, 8))
WIDE = np.array([[-1.0, -0.4, -3.0], [1.0, 0.4, 1.0]])


def lines(*rows: tuple[float, float, float]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)


@pytest.fixture
def networks() -> NDArray[np.float32]:
    """Six policies (6, p), the first the true one."""
    return (0.6 * np.random.default_rng(0).standard_normal((6, NETWORK.num_params))).astype(np.float32)


@pytest.fixture
def states() -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((40, NETWORK.obs_dim)).astype(np.float32)


def slow_means(policy: NDArray[np.float32], states: NDArray[np.float32]) -> NDArray[np.float64]:
    """The mean actions (S, A) of one policy (p,), in one state after the other."""
    weights, seen = torch.from_numpy(policy)[None], torch.from_numpy(states)
    return np.array([mean_action(NETWORK, weights, x[None, None])[0, 0].numpy() for x in seen]).astype(np.float64)


def test_differences_by_hand() -> None:
    true = lines((0, 1, 0))[0]  # actions 0 and 1
    forecasts = lines((0, 1, 0), (0, 1, 1), (0, 1, 9), (0, 9, 0))
    # In units of 2: no difference; 1/2 twice; both clipped to 2, so 1 and 1/2; 0 and 1/2, for 9 is clipped to 2.
    expected = [0, 1 / 2, np.sqrt((1 + 1 / 4) / 2), np.sqrt(1 / 8)]
    np.testing.assert_allclose(action_differences(LINE, true, forecasts, STATES, BOUNDS), expected)
    unbounded = np.array([[-np.inf], [np.inf]])
    np.testing.assert_allclose(action_differences(LINE, true, forecasts[:3], STATES, unbounded), [0, 1, 9])


def test_divergences_by_hand() -> None:
    true = lines((0, 1, 0))[0]
    two = np.log(2)
    forecasts = lines((0, 1, 0), (0, 1, 3), (two, 1, 1), (0, 3, 0))
    # Means apart by 3, as far as the clipped actions are not; by 1 at twice the spread; by 0 and 2.
    expected = [0, 9 / 2, two + (1 + 1) / 8 - 1 / 2, (0 + 4 / 2) / 2]
    np.testing.assert_allclose(kl_divergences(LINE, true, forecasts, STATES), expected, rtol=1e-6, atol=1e-12)


def test_a_spread_that_overflows_has_no_divergence() -> None:
    true = lines((0, 1, 0))[0]
    kl = kl_divergences(LINE, true, lines((-400, 1, 0), (-400, 1, 1), (300, 1, 0)), STATES)
    assert np.isfinite(kl).tolist() == [False, False, True]
    assert kl[2] == pytest.approx(299.5)


def test_differences_equal_slow_ones(networks: NDArray[np.float32], states: NDArray[np.float32]) -> None:
    got = action_differences(NETWORK, networks[0], networks[1:], states, WIDE)
    actions = [np.clip(slow_means(policy, states), *WIDE) / np.array([1.0, 0.4, 2.0]) for policy in networks]
    np.testing.assert_allclose(unit_actions(NETWORK, networks, states, WIDE), actions, rtol=1e-12, atol=1e-14)
    expected = [np.sqrt(np.mean((forecast - actions[0]) ** 2)) for forecast in actions[1:]]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert got.max() <= 2


def test_divergences_equal_those_of_torch(networks: NDArray[np.float32], states: NDArray[np.float32]) -> None:
    gaussians = [
        torch.distributions.Independent(
            torch.distributions.Normal(
                torch.from_numpy(slow_means(policy, states)), torch.from_numpy(policy[:3].astype(np.float64)).exp()
            ),
            1,
        )
        for policy in networks
    ]
    expected = [torch.distributions.kl_divergence(gaussians[0], it).mean().item() for it in gaussians[1:]]
    got = kl_divergences(NETWORK, networks[0], networks[1:], states)
    np.testing.assert_allclose(got, expected, rtol=1e-11)
    backwards = torch.distributions.kl_divergence(gaussians[1], gaussians[0]).mean().item()
    assert got[0] != pytest.approx(backwards, rel=0.01)  # the true policy comes first


def test_policies_that_squash_are_compared_as_they_act(states: NDArray[np.float32]) -> None:
    spec = PolicySpec(5, 3, (16, 8), "relu", spread="head", squash=True)
    policies = (0.6 * np.random.default_rng(0).standard_normal((6, spec.num_params))).astype(np.float32)
    seen = torch.from_numpy(states).expand(6, -1, -1)
    means = mean_action(spec, torch.from_numpy(policies), seen).double()
    spread = log_stds(spec, torch.from_numpy(policies), seen)
    assert spread is not None
    # In half action ranges, tanh is the action but for the middle of the space.
    middle = WIDE.mean(0) / np.array([1.0, 0.4, 2.0])
    actions = means.tanh().numpy() + middle
    np.testing.assert_allclose(unit_actions(spec, policies, states, WIDE), actions, rtol=1e-5, atol=1e-6)
    expected = [np.sqrt(np.mean((it - actions[0]) ** 2)) for it in actions[1:]]
    np.testing.assert_allclose(action_differences(spec, policies[0], policies[1:], states, WIDE), expected, rtol=1e-5)
    normals = [torch.distributions.Independent(torch.distributions.Normal(*it), 1) for it in
               zip(means, spread.double().exp(), strict=True)]  # fmt: skip
    expected = [torch.distributions.kl_divergence(normals[0], it).mean().item() for it in normals[1:]]
    np.testing.assert_allclose(kl_divergences(spec, policies[0], policies[1:], states), expected, rtol=1e-11)


def test_policies_without_a_gaussian_of_their_own_have_no_divergence(states: NDArray[np.float32]) -> None:
    for spec in (PolicySpec(5, 3, (8,), spread="none", squash=True), PolicySpec(5, 3, (8,), gsde=True)):
        policies = np.random.default_rng(0).standard_normal((4, spec.num_params)).astype(np.float32)
        assert np.isnan(kl_divergences(spec, policies[0], policies[1:], states)).all()
        assert (action_differences(spec, policies[0], policies[1:], states, WIDE) > 0).all()


def test_a_forecast_is_judged_alike_whatever_is_judged_beside_it(
    networks: NDArray[np.float32], states: NDArray[np.float32]
) -> None:
    true, forecasts = networks[0], networks[1:]
    for seen in (states, states[:7], states[:1]):
        differences = action_differences(NETWORK, true, forecasts, seen, WIDE)
        divergences = kl_divergences(NETWORK, true, forecasts, seen)
        for some in ([0], [3], [4, 1], [2, 0, 3], [4, 3, 2, 1, 0]):
            got = action_differences(NETWORK, true, forecasts[some], seen, WIDE)
            np.testing.assert_array_equal(got, differences[some])
            np.testing.assert_array_equal(kl_divergences(NETWORK, true, forecasts[some], seen), divergences[some])


def test_divergence_is_never_negative(networks: NDArray[np.float32], states: NDArray[np.float32]) -> None:
    near = np.tile(networks[0], (50, 1))
    near[:, :3] += 1e-6 * np.random.default_rng(2).standard_normal((50, 3)).astype(np.float32)
    kl = kl_divergences(NETWORK, networks[0], near, states)
    assert (kl >= 0).all()
    assert kl.max() < 1e-10


def test_variance_between_policies(networks: NDArray[np.float32], states: NDArray[np.float32]) -> None:
    actions = np.array([np.clip(slow_means(policy, states), *WIDE) / np.array([1.0, 0.4, 2.0]) for policy in networks])
    slow = np.mean([[np.var(actions[:, s, a], ddof=1) for a in range(3)] for s in range(len(states))])
    assert action_variance(NETWORK, networks, states, WIDE) == pytest.approx(slow, rel=1e-11)
    assert action_variance(NETWORK, np.tile(networks[:1], (4, 1)), states, WIDE) == pytest.approx(0, abs=1e-28)


def test_bounds_are_those_of_the_task() -> None:
    np.testing.assert_array_equal(action_bounds("InvertedPendulum-v5"), [[-3.0], [3.0]])
    assert action_bounds("Hopper-v5").shape == (2, 3)
