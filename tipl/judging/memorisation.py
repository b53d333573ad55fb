"""Measures that tell a forecaster that learned dynamics from one that remembers training paths or sees the future.

Shapes  N training trials, T checkpoints, p weights, k = n_components, h = prefix_end.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from tipl.forecasting.transformer import TrajectoryTransformer
from tipl.subspace.prefix import Prefix

FloatArray = NDArray[np.float64]


def training_futures(coordinates: NDArray[np.float32], prefix_end: int) -> FloatArray:
    """Return what follows the prefix's end in training, (N, k), of canonical coordinates of whole paths (N, T, k)."""
    return coordinates[:, -1].astype(np.float64) - coordinates[:, prefix_end]


def nearest_distances(prefix: Prefix, ends: NDArray[np.float32], futures: FloatArray) -> tuple[FloatArray, float]:
    """Return the distance of m futures (m,) from the nearest training path's future, and that of the training mean.

    A future is the displacement of a path after the prefix's end, in the canonical coordinates of its own prefix, so
    that a forecast that copies a training path has the same future. The m futures end at the weights `ends` (m, p) and
    are projected on the span of `prefix`; `futures` (N, k) are those of training. The unit is |theta_h - theta_0|.
    """
    basis = prefix.basis(futures.shape[1])
    own = basis.encode(ends).astype(np.float64) - basis.encode(prefix.weights[-1:])  # (m, k)
    both = np.concatenate([own, futures.mean(0, keepdims=True)])
    distances = np.linalg.norm(both[:, None] - futures, axis=2).min(1)  # (m + 1,)
    return distances[:-1], float(distances[-1])


@torch.inference_mode()
def future_leak(model: TrajectoryTransformer, path: NDArray[np.float32], prefix_end: int) -> float:
    """Return the most that predictions at 0..h change where noise replaces all that follows h; path (T, k).

    Zero, or rounding, in a causal model.
    """
    disturbed = path.copy()
    later = disturbed[prefix_end + 1 :]
    later += np.random.default_rng(prefix_end).normal(size=later.shape).astype(np.float32)
    seen = torch.full((1,), prefix_end)
    before, after = (model(torch.from_numpy(x)[None], seen)[0, : prefix_end + 1] for x in (path, disturbed))
    return float((after - before).abs().max())
