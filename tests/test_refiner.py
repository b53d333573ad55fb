"""The refiner: what it sees, its symmetries, what it learns that no basis of a prefix holds, and what it does not."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import bare_forecaster, make_store, random_path
from numpy.typing import NDArray

from tipl.forecasting.forecaster import rollout
from tipl.forecasting.refiner import KINDS, LAGS, Observed, Refiner, kinds_of
from tipl.forecasting.refiner_training import SAMPLE, load_examples, sample_weights, train_refiner
from tipl.forecasting.sources import Source
from tipl.forecasting.train_config import TrainConfig
from tipl.policy import ParameterLayout, PolicySpec
from tipl.storing.store import Store
from tipl.subspace.basis import Basis

SPEC = PolicySpec(3, 2, (5, 4))
H = 10


def trained(seed: int = 0, hidden: int = 8) -> Refiner:
    """A refiner whose weights are all random, as after training."""
    torch.manual_seed(seed)
    refiner = Refiner(hidden, 20)
    with torch.no_grad():
        for parameter in refiner.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return refiner.eval()


def observed_path(seed: int = 0, spec: PolicySpec = SPEC) -> NDArray[np.float32]:
    return random_path(H + 1, spec.num_params, seed)


def forecast_of(path: NDArray[np.float32], seed: int = 9) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (path[-1] + 0.3 * rng.standard_normal((2, path.shape[1]))).astype(np.float32)


def test_features_against_their_definitions() -> None:
    path = observed_path()
    seen = Observed.of(path, SPEC)
    moved = path.astype(np.float64) - path[0]
    for offset, shape in SPEC.layout.values():
        here = slice(offset, offset + int(np.prod(shape)))
        scale = np.sqrt((moved[-1, here] ** 2).mean())
        np.testing.assert_allclose(seen.scale[here], scale, rtol=1e-5)
        lags = [moved[round(share * H), here] - moved[-1, here] for share in LAGS]
        last_step = 3 * (moved[-1, here] - moved[-2, here])
        np.testing.assert_allclose(seen.signed[here, :-3].T, np.stack([*lags, last_step]) / scale, rtol=1e-4, atol=1e-5)
        start = path[0, here].astype(np.float64)
        np.testing.assert_allclose(seen.signed[here, -3], start / (np.sqrt((start**2).mean()) + 1e-3), rtol=1e-4)
        matrix = moved[-1, here].reshape(shape)
        if len(shape) == 2:
            left, singular, right = np.linalg.svd(matrix, full_matrices=False)
            whole = (left[:, :2] * singular[:2]) @ right[:2]
            row = np.broadcast_to(np.sqrt((matrix**2).mean(1, keepdims=True)), shape)
        else:
            whole, row = matrix, abs(matrix)
        np.testing.assert_allclose(seen.signed[here, -2], whole.ravel() / scale, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(seen.unsigned[here, 1], np.log(row.ravel() / scale + 1e-2), rtol=1e-4, atol=1e-4)
    bend = np.log(np.linalg.norm(moved[-1] - moved[H // 2]) / np.linalg.norm(moved[-1]))
    np.testing.assert_allclose(seen.unsigned[:, 3], bend, rtol=0, atol=1e-5)


def test_an_untrained_refiner_leaves_the_forecast_as_it_is() -> None:
    path = observed_path()
    forecast = forecast_of(path)
    refined = Refiner(8, 20).eval().refine(path, SPEC, forecast, np.array([1, 5]))
    np.testing.assert_allclose(refined, forecast, rtol=0, atol=1e-6)


def test_it_is_odd() -> None:
    """A policy whose every weight is negated walks the negated path."""
    path, refiner = observed_path(), trained()
    forecast = forecast_of(path)
    refined = refiner.refine(path, SPEC, forecast, np.array([1, 5]))
    assert np.abs(refined - forecast).max() > 1e-2
    negated = refiner.refine(-path, SPEC, -forecast, np.array([1, 5]))
    np.testing.assert_allclose(negated, -refined, rtol=0, atol=1e-5)


def test_it_follows_neurons_wherever_they_lie() -> None:
    """Permuting neurons of the first layer, with their rows, biases and columns, permutes the answer."""
    path, refiner = observed_path(), trained()
    order = np.array([3, 0, 4, 1, 2])
    where = np.arange(SPEC.num_params)
    for name, axis in (("policy_net.0.weight", 0), ("policy_net.0.bias", 0), ("policy_net.2.weight", 1)):
        offset, shape = SPEC.layout[name]
        here = slice(offset, offset + int(np.prod(shape)))
        where[here] = np.take(where[here].reshape(shape), order, axis).ravel()
    forecast = forecast_of(path)
    refined = refiner.refine(path, SPEC, forecast, np.array([1, 5]))
    permuted = refiner.refine(path[:, where], SPEC, forecast[:, where], np.array([1, 5]))
    np.testing.assert_allclose(permuted, refined[:, where], rtol=0, atol=1e-4)


def test_scale_of_a_run_does_not_matter() -> None:
    path, refiner = observed_path(), trained()
    path[0] *= 10.0  # so that 1e-3, which keeps a start of zero from dividing by it, is small
    forecast = forecast_of(path)
    refined = refiner.refine(path, SPEC, forecast, np.array([2, 7]))
    larger = refiner.refine(16 * path, SPEC, 16 * forecast, np.array([2, 7]))
    np.testing.assert_allclose(larger / 16, refined, rtol=0, atol=0.02)


def test_a_tensor_that_stood_still_stays() -> None:
    path = observed_path()
    path[:, :2] = path[0, :2]  # log_std
    refined = trained().refine(path, SPEC, np.repeat(path[-1:], 1, 0), np.array([3]))
    np.testing.assert_array_equal(refined[0, :2], path[0, :2])
    assert np.isfinite(refined).all()


def test_kinds() -> None:
    kinds = [KINDS[i] for i in kinds_of(SPEC)]
    starts = [kinds[offset] for offset, _ in SPEC.layout.values()]
    assert starts == ["log_std", "first weight", "first bias", "weight", "bias", "last weight", "last bias"]
    foreign = ParameterLayout(
        (("scale", (3,)), ("conv.weight", (4, 1, 2, 2)), ("conv.bias", (4,)), ("head.weight", (2, 4)))
    )
    assert [KINDS[i] for i in kinds_of(foreign)] == (
        ["other"] * 3 + ["first weight"] * 16 + ["first bias"] * 4 + ["last weight"] * 8
    )
    path = random_path(H + 1, foreign.num_params, 3)
    assert np.isfinite(trained().refine(path, foreign, path[-1:], np.array([1]))).all()


def test_the_sample_stands_for_all_weights() -> None:
    large = PolicySpec(27, 8, (256, 256))
    columns, counts = sample_weights(large, np.random.default_rng(0))
    assert counts.sum() == pytest.approx(large.num_params)
    assert (np.diff(columns) > 0).all()
    assert len(columns) < SAMPLE + 64 * len(large.layout)
    for offset, shape in large.layout.values():
        here = (columns >= offset) & (columns < offset + np.prod(shape))
        assert counts[here].sum() == pytest.approx(np.prod(shape))
    np.testing.assert_array_equal(sample_weights(SPEC, np.random.default_rng(0))[0], np.arange(SPEC.num_params))


def store_of(path: Path, weights: NDArray[np.float64], spec: PolicySpec) -> Store:
    num_trials, num_checkpoints, _ = weights.shape
    config = {"total_timesteps": 100}
    store = Store.create(path, env_id="InvertedPendulum-v5", policy=spec, seeds=range(num_trials), config=config)
    steps = np.tile(np.arange(num_checkpoints), (num_trials, 1))
    store.append(weights.astype(np.float32), steps, np.zeros((num_trials, num_checkpoints)))
    return store


CONFIG = TrainConfig(refine_steps=400, d_refine=16)


def refined_and_not(store: Store) -> tuple[float, float]:
    """Return the refined and the unrefined error on validation trials."""
    source = Source.of(store, CONFIG)
    refined = train_refiner(bare_forecaster(21), [source], [8, 12], CONFIG, progress=False)
    assert refined is not None
    return refined.error, refined.unrefined_error


@pytest.mark.slow
def test_it_learns_what_no_mixture_of_the_prefix_holds(tmp_path: Path) -> None:
    """Every weight drifts at its own speed until it meets a wall at +-1."""
    rng, spec, t = np.random.default_rng(0), PolicySpec(4, 1, (8,)), np.linspace(0, 1, 21)[:, None]
    starts, speeds = rng.standard_normal((2, 40, 1, spec.num_params))
    weights = starts + np.clip(2.0 * speeds * t, -1.0, 1.0)
    refined, unrefined = refined_and_not(store_of(tmp_path / "store.zarr", weights, spec))
    floor = np.mean(
        [Basis.from_prefix(w[:9].astype(np.float32), 6).residual(w[-1:].astype(np.float32)) for w in weights]
    )
    assert refined < 0.5 * unrefined
    end = np.linalg.norm(weights[:, -1] - weights[:, 0], axis=1).mean()
    assert refined < 0.9 * floor / end


@pytest.mark.slow
def test_random_walks_teach_it_nothing(tmp_path: Path) -> None:
    """Negative control: where nothing can be known, it stays near persistence instead of inventing a rule."""
    rng, spec = np.random.default_rng(1), PolicySpec(4, 1, (8,))
    weights = np.cumsum(rng.standard_normal((40, 21, spec.num_params)), 1)
    refined, unrefined = refined_and_not(store_of(tmp_path / "store.zarr", weights, spec))
    assert 0.97 * unrefined < refined <= unrefined


def test_training_errors_are_those_of_the_whole_forecast(tmp_path: Path) -> None:
    """The error on examples, fast and sampled, equals that of `rollout` on raw weights; no future is seen."""
    store = make_store(tmp_path / "store.zarr", 5, 16)
    source = Source.of(store, CONFIG)
    forecaster = dataclasses.replace(bare_forecaster(16), refiner=trained())
    (examples,) = load_examples(source, source.split.train, forecaster, [6], seed=0)
    horizon = torch.full((len(source.split.train),), len(examples.horizons) - 1)
    errors = examples.errors(trained(), torch.arange(len(horizon)), horizon).detach()
    for error, trial in zip(errors, source.split.train, strict=True):
        weights = store.trial(trial).weights()
        forecast = rollout(weights[:7], 9, forecaster, layout=store.policy)[0, -1]
        expected = np.linalg.norm(forecast - weights[-1]) / np.linalg.norm(weights[-1] - weights[0])
        exact = len(examples.count) == store.policy.num_params
        assert float(error) == pytest.approx(expected, rel=1e-3 if exact else 0.15)


def test_save_load_and_damage(tmp_path: Path) -> None:
    refiner, path = trained(), tmp_path / "refiner.safetensors"
    refiner.save(path)
    again = Refiner.load(path)
    run = observed_path()
    np.testing.assert_array_equal(
        again.refine(run, SPEC, run[-1:], np.array([4])), refiner.refine(run, SPEC, run[-1:], np.array([4]))
    )
    with pytest.raises(FileNotFoundError, match=r"Refiner.load: there is no file .*none"):
        Refiner.load(tmp_path / "none")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RuntimeError, match=r"Refiner.load: .*cut is damaged"):
        Refiner.load(tmp_path / "cut")
    with torch.no_grad():
        refiner.head.weight[0, 0] = torch.nan
    refiner.save(path)
    with pytest.raises(RuntimeError, match="holds NaN or Inf"):
        Refiner.load(path)


def test_a_layout_is_asked_for_where_none_is_known(tmp_path: Path) -> None:
    forecaster = dataclasses.replace(bare_forecaster(16), refiner=trained())
    path = random_path(8, SPEC.num_params, 1)
    with pytest.raises(ValueError, match="layout must be given"):
        rollout(path, 2, forecaster)
    with pytest.raises(ValueError, match="layout must have as many weights as prefix_weights"):
        rollout(path, 2, forecaster, layout=PolicySpec(4, 2, (5, 4)))
    known = dataclasses.replace(forecaster, config={"stores": [{"policy": SPEC.to_dict()}]})
    np.testing.assert_array_equal(rollout(path, 2, known), rollout(path, 2, forecaster, layout=SPEC))
