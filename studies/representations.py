"""Ways to represent a checkpoint by few numbers and to forecast these, for `compare_representations.py`.

Shapes  T checkpoints, p weights, h = prefix_end, N tokens of a kind, d weights and c numbers per token, B batch.

A path is theta_t - theta_0 in units of |theta_h - theta_0|. All representations reproduce theta_h exactly: the part of
a displacement after h that they cannot express is taken to be zero. No basis uses checkpoints after h.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training import Trainer, fit
from tipl.forecasting.training_data import Case, Examples, TrainingData, Validation, Written
from tipl.judging.regression import PENALTIES
from tipl.policy import Layout
from tipl.subspace.basis import Basis, prefix_coordinates
from tipl.subspace.prefix_end import MIN_PREFIX_END
from tipl.subspace.running_gram import gram

Tokens = list[NDArray[np.int64]]
"""For each kind of token an array (N, d): the indices of the d weights in each of its N tokens."""
Weights = NDArray[np.float32]
"""The weights of a trial, (T, p), or of one checkpoint, (p,)."""
Coordinates = Callable[[Weights, Sequence[int]], list[NDArray[np.float32]]]
"""(path (T, p), prefix ends) -> coordinates (T, k) of the path for each prefix end."""
Errors = list[list[float]]
"""Errors of held-out trials, (prefixes, n)."""


def tokens_of(layout: Layout, by: str) -> Tokens:
    """Return the tokens of a policy by "whole", "layer", "kind" (matrices, biases, log_std), "row" or "neuron".

    A row is a neuron's incoming weights and bias; a neuron is a hidden one with its outgoing weights too, so that a
    weight between two hidden neurons is held by both, and a last kind of one token has what no hidden neuron holds.
    """
    parts = {name: offset + np.arange(int(np.prod(shape))) for name, (offset, shape) in layout.layout.items()}
    if by in ("whole", "layer", "kind"):
        groups: dict[str, list[NDArray[np.int64]]] = {}
        for name, columns in parts.items():
            layer, _, kind = name.rpartition(".")
            groups.setdefault({"whole": "", "layer": layer or name, "kind": kind}[by], []).append(columns)
        return [np.concatenate(group)[None] for group in groups.values()]
    matrices = {name: parts[name].reshape(shape) for name, shape in layout.shapes.items() if len(shape) > 1}
    rows = [np.column_stack([m, parts[name.replace("weight", "bias")]]) for name, m in matrices.items()]
    if by == "row":
        return [*rows, parts["log_std"][None]]
    neurons = [np.hstack([row, ahead.T]) for row, ahead in zip(rows[:-1], list(matrices.values())[1:], strict=True)]
    held = np.concatenate([it.ravel() for it in neurons])
    return [*neurons, np.setdiff1d(np.arange(layout.num_params), held)[None]]


def relative_error(forecast: Weights, path: Weights) -> float:
    """Return how far a forecast (p,) is from the end of a path, as a share of how far that is from theta_0."""
    return float(np.linalg.norm(forecast - path[-1]) / np.linalg.norm(path[-1] - path[0]))


def grams_of(path: Weights, tokens: Tokens) -> list[NDArray[np.float64]]:
    """Return the Gram matrices (N, T, T) of theta_t - theta_0 of every token, an array a kind."""
    parts = [[np.ascontiguousarray(path[:, columns]) for columns in kind] for kind in tokens]
    return [np.stack([gram(part, origin=part[0]) for part in kind]) for kind in parts]


def svd_coordinates(grams: NDArray[np.float64], end: int, width: int, unit: float) -> NDArray[np.float32]:
    """Return the coordinates (T, N, c) of tokens, each in its own prefix's basis; zeros if it stood still."""
    coordinates = np.zeros((grams.shape[1], len(grams), width), np.float32)
    for i, token in enumerate(grams):
        if token[end, end] > 0.0:
            coordinates[:, i] = prefix_coordinates(token, end, width) * np.sqrt(token[end, end]) / unit
    return coordinates


def grouped_coordinates(
    grams: Sequence[NDArray[np.float64]], end: int, widths: Sequence[int], unit: float
) -> NDArray[np.float32]:
    """Return the coordinates (T, k) of kinds of one token each, the first of each first: padding is last."""
    parts = [svd_coordinates(kind, end, width, unit)[:, 0] for kind, width in zip(grams, widths, strict=True)]
    return np.concatenate(parts, 1)[:, interleaved(widths)]


def interleaved(widths: Sequence[int]) -> NDArray[np.int64]:
    """Return where the first, second, ... coordinates of all groups are, when one group stands after the other."""
    return np.argsort(np.concatenate([np.arange(width) for width in widths]), kind="stable")


def deal_widths(
    trials: Sequence[Sequence[NDArray[np.float64]]], ends: Sequence[int], sizes: Sequence[int], k: int
) -> list[int]:
    """Deal k coordinates to kinds of one token each, (n,): one each, then to where the next one lowers the floor most.

    `trials` are the Gram matrices of training trials, `sizes` the weights that a kind has; the floor counts at the ends
    of paths, as a share of |theta_{T-1} - theta_0|^2, for the mean of the trials and of the prefix ends.
    """
    gains = np.zeros((len(sizes), k))  # what the j-th coordinate of a kind holds of what is ahead
    for grams in trials:
        walked = sum(kind[0, -1, -1] for kind in grams)
        for end in ends:
            for gain, kind in zip(gains, grams, strict=True):
                moved = svd_coordinates(kind, end, k, 1.0)[[end, -1], 0]
                gain += (moved[1] - moved[0]) ** 2 / walked
    widths = [1] * len(sizes)
    while sum(widths) < k:
        following = [gain[w] if w < size else -1.0 for gain, w, size in zip(gains, widths, sizes, strict=True)]
        widths[int(np.argmax(following))] += 1
    return widths


def cut_coordinates(grams: NDArray[np.float64], end: int, k: int, unit: float) -> NDArray[np.float32]:
    """Return coordinates (T, G k at most) on the prefix's k directions cut into G tensors with grams (G, T, T)."""
    seen = slice(0, end + 1)
    directions = np.linalg.eigh(grams.sum(0)[seen, seen])[1][:, ::-1][:, : min(k, end)]  # as mixtures of checkpoints
    parts = []
    for tensor in grams:
        squares, mixing = np.linalg.eigh(directions.T @ tensor[seen, seen] @ directions)
        kept = squares > 1e-9 * squares[-1]  # a tensor has no more directions than weights
        parts.append(tensor[:, seen] @ directions @ mixing[:, kept] / np.sqrt(squares[kept]) / unit)
    return np.concatenate(parts, 1).astype(np.float32)


def orthonormal(path: Weights, end: int, coordinates: NDArray[np.float32]) -> Written:
    """Return a path in the coordinates (T, k) of orthonormal directions, and what lies outside them."""
    unit = np.linalg.norm(path[end] - path[0])
    since, distances = (np.linalg.norm(path - path[t], axis=1).astype(np.float64) / unit for t in (end, 0))
    inside = np.linalg.norm(coordinates.astype(np.float64) - coordinates[end], axis=1)
    return coordinates, distances, np.sqrt(np.maximum(since**2 - inside**2, 0.0))


@dataclasses.dataclass(frozen=True)
class Result:
    """The errors of one representation on held-out trials."""

    numbers: int
    """A checkpoint's."""
    forecast: Errors
    floor: Errors | None = None
    refined: Errors | None = None
    validation: float | None = None
    """Relative error of the forecast on validation trials, where representations are chosen by it."""

    def add(self, paths: Sequence[Weights], end: int, written: Sequence[Any], ahead: Sequence[Any]) -> None:
        """Add a prefix: paths written in orthonormal coordinates (T, k), and the forecasts of their ends (k,)."""
        assert self.floor is not None
        self.floor.append([])
        self.forecast.append([])
        for path, x, forecast in zip(paths, written, ahead, strict=True):
            _, distances, outside = orthonormal(path, end, x)
            self.floor[-1].append(outside[-1] / distances[-1])
            self.forecast[-1].append(np.hypot(np.linalg.norm(forecast - x[-1]), outside[-1]) / distances[-1])


def prefix_svd(tokens: Tokens, widths: Sequence[int]) -> tuple[Coordinates, Callable[[int], int]]:
    """Return what writes a path on directions of each group's prefix, and how many of them a prefix end fills."""

    def coordinates(path: Weights, ends: Sequence[int]) -> list[NDArray[np.float32]]:
        grams = grams_of(path, tokens)
        return [grouped_coordinates(grams, end, widths, float(np.linalg.norm(path[end] - path[0]))) for end in ends]

    return coordinates, lambda end: sum(min(end, width) for width in widths)


@dataclasses.dataclass(frozen=True)
class GroupedForecaster(Forecaster):
    """A forecaster in a basis of groups, each of which has directions of its own."""

    groups: tuple[Tokens, Sequence[int]] = ((), ())
    """Groups, and how many directions each has."""

    def basis_of(self, prefix: Weights) -> Basis:
        tokens, widths = self.groups
        rows = interleaved(widths)
        directions = np.zeros((len(rows), prefix.shape[1]), np.float32)
        first = 0
        for (columns,), width in zip(tokens, widths, strict=True):
            if (prefix[-1, columns] != prefix[0, columns]).any():
                own = Basis.from_prefix(np.ascontiguousarray(prefix[:, columns]), width)
                directions[np.ix_(np.flatnonzero((rows >= first) & (rows < first + width)), columns)] = own.directions
            first += width
        return Basis(prefix[0], directions, float(np.linalg.norm(prefix[-1] - prefix[0]))).through(prefix[-1])


def ridge(sides: Sequence[Sequence[Sequence[NDArray[np.float32]]]], end: int) -> list[list[NDArray[np.float32]]]:
    """Return, for each held-out trial and kind of token, the numbers (N, c) forecast for the end of the path.

    `sides` are training, validation and held-out trials, each trial a list of numbers (T, N, c), one a kind. For all
    tokens of a kind one mixture of what a token's numbers were at four checkpoints of the prefix, less those at the
    start, gives what they gain from h to the end; validation trials choose the kind's penalty.
    """
    lags = [round(share * end) for share in (0.25, 0.5, 0.75, 1.0)]
    forecasts: list[list[NDArray[np.float32]]] = [[] for _ in sides[2]]
    for kind in range(len(sides[0][0])):
        seen, target = [], []
        for side in sides:
            z = np.stack([trial[kind] for trial in side])  # (n, T, N, c)
            past = np.moveaxis(z[:, lags] - z[:, :1], 1, 2)  # (n, N, lags, c)
            seen.append(past.reshape(-1, len(lags) * z.shape[3]).astype(np.float64))
            target.append((z[:, -1] - z[:, end]).reshape(-1, z.shape[3]))
        squares, products = seen[0].T @ seen[0], seen[0].T @ target[0]
        unit = np.diag(squares).mean() + 1e-30
        fits = [np.linalg.solve(squares + it * unit * np.eye(len(squares)), products) for it in PENALTIES]
        best = min(fits, key=lambda fit: float(np.square(seen[1] @ fit - target[1]).sum()))
        ahead = z[:, end] + (seen[2] @ best).reshape(z[:, end].shape)
        for forecast, numbers in zip(forecasts, ahead, strict=True):
            forecast.append(numbers.astype(np.float32))
    return forecasts


def train_forecaster(
    training: Sequence[Weights],
    validation: Sequence[Weights],
    write: Callable[[Weights, Sequence[int]], list[Written]],
    rank: Callable[[int], int],
    config: TrainConfig,
) -> tuple[Forecaster, float]:
    """Return a forecaster of what `write(path, prefix ends)` gives, trained as `tipl train` does, and its error."""
    torch.manual_seed(config.seed)
    checked = Validation.prefix_ends(len(training[0]))
    spread = np.linspace(MIN_PREFIX_END, len(training[0]) - 2, config.max_prefixes).round().astype(int)
    ends = sorted({*spread.tolist(), *checked})
    filled = (torch.arange(config.n_components) < torch.tensor([rank(end) for end in ends])[:, None]).float()
    examples = Examples.of([write(path, ends) for path in training], ends, filled)
    cases = []
    for end, trials in zip(checked, zip(*(write(path, checked) for path in validation), strict=True), strict=True):
        paths, distances, outside = (np.array(it) for it in zip(*trials, strict=True))
        cases.append(Case(end, paths - examples.centre.at(end), distances[:, -1], outside[:, -1], rank(end)))
    trainer = Trainer(TrainingData(examples, Validation(cases), None), config)
    with tempfile.TemporaryDirectory() as events:
        fit(trainer, Path(events), progress=True)
    model = trainer.average
    model.load_state_dict(trainer.best.state)
    trust = np.interp(ends, checked, trainer.data.validation.trust(model))
    return Forecaster(model, None, dataclasses.replace(examples.centre, trust=trust)), trainer.best.error
