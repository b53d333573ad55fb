"""What a `StreamingSVD` has seen: the native sketch, the parameters that shaped it, and what was last derived from it.

Shapes  n rows seen, p columns, k = n_components, l = k + n_oversamples range directions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tipl import _core
from tipl.device import cuda_engine, cuda_index
from tipl.subspace.parameters import checked_integer, checked_threads
from tipl.subspace.sketch_svd import SHARE_COMPONENTS, TEST_DIRECTIONS, Factors, factors_of, leading_directions


@dataclasses.dataclass
class FittedSketch:
    """A sketch of rows."""

    core: _core.RowSketch
    """On a CUDA device: tipl._cuda.RowSketch, which is used alike."""
    parameters: dict[str, Any]
    """The estimator's parameters when the sketch was built."""
    factors: tuple[int, Factors] | None = None
    """What was last derived from the sketch, and from how many rows."""
    feature_names: NDArray[np.object_] | None = None
    """(p,) the names of the columns, where the first rows had any."""

    @classmethod
    def build(
        cls,
        parameters: dict[str, Any],
        num_features: int,
        *,
        owner: str,
        chosen_origin: NDArray[np.float32] | None = None,
        directions: NDArray[np.float32] | None = None,
    ) -> Self:
        """Return an empty sketch with these parameters. Raises TypeError or ValueError for a wrong one, naming `owner`.

        `chosen_origin`: an origin that `center` chose before; without it `center` chooses one. `directions` (l, p):
        those that an earlier pass found, instead of random ones.
        """
        if not isinstance(parameters["center"], bool):
            raise TypeError(f"{owner}: center must be a bool, got {parameters['center']!r}")
        seed = checked_integer("seed", parameters["seed"])
        if not 0 <= seed < 2**64:
            raise ValueError(f"{owner}: seed must lie in [0, 2**64), got {seed}")
        if checked_integer("passes", parameters["passes"]) < 1:
            raise ValueError(f"{owner}: passes must be >= 1, got {parameters['passes']}")
        range_size = _range_size(owner, parameters["n_components"], parameters["n_oversamples"], num_features)
        origin = chosen_origin
        if parameters["origin"] is not None:
            origin = np.ascontiguousarray(parameters["origin"])
            if origin.dtype != np.float32 or origin.shape != (num_features,):
                raise ValueError(
                    f"{owner}: origin must be float32 of shape (p,) = ({num_features},), got {origin.dtype} of shape "
                    f"{origin.shape}"
                )
        index = cuda_index(owner, parameters["device"])
        threads = checked_threads(parameters["num_threads"])
        make: Any = _core.RowSketch if index is None else cuda_engine().RowSketch
        core = make(
            num_features=num_features,
            range_size=range_size if directions is None else len(directions),
            test_size=TEST_DIRECTIONS if directions is None and range_size < num_features else 0,
            seed=seed,
            origin=origin,
            directions=directions,
            choose_origin=parameters["center"] and origin is None,
            **({"num_threads": threads} if index is None else {"device": index}),
        )
        return cls(core, parameters)

    @classmethod
    def restore(
        cls,
        parameters: dict[str, Any],
        arrays: Mapping[str, NDArray[Any]],
        *,
        owner: str,
        directions: NDArray[np.float32] | None = None,
    ) -> Self:
        """Return the sketch with these parameters whose `arrays` these are."""
        origin = arrays["origin"] if arrays["origin"].size else None
        num_features = arrays["co_range"].shape[1]
        fitted = cls.build(parameters, num_features, owner=owner, chosen_origin=origin, directions=directions)
        fitted.core.restore(
            co_range=arrays["co_range"],
            gram=arrays["gram"],
            squares=float(arrays["squares"][0]),
            range_rows=arrays["range_rows"],
            pending=arrays["pending"],
        )
        return fitted

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return everything that the sketch has seen, which `restore` takes."""
        seen = self.core.snapshot(settled=False)
        return {
            "co_range": seen.co_range,
            "gram": seen.gram,
            "squares": np.array([seen.squares]),
            "range_rows": seen.range_rows()[: seen.num_rows() - len(seen.pending)],
            "pending": seen.pending,
            "origin": seen.origin,
        }

    @property
    def cuda_index(self) -> int | None:
        """The index of the CUDA device that the sketch is on; None for the CPU."""
        return getattr(self.core, "device", None)

    @property
    def is_exact(self) -> bool:
        """Whether another pass over the rows would find nothing new."""
        return self.core.exact or self.core.range_size == self.core.num_features

    def read(self, num_threads: int) -> Factors:
        """Return what follows from the rows so far; computed anew only after further rows."""
        rows = self.core.num_rows()
        if self.factors is None or self.factors[0] != rows:
            built = self.parameters
            factors = factors_of(self.core, built["n_components"], built["center"], built["seed"], num_threads)
            self.factors = (rows, factors)
        return self.factors[1]

    def coordinates(self, num_threads: int) -> NDArray[np.float32]:
        """Return the coordinates (n, k) of all rows so far."""
        factors = self.read(num_threads)
        if factors.coordinates is not None:
            return factors.coordinates.astype(np.float32)
        mixed = self.core.range_rows() @ factors.mixing[:-1] + factors.mixing[-1]
        return np.asarray(mixed, dtype=np.float32)

    def next_directions(self, num_threads: int) -> NDArray[np.float32]:
        """Return the directions (more than k, p) that the next pass over the rows starts from."""
        built = self.parameters
        return leading_directions(self.core, built["n_components"], built["center"], built["seed"], num_threads)


def _range_size(owner: str, n_components: Any, n_oversamples: Any, num_features: int) -> int:
    """Return l."""
    if isinstance(n_components, float):
        if not 0.0 < n_components < 1.0:
            raise ValueError(
                f"{owner}: n_components must be an integer, or a share of the energy in (0, 1), got {n_components}"
            )
        most = min(SHARE_COMPONENTS, num_features)
    else:
        most = checked_integer("n_components", n_components)
        if not 1 <= most <= num_features:
            raise ValueError(f"{owner}: n_components must lie in [1, p] = [1, {num_features}], got {most}")
    oversamples = max(most, 16) if n_oversamples is None else checked_integer("n_oversamples", n_oversamples)
    if oversamples < 0:
        raise ValueError(f"{owner}: n_oversamples must be >= 0, got {oversamples}")
    return min(most + oversamples, num_features)
