"""The weight nowcaster: what it learns of single weights that no linear mixture can, and what it does not see."""

import numpy as np
import pytest
import torch
from factories import paths_of, random_path
from numpy.typing import NDArray
from reference import relative_error

from tipl.judging.nowcaster import Nowcaster
from tipl.judging.predictors import Persistence
from tipl.judging.regression import Ridge
from tipl.subspace.prefix import Prefix

pytestmark = pytest.mark.slow

H, HORIZON = 10, np.array([10])


def saturating_paths(num_trials: int, seed: int, num_checkpoints: int = 21) -> list[NDArray[np.float32]]:
    """Every weight drifts at its own speed until it meets a wall at +-1: where it will be is no mixture of its past."""
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, num_checkpoints)[:, None]
    starts, speeds = rng.standard_normal((2, num_trials, 1, 40))
    return list((starts + np.clip(2.0 * speeds * t, -1.0, 1.0)).astype(np.float32))


def test_nowcaster_learns_a_nonlinear_law_that_ridge_cannot() -> None:
    *training, a, b, c = saturating_paths(43, 0)
    paths = paths_of(*training)
    nowcaster, ridge = Nowcaster.fit(paths, H, HORIZON), Ridge.fit(paths, H, HORIZON)

    def error(predictor: Nowcaster | Ridge | Persistence) -> float:
        return float(np.mean([relative_error(predictor, path, H, 10) for path in (a, b, c)]))

    assert error(nowcaster) < 0.6 * error(ridge)
    assert error(ridge) < error(Persistence())


def test_nowcaster_sees_each_weight_alone() -> None:
    """Another weight's path changes a forecast by the unit of their tensor alone; another tensor's not at all."""
    nowcaster = Nowcaster.fit(paths_of(*saturating_paths(4, 1)), H, HORIZON)
    prefix = random_path(20, 40, 0)[: H + 1]
    forecast = nowcaster.forecast(Prefix(prefix), HORIZON)
    changed = prefix.copy()
    changed[1:-1, 7] += 0.3  # of net.weight, the same at both ends
    expected = forecast.copy()
    got = nowcaster.forecast(Prefix(changed), HORIZON)
    assert got[0, 7] != expected[0, 7]
    np.testing.assert_allclose(np.delete(got, 7, 1), np.delete(expected, 7, 1), rtol=0, atol=1e-6)
    changed[-1, 7] += 0.3
    got = nowcaster.forecast(Prefix(changed), HORIZON)
    others = [*range(4), *range(34, 40)]
    np.testing.assert_allclose(got[:, others], expected[:, others], rtol=0, atol=1e-6)


def test_forecast_scales_and_moves_with_the_path() -> None:
    nowcaster = Nowcaster.fit(paths_of(*saturating_paths(4, 2)), H, HORIZON)
    prefix = random_path(20, 40, 1)[: H + 1]
    forecast = nowcaster.forecast(Prefix((7.0 * prefix + 3.0).astype(np.float32)), HORIZON)
    np.testing.assert_allclose(forecast, 7.0 * nowcaster.forecast(Prefix(prefix), HORIZON) + 3.0, rtol=0, atol=1e-3)


def test_seeds_and_the_callers_random_numbers() -> None:
    paths, prefix = paths_of(*saturating_paths(4, 3)), random_path(20, 40, 2)[: H + 1]
    state = torch.get_rng_state()
    one, same, other = (Nowcaster.fit(paths, H, HORIZON, seed).forecast(Prefix(prefix), HORIZON) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_random_walk_teaches_nothing() -> None:
    """Negative control: a network that fits noise would do worse than persistence on other trials."""
    rng = np.random.default_rng(0)
    *training, heldout = (np.cumsum(rng.standard_normal((21, 40)), 0).astype(np.float32) for _ in range(33))
    nowcaster = Nowcaster.fit(paths_of(*training), H, HORIZON)
    assert relative_error(nowcaster, heldout, H, 10) < 1.1 * relative_error(Persistence(), heldout, H, 10)


def test_a_horizon_that_was_not_fitted_is_refused() -> None:
    nowcaster = Nowcaster.fit(paths_of(random_path(20, 40, 0)), 8, np.array([2, 5]))
    with pytest.raises(ValueError, match=r"Nowcaster.forecast: horizons must be among those fitted, .* got \[4\]"):
        nowcaster.forecast(Prefix(random_path(20, 40, 1)[:9]), np.array([4]))
