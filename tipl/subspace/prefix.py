"""The observed part of a path, with what several predictors need of it, computed once."""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tipl.subspace.basis import Basis, trajectory_gram


class Prefix:
    """The first h+1 checkpoints of a path, (h+1, p) float32, with its Gram matrix and its bases."""

    def __init__(self, weights: NDArray[np.float32]) -> None:
        self.weights = weights
        self._bases: dict[int, Basis] = {}

    @property
    def end(self) -> int:
        """h, the index of the last observed checkpoint."""
        return len(self.weights) - 1

    @cached_property
    def gram(self) -> NDArray[np.float64]:
        """Inner products of theta_t - theta_0, (h+1, h+1)."""
        return trajectory_gram(self.weights)

    def basis(self, n_components: int) -> Basis:
        """Return `Basis.from_prefix` of this prefix; errors as there."""
        if n_components not in self._bases:
            self._bases[n_components] = Basis.from_prefix(self.weights, n_components, gram=self.gram)
        return self._bases[n_components]
