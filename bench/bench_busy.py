"""Every stage on a busy machine: beside k processes of one thread that never rest, n cores give it n / (n + k) at best.

A row's value is the time beside them over the time on the quiet machine, and its peer the fair share, (n + k) / n.
"""

import contextlib
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from measure import Row, clock, rows_of, side_by_side
from record import Record

import tipl
from tipl import PPOConfig, StreamingSVD, _core
from tipl.collecting.envs import make_vec
from tipl.collecting.episodes import run_episodes
from tipl.collecting.population import Population
from tipl.forecasting.refiner import Observed, Refiner
from tipl.forecasting.rollout_gradient import RolloutGradient
from tipl.forecasting.transformer import ModelConfig, TrajectoryTransformer
from tipl.policy import PolicySpec

COMPETITORS = (1, 2, 4)
Work = Callable[[], object]


def collecting() -> Work:
    env = make_vec("HalfCheetah-v5", 64, seeds=range(64))
    return Population(env, PPOConfig(num_steps=256), range(64)).iterate


def training() -> Work:
    """Return 40 steps of the Transformer and as many of the refiner, without the optimiser."""
    config = ModelConfig(n_components=16, n_layer=2, n_head=4, d_model=64, d_ff=256, max_len=51, dropout=0.4)
    model = TrajectoryTransformer(config).train()
    rollouts = RolloutGradient(model, batch_size=32, num_tokens=51, generator=torch.Generator())
    past = 0.1 * torch.randn(32, 21, 16).cumsum(1)
    refiner, shape = Refiner(64, 51), (16, 256)
    seen = Observed(torch.randn(*shape, 19), torch.ones(shape), torch.zeros(shape, dtype=torch.int64))
    inputs = [it.numpy() for it in (seen.features, seen.kind, torch.randn(16, 1, 256), torch.randn(16, 1, 3))]
    both = torch.randn(shape).numpy()
    engine = refiner.engine(_core.available_cpus())

    def train() -> None:
        for _ in range(40):
            rollouts.unroll(past, 30).square().mean().backward()
            engine.loss(refiner.flat(), *inputs, both, both)

    return train


def judging() -> Work:
    policy, rng = PolicySpec(17, 6), np.random.default_rng(0)
    weights = 0.1 * rng.standard_normal((64, policy.num_params), np.float32)
    return functools.partial(run_episodes, "HalfCheetah-v5", policy, weights, rng.integers(2**31, size=(64, 1)))


def decoding() -> Work:
    config = ModelConfig(n_components=16, n_layer=4, n_head=4, d_model=128, d_ff=512, max_len=256)
    decoder = tipl.Decoder.from_model(TrajectoryTransformer(config).eval(), batch_size=8)
    x = np.zeros((8, 1, 16), np.float32)

    def decode() -> None:
        for _ in range(4):
            decoder.reset()
            decoder.prefill(x)
            decoder.generate(200)

    return decode


def fitting() -> Work:
    rows = np.random.default_rng(0).standard_normal((4096, 20_000), np.float32)
    return lambda: StreamingSVD(64).fit(rows)


STAGES = {"collect": collecting, "train": training, "evaluate": judging, "decode": decoding, "svd": fitting}


@contextlib.contextmanager
def competitors(number: int) -> Iterator[None]:
    """Keep `number` processes busy meanwhile."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        time.sleep(0.5)  # until they run
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("stage", STAGES)
def bench_busy(stage: str, record: Record) -> None:
    work, cores = STAGES[stage](), _core.available_cpus()
    work()

    def seconds() -> float:
        return side_by_side({"": clock(work)}, rounds=(3, 7), budget_s=10)[""]

    def measure() -> list[Row]:
        quiet, rows = seconds(), []
        for k in COMPETITORS:
            with competitors(k):
                busy = seconds()
            rows += rows_of("busy", f"{stage} beside {k}", "x", busy / quiet, {"fair share": (cores + k) / cores})
        return rows

    record(measure)
