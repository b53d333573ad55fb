"""Confidence: the regression against a slow optimiser, its calibration, its features, and what `train` makes of it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors
from factories import TINY_TRAIN, bare_forecaster, make_store, random_path
from numpy.typing import NDArray

from tipl.collecting.episodes import can_run, episodic_returns
from tipl.forecasting.calibration import NUM_EPISODES, calibrate, recalibrate
from tipl.forecasting.confidence import FEATURES, STRIDES, Confidence, Strides, expected_calibration_error, features_of
from tipl.forecasting.forecaster import PRETRAINED, Forecaster, source_to_judge
from tipl.forecasting.sources import Source
from tipl.forecasting.training import train
from tipl.policy import ParameterLayout, PolicySpec
from tipl.storing.store import Store

TINY = dataclasses.replace(TINY_TRAIN, n_components=6, steps=10, confidence_trials=3)


def outcomes(num: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Features, outcomes drawn from a logistic law of them, and the law's probabilities."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num, len(FEATURES))) * np.linspace(0.1, 3, len(FEATURES)) + 1.0
    p = 1 / (1 + np.exp(-(x[:, 4] - x[:, 5] - 0.5)))
    return x, rng.random(num) < p, p


def test_fit_maximises_the_penalised_likelihood() -> None:
    x, y, _ = outcomes(60, 0)
    found = Confidence.fit(x, y)
    z = np.clip((x - x.mean(0)) / x.std(0), -4, 4)
    z, target = np.concatenate([z, np.zeros((2, z.shape[1]))]), np.append(y, (0.0, 1.0))

    def loss(theta: NDArray[np.float64]) -> float:
        odds = theta[0] + z @ theta[1:]
        return float(np.sum(np.logaddexp(0, odds) - target * odds) + 0.5 * np.sum(theta[1:] ** 2))

    best = np.append(found.intercept, found.coefficients)
    rng = np.random.default_rng(1)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(30):
            assert loss(best + size * rng.standard_normal(best.shape)) > loss(best)


def test_it_finds_the_law_and_is_calibrated() -> None:
    confidence = Confidence.fit(*outcomes(2000, 2)[:2])
    x, y, p = outcomes(2000, 3)
    assert np.abs(confidence(x) - p).mean() < 0.03
    assert expected_calibration_error(confidence(x), y) < 0.04
    blind = Confidence.fit(outcomes(2000, 2)[0], np.random.default_rng(0).permutation(outcomes(2000, 2)[1]))
    assert np.ptp(blind(x)) < 0.5 * np.ptp(confidence(x))


def test_outcomes_of_one_kind_do_not_make_it_certain() -> None:
    x, _, _ = outcomes(20, 4)
    for beats in (True, False):
        p = Confidence.fit(x, np.full(20, beats))(x)
        assert ((p > 0.5) == beats).all()
        assert ((p > 0.001) & (p < 0.999)).all()


def test_expected_calibration_error_by_hand() -> None:
    p, y = [0.05, 0.05, 0.95, 0.95, 1.0, 0.55], [False, True, True, True, False, True]
    gaps = abs(1 - 0.1) + abs(2 - 2.9) + abs(1 - 0.55)
    assert expected_calibration_error(p, y) == pytest.approx(gaps / 6)


def test_features_know_neither_scale_nor_future() -> None:
    path, horizons = random_path(12, 40, 0), np.array([1, 4])
    forecast, unrefined = random_path(2, 40, 1) + path[8], random_path(2, 40, 2) + path[8]
    features = features_of(path[:9], forecast, unrefined, horizons, 12)
    assert features.shape == (2, len(FEATURES))
    larger = features_of(8 * path[:9], 8 * forecast, 8 * unrefined, horizons, 12)
    np.testing.assert_allclose(larger, features, rtol=0, atol=1e-5)
    last = path[8].astype(np.float64)
    ahead, recent = forecast[1] - last, last - path[4]
    cosine = ahead @ recent / (np.linalg.norm(ahead) * np.linalg.norm(recent))
    assert features[1, FEATURES.index("straightness")] == pytest.approx(cosine, rel=1e-5)
    still = features_of(path[:9], np.repeat(path[8:9], 2, 0), np.repeat(path[8:9], 2, 0), horizons, 12)
    assert np.isfinite(still).all()


def test_calibrate_learns_from_what_the_simulator_says(tmp_path: Path) -> None:
    """The outcomes are those of running each forecast beside its prefix's end on the same episodes."""
    store = make_store(tmp_path / "store.zarr", 6, 16)
    source = Source.of(store, TINY)
    forecaster = dataclasses.replace(bare_forecaster(16), refiner=None)
    found = calibrate(forecaster, [source], TINY, progress=False)
    assert found is not None
    assert found.strides is not None
    features, beats = [], []
    gains: dict[int, list[NDArray[np.float64]]] = {3: [], 6: [], 9: [], 12: []}
    for trial in (source.split.validation + source.split.train)[:3]:
        path = source.path(trial)
        seeds = np.random.default_rng((TINY.seed, trial)).integers(2**31, size=NUM_EPISODES)
        for h, horizons in ((3, [2, 3, 6, 12]), (6, [2, 3, 6, 9]), (9, [2, 3, 6]), (12, [2, 3])):
            forecast = forecaster.forecast([path[: h + 1]], [15 - h])[0].weights(horizons)
            features.append(features_of(path[: h + 1], forecast, forecast, np.array(horizons), 16))
            before, *after = episodic_returns(store.env_id, store.policy, np.array([path[h], *forecast]), seeds).mean(1)
            beats += [value > before for value in after]
            three_ahead = forecast[horizons.index(3)]
            tried = np.array([path[h] + np.float32(stride) * (three_ahead - path[h]) for stride in STRIDES])
            returns = episodic_returns(store.env_id, store.policy, tried, seeds).mean(1)
            gains[h].append(returns - returns[0])
    expected = Confidence.fit(np.concatenate(features), np.array(beats))
    np.testing.assert_allclose(found.confidence.coefficients, expected.coefficients, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.confidence.intercept, expected.intercept, rtol=0, atol=1e-6)
    strides = Strides.fit(np.array(list(gains)) / 16, np.array(list(gains.values())))
    np.testing.assert_array_equal(found.strides.seen, strides.seen)
    np.testing.assert_array_equal(found.strides.factor, strides.factor)


def everything(path: Path) -> tuple[dict[str, str] | None, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """What a safetensors file holds; its bytes also hold the order of the metadata, which is another in each file."""
    with safetensors.safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in list(file.keys())}
        return file.metadata(), {name: (str(it.dtype), it.shape, it.tobytes()) for name, it in arrays.items()}


@pytest.mark.slow
def test_recalibrate_is_what_training_does_on_the_same_trials(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 16)
    model = train(store, tmp_path / "model", TINY, progress=False)
    again = recalibrate([store], tmp_path / "again", model, num_trials=3, progress=False)
    for name in ("model", "refiner", "confidence", "strides"):
        one, other = (everything(folder / f"{name}.safetensors") for folder in (again, model))
        assert one == other
    split = Forecaster.load(model).config["stores"][0]["split"]
    chosen = (split["validation"] + split["train"])[:3]
    config = Forecaster.load(again).config
    assert config["calibrated_on"] == [{"env_id": store.env_id, "seeds": [store.seeds[i] for i in chosen]}]
    assert (again / "training.json").is_file()


@pytest.mark.slow
def test_a_forecaster_from_elsewhere_is_calibrated_on_runs_that_are_not_judged(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 16, seed=50)
    one = Forecaster.load(recalibrate([store], tmp_path / "one", num_trials=9, progress=False))
    heldout = source_to_judge(store, one).split.heldout
    taught = one.config["calibrated_on"][0]["seeds"]
    assert len(heldout) + len(taught) == 6
    assert not set(taught) & {store.seeds[i] for i in heldout}
    assert one.strides is not None
    assert not np.allclose(one.confidence.coefficients, Forecaster.load(PRETRAINED).confidence.coefficients)
    other = make_store(tmp_path / "other.zarr", 4, 16, seed=70)
    assert Forecaster.load(recalibrate([store, other], tmp_path / "two", num_trials=2, progress=False)).strides is None


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 16, seed=50)
    unknown = make_store(tmp_path / "unknown.zarr", 6, 16, "Ant-v5", seed=90)
    for stores, output, num_trials, error, message in (
        ([store], tmp_path, 9, FileExistsError, "output .* exists already"),
        ([store], tmp_path / "new", 0, ValueError, "num_trials must be at least 1, got 0"),
        ([unknown], tmp_path / "new", 9, ValueError, "the simulator cannot run the policies of .*unknown.zarr"),
    ):
        with pytest.raises(error, match=message):
            recalibrate(stores, output, num_trials=num_trials, progress=False)
    assert not (tmp_path / "new").exists()


def test_strides_are_those_of_most_return_or_none() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((20, len(STRIDES)))
    noise[:, 0] = 0.0
    peak = np.array([0.0, 1.0, 3.0, 6.0, 4.0, 2.0])
    strides = Strides.fit(np.array([0.2, 0.4, 0.8]), np.array([peak + noise, -peak + noise, 0.5 * noise - 1.0]))
    np.testing.assert_array_equal(strides.factor, [2.0, 0.0, 0.0])
    assert strides.at(0.3) == pytest.approx(1.0)
    assert strides.at(0.1) == 2.0
    assert Strides.fit(np.array([0.5]), peak[None, None]).factor[0] == 0.0  # one trial has no standard error


def test_tuned_forecasts_go_a_stride_along_the_forecast() -> None:
    forecaster = dataclasses.replace(bare_forecaster(16), strides=Strides(np.array([0.2, 0.6]), np.array([3.0, 1.0])))
    path = random_path(9, 40, 5)
    forecast = dataclasses.replace(forecaster.forecast([path], [4])[0], future=np.ones((4, 6), np.float32))
    moved = forecast.weights([1, 4]) - path[-1]
    assert np.abs(moved).max() > 0.1
    np.testing.assert_allclose(forecast.tuned([1, 4]), path[-1] + 1.5 * moved, rtol=0, atol=1e-5)  # 8 of 16 were seen
    half = dataclasses.replace(forecast, trust=0.5)
    np.testing.assert_allclose(half.weights([1, 4]), path[-1] + 0.5 * moved, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"forecast.tuned: the forecaster was trained without"):
        dataclasses.replace(forecast, strides=None).tuned()


def test_a_trained_forecaster_carries_it(tiny_store: Store, tiny_model: Path, tmp_path: Path) -> None:
    forecaster = Forecaster.load(tiny_model)
    prefix = tiny_store.trial(0).weights(0, 7)
    forecast = forecaster.forecast([prefix], [9])[0]
    probability = forecast.confidence([1, 9])
    assert probability.shape == (2,)
    assert ((probability > 0) & (probability < 1)).all()
    np.testing.assert_allclose(forecast.confidence()[[0, 8]], probability, rtol=1e-9)
    none = dataclasses.replace(TINY, confidence_trials=0)
    without = Forecaster.load(train(tiny_store, tmp_path / "without", none, progress=False))
    with pytest.raises(ValueError, match="trained without confidence_trials"):
        without.forecast([prefix], [9])[0].confidence()


def test_policies_that_cannot_be_run_teach_nothing(tmp_path: Path) -> None:
    assert can_run("InvertedPendulum-v5", PolicySpec(4, 1))
    assert not can_run("InvertedPendulum-v5", PolicySpec(5, 1))
    assert not can_run("unknown", PolicySpec(4, 1))
    store = make_store(tmp_path / "store.zarr", 6, 16, env_id="Nowhere-v0")
    assert calibrate(bare_forecaster(16), [Source.of(store, TINY)], TINY, progress=False) is None
    assert ParameterLayout((("a", (2, 3)),)).num_params == 6


def test_damaged_files(tmp_path: Path) -> None:
    confidence = Confidence.fit(*outcomes(20, 0)[:2])
    path = tmp_path / "confidence.safetensors"
    confidence.save(path)
    x = outcomes(5, 1)[0]
    np.testing.assert_array_equal(Confidence.load(path)(x), confidence(x))
    dataclasses.replace(confidence, intercept=np.array([np.nan])).save(path)
    with pytest.raises(RuntimeError, match="expected finite arrays"):
        Confidence.load(path)
    path.write_bytes(b"nothing")
    for load in (Confidence.load, Strides.load):
        with pytest.raises(RuntimeError, match="is damaged"):
            load(path)
    Strides(np.array([0.2, 0.4]), np.array([1.0])).save(path)
    with pytest.raises(RuntimeError, match="expected two arrays of one length"):
        Strides.load(path)
    Strides(np.array([0.2]), np.array([np.nan])).save(path)
    with pytest.raises(RuntimeError, match="holds NaN or Inf"):
        Strides.load(path)
