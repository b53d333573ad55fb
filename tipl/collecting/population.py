"""Many independent PPO trials at once, stepped in lockstep, parameters of all trials stacked.

The algorithm is Stable-Baselines3's PPO (Schulman et al. 2017, arXiv:1707.06347) with its defaults and its details. A
trial shares nothing with the others but the moment at which it is computed: its initial weights, environments, action
noise, minibatch order, gradient clipping and optimizer state follow from its own seed alone. Acting and the update run
in `csrc/ppo.cpp`.

Shapes  N trials of E = num_envs environments each, numbered trial by trial; T = num_steps; O = obs_dim, A = act_dim;
        P = parameters of a trial, log_std | actor | critic, of which the first p are the checkpoint.

A trial's results have the same bits for any number of threads and whatever the population around it.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tipl import _core
from tipl.collecting.envs import MujocoState, MujocoVectorEnv, VectorEnv
from tipl.policy import Activation, PolicySpec, layer_views

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Optimizer = Literal["adam", "sgd"]

OPTIMIZERS = ("adam", "sgd")
LOG_2PI = math.log(2 * math.pi)
ENV_ARRAYS = [field.name for field in dataclasses.fields(MujocoState) if field.name != "rngs"]
MIN_TRIALS_AT_ONCE = 64
OBS_EPS, OBS_LIMIT = 1e-8, 10.0  # of normalised observations, as in SB3's VecNormalize


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """PPO's hyperparameters, under CleanRL's names with Stable-Baselines3's defaults."""

    num_envs: int = 1
    """Environments of a trial, E."""
    num_steps: int = 2048
    """Steps of each environment in one iteration, T."""
    update_epochs: int = 10
    """Passes over these steps in one iteration."""
    num_minibatches: int = 32
    """Minibatches of one pass; must divide num_envs * num_steps."""
    learning_rate: float = 3e-4
    anneal_lr: bool = False
    """Let the learning rate fall linearly, iteration by iteration, to 0 after the last."""
    gamma: float = 0.99
    """Discount of the rewards."""
    gae_lambda: float = 0.95
    clip_coef: float = 0.2
    """How far the probability ratio may leave 1 and still earn."""
    clip_coef_vf: float | None = None
    """How far a value may leave what it was before the update and still learn (SB3's clip_range_vf); None: any."""
    vf_coef: float = 0.5
    """Weight of the mean squared error of the values (SB3's; CleanRL has a further factor 1/2)."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Limit of the norm of a trial's gradient, actor and critic together."""
    target_kl: float | None = None
    """A trial's update ends with the minibatch whose approx_kl is above 1.5 times this, before it takes the step."""
    optimizer: Optimizer = "adam"
    """sgd: without momentum, as SB3 with policy_kwargs=dict(optimizer_class=torch.optim.SGD)."""
    adam_eps: float = 1e-5
    normalize_advantage: bool = True
    """Normalise the advantages of each minibatch."""
    normalize_observations: bool = False
    """Let the networks see observations less their mean so far, over their deviation, clipped to 10 (SB3's
    VecNormalize). Checkpoints have it in their first layer, and so no clipping."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers, the same for actor and critic, which share none."""
    activation: Activation = "tanh"
    log_std_init: float = 0.0
    """Where log_std, the logarithm of the actions' standard deviation, starts."""
    learn_log_std: bool = True
    """False: log_std stays at log_std_init, and its gradient has no part in the norm that max_grad_norm limits."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "num_steps", "update_epochs", "num_minibatches"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"PPOConfig: {name} must be a positive int, got {value!r}")
        if self.batch_size % self.num_minibatches:
            batch, got = self.batch_size, self.num_minibatches
            raise ValueError(f"PPOConfig: num_minibatches must divide num_envs * num_steps = {batch}, got {got}")
        optional = [name for name in ("clip_coef_vf", "target_kl") if getattr(self, name) is not None]
        for name in ("learning_rate", "clip_coef", "max_grad_norm", "adam_eps", *optional):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"PPOConfig: {name} must be positive and finite, got {getattr(self, name)}")
        for name in ("vf_coef", "ent_coef"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"PPOConfig: {name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"PPOConfig: {name} must lie in [0, 1], got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"PPOConfig: optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        if not math.isfinite(self.log_std_init):
            raise ValueError(f"PPOConfig: log_std_init must be finite, got {self.log_std_init}")
        if not isinstance(self.learn_log_std, bool):
            raise ValueError(f"PPOConfig: learn_log_std must be a bool, got {self.learn_log_std!r}")
        PolicySpec(1, 1, self.hidden_sizes, self.activation)  # refuses bad sizes and activations

    @property
    def batch_size(self) -> int:
        """Environment steps of a trial in one iteration."""
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches


@dataclasses.dataclass(frozen=True)
class UpdateStats:
    """What the update of one iteration gave, per trial (N,), under CleanRL's names and averaged as SB3 averages."""

    policy_loss: Floats
    value_loss: Floats
    """Mean squared error of the values; as policy_loss and clipfrac the mean over all minibatches."""
    entropy: Floats
    """Entropy of the action distribution after the update."""
    approx_kl: Floats
    """Mean of (r - 1) - log r over the last epoch, where r is the ratio of an action's probabilities."""
    clipfrac: Floats
    """Share of the steps whose r left the clip range."""
    explained_variance: Floats
    """1 - Var(returns - values) / Var(returns), before the update; NaN where the returns do not vary."""


@dataclasses.dataclass(frozen=True)
class IterationStats(UpdateStats):
    """What one iteration gave, per trial (N,)."""

    episodic_return: Floats
    """Mean return of the episodes that ended in it; the last iteration's where none did, NaN before the first."""
    num_episodes: NDArray[np.int64]
    """Episodes that ended in it."""
    learning_rate: float
    seconds: dict[str, float]
    """Wall-clock time in "env" steps, "policy" (all else that acting takes) and "update"."""


class FinalStep(NamedTuple):
    """A step whose next value is not that of the row below: a time-out, or the last step of the iteration."""

    env: int
    t: int
    final_obs: Singles
    """(O,): what the step led to."""


@dataclasses.dataclass(frozen=True)
class Transitions:
    """The steps of one iteration. Every row is a real step: environments reset in the step that ends an episode."""

    observations: Singles
    """(N * E, T, O), as the networks see them."""
    actions: Singles
    """(N * E, T, A), not clipped to the action space."""
    log_probs: Singles
    """(N * E, T)"""
    rewards: Singles
    """(T, N * E)"""
    terminated: NDArray[np.bool_]
    """(T, N * E)"""
    truncated: NDArray[np.bool_]
    """(T, N * E)"""
    final_steps: list[FinalStep]


def gae(
    rewards: Singles,
    values: Singles,
    next_values: Singles,
    terminated: NDArray[np.bool_],
    done: NDArray[np.bool_],
    *,
    gamma: float,
    gae_lambda: float,
) -> Singles:
    """Return GAE advantages (T, N); every input is (T, N). Schulman et al. 2016, arXiv:1506.02438.

    `next_values` are the values of what each step led to; where a time limit ended the episode, of its final
    observation. `terminated` cuts the bootstrap; `done` (terminated or truncated) cuts only the running sum.
    """
    deltas = rewards + np.float32(gamma) * ~terminated * next_values - values  # (T, N)
    decay = np.float32(gamma * gae_lambda) * ~done  # (T, N)
    advantages, running = np.empty_like(deltas), np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):  # backwards, because A_t needs A_{t+1}
        running *= decay[t]
        running += deltas[t]
        advantages[t] = running
    return advantages


class ObservationScaler:
    """Mean and variance of all observations that each of N trials has made, and those observations on their scale.

    A trial's statistics are those of SB3's RunningMeanStd, which begins with a weight of 1e-4 at mean 0 and variance 1.
    """

    def __init__(self, num_trials: int, obs_dim: int) -> None:
        self.mean, self.var = np.zeros((num_trials, 1, obs_dim)), np.ones((num_trials, 1, obs_dim))
        self.count = 1e-4

    def update(self, obs: Floats) -> None:
        """Take observations (N * E, O), E of each trial."""
        obs = obs.reshape(len(self.mean), -1, obs.shape[-1])
        added = obs.shape[1]
        total = self.count + added
        shift = obs.mean(1, keepdims=True) - self.mean
        squares = self.count * self.var + added * obs.var(1, keepdims=True) + shift**2 * self.count * added / total
        self.mean = self.mean + shift * added / total
        self.var, self.count = squares / total, total

    def scaled(self, obs: Floats) -> Floats:
        """Return observations (N * E, O) on the scale of their trials."""
        rows = obs.reshape(len(self.mean), -1, obs.shape[-1])
        scaled: Floats = np.clip((rows - self.mean) / np.sqrt(self.var + OBS_EPS), -OBS_LIMIT, OBS_LIMIT)
        return scaled.reshape(obs.shape)

    def fold_into(self, weight: NDArray[Any], bias: NDArray[Any]) -> None:
        """Let the layers weight (N, out, O), bias (N, out) take observations as they are, without the limits."""
        scaled = weight / np.sqrt(self.var + OBS_EPS)
        bias -= (scaled @ self.mean.swapaxes(1, 2))[..., 0]
        weight[:] = scaled


@dataclasses.dataclass(frozen=True)
class PopulationState:
    """Everything that decides how a population goes on."""

    env_steps: int
    arrays: dict[str, NDArray[Any]]
    """A row a trial or an environment each: params (N, P), optimizer.step (N,), Adam's .exp_avg and .exp_avg_sq (N, P),
    generators (N, bytes), episodic_return (N,), running_return (N * E,), env.*, the fields of `MujocoState` but its
    rngs, and obs.mean and obs.var (N, 1, O) where observations are normalised."""
    env_rngs: list[Any]
    """(N * E,): those rngs, plain dicts."""


class Population:
    """N independent PPO trials, each in its own environments of `env`; trial i depends on seeds[i] alone.

    Args:
        env: num_envs environments a trial, trial by trial. They are reset to `environment_seeds(seeds, num_envs)`;
            whoever made them closes them.
        seeds: one int in [0, 2**32) a trial.
        init_seed: start every trial from the initial weights of this seed; all else stays its own.
        num_iterations: that anneal_lr reckons with; needed for that alone.
        num_threads: threads of the update, by default one a core; the environments have their own.
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
        threads = _core.available_cpus() if num_threads is None else num_threads
        if threads < 1:
            raise ValueError(f"Population: num_threads must be at least 1, got {num_threads}")
        if config.anneal_lr and num_iterations is None:
            raise ValueError("Population: num_iterations must be given with anneal_lr, got None")
        self.env, self.config, self.num_iterations = env, config, num_iterations
        self.spec = PolicySpec(env.obs_dim, env.act_dim, config.hidden_sizes, config.activation)
        self.env_steps = 0
        """Environment steps that each trial has made."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.params = _initial_params(self.spec, config.log_std_init, self.generators)  # (N, P)
        if init_seed is not None:
            generator = torch.Generator().manual_seed(init_seed)
            self.params[:] = _initial_params(self.spec, config.log_std_init, [generator])
        self.moments = np.zeros((2, *self.params.shape), np.float32)
        self.num_updates = np.zeros(N, np.int64)
        self.engine = _core.PpoUpdate(obs_dim=env.obs_dim, act_dim=env.act_dim, config=config, num_threads=threads)
        self.trials_at_once = max(MIN_TRIALS_AT_ONCE, 4 * threads)
        """Of one call of the native update: several for each thread."""
        self.scaler = ObservationScaler(N, env.obs_dim) if config.normalize_observations else None
        self._obs = env.reset(environment_seeds(self.seeds, config.num_envs))
        if self.scaler is not None:
            self.scaler.update(self._obs)
        self._running_return = np.zeros(env.num_envs)  # of the episodes under way
        self._episodic_return = np.full(N, np.nan)

    def weights(self) -> Singles:
        """Return a copy of the policies' flat weights, (N, p) in the layout of `spec`, for observations as they are."""
        weights = self.params[:, : self.spec.num_params].copy()
        if self.scaler is not None:
            first_layer = list(self.spec.unflatten(torch.from_numpy(weights)).values())[1:3]  # behind log_std
            self.scaler.fold_into(*(part.numpy() for part in first_layer))
        return weights

    @property
    def learning_rate(self) -> float:
        """Of the next iteration."""
        rate = self.config.learning_rate
        if self.config.anneal_lr and self.num_iterations is not None:
            rate *= 1 - self.env_steps / self.config.batch_size / self.num_iterations
        return rate

    def get_state(self) -> PopulationState | None:
        """Return a copy of the state between two iterations, or None where the environments cannot be saved."""
        if not isinstance(self.env, MujocoVectorEnv):
            return None
        env = self.env.get_state()
        arrays = {
            "params": self.params.copy(),
            "optimizer.step": self.num_updates.copy(),
            "optimizer.exp_avg": self.moments[0].copy(),
            "optimizer.exp_avg_sq": self.moments[1].copy(),
            "generators": torch.stack([generator.get_state() for generator in self.generators]).numpy(),
            "running_return": self._running_return.copy(),
            "episodic_return": self._episodic_return.copy(),
            **{f"env.{name}": getattr(env, name) for name in ENV_ARRAYS},
        }
        if self.scaler is not None:
            arrays |= {"obs.mean": self.scaler.mean.copy(), "obs.var": self.scaler.var.copy()}
            arrays["obs.count"] = np.array([self.scaler.count])
        return PopulationState(self.env_steps, arrays, env.rngs)

    def set_state(self, state: PopulationState) -> None:
        """Go on from `state`, of a population with equal arguments; num_threads may differ.

        Raises ValueError where it comes from a population with other trials, policies or environments.
        """
        own = self.get_state()
        if own is None or not isinstance(self.env, MujocoVectorEnv):
            raise ValueError(f"set_state: the environments of {self.env.env_id} cannot be set to a saved state")
        expected = {name: (str(array.dtype), array.shape) for name, array in own.arrays.items()}
        got = {name: (str(array.dtype), array.shape) for name, array in state.arrays.items()}
        if expected != got:
            raise ValueError(f"set_state: state must hold the arrays {expected}, got {got}")
        arrays = state.arrays
        self.env.set_state(MujocoState(**{name: arrays[f"env.{name}"] for name in ENV_ARRAYS}, rngs=state.env_rngs))
        self.env_steps = state.env_steps
        self.params[:] = arrays["params"]
        self.num_updates[:] = arrays["optimizer.step"]
        self.moments[0], self.moments[1] = arrays["optimizer.exp_avg"], arrays["optimizer.exp_avg_sq"]
        for generator, row in zip(self.generators, arrays["generators"], strict=True):
            generator.set_state(torch.tensor(row))
        self._obs = arrays["env.obs"].copy()
        self._running_return[:] = arrays["running_return"]
        self._episodic_return[:] = arrays["episodic_return"]
        if self.scaler is not None:
            self.scaler.mean, self.scaler.var = arrays["obs.mean"].copy(), arrays["obs.var"].copy()
            self.scaler.count = float(arrays["obs.count"][0])

    def iterate(self) -> IterationStats:
        """Run one iteration of every trial: num_steps steps of each environment, then the update.

        Raises FloatingPointError where a trial's weights are no longer finite; the population is then of no more use.
        """
        start = time.perf_counter()
        learning_rate = self.learning_rate
        transitions, num_episodes, env_seconds = self.act()
        acted = time.perf_counter()
        stats = self.update(transitions, learning_rate)
        updated = time.perf_counter()
        finite = np.isfinite(self.params).all(1)
        if not finite.all():
            i = int(np.argmin(finite))
            where = f"trial {i} (seed {self.seeds[i]}) after {self.env_steps} environment steps"
            raise FloatingPointError(f"Population: the weights of {where} are no longer finite")
        return IterationStats(
            **vars(stats),
            episodic_return=self._episodic_return.copy(),
            num_episodes=num_episodes,
            learning_rate=learning_rate,
            seconds={"env": env_seconds, "policy": acted - start - env_seconds, "update": updated - acted},
        )

    def act(self) -> tuple[Transitions, NDArray[np.int64], float]:
        """Step the environments num_steps times; return transitions, episodes ended (N,), seconds of stepping."""
        N, E, T = len(self.seeds), self.config.num_envs, self.config.num_steps
        A, obs_dim = self.env.act_dim, self.env.obs_dim
        log_std = self.params[:, :A]
        noise = np.empty((N, E, T, A), np.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            torch.randn(E, T, A, generator=generator, out=torch.from_numpy(row))
        log_probs = log_prob(noise, log_std[:, None, None])  # of the actions before clipping: of the noise alone
        noise *= np.exp(log_std)[:, None, None]
        transitions = Transitions(
            observations=np.empty((N * E, T, obs_dim), np.float32),
            actions=noise.reshape(N * E, T, A),  # the means are added step by step
            log_probs=log_probs.reshape(N * E, T),
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
            action = transitions.actions[:, t]
            action += self.mean_actions(obs.reshape(N, E, obs_dim)).reshape(N * E, A)
            start = time.perf_counter()
            step = self.env.step(action.astype(np.float64))
            env_seconds += time.perf_counter() - start
            transitions.rewards[t] = step.reward
            transitions.terminated[t] = step.terminated
            transitions.truncated[t] = step.truncated
            self._obs = step.obs
            if self.scaler is not None:
                self.scaler.update(step.obs)
            self._running_return += step.reward
            done = step.terminated | step.truncated
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

    def mean_actions(self, obs: Singles) -> Singles:
        """Return the policies' mean actions (N, R, A) for observations as they see them, (N, R, O)."""
        spec = self.spec
        return _core.mean_actions(
            self.params, obs, act_dim=spec.act_dim, hidden_sizes=spec.hidden_sizes, activation=spec.activation
        )

    def _seen(self, obs: Floats) -> Singles:
        """Return observations (N * E, O) as the networks see them."""
        return (obs if self.scaler is None else self.scaler.scaled(obs)).astype(np.float32)

    def update(self, transitions: Transitions, learning_rate: float) -> UpdateStats:
        """Run the epochs of one iteration."""
        N, S, config = len(self.seeds), self.config.batch_size, self.config
        values, advantages = self.estimate(transitions)
        # By trial, and by step no more: what memory holds here is what collecting takes.
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
        for start in range(0, N, self.trials_at_once):  # the orders of all would take more memory than the steps
            part = slice(start, start + self.trials_at_once)
            order = np.empty((len(self.seeds[part]), config.update_epochs, S), np.int32)
            for epochs, generator in zip(order, self.generators[part], strict=True):
                for row in epochs:
                    torch.randperm(S, generator=generator, dtype=torch.int32, out=torch.from_numpy(row))
            views = {name: array[part] for name, array in arrays.items()}
            losses.append(self.engine.update(**views, order=order, learning_rate=learning_rate))
        policy_loss, value_loss, clipfrac, approx_kl = np.concatenate(losses).T
        return UpdateStats(
            policy_loss=policy_loss,
            value_loss=value_loss,
            entropy=entropy(self.params[:, : self.spec.act_dim]),
            approx_kl=approx_kl,
            clipfrac=clipfrac,
            explained_variance=_explained_variance(returns, advantages),
        )

    def estimate(self, transitions: Transitions) -> tuple[Singles, Singles]:
        """Return the critic's values and the advantages of the steps, (T, N * E) each."""
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
        """Return the values of what each step led to, (T, N * E), given those of what it started from."""
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
    """Return the seeds of the trials' environments, trial by trial: a trial's own for its first, then derived ones."""
    return [
        seed if j == 0 else int(np.random.SeedSequence(seed, spawn_key=(j,)).generate_state(1)[0])
        for seed in seeds
        for j in range(num_envs)
    ]


def log_prob(noise: Singles, log_std: Singles) -> Singles:
    """Return the log-probabilities (...) of actions mean + exp(log_std) noise, both (..., A)."""
    A = noise.shape[-1]
    result: Singles = -0.5 * np.square(noise).sum(-1) - (log_std.sum(-1) + np.float32(0.5 * LOG_2PI * A))
    return result


def entropy(log_std: Singles) -> Floats:
    """Return the entropies (N,) of the action distributions; log_std (N, A)."""
    result: Floats = (log_std.astype(np.float64) + 0.5 * (1 + LOG_2PI)).sum(1)
    return result


def _initial_params(spec: PolicySpec, log_std: float, generators: Sequence[torch.Generator]) -> Singles:
    """Return SB3's initial parameters (N, P), each row's weights drawn from its generator; the biases are zero."""
    critic_sizes = (*spec.layer_sizes[:-1], 1)
    P = spec.num_params + sum(fan_out * (fan_in + 1) for fan_in, fan_out in itertools.pairwise(critic_sizes))
    params = torch.zeros(len(generators), P)
    params[:, : spec.act_dim] = log_std
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the QR decomposition behind orthogonal_ has other last bits on other numbers
    try:
        for row, generator in zip(params, generators, strict=True):
            nets = ((spec.act_dim, spec.layer_sizes, 0.01), (spec.num_params, critic_sizes, 1.0))
            for offset, sizes, head_gain in nets:
                *hidden, head = layer_views(row[None, offset:], sizes)
                for weight, _ in hidden:
                    torch.nn.init.orthogonal_(weight[0], math.sqrt(2), generator)
                torch.nn.init.orthogonal_(head[0][0], head_gain, generator)
    finally:
        torch.set_num_threads(num_threads)
    return params.numpy()


def _explained_variance(returns: Singles, errors: Singles) -> Floats:
    """Return 1 - Var(errors) / Var(returns) over the steps, (N,), NaN where the returns (N, S) do not vary."""
    variance: Floats = returns.var(1, dtype=np.float64)
    variance[variance == 0] = np.nan
    explained: Floats = 1 - errors.var(1, dtype=np.float64) / variance
    return explained
