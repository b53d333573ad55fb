"""Policies trained by other libraries on MuJoCo and CartPole, one function for each library, for compare_libraries.py.

Each trains on one thread for so many seconds of wall clock, saves a checkpoint halfway and one at the end, as the
library does, and says how the library loads them.
"""

import contextlib
import dataclasses
import importlib
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tipl.collecting.spaces import bounds

Floats = NDArray[np.float32]
NUM_ENVS = 4
HIDDEN = [64, 64]
PENDULUM, CHEETAH, HOPPER, CARTPOLE = "InvertedPendulum-v5", "HalfCheetah-v5", "Hopper-v5", "CartPole-v1"


@dataclasses.dataclass(frozen=True)
class Policy:
    """A library's policy, loaded from a checkpoint."""

    outputs: Callable[[Floats], Any]
    """Observations (n, obs_dim) -> deterministic actions (n, act_dim), of discrete ones the network's outputs."""
    normalised: Callable[[Floats], Any] | None = None
    """What its normaliser, where it clips, makes of observations."""
    limit: float = math.inf
    """To which it clips."""
    stop_clipping: Callable[[], Any] | None = None
    """Lets the normaliser clip no more."""

    def __call__(self, obs: Floats) -> Floats:
        return np.asarray(self.outputs(obs), np.float32)

    def clips(self, obs: Floats) -> NDArray[np.bool_]:
        """Return which observations (n, obs_dim) its normaliser clips."""
        seen = np.zeros_like(obs) if self.normalised is None else np.asarray(self.normalised(obs))
        clipped: NDArray[np.bool_] = np.any(np.abs(seen) >= self.limit, axis=-1)
        return clipped

    def with_noise(self, deviation: float) -> "Policy":
        rng = np.random.default_rng(0)
        return Policy(lambda obs: (own := self(obs)) + deviation * rng.standard_normal(own.shape))


class Clock:
    """The time that a training has: it saves a checkpoint when half of it is over, and another one at the end."""

    def __init__(self, seconds: float, path: Callable[[], Path], save: Callable[[str], Any]) -> None:
        self.seconds, self.path, self.save = seconds, path, save
        self.checkpoints: list[Path] = []
        self.start = 0.0

    def goes_on(self) -> bool:
        """Return whether there is time for another update. The first call starts the clock."""
        self.start = self.start or time.perf_counter()
        if self.elapsed >= self.seconds * (len(self.checkpoints) + 1) / 2:
            self.checkpoints.append(self.path())
            self.save(str(self.checkpoints[-1]))
        return len(self.checkpoints) < 2

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start


@dataclasses.dataclass(frozen=True)
class Trained:
    what: str
    env_id: str
    env_steps: int
    clock: Clock
    load: Callable[[Path], Policy]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Those of `tipl.import_checkpoints`."""


Train = Callable[[float, Path], Trained]
"""Trains for so many seconds, with checkpoints in a folder."""


# ---------------------------------------------------------------- what trainings share


def make_envs(env_id: str) -> Any:
    """Return environments that are reset in the step that ends an episode."""
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    return gymnasium.make_vec(env_id, NUM_ENVS, "sync", vector_kwargs={"autoreset_mode": same_step})


def rollout(envs: Any, obs: Floats, act: Callable[[Floats], Floats], num_steps: int) -> tuple[list[Floats], Floats]:
    """Return observations, actions, rewards, and 1 where an episode goes on, (T, N, ...) each; and the next obs."""
    told, (low, high) = [], bounds(envs.single_action_space)
    for _ in range(num_steps):
        actions = act(obs)
        seen, rewards, terminated, truncated, _ = envs.step(actions.clip(low, high))
        told.append((obs, actions, rewards, ~(terminated | truncated)))
        obs = seen.astype(np.float32)
    return [np.stack(it).astype(np.float32) for it in zip(*told, strict=True)], obs


def discounted(x: Floats, going: Floats, discount: float) -> Floats:
    """Return the discounted sums (T, N) of what comes in the same episode from each step on."""
    sums, running = np.empty_like(x), np.zeros_like(x[0])
    for t in reversed(range(len(x))):
        sums[t] = running = x[t] + discount * going[t] * running
    return sums


def action_bounds(env_id: str) -> NDArray[np.float64]:
    """Return the least and greatest action, (2, act_dim)."""
    space: Any = gymnasium.make(env_id).action_space
    return bounds(space)


def as_tensor(obs: Any) -> torch.Tensor:
    return torch.as_tensor(obs, dtype=torch.float32)


# ---------------------------------------------------------------- libraries


def sb3(name: str, env_id: str, seconds: float, folder: Path, *, normalise: bool = False, **settings: Any) -> Trained:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    algorithm: Any = getattr(importlib.import_module("sb3_contrib" if name == "TQC" else "stable_baselines3"), name)
    env = make_vec_env(env_id, seed=0)
    model = algorithm("MlpPolicy", VecNormalize(env) if normalise else env, seed=0, device="cpu", **settings)

    def statistics_of(path: Path) -> str:  # where CheckpointCallback puts them
        return str(folder / path.name.replace("model_", "model_vecnormalize_").replace(".zip", ".pkl"))

    def save(path: str) -> None:
        model.save(path)
        if normalise:
            model.get_vec_normalize_env().save(statistics_of(Path(path)))

    clock = Clock(seconds, lambda: folder / f"rl_model_{model.num_timesteps}_steps.zip", save)

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return clock.goes_on()

    model.learn(10**9, callback=Stop())

    def load(path: Path) -> Policy:
        loaded = algorithm.load(path, device="cpu")
        statistics: Any = VecNormalize.load(statistics_of(path), env) if normalise else None

        def outputs(obs: Floats) -> Any:
            seen = obs if statistics is None else statistics.normalize_obs(obs).astype(np.float32)
            if name == "PPO":  # predict clips to the action space
                return loaded.policy.get_distribution(as_tensor(seen)).mode()
            return loaded.q_net(as_tensor(seen)) if name == "DQN" else loaded.predict(seen, deterministic=True)[0]

        if statistics is None:
            return Policy(outputs)
        stop_clipping = partial(setattr, statistics, "clip_obs", math.inf)
        return Policy(outputs, statistics.normalize_obs, statistics.clip_obs, stop_clipping)

    return Trained(f"{name}, VecNormalize" if normalise else name, env_id, model.num_timesteps, clock, load)


def rsl_rl(env_id: str, seconds: float, folder: Path) -> Trained:
    from rsl_rl.env import VecEnv
    from rsl_rl.runners import OnPolicyRunner
    from tensordict import TensorDict

    class Envs(VecEnv):
        def __init__(self) -> None:
            self.envs, self.bounds = make_envs(env_id), action_bounds(env_id)
            self.num_envs, self.num_actions = NUM_ENVS, len(self.bounds[0])
            self.device, self.max_episode_length = "cpu", 1000
            self.cfg: dict[str, Any] = {}
            self.episode_length_buf = torch.zeros(NUM_ENVS, dtype=torch.long)
            self.obs, _ = self.envs.reset(seed=0)

        def get_observations(self) -> Any:
            return TensorDict({"policy": as_tensor(self.obs)}, [NUM_ENVS])

        def step(self, actions: torch.Tensor) -> Any:
            self.obs, rewards, terminated, truncated, _ = self.envs.step(actions.numpy().clip(*self.bounds))
            done = torch.from_numpy(terminated | truncated)
            return self.get_observations(), as_tensor(rewards), done, {"time_outs": torch.from_numpy(truncated)}

    def make_runner() -> Any:
        mlp = {"class_name": "MLPModel", "hidden_dims": HIDDEN, "activation": "elu", "obs_normalization": True}
        settings = {
            "num_steps_per_env": 128,
            "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
            "algorithm": {"class_name": "PPO"},
            "actor": {**mlp, "distribution_cfg": {"class_name": "GaussianDistribution", "std_type": "log"}},
            "critic": mlp,
        }
        return OnPolicyRunner(Envs(), settings, None, "cpu")

    runner = make_runner()
    clock = Clock(seconds, lambda: folder / f"model_{runner.current_learning_iteration}.pt", runner.save)
    while clock.goes_on():
        runner.learn(1)
        runner.current_learning_iteration += 1  # which a call of learn leaves at its own last iteration

    def load(path: Path) -> Policy:
        loaded = make_runner()
        loaded.load(str(path))
        policy = loaded.get_inference_policy("cpu")
        return Policy(lambda obs: policy(TensorDict({"policy": as_tensor(obs)}, [len(obs)])))

    steps = 128 * NUM_ENVS * runner.current_learning_iteration
    return Trained("PPO, obs_normalization, std_type log", env_id, steps, clock, load, {"activation": "elu"})


def cleanrl(env_id: str, seconds: float, folder: Path) -> Trained:
    """Train as CleanRL's PPO for continuous actions does, written again, with several epochs on each rollout."""
    envs, updates = make_envs(env_id), 0
    obs_dim, act_dim = (space.shape[0] for space in (envs.single_observation_space, envs.single_action_space))

    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.critic, self.actor_mean = self.mlp(1), self.mlp(act_dim)
            self.actor_logstd = nn.Parameter(torch.zeros(1, act_dim))

        @staticmethod
        def mlp(size: int) -> nn.Sequential:
            hidden = nn.Linear(obs_dim, HIDDEN[0]), nn.Tanh(), nn.Linear(HIDDEN[0], HIDDEN[1]), nn.Tanh()
            return nn.Sequential(*hidden, nn.Linear(HIDDEN[1], size))

        def distribution(self, obs: torch.Tensor) -> torch.distributions.Distribution:
            normal = torch.distributions.Normal(self.actor_mean(obs), self.actor_logstd.exp())
            return torch.distributions.Independent(normal, 1)

    agent = Agent()
    optimiser = torch.optim.Adam(agent.parameters(), lr=3e-4, eps=1e-5)
    clock = Clock(
        seconds,
        lambda: folder / f"ppo_{updates}.cleanrl_model",
        lambda path: torch.save(agent.state_dict(), path),
    )
    next_obs = envs.reset(seed=0)[0].astype(np.float32)
    while clock.goes_on():
        (obs, actions, rewards, going), next_obs = rollout(
            envs, next_obs, lambda seen: agent.distribution(as_tensor(seen)).sample().numpy(), 256
        )
        values = agent.critic(as_tensor(np.concatenate([obs, next_obs[None]]))).detach().numpy()[..., 0]
        advantages = discounted(rewards + 0.99 * going * values[1:] - values[:-1], going, 0.99 * 0.95)  # GAE
        o, a, advantage, target = (
            as_tensor(x).flatten(0, 1) for x in (obs, actions, advantages, advantages + values[:-1])
        )
        old = agent.distribution(o).log_prob(a).detach()
        for rows in (it for _ in range(10) for it in torch.randperm(len(o)).split(128)):
            ratio = (agent.distribution(o[rows]).log_prob(a[rows]) - old[rows]).exp()
            scaled = (advantage[rows] - advantage[rows].mean()) / (advantage[rows].std() + 1e-8)
            surrogate = torch.min(scaled * ratio, scaled * ratio.clamp(0.8, 1.2)).mean()
            loss = 0.5 * (agent.critic(o[rows])[:, 0] - target[rows]).square().mean() - surrogate
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimiser.step()
        updates += 1

    def load(path: Path) -> Policy:
        loaded = Agent()
        loaded.load_state_dict(torch.load(path, weights_only=True))
        return Policy(lambda obs: loaded.actor_mean(as_tensor(obs)))

    return Trained(
        "CleanRL's PPO, written again", env_id, updates * 256 * NUM_ENVS, clock, load, {"activation": "tanh"}
    )


def skrl(env_id: str, seconds: float, folder: Path, *, shared: bool = False, discrete: bool = False) -> Trained:
    import skrl.utils.model_instantiators.torch as make
    from skrl.agents.torch.ppo import PPO
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.resources.preprocessors.torch import RunningStandardScaler
    from skrl.trainers.torch import StepTrainer

    envs = wrap_env(gymnasium.make_vec(env_id, NUM_ENVS, "sync"), wrapper="gymnasium", verbose=False)
    spaces = {"observation_space": envs.observation_space, "action_space": envs.action_space, "device": "cpu"}
    network = [{"name": "net", "input": "OBSERVATIONS", "layers": HIDDEN, "activations": "elu"}]
    actor, critic = {"network": network, "output": "ACTIONS"}, {"network": network, "output": "ONE"}

    def make_agent() -> Any:
        if shared:
            policy = value = make.shared_model(**spaces, roles=["policy", "value"], parameters=[actor, critic])
        else:
            policy = (make.categorical_model if discrete else make.gaussian_model)(**spaces, **actor)
            value = make.deterministic_model(**spaces, **critic)
        settings = {
            "rollouts": 256,
            "mini_batches": 8,
            "learning_rate": 3e-4,
            "observation_preprocessor": RunningStandardScaler,
            "observation_preprocessor_kwargs": {"size": envs.observation_space, "device": "cpu"},
            "experiment": {"directory": str(folder), "write_interval": 0, "checkpoint_interval": 0},
        }
        memory = RandomMemory(memory_size=256, num_envs=NUM_ENVS, device="cpu")
        return PPO(models={"policy": policy, "value": value}, memory=memory, cfg=settings, **spaces)

    agent, steps = make_agent(), 0
    trainer = StepTrainer(
        env=envs, agents=agent, cfg={"timesteps": 10**9, "headless": True, "disable_progressbar": True}
    )
    clock = Clock(seconds, lambda: folder / f"agent_{steps}.pt", agent.save)
    while clock.goes_on():
        trainer.train()
        steps += 1

    def load(path: Path) -> Policy:
        loaded = make_agent()
        loaded.init()
        loaded.load(str(path))
        scaler = loaded._observation_preprocessor

        def outputs(obs: Floats) -> Any:
            _, found = loaded.act(as_tensor(obs), None, timestep=0, timesteps=1)
            return found["net_output" if discrete else "mean_actions"]

        stop_clipping = partial(setattr, scaler, "clip_threshold", math.inf)
        return Policy(outputs, lambda obs: scaler(as_tensor(obs)), scaler.clip_threshold, stop_clipping)

    models = "a shared model" if shared else "a categorical model" if discrete else "two models"
    options = {"activation": "elu"} | ({"discrete": "logits"} if discrete else {})
    return Trained(f"PPO, RunningStandardScaler, {models}", env_id, steps * NUM_ENVS, clock, load, options)


def rl_games(env_id: str, seconds: float, folder: Path, *, separate: bool = False, discrete: bool = False) -> Trained:
    from rl_games.common import env_configurations, vecenv
    from rl_games.common.algo_observer import AlgoObserver
    from rl_games.common.ivecenv import IVecEnv
    from rl_games.torch_runner import Runner

    class Envs(IVecEnv):
        def __init__(self) -> None:
            self.envs = make_envs(env_id)
            self.observation_space = self.envs.single_observation_space
            self.action_space = self.envs.single_action_space

        def get_env_info(self) -> Any:
            return env_configurations.get_env_info(self)

        def reset(self) -> Any:
            return self.envs.reset(seed=0)[0].astype(np.float32)

        def step(self, actions: Any) -> Any:
            obs, rewards, terminated, truncated, _ = self.envs.step(actions)
            return obs.astype(np.float32), rewards, terminated | truncated, {"time_outs": truncated}

    class Stop(AlgoObserver):
        def after_init(self, algo: Any) -> None:
            def path() -> Path:
                return folder / f"last_run_ep_{algo.epoch_num}.pth"

            self.algo = algo
            self.clock = Clock(seconds, path, lambda path: algo.save(path.removesuffix(".pth")))

        def after_print_stats(self, frame: int, epoch_num: int, total_time: float) -> None:
            if not self.clock.goes_on():
                self.algo.max_epochs = epoch_num

    vecenv.register("GYMNASIUM", lambda *_, **__: Envs())
    env_configurations.register(env_id, {"vecenv_type": "GYMNASIUM", "env_creator": Envs})
    kind = "discrete" if discrete else "continuous"
    default, zero = {"name": "default"}, {"name": "const_initializer", "val": 0}
    gaussian = {"mu_activation": "None", "sigma_activation": "None", "mu_init": default, "sigma_init": zero}
    space = {"discrete": None} if discrete else {"continuous": {**gaussian, "fixed_sigma": True}}
    mlp = {"units": HIDDEN, "activation": "elu", "initializer": default}
    config = {
        "name": "run", "env_name": env_id, "train_dir": str(folder), "device": "cpu", "device_name": "cpu",
        "num_actors": NUM_ENVS, "horizon_length": 256, "minibatch_size": 128, "mini_epochs": 8, "max_epochs": 10**9,
        "normalize_input": True, "normalize_advantage": True, "clip_value": True, "truncate_grads": True,
        "gamma": 0.99, "tau": 0.95, "learning_rate": 3e-4, "lr_schedule": None, "grad_norm": 1.0, "e_clip": 0.2,
        "entropy_coef": 0.0, "critic_coef": 1.0, "bounds_loss_coef": 0.0, "reward_shaper": {"scale_value": 0.1},
        "save_best_after": 10**9, "print_stats": False, "torch_compile": False,
    }  # fmt: skip
    params = {
        "seed": 1,
        "torch_threads": 1,
        "algo": {"name": f"a2c_{kind}"},
        "model": {"name": "discrete_a2c" if discrete else "continuous_a2c_logstd"},
        "network": {"name": "actor_critic", "separate": separate, "space": space, "mlp": mlp},
        "config": config,
    }
    stop = Stop()
    runner = Runner(stop)
    runner.load({"params": params})
    runner.run({"train": True})

    def load(path: Path) -> Policy:
        player = runner.create_player()
        player.restore(str(path))
        player.has_batch_dimension = True

        def outputs(obs: Floats) -> Any:
            if discrete:
                return player.model({"is_train": False, "obs": as_tensor(obs)})["logits"]
            return player.get_action(as_tensor(obs), is_deterministic=True)

        statistics = player.model.running_mean_std
        mean, scale = statistics.running_mean.float(), (statistics.running_var.float() + statistics.epsilon).sqrt()
        stop_clipping = partial(setattr, player.model, "norm_obs", lambda obs: (obs - mean) / scale)
        return Policy(outputs, lambda obs: player.model.norm_obs(as_tensor(obs)), 5.0, stop_clipping)

    what = f"PPO, normalize_input, {'separate networks' if separate else 'a shared network'}"
    return Trained(what, env_id, int(stop.algo.frame), stop.clock, load, {"activation": "elu"})


def torchrl(distribution: str, env_id: str, seconds: float, folder: Path) -> Trained:
    from tensordict import TensorDict
    from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
    from torchrl import modules
    from torchrl.collectors import Collector
    from torchrl.envs import DoubleToFloat, ExplorationType, GymEnv, TransformedEnv, set_exploration_type
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    env = TransformedEnv(GymEnv(env_id), DoubleToFloat())
    env.set_seed(0)
    obs_dim, act_dim = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
    mlp = partial(modules.MLP, obs_dim, num_cells=HIDDEN, activation_class=nn.Tanh)
    discrete, squash = distribution == "OneHotCategorical", distribution == "TanhNormal"
    keys, space = ["logits"] if discrete else ["loc", "scale"], env.action_spec.space

    def make_actor() -> Any:
        network = mlp(out_features=act_dim)
        return modules.ProbabilisticActor(
            TensorDictModule(
                network if discrete else nn.Sequential(network, AddStateIndependentNormalScale(act_dim)),
                ["observation"],
                keys,
            ),
            in_keys=keys,
            distribution_class=getattr(modules, distribution),
            distribution_kwargs={"low": space.low, "high": space.high} if squash else {},
            return_log_prob=True,
        )

    actor, critic, steps = make_actor(), modules.ValueOperator(mlp(out_features=1), ["observation"]), 0
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)
    losses = ClipPPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=False)
    optimiser = torch.optim.Adam(losses.parameters(), lr=3e-4)
    clock = Clock(seconds, lambda: folder / f"actor_{steps}.pt", lambda path: torch.save(actor.state_dict(), path))
    collector = Collector(env, actor, frames_per_batch=512, total_frames=-1)
    for batch in collector:
        for _ in range(5):
            advantage(batch)
            for rows in torch.randperm(512).split(128):
                found = losses(batch.reshape(-1)[rows])
                (found["loss_objective"] + found["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(losses.parameters(), 0.5)
                optimiser.step()
                optimiser.zero_grad()
        steps += 512
        if not clock.goes_on():
            break
    collector.shutdown()

    def load(path: Path) -> Policy:
        loaded = make_actor()
        loaded.load_state_dict(torch.load(path, weights_only=True))

        def outputs(obs: Floats) -> Any:
            with set_exploration_type(ExplorationType.DETERMINISTIC):
                found = loaded(TensorDict({"observation": as_tensor(obs)}, [len(obs)]))
            return found["logits" if discrete else "action"]

        return Policy(outputs)

    how = {"discrete": "logits"} if discrete else {"squash": squash}
    return Trained(f"PPO, {distribution}", env_id, steps, clock, load, {"activation": "tanh", **how})


def brax(seconds: float, folder: Path) -> Trained:
    """Train on Brax's inverted pendulum, whose observations and actions are those of Gymnasium's."""
    import jax
    from brax import envs
    from brax.io import model
    from brax.training.agents.ppo import train as ppo

    if not hasattr(jax, "device_put_replicated"):  # removed from JAX; Brax 0.14.2 calls it
        jax.device_put_replicated = lambda tree, devices: jax.tree.map(
            lambda leaf: jax.numpy.stack([leaf] * len(devices)), tree
        )
    newest: Any = None
    clock = Clock(seconds, lambda: folder / f"params_{newest[0]}", lambda path: model.save_params(path, newest[2]))

    class Stop(Exception):
        pass

    def after_update(*told: Any) -> None:
        nonlocal newest
        newest = told
        if told[0] and not clock.goes_on():  # not before the first update, which compiles
            raise Stop

    updates, num_steps = 10_000, 64 * 10 * 4
    with contextlib.suppress(Stop):
        ppo.train(
            envs.get_environment("inverted_pendulum", backend="generalized"),
            updates * num_steps, num_evals=updates + 1, run_evals=False, policy_params_fn=after_update,
            num_envs=64, batch_size=64, unroll_length=10, num_minibatches=4, num_updates_per_batch=4,
            episode_length=1000, learning_rate=3e-4, discounting=0.97, normalize_observations=True,
        )  # fmt: skip
    steps, make_policy, _ = newest
    low, high = action_bounds(PENDULUM)

    def load(path: Path) -> Policy:
        policy, key = jax.jit(make_policy(model.load_params(str(path)), deterministic=True)), jax.random.PRNGKey(0)
        return Policy(lambda obs: (policy(obs, key)[0] + 1) * (high - low) * 0.5 + low)  # as Brax's environment does

    what = "PPO, normalize_observations, in Brax's inverted_pendulum"
    return Trained(what, PENDULUM, int(steps), clock, load, {"activation": "silu"})


def flax(env_id: str, seconds: float, folder: Path) -> Trained:
    """Train with a policy gradient, each return relative to the mean of its batch."""
    import jax
    import optax
    from flax import linen, serialization
    from jax import numpy as jnp

    envs, updates, rng = make_envs(env_id), 0, np.random.default_rng(0)
    (act_dim,) = envs.single_action_space.shape

    class Actor(linen.Module):
        @linen.compact
        def __call__(self, obs: Any) -> Any:
            for size in HIDDEN:
                obs = jnp.tanh(linen.Dense(size)(obs))
            return linen.Dense(act_dim)(obs), self.param("log_std", linen.initializers.zeros, (act_dim,))

    actor, optimiser = Actor(), optax.adam(3e-3)
    next_obs = envs.reset(seed=0)[0].astype(np.float32)
    empty = params = actor.init(jax.random.PRNGKey(0), next_obs)
    state, apply = optimiser.init(params), jax.jit(actor.apply)

    def act(obs: Floats) -> Floats:
        mean, log_std = (np.asarray(it) for it in apply(params, obs))
        return mean + np.exp(log_std) * rng.standard_normal(mean.shape, np.float32)

    def loss(params: Any, obs: Any, actions: Any, weights: Any) -> Any:
        mean, log_std = actor.apply(params, obs)
        return (weights[..., None] * (((actions - mean) / jnp.exp(log_std)) ** 2 / 2 + log_std)).mean()

    gradient = jax.jit(jax.grad(loss))
    clock = Clock(
        seconds,
        lambda: folder / f"params_{updates}.msgpack",
        lambda path: Path(path).write_bytes(serialization.to_bytes(params)),
    )
    while clock.goes_on():
        (obs, actions, rewards, going), next_obs = rollout(envs, next_obs, act, 256)
        returns = discounted(rewards, going, 0.99)
        weights = (returns - returns.mean()) / (returns.std() + 1e-8)
        changes, state = optimiser.update(gradient(params, obs, actions, weights), state)
        params = optax.apply_updates(params, changes)
        updates += 1

    def load(path: Path) -> Policy:
        loaded = serialization.from_bytes(empty, path.read_bytes())
        return Policy(lambda obs: apply(loaded, obs)[0])

    what = "a policy gradient, parameters in msgpack"
    return Trained(what, env_id, updates * 256 * NUM_ENVS, clock, load, {"activation": "tanh"})


SB3 = "stable-baselines3"
ROWS: dict[str, tuple[str, Train]] = {  # name: the library's package, and how it trains
    "sb3-ppo": (SB3, partial(sb3, "PPO", PENDULUM, n_steps=512)),
    "sb3-ppo-normalised": (SB3, partial(sb3, "PPO", HOPPER, n_steps=512, normalise=True)),
    "sb3-sac": (SB3, partial(sb3, "SAC", PENDULUM)),
    "sb3-td3": (SB3, partial(sb3, "TD3", PENDULUM)),
    "sb3-dqn": (SB3, partial(sb3, "DQN", CARTPOLE, learning_rate=1e-3, exploration_fraction=1e-5)),
    "tqc": ("sb3-contrib", partial(sb3, "TQC", PENDULUM)),
    "rsl-rl": ("rsl-rl-lib", partial(rsl_rl, PENDULUM)),
    "cleanrl": ("torch", partial(cleanrl, PENDULUM)),
    "skrl": ("skrl", partial(skrl, CHEETAH)),
    "skrl-shared": ("skrl", partial(skrl, PENDULUM, shared=True)),
    "skrl-discrete": ("skrl", partial(skrl, CARTPOLE, discrete=True)),
    "rl-games": ("rl-games", partial(rl_games, PENDULUM, separate=True)),
    "rl-games-shared": ("rl-games", partial(rl_games, HOPPER)),
    "rl-games-discrete": ("rl-games", partial(rl_games, CARTPOLE, discrete=True)),
    "torchrl": ("torchrl", partial(torchrl, "TanhNormal", CHEETAH)),
    "torchrl-normal": ("torchrl", partial(torchrl, "IndependentNormal", PENDULUM)),
    "torchrl-discrete": ("torchrl", partial(torchrl, "OneHotCategorical", CARTPOLE)),
    "brax": ("brax", brax),
    "flax": ("flax", partial(flax, PENDULUM)),
}
