"""Judging: deterministic policies in the simulator, beside SB3's evaluate_policy; the simulator is the roof."""

import functools
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
from bench_collect import record_beside_simulator, sb3_model, seconds_a_step
from record import Record

from tipl import _core
from tipl.collecting.episodes import run_episodes
from tipl.policy import PolicySpec

TASKS = {"HalfCheetah-v5": (17, 6, 1000), "Reacher-v5": (10, 2, 50)}
"""Tasks whose episodes all have one length: observations, actions, env steps."""

STEPS = 256_000
"""Env steps of ours in one measurement; a peer's are fewer."""


@functools.cache
def sb3_env(env_id: str) -> Any:
    from stable_baselines3.common.env_util import make_vec_env

    return make_vec_env(env_id, n_envs=4, seed=0)


def sb3_evaluate(env_id: str, num_episodes: int) -> None:
    """Judge one policy in this process, one of several."""
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)
    evaluate_policy(sb3_model(env_id), sb3_env(env_id), n_eval_episodes=num_episodes)


@pytest.mark.parametrize("env_id", TASKS)
def bench_episodes(env_id: str, record: Record) -> None:
    """Different policies of 64 x 64 on episodes of their own; SB3 has one policy and as many processes as cores."""
    obs_dim, act_dim, length = TASKS[env_id]
    policy, cores = PolicySpec(obs_dim, act_dim), _core.available_cpus()
    rng = np.random.default_rng(0)
    weights = 0.1 * rng.standard_normal((64, policy.num_params), np.float32)
    seeds = rng.integers(2**31, size=(64, STEPS // 64 // length))
    returns = run_episodes(env_id, policy, weights[:2], seeds[:2, :3]).returns
    assert len(np.unique(returns)) == returns.size
    sb3_episodes = max(4, 8000 // length)
    with ProcessPoolExecutor(cores, get_context("spawn")) as processes:

        def sb3() -> None:
            list(processes.map(sb3_evaluate, [env_id] * cores, [sb3_episodes] * cores))

        sb3()  # imports, and builds models and environments
        clocks = {
            "tipl": seconds_a_step(functools.partial(run_episodes, env_id, policy, weights, seeds), STEPS),
            "Stable-Baselines3": seconds_a_step(sb3, cores * sb3_episodes * length),
        }
        record_beside_simulator(record, "evaluate", env_id, f"{env_id}, 64 policies", 64, clocks, (3, 10))
