"""A whole forecast: `tipl.rollout` of a policy's weights, beside the same with the refiner in torch."""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from measure import Row, clock, rows_of, side_by_side
from numpy.typing import NDArray
from record import Record
from roofs import Roofs

import tipl
from tipl.forecasting.refiner import Observed, Refiner
from tipl.policy import Layout, PolicySpec

PREFIX, HORIZON = 21, 10
"""Checkpoints seen and forecast."""

POLICIES = {"64 x 64": (64, 64), "256 x 256": (256, 256), "1024 x 1024": (1024, 1024)}
"""Hidden layers of a policy of HalfCheetah."""


class TorchRefiner(Refiner):
    """The refiner as torch computes it, in blocks whose activations stay in the cache."""

    BLOCK = 2048

    @torch.inference_mode()
    def refine(
        self, prefix: NDArray[np.float32], layout: Layout, forecast: NDArray[np.float32], horizons: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        seen, last = Observed.of(prefix, layout), torch.from_numpy(prefix[-1].copy())
        parts = [slice(start, start + self.BLOCK) for start in range(0, len(last), self.BLOCK)]
        rows: list[Any] = []
        for row, n in zip(forecast, horizons, strict=True):
            moved, horizon = torch.from_numpy(row) - last, torch.tensor(float(n))
            rows.append(torch.cat([self(seen.take(part), moved[part], len(prefix) - 1, horizon) for part in parts]))
        return (last + torch.stack(rows)).numpy()


@pytest.mark.parametrize("policy", POLICIES)
def bench_rollout(policy: str, record: Record, roofs: Roofs) -> None:
    """Ten checkpoints forecast after 21, by the forecaster that comes with tipl."""
    spec = PolicySpec(17, 6, POLICIES[policy])
    rng = np.random.default_rng(0)
    path = np.empty((PREFIX, spec.num_params), np.float32)
    path[0] = 0.1 * rng.standard_normal(spec.num_params)
    for before, after in itertools.pairwise(path):
        after[:] = before + 0.01 * rng.standard_normal(spec.num_params, np.float32)
    native = tipl.load_pretrained()
    assert native.refiner is not None
    in_torch = TorchRefiner(native.refiner.hidden, native.refiner.max_len).eval()
    in_torch.load_state_dict(native.refiner.state_dict())
    forecasters = {"tipl": native, "refiner in torch": dataclasses.replace(native, refiner=in_torch)}
    clocks = {
        name: clock(functools.partial(tipl.rollout, path, HORIZON, it, layout=spec)) for name, it in forecasters.items()
    }
    # Both signs of each weight go through the matrix between the refiner's hidden layers.
    flops = 2 * 2.0 * native.refiner.hidden**2 * spec.num_params * HORIZON

    def measure() -> list[Row]:
        seconds = side_by_side(clocks, rounds=(3, 15), budget_s=30, slow_s=30)
        ours = seconds.pop("tipl")
        roof = 100 * flops / roofs.gemm_gflops("float32") / 1e9 / ours, "flops"
        case = f"{policy}, {spec.num_params} weights"
        return rows_of("rollout", case, "ms", 1e3 * ours, {name: 1e3 * s for name, s in seconds.items()}, roof)

    record(measure)
