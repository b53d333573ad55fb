"""How far to trust a forecast policy: the probability that it beats the last policy seen, known before it is run.

Shapes  n horizons, h = prefix_end, F features, S samples, p weights.

A logistic regression on features of the forecast. It is fitted where the answer is known: forecasts for
validation trials, and for training trials where those are few, are run in the simulator, on the same episodes as the
policy at their prefix's end.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tipl.files.sealed import load_arrays, save_arrays

FloatArray = NDArray[np.float64]

FEATURES = ("seen", "ahead", "ratio", "step", "bend", "pace", "straightness", "refinement")
_PENALTY = 1.0
"""Weight of the squared coefficients of standardised features: a prior that each feature moves the odds by a factor of
about e."""
_BOUND = 4.0
"""Features are cut off at this many standard deviations."""


def features_of(
    prefix: NDArray[np.float32],
    forecast: NDArray[np.float32],
    unrefined: NDArray[np.float32],
    horizons: NDArray[np.int64],
    max_len: int,
) -> FloatArray:
    """Return features (n, F) of the forecast (n, p) for a prefix (h+1, p): its place, size, shape and refinement.

    They do not depend on the run's own scale or on the number of its weights. The features of one horizon have the same
    bits whichever other horizons are asked for: BLAS, whose order of sums depends on n, is not used.
    """
    h = len(prefix) - 1
    last = prefix[-1].astype(np.float64)
    walked, recent, step = (np.linalg.norm(last - prefix[i]) for i in (0, h // 2, h - 1))
    ahead = forecast - last  # (n, p)
    size = np.linalg.norm(ahead, axis=1)
    tiny = 1e-6 * walked
    columns = (
        np.full(len(horizons), h / max_len),
        horizons / max_len,
        np.log(horizons / h),
        np.log((size + tiny) / walked),
        np.full(len(horizons), np.log((recent + tiny) / walked)),
        np.full(len(horizons), np.log((step + tiny) / walked)),
        (ahead * (last - prefix[h // 2])).sum(1) / (size * recent + tiny**2),  # cosine
        np.log((np.linalg.norm(forecast - unrefined, axis=1) + tiny) / (size + tiny)),
    )
    return np.stack(columns, 1)


@dataclasses.dataclass(frozen=True)
class Confidence:
    """P(beats) = 1 / (1 + exp(-(intercept + coefficients . standardised features)))."""

    mean: FloatArray
    """Mean of the features in calibration, (F,)."""
    deviation: FloatArray
    """Their standard deviation, (F,)."""
    coefficients: FloatArray
    """(F,)"""
    intercept: FloatArray
    """(1,)"""

    @classmethod
    def fit(cls, features: FloatArray, beats: NDArray[np.bool_]) -> "Confidence":
        """Fit to outcomes (S,) of forecasts with features (S, F), by Newton's method on the penalised likelihood.

        The likelihood is concave. One outcome of each kind is added at the mean features (Laplace's rule), so that
        certainty is never claimed.
        """
        mean, deviation = features.mean(0), features.std(0)
        deviation = np.where(deviation > 1e-9, deviation, 1.0)
        x = np.pad(_standardised(features, mean, deviation), ((0, 2), (1, 0)))
        x[:, 0] = 1.0
        y = np.append(beats, (0.0, 1.0)).astype(float)
        penalty = np.full(x.shape[1], _PENALTY)
        penalty[0] = 0.0
        theta = np.zeros(x.shape[1])
        for _ in range(100):
            p = 1.0 / (1.0 + np.exp(-x @ theta))
            hessian = (x.T * (p * (1.0 - p))) @ x + np.diag(penalty)
            step = np.linalg.solve(hessian, x.T @ (y - p) - penalty * theta)
            theta = theta + step * min(1.0, 2.0 / np.abs(step).max())  # far from the optimum a full step overshoots
            if np.abs(step).max() < 1e-9:
                break
        return cls(mean, deviation, theta[1:], theta[:1])

    def __call__(self, features: FloatArray) -> FloatArray:
        """Return the probability (...) that forecasts with such features (..., F) beat the last policy seen."""
        odds = self.intercept + (_standardised(features, self.mean, self.deviation) * self.coefficients).sum(-1)
        return np.asarray(1.0 / (1.0 + np.exp(-odds)))

    def save(self, path: Path) -> None:
        save_arrays(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> "Confidence":
        """Return the confidence in `path`. Raises RuntimeError where the file is damaged."""
        arrays, _ = load_arrays(path, "Confidence.load")
        expected = {name: (len(FEATURES),) for name in ("mean", "deviation", "coefficients")} | {"intercept": (1,)}
        if {name: array.shape for name, array in arrays.items()} != expected or not all(
            np.isfinite(array).all() for array in arrays.values()
        ):
            raise RuntimeError(f"Confidence.load: {path} is damaged: expected finite arrays of the shapes {expected}")
        return cls(**arrays)


STRIDES = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Candidates, as multiples of the forecast displacement."""


@dataclasses.dataclass(frozen=True)
class Strides:
    """How far along a forecast displacement the policy of most return lies, for prefixes of different lengths."""

    seen: FloatArray
    """Prefix ends as shares of the path, ascending, (P,)."""
    factor: FloatArray
    """The stride for each, (P,); zero where no stride's mean gain exceeded its standard error."""

    @classmethod
    def fit(cls, seen: FloatArray, gains: FloatArray) -> "Strides":
        """Choose the stride with the largest mean gain in return for each prefix; gains (P, trials, len(STRIDES))."""
        factor = []
        for gain in gains:
            mean = gain.mean(0)
            best = int(np.argmax(mean))
            error = gain[:, best].std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.inf
            factor.append(STRIDES[best] if mean[best] > error else 0.0)
        return cls(seen, np.array(factor))

    def at(self, seen: float) -> float:
        """Return the stride for a prefix that ends at this share of the path, interpolated between its neighbours."""
        return float(np.interp(seen, self.seen, self.factor))

    def save(self, path: Path) -> None:
        save_arrays(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> "Strides":
        """Return the strides in `path`. Raises RuntimeError where the file is damaged."""
        arrays, _ = load_arrays(path, "Strides.load")
        if set(arrays) != {"seen", "factor"}:
            raise RuntimeError(
                f"Strides.load: {path} is damaged: expected the arrays seen and factor, got {list(arrays)}"
            )
        strides = cls(**arrays)
        if strides.seen.ndim != 1 or strides.seen.shape != strides.factor.shape or not strides.seen.size:
            raise RuntimeError(f"Strides.load: {path} is damaged: expected two arrays of one length")
        if not (np.isfinite(strides.seen).all() and np.isfinite(strides.factor).all()):
            raise RuntimeError(f"Strides.load: {path} holds NaN or Inf")
        return strides


def _standardised(features: FloatArray, mean: FloatArray, deviation: FloatArray) -> FloatArray:
    return np.clip((features - mean) / deviation, -_BOUND, _BOUND)


def expected_calibration_error(probability: Sequence[float], beats: Sequence[bool], num_bins: int = 10) -> float:
    """Return the mean over samples of |share that came true - mean probability| in the sample's bin.

    Guo et al. 2017, arXiv:1706.04599, with bins of equal width.
    """
    p, y = np.asarray(probability, float), np.asarray(beats, float)
    bins = np.minimum((p * num_bins).astype(int), num_bins - 1)
    gaps = [abs(y[bins == i].sum() - p[bins == i].sum()) for i in np.unique(bins)]
    return float(np.sum(gaps) / len(p))
