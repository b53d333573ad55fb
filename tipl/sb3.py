"""A callback of Stable-Baselines3 that records the path of the actor's weights. Needs the extra `sb3`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tipl.recorder import Recorder

try:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("tipl.sb3 needs stable-baselines3, the extra `sb3` of tipl", name=error.name) from error


class RecorderCallback(BaseCallback):
    """Records PPO and A2C before the first and after every update, SAC, TD3 and the like every `every` env steps.

        model.learn(1_000_000, callback=RecorderCallback("runs/seed1.zarr"))

    A checkpoint has the env steps and SB3's ep_rew_mean. The last weights are recorded when training ends.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        env_id: str | None = None,
        every: int = 2048,
        resume: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`env_id` is by default the environment's own; `every` counts off-policy only; the rest as in `Recorder`.

        Training raises what `Recorder` raises.
        """
        super().__init__()
        if every < 1:
            raise ValueError(f"RecorderCallback: every must be at least 1, got {every}")
        self.path, self.env_id, self.every, self.resume, self.config = Path(path), env_id, every, resume, config
        self._recorder: Recorder | None = None
        self._recorded_update: int | None = None  # model._n_updates, which grows by one an epoch

    def _on_training_start(self) -> None:
        if self._recorder is not None:  # learn() once more: go on behind its last checkpoint
            self._recorder.close()
        self._recorder = Recorder(
            self.path,
            env_id=self.env_id or self._own_env_id(),
            activation=_activation(self.model.policy),
            resume=self.resume or self._recorder is not None,
            config={"algorithm": type(self.model).__name__, "seed": self.model.seed, **(self.config or {})},
            note=self._note(),
        )
        if self._recorder.env_steps == self.model.num_timesteps:
            self._recorded_update = self.model._n_updates

    # No hook fires right after an update: the next one is the start of another rollout, or the end of training.
    def _on_rollout_start(self) -> None:
        self._record(1 if isinstance(self.model, OnPolicyAlgorithm) else self.every)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._record(1)
        if self._recorder is not None:
            self._recorder.close()

    def _record(self, least_steps: int) -> None:
        """Append a checkpoint if the weights have changed and at least so many env steps were taken since the last."""
        model, recorder = self.model, self._recorder
        if recorder is None or model._n_updates == self._recorded_update:
            return
        if 0 <= recorder.env_steps <= model.num_timesteps < recorder.env_steps + least_steps:
            return
        returns = [episode["r"] for episode in model.ep_info_buffer or []]
        recorder.log(
            model.policy,
            env_steps=model.num_timesteps,
            episodic_return=float(np.mean(returns)) if returns else None,
        )
        self._recorded_update = model._n_updates

    def _note(self) -> str | None:
        normaliser = self.model.get_vec_normalize_env()
        if normaliser is None or not normaliser.norm_obs:
            return None
        return (
            "observations were normalised by VecNormalize, whose statistics are not recorded: in the simulator these "
            "policies do not reach the returns that they had"
        )

    def _own_env_id(self) -> str:
        spec = self.training_env.get_attr("spec")[0]
        return "unknown" if spec is None else str(spec.id)


def _activation(policy: torch.nn.Module) -> str | None:
    """Return the name of the activation that the policy was built with, as `tipl` has it."""
    activation = getattr(policy, "activation_fn", None)
    return None if activation is None else str(activation.__name__).lower()
