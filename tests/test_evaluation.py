"""Evaluation: errors by hand, rows against slow ones, and what may not be judged."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from factories import SPEC, TINY_TRAIN, make_store

from tipl.collecting.episodes import episodic_returns, run_episodes
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.training import train
from tipl.judging.action_metrics import action_bounds, action_differences, action_variance, kl_divergences
from tipl.judging.evaluate_config import EvaluateConfig
from tipl.judging.evaluation import evaluate
from tipl.judging.predictors import fit_baselines
from tipl.judging.return_judgement import NUM_STATES, episode_seeds
from tipl.judging.training_path import TrainingPath
from tipl.judging.weight_judgement import weight_errors
from tipl.report import write_report
from tipl.report.results import read_results
from tipl.storing.store import Store
from tipl.subspace.basis import Basis
from tipl.subspace.plane import Plane
from tipl.subspace.prefix import Prefix

pytestmark = pytest.mark.usefixtures("hasty_nowcaster", "unrendered")

QUICK = EvaluateConfig(prefixes=(0.4, 0.6), horizons=(0.2,), num_episodes=2)


def test_weight_errors_by_hand() -> None:
    initial = np.array([1.0, 1.0], np.float32)
    truth = np.array([[4.0, 5.0], [1.0, 3.0]], np.float32)
    forecast = np.array([[4.0, 4.0], [1.0, 3.0]], np.float32)
    wpe, relative = weight_errors(forecast, truth, initial)
    np.testing.assert_allclose(wpe, [0.5, 0.0])
    np.testing.assert_allclose(relative, [0.2, 0.0])  # |(0, 1)| / |(3, 4)|


@pytest.fixture
def forecaster(tiny_model: Path) -> Forecaster:
    return Forecaster.load(tiny_model)


def test_rows_floors_and_report(tiny_store: Store, tiny_model: Path, forecaster: Forecaster, tmp_path: Path) -> None:
    store = tiny_store
    target = evaluate(store, forecaster, tmp_path / "evaluation", QUICK, progress=False)
    results = json.loads(target.read_text())
    rows = results["rows"]
    heldout = forecaster.config["stores"][0]["split"]["heldout"]
    predictors = {
        "tipl", "tipl_gated", "tipl_tuned", "transformer",
        "persistence", "linear", "quadratic", "rank1", "autoregression", "mean_path", "nearest_path",
        "ridge", "nowcaster", "another_run", "basis_floor", "shared_floor", "return_floor",
    }  # fmt: skip
    # prefix 0.4 of 16 checkpoints ends at 6: horizons 3 and 9; prefix 0.6 at 9: 3 and 6
    assert {(row["prefix"], row["horizon"]) for row in rows} == {(0.4, 3), (0.4, 9), (0.6, 3), (0.6, 6)}
    assert {row["trial"] for row in rows} == set(heldout)
    assert len(heldout) == 1  # which has no diversity
    assert {(it["action_variance"], it["return_std"]) for it in results["diversity"]} == {(None, None)}
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
        training = [store.trial(i) for i in forecaster.config["stores"][0]["split"]["train"]]
        shared = Basis.from_trials(training, TINY_TRAIN.n_components).through(path[h].astype(np.float32))
        outside = shared.residual(path[h + horizon][None].astype(np.float32))
        assert of["shared_floor"]["wpe"] == pytest.approx(outside[0] ** 2 / path.shape[1], rel=1e-4)
        assert of["basis_floor"]["wpe"] <= min(of[name]["wpe"] for name in ("tipl", "rank1", "mean_path")) * 1.001
        assert len({row["return_true"] for row in of.values()}) == 1
        for row in of.values():
            assert row["repw"] == pytest.approx(abs(row["return_true"] - row["return_predicted"]))
        truth = episodic_returns(
            store.env_id, SPEC, path[h + horizon : h + horizon + 1].astype(np.float32),
            np.array(results["settings"]["episode_seeds"][str(trial)]),
        )  # fmt: skip
        assert of["tipl"]["return_true"] == pytest.approx(truth.mean())

        chosen = "tipl" if of["tipl"]["confidence"] >= 0.5 else "persistence"
        assert of["tipl_gated"]["return_predicted"] == of[chosen]["return_predicted"]
        assert "confidence" not in of["tipl_gated"]

    assert {(it["trial"], it["prefix"]) for it in results["memorisation"]} == {
        (i, f) for i in heldout for f in (0.4, 0.6)
    }
    assert all(
        min(it["forecast_nearest"], it["true_nearest"], it["mean_nearest"]) > 0 for it in results["memorisation"]
    )
    assert results["causality"] < 1e-5

    paths = safetensors.numpy.load_file(tmp_path / "evaluation" / "coordinates.safetensors")
    stem = f"trial{heldout[0]}_prefix40"
    np.testing.assert_array_equal(paths[f"{stem}_true"][:7], paths[f"{stem}_tipl"][:7])
    assert paths[f"{stem}_h"].tolist() == [6]
    path = store.trial(heldout[0]).weights()
    plane, forecast = Plane.of(path), forecaster.forecast([path[:7]], [len(path) - 7], layout=store.policy)[0]
    np.testing.assert_array_equal(paths[f"{stem}_plane_true"], plane.points(path))
    np.testing.assert_allclose(paths[f"{stem}_plane_tipl"], plane.points(forecast.weights()), atol=1e-5)
    np.testing.assert_array_equal(paths[f"{stem}_plane_shares"], plane.shares)
    assert paths[f"{stem}_plane_mean_path"].shape == paths[f"{stem}_plane_linear"].shape == (len(path) - 7, 2)
    page = write_report(
        tmp_path / "report", evaluation=target.parent, store=store, training=tiny_model / "training.json"
    )
    assert page.stat().st_size > 10_000
    with pytest.raises(FileExistsError, match=r"output .* exists already"):
        evaluate(store, forecaster, tmp_path / "evaluation", QUICK, progress=False)


@pytest.mark.slow
def test_actions_are_compared_on_states_of_the_true_policies(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 8, 16)
    forecaster = Forecaster.load(train(store, tmp_path / "model", TINY_TRAIN, progress=False))
    target = evaluate(store, forecaster, tmp_path / "evaluation", QUICK, progress=False)
    results = json.loads(target.read_text())
    heldout, bounds = forecaster.config["stores"][0]["split"]["heldout"], action_bounds(store.env_id)
    assert len(heldout) > 1
    of_trial: dict[int, dict[tuple[float, int, str], dict]] = {trial: {} for trial in heldout}
    for row in results["rows"]:
        of_trial[row["trial"]][row["prefix"], row["horizon"], row["predictor"]] = row
    assert not np.array_equal(*(episode_seeds(QUICK, trial) for trial in heldout[:2]))
    last, future, pool, seeds = [], [], [], []
    for trial in heldout:
        judged_on, other_seeds = episode_seeds(QUICK, trial)
        assert results["settings"]["episode_seeds"][str(trial)] == judged_on.tolist()
        seeds.append(judged_on)
        path = store.trial(trial).weights()
        states = run_episodes(store.env_id, SPEC, path[9:10], other_seeds, num_states=NUM_STATES).states[0]
        row = of_trial[trial][0.4, 3, "persistence"]
        expected = action_differences(SPEC, path[9], path[6:7], states, bounds)[0]
        assert row["action_difference"] == pytest.approx(expected, rel=1e-9)
        assert row["kl"] == pytest.approx(kl_divergences(SPEC, path[9], path[6:7], states)[0], rel=1e-9)
        assert row["kl"] > 0 < row["action_difference"]
        floor = of_trial[trial][0.4, 3, "return_floor"]
        assert (floor["action_difference"], floor["kl"]) == (None, None)
        last.append(path[6])
        future.append(path[9])
        pool.append(states)

    entries = {(it["prefix"], it["horizon"], it["predictor"]): it for it in results["diversity"]}
    assert len(entries) == len(results["diversity"]) == len(results["rows"]) // len(heldout)
    everything = np.concatenate(pool)
    chosen = everything[np.random.default_rng(3).permutation(len(everything))[:NUM_STATES]]
    for name, policies in (("persistence", last), ("truth", future)):
        entry = entries[0.4, 3, name]
        assert entry["action_variance"] == pytest.approx(action_variance(SPEC, np.array(policies), chosen, bounds))
        returns = episodic_returns(store.env_id, SPEC, np.array(policies), np.array(seeds))
        assert entry["return_std"] == pytest.approx(returns.mean(1).std(ddof=1))
    read = read_results(target)
    assert read.spread("action_variance", 0.4, "truth")[0] == entries[0.4, 3, "truth"]["action_variance"]
    assert np.isnan(read.values("kl", 0.4, "return_floor")).all()


@pytest.mark.slow
def test_fresh_trials_are_judged_beside_what_the_store_taught(
    tiny_store: Store, forecaster: Forecaster, tmp_path: Path
) -> None:
    store, fresh = tiny_store, make_store(tmp_path / "fresh.zarr", 4, 16, seed=100)
    target = evaluate(store, forecaster, tmp_path / "evaluation", QUICK, fresh=fresh, progress=False)
    results = json.loads(target.read_text())
    assert results["settings"]["heldout_trials"] == [0, 1, 2, 3]
    assert results["settings"]["train_trials"] == forecaster.config["stores"][0]["split"]["train"]
    training = [TrainingPath.of(store.trial(i).weights(), SPEC, seed=i) for i in results["settings"]["train_trials"]]
    baselines = fit_baselines(
        training, 6, np.array([3, 9]), TINY_TRAIN.n_components,
        path=lambda i: store.trial(results["settings"]["train_trials"][i]).weights(),
    )  # fmt: skip
    for row in results["rows"]:
        path, h = fresh.trial(row["trial"]).weights(), round(row["prefix"] * 15)
        truth = path[h + row["horizon"]]
        expected = None
        if row["predictor"] == "persistence":
            expected = path[h]
        elif h == 6 and row["predictor"] in ("mean_path", "ridge", "another_run"):
            expected = baselines[row["predictor"]].forecast(Prefix(path[:7]), np.array([row["horizon"]]))[0]
        if expected is not None:
            assert row["wpe"] == pytest.approx(weight_errors(expected[None], truth[None], path[0])[0][0], rel=1e-5)
    report = write_report(tmp_path / "report", evaluation=target.parent, store=fresh)
    assert "4 held out, and 5 for training and validation" in report.read_text()


def test_fresh_trials_must_be_of_the_same_kind_and_unknown(
    tiny_store: Store, forecaster: Forecaster, tmp_path: Path
) -> None:
    for seed, length, env_id, expected in (
        (3, 16, "InvertedPendulum-v5", "fresh must hold trials under other seeds .* got 3 that were there, such as 3"),
        (100, 17, "InvertedPendulum-v5", "fresh must have num_checkpoints = 16, .* got 17"),
        (100, 16, "Reacher-v5", "fresh must have env_id = InvertedPendulum-v5, .* got Reacher-v5"),
    ):
        fresh = make_store(tmp_path / f"{seed} {length} {env_id}.zarr", 4, length, env_id, seed=seed)
        with pytest.raises(ValueError, match=expected):
            evaluate(tiny_store, forecaster, tmp_path / "evaluation", QUICK, fresh=fresh, progress=False)
    assert not (tmp_path / "evaluation").exists()


def test_rejections(tiny_store: Store, forecaster: Forecaster, tmp_path: Path) -> None:
    store = tiny_store
    with pytest.raises(ValueError, match=r"prefix 0.1 of a path of 16 checkpoints ends at checkpoint 2, .*\[3, 14\]"):
        evaluate(store, forecaster, tmp_path / "evaluation", EvaluateConfig(prefixes=(0.1,)), progress=False)
    other = make_store(tmp_path / "other.zarr", 6, 14)
    with pytest.raises(ValueError, match="does not fit the store .* num_checkpoints = 16, the store has 14"):  # noqa: RUF043
        evaluate(other, forecaster, tmp_path / "evaluation", QUICK, progress=False)
    with pytest.raises(ValueError, match="the model is not from `tipl train`"):
        evaluate(store, Forecaster(forecaster.model), tmp_path / "evaluation", QUICK, progress=False)
    with pytest.raises(ValueError, match=r"prefixes must be shares of the path in \(0, 1\), got \(1.5,\)"):
        EvaluateConfig(prefixes=(1.5,))
    with pytest.raises(ValueError, match=r"EvaluateConfig: seed must not be negative, got -1"):
        EvaluateConfig(seed=-1)
    assert not (tmp_path / "evaluation").exists()
