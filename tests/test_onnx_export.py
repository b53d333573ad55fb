"""Export to ONNX: the model acts as tipl's own policy and as Stable-Baselines3's, in a runtime that knows neither."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from factories import ENV_ID, SPEC, make_store

import tipl
from tipl.collecting.policy_network import actions_of, mean_action
from tipl.files.sealed import save_arrays
from tipl.policy import ACTIVATIONS, ParameterLayout, PolicySpec
from tipl.storing.exporter import layout_record
from tipl.storing.store import UNNORMALISED, Store

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
BATCHES = (1, 2, 7, 256)


def acting(path: Path, obs: np.ndarray) -> np.ndarray:
    """Return what the model at `path` does on observations (batch, obs_dim) float32, in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (action,) = session.run(["action"], {"observation": obs})
    assert action.dtype == np.float32
    return action


def own(spec: PolicySpec, row: np.ndarray, obs: np.ndarray) -> np.ndarray:
    """Return the mean actions (batch, act_dim) that tipl's engine computes."""
    return mean_action(spec, torch.from_numpy(np.array(row))[None], torch.from_numpy(obs)[None])[0].numpy()


def exact(spec: PolicySpec, row: np.ndarray, obs: np.ndarray) -> np.ndarray:
    """Return the mean actions in float64, from the definition of the layout."""
    parts = spec.unflatten(torch.from_numpy(row.astype(np.float64)))
    act: dict[str, Callable[[Any], Any]] = {
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0),
        "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
        "silu": lambda x: x / (1 + np.exp(-x)),
    }
    x = obs.astype(np.float64)
    for i in range(len(spec.hidden_sizes)):
        x = act[spec.activation](
            x @ parts[f"policy_net.{2 * i}.weight"].numpy().T + parts[f"policy_net.{2 * i}.bias"].numpy()
        )
    return x @ parts["action_net.weight"].numpy().T + parts["action_net.bias"].numpy()


def random_row(spec: PolicySpec, seed: int = 0) -> np.ndarray:
    """Weights that keep actions near one, with biases."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=shape) / np.sqrt(shape[-1] + 1) for shape in spec.shapes.values()]
    return np.concatenate([part.ravel() for part in parts]).astype(np.float32)


def loud_row(seed: int) -> np.ndarray:
    """Weights of SPEC whose actions leave the action space of ENV_ID, [-3, 3], on some observations."""
    row = random_row(SPEC, seed)
    row[-1] = 3 * (-1) ** seed  # the last layer's bias
    return row


def observations(n: int, obs_dim: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(n).normal(size=(n, obs_dim))).astype(np.float32)


@pytest.mark.parametrize("gsde", [False, True])
@pytest.mark.parametrize("hidden", [(64, 64), (5, 32, 7), (3,), ()])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_acts_as_the_engine_and_the_definition_do(activation: Any, hidden: Any, gsde: bool, tmp_path: Path) -> None:
    spec = PolicySpec(11, 3, hidden, activation, gsde)
    row = random_row(spec)
    path = tipl.export_onnx(row, tmp_path / "p.onnx", policy=spec, env_id="none")
    for n in BATCHES:
        obs = observations(n, 11)
        np.testing.assert_allclose(acting(path, obs), own(spec, row, obs), **TOLERANCE)
        np.testing.assert_allclose(acting(path, obs), exact(spec, row, obs), **TOLERANCE)


@pytest.mark.parametrize("limit", [None, 0.3])
@pytest.mark.parametrize("spread", ["head", "halves", "none"])
def test_a_squashed_mean_is_rescaled_to_the_action_space(spread: Any, limit: float | None, tmp_path: Path) -> None:
    spec = PolicySpec(11, 3, (8, 8), "relu", spread=spread, squash=True, mean_limit=limit)
    row, obs = random_row(spec), observations(50, 11, 3.0)
    means = mean_action(spec, torch.from_numpy(row[None]), torch.from_numpy(obs[None]))[0].numpy()
    path = tipl.export_onnx(row, tmp_path / "p.onnx", policy=spec, env_id="Hopper-v5")
    np.testing.assert_allclose(acting(path, obs), actions_of(spec, means, -np.ones(3), np.ones(3)), **TOLERANCE)
    unit = tipl.export_onnx(row, tmp_path / "unit.onnx", policy=spec, env_id="none")
    np.testing.assert_allclose(acting(unit, obs), np.tanh(means), **TOLERANCE)
    wide = PolicySpec(4, 1, (8,), squash=True)
    row, obs = random_row(wide), observations(50, 4, 3.0)
    means = mean_action(wide, torch.from_numpy(row[None]), torch.from_numpy(obs[None]))[0].numpy()
    path = tipl.export_onnx(row, tmp_path / "wide.onnx", policy=wide, env_id="InvertedPendulum-v5")
    expected = actions_of(wide, means, -3 * np.ones(1), 3 * np.ones(1))
    assert np.abs(expected).max() > 2
    np.testing.assert_allclose(acting(path, obs), expected, **TOLERANCE)


def test_a_model_is_valid_and_says_its_shapes(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 2, 6)
    path = tipl.export_onnx(store.path, tmp_path / "a" / "p.onnx")  # the folder is made
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    (taken,), (given,) = model.graph.input, model.graph.output
    for end, name, size in ((taken, "observation", 4), (given, "action", 1)):
        batch, width = end.type.tensor_type.shape.dim
        assert (end.name, batch.dim_param, width.dim_value) == (name, "batch", size)
        assert end.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    again = tipl.export_onnx(store.path, tmp_path / "again.onnx")
    assert again.read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob("**/.*"))


def test_a_store_and_a_forecast_act_within_the_action_space(tmp_path: Path) -> None:
    weights = np.stack([[loud_row(6 * trial + t) for t in range(6)] for trial in range(2)])
    rows = weights[1]
    with Store.create(tmp_path / "store", env_id=ENV_ID, policy=SPEC, seeds=[0, 1], config={}) as store:
        store.append(weights, np.tile(np.arange(6), (2, 1)), np.zeros((2, 6)))
    save_arrays(
        tmp_path / "f.safetensors", {"weights": rows[2:5], "checkpoint": np.array([20, 30, 40])}, layout_record(store)
    )
    obs = observations(64, 4)
    for source, arguments, row in (
        (store.path, {"trial": 1}, rows[5]),
        (store.path, {"trial": 1, "checkpoint": 0}, rows[0]),
        (tmp_path / "f.safetensors", {}, rows[4]),
        (tmp_path / "f.safetensors", {"checkpoint": 30}, rows[3]),
    ):
        mean = own(SPEC, row, obs)
        for env_id, expected in ((None, mean.clip(-3, 3)), ("none", mean), ("InvertedPendulum-v4", mean.clip(-3, 3))):
            path = tipl.export_onnx(source, tmp_path / "p.onnx", env_id=env_id, **arguments)
            np.testing.assert_allclose(acting(path, obs), expected, **TOLERANCE)
            path.unlink()
        assert np.abs(mean).max() > 3  # so that the bounds were tested
    np.testing.assert_array_equal(gymnasium.make(ENV_ID).action_space.high, [3])


def test_each_action_has_its_own_bounds(tmp_path: Path) -> None:
    gymnasium.register("Bounds-v0", entry_point=Bounded, max_episode_steps=5)
    try:
        spec = PolicySpec(3, 2, (4,))
        path = tipl.export_onnx(random_row(spec) * 9, tmp_path / "p.onnx", policy=spec, env_id="Bounds-v0")
    finally:
        del gymnasium.registry["Bounds-v0"]
    obs = observations(50, 3)
    mean = own(spec, random_row(spec) * 9, obs)
    np.testing.assert_allclose(acting(path, obs), np.stack([mean[:, 0].clip(-1, 2), mean[:, 1]], 1), rtol=1e-5)


class Bounded(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gymnasium.spaces.Box(np.array([-1, -np.inf], "f4"), np.array([2, np.inf], "f4"))

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(3), {}


# ---- Stable-Baselines3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[Any, Any, Path]]:
    """Train a PPO on normalised observations, most of which are clipped; return it, its VecNormalize and its files."""
    sb3 = pytest.importorskip("stable_baselines3", reason="runs stable-baselines3, which is not installed")
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from tipl.sb3 import RecorderCallback

    def train(gsde: bool) -> tuple[Any, Any, Path]:
        folder = tmp_path_factory.mktemp("run")
        env = VecNormalize(DummyVecEnv([lambda: gymnasium.make("Hopper-v5")]), clip_obs=0.8)
        model = sb3.PPO("MlpPolicy", env, n_steps=64, n_epochs=2, seed=0, device="cpu", use_sde=gsde)
        model.learn(128, callback=RecorderCallback(folder / "recording"))
        model.save(folder / "model.zip")
        env.save(str(folder / "vec_normalize.pkl"))
        return model, env, folder

    return train


@pytest.mark.slow
@pytest.mark.parametrize("gsde", [False, True])
def test_it_acts_as_stable_baselines3_predicts(gsde: bool, trained: Any, tmp_path: Path) -> None:
    model, env, folder = trained(gsde)
    statistics = folder / "vec_normalize.pkl"
    mean, std = env.obs_rms.mean, np.sqrt(env.obs_rms.var + env.epsilon)
    obs = (mean + 2 * std * np.random.default_rng(0).normal(size=(200, 11))).astype(np.float32)
    far = np.abs((obs - mean) / std).max(1) > env.clip_obs
    assert 0.2 < far.mean()
    expected = model.predict(env.normalize_obs(obs), deterministic=True)[0]
    folded = tipl.import_checkpoints([folder / "model.zip"], tmp_path / "folded", env_id="Hopper-v5")
    raw = tipl.import_checkpoints([folder / "model.zip"], tmp_path / "raw", env_id="Hopper-v5", normaliser="none")
    row = Store.open(folder / "recording").trial(0).weights()[-1]
    for name, weights, arguments in (
        ("recording", folder / "recording", {}),
        ("import", folded.path, {}),
        ("raw import", raw.path, {}),
        ("row", row, {"policy": folded.policy, "env_id": "Hopper-v5"}),
    ):
        path = tipl.export_onnx(weights, tmp_path / f"{name}.onnx", normaliser=statistics, **arguments)
        for batch in (obs[:1], obs[:7], obs):
            np.testing.assert_allclose(acting(path, batch), expected[: len(batch)], rtol=1e-5, atol=2e-6, err_msg=name)
    # Without the file nothing is clipped before the first layer, which changes the actions on observations far away.
    unclipped = acting(tipl.export_onnx(folded.path, tmp_path / "unclipped.onnx"), obs)
    np.testing.assert_allclose(unclipped, own(folded.policy, row, obs).clip(-1, 1), **TOLERANCE)
    assert np.abs(unclipped - expected)[far].max() > 1e-3
    normalised = tipl.export_onnx(raw.path, tmp_path / "normalised.onnx")
    np.testing.assert_allclose(acting(normalised, env.normalize_obs(obs)), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_statistics_that_do_not_fit_are_refused(trained: Any, tmp_path: Path) -> None:
    _, env, folder = trained(False)
    statistics = folder / "vec_normalize.pkl"
    store, out = make_store(tmp_path / "store", 1, 4), tmp_path / "p.onnx"
    with pytest.raises(ValueError, match=r"^export: normaliser must be of observations of 4 numbers, got 11$"):
        tipl.export_onnx(store.path, out, normaliser=statistics)
    with pytest.raises(FileNotFoundError, match="there is no file of VecNormalize's statistics"):
        tipl.export_onnx(store.path, out, normaliser=tmp_path / "none.pkl")
    env.norm_obs = False
    env.save(str(tmp_path / "off.pkl"))
    with pytest.raises(ValueError, match=r"off\.pkl does not normalise observations \(norm_obs=False\)$"):
        tipl.export_onnx(store.path, out, normaliser=tmp_path / "off.pkl")
    assert not out.exists()


# ---- what is refused


def store_of(path: Path, policy: Any, env_id: str = ENV_ID, **source: Any) -> Store:
    with Store.create(path, env_id=env_id, policy=policy, seeds=[0], config={"source": source}) as store:
        store.append(np.ones((1, 1, policy.num_params), np.float32), np.zeros((1, 1), np.int64), np.zeros((1, 1)))
    return Store.open(path)


def test_weights_that_are_no_mlps_or_of_an_unknown_task_are_refused(tmp_path: Path) -> None:
    out, row = tmp_path / "p.onnx", random_row(SPEC)
    other = store_of(tmp_path / "other", ParameterLayout((("w", (2, 3)),)))
    unknown = store_of(tmp_path / "unknown", SPEC, "unknown")
    wrong = store_of(tmp_path / "wrong", PolicySpec(5, 1))
    lost = store_of(tmp_path / "lost", SPEC, **{UNNORMALISED: True})
    for weights, arguments, error, message in (
        (other.path, {}, ValueError, "the policy must be an MLP for ONNX; of this one only its own library knows the"),
        (row, {}, ValueError, "policy must be given, the layout of the weights, which nothing else says$"),
        (row, {"policy": PolicySpec(4, 1)}, ValueError, r"weights must have shape \(p,\) = \(4546,\), got \(\d+,\)$"),
        (row, {"policy": SPEC}, ValueError, 'env_id must be given, .*; "none" leaves them as they are$'),
        (unknown.path, {}, ValueError, 'env_id must be given, .*; "none" leaves them as they are$'),
        (unknown.path, {"policy": PolicySpec(4, 1)}, ValueError, r"policy must be that of the weights, layers 4 -> "),
        (
            wrong.path,
            {},
            ValueError,
            "a policy of .* must have 4 observations and 1 actions, got 5 and 1$",
        ),
        (lost.path, {}, ValueError, 'normaliser must be given, .*; "none" makes a model that takes normalised'),
        (row.astype(np.float64), {"policy": SPEC}, TypeError, "weights must be float32, got float64$"),
        (row * np.float32(np.nan), {"policy": SPEC}, ValueError, "weights must be finite"),
        (unknown.path, {"checkpoint": 1}, ValueError, r"checkpoint must lie in \[0, 1\) of trial 0, got 1$"),
        (tmp_path / "nothing", {}, FileNotFoundError, "there is no forecast and no store"),
    ):
        with pytest.raises(error, match=f"^export: {message}"):
            tipl.export_onnx(weights, out, **arguments)
        assert not out.exists()
    assert tipl.export_onnx(lost.path, out, normaliser="none") == out


def test_a_policy_with_a_normaliser_of_its_own_takes_no_other(tmp_path: Path) -> None:
    actor = {
        "kind": "rsl_rl",
        "policy": SPEC.to_dict(),
        "keys": list(SPEC.shapes),
        "std_is_log": True,
        "normaliser": "obs_normalizer.",
    }
    store = store_of(tmp_path / "store", SPEC, actor=actor)
    with pytest.raises(ValueError, match=r"^export: normaliser must not be given: the policy's own is folded into the"):
        tipl.export_onnx(store.path, tmp_path / "p.onnx", normaliser=tmp_path / "any.pkl")


def test_a_model_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, out = make_store(tmp_path / "store", 1, 4), tmp_path / "out" / "p.onnx"

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(onnx.checker, "check_model", broken)
        with pytest.raises(OSError, match="the disk is full"):
            tipl.export_onnx(store.path, out)
    assert not out.parent.exists()
    out.parent.mkdir()
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        tipl.export_onnx(store.path, out)
    assert out.read_text() == "mine"


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"^export: the package onnx is not installed: pip install 'tipl\[onnx\]'$"):
        tipl.export_onnx(random_row(SPEC), tmp_path / "p.onnx", policy=SPEC, env_id="none")


# ---- the command


def test_the_command_writes_a_model(
    tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    store, out = make_store(tmp_path / "store", 2, 6), tmp_path / "p.onnx"
    assert run_tipl("export", store.path, "--format", "onnx", "--trial", 1, "--checkpoint", 3, "--output", out) == 0
    assert capsys.readouterr().out == f"model      {out}\n"
    obs = observations(7, 4)
    np.testing.assert_allclose(acting(out, obs), own(SPEC, store.trial(1).weights()[3], obs).clip(-3, 3), **TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--like must be given, the file that the new one is a copy of; or --format onnx"),
        (["--format", "onnx", "--like", "a.zip"], "--like must not be given with --format onnx"),
        (["--format", "onnx", "--actor", "policy."], "--actor must not be given with --format onnx"),
        (["--format", "onnx", "--max-bytes", 9], "--max-bytes must not be given with --format onnx"),
        (["--like", "a.zip", "--env-id", "Hopper-v5"], "--env-id must not be given with --format checkpoint"),
    ],
)
def test_the_command_says_in_a_line_which_option_is_wrong(
    arguments: list[Any], message: str, tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tipl("export", tmp_path / "store", "--output", tmp_path / "out", *arguments) == 2
    assert re.fullmatch(rf"tipl: error: export: {re.escape(message)}\n", capsys.readouterr().err)
