"""Record the path of a policy's weights in any torch training loop."""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsFloat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl.files.schema import plain_json
from tipl.policy import PolicySpec
from tipl.storing.actor_families import STATISTICS, Settings
from tipl.storing.foreign_actors import Actor, differences, find_actor
from tipl.storing.import_notes import activation_missing, source_record
from tipl.storing.live_modules import Seen, seen_in
from tipl.storing.observation_statistics import live_note, live_statistics
from tipl.storing.run_state import encode_state, load_state, put_back, save_state
from tipl.storing.state_tree import set_global_random_states
from tipl.storing.store import UNKNOWN, UNNORMALISED, Store, env_of


class Recorder:
    """Appends checkpoints of one policy to a store of one trial; `tipl import` joins several such stores into one.

        with tipl.Recorder("runs/seed1.zarr", env_id="Hopper-v5") as recorder:
            for update in range(num_updates):
                ...
                recorder.log(agent, env_steps=global_step, episodic_return=mean_return)

    `log` copies the actor's parameters (`foreign_actors` describes which those are) and appends them. When it returns,
    the checkpoint is on disk, and a killed process does not lose it. With `state` it also keeps what training needs to
    go on, and `restore` puts that back.
    """

    # Over 60 lines because its docstring, the reference of all arguments, takes most of them.
    def __init__(
        self,
        path: str | Path,
        *,
        env_id: str = UNKNOWN,
        env_kwargs: Mapping[str, Any] | None = None,
        activation: str | None = None,
        actor: str | Sequence[str] | None = None,
        resume: bool = False,
        config: Mapping[str, Any] | None = None,
        note: str | None = None,
        unnormalised: bool | str = False,
        squash: bool = False,
        mean_limit: float | None = None,
        discrete: bool | Literal["logits", "values"] = False,
        halves: bool = False,
    ) -> None:
        """Record into a new store at `path`, which the first `log` creates.

        Args:
            env_id: the Gymnasium id; `tipl evaluate` needs it.
            env_kwargs: the arguments with which the environment was made, beside its id, as plain JSON; all that runs
                the policies later uses them.
            activation: between the policy's layers, tanh, relu, elu or silu; by default that of the modules between
                them. It must be given where these show none and the simulator can run the policy. Any other text, such
                as "other", records a policy that the simulator would misread, whose modules do something else: its
                weights are then kept and not run.
            actor: prefix of the actor's keys, or several, where the policy holds other networks too; "" takes all
                parameters but critics'.
            resume: append to the store that an earlier recorder left at `path`, if there is one.
            config: the run's settings, plain JSON, kept in the store.
            note: what a user of the store must know, kept in its config and shown by `tipl import`.
            unnormalised: the policy sees observations that are normalised, and `log` is not told how: it cannot be run
                in the simulator. A text says in words for what other reason it cannot, such as a wrapper's changes.
            squash: the actions of a policy of Stable-Baselines3's PPO or A2C with gSDE (squash_output=True), or of
                TorchRL's (TanhNormal), are the tanh of its mean. Those of SAC and TD3 always are.
            mean_limit: to what a policy of Stable-Baselines3's SAC with gSDE clips its mean (clip_mean); without it,
                such a policy cannot be run in the simulator.
            discrete: the policy chooses one of several discrete actions, as those of Stable-Baselines3's and CleanRL's
                PPO can and DQN's do; without it, such a policy cannot be run in the simulator. An MLP with names of
                its own needs "logits" or "values", what its outputs are, as in `import_checkpoints`.
            halves: the last layer has two outputs for each action, first all means and then what becomes standard
                deviations, as in `import_checkpoints`: TorchRL's NormalParamExtractor, and rsl_rl's
                HeteroscedasticGaussianDistribution.

        Raises FileExistsError where `path` exists and `resume` is not set; RuntimeError where the store is damaged or
        another recorder has it open; ValueError where it is not a recording of this environment, or `discrete` and
        `halves` are both set.
        """
        self.path = Path(path)
        self._env_id, self._config = env_id, dict(config or {})
        self._env_kwargs = None if env_kwargs is None else plain_json("Recorder: env_kwargs", env_kwargs)
        if halves and discrete:
            raise ValueError(
                f"Recorder: halves is for continuous actions, and discrete is {discrete!r}: leave one of them out"
            )
        outputs = None if isinstance(discrete, bool) else discrete
        self._settings = Settings(activation, squash, mean_limit, bool(discrete), outputs, halves)
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
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Append the policy's weights as they are now.

        Args:
            policy: a module or a state_dict, with the same parameter names and shapes in every call.
            env_steps: environment steps that it has learned from; must grow from call to call.
            episodic_return: mean return of the last episodes; None or NaN where no episode has ended.
            normaliser: what normalises the policy's observations: a VecNormalize, a NormalizeObservation of
                Gymnasium's, environments wrapped in one of these, or any object with `mean` and `var` (obs_dim,). Its
                statistics as they are now are folded into the first layer, so that each checkpoint acts on observations
                as the environment gives them; what is clipped is not clipped. Given in every call or in none.
            state: all else that training needs to go on, for `restore`: by name, objects with a state_dict (modules,
                optimisers, schedulers), generators of random numbers, and trees of tensors, arrays and plain values.
                The random numbers of Python, NumPy and torch are kept with it. Only the newest state is kept.

        Raises ValueError, and appends nothing, where the parameters' names or shapes differ from earlier ones, a value
        is NaN or Inf, or env_steps does not grow; TypeError where an entry of `state` is none of these. After an
        OSError (a full disk) earlier checkpoints are intact, and a recorder with `resume` continues from them.
        """
        tensors = _tensors("log", policy, normaliser)
        if not isinstance(env_steps, int | np.integer) or isinstance(env_steps, bool):
            raise TypeError(f"log: env_steps must be an int, got {env_steps!r:.80}")
        if not (episodic_return is None or isinstance(episodic_return, SupportsFloat)):
            raise TypeError(f"log: episodic_return must be a number or None, got {episodic_return!r:.80}")
        if env_steps <= self.env_steps:
            raise ValueError(f"log: env_steps must grow: {self.env_steps} are recorded, got {env_steps}")
        try:
            if self._actor is None:
                self._actor = self._begin(policy, tensors)
            if (self._actor.normaliser == STATISTICS) != (f"{STATISTICS}_mean" in tensors):
                raise ValueError("normaliser must be given in every call or in none")
            weights = self._actor.flatten(tensors)
        except ValueError as error:
            raise ValueError(f"log: policy: {error}") from error
        encoded = None if state is None else encode_state(state)
        if self._store is None:
            folded = live_note(normaliser) if self._actor.normaliser == STATISTICS else ""
            self._store = self._create(self._actor, folded)
        if encoded is not None:
            save_state(self._store, encoded, weights, int(env_steps), episodic_return)
        self._append(weights, env_steps, np.nan if episodic_return is None else episodic_return)

    def restore(self, objects: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Put the newest state that `log` kept back into objects, and return its other entries; None without a state.

            saved = recorder.restore({"agent": agent, "optimiser": optimiser})
            first_update = 0 if saved is None else saved["update"] + 1

        The random numbers of Python, NumPy and torch go on as well. Of an entry that had a state_dict and is not among
        `objects`, the state_dict is returned. A checkpoint that was not appended, because the process was killed as it
        saved its state, is appended now.

        Raises ValueError where an object has other parameters than were saved, or `objects` has a name that the state
        lacks; TypeError where an object can take no state; RuntimeError where the state is damaged or of another run,
        or the run was recorded on without it.
        """
        saved = None if self._store is None else load_state(self._store, "restore")
        if self._store is None or saved is None:
            return None
        objects = objects or {}
        missing = objects.keys() - saved.entries.keys()
        if missing:
            raise ValueError(f"restore: objects must be among {sorted(saved.entries)}, got {sorted(missing)}")
        for name, entry in objects.items():
            try:
                put_back(entry, saved.entries[name])
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"restore: {name}: {error}") from error
        set_global_random_states(saved.random)
        if self._store.num_checkpoints < saved.num_checkpoints:
            self._append(saved.weights, saved.env_steps, saved.episodic_return)
        return {name: entry for name, entry in saved.entries.items() if name not in objects}

    def holds(self, policy: torch.nn.Module | Mapping[str, Tensor], *, normaliser: Any = None) -> bool:
        """Return whether the last checkpoint on disk equals the policy's weights as they are now, as `log` takes them.

        With a normaliser the first layer is not compared: statistics go on where weights stay, as in a reset.

        Raises ValueError where the parameters' names or shapes differ from those recorded, or a value is NaN or Inf.
        """
        if self._store is None or not self._store.num_checkpoints:
            return False
        try:
            tensors = _tensors("Recorder", policy, normaliser)
            actor = self._first(tensors)
            weights = actor.flatten(tensors)
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

    def _append(self, weights: NDArray[np.float32], env_steps: int, episodic_return: float) -> None:
        assert self._store is not None
        returns = np.array([[episodic_return]], np.float64)
        self._store.append(weights[None, None], np.array([[env_steps]], np.int64), returns)
        self.env_steps = env_steps

    def _begin(self, policy: torch.nn.Module | Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Actor:
        """Return the actor of a recording that begins or goes on, whose activation is known where it can be run.

        Raises ValueError where nothing says it, or the policy's modules say that the simulator would act otherwise.
        """
        seen = Seen()
        if isinstance(policy, torch.nn.Module):
            seen = seen_in(policy, find_actor(tensors, self._settings, self._keys))
        if self._settings.activation is not None:
            actor = self._first(tensors)
            if contradiction := seen.contradiction(self._settings.activation):
                raise ValueError(contradiction)
            return actor
        recorded = None if self._store is None else self._store.policy
        known = recorded.activation if isinstance(recorded, PolicySpec) else None
        if seen.doubt and (seen.is_certain or known is None):
            raise ValueError(seen.question())
        self._settings = dataclasses.replace(self._settings, activation=seen.activation or known)
        actor = self._first(tensors)
        if self._settings.activation is None and isinstance(actor.policy, PolicySpec):
            raise ValueError(activation_missing(actor.policy))
        return actor

    def _first(self, state: Mapping[str, Tensor]) -> Actor:
        """Return the actor in `state`, which must equal that of the recording if one is resumed."""
        found = find_actor(state, self._settings, self._keys)
        if self._store is not None:
            recorded = Actor.from_dict(self._store.config["source"]["actor"])
            if recorded.kind == "other" != found.kind and recorded.keys == found.keys:
                return recorded  # by a tipl that did not know this kind
            if found != recorded:
                reason = differences(recorded.policy, found.policy) or "its keys or its normaliser are others"
                if found.kind == "other" and recorded.keys == found.keys:
                    reason = "it was recorded as one that the simulator runs, which it is not: choose another path"
                raise ValueError(f"it does not fit {self.path}: {reason}")
        return found

    def _create(self, actor: Actor, folded: str) -> Store:
        source = source_record(actor, "recorder", folded, self._note)
        marked = {UNNORMALISED: self._unnormalised} if self._unnormalised else {}
        config = {**self._config, "source": source | marked}
        return Store.create(
            self.path,
            env_id=self._env_id,
            env_kwargs=self._env_kwargs,
            policy=actor.policy,
            seeds=[0],
            config=config,
        )

    def _resume(self) -> Store:
        store = Store.open(self.path, writable=True)
        env_kwargs = store.env_kwargs if self._env_kwargs is None else self._env_kwargs
        env = env_of(self._env_id, env_kwargs)
        if store.config.get("source", {}).get("format") != "recorder" or store.env != env:
            store.close()
            raise ValueError(f"Recorder: {self.path} must be a recording of {env} to append to, got {store!r}")
        if self._unnormalised and not store.is_unnormalised:
            why = (
                self._unnormalised
                if isinstance(self._unnormalised, str)
                else "its policies saw normalised observations"
            )
            warnings.warn(
                f"Recorder: {self.path}, recorded by another tipl or otherwise, does not say that the simulator must "
                f"not run its policies: {why}",
                stacklevel=3,
            )
        if store.num_checkpoints:
            self.env_steps = int(store.trial(0).env_steps[-1])
        return store


def _tensors(owner: str, policy: torch.nn.Module | Mapping[str, Tensor], normaliser: Any) -> dict[str, Tensor]:
    """Return the policy's tensors, and beside them the statistics of what normalises its observations.

    Raises TypeError for another policy, ValueError for another normaliser; error texts begin with `owner`.
    """
    if not isinstance(policy, torch.nn.Module | Mapping):
        raise TypeError(f"{owner}: policy must be a torch.nn.Module or a state_dict, got {type(policy).__name__}")
    state = policy.state_dict() if isinstance(policy, torch.nn.Module) else policy
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    try:
        statistics = None if normaliser is None else live_statistics(normaliser)
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error
    return tensors if statistics is None else tensors | statistics.to_state()
