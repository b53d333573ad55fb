"""Means over held-out trials with bootstrap intervals, and the share of the future gain that forecasts capture.

Trials are the unit of chance: the horizons of one trial are correlated, so that every interval resamples trials, never
rows. Values are (n, H) over n trials and H horizons, or (n,) at one horizon; NaN is a missing value.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tipl.report.results import FloatArray, Results, predictor_info


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over trials and its 95 % interval; the bounds are NaN where there are too few trials for one."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


class Bootstrap:
    """Percentile bootstrap over n trials: one set of resamples, drawn from `seed`, serves all statistics.

    So differences and ratios of two predictors are paired, and the same results always give the same report.
    """

    def __init__(self, num_trials: int, *, num_resamples: int = 10_000, seed: int = 0) -> None:
        uniform = np.full(num_trials, 1 / num_trials)
        # How often each trial is drawn in each resample, (resamples, n): a resample's mean is a matrix product.
        self.counts: FloatArray = (
            np.random.default_rng(seed).multinomial(num_trials, uniform, num_resamples).astype(float)
        )

    def means(self, values: FloatArray) -> FloatArray:
        """Return the mean over trials in each resample (resamples, H) of values (n, H), NaN values left out."""
        is_there = np.isfinite(values)
        total = self.counts @ np.where(is_there, values, 0.0)
        count = self.counts @ is_there.astype(float)
        return _quotient(total, count)

    def curve(self, values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return mean, lower and upper bound (H,) each, of values (n, H)."""
        return mean(values), *_interval(self.means(values), np.isfinite(values).sum(0))

    def estimate(self, values: FloatArray) -> Estimate:
        """Return the mean of values (n,) and its interval."""
        return Estimate(*(float(bound[0]) for bound in self.curve(values[:, None])))

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
    """Return the mean over trials (H,) of values (n, H), NaN values left out, NaN where there is none."""
    is_there = np.isfinite(values)
    return _quotient(np.where(is_there, values, 0.0).sum(0), is_there.sum(0))


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
        percentile = np.nanpercentile if np.isnan(drawn).any() else np.percentile  # the first is very slow
        low[enough], high[enough] = percentile(drawn, [2.5, 97.5], axis=0)
    return low, high


def ranking(results: Results, measure: str, prefix: float) -> list[tuple[str, float]]:
    """Return the real predictors with their mean `measure` at the end of the path, the smallest error first."""
    ends = {name: float(mean(results.at_end(measure, prefix, name)[:, None])[0]) for name in results.predictors}
    return sorted(((name, value) for name, value in ends.items() if math.isfinite(value)), key=lambda item: item[1])


def leaders(ranked: Sequence[tuple[str, float]]) -> set[str]:
    """Return the names that share the first value of a ranking; none where all do."""
    first = {name for name, value in ranked if value == ranked[0][1]}
    return first if len(first) < len(ranked) else set()


@dataclasses.dataclass(frozen=True)
class Gain:
    """What the return gains between the prefix's end and the path's end, and the share of it that forecasts reach."""

    future: Estimate  # mean of R(true) - R(prefix end)
    noise: float  # mean difference of the true policy's return on two sets of episode seeds; NaN where not measured
    shares: dict[str, Estimate]  # (R(forecast) - R(prefix end)) / (R(true) - R(prefix end)); empty without a clear gain

    @property
    def is_measured(self) -> bool:
        return math.isfinite(self.future.value)

    @property
    def is_there(self) -> bool:
        """Whether the mean gain exceeds the return noise."""
        return self.future.value > self._threshold

    @property
    def is_clear(self) -> bool:
        """Whether the whole interval does (the value, where one trial has no interval)."""
        return (self.future.low if self.future.has_interval else self.future.value) > self._threshold

    @property
    def ranking(self) -> list[tuple[str, float]]:
        """The real predictors with the share that they capture, the largest first."""
        real = [(name, share.value) for name, share in self.shares.items() if not predictor_info(name).is_floor]
        return sorted(real, key=lambda item: -item[1])

    @property
    def _threshold(self) -> float:
        return 0.0 if math.isnan(self.noise) else self.noise


def captured_gain(results: Results, bootstrap: Bootstrap, prefix: float) -> Gain:
    """Return the gain in return at the end of the path, and the predictors' shares of it: ratios of means over trials.

    Shares are given only where the gain's interval lies above the return noise: then no resample that matters has a
    denominator near zero.
    """
    start = results.at_end("return_predicted", prefix, "persistence")  # (n,), R(prefix end)
    future = results.at_end("return_true", prefix, "persistence") - start
    noise = float(mean(results.at_end("repw", prefix, "return_floor")[:, None])[0])
    gain = Gain(bootstrap.estimate(future), noise, {})
    if not gain.is_clear:
        return gain
    names = [n for n in results.names if n not in ("persistence", "return_floor")]
    shares = {n: bootstrap.ratio(results.at_end("return_predicted", prefix, n) - start, future) for n in names}
    return dataclasses.replace(gain, shares={n: share for n, share in shares.items() if math.isfinite(share.value)})
