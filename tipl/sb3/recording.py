"""The callback that records runs of Stable-Baselines3, and lets those that were cut off go on."""

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from tipl.files.schema import is_plain_json
from tipl.sb3 import full_state
from tipl.sb3.policies import env_id_of, settings_of
from tipl.storing.actor_families import Settings
from tipl.storing.foreign_actors import find_actor
from tipl.storing.foreign_files import OWN_CLASS, SB3_LIBRARIES
from tipl.storing.live_modules import seen_in
from tipl.storing.live_wrappers import Wrapping, changing_wrappers, effect_of_class, wrapping_of
from tipl.storing.observation_statistics import live_statistics
from tipl.storing.recorder import Recorder
from tipl.storing.state_tree import global_random_states, set_global_random_states
from tipl.storing.store import Store
from tipl.storing.tensor_checks import shown

_open_recorders: dict[Path, Recorder] = {}
"""By path. SB3 calls no hook when learn() is interrupted, so that only the next callback can close the store."""

_ONLY_WATCH = {"Monitor", "RecordEpisodeStatistics", "RecordVideo", "VecMonitor", "VecCheckNan", "VecVideoRecorder"}
"""Wrappers that change neither observations nor actions nor episodes."""


class RecorderCallback(BaseCallback):
    """Records on-policy algorithms (PPO, A2C) before the first and after every update, others every `every` env steps.

        model.learn(1_000_000, callback=RecorderCallback("runs/seed1.zarr"))

    Each checkpoint has its env steps and SB3's ep_rew_mean. The last weights are recorded when training ends.

    A run that may be cut off at any moment, and goes on when the same program is started again:

        callback = RecorderCallback("runs/seed1.zarr", resume=True, full_state=True)
        model.learn(1_000_000, callback=callback)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        env_id: str | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        every: int = 2048,
        actor: str | Sequence[str] | None = None,
        resume: bool = False,
        full_state: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Record into a new store at `path`, or with `resume` after the checkpoints that are there.

        Args:
            env_id, env_kwargs: as in `Recorder`; by default those of the model's environment, where gymnasium.make made
                it and JSON can hold them.
            every: env steps between checkpoints of off-policy algorithms; on-policy ones ignore it.
            resume: the last checkpoint at `path` must be the model as learn() begins, whether learn() continues the
                count of env steps (reset_num_timesteps=False) or starts it again. A store that an interrupted callback
                of this process holds open is closed first.
            full_state: keep all that training needs beside the newest checkpoint (on-policy algorithms). With `resume`
                learn() then goes on there, on the CPU to the bit as if it had not been cut off: with a model and
                environments made as before, and the same call, whose total_timesteps counts the whole run.
            actor, config: as in `Recorder`.

        Raises ValueError for a wrong `every`. Training raises what `Recorder` raises, and ValueError where the
        checkpoints at `path` are of another model; with `full_state`, TypeError where the algorithm is not on-policy,
        RuntimeError where the state is damaged or of another run, and ValueError where the model or its environments
        are made otherwise, or learn() would not train. It warns of what cannot be kept or put back.
        """
        super().__init__()
        if every < 1:
            raise ValueError(f"RecorderCallback: every must be at least 1, got {every}")
        self.path, self.env_id, self.every, self.resume, self.config = Path(path), env_id, every, resume, config
        self._env_kwargs, self._actor, self._full_state = env_kwargs, actor, full_state
        self._recorder: Recorder | None = None
        self._wrapping = Wrapping()
        self._normaliser: Any = None  # the wrapper whose statistics are folded into each checkpoint
        self._recorded_update: int | None = None  # model._n_updates at the last checkpoint; it counts epochs
        self._earlier_steps = 0  # env steps of earlier learn() calls, where this one starts its count again
        self._at_rollout: tuple[dict[str, Any], dict[str, Any]] | None = None
        """The state and the random numbers to be put back when the first rollout has started."""
        self._warned_of: list[str] = []

    def _on_training_start(self) -> None:
        if self._full_state:
            _check_on_policy(self.model, "RecorderCallback: full_state")
        once_more = self._recorder is not None  # learn() again with this callback
        resume = self.resume or once_more
        interrupted = resume and _close_open_recorder(self.path)
        self._wrapping = self._find_wrapping()
        self._normaliser = self._find_normaliser()
        said, misread = self._settings()
        recorder = Recorder(
            self.path,
            env_id=self.env_id or env_id_of(self.training_env),
            env_kwargs=self._env_kwargs if resume and _is_without_kwargs(self.path) else self._made_with()[0],
            actor=self._actor,
            resume=resume,
            config={"algorithm": type(self.model).__name__, "seed": self.model.seed, **(self.config or {})},
            note=self._note(misread),
            unnormalised=self._why_not_run() or (self._normaliser is None and self._is_normalised()),
            activation=said.activation,
            squash=said.squash,
            mean_limit=said.mean_limit,
            discrete=said.discrete,
        )
        self._recorder = _open_recorders[self.path.resolve()] = recorder
        try:
            restores = self._full_state and (interrupted or not once_more)
            saved = recorder.restore() if restores else None
            if saved is None:
                self._begin(recorder)
            else:
                self._go_on(recorder, saved)
        except BaseException:
            self._close()
            raise

    def _begin(self, recorder: Recorder) -> None:
        """Record the model as it is, after the checkpoints that are there."""
        steps, holds = self.model.num_timesteps, recorder.holds(self.model.policy, normaliser=self._normaliser)
        if recorder.env_steps >= steps and not holds:
            without = ", which has no full state," if self._full_state else ""
            raise ValueError(
                f"RecorderCallback: {shown(self.path)}{without} ends at env step {recorder.env_steps} with other "
                f"weights, but learn() begins at {steps}: to go on with the model recorded there, pass "
                "reset_num_timesteps=False to learn(); for another run, another path"
            )
        if self._full_state and recorder.env_steps > steps:
            raise ValueError(
                f"RecorderCallback: with full_state env steps are counted on, but {shown(self.path)} ends at "
                f"{recorder.env_steps} and learn() begins at {steps}: pass reset_num_timesteps=False to learn()"
            )
        self._recorded_update = self.model._n_updates if holds else None
        self._earlier_steps = max(0, recorder.env_steps - steps)

    def _go_on(self, recorder: Recorder, saved: dict[str, Any]) -> None:
        """Put the recorded run's state back into the model, whose learn() has prepared itself to begin anew."""
        random = global_random_states()  # those that the recorder has put back
        full_state.check(self.model, saved, self.path)
        full_state.check_target(self.model, saved, self.path)
        full_state.put_back(self.model, saved, self.path)
        set_global_random_states(random)  # a reset may have drawn some
        if not recorder.holds(self.model.policy, normaliser=self._normaliser):
            raise RuntimeError(f"RecorderCallback: the state in {shown(self.path)} is not that of its last checkpoint")
        self._at_rollout = (saved, random) if saved["in_rollout"] else None
        self._recorded_update, self._earlier_steps = self.model._n_updates, 0

    # SB3 has no hook after an update: the next hook is the start of another rollout, or the end of training.
    def _on_rollout_start(self) -> None:
        if self._at_rollout is not None:  # SB3 has drawn exploration matrices once more
            saved, random = self._at_rollout
            self._at_rollout = None
            full_state.put_exploration_back(self.model, saved)
            set_global_random_states(random)
        self._record(1 if isinstance(self.model, OnPolicyAlgorithm) else self.every)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._record(1, in_rollout=False)
        self._close()

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            _open_recorders.pop(self.path.resolve(), None)

    def _record(self, least_steps: int, *, in_rollout: bool = True) -> None:
        """Append a checkpoint if the weights have changed, at least `least_steps` env steps after the last one."""
        model, recorder = self.model, self._recorder
        if recorder is None or model._n_updates == self._recorded_update:
            return
        steps = self._earlier_steps + model.num_timesteps
        if 0 <= recorder.env_steps <= steps < recorder.env_steps + least_steps:
            return
        returns = [episode["r"] for episode in model.ep_info_buffer or []]
        recorder.log(
            model.policy,
            env_steps=steps,
            episodic_return=float(np.mean(returns)) if returns else None,
            normaliser=self._normaliser,
            state=self._state(in_rollout) if self._full_state else None,
        )
        self._recorded_update = model._n_updates

    def _state(self, in_rollout: bool) -> dict[str, Any]:
        state, lost = full_state.training_state(self.model, in_rollout=in_rollout)
        if lost != self._warned_of:
            self._warned_of = lost
            if lost:
                warnings.warn(
                    f"RecorderCallback: the state of the environments cannot be kept ({'; '.join(lost)}): after a "
                    f"resume they begin new episodes, and {full_state.NOT_EQUAL}",
                    stacklevel=2,
                )
        return state

    def _settings(self) -> tuple[Settings, str]:
        """Return what the policy says of how it acts, and in words what the simulator would misread in its modules;
        the activation is then none of the simulator's, so that the policy is not run."""
        policy, said = self.model.policy, settings_of(self.model.policy)
        try:
            seen = seen_in(policy, find_actor(policy.state_dict(), said, self._actor))
        except ValueError:  # the recorder raises it again
            return said, ""
        if not seen.contradiction(said.activation or ""):
            return said, ""
        found = seen.doubt or f"{seen.activation} lies between its layers, where its activation_fn is {said.activation}"
        return dataclasses.replace(said, activation=found), found

    def _note(self, misread: str) -> str | None:
        """Return in words how the run's environment differs from the simulator's; None where no difference is known."""
        notes = [misread] if misread else []
        module = type(self.model.policy).__module__
        if not misread and not f"{module}.".startswith(SB3_LIBRARIES):
            notes.append(OWN_CLASS.format(module=shown(module)))
        if self._normaliser is not None:
            notes += self._wrapping.clips
        elif self._is_normalised():
            name = type(self._wrapping.normaliser).__name__
            notes.append(f"observations were normalised by {name}, whose statistics are not recorded")
        changes = self._wrappers() + self._made_with()[1]
        if changes:
            notes.append(
                f"the environment was not as registered, but {', '.join(changes)}: the simulator runs it as "
                "registered, where these policies may not reach the returns that they had"
            )
        return "; ".join(notes) or None

    def _find_wrapping(self) -> Wrapping:
        """Return what the environments' wrappers do beyond those of the registered environment."""
        found = wrapping_of(self.training_env)
        if found.changes or not (found.normaliser is None or isinstance(found.normaliser, VecNormalize)):
            found = wrapping_of(self.training_env, self._registered_wrappers())
        return dataclasses.replace(found, changes=(*found.changes, *self._hidden_wrappers()))

    def _registered_wrappers(self) -> set[str]:
        """Return the names of the wrappers that the environment has where it is made by its id."""
        env_id = self.env_id or env_id_of(self.training_env)
        if env_id not in gymnasium.registry:
            return set()
        try:
            with contextlib.closing(gymnasium.make(env_id, **self._made_with()[0])) as env:
                return changing_wrappers(env)
        except Exception:  # what an environment raises that is made otherwise than the run's
            return set()

    def _hidden_wrappers(self) -> list[str]:
        """Return in words the wrappers of environments in other processes that change observations or actions."""
        if "envs" in vars(self.training_env.unwrapped):
            return []
        changes: dict[str, None] = {}
        for spec in self.training_env.get_attr("spec"):
            registered = None if spec is None else gymnasium.registry.get(spec.id)
            known = len(() if registered is None else registered.additional_wrappers)
            for it in () if spec is None else spec.additional_wrappers[known:]:
                with contextlib.suppress(Exception):  # a class that cannot be imported here
                    if effect := effect_of_class(load_env_creator(it.entry_point)):  # type: ignore[arg-type]
                        changes[f"{it.name}, in another process, which changes {effect}"] = None
        return list(changes)

    def _why_not_run(self) -> str:
        """Return in words why a simulator that lacks the environments' wrappers cannot run the policy, or ""."""
        if not self._wrapping.changes:
            return ""
        return (
            f"their environment was wrapped in {'; in '.join(self._wrapping.changes)}: the simulator, without this, "
            "would give other returns; to judge such runs, register the environment with its wrappers under its own id"
        )

    def _find_normaliser(self) -> Any:
        """Return the wrapper whose statistics are folded into the policy's first layer, or None."""
        normaliser = self._wrapping.normaliser
        if normaliser is None or self._wrapping.changes:
            return None
        try:
            statistics = live_statistics(normaliser)
            if statistics is None:
                return None
            state = self.model.policy.state_dict() | statistics.to_state()
            find_actor(state, self._settings()[0], self._actor).flatten(state)
        except ValueError:
            return None  # none, or of a Dict; not an MLP that they could be folded into; another number of observations
        return normaliser

    def _is_normalised(self) -> bool:
        return self._wrapping.normaliser is not None

    def _wrappers(self) -> list[str]:
        """Return in words the wrappers around the vector of environments that may change what a policy does."""
        changes, env = [], self.training_env
        while isinstance(env, VecEnvWrapper):
            if type(env).__name__ not in _ONLY_WATCH | {"VecNormalize", "VecTransposeImage"}:
                changes.append(f"wrapped in {type(env).__name__}")
            env = env.venv
        return changes

    def _made_with(self) -> tuple[dict[str, Any], list[str]]:
        """Return the arguments that the environments were made with, and in words how they differ otherwise.

        The arguments are those of all environments that are not the registered ones, and that JSON can hold.
        """
        made, changes = [], []
        for spec in self.training_env.get_attr("spec"):
            registered = None if spec is None else gymnasium.registry.get(spec.id)
            made.append({} if spec is None else _arguments(spec, registered))
            if registered is not None and spec.max_episode_steps is None is not registered.max_episode_steps:
                changes.append("made without its time limit")
            wrappers = () if registered is None else registered.additional_wrappers
            changes += [
                f"wrapped in {it.name}"
                for it in (() if spec is None else spec.additional_wrappers[len(wrappers) :])
                if it.name not in _ONLY_WATCH and (self._normaliser is None or it.name not in self._wrapping.names)
            ]
        if self._env_kwargs is not None:
            return dict(self._env_kwargs), list(dict.fromkeys(changes))
        kept = {
            name: value
            for name, value in made[0].items()
            if is_plain_json(value) and all(repr(value) == repr(it.get(name)) for it in made)
        }
        changes += [f"made with {name}={shown(repr(it[name]))}" for it in made for name in it if name not in kept]
        return kept, list(dict.fromkeys(changes))


def _arguments(spec: Any, registered: Any) -> dict[str, Any]:
    """Return the arguments with which an environment was made that are not the registered ones."""
    kwargs = {} if registered is None else registered.kwargs
    made = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
    if registered is not None and spec.max_episode_steps not in (None, registered.max_episode_steps):
        made["max_episode_steps"] = spec.max_episode_steps
    return {name: value for name, value in made.items() if repr(value) != repr(kwargs.get(name))}


def _is_without_kwargs(path: Path) -> bool:
    """Return whether there is a recording that says no arguments of its environment, as those of older tipls."""
    return path.exists() and not Store.open(path).env_kwargs


def resume(path: str | Path, model: Any, *, actor: str | Sequence[str] | None = None) -> RecorderCallback:
    """Put the run that was recorded at `path` with full_state back into `model`; return the callback to go on with.

        model = PPO(...)  # made as before
        model.learn(1_000_000, callback=tipl.sb3.resume("runs/seed1.zarr", model))  # the end of the whole run

    The same as learn() with RecorderCallback(path, resume=True, full_state=True), except that the model is as it was
    already now, to be looked at or saved, and that there must be something to resume.

    Raises FileNotFoundError where nothing is recorded at `path`, ValueError where it has no full state or the model or
    its environments are made otherwise, RuntimeError where the state is damaged or of another run, TypeError where the
    algorithm is not on-policy. It warns of what cannot be put back.
    """
    path = Path(path)
    _check_on_policy(model, "resume: model")
    _close_open_recorder(path)
    env_id = Store.open(path).env_id
    with Recorder(path, env_id=env_id, resume=True) as recorder:
        saved = recorder.restore()
        if saved is None:
            raise ValueError(f"resume: {shown(path)} has no full state: it must be recorded with full_state=True")
        random = global_random_states()
    full_state.check(model, saved, path)
    full_state.put_back(model, saved, path)
    full_state.put_exploration_back(model, saved)
    set_global_random_states(random)
    return RecorderCallback(path, env_id=env_id, actor=actor, resume=True, full_state=True)


def _check_on_policy(model: Any, what: str) -> None:
    if not isinstance(model, OnPolicyAlgorithm):
        raise TypeError(f"{what} must be an on-policy algorithm, as PPO is, got {type(model).__name__}")


def _close_open_recorder(path: Path) -> bool:
    """Close the store if an interrupted callback of this process holds it open; return whether one did."""
    recorder = _open_recorders.pop(path.resolve(), None)
    if recorder is not None:
        recorder.close()
    return recorder is not None
