"""A run folder that looks like one, without training anything: input for the tests of results, verdict and report."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from factories import make_store, policy_return
from numpy.typing import NDArray

from tipl.files.manifest import write_manifest
from tipl.report import write_report
from tipl.report.results import Results, read_results
from tipl.storing.store import Store
from tipl.subspace.plane import Plane

PREFIXES = (0.2, 0.4, 0.6, 0.8)
NUM_COMPONENTS = 8


def make_rows(store: Store, heldout: list[int], prefixes: tuple[float, ...] = PREFIXES) -> list[dict[str, Any]]:
    """Rows of an evaluation: true baselines, and a TIPL that finds four tenths of what persistence misses."""
    rng = np.random.default_rng(2)
    rows = []
    for trial in heldout:
        theta = store.trial(trial).weights().astype(np.float64)  # (T, p)
        last, middle = len(theta) - 1, rng.uniform(0.25, 0.75)
        for prefix in prefixes:
            h = round(prefix * last)
            for horizon in sorted({*np.linspace(1, last - h, 8).round().astype(int).tolist()}):
                true = theta[h + horizon]
                speed = (theta[h] - theta[h // 2]) / (h - h // 2)
                seen = theta[: h + 1] - theta[0]
                span = np.linalg.svd(seen, full_matrices=False)[2][:NUM_COMPONENTS]
                drift = true - theta[h]
                forecasts = {
                    "tipl": (theta[h] + 0.4 * drift, 0.5),
                    "persistence": (theta[h], 0.0),
                    "linear": (theta[h] + horizon * speed, 0.6),
                    "rank1": (theta[h] + span[:1].T @ (span[:1] @ (horizon * speed)), 0.3),
                    "mean_path": (theta[h] + 0.2 * drift + rng.normal(size=len(drift)) * 0.01, 0.1),
                    "basis_floor": (theta[0] + span.T @ (span @ (true - theta[0])), 0.9),
                    "return_floor": (true, 1.0),
                }
                t0, t1 = h / last, (h + horizon) / last
                return_true = float(policy_return(t1, middle) + rng.normal() * 2)
                for name, (forecast, reach) in forecasts.items():
                    noise = np.random.default_rng([trial, h, len(name)]).normal() * 4
                    predicted = float(policy_return(t0 + reach * (t1 - t0), middle) + noise)
                    error = np.linalg.norm(forecast - true)
                    rows.append({
                        "env_id": store.env_id, "trial": trial, "prefix": prefix, "horizon": int(horizon),
                        "predictor": name, "wpe": float(error**2 / len(true)),
                        "wpe_relative": float(error / np.linalg.norm(true - theta[0])), "return_true": return_true,
                        "return_predicted": predicted, "repw": abs(return_true - predicted),
                        **(NO_ACTIONS if name == "return_floor" else compare_actions(float(error))),
                        **({"confidence": 0.3 + 0.65 * horizon / (last - h)} if name == "tipl" else {}),
                    })  # fmt: skip
    return rows


NO_ACTIONS = {"action_difference": None, "kl": None}


def compare_actions(error: float) -> dict[str, float]:
    """Functional metrics that grow with the distance of the weights."""
    return {"action_difference": math.tanh(0.05 * error), "kl": (0.2 * error) ** 3}


def make_diversity(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much policies differ at each (prefix, horizon): forecasts less than the truth, the mean path hardly."""
    factor = {"mean_path": 0.02, "tipl": 0.7, "return_floor": 1.0}
    keys = dict.fromkeys((row["prefix"], row["horizon"], row["predictor"]) for row in rows)
    return [
        {
            "prefix": prefix, "horizon": horizon, "predictor": "truth" if name == "return_floor" else name,
            "action_variance": factor.get(name, 0.9) * (0.1 + 0.01 * horizon), "return_std": 40.0 + horizon,
        }
        for prefix, horizon, name in keys
    ]  # fmt: skip


def make_memorisation(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Forecasts seven tenths as far from a training path as the truth is; their mean is half as far."""
    keys = dict.fromkeys((row["trial"], row["prefix"]) for row in rows)
    return [
        {
            "trial": trial, "prefix": prefix, "forecast_nearest": 0.7 * (1 + 0.1 * trial), "mean_nearest": 0.8,
            "true_nearest": 1 + 0.1 * trial,
        }
        for trial, prefix in keys
    ]  # fmt: skip


def make_results(store: Store, heldout: list[int], rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": "tipl-results", "version": 1, "env_id": store.env_id, "tipl_version": "0.1.0",
        "settings": {
            "num_trials": store.num_trials, "train_trials": [i for i in range(store.num_trials) if i not in heldout],
            "heldout_trials": heldout, "num_checkpoints": store.trial(0).num_checkpoints, "prefixes": list(PREFIXES),
            "num_episodes": 16, "episode_seeds": {str(trial): list(range(16)) for trial in heldout},
            "n_components": NUM_COMPONENTS,
        },
        "machine": {"cpu": "A server of today", "num_cores": 2, "isa": "avx512"},
        "seconds": {"collect": 61.2, "evaluate": 17.3},
        "rows": rows,
        "diversity": make_diversity(rows),
        "memorisation": make_memorisation(rows),
        "causality": 0.0,
    }  # fmt: skip


def make_coordinates(store: Store, heldout: list[int], prefixes: tuple[float, ...]) -> dict[str, NDArray[np.generic]]:
    arrays = {}
    for trial in heldout[:3]:
        theta = store.trial(trial).weights().astype(np.float64)
        for prefix in prefixes:
            h = round(prefix * (len(theta) - 1))
            directions = np.linalg.svd(theta[: h + 1] - theta[0], full_matrices=False)[2][:NUM_COMPONENTS]
            true = (theta - theta[0]) @ directions.T / np.linalg.norm(theta[h] - theta[0])
            true *= np.where(true[h] < 0, -1, 1)
            forecast = true.copy()
            forecast[h:] = true[h] + 0.6 * (true[h:] - true[h])
            stem = f"trial{trial}_prefix{round(100 * prefix)}_"
            arrays[stem + "true"], arrays[stem + "tipl"] = true.astype(np.float32), forecast.astype(np.float32)
            arrays[stem + "h"] = np.array([h])
            if trial == heldout[0]:
                path = store.trial(trial).weights()
                plane, away = Plane.of(path), np.arange(1, len(path) - h)[:, None] * (path[h] - path[h - 1])
                arrays[stem + "plane_true"], arrays[stem + "plane_shares"] = plane.points(path), np.array(plane.shares)
                arrays[stem + "plane_tipl"] = plane.points(path[h] + np.float32(0.6) * (path[h + 1 :] - path[h]))
                arrays[stem + "plane_linear"] = plane.points((path[h] + away).astype(np.float32))
    return arrays


def make_training() -> dict[str, Any]:
    steps = list(range(0, 3000, 50))
    loss = [0.02 * math.exp(-step / 600) + 0.001 for step in steps]
    heldout = [value * 1.1 + 1e-7 * step for step, value in zip(steps, loss, strict=True)]
    best = steps[int(np.argmin(heldout))]
    return {"steps": steps, "train_loss": loss, "validation_error": heldout, "seconds": 95.2, "num_parameters": 348_000,
            "best_step": best}  # fmt: skip


class Run:
    """A run folder to make reports of; `write` stores the (changed) results."""

    def __init__(
        self,
        folder: Path,
        *,
        num_trials: int = 6,
        num_heldout: int = 3,
        prefixes: tuple[float, ...] = PREFIXES,
        env_id: str = "InvertedPendulum-v5",
    ) -> None:
        self.evaluation, self.output = folder / "evaluation", folder / "report"
        self.training = folder / "model" / "training.json"
        self.evaluation.mkdir(parents=True)
        self.training.parent.mkdir()
        self.store = make_store(folder / "store.zarr", num_trials, 31, env_id)
        self.heldout = list(range(num_trials - num_heldout, num_trials))
        self.results = make_results(self.store, self.heldout, make_rows(self.store, self.heldout, prefixes))
        self.training.write_text(json.dumps(make_training()))
        write_manifest(self.training.parent)
        coordinates = make_coordinates(self.store, self.heldout, prefixes)
        safetensors.numpy.save_file(coordinates, self.evaluation / "coordinates.safetensors")
        self.write()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.results["rows"]

    def write(self) -> Path:
        path = self.evaluation / "results.json"
        path.write_text(json.dumps(self.results))
        write_manifest(self.evaluation)
        return path

    def leave_out(self, name: str) -> None:
        """Let the evaluation be without a file."""
        (self.evaluation / name).unlink()
        write_manifest(self.evaluation)

    def read(self) -> Results:
        return read_results(self.write())

    def report(self, **kwargs: Any) -> Path:
        arguments = {"evaluation": self.evaluation, "store": self.store, "training": self.training} | kwargs
        return write_report(self.output, **arguments)


def cell_of(row: dict[str, Any]) -> tuple[int, float, int]:
    """Return what a row shares with those of the other predictors."""
    return row["trial"], row["prefix"], row["horizon"]


def at_end(rows: list[dict[str, Any]], prefix: float, predictor: str, measure: str) -> list[float]:
    """Return a measure at the largest horizon, by trial."""
    chosen = [row for row in rows if row["prefix"] == prefix and row["predictor"] == predictor]
    last = max(row["horizon"] for row in chosen)
    return [row[measure] for row in sorted(chosen, key=lambda row: row["trial"]) if row["horizon"] == last]
