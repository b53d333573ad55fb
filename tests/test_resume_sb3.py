"""Runs of Stable-Baselines3 that were cut off and went on: equal, to the bit, to runs that were not."""

import enum
import json
import random
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from processes import run_python

import tipl
from tipl.files.sealed import Arrays, load_arrays, save_arrays
from tipl.storing.state_tree import decode, encode
from tipl.storing.store import Store

sb3 = pytest.importorskip("stable_baselines3", reason="runs stable-baselines3, which is not installed")
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.monitor import Monitor  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize  # noqa: E402

from tipl.sb3 import RecorderCallback, env_state, resume  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ENV_ID = "InvertedPendulum-v5"
N_ENVS, N_STEPS = 2, 32
ITERATION = N_ENVS * N_STEPS  # env steps
TOTAL = 6 * ITERATION
STATE = "training_state/state.safetensors"


def falling(remaining: float) -> float:
    return 3e-3 * remaining


def make(
    *, normalise: bool = False, env_id: str = ENV_ID, wrap: Callable[[Any], Any] = Monitor, seed: int = 3, **named: Any
) -> Any:
    """Return a PPO as a program would make it anew each time that it is started."""
    env: Any = DummyVecEnv([lambda: wrap(gymnasium.make(env_id))] * N_ENVS)
    if normalise:
        env = VecNormalize(env)
    settings = {"n_steps": N_STEPS, "batch_size": 32, "n_epochs": 2, "learning_rate": falling, "device": "cpu"}
    return sb3.PPO("MlpPolicy", env, seed=seed, policy_kwargs={"net_arch": [16]}, **(settings | named))


def recorder(path: Path) -> RecorderCallback:
    return RecorderCallback(path, resume=True, full_state=True)


class CutOff(BaseCallback):
    """Ends learn() in the middle of a rollout, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        if self.model.num_timesteps >= self.steps:
            raise KeyboardInterrupt
        return True


class Stop(CutOff):
    """Ends learn() there as SB3 provides for it."""

    def _on_step(self) -> bool:
        return bool(self.model.num_timesteps < self.steps)


def cut_off(model: Any, path: Path, steps: int = 3 * ITERATION + 10, total: int = TOTAL) -> None:
    with pytest.raises(KeyboardInterrupt):
        model.learn(total, callback=[recorder(path), CutOff(steps)])


def everything(model: Any, path: Path) -> dict[str, Any]:
    """Return what two equal runs have in common, all but the times on the clock."""
    store, normaliser = Store.open(path), model.get_vec_normalize_env()
    trial = store.trial(0)
    return {
        "weights": trial.weights(),
        "env_steps": trial.env_steps,
        "returns": trial.episodic_return,
        "policy": model.policy.state_dict(),
        "optimiser": model.policy.optimizer.state_dict()["state"],
        "learning rate": model.policy.optimizer.param_groups[0]["lr"],
        "counts": [model.num_timesteps, model._n_updates, model._current_progress_remaining, model._total_timesteps],
        "last": [model._last_obs, model._last_episode_starts],
        "episodes": [[it["r"], it["l"]] for it in model.ep_info_buffer],
        "random": [torch.get_rng_state(), np.random.get_state()[1:3]],  # noqa: NPY002
        "normaliser": None if normaliser is None else [
            *vars(normaliser.obs_rms).values(), *vars(normaliser.ret_rms).values(), normaliser.returns,
        ],
    }  # fmt: skip


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        np.testing.assert_array_equal(a, b)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "VecNormalize": {"normalise": True},
    "gSDE": {"use_sde": True},
    "gSDE, drawn often, and VecNormalize": {"use_sde": True, "sde_sample_freq": 5, "normalise": True},
    "Ant, whose reward reads what the step before computed": {"env_id": "Ant-v5"},
    "Pendulum, whose state is Python's, cut by a TimeLimit": {
        "env_id": "Pendulum-v1", "wrap": lambda env: Monitor(gymnasium.wrappers.TimeLimit(env, 40)),
    },
    "A wrapper with odd attributes": {"wrap": lambda env: Monitor(Odd(env))},
    "Gymnasium's NormalizeObservation": {
        "wrap": lambda env: Monitor(gymnasium.wrappers.NormalizeReward(gymnasium.wrappers.NormalizeObservation(env)))
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_off_equals_one_that_was_not(kind: str, tmp_path: Path) -> None:
    whole = make(**KINDS[kind])
    whole.learn(TOTAL, callback=RecorderCallback(tmp_path / "whole", full_state=True))
    expected = everything(whole, tmp_path / "whole")
    for steps in (10, 3 * ITERATION + 10, 5 * ITERATION):  # twice in a rollout, once in the step that ends one
        cut_off(make(**KINDS[kind]), tmp_path / "parts", steps)
    model = make(**KINDS[kind])
    model.learn(TOTAL, callback=recorder(tmp_path / "parts"))
    assert_equal(everything(model, tmp_path / "parts"), expected)
    assert expected["env_steps"].tolist() == [ITERATION * i for i in range(7)]
    assert not tipl.verify(tmp_path / "parts").problems
    groups = dict(Store.open(tmp_path / "parts").zarr_group().groups())
    assert groups.keys() == {"trial_0000", "training_state"}
    imported = tipl.import_checkpoints([tmp_path / "parts"], tmp_path / "store")
    np.testing.assert_array_equal(imported.trial(0).weights(), expected["weights"])


@pytest.mark.parametrize("algorithm", [sb3.PPO, sb3.A2C])
def test_keeping_the_state_changes_nothing(algorithm: Any, tmp_path: Path) -> None:
    found = []
    for full_state in (False, True):
        model = algorithm("MlpPolicy", ENV_ID, n_steps=64, seed=0, device="cpu")
        model.learn(3 * 64, callback=RecorderCallback(tmp_path / str(full_state), full_state=full_state))
        found.append(everything(model, tmp_path / str(full_state)))
    assert_equal(*found)


def test_a2c_goes_on(tmp_path: Path) -> None:
    def a2c() -> Any:
        return sb3.A2C("MlpPolicy", ENV_ID, n_steps=N_STEPS, learning_rate=falling, seed=0, device="cpu")

    whole, model = a2c(), None
    whole.learn(4 * N_STEPS, callback=recorder(tmp_path / "whole"))
    expected = everything(whole, tmp_path / "whole")
    cut_off(a2c(), tmp_path / "parts", 3 * N_STEPS - 1, total=4 * N_STEPS)
    model = a2c()
    model.learn(4 * N_STEPS, callback=recorder(tmp_path / "parts"))
    assert_equal(everything(model, tmp_path / "parts"), expected)


KILLS = {
    "in a rollout": f"""
class Kill(BaseCallback):
    def _on_step(self):
        if self.model.num_timesteps >= {3 * ITERATION + 10}: os.kill(os.getpid(), signal.SIGKILL)
        return True
""",
    "when the state is saved and its checkpoint is not": """
append = Store.append
def kill(store, *columns):
    if store.num_checkpoints == 3: os.kill(os.getpid(), signal.SIGKILL)
    append(store, *columns)
Store.append = kill
""",
    "while the state is written": """
replace = os.replace
def kill(source, target):
    if str(target).endswith("state.safetensors") and kill.calls == 3: os.kill(os.getpid(), signal.SIGKILL)
    kill.calls += str(target).endswith("state.safetensors")
    replace(source, target)
kill.calls, os.replace = 0, kill
""",
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_equals_one_that_was_not(kill: str, tmp_path: Path) -> None:
    code = f"""
import os, signal
from test_resume_sb3 import *
torch.set_num_threads(1)
class Kill(BaseCallback):
    def _on_step(self): return True
{KILLS[kill]}
make(normalise=True, use_sde=True).learn(TOTAL, callback=[recorder(Path({str(tmp_path / "run")!r})), Kill()])
"""
    done = run_python(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = Store.open(tmp_path / "run").num_checkpoints
    assert there == (4 if kill == "in a rollout" else 3)
    assert not tipl.verify(tmp_path / "run").problems
    model = make(normalise=True, use_sde=True)
    model.learn(TOTAL, callback=recorder(tmp_path / "run"))
    resumed = everything(model, tmp_path / "run")
    whole = make(normalise=True, use_sde=True)
    whole.learn(TOTAL, callback=recorder(tmp_path / "whole"))
    assert_equal(resumed, everything(whole, tmp_path / "whole"))
    assert {file.name for file in (tmp_path / "run" / STATE).parent.iterdir()} == {"zarr.json", "state.safetensors"}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The recording of a run that was cut off after three iterations of six."""
    cut_off(make(), tmp_path / "run")
    return tmp_path / "run"


def test_resume_gives_the_model_and_the_callback(begun: Path, tmp_path: Path) -> None:
    whole = make()
    whole.learn(TOTAL, callback=recorder(tmp_path / "whole"))
    expected = everything(whole, tmp_path / "whole")
    model = make()
    callback = resume(begun, model)
    assert model.num_timesteps == 3 * ITERATION
    last = Store.open(begun).trial(0).weights()[-1]
    with tipl.Recorder(tmp_path / "copy", activation="tanh") as copy:
        copy.log(model.policy, env_steps=0)
    np.testing.assert_array_equal(Store.open(tmp_path / "copy").trial(0).weights()[0], last)
    model.learn(TOTAL, callback=callback)
    assert_equal(everything(model, begun), expected)


def test_the_end_of_learn_cannot_be_mistaken(begun: Path, tmp_path: Path) -> None:
    """total_timesteps is the end of the whole run, whether the count of env steps is said to be reset or not."""
    with pytest.raises(ValueError, match=rf"must end beyond env step {3 * ITERATION}, which .*run has reached, got 64; "
                                         rf"total_timesteps counts the whole run: {TOTAL} in the call"):  # fmt: skip
        make().learn(ITERATION, callback=recorder(begun))
    model = make()
    stopped = [resume(begun, model), Stop(3 * ITERATION + 1)]
    with pytest.warns(UserWarning, match=rf"was to end at env step {TOTAL}, and learn\(\) now ends at {TOTAL + 192}"):
        model.learn(TOTAL, callback=stopped, reset_num_timesteps=False)  # SB3 adds the steps that were taken
    whole = make()
    whole.learn(TOTAL, callback=recorder(tmp_path / "whole"))
    expected = everything(whole, tmp_path / "whole")
    model = make()
    model.learn(TOTAL - 3 * ITERATION, callback=resume(begun, model), reset_num_timesteps=False)  # the same end
    assert_equal(everything(model, begun), expected)
    again = make()
    again.learn(TOTAL, callback=recorder(begun))  # the program started once more when all is done
    assert again.num_timesteps == TOTAL
    np.testing.assert_array_equal(Store.open(begun).trial(0).weights(), expected["weights"])


def test_a_finished_run_can_be_prolonged(tmp_path: Path) -> None:
    """Where no schedule depends on the end, a run that was prolonged equals a longer one."""
    constant: dict[str, Any] = {"learning_rate": 1e-3, "use_sde": True, "normalise": True}
    whole = make(**constant)
    whole.learn(4 * ITERATION, callback=recorder(tmp_path / "whole"))
    expected = everything(whole, tmp_path / "whole")
    make(**constant).learn(2 * ITERATION, callback=recorder(tmp_path / "parts"))
    model = make(**constant)
    model.learn(4 * ITERATION, callback=recorder(tmp_path / "parts"))
    assert_equal(everything(model, tmp_path / "parts"), expected)


def test_learn_once_more_with_the_same_callback(tmp_path: Path) -> None:
    callback, model = recorder(tmp_path / "run"), make(learning_rate=1e-3)
    model.learn(2 * ITERATION, callback=callback)
    model.learn(ITERATION, callback=callback, reset_num_timesteps=False)
    with pytest.raises(ValueError, match=rf"env steps are counted on, but .*run ends at {3 * ITERATION} and learn\(\) "
                                         r"begins at 0: pass reset_num_timesteps=False"):  # fmt: skip
        model.learn(ITERATION, callback=callback)
    assert Store.open(tmp_path / "run").trial(0).env_steps.tolist() == [0, 64, 128, 192]


def test_the_same_callback_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    whole = make()
    whole.learn(TOTAL, callback=recorder(tmp_path / "whole"))
    expected = everything(whole, tmp_path / "whole")
    callback, model = RecorderCallback(tmp_path / "run", full_state=True), make()
    with pytest.raises(KeyboardInterrupt):
        model.learn(TOTAL, callback=[callback, CutOff(200)])
    model.learn(TOTAL, callback=callback)
    assert_equal(everything(model, tmp_path / "run"), expected)


def test_a_model_made_otherwise_is_refused(begun: Path) -> None:
    for named, message in (
        ({"policy_kwargs": {"net_arch": {"pi": [16], "vf": [8]}}}, r"parameters differ: expected .*\(16, 4\), got "),
        ({"policy_kwargs": {"net_arch": [16], "activation_fn": torch.nn.ReLU}}, r"Tanh\(\), got .*ReLU\(\)"),
        ({"policy_kwargs": {"net_arch": [16], "optimizer_class": torch.optim.SGD}}, "expected Adam, got SGD"),
        ({"env_id": "InvertedDoublePendulum-v5"}, "the environments differ: expected InvertedPendulum-v5 1000"),
        ({"normalise": True}, "expected DummyVecEnv, got VecNormalize"),
        ({"wrap": lambda env: Monitor(gymnasium.wrappers.ClipReward(env, -1))}, "ClipReward in Monitor"),
    ):  # fmt: skip
        kwargs = named.pop("policy_kwargs", None)
        model = make(**named)
        if kwargs:
            model = sb3.PPO("MlpPolicy", model.env, n_steps=N_STEPS, batch_size=32, n_epochs=2, device="cpu",
                            learning_rate=falling, policy_kwargs=kwargs)  # fmt: skip
        with pytest.raises(ValueError, match=message):
            resume(begun, model)
    a2c = sb3.A2C("MlpPolicy", ENV_ID, device="cpu")
    with pytest.raises(ValueError, match="the algorithms differ: expected PPO, got A2C"):
        resume(begun, a2c)
    with pytest.raises(ValueError, match="the numbers of environments differ: expected 2, got 1"):
        resume(begun, sb3.PPO("MlpPolicy", ENV_ID, device="cpu"))
    for other in (resume, RecorderCallback):
        model = sb3.SAC("MlpPolicy", ENV_ID, device="cpu", buffer_size=10)
        with pytest.raises(TypeError, match="must be an on-policy algorithm, as PPO is, got SAC"):
            if other is resume:
                resume(begun, model)
            else:
                model.learn(10, callback=recorder(begun))
    make().learn(TOTAL, callback=recorder(begun))  # and it is as it was


def test_other_settings_and_versions_are_said(begun: Path) -> None:
    with pytest.warns(UserWarning, match=r"n_epochs was 2 in .*run and is 3 now: the run goes on, but not to the bit"):
        resume(begun, make(n_epochs=3))
    with pytest.warns(
        UserWarning, match=r"lr_schedule was \[0\.003, 0\.0015, 0\.0\] in .* and is \[0\.1, 0\.1, 0\.1\]"
    ):
        resume(begun, make(learning_rate=0.1))
    arrays, record = load_arrays(begun / STATE, "test")
    versions = record["tree"]["entries"]["versions"]
    versions["dict"] = [[name, "0.1" if name == "torch" else it] for name, it in versions["dict"]]
    save_arrays(begun / STATE, arrays, record)
    with pytest.warns(UserWarning, match=r"was recorded with torch 0\.1 and goes on with torch"):
        resume(begun, make())


def test_damaged_states_and_those_of_other_runs_are_refused(begun: Path, tmp_path: Path) -> None:
    data = (begun / STATE).read_bytes()
    for spoilt in (data[:-1], data[:1000] + bytes([data[1000] ^ 1]) + data[1001:], data[:-9] + b"9" + data[-8:], b""):
        (begun / STATE).write_bytes(spoilt)
        with pytest.raises(RuntimeError, match=r"restore: .*state\.safetensors is damaged"):
            make().learn(TOTAL, callback=recorder(begun))
        assert any("state.safetensors is damaged" in it for it in tipl.verify(begun).problems)
    (begun / STATE).write_bytes(data)
    assert not tipl.verify(begun).problems

    cut_off(make(seed=4), tmp_path / "other")
    same_settings = make()
    with torch.no_grad():
        same_settings.policy.action_net.bias.add_(1.0)
    cut_off(same_settings, tmp_path / "alike")
    for other, message in (("other", "is of another store"), ("alike", "is of another run")):
        (begun / STATE).write_bytes((tmp_path / other / STATE).read_bytes())
        with pytest.raises(RuntimeError, match=message):
            make().learn(TOTAL, callback=recorder(begun))
    (begun / STATE).write_bytes(data)

    model = make()
    model.learn(TOTAL, callback=resume(begun, model))
    whole = (begun / STATE).read_bytes()
    (begun / STATE).write_bytes(data)
    with pytest.raises(RuntimeError, match="is the state at checkpoint 4, but the store has 7: it was recorded on"):
        resume(begun, make())
    (begun / STATE).write_bytes(whole)
    (begun / STATE).unlink()
    with pytest.raises(ValueError, match=r"run has no full state: it must be recorded with full_state=True"):
        resume(begun, make())
    with pytest.raises(ValueError, match=r"run, which has no full state, ends at env step 384 with other weights"):
        make().learn(TOTAL, callback=recorder(begun))
    with tipl.Recorder(tmp_path / "own", env_id=ENV_ID) as own:
        own.log(make().policy, env_steps=1, state={"a": 1})
    with pytest.raises(ValueError, match=r"own must be of Stable-Baselines3, but holds \['a'\]"):
        resume(tmp_path / "own", make())
    with pytest.raises(FileNotFoundError, match="there is no trajectory store at"):
        resume(tmp_path / "nothing", make())


class Motor:
    """Holds what cannot be kept."""

    def __init__(self) -> None:
        self.states = {object()}


class Foreign(gymnasium.Wrapper):
    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.motor = Motor()


class Phase(enum.Enum):
    LEFT, RIGHT = 0, 1


class Odd(gymnasium.Wrapper):
    """Keeps its state under names and in types that others use for something else."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.clock, self.keys, self.actions, self.phase = 0.0, [], [], Phase.LEFT
        self.window, self.envs, self.view = deque(maxlen=3), {"a": 1}, self.unwrapped.data.qpos[:1]
        self.spaces, self.own, self.mean = {"a": env.action_space}, random.Random(1), Motor.__new__(Motor)
        self.mean.value = np.zeros(2)

    def step(self, action: Any) -> Any:
        self.clock += 0.1
        self.actions.append(float(action[0]))
        self.window.append(self.own.random())
        self.mean.value = self.mean.value + self.own.random()
        self.envs["a"] += 1
        self.phase = Phase(1 - self.phase.value)
        obs, _, terminated, truncated, info = super().step(action)
        reward = self.clock + sum(self.actions) + sum(self.window) + self.mean.value.sum() + self.envs["a"]
        return obs, reward + self.phase.value + self.view[0], terminated, truncated, info


class Own(Foreign):
    """Says itself what its state is."""

    steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]

    def step(self, action: Any) -> Any:
        self.steps += 1
        return super().step(action)


class Randomised(gymnasium.Wrapper):
    """Changes its MuJoCo model in every episode."""

    def reset(self, **named: Any) -> Any:
        self.unwrapped.model.body_mass[1] = 1.0 + np.random.default_rng().random()
        return super().reset(**named)


@pytest.mark.parametrize(("wrapper", "why"), [
    (Foreign, r"Foreign\.motor\.states \(a set\)"),
    (Randomised, r"InvertedPendulumEnv\.data \(its MuJoCo model is not the one that the run had"),
])  # fmt: skip
def test_environments_that_cannot_be_kept_begin_new_episodes(wrapper: Any, why: str, tmp_path: Path) -> None:
    def run() -> Any:
        return make(wrap=lambda env: Monitor(wrapper(env)), normalise=True)

    if wrapper is Foreign:
        with pytest.warns(UserWarning, match=rf"cannot be kept \({why}\): after a resume they begin new episodes"):
            cut_off(run(), tmp_path / "run")
    else:
        cut_off(run(), tmp_path / "run")
    model = run()
    with pytest.warns(
        UserWarning, match=rf"cannot be put back \({why}.*they begin new episodes, and the run goes on, but"
    ):
        callback = resume(tmp_path / "run", model)
    assert model._last_episode_starts.all()
    assert not model.env.returns.any()
    assert model.env.get_attr("rewards") == [[], []]
    with pytest.warns(UserWarning, match="begin new episodes"):
        model.learn(TOTAL, callback=callback)
    assert Store.open(tmp_path / "run").trial(0).env_steps.tolist() == [ITERATION * i for i in range(7)]


def test_an_environment_can_say_what_its_state_is(tmp_path: Path) -> None:
    cut_off(make(wrap=lambda env: Monitor(Own(env))), tmp_path / "run")
    model = make(wrap=lambda env: Monitor(Own(env)))
    resume(tmp_path / "run", model)
    assert model.env.get_attr("steps") == [3 * N_STEPS] * 2


def test_environments_in_other_processes_begin_new_episodes(tmp_path: Path) -> None:
    def run() -> Any:
        env = SubprocVecEnv([lambda: gymnasium.make("Pendulum-v1")], start_method="fork")
        return sb3.PPO("MlpPolicy", env, n_steps=N_STEPS, seed=0, device="cpu", batch_size=32)

    why = r"the environments of SubprocVecEnv run outside this process"
    model = run()
    with pytest.warns(UserWarning, match=why):
        model.learn(3 * N_STEPS, callback=[recorder(tmp_path / "run"), Stop(N_STEPS + 1)])
    model.env.close()
    model = run()
    with pytest.warns(UserWarning, match=why):
        model.learn(3 * N_STEPS, callback=recorder(tmp_path / "run"))
    model.env.close()
    assert Store.open(tmp_path / "run").trial(0).env_steps.tolist() == [0, 32, 64, 96]


@pytest.mark.parametrize(
    "env_id",
    ["Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5", "InvertedDoublePendulum-v5",
     "Pusher-v5", "Reacher-v5", "Swimmer-v5", "Walker2d-v5", "CartPole-v1", "Acrobot-v1", "MountainCarContinuous-v0",
     "Taxi-v4", "FrozenLake-v1", "Blackjack-v1"],
)  # fmt: skip
def test_every_environment_goes_on_where_it_was(env_id: str) -> None:
    """A fresh environment takes the state of another in the middle of an episode: the same bits in every later step."""
    envs = [VecMonitor(DummyVecEnv([lambda: gymnasium.make(env_id)] * 2)) for _ in range(2)]
    for env in envs:
        env.action_space.seed(0)
        env.seed(0)
        env.reset()
    actions = [np.stack([envs[0].action_space.sample() for _ in range(2)]) for _ in range(150)]
    for action in actions[:50]:
        envs[0].step(action)
    state, lost = env_state.envs_state(envs[0])
    arrays: Arrays = {}
    state = decode(json.loads(json.dumps(encode(state, arrays, "state"))), arrays)
    assert not lost
    env_state.set_wrappers_state(envs[1], state)
    env_state.set_envs_state(envs[1], state)
    for action in actions[50:]:
        (obs, rewards, dones, infos), other = (env.step(action) for env in envs)
        assert_equal([obs, rewards, dones], list(other[:3]))
        episodes = [
            [[it["episode"][key] for key in "rl"] for it in some if "episode" in it] for some in (infos, other[3])
        ]
        assert_equal(*episodes)
