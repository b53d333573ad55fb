"""What baselines need to know of a training trial, read once and small enough to be held for all trials.

Shapes  T checkpoints, p weights, G parameter tensors of the layout, s sampled weights.
"""

import dataclasses
import functools
import math

import numpy as np
from numpy.typing import NDArray

from tipl.policy import Layout
from tipl.subspace.running_gram import gram

SAMPLED_WEIGHTS = 1024
"""Weights of a trial that are kept as they are."""


@dataclasses.dataclass(frozen=True)
class TrainingPath:
    """One trial's path theta_0..theta_{T-1}: every inner product of its displacements, and a sample of its weights.

    Memory: 8 G T^2 + 4 T s bytes, whatever p is; 48 trials of 245 checkpoints and 7 tensors take 210 MB.
    """

    layout: Layout
    grams: NDArray[np.float64]
    """Gram matrices of theta_t - theta_0, one for each parameter tensor, (G, T, T)."""
    columns: NDArray[np.int64]
    """Which weights were sampled, ascending (s,): equally many of each tensor in every trial of this layout."""
    sample: NDArray[np.float32]
    """theta_t - theta_0 of the sampled weights, (T, s)."""

    @classmethod
    def of(cls, weights: NDArray[np.float32], layout: Layout, seed: int) -> "TrainingPath":
        """Read the path (T, p) of a trial; `seed` chooses the sample."""
        slices = tensor_slices(layout)
        tensors = (np.ascontiguousarray(weights[:, columns]) for columns in slices)
        rng = np.random.default_rng(seed)
        counts = _sample_sizes([columns.stop - columns.start for columns in slices])
        columns = np.concatenate(
            [it.start + np.sort(rng.permutation(it.stop - it.start)[:n]) for it, n in zip(slices, counts, strict=True)]
        )
        return cls(
            layout=layout,
            grams=np.stack([gram(tensor, origin=tensor[0]) for tensor in tensors]),
            columns=columns,
            sample=weights[:, columns] - weights[0, columns],
        )

    @functools.cached_property
    def gram(self) -> NDArray[np.float64]:
        """The Gram matrix of all weights together (T, T), as `basis.trajectory_gram` computes it."""
        return np.asarray(self.grams.sum(0))

    def walked(self, t: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """Return |theta_t - theta_0|, which errors are relative to, of the shape of t."""
        return np.asarray(np.sqrt(self.gram[t, t]))


def tensor_slices(layout: Layout) -> list[slice]:
    """Return where each parameter tensor lies in the flat weights, G slices."""
    return [slice(offset, offset + math.prod(shape)) for offset, shape in layout.layout.values()]


def _sample_sizes(sizes: list[int]) -> list[int]:
    """Return how many weights to sample of tensors with these sizes: equally many, and all of a smaller tensor."""
    counts, left = [0] * len(sizes), SAMPLED_WEIGHTS
    for rank, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        counts[i] = min(sizes[i], max(1, left // (len(sizes) - rank)))
        left -= counts[i]
    return counts
