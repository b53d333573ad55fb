"""The forecaster that comes with tipl: small, safe, and better than persistence on runs that it never saw."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from factories import random_path

import tipl
from tipl.policy import PolicySpec
from tipl.report.results import read_results

FOLDER = Path(tipl.__file__).parent / "forecasting" / "pretrained"


def test_it_is_small_and_cannot_run_code() -> None:
    files = {path.name for path in FOLDER.iterdir()}
    assert files == {
        "README.md", "manifest.json", "config.json",
        "model.safetensors", "centre.safetensors", "refiner.safetensors", "confidence.safetensors",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4 * 2**20
    forecaster = tipl.load_pretrained()
    assert len({source["env_id"] for source in forecaster.config["stores"]}) == 7
    assert forecaster.config["train"]["trust"] == 0.55


def test_rollout_uses_it_by_default() -> None:
    spec = PolicySpec(5, 2, (12, 9))
    path = random_path(11, spec.num_params, 0)
    forecast = tipl.rollout(path, 7, layout=spec)
    assert forecast.shape == (1, 7, spec.num_params)
    np.testing.assert_array_equal(forecast, tipl.rollout(path, 7, tipl.load_pretrained(), layout=spec))
    with pytest.raises(ValueError, match="layout must be given"):
        tipl.rollout(path, 7)
    with pytest.raises(ValueError, match=r"horizon must lie in \[1, 40\]"):
        tipl.rollout(path, 41, layout=spec)


def test_a_forecast_has_the_same_bits_alone_as_among_others_and_for_any_number_of_threads() -> None:
    spec, forecaster = PolicySpec(11, 3, (33, 17)), tipl.load_pretrained()
    prefixes = [random_path(40, spec.num_params, i)[:length] for i, length in enumerate((9, 21, 9, 31))]
    horizons = np.array([1, 4, 5])
    alone = [forecaster.forecast([prefix], [5], layout=spec, num_threads=1)[0] for prefix in prefixes]
    expected = [(one.weights(), one.confidence()) for one in alone]
    num_threads = torch.get_num_threads()
    try:
        for threads, rows in ((1, [3, 1, 0]), (2, [0, 1, 2, 3]), (2, [2, 2]), (2, [1])):
            torch.set_num_threads(threads)
            seen = [prefixes[i] for i in rows]
            forecasts = forecaster.forecast(seen, [5] * len(rows), layout=spec, num_threads=threads)
            for i, forecast in zip(rows, forecasts, strict=True):
                weights, confidence = expected[i]
                np.testing.assert_array_equal(forecast.weights(horizons), weights[horizons - 1])
                np.testing.assert_array_equal(forecast.confidence(horizons), confidence[horizons - 1])
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.slow
@pytest.mark.usefixtures("hasty_nowcaster")
def test_a_newcomer_forecasts_and_judges_a_run_of_their_own(
    tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """An unseen run of other sizes and settings, of more checkpoints than the forecaster knows: thinned and judged."""
    store, forecast = tmp_path / "store.zarr", tmp_path / "forecast.safetensors"
    ppo = tipl.PPOConfig(num_steps=128, num_minibatches=4, hidden_sizes=(32, 32))
    made = tipl.collect(
        store, env_id="InvertedPendulum-v5", num_trials=6, total_timesteps=100 * 128, seed=5, ppo=ppo, progress=False
    )
    assert run_tipl("rollout", "--store", store, "--output", forecast) == 0
    assert (
        "checkpoints 42 to 100, every 2, of trial 0; the last beats the policy at 40 with p = 0."
        in capsys.readouterr().out
    )
    arrays = safetensors.numpy.load_file(forecast)
    assert arrays["weights"].shape == (30, made.policy.num_params)
    assert ((arrays["confidence"] > 0) & (arrays["confidence"] < 1)).all()
    forecaster = tipl.load_pretrained()
    quick = tipl.EvaluateConfig(prefixes=(0.2, 0.4), horizons=(0.2,), num_episodes=1)
    results = read_results(tipl.evaluate(made, forecaster, tmp_path / "evaluation", quick, progress=False))
    assert results.settings["is_zero_shot"]
    for prefix in quick.prefixes:
        errors = {name: results.at_end("wpe_relative", prefix, name).mean() for name in ("tipl", "persistence")}
        assert errors["tipl"] < errors["persistence"]


def test_it_is_not_judged_on_trials_that_it_may_have_seen(tmp_path: Path) -> None:
    seen = tipl.collect(
        tmp_path / "store.zarr",
        env_id="InvertedPendulum-v4",
        num_trials=3,
        total_timesteps=512,
        ppo=tipl.PPOConfig(num_steps=32, num_minibatches=2, update_epochs=1),
        progress=False,
    )
    with pytest.raises(ValueError, match="with the same 3 of its 3 seeds, so that it may have seen"):
        tipl.evaluate(seen, tipl.load_pretrained(), tmp_path / "evaluation", progress=False)
