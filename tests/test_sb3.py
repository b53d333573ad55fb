"""Runs of Stable-Baselines3: recorded, imported, forecast, exported, loaded again and judged."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium.wrappers as wrappers
import numpy as np
import pytest
import torch
from factories import TINY_EVALUATE, TINY_TRAIN, flags

import tipl
from tipl import JumpConfig
from tipl.collecting.episodes import episodic_returns
from tipl.collecting.policy_network import mean_action
from tipl.jumping.jumps import Jump, Walk
from tipl.policy import ParameterLayout, PolicySpec
from tipl.storing.store import Store

sb3 = pytest.importorskip("stable_baselines3", reason="runs stable-baselines3, which is not installed")
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback  # noqa: E402
from stable_baselines3.common.evaluation import evaluate_policy  # noqa: E402
from stable_baselines3.common.monitor import Monitor  # noqa: E402
from stable_baselines3.common.policies import ActorCriticPolicy  # noqa: E402
from stable_baselines3.common.torch_layers import FlattenExtractor  # noqa: E402
from stable_baselines3.common.vec_env import (  # noqa: E402
    DummyVecEnv,
    SubprocVecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from tipl.sb3 import JumpCallback, RecorderCallback  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ENV_ID = "InvertedPendulum-v5"
NUM_STEPS, NUM_UPDATES, NUM_RUNS = 128, 12, 4
OBS = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)


def ppo(seed: int = 0, **arguments: Any) -> Any:
    arguments = {"n_steps": NUM_STEPS, "batch_size": 64, "n_epochs": 1, "seed": seed, "device": "cpu"} | arguments
    return sb3.PPO("MlpPolicy", ENV_ID, **arguments)


class Spy(BaseCallback):
    """Notes every distinct actor that it sees, whatever hook it sees it in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[np.ndarray] = []

    def note(self) -> None:
        weights = actor_of(self.model)
        if not self.seen or not np.array_equal(self.seen[-1], weights):
            self.seen.append(weights)

    def _on_training_start(self) -> None:
        self.note()

    def _on_step(self) -> bool:
        self.note()
        return True

    def _on_training_end(self) -> None:
        self.note()


def actor_of(model: Any) -> np.ndarray:
    """Return the actor's parameters in the order of PolicySpec, from SB3's own modules."""
    policy = model.policy
    parts = [policy.log_std, *policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    return torch.cat([part.detach().flatten() for part in parts]).numpy()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders seed0, seed1, ... of SB3's checkpoints, and seed0.zarr, ... recorded in the same runs."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(NUM_RUNS):
        spy = Spy()
        callbacks = [
            CheckpointCallback(NUM_STEPS, str(folder / f"seed{seed}")),
            RecorderCallback(folder / f"seed{seed}.zarr"),
            spy,
        ]
        model = ppo(seed).learn(NUM_STEPS * NUM_UPDATES, callback=CallbackList(callbacks))
        np.save(folder / f"seed{seed}.npy", np.array(spy.seen))
        np.save(folder / f"returns{seed}.npy", [episode["r"] for episode in model.ep_info_buffer])
    return folder


def test_every_update_of_ppo_is_recorded_once(runs: Path) -> None:
    for seed in range(NUM_RUNS):
        store, seen = Store.open(runs / f"seed{seed}.zarr"), np.load(runs / f"seed{seed}.npy")
        assert seen.shape == (NUM_UPDATES + 1, store.policy.num_params)
        np.testing.assert_array_equal(store.trial(0).weights(), seen)
        assert store.trial(0).env_steps.tolist() == [NUM_STEPS * i for i in range(NUM_UPDATES + 1)]
        returns = store.trial(0).episodic_return
        assert np.isnan(returns[0])
        assert returns[-1] == np.load(runs / f"returns{seed}.npy").mean()  # fewer than 100 episodes: SB3's ep_rew_mean
    assert store.policy == PolicySpec(4, 1)
    assert store.env_id == ENV_ID
    assert (store.config["algorithm"], store.config["seed"]) == ("PPO", NUM_RUNS - 1)


def test_sb3s_own_checkpoints_hold_what_was_recorded(runs: Path, tmp_path: Path) -> None:
    folders = [runs / f"seed{seed}" for seed in range(NUM_RUNS)]
    store = tipl.import_checkpoints(folders, tmp_path / "store", env_id=ENV_ID)
    for seed in range(NUM_RUNS):
        imported, recorded = store.trial(seed), Store.open(runs / f"seed{seed}.zarr").trial(0)
        assert imported.env_steps.tolist() == [NUM_STEPS * (i + 1) for i in range(NUM_UPDATES)]
        # SB3 saves at the end of a rollout, before the update that learns from it.
        np.testing.assert_array_equal(imported.weights(), recorded.weights(0, NUM_UPDATES))


def test_round_trip(runs: Path, hasty_nowcaster: None, run_tipl: Callable[..., int], tmp_path: Path) -> None:
    """SB3 -> import -> train -> rollout -> export -> PPO.load -> evaluate."""

    def run(*arguments: object) -> None:
        assert run_tipl(*arguments) == 0

    store, model, forecast, output = (tmp_path / name for name in ("store", "model", "f.safetensors", "forecast.zip"))
    run("import", *(runs / f"seed{i}" for i in range(NUM_RUNS)), "--output", store, "--env-id", ENV_ID)
    run("train", "--store", store, "--output", model, *flags(TINY_TRAIN))
    run("rollout", "--model", model, "--store", store, "--trial", 1, "--prefix", 0.5, "--output", forecast)
    template = runs / "seed1" / f"rl_model_{NUM_STEPS * 6}_steps.zip"
    run("export", forecast, "--like", template, "--output", output)

    expected = tipl.rollout(Store.open(store).trial(1).weights(0, 7), 5, tipl.Forecaster.load(model))[0, -1]
    loaded = sb3.PPO.load(output, device="cpu")
    np.testing.assert_array_equal(actor_of(loaded), expected)
    mean, _ = evaluate_policy(loaded, Monitor(gymnasium.make(ENV_ID)), n_eval_episodes=3)
    assert mean > 0
    # The same policies in the two simulations: the same episodes.
    seeds = np.arange(5)
    ours = episodic_returns(ENV_ID, PolicySpec(4, 1), expected[None], seeds)[0]
    np.testing.assert_array_equal(ours, [sb3_return(loaded, int(seed)) for seed in seeds])
    # It learns on, as any checkpoint does.
    loaded.set_env(DummyVecEnv([lambda: gymnasium.make(ENV_ID)]))
    loaded.learn(NUM_STEPS)
    # And the whole evaluation runs on imported stores.
    run("evaluate", "--store", store, "--model", model, "--output", tmp_path / "evaluation", *flags(TINY_EVALUATE))


def sb3_return(model: Any, seed: int, env_id: str = ENV_ID) -> float:
    env, total, over = gymnasium.make(env_id), 0.0, False
    obs, _ = env.reset(seed=seed)
    while not over:
        action, _ = model.predict(obs, deterministic=True)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, over = total + float(reward), terminated or truncated
    env.close()
    return total


def test_a_checkpoint_exported_unchanged_is_the_original(runs: Path, tmp_path: Path) -> None:
    store = tipl.import_checkpoints([runs / "seed0"], tmp_path / "store")
    original, template = (runs / "seed0" / f"rl_model_{NUM_STEPS * i}_steps.zip" for i in (9, 1))
    written = tipl.export_checkpoint(store.path, template, tmp_path / "a.zip", checkpoint=8)
    actions = [sb3.PPO.load(path, device="cpu").predict(OBS, deterministic=True)[0] for path in (written, original)]
    np.testing.assert_array_equal(*actions)
    with zipfile.ZipFile(written) as after, zipfile.ZipFile(template) as before:
        assert after.namelist() == before.namelist()
        for name in set(after.namelist()) - {"policy.pth"}:
            assert after.read(name) == before.read(name)
    states = [sb3.PPO.load(path, device="cpu").policy.state_dict() for path in (written, template, original)]
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1 if "value" in key else 2][key])


def test_a_run_that_tipl_collected_goes_into_a_zip(tmp_path: Path) -> None:
    ppo_config = tipl.PPOConfig(num_steps=64, num_minibatches=1)
    store = tipl.collect(
        tmp_path / "s", env_id=ENV_ID, num_trials=2, total_timesteps=64, ppo=ppo_config, progress=False
    )
    ppo().save(tmp_path / "like.zip")
    written = tipl.export_checkpoint(store.path, tmp_path / "like.zip", tmp_path / "out.zip", trial=1)
    np.testing.assert_array_equal(actor_of(sb3.PPO.load(written, device="cpu")), store.trial(1).weights()[-1])
    ppo(policy_kwargs={"activation_fn": torch.nn.ReLU}).save(tmp_path / "relu.zip")
    with pytest.raises(ValueError, match="the activation is relu instead of tanh"):
        tipl.export_checkpoint(store.path, tmp_path / "relu.zip", tmp_path / "out2.zip")
    ppo(policy_kwargs={"net_arch": [32]}).save(tmp_path / "small.zip")
    with pytest.raises(ValueError, match=r"policy_net\.2\.weight \(64, 64\) is missing"):
        tipl.export_checkpoint(store.path, tmp_path / "small.zip", tmp_path / "out2.zip")


@pytest.mark.parametrize(
    ("kwargs", "policy"),
    [
        ({"activation_fn": torch.nn.ReLU, "net_arch": [16]}, PolicySpec(4, 1, (16,), "relu")),
        ({"activation_fn": torch.nn.ELU, "net_arch": {"pi": [8, 4], "vf": [16]}}, PolicySpec(4, 1, (8, 4), "elu")),
        ({"net_arch": {"pi": [], "vf": [8]}}, PolicySpec(4, 1, ())),
        ({"activation_fn": torch.nn.SiLU, "net_arch": [8]}, PolicySpec(4, 1, (8,), "silu")),
        ({"activation_fn": torch.nn.Mish, "net_arch": [8]}, None),
    ],
)
def test_networks_of_all_kinds(kwargs: dict[str, Any], policy: PolicySpec | None, tmp_path: Path) -> None:
    model = ppo(policy_kwargs=kwargs)
    model.save(tmp_path / "a.zip")
    store = tipl.import_checkpoints([tmp_path / "a.zip"], tmp_path / "store")
    with tipl.Recorder(
        tmp_path / "recording", activation=kwargs.get("activation_fn", torch.nn.Tanh).__name__.lower()
    ) as recorder:
        recorder.log(model.policy, env_steps=0)
    assert Store.open(tmp_path / "recording").policy == store.policy
    row = store.trial(0).weights()[0]
    np.testing.assert_array_equal(row, actor_of(model))
    if policy is None:
        assert isinstance(store.policy, ParameterLayout)
    else:
        assert store.policy == policy
    written = tipl.export_checkpoint(row + 1, tmp_path / "a.zip", tmp_path / "b.zip")
    np.testing.assert_array_equal(actor_of(sb3.PPO.load(written, device="cpu")), row + 1)


def test_reduced_gsde_and_discrete_actions_that_nothing_says_are_not_for_the_simulator(tmp_path: Path) -> None:
    one_for_all = {"net_arch": [8], "full_std": False}  # both actions share a column of log_std
    gsde = sb3.PPO("MlpPolicy", "Reacher-v5", use_sde=True, policy_kwargs=one_for_all, device="cpu")
    discrete = sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
    for model in (gsde, discrete):
        with tipl.Recorder(tmp_path / str(id(model))) as recorder:
            recorder.log(model.policy, env_steps=0)
        assert isinstance(Store.open(recorder.path).policy, ParameterLayout)
        assert not any("value" in name for name in Store.open(recorder.path).policy.shapes)


def test_a2c_is_recorded_and_comes_back(tmp_path: Path) -> None:
    model = sb3.A2C("MlpPolicy", ENV_ID, n_steps=16, device="cpu", seed=0)
    model.learn(48, callback=RecorderCallback(tmp_path / "run"))
    store = Store.open(tmp_path / "run")
    assert store.trial(0).env_steps.tolist() == [0, 16, 32, 48]
    np.testing.assert_array_equal(store.trial(0).weights()[-1], actor_of(model))
    model.save(tmp_path / "a.zip")
    written = tipl.export_checkpoint(store.path, tmp_path / "a.zip", tmp_path / "b.zip", checkpoint=1)
    np.testing.assert_array_equal(actor_of(sb3.A2C.load(written, device="cpu")), store.trial(0).weights()[1])


def test_learning_on_is_recorded_behind_and_a_new_start_is_refused(tmp_path: Path) -> None:
    model, callback = ppo(), RecorderCallback(tmp_path / "run")
    model.learn(2 * NUM_STEPS, callback=callback)
    model.learn(NUM_STEPS, callback=callback, reset_num_timesteps=False)
    model.save(tmp_path / "model.zip")
    again = sb3.PPO.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    again.learn(NUM_STEPS, callback=RecorderCallback(tmp_path / "run", resume=True), reset_num_timesteps=False)
    trial = Store.open(tmp_path / "run").trial(0)
    assert trial.env_steps.tolist() == [NUM_STEPS * i for i in range(5)]
    np.testing.assert_array_equal(trial.weights()[-1], actor_of(again))
    with pytest.raises(FileExistsError, match="pass resume=True"):
        ppo().learn(NUM_STEPS, callback=RecorderCallback(tmp_path / "run"))
    with pytest.raises(
        ValueError,
        match=rf"run ends at env step {4 * NUM_STEPS} with other weights, but learn\(\) begins at 0: to go on",
    ):
        ppo().learn(NUM_STEPS, callback=RecorderCallback(tmp_path / "run", resume=True))
    assert Store.open(tmp_path / "run", writable=True).num_checkpoints == 5  # let go, and as it was
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        RecorderCallback(tmp_path / "x", every=0)


class StopAt(BaseCallback):
    def _on_step(self) -> bool:
        return self.num_timesteps < NUM_STEPS + 10


def test_a_run_stopped_in_a_rollout_repeats_no_checkpoint(tmp_path: Path) -> None:
    ppo().learn(5 * NUM_STEPS, callback=[RecorderCallback(tmp_path / "run"), StopAt()])
    assert Store.open(tmp_path / "run").trial(0).env_steps.tolist() == [0, NUM_STEPS]


@pytest.mark.parametrize("anew", [False, True])
def test_learning_goes_on_where_env_steps_are_counted_anew(anew: bool, tmp_path: Path) -> None:
    model, callback = ppo(), RecorderCallback(tmp_path / "run")
    model.learn(2 * NUM_STEPS, callback=callback)
    again = RecorderCallback(tmp_path / "run", resume=True) if anew else callback
    model.learn(2 * NUM_STEPS, callback=again)  # reset_num_timesteps is True by default
    assert model.num_timesteps == 2 * NUM_STEPS
    trial = Store.open(tmp_path / "run").trial(0)
    assert trial.env_steps.tolist() == [NUM_STEPS * i for i in range(5)]
    assert len(np.unique(trial.weights(), axis=0)) == 5
    np.testing.assert_array_equal(trial.weights()[-1], actor_of(model))


class Interrupt(BaseCallback):
    def _on_step(self) -> bool:
        if self.num_timesteps >= 2 * NUM_STEPS + 10:
            raise KeyboardInterrupt
        return True


@pytest.mark.parametrize("reset", [False, True])
def test_a_fresh_callback_goes_on_after_ctrl_c(reset: bool, tmp_path: Path) -> None:
    model, interrupted = ppo(), RecorderCallback(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        model.learn(9 * NUM_STEPS, callback=[interrupted, Interrupt()])
    with pytest.raises(FileExistsError, match="pass resume=True"):
        model.learn(NUM_STEPS, callback=RecorderCallback(tmp_path / "run"), reset_num_timesteps=reset)
    model.learn(NUM_STEPS, callback=RecorderCallback(tmp_path / "run", resume=True), reset_num_timesteps=reset)
    trial = Store.open(tmp_path / "run", writable=True).trial(0)
    # The steps that no update saw count where SB3 counts them; the weights of before are not recorded twice.
    assert trial.env_steps.tolist() == [0, NUM_STEPS, 2 * NUM_STEPS, 3 * NUM_STEPS + (0 if reset else 10)]
    assert len(np.unique(trial.weights(), axis=0)) == 4


def test_a_model_of_another_layout_lets_the_store_go(tmp_path: Path) -> None:
    ppo().learn(NUM_STEPS, callback=RecorderCallback(tmp_path / "run"))
    small = ppo(policy_kwargs={"net_arch": [8]})
    with pytest.raises(ValueError, match=r"Recorder: policy: it does not fit .*run: policy_net\.2\.weight"):
        small.learn(NUM_STEPS, callback=RecorderCallback(tmp_path / "run", resume=True))
    Store.open(tmp_path / "run", writable=True).close()


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (lambda: gymnasium.make("Pendulum-v1", g=np.float32(2)), "but made with g=np.float32(2.0): the simulator"),
        (
            lambda: DummyVecEnv([lambda: gymnasium.make("Pendulum-v1"), lambda: gymnasium.make("Pendulum-v1", g=2.0)]),
            "but made with g=2.0: the simulator",
        ),
        (lambda: gymnasium.make("Pendulum-v1", max_episode_steps=-1), "but made without its time limit: the simulator"),
        (
            lambda: wrappers.NormalizeObservation(gymnasium.make("Pendulum-v1")),
            "of NormalizeObservation are folded into",
        ),
        (lambda: wrappers.NormalizeReward(gymnasium.make("Pendulum-v1")), "but wrapped in NormalizeReward:"),
        (lambda: wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1, 1), "but wrapped in RescaleAction:"),
        (
            lambda: VecFrameStack(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")]), 2),
            "but wrapped in VecFrameStack:",
        ),
        (lambda: wrappers.RecordEpisodeStatistics(gymnasium.make("Pendulum-v1", render_mode=None)), None),
        (lambda: VecMonitor(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")])), None),
    ],
)
def test_an_environment_unlike_its_id_is_said(make: Any, note: str | None, tmp_path: Path) -> None:
    model = sb3.PPO("MlpPolicy", make(), n_steps=64, n_epochs=1, device="cpu")
    model.learn(64, callback=RecorderCallback(tmp_path / "run"))
    store = Store.open(tmp_path / "run")
    assert store.env == "Pendulum-v1"
    written = store.config["source"].get("note")
    assert written is None if note is None else note in written


def test_the_arguments_of_an_environment_are_recorded_and_serve_what_runs_its_policies(tmp_path: Path) -> None:
    kwargs = {"g": 2.0, "max_episode_steps": 9}
    path = tmp_path / "run"
    env = gymnasium.make("Pendulum-v1", render_mode="rgb_array", **kwargs)
    model = sb3.PPO("MlpPolicy", env, n_steps=64, n_epochs=1, device="cpu")
    model.learn(64, callback=RecorderCallback(path))
    store = Store.open(path)
    assert (store.env_kwargs, store.config["source"].get("note")) == (kwargs, None)
    scores = tipl.score(store, num_episodes=1, progress=False)
    seed = int(np.random.default_rng((0, 0)).integers(2**31, size=5)[0])
    own, obs, total = gymnasium.make("Pendulum-v1", **kwargs), None, 0.0
    obs, _ = own.reset(seed=seed)
    for _ in range(9):
        obs, reward, _, truncated, _ = own.step(model.predict(obs, deterministic=True)[0])
        total += float(reward)
    assert truncated
    assert scores.returns[0, -1, 0] == pytest.approx(total, rel=1e-5)
    model.learn(64, callback=RecorderCallback(path, resume=True), reset_num_timesteps=False)
    assert Store.open(path).num_checkpoints == 3
    other = sb3.PPO("MlpPolicy", gymnasium.make("Pendulum-v1", g=3.0), n_steps=64, n_epochs=1, device="cpu")
    with pytest.raises(ValueError, match=r'must be a recording of Pendulum-v1 {"g": 3.0} to append to'):
        other.learn(64, callback=RecorderCallback(path, resume=True))


def test_an_old_recording_without_arguments_goes_on(tmp_path: Path) -> None:
    model = sb3.PPO("MlpPolicy", gymnasium.make("Pendulum-v1", g=2.0), n_steps=64, n_epochs=1, device="cpu")
    model.learn(64, callback=RecorderCallback(tmp_path / "run", env_kwargs={}))  # as older tipls recorded
    model.learn(64, callback=RecorderCallback(tmp_path / "run", resume=True), reset_num_timesteps=False)
    assert (Store.open(tmp_path / "run").env_kwargs, Store.open(tmp_path / "run").num_checkpoints) == ({}, 3)


class OwnPolicy(ActorCriticPolicy):
    """A policy whose default activation is not SB3's."""

    def __init__(self, *arguments: Any, activation_fn: Any = torch.nn.ReLU, **named: Any) -> None:
        super().__init__(*arguments, activation_fn=activation_fn, **named)


class Tanh(torch.nn.Module):
    """Not torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_policies_of_an_own_class_are_not_taken_for_sb3s(tmp_path: Path) -> None:
    model = sb3.PPO(OwnPolicy, ENV_ID, n_steps=64, n_epochs=1, device="cpu")
    model.learn(64, callback=RecorderCallback(tmp_path / "run"))
    assert Store.open(tmp_path / "run").policy == PolicySpec(4, 1, (64, 64), "relu")
    model.save(tmp_path / "own.zip")
    with pytest.raises(
        ValueError, match=r"own\.zip: its policy is of a class of its own, from test_sb3, .*: pass activation"
    ):
        tipl.import_checkpoints([tmp_path / "own.zip"], tmp_path / "store")
    store = tipl.import_checkpoints([tmp_path / "own.zip"], tmp_path / "store", activation="relu")
    assert store.policy == PolicySpec(4, 1, (64, 64), "relu")
    for it in (store, Store.open(tmp_path / "run")):
        assert "of a class of its own, from test_sb3: what that does beside" in it.config["source"]["note"]
    named_alike = ppo(policy_kwargs={"activation_fn": Tanh})
    named_alike.learn(NUM_STEPS, callback=RecorderCallback(tmp_path / "alike"))
    assert isinstance(Store.open(tmp_path / "alike").policy, ParameterLayout)
    named_alike.save(tmp_path / "alike.zip")
    assert isinstance(tipl.import_checkpoints([tmp_path / "alike.zip"], tmp_path / "b").policy, ParameterLayout)


@pytest.mark.parametrize(("algorithm", "settings"), [(sb3.PPO, {"n_epochs": 1}), (sb3.A2C, {})])
@pytest.mark.parametrize("hidden", [(64, 64), (7,), ()])
def test_policies_with_gsde_are_run_by_their_mean_action(algorithm, settings, hidden, tmp_path):
    layers = {"net_arch": {"pi": list(hidden), "vf": [8]}}
    model = algorithm(
        "MlpPolicy", ENV_ID, use_sde=True, n_steps=64, policy_kwargs=layers, seed=0, device="cpu", **settings
    )
    model.learn(64, callback=RecorderCallback(tmp_path / "recording"))
    model.save(tmp_path / "model_64_steps.zip")
    store = tipl.import_checkpoints([tmp_path / "model_64_steps.zip"], tmp_path / "store", env_id=ENV_ID)
    assert store.policy == PolicySpec(4, 1, hidden, "tanh", gsde=True) == Store.open(tmp_path / "recording").policy
    obs = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    row = torch.from_numpy(store.trial(0).weights())
    own = model.predict(obs, deterministic=True)[0]
    np.testing.assert_allclose(
        mean_action(store.policy, row, torch.from_numpy(obs)[None])[0].clip(-3, 3), own, atol=1e-6
    )
    last = Store.open(tmp_path / "recording").trial(0).weights()[-1]
    np.testing.assert_array_equal(last, store.trial(0).weights()[0])
    exported = tipl.export_checkpoint(last, tmp_path / "model_64_steps.zip", tmp_path / "exported.zip")
    again = algorithm.load(exported, device="cpu")
    for name, tensor in model.policy.state_dict().items():
        assert torch.equal(again.policy.state_dict()[name], tensor)
    scores = tipl.score(store, num_episodes=2, progress=False)
    seeds = np.random.default_rng((0, 0)).integers(2**31, size=10)[:2]
    env, returns = gymnasium.make(ENV_ID), []
    for seed in seeds:
        (seen, _), total, ended = env.reset(seed=int(seed)), 0.0, False
        while not ended:
            action = model.predict(seen.astype(np.float32), deterministic=True)[0]
            seen, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    np.testing.assert_array_equal(scores.returns[0, 0], returns)


def test_observation_statistics_travel_with_every_checkpoint(tmp_path: Path) -> None:
    """Each checkpoint, of SB3's files and of a recording, acts on raw observations as the model on normalised ones."""
    env = VecNormalize(DummyVecEnv([lambda: Monitor(gymnasium.make(ENV_ID))]), clip_obs=1e6)
    model, seen = sb3.PPO("MlpPolicy", env, n_steps=64, n_epochs=1, seed=0, device="cpu"), []
    obs = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)

    class Acts(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps in (64, 128):
                seen.append(model.predict(env.normalize_obs(obs), deterministic=True)[0])
            return True

    checkpoints = CheckpointCallback(64, str(tmp_path / "run"), save_vecnormalize=True)
    recorder = RecorderCallback(tmp_path / "recording")
    model.learn(128, callback=[Acts(), checkpoints, recorder])
    store = tipl.import_checkpoints([tmp_path / "run"], tmp_path / "store", env_id=ENV_ID)
    assert store.trial(0).env_steps.tolist() == [64, 128]

    def actions(store: Store, i: int) -> Any:
        row = torch.from_numpy(store.trial(0).weights(i, i + 1).copy())
        return mean_action(store.policy, row, torch.from_numpy(obs)[None])[0].numpy()

    for i in range(2):
        np.testing.assert_allclose(np.clip(actions(store, i), -3.0, 3.0), seen[i], atol=1e-5)
    recording = Store.open(tmp_path / "recording")
    last = model.predict(env.normalize_obs(obs), deterministic=True)[0]
    np.testing.assert_allclose(np.clip(actions(recording, -1 % recording.num_checkpoints), -3.0, 3.0), last, atol=1e-5)
    for it in (store, recording):
        assert "folded into the first layer" in it.config["source"]["note"]
        assert not it.is_unnormalised
    model.save(tmp_path / "model.zip")
    env.save(tmp_path / "model_vecnormalize.pkl")
    exported = tipl.export_checkpoint(recording.path, tmp_path / "model.zip", tmp_path / "exported.zip")
    again = sb3.PPO.load(exported, device="cpu").predict(env.normalize_obs(obs), deterministic=True)[0]
    np.testing.assert_allclose(again, last, atol=1e-5)


def test_a_normalised_run_can_be_resumed_and_other_normalisers_are_said(tmp_path: Path) -> None:
    def normalised() -> Any:
        return VecNormalize(DummyVecEnv([lambda: Monitor(gymnasium.make(ENV_ID))]))

    env = normalised()
    model = sb3.PPO("MlpPolicy", env, n_steps=64, n_epochs=1, seed=0, device="cpu")
    model.learn(128, callback=RecorderCallback(tmp_path / "run"))
    model.save(tmp_path / "model.zip")
    env.save(tmp_path / "vec_normalize.pkl")
    env = VecNormalize.load(tmp_path / "vec_normalize.pkl", DummyVecEnv([lambda: Monitor(gymnasium.make(ENV_ID))]))
    again = sb3.PPO.load(tmp_path / "model.zip", env=env, device="cpu")
    again.learn(128, callback=RecorderCallback(tmp_path / "run", resume=True), reset_num_timesteps=False)
    assert Store.open(tmp_path / "run").trial(0).env_steps.tolist() == [0, 64, 128, 192, 256]
    other = sb3.PPO("MlpPolicy", normalised(), n_steps=64, n_epochs=1, seed=1, device="cpu")
    with pytest.raises(ValueError, match="with other weights"):
        other.learn(64, callback=RecorderCallback(tmp_path / "run", resume=True))
    stacked = sb3.PPO("MlpPolicy", VecFrameStack(normalised(), 2), n_steps=64, n_epochs=1, device="cpu")
    stacked.learn(64, callback=RecorderCallback(tmp_path / "stacked"))
    store = Store.open(tmp_path / "stacked")
    assert store.is_unnormalised
    assert "whose statistics are not recorded" in store.config["source"]["note"]


def clipped(env: Any) -> Any:
    return wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10), env.observation_space)


def scaled(env: Any) -> Any:
    return wrappers.TransformObservation(env, lambda obs: np.clip(obs * 2, -10, 10), env.observation_space)


class Own(gymnasium.ObservationWrapper):
    def observation(self, obs: Any) -> Any:
        return 2 * obs


class Shift(gymnasium.ActionWrapper):
    def action(self, action: Any) -> Any:
        return action + 0.1


class Shaped(gymnasium.Wrapper):
    """Another reward, the same observations and actions."""

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, float(reward) + 1.0, *rest


class OwnVec(VecEnvWrapper):
    def reset(self) -> Any:
        return 2 * self.venv.reset()

    def step_wait(self) -> Any:
        obs, *rest = self.venv.step_wait()
        return 2 * obs, *rest


def normalised(env: Any = None) -> Any:
    return wrappers.NormalizeObservation(gymnasium.make(ENV_ID) if env is None else env)


def frozen(mean: float = 0.5) -> Any:
    env = normalised()
    env.obs_rms.mean, env.update_running_mean = np.full(4, mean), False
    return env


FOLDED_WRAPPERS = {
    "NormalizeObservation": normalised,
    "in a vector": lambda: DummyVecEnv([normalised]),
    "watched": lambda: DummyVecEnv([lambda: Monitor(wrappers.RecordEpisodeStatistics(normalised()))]),
    "CleanRL's": lambda: wrappers.NormalizeReward(
        clipped(normalised(wrappers.FlattenObservation(gymnasium.make(ENV_ID))))
    ),
    "with a reward of one's own": lambda: Shaped(normalised()),
    "frozen in two environments": lambda: DummyVecEnv([frozen, frozen]),
    "VecNormalize without observations": lambda: VecNormalize(DummyVecEnv([normalised]), norm_obs=False),
}


@pytest.mark.parametrize("kind", FOLDED_WRAPPERS)
def test_gymnasiums_statistics_are_recorded_live(kind: str, tmp_path: Path) -> None:
    model = sb3.PPO("MlpPolicy", FOLDED_WRAPPERS[kind](), n_steps=64, n_epochs=1, seed=0, device="cpu")
    model.learn(128, callback=RecorderCallback(tmp_path / "run"))
    store = Store.open(tmp_path / "run")
    note = store.config["source"]["note"]
    assert not store.is_unnormalised
    assert note.startswith("the observation statistics of NormalizeObservation are folded into the first layer")
    assert ("beyond [-10, 10], is not clipped" in note) == (kind == "CleanRL's")
    assert "wrapped in NormalizeObservation" not in note
    assert "wrapped in TransformObservation" not in note
    assert ("wrapped in NormalizeReward" in note) == (kind == "CleanRL's")
    assert ("wrapped in Shaped" in note) == ("of one's own" in kind)
    env = model.env.envs[0]
    while not isinstance(env, wrappers.NormalizeObservation):
        env = env.env
    seen = ((OBS - env.obs_rms.mean) / np.sqrt(env.obs_rms.var + env.epsilon)).astype(np.float32)
    row = torch.from_numpy(store.trial(0).weights()[-1:].copy())
    ours = mean_action(store.policy, row, torch.from_numpy(OBS)[None])[0].clip(-3, 3)
    np.testing.assert_allclose(ours, model.predict(seen, deterministic=True)[0], atol=1e-5)
    tipl.score(store, num_episodes=1, progress=False)
    before = store.num_checkpoints
    model.learn(64, callback=RecorderCallback(tmp_path / "run", resume=True), reset_num_timesteps=False)
    assert store.num_checkpoints > before


MARKED_WRAPPERS = {
    "several with their own statistics": (
        lambda: DummyVecEnv([normalised, normalised]),
        "NormalizeObservation, of which each of the 2 environments has one with other statistics",
    ),
    "some": (lambda: DummyVecEnv([normalised, lambda: gymnasium.make(ENV_ID)]), "NormalizeObservation, of which each"),
    "frozen apart": (lambda: DummyVecEnv([frozen, lambda: frozen(0.7)]), "NormalizeObservation, of which each"),
    "actions": (lambda: wrappers.RescaleAction(gymnasium.make(ENV_ID), -1, 1), "RescaleAction, which changes actions"),
    "own actions": (lambda: Shift(normalised()), "Shift, which changes actions"),
    "own observations": (lambda: Own(gymnasium.make(ENV_ID)), "Own, which changes observations"),
    "own over normalised": (lambda: Own(normalised()), "Own, which changes observations"),
    "normalised over own": (lambda: normalised(Own(gymnasium.make(ENV_ID))), "Own, which changes observations"),
    "more than a clip": (lambda: scaled(normalised()), "TransformObservation, which changes observations"),
    "a clip before": (lambda: normalised(clipped(gymnasium.make(ENV_ID))), "TransformObservation, which changes obs"),
    "delay": (lambda: wrappers.DelayObservation(gymnasium.make(ENV_ID), 1), "DelayObservation, which changes"),
    "time": (lambda: wrappers.TimeAwareObservation(gymnasium.make(ENV_ID)), "TimeAwareObservation, which changes obs"),
    "twice": (lambda: VecNormalize(DummyVecEnv([normalised])), "VecNormalize over NormalizeObservation, which norm"),
    "frames": (lambda: VecFrameStack(DummyVecEnv([normalised]), 2), "VecFrameStack, which changes observations"),
    "a vector's own": (
        lambda: OwnVec(VecNormalize(DummyVecEnv([lambda: gymnasium.make(ENV_ID)]))),
        "OwnVec, which changes observations or actions, as far as is known",
    ),
}


@pytest.mark.parametrize("kind", MARKED_WRAPPERS)
def test_policies_behind_other_wrappers_are_recorded_and_not_judged(kind: str, tmp_path: Path) -> None:
    make, reason = MARKED_WRAPPERS[kind]
    model = sb3.PPO("MlpPolicy", make(), n_steps=64, n_epochs=1, seed=0, device="cpu")
    model.learn(64, callback=RecorderCallback(tmp_path / "run"))
    joined = tipl.import_checkpoints([tmp_path / "run"], tmp_path / "joined")
    for store in (Store.open(tmp_path / "run"), joined):
        np.testing.assert_array_equal(store.trial(0).weights()[-1], actor_of(model))
        assert store.is_unnormalised
        with pytest.raises(ValueError, match=rf"^score: the policies in .* cannot be run: .* in {reason}") as refused:
            tipl.score(store, progress=False)
        assert "\n" not in str(refused.value)
        with pytest.raises(ValueError, match=rf"^export: .* in {reason}"):
            tipl.export_onnx(store.path, tmp_path / "a.onnx")


def test_wrappers_in_other_processes_are_seen_by_their_names(tmp_path: Path) -> None:
    env = SubprocVecEnv([normalised, normalised])
    try:
        model = sb3.PPO("MlpPolicy", env, n_steps=32, n_epochs=1, batch_size=32, seed=0, device="cpu")
        model.learn(64, callback=RecorderCallback(tmp_path / "run"))
    finally:
        env.close()
    with pytest.raises(ValueError, match="wrapped in NormalizeObservation, in another process, which changes obs"):
        tipl.score(Store.open(tmp_path / "run"), progress=False)


def test_wrappers_of_the_registered_environment_are_the_simulators_too(tmp_path: Path) -> None:
    gymnasium.register("Doubled-v0", lambda **kwargs: Own(gymnasium.make(ENV_ID, **kwargs)), max_episode_steps=1000)
    try:
        for kwargs, env in (({}, "Doubled-v0"), ({"env_id": "Doubled-v0"}, Own(gymnasium.make(ENV_ID)))):
            model = sb3.PPO("MlpPolicy", env, n_steps=64, n_epochs=1, seed=0, device="cpu")
            model.learn(64, callback=RecorderCallback(tmp_path / str(len(kwargs)), **kwargs))
            store = Store.open(tmp_path / str(len(kwargs)))
            assert (store.env_id, store.is_unnormalised) == ("Doubled-v0", False)
            scores = tipl.score(store, num_episodes=1, progress=False)
            seed = int(np.random.default_rng((0, 0)).integers(2**31, size=5)[0])
            assert scores.returns[0, -1, 0] == sb3_return(model, seed, "Doubled-v0")
    finally:
        del gymnasium.registry["Doubled-v0"]


class Tripled(FlattenExtractor):
    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(observations)


class Pair(gymnasium.Env):
    """Observations are a Dict of two vectors."""

    observation_space = gymnasium.spaces.Dict({name: gymnasium.spaces.Box(-1, 1, (2,)) for name in ("a", "b")})
    action_space = gymnasium.spaces.Box(-3, 3, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 1.0, False, True, {}


class Dropping(ActorCriticPolicy):
    """Its activation_fn does not say all of its network."""

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.policy_net.append(torch.nn.Dropout())


@pytest.mark.parametrize(
    ("policy", "make", "kwargs", "reason"),
    [
        (
            "MlpPolicy",
            lambda: gymnasium.make(ENV_ID),
            {"features_extractor_class": Tripled},
            "pass through a features extractor of (its|the run's) own, .*Tripled",
        ),
        ("MultiInputPolicy", Pair, {}, "observations are a Dict, whose entries SB3's MultiInputPolicy joins"),
        (Dropping, lambda: gymnasium.make(ENV_ID), {}, r"Dropout\(p=0\.5, inplace=False\) lies between"),
    ],
)
def test_policies_that_are_more_than_their_layers_are_forecast_and_not_judged(
    policy: Any, make: Any, kwargs: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = sb3.PPO(policy, make(), n_steps=64, n_epochs=1, seed=0, device="cpu", policy_kwargs=kwargs)
    model.learn(64, callback=RecorderCallback(tmp_path / "recorded"))
    model.save(tmp_path / "a.zip")
    stores = [Store.open(tmp_path / "recorded")]
    if policy is not Dropping:  # an import asks for the activation of a class of its own
        stores.append(tipl.import_checkpoints([tmp_path / "a.zip"], tmp_path / "imported", env_id=ENV_ID))
    for store in stores:
        assert isinstance(store.policy, ParameterLayout)
        with pytest.raises(ValueError, match=rf"^score: .*{reason}") as refused:
            tipl.score(store, progress=False)
        assert "\n" not in str(refused.value)
        with pytest.raises(ValueError, match=rf"must be an MLP for ONNX.*{reason}"):
            tipl.export_onnx(store.path, tmp_path / "a.onnx")
        np.testing.assert_array_equal(store.trial(0).weights()[-1], actor_of(model))
        tipl.export_checkpoint(store.path, tmp_path / "a.zip", tmp_path / f"{store.path.name}.zip")
    if policy is not Dropping:
        again = sb3.PPO.load(tmp_path / "imported.zip", device="cpu")
        np.testing.assert_array_equal(actor_of(again), actor_of(model))
    with (
        tipl.Recorder(tmp_path / "own") as recorder,
        pytest.raises(ValueError, match=rf'^log: policy: .*{reason}.*activation="other"'),
    ):
        recorder.log(model.policy, env_steps=0)


def test_a_jump_that_does_not_hold_is_put_back(monkeypatch):
    """Every jump is refused: the run loses the iteration after it and goes on from the weights before it."""
    monkeypatch.setattr(Walk, "expected", lambda walk, ahead=1: (float("inf"), 0.0))

    def normalised() -> Any:
        env = VecNormalize(DummyVecEnv([lambda: Monitor(gymnasium.make(ENV_ID))]))
        return sb3.PPO("MlpPolicy", env, n_steps=NUM_STEPS, batch_size=64, n_epochs=1, seed=0, device="cpu")

    model, jumps, seen, statistics = normalised(), JumpCallback(config=JumpConfig(start=4, max_undone=1)), Spy(), []

    class Counts(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            statistics.append(model.env.obs_rms.count)

    model.learn(8 * NUM_STEPS, callback=CallbackList([jumps, seen, Counts()]))
    assert jumps.jumps == [Jump(0, 4, 20, held=False, lost=1)]
    plain = normalised().learn(4 * NUM_STEPS)
    # Seen were the weights after updates 0 to 3, those that the run jumped to after the fourth, and those before that.
    np.testing.assert_array_equal(seen.seen[5], actor_of(plain))
    assert not np.array_equal(seen.seen[4], seen.seen[5])
    assert statistics[5] == statistics[4] < statistics[6]  # the iteration that was lost is not in the normaliser either
    assert model.num_timesteps == 8 * NUM_STEPS


def test_a_run_too_short_to_jump_is_told_so():
    model = sb3.PPO("MlpPolicy", ENV_ID, n_steps=16, batch_size=16, n_epochs=1, device="cpu")
    told = r"JumpCallback: no run will jump: .* 12 iterations \(config.start\), and total_timesteps = 192 makes 12"
    with pytest.warns(UserWarning, match=told):
        model.learn(12 * 16, callback=JumpCallback())


def test_jumps_need_an_on_policy_algorithm():
    model = sb3.SAC("MlpPolicy", ENV_ID, device="cpu", learning_starts=8)
    with pytest.raises(TypeError, match="JumpCallback: the algorithm must be on-policy, as PPO is, got SAC"):
        model.learn(16, callback=JumpCallback())
