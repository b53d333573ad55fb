"""Collecting trajectories: PPO iterations of a population beside Stable-Baselines3's PPO; the simulator is the roof.

All take HalfCheetah-v5 env steps and use all cores; the population and SB3 learn with SB3's default hyperparameters.
SB3 runs as fast as it can here: a process of one thread on each core.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from measure import Clock, Row, rows_of, side_by_side
from record import Record

from tipl import PPOConfig, _core
from tipl.envs import make_vec
from tipl.ppo import Population

ENV_ID, NUM_TRIALS, SB3_STEPS, SIMULATED_STEPS = "HalfCheetah-v5", 32, 4096, 512


@cache
def sb3_model() -> Any:
    from stable_baselines3 import PPO

    torch.set_num_threads(1)
    return PPO("MlpPolicy", ENV_ID, device="cpu", seed=0)


def sb3_learn(process: int) -> int:
    """In a process of its own, where `process` only tells the calls apart; return the env steps taken."""
    sb3_model().learn(SB3_STEPS, reset_num_timesteps=False)
    return SB3_STEPS


def seconds_a_step(work: Callable[[], object], num_steps: int) -> Clock:
    def run() -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) / num_steps

    return run


def bench_population(record: Record) -> None:
    seeds, cores = range(NUM_TRIALS), _core.available_cpus()
    env, bare_env = make_vec(ENV_ID, NUM_TRIALS, seeds=seeds), make_vec(ENV_ID, NUM_TRIALS, seeds=seeds)
    population = Population(env, PPOConfig(), seeds)
    before = population.weights()
    population.iterate()
    assert (population.weights() != before).any(axis=1).all()  # every trial has learned something
    bare_env.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (SIMULATED_STEPS, NUM_TRIALS, env.act_dim))

    def simulate() -> None:
        for action in actions:
            bare_env.step(action)

    with ProcessPoolExecutor(cores, get_context("spawn")) as processes:

        def sb3() -> int:
            return sum(processes.map(sb3_learn, range(cores)))

        sb3()  # imports, and builds the models
        clocks = {
            "tipl": seconds_a_step(population.iterate, PPOConfig().num_steps * NUM_TRIALS),
            "Stable-Baselines3": seconds_a_step(sb3, cores * SB3_STEPS),
            "simulator": seconds_a_step(simulate, SIMULATED_STEPS * NUM_TRIALS),
        }

        def measure() -> list[Row]:
            rates = {name: 1 / s for name, s in side_by_side(clocks, rounds=(5, 20)).items()}
            ours, roof = rates.pop("tipl"), rates.pop("simulator")
            return rows_of("collect", ENV_ID, "env steps/s", ours, rates, (100 * ours / roof, "simulator"))

        record(measure)
    env.close()
    bare_env.close()
