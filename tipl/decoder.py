"""The native decoder: a trained forecaster continued step by step over a KV cache, in C++ (`csrc/decode.h`).

Shapes  B sequences, t tokens, k = n_components. The arithmetic is `tipl.model.TrajectoryTransformer`'s.
"""

import operator
from collections.abc import Mapping
from typing import Literal, Self, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray

from tipl import _core
from tipl.model import ModelConfig, TrajectoryTransformer

DTYPES = ("float32",)
"""What `Decoder` computes in."""


class Decoder:
    """Continue B trajectories of coordinates, each observed up to its own prefix end.

        decoder = Decoder.from_model(model, batch_size=4)
        decoder.prefill(prefix)         # (4, t, k) observed coordinates
        path = decoder.generate(100)    # (4, 100, k), what model.rollout(prefix, 100) returns

    `prefill` once, then any mix of `step` (observe what came) and `generate` (believe the predictions); `reset` to
    begin anew. Results have the same bits for any `num_threads`, and for a sequence alone as for one in a batch. One
    call at a time: a second thread's raises RuntimeError.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, NDArray[np.float32]],
        batch_size: int,
        *,
        max_len: int | None = None,
        dtype: Literal["float32"] = "float32",
        num_threads: int | None = None,
    ) -> None:
        """Pack `weights`, the model's state_dict as NumPy arrays, and allocate caches for B = `batch_size` sequences.

        `max_len` is the tokens that a sequence can hold, at most and by default config.max_len; `num_threads` defaults
        to the cores that this process may use.

        Raises ValueError for sizes that make no decoder, a dtype that it lacks, a weight of another shape, a missing or
        an unknown one, NaN or Inf; TypeError for a weight that is not float32, a size that is no int.
        """
        if dtype not in DTYPES:
            raise ValueError(f"Decoder: dtype must be one of {', '.join(map(repr, DTYPES))}, got {dtype!r}")
        self.config = config
        self._core = _core.Decoder(
            n_components=config.n_components,
            n_layer=config.n_layer,
            n_head=config.n_head,
            d_model=config.d_model,
            d_ff=config.d_ff,
            max_len=config.max_len,
            diff_scale=config.diff_scale,
            out_scale=config.out_scale,
            weights=dict(weights),
            batch_size=as_int("Decoder: batch_size", batch_size),
            cache_len=config.max_len if max_len is None else as_int("Decoder: max_len", max_len),
            num_threads=_core.available_cpus() if num_threads is None else as_int("Decoder: num_threads", num_threads),
        )

    @classmethod
    def from_model(
        cls,
        model: TrajectoryTransformer,
        batch_size: int,
        max_len: int | None = None,
        dtype: Literal["float32"] = "float32",
        num_threads: int | None = None,
    ) -> Self:
        """Return a decoder with a copy of `model`'s weights, on whatever device they are; errors as in `Decoder`."""
        weights = {}
        for name, tensor in model.state_dict().items():
            if tensor.dtype != torch.float32:
                raise TypeError(f"from_model: model's {name} must be torch.float32, got {tensor.dtype}")
            weights[name] = np.ascontiguousarray(tensor.detach().cpu().numpy())
        return cls(model.config, weights, batch_size, max_len=max_len, dtype=dtype, num_threads=num_threads)

    def prefill(self, x: NDArray[np.float32], lengths: NDArray[np.integer] | None = None) -> NDArray[np.float32]:
        """Return the prediction (B, k) of the coordinates that follow the observed prefixes `x` (B, t, k).

        Sequence b's prefix is its first `lengths[b]` tokens (all t by default), and ends at h = lengths[b] - 1; what
        lies behind is ignored. Interrupted by Ctrl-C, the decoder is empty again.

        Raises TypeError where `x` is not float32 or `lengths` no integers; ValueError for a wrong shape, lengths
        outside [1, t], t > max_len, NaN or Inf; RuntimeError where the decoder is not empty.
        """
        if lengths is None:
            return self._core.prefill(x)
        if not np.issubdtype(np.asarray(lengths).dtype, np.integer):
            raise TypeError(f"prefill: lengths must be integers, got {np.asarray(lengths).dtype}")
        return self._core.prefill(x, np.ascontiguousarray(lengths, dtype=np.int64))

    def step(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Append the coordinates `x` (B, k) to the trajectories; return the prediction (B, k) of those that follow.

        Raises TypeError where `x` is not float32; ValueError for a wrong shape, NaN or Inf, or a full cache;
        RuntimeError before `prefill`.
        """
        return self._core.step(x)

    def generate(self, n: int) -> NDArray[np.float32]:
        """Append the model's own predictions n times; return what was appended, (B, n, k).

        The first is the prediction that the last call returned, so that prefill and generate(n) give what
        `TrajectoryTransformer.rollout` gives, and generate(n) then generate(m) what generate(n + m) gives. A path that
        diverges is returned as it is, Inf or NaN. The loop runs without the GIL. Interrupted by Ctrl-C, the decoder
        holds as many tokens as `position` says, and generate goes on from there.

        Raises ValueError for n < 1 and where the cache lacks room for n tokens (nothing is appended then); RuntimeError
        before `prefill`.
        """
        return self._core.generate(as_int("generate: n", n))

    def reset(self) -> None:
        """Empty every sequence."""
        self._core.reset()

    @property
    def position(self) -> NDArray[np.int64]:
        """Tokens that each sequence holds, (B,)."""
        return self._core.position

    @property
    def batch_size(self) -> int:
        return self._core.batch_size

    @property
    def max_len(self) -> int:
        """Tokens that a sequence can hold."""
        return self._core.max_len

    @property
    def num_threads(self) -> int:
        return self._core.num_threads


def as_int(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
