"""Bootstrap intervals, the share of the gain, and the words that are made of them."""

import html
import math
import re
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import Run, at_end, cell_of

from tipl.report.estimates import Bootstrap, Estimate, captured_gain, leaders
from tipl.report.page import fmt
from tipl.report.plots import NBSP
from tipl.report.verdict import verdict


def words_of(run: Run) -> str:
    results = run.read()
    bootstrap = Bootstrap(len(results.trials))
    gains = {f: captured_gain(results, bootstrap, f) for f in results.prefixes}
    return html.unescape(re.sub(r"<[^>]*>", "", verdict(results, bootstrap, gains))).replace(NBSP, " ")


@pytest.fixture
def small(tmp_path: Path) -> Run:
    """A run to change and damage."""
    return Run(tmp_path, prefixes=(0.2, 0.6))


def test_verdict_says_what_the_numbers_say(tmp_path: Path) -> None:
    run = Run(tmp_path, num_trials=10, num_heldout=9)
    text = words_of(run)
    assert "better than every other predictor, at every prefix." in text
    assert text.count("40 % lower") == 4  # TIPL goes four tenths of the way
    tipl, persistence = (np.mean(at_end(run.rows, 0.4, n, "wpe_relative")) for n in ("tipl", "persistence"))
    assert re.search(rf"at the end of the path is {fmt(tipl)} \[[^]]*\], persistence's {fmt(persistence)}: 40 %", text)
    assert "more than every other predictor at 1 of these 4 prefixes" in text  # linear reaches further in return


def test_verdict_of_a_loss_and_of_a_lead_within_the_noise(small: Run) -> None:
    factor = dict(zip(small.heldout, (0.85, 1.0, 1.05), strict=True))
    persistence = {cell_of(row): row["wpe_relative"] for row in small.rows if row["predictor"] == "persistence"}
    for row in small.rows:
        if row["predictor"] == "tipl":
            row["wpe_relative"] = persistence[cell_of(row)] * (2.0 if row["prefix"] == 0.2 else factor[row["trial"]])
        elif row["predictor"] != "persistence":
            row["wpe_relative"] *= 10
    text = words_of(small)
    assert "at 1 of 2 prefixes: 60 %. At 60 % its lead is within the noise of the trials." in text
    assert "100 % higher" in text
    assert "✗ Not the best: persistence," in text
    assert "The interval includes zero: a difference within the noise" in text


def test_equals_are_no_winners(small: Run) -> None:
    for row in small.rows:
        row["wpe_relative"] = 0.5 if row["predictor"] in ("tipl", "linear") else 0.7
    assert "TIPL is not the best forecast of the weights at the end of the path, at any prefix." in words_of(small)
    assert leaders([("a", 1.0), ("b", 1.0), ("c", 2.0)]) == {"a", "b"}
    assert leaders([("a", 1.0), ("b", 1.0)]) == set()


def test_tipl_alone_has_nothing_to_be_compared_with(small: Run) -> None:
    small.results["rows"] = [row for row in small.rows if row["predictor"] in ("tipl", "basis_floor")]
    assert "These results hold no other predictor to compare TIPL with." in words_of(small)


def test_no_gain_is_called_so(small: Run) -> None:
    for row in small.rows:
        if row["prefix"] == 0.6:
            row["return_true"] = row["return_predicted"] = 1000.0
            row["repw"] = 0.0
    text = words_of(small)
    assert "After 60 % of the path no gain in return stands out of the noise." in text
    assert "Return: no gain to capture (the true future's is 0 [0, 0], the return noise 0)." in text


def test_a_tiny_gain_in_one_trial_does_not_blow_up_the_share(tmp_path: Path) -> None:
    run = Run(tmp_path, num_trials=10, num_heldout=9)
    start = {cell_of(row): row["return_predicted"] for row in run.rows if row["predictor"] == "persistence"}
    for row in run.rows:
        if row["trial"] == run.heldout[0]:
            row["return_true"] = start[cell_of(row)] + 1e-9
    share = captured_gain(run.read(), Bootstrap(9), 0.2).shares["tipl"]
    assert 0 < share.low < share.value < share.high < 2


def test_a_gain_that_one_trial_alone_could_undo_is_not_shared_out(small: Run) -> None:
    for row in small.rows:
        if row["trial"] == small.heldout[0]:
            row["return_true"] = row["return_predicted"]
    assert "Return: the gain is too uncertain to share out (the true future's is" in words_of(small)


# ---------------------------------------------------------------- intervals


def test_interval_agrees_with_the_normal_theory_and_repeats() -> None:
    values = np.random.default_rng(3).normal(5, 2, 60)
    estimate = Bootstrap(60).estimate(values)
    half_width = 1.96 * values.std() / math.sqrt(60)
    assert estimate.value == pytest.approx(values.mean())
    assert [estimate.low, estimate.high] == pytest.approx(
        values.mean() + half_width * np.array([-1, 1]), abs=0.1 * half_width
    )
    assert Bootstrap(60).estimate(values) == estimate
    assert Bootstrap(60, seed=1).estimate(values) != estimate


def test_interval_resamples_trials_not_rows() -> None:
    values = np.random.default_rng(4).normal(size=(12, 1))
    bootstrap = Bootstrap(12)
    mean, low, high = bootstrap.curve(np.repeat(values, 5, axis=1))  # five horizons that all say the same
    assert np.ptp(low) == np.ptp(high) == 0
    assert bootstrap.estimate(values[:, 0]) == Estimate(mean[0], low[0], high[0])


def test_ratio_is_paired() -> None:
    reference = np.random.default_rng(5).uniform(1, 100, 15)
    ratio = Bootstrap(15).ratio(0.7 * reference, reference)
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([0.7, 0.7, 0.7])


def test_missing_values_are_left_out_and_one_trial_has_no_interval() -> None:
    bootstrap = Bootstrap(3)
    assert bootstrap.estimate(np.array([1.0, np.nan, 3.0])).value == 2.0
    assert not bootstrap.estimate(np.array([1.0, np.nan, np.nan])).has_interval
    assert math.isnan(bootstrap.estimate(np.full(3, np.nan)).value)
    assert Bootstrap(1).estimate(np.array([4.0])).value == 4.0
    assert not Bootstrap(1).estimate(np.array([4.0])).has_interval
