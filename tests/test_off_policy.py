"""SAC, TQC, TD3 and DDPG of Stable-Baselines3 and sb3-contrib: recorded, imported, judged and exported as they act."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from factories import TINY_EVALUATE, TINY_TRAIN, flags

import tipl
from tipl.collecting.envs import make_vec
from tipl.collecting.episodes import can_run, episodic_returns
from tipl.collecting.policy_network import actions_of, mean_action
from tipl.policy import ParameterLayout, PolicySpec
from tipl.report.results import read_results
from tipl.storing.store import Store

sb3 = pytest.importorskip("stable_baselines3", reason="runs stable-baselines3, which is not installed")
from stable_baselines3.common.callbacks import CheckpointCallback  # noqa: E402
from stable_baselines3.common.monitor import Monitor  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize  # noqa: E402

from tipl.sb3 import RecorderCallback  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ENV_ID = "InvertedPendulum-v5"
SQUASHED = {"squash": True}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: algorithm, its arguments, its policy_kwargs, what its PolicySpec has beside sizes
    "SAC": ("SAC", {}, {}, {"activation": "relu", "spread": "head"}),
    "TQC": ("TQC", {}, {"activation_fn": torch.nn.ELU}, {"activation": "elu", "spread": "head"}),
    "TD3": ("TD3", {}, {}, {"activation": "relu", "spread": "none"}),
    "DDPG": ("DDPG", {}, {"activation_fn": torch.nn.Tanh}, {"spread": "none"}),
    "SAC with gSDE": ("SAC", {"use_sde": True}, {}, {"activation": "relu", "gsde": True, "mean_limit": 2.0}),
    "SAC with gSDE, often clipped": (
        "SAC",
        {"use_sde": True},
        {"clip_mean": 0.05},
        {"activation": "relu", "gsde": True, "mean_limit": 0.05},
    ),
    "SAC with gSDE, not clipped": (
        "SAC",
        {"use_sde": True},
        {"clip_mean": 0.0},
        {"activation": "relu", "gsde": True},
    ),
    "PPO with squashed gSDE": ("PPO", {"use_sde": True}, {"squash_output": True}, {"gsde": True}),
}


def algorithm_of(name: str) -> Any:
    if hasattr(sb3, name):
        return getattr(sb3, name)
    return getattr(pytest.importorskip("sb3_contrib", reason=f"runs {name} of sb3-contrib, not installed"), name)


def make_model(name: str, env: Any, seed: int = 0, policy_kwargs: Any = (), **arguments: Any) -> Any:
    few = {"learning_starts": 20, "batch_size": 16, "buffer_size": 500}
    if name == "PPO":
        few = {"n_steps": 50, "batch_size": 50, "n_epochs": 1}
    kwargs = {"net_arch": [16, 12], **dict(policy_kwargs)}
    return algorithm_of(name)(
        "MlpPolicy", env, seed=seed, device="cpu", policy_kwargs=kwargs, learning_rate=3e-3, **few, **arguments
    )


def own_return(model: Any, env_id: str, seed: int, normalise: Callable[[Any], Any] = lambda obs: obs) -> float:
    """The return of one episode that the library's own model acts in."""
    env, total, over = gymnasium.make(env_id), 0.0, False
    obs, _ = env.reset(seed=seed)
    while not over:
        action, _ = model.predict(normalise(obs).astype(np.float32), deterministic=True)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, over = total + float(reward), terminated or truncated
    env.close()
    return total


def actions(spec: PolicySpec, row: np.ndarray, env_id: str, obs: np.ndarray) -> np.ndarray:
    env = make_vec(env_id, 1, seeds=[0])
    means = mean_action(spec, torch.tensor(row)[None], torch.from_numpy(obs)[None])[0].numpy()
    return actions_of(spec, means, env.action_low, env.action_high)


@pytest.mark.parametrize("env_id", [ENV_ID, "Hopper-v5"])
@pytest.mark.parametrize("kind", KINDS)
def test_policies_act_and_return_as_in_their_library(kind: str, env_id: str, tmp_path: Path) -> None:
    name, arguments, policy_kwargs, expected = KINDS[kind]
    model = make_model(name, env_id, policy_kwargs=policy_kwargs, **arguments)
    checkpoints = CheckpointCallback(100, str(tmp_path / "run"))
    model.learn(300, callback=[RecorderCallback(tmp_path / "recording", every=100), checkpoints])
    store = tipl.import_checkpoints([tmp_path / "run"], tmp_path / "store", env_id=env_id)
    sizes = {"InvertedPendulum-v5": (4, 1), "Hopper-v5": (11, 3)}[env_id]
    assert store.policy == PolicySpec(*sizes, (16, 12), **SQUASHED | expected)
    assert store.trial(0).env_steps.tolist() == [100, 200, 300]
    assert "note" not in store.config["source"]  # nothing was assumed
    assert Store.open(tmp_path / "recording").policy == store.policy

    obs = np.random.default_rng(0).normal(size=(40, sizes[0])).astype(np.float32)
    files = [tmp_path / "run" / f"rl_model_{step}_steps.zip" for step in (100, 200, 300)]
    loaded = [algorithm_of(name).load(path, device="cpu") for path in files]
    weights = store.trial(0).weights()
    for row, own in zip(weights, loaded, strict=True):
        np.testing.assert_allclose(
            actions(store.policy, row, env_id, obs), own.predict(obs, deterministic=True)[0], atol=1e-6, rtol=0
        )
    assert not np.array_equal(weights[0], weights[2])
    scores = tipl.score(store, num_episodes=3, progress=False)
    seeds = np.random.default_rng((0, 0)).integers(2**31, size=15)[:3]
    own_returns = [[own_return(own, env_id, int(seed)) for seed in seeds] for own in loaded]
    if env_id == ENV_ID:  # it counts steps
        np.testing.assert_array_equal(scores.returns[0], own_returns)
    else:
        np.testing.assert_allclose(scores.returns[0], own_returns, rtol=1e-5)  # float32 sums in another order

    written = tipl.export_checkpoint(store.path, files[0], tmp_path / "out.zip", checkpoint=2)
    after = algorithm_of(name).load(written, device="cpu")
    np.testing.assert_array_equal(*(it.predict(obs, deterministic=True)[0] for it in (after, loaded[2])))
    own_keys = set(store.config["source"]["actor"]["keys"])
    for key, tensor in after.policy.state_dict().items():
        assert torch.equal(tensor, loaded[2 if key in own_keys else 0].policy.state_dict()[key])
    if name != "PPO":
        assert own_keys == {f"actor.{key}" for key in after.actor.state_dict()}
    after.set_env(DummyVecEnv([lambda: gymnasium.make(env_id)]))
    after.learn(60)  # it learns on, as any checkpoint does


@pytest.mark.parametrize("kind", ["SAC", "TD3"])
def test_evaluation_and_report(
    kind: str, hasty_nowcaster: None, run_tipl: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, arguments, policy_kwargs, _ = KINDS[kind]
    for seed in range(4):
        model = make_model(name, ENV_ID, seed, policy_kwargs, **arguments)
        model.learn(240, callback=CheckpointCallback(20, str(tmp_path / f"seed{seed}")))

    def run(*words: object) -> None:
        assert run_tipl(*words) == 0, capsys.readouterr().err

    store, model, out = (tmp_path / name for name in ("store", "model", "evaluation"))
    run("import", *(tmp_path / f"seed{i}" for i in range(4)), "--output", store, "--env-id", ENV_ID)
    run("score", store, "--num-episodes", 1)
    run("train", "--store", store, "--output", model, *flags(TINY_TRAIN))
    run("evaluate", "--store", store, "--model", model, "--output", out, *flags(TINY_EVALUATE))
    run("report", "--store", store, "--evaluation", out, "--output", tmp_path / "report")
    results = read_results(out / "results.json")
    assert results.has_values("action_difference", "tipl")
    assert results.has_values("kl", "tipl") == (kind == "SAC")
    pages = [path.read_text() for path in (tmp_path / "report").rglob("*.html")]
    assert pages
    assert any("KL divergence of the forecast" in page for page in pages) == (kind == "SAC")
    forecast = tmp_path / "f.safetensors"
    run("rollout", "--model", model, "--store", store, "--trial", 1, "--prefix", 0.5, "--output", forecast)
    run("export", forecast, "--like", tmp_path / "seed1" / "rl_model_120_steps.zip", "--output", tmp_path / "f.zip")
    assert np.isfinite(own_return(algorithm_of(name).load(tmp_path / "f.zip", device="cpu"), ENV_ID, 0))


def test_normalised_observations_are_folded(tmp_path: Path) -> None:
    env = VecNormalize(DummyVecEnv([lambda: Monitor(gymnasium.make(ENV_ID))]), clip_obs=1e6)
    model = make_model("SAC", env)
    checkpoints = CheckpointCallback(60, str(tmp_path / "run"), save_vecnormalize=True)
    model.learn(120, callback=[checkpoints, RecorderCallback(tmp_path / "recording")])
    store = tipl.import_checkpoints([tmp_path / "run"], tmp_path / "store", env_id=ENV_ID)
    assert "folded into the first layer" in store.config["source"]["note"]
    recording = Store.open(tmp_path / "recording")
    obs = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    own = model.predict(env.normalize_obs(obs), deterministic=True)[0]
    (tmp_path / "last").mkdir()
    last, statistics = tmp_path / "last" / "model.zip", tmp_path / "statistics.pkl"
    env.save(statistics)
    model.save(last)
    now = tipl.import_checkpoints([last], tmp_path / "now", normaliser=statistics)
    for it in (now, recording):
        np.testing.assert_allclose(actions(it.policy, it.trial(0).weights()[-1], ENV_ID, obs), own, atol=1e-5)
    alone = tipl.import_checkpoints([last], tmp_path / "alone", env_id=ENV_ID)
    with pytest.raises(ValueError, match="saw observations through VecNormalize, and the store lacks its statistics"):
        tipl.score(alone)
    written = tipl.export_checkpoint(now.path, last, tmp_path / "out.zip", normaliser=statistics)
    again = sb3.SAC.load(written, device="cpu").predict(env.normalize_obs(obs), deterministic=True)[0]
    np.testing.assert_allclose(again, own, atol=1e-5)


def test_float32_observations_leave_open_whether_they_were_normalised(tmp_path: Path) -> None:
    model = make_model("TD3", "Pendulum-v1").learn(60)
    model.save(tmp_path / "plain.zip")
    store = tipl.import_checkpoints([tmp_path / "plain.zip"], tmp_path / "store", env_id="Pendulum-v1")
    assert "do not say whether observations came through VecNormalize" in store.config["source"]["note"]
    returns = episodic_returns("Pendulum-v1", store.policy, store.trial(0).weights(), np.arange(2))[0]
    np.testing.assert_allclose(returns, [own_return(model, "Pendulum-v1", seed) for seed in (0, 1)], rtol=1e-5)
    env = VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")]))
    model = make_model("TD3", env).learn(60)
    (tmp_path / "run").mkdir()
    model.save(tmp_path / "run" / "m_60_steps.zip")
    env.save(tmp_path / "run" / "vec_normalize.pkl")
    beside = tipl.import_checkpoints([tmp_path / "run"], tmp_path / "beside", env_id="Pendulum-v1")
    assert "folded into the first layer" in beside.config["source"]["note"]
    obs = np.random.default_rng(0).uniform(-1, 1, size=(20, 3)).astype(np.float32)
    own = model.predict(env.normalize_obs(obs), deterministic=True)[0]
    np.testing.assert_allclose(actions(beside.policy, beside.trial(0).weights()[0], "Pendulum-v1", obs), own, atol=1e-5)


def test_batch_normalisation_is_imported_and_not_run(tmp_path: Path) -> None:
    model = make_model("CrossQ", ENV_ID).learn(40)
    model.save(tmp_path / "m_40.zip")
    store = tipl.import_checkpoints([tmp_path / "m_40.zip"], tmp_path / "store", env_id=ENV_ID)
    assert isinstance(store.policy, ParameterLayout)
    assert {"actor.latent_pi.0.scale", "actor.latent_pi.0.ra_mean", "actor.mu.weight"} <= set(store.policy.shapes)
    with pytest.raises(ValueError, match=r"simulator can run only MLPs .* with batch normalisation \(CrossQ\)"):
        tipl.score(store)
    written = tipl.export_checkpoint(store.path, tmp_path / "m_40.zip", tmp_path / "out.zip")
    again = algorithm_of("CrossQ").load(written, device="cpu")
    for key, tensor in again.policy.state_dict().items():
        assert torch.equal(tensor, model.policy.state_dict()[key])


def test_policies_of_another_environment_are_refused(tmp_path: Path) -> None:
    model = make_model("SAC", ENV_ID)
    model.save(tmp_path / "m_1.zip")
    store = tipl.import_checkpoints([tmp_path / "m_1.zip"], tmp_path / "store", env_id="Hopper-v5")
    with pytest.raises(ValueError, match="of Hopper-v5 must have 11 observations and 3 actions, got 4 and 1"):
        tipl.score(store, progress=False)


class Unbounded(gymnasium.Env[np.ndarray, np.ndarray]):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (4,))
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(4, np.float32), {}


def test_an_action_space_without_bounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Unbounded-v0"
    monkeypatch.setitem(gymnasium.registry, name, gymnasium.envs.registration.EnvSpec(name, entry_point=Unbounded))
    plain, squashed = (PolicySpec(4, 1, (3,), squash=squash) for squash in (False, True))
    assert can_run(name, plain)
    assert not can_run(name, squashed)
    weights = np.zeros((1, squashed.num_params), np.float32)
    with pytest.raises(ValueError, match=r"a policy that squashes needs an action space with bounds, got \[-inf\]"):
        episodic_returns(name, squashed, weights, np.arange(1))
