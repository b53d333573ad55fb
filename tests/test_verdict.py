"""Bootstrap intervals, interquartile means, the share of the gain, rankings, and the words that are made of them."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from pages import text_of
from synthetic_run import Run, at_end, cell_of

from tipl.report.intervals import Bootstrap, Estimate, captured_gain, iqm, leaders, standings, tipl_leads
from tipl.report.page import fmt
from tipl.report.verdict import verdict


def words_of(run: Run) -> str:
    results = run.read()
    bootstrap = Bootstrap(len(results.trials))
    gains = {f: captured_gain(results, bootstrap, f) for f in results.prefixes}
    return text_of(verdict(results, bootstrap, gains))


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
    assert tipl_leads([("tipl", 1.0), ("tipl_gated", 1.0), ("ridge", 2.0)])
    assert not tipl_leads([("tipl_tuned", 0.9), ("tipl", 1.0), ("ridge", 2.0)])
    assert not tipl_leads([("ridge", 1.0), ("tipl", 1.0), ("linear", 2.0)])


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


def returns_of(run: Run, prefix: float, horizon: int, name: str) -> list[tuple[float, float]]:
    """(true, predicted) return by trial."""
    rows = [row for row in run.rows if (row["prefix"], row["horizon"], row["predictor"]) == (prefix, horizon, name)]
    return [(row["return_true"], row["return_predicted"]) for row in sorted(rows, key=lambda row: row["trial"])]


def test_shares_at_every_horizon_equal_slow_ones(tmp_path: Path) -> None:
    run = Run(tmp_path, num_trials=20, num_heldout=9, prefixes=(0.2, 0.6))
    results, bootstrap = run.read(), Bootstrap(9)
    counts = []
    for prefix in results.prefixes:
        for horizon in results.horizons[prefix].tolist():
            gain = captured_gain(results, bootstrap, prefix, horizon)
            noise = np.mean([abs(true - other) for true, other in returns_of(run, prefix, horizon, "return_floor")])
            start = [predicted for _, predicted in returns_of(run, prefix, horizon, "persistence")]
            assert gain.noise == pytest.approx(noise)
            for name in ("tipl", "linear"):
                shares = [
                    (predicted - begin) / (true - begin)
                    for begin, (true, predicted) in zip(start, returns_of(run, prefix, horizon, name), strict=True)
                    if true - begin > noise
                ]
                assert gain.num_gained == len(shares)
                if shares:
                    middle = scipy.stats.trim_mean(np.repeat(shares, 4), 0.25)
                    assert gain.iqm_shares[name].value == pytest.approx(middle)
                assert (name in gain.iqm_shares) == bool(shares)
            counts.append(gain.num_gained)
        assert captured_gain(results, bootstrap, prefix) == gain  # the last horizon is the end of the path
        assert not {"persistence", "return_floor"} & set(gain.iqm_shares)
    assert 0 < min(counts) < max(counts) == 9  # some trials do not gain, and are left out


def test_shares_by_hand(small: Run) -> None:
    """Three trials that gain 100, 10 and nothing; TIPL reaches half of the first gain and twice the second."""
    reached = {"tipl": (50.0, 20.0, 7.0), "persistence": (0.0, 0.0, 0.0), "return_floor": (101.0, 9.0, 1.0)}
    for row in small.rows:
        trial = small.heldout.index(row["trial"])
        row["return_true"] = (100.0, 10.0, 0.0)[trial]
        row["return_predicted"] = reached.get(row["predictor"], (100.0, 10.0, 0.0))[trial]
        row["repw"] = abs(row["return_true"] - row["return_predicted"])
    gain = captured_gain(small.read(), Bootstrap(3), 0.2)
    assert (gain.noise, gain.num_gained) == (1.0, 2)
    assert gain.iqm_shares["tipl"].value == pytest.approx((0.5 + 2.0) / 2)
    assert [gain.iqm_shares["tipl"].low, gain.iqm_shares["tipl"].high] == [0.5, 2.0]
    assert gain.iqm_shares["linear"] == Estimate(1.0, 1.0, 1.0)
    assert gain.iqm_ranking[0][0] == "tipl"
    assert gain.shares == {}  # one of three trials could undo the mean gain


# ---------------------------------------------------------------- rankings


def test_standings_by_hand(small: Run) -> None:
    errors = {"tipl": (0.1, 0.2, 0.9), "persistence": (0.2, 0.2, 0.2), "linear": (0.3, 0.3, 0.3)}
    small.results["rows"] = [row for row in small.rows if row["predictor"] in errors]
    for row in small.rows:
        row["wpe_relative"] = errors[row["predictor"]][small.heldout.index(row["trial"])]
    found = standings(small.read(), Bootstrap(3), "wpe_relative")
    assert [it.name for it in found] == ["persistence", "linear", "tipl"]
    assert [it.error.value for it in found] == pytest.approx([0.2, 0.3, 0.4])
    # Ranks by trial: tipl 1, 1.5 (shared), 3; persistence 2, 1.5, 1; linear 3, 3, 2.
    assert [it.rank.value for it in found] == pytest.approx([4.5 / 3, 8 / 3, 5.5 / 3])
    assert found[2].rank.low == 1.0
    assert found[2].rank.high == 3.0


def test_a_predictor_that_misses_a_prefix_of_every_trial_has_no_standing(small: Run) -> None:
    for row in small.rows:
        if row["predictor"] == "linear" and row["prefix"] == 0.6:
            row["wpe_relative"] = None
    names = [it.name for it in standings(small.read(), Bootstrap(3), "wpe_relative")]
    assert sorted(names) == ["mean_path", "persistence", "rank1", "tipl"]
    small.results["rows"] = [row for row in small.rows if row["predictor"] == "basis_floor"]
    assert standings(small.read(), Bootstrap(3), "wpe_relative") == []


# ---------------------------------------------------------------- interquartile means


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_iqm_is_the_trimmed_mean_of_four_copies(values: list[float]) -> None:
    expected = scipy.stats.trim_mean(np.repeat(values, 4), 0.25)
    assert iqm(np.array(values)[:, None])[0] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_iqm_by_hand() -> None:
    assert iqm(np.array([[1.0], [100.0], [2.0], [-50.0]])) == [1.5]  # as rliable's, where 4 divides n
    assert iqm(np.array([[3.0], [0.0], [900.0]])) == pytest.approx([(0.25 * 0 + 3 + 0.25 * 900) / 1.5])
    columns = np.array([[1.0, np.nan, np.nan], [np.nan, np.nan, 2.0], [3.0, np.nan, 4.0]])
    np.testing.assert_array_equal(iqm(columns), [2.0, np.nan, 3.0])


def test_resampled_iqms_equal_slow_ones() -> None:
    values = np.random.default_rng(6).standard_cauchy((9, 2))
    values[4, 1] = np.nan
    bootstrap = Bootstrap(9, num_resamples=200)
    for counts, fast in zip(bootstrap.counts.astype(int), bootstrap.iqms(values), strict=True):
        for column, got in zip(values.T, fast, strict=True):
            drawn = np.repeat(column, counts)
            assert got == pytest.approx(scipy.stats.trim_mean(np.repeat(drawn[np.isfinite(drawn)], 4), 0.25))


def test_an_outlier_moves_the_mean_but_not_the_iqm() -> None:
    values = np.random.default_rng(7).normal(5, 1, 40)
    outlier = values.copy()
    outlier[np.argmax(outlier)] = 1e6
    bootstrap = Bootstrap(40)
    before, after = bootstrap.estimate(values, "iqm"), bootstrap.estimate(outlier, "iqm")
    assert after == before
    assert before.low < before.value < before.high
    half_width = 1.96 * math.sqrt(1.19 / 40) * values.std()  # of normal values: 1.19 times the variance of the mean
    assert (before.high - before.low) / 2 == pytest.approx(half_width, rel=0.2)
    assert bootstrap.estimate(outlier).value > 1e4


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
