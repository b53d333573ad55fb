"""The forecaster: a GPT-style causal Transformer on canonical coordinates of a weight trajectory.

Shapes  B sequences, T tokens, k = n_components, d = d_model, H heads, D = d / H.
Token t of a sequence whose observed prefix ends at checkpoint h is

    u_t = [ x_t (k) | diff_scale * (x_t - x_{t-1}) (k, zero at t = 0) | (t - h) / max_len (1) ]      (2k + 1)

and the model predicts a residual, x_{t+1} = x_t + out_scale * head(...), so that an untrained model is persistence.
`csrc/decode.cpp` runs the same arithmetic over a KV cache; tests/test_decoder.py holds the two together.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tipl.files.locations import read_file, write_atomically
from tipl.files.manifest import write_manifest
from tipl.files.schema import parse, parse_json
from tipl.files.sealed import load_arrays, save_arrays

MAX_SIZE = 2**20
"""Of anything that a model has or can take."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a `TrajectoryTransformer`, and the scales that keep its inputs and outputs near one."""

    n_components: int = 16
    """Coordinates of a checkpoint, k."""
    n_layer: int = 3
    n_head: int = 4
    d_model: int = 96
    d_ff: int = 384
    max_len: int = 64
    """Longest trajectory, in checkpoints, that the model can represent (T <= max_len)."""
    dropout: float = 0.1
    diff_scale: float = 10.0
    """Multiplies the last difference, which is about a tenth of a coordinate."""
    out_scale: float = 0.1
    """Multiplies the head's output, for the same reason."""

    def __post_init__(self) -> None:
        for name in ("n_components", "n_layer", "n_head", "d_model", "d_ff", "max_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                raise ValueError(f"ModelConfig: {name} must be an int in [1, {MAX_SIZE}], got {value!r}")
        if self.d_model % self.n_head:
            raise ValueError(f"ModelConfig: d_model must be a multiple of n_head = {self.n_head}, got {self.d_model}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"ModelConfig: dropout must lie in [0, 1), got {self.dropout}")
        for name in ("diff_scale", "out_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"ModelConfig: {name} must be finite, got {getattr(self, name)}")

    @property
    def token_width(self) -> int:
        return 2 * self.n_components + 1

    @property
    def num_matrix_parameters(self) -> int:
        """Parameters in the blocks' matrices and the positions: most of all, without building a model."""
        of_block = self.d_model * (4 * self.d_model + 2 * self.d_ff)
        return self.n_layer * of_block + self.max_len * self.d_model


KeyValues = tuple[Tensor, Tensor]
"""Keys and values of the tokens that a block has seen, each (B, H, T, D)."""


class Block(nn.Module):
    """One pre-norm Transformer block, (B, T, d) -> (B, T, d)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.n_head = config.n_head
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, config.d_ff)
        self.fc2 = nn.Linear(config.d_ff, d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, z: Tensor, past: KeyValues | None = None) -> tuple[Tensor, KeyValues]:
        """Return the output and all keys and values so far; with a `past`, z is the one token that follows it."""
        B, T, d = z.shape
        q, k, v = self.qkv(self.norm1(z)).view(B, T, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)  # (B, H, T, D)
        z = z + self.dropout(self.proj(y.transpose(1, 2).reshape(B, T, d)))
        z = z + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(z)), approximate="tanh")))
        return z, (k, v)


class TrajectoryTransformer(nn.Module):
    """Predict the next coordinates at every position of a trajectory, causally."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.token_width, config.d_model)
        self.pos = nn.Embedding(config.max_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.n_components)
        nn.init.normal_(self.pos.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, prefix_end: Tensor) -> Tensor:
        """Return the predicted x_{t+1} for each t, (B, T, k), from x (B, T, k) and prefix_end (B,), the index h."""
        self._check(x, x.shape[1])
        diff = F.pad(x[:, 1:] - x[:, :-1], (0, 0, 1, 0))  # (B, T, k), zero at t = 0
        return self._advance(x, diff, torch.arange(x.shape[1], device=x.device), prefix_end)[0]

    def unroll(self, x: Tensor, horizon: int) -> Tensor:
        """Return `horizon` further coordinates (B, horizon, k) after the prefix x (B, h+1, k); gradients flow through.

        Each prediction is the next input, over a KV cache. Without gradients `tipl.Decoder` does the same, much faster.
        """
        self._check(x, x.shape[1] + horizon)
        h = x.shape[1] - 1
        prefix_end = torch.full((len(x),), h, device=x.device)
        diff = F.pad(x[:, 1:] - x[:, :-1], (0, 0, 1, 0))
        positions = torch.arange(h + horizon, device=x.device)
        predicted, past = self._advance(x, diff, positions[: h + 1], prefix_end)
        last, current = x[:, -1:], predicted[:, -1:]  # (B, 1, k)
        path = [current]
        for t in range(h + 1, h + horizon):
            predicted, past = self._advance(current, current - last, positions[t : t + 1], prefix_end, past)
            last, current = current, predicted
            path.append(current)
        return torch.cat(path, 1)

    @torch.inference_mode()
    def rollout(self, x: Tensor, horizon: int) -> Tensor:
        """Return what `unroll` returns, each step recomputed from the start: slow and obvious, the tests' oracle."""
        prefix_end = torch.full((len(x),), x.shape[1] - 1, device=x.device)
        path = x
        for _ in range(horizon):
            path = torch.cat([path, self(path, prefix_end)[:, -1:]], 1)
        return path[:, x.shape[1] :]

    def _advance(
        self, x: Tensor, diff: Tensor, t: Tensor, prefix_end: Tensor, past: Sequence[KeyValues] | None = None
    ) -> tuple[Tensor, list[KeyValues]]:
        """Return predictions (B, T, k) that follow tokens x (B, T, k) at positions t (T,), and each block's cache."""
        z, present = self._read(x, diff, t, prefix_end, past)
        return x + self.config.out_scale * self.head(z), present

    def _read(
        self, x: Tensor, diff: Tensor, t: Tensor, prefix_end: Tensor, past: Sequence[KeyValues] | None = None
    ) -> tuple[Tensor, list[KeyValues]]:
        """Return what the head reads of tokens x (B, T, k), normalised (B, T, d), and each block's cache."""
        since_prefix = ((t - prefix_end[:, None]).to(x.dtype) / self.config.max_len)[..., None]  # (B, T, 1)
        z = self.embed(torch.cat([x, self.config.diff_scale * diff, since_prefix], -1)) + self.pos(t)
        present = []
        for i, block in enumerate(self.blocks):
            z, keys_values = block(z, past[i] if past else None)
            present.append(keys_values)
        return self.norm(z), present

    def _check(self, x: Tensor, length: int) -> None:
        if x.ndim != 3 or x.shape[2] != self.config.n_components:
            raise ValueError(f"model: x must have shape (B, T, {self.config.n_components}), got {tuple(x.shape)}")
        if length > self.config.max_len:
            raise ValueError(
                f"model: a path must have at most max_len = {self.config.max_len} checkpoints, got {length}"
            )


@dataclasses.dataclass(frozen=True)
class BareFolder:
    """What every config.json of a model folder holds; `Forecaster` knows what more."""

    format: Literal["tipl-model"]
    version: Literal[1]
    model: ModelConfig


def save_model(model: TrajectoryTransformer, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write `config.json`, `model.safetensors` and the manifest of all that is in `folder`, each whole or not at all.

    `extra` holds what the forecaster's user needs beside the sizes (environment, basis, training trials): plain JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": "tipl-model", "version": 1, "model": dataclasses.asdict(model.config), **(extra or {})}
    save_arrays(folder / "model.safetensors", arrays_of(model))
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_manifest(folder)


def load_model(folder: Path) -> tuple[TrajectoryTransformer, dict[str, Any]]:
    """Return the model in `folder`, in eval mode, and its whole `config.json`. Nothing in the folder can run code.

    Raises FileNotFoundError where a file is missing, RuntimeError where one is damaged or the two do not fit.
    """
    config_path, model_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, model_path):
        if not path.is_file():
            raise FileNotFoundError(f"load_model: {folder} is no model folder: {path.name} is missing")
    document = parse_json(read_file(config_path), config_path)
    config = parse(BareFolder, document, config_path, more=True).model
    arrays, _ = load_arrays(model_path, "load_model")
    # Before a model of such sizes is built.
    if config.num_matrix_parameters > sum(array.size for array in arrays.values()):
        raise RuntimeError(f"load_model: {model_path} does not fit its config.json: it holds too few parameters")
    model = TrajectoryTransformer(config)
    try:
        set_arrays(model, arrays)
    except ValueError as error:
        raise RuntimeError(f"load_model: {model_path} does not fit its config.json: {error}") from error
    return model.eval(), document


def arrays_of(module: nn.Module) -> dict[str, NDArray[Any]]:
    """Return the parameters and buffers of a module as arrays, by name."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}


def set_arrays(module: nn.Module, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Give a module what `arrays_of` returned. Raises ValueError where the arrays are others, or not finite."""
    expected = {name: (tuple(tensor.shape), tensor.numpy().dtype) for name, tensor in module.state_dict().items()}
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(f"{name} must be {_described(expected.get(name))}, got {_described(found.get(name))}")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} holds NaN or Inf")
    module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


def _described(kind: tuple[tuple[int, ...], np.dtype[Any]] | None) -> str:
    return "absent" if kind is None else f"{kind[1]} of shape {kind[0]}"
