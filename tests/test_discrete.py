"""Policies of discrete actions: found where a file says so, run, compared and exported as they act in their library."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foreign_checkpoints
import gymnasium
import numpy as np
import onnxruntime
import pytest
import torch
from factories import TINY_EVALUATE, TINY_PPO, TINY_TRAIN, flags
from foreign_checkpoints import CleanRL, RslRl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import tipl
from tipl.collecting.description import describe_store
from tipl.collecting.envs import make_vec
from tipl.collecting.episodes import can_run, episodic_returns
from tipl.collecting.policy_network import actions_of, mean_action
from tipl.judging.action_metrics import action_bounds, action_differences, action_variance, kl_divergences
from tipl.policy import ACTIVATIONS, ParameterLayout, PolicySpec
from tipl.report.results import read_results
from tipl.storing.actor_families import Settings
from tipl.storing.foreign_actors import Actor, differences, find_actor
from tipl.storing.foreign_files import find_actor_in, read_checkpoint_file
from tipl.storing.importer import describe_import
from tipl.storing.store import Store

KINDS = ("PPO", "DQN", "CleanRL")
FAR = "tipl/Far-v0"
CART_POLE = PolicySpec(4, 2, (3,), spread="none", outputs="logits")


class Far(gymnasium.Env[np.ndarray, np.int64]):
    """Actions 5, 6 and 7, of which each is worth itself, for nine steps; an observation counts down from a start."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    action_space = gymnasium.spaces.Discrete(3, start=5)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self._obs.copy(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self._obs = np.roll(-self._obs, 1)
        return self._obs.copy(), float(action), False, False, {}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    gymnasium.register(FAR, Far, max_episode_steps=9)
    yield
    del gymnasium.registry[FAR]


def linear(prefix: str, fan_in: int, fan_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (fan_out, fan_in), f"{prefix}.bias": (fan_out,)}


def mlp(prefix: str, sizes: tuple[int, ...], head: str | None = None) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of an MLP, whose last layer may have a name of its own."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(len(sizes) - 1):
        is_head = i == len(sizes) - 2 and head is not None
        shapes |= linear(str(head) if is_head else f"{prefix}.{2 * i}", sizes[i], sizes[i + 1])
    return shapes


def actor_shapes(kind: str, sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    if kind == "PPO":
        return mlp("mlp_extractor.policy_net", sizes, "action_net")
    return mlp({"DQN": "q_net.q_net", "CleanRL": "actor"}[kind], sizes)


def whole(kind: str, seed: int = 0, sizes: tuple[int, ...] = (3, 8, 6, 2)) -> dict[str, Tensor]:
    """A policy's state: the actor, and a critic or a target network with as many outputs as there are actions."""
    actor = actor_shapes(kind, sizes)
    beside = {
        "PPO": mlp("mlp_extractor.value_net", sizes, "value_net"),
        "DQN": {key.replace("q_net.", "q_net_target.", 1): shape for key, shape in actor.items()},
        "CleanRL": mlp("critic", sizes),
    }[kind]
    random = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=random) for key, shape in (beside | actor).items()}


def spec_of(kind: str, sizes: tuple[int, ...] = (3, 8, 6, 2), activation: Any = None) -> PolicySpec:
    default = "relu" if kind == "DQN" else "tanh"
    outputs: Any = "values" if kind == "DQN" else "logits"
    return PolicySpec(sizes[0], sizes[-1], sizes[1:-1], activation or default, spread="none", outputs=outputs)


def space(name: str) -> dict[str, str]:
    return {":type:": f"<class 'gymnasium.spaces.{name}'>", ":serialized:": "never read", "n": "2", "start": "0"}


DISCRETE = space("discrete.Discrete")


def sb3_zip(path: Path, state: dict[str, Tensor], action_space: Any = DISCRETE, **data: Any) -> Path:
    return foreign_checkpoints.sb3_zip(path, state, action_space=action_space, **data)


def saved(kind: str, folder: Path, seed: int = 0, sizes: tuple[int, ...] = (3, 8, 6, 2)) -> Path:
    """A checkpoint file of the kind, of step `seed`."""
    if kind != "CleanRL":
        return sb3_zip(folder / f"m_{seed}_steps.zip", whole(kind, seed, sizes), num_timesteps=seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(whole(kind, seed, sizes), folder / f"step_{seed}.cleanrl_model")
    return folder / f"step_{seed}.cleanrl_model"


def network(kind: str, state: dict[str, Tensor], obs: Tensor) -> Tensor:
    """The outputs (batch, n) in float64, from the state's keys alone."""
    layers = [key.removesuffix(".weight") for key in actor_shapes(kind, (1,) * 4) if key.endswith(".weight")]
    x = obs.double()
    for layer in layers:
        x = x @ state[f"{layer}.weight"].double().T + state[f"{layer}.bias"].double()
        x = x if layer == layers[-1] else x.relu() if kind == "DQN" else x.tanh()
    return x


def weights_of(spec: PolicySpec, num_policies: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_policies, spec.num_params)).astype(np.float32)


# ---- which policies these are


def test_a_spec_says_what_its_outputs_are() -> None:
    logits, values, plain = spec_of("PPO"), spec_of("DQN"), PolicySpec(3, 2, (8, 6))
    assert "outputs" not in plain.to_dict()  # old stores keep their bytes
    for spec in (logits, values):
        assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        assert next(iter(spec.shapes)) == "policy_net.0.weight"
    assert str(logits) == "layers 3 -> 8 -> 6 -> 2, tanh, discrete actions, the greatest of 2 logits"
    assert str(values).endswith("relu, discrete actions, the greatest of 2 values")
    assert (plain.discrete, logits.discrete, values.discrete) == (False, True, True)
    assert (
        differences(spec_of("PPO", activation="relu"), values) == "the kind of the outputs is values instead of logits"
    )
    with pytest.raises(ValueError, match=r"outputs must be one of \('means', 'logits', 'values'\), got 'probs'$"):
        PolicySpec(3, 2, outputs="probs")  # type: ignore[arg-type]
    for wrong in ({"spread": "parameter"}, {"spread": "head"}, {"squash": True}, {"mean_limit": 1.0}):
        with pytest.raises(ValueError, match="must be 'none', False and None with discrete actions, got "):
            PolicySpec(3, 2, **{"spread": "none", "outputs": "logits", **wrong})  # type: ignore[arg-type]


sizes = st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(KINDS), sizes, st.sampled_from(["", "policy.", "agent.net."]), st.sampled_from(ACTIVATIONS),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_any_size_under_any_prefix_is_found_written_and_read(
    kind: str, sizes: tuple[int, ...], prefix: str, activation: Any, whole_key: bool, seed: int
) -> None:
    state = {f"{prefix}{key}": it for key, it in whole(kind, seed, sizes).items()}
    other = {f"{prefix}{key}": it for key, it in whole(kind, seed + 1, sizes).items()}
    chosen = f"{prefix}actor." if whole_key and kind == "CleanRL" else prefix or None
    actor = find_actor(state, Settings(activation, discrete=True), chosen)
    assert actor.policy == spec_of(kind, sizes, activation)
    assert actor.keys == tuple(prefix + key for key in actor_shapes(kind, sizes))
    assert Actor.from_dict(json.loads(json.dumps(actor.to_dict()))) == actor
    row = actor.flatten(other)
    np.testing.assert_array_equal(row, torch.cat([other[key].flatten() for key in actor.keys]).numpy())
    before = {key: it.clone() for key, it in state.items()}
    actor.write(row, state)
    for key, it in state.items():
        assert torch.equal(it, (other if key in actor.keys else before)[key])
    unsaid = find_actor(state, Settings(activation), prefix or None)
    assert isinstance(unsaid.policy, ParameterLayout)  # as likely the mean of a continuous action


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_imported_act_and_are_exported(kind: str, tmp_path: Path) -> None:
    paths = [saved(kind, tmp_path / "run", seed) for seed in range(3)]
    activation = "tanh" if kind == "CleanRL" else None
    if activation is not None:
        with pytest.raises(ValueError, match=r"activation must be given, .*the library's default is tanh$"):
            tipl.import_checkpoints([tmp_path / "run"], tmp_path / "store")
    store = tipl.import_checkpoints([tmp_path / "run"], tmp_path / "store", activation=activation)
    assert store.policy == spec_of(kind)
    assert "note" not in store.config["source"]
    assert "the greatest of 2" in describe_store(store)["policy"]
    obs = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    for seed, row in enumerate(store.trial(0).weights()):
        outputs = mean_action(store.policy, torch.tensor(row)[None], obs[None])[0]
        expected = network(kind, whole(kind, seed), obs)
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
        actions = actions_of(store.policy, outputs.numpy(), np.zeros(1), np.ones(1))
        np.testing.assert_array_equal(actions[:, 0], expected.argmax(1))
    written = read_checkpoint_file(tipl.export_checkpoint(store.path, paths[0], tmp_path / f"out{paths[0].suffix}"))
    actor = actor_shapes(kind, (3, 8, 6, 2))
    for key, it in written.state.items():
        assert torch.equal(it, whole(kind, 2 if key in actor else 0)[key])
    lines = describe_import([tmp_path / "run"], activation=activation)
    beside = "a target network's" if kind == "DQN" else "a critic's"
    assert sum(label == "tensor" and text.endswith(beside) for label, text in lines) == 6


@pytest.mark.parametrize("kind", ["PPO", "DQN"])
def test_what_a_zip_says_of_the_actions_decides(kind: str, tmp_path: Path) -> None:
    path, state = tmp_path / "m_1.zip", whole(kind)

    def found(action_space: Any = DISCRETE, **data: Any) -> Any:
        sb3_zip(path, state, action_space, **data)
        return find_actor_in(path, read_checkpoint_file(path)).policy

    assert found() == spec_of(kind)
    assert found({":type:": "<class 'gym.spaces.discrete.Discrete'>"}) == spec_of(kind)  # of an older SB3
    named = "<class 'torch.nn.modules.activation.{}'>"
    assert found(policy_kwargs={"activation_fn": named.format("ELU")}) == spec_of(kind, activation="elu")
    assert isinstance(found(policy_kwargs={"activation_fn": named.format("Mish")}), ParameterLayout)
    spaces = [space(name) for name in ("multi_discrete.MultiDiscrete", "multi_binary.MultiBinary", "box.Box")]
    for other in (*spaces, {}, None, 2, "Discrete", [DISCRETE], {":type:": 3}):
        assert isinstance(found(other), ParameterLayout)
    masked = {"__module__": "sb3_contrib.common.maskable.policies"}
    assert isinstance(found(policy_class=masked), ParameterLayout)


def test_a_file_that_may_be_of_discrete_actions_can_be_of_others(tmp_path: Path) -> None:
    torch.save(CleanRL().state_dict(), tmp_path / "ppo.cleanrl_model")
    continuous = tipl.import_checkpoints([tmp_path / "ppo.cleanrl_model"], tmp_path / "a", activation="tanh")
    assert continuous.policy == PolicySpec(4, 2, (8, 8))
    for state in (RslRl().release_3(), RslRl().release_2()):
        found = find_actor(state["model_state_dict"], Settings("elu", discrete=True))
        assert found.kind == "rsl_rl"
    torch.save(whole("CleanRL"), tmp_path / "bare.pt")
    bare = tipl.import_checkpoints([tmp_path / "bare.pt"], tmp_path / "b")
    assert isinstance(bare.policy, ParameterLayout)
    with pytest.raises(ValueError, match="the simulator can run only MLPs that it knows"):
        tipl.score(bare)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (whole("PPO") | {"extra_net.weight": torch.ones(2)}, r"beside the actor of sb3 .* lies \[extra_net\.weight\]"),
        (whole("DQN") | {"q_net.extra": torch.ones(2)}, r"beside the actor of sb3 .* lies \[q_net\.extra\]"),
        (whole("CleanRL") | {"actor.extra": torch.ones(2)}, r"beside the actor of cleanrl .* lies \[actor\.extra\]"),
        (whole("CleanRL") | {"target.0.weight": torch.ones(2)}, r"\[target\.0\.weight\] may be a critic's"),
        ({k: it for k, it in whole("DQN").items() if "target" in k}, "no floating-point tensor of an actor is there"),
        (
            whole("PPO") | {"action_net.bias": torch.tensor([0.0, math.nan])},
            r"action_net\.bias must be finite, got NaN",
        ),
    ],
)
def test_a_file_without_a_clear_actor_is_refused(state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    sb3_zip(tmp_path / "m_1.zip", state)
    with pytest.raises(ValueError, match=message):
        tipl.import_checkpoints([tmp_path / "m_1.zip"], tmp_path / "store", activation="tanh")
    assert not (tmp_path / "store").exists()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(KINDS), st.randoms(use_true_random=False), st.integers(1, 4))
def test_no_tensor_of_a_damaged_file_is_left_out_in_silence(kind: str, random: Any, changes: int) -> None:
    state = foreign_checkpoints.damaged(whole(kind), random, changes)
    expected = {
        key for key in state if not key.startswith(("critic", "q_net_target.", "value_net", "mlp_extractor.value"))
    }
    try:
        actor = find_actor(state, Settings(discrete=True))
    except ValueError:
        return
    assert set(actor.keys) == expected
    assert sum(state[key].numel() for key in actor.keys) == actor.policy.num_params == len(actor.flatten(state))


@pytest.mark.parametrize("kind", KINDS)
def test_recordings(kind: str, tmp_path: Path) -> None:
    with tipl.Recorder(tmp_path / "a", env_id=FAR, activation="relu", discrete=True) as recorder:
        recorder.log(whole(kind), env_steps=1)
    with tipl.Recorder(tmp_path / "a", env_id=FAR, activation="relu", discrete=True, resume=True) as recorder:
        assert recorder.holds(whole(kind))
        recorder.log(whole(kind, 1), env_steps=2)
    store = Store.open(tmp_path / "a")
    assert store.policy == spec_of(kind, activation="relu")
    assert "note" not in store.config["source"]

    # A recording by a tipl that did not know these actors goes on, and is exported.
    with tipl.Recorder(tmp_path / "old", env_id=FAR) as recorder:
        recorder.log(whole(kind), env_steps=1)
    with tipl.Recorder(tmp_path / "old", env_id=FAR, activation="tanh", discrete=True, resume=True) as recorder:
        recorder.log(whole(kind, 1), env_steps=2)
    old, like = Store.open(tmp_path / "old"), saved(kind, tmp_path / "like", 2)
    assert isinstance(old.policy, ParameterLayout)
    written = read_checkpoint_file(tipl.export_checkpoint(old.path, like, tmp_path / f"out{like.suffix}")).state
    for key, it in written.items():
        assert torch.equal(it, whole(kind, 1 if key in actor_shapes(kind, (3, 8, 6, 2)) else 2)[key])


# ---- environments


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", FAR])
def test_environments_equal_gymnasium(env_id: str) -> None:
    seeds, own = [3, 4], [gymnasium.make(env_id, max_episode_steps=25) for _ in range(2)]
    env = make_vec(env_id, 2, seeds=seeds, max_episode_steps=25)
    space = own[0].action_space
    assert isinstance(space, gymnasium.spaces.Discrete)
    assert (env.num_actions, env.act_dim, env.action_low[0]) == (space.n, 1, space.start)
    assert env.action_high[0] == space.start + space.n - 1
    np.testing.assert_array_equal(env.reset(), [it.reset(seed=seed)[0] for it, seed in zip(own, seeds, strict=True)])
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = rng.integers(space.n, size=(2, 1)) + space.start
        step = env.step(actions.astype(np.float64))
        for i, it in enumerate(own):
            obs, reward, terminated, truncated, _ = it.step(actions[i, 0])
            np.testing.assert_array_equal(step.final_obs[i], obs)
            assert (step.reward[i], step.terminated[i], step.truncated[i]) == (reward, terminated, truncated)
            if terminated or truncated:
                np.testing.assert_array_equal(step.obs[i], it.reset()[0])
    env.close()


def test_actions_that_are_not_whole_are_refused() -> None:
    env = make_vec("CartPole-v1", 2, seeds=[0, 1])
    env.reset()
    with pytest.raises(ValueError, match=r"^step: actions must be whole numbers, got \[1\.  0\.5\]$"):
        env.step(np.array([[1.0], [0.5]]))
    env.step(np.array([[1.0], [0.5]]), np.array([True, False]))  # that one is not taken


@pytest.mark.parametrize(
    ("env_id", "policy", "message"),
    [
        (
            "CartPole-v1",
            PolicySpec(4, 2),
            "of .* must choose one of 2 discrete actions, got policies that give continuous actions of size 2$",
        ),
        (
            "Pendulum-v1",
            PolicySpec(3, 5, spread="none", outputs="values"),
            "of .* must give continuous actions of size 1, got policies that choose one of 5 discrete actions$",
        ),
        ("Acrobot-v1", CART_POLE, "of Acrobot-v1 must have 6 observations and 3 actions, got 4 and 2$"),
        (FAR, spec_of("DQN", (2, 2)), "of tipl/Far-v0 must have 2 observations and 3 actions, got 2 and 2$"),
    ],
)
def test_policies_of_another_kind_or_size_are_refused(
    env_id: str, policy: PolicySpec, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^the policies {message}"):
        episodic_returns(env_id, policy, weights_of(policy, 1), np.arange(1))
    assert not can_run(env_id, policy)
    with pytest.raises(ValueError, match=f"^export: a policy {message}"):
        tipl.export_onnx(weights_of(policy, 1)[0], tmp_path / "p.onnx", policy=policy, env_id=env_id)


def test_policies_train_where_actions_are_counted_from_another_number(
    run_tipl: Callable[..., int], tmp_path: Path
) -> None:
    words = ("--num-trials", 2, "--total-timesteps", 64, "--output", tmp_path / "out", *flags(TINY_PPO, "ppo."))
    assert run_tipl("collect", "--env-id", FAR, *words) == 0  # the task itself asserts that there are such actions
    store = Store.open(tmp_path / "out")
    assert store.policy == PolicySpec(2, 3, TINY_PPO.hidden_sizes, spread="none", outputs="logits")
    returns = np.stack([store.trial(i).episodic_return[1:] for i in range(2)])
    assert ((returns > 5 * 9) & (returns < 7 * 9)).all()  # of nine steps that give 5, 6 or 7
    scores = tipl.score(store, num_episodes=1, progress=False)
    assert set(np.unique(scores.returns)) <= {float(it) for it in range(45, 64)}


def test_a_missing_simulator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(*_: Any) -> None:
        raise gymnasium.error.DependencyNotInstalled("Box2D is not installed")

    monkeypatch.setattr(Far, "__init__", needs)
    with pytest.raises(ValueError, match=r"^make_vec: Gymnasium refuses tipl/Far-v0: Box2D is not installed$"):
        episodic_returns(FAR, spec_of("PPO", (2, 3)), weights_of(spec_of("PPO", (2, 3)), 1), np.arange(1))


# ---- acting


def test_the_first_of_several_greatest_outputs_is_taken_counted_from_the_start() -> None:
    outputs = np.array([[1, 3, 3], [2, 2, 2], [0, -1, 5]], np.float32)
    spec = spec_of("DQN", (2, 3))
    np.testing.assert_array_equal(actions_of(spec, outputs, np.array([5.0]), np.array([7.0])), [[6], [5], [7]])
    np.testing.assert_array_equal(np.argmax(outputs, 1), torch.from_numpy(outputs).argmax(1))


@pytest.mark.parametrize("env_id", ["CartPole-v1", FAR])
def test_returns_are_those_of_a_loop_over_the_environment(env_id: str) -> None:
    obs_dim, n, start = {"CartPole-v1": (4, 2, 0), FAR: (2, 3, 5)}[env_id]
    spec = spec_of("PPO", (obs_dim, 7, n))
    weights, seeds = weights_of(spec, 5), np.array([[i, 10 + i] for i in range(5)])
    returns = episodic_returns(env_id, spec, weights, seeds)
    for row, own_seeds, own in zip(weights, seeds, returns, strict=True):
        parts = spec.unflatten(torch.from_numpy(row).double())
        for seed, expected in zip(own_seeds, own, strict=True):
            env, total, over = gymnasium.make(env_id), 0.0, False
            obs, _ = env.reset(seed=int(seed))
            while not over:
                hidden = (
                    parts["policy_net.0.weight"] @ torch.from_numpy(obs).double() + parts["policy_net.0.bias"]
                ).tanh()
                outputs = parts["action_net.weight"] @ hidden + parts["action_net.bias"]
                obs, reward, terminated, truncated, _ = env.step(np.int64(int(outputs.argmax()) + start))
                total, over = total + float(reward), terminated or truncated
            env.close()
            assert total == expected
    assert len(np.unique(returns)) > 1
    np.testing.assert_array_equal(episodic_returns(env_id, spec, weights[3:4], seeds[3:4])[0], returns[3])


def test_actions_are_compared() -> None:
    spec, states = spec_of("PPO", (2, 9, 3)), np.random.default_rng(1).normal(size=(40, 2)).astype(np.float32)
    weights, bounds = weights_of(spec, 6), action_bounds(FAR)
    np.testing.assert_array_equal(bounds, [[5], [7]])
    outputs = mean_action(spec, torch.from_numpy(weights), torch.from_numpy(states).expand(6, -1, -1)).double()
    chosen = outputs.argmax(-1)
    shares = action_differences(spec, weights[0], weights[1:], states, bounds)
    np.testing.assert_allclose(shares, (chosen[1:] != chosen[0]).double().mean(1), rtol=1e-15)
    assert 0.0 < shares.max() <= 1.0
    own = kl_divergence(Categorical(logits=outputs[0]), Categorical(logits=outputs[1:])).mean(1)
    np.testing.assert_allclose(kl_divergences(spec, weights[0], weights[1:], states), own, rtol=1e-10)
    pairs = [(chosen[i] != chosen[j]).double().mean() for i in range(6) for j in range(6) if i != j]
    assert action_variance(spec, weights, states, bounds) == pytest.approx(float(np.mean(pairs)), rel=1e-12)
    same = np.tile(weights[:1], (3, 1))
    assert action_variance(spec, same, states, bounds) == 0.0
    assert not action_differences(spec, same[0], same, states, bounds).any()
    assert not kl_divergences(spec, same[0], same, states).any()
    values = spec_of("DQN", (2, 9, 3))
    assert np.isnan(kl_divergences(values, weights[0], weights[1:], states)).all()  # no probabilities


def test_an_onnx_model_gives_whole_actions(tmp_path: Path) -> None:
    spec, obs = spec_of("PPO", (2, 9, 3)), np.random.default_rng(1).normal(size=(300, 2)).astype(np.float32)
    row = weights_of(spec, 1)[0]
    outputs = mean_action(spec, torch.from_numpy(row)[None], torch.from_numpy(obs)[None])[0].numpy()
    for env_id, start in ((FAR, 5), ("none", 0)):
        path = tipl.export_onnx(row, tmp_path / f"{start}.onnx", policy=spec, env_id=env_id)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for batch in (1, 300):
            (action,) = session.run(["action"], {"observation": obs[:batch]})
            assert (action.dtype, action.shape) == (np.int64, (batch,))
            np.testing.assert_array_equal(action, outputs[:batch].argmax(1) + start)
    flat = tipl.export_onnx(0 * row, tmp_path / "flat.onnx", policy=spec, env_id="none")
    (action,) = onnxruntime.InferenceSession(flat, providers=["CPUExecutionProvider"]).run(None, {"observation": obs})
    assert not action.any()  # the first of equals


# ---- beside Stable-Baselines3


RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PPO": ("PPO", "CartPole-v1", {"n_steps": 512}),
    "PPO, another task": ("PPO", "Acrobot-v1", {"n_steps": 512}),
    "PPO, normalised": ("PPO", "CartPole-v1", {"n_steps": 512}),
    "A2C": ("A2C", "CartPole-v1", {"n_steps": 128}),
    "DQN": ("DQN", "MountainCar-v0", {"learning_starts": 100, "policy_kwargs": {"net_arch": [16]}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_policies_act_and_return_as_in_their_library(kind: str, tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3", reason="runs stable-baselines3, which is not installed")
    from stable_baselines3.common.callbacks import CheckpointCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    from tipl.sb3 import RecorderCallback

    name, env_id, arguments = RUNS[kind]
    algorithm, normalised = getattr(sb3, name), "normalised" in kind
    env: Any = DummyVecEnv([lambda: Monitor(gymnasium.make(env_id))])
    if normalised:
        env = VecNormalize(env, clip_obs=1e6)
    model = algorithm("MlpPolicy", env, seed=0, device="cpu", **arguments)
    checkpoints = CheckpointCallback(512, str(tmp_path / "run"), save_vecnormalize=normalised)
    model.learn(2048, callback=[RecorderCallback(tmp_path / "recording", every=512), checkpoints])
    store = tipl.import_checkpoints([tmp_path / "run"], tmp_path / "store", env_id=env_id)
    assert isinstance(store.policy, PolicySpec)
    assert store.policy.outputs == ("values" if name == "DQN" else "logits")
    recording = Store.open(tmp_path / "recording")
    assert recording.policy == store.policy
    np.testing.assert_array_equal(recording.trial(0).weights()[-1], np.array(_row_of(store, model, env, normalised)))

    files = [tmp_path / "run" / f"rl_model_{step}_steps.zip" for step in (512, 1024, 1536, 2048)]
    loaded = [algorithm.load(path, device="cpu") for path in files]
    scores = tipl.score(store, num_episodes=3, progress=False)
    seeds = np.random.default_rng((0, 0)).integers(2**31, size=15)[:3]

    def own_return(own: Any, step: int, seed: int) -> float:
        own_env: Any = DummyVecEnv([lambda: Monitor(gymnasium.make(env_id))])
        if normalised:
            own_env = VecNormalize.load(str(tmp_path / "run" / f"rl_model_vecnormalize_{step}_steps.pkl"), own_env)
            own_env.training, own_env.norm_reward = False, False
        own_env.seed(int(seed))
        return float(evaluate_policy(own, own_env, n_eval_episodes=1, deterministic=True)[0])

    own_returns = [
        [own_return(own, step, seed) for seed in seeds]
        for own, step in zip(loaded, (512, 1024, 1536, 2048), strict=True)
    ]
    np.testing.assert_array_equal(scores.returns[0], own_returns)

    obs = np.random.default_rng(0).normal(size=(200, store.policy.obs_dim)).astype(np.float32)
    if not normalised:  # otherwise the weights have the statistics in them, and SB3's have not
        written = tipl.export_checkpoint(store.path, files[0], tmp_path / "out.zip", checkpoint=3)
        after = algorithm.load(written, device="cpu")
        np.testing.assert_array_equal(*(it.predict(obs, deterministic=True)[0] for it in (after, loaded[3])))
        tipl.export_onnx(store.path, tmp_path / "p.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "p.onnx", providers=["CPUExecutionProvider"])
        (action,) = session.run(["action"], {"observation": obs})
        np.testing.assert_array_equal(action, loaded[3].predict(obs, deterministic=True)[0])
        after.set_env(DummyVecEnv([lambda: gymnasium.make(env_id)]))
        after.learn(512)  # it learns on, as any checkpoint does


def _row_of(store: Store, model: Any, env: Any, normalised: bool) -> np.ndarray:
    """The weights of the model as it is now, with VecNormalize's statistics as they are now."""
    from tipl.storing.observation_statistics import live_statistics

    state = dict(model.policy.state_dict())
    statistics = live_statistics(env) if normalised else None
    state |= {} if statistics is None else statistics.to_state()
    return Actor.from_dict(store.config["source"]["actor"]).flatten(state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PPO", "DQN"])
def test_evaluation_and_report(
    kind: str, hasty_nowcaster: None, run_tipl: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = (4, 8, 6, 2)
    rows = np.cumsum(np.random.default_rng(0).normal(size=(4, 12, spec_of(kind, sizes).num_params)), 1)
    actor = find_actor(whole(kind, 0, sizes), Settings(spec_of(kind).activation, discrete=True))
    for trial in range(4):
        for t in range(12):
            state = whole(kind, 0, sizes)
            actor.write((0.2 * rows[trial, t]).astype(np.float32), state)
            sb3_zip(tmp_path / f"seed{trial}" / f"m_{20 * t}_steps.zip", state)

    def run(*words: object) -> None:
        assert run_tipl(*words) == 0, capsys.readouterr().err

    store, model, out = (tmp_path / name for name in ("store", "model", "evaluation"))
    run("import", *(tmp_path / f"seed{i}" for i in range(4)), "--output", store, "--env-id", "CartPole-v1")
    run("score", store, "--num-episodes", 1)
    run("train", "--store", store, "--output", model, *flags(TINY_TRAIN))
    run("evaluate", "--store", store, "--model", model, "--output", out, *flags(TINY_EVALUATE))
    run("report", "--store", store, "--evaluation", out, "--output", tmp_path / "report")
    results = read_results(out / "results.json")
    assert results.has_values("action_difference", "tipl")
    assert results.has_values("kl", "tipl") == (kind == "PPO")
    pages = [path.read_text() for path in (tmp_path / "report").rglob("*.html")]
    assert any("in which discrete actions differ" in page for page in pages)
    forecast = tmp_path / "f.safetensors"
    run("rollout", "--model", model, "--store", store, "--trial", 1, "--prefix", 0.5, "--output", forecast)
    run("export", forecast, "--like", tmp_path / "seed1" / "m_120_steps.zip", "--output", tmp_path / "f.zip")
    run("export", forecast, "--format", "onnx", "--output", tmp_path / "f.onnx")
    exported = find_actor_in(tmp_path / "f.zip", read_checkpoint_file(tmp_path / "f.zip"))
    assert exported.policy == spec_of(kind, sizes)
