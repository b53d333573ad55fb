"""Scores of all checkpoints: returns against `episodic_returns`, the best beside the last on new episodes."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from factories import SPEC

import tipl
from tipl.collecting.episodes import episodic_returns
from tipl.collecting.policy_network import mean_action, sampled_means, unclipped
from tipl.files.sealed import load_json
from tipl.policy import ParameterLayout, PolicySpec
from tipl.report import scores as module
from tipl.storing.store import Store

ENV_ID = "InvertedPendulum-v5"


def store_of(path: Path, num_trials: int = 3, num_checkpoints: int = 7) -> Store:
    rng = np.random.default_rng(0)
    weights = 0.5 * rng.standard_normal((num_trials, num_checkpoints, SPEC.num_params))
    steps = np.tile(64 * np.arange(num_checkpoints), (num_trials, 1))
    with Store.create(path, env_id=ENV_ID, policy=SPEC, seeds=range(num_trials), config={}) as store:
        store.append(weights.astype(np.float32), steps, np.full(steps.shape, np.nan))
    return Store.open(path)


@pytest.mark.parametrize("every", [1, 4])
def test_scores_are_the_returns_of_the_checkpoints(every, tmp_path, monkeypatch):
    store = store_of(tmp_path / "s.zarr")
    scores = tipl.score(store, num_episodes=3, every=every, seed=5, progress=False)
    assert scores.checkpoints == ([2, 6] if every == 4 else list(range(7)))
    np.testing.assert_array_equal(scores.env_steps, np.tile(64 * np.array(scores.checkpoints), (3, 1)))
    for i, best in enumerate(scores.best):
        seeds = np.random.default_rng((5, i)).integers(2**31, size=15)
        weights = store.trial(i).weights()
        np.testing.assert_array_equal(
            scores.returns[i], episodic_returns(ENV_ID, SPEC, weights[scores.checkpoints], seeds[:3])
        )
        at = scores.checkpoints[int(scores.returns[i].mean(1).argmax())]
        assert (best.trial, best.checkpoint, best.env_steps) == (i, at, 64 * at)
        again = episodic_returns(ENV_ID, SPEC, weights[[at, -1]], seeds[3:])
        assert best.gain.value == pytest.approx(float((again[0] - again[1]).mean()))
        assert best.beats_last == (best.gain.low > 0.0)
    monkeypatch.setattr(module, "MAX_BYTES", 1)  # trial by trial
    alone = tipl.score(store, num_episodes=3, every=every, seed=5, progress=False, num_threads=1)
    assert alone.to_dict() == scores.to_dict()


def test_the_last_checkpoint_may_be_the_best(tmp_path):
    store = store_of(tmp_path / "s.zarr", num_trials=1, num_checkpoints=1)
    best = tipl.score(store, num_episodes=1, progress=False).best[0]
    assert best.checkpoint == 0
    assert (best.gain.value, best.gain.low, best.gain.high) == (0.0, 0.0, 0.0)
    assert not best.beats_last


def test_what_cannot_be_scored_is_refused(tmp_path):
    store = store_of(tmp_path / "s.zarr")
    for arguments, message in (
        ({"num_episodes": 0}, "num_episodes must be at least 1"),
        ({"every": 0}, "every must be"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=f"score: {message}"):
            tipl.score(store, **arguments)
    other = Store.create(tmp_path / "o.zarr", env_id="E", policy=ParameterLayout((("w", (2,)),)), seeds=[0], config={})
    other.close()
    with pytest.raises(ValueError, match="score: the simulator can run only MLPs that it knows"):
        tipl.score(Store.open(tmp_path / "o.zarr"))
    lost = Store.create(
        tmp_path / "n.zarr", env_id=ENV_ID, policy=SPEC, seeds=[0], config={"source": {"unnormalised": True}}
    )
    lost.close()
    with pytest.raises(ValueError, match=r"score: the runs in .* saw observations through VecNormalize"):
        tipl.score(Store.open(tmp_path / "n.zarr"))


def test_the_command_prints_writes_and_draws(tmp_path: Path, run_tipl: Callable[..., int], capsys) -> None:
    store = store_of(tmp_path / "s.zarr")
    output, plot = tmp_path / "scores.json", tmp_path / "scores.svg"
    command = ["score", store.path, "--output", output, "--num-episodes", 2, "--plot", plot]
    assert run_tipl(*command) == 0
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if line.startswith("trial ")]) == 3
    assert said[3].startswith("scores ")
    assert said[3].endswith("of 3 runs had a policy that beats their last beyond chance")
    document = load_json(output, "test")
    assert np.shape(document["returns"]) == (3, 7, 2)
    assert all(it["low"] is None or math.isfinite(it["low"]) for it in document["best"])
    assert plot.read_text().count("<svg") == 1
    assert run_tipl("verify", output) == 0
    output.write_text(json.dumps(document))
    assert run_tipl(*command) == 2
    assert "exists" in capsys.readouterr().err


def test_a_policy_that_diverged_is_named_and_left_out(tmp_path, run_tipl, capsys):
    whole, path = store_of(tmp_path / "s.zarr", num_trials=2), tmp_path / "d.zarr"
    weights = np.stack([whole.trial(i).weights() for i in range(2)])
    weights[0, 3], weights[1, -1] = 3e38, 3e38  # finite, but not what they give
    steps = np.tile(64 * np.arange(7), (2, 1))
    with Store.create(path, env_id=ENV_ID, policy=SPEC, seeds=range(2), config={}) as store:
        store.append(weights, steps, np.full(steps.shape, np.nan))
    scores = tipl.score(Store.open(path), num_episodes=2, progress=False)
    expected = tipl.score(whole, num_episodes=2, progress=False).returns
    assert scores.diverged == [(0, 3), (1, 6)]
    assert np.isnan(scores.returns[0, 3]).all()
    sound = ~np.isnan(scores.returns)
    assert sound.sum() == 2 * 7 * 2 - 2 * 2
    np.testing.assert_array_equal(scores.returns[sound], expected[sound])
    assert math.isnan(scores.best[1].gain.value)
    assert not scores.best[1].beats_last
    assert run_tipl("score", path, "--num-episodes", "2", "--output", tmp_path / "scores.json") == 0
    assert "diverged   trial 0, checkpoint 3: its actions are not finite" in capsys.readouterr().out
    assert load_json(tmp_path / "scores.json", "test")["returns"][0][3] == [None, None]
    weights[0] = 3e38
    with Store.create(tmp_path / "e.zarr", env_id=ENV_ID, policy=SPEC, seeds=range(2), config={}) as store:
        store.append(weights, steps, np.full(steps.shape, np.nan))
    with pytest.raises(ValueError, match="all policies of trial 0 give actions that are not finite: it diverged"):
        tipl.score(Store.open(tmp_path / "e.zarr"), num_episodes=1, progress=False)


def test_sampled_scores(tmp_path, run_tipl, monkeypatch):
    store = store_of(tmp_path / "s.zarr", num_trials=2, num_checkpoints=3)
    sampled = tipl.score(store, num_episodes=2, sampled=True, progress=False)
    again = tipl.score(store, num_episodes=2, sampled=True, progress=False, num_threads=1)
    assert again.to_dict() == sampled.to_dict()
    assert (sampled.returns != tipl.score(store, num_episodes=2, progress=False).returns).any()
    for i in range(2):  # a policy alone
        seeds = np.random.default_rng((0, i)).integers(2**31, size=10)[:2]
        alone = episodic_returns(ENV_ID, SPEC, store.trial(i).weights()[1:2], seeds, sampled=True)
        np.testing.assert_array_equal(alone[0], sampled.returns[i, 1])
    assert run_tipl("score", store.path, "--sampled", "--num-episodes", "2", "--output", tmp_path / "s.json") == 0
    saved = load_json(tmp_path / "s.json", "test")
    assert saved["sampled"]
    np.testing.assert_array_equal(saved["returns"], sampled.returns)


def test_without_spread_a_sampled_policy_is_the_deterministic_one(tmp_path):
    weights = store_of(tmp_path / "s.zarr").trial(0).weights().copy()
    weights[:, : SPEC.act_dim] = -40.0  # log_std
    seeds = np.arange(3)
    expected = episodic_returns(ENV_ID, SPEC, weights, seeds)
    np.testing.assert_array_equal(episodic_returns(ENV_ID, SPEC, weights, seeds, sampled=True), expected)


def test_what_is_sampled_has_the_policys_distribution():
    rng = np.random.default_rng(0)
    logits = PolicySpec(2, 3, (), spread="none", outputs="logits")
    row = torch.from_numpy(rng.normal(size=(1, logits.num_params)).astype(np.float32))
    obs = torch.ones(1, 40_000, 2)
    means = mean_action(logits, row, obs).numpy()
    drawn = sampled_means(logits, row, obs, means, rng.gumbel(size=means.shape).astype(np.float32))
    shares = np.bincount(drawn[0].argmax(1), minlength=3) / 40_000
    np.testing.assert_allclose(shares, torch.from_numpy(means[0, 0]).softmax(0), atol=4 * 0.5 / 200)
    gaussian = PolicySpec(2, 2, (), mean_limit=1.0, rescale=True)
    row = torch.tensor([[0.5, -1.0, *rng.normal(size=gaussian.num_params - 2)]], dtype=torch.float32)
    means = mean_action(unclipped(gaussian), row, obs).numpy()
    noise = rng.normal(size=means.shape).astype(np.float32)
    drawn = sampled_means(gaussian, row, obs, means, noise)
    np.testing.assert_allclose(drawn, (means + np.exp([0.5, -1.0]) * noise).clip(-1, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "policy",
    [
        PolicySpec(4, 2, (3,), spread="none", outputs="values"),
        PolicySpec(4, 1, (3,), spread="none", squash=True),
        PolicySpec(4, 1, (3,), gsde=True),
    ],
)
def test_policies_without_a_distribution_of_their_own_are_not_sampled(policy, tmp_path):
    with Store.create(tmp_path / "s", env_id=ENV_ID, policy=policy, seeds=[0], config={}) as store:
        store.append(np.zeros((1, 1, policy.num_params), np.float32), np.array([[1]]), np.array([[np.nan]]))
    with pytest.raises(ValueError, match="score: sampled needs policies with a distribution of their own, got layers"):
        tipl.score(Store.open(tmp_path / "s"), sampled=True, progress=False)


def test_env_kwargs_are_those_of_the_environment(tmp_path: Path, run_tipl: Callable[..., int], capsys) -> None:
    """Returns are those of Gymnasium's environment made with them; alone, they are the registered one's."""
    store = store_of(tmp_path / "s.zarr", num_trials=1, num_checkpoints=2)
    kwargs = {"reset_noise_scale": 0.0}
    scores = tipl.score(store, num_episodes=2, env_kwargs=kwargs, progress=False)
    env = gymnasium.make(ENV_ID, **kwargs)
    for row, weights in zip(scores.returns[0], store.trial(0).weights(), strict=True):
        obs, total, ended = env.reset(seed=0)[0], 0.0, False
        while not ended:
            seen = torch.tensor(obs, dtype=torch.float32)[None, None]
            action = mean_action(SPEC, torch.from_numpy(weights[None]), seen).numpy()[0, 0]
            low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
            obs, reward, terminated, truncated, _ = env.step(np.clip(action, low, high))
            total, ended = total + float(reward), terminated or truncated
        np.testing.assert_array_equal(row, [total, total])  # nothing random is left
    assert scores.to_dict()["env_kwargs"] == kwargs
    same = tipl.score(store, num_episodes=2, env_kwargs={"reset_noise_scale": 0.01}, progress=False)  # the default
    np.testing.assert_array_equal(same.returns, tipl.score(store, num_episodes=2, progress=False).returns)

    command = ("score", tmp_path / "s.zarr", "--num-episodes", 2, "--env-kwargs")
    assert run_tipl(*command, json.dumps(kwargs), "--output", tmp_path / "scores.json") == 0
    assert load_json(tmp_path / "scores.json", "score")["returns"] == scores.returns.tolist()
    capsys.readouterr()
    for text, expected in {
        "{": "env_kwargs must be a JSON object, such as",
        "[1]": "env_kwargs must be a JSON object, such as",
        "[" * 100_000: "env_kwargs must be a JSON object, such as",
        '{"no_such": 1}': "InvertedPendulum-v5 refuses env_kwargs .*no_such",
        '{"num_envs": 1}': "InvertedPendulum-v5 refuses env_kwargs .*num_envs",
    }.items():
        assert run_tipl(*command, text) == 2
        assert re.search(expected, capsys.readouterr().err)


def test_a_copy_of_the_store_has_the_returns_that_it_lacks(tmp_path, monkeypatch):
    store = store_of(tmp_path / "s.zarr")
    scores = tipl.score(store, num_episodes=2, progress=False)
    monkeypatch.setattr("tipl.storing.importer.BLOCK_BYTES", 1)  # checkpoint by checkpoint
    filled = scores.fill(store, tmp_path / "filled.zarr")
    for i in range(store.num_trials):
        trial, before = filled.trial(i), store.trial(i)
        np.testing.assert_array_equal(trial.weights(), before.weights())
        np.testing.assert_array_equal(trial.env_steps, before.env_steps)
        np.testing.assert_array_equal(trial.episodic_return, scores.returns[i].mean(1))
        assert trial.seed == before.seed
    assert filled.config == {"filled_returns": {"by": "tipl score", "num_episodes": 2, "sampled": False}}
    again = scores.fill(filled, tmp_path / "again.zarr")  # what is there stays
    np.testing.assert_array_equal(again.trial(1).episodic_return, filled.trial(1).episodic_return)
    with pytest.raises(FileExistsError, match=r"filled\.zarr exists already"):
        scores.fill(store, tmp_path / "filled.zarr")
    some = tipl.score(store, num_episodes=2, every=2, progress=False)
    with pytest.raises(ValueError, match="the scores are not of every checkpoint of the store"):
        some.fill(store, tmp_path / "some.zarr")
    assert not (tmp_path / "some.zarr").exists()
