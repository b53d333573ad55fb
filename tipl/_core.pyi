"""The native engine (csrc/): float32 kernels for this CPU's instruction set, and the threads that run them."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

# ---- calls

class InUse: ...

class Turn:
    def __init__(self, objects: Iterable[InUse], where: str, what: str) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...

# ---- engine

def isa() -> Literal["baseline", "avx2", "avx512", "avx512bf16"]: ...
def lanes() -> int: ...
def choose_isa(name: str | None, supported: Sequence[str]) -> str: ...
def available_cpus() -> int: ...
def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]: ...
def normal4(seed: int, stream: int, index: int) -> list[float]: ...

class ThreadPool:
    def __init__(self, num_threads: int) -> None: ...
    @property
    def size(self) -> int: ...
    def owners(self, items: int, fail_at: Sequence[int] = ()) -> NDArray[np.int32]: ...
    def barriers_hold(self, rounds: int) -> bool: ...
    def sleeps(self, seconds: float) -> float: ...

# ---- training

class Refiner:
    def __init__(
        self,
        *,
        hidden: int,
        num_signed: int,
        num_unsigned: int,
        num_kinds: int,
        bound: float,
        linear_gain: float,
        num_threads: int,
    ) -> None: ...
    @property
    def num_params(self) -> int: ...
    def answer(
        self,
        params: NDArray[np.float32],
        features: NDArray[np.float32],
        kinds: NDArray[np.int64],
        forecasts: NDArray[np.float32],
        places: NDArray[np.float32],
    ) -> NDArray[np.float32]: ...
    def loss(
        self,
        params: NDArray[np.float32],
        features: NDArray[np.float32],
        kinds: NDArray[np.int64],
        forecasts: NDArray[np.float32],
        places: NDArray[np.float32],
        gain: NDArray[np.float32],
        offset: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...

class RolloutGradient:
    def __init__(
        self,
        *,
        n_components: int,
        n_layer: int,
        n_head: int,
        d_model: int,
        d_ff: int,
        max_len: int,
        diff_scale: float,
        out_scale: float,
        batch_size: int,
        num_tokens: int,
        num_threads: int,
    ) -> None: ...
    @property
    def num_params(self) -> int: ...
    def forward(
        self,
        params: NDArray[np.float32],
        x: NDArray[np.float32],
        prefix_ends: NDArray[np.int64],
        *,
        horizon: int = 0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> NDArray[np.float32]: ...
    def backward(self, params: NDArray[np.float32], grad: NDArray[np.float32]) -> NDArray[np.float32]: ...

# ---- decoder

class Decoder:
    def __init__(
        self,
        *,
        n_components: int,
        n_layer: int,
        n_head: int,
        d_model: int,
        d_ff: int,
        max_len: int,
        diff_scale: float,
        out_scale: float,
        weights: dict[str, NDArray[np.float32]],
        dtype: Literal["float32", "bfloat16", "int8"],
        cache_dtype: Literal["float32", "bfloat16"],
        batch_size: int,
        cache_len: int,
        num_threads: int,
    ) -> None: ...
    def prefill(self, x: NDArray[np.float32], lengths: NDArray[np.int64] | None = None) -> NDArray[np.float32]: ...
    def step(self, x: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def generate(self, n: NDArray[np.int64]) -> NDArray[np.float32]: ...
    def reset(self) -> None: ...
    @property
    def position(self) -> NDArray[np.int64]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def max_len(self) -> int: ...
    @property
    def num_threads(self) -> int: ...

# ---- Temporal SVD

class ReadAhead:
    def __init__(self, X: NDArray[Any]) -> None: ...
    def want(self, bytes: int) -> None: ...

class RowSketch:
    def __init__(
        self,
        *,
        num_features: int,
        range_size: int,
        test_size: int,
        seed: int,
        num_threads: int,
        origin: NDArray[np.float32] | None,
        directions: NDArray[np.float32] | None,
        choose_origin: bool = False,
    ) -> None: ...
    def partial_fit(self, X: NDArray[np.float32], first_row: int, all_or_none: bool) -> None: ...
    def check_rows(self, X: NDArray[np.float32], first_row: int, before: float) -> float: ...
    def merge(self, other: RowSketch) -> None: ...
    def settle(self) -> None: ...
    def snapshot(self, settled: bool = True) -> RowSketch: ...
    def apply(self, X: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def exact_rows(self) -> NDArray[np.float32]: ...
    def exact_origin(self) -> NDArray[np.float32]: ...
    def range_rows(self) -> NDArray[np.float32]: ...
    def combine(self, weights: NDArray[np.float64]) -> NDArray[np.float32]: ...
    def num_rows(self) -> int: ...
    def restore(
        self,
        *,
        co_range: NDArray[np.float64],
        gram: NDArray[np.float64],
        squares: float,
        range_rows: NDArray[np.float32],
        pending: NDArray[np.float32],
    ) -> None: ...
    @property
    def gram(self) -> NDArray[np.float64]: ...
    @property
    def co_range(self) -> NDArray[np.float64]: ...
    @property
    def row_sum(self) -> NDArray[np.float64]: ...
    @property
    def squares(self) -> float: ...
    @property
    def pending(self) -> NDArray[np.float32]: ...
    @property
    def directions(self) -> NDArray[np.float32]: ...
    @property
    def origin(self) -> NDArray[np.float32]: ...
    @property
    def num_features(self) -> int: ...
    @property
    def exact(self) -> bool: ...
    @property
    def directed(self) -> bool: ...
    @property
    def range_size(self) -> int: ...
    @property
    def test_size(self) -> int: ...

def partial_fit_together(
    sketches: Sequence[RowSketch], starts: Sequence[int], X: NDArray[np.float32], first_row: int, all_or_none: bool
) -> None: ...
def check_finite(where: str, X: NDArray[np.float32], num_threads: int, first_row: int = 0) -> None: ...
def products(
    where: str,
    X: NDArray[np.float32],
    Y: NDArray[np.float32] | None,
    origin: NDArray[np.float32] | None,
    num_threads: int,
    first_row: int = 0,
) -> NDArray[np.float64]: ...
def combine(X: NDArray[np.float32], weights: NDArray[np.float64], num_threads: int) -> NDArray[np.float32]: ...

# ---- policies

def mean_actions(
    params: NDArray[np.float32],
    obs: NDArray[np.float32],
    *,
    act_dim: int,
    hidden_sizes: Sequence[int],
    activation: str,
    discrete: bool = False,
) -> NDArray[np.float32]:
    """Rows of `params` begin with log_std (A), but not where `discrete`: the outputs are then logits."""

class PpoUpdate:
    def __init__(self, *, obs_dim: int, act_dim: int, config: object, num_threads: int, discrete: bool = False) -> None:
        """`config` has the attributes of `tipl.PPOConfig`; `discrete`: there are `act_dim` discrete actions."""

    @property
    def num_params(self) -> int: ...
    def values(self, params: NDArray[np.float32], obs: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def update(
        self,
        *,
        params: NDArray[np.float32],
        first_moments: NDArray[np.float32],
        second_moments: NDArray[np.float32],
        num_updates: NDArray[np.int64],
        observations: NDArray[np.float32],
        actions: NDArray[np.float32],
        log_probs: NDArray[np.float32],
        advantages: NDArray[np.float32],
        returns: NDArray[np.float32],
        values: NDArray[np.float32],
        order: NDArray[np.int32],
        learning_rate: float,
    ) -> NDArray[np.float64]:
        """`actions` (N, T, A), or the indices of discrete ones (N, T, 1).

        Returns policy loss, value loss, clipped share and approximate KL divergence, (N, 4); of discrete actions also
        the entropy, (N, 5).
        """
