import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray

from tests import reference
from tipl.envs import VectorEnv
from tipl.policy import PolicySpec, mean_action
from tipl.ppo import FinalStep, Learner, Population, PPOConfig, Transitions, clip_grad_norms_, entropy, gae, log_prob

# A small iteration whose minibatches are still multiples of 16, as bitwise independence asks.
SMALL = PPOConfig(num_steps=64, num_minibatches=4, update_epochs=3)


class ScriptedEnv(VectorEnv):
    """Identifiable steps: observation (seed, episode, step in the episode) / 10, reward 100 x (step overall) + action.

    Even episodes terminate after 5 steps, odd ones time out after 7. So nothing is random but a seed's own label.
    """

    def __init__(self, num_envs: int, act_dim: int = 1) -> None:
        super().__init__("Scripted-v0", num_envs, 3, Box(-np.inf, np.inf, (act_dim,), np.float32), None)
        self.labels = np.full(num_envs, -1.0)
        self.episode, self.elapsed, self.total = (np.zeros(num_envs, np.int64) for _ in range(3))

    def _seed(self, seeds: list[int]) -> None:
        self.labels[:] = seeds
        self.episode[:], self.total[:] = -1, 0

    def _observe(self, ids: NDArray[np.intp]) -> NDArray[np.float64]:
        return np.stack([self.labels[ids], self.episode[ids], self.elapsed[ids]], 1) / 10

    def _advance(
        self, actions: NDArray[np.float64], ids: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
        reward = 100.0 * self.total[ids] + actions[:, 0]
        self.total[ids] += 1
        self.elapsed[ids] += 1
        even = self.episode[ids] % 2 == 0
        return self._observe(ids), reward, even & (self.elapsed[ids] == 5), ~even & (self.elapsed[ids] == 7)

    def _restart(self, ids: NDArray[np.intp]) -> NDArray[np.float64]:
        self.episode[ids] += 1
        self.elapsed[ids] = 0
        return self._observe(ids)

    def close(self) -> None:
        pass


class TargetEnv(ScriptedEnv):
    """Observation x, uniform in [-1, 1]; reward -(action - 0.8 x + 0.3)^2; a time limit of 16 steps."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs)
        self.obs_dim, self._obs = 1, np.zeros((num_envs, 1))

    def _seed(self, seeds: list[int]) -> None:
        super()._seed(seeds)
        self.rngs = [np.random.default_rng(seed) for seed in seeds]

    def _observe(self, ids: NDArray[np.intp]) -> NDArray[np.float64]:
        return np.array([self.rngs[i].uniform(-1, 1, 1) for i in ids])

    def _advance(
        self, actions: NDArray[np.float64], ids: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
        reward = -((actions[:, 0] - 0.8 * self._obs[ids, 0] + 0.3) ** 2)
        self.elapsed[ids] += 1
        return self._observe(ids), reward, np.zeros(len(ids), np.bool_), self.elapsed[ids] == 16


def population(seeds: Sequence[int], config: PPOConfig = SMALL, act_dim: int = 1, **kwargs: object) -> Population:
    return Population(ScriptedEnv(len(seeds), act_dim), config, seeds, **kwargs)


def path(seeds: Sequence[int], config: PPOConfig = SMALL, iterations: int = 3, **kwargs: object) -> NDArray[np.float32]:
    """Return the weights (N, iterations, p) of a population after each iteration."""
    trials = population(seeds, config, **kwargs)
    rows = []
    for _ in range(iterations):
        trials.iterate()
        rows.append(trials.weights())
    return np.stack(rows, 1)


# ---- advantages


def test_gae_by_hand() -> None:
    # gamma = gae_lambda = 1/2, so that all is exact. Step 1 terminates; step 3 times out, and V(final_obs) there is 8.
    rewards, values = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 6.0, 8.0, 10.0]
    next_values = [4.0, 77.0, 8.0, 8.0, 12.0]  # 77: what follows a termination must not matter
    deltas = [1 + 2 - 2, 2 - 4, 3 + 4 - 6, 4 + 4 - 8, 5 + 6 - 10]  # 1, -2, 1, 0, 1
    expected = [1 - 2 / 4, -2.0, 1 + 0 / 4, 0.0, 1.0]  # running sums, cut after steps 1 and 3
    assert deltas == [1, -2, 1, 0, 1]
    column = [np.array([x], np.float32).T for x in (rewards, values, next_values)]
    terminated = np.array([[0, 1, 0, 0, 0]], bool).T
    done = np.array([[0, 1, 0, 1, 0]], bool).T
    advantages = gae(*column, terminated, done, gamma=0.5, gae_lambda=0.5)
    assert advantages.dtype == np.float32
    assert advantages[:, 0].tolist() == expected


def test_gae_equals_stable_baselines3() -> None:
    pytest.importorskip("stable_baselines3", reason="compares with stable-baselines3, which is not installed")
    from stable_baselines3.common.buffers import RolloutBuffer

    T, N, rng = 40, 3, np.random.default_rng(0)
    rewards, values, final_values = rng.normal(size=(3, T, N)).astype(np.float32)
    terminated, truncated = rng.random((2, T, N)) < 0.15
    done = terminated | truncated
    last_values = rng.normal(size=N).astype(np.float32)
    buffer = RolloutBuffer(T, Box(-1, 1, (1,)), Box(-1, 1, (1,)), gamma=0.9, gae_lambda=0.8, n_envs=N)
    # SB3 adds a time-out's value to its reward, and stores whether an episode starts rather than whether one has ended.
    buffer.rewards[:] = rewards + np.float32(0.9) * final_values * (truncated & ~terminated)
    buffer.values[:] = values
    buffer.episode_starts[1:] = done[:-1]
    buffer.compute_returns_and_advantage(torch.from_numpy(last_values), done[-1])
    next_values = np.where(done, final_values, np.vstack([values[1:], last_values]))
    advantages = gae(rewards, values, next_values, terminated, done, gamma=0.9, gae_lambda=0.8)
    np.testing.assert_allclose(advantages, buffer.advantages, rtol=0, atol=2e-6)


def value_is_first_observation(learner: Learner) -> None:
    """Make a critic without hidden layers say V(obs) = 10 obs[2], which is the step in the episode."""
    for weight, bias in learner.critic.layers:
        weight.copy_(torch.tensor([[0.0, 0.0, 10.0]]))
        bias.zero_()


def test_time_out_bootstraps_from_the_final_observation() -> None:
    trials = population([3, 4], dataclasses.replace(SMALL, hidden_sizes=()), num_threads=1)
    transitions, num_episodes, _ = trials.act()
    (learner,) = trials.learners
    value_is_first_observation(learner)
    values = learner.values(transitions.observations).numpy().T  # (T, N)
    next_values = learner.next_values(values, transitions)
    # Episodes of 5 (terminated) and 7 (timed out) steps in turn: 12 steps a pair, 64 = 5 x 12 + 4.
    step = np.concatenate([np.tile([*range(5), *range(7)], 5), np.arange(4)])
    assert num_episodes.tolist() == [10, 10]
    np.testing.assert_array_equal(values, np.tile(step, (2, 1)).T)
    truncated, terminated = transitions.truncated[:, 0], transitions.terminated[:, 0]
    assert np.flatnonzero(terminated).tolist() == [4 + 12 * i for i in range(5)]
    assert np.flatnonzero(truncated).tolist() == [11 + 12 * i for i in range(5)]
    # Everywhere else than at a termination the next value is that of one step further in the same episode, also at
    # the time-outs (7, where the next row says 0) and at the last step (4, which has no next row).
    np.testing.assert_array_equal(next_values[~terminated], np.tile(step[~terminated] + 1, (2, 1)).T)
    assert next_values[truncated].tolist() == [[7.0, 7.0]] * 5
    assert next_values[-1].tolist() == [4.0, 4.0]


def test_transitions_are_the_steps_that_were_made() -> None:
    trials = population([7, 2, 5], act_dim=2)
    weights = torch.from_numpy(trials.weights())
    first, _, _ = trials.act()
    second, _, _ = trials.act()
    t = np.arange(128)[:, None]
    rewards = np.concatenate([first.rewards, second.rewards])
    actions = torch.cat([first.actions, second.actions], 1)
    # The reward is 100 t + action: row t holds the action of step t, and its observation names trial and step.
    np.testing.assert_allclose(rewards - 100 * t, actions[..., 0].T, rtol=0, atol=1e-3)
    observations = torch.cat([first.observations, second.observations], 1)
    elapsed = np.concatenate([np.tile([*range(5), *range(7)], 10), [*range(5), *range(3)]])
    for i, seed in enumerate([7, 2, 5]):
        np.testing.assert_allclose(observations[i, :, 0], seed / 10, rtol=1e-6)
        np.testing.assert_allclose(observations[i, :, 2], elapsed / 10, rtol=1e-6)
    # Log-probabilities are those of the actions under the policy's distribution, time-outs and resets or not.
    mean = mean_action(trials.spec, weights, first.observations)
    normal = torch.distributions.Normal(mean, trials.spec.unflatten(weights)["log_std"].exp()[:, None])
    torch.testing.assert_close(first.log_probs, normal.log_prob(first.actions).sum(-1), rtol=0, atol=2e-5)


# ---- distribution, clipping, gradient, update


def test_log_prob_and_entropy_equal_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, noise = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator)
    log_std = torch.randn(3, 1, 4, dtype=torch.float64, generator=generator)
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(log_prob(noise, log_std), normal.log_prob(mean + log_std.exp() * noise))
    torch.testing.assert_close(entropy(log_std), normal.entropy()[:, 0])


def test_gradient_norms_are_clipped_for_each_trial_alone() -> None:
    grads = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    grads *= torch.tensor([[10.0], [0.01], [0.0], [1.0]])
    expected = grads.clone()
    for row in expected:
        parameter = torch.nn.Parameter(torch.zeros(10))
        parameter.grad = row
        torch.nn.utils.clip_grad_norm_([parameter], 0.5)
    before = grads.clone()
    clip_grad_norms_(grads, 0.5)
    torch.testing.assert_close(grads, expected, rtol=1e-6, atol=0)
    assert torch.equal(grads[1:3], before[1:3])
    assert grads[0].norm() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("hidden_sizes", [(), (8, 5), (16, 16)])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("act_dim", [1, 3])
def test_gradient_equals_autograd(hidden_sizes: tuple[int, ...], activation: str, act_dim: int) -> None:
    config = dataclasses.replace(SMALL, hidden_sizes=hidden_sizes, activation=activation, ent_coef=0.1, vf_coef=0.7)
    spec, C, B = PolicySpec(4, act_dim, hidden_sizes, activation), 3, config.minibatch_size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    critic_params = sum(o * (i + 1) for i, o in zip((4, *hidden_sizes), (*hidden_sizes, 1), strict=True))
    params = 0.3 * normal(C, spec.num_params + critic_params)
    agents = [reference.Agent(row, 4, act_dim, config) for row in params]
    obs, action, advantage, target = normal(C, B, 4), normal(C, B, act_dim), normal(C, B), normal(C, B)
    # Ratios on both sides of the clip range and inside, with advantages of both signs.
    old_log_prob = torch.stack([agents[i].distribution(obs[i]).log_prob(action[i]) for i in range(C)]).detach()
    old_log_prob += 0.3 * normal(C, B)
    learner = Learner(spec, config, params)
    learner.backpropagate(2, obs, action, old_log_prob, advantage, target)
    for i, agent in enumerate(agents):
        losses = reference.ppo_losses(agent, obs[i], action[i], old_log_prob[i], advantage[i], target[i], config)
        assert 0.1 < losses["clipfrac"] < 0.9
        gradient = torch.autograd.grad(losses["loss"], list(agent.parameters()))
        torch.testing.assert_close(learner.grads[i], torch.cat([g.flatten() for g in gradient]), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(-learner.objectives[2, i].mean(), losses["policy_loss"].detach())


def test_update_equals_autograd_with_torch_clipping_and_adam() -> None:
    config = dataclasses.replace(SMALL, learning_rate=1e-3, ent_coef=0.01, max_grad_norm=2.0)
    trials = population([1, 2], config, act_dim=2, num_threads=1)
    transitions, _, _ = trials.act()
    transitions = dataclasses.replace(transitions, rewards=transitions.rewards / 1000)
    rows, generators = trials.params.clone(), [torch.Generator().set_state(g.get_state()) for g in trials.generators]
    (learner,) = trials.learners
    values, advantages = learner.estimate(transitions)
    stats = learner.update(transitions, trials.generators)
    for i, generator in enumerate(generators):
        data = {
            "obs": transitions.observations[i],
            "action": transitions.actions[i],
            "log_prob": transitions.log_probs[i],
            "advantage": torch.from_numpy(advantages[:, i].copy()),
            "target": torch.from_numpy(advantages[:, i] + values[:, i]),
        }
        orders = [torch.randperm(config.num_steps, generator=generator) for _ in range(config.update_epochs)]
        oracle, in_float32 = (reference.Agent(row, 3, 2, config) for row in (rows[i].double(), rows[i]))
        logs = reference.ppo_update(oracle, {name: x.double() for name, x in data.items()}, orders, config)
        reference.ppo_update(in_float32, data, orders, config)
        ours = trials.params[i, : len(oracle.row())]
        bound = 2 * (in_float32.row() - oracle.row()).abs().max() + 4 * torch.finfo(torch.float32).eps
        assert (ours - oracle.row()).abs().max() <= bound
        assert (oracle.row() - rows[i, : len(oracle.row())]).abs().max() > 1e-3  # it did move
        for name in ("policy_loss", "value_loss", "approx_kl", "clipfrac"):
            assert getattr(stats, name)[i] == pytest.approx(logs[name], rel=1e-3, abs=1e-6), name
        returns = advantages[:, i] + values[:, i]
        assert stats.explained_variance[i] == pytest.approx(1 - advantages[:, i].var() / returns.var(), abs=1e-5)
        with torch.no_grad():
            assert stats.entropy[i] == pytest.approx(oracle.distribution(data["obs"].double()).entropy()[0].item())


def test_update_equals_stable_baselines3() -> None:
    """One minibatch an epoch, so that the order of its rows is only a matter of rounding."""
    sb3 = pytest.importorskip("stable_baselines3", reason="compares with stable-baselines3, which is not installed")
    from stable_baselines3.common.logger import Logger

    model = sb3.PPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=64, n_epochs=4, device="cpu", seed=0)
    model.set_logger(Logger(None, []))
    config = PPOConfig(num_steps=64, num_minibatches=1, update_epochs=4)
    spec = PolicySpec(3, 1)
    state = model.policy.state_dict()
    order = [name for name in state if "value_net" not in name] + [name for name in state if "value_net" in name]
    params = torch.cat([state[name].flatten() for name in order])[None]
    learner = Learner(spec, config, params)
    generator = torch.Generator().manual_seed(0)
    transitions = Transitions(
        observations=torch.randn(1, 64, 3, generator=generator),
        actions=torch.randn(1, 64, 1, generator=generator),
        log_probs=-1.4 + 0.3 * torch.randn(1, 64, generator=generator),
        rewards=torch.randn(64, 1, generator=generator).numpy(),
        terminated=np.arange(64)[:, None] % 10 == 9,
        truncated=np.zeros((64, 1), bool),
        final_steps=[FinalStep(0, 63, np.ones(3, np.float32))],
    )
    buffer = model.rollout_buffer
    buffer.observations[:, 0], buffer.actions[:, 0] = transitions.observations[0], transitions.actions[0]
    buffer.rewards[:], buffer.log_probs[:, 0] = transitions.rewards, transitions.log_probs[0]
    buffer.episode_starts[1:] = transitions.terminated[:-1]
    with torch.no_grad():
        buffer.values[:, 0] = model.policy.predict_values(transitions.observations[0])[:, 0]
        last_value = model.policy.predict_values(torch.ones(1, 3))
    buffer.compute_returns_and_advantage(last_value, transitions.terminated[-1])
    buffer.full = True
    model.train()
    stats = learner.update(transitions, [generator])
    after = torch.cat([model.policy.state_dict()[name].flatten() for name in order])
    torch.testing.assert_close(params[0], after, rtol=0, atol=2e-6)
    logged = model.logger.name_to_value
    for name, theirs in (
        ("policy_loss", "policy_gradient_loss"),
        ("value_loss", "value_loss"),
        ("clipfrac", "clip_fraction"),
        ("approx_kl", "approx_kl"),
        ("explained_variance", "explained_variance"),
    ):
        assert getattr(stats, name)[0] == pytest.approx(logged[f"train/{theirs}"], rel=1e-3, abs=1e-6), name


def test_every_transition_is_visited_once_an_epoch() -> None:
    visits: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    class Recording(Learner):
        def backpropagate(self, m: int, obs: torch.Tensor, action: torch.Tensor, *rest: torch.Tensor) -> None:
            visits.append((m, obs.clone(), torch.stack(rest, -1)))
            super().backpropagate(m, obs, action, *rest)

    trials = population([1, 2, 3], dataclasses.replace(SMALL, normalize_advantage=False))
    transitions, _, _ = trials.act()
    # Each step is (trial, t), in every array alike.
    label = torch.stack([torch.arange(3.0)[:, None].expand(3, 64), torch.arange(64.0).expand(3, 64)], -1)
    observations = torch.cat([label, torch.zeros(3, 64, 1)], -1)
    transitions = dataclasses.replace(transitions, observations=observations, log_probs=label.sum(-1))
    Recording(trials.spec, trials.config, trials.params).update(transitions, trials.generators)
    assert [m for m, _, _ in visits] == [0, 1, 2, 3] * 3
    orders = []
    for epoch in range(3):
        obs = torch.cat([obs for _, obs, _ in visits[4 * epoch : 4 * epoch + 4]], 1)  # (C, T, O)
        log_probs = torch.cat([rest[..., 0] for _, _, rest in visits[4 * epoch : 4 * epoch + 4]], 1)
        assert torch.equal(obs[..., 0], label[..., 0])  # a trial sees its own steps only
        assert torch.equal(obs[..., 1].sort(1).values, label[..., 1])
        assert torch.equal(log_probs, obs[..., :2].sum(-1))  # and the arrays stay together
        orders += list(obs[..., 1])
    assert len({tuple(order.tolist()) for order in orders}) == 9  # each trial and epoch has an order of its own


# ---- independence and randomness


def test_same_seed_same_path_and_other_seed_other_path() -> None:
    one = path([5, 6])
    np.testing.assert_array_equal(path([5, 6]), one)
    assert not np.isclose(one[0, 0], one[1, 0]).all()
    # Every source of randomness is the seed's: initial weights, noise, minibatch order.
    assert (population([5]).weights() != population([6]).weights()).any()


@pytest.mark.parametrize("hidden_sizes", [(64, 64), (7,)])
def test_trial_does_not_depend_on_the_others_nor_on_threads(hidden_sizes: tuple[int, ...]) -> None:
    config = dataclasses.replace(SMALL, hidden_sizes=hidden_sizes)
    seeds = [3, 1, 4, 15, 9]
    together = path(seeds, config, act_dim=3, num_threads=1)
    for threads in (2, 7):
        np.testing.assert_array_equal(path(seeds, config, act_dim=3, num_threads=threads), together)
    for i in (0, 3):
        np.testing.assert_array_equal(path([seeds[i]], config, act_dim=3), together[i : i + 1])
    np.testing.assert_array_equal(path(seeds[::-1], config, act_dim=3, num_threads=2), together[::-1])


def test_shared_init_shares_the_initial_weights_and_nothing_else() -> None:
    seeds = [8, 9, 10]
    shared = population(seeds, shared_init=True)
    np.testing.assert_array_equal(shared.weights(), np.repeat(population([8]).weights(), 3, 0))
    shared.iterate()
    assert len(np.unique(shared.weights(), axis=0)) == 3
    # Noise and minibatch orders are those that each trial would have drawn with weights of its own.
    own = population(seeds)
    own.iterate()
    for one, other in zip(shared.generators, own.generators, strict=True):
        assert torch.equal(one.get_state(), other.get_state())


def test_initial_weights_are_stable_baselines3s() -> None:
    trials = Population(ScriptedEnv(2, act_dim=3), PPOConfig(hidden_sizes=(64, 32)), [0, 1])
    parts = trials.spec.unflatten(torch.from_numpy(trials.weights()))
    assert not any(part.any() for name, part in parts.items() if name.endswith("bias") or name == "log_std")
    for name, gain in (("policy_net.0.weight", 2**0.5), ("policy_net.2.weight", 2**0.5), ("action_net.weight", 0.01)):
        for weight in parts[name]:
            rows = weight if weight.shape[0] <= weight.shape[1] else weight.T
            torch.testing.assert_close(rows @ rows.T, gain**2 * torch.eye(len(rows)), rtol=0, atol=1e-5 * gain**2)
    for learner in trials.learners:
        gains = [2**0.5, 2**0.5, 1.0]
        for (weight, bias), gain in zip(learner.critic.layers, gains, strict=True):
            norm = torch.linalg.matrix_norm(weight, 2)
            torch.testing.assert_close(norm, torch.full_like(norm, gain), rtol=1e-5, atol=0)
            assert not bias.any()


# ---- statistics, errors


def test_episodic_return_is_a_mean_carried_on() -> None:
    # Episodes of 5 and 7 steps in turn; iterations of 4 steps end at steps 3, 7, 11, ...: none, one, one, one ended.
    config = PPOConfig(num_steps=4, num_minibatches=2, update_epochs=1)
    trials = population([1, 2], config)
    stats = [trials.iterate() for _ in range(6)]
    # Ends at steps 4 (length 5), 11 (7), 16 (5), 23 (7).
    assert [s.num_episodes.tolist() for s in stats] == [[0, 0], [1, 1], [1, 1], [0, 0], [1, 1], [1, 1]]
    assert trials.env_steps == 24
    expected = [np.nan, 100.0 * sum(range(5)), 100.0 * sum(range(5, 12)), 100.0 * sum(range(5, 12))]
    expected += [100.0 * sum(range(12, 17)), 100.0 * sum(range(17, 24))]
    for s, value in zip(stats, expected, strict=True):
        np.testing.assert_allclose(s.episodic_return, value, rtol=0, atol=30)  # the actions' part of the rewards
    assert np.array_equal(stats[3].episodic_return, stats[2].episodic_return)
    # Ten episodes of each kind end in 128 steps, and one more of five.
    several = population([1], dataclasses.replace(SMALL, num_steps=128)).iterate()
    assert several.num_episodes == [21]
    np.testing.assert_allclose(several.episodic_return, 100.0 * sum(range(125)) / 21, rtol=0, atol=30)


def test_seconds_add_up() -> None:
    seconds = population([1]).iterate().seconds
    assert set(seconds) == {"env", "policy", "update"}
    assert all(value > 0 for value in seconds.values())


def test_weights_are_a_copy() -> None:
    trials = population([1])
    weights = trials.weights()
    assert weights.shape == (1, trials.spec.num_params)
    assert weights.dtype == np.float32
    before = weights.copy()
    trials.iterate()
    np.testing.assert_array_equal(weights, before)


def test_torch_thread_count_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    population([1, 2], num_threads=2).iterate()
    assert torch.get_num_threads() == before


def test_weights_that_are_not_finite_name_the_trial() -> None:
    class Broken(ScriptedEnv):
        def _advance(self, actions: NDArray[np.float64], ids: NDArray[np.intp]):  # type: ignore[no-untyped-def]
            obs, reward, terminated, truncated = super()._advance(actions, ids)
            reward[1] = np.nan
            return obs, reward, terminated, truncated

    trials = Population(Broken(3), SMALL, [11, 12, 13])
    match = r"weights of trial 1 \(seed 12\) after 64 environment steps are no longer finite"
    with pytest.raises(FloatingPointError, match=match):
        trials.iterate()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_steps": 0}, "PPOConfig: num_steps must be a positive int, got 0"),
        ({"update_epochs": 1.5}, r"PPOConfig: update_epochs must be a positive int, got 1\.5"),
        ({"num_minibatches": 100}, "PPOConfig: num_minibatches must divide num_steps = 2048, got 100"),
        ({"learning_rate": 0.0}, r"PPOConfig: learning_rate must be positive and finite, got 0\.0"),
        ({"max_grad_norm": float("nan")}, "PPOConfig: max_grad_norm must be positive and finite, got nan"),
        ({"ent_coef": -0.1}, r"PPOConfig: ent_coef must be finite and not negative, got -0\.1"),
        ({"gamma": 1.01}, r"PPOConfig: gamma must lie in \[0, 1\], got 1\.01"),
        ({"hidden_sizes": (0,)}, r"hidden_sizes must be a tuple of positive ints, got \(0,\)"),
        ({"activation": "gelu"}, r"activation must be one of \('tanh', 'relu', 'elu'\), got 'gelu'"),
    ],
)
def test_bad_config_is_refused(kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PPOConfig(**kwargs)


@pytest.mark.parametrize(
    ("seeds", "kwargs", "match"),
    [
        ([1, 2, 3], {}, r"Population: seeds must have one entry for each of 2 environments, got 3"),
        ([1, 2**32], {}, r"Population: seeds must lie in \[0, 2\*\*32\), got 4294967296"),
        ([1, 2], {"num_threads": 0}, "Population: num_threads must be at least 1, got 0"),
    ],
)
def test_bad_population_is_refused(seeds: list[int], kwargs: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Population(ScriptedEnv(2), SMALL, seeds, **kwargs)


# ---- learning


def test_population_learns() -> None:
    config = PPOConfig(num_steps=256, num_minibatches=8, learning_rate=3e-3, gamma=0.9, update_epochs=4)
    trials = Population(TargetEnv(3), config, [0, 1, 2])
    first = trials.iterate().episodic_return
    for _ in range(25):
        last = trials.iterate()
    # At first the noise alone costs 16 x 1 an episode, and the mean action 0 another 16 x (0.3^2 + 0.8^2 / 3).
    assert first.max() < -12
    assert last.episodic_return.min() > -4
    obs = torch.linspace(-1, 1, 9).view(1, 9, 1).expand(3, 9, 1)
    actions = mean_action(trials.spec, torch.from_numpy(trials.weights()), obs.contiguous())
    assert (actions - (0.8 * obs - 0.3)).abs().max() < 0.25
