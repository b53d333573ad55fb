"""The report on confidence: reliability by hand and against a slow bootstrap, and what following it costs."""

import re
from pathlib import Path

import numpy as np
import pytest
from pages import text_of
from synthetic_run import Run, cell_of

from tipl.forecasting.confidence import expected_calibration_error
from tipl.report.confidence import confidence_section, reliability
from tipl.report.intervals import Bootstrap
from tipl.report.page import Html, fmt


def words_of(run: Run) -> str:
    results = run.read()
    section = confidence_section(results, Bootstrap(len(results.trials)), lambda plot, caption: Html(""))
    return text_of(section)


@pytest.fixture
def small(tmp_path: Path) -> Run:
    """A run to change, of nine held-out trials."""
    return Run(tmp_path, num_trials=12, num_heldout=9, prefixes=(0.2, 0.6))


def rows_of(run: Run, name: str) -> list[dict]:
    return [row for row in run.rows if row["predictor"] == name]


def add_gated(run: Run, cost: float = 0.0) -> None:
    """Add the gated forecast: TIPL where its confidence is one half, persistence elsewhere; `cost` is taken off."""
    last = {cell_of(row): row for row in rows_of(run, "persistence")}
    for row in rows_of(run, "tipl"):
        chosen = row if row["confidence"] >= 0.5 else last[cell_of(row)]
        gated = {key: value for key, value in chosen.items() if key != "confidence"}
        run.rows.append(gated | {"predictor": "tipl_gated", "return_predicted": chosen["return_predicted"] - cost})


def test_reliability_by_hand(tmp_path: Path) -> None:
    run = Run(tmp_path, prefixes=(0.4,))
    horizons = sorted({row["horizon"] for row in run.rows})[:2]
    run.results["rows"] = [row for row in run.rows if row["horizon"] in horizons]
    run.results["diversity"] = run.results["memorisation"] = []
    last = {cell_of(row): row["return_predicted"] for row in rows_of(run, "persistence")}
    p, y = [0.05, 0.05, 0.95, 0.95, 1.0, 0.55], [False, True, True, True, False, True]
    for row, probability, beats in zip(rows_of(run, "tipl"), p, y, strict=True):
        row["confidence"], row["return_predicted"] = probability, last[cell_of(row)] + (1.0 if beats else 0.0)
    found = reliability(run.read(), Bootstrap(3))
    assert found is not None
    assert found.counts.tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 3]
    np.testing.assert_allclose(found.probability[[0, 5, 9]], [0.05, 0.55, 2.9 / 3])
    np.testing.assert_allclose(found.frequency[[0, 5, 9]], [1 / 2, 1, 2 / 3])  # a tie does not beat
    assert np.isnan(found.frequency[1])
    assert found.error.value == pytest.approx((abs(1 - 0.1) + abs(2 - 2.9) + abs(1 - 0.55)) / 6)
    assert found.mean_probability == pytest.approx(sum(p) / 6)


def test_interval_of_the_error_equals_a_slow_one(small: Run) -> None:
    rng = np.random.default_rng(3)
    for row in rows_of(small, "tipl"):
        row["confidence"] = rng.uniform(0.1, 0.9)
    last = {cell_of(row): row["return_predicted"] for row in rows_of(small, "persistence")}
    trials: dict[int, list[tuple[float, bool]]] = {}
    for row in rows_of(small, "tipl"):
        beats = row["return_predicted"] > last[cell_of(row)]
        trials.setdefault(row["trial"], []).append((row["confidence"], beats))

    def error(drawn: list[int]) -> float:
        return expected_calibration_error(*zip(*(pair for trial in drawn for pair in trials[trial]), strict=True))

    value = error(small.heldout)
    errors = [error(rng.choice(small.heldout, len(small.heldout)).tolist()) for _ in range(2000)]
    found = reliability(small.read(), Bootstrap(9))
    assert found is not None
    assert found.error.value == pytest.approx(value)
    high, low = 2 * value - np.percentile(errors, [2.5, 97.5])
    assert (found.error.low, found.error.high) == pytest.approx((max(low, 0), high), abs=0.01)


def test_a_gate_that_never_loses(small: Run) -> None:
    add_gated(small)
    text = words_of(small)
    assert "Following the gated forecast never loses return beyond the interval" in text
    assert "followed always, TIPL loses nowhere" in text
    assert "TIPL, gated" in text


def test_a_gate_that_loses_says_where(small: Run) -> None:
    add_gated(small, cost=500.0)
    text = words_of(small)
    gained = {}
    last = {cell_of(row): row["return_predicted"] for row in rows_of(small, "persistence")}
    for row in rows_of(small, "tipl_gated"):
        gained.setdefault(cell_of(row)[1:], []).append(row["return_predicted"] - last[cell_of(row)])
    (prefix, horizon), worst = min(gained.items(), key=lambda item: np.mean(item[1]))
    start = "Following the gated forecast loses return: "
    assert re.search(rf"{start}{fmt(-np.mean(worst))} \[[^]]*\] at prefix {100 * prefix:g} %, {horizon} ahead", text), (
        text
    )
    assert re.search(r"; at \d+ of 16 prefixes and horizons in all\.", text)


def test_a_gate_that_stays_shut(small: Run) -> None:
    for row in rows_of(small, "tipl"):
        row["confidence"] = 0.2
    add_gated(small)
    assert "It follows TIPL nowhere, so that it gains nothing either." in words_of(small)


def test_results_without_a_gate_or_returns(small: Run) -> None:
    assert "These results hold no returns of the gated forecast." in words_of(small)
    for row in small.rows:
        row["return_predicted"] = None
    assert "These results hold no confidence" in words_of(small)
