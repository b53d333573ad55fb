"""Readers of what `tipl evaluate` and `tipl train` write: results.json, coordinates.safetensors, training.json.

`evaluate` writes one row for each (trial, prefix, horizon, predictor). Here the rows become arrays (n, H) over the n
held-out trials and the H horizons of a prefix, NaN where a row or its value is missing. Each reader checks its file
once; its errors name the file and the place in it.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl.files.manifest import read_listed
from tipl.files.sealed import parse_safetensors
from tipl.report.predictor_info import PREDICTORS, predictor_info

FloatArray = NDArray[np.float64]

MEASURES = ("wpe", "wpe_relative", "return_true", "return_predicted", "repw", "action_difference", "kl", "confidence")
OPTIONAL = ("action_difference", "kl", "confidence")  # results of tipl 0.1 lack them; only TIPL has a confidence
NON_NEGATIVE = ("wpe", "wpe_relative", "repw", "action_difference", "kl", "confidence")
SPREADS = ("action_variance", "return_std")  # of the held-out trials' policies at one checkpoint
NEAREST = ("forecast_nearest", "true_nearest", "mean_nearest")  # distances to the nearest training path

RowKey = tuple[int, float, int, str]  # trial, prefix, horizon, predictor


@dataclasses.dataclass(frozen=True)
class Results:
    """A checked `results.json` as arrays: `values(measure, prefix, predictor)` is (n, H)."""

    path: Path
    env_id: str
    tipl_version: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: dict[str, Any]
    trials: tuple[int, ...]  # the n held-out trials that have rows
    prefixes: tuple[float, ...]
    names: tuple[str, ...]  # predictors in the order of PREDICTORS, unknown ones, floors
    horizons: dict[float, NDArray[np.int64]]  # prefix -> (H,)
    has_rows: dict[float, NDArray[np.bool_]]  # prefix -> (n, H), True where any predictor was evaluated
    cells: dict[tuple[str, float, str], FloatArray]  # (measure, prefix, predictor) -> (n, H)
    spreads: dict[tuple[str, float, str], FloatArray]  # (spread, prefix, predictor or "truth") -> (H,)
    distances: dict[tuple[str, float], FloatArray]  # (one of NEAREST, prefix) -> (n,)
    causality: float  # largest change of a prediction when the checkpoints after it change; NaN where not measured

    @property
    def in_sample(self) -> bool:
        """Whether the judged trials are those that the forecaster was trained on, so that none was held out."""
        train = self.settings.get("train")
        elsewhere = self.settings.get("is_zero_shot") or self.is_fresh
        return isinstance(train, dict) and train.get("in_sample") is True and not elsewhere

    @property
    def is_fresh(self) -> bool:
        """Whether all trials come from a store that was used neither for training nor for validation."""
        return self.settings.get("is_fresh") is True

    @property
    def follow(self) -> float:
        """The least confidence at which the gated forecast follows TIPL."""
        return float(self.settings.get("follow", 0.5))

    @property
    def predictors(self) -> tuple[str, ...]:
        """The real predictors, without the floors."""
        return tuple(name for name in self.names if not predictor_info(name).is_floor)

    def values(self, measure: str, prefix: float, name: str) -> FloatArray:
        """Return `measure` of predictor `name` (n, H), NaN where there is no value."""
        empty = np.full((len(self.trials), len(self.horizons[prefix])), np.nan)
        return self.cells.get((measure, prefix, name), empty)

    def has_values(self, measure: str, name: str) -> bool:
        """Return whether `measure` of predictor `name` is known anywhere."""
        return any(np.isfinite(self.values(measure, prefix, name)).any() for prefix in self.prefixes)

    def spread(self, which: str, prefix: float, name: str) -> FloatArray:
        """Return `which` of SPREADS between the policies of predictor `name`, or "truth", (H,); NaN where unknown."""
        return self.spreads.get((which, prefix, name), np.full(len(self.horizons[prefix]), np.nan))

    def nearest(self, which: str, prefix: float) -> FloatArray:
        """Return distances to the nearest training path (n,), NaN where unknown; `which` is one of NEAREST."""
        return self.distances.get((which, prefix), np.full(len(self.trials), np.nan))

    def at(self, measure: str, prefix: float, name: str, horizon: int | None) -> FloatArray:
        """Return `measure` of predictor `name` (n,) at `horizon`; None stands for the end of the path."""
        if horizon is None:
            return self.at_end(measure, prefix, name)
        return self.values(measure, prefix, name)[:, self.horizons[prefix].tolist().index(horizon)]

    def at_end(self, measure: str, prefix: float, name: str) -> FloatArray:
        """Return `measure` of predictor `name` at the end of each trial's path (n,): its largest horizon with rows."""
        is_there = self.has_rows[prefix]
        last = is_there.shape[1] - 1 - np.argmax(is_there[:, ::-1], axis=1)  # (n,)
        at_end = self.values(measure, prefix, name)[np.arange(len(last)), last]
        return np.where(is_there.any(1), at_end, np.nan)


def read_results(path: Path) -> Results:
    """Return the results in `path`. Raises FileNotFoundError; RuntimeError naming the file and the fault in it."""
    if not path.is_file():
        raise FileNotFoundError(f"read_results: {path} does not exist; `tipl evaluate` writes it")
    try:
        return _parse(path, json.loads(read_listed(path)))
    except ValueError as error:  # from the JSON parser, the text decoder or `_parse`
        raise RuntimeError(f"read_results: {path} is damaged or not of tipl: {error}") from error


def _parse(path: Path, document: Any) -> Results:
    if not isinstance(document, dict) or document.get("format") != "tipl-results":
        raise ValueError("format must be 'tipl-results'")
    if document.get("version") != 1:
        raise ValueError(f"version must be 1, got {document.get('version')!r}")
    env_id = required(document, "env_id", str, "the file")
    settings = required(document, "settings", dict, "the file")
    heldout = required(settings, "heldout_trials", list, "settings")
    rows = required(document, "rows", list, "the file")
    if not rows:
        raise ValueError("rows must not be empty")

    keys = _row_keys(rows, env_id, heldout)
    trials = tuple(sorted({trial for trial, _, _, _ in keys}))
    prefixes = tuple(sorted({prefix for _, prefix, _, _ in keys}))
    found = dict.fromkeys(name for _, _, _, name in keys)  # in the order of the file
    known, unknown = [n for n in PREDICTORS if n in found], [n for n in found if n not in PREDICTORS]
    names = tuple(sorted(known + unknown, key=lambda n: predictor_info(n).is_floor))  # stable: floors to the end
    horizons = {f: np.array(sorted({key[2] for key in keys if key[1] == f}), np.int64) for f in prefixes}
    cells, has_rows = _parse_cells(rows, keys, trials, names, horizons)
    return Results(
        path=path,
        env_id=env_id,
        tipl_version=str(document.get("tipl_version", "unknown")),
        settings=settings,
        machine=required(document, "machine", dict, "the file"),
        seconds=required(document, "seconds", dict, "the file"),
        trials=trials,
        prefixes=prefixes,
        names=names,
        horizons=horizons,
        has_rows=has_rows,
        cells=cells,
        spreads=_parse_spreads(document, horizons),
        distances=_parse_distances(document, trials, prefixes),
        causality=number(document, "causality", "the file", non_negative=True) if "causality" in document else math.nan,
    )


def _row_keys(rows: Sequence[Any], env_id: str, heldout: Sequence[int]) -> list[RowKey]:
    """Return the key of each entry of "rows", checked."""
    keys: list[RowKey] = []
    for i, row in enumerate(rows):
        where = f"rows[{i}]"
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be an object, got {row!r}")
        trial, horizon = required(row, "trial", int, where), required(row, "horizon", int, where)
        prefix = round(float(required(row, "prefix", (int, float), where)), 6)
        if row.get("env_id", env_id) != env_id:
            raise ValueError(f"{where}: env_id must be {env_id!r}, got {row['env_id']!r}")
        if trial not in heldout:
            raise ValueError(f"{where}: trial must be one of settings.heldout_trials, got {trial}")
        if not 0 < prefix < 1:
            raise ValueError(f"{where}: prefix must lie in (0, 1), got {prefix}")
        if horizon < 1:
            raise ValueError(f"{where}: horizon must be at least 1, got {horizon}")
        keys.append((trial, prefix, horizon, required(row, "predictor", str, where)))
    return keys


def _parse_cells(
    rows: Sequence[Mapping[str, Any]],
    keys: Sequence[RowKey],
    trials: Sequence[int],
    names: Sequence[str],
    horizons: Mapping[float, NDArray[np.int64]],
) -> tuple[dict[tuple[str, float, str], FloatArray], dict[float, NDArray[np.bool_]]]:
    """Return `Results.cells` and `Results.has_rows` from the entries of "rows" and their keys."""
    trial_index = {trial: i for i, trial in enumerate(trials)}
    horizon_index = {(f, int(horizon)): j for f in horizons for j, horizon in enumerate(horizons[f])}
    cells = {
        (measure, f, name): np.full((len(trials), len(horizons[f])), np.nan)
        for measure in MEASURES
        for f in horizons
        for name in names
    }
    has_rows = {f: np.zeros((len(trials), len(horizons[f])), bool) for f in horizons}
    seen: set[RowKey] = set()
    for i, (key, row) in enumerate(zip(keys, rows, strict=True)):
        trial, f, horizon, name = key
        if key in seen:
            raise ValueError(f"rows[{i}]: trial {trial}, prefix {f}, horizon {horizon}, {name!r} has come before")
        seen.add(key)
        cell = trial_index[trial], horizon_index[f, horizon]
        has_rows[f][cell] = True
        for measure in MEASURES:
            if measure in row or measure not in OPTIONAL:
                value = number(row, measure, f"rows[{i}]", non_negative=measure in NON_NEGATIVE)
                if measure == "confidence" and value > 1:
                    raise ValueError(f"rows[{i}]: confidence must lie in [0, 1], got {value}")
                cells[measure, f, name][cell] = value
    return cells, has_rows


def _parse_spreads(
    document: Mapping[str, Any], horizons: Mapping[float, NDArray[np.int64]]
) -> dict[tuple[str, float, str], FloatArray]:
    """Return `Results.spreads` from the entries of "diversity", which older files lack."""
    spreads: dict[tuple[str, float, str], FloatArray] = {}
    entries = required(document, "diversity", list, "the file") if "diversity" in document else []
    for i, entry in enumerate(entries):
        where = f"diversity[{i}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be an object, got {entry!r}")
        prefix = round(float(required(entry, "prefix", (int, float), where)), 6)
        horizon, name = required(entry, "horizon", int, where), required(entry, "predictor", str, where)
        if horizon not in horizons.get(prefix, ()):
            raise ValueError(f"{where}: no row has prefix {prefix} and horizon {horizon}")
        place = horizons[prefix].tolist().index(horizon)
        for which in SPREADS:
            spread = spreads.setdefault((which, prefix, name), np.full(len(horizons[prefix]), np.nan))
            spread[place] = number(entry, which, where, non_negative=True)
    return spreads


def _parse_distances(
    document: Mapping[str, Any], trials: Sequence[int], prefixes: Sequence[float]
) -> dict[tuple[str, float], FloatArray]:
    """Return `Results.distances` from the entries of "memorisation", which older files lack."""
    distances: dict[tuple[str, float], FloatArray] = {}
    entries = required(document, "memorisation", list, "the file") if "memorisation" in document else []
    for i, entry in enumerate(entries):
        where = f"memorisation[{i}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be an object, got {entry!r}")
        trial = required(entry, "trial", int, where)
        prefix = round(float(required(entry, "prefix", (int, float), where)), 6)
        if trial not in trials or prefix not in prefixes:
            raise ValueError(f"{where}: no row has trial {trial} and prefix {prefix}")
        for which in NEAREST:
            of_trials = distances.setdefault((which, prefix), np.full(len(trials), np.nan))
            of_trials[trials.index(trial)] = number(entry, which, where, non_negative=True)
    return distances


def required(mapping: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return `mapping[key]`; ValueError unless it is there and of `kind` (a bool is no int)."""
    if key not in mapping:
        raise ValueError(f"{where} lacks {key!r}")
    value = mapping[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where}: {key} must be of type {expected}, got {value!r}")
    return value


def number(mapping: Mapping[str, Any], key: str, where: str, *, non_negative: bool = False) -> float:
    """Return the number `mapping[key]`, NaN for null; ValueError for an infinity or another type."""
    if key in mapping and mapping[key] is None:
        return math.nan
    value = float(required(mapping, key, (int, float), where))
    if math.isinf(value) or (non_negative and value < 0):
        raise ValueError(f"{where}: {key} must be finite{' and not negative' if non_negative else ''}, got {value}")
    return value


@dataclasses.dataclass(frozen=True)
class Training:
    """The forecaster's training: losses (S,) at optimiser steps (S,), NaN where a loss was not measured."""

    steps: FloatArray
    train_loss: FloatArray
    validation_error: FloatArray
    seconds: float
    num_parameters: int
    best_step: int


def read_training(path: Path) -> Training:
    """Return the training in `path`. Raises FileNotFoundError; RuntimeError naming the file and the fault in it."""
    if not path.is_file():
        raise FileNotFoundError(f"read_training: {path} does not exist; `tipl train` writes it")
    try:
        document = json.loads(read_listed(path))
        if not isinstance(document, dict):
            raise ValueError("it must hold a JSON object")
        curves = {}
        for key in ("steps", "train_loss", "validation_error"):
            values = required(document, key, list, "the file")
            curves[key] = np.array(
                [number({key: value}, key, f"{key}[{i}]", non_negative=True) for i, value in enumerate(values)]
            )
            if len(values) != len(document["steps"]):
                raise ValueError(f"{key} must be as long as steps, {len(document['steps'])}, got {len(values)}")
        return Training(
            **curves,
            seconds=number(document, "seconds", "the file", non_negative=True),
            num_parameters=required(document, "num_parameters", int, "the file"),
            best_step=required(document, "best_step", int, "the file"),
        )
    except ValueError as error:
        raise RuntimeError(f"read_training: {path} is damaged or not of tipl: {error}") from error


@dataclasses.dataclass(frozen=True)
class CoordinatePath:
    """A held-out path in the coordinates of one prefix: the truth, and TIPL's forecast after `prefix_end`."""

    trial: int
    percent: int
    prefix_end: int
    true: NDArray[np.float32]  # (T, k)
    forecast: NDArray[np.float32]  # (T, k)
    plane: Mapping[str, NDArray[np.floating]] = dataclasses.field(default_factory=dict)
    """The same on the plane of the true path, where that was kept: "true" (T, 2), what each predictor forecasts by its
    name, (T-1-h, 2), and "shares" (2,)."""


def read_coordinates(path: Path) -> list[CoordinatePath]:
    """Return the paths in `coordinates.safetensors`, by trial and prefix; RuntimeError names the file and the fault."""
    found = []
    try:
        arrays, _ = parse_safetensors(read_listed(path))
        for match in filter(None, (re.fullmatch(r"(trial(\d+)_prefix(\d+)_)true", name) for name in arrays)):
            stem = match[1]
            if missing := {f"{stem}tipl", f"{stem}h"} - arrays.keys():
                raise ValueError(f"it lacks {min(missing)}")
            true, forecast, h = (arrays[stem + part] for part in ("true", "tipl", "h"))
            if true.ndim != 2 or true.shape != forecast.shape:
                raise ValueError(f"{stem}tipl must have the shape (T, k) = {true.shape}, got {forecast.shape}")
            if h.shape != (1,) or not 0 <= int(h[0]) < len(true):
                raise ValueError(f"{stem}h must hold one index below T = {len(true)}, got {h.tolist()}")
            points = {
                n.removeprefix(f"{stem}plane_"): a for n, a in sorted(arrays.items()) if n.startswith(f"{stem}plane_")
            }
            _check_plane(f"{stem}plane_", points, len(true), int(h[0]))
            found.append(CoordinatePath(int(match[2]), int(match[3]), int(h[0]), true, forecast, points))
    except ValueError as error:
        raise RuntimeError(f"read_coordinates: {path} is damaged or not of tipl: {error}") from error
    return sorted(found, key=lambda path: (path.trial, path.percent))


def _check_plane(stem: str, points: Mapping[str, NDArray[Any]], num_checkpoints: int, prefix_end: int) -> None:
    """Raise ValueError where `CoordinatePath.plane` is not as it must be; earlier evaluations have none."""
    if points and (missing := {"true", "tipl", "shares"} - points.keys()):
        raise ValueError(f"it lacks {stem}{min(missing)}")
    known = {"true": (num_checkpoints, 2), "shares": (2,)}
    for name, array in points.items():
        expected = known.get(name, (num_checkpoints - 1 - prefix_end, 2))
        if array.shape != expected or not np.isfinite(array).all():
            raise ValueError(f"{stem}{name} must be finite and have the shape {expected}, got {array.shape}")
