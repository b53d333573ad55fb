"""Callbacks of Stable-Baselines3: one records the path of the actor's weights, one lets a run jump along a forecast of
it. They need the extra `sb3`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from tipl.forecasting.forecaster import Forecaster
from tipl.jumping.jump_config import JumpConfig
from tipl.jumping.jumper import Jumper
from tipl.jumping.jumps import Jump
from tipl.storing.actor_families import Settings
from tipl.storing.foreign_actors import find_actor, shown
from tipl.storing.observation_statistics import FOLDED_NOTE, live_statistics
from tipl.storing.recorder import Recorder

try:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
    from stable_baselines3.common.vec_env import VecEnvWrapper
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("tipl.sb3 needs stable-baselines3, the extra `sb3` of tipl", name=error.name) from error

_open_recorders: dict[Path, Recorder] = {}
"""By path. SB3 calls no hook when learn() is interrupted, so that only the next callback can close the store."""

_ONLY_WATCH = {"Monitor", "RecordEpisodeStatistics", "RecordVideo", "VecMonitor", "VecCheckNan", "VecVideoRecorder"}
"""Wrappers that change neither observations nor actions nor episodes."""


class RecorderCallback(BaseCallback):
    """Records on-policy algorithms (PPO, A2C) before the first and after every update, others every `every` env steps.

        model.learn(1_000_000, callback=RecorderCallback("runs/seed1.zarr"))

    Each checkpoint has its env steps and SB3's ep_rew_mean. The last weights are recorded when training ends.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        env_id: str | None = None,
        every: int = 2048,
        actor: str | Sequence[str] | None = None,
        resume: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Record into a new store at `path`, or with `resume` after the checkpoints that are there.

        Args:
            env_id: by default that of the model's environment.
            every: env steps between checkpoints of off-policy algorithms; on-policy ones ignore it.
            resume: the last checkpoint at `path` must be the model as learn() begins, whether learn() continues the
                count of env steps (reset_num_timesteps=False) or starts it again. A store that an interrupted callback
                of this process holds open is closed first.
            actor, config: as in `Recorder`.

        Raises ValueError for a wrong `every`. Training raises what `Recorder` raises, and ValueError where the
        checkpoints at `path` are of another model.
        """
        super().__init__()
        if every < 1:
            raise ValueError(f"RecorderCallback: every must be at least 1, got {every}")
        self.path, self.env_id, self.every, self.resume, self.config = Path(path), env_id, every, resume, config
        self._actor = actor
        self._recorder: Recorder | None = None
        self._normaliser: Any = None  # the VecNormalize whose statistics are folded into each checkpoint
        self._recorded_update: int | None = None  # model._n_updates at the last checkpoint; it counts epochs
        self._earlier_steps = 0  # env steps of earlier learn() calls, where this one starts its count again

    def _on_training_start(self) -> None:
        resume = self.resume or self._recorder is not None  # learn() once more
        if resume and self.path.resolve() in _open_recorders:
            _open_recorders.pop(self.path.resolve()).close()
        self._normaliser = self._find_normaliser()
        recorder = Recorder(
            self.path,
            env_id=self.env_id or self._own_env_id(),
            actor=self._actor,
            resume=resume,
            config={"algorithm": type(self.model).__name__, "seed": self.model.seed, **(self.config or {})},
            note=self._note(),
            unnormalised=self._normaliser is None and self._is_normalised(),
            **dataclasses.asdict(_settings(self.model.policy)),
        )
        self._recorder = _open_recorders[self.path.resolve()] = recorder
        steps = self.model.num_timesteps
        try:
            holds = recorder.holds(self.model.policy, normaliser=self._normaliser)
        except ValueError:
            self._close()
            raise
        if recorder.env_steps >= steps and not holds:
            self._close()
            raise ValueError(
                f"RecorderCallback: {shown(self.path)} ends at env step {recorder.env_steps} with other weights, but "
                f"learn() begins at {steps}: to go on with the model recorded there, pass reset_num_timesteps=False to "
                "learn(); for another run, another path"
            )
        self._recorded_update = self.model._n_updates if holds else None
        self._earlier_steps = max(0, recorder.env_steps - steps)

    # SB3 has no hook after an update: the next hook is the start of another rollout, or the end of training.
    def _on_rollout_start(self) -> None:
        self._record(1 if isinstance(self.model, OnPolicyAlgorithm) else self.every)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._record(1)
        self._close()

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            _open_recorders.pop(self.path.resolve(), None)

    def _record(self, least_steps: int) -> None:
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
        )
        self._recorded_update = model._n_updates

    def _note(self) -> str | None:
        """Return in words how the run's environment differs from the simulator's; None where no difference is known."""
        notes = []
        if self._normaliser is not None:
            notes.append(FOLDED_NOTE.format(clip=self._normaliser.clip_obs))
        elif self._is_normalised():
            notes.append("observations were normalised by VecNormalize, whose statistics are not recorded")
        changes = self._changes()
        if changes:
            notes.append(
                f"the environment was not as registered, but {', '.join(changes)}: the simulator runs it as "
                "registered, where these policies may not reach the returns that they had"
            )
        return "; ".join(notes) or None

    def _find_normaliser(self) -> Any:
        """Return the VecNormalize whose statistics are folded into the policy's first layer, or None."""
        normaliser = self.model.get_vec_normalize_env()
        try:
            statistics = live_statistics(normaliser)
            if statistics is None:
                return None
            state = self.model.policy.state_dict() | statistics.to_state()
            find_actor(state, _settings(self.model.policy), self._actor).flatten(state)
        except ValueError:
            return None  # none, or of a Dict; not an MLP that they could be folded into; another number of observations
        return normaliser

    def _is_normalised(self) -> bool:
        normaliser = self.model.get_vec_normalize_env()
        return normaliser is not None and bool(normaliser.norm_obs)

    def _changes(self) -> list[str]:
        """Return in words how the environment differs from the one registered under its id."""
        changes, env = [], self.training_env
        while isinstance(env, VecEnvWrapper):
            if type(env).__name__ not in _ONLY_WATCH | {"VecNormalize", "VecTransposeImage"}:
                changes.append(f"wrapped in {type(env).__name__}")
            env = env.venv
        for spec in env.get_attr("spec"):
            if spec is None:
                continue
            registered = gymnasium.registry.get(spec.id)
            kwargs = {} if registered is None else registered.kwargs
            made = {name: value for name, value in spec.kwargs.items() if name != "render_mode"}
            if registered is not None and spec.max_episode_steps != registered.max_episode_steps:
                made["max_episode_steps"] = spec.max_episode_steps
            changes += [
                f"made with {name}={shown(repr(made[name]))}"
                for name in made
                if repr(made[name]) != repr(kwargs.get(name))
            ]
            wrappers = () if registered is None else registered.additional_wrappers
            changes += [
                f"wrapped in {it.name}"
                for it in spec.additional_wrappers[len(wrappers) :]
                if it.name not in _ONLY_WATCH
            ]
        return list(dict.fromkeys(changes))

    def _own_env_id(self) -> str:
        spec = self.training_env.get_attr("spec")[0]
        return "unknown" if spec is None else str(spec.id)


class JumpCallback(BaseCallback):
    """Lets an on-policy algorithm (PPO, A2C) jump along forecasts of its own weights, and undoes what does not hold.

        model.learn(100_000, callback=JumpCallback("runs/pendulum/model"))

    See `tipl.Jumper`. A jump that is undone puts back the policy, its optimiser and VecNormalize's statistics; the
    environments and random numbers go on. `jumps` lists what happened.
    """

    def __init__(self, model: Forecaster | str | Path | None = None, *, config: JumpConfig = JumpConfig()) -> None:
        """Forecast with the forecaster in the folder `model`, by default the one that comes with tipl.

        `config` says when the run jumps, how far, and what a jump must hold against. Training raises TypeError where
        the algorithm is not on-policy.
        """
        super().__init__()
        self._forecaster, self._config = model, config
        self._jumper: Jumper | None = None
        self._returns: list[float] = []

    @property
    def jumps(self) -> list[Jump]:
        """All jumps so far."""
        return [] if self._jumper is None else self._jumper.jumps

    def _on_training_start(self) -> None:
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise TypeError(
                f"JumpCallback: the algorithm must be on-policy, as PPO is, got {type(self.model).__name__}"
            )
        if self._jumper is not None:
            return  # learn() once more goes on with the same run
        normaliser, normalisers = self.model.get_vec_normalize_env(), {}
        if normaliser is not None:
            normalisers = {"obs_rms": normaliser.obs_rms, "ret_rms": normaliser.ret_rms}
        self._jumper = Jumper(
            self.model.policy,
            self.model.policy.optimizer,
            model=self._forecaster,
            config=self._config,
            activation=_activation(self.model.policy),
            normalisers=normalisers,
        )
        self._seen_updates = self.model._n_updates

    # SB3 has no hook after an update: the next hook is the start of another rollout.
    def _on_rollout_start(self) -> None:
        self._after_update()

    def _on_step(self) -> bool:
        self._returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_training_end(self) -> None:
        self._after_update(is_last=True)

    def _after_update(self, *, is_last: bool = False) -> None:
        if self._jumper is not None and self.model._n_updates != self._seen_updates:
            self._seen_updates = self.model._n_updates
            self._jumper.step(self._returns, is_last=is_last)
            self._returns = []


def _settings(policy: torch.nn.Module) -> Settings:
    """Return what the policy's parameters do not say of how it acts."""
    limit = getattr(getattr(policy, "actor", None), "clip_mean", None)
    is_limit = isinstance(limit, float) and 0.0 < limit < math.inf
    return Settings(_activation(policy), bool(getattr(policy, "squash_output", False)), limit if is_limit else None)


def _activation(policy: torch.nn.Module) -> str | None:
    """Return the name of the policy's activation: "tanh" for torch's Tanh, the full repr of a custom one, or None."""
    activation = getattr(policy, "activation_fn", None)
    if activation is None or getattr(activation, "__module__", "") != torch.nn.Tanh.__module__:
        return None if activation is None else repr(activation)
    return str(activation.__name__).lower()
