"""Jumping: what watching and jumping cost, beside an iteration of the training that they are part of."""

import contextlib
import functools

import pytest
import torch
from measure import Row, clock, rows_of, side_by_side
from record import Record

from tipl import JumpConfig, Jumper, PPOConfig, load_pretrained
from tipl.collecting.envs import make_vec
from tipl.collecting.population import Population
from tipl.jumping.jumps import Jumps
from tipl.jumping.learner import PopulationLearner

NUM_TRIALS = 64


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "InvertedPendulum-v5"])
def bench_population(env_id: str, record: Record) -> None:
    """All trials of a population in one call: an iteration after which all jump, one after which none does."""
    seeds = range(NUM_TRIALS)
    with contextlib.closing(make_vec(env_id, NUM_TRIALS, seeds=seeds)) as env:
        population = Population(env, PPOConfig(), seeds)
        never, always = (
            Jumps.by_forecasts(
                PopulationLearner(population), load_pretrained(), JumpConfig(start=3, max_jumps=n, test_iterations=1)
            )
            for n in (0, 10**6)
        )
        for _ in range(4):
            population.iterate()
            for jumps in (never, always):
                jumps.after_iteration([1.0] * NUM_TRIALS)
        assert len(always.jumps) == NUM_TRIALS  # after the third iteration, and they held
        assert not never.jumps
        before, params = [walk.copy() for walk in always.walks], population.params.copy()

        def jump() -> None:
            always.walks = [walk.copy() for walk in before]
            for walk in always.walks:
                walk.last_jump, walk.num_held = None, 0
            always.after_iteration([1.0] * NUM_TRIALS)
            assert len(always.tests) == NUM_TRIALS
            always.tests.clear()
            population.params[:] = params

        clocks = {
            "all jump": clock(jump),
            "none jumps": clock(lambda: never.after_iteration([1.0] * NUM_TRIALS)),
            "iteration": clock(population.iterate),
        }

        def measure() -> list[Row]:
            ms = {name: 1e3 * s for name, s in side_by_side(clocks, rounds=(3, 6)).items()}
            iteration = {"an iteration": ms.pop("iteration")}
            return [row for name in ms for row in rows_of("jump", f"{env_id} {name}", "ms", ms[name], iteration)]

        record(measure)


def bench_run(record: Record) -> None:
    """One run of any torch loop with SB3's networks: actor and critic, 64 x 64, of HalfCheetah."""

    def net(out: int) -> torch.nn.Module:
        linear, tanh = torch.nn.Linear, torch.nn.Tanh
        return torch.nn.Sequential(linear(17, 64), tanh(), linear(64, 64), tanh(), linear(64, out))

    policy = torch.nn.ModuleDict({"actor": net(6), "critic": net(1)})
    optimizer = torch.optim.Adam(policy.parameters())
    forecaster = load_pretrained()
    config = JumpConfig(start=6, max_jumps=10**6)

    def learn() -> None:
        x = torch.randn(64, 17)
        loss = policy["actor"](x).square().mean() + (policy["critic"](x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def jump() -> float:
        jumper = Jumper(policy, optimizer, model=forecaster, config=config, actor="actor.")
        for value in range(5):
            learn()
            jumper.step(float(value))
        learn()
        seconds = clock(functools.partial(jumper.step, 5.0))()
        assert len(jumper.jumps) == 1
        return seconds

    clocks = {"jump": jump, "update": clock(lambda: [learn() for _ in range(10 * 32)])}

    def measure() -> list[Row]:
        ms = {name: 1e3 * s for name, s in side_by_side(clocks, rounds=(5, 20)).items()}
        return rows_of("jump", "one run, 64x64", "ms", ms["jump"], {"320 minibatches": ms["update"]})

    record(measure)
