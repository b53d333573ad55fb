"""A weight nowcaster: one small network that continues every weight from its own last values and nothing else.

After WNN (Jang et al. 2023, "Learning to Boost Training by Periodic Nowcasting Near Future Weights", ICML), which sees
a weight's last five values and their differences, in units of their range, and adds its output to the last of them; it
has a network for each kind of layer. Here the kind is an input, the five values are spread over the prefix, and the
unit is how far the weight's tensor has walked, so that one loss over all weights is the trial's relative error.

Shapes  N training trials, s sampled weights, p weights, G parameter tensors, m lags, n horizons; h = prefix_end.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tipl.judging.regression import fitted_rows
from tipl.judging.training_path import TrainingPath, tensor_slices
from tipl.policy import Layout
from tipl.subspace.prefix import Prefix

NUM_LAGS = 5
NUM_KINDS = 3

STEPS = 400
BATCH_TRIALS = 8
LEARNING_RATE = 5e-3
D_HIDDEN = 32


class _Network(nn.Module):
    """Inputs (..., m + kinds) -> displacements (..., n): a linear map and an MLP, which both begin at zero."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)
        self.mlp = nn.Sequential(
            nn.Linear(d_in, D_HIDDEN), nn.GELU(), nn.Linear(D_HIDDEN, D_HIDDEN), nn.GELU(), nn.Linear(D_HIDDEN, d_out)
        )
        for parameter in (*self.linear.parameters(), *self.mlp[-1].parameters()):
            nn.init.zeros_(parameter)  # so that it begins at persistence

    def forward(self, x: Tensor) -> Tensor:
        forecast: Tensor = self.linear(x) + self.mlp(x)
        return forecast


@dataclasses.dataclass(frozen=True)
class Nowcaster:
    """A network predicts each weight's displacement from that weight's path so far and from what kind of weight it
    is."""

    layout: Layout
    horizons: NDArray[np.int64]
    """What it was fitted for, (n,)."""
    network: nn.Module

    @classmethod
    def fit(
        cls, training: Sequence[TrainingPath], prefix_end: int, horizons: NDArray[np.int64], seed: int = 0
    ) -> "Nowcaster":
        """Train on the sampled weights of all trials, each trial's loss its estimated relative error."""
        layout = training[0].layout
        sizes = np.array([columns.stop - columns.start for columns in tensor_slices(layout)])
        tensors = _tensor_of(layout, training[0].columns)  # (s,), the same in every trial
        stands_for = (sizes / np.bincount(tensors))[tensors]  # how many weights each sampled one speaks for, (s,)
        inputs, targets, shares = [], [], []
        for path in training:
            unit = np.sqrt(path.grams[:, prefix_end, prefix_end] / sizes)[tensors]  # (s,)
            inputs.append(_inputs(layout, path.columns, path.sample[: prefix_end + 1], unit))
            moved = path.sample[prefix_end + horizons] - path.sample[prefix_end]  # (n, s)
            targets.append((moved / _divisor(unit)).T)
            shares.append(np.outer(stands_for * unit**2, 1.0 / path.walked(prefix_end + horizons) ** 2))
        x, y, share = (torch.from_numpy(np.stack(it).astype(np.float32)) for it in (inputs, targets, shares))
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            torch.manual_seed(seed)
            network = _Network(x.shape[-1], len(horizons))
            _train(network, x, y, share)
        return cls(layout, horizons, network.eval())

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = fitted_rows("Nowcaster", self.horizons, horizons)
        displacements = prefix.weights - prefix.weights[0]  # (h+1, p)
        unit = np.empty(displacements.shape[1])
        for columns in tensor_slices(self.layout):
            unit[columns] = np.sqrt(np.mean(displacements[-1, columns].astype(np.float64) ** 2))
        x = _inputs(self.layout, np.arange(len(unit)), displacements, unit)
        with torch.no_grad():
            moved = self.network(torch.from_numpy(x)).numpy()[:, rows].T  # (n, p)
        return np.asarray(prefix.weights[-1] + unit * moved, dtype=np.float32)


def _train(network: nn.Module, x: Tensor, y: Tensor, share: Tensor) -> None:
    """Fit targets y (N, s, n) of inputs x (N, s, m + kinds); sum_s share (y - network)^2 is squared relative error."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        trials = torch.randperm(len(x))[:BATCH_TRIALS]
        squared = (share[trials] * (network(x[trials]) - y[trials]) ** 2).sum(1)  # (B, n)
        optimizer.zero_grad()
        (squared + 1e-8).sqrt().mean().backward()  # the root of zero has no slope
        optimizer.step()
        schedule.step()


def _inputs(
    layout: Layout, columns: NDArray[np.int64], displacements: NDArray[np.float32], unit: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return what the network sees of the weights `columns` (c,), displacements (h+1, c) and units (c,): (c, m + 3)."""
    prefix_end = len(displacements) - 1
    lags = np.unique(np.linspace(0, prefix_end - 1, NUM_LAGS).round().astype(np.int64))  # from theta_0 on
    values = (displacements[lags] - displacements[-1]) / _divisor(unit)  # (m, c)
    kinds = [_kind(name, shape) for name, (_, shape) in layout.layout.items()]
    one_hot = np.eye(NUM_KINDS)[kinds][_tensor_of(layout, columns)]  # (c, 3)
    return np.concatenate([values.T, one_hot], 1).astype(np.float32)


def _kind(name: str, shape: tuple[int, ...]) -> int:
    """Return 0 for a weight matrix, 1 for a bias or another vector, 2 for log_std."""
    return 2 if name.endswith("log_std") else 0 if len(shape) > 1 else 1


def _tensor_of(layout: Layout, columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of the parameter tensor in which each flat weight lies."""
    starts = [columns.start for columns in tensor_slices(layout)]
    return np.asarray(np.searchsorted(starts, columns, side="right") - 1)


def _divisor(unit: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return units to divide by. A tensor that has not moved has the unit zero, and is forecast to stay."""
    return np.where(unit > 0.0, unit, 1.0)
