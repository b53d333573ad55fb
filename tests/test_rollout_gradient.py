"""The native rollouts and their gradient, against torch's autograd in float64."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from tipl import _core
from tipl.forecasting.rollout_gradient import RolloutGradient
from tipl.forecasting.transformer import ModelConfig, TrajectoryTransformer

SMALL = ModelConfig(n_components=3, n_layer=1, n_head=3, d_model=15, d_ff=7, max_len=20, dropout=0.0)
DEFAULT = ModelConfig(n_components=16, n_layer=2, n_head=4, d_model=64, d_ff=256, max_len=51, dropout=0.0)


def model_of(config: ModelConfig) -> TrajectoryTransformer:
    """Return a model in which every parameter counts."""
    torch.manual_seed(0)
    model = TrajectoryTransformer(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def engine_of(config: ModelConfig, batch_size: int, num_threads: int = 1, num_tokens: int | None = None) -> Any:
    sizes = {name: value for name, value in dataclasses.asdict(config).items() if name != "dropout"}
    return _core.RolloutGradient(
        **sizes, batch_size=batch_size, num_tokens=num_tokens or config.max_len, num_threads=num_threads
    )


def inputs(config: ModelConfig, batch: int, tokens: int, horizon: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return paths, the ends of their prefixes, and a gradient by what is predicted."""
    generator = torch.Generator().manual_seed(1)
    x = 0.3 * torch.randn(batch, tokens, config.n_components, generator=generator).cumsum(1)
    ends = (
        torch.randint(1, tokens + 1, (batch,), generator=generator)
        if horizon == 0
        else torch.full((batch,), tokens - 1)
    )
    grad = torch.randn(batch, horizon or tokens, config.n_components, generator=generator)
    return x, ends, grad


def by_torch(
    model: TrajectoryTransformer, x: Tensor, ends: Tensor, grad: Tensor, horizon: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the predictions and the gradient by all parameters, in the precision of the model."""
    dtype = next(model.parameters()).dtype
    predicted = model(x.to(dtype), ends) if horizon == 0 else model.unroll(x.to(dtype), horizon)
    model.zero_grad()
    predicted.backward(grad.to(dtype))
    grads = [torch.zeros_like(it) if it.grad is None else it.grad for it in model.parameters()]
    return predicted.detach().numpy(), parameters_to_vector(grads).numpy()


def error(value: NDArray[Any], truth: NDArray[Any]) -> float:
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize(
    ("config", "batch", "tokens", "horizon"),
    [
        (DEFAULT, 5, 12, 0),
        (DEFAULT, 33, 50, 0),
        (DEFAULT, 32, 12, 1),
        (DEFAULT, 32, 12, 2),
        (DEFAULT, 20, 12, 39),
        (DEFAULT, 3, 50, 1),
        (SMALL, 5, 4, 0),
        (SMALL, 1, 20, 0),
        (SMALL, 17, 1, 3),
        (SMALL, 16, 4, 12),
        (dataclasses.replace(SMALL, n_layer=3, diff_scale=0.7, out_scale=-1.3), 4, 5, 6),
    ],
)
def test_predictions_and_gradients_equal_torchs_in_float64(config, batch, tokens, horizon):
    model = model_of(config)
    x, ends, grad = inputs(config, batch, tokens, horizon)
    params = parameters_to_vector(model.parameters()).detach().numpy()
    engine = engine_of(config, batch)
    predicted = engine.forward(params, x.numpy(), ends.numpy(), horizon=horizon)
    grads = engine.backward(params, grad.numpy())
    in_float32 = by_torch(model, x, ends, grad, horizon)
    truth = by_torch(model.double(), x, ends, grad, horizon)
    assert (predicted.shape, grads.shape) == (truth[0].shape, truth[1].shape)
    for got, torchs, true in zip((predicted, grads), in_float32, truth, strict=True):
        assert error(got, true) < 2.0 * error(torchs, true) + 1e-7


class Dropped(nn.Module):
    """Dropout of the given units, one mask (B, T, d) for all tokens of a rollout."""

    def __init__(self, mask: NDArray[np.float64]) -> None:
        super().__init__()
        self.mask, self.seen = torch.from_numpy(mask), 0

    def forward(self, z: Tensor) -> Tensor:
        first, self.seen = self.seen, self.seen + z.shape[1]
        return z * self.mask[:, first : self.seen]


def masks(seed: int, number: int, batch: int, tokens: int, width: int, dropout: float) -> NDArray[np.float64]:
    """Return mask `number` (B, T, d), as csrc/cpu/sequence_group.cpp says that it is drawn."""
    threshold = round(dropout * 2**16)
    mask = np.empty((batch, tokens, width))
    for b, t, unit in np.ndindex(mask.shape):
        words = _core.philox4x32((unit // 8, t, number, b), (seed & 0xFFFFFFFF, seed >> 32))
        half = words[unit % 8 // 2] >> 16 * (unit % 2) & 0xFFFF
        mask[b, t, unit] = (half >= threshold) / (1.0 - threshold / 2**16)
    return mask


class TwoMasks(nn.Module):
    """A block's dropout, which is called after attention and after fc2 in turn."""

    def __init__(self, first: Dropped, second: Dropped) -> None:
        super().__init__()
        self.both, self.calls = (first, second), 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        dropped: Tensor = self.both[(self.calls - 1) % 2](z)
        return dropped


@pytest.mark.parametrize("horizon", [0, 6])
def test_dropout_drops_what_philox_says_and_the_gradient_knows_it(horizon):
    config, batch, tokens, dropout, seed = dataclasses.replace(SMALL, n_layer=2), 18, 5, 0.4, 2**61 + 12345
    model = model_of(config)
    x, ends, grad = inputs(config, batch, tokens, horizon)
    params = parameters_to_vector(model.parameters()).detach().numpy()
    engine = engine_of(config, batch)
    predicted = engine.forward(params, x.numpy(), ends.numpy(), horizon=horizon, dropout=dropout, seed=seed)
    grads = engine.backward(params, grad.numpy())
    read = tokens + max(0, horizon - 1)
    drawn = [masks(seed, i, batch, read, config.d_model, dropout) for i in range(4)]
    assert 0.5 < np.mean([mask > 0 for mask in drawn]) < 0.7
    for i, block in enumerate(model.blocks):
        block.dropout = TwoMasks(Dropped(drawn[2 * i]), Dropped(drawn[2 * i + 1]))
    truth = by_torch(model.double(), x, ends, grad, horizon)
    assert error(predicted, truth[0]) < 1e-6
    assert error(grads, truth[1]) < 1e-5


def test_same_bits_with_any_number_of_threads_and_again():
    model = model_of(SMALL)
    x, ends, grad = inputs(SMALL, 50, 6, 9)
    params = parameters_to_vector(model.parameters()).detach().numpy()
    answers = []
    for num_threads in (1, 2, 3):
        engine = engine_of(SMALL, 64, num_threads)
        for _ in range(2):
            predicted = engine.forward(params, x.numpy(), ends.numpy(), horizon=9, dropout=0.3, seed=7)
            answers.append((predicted.tobytes(), engine.backward(params, grad.numpy()).tobytes()))
    assert len(set(answers)) == 1


def test_a_batch_after_a_larger_one_forgets_it():
    model = model_of(SMALL)
    params = parameters_to_vector(model.parameters()).detach().numpy()
    used, fresh = engine_of(SMALL, 40), engine_of(SMALL, 40)
    x, ends, grad = inputs(SMALL, 40, 15, 6)
    used.forward(params, 1e3 * x.numpy(), ends.numpy(), horizon=6, dropout=0.5, seed=3)
    used.backward(params, grad.numpy())
    for horizon in (0, 2):
        x, ends, grad = inputs(SMALL, 7, 5, horizon)
        answers = []
        for engine in (used, fresh):
            predicted = engine.forward(params, x.numpy(), ends.numpy(), horizon=horizon)
            answers.append((predicted.tobytes(), engine.backward(params, grad.numpy()).tobytes()))
        assert answers[0] == answers[1]


def test_autograd_gets_the_engines_gradient():
    model = model_of(dataclasses.replace(SMALL, dropout=0.5))
    x, _, _ = inputs(SMALL, 6, 5, 4)
    generator = torch.Generator().manual_seed(0)
    rollouts = RolloutGradient(model, batch_size=6, num_tokens=20, generator=generator)
    assert type(rollouts.unroll(x, 4)) is Tensor
    rollouts.unroll(x, 4).square().sum().backward()  # eval mode: nothing is dropped
    got = parameters_to_vector([it.grad for it in model.parameters()])
    model.zero_grad()
    model.unroll(x, 4).square().sum().backward()
    torch.testing.assert_close(got, parameters_to_vector([it.grad for it in model.parameters()]))
    model.train()
    first, second = rollouts.unroll(x, 4), rollouts.unroll(x, 4)
    assert not torch.equal(first, second)  # another mask
    generator.manual_seed(0)
    for _ in range(2):
        rollouts.unroll(x, 4)
    assert torch.equal(first, rollouts.unroll(x, 4))
    with pytest.raises(RuntimeError, match="another call came between"):
        first.sum().backward()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"RolloutGradient: num_tokens must lie in \[1, 20\], got 21"):
        engine_of(SMALL, 4, num_tokens=21)
    with pytest.raises(ValueError, match=r"RolloutGradient: batch_size must lie in \[1, 1048576\], got 0"):
        engine_of(SMALL, 0)
    engine = engine_of(SMALL, 4, num_tokens=10)
    params = np.zeros(engine.num_params, np.float32)
    x, ends = np.zeros((2, 5, 3), np.float32), np.zeros(2, np.int64)
    with pytest.raises(RuntimeError, match="there is no forward"):
        engine.backward(params, x)
    for arguments, keywords, message in (
        ((params[1:], x, ends), {}, r"params must have shape \(P,\)"),
        ((params, x[:, :, :2].copy(), ends), {}, r"x must have shape \(B, T, k\) = \(B, T, 3\), got \(2, 5, 2\)"),
        ((params, x[:, :0], ends), {}, "x must hold at least one token"),
        ((params, np.zeros((5, 5, 3), np.float32), np.zeros(5, np.int64)), {}, "x must hold 1 to batch_size = 4"),
        ((params, x, ends[:1]), {}, r"prefix_ends must have shape"),
        ((params, x, ends), {"horizon": 7}, "at most num_tokens = 10 tokens, got 5 and a horizon of 7"),
        ((params, x, ends), {"horizon": -1}, "horizon must not be negative, got -1"),
        ((params, x, ends), {"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1"),
        ((params, np.full_like(x, np.nan), ends), {}, "x must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.forward(*arguments, **keywords)
    engine.forward(params, x, ends, horizon=3)
    with pytest.raises(ValueError, match=r"the shape of what forward returned, \(2, 3, 3\), got \(2, 5, 3\)"):
        engine.backward(params, x)
