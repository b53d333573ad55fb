"""Run deterministic policies in the simulator: their episodic returns, and a sample of the states that they visit.

A deterministic policy takes the mean action, clipped to the action space or squashed into it; of discrete actions it
takes the one with the greatest output. Bit for bit, its results depend only on its weights and episode seeds: not on
which policies step together, the number of threads, or which machine of a cluster runs it, provided that all have the
same libraries and instruction set (`tipl._core.isa()`). Another instruction set may round an action differently, and
chaotic dynamics turn that into a different return.

Shapes  N policies, M of them in a group that steps together, E episodes per policy, S states kept per policy,
        p weights.
"""

import contextlib
import dataclasses
import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from tipl import _core
from tipl.cluster import Cluster
from tipl.collecting.envs import is_batched, make_vec
from tipl.collecting.policy_network import actions_of, mean_of_rows, mlp_rows, sampled_means, unclipped
from tipl.collecting.vector_env import VectorEnv
from tipl.policy import PolicySpec
from tipl.storing.store import UNNORMALISED, Store

LONG_EPISODE = 100_000
"""Steps after which an episode may be one that never ends, of which a warning is given."""
ENVS_AT_ONCE = 256
"""Simulations stepped together: enough to hide Python's cost per step, few enough for all weights to stay in cache."""


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Results of N policies, E episodes each."""

    returns: NDArray[np.float64]
    """(N, E)"""
    states: list[NDArray[np.float32]]
    """N arrays (at most S, obs_dim): observations that the policy acted on, drawn uniformly from all its steps."""


def run_episodes(
    env_id: str,
    policy: PolicySpec,
    weights: NDArray[np.float32],
    episode_seeds: NDArray[np.int64],
    *,
    num_states: int = 0,
    num_threads: int | None = None,
    cluster: Cluster | None = None,
    bar: Progress | None = None,
    keep_diverged: bool = False,
    sampled: bool = False,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Episodes:
    """Run deterministic policies (N, p) for E episodes each, and keep `num_states` states of each policy.

    With `sampled` they are stochastic: what is drawn follows from an episode's seed, and neither from the other
    episodes nor from the other policies.

    `episode_seeds` is (E,), the same for all policies, or (N, E). Policies and episodes step together in groups of up
    to `ENVS_AT_ONCE` simulations; an episode that has ended is not stepped further. On a cluster, workers take these
    groups one by one, each with `num_threads` threads, by default 1. Here that many threads take them, by default one
    for each CPU. With `keep_diverged`, a policy whose network gives numbers that are not finite ends there, and all its
    returns are NaN. `env_kwargs` are as in `make_vec`.

    Raises ValueError for such a policy otherwise, and where the policies have not the environment's numbers of
    observations and actions, or not its kind of actions.
    """
    seeds = np.broadcast_to(episode_seeds, (len(weights), np.shape(episode_seeds)[-1]))
    num_episodes = seeds.shape[1]
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    threads = num_threads or (_core.available_cpus() if cluster is None else 1)
    # Other environments are stepped on this thread: they may not stand several.
    side_by_side = threads if cluster is None and is_batched(env_id, env_kwargs) else 1
    groups = _groups(weights, seeds, side_by_side)
    tick, poll = _no_tick, None
    if bar is not None:
        task = bar.add_task(f"evaluate {len(weights)} policies", total=seeds.size, note="")
        tick = functools.partial(bar.advance, task)

        def poll(num_ended: int) -> None:
            bar.update(task, completed=sum(len(group) for group, _ in groups[:num_ended]) * num_episodes)

    calls: list[tuple[Any, ...]] = [(env_id, policy, *group, num_states) for group in groups]
    if cluster is None:
        run = functools.partial(
            _run_group,
            num_threads=max(1, threads // len(groups)),
            tick=tick,
            keep_diverged=keep_diverged,
            sampled=sampled,
            env_kwargs=env_kwargs,
        )
        parts = _side_by_side(run, calls, side_by_side)
    else:
        rest = (threads, _no_tick, _no_watch, keep_diverged, sampled, env_kwargs)
        parts = cluster.map(_run_group, [(*call, *rest) for call in calls], num_cpus=threads, poll=poll)
    return Episodes(np.concatenate([part.returns for part in parts]), [kept for part in parts for kept in part.states])


def _groups(
    weights: NDArray[np.float32], seeds: NDArray[np.int64], side_by_side: int
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Return the policies (N, p) and their episodes (N, E) in groups that step together, of which as many as
    `side_by_side` run at once: alike in size, and where they are few, one for each of those or a multiple."""
    at_once = max(1, ENVS_AT_ONCE // seeds.shape[1])
    rounds = -(-len(weights) // (at_once * side_by_side))
    count = max(1, min(len(weights), rounds * side_by_side))
    return list(zip(np.array_split(weights, count), np.array_split(seeds, count), strict=True))


class _Stopped(Exception):
    """This group ends because another one failed, or because of an interrupt."""


def _side_by_side(run_group: Callable[..., Episodes], calls: Sequence[tuple[Any, ...]], threads: int) -> list[Episodes]:
    """Return what each call of `run_group` gives, `threads` of them at once, each on a thread of its own.

    So a group does not wait for another's threads at each step, and Python's part of its steps runs beside the
    simulator's part of theirs. If one group fails, or the caller is interrupted, the others end at their next step.
    """
    if threads == 1 or len(calls) == 1:
        return [run_group(*call) for call in calls]
    stop = threading.Event()

    def watch(env: VectorEnv, running: NDArray[np.bool_], total: NDArray[np.float64]) -> None:
        if stop.is_set():
            raise _Stopped

    def run(call: tuple[Any, ...]) -> Episodes:
        try:
            return run_group(*call, watch=watch)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads, "tipl-episodes") as pool:
        futures = [pool.submit(run, call) for call in calls]
        try:
            failed = [error for future in futures if (error := future.exception())]
        except BaseException:  # an interrupt
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    for error in failed:
        if not isinstance(error, _Stopped):
            raise error
    return [future.result() for future in futures]


@dataclasses.dataclass(frozen=True)
class Recording:
    """One episode of each of M policies, all from the same start: at most S steps, the longest episode's."""

    states: NDArray[np.float64]
    """MuJoCo's mjSTATE_INTEGRATION before each step, (S, M, nstate); after an episode's end its last one."""
    returns: NDArray[np.float64]
    """Return so far before each step, and in the end, (S+1, M)."""
    lengths: NDArray[np.int64]
    """Steps of each episode, (M,)."""


def record_episodes(
    env_id: str,
    policy: PolicySpec,
    weights: NDArray[np.float32],
    seed: int,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Recording:
    """Return what happens in the episode of `seed` under each of the policies (M, p): just what `run_episodes` judges.

    Raises ValueError where the environment is no MuJoCo task of Gymnasium's, whose state alone can be read, or does not
    fit.
    """
    states: list[NDArray[np.float64]] = []
    returns: list[NDArray[np.float64]] = []
    lengths = np.zeros(len(weights), np.int64)

    def watch(env: VectorEnv, running: NDArray[np.bool_], total: NDArray[np.float64]) -> None:
        returns.append(total.copy())
        if running.any():  # an episode that has ended was reset: its last state stays
            now = env.simulation_states()
            states.append(now if not states else np.where(running[:, None], now, states[-1]))
        lengths[:] += running

    _run_group(env_id, policy, weights, np.full((len(weights), 1), seed), 0, None, watch=watch, env_kwargs=env_kwargs)
    return Recording(np.stack(states), np.stack(returns), lengths)


def episodic_returns(
    env_id: str, policy: PolicySpec, weights: NDArray[np.float32], episode_seeds: NDArray[np.int64], **kwargs: Any
) -> NDArray[np.float64]:
    """Return the episodic returns (N, E) of policies (N, p); keywords are those of `run_episodes`."""
    return run_episodes(env_id, policy, weights, episode_seeds, **kwargs).returns


def policy_to_run(owner: str, store: Store) -> PolicySpec:
    """Return the policy of a store's checkpoints, as they act; error texts begin with `owner`.

    Raises ValueError where the simulator cannot run them: they are of another kind, or saw normalised observations
    whose statistics the store lacks, or observations that wrappers had changed otherwise.
    """
    if not isinstance(store.policy, PolicySpec):
        note = (store.config.get("source") or {}).get("note", "")
        raise ValueError(
            f"{owner}: the simulator can run only MLPs that it knows, and the store {store.path} holds others"
            f"{f' ({note})' if note else ''}; `tipl.judging.weight_judgement.weight_errors` judges their weights"
        )
    reason = (store.config.get("source") or {}).get(UNNORMALISED)
    if isinstance(reason, str):
        raise ValueError(f"{owner}: the policies in {store.path} cannot be run: {reason}")
    if reason:
        raise ValueError(
            f"{owner}: the runs in {store.path} saw observations through VecNormalize, and the store lacks its "
            "statistics, without which the policies act otherwise: import the checkpoint files again with normaliser "
            "(--normaliser)"
        )
    return store.policy


def can_run(env_id: str, policy: PolicySpec, env_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Return whether the environment exists here and its observations and actions are those of the policy."""
    try:
        with contextlib.closing(make_vec(env_id, 1, seeds=[0], num_threads=1, env_kwargs=env_kwargs)) as env:
            has_bounds = bool(np.isfinite(env.action_high - env.action_low).all())
            return not misfit(policy, env) and (has_bounds or not (policy.squash or policy.rescale))
    except (ValueError, gymnasium.error.Error):
        return False


def misfit(policy: PolicySpec, env: VectorEnv) -> str:
    """Return in words what the environment's policies must do, and what this one does instead; "" where it fits."""
    is_discrete = env.num_actions is not None
    num_actions = env.act_dim if env.num_actions is None else env.num_actions
    if policy.discrete != is_discrete:
        expected, got = _acting(num_actions, is_discrete), _acting(policy.act_dim, policy.discrete)
        return f"must {expected}, got policies that {got}"
    if (policy.obs_dim, policy.act_dim) != (env.obs_dim, num_actions):
        return (
            f"must have {env.obs_dim} observations and {num_actions} actions, got {policy.obs_dim} and {policy.act_dim}"
        )
    return ""


def _acting(num_actions: int, is_discrete: bool) -> str:
    if is_discrete:
        return f"choose one of {num_actions} discrete actions"
    return f"give continuous actions of size {num_actions}"


def _no_tick(num_ended: int) -> None:
    pass


def _no_watch(env: VectorEnv, running: NDArray[np.bool_], total: NDArray[np.float64]) -> None:
    pass


def _run_group(
    env_id: str,
    policy: PolicySpec,
    weights: NDArray[np.float32],
    episode_seeds: NDArray[np.int64],
    num_states: int,
    num_threads: int | None,
    tick: Callable[[int], None] = _no_tick,
    watch: Callable[[VectorEnv, NDArray[np.bool_], NDArray[np.float64]], None] = _no_watch,
    keep_diverged: bool = False,
    sampled: bool = False,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Episodes:
    """Run policies (M, p) on episodes (M, E) that step together; `tick` gets each number of ended episodes.

    `watch` is called before each step and after the last, with which episodes are running and their returns so far.
    """
    shape, seeds = episode_seeds.shape, episode_seeds.ravel().tolist()
    env = make_vec(env_id, len(seeds), seeds=seeds, num_threads=num_threads, env_kwargs=env_kwargs)
    with contextlib.closing(env):
        difference = misfit(policy, env)
        if difference:
            raise ValueError(f"the policies of {env_id} {difference}")
        # A copy, because arrays from Ray's object store are read-only, and torch warns of those.
        rows, total = mlp_rows(policy, torch.from_numpy(weights.copy())), np.zeros(env.num_envs)
        noise = _Noise(policy, episode_seeds) if sampled else None
        network = unclipped(policy) if sampled else policy
        sample = _StateSample(num_states, env.obs_dim, episode_seeds)
        obs = env.reset(seeds)
        running = np.ones(env.num_envs, bool)
        busy = np.arange(len(rows))  # the policies with a running episode, which alone compute actions
        for _ in _while_any(running, env):
            watch(env, running, total)
            if not (still := running.reshape(shape)[busy].any(1)).all():
                busy, rows = busy[still], rows[torch.from_numpy(still)]
            seen = obs.reshape(*shape, -1).astype(np.float32)
            sample.add(seen, running.reshape(shape))
            actions = np.zeros((*shape, env.act_dim))
            inputs = torch.from_numpy(seen[busy])
            means = mean_of_rows(network, rows, inputs).numpy()
            if noise is not None:
                drawn = noise.next()[busy]
                means = sampled_means(policy, torch.from_numpy(weights[busy]), inputs, means, drawn)
            if keep_diverged and not (sound := np.isfinite(means).all((1, 2))).all():
                lost = busy[~sound]
                total.reshape(shape)[lost], running.reshape(shape)[lost] = np.nan, False
                means[~sound] = 0.0
            actions[busy] = actions_of(policy, means, env.action_low, env.action_high)
            step = env.step(actions.reshape(env.num_envs, -1), running)
            obs = step.obs
            total += step.reward
            ended = step.terminated | step.truncated  # False where an episode is not running
            running &= ~ended
            if ended.any():
                tick(int(ended.sum()))
        watch(env, running, total)
    return Episodes(total.reshape(shape), sample.states())


def _while_any(running: NDArray[np.bool_], env: VectorEnv) -> Iterator[None]:
    """Yield before each step until no episode is `running`, which the caller keeps up to date; warn of long ones."""
    for num_steps in itertools.count():
        if not running.any():
            return
        if num_steps == LONG_EPISODE:
            limit = env.max_episode_steps or "none, so they may never end"
            warnings.warn(
                f"after {num_steps:,} steps, {running.sum()} of {env.num_envs} episodes of {env.env_id} "
                f"have not ended; its time limit is {limit}",
                stacklevel=1,
            )
        yield


class _Noise:
    """What stochastic policies draw at each step: (M, E, A), from a generator for each episode's seed (M, E)."""

    _AHEAD = 64  # steps drawn at once

    def __init__(self, policy: PolicySpec, episode_seeds: NDArray[np.int64]) -> None:
        self._rngs = [np.random.default_rng((seed, 1)) for seed in episode_seeds.ravel().tolist()]
        self._shape, self._is_discrete = (*episode_seeds.shape, policy.act_dim), policy.discrete
        self._ahead: list[NDArray[np.float32]] = []

    def next(self) -> NDArray[np.float32]:
        """Return the noise of the next step: standard normal, or standard Gumbel for discrete actions."""
        if not self._ahead:
            size = (self._AHEAD, self._shape[-1])
            drawn = [rng.gumbel(size=size) if self._is_discrete else rng.normal(size=size) for rng in self._rngs]
            self._ahead = list(np.stack(drawn, 1).astype(np.float32).reshape(self._AHEAD, *self._shape))[::-1]
        return self._ahead.pop()


class _StateSample:
    """Up to S observations of each of M policies: a reservoir sample, uniform over the steps of all its episodes.

    Every (step, episode) gets a random priority, and the S of lowest priority are kept. Priorities come from the
    policy's episode seeds (M, E), so that its states do not depend on the policies beside it.
    """

    def __init__(self, num_states: int, obs_dim: int, episode_seeds: NDArray[np.int64]) -> None:
        distinct, self._rng_of = np.unique(episode_seeds, axis=0, return_inverse=True)
        self._rngs = [np.random.default_rng(seeds) for seeds in distinct]
        self._num_episodes = episode_seeds.shape[1]
        self._obs = np.empty((len(episode_seeds), num_states, obs_dim), np.float32)
        self._priority = np.full((len(episode_seeds), num_states), np.inf)  # infinity marks an unused place

    def add(self, obs: NDArray[np.float32], running: NDArray[np.bool_]) -> None:
        """Offer the sample the observations (M, E, obs_dim) of this step, where an episode is `running` (M, E)."""
        if not self._priority.size:
            return
        # Drawn for ended episodes too, so that a policy's draws do not depend on when other episodes end.
        drawn = np.stack([rng.random(self._num_episodes) for rng in self._rngs])[self._rng_of]  # (M, E)
        for episode in np.flatnonzero((running & (drawn < self._priority.max(1, keepdims=True))).any(0)):
            place = self._priority.argmax(1)  # (M,): the state that would be replaced
            rows = np.flatnonzero(running[:, episode])
            rows = rows[drawn[rows, episode] < self._priority[rows, place[rows]]]
            self._obs[rows, place[rows]] = obs[rows, episode]
            self._priority[rows, place[rows]] = drawn[rows, episode]

    def states(self) -> list[NDArray[np.float32]]:
        """Return the kept observations of each policy."""
        return [obs[np.isfinite(priority)] for obs, priority in zip(self._obs, self._priority, strict=True)]
