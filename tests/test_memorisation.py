"""Dynamics or the average: distances to training paths, a model that peeks, and the report's words on them."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import SPEC, make_store
from pages import text_of
from synthetic_run import Run, at_end
from torch import Tensor, nn

from tipl.forecasting.transformer import ModelConfig, TrajectoryTransformer
from tipl.judging.memorisation import future_leak, nearest_distances, training_futures
from tipl.judging.predictors import NearestPath, canonical_coordinates
from tipl.judging.training_path import TrainingPath
from tipl.report.intervals import Bootstrap
from tipl.report.memorisation import dynamics_section
from tipl.report.page import Html, fmt
from tipl.subspace.prefix import Prefix


def words_of(run: Run) -> str:
    results = run.read()
    section = dynamics_section(results, Bootstrap(len(results.trials)), lambda plot, caption: Html(""))
    return text_of(section)


@pytest.fixture
def small(tmp_path: Path) -> Run:
    """A run to change."""
    return Run(tmp_path, num_trials=12, num_heldout=8, prefixes=(0.2, 0.6))


# ---------------------------------------------------------------- what is measured


def test_distances_equal_a_slow_computation() -> None:
    rng = np.random.default_rng(0)
    prefix = np.cumsum(rng.normal(size=(6, 30)), 0).astype(np.float32)
    ends, futures = prefix[-1] + rng.normal(size=(2, 30)).astype(np.float32), rng.normal(size=(5, 3))
    found, average = nearest_distances(Prefix(prefix), ends, futures)
    seen = prefix.astype(np.float64) - prefix[0]
    directions = np.linalg.svd(seen, full_matrices=False)[2][:3]
    directions *= np.where(directions @ seen[-1] < 0, -1, 1)[:, None]
    for end, distance in zip(ends, found, strict=True):
        ahead = directions @ (end.astype(np.float64) - prefix[-1]) / np.linalg.norm(seen[-1])
        assert distance == pytest.approx(min(np.linalg.norm(ahead - future) for future in futures), rel=1e-4)
    assert average == pytest.approx(min(np.linalg.norm(futures.mean(0) - future) for future in futures))


def test_a_forecaster_that_copies_a_training_path_is_found_out(tmp_path: Path) -> None:
    """The nearest path predictor copies what follows: no distance is left, whatever trial it continues."""
    store, h, k = make_store(tmp_path / "store.zarr", 6, 16), 6, 4
    training = [TrainingPath.of(store.trial(i).weights(), SPEC, seed=i) for i in range(4)]
    copier = NearestPath(canonical_coordinates(training, h, k))
    futures = training_futures(copier.coordinates, h)
    for i in (4, 5):
        path = store.trial(i).weights()
        copied = copier.forecast(Prefix(path[: h + 1]), np.array([15 - h]))[0]
        (forecast, true), _ = nearest_distances(Prefix(path[: h + 1]), np.stack([copied, path[-1]]), futures)
        assert forecast < 1e-4
        assert true > 0.01


class Peeking(TrajectoryTransformer):
    """Predicts the next coordinates by looking at them."""

    def forward(self, x: Tensor, prefix_end: Tensor) -> Tensor:
        return torch.cat([x[:, 1:], x[:, -1:]], 1)


def test_only_a_model_that_peeks_leaks() -> None:
    config = ModelConfig(n_components=3, max_len=12, n_layer=2, n_head=2, d_model=16)
    torch.manual_seed(0)
    model = TrajectoryTransformer(config).eval()
    nn.init.normal_(model.head.weight)  # zero before training: it would predict persistence, and could not leak
    path = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
    kept = path.copy()
    for h in (3, 7, 10):
        assert future_leak(model, path, h) < 1e-6
        assert future_leak(Peeking(config), path, h) > 0.1
    np.testing.assert_array_equal(path, kept)


# ---------------------------------------------------------------- what the report says


def test_the_average_path_is_compared_in_pairs(small: Run) -> None:
    text = words_of(small)
    assert "Nearer to the truth than the training trials' mean path, at the end of the path: TIPL at 2 of 2" in text
    for prefix, shown in ((0.2, "20 %"), (0.6, "60 %")):
        own, theirs = (np.array(at_end(small.rows, prefix, n, "wpe_relative")) for n in ("tipl", "mean_path"))
        assert re.search(rf"by {fmt((theirs - own).mean())} \[[^]]*\] at prefix {shown}", text)
    for row in small.rows:
        if row["predictor"] == "tipl":
            row["wpe_relative"] *= 10 if row["prefix"] == 0.6 else 1
    text = words_of(small)
    assert "TIPL at 1 of 2 prefixes" in text
    assert re.search(r"its error is below it by [\d.]+ \[[^]]*\] at prefix 20 %, above it by [\d.]+ \[", text)
    for row in small.rows:
        row["wpe_relative"] = 0.5
    assert "TIPL at none of 2 prefixes" in words_of(small)
    assert "the same within the interval at 20 % and 60 %" in words_of(small)


def test_copies_are_called_so(small: Run) -> None:
    text = words_of(small)
    mean_ratio = 0.8 / np.mean([1 + 0.1 * trial for trial in small.heldout])
    assert f"0.700 [0.700, 0.700] ({fmt(mean_ratio)}) at prefix 20 %" in text
    assert "No copies: nowhere" in text
    for entry in small.results["memorisation"]:
        if entry["prefix"] == 0.6:
            entry["forecast_nearest"] *= 0.01
    assert "Copies at prefix 60 %: there" in words_of(small)
    small.results["settings"]["is_zero_shot"] = True
    assert "never saw this task's training trials" in words_of(small)


def test_collapse_is_called_so(small: Run) -> None:
    text = words_of(small)
    assert "true ones' (in round brackets persistence's): 0.700 (0.900) at prefix 20 % and 0.700 (0.900)" in text
    assert "Nowhere do they act less than half as differently. Nowhere do they score" in text
    for entry in small.results["diversity"]:
        if entry["predictor"] == "tipl" and entry["prefix"] == 0.2:
            entry["action_variance"] *= 0.5
    text = words_of(small)
    assert "After 20 % of the path they act less than half as differently. Nowhere do they score" in text


def test_a_model_that_sees_the_future_is_named(small: Run) -> None:
    assert "do not change at all where noise replaces all that follows" in words_of(small)
    small.results["causality"] = 0.25
    assert "change by 0.250 at most" in words_of(small)
    assert "it SEES THE FUTURE" in words_of(small)


def test_in_sample_trials_are_no_copies(small: Run) -> None:
    results = dataclasses.replace(small.read(), settings=small.results["settings"] | {"train": {"in_sample": True}})
    section = dynamics_section(results, Bootstrap(len(results.trials)), lambda plot, caption: Html(""))
    assert "The judged trials are training trials" in section
