"""Running policies: returns against one environment at a time, and the states that are kept of them."""

import threading
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from factories import SPEC
from numpy.typing import NDArray

from tipl.collecting import episodes
from tipl.collecting.envs import MujocoVectorEnv
from tipl.collecting.episodes import _StateSample, episodic_returns, run_episodes
from tipl.collecting.policy_network import mean_action
from tipl.policy import ACTIVATIONS, Activation, PolicySpec

ENV_ID = "InvertedPendulum-v5"


def some_policies(number: int) -> NDArray[np.float32]:
    return (0.5 * np.random.default_rng(0).standard_normal((number, SPEC.num_params))).astype(np.float32)


def test_returns_equal_those_of_one_gymnasium_env_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "ENVS_AT_ONCE", 8)  # two groups, the second not full
    rng = np.random.default_rng(0)
    weights = (0.5 * rng.standard_normal((5, SPEC.num_params))).astype(np.float32)
    seeds = np.array([11, 12, 13])
    got = episodic_returns("InvertedPendulum-v5", SPEC, weights, seeds)
    env = gymnasium.make("InvertedPendulum-v5")
    assert isinstance(env.action_space, gymnasium.spaces.Box)
    for policy, row in zip(torch.from_numpy(weights), got, strict=True):
        for seed, value in zip(seeds, row, strict=True):
            obs, _ = env.reset(seed=int(seed))
            total, ended = 0.0, False
            while not ended:
                seen = torch.from_numpy(obs.astype(np.float32))[None, None]
                action = mean_action(SPEC, policy[None], seen)[0, 0].numpy().astype(np.float64)
                action = np.clip(action, env.action_space.low, env.action_space.high)
                obs, reward, terminated, truncated, _ = env.step(action)
                total, ended = total + float(reward), terminated or truncated
            assert value == total
    assert len(np.unique(got)) > 3
    env.close()
    with pytest.raises(ValueError, match="of Hopper-v5 must have 11 observations and 3 actions, got 4 and 1"):
        episodic_returns("Hopper-v5", SPEC, weights, seeds)


def visited(policy: NDArray[np.float32], seeds: NDArray[np.int64]) -> set[bytes]:
    """Every observation that a policy acts on, one environment at a time."""
    env, seen = gymnasium.make(ENV_ID), set()
    assert isinstance(env.action_space, gymnasium.spaces.Box)
    for seed in seeds:
        obs, _ = env.reset(seed=int(seed))
        ended = False
        while not ended:
            state = obs.astype(np.float32)
            seen.add(state.tobytes())
            action = mean_action(SPEC, torch.from_numpy(policy[None]), torch.from_numpy(state[None, None]))[0, 0]
            clipped = np.clip(action.numpy().astype(np.float64), env.action_space.low, env.action_space.high)
            obs, _, terminated, truncated, _ = env.step(clipped)
            ended = terminated or truncated
    env.close()
    return seen


def test_kept_states_are_some_or_all_of_those_visited() -> None:
    weights, seeds = some_policies(3), np.array([11, 12, 13])
    every, some = (run_episodes(ENV_ID, SPEC, weights, seeds, num_states=n) for n in (5000, 7))
    for policy, all_states, states in zip(weights, every.states, some.states, strict=True):
        assert {state.tobytes() for state in all_states} == visited(policy, seeds)
        assert states.shape == (7, SPEC.obs_dim)
        assert {state.tobytes() for state in states} < {state.tobytes() for state in all_states}
        assert len(np.unique(states, axis=0)) == 7
    np.testing.assert_array_equal(every.returns, episodic_returns(ENV_ID, SPEC, weights, seeds))
    assert [len(states) for states in run_episodes(ENV_ID, SPEC, weights, seeds).states] == [0, 0, 0]


def test_states_do_not_depend_on_threads_nor_on_the_policies_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, seeds = some_policies(5), np.array([11, 12])
    together = run_episodes(ENV_ID, SPEC, weights, seeds, num_states=9, num_threads=2)
    alone = [run_episodes(ENV_ID, SPEC, row[None], seeds, num_states=9, num_threads=1).states[0] for row in weights]
    monkeypatch.setattr(episodes, "ENVS_AT_ONCE", 4)  # groups of two
    grouped = run_episodes(ENV_ID, SPEC, weights, seeds, num_states=9)
    for one, two, three in zip(together.states, alone, grouped.states, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    other = run_episodes(ENV_ID, SPEC, weights, seeds + 1, num_states=9)
    assert all((one != two).any() for one, two in zip(together.states, other.states, strict=True))


@pytest.mark.parametrize(
    ("env_id", "num_episodes"), [("HalfCheetah-v5", 3), *(("Walker2d-v5", n) for n in (1, 2, 3, 5, 8))]
)
def test_copies_of_a_policy_get_equal_returns(env_id: str, num_episodes: int) -> None:
    spec = PolicySpec(17, 6)
    policy = (0.12 * np.random.default_rng(1).standard_normal(spec.num_params)).astype(np.float32)
    got = episodic_returns(env_id, spec, np.tile(policy, (10, 1)), np.arange(num_episodes))
    np.testing.assert_array_equal(got, np.tile(got[0], (10, 1)))
    assert len(np.unique(got[0])) == num_episodes


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_policy_gets_the_same_returns_alone_as_in_any_company(activation: Activation) -> None:
    """Walker2d amplifies a last bit; the company falls sooner or later than the policy does."""
    env_id, spec, rng = "Walker2d-v5", PolicySpec(17, 6, (33, 20), activation), np.random.default_rng(0)
    scale = np.repeat([0.05, 0.1, 0.3], [5, 4, 4])[:, None]  # a walker's fall is sooner with some than with others
    weights = (scale * rng.standard_normal((13, spec.num_params))).astype(np.float32)
    seeds = rng.integers(1000, size=(13, 8))
    alone = [run_episodes(env_id, spec, weights[i : i + 1], seeds[i], num_states=9, num_threads=1) for i in range(13)]
    assert len(np.unique([one.returns for one in alone])) == 13 * 8
    num_threads = torch.get_num_threads()
    try:
        for case, (N, E) in enumerate([(13, 8), (2, 1), (3, 5), (4, 3), (7, 2), (12, 1), (9, 3), (2, 5), (5, 1)]):
            torch.set_num_threads(1 + case % 2)
            rows = rng.permutation(13)[:N]
            together = run_episodes(
                env_id, spec, weights[rows], seeds[rows, :E], num_states=9, num_threads=1 + case % 3
            )
            np.testing.assert_array_equal(together.returns, [alone[i].returns[0, :E] for i in rows])
            if E == 8:
                for i, states in zip(rows, together.states, strict=True):
                    np.testing.assert_array_equal(states, alone[i].states[0])
    finally:
        torch.set_num_threads(num_threads)


def test_policies_may_have_episodes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, seeds = some_policies(5), np.array([[11, 12], [13, 14], [11, 12], [15, 16], [13, 14]])
    together = run_episodes(ENV_ID, SPEC, weights, seeds, num_states=9)
    monkeypatch.setattr(episodes, "ENVS_AT_ONCE", 4)  # groups of two
    grouped = run_episodes(ENV_ID, SPEC, weights, seeds, num_states=9)
    for row, own, of_one, states, in_group in zip(
        weights, seeds, together.returns, together.states, grouped.states, strict=True
    ):
        alone = run_episodes(ENV_ID, SPEC, row[None], own, num_states=9)
        np.testing.assert_array_equal(alone.returns[0], of_one)
        np.testing.assert_array_equal(alone.states[0], states)
        np.testing.assert_array_equal(alone.states[0], in_group)
    np.testing.assert_array_equal(together.returns, grouped.returns)


@pytest.mark.parametrize(
    ("num_policies", "num_threads", "sizes"),
    [(9, 2, [2, 2, 2, 1, 1, 1]), (9, 4, [2] + 7 * [1]), (3, 2, [2, 1]), (2, 8, [1, 1]), (9, 1, [2, 2, 2, 2, 1])],
)
def test_groups_run_side_by_side_and_are_alike_in_size(
    num_policies: int, num_threads: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episodes, "ENVS_AT_ONCE", 4)
    weights, seeds, ran = some_policies(num_policies), np.array([11, 12]), []
    run_group = episodes._run_group

    def noted(*arguments: Any, **keywords: Any) -> episodes.Episodes:
        ran.append((len(arguments[2]), threading.current_thread() is threading.main_thread()))
        return run_group(*arguments, **keywords)

    monkeypatch.setattr(episodes, "_run_group", noted)
    together = run_episodes(ENV_ID, SPEC, weights, seeds, num_states=5, num_threads=num_threads)
    assert sorted(ran) == sorted((size, num_threads == 1) for size in sizes)
    for row, returns, states in zip(weights, together.returns, together.states, strict=True):
        alone = run_episodes(ENV_ID, SPEC, row[None], seeds, num_states=5, num_threads=1)
        np.testing.assert_array_equal(alone.returns[0], returns)
        np.testing.assert_array_equal(alone.states[0], states)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_failure_or_an_interrupt_ends_all_groups(kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "ENVS_AT_ONCE", 4)
    steps = []
    step = MujocoVectorEnv.step

    def failing(env: MujocoVectorEnv, *arguments: Any) -> Any:
        steps.append(threading.get_ident())
        if len(steps) == 40:
            raise kind("of one group")
        return step(env, *arguments)

    monkeypatch.setattr(MujocoVectorEnv, "step", failing)
    with pytest.raises(kind, match="of one group"):
        run_episodes(ENV_ID, SPEC, np.zeros((40, SPEC.num_params), np.float32), np.array([11, 12]), num_threads=2)
    assert len(steps) < 200
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tipl-episodes")]


@pytest.mark.slow
def test_every_step_is_as_likely_to_be_kept() -> None:
    lengths = np.array([40, 10, 25])  # of three episodes: 75 steps, numbered
    first, kept = np.array([0, 40, 50]), np.zeros(75)
    for seed in range(600):
        sample = _StateSample(15, 1, np.array([[seed, 0, 0]]))
        for t in range(lengths.max()):
            sample.add((first + t).astype(np.float32)[None, :, None], (t < lengths)[None])
        kept[sample.states()[0].astype(int).ravel()] += 1
    assert kept.sum() == 600 * 15  # no step twice
    expected = 600 * 15 / 75
    deviations = (kept - expected) / np.sqrt(expected * (1 - 15 / 75))
    assert np.abs(deviations).max() < 4.5
    assert 0.6 < deviations.std() < 1.4


def test_episodes_that_do_not_end_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "LONG_EPISODE", 40)
    policy, weights = PolicySpec(3, 1), np.zeros((2, PolicySpec(3, 1).num_params), np.float32)  # Pendulum never ends
    text = "after 40 steps, 4 of 4 episodes of Pendulum-v1 have not ended; its time limit is "
    for kwargs, limit in (({}, "200"), ({"max_episode_steps": 41}, "41")):
        with pytest.warns(UserWarning, match=f"^{text}{limit}$") as warned:
            episodic_returns("Pendulum-v1", policy, weights, np.arange(2), env_kwargs=kwargs)
        assert len(warned) == 1
    episodic_returns("Pendulum-v1", policy, weights, np.arange(2), env_kwargs={"max_episode_steps": 40})
