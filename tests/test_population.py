import dataclasses
import sys
import types
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pytest
import reference
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from ppo_checks import (
    SMALL,
    UPDATES,
    ScriptedEnv,
    assert_logged,
    assert_updates_as_autograd,
    population,
    random_update,
    row_of,
    updated,
    updated_beside_sb3,
    value_is_third_observation,
)
from processes import ISAS, run_on

from tipl import _core
from tipl.collecting.initial_parameters import _orthogonal
from tipl.collecting.policy_network import layer_views, mean_action
from tipl.collecting.population import (
    FinalStep,
    ObservationScaler,
    Population,
    PPOConfig,
    Transitions,
    entropy,
    environment_seeds,
    gae,
)
from tipl.collecting.transitions import log_prob
from tipl.policy import PolicySpec


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


def test_time_out_bootstraps_from_the_final_observation() -> None:
    trials = population([3, 4], dataclasses.replace(SMALL, hidden_sizes=()), num_threads=1)
    transitions, num_episodes, _ = trials.act()
    value_is_third_observation(trials)
    values = trials.engine.values(trials.params, transitions.observations).T  # (T, N)
    next_values = trials.next_values(values, transitions)
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
    trials = population([7, 2, 5], dataclasses.replace(SMALL, log_std_init=-0.5), act_dim=2)
    weights = torch.from_numpy(trials.weights())
    (first, *_), (second, *_) = trials.act(), trials.act()
    t = np.arange(128)[:, None]
    rewards = np.concatenate([first.rewards, second.rewards])
    actions = np.concatenate([first.actions, second.actions], 1)
    # The reward is 100 t + action: row t holds the action of step t, and its observation names trial and step.
    np.testing.assert_allclose(rewards - 100 * t, actions[..., 0].T, rtol=0, atol=1e-3)
    observations = np.concatenate([first.observations, second.observations], 1)
    elapsed = np.concatenate([np.tile([*range(5), *range(7)], 10), [*range(5), *range(3)]])
    for i, seed in enumerate([7, 2, 5]):
        np.testing.assert_allclose(observations[i, :, 0], seed / 10, rtol=1e-6)
        np.testing.assert_allclose(observations[i, :, 2], elapsed / 10, rtol=1e-6)
    # Log-probabilities are those of the actions under the policy's distribution, time-outs and resets or not.
    mean = mean_action(trials.spec, weights, torch.from_numpy(first.observations))
    normal = torch.distributions.Normal(mean, trials.spec.unflatten(weights)["log_std"].exp()[:, None])
    expected = normal.log_prob(torch.from_numpy(first.actions)).sum(-1)
    np.testing.assert_allclose(first.log_probs, expected, rtol=0, atol=2e-5)


def test_a_trial_of_several_environments_keeps_them_apart_and_has_its_own_seeds() -> None:
    config = dataclasses.replace(SMALL, num_envs=3)
    trials = population([7, 2], config)
    assert trials.env.labels.tolist() == environment_seeds([7, 2], 3)
    assert environment_seeds([7, 2], 3)[::3] == [7, 2]
    assert len(set(environment_seeds([7, 2], 3))) == 6
    transitions, num_episodes, _ = trials.act()
    assert trials.env_steps == 3 * 64
    assert num_episodes.tolist() == [30, 30]
    label = np.broadcast_to(trials.env.labels[:, None] / 10, (6, 64))
    np.testing.assert_array_equal(transitions.observations[..., 0], label.astype(np.float32))
    # Each environment's advantages are those that it has alone.
    values, advantages = trials.estimate(transitions)
    for j in range(6):
        one = population([7, 2][j // 3 : j // 3 + 1])
        finals = [step._replace(env=0) for step in transitions.final_steps if step.env == j]
        arrays = {name: getattr(transitions, name) for name in ("rewards", "terminated", "truncated")}
        rows = {name: getattr(transitions, name)[j : j + 1] for name in ("observations", "actions", "log_probs")}
        alone = Transitions(**rows, **{name: x[:, j : j + 1] for name, x in arrays.items()}, final_steps=finals)
        expected = one.estimate(alone)
        np.testing.assert_allclose(values[:, j : j + 1], expected[0], rtol=0, atol=1e-6)
        np.testing.assert_allclose(advantages[:, j : j + 1], expected[1], rtol=1e-5, atol=1e-4)


# ---- observations


def test_scaled_observations_are_stable_baselines3s() -> None:
    sb3 = pytest.importorskip("stable_baselines3", reason="compares with stable-baselines3, which is not installed")
    from stable_baselines3.common.running_mean_std import RunningMeanStd

    assert sb3.__version__
    rng, scaler = np.random.default_rng(0), ObservationScaler(2, 3)
    theirs = [RunningMeanStd(shape=(3,)) for _ in range(2)]
    for _ in range(20):
        obs = rng.normal([5, 0, -2], [1, 100, 0.01], (8, 3))  # four of each trial
        scaler.update(obs)
        for i, one in enumerate(theirs):
            one.update(obs[4 * i : 4 * i + 4])
            np.testing.assert_allclose(scaler.mean[i, 0], one.mean, rtol=1e-12)
            np.testing.assert_allclose(scaler.var[i, 0], one.var, rtol=1e-12)
    expected = [
        np.clip((obs[i] - one.mean) / np.sqrt(one.var + 1e-8), -10, 10) for i, one in ((1, theirs[0]), (5, theirs[1]))
    ]
    np.testing.assert_allclose(scaler.scaled(obs)[[1, 5]], expected, rtol=1e-12)
    assert abs(scaler.scaled(obs + 1e6)).max() == 10


def test_a_checkpoint_takes_observations_as_they_are() -> None:
    trials = population([3, 4], dataclasses.replace(SMALL, normalize_observations=True), act_dim=2)
    trials.iterate()
    obs = trials._obs
    seen = trials._seen(obs)
    assert abs(seen - obs).max() > 0.1
    expected = trials.mean_actions(seen[:, None])
    folded = mean_action(
        trials.spec, torch.from_numpy(trials.weights()), torch.from_numpy(obs.astype(np.float32))[:, None]
    )
    np.testing.assert_allclose(folded, expected, rtol=0, atol=1e-5)
    rest = [trials.weights()[:, :2], trials.weights()[:, 2 + 64 * 4 :]]  # all but the first layer
    own = trials.params[:, : trials.spec.num_params]
    np.testing.assert_array_equal(np.hstack(rest), np.hstack([own[:, :2], own[:, 2 + 64 * 4 :]]))


# ---- distribution, clipping, gradient, update


def test_log_prob_and_entropy_equal_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, noise = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator)
    log_std = torch.randn(3, 1, 4, dtype=torch.float64, generator=generator)
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    np.testing.assert_allclose(log_prob(noise.numpy(), log_std.numpy()), normal.log_prob(mean + log_std.exp() * noise))
    np.testing.assert_allclose(entropy(log_std[:, 0].numpy()), normal.entropy()[:, 0])


@pytest.mark.parametrize("act_dim", [1, 3])
@pytest.mark.parametrize("settings", UPDATES)
def test_update_equals_autograd_with_torch_clipping_and_optimizers(settings: str, act_dim: int) -> None:
    config = dataclasses.replace(SMALL, **({"learning_rate": 3e-3} | UPDATES[settings]))
    arrays = random_update(config, act_dim)
    ours = updated(config, arrays)
    if settings == "target KL at once":  # the ratios are not one to begin with
        np.testing.assert_array_equal(ours["params"], arrays["params"])
        assert not ours["num_updates"].any()
        return
    if settings == "target KL reached":
        assert 0 < ours["num_updates"].min() < 12
    assert_updates_as_autograd(config, arrays, ours)
    fixed = 0 if config.learn_log_std else act_dim  # columns
    np.testing.assert_array_equal(ours["params"][:, :fixed], arrays["params"][:, :fixed])
    without = None if config.optimizer == "sgd" else fixed
    assert not ours["first_moments"][:, :without].any()
    assert not ours["second_moments"][:, :without].any()
    for threads in (1, 7):
        again = updated(config, arrays, threads)
        assert all(np.array_equal(again[name], ours[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_updates_as_autograd(isa: str) -> None:
    run_on(
        isa,
        "import dataclasses\n"
        "from test_population import SMALL, UPDATES, assert_updates_as_autograd, random_update, updated\n"
        "for sizes, steps in (((64, 64), 64), ((5, 18), 60)):\n"
        "    sized = dataclasses.replace(SMALL, hidden_sizes=sizes, learning_rate=3e-3, num_steps=steps)\n"
        "    for settings in ('as by default', 'SGD', 'fixed log_std'):\n"
        "        config = dataclasses.replace(sized, **UPDATES[settings])\n"
        "        arrays = random_update(config, 3)\n"
        "        assert_updates_as_autograd(config, arrays, updated(config, arrays))\n",
    )


@pytest.mark.parametrize("hidden_sizes", [(), (8, 5), (16, 16), (64, 64)])
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu"])
@pytest.mark.parametrize("act_dim", [1, 3])
def test_gradient_equals_autograd(hidden_sizes: tuple[int, ...], activation: str, act_dim: int) -> None:
    """Adam's first moment after one step is a tenth of the gradient."""
    config = PPOConfig(
        num_steps=48,
        num_minibatches=1,
        update_epochs=1,
        hidden_sizes=hidden_sizes,
        activation=activation,
        ent_coef=0.1,
        vf_coef=0.7,
        max_grad_norm=1e9,
        normalize_advantage=False,
    )
    arrays = random_update(config, act_dim)
    ours = 10 * updated(config, arrays)["first_moments"]
    for i in range(3):
        gradients = []
        for dtype in (torch.float64, torch.float32):
            data = {name: torch.from_numpy(x[i]).to(dtype) for name, x in arrays.items() if name != "order"}
            agent = reference.Agent(data["params"], 5, act_dim, config)
            names = ("observations", "actions", "log_probs", "advantages", "returns", "values")
            losses = reference.ppo_losses(agent, *(data[name] for name in names), config)
            assert 0.1 < losses["clipfrac"] < 0.9
            gradient = torch.autograd.grad(losses["loss"], list(agent.parameters()))
            gradients.append(torch.cat([g.flatten() for g in gradient]).double())
        oracle, in_float32 = gradients
        bound = 4 * (in_float32 - oracle).abs().max() + 16 * torch.finfo(torch.float32).eps * oracle.abs().max()
        assert (torch.from_numpy(ours[i]) - oracle).abs().max() <= bound


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu"])
@pytest.mark.parametrize("hidden_sizes", [(), (1,), (7, 33), (64, 64), (256,)])
def test_mean_actions_and_values_equal_torch(hidden_sizes: tuple[int, ...], activation: str) -> None:
    config = PPOConfig(num_steps=24, num_minibatches=1, hidden_sizes=hidden_sizes, activation=activation)
    for obs_dim, act_dim in ((1, 1), (17, 6), (64, 16)):
        arrays = random_update(config, act_dim, obs_dim)
        engine = _core.PpoUpdate(obs_dim=obs_dim, act_dim=act_dim, config=config, num_threads=2)
        obs = random_update(dataclasses.replace(config, num_steps=25, num_minibatches=1), act_dim, obs_dim, 1)[
            "observations"
        ]
        sizes = {"act_dim": act_dim, "hidden_sizes": hidden_sizes, "activation": activation}
        actions, values = _core.mean_actions(arrays["params"], obs, **sizes), engine.values(arrays["params"], obs)
        for i in range(3):
            agent = reference.Agent(torch.from_numpy(arrays["params"][i]).double(), obs_dim, act_dim, config)
            with torch.no_grad():
                x = torch.from_numpy(obs[i]).double()
                np.testing.assert_allclose(actions[i], agent.actor(x), rtol=1e-5, atol=2e-5)
                np.testing.assert_allclose(values[i], agent.critic(x)[:, 0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("params", lambda x: x[:, :-1], r"update: params must have at least \d+ columns, got \d+"),
        ("params", lambda x: x.astype(np.float64), r"update: params must .*float32, got .*float64"),
        (
            "actions",
            lambda x: x[:, 1:],
            r"update: actions must have shape \(N, T, A\) = \(3, 64, 2\), got \(3, 63, 2\)",
        ),
        ("returns", lambda x: x[1:], r"update: returns must have shape \(N, T\) = \(3, 64\), got \(2, 64\)"),
        ("order", lambda x: x + 1, r"update: order must hold steps in \[0, 64\), got 64"),
        ("order", lambda x: x - 1, r"update: order must hold steps in \[0, 64\), got -1"),
    ],
)
def test_wrong_arrays_are_refused(name: str, change: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    arrays = random_update(SMALL, 2)
    with pytest.raises((TypeError, ValueError), match=message):
        updated(SMALL, arrays | {name: np.ascontiguousarray(change(arrays[name]))})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"activation": "gelu"}, "PpoUpdate: activation must be tanh, relu or elu, got gelu"),
        ({"optimizer": "rmsprop"}, "PpoUpdate: optimizer must be adam or sgd, got rmsprop"),
        ({"clip_coef": "wide"}, "PpoUpdate: clip_coef has the wrong type: str"),
    ],
)
def test_settings_that_the_engine_does_not_know_are_refused(setting: dict[str, str], message: str) -> None:
    config = types.SimpleNamespace(**(vars(SMALL) | {"minibatch_size": SMALL.minibatch_size} | setting))
    with pytest.raises((TypeError, ValueError), match=message):
        _core.PpoUpdate(obs_dim=1, act_dim=1, config=config, num_threads=1)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("learn_log_std", [True, False])
def test_update_equals_stable_baselines3(optimizer: Literal["adam", "sgd"], learn_log_std: bool) -> None:
    """One minibatch an epoch, so that the order of its rows is only a matter of rounding."""
    sb3 = pytest.importorskip("stable_baselines3", reason="compares with stable-baselines3, which is not installed")
    from stable_baselines3.common.logger import Logger

    config = PPOConfig(
        num_steps=64,
        num_minibatches=1,
        update_epochs=4,
        learning_rate=3e-4 if optimizer == "adam" else 0.03,
        optimizer=optimizer,
        log_std_init=-0.5,
        learn_log_std=learn_log_std,
    )
    model = sb3.PPO(
        "MlpPolicy",
        "Pendulum-v1",
        n_steps=64,
        batch_size=64,
        n_epochs=4,
        learning_rate=config.learning_rate,
        policy_kwargs={
            "log_std_init": -0.5,
            "optimizer_class": {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer],
        },
        device="cpu",
        seed=0,
    )
    model.policy.log_std.requires_grad_(learn_log_std)
    model.set_logger(Logger(None, []))
    spec = PolicySpec(3, 1)
    params = row_of(model)
    trials = Population(ScriptedEnv(1), config, [0])
    assert trials.spec == spec
    assert trials.params[0, 0] == params[0]
    trials.params[:] = params
    generator = torch.Generator().manual_seed(0)
    transitions = Transitions(
        observations=torch.randn(1, 64, 3, generator=generator).numpy(),
        actions=torch.randn(1, 64, 1, generator=generator).numpy(),
        log_probs=-1.4 + 0.3 * torch.randn(1, 64, generator=generator).numpy(),
        rewards=torch.randn(64, 1, generator=generator).numpy(),
        terminated=np.arange(64)[:, None] % 10 == 9,
        truncated=np.zeros((64, 1), bool),
        final_steps=[FinalStep(0, 63, np.ones(3, np.float32))],
    )
    stats, logged = updated_beside_sb3(model, trials, transitions, config.learning_rate)
    after = row_of(model)
    np.testing.assert_allclose(trials.params[0], after, rtol=0, atol=2e-6)
    assert abs(after - params).max() > 5e-4
    assert (after[0] == -0.5) == (trials.params[0, 0] == -0.5) == (not learn_log_std)
    assert_logged(stats, logged)


def test_every_transition_is_visited_once_an_epoch() -> None:
    trials, orders = population([1, 2, 3], dataclasses.replace(SMALL, num_envs=2)), []

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(engine, name)

        def update(self, *, order: np.ndarray, **arrays: np.ndarray) -> np.ndarray:
            orders.append(order.copy())
            return engine.update(order=order, **arrays)

    engine, trials.engine = trials.engine, Watched()
    for _ in range(2):
        trials.iterate()
    both = np.stack(orders)  # (iterations, N, epochs, S)
    assert both.shape == (2, 3, 3, 128)
    np.testing.assert_array_equal(np.sort(both), np.broadcast_to(np.arange(128), both.shape))
    assert (
        len(np.unique(both.reshape(18, 128), axis=0)) == 18
    )  # each trial, iteration and epoch has an order of its own


# ---- independence and randomness


def test_same_seed_same_path_and_other_seed_other_path() -> None:
    one = path([5, 6])
    np.testing.assert_array_equal(path([5, 6]), one)
    assert not np.isclose(one[0, 0], one[1, 0]).all()
    # Every source of randomness is the seed's: initial weights, noise, minibatch order.
    assert (population([5]).weights() != population([6]).weights()).any()


@pytest.mark.parametrize("settings", [{}, {"hidden_sizes": (7,)}, {"num_steps": 60}, {"num_envs": 2}])
def test_trial_does_not_depend_on_the_others_nor_on_threads(settings: dict[str, object]) -> None:
    config = dataclasses.replace(SMALL, normalize_observations=True, normalize_rewards=True, **settings)
    seeds = [3, 1, 4, 15, 9]
    together = path(seeds, config, act_dim=3, num_threads=1)
    for threads in (2, 7):
        np.testing.assert_array_equal(path(seeds, config, act_dim=3, num_threads=threads), together)
    for i in (0, 3):
        np.testing.assert_array_equal(path([seeds[i]], config, act_dim=3), together[i : i + 1])
    np.testing.assert_array_equal(path(seeds[::-1], config, act_dim=3, num_threads=2), together[::-1])


def test_updates_of_some_trials_at_once_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    together = path(range(9), SMALL, num_threads=1)
    monkeypatch.setattr(sys.modules["tipl.collecting.population"], "MIN_TRIALS_AT_ONCE", 1)
    np.testing.assert_array_equal(path(range(9), SMALL, num_threads=1), together)  # 4, 4 and 1


def test_shared_init_shares_the_initial_weights_and_nothing_else() -> None:
    seeds = [8, 9, 10]
    shared = population(seeds, init_seed=seeds[0])
    np.testing.assert_array_equal(shared.weights(), np.repeat(population([8]).weights(), 3, 0))
    shared.iterate()
    assert len(np.unique(shared.weights(), axis=0)) == 3
    # Noise and minibatch orders are those that each trial would have drawn with weights of its own.
    own = population(seeds)
    own.iterate()
    for one, other in zip(shared.generators, own.generators, strict=True):
        assert torch.equal(one.get_state(), other.get_state())


def test_initial_weights_do_not_depend_on_torchs_threads() -> None:
    weights, num_threads = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        weights.append(Population(ScriptedEnv(2, act_dim=3), PPOConfig(hidden_sizes=(256, 64)), [0, 1]).weights())
        assert torch.get_num_threads() == threads
    torch.set_num_threads(num_threads)
    np.testing.assert_array_equal(weights[1:], weights[:1] * 2)


@pytest.mark.parametrize("shape", [(64, 17), (64, 64), (1, 64), (6, 32), (4, 1)])
def test_orthogonal_weights_are_torchs_but_rounded_once(shape: tuple[int, int]) -> None:
    """Another algorithm in float64 gives the same float32 numbers, as another machine's LAPACK would."""
    weight, theirs, generator = torch.empty(shape), torch.empty(shape), torch.Generator().manual_seed(7)
    state = generator.get_state()
    _orthogonal(weight, 2**0.5, generator)
    after = generator.get_state()
    torch.nn.init.orthogonal_(theirs, 2**0.5, generator.set_state(state))
    assert torch.equal(after, generator.get_state())
    torch.testing.assert_close(weight, theirs, rtol=0, atol=5e-6)
    drawn = torch.empty(shape).normal_(generator=generator.set_state(state)).double().numpy()
    columns = drawn.T if shape[0] < shape[1] else drawn
    basis: list[NDArray[np.float64]] = []
    for column in columns.T:
        for _ in range(
            3
        ):  # Gram-Schmidt, again for what rounding leaves; its signs are those of r's diagonal made positive
            for earlier in basis:
                column = column - earlier * (earlier @ column)
        basis.append(column / np.linalg.norm(column))
    exact = np.stack(basis, 1) * 2**0.5
    np.testing.assert_array_equal(weight.numpy(), (exact.T if shape[0] < shape[1] else exact).astype(np.float32))


def test_initial_weights_are_stable_baselines3s() -> None:
    trials = Population(ScriptedEnv(2, act_dim=3), PPOConfig(hidden_sizes=(64, 32)), [0, 1])
    parts = trials.spec.unflatten(torch.from_numpy(trials.weights()))
    assert not any(part.any() for name, part in parts.items() if name.endswith("bias") or name == "log_std")
    for name, gain in (("policy_net.0.weight", 2**0.5), ("policy_net.2.weight", 2**0.5), ("action_net.weight", 0.01)):
        for weight in parts[name]:
            rows = weight if weight.shape[0] <= weight.shape[1] else weight.T
            torch.testing.assert_close(rows @ rows.T, gain**2 * torch.eye(len(rows)), rtol=0, atol=1e-5 * gain**2)
    critics = torch.from_numpy(trials.params[:, trials.spec.num_params :])
    for (weight, bias), gain in zip(layer_views(critics, (3, 64, 32, 1)), [2**0.5, 2**0.5, 1.0], strict=True):
        norm = torch.linalg.matrix_norm(weight, 2)
        torch.testing.assert_close(norm, torch.full_like(norm, gain), rtol=1e-5, atol=0)
        assert not bias.any()


@pytest.mark.parametrize("hidden_sizes", [(), (64, 32), (256, 256)])
def test_initial_weights_that_are_not_orthogonal_are_torchs_defaults(hidden_sizes: tuple[int, ...]) -> None:
    config = dataclasses.replace(SMALL, hidden_sizes=hidden_sizes, ortho_init=False, log_std_init=-2.0)
    trials = population([3, 4], config, act_dim=2)
    np.testing.assert_array_equal(population([4, 3], config, act_dim=2).params[::-1], trials.params)
    assert (trials.params[0, 2:] != trials.params[1, 2:]).all()
    np.testing.assert_array_equal(trials.params[:, :2], -2)
    params = torch.from_numpy(trials.params)
    actor, critic = (3, *hidden_sizes, 2), (3, *hidden_sizes, 1)
    layers = [*layer_views(params[:, 2:], actor), *layer_views(params[:, trials.spec.num_params :], critic)]
    for weight, bias in layers:
        bound = weight.shape[-1] ** -0.5
        assert max(abs(weight).max(), abs(bias).max()) <= bound * (1 + 1e-6)
        if weight.numel() > 100:
            assert abs(weight).max() > 0.9 * bound
            assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.1  # of a uniform distribution
        assert (bias != 0).all()


@pytest.mark.parametrize("hidden_sizes", [(64, 64), (24, 8)])
def test_initial_weights_without_ortho_init_are_stable_baselines3s_to_the_bit(hidden_sizes: tuple[int, ...]) -> None:
    sb3 = pytest.importorskip("stable_baselines3", reason="compares with stable-baselines3, which is not installed")
    config = dataclasses.replace(SMALL, hidden_sizes=hidden_sizes, ortho_init=False, log_std_init=-0.5)
    kwargs = {"net_arch": list(hidden_sizes), "ortho_init": False, "log_std_init": -0.5}
    for seed in (0, 5):
        state = sb3.PPO("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, seed=seed, device="cpu").policy.state_dict()
        order = [name for name in state if "value_net" not in name] + [name for name in state if "value_net" in name]
        theirs = torch.cat([state[name].flatten() for name in order])
        np.testing.assert_array_equal(population([seed], config).params[0], theirs)


def test_log_std_starts_where_it_is_told_and_all_else_as_without() -> None:
    for kwargs in ({}, {"init_seed": 5}):
        own, default = (
            population([3, 4], dataclasses.replace(SMALL, log_std_init=x), 2, **kwargs) for x in (-1.5, 0.0)
        )
        np.testing.assert_array_equal(own.params[:, :2], np.full((2, 2), -1.5))
        np.testing.assert_array_equal(own.params[:, 2:], default.params[:, 2:])
        for one, other in zip(own.generators, default.generators, strict=True):
            assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_log_std_that_is_not_learned_stays_to_the_bit(optimizer: Literal["adam", "sgd"]) -> None:
    # With values in the loss, their errors would be nearly all of the norm: SGD would leave log_std to rounding.
    config = dataclasses.replace(SMALL, optimizer=optimizer, log_std_init=-0.7, learn_log_std=False, vf_coef=0.0)
    weights = path([3, 4], config, act_dim=2)
    np.testing.assert_array_equal(weights[..., :2], np.full((2, 3, 2), -0.7, np.float32))
    assert (np.diff(weights[..., 2:], axis=1) != 0).any(-1).all()
    learned = path([3, 4], dataclasses.replace(config, learn_log_std=True), act_dim=2)
    assert (learned[..., :2] != weights[..., :2]).all()


# ---- statistics, errors


@pytest.mark.parametrize("normalize_rewards", [False, True])
def test_episodic_return_is_a_mean_carried_on(normalize_rewards: bool) -> None:
    # Episodes of 5 and 7 steps in turn; iterations of 4 steps end at steps 3, 7, 11, ...: none, one, one, one ended.
    config = PPOConfig(num_steps=4, num_minibatches=2, update_epochs=1, normalize_rewards=normalize_rewards)
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


def test_normalised_rewards_change_what_is_learned_and_no_return() -> None:
    plain, normalised = (population([1, 2], dataclasses.replace(SMALL, normalize_rewards=x)) for x in (False, True))
    np.testing.assert_array_equal(normalised.params, plain.params)
    first, same_steps = plain.iterate(), normalised.iterate()
    np.testing.assert_array_equal(same_steps.episodic_return, first.episodic_return)
    assert (normalised.params != plain.params).any(1).all()
    assert (same_steps.value_loss < 1e-3 * first.value_loss).all()  # rewards are hundreds as they are


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


def test_the_learning_rate_is_annealed_over_the_iterations() -> None:
    config = dataclasses.replace(SMALL, anneal_lr=True, learning_rate=4e-3)
    trials = population([1, 2], config, num_iterations=4)
    assert [trials.iterate().learning_rate for _ in range(4)] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3], rel=1e-12)
    assert population([1]).iterate().learning_rate == SMALL.learning_rate
    # The first iteration is as without, the second is not.
    np.testing.assert_array_equal(
        path([1], config, 1, num_iterations=4), path([1], dataclasses.replace(config, anneal_lr=False), 1)
    )
    assert (path([1], config, 2, num_iterations=4) != path([1], config, 2, num_iterations=5)).any()
    with pytest.raises(ValueError, match="Population: num_iterations must be given with anneal_lr, got None"):
        population([1], config)


@pytest.mark.parametrize("normalize_rewards", [False, True])
def test_weights_that_are_not_finite_name_the_trial(normalize_rewards: bool) -> None:
    class Broken(ScriptedEnv):
        def _advance(self, actions: NDArray[np.float64], ids: NDArray[np.intp]):  # type: ignore[no-untyped-def]
            obs, reward, terminated, truncated = super()._advance(actions, ids)
            reward[1] = np.nan
            return obs, reward, terminated, truncated

    config = dataclasses.replace(SMALL, normalize_rewards=normalize_rewards)
    trials = Population(Broken(3), config, [11, 12, 13])
    match = r"weights of trial 1 \(seed 12\) after 64 environment steps are no longer finite"
    with pytest.raises(FloatingPointError, match=match):
        trials.iterate()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_steps": 0}, "PPOConfig: num_steps must be a positive int, got 0"),
        ({"update_epochs": 1.5}, r"PPOConfig: update_epochs must be a positive int, got 1\.5"),
        ({"num_minibatches": 100}, r"PPOConfig: num_minibatches must divide num_envs \* num_steps = 2048, got 100"),
        ({"num_envs": 0}, "PPOConfig: num_envs must be a positive int, got 0"),
        ({"target_kl": 0.0}, r"PPOConfig: target_kl must be positive and finite, got 0\.0"),
        ({"clip_coef_vf": -1.0}, r"PPOConfig: clip_coef_vf must be positive and finite, got -1\.0"),
        ({"learning_rate": 0.0}, r"PPOConfig: learning_rate must be positive and finite, got 0\.0"),
        ({"max_grad_norm": float("nan")}, "PPOConfig: max_grad_norm must be positive and finite, got nan"),
        ({"ent_coef": -0.1}, r"PPOConfig: ent_coef must be finite and not negative, got -0\.1"),
        ({"gamma": 1.01}, r"PPOConfig: gamma must lie in \[0, 1\], got 1\.01"),
        ({"hidden_sizes": (0,)}, r"hidden_sizes must be a tuple of positive ints, got \(0,\)"),
        ({"optimizer": "rmsprop"}, r"PPOConfig: optimizer must be one of \('adam', 'sgd'\), got 'rmsprop'"),
        ({"log_std_init": float("-inf")}, "PPOConfig: log_std_init must be finite, got -inf"),
        ({"learn_log_std": "no"}, "PPOConfig: learn_log_std must be a bool, got 'no'"),
        ({"normalize_rewards": 1}, "PPOConfig: normalize_rewards must be a bool, got 1"),
        ({"ortho_init": None}, "PPOConfig: ortho_init must be a bool, got None"),
        ({"activation": "gelu"}, r"activation must be one of \('tanh', 'relu', 'elu'\), got 'gelu'"),
        ({"activation": "silu"}, r"PPOConfig: activation must be one of \('tanh', 'relu', 'elu'\), got 'silu'"),
    ],
)
def test_bad_config_is_refused(kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PPOConfig(**kwargs)


@pytest.mark.parametrize(
    ("seeds", "kwargs", "match"),
    [
        ([1, 2, 3], {}, r"Population: seeds must have one entry for every 1 of 2 environments, got 3"),
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
