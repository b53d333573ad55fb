"""PyTorch as a decoder beside `tipl.Decoder`: eager, compiled, compiled ahead of time, and as a CUDA graph.

Each peer is a callable: `peer(n)` makes n decode steps of B sequences from empty caches, believing its own predictions,
and returns them.

Shapes  L layers, B sequences, H heads, T slots, D head_dim, k = n_components; every cache is allocated once.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.nn import functional as F

from tipl import TrajectoryTransformer

Floats = NDArray[np.float32]


class TorchStep(nn.Module):
    """One decode step of the model over its caches, in eager mode."""

    def __init__(self, model: TrajectoryTransformer, batch_size: int) -> None:
        super().__init__()
        config = model.config
        self.model = model
        shape = (config.n_layer, batch_size, config.n_head, config.max_len, config.d_model // config.n_head)
        device = model.pos.weight.device
        self.keys: Iterable[Tensor] = list(torch.zeros(shape, device=device))  # L times (B, H, T, D)
        self.values: Iterable[Tensor] = list(torch.zeros(shape, device=device))

    def forward(self, x: Tensor, last: Tensor, pos: Tensor, slot: int) -> Tensor:
        """Return the prediction (B, 1, k) that follows x (B, 1, k) at `slot`; pos (1,) is the slot as a tensor."""
        model, config = self.model, self.model.config
        since_prefix = (pos / config.max_len).expand(len(x), 1, 1)  # the prefix is one token, h = 0
        z = model.embed(torch.cat([x, config.diff_scale * (x - last), since_prefix], -1)) + model.pos(pos)
        for block, keys, values in zip(model.blocks, self.keys, self.values, strict=True):
            q, k, v = block.qkv(block.norm1(z)).view(len(x), 1, 3, config.n_head, -1).permute(2, 0, 3, 1, 4)
            y = self.attend(q, k, v, keys, values, pos, slot)  # (B, H, 1, D)
            z = z + block.proj(y.transpose(1, 2).reshape(z.shape))
            z = z + block.fc2(F.gelu(block.fc1(block.norm2(z)), approximate="tanh"))
        return x + config.out_scale * model.head(model.norm(z))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pos: Tensor, slot: int) -> Tensor:
        keys[:, :, slot : slot + 1], values[:, :, slot : slot + 1] = k, v
        return F.scaled_dot_product_attention(q, keys[:, :, : slot + 1], values[:, :, : slot + 1])


class Caches(nn.Module):
    """Tensors as buffers: an exported step may write to its buffers alone."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_buffer(str(i), tensor)

    def __iter__(self) -> Iterator[Tensor]:
        return self.buffers()


class CompiledStep(TorchStep):
    """The same for torch.compile: shapes never change, so that it compiles once; a mask hides unused cache slots."""

    def __init__(self, model: TrajectoryTransformer, batch_size: int) -> None:
        super().__init__(model, batch_size)
        slots = model.config.max_len
        self.register_buffer("mask", torch.ones(slots, slots, dtype=torch.bool, device=model.pos.weight.device).tril())

    @torch.no_grad()
    def exported(self, start: Tensor) -> torch.export.ExportedProgram:
        """Return the step as torch.export has it, for batches like `start`; its caches become buffers."""
        keys, values = list(self.keys), list(self.values)
        del self.keys, self.values  # a module cannot take the place of a list
        self.keys, self.values = Caches(keys), Caches(values)
        position = torch.zeros(1, dtype=torch.long)
        return torch.export.export(self, (start, start.clone(), position, 0))  # one tensor twice would be one input

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pos: Tensor, slot: int) -> Tensor:
        keys.index_copy_(2, pos, k)
        values.index_copy_(2, pos, v)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask[pos])


class TorchRollout:
    """`TrajectoryTransformer.rollout` from one observed token `start` (B, 1, k), over a cache."""

    def __init__(self, model: TrajectoryTransformer, start: Floats, *, compiled: bool = False) -> None:
        step = (CompiledStep if compiled else TorchStep)(model, len(start)).eval()
        self.step = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
        self.compiled = compiled
        device = model.pos.weight.device
        self.start = torch.from_numpy(start).to(device)
        self.positions = torch.arange(model.config.max_len, device=device).split(1)

    @torch.inference_mode()
    def __call__(self, n: int) -> Floats:
        """Return the path (B, n, k) that follows the start."""
        last, x = self.start.clone(), self.start.clone()  # inference tensors like all that follow: compiled once
        path = []
        for t in range(n):  # a compiled step would be compiled for every slot
            last, x = x, self.step(x, last, self.positions[t], 0 if self.compiled else t)
            path.append(x)
        return torch.cat(path, 1).cpu().numpy()


class AOTInductorRollout(TorchRollout):
    """The compiled step as a library of machine code, without Python between its kernels."""

    def __init__(self, model: TrajectoryTransformer, start: Floats, folder: Path) -> None:
        super().__init__(model, start)
        step = CompiledStep(model, len(start)).eval()
        package = aoti_compile_and_package(step.exported(self.start), package_path=str(folder / "step.pt2"))
        self.step, self.compiled = aoti_load_package(package), True


class GraphRollout:
    """The same on a CUDA device, each step one replay of a CUDA graph: all that a step launches, at once."""

    def __init__(self, model: TrajectoryTransformer, start: Floats) -> None:
        device = model.pos.weight.device
        self.step = CompiledStep(model, len(start)).eval()
        self.start = torch.from_numpy(start).to(device)
        self.x, self.last = self.start.clone(), self.start.clone()
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.path = torch.zeros(len(start), model.config.max_len, start.shape[2], device=device)
        with torch.inference_mode():
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # what is made at a first call must be there before the graph
                for _ in range(3):
                    self._advance()
            torch.cuda.current_stream().wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._advance()

    def _advance(self) -> None:
        following = self.step(self.x, self.last, self.position, 0)
        self.path.index_copy_(1, self.position, following)
        self.last.copy_(self.x)
        self.x.copy_(following)
        self.position.add_(1)

    @torch.inference_mode()
    def __call__(self, n: int) -> Floats:
        """Return the path (B, n, k) that follows the start."""
        self.x.copy_(self.start)
        self.last.copy_(self.start)
        self.position.zero_()
        for _ in range(n):
            self.graph.replay()
        return self.path[:, :n].cpu().numpy()
