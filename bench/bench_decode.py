"""Decoding step by step: `tipl.Decoder` beside PyTorch, IREE, ONNX Runtime and llama.cpp, on the same random models.

A rollout observes one token and makes max_len decode steps from an empty cache. Answers are compared first; then all
take turns on all cores. The roof of a step is reading the weights and, on average, half the full cache, or its flops.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from iree_peer import IreeRollout
from llama_peer import open_llama_cpp
from measure import Clock, Row, rows_of, side_by_side
from numpy.typing import NDArray
from onnxruntime_peer import OnnxRuntimeRollout
from record import Record
from roofs import Roofs
from torch.nn import functional as F
from torch_peers import AOTInductorRollout, TorchRollout

from tipl import Decoder, ModelConfig, TrajectoryTransformer, _core

Rollout = Callable[[int], NDArray[np.float32]]

SIZES = {
    "d64": ModelConfig(n_components=16, n_layer=2, n_head=4, d_model=64, d_ff=256, max_len=51),  # the demo's
    "d128": ModelConfig(n_components=32, n_layer=4, n_head=4, d_model=128, d_ff=512, max_len=512),
    "d256": ModelConfig(n_components=32, n_layer=6, n_head=8, d_model=256, d_ff=1024, max_len=512),
    "d512": ModelConfig(n_components=32, n_layer=8, n_head=8, d_model=512, d_ff=2048, max_len=512),
}
MODES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "bf16+cache": {"dtype": "bfloat16", "cache_dtype": "bfloat16"},
}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
ERROR = {"fp32": 1e-4, "bf16": 0.03, "int8": 0.03, "bf16+cache": 0.03}
"""Largest error against PyTorch over 16 steps, relative to the largest coordinate. tests/ has the exact bounds."""
LLAMA_CPP = {"f32": 0.005, "f16": 0.005, "q8_0": 0.05}
"""The same for llama.cpp's weights, relative to the head's largest output; its cache is float16."""
WARM_UP, SETTLE_S = 32, 0.02


@dataclass(frozen=True)
class Case:
    """One model and a batch of first tokens."""

    size: str
    batch_size: int

    @property
    def name(self) -> str:
        return f"{self.size} b{self.batch_size}"

    @property
    def config(self) -> ModelConfig:
        return SIZES[self.size]

    @property
    def start(self) -> NDArray[np.float32]:
        rng = np.random.default_rng(0)
        return rng.standard_normal((self.batch_size, 1, self.config.n_components), dtype=np.float32)

    @cached_property
    def model(self) -> TrajectoryTransformer:
        """Random weights, and a head that predicts more than persistence."""
        torch.manual_seed(0)
        model = TrajectoryTransformer(self.config).eval().requires_grad_(False)
        torch.nn.init.normal_(model.head.weight, std=self.config.d_model**-0.5)
        torch.nn.init.normal_(model.head.bias, std=0.1)
        return model

    def ours(self, mode: str) -> Rollout:
        decoder, start = Decoder.from_model(self.model, self.batch_size, **MODES[mode]), self.start

        def rollout(n: int) -> NDArray[np.float32]:
            decoder.reset()
            decoder.prefill(start)
            return decoder.generate(n - 1)  # n decode steps, for the prefix took one

        return rollout

    def clock(self, rollout: Rollout) -> Clock:
        """Seconds per step, after other libraries' threads have gone to sleep and the weights are in the cache."""
        n = self.config.max_len
        times = -(-512 // n)

        def run() -> float:
            time.sleep(SETTLE_S)
            rollout(WARM_UP)
            start = time.perf_counter()
            for _ in range(times):
                rollout(n)
            return (time.perf_counter() - start) / (times * n)

        return run

    def embeddings(self, path: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the model adds to the positions' embeddings along a path, (B, t, k) -> (B, t, d)."""
        x = torch.from_numpy(path)
        diff = F.pad(x[:, 1:] - x[:, :-1], (0, 0, 1, 0))
        since_prefix = (torch.arange(x.shape[1]) / self.config.max_len).expand(x.shape[:2])[..., None]
        return self.model.embed(torch.cat([x, self.config.diff_scale * diff, since_prefix], -1)).numpy()

    def traffic(self, mode: str) -> tuple[float, float]:
        """Return the bytes that one step reads on average, and its flops."""
        dtype, cache_dtype = (MODES[mode].get(key, "float32") for key in ("dtype", "cache_dtype"))
        weights = {name: w for name, w in self.model.named_parameters() if name != "pos.weight"}  # a row of it is read
        blocks = sum(w.numel() for name, w in weights.items() if name.startswith("blocks.") and w.ndim == 2)
        others = sum(w.numel() for w in weights.values()) - blocks  # float32 in every mode
        slots = self.batch_size * (self.config.max_len + 1) / 2
        cached = slots * self.config.n_layer * self.config.d_model  # keys, and as many values
        num_bytes = BYTES[dtype] * blocks + 4 * others + 2 * BYTES[cache_dtype] * cached
        return num_bytes, 2 * self.batch_size * (blocks + others) + 4 * cached


def assert_close(name: str, answer: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float) -> None:
    error = np.abs(answer - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"{name}: relative error {error:.2g}, tolerated {tolerance:.2g}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:iree")
@pytest.mark.parametrize("batch_size", [1, 8, 32, 128], ids="b{}".format)
@pytest.mark.parametrize("size", SIZES)
def bench_rollout(record: Record, roofs: Roofs, size: str, batch_size: int, tmp_path: Path) -> None:
    case = Case(size, batch_size)
    modes = ("fp32", "bf16", "int8") if batch_size == 1 else ("fp32", "bf16+cache")
    rollouts: dict[str, Rollout] = {mode: case.ours(mode) for mode in modes}

    eager = rollouts["torch eager"] = TorchRollout(case.model, case.start)
    expected = eager(16)
    for mode in modes:
        assert_close(mode, rollouts[mode](17), expected, ERROR[mode])
    if batch_size <= 32:
        torch._dynamo.reset()
        rollouts["torch.compile"] = TorchRollout(case.model, case.start, compiled=True)
        rollouts["AOTInductor"] = AOTInductorRollout(case.model, case.start, tmp_path)
        rollouts["IREE"] = IreeRollout(case.model, case.start, tmp_path)
        for name in ("torch.compile", "AOTInductor", "IREE"):
            assert_close(name, rollouts[name](16), expected, ERROR["fp32"])
    rollouts["ONNX Runtime"] = OnnxRuntimeRollout(case.model, case.start)
    assert_close("ONNX Runtime", rollouts["ONNX Runtime"](16), expected, ERROR["fp32"])

    path = np.concatenate([case.start, expected], axis=1)
    head = (path[:, -1] - path[:, -2]) / case.config.out_scale - case.model.head.bias.numpy()
    with ExitStack() as stack:
        for weights in LLAMA_CPP if batch_size <= 32 else ("f16",):
            peer = stack.enter_context(open_llama_cpp(case.model, weights, case.embeddings(path[:, :-1])))
            assert_close(f"llama.cpp {weights}", peer(16), head, LLAMA_CPP[weights])
            rollouts[f"llama.cpp {weights}"] = peer
        clocks = {name: case.clock(rollout) for name, rollout in rollouts.items()}
        clocks |= {f"read {mode}": partial(roofs.reading_s, case.traffic(mode)[0]) for mode in modes}

        def measure() -> list[Row]:
            us = {name: 1e6 * seconds for name, seconds in side_by_side(clocks).items()}
            peers = {name: us[name] for name in rollouts if name not in modes}
            rows = []
            for mode in modes:
                beside = peers if mode == "fp32" else peers | {"tipl fp32": us["fp32"]}
                dtype = "bfloat16" if mode.startswith("bf16") else "float32"
                roof = roofs.share(us[mode] / 1e6, us[f"read {mode}"] / 1e6, *case.traffic(mode), dtype)
                rows += rows_of("decode", f"{case.name} {mode}", "us/step", us[mode], beside, roof)
            return rows

        record(measure)


@cache
def our_clock(size: str) -> Clock:
    case = Case(size, 1)
    return case.clock(case.ours("fp32"))


def seconds_a_step(isa: str, size: str) -> float:
    assert _core.isa().startswith(isa)
    return our_clock(size)()


@pytest.mark.skipif(not _core.isa().startswith("avx512"), reason="this machine, or TIPL_ISA, has no AVX-512")
@pytest.mark.parametrize("size", ["d128", "d256", "d512"])
def bench_avx2(record: Record, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    """The AVX2 kernels in a second process, beside the AVX-512 kernels in this one."""
    monkeypatch.setenv("TIPL_ISA", "avx2")
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        clocks = {
            "avx2": lambda: process.submit(seconds_a_step, "avx2", size).result(),
            "avx512": partial(seconds_a_step, "avx512", size),
        }

        def measure() -> list[Row]:
            us = {name: 1e6 * seconds for name, seconds in side_by_side(clocks, rounds=(5, 20)).items()}
            return rows_of("decode", f"{size} b1 fp32 avx2", "us/step", us["avx2"], {"tipl avx512": us["avx512"]})

        record(measure)


def bench_after_matmuls(record: Record) -> None:
    """A rollout right after a torch product on all cores may take at most a tenth longer: torch's threads spin then."""
    case = Case("d128", 1)
    rollout, matrix, n = case.ours("fp32"), torch.randn(1024, 1024), case.config.max_len
    rollout(n)

    def after(pause: Callable[[], None]) -> float:
        pause()
        start = time.perf_counter()
        rollout(n)
        return (time.perf_counter() - start) / n

    def matmuls() -> None:
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            torch.mm(matrix, matrix)

    clocks = {"alone": partial(after, partial(time.sleep, 0.3)), "after": partial(after, matmuls)}

    def measure() -> list[Row]:
        us = {name: 1e6 * seconds for name, seconds in side_by_side(clocks, rounds=(20, 20)).items()}
        return rows_of(
            "decode", f"{case.name} fp32 after torch.mm", "us/step", us["after"], {"tipl alone": us["alone"]}
        )

    (row,) = record(measure)
    assert row.ratio >= 0.9, f"slowed to {row.ratio:.2f} of its speed by torch's threads"
