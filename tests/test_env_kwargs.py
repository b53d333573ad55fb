"""Arguments of environments: said once, kept in the store, and used by all that runs its policies.

Returns are compared with those of Gymnasium's own environment, made with the same arguments.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from factories import ENV_ID, SPEC, TINY_EVALUATE, TINY_PPO, TINY_TRAIN, flags
from numpy.typing import NDArray

import tipl
from tipl.collecting.envs import make_vec
from tipl.collecting.episodes import can_run, episodic_returns, record_episodes
from tipl.collecting.policy_network import mean_action
from tipl.judging.return_judgement import episode_seeds
from tipl.policy import PolicySpec
from tipl.sharing.origin import origin_of
from tipl.storing.store import Store

KWARGS: dict[str, Any] = {"reset_noise_scale": 0.3}
ANT: dict[str, Any] = {"exclude_current_positions_from_observation": False, "healthy_reward": 0.5}


def own_return(
    env_id: str, kwargs: dict[str, Any], policy: PolicySpec, weights: NDArray[np.float32], seed: int
) -> float:
    """The return of Gymnasium's own episode."""
    env = gymnasium.make(env_id, **kwargs)
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
    (obs, _), total, ended = env.reset(seed=seed), 0.0, False
    while not ended:
        seen = torch.tensor(obs, dtype=torch.float32)[None, None]
        action = mean_action(policy, torch.from_numpy(weights[None]), seen).numpy()[0, 0]
        obs, reward, terminated, truncated, _ = env.step(np.clip(action, low, high))
        total, ended = total + float(reward), terminated or truncated
    return total


def store_of(path: Path, kwargs: dict[str, Any] | None, env_id: str = ENV_ID, policy: PolicySpec = SPEC) -> Store:
    weights = (0.5 * np.random.default_rng(0).standard_normal((1, 2, policy.num_params))).astype(np.float32)
    with Store.create(path, env_id=env_id, env_kwargs=kwargs, policy=policy, seeds=[0], config={}) as store:
        store.append(weights, np.array([[0, 64]]), np.full((1, 2), np.nan))
    return Store.open(path)


def test_a_store_keeps_them_and_one_without_is_as_before(tmp_path: Path, run_tipl: Callable[..., int], capsys) -> None:
    store = store_of(tmp_path / "s.zarr", {"healthy_z_range": (0.2, 1.0), "nested": {"a": [1]}})
    assert store.env_kwargs == {"healthy_z_range": [0.2, 1.0], "nested": {"a": [1]}}
    assert run_tipl("store", "info", store.path) == 0
    assert f'env         {ENV_ID} {{"healthy_z_range": [0.2, 1.0], "nested": {{"a": [1]}}}}' in capsys.readouterr().out
    plain = store_of(tmp_path / "p.zarr", None)
    assert (plain.env_kwargs, plain.env) == ({}, ENV_ID)
    assert "env_kwargs" not in (plain.path / "zarr.json").read_text()  # so that an older tipl reads it
    with pytest.raises(ValueError, match="create: env_kwargs and config must be plain JSON"):
        store_of(tmp_path / "n.zarr", {"a": float("nan")})


def test_of_another_observation_space_returns_are_gymnasiums(tmp_path: Path) -> None:
    kwargs = {**ANT, "max_episode_steps": 25}
    policy = PolicySpec(obs_dim=107, act_dim=8, hidden_sizes=(8,))
    store = store_of(tmp_path / "s.zarr", kwargs, "Ant-v5", policy)
    assert can_run("Ant-v5", policy, kwargs)
    assert not can_run("Ant-v5", policy)
    scores = tipl.score(store, num_episodes=1, progress=False)
    seed = int(np.random.default_rng((0, 0)).integers(2**31, size=5)[0])
    expected = [own_return("Ant-v5", kwargs, policy, row, seed) for row in store.trial(0).weights()]
    np.testing.assert_array_equal(scores.returns[0, :, 0], expected)
    with pytest.raises(ValueError, match="must have 105 observations and 8 actions, got 107 and 8"):
        tipl.score(store, num_episodes=1, env_kwargs={}, progress=False)


def test_a_time_limit_alone_leaves_the_fast_environment() -> None:
    env = make_vec(ENV_ID, 1, seeds=[0], env_kwargs={"max_episode_steps": 7})
    assert (type(env).__name__, env.max_episode_steps) == ("MujocoVectorEnv", 7)
    assert env.env_kwargs == {"max_episode_steps": 7}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"no_such": 1}, "refuses env_kwargs {'no_such': 1}: .*no_such"),
        ({"reset_noise_scale": "x"}, "refuses env_kwargs {'reset_noise_scale': 'x'}"),  # which only a reset finds
        ({"xml_file": "/no/such.xml"}, "refuses env_kwargs"),
        ({"max_episode_steps": "9"}, "env_kwargs: max_episode_steps must be an int, got '9'"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1, got 0"),
        ({"render_mode": "human"}, "env_kwargs must not say render_mode"),
    ],
)
def test_wrong_ones_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_vec(ENV_ID, 1, seeds=[0], env_kwargs=kwargs)


def test_what_is_recorded_for_a_video_is_what_is_judged() -> None:
    weights = (0.4 * np.random.default_rng(3).standard_normal((2, SPEC.num_params))).astype(np.float32)
    recording = record_episodes(ENV_ID, SPEC, weights, 11, KWARGS)
    judged = episodic_returns(ENV_ID, SPEC, weights, np.array([11]), env_kwargs=KWARGS)
    np.testing.assert_array_equal(recording.returns[-1], judged[:, 0])
    own = gymnasium.make(ENV_ID, **KWARGS)
    own.reset(seed=11)
    first = own.unwrapped.data.qpos  # type: ignore[attr-defined]
    np.testing.assert_array_equal(recording.states[0, :, 1 : 1 + len(first)], [first, first])  # time comes before
    model, seconds = make_vec(ENV_ID, 1, seeds=[0], env_kwargs=KWARGS).simulation()
    assert (model.nq, seconds) == (2, make_vec(ENV_ID, 1, seeds=[0]).simulation()[1])


def test_import_gives_them_to_a_store_that_lacks_them(tmp_path: Path, run_tipl: Callable[..., int], capsys) -> None:
    old, new = store_of(tmp_path / "old.zarr", None), tmp_path / "new.zarr"
    said = ("--env-kwargs", json.dumps(KWARGS))
    assert run_tipl("import", old.path, "--output", new, *said) == 0
    assert Store.open(new).env_kwargs == KWARGS
    again = tipl.import_checkpoints([new], tmp_path / "again.zarr")  # those of the store
    assert again.env_kwargs == KWARGS
    with pytest.raises(ValueError, match=r"several env_kwargs, {} and {'reset_noise_scale': 0.3}; pass those of all"):
        tipl.import_checkpoints([old.path, new], tmp_path / "both.zarr")
    assert len(tipl.import_checkpoints([old.path, new], tmp_path / "both.zarr", env_kwargs=KWARGS)) == 2
    capsys.readouterr()
    assert run_tipl("import", old.path, "--dry-run", *said) == 0
    assert 'env_kwargs {"reset_noise_scale": 0.3}' in capsys.readouterr().out


@pytest.mark.parametrize("command", ["import", "collect", "run", "accelerate", "score"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"no_such": 1}', "refuses env_kwargs {'no_such': 1}"),
        ('{"reset_noise_scale"', "env_kwargs must be a JSON object, such as .*: Expecting ':' delimiter"),
        ("[1]", r"env_kwargs must be a JSON object, such as .*, got '\[1\]'$"),
        ('{"a": NaN}', "env_kwargs must be a JSON object, .*: NaN is no number of JSON's"),
        ('{"a": 1e999}', "env_kwargs must be a JSON object, .*: it must be plain JSON: Out of range"),
        ('{"a": "\\ud800"}', "env_kwargs must be a JSON object, .*: it must be plain JSON: unexpected end of hex"),
        ('{"a": ' + "[" * 400 + "]" * 400 + "}", "env_kwargs must be a JSON object, .*: recursion limit"),
        ('{"a": {"b": 1, "b": 2}}', "env_kwargs must be a JSON object, .*: it gives 'b' twice"),
    ],
)
def test_wrong_ones_end_a_command_in_one_line(
    tmp_path: Path, run_tipl: Callable[..., int], capsys, command: str, text: str, message: str
) -> None:
    store = store_of(tmp_path / "old.zarr", None).path
    sources = {"import": (store,), "score": (store,)}.get(command, ("--env-id", ENV_ID))
    assert run_tipl(command, *sources, "--output", tmp_path / "bad", "--env-kwargs", text) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.strip())
    assert error.count("\n") == 1
    assert [it.name for it in tmp_path.iterdir()] == ["old.zarr"]  # nothing is left behind


def test_a_recorder_keeps_them_and_goes_on_with_the_same_alone(tmp_path: Path) -> None:
    policy = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    path = tmp_path / "run"
    with tipl.Recorder(path, env_id=ENV_ID, env_kwargs=KWARGS, actor="") as recorder:
        recorder.log(policy, env_steps=1)
    assert Store.open(path).env_kwargs == KWARGS
    with tipl.Recorder(path, env_id=ENV_ID, env_kwargs=KWARGS, actor="", resume=True) as recorder:
        recorder.log(policy, env_steps=2)
    tipl.Recorder(path, env_id=ENV_ID, actor="", resume=True).close()  # by default those that are there
    with pytest.raises(ValueError, match=f"must be a recording of {ENV_ID} to append to"):
        tipl.Recorder(path, env_id=ENV_ID, env_kwargs={}, actor="", resume=True)


@pytest.fixture(scope="module")
def whole_run(
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: None,
    hasty_nowcaster: None,
    render_nothing: Callable[[pytest.MonkeyPatch], None],
) -> Path:
    """What `tipl run` leaves, in an environment with KWARGS."""
    output = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        render_nothing(patch)
        tipl.pipeline.run(
            output, env_id=ENV_ID, env_kwargs=KWARGS, num_trials=4, total_timesteps=32 * 11, ppo=TINY_PPO,
            train=TINY_TRAIN, evaluate=TINY_EVALUATE, progress=False,
        )  # fmt: skip
    return output


def test_every_stage_uses_those_of_the_store(whole_run: Path) -> None:
    store = Store.open(whole_run / "store.zarr")
    assert store.env_kwargs == KWARGS
    results = json.loads((whole_run / "evaluation" / "results.json").read_text())
    assert results["settings"]["env_kwargs"] == KWARGS
    true = {row["trial"]: row["return_true"] for row in results["rows"] if row["predictor"] == "tipl"}
    for trial, value in true.items():
        seed = int(episode_seeds(TINY_EVALUATE, trial)[0, 0])
        row = next(it for it in results["rows"] if it["trial"] == trial)
        at = round(row["prefix"] * (store.num_checkpoints - 1)) + row["horizon"]
        assert value == own_return(ENV_ID, KWARGS, SPEC, store.trial(trial).weights()[at], seed)
        assert value != own_return(ENV_ID, {}, SPEC, store.trial(trial).weights()[at], seed)
    page = (whole_run / "report" / "report.html").read_text()
    assert "reset_noise_scale" in page
    assert "--env-kwargs '{\"reset_noise_scale\": 0.3}'" in str(origin_of(store))


def test_a_run_and_a_collection_go_on_with_the_same_alone(whole_run: Path, tmp_path: Path, run_tipl, capsys) -> None:
    tiny = ("--env-id", ENV_ID, "--num-trials", 4, "--total-timesteps", 32 * 11)
    same = (*tiny, *flags(TINY_PPO, "ppo."), *flags(TINY_TRAIN, "train."), *flags(TINY_EVALUATE, "evaluate."))
    assert run_tipl("run", *same, "--output", whole_run, "--resume", "--env-kwargs", '{"reset_noise_scale": 0.2}') == 2
    assert re.search(
        r'begun with env_kwargs = {"reset_noise_scale": 0.3}, got {"reset_noise_scale": 0.2}', capsys.readouterr().err
    )
    assert run_tipl("run", *same, "--output", whole_run, "--resume", "--env-kwargs", json.dumps(KWARGS)) == 0
    begun = tmp_path / "begun.zarr"
    config = Store.open(whole_run / "store.zarr").config
    Store.create(begun, env_id=ENV_ID, env_kwargs=KWARGS, policy=SPEC, seeds=[0, 1, 2, 3], config=config).close()
    capsys.readouterr()
    assert run_tipl("collect", *tiny, *flags(TINY_PPO, "ppo."), "--output", begun) == 2
    assert "unfinished collection with env_kwargs.reset_noise_scale = 0.3, got nothing" in capsys.readouterr().err


def test_a_store_of_others_is_no_fresh_one(whole_run: Path, tmp_path: Path) -> None:
    store = Store.open(whole_run / "store.zarr")
    fresh = Store.create(tmp_path / "fresh.zarr", env_id=ENV_ID, policy=SPEC, seeds=[7], config=store.config)
    fresh.close()
    with pytest.raises(ValueError, match=r"fresh must have env_kwargs = {'reset_noise_scale': 0.3}, as .* has, got {}"):
        tipl.evaluate(
            store, tipl.Forecaster.load(whole_run / "model"), tmp_path / "e", TINY_EVALUATE, fresh=fresh, progress=False
        )


def test_accelerated_runs_learn_in_it_and_are_compared_with_their_like(tmp_path: Path) -> None:
    def ledger(name: str, kwargs: dict[str, Any]) -> tipl.Ledger:
        return tipl.accelerate(
            tmp_path / name, env_id=ENV_ID, env_kwargs=kwargs, num_trials=2, total_timesteps=64, ppo=TINY_PPO,
            jumps=tipl.JumpConfig(max_jumps=0), progress=False,
        )  # fmt: skip

    made, plain = ledger("made", KWARGS), ledger("plain", {})
    assert Store.open(tmp_path / "made" / "store.zarr").env_kwargs == KWARGS
    assert (made.env_kwargs, plain.env_kwargs) == (KWARGS, {})
    with pytest.raises(ValueError, match=r"compare: made must have the same env_kwargs as plain, {}, got"):
        tipl.compare({"plain": plain, "made": made}, "plain")
