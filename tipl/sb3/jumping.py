"""The callback that lets a run of Stable-Baselines3 jump along a forecast of its own weights."""

from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from tipl.forecasting.forecaster import Forecaster
from tipl.jumping.jump_config import JumpConfig
from tipl.jumping.jumper import Jumper
from tipl.jumping.jumps import Jump, warn_if_too_short
from tipl.sb3.policies import activation_of, env_id_of


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
            env_id=env_id_of(self.training_env),
            activation=activation_of(self.model.policy),
            normalisers=normalisers,
        )
        self._seen_updates = self.model._n_updates
        steps, to_go = self.model.n_steps * self.model.n_envs, self.model._total_timesteps - self.model.num_timesteps
        warn_if_too_short("JumpCallback", "config.start", self._jumper.first_jump, to_go, -(-to_go // steps))

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
