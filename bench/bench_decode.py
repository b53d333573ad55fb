"""Decode steps a second: `tipl.Decoder` beside PyTorch eager with a KV cache, on the same random model.

A case is a whole rollout, 8 observed coordinates and then 200 decodes, with the answers compared first. PyTorch's own
rollout is `TrajectoryTransformer.unroll`, which concatenates its cache; at these sizes that costs it less than a fifth.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from tipl import Decoder, ModelConfig, TrajectoryTransformer

PREFIX, HORIZON = 8, 200
CASES = [
    pytest.param(d_model, n_layer, n_head, batch_size, id=f"d{d_model} L{n_layer} b{batch_size}")
    for d_model, n_layer, n_head in ((64, 2, 4), (128, 4, 4), (256, 6, 8))
    for batch_size in (1, 32)
]


@pytest.mark.parametrize(("d_model", "n_layer", "n_head", "batch_size"), CASES)
@pytest.mark.parametrize("engine", ["tipl", "torch eager"])
def bench_rollout(
    benchmark: BenchmarkFixture, engine: str, d_model: int, n_layer: int, n_head: int, batch_size: int
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(n_layer=n_layer, n_head=n_head, d_model=d_model, d_ff=4 * d_model, max_len=PREFIX + HORIZON)
    model = TrajectoryTransformer(config).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    prefix = torch.randn(batch_size, PREFIX, config.n_components)
    decoder = Decoder.from_model(model, batch_size)

    def ours() -> np.ndarray:
        decoder.reset()
        decoder.prefill(prefix.numpy())
        return decoder.generate(HORIZON)

    @torch.inference_mode()
    def torch_eager() -> np.ndarray:
        return model.unroll(prefix, HORIZON).numpy()

    np.testing.assert_allclose(ours(), torch_eager(), atol=1e-3)
    rollout: Callable[[], np.ndarray] = ours if engine == "tipl" else torch_eager
    benchmark.group = f"rollout d{d_model} L{n_layer} b{batch_size}"
    benchmark.pedantic(rollout, rounds=20 if d_model < 256 else 5, warmup_rounds=2)
    benchmark.extra_info["microseconds_a_step"] = 1e6 * benchmark.stats.stats.median / HORIZON
