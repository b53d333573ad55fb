"""The vectorised environments against Gymnasium's own, one by one: equal to the last bit, or it is a bug here.

All 21 MuJoCo tasks are bit-equal in observation, reward, terminated and truncated, so that no tolerance appears below.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tipl.collecting.envs import MujocoVectorEnv, make_vec
from tipl.collecting.mujoco_tasks import TASKS
from tipl.collecting.vector_env import Step, VectorEnv

# A lowered time limit at which random actions end some episodes by termination and some by truncation.
SHORT_LIMIT = {
    "InvertedPendulum": 6,
    "InvertedDoublePendulum": 6,
    "Hopper": 20,
    "Walker2d": 20,
    "Ant": 80,
    "Humanoid": 22,
}
NEVER_TERMINATES = {"HalfCheetah", "HumanoidStandup", "Swimmer", "Reacher", "Pusher"}


def make_own(env_id: str, num_envs: int, limit: int | None = None) -> list[gymnasium.Env[Any, Any]]:
    """Gymnasium's own environments, made quietly: v4 is out of date, and MuJoCo dislikes an XML attribute."""
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            kwargs = {} if limit is None else {"max_episode_steps": limit}
            return [gymnasium.make(env_id, disable_env_checker=True, **kwargs) for _ in range(num_envs)]
    finally:
        mujoco.set_mju_user_warning(None)


def assert_equals_own(
    env: VectorEnv,
    own: list[gymnasium.Env[Any, Any]],
    seeds: list[int],
    num_steps: int,
    action_dtype: type = np.float64,
) -> Step:
    """Step both with the same random actions through all resets; return env's steps, stacked along time."""
    np.testing.assert_array_equal(env.reset(), [e.reset(seed=seed)[0] for e, seed in zip(own, seeds, strict=True)])
    steps = []
    for actions in random_actions(env, num_steps):
        step = env.step(actions)
        for i, e in enumerate(own):
            obs, reward, terminated, truncated, _ = e.step(actions[i].astype(action_dtype))
            np.testing.assert_array_equal(step.final_obs[i], obs)
            np.testing.assert_array_equal(step.reward[i], reward)
            assert (step.terminated[i], step.truncated[i]) == (terminated, truncated)
            if terminated or truncated:
                obs, _ = e.reset()
            np.testing.assert_array_equal(step.obs[i], obs)
        steps.append(step)
    return stacked(steps)


def random_actions(env: VectorEnv, num_steps: int) -> np.ndarray:
    """Actions (T, N, act_dim) within the action space, the same at every call."""
    return np.random.default_rng(0).uniform(env.action_low, env.action_high, (num_steps, env.num_envs, env.act_dim))


def play(env: VectorEnv, actions: np.ndarray) -> Step:
    """Step env with actions (T, N, act_dim); the steps stacked along time."""
    return stacked([env.step(a) for a in actions])


def stacked(steps: list[Step]) -> Step:
    return Step(*(np.stack([getattr(step, name) for step in steps]) for name in Step.__dataclass_fields__))


def column(step: Step, i: int) -> Step:
    """Environment i of steps stacked along time, still with an axis of environments."""
    return Step(*(getattr(step, name)[:, i : i + 1] for name in Step.__dataclass_fields__))


def assert_same(a: Step, b: Step) -> None:
    for name in Step.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# Equality with Gymnasium.


def test_table_holds_every_mujoco_task_of_gymnasium() -> None:
    registered = {
        spec.id
        for spec in gymnasium.registry.values()
        if isinstance(spec.entry_point, str) and spec.entry_point.startswith("gymnasium.envs.mujoco.")
    }
    assert set(TASKS) == registered - {"Pusher-v4"}


@pytest.mark.slow
@pytest.mark.parametrize("env_id", TASKS)
def test_whole_episode_equals_gymnasium(env_id: str) -> None:
    env = make_vec(env_id, 1, seeds=[7], num_threads=1)
    (own,) = make_own(env_id, 1)
    assert isinstance(env, MujocoVectorEnv)
    assert env.max_episode_steps == gymnasium.registry[env_id].max_episode_steps
    np.testing.assert_array_equal(env.action_low, own.action_space.low)
    np.testing.assert_array_equal(env.action_high, own.action_space.high)
    steps = assert_equals_own(env, [own], [7], env.max_episode_steps + 3)
    if env_id[:-3] in NEVER_TERMINATES:
        np.testing.assert_array_equal(np.flatnonzero(steps.truncated), [env.max_episode_steps - 1])


@pytest.mark.slow
@pytest.mark.parametrize("env_id", TASKS)
def test_short_episodes_of_many_equal_gymnasium(env_id: str) -> None:
    seeds, limit = [3, 1, 4, 1, 59], SHORT_LIMIT.get(env_id[:-3], 30)
    env = make_vec(env_id, 5, seeds=seeds, num_threads=2, max_episode_steps=limit)
    steps = assert_equals_own(env, make_own(env_id, 5, limit), seeds, 2 * limit + 20)
    assert steps.truncated.any()
    assert steps.terminated.any() == (env_id[:-3] not in NEVER_TERMINATES)


def test_termination_on_the_last_step_is_both_terminated_and_truncated() -> None:
    env = make_vec("InvertedPendulum-v5", 1, seeds=[0])
    env.reset()
    length = 1 + int(np.argmax(play(env, np.full((50, 1, 1), 3.0)).terminated))
    env = make_vec("InvertedPendulum-v5", 1, seeds=[0], max_episode_steps=length)
    env.reset()
    steps = play(env, np.full((length, 1, 1), 3.0))
    assert not steps.terminated[:-1].any()
    assert not steps.truncated[:-1].any()
    assert steps.terminated[-1, 0]
    assert steps.truncated[-1, 0]


class Drift(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point pushed by the action and by noise; it ends beyond 1."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-0.5, 0.5, (2,), np.float32)

    def __init__(self, **spaces: gymnasium.Space[Any]) -> None:
        for name, space in spaces.items():
            setattr(self, name, space)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._x = self.np_random.uniform(-0.1, 0.1, 2).astype(np.float32)
        return self._x.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self._x += action + self.np_random.normal(0.0, 0.1, 2).astype(np.float32)
        return self._x.copy(), float(self._x.sum()), bool(np.abs(self._x).max() > 1.0), False, {}


REFUSED_SPACES = {
    "MatrixObservation": {"observation_space": gymnasium.spaces.Box(0.0, 1.0, (2, 3))},
    "DictObservation": {"observation_space": gymnasium.spaces.Dict(x=gymnasium.spaces.Box(0.0, 1.0, (2,)))},
    "SeveralDiscreteActions": {"action_space": gymnasium.spaces.MultiDiscrete([4, 2])},
    "MatrixAction": {"action_space": gymnasium.spaces.Box(0.0, 1.0, (2, 3))},
    "IntegerAction": {"action_space": gymnasium.spaces.Box(0, 9, (2,), np.int64)},
}


class Broken(Drift):
    """Its fourth observation, or the reward that comes with it, is `given`; an exception is raised."""

    def __init__(self, name: str, given: Any) -> None:
        self._name, self._given = name, given

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        obs, _ = super().reset(**kwargs)
        self._left = 3
        return (self._value() if self._name == "first" else obs), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, *rest = super().step(action)
        self._left -= 1
        if self._left == 0:
            obs, reward = (self._value(), reward) if self._name == "obs" else (obs, self._value())
        return (obs, reward, *rest)  # type: ignore[return-value]

    def _value(self) -> Any:
        if isinstance(self._given, Exception):
            raise self._given
        return self._given


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    gymnasium.register("tipl/Broken-v0", Broken, disable_env_checker=True)
    gymnasium.register("tipl/Drift-v0", Drift)
    gymnasium.register("tipl/Drift-v1", Drift, max_episode_steps=9)
    for name, spaces in REFUSED_SPACES.items():
        gymnasium.register(f"tipl/{name}-v0", Drift, kwargs=spaces)
    yield
    for env_id in [env_id for env_id in gymnasium.registry if env_id.startswith("tipl/")]:
        del gymnasium.registry[env_id]


def test_any_other_environment_equals_gymnasium() -> None:
    seeds = [5, 6, 7, 8]
    env = make_vec("tipl/Drift-v1", 4, seeds=seeds)
    assert (env.obs_dim, env.act_dim, env.max_episode_steps) == (2, 2, 9)
    steps = assert_equals_own(env, make_own("tipl/Drift-v1", 4), seeds, 60, np.float32)
    assert steps.terminated.any()
    assert steps.truncated.any()
    env.close()


def test_any_other_environment_takes_another_time_limit_or_none() -> None:
    assert make_vec("tipl/Drift-v0", 1, seeds=[0]).max_episode_steps is None
    env = make_vec("tipl/Drift-v0", 1, seeds=[0], max_episode_steps=2)
    assert env.max_episode_steps == 2
    env.reset()
    np.testing.assert_array_equal(play(env, np.zeros((4, 1, 2))).truncated[:, 0], [False, True, False, True])


def test_an_environment_is_found_through_its_module() -> None:
    assert make_vec("gymnasium.envs.classic_control:Pendulum-v1", 1, seeds=[0]).obs_dim == 3


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("obs", np.zeros(1, np.float32), r"step: tipl/Broken-v0 gave an observation of shape \(1,\); its .* \(2,\)"),
        ("obs", np.zeros(3, np.float32), r"step: tipl/Broken-v0 gave an observation of shape \(3,\); its .* \(2,\)"),
        ("obs", np.array([0, np.nan]), r"step: tipl/Broken-v0 gave an observation that is not finite, \[ 0. nan\]"),
        ("first", np.array([0, np.inf]), r"reset: tipl/Broken-v0 gave an observation that is not finite, \[ 0. inf\]"),
        ("reward", np.nan, r"step: tipl/Broken-v0 gave a reward that is not finite, nan"),
        ("reward", -np.inf, r"step: tipl/Broken-v0 gave a reward that is not finite, -inf"),
        ("reward", None, r"step: tipl/Broken-v0 gave a reward that is not finite, nan"),
    ],
)
def test_what_an_environment_should_not_give_is_refused(name: str, given: Any, message: str) -> None:
    env = make_vec("tipl/Broken-v0", 2, seeds=[0, 1], env_kwargs={"name": name, "given": given})
    with pytest.raises(ValueError, match=f"^{message}$"):
        play_from_the_start(env)


@pytest.mark.parametrize(("name", "caller"), [("obs", "step"), ("first", "reset")])
def test_what_an_environment_raises_is_said_with_its_name(name: str, caller: str) -> None:
    given = KeyError("no licence")
    gymnasium.register("tipl/Raising-v0", Broken, disable_env_checker=True, kwargs={"name": name, "given": given})
    env = make_vec("tipl/Raising-v0", 2, seeds=[0, 1])
    with pytest.raises(RuntimeError, match=rf"^{caller}: tipl/Raising-v0 failed: KeyError: 'no licence'$") as caught:
        play_from_the_start(env)
    assert isinstance(caught.value.__cause__, KeyError)


def play_from_the_start(env: VectorEnv) -> None:
    env.reset()
    play(env, np.zeros((2, 2, 2)))
    env.step(np.full((2, 2), np.nan), np.zeros(2, bool))  # what is not stepped gives nothing
    play(env, np.zeros((1, 2, 2)))


# Autoreset, masks, seeds, threads.


def test_autoreset_returns_the_new_episode_and_keeps_the_last_observation() -> None:
    env = make_vec("HalfCheetah-v5", 2, seeds=[0, 1], max_episode_steps=3)
    first = env.reset()
    steps = play(env, random_actions(env, 6))
    np.testing.assert_array_equal(steps.truncated[:, 0], [False, False, True] * 2)
    same = (steps.obs == steps.final_obs).all(axis=2)
    np.testing.assert_array_equal(same, ~steps.truncated)
    assert np.abs(steps.obs[2, :, 8:]).max() < 1.0  # velocities of an episode's start, 0.1 normal
    assert (steps.obs[2] != first).all(axis=1).all()  # another draw of the reset noise
    assert (steps.reward != 0.0).all()  # no phantom step, whose reward would be 0


@pytest.mark.parametrize(
    "env_id", ["InvertedDoublePendulum-v5", "Ant-v5", "Humanoid-v4", "Reacher-v4", "tipl/Drift-v1"]
)
def test_a_mask_steps_the_active_environments_alone(env_id: str) -> None:
    n, num_steps = 4, 40
    env = make_vec(env_id, n, seeds=range(n), num_threads=2, max_episode_steps=12)
    alone = [make_vec(env_id, 1, seeds=[i], num_threads=1, max_episode_steps=12) for i in range(n)]
    obs = env.reset()
    np.testing.assert_array_equal(obs, np.concatenate([e.reset() for e in alone]))
    masks = np.random.default_rng(1).random((num_steps, n)) < 0.6
    masks[7], masks[8] = False, True
    for mask, actions in zip(masks, random_actions(env, num_steps), strict=True):
        actions[~mask] = np.nan  # is not looked at
        step = env.step(actions, mask)
        for i in range(n):
            if mask[i]:
                assert_same(column(stacked([step]), i), play(alone[i], actions[None, i : i + 1]))
            else:
                np.testing.assert_array_equal(step.obs[i], obs[i])
                np.testing.assert_array_equal(step.final_obs[i], obs[i])
                assert (step.reward[i], step.terminated[i], step.truncated[i]) == (0.0, False, False)
        obs = step.obs


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_an_environment_does_not_depend_on_its_neighbours(data: st.DataObject) -> None:
    seeds = data.draw(st.lists(st.integers(0, 2**63), min_size=1, max_size=5), label="seeds")
    num_threads = data.draw(st.sampled_from([1, 2, 7]), label="num_threads")
    env = make_vec("Hopper-v5", len(seeds), seeds=seeds, num_threads=num_threads)
    env.reset()
    actions = random_actions(env, 30)
    together = play(env, actions)
    for i, seed in enumerate(seeds):
        alone = make_vec("Hopper-v5", 1, seeds=[seed], num_threads=1)
        alone.reset()
        assert_same(column(together, i), play(alone, actions[:, i : i + 1]))


@pytest.mark.parametrize("env_id", ["Humanoid-v5", "HalfCheetah-v4"])
def test_results_do_not_depend_on_threads(env_id: str) -> None:
    results = []
    for num_threads in (1, 2, 7, None):
        env = make_vec(env_id, 9, seeds=range(9), num_threads=num_threads)
        env.reset()
        results.append(play(env, random_actions(env, 25)))
    for result in results[1:]:
        assert_same(results[0], result)


@pytest.mark.parametrize("env_id", ["Pusher-v5", "tipl/Drift-v1"])
def test_seeds_decide_the_episodes(env_id: str) -> None:
    env = make_vec(env_id, 3, seeds=[1, 1, 2])
    first = env.reset()
    np.testing.assert_array_equal(first[0], first[1])
    assert (first[0] != first[2]).any()
    second = env.reset()  # goes on: another episode
    assert (second[0] != first[0]).any()
    np.testing.assert_array_equal(env.reset(seeds=[1, 1, 2]), first)
    np.testing.assert_array_equal(env.reset(), second)
    np.testing.assert_array_equal(env.reset(seeds=np.array([2, 1, 1])), first[::-1])


@pytest.mark.parametrize("env_id", ["Walker2d-v5", "tipl/Drift-v1"])
def test_actions_are_clipped_to_the_action_space_and_left_alone(env_id: str) -> None:
    wild = make_vec(env_id, 2, seeds=[0, 1])
    tame = make_vec(env_id, 2, seeds=[0, 1])
    wild.reset()
    tame.reset()
    actions = 3.0 * random_actions(wild, 10)
    kept = actions.copy()
    assert_same(play(wild, actions), play(tame, actions.clip(wild.action_low, wild.action_high)))
    np.testing.assert_array_equal(actions, kept)


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "tipl/Drift-v1"])
def test_what_a_step_returned_is_the_callers(env_id: str) -> None:
    env, twin = make_vec(env_id, 2, seeds=[0, 1]), make_vec(env_id, 2, seeds=[0, 1])
    first = env.reset()
    kept = first.copy()
    twin.reset()
    actions = random_actions(env, 20)
    steps, copies = [], []
    for a in actions:
        step = env.step(a)
        steps.append(step)
        copies.append(stacked([step]))
    np.testing.assert_array_equal(first, kept)
    for step, copy in zip(steps, copies, strict=True):
        assert_same(stacked([step]), copy)
    first[:] = np.nan
    for step, a in zip(steps, actions, strict=True):
        again = twin.step(a)
        assert_same(again, step)
        again.obs[:] = again.final_obs[:] = np.nan  # must not reach the environment
    np.testing.assert_array_equal(twin.step(actions[0], np.zeros(2, bool)).obs, steps[-1].obs)


@pytest.mark.parametrize("env_id", ["Ant-v5", "HumanoidStandup-v5", "Reacher-v4", "HalfCheetah-v5"])
def test_a_restored_state_goes_on_to_the_bit(env_id: str) -> None:
    env = make_vec(env_id, 3, seeds=[0, 1, 2], max_episode_steps=25)
    assert isinstance(env, MujocoVectorEnv)
    env.reset()
    actions = random_actions(env, 90)
    play(env, actions[:35])
    state = env.get_state()
    expected = play(env, actions[35:])
    other = make_vec(env_id, 3, seeds=[7, 8, 9], max_episode_steps=25)
    assert isinstance(other, MujocoVectorEnv)
    other.set_state(state)
    assert_same(play(other, actions[35:]), expected)
    env.set_state(state)  # also in the environment itself, although it has moved on
    assert_same(play(env, actions[35:]), expected)


def test_a_state_of_another_task_is_refused() -> None:
    env, other = make_vec("Ant-v5", 2, seeds=[0, 1]), make_vec("Ant-v4", 2, seeds=[0, 1])
    assert isinstance(env, MujocoVectorEnv)
    assert isinstance(other, MujocoVectorEnv)
    with pytest.raises(ValueError, match=r"set_state: state must hold simulations and obs of shapes .*105.*, got .*27"):
        env.set_state(other.get_state())


def test_making_an_environment_prints_and_writes_nothing(tmp_path: Any, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its MUJOCO_LOG.TXT into the working directory
    make_vec("HalfCheetah-v4", 1, seeds=[0]).reset()
    make_vec("HalfCheetah-v5", 1, seeds=[0], env_kwargs={"ctrl_cost_weight": 0.2}).reset()  # Gymnasium's own
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_making_environments_on_several_threads_prints_and_writes_nothing(
    tmp_path: Any, monkeypatch: Any, capfd: Any
) -> None:
    """As `run_episodes` does. MuJoCo has one handler of warnings for the whole process."""
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: make_vec("HalfCheetah-v5", 1, seeds=[seed], num_threads=1), range(48)))
    assert mujoco.get_mju_user_warning() is None
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def blow_up(env: VectorEnv) -> None:
    """Step simulations that are too fast for any time step."""
    env.reset()
    if isinstance(env, MujocoVectorEnv):
        state = env.get_state()
        state.simulations[:, 1:] = 1e20
        env.set_state(state)
    else:
        env._envs[0].unwrapped.data.qvel[:] = 1e20  # type: ignore[attr-defined]
    env.step(np.zeros((env.num_envs, env.act_dim)))


@pytest.mark.parametrize("kwargs", [{}, {"ctrl_cost_weight": 0.2}])
def test_the_simulators_warnings_are_pythons_and_no_file(
    kwargs: dict[str, float], tmp_path: Any, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    env = make_vec("HalfCheetah-v5", 8, seeds=range(8), env_kwargs=kwargs)
    with pytest.warns(RuntimeWarning, match=r"MuJoCo: Nan, Inf or huge value in Q\w+ at DOF \d+\. .* unstable\.$"):
        blow_up(env)
    said: list[str] = []
    mujoco.set_mju_user_warning(said.append)  # of a program that has a handler of its own
    try:
        blow_up(make_vec("HalfCheetah-v5", 8, seeds=range(8), env_kwargs=kwargs))
        assert mujoco.get_mju_user_warning() == said.append
    finally:
        mujoco.set_mju_user_warning(None)
    assert said
    assert all("Nan, Inf or huge value" in text for text in said)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# Mistakes of the caller.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"env_id": "HalfCheeta-v5"},
            r"unknown env_id 'HalfCheeta-v5'; did you mean HalfCheetah-v5 or HalfCheetah-v4\?",
        ),
        ({"env_id": "HalfCheetah"}, r"unknown env_id 'HalfCheetah'; did you mean HalfCheetah-v5 or HalfCheetah-v4\?"),
        ({"env_id": "?"}, r"unknown env_id '\?'$"),
        ({"env_id": "?", "max_episode_steps": 5}, r"unknown env_id '\?'$"),
        ({"env_id": "no.such.module:A-v0"}, r"'no.such.module:A-v0' names a module that cannot be imported: No module"),
        ({"env_id": "broken_module:A-v0"}, r"'broken_module:A-v0' names a module that cannot be imported: .*syntax"),
        ({"env_id": "tipl/Broken-v0"}, r"tipl/Broken-v0 cannot be made: TypeError: .*'name' and 'given'"),
        ({"env_id": "Pusher-v4"}, r"Gymnasium refuses Pusher-v4: `Pusher-v4` is only supported on `mujoco<3`"),
        ({"env_id": "HalfCheetah-v3"}, r"Gymnasium refuses HalfCheetah-v3: .*moved to the gymnasium-robotics project"),
        (
            {"env_id": "tipl/SeveralDiscreteActions-v0"},
            r"the actions of tipl/SeveralDiscreteActions-v0 must be a Box or Discrete, got MultiDiscrete\(\[4 2\]\)",
        ),
        ({"env_id": "tipl/MatrixAction-v0"}, r"the actions of .* must be vectors, got shape \(2, 3\)"),
        ({"env_id": "tipl/IntegerAction-v0"}, r"the actions of .* must be continuous, got int64"),
        ({"env_id": "tipl/DictObservation-v0"}, r"the observations of .* must be a Box, got Dict"),
        ({"env_id": "tipl/MatrixObservation-v0"}, r"the observations of .* must be vectors, got shape \(2, 3\)"),
        ({"num_envs": 0, "seeds": []}, r"num_envs must be at least 1, got 0"),
        ({"seeds": [1, 2, 3]}, r"seeds must have num_envs = 2 entries, got 3"),
        ({"seeds": [1, -2]}, r"seeds must not be negative, got -2"),
        ({"num_threads": 0}, r"num_threads must be at least 1, got 0"),
        ({"num_threads": 10**23}, r"num_threads must be at most 1024, got 100000000000000000000000"),
        ({"max_episode_steps": 0}, r"max_episode_steps must be at least 1, got 0"),
        ({"max_episode_steps": 2**31}, r"max_episode_steps must be at most 2147483647, got 2147483648"),
    ],
)
def test_make_vec_refuses_values(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"^make_vec: .*" + message):
        make_vec(**({"env_id": "Swimmer-v5", "num_envs": 2, "seeds": [0, 1]} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env_id": 5}, r"env_id must be a string, got int"),
        ({"num_envs": 2.0}, r"num_envs must be an int, got float"),
        ({"seeds": 3}, r"seeds must be a sequence of ints, got 3"),
        ({"seeds": [0.5, 1.0]}, r"seeds must be a sequence of ints, got \[0.5, 1.0\]"),
        ({"num_threads": "2"}, r"num_threads must be an int, got str"),
        ({"max_episode_steps": 1.5}, r"max_episode_steps must be an int, got float"),
    ],
)
def test_make_vec_refuses_types(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=r"^make_vec: " + message):
        make_vec(**({"env_id": "Swimmer-v5", "num_envs": 2, "seeds": [0, 1]} | arguments))


@pytest.mark.parametrize("env_id", ["Swimmer-v5", "tipl/Drift-v0"])
def test_step_and_reset_refuse_mistakes_and_touch_nothing(env_id: str) -> None:
    env, twin = make_vec(env_id, 3, seeds=[0, 1, 2]), make_vec(env_id, 3, seeds=[0, 1, 2])
    good = np.zeros((3, 2))
    with pytest.raises(RuntimeError, match=r"^step: call reset\(\) first"):
        env.step(good)
    env.reset()
    twin.reset()
    with pytest.raises(TypeError, match=r"^step: actions must be a float64 array, got float32"):
        env.step(good.astype(np.float32))
    with pytest.raises(TypeError, match=r"^step: actions must be a float64 array, got list"):
        env.step(good.tolist())
    with pytest.raises(
        ValueError, match=r"^step: actions must have shape \(num_envs, act_dim\) = \(3, 2\), got \(2, 3\)"
    ):
        env.step(good.T.copy())
    with pytest.raises(TypeError, match=r"^step: active must be a bool array, got int64"):
        env.step(good, np.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"^step: active must have shape \(num_envs,\) = \(3,\), got \(2,\)"):
        env.step(good, np.ones(2, bool))
    for value in (np.nan, np.inf):
        bad = good.copy()
        bad[2, 1] = value
        with pytest.raises(ValueError, match=rf"^step: actions must be finite, got \[ *0\. +{value}\] in row 2"):
            env.step(bad)
    with pytest.raises(ValueError, match=r"^reset: seeds must have num_envs = 3 entries, got 1"):
        env.reset(seeds=[0])
    with pytest.raises(TypeError, match=r"^reset: seeds must be a sequence of ints, got 'abc'"):
        env.reset(seeds="abc")
    assert_same(env.step(good), twin.step(good))
