"""PPO with discrete actions: what they have of their own. All else is tested with continuous ones."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import reference
import torch
from factories import MODEL_CONFIG, TINY_PPO, everything, random_model
from gymnasium.spaces import Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ppo_checks import (
    SMALL,
    UPDATES,
    ScriptedEnv,
    assert_logged,
    assert_updates_as_autograd,
    by_autograd,
    random_update,
    row_of,
    updated,
    updated_beside_sb3,
)
from processes import ISAS, run_on

import tipl
from tipl.collecting.action_noise import CategoricalActions
from tipl.collecting.envs import make_vec
from tipl.collecting.policy_network import mean_action
from tipl.collecting.population import FinalStep, Population, PPOConfig, Transitions
from tipl.collecting.vector_env import VectorEnv
from tipl.forecasting.forecaster import Forecaster
from tipl.jumping.jump_config import JumpConfig
from tipl.policy import PolicySpec
from tipl.storing.store import Store

LOGITS: dict[str, Any] = {"spread": "none", "outputs": "logits"}


class ScriptedChoice(ScriptedEnv):
    """`ScriptedEnv` with the actions 5, 6 and 7, of which a reward holds the one that was taken."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs)
        VectorEnv.__init__(self, "ScriptedChoice-v0", num_envs, 3, Discrete(3, start=5), None)


def population(seeds: Sequence[int], config: PPOConfig = SMALL, **kwargs: Any) -> Population:
    return Population(ScriptedChoice(len(seeds) * config.num_envs), config, seeds, **kwargs)


def path(seeds: Sequence[int], config: PPOConfig = SMALL, **kwargs: Any) -> NDArray[np.float32]:
    """Return all parameters (N, 3, P) of a population after each of three iterations."""
    trials, rows = population(seeds, config, **kwargs), []
    for _ in range(3):
        trials.iterate()
        rows.append(trials.params.copy())
    return np.stack(rows, 1)


# ---- the update


CHOICES = {name: it for name, it in UPDATES.items() if "learn_log_std" not in it}
CHOICES["target KL reached"] = {"target_kl": 0.08, "learning_rate": 1e-2}


@pytest.mark.parametrize("num_actions", [2, 18])
@pytest.mark.parametrize("name", CHOICES)
def test_update_equals_autograd(name: str, num_actions: int) -> None:
    config = dataclasses.replace(SMALL, **({"learning_rate": 3e-3} | CHOICES[name]))
    arrays = random_update(config, num_actions, discrete=True)
    ours = updated(config, arrays, num_actions=num_actions)
    if name == "target KL at once":
        np.testing.assert_array_equal(ours["params"], arrays["params"])
        return
    if name == "target KL reached":
        assert ours["num_updates"].min() < 12
        assert ours["num_updates"].max() > 0
    assert_updates_as_autograd(config, arrays, ours, num_actions)
    for threads in (1, 7):
        again = updated(config, arrays, threads, num_actions)
        assert all(np.array_equal(again[name], ours[name]) for name in ours)
    alone = updated(config, {name: x[1:2] for name, x in arrays.items()}, num_actions=num_actions)
    assert all(np.array_equal(alone[name][0], ours[name][1]) for name in ours)


@settings(max_examples=25, deadline=None)
@given(
    hidden_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple),
    num_actions=st.integers(2, 18),
    obs_dim=st.integers(1, 9),
    minibatch_size=st.integers(1, 40),
    ent_coef=st.sampled_from([0.0, 0.02]),
    clip_coef_vf=st.sampled_from([None, 0.1]),
    max_grad_norm=st.sampled_from([0.05, 1e9]),
    target_kl=st.sampled_from([None, 0.2]),
    seed=st.integers(0, 2**31),
)
def test_update_of_any_size_equals_autograd(
    num_actions: int, obs_dim: int, minibatch_size: int, seed: int, **kwargs: Any
) -> None:
    config = PPOConfig(
        num_steps=2 * minibatch_size, num_minibatches=2, update_epochs=2, optimizer="sgd", learning_rate=0.05, **kwargs
    )
    arrays = random_update(config, num_actions, obs_dim, seed, discrete=True)
    ours = updated(config, arrays, num_actions=num_actions)
    for i in range(3):
        oracle, logs = by_autograd(config, arrays, i, torch.float64, num_actions)
        in_float32, float32_logs = by_autograd(config, arrays, i, torch.float32, num_actions)
        clipped = ours["losses"][i, 2], float32_logs["clipfrac"]
        if float32_logs["steps"] != logs["steps"] or clipped != pytest.approx((logs["clipfrac"],) * 2):
            continue  # a ratio or the KL is so near to its bound that rounding decides
        error = (torch.from_numpy(ours["params"][i]).double() - oracle.row()).abs().max()
        assert error <= 4 * (in_float32.row() - oracle.row()).abs().max() + 8 * torch.finfo(torch.float32).eps
        assert ours["num_updates"][i] == logs["steps"]
        assert ours["losses"][i, 4] == pytest.approx(logs["entropy"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("hidden_sizes", [(), (8, 5), (64, 64)])
@pytest.mark.parametrize("num_actions", [1, 2, 7])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gradient_equals_autograd(hidden_sizes: tuple[int, ...], num_actions: int, scale: float) -> None:
    """Adam's first moment after one step is a tenth of the gradient.

    With the last layer scaled, actions are next to sure or next to impossible.
    """
    config = PPOConfig(
        num_steps=48,
        num_minibatches=1,
        update_epochs=1,
        hidden_sizes=hidden_sizes,
        ent_coef=0.1,
        max_grad_norm=1e9,
        normalize_advantage=False,
    )
    arrays = random_update(config, num_actions, discrete=True)
    spec = PolicySpec(5, num_actions, hidden_sizes, **LOGITS)
    arrays["params"][:, spec.layout["action_net.weight"][0] : spec.num_params] *= scale
    ours = 10 * updated(config, arrays, num_actions=num_actions)["first_moments"]
    for i in range(3):
        gradients = []
        for dtype in (torch.float64, torch.float32):
            data = {name: torch.from_numpy(x[i]).to(dtype) for name, x in arrays.items() if name != "order"}
            agent = reference.Agent(data["params"], 5, num_actions, config, discrete=True)
            names = ("observations", "actions", "log_probs", "advantages", "returns", "values")
            losses = reference.ppo_losses(agent, *(data[name] for name in names), config)
            gradient = torch.autograd.grad(losses["loss"], list(agent.parameters()))
            gradients.append(torch.cat([g.flatten() for g in gradient]).double())
        oracle, in_float32 = gradients
        bound = 4 * (in_float32 - oracle).abs().max() + 16 * torch.finfo(torch.float32).eps * oracle.abs().max()
        assert (torch.from_numpy(ours[i]) - oracle).abs().max() <= bound


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_updates_as_autograd(isa: str) -> None:
    run_on(
        isa,
        "import dataclasses\n"
        "from test_population import SMALL, assert_updates_as_autograd, random_update, updated\n"
        "for sizes, steps, n in (((64, 64), 64, 2), ((5, 18), 60, 7)):\n"
        "    config = dataclasses.replace(SMALL, hidden_sizes=sizes, num_steps=steps, ent_coef=0.1)\n"
        "    arrays = random_update(config, n, discrete=True)\n"
        "    assert_updates_as_autograd(config, arrays, updated(config, arrays, num_actions=n), n)\n",
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "got nan"),
        (-1.0, "got -1"),
        (3.0, "got 3"),
        (0.5, r"got 0\.5"),
        (np.inf, "got inf"),
    ],
)
def test_actions_that_are_no_index_are_refused(value: float, message: str) -> None:
    arrays = random_update(SMALL, 3, discrete=True)
    arrays["actions"][2, 63] = value
    with pytest.raises(ValueError, match=rf"^update: actions must be whole numbers in \[0, 3\), {message}$"):
        updated(SMALL, arrays, num_actions=3)
    arrays["actions"] = np.zeros((3, 64, 3), np.float32)
    with pytest.raises(ValueError, match=r"update: actions must have shape \(N, T, A\) = \(3, 64, 1\), got"):
        updated(SMALL, arrays, num_actions=3)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_update_equals_stable_baselines3(optimizer: Literal["adam", "sgd"]) -> None:
    """One minibatch an epoch, so that the order of its rows is only a matter of rounding."""
    sb3 = pytest.importorskip("stable_baselines3", reason="compares with stable-baselines3, which is not installed")
    from stable_baselines3.common.logger import Logger

    config = PPOConfig(
        num_steps=64,
        num_minibatches=1,
        update_epochs=4,
        learning_rate=3e-4 if optimizer == "adam" else 0.03,
        optimizer=optimizer,
        ent_coef=0.01,
    )
    classes = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    model = sb3.PPO(
        "MlpPolicy",
        "CartPole-v1",
        n_steps=64,
        batch_size=64,
        n_epochs=4,
        learning_rate=config.learning_rate,
        ent_coef=0.01,
        policy_kwargs={"optimizer_class": classes[optimizer]},
        device="cpu",
        seed=0,
    )
    model.set_logger(Logger(None, []))
    env = make_vec("CartPole-v1", 1, seeds=[0])
    trials = Population(env, config, [0])
    params = row_of(model)
    assert trials.params.shape == (1, len(params))
    trials.params[:] = params
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(1, 64, 4, generator=generator)
    transitions = Transitions(
        observations=obs.numpy(),
        actions=torch.randint(2, (1, 64, 1), generator=generator).float().numpy(),
        log_probs=-0.7 + 0.3 * torch.randn(1, 64, generator=generator).numpy(),
        rewards=torch.randn(64, 1, generator=generator).numpy(),
        terminated=np.arange(64)[:, None] % 10 == 9,
        truncated=np.zeros((64, 1), bool),
        final_steps=[FinalStep(0, 63, np.ones(4, np.float32))],
    )
    stats, logged = updated_beside_sb3(model, trials, transitions, config.learning_rate)
    np.testing.assert_allclose(trials.params[0], row_of(model), rtol=0, atol=2e-6)
    assert abs(trials.params[0] - params).max() > 5e-4
    assert_logged(stats, logged)
    assert stats.entropy[0] == pytest.approx(-logged["train/entropy_loss"], rel=1e-5)


# ---- acting


def test_transitions_are_the_steps_that_were_made() -> None:
    trials = population([7, 2, 4], dataclasses.replace(SMALL, num_envs=2))
    trials.params *= 20  # or all three actions would be as likely
    weights = torch.from_numpy(trials.weights())
    transitions, _, _ = trials.act()
    assert transitions.actions.shape == (6, 64, 1)
    assert set(np.unique(transitions.actions)) == {0.0, 1.0, 2.0}
    t = np.arange(64)[:, None]
    np.testing.assert_array_equal(transitions.rewards - 100 * t, transitions.actions[..., 0].T + 5)
    logits = mean_action(trials.spec, weights, torch.from_numpy(transitions.observations).view(3, 128, 3))
    assert logits.std() > 0.1
    categorical = torch.distributions.Categorical(logits=logits.double())
    expected = categorical.log_prob(torch.from_numpy(transitions.actions).view(3, 128).double())
    np.testing.assert_allclose(transitions.log_probs.reshape(3, 128), expected, rtol=0, atol=2e-6)


def test_actions_are_drawn_with_the_probabilities_of_the_softmax() -> None:
    num_draws, logits = 40_000, np.array([0.0, -1.0, 1.5, -20.0], np.float32)
    actions = CategoricalActions(4, 5.0, [torch.Generator().manual_seed(i) for i in (0, 1)], 1, num_draws)
    for t in range(num_draws):
        taken = actions.take(t, np.tile(logits, (2, 1)))
    assert taken.dtype == np.float64
    np.testing.assert_array_equal(taken, actions.actions[:, -1] + 5)
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    shares = np.stack([np.bincount(row.astype(int), minlength=4) for row in actions.actions[..., 0]]) / num_draws
    deviations = np.sqrt(probabilities * (1 - probabilities) / num_draws)
    assert (abs(shares - probabilities) <= 4 * deviations + 1e-12).all()
    assert (actions.actions[0] != actions.actions[1]).any()
    chosen = actions.actions[0, :, 0].astype(int)
    np.testing.assert_allclose(actions.log_probs[0], np.log(probabilities)[chosen], rtol=0, atol=1e-6)


def test_logits_far_apart_give_finite_log_probabilities() -> None:
    actions = CategoricalActions(3, 0.0, [torch.Generator().manual_seed(0)], 1, 2)
    for t, logits in enumerate(([1e30, 0.0, -1e30], [-1e4, -1e4, -1e4 - 200])):
        actions.take(t, np.array([logits], np.float32))
    np.testing.assert_allclose(actions.log_probs[0], [0.0, -np.log(2)], rtol=1e-6)


def test_a_checkpoint_takes_observations_as_they_are() -> None:
    trials = population([3, 4], dataclasses.replace(SMALL, normalize_observations=True))
    trials.iterate()
    obs = trials._obs
    expected = trials.mean_actions(trials._seen(obs)[:, None])
    seen = torch.from_numpy(obs.astype(np.float32))[:, None]
    folded = mean_action(trials.spec, torch.from_numpy(trials.weights()), seen)
    np.testing.assert_allclose(folded, expected, rtol=0, atol=1e-5)


# ---- independence and initial parameters


@pytest.mark.parametrize("kwargs", [{}, {"hidden_sizes": (7,)}, {"num_envs": 2, "num_steps": 60}])
def test_trial_does_not_depend_on_the_others_nor_on_threads(kwargs: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, normalize_observations=True, normalize_rewards=True, **kwargs)
    seeds = [3, 1, 4, 15, 9]
    together = path(seeds, config, num_threads=1)
    np.testing.assert_array_equal(path(seeds, config, num_threads=7), together)
    for i in (0, 3):
        np.testing.assert_array_equal(path([seeds[i]], config), together[i : i + 1])
    np.testing.assert_array_equal(path(seeds[::-1], config, num_threads=2), together[::-1])
    assert len(np.unique(together[:, 0], axis=0)) == 5


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1"])
def test_initial_weights_without_ortho_init_are_stable_baselines3s_to_the_bit(env_id: str) -> None:
    sb3 = pytest.importorskip("stable_baselines3", reason="compares with stable-baselines3, which is not installed")
    config = dataclasses.replace(SMALL, hidden_sizes=(24, 8), ortho_init=False)
    kwargs = {"net_arch": [24, 8], "ortho_init": False}
    for seed in (0, 5):
        theirs = row_of(sb3.PPO("MlpPolicy", env_id, policy_kwargs=kwargs, seed=seed, device="cpu"))
        env = make_vec(env_id, 1, seeds=[0])
        np.testing.assert_array_equal(Population(env, config, [seed]).params[0], theirs)
        env.close()


def test_orthogonal_initial_weights_have_stable_baselines3s_gains() -> None:
    trials = population([0, 1])
    assert trials.spec == PolicySpec(3, 3, **LOGITS)
    head = trials.spec.unflatten(torch.from_numpy(trials.weights()))["action_net.weight"]  # (N, 3, 64)
    torch.testing.assert_close(head @ head.mT, 1e-4 * torch.eye(3).expand(2, 3, 3), rtol=0, atol=1e-9)


# ---- runs


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3"])
def test_tasks_of_gymnasium_are_collected_and_scored(env_id: str, tmp_path: Path) -> None:
    if env_id == "LunarLander-v3":
        pytest.importorskip("Box2D", reason="runs LunarLander, which needs Box2D and pygame")
    arguments: dict[str, Any] = {"env_id": env_id, "num_trials": 2, "total_timesteps": 64, "progress": False}
    store = tipl.collect(tmp_path / "a", ppo=TINY_PPO, record_critic=str(tmp_path / "critics"), **arguments)
    assert isinstance(store.policy, PolicySpec)
    assert (store.policy.outputs, store.policy.spread) == ("logits", "none")
    assert Store.open(tmp_path / "critics").num_checkpoints == store.num_checkpoints == 3
    again = tipl.collect(tmp_path / "b", ppo=TINY_PPO, num_threads=1, trials_per_shard=1, **arguments)
    for one, other in zip(everything(store), everything(again), strict=True):
        np.testing.assert_array_equal(one, other)
    if env_id in ("CartPole-v1", "LunarLander-v3"):
        assert np.isfinite(tipl.score(store, num_episodes=1, progress=False).returns).all()


def test_a_collection_that_was_cut_off_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"env_id": "CartPole-v1", "num_trials": 2, "total_timesteps": 5 * 32}
    arguments |= {"ppo": TINY_PPO, "progress": False}
    whole = tipl.collect(tmp_path / "whole", **arguments)
    iterate, count = Population.iterate, itertools.count()

    def interrupted(trials: Population) -> Any:
        if next(count) == 3:
            raise KeyboardInterrupt
        return iterate(trials)

    with monkeypatch.context() as patch:
        patch.setattr(Population, "iterate", interrupted)
        with pytest.raises(KeyboardInterrupt, match="4 of 6 checkpoints"):
            tipl.collect(tmp_path / "cut", **arguments)
    for one, other in zip(everything(tipl.collect(tmp_path / "cut", **arguments)), everything(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ppo.log-std-init", -1), "log_std_init must stay 0.0 for the discrete actions of CartPole-v1"),
        (("--ppo.no-learn-log-std",), "learn_log_std must stay True for the discrete actions of CartPole-v1"),
    ],
)
@pytest.mark.parametrize("command", ["collect", "run", "accelerate"])
def test_settings_of_log_std_are_refused_in_one_line(
    command: str,
    flags: tuple[Any, ...],
    message: str,
    run_tipl: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--env-id", "CartPole-v1", "--num-trials", 4, "--total-timesteps", 40960, "--output", tmp_path / "out")
    assert run_tipl(command, *words, *flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_trials_jump(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    Forecaster(random_model(MODEL_CONFIG)).save(tmp_path / "model")
    ledger = tipl.accelerate(
        tmp_path / "out",
        env_id="CartPole-v1",
        num_trials=2,
        total_timesteps=32 * 9,
        ppo=TINY_PPO,
        model=tmp_path / "model",
        jumps=JumpConfig(start=3, max_jumps=3),
        progress=False,
    )
    assert ledger.jumps
    assert Store.open(tmp_path / "out" / "store.zarr").policy == PolicySpec(4, 2, (16, 16), **LOGITS)
    assert tipl.verify(tmp_path / "out").problems == []


def test_population_learns_to_balance() -> None:
    config = PPOConfig(num_steps=512, num_minibatches=8, learning_rate=2e-3, ent_coef=0.01)
    env = make_vec("CartPole-v1", 3, seeds=[0, 1, 2])
    trials = Population(env, config, [0, 1, 2])
    first = trials.iterate()
    assert (abs(first.entropy - np.log(2)) < 0.05).all()  # nearly uniform to begin with
    for _ in range(9):
        last = trials.iterate()
    assert first.episodic_return.max() < 40
    assert last.episodic_return.min() > 90
    assert (last.entropy < first.entropy).all()
    env.close()
