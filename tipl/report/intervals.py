"""Means over held-out trials with bootstrap intervals, and the share of the future gain that forecasts capture.

Only trials are independent: the horizons of one trial are correlated, so every interval resamples trials, never rows.
Values are (n, H) over n trials and H horizons, or (n,) at one horizon; NaN is a missing value.

The interquartile mean (IQM), the mean of the middle half, is used where a few trials could outweigh all others, as
Agarwal et al. 2021 (arXiv 2108.13264) recommend. Their library rliable drops a quarter of the values at each end,
rounded down to whole values; here a value on the border counts in part, so that repeating every value leaves the IQM
unchanged.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tipl.report.predictor_info import predictor_info
from tipl.report.results import FloatArray, Results

Statistic = Literal["mean", "iqm"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic over trials and its 95 % interval; the bounds are NaN where there are too few trials for one."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


class Bootstrap:
    """Percentile bootstrap over n trials. All statistics use the same resamples, drawn from `seed`.

    Differences and ratios of two predictors are therefore paired, and equal results always give equal reports.
    """

    def __init__(self, num_trials: int, *, num_resamples: int = 10_000, seed: int = 0) -> None:
        uniform = np.full(num_trials, 1 / num_trials)
        # How often each trial occurs in each resample, (resamples, n), so that means are one matrix product.
        self.counts: FloatArray = (
            np.random.default_rng(seed).multinomial(num_trials, uniform, num_resamples).astype(float)
        )

    def means(self, values: FloatArray) -> FloatArray:
        """Return the mean over trials in each resample, (resamples, H), of values (n, H); NaN values are left out."""
        is_there = np.isfinite(values)
        total = self.counts @ np.where(is_there, values, 0.0)
        count = self.counts @ is_there.astype(float)
        return _quotient(total, count)

    def iqms(self, values: FloatArray) -> FloatArray:
        """Return the interquartile mean over trials in each resample (resamples, H) of values (n, H)."""
        return _iqms(values, self.counts)

    def curve(self, values: FloatArray, statistic: Statistic = "mean") -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the mean or IQM of values (n, H), and its lower and upper bounds, (H,) each."""
        center, resampled = (
            (mean(values), self.means(values)) if statistic == "mean" else (iqm(values), self.iqms(values))
        )
        return center, *_interval(resampled, np.isfinite(values).sum(0))

    def estimate(self, values: FloatArray, statistic: Statistic = "mean") -> Estimate:
        """Return the mean or IQM of values (n,) and its interval."""
        return Estimate(*(float(bound[0]) for bound in self.curve(values[:, None], statistic)))

    def ratio(self, numerator: FloatArray, denominator: FloatArray) -> Estimate:
        """Return mean(numerator) / mean(denominator) of two (n,) arrays, over the trials that have both."""
        has_both = np.isfinite(numerator) & np.isfinite(denominator)
        pair = np.where(has_both[:, None], np.stack([numerator, denominator], 1), np.nan)  # (n, 2)
        center, resampled = mean(pair), self.means(pair)
        if not center[1]:
            return Estimate(math.nan)
        ratios = _quotient(resampled[:, :1], resampled[:, 1:])
        low, high = _interval(ratios, has_both.sum(keepdims=True))
        return Estimate(float(center[0] / center[1]), float(low[0]), float(high[0]))


def mean(values: FloatArray) -> FloatArray:
    """Return the mean over trials (H,) of values (n, H); NaN values are left out, NaN where no others are."""
    is_there = np.isfinite(values)
    return _quotient(np.where(is_there, values, 0.0).sum(0), is_there.sum(0))


def iqm(values: FloatArray) -> FloatArray:
    """Return the interquartile mean over trials (H,) of values (n, H); NaN as in `mean`."""
    middle: FloatArray = _iqms(values, np.ones((1, len(values))))[0]
    return middle


def _iqms(values: FloatArray, counts: FloatArray) -> FloatArray:
    """Return the IQMs (R, H) of values (n, H) in R resamples, where trial i occurs counts[r, i] times."""
    iqms = np.empty((len(counts), values.shape[1]))
    for column, middle in zip(values.T, iqms.T, strict=True):
        order = np.argsort(column)[: np.isfinite(column).sum()]  # NaN sorts last
        drawn = counts[:, order]
        last = drawn.cumsum(1)  # rank of each trial's last copy
        total = last[:, -1:] if len(order) else np.zeros((len(counts), 1))
        within = np.minimum(last, 0.75 * total) - np.maximum(last - drawn, 0.25 * total)
        middle[:] = _quotient(np.maximum(within, 0.0) @ column[order], 0.5 * total[:, 0])
    return iqms


def _quotient(numerator: FloatArray, denominator: NDArray[np.generic]) -> FloatArray:
    """Return the elementwise quotient of two arrays of one shape, NaN where the denominator is zero."""
    quotient: FloatArray = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


def _interval(resampled: FloatArray, num_values: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
    """Return the 2.5 % and 97.5 % percentiles (H,) of (resamples, H); NaN where fewer than two trials have a value."""
    low, high = np.full((2, resampled.shape[1]), np.nan)
    enough = num_values >= 2
    if enough.any():
        drawn = resampled[:, enough]
        percentile = np.nanpercentile if np.isnan(drawn).any() else np.percentile  # nanpercentile is very slow
        low[enough], high[enough] = percentile(drawn, [2.5, 97.5], axis=0)
    return low, high


def ranking(results: Results, measure: str, prefix: float, statistic: Statistic = "mean") -> list[tuple[str, float]]:
    """Return (predictor, mean or IQM of `measure` at the path's end) without floors, smallest error first."""
    center = mean if statistic == "mean" else iqm
    ends = {name: float(center(results.at_end(measure, prefix, name)[:, None])[0]) for name in results.predictors}
    return sorted(((name, value) for name, value in ends.items() if math.isfinite(value)), key=lambda item: item[1])


@dataclasses.dataclass(frozen=True)
class Standing:
    """A predictor's mean error at the end of the path, and its mean rank there (1 is the best), over all prefixes."""

    name: str
    error: Estimate
    rank: Estimate


def standings(results: Results, bootstrap: Bootstrap, measure: str) -> list[Standing]:
    """Return the standings of all predictors but the floors, smallest mean `measure` first.

    Means are over trials and prefixes, intervals over trials. Equal errors share the mean of their ranks. A trial
    counts only where the predictor has a value at every prefix.
    """
    names = results.predictors
    if not names:
        return []
    ends = np.array([[results.at_end(measure, f, n) for f in results.prefixes] for n in names])  # (P, F, n)
    below, equal = (compare(ends[None], ends[:, None]).sum(1) for compare in (np.less, np.equal))
    ranks = np.where(np.isfinite(ends), below + (equal + 1) / 2, np.nan)
    found = [
        Standing(name, bootstrap.estimate(error), bootstrap.estimate(rank))
        for name, error, rank in zip(names, ends.mean(1), ranks.mean(1), strict=True)
    ]
    return sorted((it for it in found if math.isfinite(it.error.value)), key=lambda it: it.error.value)


def leaders(ranked: Sequence[tuple[str, float]]) -> set[str]:
    """Return the names that share the first value of a ranking; none where all names share it."""
    first = {name for name, value in ranked if value == ranked[0][1]}
    return first if len(first) < len(ranked) else set()


OWN = ("tipl", "tipl_gated", "tipl_tuned")
"""TIPL and the predictors derived from its forecasts, which often equal it: gated, and with tuned strides."""


def tipl_leads(ranked: Sequence[tuple[str, float]]) -> bool:
    """Return whether TIPL comes first in a ranking, sharing the first place with members of `OWN` at most."""
    first = leaders(ranked)
    return "tipl" in first and first <= set(OWN)


@dataclasses.dataclass(frozen=True)
class Gain:
    """The gain in return from the prefix's end to a later checkpoint, and the share of it that forecasts capture.

    A share is (R(forecast) - R(prefix end)) / (R(true) - R(prefix end)).
    """

    future: Estimate  # mean of R(true) - R(prefix end)
    noise: float  # mean difference of the true policy's return on two sets of episode seeds; NaN where not measured
    shares: dict[str, Estimate]  # ratios of means over trials; empty without a clear gain
    num_gained: int  # trials whose own gain exceeds the noise
    iqm_shares: dict[str, Estimate]  # IQM of these trials' own shares; empty where there is none

    @property
    def is_measured(self) -> bool:
        return math.isfinite(self.future.value)

    @property
    def is_there(self) -> bool:
        """Whether the mean gain lies above the return noise."""
        return self.future.value > self.threshold

    @property
    def is_clear(self) -> bool:
        """Whether the mean gain's whole interval does; where a single trial has no interval, whether its gain does."""
        return (self.future.low if self.future.has_interval else self.future.value) > self.threshold

    @property
    def ranking(self) -> list[tuple[str, float]]:
        """(predictor, captured share as a ratio of means) without floors, largest first."""
        return _largest_first(self.shares)

    @property
    def iqm_ranking(self) -> list[tuple[str, float]]:
        """(predictor, IQM of the trials' shares) without floors, largest first."""
        return _largest_first(self.iqm_shares)

    @property
    def threshold(self) -> float:
        """The return noise: smaller gains are chance. Zero where the noise was not measured."""
        return 0.0 if math.isnan(self.noise) else self.noise


def _largest_first(shares: Mapping[str, Estimate]) -> list[tuple[str, float]]:
    real = [(name, share.value) for name, share in shares.items() if not predictor_info(name).is_floor]
    return sorted(real, key=lambda item: -item[1])


def captured_gain(results: Results, bootstrap: Bootstrap, prefix: float, horizon: int | None = None) -> Gain:
    """Return the gain in return at `horizon`, by default the end of the path, and the predictors' shares of it.

    Ratios of means are given only where the mean gain's interval lies above the return noise, so that hardly any
    resample has a denominator near zero. IQMs are over trials whose own gain lies above the noise, so that no share has
    one.
    """
    start = results.at("return_predicted", prefix, "persistence", horizon)  # (n,), R(prefix end)
    future = results.at("return_true", prefix, "persistence", horizon) - start
    noise = float(mean(results.at("repw", prefix, "return_floor", horizon)[:, None])[0])
    gain = Gain(bootstrap.estimate(future), noise, {}, 0, {})
    gained = future > gain.threshold  # (n,), False where the gain is not known
    names = [n for n in results.names if n not in ("persistence", "return_floor")]
    gains = {n: results.at("return_predicted", prefix, n, horizon) - start for n in names}
    shares = {n: bootstrap.ratio(gains[n], future) for n in names} if gain.is_clear else {}
    own_share = {n: np.divide(gains[n], future, out=np.full(len(future), np.nan), where=gained) for n in names}
    iqm_shares = {n: bootstrap.estimate(own_share[n], "iqm") for n in names} if gained.any() else {}
    return dataclasses.replace(gain, shares=_known(shares), num_gained=int(gained.sum()), iqm_shares=_known(iqm_shares))


def _known(shares: Mapping[str, Estimate]) -> dict[str, Estimate]:
    return {name: share for name, share in shares.items() if math.isfinite(share.value)}
