"""The plane in which a path through weight space is best seen, and how much it hides.

Shapes  T checkpoints, p weights.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from tipl.subspace.basis import Basis, trajectory_gram


@dataclasses.dataclass(frozen=True)
class Plane:
    """The two leading directions of a path's displacements theta_t - theta_0."""

    basis: Basis
    """Two directions; the scale is |theta_{T-1} - theta_0|."""
    shares: tuple[float, float]
    """The share of the path's squared displacement, the sum of |theta_t - theta_0|^2, along each direction."""

    @classmethod
    def of(cls, path: NDArray[np.float32]) -> "Plane":
        """Return the plane of a path (T, p).

        Raises ValueError where the path has fewer than four checkpoints, or ends where it began.
        """
        path_gram = trajectory_gram(path)
        squares = np.linalg.eigvalsh(path_gram)[::-1][:2]  # eigvalsh is ascending
        basis = Basis.from_prefix(path, 2, gram=path_gram)
        first, second = np.maximum(squares, 0.0) / np.trace(path_gram)
        return cls(basis, (float(first), float(second)))

    @property
    def hidden(self) -> float:
        """The share of the path's squared displacement that lies outside the plane."""
        return max(0.0, 1.0 - sum(self.shares))

    def points(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return weights (n, p) as points (n, 2). theta_0 is (0, 0), and the unit is |theta_{T-1} - theta_0|."""
        return self.basis.encode(weights)

    def distances(self, one: NDArray[np.float32], other: NDArray[np.float32]) -> tuple[float, float]:
        """Return the distance between two checkpoints (p,) in all weights, and as seen in the plane, in its unit."""
        apart = np.linalg.norm(one.astype(np.float64) - other) / self.basis.scale
        seen = np.linalg.norm(np.subtract(*self.points(np.stack([one, other])).astype(np.float64)))
        return float(apart), float(seen)
