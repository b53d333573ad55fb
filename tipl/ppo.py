"""Many independent PPO trials at once: one environment a trial, stepped in lockstep, parameters of all trials stacked.

The algorithm is Stable-Baselines3's PPO (Schulman et al. 2017, arXiv:1707.06347) with its defaults and its details. A
trial shares nothing with the others but the moment at which it is computed: its initial weights, environment, action
noise, minibatch order, gradient clipping and Adam state follow from its own seed alone.

Shapes  N trials, C of them in one worker's hands; T = num_steps, M = num_minibatches, B = T / M; O = obs_dim,
        A = act_dim; P = parameters of a trial, log_std | actor | critic, of which the first p are the checkpoint.

A trial's results do not depend on the number of threads nor on the population around it: to the bit where B is a
multiple of 16, as by default, which lets every trial's matrices lie alike in memory, else but for rounding.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl.envs import MujocoState, MujocoVectorEnv, VectorEnv
from tipl.policy import Activation, PolicySpec, StackedMLP, layer_views, round_up

Floats = NDArray[np.float64]

LOG_2PI = math.log(2 * math.pi)
ENV_ARRAYS = [field.name for field in dataclasses.fields(MujocoState) if field.name != "rngs"]
TRIALS_PER_JOB = 16  # what one worker updates before it turns to the next trials; their activations fit the L2 cache


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """PPO's hyperparameters, under CleanRL's names with Stable-Baselines3's defaults."""

    num_steps: int = 2048
    """Environment steps of a trial in one iteration, T."""
    update_epochs: int = 10
    """Passes over these steps in one iteration."""
    num_minibatches: int = 32
    """Minibatches of one pass, M; must divide num_steps."""
    learning_rate: float = 3e-4
    gamma: float = 0.99
    """Discount of the rewards."""
    gae_lambda: float = 0.95
    clip_coef: float = 0.2
    """How far the probability ratio may leave 1 and still earn."""
    vf_coef: float = 0.5
    """Weight of the mean squared error of the values (SB3's; CleanRL has a further factor 1/2)."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Limit of the norm of a trial's gradient, actor and critic together."""
    adam_eps: float = 1e-5
    normalize_advantage: bool = True
    """Normalise the advantages of each minibatch."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers, the same for actor and critic, which share none."""
    activation: Activation = "tanh"

    def __post_init__(self) -> None:
        for name in ("num_steps", "update_epochs", "num_minibatches"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"PPOConfig: {name} must be a positive int, got {value!r}")
        if self.num_steps % self.num_minibatches:
            got = self.num_minibatches
            raise ValueError(f"PPOConfig: num_minibatches must divide num_steps = {self.num_steps}, got {got}")
        for name in ("learning_rate", "clip_coef", "max_grad_norm", "adam_eps"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"PPOConfig: {name} must be positive and finite, got {getattr(self, name)}")
        for name in ("vf_coef", "ent_coef"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"PPOConfig: {name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"PPOConfig: {name} must lie in [0, 1], got {getattr(self, name)}")
        PolicySpec(1, 1, self.hidden_sizes, self.activation)  # refuses bad sizes and activations

    @property
    def minibatch_size(self) -> int:
        return self.num_steps // self.num_minibatches


@dataclasses.dataclass(frozen=True)
class UpdateStats:
    """What the update of one iteration gave, per trial (N,), under CleanRL's names and averaged as SB3 averages."""

    policy_loss: Floats
    value_loss: Floats
    """Mean squared error of the values; as policy_loss and clipfrac the mean over the minibatches of all epochs."""
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
    seconds: dict[str, float]
    """Wall-clock time in "env" steps, "policy" (all else that acting takes) and "update"."""


class FinalStep(NamedTuple):
    """A step whose next value is not that of the row below: a time-out, or the last step of the iteration."""

    trial: int
    t: int
    final_obs: NDArray[np.float32]
    """(O,): what the step led to."""


@dataclasses.dataclass(frozen=True)
class Transitions:
    """The steps of one iteration. Every row is a real step: environments reset in the step that ends an episode."""

    observations: Tensor
    """(N, T, O)"""
    actions: Tensor
    """(N, T, A), not clipped to the action space."""
    log_probs: Tensor
    """(N, T)"""
    rewards: NDArray[np.float32]
    """(T, N)"""
    terminated: NDArray[np.bool_]
    """(T, N)"""
    truncated: NDArray[np.bool_]
    """(T, N)"""
    final_steps: list[FinalStep]


def gae(
    rewards: NDArray[np.float32],
    values: NDArray[np.float32],
    next_values: NDArray[np.float32],
    terminated: NDArray[np.bool_],
    done: NDArray[np.bool_],
    *,
    gamma: float,
    gae_lambda: float,
) -> NDArray[np.float32]:
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


def log_prob(noise: Tensor, log_std: Tensor) -> Tensor:
    """Return the log-probabilities (N, B) of actions mean + exp(log_std) noise; noise (N, B, A), log_std (N, 1, A)."""
    return noise.square().sum(-1).mul_(-0.5).sub_(log_std.sum(-1).add_(0.5 * LOG_2PI * noise.shape[-1]))


def entropy(log_std: Tensor) -> Tensor:
    """Return the entropies (N,) of the action distributions; log_std (N, 1, A)."""
    return (log_std + 0.5 * (1 + LOG_2PI)).sum((1, 2))


def clip_grad_norms_(grads: Tensor, max_norm: float) -> None:
    """Scale each row of grads (N, P) whose norm is above max_norm down to it, as torch's clip_grad_norm_ does."""
    norms = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
    grads.mul_((max_norm / (norms + 1e-6)).clamp_(max=1.0))


class Learner:
    """The updates of trials [first, first + C): reads their transitions, and owns their gradients and Adam state.

    Forward and backward are by hand into buffers made once, on the calling thread.
    """

    def __init__(self, spec: PolicySpec, config: PPOConfig, params: Tensor, first: int = 0) -> None:
        C, B, A, p = len(params), config.minibatch_size, spec.act_dim, spec.num_params
        self.config, self.trials = config, range(first, first + C)
        self.grads = torch.zeros_like(params)  # (C, P)
        params.grad = self.grads
        self.optimizer = torch.optim.Adam([params], lr=config.learning_rate, eps=config.adam_eps, fused=True)
        self.log_std, self.log_std_grad = params[:, None, :A], self.grads[:, None, :A]  # (C, 1, A)
        self.actor = StackedMLP(params[:, A:], spec.layer_sizes, spec.activation, B, self.grads[:, A:])
        self.critic = StackedMLP(params[:, p:], _critic_sizes(spec), spec.activation, B, self.grads[:, p:])
        # Of each minibatch of an epoch, for the statistics.
        self.log_ratios, self.objectives, self.value_errors = params.new_empty(3, config.num_minibatches, C, B)

    def update(self, transitions: Transitions, generators: Sequence[torch.Generator]) -> UpdateStats:
        """Run the epochs of one iteration; generators (C,) give the minibatch orders. The statistics are (C,)."""
        config, trials = self.config, slice(self.trials.start, self.trials.stop)
        C, T, M, B = len(self.trials), config.num_steps, config.num_minibatches, config.minibatch_size
        values, advantages = self.estimate(transitions)
        returns = advantages + values
        # One row a step, so that one index picks the same minibatch of all trials.
        observations, actions = (x[trials].flatten(0, 1) for x in (transitions.observations, transitions.actions))
        scalars = [torch.from_numpy(x.T.reshape(-1)) for x in (advantages, returns)]
        scalars.append(transitions.log_probs[trials].flatten())  # (C * T,) each
        order = torch.empty(C, T, dtype=torch.int64)
        sums = torch.zeros(3, C, dtype=torch.float64)
        for _ in range(config.update_epochs):
            for i, generator in enumerate(generators):
                torch.randperm(T, generator=generator, out=order[i])
                order[i] += i * T
            epoch = order.view(C, M, B).transpose(0, 1).reshape(M, C * B)
            advantage, target, old_log_prob = (x[epoch].view(M, C, B) for x in scalars)
            if config.normalize_advantage and B > 1:
                std, mean = torch.std_mean(advantage, -1, keepdim=True)
                advantage = (advantage - mean) / (std + 1e-8)
            for m, rows in enumerate(epoch):
                obs, action = (x.index_select(0, rows).view(C, B, -1) for x in (observations, actions))
                self.backpropagate(m, obs, action, old_log_prob[m], advantage[m], target[m])
                clip_grad_norms_(self.grads, config.max_grad_norm)
                self.optimizer.step()
            ratios = self.log_ratios.exp()
            clipped = (ratios - 1).abs() > config.clip_coef
            sums += torch.stack([x.double().mean((0, 2)) for x in (-self.objectives, self.value_errors**2, clipped)])
        policy_loss, value_loss, clipfrac = (sums / config.update_epochs).numpy()
        return UpdateStats(
            policy_loss=policy_loss,
            value_loss=value_loss,
            entropy=entropy(self.log_std).double().numpy(),
            approx_kl=(ratios - 1 - self.log_ratios).double().mean((0, 2)).numpy(),
            clipfrac=clipfrac,
            explained_variance=_explained_variance(returns, advantages),
        )

    def backpropagate(
        self, m: int, obs: Tensor, action: Tensor, old_log_prob: Tensor, advantage: Tensor, target: Tensor
    ) -> None:
        """Write the gradient of PPO's loss on minibatch m of an epoch into `grads`; the inputs are (C, B, ...).

        loss = mean over B of [-min(r advantage, clip(r) advantage) + vf_coef (value - target)^2] - ent_coef entropy
        """
        config, B = self.config, obs.shape[1]
        inv_std = torch.exp(-self.log_std)
        noise = (action - self.actor.forward(obs)).mul_(inv_std)  # (C, B, A)
        log_ratio = torch.sub(log_prob(noise, self.log_std), old_log_prob, out=self.log_ratios[m])
        ratio = log_ratio.exp()
        objective = ratio * advantage
        clipped = ratio.clamp_(1 - config.clip_coef, 1 + config.clip_coef).mul_(advantage)
        torch.minimum(objective, clipped, out=self.objectives[m])
        # r is its own derivative by the log-probability; where the clipped side is the smaller, the loss is constant.
        log_prob_grad = objective.mul_(objective <= clipped).mul_(-1 / B)[..., None]  # (C, B, 1)
        mean_grad = (noise * log_prob_grad).mul_(inv_std)
        torch.sum(noise.square_().sub_(1).mul_(log_prob_grad), 1, keepdim=True, out=self.log_std_grad)
        self.log_std_grad -= config.ent_coef
        self.actor.backward(mean_grad)
        value_error = torch.sub(self.critic.forward(obs)[..., 0], target, out=self.value_errors[m])
        self.critic.backward((value_error * (2 * config.vf_coef / B))[..., None])

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return a copy of Adam's state, a row a trial: step (C,), exp_avg and exp_avg_sq (C, P)."""
        (params,) = self.optimizer.param_groups[0]["params"]
        state = self.optimizer.state[params]  # empty before the first step
        step = state.get("step", torch.zeros(()))
        moments = {name: state.get(name, torch.zeros_like(params)).clone() for name in ("exp_avg", "exp_avg_sq")}
        return {"step": step.repeat(len(params)), **moments}

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `optimizer_state` returned; its trials may have come from other learners, in step."""
        (params,) = self.optimizer.param_groups[0]["params"]
        moments = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
        self.optimizer.state[params] = {"step": state["step"][0].clone(), **moments}

    def estimate(self, transitions: Transitions) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the critic's values and the advantages of the steps, (T, C) each."""
        trials = slice(self.trials.start, self.trials.stop)
        values = self.values(transitions.observations[trials]).numpy().T
        terminated, truncated = transitions.terminated[:, trials], transitions.truncated[:, trials]
        advantages = gae(
            transitions.rewards[:, trials],
            values,
            self.next_values(values, transitions),
            terminated,
            terminated | truncated,
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
        )
        return values, advantages

    def values(self, obs: Tensor) -> Tensor:
        """Return the critic's values (C, R) of obs (C, R, O), R a multiple of B."""
        B = self.config.minibatch_size
        return torch.cat([self.critic.forward(rows)[..., 0].clone() for rows in torch.split(obs, B, 1)], 1)

    def next_values(self, values: NDArray[np.float32], transitions: Transitions) -> NDArray[np.float32]:
        """Return the values of what each step led to, (T, C), given the values (T, C) of what it started from."""
        finals = [[step for step in transitions.final_steps if step.trial == trial] for trial in self.trials]
        B = self.config.minibatch_size
        rows = -(-max(map(len, finals)) // B) * B  # whole minibatches, because the critic's buffers have that size
        final_obs = torch.zeros(len(finals), rows, transitions.observations.shape[-1])
        for i, steps in enumerate(finals):
            final_obs[i, : len(steps)] = torch.from_numpy(np.array([step.final_obs for step in steps]))
        final_values = self.values(final_obs).numpy()
        next_values = np.roll(values, -1, 0)
        for i, steps in enumerate(finals):
            next_values[[step.t for step in steps], i] = final_values[i, : len(steps)]
        return next_values


@dataclasses.dataclass(frozen=True)
class PopulationState:
    """Everything that decides how a population goes on."""

    env_steps: int
    arrays: dict[str, NDArray[Any]]
    """A row a trial each: params (N, P), the learners' optimizer.*, generators (N, bytes), running_return and
    episodic_return (N,), and env.*, the fields of `MujocoState` but its rngs."""
    env_rngs: list[Any]
    """(N,): those rngs, plain dicts."""


class Population:
    """N independent PPO trials, one to each environment of `env`; trial i depends on seeds[i] alone.

    Args:
        env: its environments are reset to `seeds`; whoever made it closes it.
        seeds: one int in [0, 2**32) a trial.
        shared_init: start every trial from the initial weights of seeds[0]; all else stays its own.
        num_threads: threads of the update, by default as many as torch uses; the environments have their own.
    """

    def __init__(
        self,
        env: VectorEnv,
        config: PPOConfig,
        seeds: Sequence[int],
        *,
        shared_init: bool = False,
        num_threads: int | None = None,
    ) -> None:
        N = env.num_envs
        self.seeds = [int(seed) for seed in seeds]
        if len(self.seeds) != N:
            raise ValueError(
                f"Population: seeds must have one entry for each of {N} environments, got {len(self.seeds)}"
            )
        for seed in self.seeds:
            if not 0 <= seed < 2**32:  # torch's generator takes no more bits
                raise ValueError(f"Population: seeds must lie in [0, 2**32), got {seed}")
        threads = torch.get_num_threads() if num_threads is None else num_threads
        if threads < 1:
            raise ValueError(f"Population: num_threads must be at least 1, got {num_threads}")
        self.env, self.config = env, config
        self.spec = PolicySpec(env.obs_dim, env.act_dim, config.hidden_sizes, config.activation)
        self.env_steps = 0
        """Environment steps that each trial has made."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self.params = _initial_params(self.spec, self.generators)
        if shared_init:
            self.params[1:] = self.params[0]
        self._actor = StackedMLP(self.params[:, env.act_dim :], self.spec.layer_sizes, config.activation, batch_size=1)
        jobs = min(N, threads * math.ceil(N / (threads * TRIALS_PER_JOB)))
        bounds = [N * job // jobs for job in range(jobs + 1)]
        self.learners = [
            Learner(self.spec, config, self.params[first:last], first) for first, last in itertools.pairwise(bounds)
        ]
        self._workers = ThreadPoolExecutor(threads, "ppo-update", torch.set_num_threads, (1,))
        self._obs = env.reset(self.seeds)
        self._running_return = np.zeros(N)  # of the episodes under way
        self._episodic_return = np.full(N, np.nan)

    def weights(self) -> NDArray[np.float32]:
        """Return a copy of the policies' flat weights, (N, p) in the layout of `spec`."""
        return self.params[:, : self.spec.num_params].numpy().copy()

    def get_state(self) -> PopulationState | None:
        """Return a copy of the state between two iterations, or None where the environments cannot be saved."""
        if not isinstance(self.env, MujocoVectorEnv):
            return None
        env = self.env.get_state()
        optimizers = [learner.optimizer_state() for learner in self.learners]
        arrays = {
            "params": self.params.numpy().copy(),
            **{f"optimizer.{name}": torch.cat([part[name] for part in optimizers]).numpy() for name in optimizers[0]},
            "generators": torch.stack([generator.get_state() for generator in self.generators]).numpy(),
            "running_return": self._running_return.copy(),
            "episodic_return": self._episodic_return.copy(),
            **{f"env.{name}": getattr(env, name) for name in ENV_ARRAYS},
        }
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
        self.params.copy_(torch.tensor(arrays["params"]))
        for learner in self.learners:
            trials = slice(learner.trials.start, learner.trials.stop)
            names = [name for name in arrays if name.startswith("optimizer.")]
            learner.load_optimizer_state(
                {name.removeprefix("optimizer."): torch.tensor(arrays[name][trials]) for name in names}
            )
        for generator, row in zip(self.generators, arrays["generators"], strict=True):
            generator.set_state(torch.tensor(row))
        self._obs = arrays["env.obs"].copy()
        self._running_return[:] = arrays["running_return"]
        self._episodic_return[:] = arrays["episodic_return"]

    def iterate(self) -> IterationStats:
        """Run one iteration of every trial: num_steps environment steps, then the update.

        Raises FloatingPointError where a trial's weights are no longer finite; the population is then of no more use.
        """
        # One torch thread: the operations are too small to share, and idle OpenMP threads would spin beside the others.
        with _torch_threads(1):
            start = time.perf_counter()
            transitions, num_episodes, env_seconds = self.act()
            acted = time.perf_counter()
            parts = list(self._workers.map(lambda learner: self._update(learner, transitions), self.learners))
            updated = time.perf_counter()
        finite = torch.isfinite(self.params).all(1)
        if not finite.all():
            i = int(finite.logical_not().nonzero()[0])
            where = f"trial {i} (seed {self.seeds[i]}) after {self.env_steps} environment steps"
            raise FloatingPointError(f"Population: the weights of {where} are no longer finite")
        names = [field.name for field in dataclasses.fields(UpdateStats)]
        return IterationStats(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
            episodic_return=self._episodic_return.copy(),
            num_episodes=num_episodes,
            seconds={"env": env_seconds, "policy": acted - start - env_seconds, "update": updated - acted},
        )

    def _update(self, learner: Learner, transitions: Transitions) -> UpdateStats:
        return learner.update(transitions, [self.generators[i] for i in learner.trials])

    def act(self) -> tuple[Transitions, NDArray[np.int64], float]:
        """Step the environments num_steps times; return transitions, episodes ended (N,), seconds of stepping."""
        N, T, A = self.env.num_envs, self.config.num_steps, self.env.act_dim
        log_std = self.params[:, None, :A]
        noise = torch.empty(N, T, A)
        for row, generator in zip(noise, self.generators, strict=True):
            torch.randn(T, A, generator=generator, out=row)
        log_probs = log_prob(noise, log_std)  # of the actions before clipping: a function of the noise alone
        transitions = Transitions(
            observations=torch.empty(N, T, self.env.obs_dim),
            actions=noise.mul_(log_std.exp()),  # the means are added step by step
            log_probs=log_probs,
            rewards=np.empty((T, N), np.float32),
            terminated=np.empty((T, N), np.bool_),
            truncated=np.empty((T, N), np.bool_),
            final_steps=[],
        )
        observations, actions = transitions.observations.numpy(), transitions.actions.numpy()  # the same memory
        returns, num_episodes = np.zeros(N), np.zeros(N, np.int64)
        env_seconds = 0.0
        for t in range(T):
            observations[:, t] = self._obs
            actions[:, t] += self._actor.forward(transitions.observations[:, t : t + 1]).numpy()[:, 0]
            start = time.perf_counter()
            step = self.env.step(actions[:, t].astype(np.float64))
            env_seconds += time.perf_counter() - start
            transitions.rewards[t] = step.reward
            transitions.terminated[t] = step.terminated
            transitions.truncated[t] = step.truncated
            self._obs = step.obs
            self._running_return += step.reward
            done = step.terminated | step.truncated
            if done.any():
                returns[done] += self._running_return[done]
                num_episodes[done] += 1
                self._running_return[done] = 0.0
            timed_out = step.truncated & ~step.terminated
            for i in range(N) if t == T - 1 else np.flatnonzero(timed_out).tolist():
                transitions.final_steps.append(FinalStep(i, t, step.final_obs[i].astype(np.float32)))
        self.env_steps += T
        ended = num_episodes > 0
        self._episodic_return[ended] = returns[ended] / num_episodes[ended]
        return transitions, num_episodes, env_seconds


def _critic_sizes(spec: PolicySpec) -> tuple[int, ...]:
    return (*spec.layer_sizes[:-1], 1)


def _initial_params(spec: PolicySpec, generators: Sequence[torch.Generator]) -> Tensor:
    """Return SB3's initial parameters (N, P), each row drawn from its generator; all but the weights are zero.

    P is rounded up to a multiple of 16, so that all rows lie alike in memory.
    """
    P = spec.num_params + sum(fan_out * (fan_in + 1) for fan_in, fan_out in itertools.pairwise(_critic_sizes(spec)))
    params = torch.zeros(len(generators), round_up(P))
    for row, generator in zip(params, generators, strict=True):
        nets = ((spec.act_dim, spec.layer_sizes, 0.01), (spec.num_params, _critic_sizes(spec), 1.0))
        for offset, sizes, head_gain in nets:
            *hidden, head = layer_views(row[None, offset:], sizes)
            for weight, _ in hidden:
                torch.nn.init.orthogonal_(weight[0], math.sqrt(2), generator)
            torch.nn.init.orthogonal_(head[0][0], head_gain, generator)
    return params


def _explained_variance(returns: NDArray[np.float32], errors: NDArray[np.float32]) -> Floats:
    """Return 1 - Var(errors) / Var(returns) over time, (C,), NaN where the returns (T, C) do not vary."""
    variance: Floats = returns.var(0, dtype=np.float64)
    variance[variance == 0] = np.nan
    explained: Floats = 1 - errors.var(0, dtype=np.float64) / variance
    return explained


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
