"""From prefix weights to forecast weights, against the torch recursion in the same basis."""

from pathlib import Path

import numpy as np
import pytest
import torch
from factories import MODEL_CONFIG, random_model, random_path
from numpy.typing import NDArray

from tipl.forecasting.forecaster import Forecaster, rollout
from tipl.forecasting.transformer import TrajectoryTransformer, save_model
from tipl.subspace.basis import Basis, Centre


def prefixes(count: int, length: int = 8) -> NDArray[np.float32]:
    return np.stack([random_path(20, 60, seed)[:length] for seed in range(count)])


@pytest.mark.parametrize("count", [1, 3])
def test_rollout_is_the_torch_recursion_between_encode_and_decode(count: int) -> None:
    model, observed = random_model(), prefixes(count)
    forecast = rollout(observed, 12, model)
    assert forecast.shape == (count, 12, 60)
    for weights, prefix in zip(forecast, observed, strict=True):
        basis = Basis.from_prefix(prefix, MODEL_CONFIG.n_components)
        expected = basis.decode(model.rollout(torch.from_numpy(basis.encode(prefix)[None]), 12)[0].numpy())
        np.testing.assert_allclose(weights, expected, atol=1e-4 * np.abs(expected).max())


def test_model_may_be_a_folder_and_a_prefix_may_stand_alone(tmp_path: Path) -> None:
    model, observed = random_model(), prefixes(2)
    save_model(model, tmp_path / "model")
    batch = rollout(observed, 5, tmp_path / "model")
    np.testing.assert_array_equal(rollout(observed[1], 5, str(tmp_path / "model"))[0], batch[1])
    np.testing.assert_array_equal(rollout(observed, 5, Forecaster(model)), batch)


def test_a_centred_forecaster_that_learned_nothing_follows_the_mean_path() -> None:
    rng = np.random.default_rng(0)
    paths = rng.standard_normal((2, MODEL_CONFIG.max_len, MODEL_CONFIG.n_components)).astype(np.float32)
    centre = Centre(np.array([5, 9]), paths, np.ones(2))
    untrained = Forecaster(TrajectoryTransformer(MODEL_CONFIG).eval(), None, centre)
    observed = rng.standard_normal((2, 8, MODEL_CONFIG.n_components)).astype(np.float32)  # ends at 7, between 5 and 9
    mean = centre.paths.mean(0)
    expected = observed[:, -1:] + mean[8:14] - mean[7]
    np.testing.assert_allclose(untrained.continue_coordinates(observed, [6, 6]), expected, atol=1e-5)


def test_prefixes_of_all_lengths_are_continued_together() -> None:
    rng = np.random.default_rng(0)
    centre = Centre(
        np.array([3, 19]),
        rng.standard_normal((2, MODEL_CONFIG.max_len, MODEL_CONFIG.n_components)).astype(np.float32),
        np.array([0.5, 1.0]),
    )
    for forecaster in (Forecaster(random_model()), Forecaster(random_model(), None, centre)):
        paths, lengths, horizons = prefixes(4, 20), [8, 5, 20, 8], [1, 12, 4, 6]
        observed = [path[:length] for path, length in zip(paths, lengths, strict=True)]
        together = forecaster.forecast(observed, horizons)
        for prefix, n, forecast in zip(observed, horizons, together, strict=True):
            assert forecast.weights().shape == (n, 60)
            np.testing.assert_array_equal(forecast.weights(), rollout(prefix, n, forecaster)[0])


def test_rejections() -> None:
    model, observed = random_model(), prefixes(2)
    with pytest.raises(TypeError, match="prefix_weights must be float32, got float64"):
        rollout(observed.astype(np.float64), 3, model)
    with pytest.raises(ValueError, match=r"must have shape \(B, h\+1, p\) or \(h\+1, p\), got \(60,\)"):
        rollout(observed[0, 0], 3, model)
    spoilt = observed.copy()
    spoilt[1, 4, 7] = np.inf
    with pytest.raises(ValueError, match="NaN or Inf in trial 1, checkpoint 4"):
        rollout(spoilt, 3, model)
    with pytest.raises(ValueError, match=r"horizon must lie in \[1, 16\] .* got 17"):
        rollout(observed, 17, model)
    with pytest.raises(ValueError, match="a prefix must hold at least 4 checkpoints"):
        rollout(observed[:, :3], 3, model)
    shared = Forecaster(model, Basis.from_prefix(prefixes(1)[0][:, :50], MODEL_CONFIG.n_components))
    with pytest.raises(ValueError, match=r"must hold p = 50 weights for each checkpoint, .* got 60"):
        rollout(observed, 3, shared)
