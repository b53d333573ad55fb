"""Reading what an evaluation and a training left: as arrays, and what is damaged is named."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from synthetic_run import Run, make_training

from tipl.files.manifest import write_manifest
from tipl.report.intervals import ranking
from tipl.report.results import read_coordinates, read_results, read_training


@pytest.fixture
def small(tmp_path: Path) -> Run:
    """A run to change and damage."""
    return Run(tmp_path, prefixes=(0.2, 0.6))


def test_results_become_arrays_by_trial_and_horizon(small: Run) -> None:
    results = small.read()
    assert results.trials == tuple(small.heldout)
    assert results.prefixes == (0.2, 0.6)
    assert results.predictors == ("tipl", "persistence", "linear", "rank1", "mean_path")
    for row in small.rows:
        cell = small.heldout.index(row["trial"]), list(results.horizons[row["prefix"]]).index(row["horizon"])
        for measure in ("wpe", "wpe_relative", "return_true", "return_predicted", "repw"):
            assert results.values(measure, row["prefix"], row["predictor"])[cell] == row[measure]
        for measure in ("action_difference", "kl"):  # null for the return floor
            value = results.values(measure, row["prefix"], row["predictor"])[cell]
            assert value == row[measure] if row["predictor"] != "return_floor" else math.isnan(value)
        assert (
            results.at("wpe", row["prefix"], row["predictor"], row["horizon"])[cell[0]]
            == results.values("wpe", row["prefix"], row["predictor"])[cell]
        )
    for entry in small.results["diversity"]:
        place = list(results.horizons[entry["prefix"]]).index(entry["horizon"])
        for which in ("action_variance", "return_std"):
            assert results.spread(which, entry["prefix"], entry["predictor"])[place] == entry[which]
    best = ranking(results, "wpe_relative", 0.2)
    assert best[0][0] == "tipl"
    assert [value for _, value in best] == sorted(value for _, value in best)


def test_confidence_distances_and_causality_are_read(small: Run) -> None:
    results = small.read()
    for row in small.rows:
        value = results.at("confidence", row["prefix"], row["predictor"], row["horizon"])
        cell = value[small.heldout.index(row["trial"])]
        assert cell == row["confidence"] if row["predictor"] == "tipl" else math.isnan(cell)
    for entry in small.results["memorisation"]:
        for which in ("forecast_nearest", "true_nearest", "mean_nearest"):
            found = results.nearest(which, entry["prefix"])
            assert found[small.heldout.index(entry["trial"])] == entry[which]
    assert results.causality == 0.0
    del small.results["memorisation"], small.results["causality"]
    results = small.read()
    assert np.isnan(results.nearest("true_nearest", 0.2)).all()
    assert math.isnan(results.causality)


def test_results_of_an_earlier_version_lack_functional_metrics(small: Run) -> None:
    del small.results["diversity"]
    for row in small.rows:
        del row["action_difference"], row["kl"]
    results = small.read()
    for name in results.names:
        assert not results.has_values("kl", name)
        assert not results.has_values("action_difference", name)
        assert results.has_values("wpe", name)
        assert np.isnan(results.spread("action_variance", 0.2, name)).all()


def test_a_divergence_that_overflowed_is_left_out(small: Run) -> None:
    small.rows[0]["kl"] = small.results["diversity"][0]["return_std"] = None
    results, first = small.read(), small.rows[0]
    assert np.isnan(results.values("kl", first["prefix"], first["predictor"])[0, 0])
    assert np.isnan(results.spread("return_std", first["prefix"], first["predictor"])[0])
    assert np.isfinite(results.values("action_difference", first["prefix"], first["predictor"])[0, 0])


def change(key: str, value: Any, place: int | None = None) -> Any:
    def damage(results: dict[str, Any]) -> None:
        (results if place is None else results["rows"][place])[key] = value

    return damage


def drop(key: str, place: int | None = None) -> Any:
    return lambda results: (results if place is None else results["rows"][place]).pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("format", "other"), "format must be 'tipl-results'"),
        (change("version", 2), "version must be 1, got 2"),
        (drop("env_id"), "the file lacks 'env_id'"),
        (change("settings", []), r"the file: settings must be of type dict, got \[\]"),
        (change("settings", {}), "settings lacks 'heldout_trials'"),
        (change("rows", []), "rows must not be empty"),
        (change("machine", "fast"), "the file: machine must be of type dict, got 'fast'"),
        (lambda results: results["rows"].insert(3, 7), r"rows\[3\] must be an object, got 7"),
        (drop("wpe", 5), r"rows\[5\] lacks 'wpe'"),
        (change("wpe", "small", 5), r"rows\[5\]: wpe must be of type int or float, got 'small'"),
        (change("wpe_relative", -0.1, 5), r"rows\[5\]: wpe_relative must be finite and not negative, got -0.1"),
        (change("return_true", math.inf, 5), r"rows\[5\]: return_true must be finite, got inf"),
        (change("trial", 0, 5), r"rows\[5\]: trial must be one of settings.heldout_trials, got 0"),
        (change("trial", True, 5), r"rows\[5\]: trial must be of type int, got True"),
        (change("prefix", 1.5, 5), r"rows\[5\]: prefix must lie in \(0, 1\), got 1.5"),
        (change("horizon", 0, 5), r"rows\[5\]: horizon must be at least 1, got 0"),
        (change("env_id", "Ant-v5", 5), r"rows\[5\]: env_id must be 'InvertedPendulum-v5', got 'Ant-v5'"),
        (change("kl", math.inf, 5), r"rows\[5\]: kl must be finite and not negative, got inf"),
        (
            change("action_difference", -0.1, 5),
            r"rows\[5\]: action_difference must be finite and not negative, got -0.1",
        ),
        (change("diversity", {}), r"the file: diversity must be of type list, got {}"),
        (lambda results: results["diversity"].insert(2, 7), r"diversity\[2\] must be an object, got 7"),
        (
            lambda results: results["diversity"][2].update(horizon=1000),
            r"diversity\[2\]: no row has prefix 0.2 and horizon 1000",
        ),
        (
            lambda results: results["diversity"][2].update(action_variance=-1.0),
            r"diversity\[2\]: action_variance must be finite and not negative, got -1.0",
        ),
        (lambda results: results["diversity"][2].pop("return_std"), r"diversity\[2\] lacks 'return_std'"),
        (change("confidence", 1.5, 5), r"rows\[5\]: confidence must lie in \[0, 1\], got 1.5"),
        (change("causality", -1.0), "the file: causality must be finite and not negative, got -1.0"),
        (change("memorisation", {}), r"the file: memorisation must be of type list, got {}"),
        (lambda results: results["memorisation"].insert(2, 7), r"memorisation\[2\] must be an object, got 7"),
        (
            lambda results: results["memorisation"][2].update(trial=0),
            r"memorisation\[2\]: no row has trial 0 and prefix 0.2",
        ),
        (lambda results: results["memorisation"][2].pop("mean_nearest"), r"memorisation\[2\] lacks 'mean_nearest'"),
        (change("predictor", "tipl", 1), r"rows\[1\]: trial 3, prefix 0.2, horizon 1, 'tipl' has come before"),
    ],
)
def test_damaged_results_are_named(small: Run, damage: Any, message: str) -> None:
    damage(small.results)
    with pytest.raises(RuntimeError, match=rf"results\.json is damaged or not of tipl: {message}"):
        small.read()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]"])
def test_a_file_that_is_no_results_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    write_manifest(tmp_path)
    with pytest.raises(RuntimeError, match=r"results\.json is damaged or not of tipl"):
        read_results(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", None, "the file: steps must be of type list, got None"),
        ("validation_error", [1.0], "validation_error must be as long as steps, 60, got 1"),
        ("train_loss", ["a"] * 60, r"train_loss\[0\]: train_loss must be of type int or float, got 'a'"),
        ("num_parameters", "many", "the file: num_parameters must be of type int, got 'many'"),
    ],
)
def test_damaged_training_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = tmp_path / "training.json"
    path.write_text(json.dumps(make_training() | {key: value}))
    write_manifest(tmp_path)
    with pytest.raises(RuntimeError, match=rf"training\.json is damaged or not of tipl: {message}"):
        read_training(path)


def test_damaged_coordinates_are_named(tmp_path: Path) -> None:
    path = tmp_path / "coordinates.safetensors"
    path.write_bytes(b"\0" * 20)
    write_manifest(tmp_path)
    with pytest.raises(RuntimeError, match=r"coordinates\.safetensors is damaged or not of tipl"):
        read_coordinates(path)
    stem, paths = "trial3_prefix20_", np.zeros((5, 2), np.float32)
    for arrays, message in (
        ({"true": paths, "tipl": paths}, "it lacks trial3_prefix20_h"),
        (
            {"true": paths, "tipl": paths[:3], "h": np.array([1])},
            r"trial3_prefix20_tipl must have the shape .* \(5, 2\)",
        ),
        (
            {"true": paths, "tipl": paths, "h": np.array([5])},
            r"trial3_prefix20_h must hold one index below T = 5, got \[5\]",
        ),
        (
            {"true": paths, "tipl": paths, "h": np.array([1]), "plane_true": paths, "plane_shares": np.ones(2)},
            "it lacks trial3_prefix20_plane_tipl",
        ),
        (
            {
                "true": paths,
                "tipl": paths,
                "h": np.array([1]),
                "plane_true": paths,
                "plane_shares": np.ones(2),
                "plane_tipl": paths,
            },
            r"trial3_prefix20_plane_tipl must be finite and have the shape \(3, 2\), got \(5, 2\)",
        ),
    ):
        safetensors.numpy.save_file({stem + name: array for name, array in arrays.items()}, path)
        write_manifest(tmp_path)
        with pytest.raises(RuntimeError, match=message):
            read_coordinates(path)
