"""The decoder and Temporal SVD on a CUDA device, beside torch on the same device. Skipped where torch sees none.

    pytest bench/bench_cuda.py    # some minutes; needs nothing of the extra `bench`

All wait for the device at their ends. Answers are compared first; then all take turns. What the decoder's counts
predicted (bench/cuda_counts.json) stands beside what was measured, as a peer of its own.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from measure import Clock, Row, rows_of, side_by_side
from numpy.typing import NDArray
from record import Record
from torch_peers import GraphRollout, TorchRollout

from tipl import Decoder, ModelConfig, StreamingSVD, TrajectoryTransformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

Floats = NDArray[np.float32]
SIZES = {
    "d128": ModelConfig(n_components=16, n_layer=4, n_head=4, d_model=128, d_ff=512, max_len=256),
    "d256": ModelConfig(n_components=16, n_layer=6, n_head=8, d_model=256, d_ff=1024, max_len=256),
}
MODES = {"fp32": "float32", "bf16": "bfloat16"}
ERROR = {"fp32": 1e-4, "bf16": 0.03}
"""Largest error against torch eager over 16 steps, relative to the largest coordinate."""
SVD_SHAPES = [(31296, 5708), (8192, 73484)]
COUNTS = Path(__file__).with_name("cuda_counts.json")


def random_model(config: ModelConfig) -> TrajectoryTransformer:
    """Random weights on the CPU, and a head that predicts more than persistence."""
    torch.manual_seed(0)
    model = TrajectoryTransformer(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.weight, std=config.d_model**-0.5)
    torch.nn.init.normal_(model.head.bias, std=0.1)
    return model


def our_rollout(
    model: TrajectoryTransformer, start: Floats, dtype: str, device: str = "cuda"
) -> Callable[[int], Floats]:
    """Return n decode steps from an empty cache; the result comes to the host, as the peers' do."""
    decoder = Decoder.from_model(model, len(start), dtype=dtype, cache_dtype=dtype, device=device)

    def rollout(n: int) -> Floats:
        decoder.reset()
        decoder.prefill(start)
        return np.asarray(decoder.generate(n - 1))

    return rollout


def seconds_a_step(rollout: Callable[[int], Floats], steps: int) -> Clock:
    def run() -> float:
        rollout(8)
        start = time.perf_counter()
        rollout(steps)
        return (time.perf_counter() - start) / steps

    return run


def predicted_us(config: ModelConfig, batch_size: int, dtype: str) -> float | None:
    """Return what bench/cuda_counts.py predicts for an H100, whose SMs the H200 has too."""
    for row in json.loads(COUNTS.read_text())["rows"]:
        of_row = (row["d_model"], row["n_layer"], row["batch"], row["dtype"])
        if row["card"].startswith("H100") and of_row == (config.d_model, config.n_layer, batch_size, dtype):
            return float(row["time_us"]["step"])
    return None


@pytest.mark.parametrize("batch_size", [1, 16, 128, 1024, 4096], ids="b{}".format)
@pytest.mark.parametrize("size", SIZES)
def bench_rollout(record: Record, size: str, batch_size: int) -> None:
    config = SIZES[size]
    model = random_model(config)
    start = np.random.default_rng(0).standard_normal((batch_size, 1, config.n_components), dtype=np.float32)
    rollouts = {mode: our_rollout(model, start, dtype) for mode, dtype in MODES.items()}
    on_device = random_model(config).cuda()
    rollouts["torch eager"] = eager = TorchRollout(on_device, start)
    rollouts["torch, CUDA graph"] = GraphRollout(on_device, start)
    expected = eager(16)
    for name, rollout in rollouts.items():
        answer = rollout(17 if name in MODES else 16)[:, :16]
        error = np.abs(answer - expected).max() / np.abs(expected).max()
        assert error < ERROR.get(name, 1e-4), f"{name}: relative error {error:.2g}"
    if batch_size <= 16:
        rollouts["tipl on the CPU"] = our_rollout(model, start, "float32", "cpu")
    steps = config.max_len - 1
    clocks = {name: seconds_a_step(rollout, steps) for name, rollout in rollouts.items()}

    def measure() -> list[Row]:
        us = {name: 1e6 * seconds for name, seconds in side_by_side(clocks, budget_s=4).items()}
        peers = {name: us[name] for name in rollouts if name not in MODES}
        rows = []
        for mode, dtype in MODES.items():
            predicted = predicted_us(config, batch_size, dtype)
            beside = peers if predicted is None else peers | {"its own prediction": predicted}
            rows += rows_of("cuda", f"{size} b{batch_size} {mode}", "us/step", us[mode], beside)
        return rows

    record(measure)


def bench_meetings(record: Record) -> None:
    """Two meetings a layer, and next to no work: a step of many thin layers less one of few, for each meeting."""
    thin = ModelConfig(n_components=1, n_layer=2, n_head=1, d_model=4, d_ff=4, max_len=256)
    start = np.zeros((1, 1, 1), np.float32)
    clocks = {
        layers: seconds_a_step(
            our_rollout(random_model(dataclasses.replace(thin, n_layer=layers)), start, "float32"), 255
        )
        for layers in (2, 32)
    }

    def measure() -> list[Row]:
        us = side_by_side({str(layers): clock for layers, clock in clocks.items()}, budget_s=4)
        return rows_of("cuda", "a meeting", "us", 1e6 * (us["32"] - us["2"]) / (2 * 30), {"assumed by the model": 1.0})

    record(measure)


@pytest.mark.parametrize("shape", SVD_SHAPES, ids="{0[0]}x{0[1]}".format)
def bench_svd(record: Record, shape: tuple[int, int]) -> None:
    """Rows on the device, and rows in the host's memory, whose copy is the roof."""
    k, (n, p) = 32, shape
    torch.manual_seed(0)
    scales = 1.0 / torch.arange(1, 65, device="cuda")
    rows = torch.randn(n, 64, device="cuda") * scales @ torch.randn(64, p, device="cuda")
    rows += 1e-3 * torch.randn(n, p, device="cuda")
    host = rows.cpu().numpy()
    pinned = torch.from_numpy(host).pin_memory()
    room = torch.empty_like(rows)
    best = torch.svd_lowrank(rows, q=64, niter=4)[2][:, :k]
    least = torch.linalg.norm(rows - rows @ best @ best.T)
    ours = StreamingSVD(k, device="cuda").fit(rows)
    components = torch.from_numpy(ours.components_).cuda()
    assert torch.linalg.norm(rows - rows @ components.T @ components) < 1.05 * least

    def seconds(work: Callable[[], object]) -> Clock:
        def run() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            return time.perf_counter() - start

        return run

    clocks = {
        "device": seconds(lambda: StreamingSVD(k, device="cuda").fit(rows).components_),
        "host": seconds(lambda: StreamingSVD(k, device="cuda").fit(host).components_),
        "torch.svd_lowrank niter=2": seconds(lambda: torch.svd_lowrank(rows, q=64, niter=2)),
        "torch.svd_lowrank niter=0": seconds(lambda: torch.svd_lowrank(rows, q=64, niter=0)),
        "tipl on the CPU": seconds(lambda: StreamingSVD(k).fit(host).components_),
        "copying pinned rows": seconds(lambda: room.copy_(pinned, non_blocking=True)),
    }

    def measure() -> list[Row]:
        ms = {name: 1e3 * it for name, it in side_by_side(clocks, budget_s=15).items()}
        torchs = {name: ms[name] for name in clocks if name.startswith("torch")}
        on_cpu = {"tipl on the CPU": ms["tipl on the CPU"]}
        return [
            *rows_of("cuda", f"{n}x{p} on the device", "ms", ms["device"], torchs | on_cpu),
            *rows_of(
                "cuda",
                f"{n}x{p} of the host",
                "ms",
                ms["host"],
                on_cpu | {"copying pinned rows": ms["copying pinned rows"]},
            ),
        ]

    record(measure)
