"""The Transformer's rollouts and their gradient by the native engine, for training on the CPU.

Shapes  B sequences, T checkpoints given, k = n_components.

`csrc/rollout_gradient.h` does what `TrajectoryTransformer` does under torch's autograd, several times faster: torch
spends its time on the start of many small operations. tests/test_rollout_gradient.py compares both with float64.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tipl import _core
from tipl.forecasting.training_state import split_like
from tipl.forecasting.transformer import TrajectoryTransformer


class RolloutGradient:
    """`model` as a differentiable function of its parameters: called as the model itself, `unroll` as its method.

    Dropout follows `model.training`; what is dropped follows `generator`, from which each call draws one number.
    """

    def __init__(
        self,
        model: TrajectoryTransformer,
        *,
        batch_size: int,
        num_tokens: int,
        generator: torch.Generator,
        num_threads: int | None = None,
    ) -> None:
        """For at most `batch_size` sequences of at most `num_tokens` tokens, on all cores unless told otherwise."""
        sizes = {name: value for name, value in dataclasses.asdict(model.config).items() if name != "dropout"}
        self.model, self.generator = model, generator
        self._engine = _core.RolloutGradient(
            **sizes,
            batch_size=batch_size,
            num_tokens=num_tokens,
            num_threads=_core.available_cpus() if num_threads is None else num_threads,
        )
        self._calls = 0

    def __call__(self, x: Tensor, prefix_end: Tensor) -> Tensor:
        """Return the predicted x_{t+1} for each t, (B, T, k), from x (B, T, k) and prefix_end (B,), the index h."""
        return self._run(x, prefix_end, 0)

    def unroll(self, x: Tensor, horizon: int) -> Tensor:
        """Return `horizon` >= 1 further coordinates (B, horizon, k) after the prefix x (B, h+1, k)."""
        return self._run(x, torch.full((len(x),), x.shape[1] - 1), horizon)

    def _run(self, x: Tensor, prefix_end: Tensor, horizon: int) -> Tensor:
        dropout = self.model.config.dropout if self.model.training else 0.0
        seed = int(torch.randint(2**62, (), generator=self.generator))
        self._calls += 1
        predicted: Tensor = _Rollout.apply(  # type: ignore[no-untyped-call]
            self, x, prefix_end, horizon, dropout, seed, *self.model.parameters()
        )
        return predicted


class _Rollout(torch.autograd.Function):
    """The engine's two calls as one operation of autograd, which has no gradient by x."""

    @staticmethod
    def forward(
        ctx: Any,
        rollout: RolloutGradient,
        x: Tensor,
        prefix_end: Tensor,
        horizon: int,
        dropout: float,
        seed: int,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.rollout, ctx.call, ctx.parameters = rollout, rollout._calls, parameters
        ctx.flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters]).numpy()
        predicted = rollout._engine.forward(
            ctx.flat, x.contiguous().numpy(), prefix_end.numpy(), horizon=horizon, dropout=dropout, seed=seed
        )
        return torch.from_numpy(predicted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.call != ctx.rollout._calls:
            raise RuntimeError("RolloutGradient: backward must follow its own forward, but another call came between")
        flat = torch.from_numpy(ctx.rollout._engine.backward(ctx.flat, grads[0].contiguous().numpy()))
        return (None,) * 6 + tuple(split_like(flat, ctx.parameters))
