"""Collecting trajectories: one PPO iteration of a population beside the bare simulator and Stable-Baselines3's PPO.

All three take HalfCheetah-v5 env steps; the population and SB3 learn with SB3's default hyperparameters. The statistics
that matter are the env steps a second in `extra_info`, printed at the end.
"""

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tipl import PPOConfig
from tipl.envs import make_vec
from tipl.ppo import Population

ENV_ID, NUM_TRIALS = "HalfCheetah-v5", 32


def report(benchmark: BenchmarkFixture, num_steps: int) -> None:
    rate = num_steps / benchmark.stats.stats.median
    benchmark.extra_info["env_steps_a_second"] = rate
    print(f"\n{benchmark.name}: {rate:,.0f} env steps/s")


def bench_simulator(benchmark: BenchmarkFixture) -> None:
    env = make_vec(ENV_ID, NUM_TRIALS, seeds=range(NUM_TRIALS))
    env.reset()
    actions = np.random.default_rng(0).uniform(-1, 1, (512, NUM_TRIALS, env.act_dim))

    def steps() -> None:
        for action in actions:
            env.step(action)

    benchmark.group = "collect"
    benchmark.pedantic(steps, rounds=3, warmup_rounds=1)
    report(benchmark, actions.shape[0] * NUM_TRIALS)
    env.close()


def bench_population(benchmark: BenchmarkFixture) -> None:
    env = make_vec(ENV_ID, NUM_TRIALS, seeds=range(NUM_TRIALS))
    population = Population(env, PPOConfig(), range(NUM_TRIALS))
    before = population.weights()
    benchmark.group = "collect"
    benchmark.pedantic(population.iterate, rounds=3, warmup_rounds=1)
    assert (population.weights() != before).any(axis=1).all()  # every trial has learned something
    report(benchmark, PPOConfig().num_steps * NUM_TRIALS)
    env.close()


@pytest.mark.filterwarnings("ignore")
def bench_stable_baselines3(benchmark: BenchmarkFixture) -> None:
    """One process, one thread: two such processes take twice as many steps a second on two cores."""
    sb3 = pytest.importorskip("stable_baselines3", reason="the extra bench is not installed")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = sb3.PPO("MlpPolicy", ENV_ID, device="cpu", seed=0)
    benchmark.group = "collect"
    benchmark.pedantic(model.learn, args=(4096,), kwargs={"reset_num_timesteps": False}, rounds=2, warmup_rounds=1)
    torch.set_num_threads(threads)
    report(benchmark, 4096)
