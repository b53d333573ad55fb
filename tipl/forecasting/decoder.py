"""The native decoder: a trained forecaster continued step by step over a KV cache, in C++ or CUDA (`csrc/decode.h`).

Shapes  B sequences, t tokens, k = n_components. The arithmetic is `TrajectoryTransformer`'s.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, Self, SupportsIndex, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from tipl import _core
from tipl.arrays import Kind, as_host_integers, as_input, as_result
from tipl.device import cuda_engine, cuda_index, devices
from tipl.forecasting.transformer import ModelConfig, TrajectoryTransformer

Dtype = Literal["float32", "bfloat16", "int8"]
CacheDtype = Literal["float32", "bfloat16"]


class Decoder:
    """Continue B trajectories of coordinates, each observed up to its own prefix end.

        decoder = Decoder.from_model(model, batch_size=4)
        decoder.prefill(prefix)         # (4, t, k) observed coordinates
        path = decoder.generate(100)    # (4, 100, k), what model.rollout(prefix, 100) returns

    `prefill` once, then any mix of `step` (observe what came) and `generate` (believe the predictions); `reset` to
    begin anew. Results have the same bits for any `num_threads`, and for a sequence alone or in a batch. One call at a
    time: a second thread's call raises RuntimeError, and so does any call in a child that was forked during one. A
    decoder cannot be pickled or copied.

    Arrays are NumPy's, torch's, or of any library that speaks DLPack (CuPy, JAX), float32, and are not copied where
    they are on the decoder's device. Results are of the kind that came in: NumPy arrays, torch tensors on the device,
    or else `tipl._cuda.DeviceArray`s, which speak DLPack. Calls wait for the device.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, NDArray[np.float32]],
        batch_size: int,
        *,
        max_len: int | None = None,
        dtype: Dtype = "float32",
        cache_dtype: CacheDtype = "float32",
        num_threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        """Pack `weights`, the model's state_dict as NumPy arrays, and allocate caches for B = `batch_size` sequences.

        `max_len` is the tokens that a sequence can hold, at most and by default config.max_len; `num_threads` defaults
        to the cores that this process may use. `dtype` is what the blocks' matrices are stored in: bfloat16, or int8
        with a scale for each row; `cache_dtype` the same of keys and values. Sums are float32 throughout. On random
        models the error of one predicted change is 0.4 % with bfloat16 weights, 0.1 % with a bfloat16 cache, 1.4 % with
        int8 ones, which a CUDA device does not have. `device` is "cpu", "cuda", "cuda:1" ..., or "auto": CUDA where
        there is a device and the work of a step is worth it (`faster_device`).

        Raises ValueError for sizes that make no decoder, an unknown dtype or device, a weight that is missing, unknown
        or of another shape, NaN or Inf; TypeError for a weight that is not float32 or a size that is no int;
        RuntimeError where the device is not there."""
        for name, value, known in (("dtype", dtype, Dtype), ("cache_dtype", cache_dtype, CacheDtype)):
            if value not in get_args(known):
                names = ", ".join(map(repr, get_args(known)))
                raise ValueError(f"Decoder: {name} must be one of {names}, got {value!r}")
        self.config = config
        batch = as_int("Decoder: batch_size", batch_size)
        cache_len = config.max_len if max_len is None else as_int("Decoder: max_len", max_len)
        if device == "auto":
            device = faster_device(config, batch, dtype)
        self._cuda_index = cuda_index("Decoder", device)
        self._kind = Kind()
        threads = _core.available_cpus() if num_threads is None else as_int("Decoder: num_threads", num_threads)
        make: Any = _core.Decoder if self._cuda_index is None else cuda_engine().Decoder
        where = {"num_threads": threads} if self._cuda_index is None else {"device": self._cuda_index}
        self._core = make(
            n_components=config.n_components,
            n_layer=config.n_layer,
            n_head=config.n_head,
            d_model=config.d_model,
            d_ff=config.d_ff,
            max_len=config.max_len,
            diff_scale=config.diff_scale,
            out_scale=config.out_scale,
            weights=dict(weights),
            dtype=dtype,
            cache_dtype=cache_dtype,
            batch_size=batch,
            cache_len=cache_len,
            **where,
        )

    @classmethod
    def from_model(
        cls,
        model: TrajectoryTransformer,
        batch_size: int,
        max_len: int | None = None,
        dtype: Dtype = "float32",
        cache_dtype: CacheDtype = "float32",
        num_threads: int | None = None,
        device: str = "cpu",
    ) -> Self:
        """Return a decoder with a copy of `model`'s weights, on whatever device they are; errors as in `Decoder`."""
        weights = {}
        for name, tensor in model.state_dict().items():
            if tensor.dtype != torch.float32:
                raise TypeError(f"from_model: model's {name} must be torch.float32, got {tensor.dtype}")
            weights[name] = np.ascontiguousarray(tensor.detach().cpu().numpy())
        return cls(
            model.config,
            weights,
            batch_size,
            max_len=max_len,
            dtype=dtype,
            cache_dtype=cache_dtype,
            num_threads=num_threads,
            device=device,
        )

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, or copied: caches would be shared, or sent along with all weights."""
        raise TypeError("a Decoder cannot be pickled or copied; make another one with Decoder.from_model")

    def prefill(self, x: Any, lengths: Any = None) -> Any:
        """Return the prediction (B, k) of the coordinates that follow the observed prefixes `x` (B, t, k).

        Sequence b's prefix is its first `lengths[b]` tokens (all t by default), and ends at h = lengths[b] - 1; what
        lies behind is ignored. Interrupted by Ctrl-C, the decoder is empty again.

        Raises TypeError where `x` is not float32 or `lengths` no integers; ValueError for a wrong shape, lengths
        outside [1, t], t > max_len, NaN or Inf; RuntimeError where the decoder is not empty.
        """
        kind, x = as_input("prefill: x", x, self._cuda_index)
        own = None if lengths is None else as_host_integers("prefill: lengths", lengths)
        y = self._core.prefill(x) if own is None else self._core.prefill(x, own)
        self._kind = kind
        return as_result(kind, y)

    def step(self, x: Any) -> Any:
        """Append the coordinates `x` (B, k) to the trajectories; return the prediction (B, k) of those that follow.

        Raises TypeError where `x` is not float32; ValueError for a wrong shape, NaN or Inf, or a full cache;
        RuntimeError before `prefill`. Interrupted by Ctrl-C, the decoder is as before.
        """
        kind, x = as_input("step: x", x, self._cuda_index)
        return as_result(kind, self._core.step(x))

    def generate(self, n: Any) -> Any:
        """Append the model's own predictions n times; return what was appended, (B, n, k).

        The first is the prediction that the last call returned, so that prefill and generate(n) give what
        `TrajectoryTransformer.rollout` gives, and generate(n) then generate(m) what generate(n + m) gives. `n` may be
        an array (B,), a number for each sequence: the result is then (B, n.max(), k), NaN after a sequence's own n, and
        finished sequences cost nothing more. It is of the kind of the array that `prefill` was given. A path that
        diverges is returned as it is, Inf or NaN. The loop runs without the GIL. Interrupted by Ctrl-C, the decoder
        holds as many tokens as `position` says, and generate goes on from there.

        Raises TypeError where `n` holds no integers; ValueError for n < 1 (of an array: n < 0, or another shape) and
        where the cache lacks room for n tokens (nothing is appended then); RuntimeError before `prefill`.
        """
        if getattr(n, "ndim", 0) > 0:
            return as_result(self._kind, self._core.generate(as_host_integers("generate: n", n)))
        steps = as_int("generate: n", n)
        if steps < 1:
            raise ValueError(f"generate: n must be >= 1, got {steps}")
        own = np.full(self.batch_size, min(steps, np.iinfo(np.int64).max))
        return as_result(self._kind, self._core.generate(own))

    def reset(self) -> None:
        """Empty every sequence."""
        self._core.reset()

    @property
    def position(self) -> NDArray[np.int64]:
        """Tokens that each sequence holds, (B,)."""
        position: NDArray[np.int64] = self._core.position
        return position

    @property
    def batch_size(self) -> int:
        return int(self._core.batch_size)

    @property
    def max_len(self) -> int:
        """Tokens that a sequence can hold."""
        return int(self._core.max_len)

    @property
    def num_threads(self) -> int:
        """Threads of the CPU that a call uses; one where the decoder is on a CUDA device."""
        return int(self._core.num_threads) if self._cuda_index is None else 1

    @property
    def device(self) -> str:
        return "cpu" if self._cuda_index is None else f"cuda:{self._cuda_index}"


def faster_device(config: ModelConfig, batch_size: int, dtype: Dtype = "float32") -> str:
    """Return "cuda" where there is a device and it should be faster than the CPU, else "cpu".

    A step on a device takes two meetings of its blocks for each layer, some 1.5 us each, however small the model is;
    the CPU makes some 50 multiplications in a nanosecond. The rule was not yet measured on a device.
    """
    multiplications = config.num_matrix_parameters * batch_size
    meetings = 2 * config.n_layer
    worth_it = multiplications / 50 > 1500 * meetings
    return "cuda" if worth_it and dtype != "int8" and devices() else "cpu"


def continue_paths(
    model: TrajectoryTransformer,
    observed: Sequence[NDArray[np.float32]],
    horizons: Sequence[int],
    *,
    num_threads: int | None = None,
    device: str = "cpu",
) -> list[NDArray[np.float32]]:
    """Return the model's own continuation (n, k) of each path (h+1, k), of any lengths: native, in one batch."""
    lengths = np.array([len(path) for path in observed])
    steps = np.array(horizons)
    x = np.zeros((len(observed), lengths.max(), model.config.n_components), np.float32)
    for row, path in zip(x, observed, strict=True):
        row[: len(path)] = path
    max_len = int((lengths + steps).max())
    decoder = Decoder.from_model(model, len(x), max_len=max_len, num_threads=num_threads, device=device)
    decoder.prefill(x, lengths)
    return [path[:n] for path, n in zip(decoder.generate(steps), steps, strict=True)]


def as_int(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
