"""Temporal SVD: a trajectory of weights as a path of a few coordinates (Tang et al. 2023, arXiv 2303.01391).

Shapes  T checkpoints, p weights, k = n_components, h = prefix_end (the index of the last observed checkpoint).

Two ways to a `Basis`:

* `Basis.from_prefix` knows one trial's observed prefix and nothing else. Its *canonical coordinates* are those of
  theta_t - theta_0 on the prefix's right singular vectors, divided by |theta_h - theta_0|, each sign such that the
  coordinate at h is positive: trials with other initialisations, tasks and sizes look alike in them, so that one
  forecaster serves all.
* `Basis.from_trials` is fitted on the rows of all training trials, as the paper does. It does not carry over to
  initialisations it never saw; the floor that every evaluation reports shows by how much.

Either basis, where a forecast is made in it, passes through the last observed checkpoint (`Basis.through`): what the
directions cannot represent of theta_h stays as it was last seen. It matters where a prefix has more directions than k:
on HalfCheetah at 80 % of 148 checkpoints, k = 16, the floor falls from 0.304 to 0.297, below persistence's 0.300.
"""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl import _core
from tipl.cluster import Cluster
from tipl.files.sealed import load_arrays, save_arrays
from tipl.storing.store import Trial
from tipl.subspace.prefix_end import MIN_PREFIX_END
from tipl.subspace.running_gram import gram
from tipl.subspace.streaming_svd import StreamingSVD

SKETCH_TRIALS = 16
"""How many trials go into one sketch, before sketches are merged."""

# A direction whose singular value is below this share of the first one is rounding noise of float32 weights.
_NOISE = 1e-6


def trajectory_gram(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return G = D D^T (T, T) with D = weights - weights[0], which determines every prefix basis of the trial."""
    weights = np.ascontiguousarray(weights)
    return gram(weights, origin=weights[0])


def prefix_coordinates(trial_gram: NDArray[np.float64], prefix_end: int, n_components: int) -> NDArray[np.float32]:
    """Return the canonical coordinates (T, k) of a trial in the basis of its prefix 0..h, from its Gram matrix (T, T).

    Exact, and without any work of size p: with the displacements of the prefix D_h = U S V^T the coordinates are
    D V = D D_h^T U / S = G[:, :h+1] U / S. Where the prefix has fewer than k directions the other coordinates are zero.
    """
    mixing, scale = _prefix_svd(trial_gram[: prefix_end + 1, : prefix_end + 1], n_components)
    return np.asarray(trial_gram[:, : prefix_end + 1] @ mixing / scale, dtype=np.float32)


def prefix_rank(prefix_end: int, n_components: int) -> int:
    """Return how many coordinates a prefix 0..h can fill: its displacements have rank h at most."""
    return min(prefix_end, n_components)


def _prefix_svd(prefix_gram: NDArray[np.float64], n_components: int) -> tuple[NDArray[np.float64], float]:
    """Return U / S with canonical signs (h+1, k), and |theta_h - theta_0|, from the prefix's Gram matrix (h+1, h+1)."""
    prefix_end = len(prefix_gram) - 1
    if prefix_end < MIN_PREFIX_END:
        raise ValueError(
            f"prefix basis: a prefix must hold at least {MIN_PREFIX_END + 1} checkpoints (theta_0 and "
            f"{MIN_PREFIX_END} after it), got {prefix_end + 1}"
        )
    scale = float(np.sqrt(prefix_gram[-1, -1]))
    if not scale > 0.0:
        raise ValueError(
            "prefix basis: the weights at the prefix's end equal the initial weights, so the path has no scale"
        )
    squares, left = np.linalg.eigh(prefix_gram)  # ascending
    rank = prefix_rank(prefix_end, n_components)
    squares, left = squares[::-1][:rank], left[:, ::-1][:, :rank]
    kept = squares > squares[0] * _NOISE**2
    singular = np.sqrt(squares[kept])
    left = left[:, kept]
    left = left * np.where(left[-1] < 0, -1.0, 1.0)  # the coordinate at h is left[-1] * singular
    mixing = np.zeros((prefix_end + 1, n_components))
    mixing[:, : len(singular)] = left / singular
    return mixing, scale


@dataclasses.dataclass(frozen=True)
class Basis:
    """Where a trajectory is written in coordinates: an origin, k directions and a scale."""

    origin: NDArray[np.float32]
    """A point of the affine space that the basis spans, (p,): where the coordinates are zero."""
    directions: NDArray[np.float32]
    """Orthonormal rows (k, p); in a prefix basis the rows beyond the prefix's rank are zero."""
    scale: float
    """|theta_h - theta_0| (prefix basis) or the training rows' deviation along the first direction (shared basis)."""

    @classmethod
    def from_prefix(
        cls, prefix: NDArray[np.float32], n_components: int, *, gram: NDArray[np.float64] | None = None
    ) -> "Basis":
        """Return the basis of the observed prefix theta_0..theta_h, (h+1, p) float32, through theta_h.

        `gram` is the prefix's `trajectory_gram`, where that is known already.

        Raises ValueError where the prefix is too short, does not move, or holds NaN or Inf.
        """
        mixing, scale = _prefix_svd(trajectory_gram(prefix) if gram is None else gram, n_components)
        mixing[0] = -mixing[1:].sum(0)  # which turns a mixture of checkpoints into one of displacements from the first
        directions = _core.combine(np.ascontiguousarray(prefix), mixing, num_threads=1)
        return cls(prefix[0], directions.astype(np.float32, copy=False), scale).through(prefix[-1])

    @classmethod
    def from_trials(
        cls,
        trials: Sequence[Trial],
        n_components: int,
        *,
        block_rows: int = 256,
        seed: int = 0,
        cluster: Cluster | None = None,
    ) -> "Basis":
        """Return the basis of all rows of `trials`, read once in blocks: no trial is ever held whole.

        Trials are sketched in groups, and the sketches merged: the workers of a cluster give the same bits.
        """
        groups = [trials[start : start + SKETCH_TRIALS] for start in range(0, len(trials), SKETCH_TRIALS)]
        calls = [(group, n_components, block_rows, seed) for group in groups]
        sketches: Iterable[StreamingSVD] = itertools.starmap(_sketch, calls)
        if cluster is not None:
            sketches = map(_unpacked, cluster.map(_packed_sketch, calls))
        svd = functools.reduce(StreamingSVD.merge, sketches)
        scale = float(svd.singular_values_[0] / np.sqrt(svd.n_samples_seen_))
        if not scale > 0.0:
            raise ValueError("shared basis: all training checkpoints are equal, so the paths have no scale")
        return cls(svd.mean_.astype(np.float32), svd.components_.astype(np.float32), scale)

    @property
    def n_components(self) -> int:
        return len(self.directions)

    def through(self, weights: NDArray[np.float32]) -> "Basis":
        """Return this basis with its origin moved orthogonally to it, such that `weights` (p,) decode exactly."""
        outside = weights - self.decode(self.encode(weights[None]))[0]
        return dataclasses.replace(self, origin=self.origin + outside)

    def encode(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return coordinates (T, k) of weights (T, p), each row with the same bits whatever other rows there are."""
        moved = np.asarray(weights - self.origin, dtype=np.float32)
        inner = _core.products(
            "encode", moved, self.directions, None, num_threads=1
        )  # the order of BLAS's sums would depend on T
        return np.asarray(inner / self.scale, dtype=np.float32)

    def decode(self, coordinates: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return weights (T, p) of coordinates (T, k): a row has the same bits whatever other rows there are."""
        mixing = np.ascontiguousarray(self.scale * np.asarray(coordinates, np.float64).T)  # (k, T)
        return np.asarray(self.origin + _core.combine(self.directions, mixing, num_threads=1), dtype=np.float32)

    def residual(self, weights: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return |weights - decode(encode(weights))|, (T,): the least error of a forecast in this basis."""
        outside = weights.astype(np.float64) - self.decode(self.encode(weights))
        return np.asarray(np.linalg.norm(outside, axis=1))

    def save(self, path: Path) -> None:
        """Write the basis as one safetensors file."""
        scale = np.array([self.scale])
        save_arrays(path, {"origin": self.origin, "directions": self.directions, "scale": scale})

    @classmethod
    def load(cls, path: Path) -> "Basis":
        """Return the basis in `path`. Raises FileNotFoundError or, where the file is damaged, RuntimeError."""
        arrays = _load_arrays(path, "Basis.load", {"origin": 1, "directions": 2, "scale": 1})
        return cls(arrays["origin"], arrays["directions"], float(arrays["scale"][0]))


def _sketch(
    trials: Sequence[Trial], n_components: int, block_rows: int, seed: int, num_threads: int | None = None
) -> StreamingSVD:
    svd = StreamingSVD(n_components, center=True, seed=seed, num_threads=num_threads)
    for trial in trials:
        for block in trial.blocks(block_rows):
            svd.partial_fit(block)
    return svd


def _packed_sketch(trials: Sequence[Trial], n_components: int, block_rows: int, seed: int) -> bytes:
    """Return a sketch as the content of its file, which can travel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sketch.safetensors"
        _sketch(trials, n_components, block_rows, seed, num_threads=1).save(path)
        return path.read_bytes()


def _unpacked(sketch: bytes) -> StreamingSVD:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(sketch)
        return StreamingSVD.load(file.name)


@dataclasses.dataclass(frozen=True)
class Centre:
    """The mean path of the training trials in coordinates, which the forecaster's own coordinates are measured from.

    A forecaster that has learned nothing then continues every path as the training trials went on average, and all that
    it learns is how a path departs from the others.
    """

    ends: NDArray[np.int64]
    """The prefix ends that have a mean path of their own, ascending, (P,)."""
    paths: NDArray[np.float32]
    """(P, T, k)"""
    trust: NDArray[np.float64]
    """The share in [0, 1] of the forecaster's departures from the mean path that validation trials bore out, (P,)."""

    def at(self, prefix_end: int) -> NDArray[np.float32]:
        """Return the mean path (T, k) for prefixes that end at `prefix_end`, interpolated between its neighbours."""
        position = float(np.interp(prefix_end, self.ends, np.arange(len(self.ends))))
        below = min(int(position), len(self.ends) - 1)
        above = min(below + 1, len(self.ends) - 1)
        share = np.float32(position - below)
        return np.asarray((1 - share) * self.paths[below] + share * self.paths[above], dtype=np.float32)

    def trust_at(self, prefix_end: int) -> np.float32:
        """Return the trust for prefixes that end at `prefix_end`, interpolated too."""
        return np.float32(np.interp(prefix_end, self.ends, self.trust))

    def save(self, path: Path) -> None:
        save_arrays(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> "Centre":
        """Return the centre in `path`. Raises FileNotFoundError or, where the file is damaged, RuntimeError."""
        arrays = _load_arrays(path, "Centre.load", {"ends": 1, "paths": 3, "trust": 1})
        centre = cls(arrays["ends"], arrays["paths"], arrays["trust"])
        if not len(centre.ends) == len(centre.paths) == len(centre.trust):
            shapes = {name: array.shape for name, array in arrays.items()}
            raise RuntimeError(f"Centre.load: {path} is damaged: expected (P,), (P, T, k) and (P,), got {shapes}")
        return centre


def _load_arrays(path: Path, owner: str, dimensions: dict[str, int]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a safetensors file, which must have these names and dimensions, be finite and not empty."""
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: there is no file {path}")
    arrays, _ = load_arrays(path, owner)
    if {name: array.ndim for name, array in arrays.items()} != dimensions or not all(
        array.size and np.isfinite(array).all() for array in arrays.values()
    ):
        shapes = {name: array.shape for name, array in arrays.items()}
        raise RuntimeError(
            f"{owner}: {path} is damaged: expected finite arrays of the dimensions {dimensions}, got {shapes}"
        )
    return arrays
