"""Autoregression and ridge: paths that obey them, the slow way to the same numbers, and what they cannot know."""

import numpy as np
import pytest
from factories import LAYOUT, paths_of, random_path
from numpy.typing import NDArray
from reference import relative_error

from tipl.judging import regression
from tipl.judging.predictors import Persistence, canonical_coordinates
from tipl.judging.regression import Autoregression, Ridge
from tipl.judging.training_path import tensor_slices
from tipl.subspace.prefix import Prefix


def autoregressive_path(num_checkpoints: int, seed: int) -> NDArray[np.float32]:
    """Differences d_t = 1.6 d_{t-1} - 0.7 d_{t-2} of all weights, begun along two directions."""
    steps = [np.zeros(40), *np.random.default_rng(seed).standard_normal((2, 40))]
    for _ in range(num_checkpoints - 3):
        steps.append(1.6 * steps[-1] - 0.7 * steps[-2])
    return np.cumsum(steps, 0).astype(np.float32)


def ridge_family(num_trials: int, seed: int, noise: float = 0.0) -> list[NDArray[np.float32]]:
    """Paths whose weights all follow one of a few curves a tensor, the same curves in all trials."""
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, 21)[:, None]
    curves = [(t, t**2), (t, 1 - np.exp(-4 * t)), (t**0.5, np.sin(2 * t))]
    trials = []
    for _ in range(num_trials):
        parts = [
            np.concatenate(of_tensor, 1) @ rng.standard_normal((2, columns.stop - columns.start))
            for of_tensor, columns in zip(curves, tensor_slices(LAYOUT), strict=True)
        ]
        path = rng.standard_normal(40) + np.concatenate(parts, 1) + noise * rng.standard_normal((21, 40))
        trials.append(path.astype(np.float32))
    return trials


def test_autoregression_continues_an_autoregressive_process() -> None:
    *training, heldout = (autoregressive_path(20, seed) for seed in range(6))
    predictor = Autoregression.fit(paths_of(*training), 6, canonical_coordinates(paths_of(*training), 6, 2))
    assert len(predictor.coefficients) >= 2  # one difference does not tell where it turns
    for horizon in (1, 3, 13):
        assert relative_error(predictor, heldout, 6, horizon) < 1e-3
        assert relative_error(Persistence(), heldout, 6, horizon) > 0.1


def test_autoregression_of_a_random_walk_stays_where_it_is() -> None:
    """Nothing in the past tells: the penalty that training trials choose is the strongest."""
    rng = np.random.default_rng(0)
    *training, heldout = (np.cumsum(rng.standard_normal((40, 40)), 0).astype(np.float32) for _ in range(17))
    predictor = Autoregression.fit(paths_of(*training), 20, canonical_coordinates(paths_of(*training), 20, 8))
    assert relative_error(predictor, heldout, 20, 19) < 1.05 * relative_error(Persistence(), heldout, 20, 19)


def test_ridge_equals_a_regression_on_the_weights_themselves() -> None:
    """The fast path against the slow one: every weight of every trial a row, scaled by the trial's weight."""
    training = [random_path(20, 40, seed) for seed in range(5)]
    heldout, h, horizons = random_path(20, 40, 9), 8, np.array([3, 11])
    predictor = Ridge.fit(paths_of(*training), h, horizons)
    forecast = predictor.forecast(Prefix(heldout[: h + 1]), horizons)
    for j, horizon in enumerate(horizons):
        for columns in tensor_slices(LAYOUT):
            rows, targets = [], []
            for path in training:
                displacement = path.astype(np.float64) - path[0]  # (T, p)
                walked = np.linalg.norm(displacement[h + horizon])
                rows.append(displacement[1 : h + 1, columns].T / walked)
                targets.append((displacement[h + horizon] - displacement[h])[columns] / walked)
            x, y = np.concatenate(rows), np.concatenate(targets)
            x_penalty = np.diag(np.sqrt(predictor.penalties[j] * (x**2).sum(0)))
            c = np.linalg.lstsq(np.concatenate([x, x_penalty]), np.concatenate([y, np.zeros(h)]), rcond=None)[0]
            expected = heldout[h, columns] + c @ (heldout[1 : h + 1, columns].astype(np.float64) - heldout[0, columns])
            np.testing.assert_allclose(forecast[j, columns], expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_ridge_chooses_the_penalty_of_the_least_error_on_trials_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = ridge_family(9, 0, noise=0.1)
    chosen = float(Ridge.fit(paths_of(*trials), 12, np.array([8])).penalties[0])
    candidates = regression.PENALTIES
    errors = []
    for penalty in candidates:
        monkeypatch.setattr(regression, "PENALTIES", np.array([penalty]))
        errors.append([])
        for fold in range(4):
            others = [path for i, path in enumerate(trials) if i % 4 != fold]
            predictor = Ridge.fit(paths_of(*others), 12, np.array([8]))
            errors[-1] += [relative_error(predictor, path, 12, 8) for path in trials[fold::4]]
    assert chosen == candidates[np.argmin(np.mean(errors, 1))]
    assert candidates[0] > chosen > candidates[-1]


def test_a_single_trial_cannot_be_left_out_so_that_the_strongest_penalty_stands() -> None:
    predictor = Ridge.fit(paths_of(random_path(20, 40, 0)), 8, np.array([2, 5]))
    np.testing.assert_array_equal(predictor.penalties, regression.PENALTIES[0])


def test_ridge_continues_curves_that_all_trials_share_and_no_others() -> None:
    *training, heldout = ridge_family(12, 1, noise=1e-3)
    predictor = Ridge.fit(paths_of(*training), 10, np.array([10]))
    persistence = relative_error(Persistence(), heldout, 10, 10)
    assert relative_error(predictor, heldout, 10, 10) < 0.05 * persistence
    # Negative control: futures that belong to other trials teach nothing.
    futures = [*training[1:], training[0]]
    shuffled = [
        np.concatenate([path[:11], path[10] + other[11:] - other[10]])
        for path, other in zip(training, futures, strict=True)
    ]
    mistaught = Ridge.fit(paths_of(*shuffled), 10, np.array([10]))
    assert relative_error(mistaught, heldout, 10, 10) > 0.7 * persistence


def test_a_horizon_that_was_not_fitted_is_refused() -> None:
    predictor = Ridge.fit(paths_of(random_path(20, 40, 0)), 8, np.array([2, 5]))
    with pytest.raises(ValueError, match=r"Ridge.forecast: horizons must be among those fitted, \[2, 5\], got \[3\]"):
        predictor.forecast(Prefix(random_path(20, 40, 1)[:9]), np.array([2, 3]))
