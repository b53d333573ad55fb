"""Training the forecaster: a step of the Transformer and one of the refiner, beside torch's autograd doing the same."""

import functools
from collections.abc import Callable

import pytest
import torch
from measure import Row, clock, rows_of, side_by_side
from record import Record
from roofs import Roofs

from tipl import _core
from tipl.forecasting.refiner import KINDS, Observed, Refiner, growth_of
from tipl.forecasting.refiner_training import BATCH_SIZE, BATCH_WEIGHTS
from tipl.forecasting.rollout_gradient import RolloutGradient
from tipl.forecasting.transformer import ModelConfig, TrajectoryTransformer
from tipl.threads import torch_threads

BATCH, PREFIX_END, LENGTH = 32, 20, 51
"""Sequences in a step; the prefix that each continues, and the checkpoints of a whole path, as in the demo."""

SIZES = {"d64 L2": (64, 2), "d128 L3": (128, 3), "d256 L6": (256, 6)}
"""The default model, and larger ones: d_model, n_layer."""


def flops_of(config: ModelConfig, horizon: int) -> float:
    """Return the multiplications and additions of one step that no algorithm can leave out.

    Each parameter of a matrix counts six for each token. The last block asks only for keys and values of the tokens
    that nothing is predicted from.
    """
    d, tokens, asked = config.d_model, PREFIX_END + horizon, horizon
    block = d * (4 * d + 2 * config.d_ff)
    always = config.token_width * d * tokens + (config.n_layer - 1) * block * tokens + 2 * d * d * tokens
    return 6.0 * BATCH * (always + (block - 2 * d * d + config.n_components * d) * asked)


@pytest.mark.parametrize("size", SIZES)
def bench_step(size: str, record: Record, roofs: Roofs) -> None:
    """Rollouts from a prefix to the path's end, with dropout, and the gradient of their error through all of them."""
    d_model, n_layer = SIZES[size]
    config = ModelConfig(
        n_components=16, n_layer=n_layer, n_head=4, d_model=d_model, d_ff=4 * d_model, max_len=LENGTH, dropout=0.4
    )
    torch.manual_seed(0)
    model, horizon, cores = TrajectoryTransformer(config).train(), LENGTH - PREFIX_END - 1, _core.available_cpus()
    paths = 0.1 * torch.randn(BATCH, LENGTH, config.n_components).cumsum(1)
    past, future = paths[:, : PREFIX_END + 1], paths[:, PREFIX_END + 1 :]
    native = RolloutGradient(model, batch_size=BATCH, num_tokens=LENGTH, generator=torch.Generator())

    def step(unroll: Callable[[torch.Tensor, int], torch.Tensor], num_threads: int) -> None:
        with torch_threads(num_threads):
            model.zero_grad()
            (unroll(past, horizon) - future).square().sum(-1).sqrt().mean().backward()

    clocks = {"tipl": clock(functools.partial(step, native.unroll, 1))}
    clocks |= {
        f"torch autograd, {n} threads": clock(functools.partial(step, model.unroll, n)) for n in sorted({1, cores})
    }

    def measure() -> list[Row]:
        seconds = side_by_side(clocks, rounds=(3, 15), budget_s=30)
        ours = seconds.pop("tipl")
        roof = 100 * flops_of(config, horizon) / roofs.gemm_gflops("float32") / 1e9 / ours, "flops"
        peers = {name: 1e3 * value for name, value in seconds.items()}
        return rows_of("train", f"{size}, batch {BATCH}", "ms", 1e3 * ours, peers, roof)

    record(measure)


@pytest.mark.parametrize("hidden", [64])
def bench_refiner_step(hidden: int, record: Record, roofs: Roofs) -> None:
    """The error of a batch of refined forecasts, and its gradient by all parameters."""
    torch.manual_seed(0)
    refiner, cores = Refiner(hidden, LENGTH), _core.available_cpus()
    shape = (BATCH_SIZE, BATCH_WEIGHTS)
    seen = Observed(torch.randn(*shape, 19), torch.ones(shape), torch.randint(len(KINDS), shape))
    forecast, offset, gain = (torch.randn(shape) for _ in range(3))
    steps = torch.randint(1, LENGTH - PREFIX_END, (BATCH_SIZE,)).float()
    place, growth = refiner.place(PREFIX_END, steps)[:, None], growth_of(PREFIX_END, steps)[:, None]
    inputs = [it.numpy() for it in (seen.features, seen.kind, forecast[:, None], place, gain * growth, offset)]
    engine = refiner.engine(cores)

    def natively() -> None:
        engine.loss(refiner.flat(), *inputs)

    def by_torch(num_threads: int) -> None:
        with torch_threads(num_threads):
            refiner.zero_grad()
            moved = refiner(seen, forecast, PREFIX_END, steps) - forecast
            (gain * moved + offset).square().sum(-1).sqrt().mean().backward()

    clocks = {"tipl": clock(natively)}
    clocks |= {f"torch autograd, {n} threads": clock(functools.partial(by_torch, n)) for n in sorted({1, cores})}
    # Both signs go through the matrix between the hidden layers, forward and twice on the way back.
    flops = 2 * 3 * 2.0 * hidden**2 * BATCH_SIZE * BATCH_WEIGHTS

    def measure() -> list[Row]:
        seconds = side_by_side(clocks, rounds=(20, 300), budget_s=15)
        ours = seconds.pop("tipl")
        roof = 100 * flops / roofs.gemm_gflops("float32") / 1e9 / ours, "flops"
        peers = {name: 1e3 * value for name, value in seconds.items()}
        return rows_of("train", f"refiner, {BATCH_SIZE} x {BATCH_WEIGHTS}", "ms", 1e3 * ours, peers, roof)

    record(measure)
