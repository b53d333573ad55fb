"""Baselines: each against a path that it continues exactly, and each blind to the future."""

import numpy as np
import pytest
from factories import LAYOUT, paths_of, random_path
from numpy.typing import NDArray
from reference import relative_error

from tipl.judging.predictors import (
    Linear,
    MeanPath,
    NearestPath,
    Persistence,
    Quadratic,
    RankOne,
    canonical_coordinates,
    fit_baselines,
)
from tipl.judging.training_path import SAMPLED_WEIGHTS, TrainingPath
from tipl.policy import ParameterLayout
from tipl.subspace.basis import prefix_coordinates, trajectory_gram
from tipl.subspace.prefix import Prefix

pytestmark = pytest.mark.usefixtures("hasty_nowcaster")

HORIZONS = np.array([1, 4, 10])
NAMES = [
    "persistence", "linear", "quadratic", "rank1", "autoregression", "mean_path", "nearest_path", "ridge", "nowcaster",
    "another_run",
]  # fmt: skip


def line(num_checkpoints: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    start, speed = rng.standard_normal((2, 40))
    return (start + np.arange(num_checkpoints)[:, None] * speed).astype(np.float32)


def rotated_copies(path: NDArray[np.floating], num_copies: int, seed: int) -> list[NDArray[np.float32]]:
    """The path in other directions from other points: the same in canonical coordinates."""
    rng, p = np.random.default_rng(seed), path.shape[1]
    displacements = path.astype(np.float64) - path[0]
    rotations = [np.linalg.qr(rng.standard_normal((p, p)))[0] for _ in range(num_copies)]
    return [(displacements @ rotation + rng.standard_normal(p)).astype(np.float32) for rotation in rotations]


# ---------------------------------------------------------------- what is learned of a trial


def test_training_path_holds_every_inner_product_and_a_sample_of_weights() -> None:
    path = random_path(20, 40, 0)
    read = TrainingPath.of(path, LAYOUT, 3)
    displacement = path.astype(np.float64) - path[0]
    for tensor, columns in zip(read.grams, (slice(4), slice(4, 34), slice(34, 40)), strict=True):
        np.testing.assert_allclose(tensor, displacement[:, columns] @ displacement[:, columns].T, rtol=1e-12)
    np.testing.assert_allclose(read.gram, trajectory_gram(path), rtol=1e-12)
    np.testing.assert_allclose(read.walked(np.arange(20)), np.linalg.norm(displacement, axis=1), rtol=1e-12)
    np.testing.assert_array_equal(read.columns, np.arange(40))  # fewer than may be sampled: all
    np.testing.assert_array_equal(read.sample, path - path[0])


def test_sample_of_large_tensors_leaves_room_for_small_ones() -> None:
    layout = ParameterLayout((("a.weight", (50, 100)), ("a.bias", (100,)), ("b.weight", (1, 100)), ("log_std", (2,))))
    path = random_path(5, layout.num_params, 1)
    one, other = (TrainingPath.of(path, layout, seed) for seed in (0, 1))
    for read in (one, other):
        assert (np.diff(read.columns) > 0).all()
        np.testing.assert_array_equal(read.sample, (path - path[0])[:, read.columns])
        counts = np.histogram(read.columns, [0, 5000, 5100, 5200, 5202])[0]
        np.testing.assert_array_equal(counts, [SAMPLED_WEIGHTS - 202, 100, 100, 2])
    assert not np.array_equal(one.columns, other.columns)
    np.testing.assert_array_equal(one.columns, TrainingPath.of(path, layout, 0).columns)


# ---------------------------------------------------------------- each continues its own kind of path


def test_persistence_repeats_the_last_checkpoint() -> None:
    path = random_path(20, 40, 0)
    forecast = Persistence().forecast(Prefix(path[:8]), HORIZONS)
    np.testing.assert_array_equal(forecast, np.stack([path[7]] * 3))


def test_lines_and_parabolas_are_continued() -> None:
    path = line(20, 1)
    for predictor in (Linear(3), Quadratic(3), RankOne()):
        forecast = predictor.forecast(Prefix(path[:9]), HORIZONS)
        np.testing.assert_allclose(forecast, path[8 + HORIZONS], rtol=0, atol=1e-3)
    bend = np.random.default_rng(0).standard_normal(40)
    parabola = (path + 0.1 * np.arange(20)[:, None] ** 2 * bend).astype(np.float32)
    for window in (2, 5, 8):
        forecast = Quadratic(window).forecast(Prefix(parabola[:9]), HORIZONS)
        np.testing.assert_allclose(forecast, parabola[8 + HORIZONS], rtol=0, atol=2e-3)
    np.testing.assert_array_equal(Quadratic(5).forecast(Prefix(parabola[:9]), np.array([0])), parabola[8:9])


def test_windows_are_the_best_on_training_trials() -> None:
    """A path that turns a little before the prefix's end: only a short window sees where it goes."""
    turn = np.concatenate([line(8, 2), line(8, 2)[-1] + np.arange(1, 13)[:, None] * line(2, 3)[:1]])
    assert Linear.fit(paths_of(turn), 8).window == 1
    assert Quadratic.fit(paths_of(turn), 9).window == 2
    noise = np.random.default_rng(0).standard_normal((20, 40)) * 2.0
    for predictor in (Linear, Quadratic):
        assert predictor.fit(paths_of(line(20, 4) + noise), 12).window > 4


@pytest.mark.parametrize("predictor", [Linear(4), Quadratic(4), Quadratic(9)])
def test_error_by_gram_equals_the_error_in_weights(predictor: Linear | Quadratic) -> None:
    path = random_path(20, 40, 5)
    expected = [relative_error(predictor, path, 9, horizon) for horizon in range(1, 11)]
    np.testing.assert_allclose(predictor.errors(trajectory_gram(path), 9), expected, rtol=1e-4)


def test_mean_and_nearest_path_of_rotated_copies_are_exact() -> None:
    """Copies of one path in other directions look the same in canonical coordinates."""
    *training, heldout = rotated_copies(random_path(20, 40, 6), 4, 0)
    others = [random_path(20, 40, seed) for seed in (7, 8, 9)]
    displacement = heldout.astype(np.float64) - heldout[0]
    v = np.linalg.svd(displacement[:13], full_matrices=False)[2][:12]
    expected = heldout[12] + (displacement[[15, 19]] - displacement[12]) @ v.T @ v  # what the prefix's span can hold
    for predictor in (
        MeanPath.fit(canonical_coordinates(paths_of(*training), 12, 12)),
        NearestPath(canonical_coordinates(paths_of(*others, training[0]), 12, 12)),
    ):
        forecast = predictor.forecast(Prefix(heldout[:13]), np.array([3, 7]))
        np.testing.assert_allclose(forecast, expected, atol=2e-2 * np.abs(displacement).max())


def test_nearest_path_repeats_a_training_trial_and_no_mean() -> None:
    trials = [random_path(20, 40, seed) for seed in range(4)]
    predictor = NearestPath(canonical_coordinates(paths_of(*trials), 10, 8))
    for trial in trials:
        coordinates = prefix_coordinates(trajectory_gram(trial), 10, 8)
        v = np.linalg.svd((trial - trial[0])[:11].astype(np.float64), full_matrices=False)[2][:8]
        v *= np.where(v @ (trial[10] - trial[0]) < 0, -1, 1)[:, None]
        scale = np.linalg.norm(trial[10] - trial[0])
        expected = trial[10] + scale * (coordinates[10 + HORIZONS[:2]] - coordinates[10]) @ v
        forecast = predictor.forecast(Prefix(trial[:11]), HORIZONS[:2])
        np.testing.assert_allclose(forecast, expected, atol=1e-3 * scale)


# ---------------------------------------------------------------- all of them


def test_every_baseline_is_float32_of_the_right_shape_and_reproducible() -> None:
    trials = [random_path(20, 40, seed) for seed in range(3)]
    training = paths_of(*trials)
    baselines, again = (fit_baselines(training, 8, HORIZONS, 6, path=trials.__getitem__) for _ in range(2))
    assert list(baselines) == NAMES
    prefix = random_path(20, 40, 9)[:9]
    for name, predictor in baselines.items():
        forecast = predictor.forecast(Prefix(prefix), HORIZONS)
        assert forecast.shape == (3, 40)
        assert forecast.dtype == np.float32
        assert np.isfinite(forecast).all()
        np.testing.assert_array_equal(forecast, again[name].forecast(Prefix(prefix), HORIZONS))
        np.testing.assert_allclose(predictor.forecast(Prefix(prefix), HORIZONS[1:]), forecast[1:], rtol=0, atol=1e-5)


def test_another_run_is_the_training_trial_with_the_nearest_prefix() -> None:
    trials = [random_path(20, 40, seed) for seed in range(3)]
    alike = rotated_copies(trials[1], 1, 7)[0]  # the same prefix in canonical coordinates, other weights throughout
    another = fit_baselines(paths_of(*trials), 8, HORIZONS, 6, path=trials.__getitem__)["another_run"]
    np.testing.assert_array_equal(another.forecast(Prefix(alike[:9]), HORIZONS), trials[1][8 + HORIZONS])


@pytest.mark.parametrize("num_trials", [1, 2])
def test_few_trials_a_short_prefix_and_a_tensor_that_never_moves(num_trials: int) -> None:
    trials = [random_path(20, 40, seed) for seed in range(num_trials + 1)]
    for path in trials:
        path[:, :4] = 0.5  # log_std
    *training, heldout = trials
    for predictor in fit_baselines(paths_of(*training), 3, HORIZONS, 6, path=training.__getitem__).values():
        forecast = predictor.forecast(Prefix(heldout[:4]), HORIZONS)
        np.testing.assert_allclose(forecast[:, :4], 0.5, rtol=0, atol=1e-5)
        assert np.isfinite(forecast).all()
