"""Jumps for any training loop in torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tipl.forecasting.forecaster import PRETRAINED, Forecaster
from tipl.jumping.jump_config import JumpConfig
from tipl.jumping.jumps import Jump, Jumps
from tipl.jumping.learner import TorchLearner
from tipl.storing.store import UNKNOWN


class Jumper:
    """Watches one run, as `Recorder` does, and lets it jump along forecasts of its own weights.

        jumper = tipl.Jumper(agent, optimizer)
        for iteration in range(num_iterations):
            ...                                  # act and update, as ever
            jumper.step(returns_of_the_episodes_that_ended)

    A jump changes the parameters in place. The run's own next iterations are the test: where its episodes return no
    more than the run's trend leads to expect without a jump, parameters, optimiser and normalisers are put back, and
    the iterations are lost. No episode is run to judge. Environments and random numbers go on as they are.
    """

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        model: Forecaster | str | Path | None = None,
        config: JumpConfig = JumpConfig(),
        env_id: str = UNKNOWN,
        actor: str | Sequence[str] | None = None,
        activation: str | None = None,
        normalisers: Mapping[str, Any] | None = None,
    ) -> None:
        """Watch `policy`, actor and critic, from before its first update on.

        Args:
            optimizer: what updates it; its state is put back with a jump that is undone.
            model: a forecaster or its folder, by default the one that comes with tipl. Where it does not fit, the run
                never jumps, and a warning says so.
            config: when to jump, how far, and what a jump must hold against.
            env_id: the task's Gymnasium id, by which the default of `config.start` goes.
            actor, activation: where the actor's parameters are, as in `Recorder`.
            normalisers: objects by name whose attributes are put back too, such as running means of observations.

        Raises ValueError where it is not clear which parameters are the actor's.
        """
        learner = TorchLearner(policy, optimizer, actor=actor, activation=activation, normalisers=normalisers)
        if not isinstance(model, Forecaster):
            model = Forecaster.load(PRETRAINED if model is None else model)
        self._jumps = Jumps.by_forecasts(learner, model, config, env_id)

    def step(self, episode_returns: Sequence[float] | float, *, is_last: bool = False) -> Jump | None:
        """Judge the last jump, undo it if need be, and jump if it is time; call this after each update.

        Args:
            episode_returns: returns of the episodes that ended since the last call, or their mean; none or NaN where
                none did.
            is_last: training ends here: no jump is made, and one that no episode has tested is undone.

        Returns the jump that was made or judged now, None where there was none. Raises ValueError where a return is
        infinite.
        """
        values = np.atleast_1d(np.asarray(episode_returns, np.float64))
        if np.isinf(values).any():
            raise ValueError(f"step: episode_returns must be finite, or NaN where no episode ended, got {values.max()}")
        before = list(self._jumps.jumps)
        self._jumps.after_iteration([float(values.mean()) if values.size else float("nan")], is_last=is_last)
        after = self._jumps.jumps
        return after[-1] if after != before else None

    @property
    def jumps(self) -> list[Jump]:
        """All jumps so far."""
        return list(self._jumps.jumps)

    @property
    def first_jump(self) -> int:
        """Iterations before the first jump."""
        return self._jumps.first_jump

    @property
    def iterations_lost(self) -> int:
        """Iterations that undone jumps have cost."""
        return sum(jump.lost for jump in self._jumps.jumps)
