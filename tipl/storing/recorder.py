"""Record the path of a policy's weights in any torch training loop."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tipl.policy import ACTIVATIONS, PolicySpec
from tipl.storing.actor_families import STATISTICS, Settings
from tipl.storing.foreign_actors import Actor, differences, find_actor
from tipl.storing.imported_runs import activation_missing, source_record
from tipl.storing.observation_statistics import live_statistics
from tipl.storing.store import UNNORMALISED, Store


class Recorder:
    """Appends checkpoints of one policy to a store of one trial; `tipl import` joins several such stores into one.

        with tipl.Recorder("runs/seed1.zarr", env_id="Hopper-v5") as recorder:
            for update in range(num_updates):
                ...
                recorder.log(agent, env_steps=global_step, episodic_return=mean_return)

    `log` copies the actor's parameters (`foreign_actors` describes which those are) and appends them. When it returns,
    the checkpoint is on disk, and a killed process does not lose it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        env_id: str = "unknown",
        activation: str | None = None,
        actor: str | Sequence[str] | None = None,
        resume: bool = False,
        config: Mapping[str, Any] | None = None,
        note: str | None = None,
        unnormalised: bool = False,
        squash: bool = False,
        mean_limit: float | None = None,
    ) -> None:
        """Record into a new store at `path`, which the first `log` creates.

        Args:
            env_id: the Gymnasium id; `tipl evaluate` needs it.
            activation: between the policy's layers, tanh, relu or elu; by default that of the policy's modules. It must
                be given where these have none, or several, and the simulator can run the policy.
            actor: prefix of the actor's keys, or several, where the policy holds other networks too; "" takes all
                parameters but critics'.
            resume: append to the store that an earlier recorder left at `path`, if there is one.
            config: the run's settings, plain JSON, kept in the store.
            note: what a user of the store must know, kept in its config and shown by `tipl import`.
            unnormalised: the policy sees observations that are normalised, and `log` is not told how: it cannot be run
                in the simulator.
            squash: the actions of a policy of Stable-Baselines3's PPO or A2C with gSDE are the tanh of its mean
                (squash_output=True). Those of SAC and TD3 always are.
            mean_limit: to what a policy of Stable-Baselines3's SAC with gSDE clips its mean (clip_mean); without it,
                such a policy cannot be run in the simulator.

        Raises FileExistsError where `path` exists and `resume` is not set; RuntimeError where the store is damaged or
        another recorder has it open; ValueError where it is not a recording of this env_id.
        """
        self.path = Path(path)
        self._env_id, self._config = env_id, dict(config or {})
        self._settings = Settings(activation, squash, mean_limit)
        self._keys, self._note, self._unnormalised = actor, note or "", unnormalised
        self._store: Store | None = None
        self._actor: Actor | None = None
        self.env_steps = -1
        """Environment steps at the last checkpoint, -1 before the first."""
        if self.path.exists():
            if not resume:
                raise FileExistsError(f"Recorder: {path} exists; choose another path, or pass resume=True to append")
            self._store = self._resume()

    def log(
        self,
        policy: torch.nn.Module | Mapping[str, Tensor],
        *,
        env_steps: int,
        episodic_return: float | None = None,
        normaliser: Any = None,
    ) -> None:
        """Append the policy's weights as they are now.

        Args:
            policy: a module or a state_dict, with the same parameter names and shapes in every call.
            env_steps: environment steps that it has learned from; must grow from call to call.
            episodic_return: mean return of the last episodes; None or NaN where no episode has ended.
            normaliser: what normalises the policy's observations: a VecNormalize, a NormalizeObservation of
                Gymnasium's, or any object with `mean` and `var` (obs_dim,). Its statistics as they are now are folded
                into the first layer, so that each checkpoint acts on observations as the environment gives them; what
                it clips is not clipped. Given in every call or in none.

        Raises ValueError, and appends nothing, where the parameters' names or shapes differ from earlier ones, a value
        is NaN or Inf, or env_steps does not grow. After an OSError (a full disk) earlier checkpoints are intact, and
        a recorder with `resume` continues from them.
        """
        state = _state(policy, normaliser)
        if env_steps <= self.env_steps:
            raise ValueError(f"log: env_steps must grow: {self.env_steps} are recorded, got {env_steps}")
        try:
            if self._actor is None:
                if self._settings.activation is None:
                    self._settings = dataclasses.replace(self._settings, activation=self._activation_of(policy))
                self._actor = self._first(state)
                if self._settings.activation is None and isinstance(self._actor.policy, PolicySpec):
                    raise ValueError(activation_missing(self._actor.policy))
            if (self._actor.normaliser == STATISTICS) != (f"{STATISTICS}_mean" in state):
                raise ValueError("normaliser must be given in every call or in none")
            weights = self._actor.flatten(state)
        except ValueError as error:
            raise ValueError(f"log: policy: {error}") from error
        if self._store is None:
            self._store = self._create(self._actor)
        returns = np.array([[np.nan if episodic_return is None else episodic_return]], np.float64)
        self._store.append(weights[None, None], np.array([[env_steps]], np.int64), returns)
        self.env_steps = env_steps

    def holds(self, policy: torch.nn.Module | Mapping[str, Tensor], *, normaliser: Any = None) -> bool:
        """Return whether the last checkpoint on disk equals the policy's weights as they are now, as `log` takes them.

        With a normaliser the first layer is not compared: statistics go on where weights stay, as in a reset.

        Raises ValueError where the parameters' names or shapes differ from those recorded, or a value is NaN or Inf.
        """
        if self._store is None or not self._store.num_checkpoints:
            return False
        try:
            state = _state(policy, normaliser)
            actor = self._first(state)
            weights = actor.flatten(state)
        except ValueError as error:
            raise ValueError(f"Recorder: policy: {error}") from error
        last = self._store.num_checkpoints - 1
        same = self._store.trial(0).weights(last, last + 1)[0] == weights
        if actor.normaliser == STATISTICS:
            assert isinstance(actor.policy, PolicySpec)
            first = actor.policy.first_layer
            for offset, shape in list(actor.policy.layout.values())[first : first + 2]:
                same[offset : offset + math.prod(shape)] = True
        return bool(same.all())

    def close(self) -> None:
        """Close the store, so that another writer may open it; `log` can no longer append."""
        if self._store is not None:
            self._store.close()

    @property
    def num_checkpoints(self) -> int:
        """Number of checkpoints on disk."""
        return 0 if self._store is None else self._store.num_checkpoints

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _activation_of(self, policy: torch.nn.Module | Mapping[str, Tensor]) -> str | None:
        """Return the one kind of activation among the policy's modules, or that of the recording that is resumed; None
        where neither says one."""
        modules = policy.modules() if isinstance(policy, torch.nn.Module) else ()
        names = {type(module).__name__.lower() for module in modules} & set(ACTIVATIONS)
        if len(names) == 1:
            return names.pop()
        recorded = None if self._store is None else self._store.policy
        return recorded.activation if isinstance(recorded, PolicySpec) else None

    def _first(self, state: Mapping[str, Tensor]) -> Actor:
        """Return the actor in `state`, which must equal that of the recording if one is resumed."""
        found = find_actor(state, self._settings, self._keys)
        if self._store is not None:
            recorded = Actor.from_dict(self._store.config["source"]["actor"])
            if recorded.kind == "other" != found.kind and recorded.keys == found.keys:
                return recorded  # by a tipl that did not know this kind
            if found != recorded:
                reason = differences(recorded.policy, found.policy) or "its keys or its normaliser are others"
                raise ValueError(f"it does not fit {self.path}: {reason}")
        return found

    def _create(self, actor: Actor) -> Store:
        source = source_record(actor, "recorder", self._note)
        config = {**self._config, "source": source | ({UNNORMALISED: True} if self._unnormalised else {})}
        return Store.create(self.path, env_id=self._env_id, policy=actor.policy, seeds=[0], config=config)

    def _resume(self) -> Store:
        store = Store.open(self.path, writable=True)
        if store.config.get("source", {}).get("format") != "recorder" or store.env_id != self._env_id:
            store.close()
            raise ValueError(f"Recorder: {self.path} must be a recording of {self._env_id} to append to, got {store!r}")
        if store.num_checkpoints:
            self.env_steps = int(store.trial(0).env_steps[-1])
        return store


def _state(policy: torch.nn.Module | Mapping[str, Tensor], normaliser: Any) -> dict[str, Tensor]:
    """Return the policy's tensors, and beside them the statistics of what normalises its observations."""
    state = policy.state_dict() if isinstance(policy, torch.nn.Module) else policy
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    statistics = None if normaliser is None else live_statistics(normaliser)
    return tensors if statistics is None else tensors | statistics.to_state()
