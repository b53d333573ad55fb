"""Evaluation: errors by hand, returns against one environment at a time, and what may not be judged."""

import importlib
import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import safetensors.numpy
import torch
from synthetic_run import SPEC, make_store

from tipl.evaluate import EvaluateConfig, episodic_returns, evaluate, weight_errors
from tipl.policy import mean_action
from tipl.report import write_report
from tipl.rollout import Forecaster
from tipl.train import TrainConfig, train

TINY = TrainConfig(n_components=6, n_layer=1, n_head=2, d_model=16, steps=10, batch_size=8, max_prefixes=6)
QUICK = EvaluateConfig(prefixes=(0.4, 0.6), horizons=(0.2,), num_episodes=2)


def test_weight_errors_by_hand() -> None:
    initial = np.array([1.0, 1.0], np.float32)
    truth = np.array([[4.0, 5.0], [1.0, 3.0]], np.float32)
    forecast = np.array([[4.0, 4.0], [1.0, 3.0]], np.float32)
    wpe, relative = weight_errors(forecast, truth, initial)
    np.testing.assert_allclose(wpe, [0.5, 0.0])
    np.testing.assert_allclose(relative, [0.2, 0.0])  # |(0, 1)| / |(3, 4)|


def test_returns_equal_those_of_one_gymnasium_env_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("tipl.evaluate"), "ENVS_AT_ONCE", 8)  # two groups, the second not full
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


def test_rows_floors_and_report(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 16)
    forecaster = Forecaster.load(train(store, tmp_path / "model", TINY, progress=False))
    target = evaluate(store, forecaster, tmp_path / "evaluation", QUICK, progress=False)
    results = json.loads(target.read_text())
    rows = results["rows"]
    heldout = forecaster.config["split"]["heldout"]
    predictors = {"tipl", "persistence", "linear", "rank1", "mean_path", "basis_floor", "return_floor"}
    # prefix 0.4 of 16 checkpoints ends at 6: horizons 3 and 9; prefix 0.6 at 9: 3 and 6
    assert {(row["prefix"], row["horizon"]) for row in rows} == {(0.4, 3), (0.4, 9), (0.6, 3), (0.6, 6)}
    assert {row["trial"] for row in rows} == set(heldout)
    assert {row["predictor"] for row in rows} == predictors
    assert len(rows) == len(heldout) * 4 * len(predictors)

    by_key = {(row["trial"], row["prefix"], row["horizon"], row["predictor"]): row for row in rows}
    for trial, prefix, horizon in {(row["trial"], row["prefix"], row["horizon"]) for row in rows}:
        of = {name: by_key[trial, prefix, horizon, name] for name in predictors}
        path = store.trial(trial).weights().astype(np.float64)
        h = round(prefix * 15)
        error, walked = path[h] - path[h + horizon], path[h + horizon] - path[0]
        assert of["persistence"]["wpe"] == pytest.approx((error**2).mean(), rel=1e-5)
        expected = np.linalg.norm(error) / np.linalg.norm(walked)
        assert of["persistence"]["wpe_relative"] == pytest.approx(expected, rel=1e-5)
        assert of["return_floor"]["wpe"] == 0.0
        assert of["basis_floor"]["wpe"] <= min(of[name]["wpe"] for name in ("tipl", "rank1", "mean_path")) * 1.001
        assert len({row["return_true"] for row in of.values()}) == 1
        for row in of.values():
            assert row["repw"] == pytest.approx(abs(row["return_true"] - row["return_predicted"]))
        truth = episodic_returns(
            store.env_id, SPEC, path[h + horizon : h + horizon + 1].astype(np.float32),
            np.array(results["settings"]["episode_seeds"]),
        )  # fmt: skip
        assert of["tipl"]["return_true"] == pytest.approx(truth.mean())

    paths = safetensors.numpy.load_file(tmp_path / "evaluation" / "coordinates.safetensors")
    stem = f"trial{heldout[0]}_prefix40"
    np.testing.assert_array_equal(paths[f"{stem}_true"][:7], paths[f"{stem}_tipl"][:7])
    assert paths[f"{stem}_h"].tolist() == [6]
    page = write_report(
        tmp_path / "report", evaluation=target.parent, store=store, training=tmp_path / "model" / "training.json"
    )
    assert page.stat().st_size > 10_000
    with pytest.raises(FileExistsError, match=r"output .* exists already"):
        evaluate(store, forecaster, tmp_path / "evaluation", QUICK, progress=False)


def test_rejections(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 4, 12)
    forecaster = Forecaster.load(train(store, tmp_path / "model", TINY, progress=False))
    with pytest.raises(ValueError, match=r"prefix 0.2 of a path of 12 checkpoints ends at checkpoint 2, .*\[3, 10\]"):
        evaluate(store, forecaster, tmp_path / "evaluation", EvaluateConfig(), progress=False)
    other = make_store(tmp_path / "other.zarr", 4, 14)
    with pytest.raises(ValueError, match="does not fit the store .* num_checkpoints = 12, the store has 14"):  # noqa: RUF043
        evaluate(other, forecaster, tmp_path / "evaluation", QUICK, progress=False)
    with pytest.raises(ValueError, match="the model is not from `tipl train`"):
        evaluate(store, Forecaster(forecaster.model), tmp_path / "evaluation", QUICK, progress=False)
    with pytest.raises(ValueError, match=r"prefixes must be shares of the path in \(0, 1\), got \(1.5,\)"):
        EvaluateConfig(prefixes=(1.5,))
    assert not (tmp_path / "evaluation").exists()
