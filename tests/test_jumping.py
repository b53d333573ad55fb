"""Jumps: when they happen, what they change, and that what does not hold is undone to the bit."""

import copy
import dataclasses
import errno
import functools
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import MODEL_CONFIG, TINY_PPO, bare_forecaster, random_model
from torch import nn

import tipl
import tipl.collecting.collection
from tipl import JumpConfig, Ledger
from tipl.cli import main
from tipl.collecting.envs import make_vec
from tipl.collecting.population import Population, environment_seeds
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.transformer import ModelConfig
from tipl.jumping.jumping_population import JumpingPopulation
from tipl.jumping.jumps import At, Every, Growing, Jump, Jumps, Walk
from tipl.jumping.learner import PopulationLearner, TorchLearner
from tipl.jumping.rivals import (
    OuterSteps,
    averaging,
    by_ninos_rule,
    linear_regrounding,
    rank_one,
    trimming_and_boosting,
)
from tipl.policy import ParameterLayout, PolicySpec
from tipl.storing.store import Store

LAYOUT = ParameterLayout((("log_std", (1,)), ("weight", (3, 2))))
CRITIC = ParameterLayout((("value", (4,)),))
P = LAYOUT.num_params + CRITIC.num_params
NAN = math.nan


class Line:
    """A learner whose weights grow by one in each iteration, of each run."""

    actor, critic = LAYOUT, CRITIC

    def __init__(self, num_runs: int = 1) -> None:
        self.params = np.tile(np.arange(P, dtype=np.float32), (num_runs, 1))

    @property
    def num_runs(self) -> int:
        return len(self.params)

    def weights(self):
        return self.params.copy()

    def replace(self, run, weights):
        self.params[run] = weights

    def keep(self, run):
        return self.params[run].copy()

    def put_back(self, run, kept):
        self.params[run] = kept

    def learn(self) -> None:
        self.params += 1


class Ahead:
    """Forecasts the truth of a `Line`."""

    def forecast(self, prefix, horizons):
        return prefix.weights[-1] + horizons[:, None].astype(np.float32)


def train(jumps: Jumps, returns: list[float], *, ends: bool = False) -> list[float]:
    """Learn an iteration for each return; return how far the first run was after each."""
    far = []
    for i, value in enumerate(returns):
        jumps.learner.learn()
        jumps.after_iteration([value] * jumps.learner.num_runs, is_last=ends and i == len(returns) - 1)
        far.append(float(jumps.learner.params[0, 0]))
    return far


def test_a_jump_that_holds_goes_on_from_there():
    jumps = Jumps(Line(), At((4,), (10,)), Ahead(), Ahead())
    assert train(jumps, [1, 2, 3, 4, 5, 6]) == [1, 2, 3, 14, 15, 16]
    assert jumps.jumps == [Jump(0, 4, 10, held=True)]
    assert [row[0] for row in jumps.walks[0].path] == [0, 1, 2, 3, 14, 15, 16]


def test_a_jump_that_does_not_hold_is_undone():
    jumps = Jumps(Line(), At((4,), (10,)), Ahead(), Ahead())
    assert train(jumps, [1, 2, 3, 4, 1, 6]) == [1, 2, 3, 14, 4, 5]
    assert jumps.jumps == [Jump(0, 4, 10, held=False, lost=1)]
    walk = jumps.walks[0]
    assert (walk.iteration, walk.kept_iterations, walk.returns) == (6, 5, [1, 2, 3, 4, 6])
    assert [row[0] for row in walk.path] == [0, 1, 2, 3, 4, 5]


def test_a_jump_must_beat_the_trend_beyond_noise():
    returns = [1.0, 3.0, 5.0, 4.0]  # steps 2, 2, -1: trend 4.5 + 1.5 = 6, deviation sqrt(2 / 2) = 1
    for margin, last, held in ((1.0, 7.01, True), (1.0, 6.99, False), (0.0, 6.01, True), (-1.0, 4.99, False)):
        jumps = Jumps(Line(), At((4,), (10,)), Ahead(), config=JumpConfig(margin=margin, test_iterations=1))
        train(jumps, [*returns, last])
        assert jumps.jumps[0].held is held
    without_test = Jumps(Line(), At((4,), (10,)), Ahead(), config=JumpConfig(margin=None, test_iterations=1))
    train(without_test, [*returns, -1000.0])
    assert without_test.jumps[0].held is True


def test_several_iterations_must_keep_to_the_trend():
    config = JumpConfig(test_iterations=3, margin=0.0)  # the trend goes on by one in each iteration: 5, 6, 7

    def jump(*returns):
        jumps = Jumps(Line(), At((4,), (10,)), Ahead(), config=config)
        return jumps, train(jumps, [1, 2, 3, 4, *returns])

    jumps, far = jump(5, 6, 7, 0)
    assert jumps.jumps == [Jump(0, 4, 10, held=True)]
    assert far == [1, 2, 3, 14, 15, 16, 17, 18]
    jumps, far = jump(9, 9, 6.9, 5)
    assert jumps.jumps == [Jump(0, 4, 10, held=False, lost=3)]
    assert far == [1, 2, 3, 14, 15, 16, 4, 5]
    assert (jumps.walks[0].iteration, jumps.walks[0].returns) == (8, [1, 2, 3, 4, 5])
    jumps, far = jump(9, NAN, 9, 7.9)  # the second that tells anything is the third, the third the fourth: 8
    assert jumps.jumps == [Jump(0, 4, 10, held=False, lost=4)]
    jumps, _ = jump(4.9)
    assert jumps.jumps == [Jump(0, 4, 10, held=False, lost=1)]
    short = Jumps(Line(), At((4,), (10,)), Ahead(), config=config)
    assert train(short, [1, 2, 3, 4, 9, 9], ends=True)[-1] == 16  # two tests are what there was time for


def test_it_is_tested_until_an_episode_has_ended():
    jumps = Jumps(Line(), At((4,), (10,)), Ahead())
    assert train(jumps, [1, 2, 3, 4, NAN, NAN, 1, 5]) == [1, 2, 3, 14, 15, 16, 4, 5]
    assert jumps.jumps == [Jump(0, 4, 10, held=False, lost=3)]


def test_without_returns_before_it_no_jump_holds():
    jumps = Jumps(Line(), At((4,), (10,)), Ahead())
    assert train(jumps, [NAN, NAN, NAN, NAN, 1000.0])[-1] == 4


@pytest.mark.parametrize("last", [NAN, 1.0])
def test_training_ends_with_weights_that_were_tested(last):
    jumps = Jumps(Line(), At((4,), (10,)), Ahead())
    assert train(jumps, [1, 2, 3, 4, last], ends=True)[-1] == 4
    jumps = Jumps(Line(), At((4,), (10,)), Ahead())
    assert train(jumps, [1, 2, 3, 4], ends=True)[-1] == 4
    assert jumps.jumps == []


def test_without_a_critics_forecast_only_the_actor_jumps():
    jumps = Jumps(Line(), At((4,), (10,)), Ahead())
    train(jumps, [1, 2, 3, 4])
    np.testing.assert_array_equal(jumps.learner.params[0] - np.arange(P), [14] * LAYOUT.num_params + [4] * 4)


def test_a_part_that_never_moved_stays():
    class Actor(Line):
        def learn(self):
            self.params[:, : LAYOUT.num_params] += 1

    jumps = Jumps(Actor(), At((4,), (10,)), Ahead(), Ahead())
    train(jumps, [1, 2, 3, 4])
    np.testing.assert_array_equal(jumps.learner.params[0] - np.arange(P), [14] * LAYOUT.num_params + [0] * 4)


def test_log_std_falls_no_further_than_allowed():
    class Down:
        def forecast(self, prefix, horizons):
            return np.full((1, prefix.weights.shape[1]), -9.0, np.float32)

    jumps = Jumps(Line(), At((4,), (10,)), Down(), config=JumpConfig(log_std_drop=0.5))
    train(jumps, [1, 2, 3, 4])
    np.testing.assert_array_equal(jumps.learner.params[0, : LAYOUT.num_params], [3.5, *[-9.0] * 6])


def test_a_forecast_that_is_not_finite_is_not_followed():
    class Bad:
        def forecast(self, prefix, horizons):
            return np.full((1, prefix.weights.shape[1]), np.nan, np.float32)

    jumps = Jumps(Line(), Growing(JumpConfig(start=3)), Bad())
    assert train(jumps, [1, 2, 3, 4, 5]) == [1, 2, 3, 4, 5]
    assert jumps.jumps == []


def test_a_jump_after_which_the_weights_diverge_is_undone():
    jumps = Jumps(Line(), At((4,), (10,)), Ahead(), Ahead(), JumpConfig(margin=None))
    train(jumps, [1, 2, 3, 4])
    jumps.learner.params[:] = np.nan
    assert train(jumps, [99.0, 6]) == [4, 5]
    assert jumps.jumps == [Jump(0, 4, 10, held=False, lost=1)]


def test_a_population_leaves_a_diverging_trial_to_its_test():
    one = jumping(2, start=3)
    for _ in range(3):
        one.iterate()
    assert set(one.jumps.tests) == {0, 1}
    one.params[1, 5] = np.inf
    before = one.jumps.tests[1].kept.arrays["params"][0]
    one.iterate()
    np.testing.assert_array_equal(one.params[1], before)
    one.jumps.tests.clear()
    one.params[1, 5] = np.inf
    with pytest.raises(FloatingPointError, match=r"the weights of trial 1 \(seed 21\) after 160 environment steps"):
        one.iterate()


def test_a_torch_policy_that_diverges_is_put_back():
    agent = Agent()
    forecaster = Forecaster(random_model(ModelConfig(n_components=4, n_layer=1, d_model=16, d_ff=32, max_len=16)))
    optimizer = torch.optim.Adam(agent.parameters(), 1e-2)
    jumper = tipl.Jumper(agent, optimizer, model=forecaster, config=JumpConfig(start=4))
    for value in (1.0, 2.0, 3.0, 4.0):
        learn(agent, optimizer)
        jumper.step(value)
    agent.actor_logstd.data.fill_(math.nan)
    assert jumper.step(100.0) == Jump(0, 4, 20, held=False, lost=1)
    assert torch.isfinite(agent.actor_logstd).all()


def test_runs_jump_on_their_own():
    jumps = Jumps(Line(2), At((4,), (10,)), Ahead(), config=JumpConfig(test_iterations=1))
    for value in (1, 2, 3, 4):
        jumps.learner.learn()
        jumps.after_iteration([value, value])
    jumps.learner.learn()
    jumps.after_iteration([9.0, -9.0])
    assert jumps.learner.params[:, 0].tolist() == [15, 4]
    assert [jump.held for jump in jumps.jumps] == [True, False]


def test_growing_waits_twice_as_long_after_each_jump():
    config = JumpConfig(start=3, reach=2.0, max_jumps=3)
    jumps = Jumps(Line(), Growing(config), Ahead(), config=config)
    train(jumps, list(map(float, range(40))))
    assert [(jump.iteration, jump.ahead) for jump in jumps.jumps] == [(3, 6), (9, 12), (21, 24)]
    never = dataclasses.replace(config, max_undone=2)
    jumps = Jumps(Line(), Growing(never), Ahead(), config=never)
    train(jumps, [1.0, 2, 3, -99, 4, 5, 6, 7, 8, -99, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22])
    assert [(jump.iteration, jump.held) for jump in jumps.jumps] == [(3, False), (9, False)]


def test_a_long_path_is_thinned_evenly():
    walk = Walk([np.zeros(1, np.float32)])
    for i in range(1, 41):
        walk.add(np.full(1, i, np.float32), 0.0, max_rows=8)
    assert walk.every == 8
    assert [float(row[0]) for row in walk.path] == [0, 8, 16, 24, 32, 40]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 2}, "start must be an int of at least 3, got 2"),
        ({"reach": 0.0}, "reach must be positive and finite"),
        ({"margin": math.nan}, "margin must be finite"),
        ({"log_std_drop": -1.0}, "log_std_drop must be finite and not negative"),
        ({"max_rows": 9}, "max_rows must be even and at least 8, got 9"),
        ({"test_iterations": 0}, "test_iterations must be an int of at least 1, got 0"),
        ({"max_jumps": -1}, "max_jumps must be an int of at least 0"),
    ],
)
def test_config_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        JumpConfig(**arguments)
    with pytest.raises(ValueError, match="At: lengths must be one or 2 positive ints"):
        At((1, 2), (1, 2, 3))
    with pytest.raises(ValueError, match="Every: period and length must be positive"):
        Every(0, 1)


def population(num_trials: int = 2, env_id: str = "InvertedPendulum-v5", **arguments) -> Population:
    seeds = list(range(7, 7 + num_trials))
    ppo = dataclasses.replace(TINY_PPO, **arguments)
    env = make_vec(env_id, num_trials * ppo.num_envs, seeds=environment_seeds(seeds, ppo.num_envs), num_threads=1)
    return Population(env, ppo, seeds, num_threads=1)


def state_of_trial(one: Population, trial: int) -> dict[str, bytes]:
    kept = one.keep([trial])
    return {name: array.tobytes() for name, array in kept.arrays.items()} | {
        "rngs": json.dumps(kept.env_rngs, default=str).encode()
    }


@pytest.mark.parametrize(
    "arguments", [{}, {"num_envs": 2, "normalize_observations": True}, {"num_envs": 2, "normalize_rewards": True}]
)
def test_a_trial_is_put_back_to_the_bit(arguments):
    one, other = population(3, **arguments), population(3, **arguments)
    for it in (one, other):
        it.iterate()
    kept, expected = one.keep([1]), [state_of_trial(one, trial) for trial in range(3)]
    one.params[1] += 0.1
    one.iterate()
    moved = [state_of_trial(one, trial) for trial in range(3)]
    one.put_back(kept)
    assert state_of_trial(one, 1) == expected[1] != moved[1]
    assert [state_of_trial(one, trial) for trial in (0, 2)] == [moved[0], moved[2]] != [expected[0], expected[2]]
    one.iterate()
    other.iterate()
    assert one.params[1].tobytes() == other.params[1].tobytes()  # as if nothing had been tried


def test_environments_whose_state_cannot_be_saved_go_on():
    one = population(2, "Pendulum-v1")
    one.iterate()
    kept = one.keep([0])
    assert kept.env_rngs is None
    before = one.params[0].copy()
    one.iterate()
    one.put_back(kept)
    np.testing.assert_array_equal(one.params[0], before)
    one.iterate()


def test_a_population_fits_the_learner():
    learner = PopulationLearner(population())
    assert learner.critic is not None
    assert learner.actor.num_params + learner.critic.num_params == learner.weights().shape[1]


class Agent(nn.Module):
    """An actor-critic with CleanRL's names."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.actor_mean = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.actor_logstd = nn.Parameter(torch.zeros(1, 1))


def learn(agent: Agent, optimizer: torch.optim.Optimizer) -> None:
    x = torch.randn(16, 4)
    loss = (agent.critic(x) - 1).square().mean() + (agent.actor_mean(x) - x[:, :1]).square().mean()
    loss = loss + (agent.actor_logstd + 1).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def snapshot(agent: Agent, optimizer: torch.optim.Optimizer):
    return copy.deepcopy((agent.state_dict(), optimizer.state_dict()["state"]))


def assert_equal_states(one, other) -> None:
    for name in one[0]:
        assert torch.equal(one[0][name], other[0][name])
    for i in one[1]:
        for name in one[1][i]:
            assert torch.equal(torch.as_tensor(one[1][i][name]), torch.as_tensor(other[1][i][name]))


class Statistics:
    def __init__(self) -> None:
        self.mean = np.zeros(4)


def test_a_torch_loop_jumps_and_is_put_back():
    torch.manual_seed(0)
    agent, statistics = Agent(), Statistics()
    optimizer = torch.optim.Adam(agent.parameters(), 1e-2)
    forecaster = Forecaster(random_model(ModelConfig(n_components=4, n_layer=1, d_model=16, d_ff=32, max_len=16)))
    jumper = tipl.Jumper(
        agent, optimizer, model=forecaster, config=JumpConfig(start=4, max_undone=1), normalisers={"obs": statistics}
    )
    made, states = [], []
    for value in (1.0, 2.0, 3.0, 4.0, -50.0, 5.0):
        learn(agent, optimizer)
        statistics.mean = statistics.mean + 1
        states.append(snapshot(agent, optimizer))
        made.append(jumper.step([value, value]))
    assert made[:3] == [None] * 3
    assert made[3] == Jump(0, 4, 20)
    assert made[4] == Jump(0, 4, 20, held=False, lost=1)
    assert made[5] is None
    assert jumper.iterations_lost == 1
    np.testing.assert_array_equal(statistics.mean, 5)  # six, less the one that was lost


def test_put_back_restores_a_torch_run():
    torch.manual_seed(0)
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), 1e-2)
    learner = TorchLearner(agent, optimizer)
    assert learner.critic is not None
    assert learner.weights().shape == (1, sum(it.numel() for it in agent.parameters()))
    learn(agent, optimizer)
    before, kept = snapshot(agent, optimizer), learner.keep(0)
    weights = learner.weights()[0]
    learner.replace(0, weights + 1)
    np.testing.assert_array_equal(learner.weights()[0], weights + 1)
    for _ in range(2):  # also a second time: what is kept is not changed by going on
        learn(agent, optimizer)
        learner.put_back(0, kept)
        assert_equal_states(snapshot(agent, optimizer), before)


@pytest.mark.parametrize(
    ("forecaster", "reason"),
    [
        (dataclasses.replace(bare_forecaster(12), shared_basis=object()), "it has a shared basis"),
        (bare_forecaster(8), "it knows paths of 8 checkpoints, and jumps need 9"),
    ],
)
def test_without_a_forecaster_that_fits_nothing_happens(forecaster, reason):
    agent = Agent()
    with pytest.warns(UserWarning, match=f"no jumps: the forecaster does not fit: {reason}"):
        jumper = tipl.Jumper(agent, model=forecaster, config=JumpConfig(start=3))
    before = copy.deepcopy(agent.state_dict())
    assert [jumper.step(float(i)) for i in range(12)] == [None] * 12
    assert all(torch.equal(before[name], it) for name, it in agent.state_dict().items())


def test_a_long_run_is_thinned_to_what_the_forecaster_knows():
    torch.manual_seed(0)
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), 1e-3)
    forecaster = Forecaster(random_model(ModelConfig(n_components=4, n_layer=1, d_model=16, d_ff=32, max_len=9)))
    jumper = tipl.Jumper(agent, optimizer, model=forecaster, config=JumpConfig(start=3, max_jumps=9, margin=None))
    for value in range(60):
        learn(agent, optimizer)
        jumper.step(float(value))
    # It waits 3, 6, 12 and 24 iterations, and then for the next checkpoint of the path, 1, 2, 4 and 8 apart.
    assert [jump.iteration for jump in jumper.jumps] == [3, 10, 24, 48]
    assert all(jump.held for jump in jumper.jumps)


def test_jumper_refuses():
    with pytest.raises(ValueError, match="Jumper: policy:"):
        tipl.Jumper(nn.Linear(2, 2).requires_grad_(False), actor="nowhere", model=bare_forecaster(12))
    with pytest.raises(ValueError, match="step: episode_returns must be finite"):
        tipl.Jumper(Agent(), model=bare_forecaster(12)).step([1.0, math.inf])


def jumping(num_trials: int = 3, model: Forecaster | None = None, **config) -> JumpingPopulation:
    seeds = list(range(20, 20 + num_trials))
    env = make_vec("InvertedPendulum-v5", num_trials, seeds=seeds, num_threads=1)
    settings = JumpConfig(**{"start": 3, "max_jumps": 3} | config)
    made = functools.partial(
        Jumps.by_forecasts,
        forecaster=Forecaster(random_model(MODEL_CONFIG)) if model is None else model,
        config=settings,
    )
    return JumpingPopulation(env, TINY_PPO, seeds, num_iterations=10, num_threads=1, jumps=made)


def test_a_trials_jumps_depend_on_its_seed_alone():
    together, alone = jumping(3), jumping(1)
    for _ in range(6):
        together.iterate()
        alone.iterate()
    assert together.params[0].tobytes() == alone.params[0].tobytes()
    assert [jump for jump in together.jumps.jumps if jump.run == 0] == alone.jumps.jumps != []


@pytest.mark.parametrize("test_iterations", [1, 2])
def test_a_jumping_population_goes_on_from_any_state(test_iterations):
    whole = jumping(test_iterations=test_iterations)
    states = [whole.get_state()]
    for _ in range(10):
        whole.iterate()
        states.append(whole.get_state())
    assert {jump.held for jump in whole.jumps.jumps} == {True, False}
    for start in range(0, 10, 3):
        other = jumping(test_iterations=test_iterations)
        other.set_state(states[start])
        for _ in range(start, 10):
            other.iterate()
        assert other.params.tobytes() == whole.params.tobytes()
        assert other.ledger.to_dict() == whole.ledger.to_dict()


def test_jumps_that_are_all_undone_leave_plain_training(monkeypatch):
    """Random forecasts, a test that nothing passes: after what was lost, each trial goes on as if nothing had been."""
    monkeypatch.setattr(Walk, "expected", lambda walk, ahead=1: (math.inf, 0.0))
    refusing = jumping(max_undone=2)
    for _ in range(10):
        refusing.iterate()
    lost = refusing.jumps.walks[0].num_undone
    assert lost == 2
    assert all(jump.held is False for jump in refusing.jumps.jumps)
    plain = jumping(max_jumps=0)
    for _ in range(10 - lost):
        plain.iterate()
    assert refusing.params.tobytes() == plain.params.tobytes()
    assert refusing.ledger.env_steps == {"training": 8 * 3 * 32, "undone": 2 * 3 * 32, "judging": 0}


ACCELERATE = {
    "env_id": "InvertedPendulum-v5",
    "num_trials": 2,
    "total_timesteps": 32 * 9,
    "ppo": TINY_PPO,
    "progress": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    folder.mkdir()
    Forecaster(random_model(MODEL_CONFIG)).save(folder)
    return folder


def files(path: Path) -> dict[str, bytes]:
    return {str(it.relative_to(path)): it.read_bytes() for it in path.rglob("*") if it.is_file()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*checks")
@pytest.mark.parametrize("after", [0, 4, 8])
def test_accelerate_goes_on_where_it_was_cut_off(tmp_path, model, after, monkeypatch, capsys):
    jumps = JumpConfig(start=3, max_jumps=3)
    monkeypatch.setattr(sys.modules["tipl.collecting.collection"], "SAVE_SECONDS", 0.0)
    whole = tipl.accelerate(tmp_path / "whole", model=model, jumps=jumps, **ACCELERATE)
    assert whole.jumps
    iterate, count = JumpingPopulation.iterate, itertools.count()

    def interrupted(population):
        stats = iterate(population)
        if next(count) == after:
            raise KeyboardInterrupt
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(JumpingPopulation, "iterate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tipl.accelerate(tmp_path / "cut", model=model, jumps=jumps, **ACCELERATE)
    assert not (tmp_path / "cut").exists()
    ledger = tipl.accelerate(tmp_path / "cut", model=model, jumps=jumps, **ACCELERATE | {"progress": True})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == 2 * [f"{tmp_path}/cut/store.zarr"]  # goes on, and is finished
    assert ledger.to_dict() == whole.to_dict()
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    with pytest.raises(FileExistsError, match=r"accelerate: .*cut exists"):
        tipl.accelerate(tmp_path / "cut", model=model, jumps=jumps, **ACCELERATE)


def test_accelerate_publishes_only_what_was_asked(tmp_path, monkeypatch):
    plain = ACCELERATE | {"jumps": JumpConfig(max_jumps=0)}

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr("tipl.files.publishing.write_manifest", full)  # when all runs are finished
        with pytest.raises(OSError, match="No space left"):
            tipl.accelerate(tmp_path / "runs", **plain)
    for other, message in (
        ({"seed": 5}, "holds an unfinished collection with seed = 0, got 5"),
        ({"jumps": JumpConfig(max_jumps=0, reach=2.0)}, "with jumps.reach = 5.0, got 2.0"),
        ({"env_kwargs": {"reset_noise_scale": 0.1}}, "with env_kwargs.reset_noise_scale = nothing, got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            tipl.accelerate(tmp_path / "runs", **plain | other)
    ledger = tipl.accelerate(tmp_path / "runs", **plain)
    assert tipl.verify(tmp_path / "runs").problems == []
    assert ledger.to_dict() == tipl.accelerate(tmp_path / "whole", **plain).to_dict()
    assert files(tmp_path / "runs") == files(tmp_path / "whole")


def test_accelerate_says_that_runs_are_too_short_to_jump(tmp_path, model):
    said = r"comes after 12 iterations \(jumps.start\), and total_timesteps = 384 makes 12"
    with pytest.warns(UserWarning, match=said):
        short = tipl.accelerate(tmp_path / "short", model=model, **ACCELERATE | {"total_timesteps": 32 * 12})
    assert not short.jumps


def test_the_first_jump_comes_early_only_with_a_forecaster_of_the_task_alone():
    own, critic = PolicySpec(3, 1, (4,)), ParameterLayout((("w", (4, 3)),))
    other = PolicySpec(5, 1, (4,))

    def start_with(*stores, env_id="unknown", start=None):
        config = {"stores": [{"env_id": task, "policy": policy.to_dict()} for task, policy in stores]}
        forecaster = Forecaster(random_model(MODEL_CONFIG), config=config)
        learner = Line()
        learner.actor, learner.critic = own, None
        return Jumps.by_forecasts(learner, forecaster, JumpConfig(start=start), env_id).first_jump

    for env_id in ("A-v5", "A-v4", "unknown"):
        assert start_with(("A-v5", own), env_id=env_id) == 6
        assert start_with(("A-v5", critic), ("A-v4", own), env_id=env_id) == 6
        assert start_with(("A-v5", own), ("B-v5", own), env_id=env_id) == 12
        assert start_with(env_id=env_id) == start_with(("unknown", own), env_id=env_id) == 12
        assert start_with(("A-v5", own), env_id=env_id, start=4) == 4
        assert start_with(env_id=env_id, start=9) == 9
    assert start_with(("A-v5", other), env_id="unknown") == 12
    assert start_with(("A-v5", other), env_id="A-v5") == 6
    assert start_with(("A-v5", own), env_id="B-v5") == start_with(("AB-v5", own), env_id="A-v5") == 12


@pytest.mark.slow
def test_runs_jump_later_with_the_included_forecaster(tmp_path):
    runs = {"env_id": ACCELERATE["env_id"], "num_trials": 2, "total_timesteps": 32 * 15, "ppo": ACCELERATE["ppo"]}
    ledger = tipl.accelerate(tmp_path / "runs", progress=False, **runs)
    assert [(jump.run, jump.iteration) for jump in ledger.jumps] == [(0, 12), (1, 12)]
    assert Store.open(tmp_path / "runs" / "store.zarr").config["jumps"]["start"] == 12
    early = tipl.accelerate(tmp_path / "early", jumps=JumpConfig(start=7), progress=False, **runs)
    assert min(jump.iteration for jump in early.jumps) == 7


def test_accelerate_leaves_nothing_where_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="num_trials must be an int of at least 1, got 0"):
        tipl.accelerate(tmp_path / "runs", **ACCELERATE | {"jumps": JumpConfig(max_jumps=0), "num_trials": 0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*has no checksum")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"returns": []}, "returns: List should have at least 1 item"),
        ({"returns": [[1.0, 2.0], [1.0]]}, "returns must hold 2 numbers a row, one for each seed, got 1"),
        ({"returns": [["a", "b"]]}, "returns.0.0.*: Input should be a valid number, got 'a'"),
        ({"returns": [[math.inf, 1.0]]}, "returns.0.0.*: Input should be a finite number"),
        ({"steps_per_iteration": 0}, "steps_per_iteration: Input should be greater than or equal to 1, got 0"),
        ({"steps_per_iteration": "3"}, "steps_per_iteration: Input should be a valid integer, got '3'"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"seeds": 5}, "seeds: Input should be a valid array, got 5"),
        ({"env_id": 5}, "env_id: Input should be a valid string, got 5"),
        ({"env_kwargs": [1]}, "env_kwargs: Input should be an object"),
        ({"jumps": [{"iteration": 1}]}, "jumps.0.run: Field required"),
        ({"jumps": [{"run": 0, "iteration": 1, "ahead": "x"}]}, "jumps.0.ahead: Input should be a valid integer"),
        ({"env_steps": {"judging": "x"}}, "env_steps.judging: Input should be a valid integer, got 'x'"),
        ({"env_steps": {"judging": 0}}, "env_steps must name training, undone, judging, got judging"),
        ({"more": 1}, "more: Unexpected keyword argument"),
    ],
)
def test_a_ledger_of_anything_else_is_refused(tmp_path, change, message):
    path = tmp_path / "ledger.json"
    document = ledger_with(np.ones((2, 6))).to_dict()
    path.write_text(json.dumps(document))
    assert Ledger.load(path).to_dict() == document
    path.write_text(json.dumps(document | change))
    with pytest.raises(RuntimeError, match=rf"ledger\.json: .*{message}"):
        Ledger.load(path)


def test_a_ledger_that_is_not_there_is_refused(tmp_path, run_tipl, capsys):
    tmp_path.joinpath("folder").mkdir()
    for given, missing in (("nothing", "nothing"), ("folder", "folder/ledger.json")):
        assert run_tipl("compare", tmp_path / given) == 2
        assert f"{tmp_path / missing} does not exist; `tipl accelerate` writes it" in capsys.readouterr().err


def test_accelerate_without_jumps_is_collect(tmp_path):
    ledger = tipl.accelerate(tmp_path / "plain", jumps=JumpConfig(max_jumps=0), **ACCELERATE)
    expected = tipl.collect(tmp_path / "store", **ACCELERATE)
    got = Store.open(tmp_path / "plain" / "store.zarr")
    np.testing.assert_array_equal(got.trial(1).weights(), expected.trial(1).weights())
    assert ledger.jumps == []
    assert tipl.verify(tmp_path / "plain").problems == []
    file = tmp_path / "plain" / "ledger.json"
    file.write_text(file.read_text().replace('"undone": 0', '"undone": 1'))
    with pytest.raises(RuntimeError, match=r"ledger.json is damaged or of another folder: its SHA-256 is"):
        Ledger.load(file)


def ledger_with(curves: np.ndarray, seeds: list[int] | None = None) -> Ledger:
    return Ledger("E", seeds or list(range(len(curves))), 10, curves.T.tolist())


def test_compare_finds_where_the_plain_return_is_reached():
    rng = np.random.default_rng(0)
    plain = np.linspace(0, 100, 20) + rng.normal(0, 1, (8, 1))
    arms = tipl.compare(
        {"plain": ledger_with(plain), "twice": ledger_with(np.minimum(2 * plain, 105)), "flat": ledger_with(0 * plain)},
        "plain",
    )
    target = plain[:, -5:].mean()
    assert arms["twice"].steps.value == (np.argmax(2 * plain.mean(0) >= target) + 1) / 20 == 0.5
    assert arms["twice"].steps.low <= 0.5 <= arms["twice"].steps.high < 0.7
    assert arms["flat"].steps.value == math.inf
    assert arms["plain"].gain.low == arms["plain"].gain.high == 0.0
    assert arms["twice"].gain.value == pytest.approx(105 - target, abs=1.0)
    assert (arms["flat"].improvement, arms["plain"].improvement, arms["twice"].improvement) == (0.0, 0.5, 1.0)
    with pytest.raises(ValueError, match="compare: other must have the same seeds as plain"):
        tipl.compare({"plain": ledger_with(plain), "other": ledger_with(plain, [9] * 8)}, "plain")
    with pytest.raises(ValueError, match="compare: other must have 200 env steps a run, as plain, got 100"):
        tipl.compare({"plain": ledger_with(plain), "other": ledger_with(plain[:, :10])}, "plain")


def test_compare_averages_the_returns_of_shorter_iterations():
    plain = np.linspace(0, 100, 20) + np.arange(8.0)[:, None]
    finer = ledger_with(np.repeat(plain, 2, axis=1) + np.tile([-3.0, 3.0], 20))
    finer.steps_per_iteration = 5
    arms = tipl.compare({"plain": ledger_with(plain), "finer": finer}, "plain")
    assert arms["finer"].steps == arms["plain"].steps
    assert arms["finer"].gain.value == pytest.approx(0.0)
    finer.steps_per_iteration = 50
    with pytest.raises(ValueError, match="finer must have 200 env steps a run, as plain, got 2,000"):
        tipl.compare({"plain": ledger_with(plain), "finer": finer}, "plain")
    uneven = ledger_with(np.repeat(plain, 2, axis=1)[:, :25])
    uneven.steps_per_iteration = 8
    with pytest.raises(ValueError, match="uneven must have iterations that divide 10 env steps, got 8"):
        tipl.compare({"plain": ledger_with(plain), "uneven": uneven}, "plain")


def test_compare_prints_and_draws(tmp_path, monkeypatch, capsys):
    plain = np.linspace(0, 100, 20) + np.arange(8.0)[:, None]
    for name, curves in {"plain": plain, "flat": 0 * plain}.items():
        (tmp_path / name).mkdir()
        ledger_with(curves).save(tmp_path / name / "ledger.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tipl", "compare", "plain", "flat", "--plot", "curves.svg"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plain: the plain runs' final return after 0.90 [0.90, 0.90] of their env steps")
    assert lines[1].startswith("flat: the plain runs' final return after never [never, never] of their env steps")
    assert (tmp_path / "curves.svg").read_text().count("<svg") == 1
    with pytest.raises(FileExistsError, match=r"plot_ledgers: curves.svg exists"):
        tipl.plot_ledgers({"plain": ledger_with(plain)}, "curves.svg")
    with pytest.raises(ValueError, match=r"plot_ledgers: path must end in .svg or .png"):
        tipl.plot_ledgers({"plain": ledger_with(plain)}, "curves.pdf")


def test_a_damaged_ledger_is_refused(tmp_path):
    ledger = Ledger("InvertedPendulum-v5", [1, 2], 32, [[1.0, NAN], [2.0, NAN], [NAN, 3.0]], [Jump(0, 1, 5, True)])
    ledger.save(tmp_path / "ledger.json")
    assert Ledger.load(tmp_path / "ledger.json").to_dict() == ledger.to_dict()
    np.testing.assert_array_equal(ledger.curves(), [[1, 2, 2], [NAN, NAN, 3]])
    text = (tmp_path / "ledger.json").read_text()
    (tmp_path / "ledger.json").write_text(text.replace("3.0", "4.0"))
    with pytest.raises(RuntimeError, match=r"Ledger.load: .* is damaged"):
        Ledger.load(tmp_path / "ledger.json")


def test_rivals_do_what_their_papers_say():
    line = Line()
    outer = OuterSteps(line, 2.0)
    line.learn()
    outer.after_iteration([1.0])
    assert line.params[0, 0] == 2
    line, outer = Line(), None
    outer = OuterSteps(line, 1.0, 0.5)
    far = []
    for _ in range(2):
        line.learn()
        outer.after_iteration([1.0])
        far.append(float(line.params[0, 0]))
    assert far == [1.5, 1.5 + 1 + 0.5 * 1.5]  # v = 1, then 1.5
    assert train(linear_regrounding(Line(), 4, 10), [1.0] * 6) == [1, 2, 3, 14, 15, 16]
    assert train(averaging(Line(), 4), [1.0] * 5) == [1, 2, 3, 2.5, 3.5]
    assert train(rank_one(Line(), 4, 10), [1.0] * 5) == pytest.approx([1, 2, 3, 14, 15], abs=1e-5)
    assert train(trimming_and_boosting(Line(), 4, 3, 0.5), [1.0] * 5) == pytest.approx([1, 2, 3, 6, 7], abs=1e-5)
    forecaster = Forecaster(random_model(ModelConfig(n_components=4, n_layer=1, d_model=16, d_ff=32, max_len=60)))
    nino = by_ninos_rule(Line(), forecaster, 4, 16, 3)
    train(nino, [1.0] * 20)
    assert [(jump.iteration, jump.ahead) for jump in nino.jumps] == [(4, 16), (8, 4), (12, 1)]
    with pytest.raises(ValueError, match="OuterSteps: step must be positive"):
        OuterSteps(Line(), 0.0)


def test_a_population_takes_outer_steps():
    seeds = [20, 21]
    outer, plain = (
        JumpingPopulation(
            make_vec("InvertedPendulum-v5", 2, seeds=seeds, num_threads=1),
            TINY_PPO,
            seeds,
            num_iterations=2,
            jumps=made,
        )
        for made in (functools.partial(OuterSteps, step=2.0), Jumps.none)
    )
    before = plain.params.copy()
    for one in (outer, plain):
        one.iterate()
    np.testing.assert_allclose(outer.params - before, 2 * (plain.params - before), atol=1e-6)
    outer.iterate()
    assert outer.ledger.env_steps == {"training": 2 * 2 * 32, "undone": 0, "judging": 0}


@pytest.mark.parametrize("url", [False, True])
def test_critics_are_recorded_beside_the_policies(tmp_path, url):
    critics = tmp_path / "critics"
    store = tipl.collect(tmp_path / "store", record_critic=f"file://{critics}" if url else critics, **ACCELERATE)
    recorded = Store.open(critics)
    seeds, N = store.seeds, 2
    one = Population(make_vec("InvertedPendulum-v5", N, seeds=seeds, num_threads=1), TINY_PPO, seeds, num_threads=1)
    for k in range(10):
        for trial in range(N):
            np.testing.assert_array_equal(recorded.trial(trial).weights(k, k + 1)[0], one.critic_weights()[trial])
        one.iterate()
    assert recorded.policy == one.critic_layout
    assert tipl.verify_store(critics).problems == []
    with pytest.raises(FileExistsError, match=r"record_critic: .*critics exists and is not of the collection"):
        tipl.collect(tmp_path / "other", record_critic=critics, **ACCELERATE | {"seed": 1})


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 3, 8])
def test_a_cut_off_collection_of_critics_goes_on(tmp_path, after, monkeypatch):
    monkeypatch.setattr(sys.modules["tipl.collecting.collection"], "SAVE_SECONDS", 0.0)
    tipl.collect(tmp_path / "whole", record_critic=tmp_path / "whole critics", **ACCELERATE)
    append, count = Store.append, itertools.count()

    def interrupted(store, *columns):
        if next(count) == 2 * after + 1:  # between the appends to the two stores
            raise OSError("disk full")
        append(store, *columns)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "append", interrupted)
        with pytest.raises(RuntimeError, match="disk full"):
            tipl.collect(tmp_path / "cut", record_critic=tmp_path / "cut critics", **ACCELERATE)
    tipl.collect(tmp_path / "cut", record_critic=tmp_path / "cut critics", **ACCELERATE)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert files(tmp_path / "cut critics") == files(tmp_path / "whole critics")
