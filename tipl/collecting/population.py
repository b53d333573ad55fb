"""Many independent PPO trials that learn in lockstep, with the parameters of all trials stacked in one array.

The algorithm is Stable-Baselines3's PPO (Schulman et al. 2017, arXiv:1707.06347) with its defaults and its details.
Trials share nothing but the time at which they are computed: a trial's initial weights, environments, action noise,
minibatch order, gradient clipping and optimizer state depend on its own seed alone. Acting and the update run in
`csrc/ppo.cpp`.

Shapes  N trials of E = num_envs environments each, numbered trial by trial; T = num_steps; O = obs_dim; A outputs of an
        actor, the means of a continuous action or the logits of A discrete ones; P = number of parameters of a trial,
        ordered log_std | actor | critic; the first p of them are the checkpoint. Of discrete actions there is no
        log_std.

A trial's results have the same bits for any number of threads and whichever trials are beside it.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tipl import _core
from tipl.collecting.action_noise import Actions, CategoricalActions, GaussianActions, spec_of_actions
from tipl.collecting.env_checks import check_settings
from tipl.collecting.envs import MujocoState, MujocoVectorEnv
from tipl.collecting.initial_parameters import critic_sizes, initial_parameters
from tipl.collecting.observation_scaler import ObservationScaler
from tipl.collecting.population_records import IterationStats, KeptTrials, PopulationState, UpdateStats
from tipl.collecting.ppo_config import PPOConfig
from tipl.collecting.reward_scaler import RewardScaler
from tipl.collecting.transitions import FinalStep, Transitions, entropy, explained_variance, gae
from tipl.collecting.vector_env import VectorEnv
from tipl.policy import ParameterLayout

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

ENV_ARRAYS = [field.name for field in dataclasses.fields(MujocoState) if field.name != "rngs"]
MIN_TRIALS_AT_ONCE = 64  # in one call of the native update, which takes all trials where there are fewer


class Population:
    """N independent PPO trials, each in its own environments of `env`; trial i depends on seeds[i] alone.

    Args:
        env: `config.num_envs` environments for each trial, trial by trial. They are reset to
            `environment_seeds(seeds, num_envs)`. The caller closes them.
        seeds: one int in [0, 2**32) for each trial.
        init_seed: start all trials from the initial weights of this seed; everything else follows each trial's own.
        num_iterations: length of the whole run, which anneal_lr needs; otherwise not used.
        num_threads: threads of the update, by default one per core; the environments have their own.

    Raises ValueError where `env`, `seeds`, `num_iterations` or `num_threads` do not fit the above, or `config` does not
    fit `env`.
    """

    def __init__(
        self,
        env: VectorEnv,
        config: PPOConfig,
        seeds: Sequence[int],
        *,
        init_seed: int | None = None,
        num_iterations: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        N = len(seeds)
        self.seeds = [int(seed) for seed in seeds]
        if env.num_envs != N * config.num_envs:
            raise ValueError(
                f"Population: seeds must have one entry for every {config.num_envs} of {env.num_envs} environments, "
                f"got {N}"
            )
        for seed in self.seeds:
            if not 0 <= seed < 2**32:  # torch's generator takes no more bits
                raise ValueError(f"Population: seeds must lie in [0, 2**32), got {seed}")
        check_settings("Population", env, config)
        threads = _core.available_cpus() if num_threads is None else num_threads
        if threads < 1:
            raise ValueError(f"Population: num_threads must be at least 1, got {num_threads}")
        if config.anneal_lr and num_iterations is None:
            raise ValueError("Population: num_iterations must be given with anneal_lr, got None")
        self.env, self.config, self.num_iterations = env, config, num_iterations
        self.spec = spec_of_actions(env.obs_dim, env.act_dim, env.num_actions, config)
        self.env_steps = 0
        """Environment steps that each trial has taken."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.params = initial_parameters(self.spec, config, self.generators)  # (N, P)
        if init_seed is not None:
            generator = torch.Generator().manual_seed(init_seed)
            self.params[:] = initial_parameters(self.spec, config, [generator])
        self.moments = np.zeros((2, *self.params.shape), np.float32)
        self.num_updates = np.zeros(N, np.int64)
        self.engine = _core.PpoUpdate(
            obs_dim=env.obs_dim,
            act_dim=self.spec.act_dim,
            config=config,
            num_threads=threads,
            discrete=self.spec.discrete,
        )
        self.trials_at_once = max(MIN_TRIALS_AT_ONCE, 4 * threads)
        """Trials in one call of the native update: several for each thread."""
        self.observation_scaler = ObservationScaler(N, env.obs_dim) if config.normalize_observations else None
        self.reward_scaler = RewardScaler(N, config.num_envs, config.gamma) if config.normalize_rewards else None
        self._obs = env.reset(environment_seeds(self.seeds, config.num_envs))
        if self.observation_scaler is not None:
            self.observation_scaler.update(self._obs)
        self._running_return = np.zeros(env.num_envs)  # rewards so far in each environment's current episode
        self._episodic_return = np.full(N, np.nan)

    def weights(self) -> Singles:
        """Return a copy of the policies' flat weights, (N, p) in the layout of `spec`; they take raw observations."""
        weights = self.params[:, : self.spec.num_params].copy()
        if self.observation_scaler is not None:
            parts, first = list(self.spec.unflatten(torch.from_numpy(weights)).values()), self.spec.first_layer
            self.observation_scaler.fold_into(*(part.numpy() for part in parts[first : first + 2]))
        return weights

    @property
    def critic_layout(self) -> ParameterLayout:
        """Which of a trial's parameters is which behind the policy's p."""
        sizes = critic_sizes(self.spec)
        parameters: list[tuple[str, tuple[int, ...]]] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            name = "value_net" if i == len(sizes) - 2 else f"critic_net.{2 * i}"
            parameters += [(f"{name}.weight", (fan_out, fan_in)), (f"{name}.bias", (fan_out,))]
        return ParameterLayout(tuple(parameters))

    def critic_weights(self) -> Singles:
        """Return a copy of the critics' flat weights, in the layout of `critic_layout`."""
        return self.params[:, self.spec.num_params :].copy()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next iteration."""
        rate = self.config.learning_rate
        if self.config.anneal_lr and self.num_iterations is not None:
            rate *= 1 - self.env_steps / self.config.batch_size / self.num_iterations
        return rate

    def get_state(self) -> PopulationState | None:
        """Return a copy of the state between two iterations, or None where the environments' state cannot be saved."""
        kept = self.keep(range(len(self.seeds)))
        return None if kept.env_rngs is None else PopulationState(self.env_steps, kept.arrays, kept.env_rngs)

    def set_state(self, state: PopulationState) -> None:
        """Continue from `state`, which a population with equal arguments returned; num_threads may differ.

        Raises ValueError where the state's population had other numbers of trials, policies or environments.
        """
        own = Population.get_state(self)
        if own is None or not isinstance(self.env, MujocoVectorEnv):
            raise ValueError(f"set_state: the environments of {self.env.env_id} cannot be set to a saved state")
        expected = {name: (str(array.dtype), array.shape) for name, array in own.arrays.items()}
        got = {name: (str(array.dtype), array.shape) for name, array in state.arrays.items()}
        if expected != got:
            raise ValueError(f"set_state: state must hold the arrays {expected}, got {got}")
        self.env_steps = state.env_steps
        self.put_back(KeptTrials(range(len(self.seeds)), state.arrays, state.env_rngs))

    def keep(self, trials: Sequence[int]) -> KeptTrials:
        """Return a copy of all that the next iteration of some trials depends on, apart from `env_steps`.

        Where the environments' state cannot be saved, it is left out.
        """
        rows = list(trials)
        arrays = {name: array[rows] for name, array in self._learned().items()}  # copies: the index is a list
        arrays["generators"] = self._generator_rows(rows)
        if not isinstance(self.env, MujocoVectorEnv):
            return KeptTrials(rows, arrays, None)
        env, envs = self.env.get_state(), self._envs_of(rows)
        arrays |= {name: array[envs] for name, array in self._episodes().items()}
        arrays |= {f"env.{name}": getattr(env, name)[envs] for name in ENV_ARRAYS}
        return KeptTrials(rows, arrays, [env.rngs[j] for j in envs])

    def put_back(self, kept: KeptTrials) -> None:
        """Set the trials in `kept` to what they were, bit for bit; the others and `env_steps` stay.

        Environments whose state cannot be saved stay where they are, in the midst of an episode.
        """
        rows = list(kept.trials)
        for name, array in self._learned().items():
            array[rows] = kept.arrays[name]
        for i, row in zip(rows, kept.arrays["generators"], strict=True):
            self.generators[i].set_state(torch.tensor(row))
        if kept.env_rngs is None or not isinstance(self.env, MujocoVectorEnv):
            return
        envs, state = self._envs_of(rows), self.env.get_state()
        for name in ENV_ARRAYS:
            getattr(state, name)[envs] = kept.arrays[f"env.{name}"]
        for j, rng in zip(envs, kept.env_rngs, strict=True):
            state.rngs[j] = rng
        self.env.set_state(state)
        self._obs = state.obs.copy()
        for name, array in self._episodes().items():
            array[envs] = kept.arrays[name]

    def _learned(self) -> dict[str, NDArray[Any]]:
        """Return what trials have learned, one row for each, under the names of `PopulationState`; these are views."""
        arrays: dict[str, NDArray[Any]] = {
            "params": self.params,
            "optimizer.step": self.num_updates,
            "optimizer.exp_avg": self.moments[0],
            "optimizer.exp_avg_sq": self.moments[1],
            "episodic_return": self._episodic_return,
        }
        for name, scaler in (("obs", self.observation_scaler), ("reward", self.reward_scaler)):
            if scaler is not None:
                arrays |= {f"{name}.mean": scaler.mean, f"{name}.var": scaler.var, f"{name}.count": scaler.count}
        return arrays

    def _episodes(self) -> dict[str, Floats]:
        """Return sums over the environments' current episodes, each (N * E,), as `_learned` returns its arrays."""
        arrays = {"running_return": self._running_return}
        if self.reward_scaler is not None:
            arrays["discounted_return"] = self.reward_scaler.discounted_return
        return arrays

    def _generator_rows(self, trials: Sequence[int]) -> NDArray[np.uint8]:
        return torch.stack([self.generators[i].get_state() for i in trials]).numpy()

    def _envs_of(self, trials: Sequence[int]) -> list[int]:
        """Return the indices of these trials' environments."""
        num_envs = self.config.num_envs
        return [i * num_envs + j for i in trials for j in range(num_envs)]

    def iterate(self) -> IterationStats:
        """Run one iteration of every trial: num_steps steps of each environment, then the update.

        Raises FloatingPointError where a trial's weights are no longer finite; the population must not be used after.
        """
        start = time.perf_counter()
        learning_rate = self.learning_rate
        transitions, num_episodes, env_seconds = self.act()
        acted = time.perf_counter()
        stats = self.update(transitions, learning_rate)
        updated = time.perf_counter()
        self.check_finite(np.asarray(np.isfinite(self.params).all(1)))
        return IterationStats(
            **vars(stats),
            episodic_return=self._episodic_return.copy(),
            num_episodes=num_episodes,
            learning_rate=learning_rate,
            seconds={"env": env_seconds, "policy": acted - start - env_seconds, "update": updated - acted},
        )

    def check_finite(self, finite: NDArray[np.bool_]) -> None:
        """Raise FloatingPointError where a trial's weights are no longer finite; `finite` (N,) says whose are."""
        if not finite.all():
            i = int(np.argmin(finite))
            where = f"trial {i} (seed {self.seeds[i]}) after {self.env_steps} environment steps"
            raise FloatingPointError(f"Population: the weights of {where} are no longer finite")

    def act(self) -> tuple[Transitions, NDArray[np.int64], float]:
        """Step the environments num_steps times.

        Returns the transitions, the number of episodes that ended in each trial (N,), and the seconds spent in `env`.
        """
        N, E, T = len(self.seeds), self.config.num_envs, self.config.num_steps
        A, obs_dim = self.spec.act_dim, self.env.obs_dim
        actions = self._actions()
        transitions = Transitions(
            observations=np.empty((N * E, T, obs_dim), np.float32),
            actions=actions.actions,
            log_probs=actions.log_probs,
            rewards=np.empty((T, N * E), np.float32),
            terminated=np.empty((T, N * E), np.bool_),
            truncated=np.empty((T, N * E), np.bool_),
            final_steps=[],
        )
        returns, num_episodes = np.zeros(N * E), np.zeros(N * E, np.int64)
        env_seconds = 0.0
        for t in range(T):
            obs = self._seen(self._obs)
            transitions.observations[:, t] = obs
            taken = actions.take(t, self.mean_actions(obs.reshape(N, E, obs_dim)).reshape(N * E, A))
            start = time.perf_counter()
            step = self.env.step(taken)
            env_seconds += time.perf_counter() - start
            transitions.terminated[t] = step.terminated
            transitions.truncated[t] = step.truncated
            self._obs = step.obs
            if self.observation_scaler is not None:
                self.observation_scaler.update(step.obs)
            done = step.terminated | step.truncated
            reward = step.reward if self.reward_scaler is None else self.reward_scaler.step(step.reward, done)
            transitions.rewards[t] = reward
            self._running_return += step.reward
            last = t == T - 1
            if last or done.any():
                returns[done] += self._running_return[done]
                num_episodes[done] += 1
                self._running_return[done] = 0.0
                final_obs = self._seen(step.final_obs)
                for j in range(N * E) if last else np.flatnonzero(step.truncated & ~step.terminated).tolist():
                    transitions.final_steps.append(FinalStep(j, t, final_obs[j]))
        self.env_steps += self.config.batch_size
        ended = num_episodes.reshape(N, E).sum(1)
        known = ended > 0
        self._episodic_return[known] = returns.reshape(N, E).sum(1)[known] / ended[known]
        return transitions, ended, env_seconds

    def _actions(self) -> Actions:
        """Draw the noise of one iteration."""
        E, T = self.config.num_envs, self.config.num_steps
        if self.spec.discrete:
            return CategoricalActions(self.spec.act_dim, self.env.action_low[0], self.generators, E, T)
        return GaussianActions(self.params[:, : self.spec.act_dim], self.generators, E, T)

    def mean_actions(self, obs: Singles) -> Singles:
        """Return the actors' outputs (N, R, A), mean actions or logits, for R observations of each, (N, R, O).

        The observations are normalised if the settings say so.
        """
        spec = self.spec
        return _core.mean_actions(
            self.params,
            obs,
            act_dim=spec.act_dim,
            hidden_sizes=spec.hidden_sizes,
            activation=spec.activation,
            discrete=spec.discrete,
        )

    def _seen(self, obs: Floats) -> Singles:
        """Return observations (N * E, O) as the networks see them: float32, normalised if the settings say so."""
        return (obs if self.observation_scaler is None else self.observation_scaler.scaled(obs)).astype(np.float32)

    def update(self, transitions: Transitions, learning_rate: float) -> UpdateStats:
        """Run all epochs of one iteration's update."""
        N, S, config = len(self.seeds), self.config.batch_size, self.config
        values, advantages = self.estimate(transitions)
        # The arrays ordered by trial replace those ordered by step: the peak memory of a collection is reached here.
        values, advantages = (np.ascontiguousarray(steps.T).reshape(N, S) for steps in (values, advantages))
        returns = advantages + values
        arrays = {
            "params": self.params,
            "first_moments": self.moments[0],
            "second_moments": self.moments[1],
            "num_updates": self.num_updates,
            "observations": transitions.observations.reshape(N, S, -1),
            "actions": transitions.actions.reshape(N, S, -1),
            "log_probs": transitions.log_probs.reshape(N, S),
            "advantages": advantages,
            "returns": returns,
            "values": values,
        }
        losses = []
        for start in range(0, N, self.trials_at_once):  # minibatch orders of all trials would outweigh the steps
            part = slice(start, start + self.trials_at_once)
            order = np.empty((len(self.seeds[part]), config.update_epochs, S), np.int32)
            for epochs, generator in zip(order, self.generators[part], strict=True):
                for row in epochs:
                    torch.randperm(S, generator=generator, dtype=torch.int32, out=torch.from_numpy(row))
            views = {name: array[part] for name, array in arrays.items()}
            losses.append(self.engine.update(**views, order=order, learning_rate=learning_rate))
        policy_loss, value_loss, clipfrac, approx_kl, *entropies = np.concatenate(losses).T
        return UpdateStats(
            policy_loss=policy_loss,
            value_loss=value_loss,
            entropy=entropies[0] if self.spec.discrete else entropy(self.params[:, : self.spec.act_dim]),
            approx_kl=approx_kl,
            clipfrac=clipfrac,
            explained_variance=explained_variance(returns, advantages),
        )

    def estimate(self, transitions: Transitions) -> tuple[Singles, Singles]:
        """Return the critic's values of the steps' observations and the steps' advantages, (T, N * E) each."""
        N, (T, J) = len(self.seeds), transitions.rewards.shape
        values = self.engine.values(self.params, transitions.observations.reshape(N, J // N * T, -1)).reshape(J, T).T
        advantages = gae(
            transitions.rewards,
            values,
            self.next_values(values, transitions),
            transitions.terminated,
            transitions.terminated | transitions.truncated,
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
        )
        return values, advantages

    def next_values(self, values: Singles, transitions: Transitions) -> Singles:
        """Return the values of the observations after each step, (T, N * E), given `values` of those before it."""
        finals: list[list[FinalStep]] = [[] for _ in self.seeds]
        for step in transitions.final_steps:
            finals[step.env // self.config.num_envs].append(step)
        final_obs = np.zeros((len(finals), max(map(len, finals)), self.env.obs_dim), np.float32)
        for rows, steps in zip(final_obs, finals, strict=True):
            rows[: len(steps)] = [step.final_obs for step in steps]
        next_values = np.roll(values, -1, 0)
        for steps, row in zip(finals, self.engine.values(self.params, final_obs), strict=True):
            next_values[[step.t for step in steps], [step.env for step in steps]] = row[: len(steps)]
        return next_values


def environment_seeds(seeds: Sequence[int], num_envs: int) -> list[int]:
    """Return the seeds of all environments, trial by trial: the trial's seed for its first, derived ones after it."""
    return [
        seed if j == 0 else int(np.random.SeedSequence(seed, spawn_key=(j,)).generate_state(1)[0])
        for seed in seeds
        for j in range(num_envs)
    ]
