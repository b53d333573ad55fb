"""Linear regressions on a trajectory's own past: of its coordinates, and of its weights.

Shapes  N training trials, T checkpoints, p weights, G parameter tensors, k = n_components, h = prefix_end, n horizons,
        q the order of an autoregression, L penalties.

Penalties are chosen by cross-validation on training trials alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tipl.judging.training_path import TrainingPath, tensor_slices
from tipl.policy import Layout
from tipl.subspace.prefix import Prefix

PENALTIES = 10.0 ** np.arange(2, -6, -1)
"""Candidate penalties (L,), as shares of a regressor's own square. The strongest comes first, so that it wins ties."""

ORDERS = (1, 2, 4, 8, 16)
"""Candidate numbers of past differences that an autoregression sees."""

NUM_FOLDS = 4


@dataclasses.dataclass(frozen=True)
class Autoregression:
    """Each canonical coordinate's next difference is a fixed mixture of its last `q`, rolled out from the prefix."""

    coefficients: NDArray[np.float64]
    """The coefficient of each of the last q differences, the latest first, (q, k)."""

    @classmethod
    def fit(
        cls, training: Sequence[TrainingPath], prefix_end: int, coordinates: NDArray[np.float32]
    ) -> "Autoregression":
        """Regress differences after the prefix on those before them; order and penalty by the rollouts' mean error.

        `coordinates` (N, T, k) are the training paths' own, each in the basis of its prefix 0..`prefix_end`.
        """
        differences = np.diff(
            coordinates.astype(np.float64), axis=1
        )  # (N, T-1, k); what leads to checkpoint t is at t-1
        orders = [order for order in ORDERS if order <= prefix_end]
        last = differences.shape[1]
        target = differences[:, prefix_end:]  # (N, T-1-h, k)
        past = np.stack([differences[:, prefix_end - lag : last - lag] for lag in range(1, orders[-1] + 1)], 2)
        squares = np.einsum("nfqk,nfrk->nkqr", past, past, optimize=True)
        products = np.einsum("nfqk,nfk->nkq", past, target, optimize=True)
        walked = np.stack([path.walked(np.arange(prefix_end, last + 1)) for path in training])
        walked = walked[:, 1:] / walked[:, :1]  # (N, T-1-h), in the unit of the coordinates

        def fitted(trials: NDArray[np.int64], order: int) -> NDArray[np.float64]:
            """Return the coefficients (L, q, k) that `trials` teach."""
            found = _solve(squares[trials, :, :order, :order].sum(0), products[trials, :, :order].sum(0))
            return found.transpose(0, 2, 1)

        errors = np.zeros((len(orders), len(PENALTIES)))
        for others, fold in _folds(len(training)):
            for i, order in enumerate(orders):
                history = differences[fold, prefix_end - order : prefix_end][:, ::-1]  # (M, q, k), the latest first
                away = _roll_out(fitted(others, order), history, target.shape[1]) - np.cumsum(target[fold], 1)
                errors[i] += (np.linalg.norm(away, axis=-1) / walked[fold]).sum((1, 2))
        best = int(np.argmin(errors))
        order, penalty = orders[best // len(PENALTIES)], best % len(PENALTIES)
        return cls(fitted(np.arange(len(training)), order)[penalty])

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        order, n_components = self.coefficients.shape
        basis = prefix.basis(n_components)
        observed = basis.encode(prefix.weights[-1 - order :])  # (q+1, k)
        history = np.diff(observed.astype(np.float64), axis=0)[::-1]
        moved = _roll_out(self.coefficients[None], history[None], int(horizons.max()))[0, 0]
        return basis.decode((observed[-1] + moved[horizons - 1]).astype(np.float32))


def _roll_out(coefficients: NDArray[np.float64], history: NDArray[np.float64], num_steps: int) -> NDArray[np.float64]:
    """Return how far L autoregressions (L, q, k) move from the last of M histories (M, q, k) on, (L, M, steps, k)."""
    history = np.broadcast_to(history, (len(coefficients), *history.shape))
    steps = []
    for _ in range(num_steps):
        step = np.einsum("lqk,lmqk->lmk", coefficients, history)
        history = np.concatenate([step[:, :, None], history[:, :, :-1]], 2)
        steps.append(step)
    return np.cumsum(np.stack(steps, 2), 2)


@dataclasses.dataclass(frozen=True)
class Ridge:
    """Every weight moves on by a fixed mixture of its own displacements so far, one mixture for each parameter tensor.

    theta_{h+j} - theta_h = sum_i c_i (theta_i - theta_0), i = 1..h: the same c for all weights of a tensor and for all
    trials, and other coefficients for each horizon j. A trial has the weight 1 / |theta_{h+j} - theta_0|^2, so that the
    relative error is what is minimised.
    """

    layout: Layout
    horizons: NDArray[np.int64]
    """What it was fitted for, (n,)."""
    mixing: NDArray[np.float64]
    """The coefficients c, (n, G, h)."""
    penalties: NDArray[np.float64]
    """Those chosen, (n,)."""

    @classmethod
    def fit(cls, training: Sequence[TrainingPath], prefix_end: int, horizons: NDArray[np.int64]) -> "Ridge":
        """Solve the normal equations, which follow from the trials' Gram matrices without work on p weights.

        Each horizon's penalty has the least mean relative error at that horizon.
        """
        fits = [_fit_horizon(training, prefix_end, int(horizon)) for horizon in horizons]
        mixing, penalties = zip(*fits, strict=True)
        return cls(training[0].layout, horizons, np.stack(mixing), np.array(penalties))

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        chosen = self.mixing[fitted_rows("Ridge", self.horizons, horizons)]  # (n, G, h)
        weights = prefix.weights
        displacements = weights[1:] - weights[0]  # (h, p)
        forecast = np.empty((len(horizons), weights.shape[1]), np.float32)
        for i, columns in enumerate(tensor_slices(self.layout)):
            forecast[:, columns] = weights[-1, columns] + chosen[:, i] @ displacements[:, columns]
        return forecast


def _fit_horizon(training: Sequence[TrainingPath], prefix_end: int, horizon: int) -> tuple[NDArray[np.float64], float]:
    """Return the coefficients (G, h) for one horizon, and the penalty they were fitted with."""
    t, seen = prefix_end + horizon, slice(1, prefix_end + 1)
    weight = [1.0 / path.walked(t) ** 2 for path in training]
    products = [path.grams[:, seen, t] - path.grams[:, seen, prefix_end] for path in training]  # (G, h) each
    folds = _folds(len(training))
    # Sums over each fold: what the others teach is the total less the fold.
    squares_of = [sum(weight[i] * training[i].grams[:, seen, seen] for i in fold) for _, fold in folds]
    products_of = [sum(weight[i] * products[i] for i in fold) for _, fold in folds]
    squares, right = sum(squares_of), sum(products_of)  # (G, h, h), (G, h)
    errors = np.zeros(len(PENALTIES))
    for (_, fold), fold_squares, fold_products in zip(folds, squares_of, products_of, strict=True):
        c = _solve(squares - fold_squares, right - fold_products).swapaxes(0, 1)  # (G, L, h)
        for i in fold:
            path = training[i]
            moved = path.gram[t, t] - 2 * path.gram[t, prefix_end] + path.gram[prefix_end, prefix_end]
            explained = c * (2 * products[i][:, None] - c @ path.grams[:, seen, seen])  # (G, L, h)
            errors += np.sqrt(np.maximum(moved - explained.sum((0, 2)), 0.0) * weight[i])
    best = int(np.argmin(errors))
    return _solve(squares, right)[best], float(PENALTIES[best])


def _solve(squares: NDArray[np.float64], products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (A + penalty diag(A))^-1 b for every penalty, (L, ..., m), of A (..., m, m) and b (..., m).

    Where a regressor is zero throughout, so is its coefficient.
    """
    size = np.sqrt(np.diagonal(squares, axis1=-2, axis2=-1))  # (..., m)
    size = np.where(size > 0.0, size, 1.0)
    unit = squares / (size[..., :, None] * size[..., None, :])
    penalties = PENALTIES.reshape(-1, *[1] * unit.ndim)
    found = np.linalg.solve(unit + penalties * np.eye(unit.shape[-1]), (products / size)[None, ..., None])
    return np.asarray(found[..., 0] / size)


def _folds(num_trials: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return (other trials, trials of the fold) for each fold; with a single trial there are no others."""
    folds = [np.arange(first, num_trials, NUM_FOLDS) for first in range(min(NUM_FOLDS, num_trials))]
    return [(np.setdiff1d(np.arange(num_trials), fold), fold) for fold in folds]


def fitted_rows(name: str, fitted: NDArray[np.int64], horizons: NDArray[np.int64]) -> list[int]:
    """Return where each of `horizons` is in `fitted`. Raises ValueError where one is not."""
    rows = {int(horizon): row for row, horizon in enumerate(fitted)}
    if missing := [int(horizon) for horizon in horizons if int(horizon) not in rows]:
        raise ValueError(f"{name}.forecast: horizons must be among those fitted, {sorted(rows)}, got {missing}")
    return [rows[int(horizon)] for horizon in horizons]
