"""A population whose trials jump."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl.collecting.population import Population
from tipl.collecting.population_records import IterationStats, KeptTrials, PopulationState
from tipl.collecting.ppo_config import PPOConfig
from tipl.collecting.vector_env import VectorEnv
from tipl.jumping.jumps import Jump, Jumps, Test, Walk
from tipl.jumping.learner import PopulationLearner
from tipl.jumping.ledger import Ledger

PREFIX = "jumps."
"""Of the arrays that a state of jumps adds to a population's."""


class JumpingPopulation(Population):
    """N independent PPO trials that jump; a trial still depends on its own seed alone.

    Args:
        jumps: makes what watches the trials.
        finished: is given the ledger after the last iteration.
        env, config, seeds, rest: as in `Population`; num_iterations says after which one no trial jumps any more.
    """

    def __init__(
        self,
        env: VectorEnv,
        config: PPOConfig,
        seeds: Sequence[int],
        *,
        jumps: Callable[[PopulationLearner], Jumps],
        finished: Callable[[Ledger], None] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(env, config, seeds, **rest)
        self.jumps = jumps(PopulationLearner(self))
        self._finished = finished
        self.ledger = Ledger(env.env_id, list(self.seeds), config.batch_size, env_kwargs=dict(env.env_kwargs))

    def iterate(self) -> IterationStats:
        """Run one iteration of every trial, then judge, undo and make jumps. Raises what `Population.iterate` does."""
        stats = super().iterate()
        measured = np.where(stats.num_episodes > 0, stats.episodic_return, np.nan)
        is_last = self.env_steps == self.config.batch_size * (self.num_iterations or 0)
        self.jumps.after_iteration(measured, is_last=is_last)
        self.ledger.add(measured, self.jumps.jumps)
        if self._finished is not None and is_last:
            self._finished(self.ledger)
        return stats

    def check_finite(self, finite: NDArray[np.bool_]) -> None:
        """Leave a trial whose jump is tested to the test, which puts it back."""
        super().check_finite(finite | np.isin(np.arange(len(finite)), list(self.jumps.tests)))

    def get_state(self) -> PopulationState | None:
        state = super().get_state()
        if state is None:
            return None
        arrays = {PREFIX + name: array for name, array in state_of(self.jumps, self.ledger).items()}
        return dataclasses.replace(state, arrays=state.arrays | arrays)

    def set_state(self, state: PopulationState) -> None:
        own = {name: array for name, array in state.arrays.items() if not name.startswith(PREFIX)}
        super().set_state(dataclasses.replace(state, arrays=own))
        set_state_of(
            self.jumps,
            self.ledger,
            {name.removeprefix(PREFIX): it for name, it in state.arrays.items() if name.startswith(PREFIX)},
        )


def state_of(jumps: Jumps, ledger: Ledger) -> dict[str, NDArray[Any]]:
    """Return all that jumps of a population depend on, as arrays."""
    arrays: dict[str, NDArray[Any]] = {}
    walks = {f"walk.{run}": walk for run, walk in enumerate(jumps.walks)}
    walks |= {f"test.{run}.walk": test.walk for run, test in jumps.tests.items()}
    for name, walk in walks.items():
        arrays[f"{name}.path"] = np.stack(walk.path)
        arrays[f"{name}.returns"] = np.array(walk.returns, np.float64)
    for run, test in jumps.tests.items():
        arrays |= {f"test.{run}.kept.{name}": array for name, array in test.kept.arrays.items()}
    record = {
        "walks": {name: _counts(walk) for name, walk in walks.items()},
        "tests": {run: {"jump": test.jump, "env_rngs": test.kept.env_rngs} for run, test in jumps.tests.items()},
        "jumps": [dataclasses.asdict(jump) for jump in jumps.jumps],
    }
    arrays["record"] = np.frombuffer(json.dumps(record, sort_keys=True).encode(), np.uint8).copy()
    arrays["returns"] = np.array(ledger.returns, np.float64).reshape(-1, len(jumps.walks))
    return arrays


def set_state_of(jumps: Jumps, ledger: Ledger, arrays: dict[str, NDArray[Any]]) -> None:
    """Go on from a state that `state_of` returned."""
    record = json.loads(arrays["record"].tobytes())
    walks = {
        name: Walk(list(arrays[f"{name}.path"]), returns=arrays[f"{name}.returns"].tolist(), **counts)
        for name, counts in record["walks"].items()
    }
    jumps.walks = [walks[f"walk.{run}"] for run in range(len(jumps.walks))]
    jumps.jumps = [Jump(**jump) for jump in record["jumps"]]
    jumps.tests = {}
    for key, test in record["tests"].items():
        start = f"test.{key}.kept."
        held = {name.removeprefix(start): it for name, it in arrays.items() if name.startswith(start)}
        kept = KeptTrials([int(key)], held, test["env_rngs"])
        jumps.tests[int(key)] = Test(test["jump"], kept, walks[f"test.{key}.walk"])
    ledger.returns = [list(row) for row in arrays["returns"]]
    ledger.jumps = jumps.jumps


def _counts(walk: Walk) -> dict[str, Any]:
    return {name: value for name, value in vars(walk).items() if name not in ("path", "returns")}
