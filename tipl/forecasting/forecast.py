"""One run continued: its forecast weights, how far they are to be trusted, and how far to go along them.

Shapes  p weights, k = n_components, h = prefix_end, n horizons; a horizon counts checkpoints ahead of h.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tipl.forecasting.confidence import Confidence, Strides, features_of
from tipl.forecasting.refiner import Refiner
from tipl.policy import Layout
from tipl.subspace.basis import Basis


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What is forecast of one run at n horizons."""

    weights: NDArray[np.float32]
    """The forecast, refined, (n, p)."""
    unrefined: NDArray[np.float32]
    """What the Transformer forecasts in its basis, (n, p)."""
    confidence: NDArray[np.float64] | None
    """The predicted probability (n,) that the policy at each horizon beats the last one observed; None where the
    forecaster's confidence was not calibrated."""
    tuned: NDArray[np.float32] | None
    """Weights as far along the forecast's displacement as brought most return in calibration, (n, p), or None.

    Where much of the future is uncertain, the forecast of least weight error goes less far than the truth, so that a
    longer step may return more."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One run continued."""

    basis: Basis
    observed: NDArray[np.float32]
    """Coordinates of the prefix in the basis, (h+1, k)."""
    future: NDArray[np.float32]
    """Coordinates forecast for what follows, (n, k)."""
    prefix: NDArray[np.float32]
    """What was observed, (h+1, p)."""
    layout: Layout | None = None
    refiner: Refiner | None = None
    calibrated: Confidence | None = None
    strides: Strides | None = None
    max_len: int = 0
    trust: float = 1.0
    """Share of the displacement that is believed."""

    def at(self, horizons: Sequence[int] | NDArray[np.int64] | None = None) -> "Ahead":
        """Return all that is forecast at some `horizons` (n,) in checkpoints after the prefix, or at all of them."""
        chosen = self._chosen(horizons)
        last, unrefined = self.prefix[-1], self.in_basis(chosen)
        weights = self._refined(unrefined, chosen)
        confidence = tuned = None
        if self.calibrated is not None:
            confidence = self.calibrated(features_of(self.prefix, weights, unrefined, chosen, self.max_len))
        if self.strides is not None:
            tuned = _along(last, weights, self.strides.at((len(self.prefix) - 1) / self.max_len))
        return Ahead(weights, unrefined, confidence, tuned)

    def weights(self, horizons: Sequence[int] | NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Return the forecast weights (n, p), refined; `horizons` as in `at`."""
        chosen = self._chosen(horizons)
        return self._refined(self.in_basis(chosen), chosen)

    def tuned(self, horizons: Sequence[int] | NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Return `Ahead.tuned`. Raises ValueError where the forecaster was not calibrated."""
        tuned = self.at(horizons).tuned
        if tuned is None:
            raise ValueError(
                "forecast.tuned: the forecaster was trained without confidence_trials, or on several stores"
            )
        return tuned

    def confidence(self, horizons: Sequence[int] | NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Return `Ahead.confidence`. Raises ValueError where the forecaster's confidence was not calibrated."""
        confidence = self.at(horizons).confidence
        if confidence is None:
            raise ValueError("forecast.confidence: the forecaster was trained without confidence_trials")
        return confidence

    def _chosen(self, horizons: Sequence[int] | NDArray[np.int64] | None) -> NDArray[np.int64]:
        return np.arange(1, len(self.future) + 1) if horizons is None else np.asarray(horizons, np.int64)

    def _refined(self, weights: NDArray[np.float32], horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return what the forecast is, of what the Transformer forecasts at `horizons`, (n, p)."""
        if self.refiner is not None and self.layout is not None:
            weights = self.refiner.refine(self.prefix, self.layout, weights, horizons)
        return weights if self.trust == 1.0 else _along(self.prefix[-1], weights, self.trust)

    def in_basis(self, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the weights (n, p) that the Transformer forecasts, before they are refined."""
        return self.basis.decode(self.future[horizons - 1])


def _along(start: NDArray[np.float32], weights: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Return what lies a share of the way from start (p,) to weights (n, p); beyond them where it is above one."""
    return np.asarray(start + np.float32(share) * (weights - start), dtype=np.float32)
