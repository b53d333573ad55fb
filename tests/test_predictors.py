"""Baselines: each against a path that it continues exactly, and each blind to the future."""

import numpy as np
import pytest
from numpy.typing import NDArray
from test_basis import random_path

from tipl.basis import trajectory_gram
from tipl.predictors import Linear, MeanPath, Persistence, RankOne, fit_baselines

HORIZONS = np.array([1, 4, 10])


def line(num_checkpoints: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    start, speed = rng.standard_normal((2, 40))
    return (start + np.arange(num_checkpoints)[:, None] * speed).astype(np.float32)


def test_persistence_repeats_the_last_checkpoint() -> None:
    path = random_path(20, 40, 0)
    forecast = Persistence().forecast(path[:8], HORIZONS)
    np.testing.assert_array_equal(forecast, np.stack([path[7]] * 3))


def test_linear_and_rank_one_continue_a_straight_line() -> None:
    path = line(20, 1)
    for predictor in (Linear(3), RankOne()):
        forecast = predictor.forecast(path[:9], HORIZONS)
        np.testing.assert_allclose(forecast, path[8 + HORIZONS], rtol=0, atol=1e-3)


def test_linear_window_is_the_best_on_training_trials() -> None:
    """A path that turns a little before the prefix's end: only a short window sees where it goes."""
    turn = np.concatenate([line(8, 2), line(8, 2)[-1] + np.arange(1, 13)[:, None] * line(2, 3)[:1]]).astype(np.float32)
    assert Linear.fit([trajectory_gram(turn)], 8).window == 1
    noise = np.random.default_rng(0).standard_normal((20, 40)) * 2.0
    assert Linear.fit([trajectory_gram((line(20, 4) + noise).astype(np.float32))], 12).window > 4


def test_linear_error_by_gram_equals_the_error_in_weights() -> None:
    from tipl.predictors import _linear_error

    path = random_path(20, 40, 5)
    forecast = Linear(4).forecast(path[:10], np.arange(1, 11))
    truth = path[10:].astype(np.float64)
    expected = np.mean(np.linalg.norm(forecast - truth, axis=1) / np.linalg.norm(truth - path[0], axis=1))
    assert _linear_error(trajectory_gram(path), 9, 4) == pytest.approx(expected, rel=1e-4)


def test_mean_path_of_rotated_copies_is_exact() -> None:
    """Copies of one path in other directions look the same in canonical coordinates."""
    path = random_path(20, 40, 6).astype(np.float64)
    rng = np.random.default_rng(0)
    copies = []
    for _ in range(4):
        rotation = np.linalg.qr(rng.standard_normal((40, 40)))[0]
        copies.append(((path - path[0]) @ rotation + rng.standard_normal(40)).astype(np.float32))
    *training, heldout = copies
    predictor = MeanPath.fit([trajectory_gram(copy) for copy in training], 12, 12)
    forecast = predictor.forecast(heldout[:13], np.array([3, 7]))
    displacement = heldout.astype(np.float64) - heldout[0]
    v = np.linalg.svd(displacement[:13], full_matrices=False)[2][:12]
    expected = heldout[12] + (displacement[[15, 19]] - displacement[12]) @ v.T @ v  # what the prefix's span can hold
    np.testing.assert_allclose(forecast, expected, atol=2e-2 * np.abs(displacement).max())


def test_every_baseline_is_float32_of_the_right_shape() -> None:
    grams = [trajectory_gram(random_path(20, 40, seed)) for seed in range(3)]
    baselines = fit_baselines(grams, 8, 6)
    assert list(baselines) == ["persistence", "linear", "rank1", "mean_path"]
    for predictor in baselines.values():
        forecast = predictor.forecast(random_path(20, 40, 9)[:9], HORIZONS)
        assert forecast.shape == (3, 40)
        assert forecast.dtype == np.float32
        assert np.isfinite(forecast).all()
