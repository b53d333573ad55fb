"""Commands that make stores, look into them, and bring weights in and out of them."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import tipl
from tipl.cli.arguments import EnvKwargsArg, FreshArg, PathArg, RayArg, StoreArg, env_kwargs_of
from tipl.cli.printing import print_verification
from tipl.collecting.ppo_config import PPOConfig
from tipl.policy import Activation


@dataclasses.dataclass(frozen=True)
class Collect:
    """Train many PPO trials at once on a MuJoCo task and store a checkpoint of each after every iteration.

    If it is interrupted, at any moment, the same command goes on from there, and the store ends up the same.

    Example: tipl collect --env-id HalfCheetah-v5 --num-trials 32 --total-timesteps 300000 --output cheetah.zarr

    Example: tipl collect --num-trials 1000 --ray 10.0.0.1:6379 --output s3://bucket/pendulum.zarr
    """

    output: StoreArg
    """Where the store goes. It must not exist yet, or hold this same collection unfinished, which then goes on."""
    env_id: str = "InvertedPendulum-v5"
    """A Gymnasium id with continuous or Discrete actions."""
    env_kwargs: EnvKwargsArg = None
    """Arguments for the environment, such as '{"ctrl_cost_weight": 0.05}'. With any, the environment is Gymnasium's
    own, which is slower."""
    num_trials: int = 48
    """PPO runs, each with its own initial weights and seeds."""
    total_timesteps: int = 100_000
    """Env steps for each trial."""
    seed: int = 0
    """The seed from which those of all trials derive."""
    shared_init: bool = False
    """Start all trials from the same weights (the paper's setting)."""
    init_seed: int | None = None
    """Start all trials from the initial weights that this trial seed gives. To get the start that another store's
    trials share, give the first seed that `tipl store info` shows for that store."""
    num_threads: int | None = None
    """Cores to use, by default all; with --ray the cores of each worker, by default one."""
    ray: RayArg = None
    """Collect on the Ray cluster at this address, all of whose workers must reach `output`; "local" starts a cluster
    on this machine."""
    trials_per_shard: int | None = None
    """Trials that train together in one process; by default all, with --ray at most 16."""
    tensorboard: PathArg | None = None
    """A folder for TensorBoard curves of every trial and their mean, under CleanRL's tags; none by default."""
    record_critic: FreshArg = None
    """A second store, for the paths of the critics' weights: train on both stores to forecast critics too."""
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def run(self) -> None:
        self.collect()
        print(f"store      {self.output}")
        if self.record_critic is not None:
            print(f"critics    {self.record_critic}")

    def collect(self) -> "tipl.Store":
        return tipl.collect(
            self.output,
            env_id=self.env_id,
            env_kwargs=env_kwargs_of("collect", self.env_kwargs),
            num_trials=self.num_trials,
            total_timesteps=self.total_timesteps,
            seed=self.seed,
            ppo=self.ppo,
            shared_init=self.shared_init,
            init_seed=self.init_seed,
            num_threads=self.num_threads,
            ray=self.ray,
            trials_per_shard=self.trials_per_shard,
            tensorboard=self.tensorboard,
            record_critic=self.record_critic,
        )


@dataclasses.dataclass(frozen=True)
class StoreVerify:
    """Check the checksums of all files of a store: prints ok, or says what is wrong with which file and exits with 1.

    Example: tipl store verify runs/cheetah/store.zarr
    """

    store: tyro.conf.Positional[StoreArg]
    """The store's folder or URL."""

    def run(self) -> None:
        print_verification(self.store, tipl.verify_store(self.store, progress=True))


@dataclasses.dataclass(frozen=True)
class StoreInfo:
    """Show what is inside a store: trials, checkpoints, layout, hyperparameters, returns, progress.

    Example: tipl store info runs/cheetah/store.zarr --plot cheetah.svg
    """

    store: tyro.conf.Positional[StoreArg]
    """The store's folder or URL."""
    plot: PathArg | None = None
    """Draw learning curves, dimensionality and detour ratios of the trials' paths into this .svg or .png file."""
    overwrite: bool = False
    """Replace the plot if it exists."""

    def run(self) -> None:
        for label, text in tipl.describe_store(tipl.Store.open(self.store)).items():
            for i, line in enumerate(text.splitlines()):
                print(f"{label if i == 0 else '':<11} {line}")
        if self.plot is not None:
            tipl.plot_store(tipl.Store.open(self.store), self.plot, overwrite=self.overwrite)
            print(f"{'plot':<11} {self.plot}")


@dataclasses.dataclass(frozen=True)
class Verify:
    """Check the checksums of anything that tipl wrote: a store, a model, an evaluation, a report, a forecast, a run.

    Prints ok, or says what is wrong with which file and exits with status 1.

    Example: tipl verify runs/cheetah
    """

    path: tyro.conf.Positional[StoreArg]
    """A folder, a file, or the URL of a store or a zoo."""

    def run(self) -> None:
        print_verification(self.path, tipl.verify(self.path, progress=True))


@dataclasses.dataclass(frozen=True)
class StoreCommands:
    """Look into a store, or check that it is whole."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Annotated[StoreVerify, tyro.conf.subcommand("verify")] | Annotated[StoreInfo, tyro.conf.subcommand("info")]
    ]

    def run(self) -> None:
        self.command.run()


@dataclasses.dataclass(frozen=True)
class Import:
    """Make a store of your own runs: checkpoints of Stable-Baselines3, CleanRL, rsl_rl, skrl, rl_games, TorchRL, Flax,
    Brax.

    It also reads any other state_dict, and the weights of TorchScript files.

    Example: tipl import logs/seed0 logs/seed1 --output store.zarr --env-id Hopper-v5 --pattern 'rl_model_*.zip'
    """

    sources: tyro.conf.Positional[tuple[PathArg, ...]]
    """Folders of checkpoint files (.zip .cleanrl_model .pt .pth .safetensors .msgpack .npz, .pkl of Brax), one folder
    for each trial; or files that together are one trial; or stores, whose trials are joined."""
    output: PathArg | None = None
    """Where the store goes; must not exist. Needed unless --dry-run."""
    dry_run: bool = False
    """Only print what would be imported: what each tensor of the first file is taken for, the order of the files, their
    env steps, the notes. If the import would be refused, the tensors of the first file are printed all the same."""
    env_id: str = "unknown"
    """The Gymnasium id, which checkpoint files do not hold and `tipl evaluate` needs."""
    env_kwargs: EnvKwargsArg = None
    """The arguments with which the environment was made, beside its id, such as '{"ctrl_cost_weight": 0.05}'. The store
    keeps them for all that runs its policies. By default those of the stores, if stores are joined."""
    pattern: str = "*"
    """Which file names to take in each folder."""
    activation: Activation | None = None
    """The policy's activation. Needed if the simulator can run the policy and the files do not say the activation."""
    actor: tuple[str, ...] | None = None
    """How the actor's keys begin, such as "policy.", where a file holds several networks; "" takes all keys but the
    critics'."""
    discrete: Literal["logits", "values"] | None = None
    """For files that do not say it: the policy chooses discrete actions, and its outputs, one for each action, are
    logits, as in PPO, or values, as in DQN."""
    squash: bool | None = None
    """For TorchRL: whether actions are the tanh of the network's output (TanhNormal), or the output itself."""
    halves: bool = False
    """For TorchRL with NormalParamExtractor and rsl_rl with HeteroscedasticGaussianDistribution: the last layer has two
    outputs for each action, and the first half are the mean action."""
    ignore: tuple[str, ...] = ()
    """Patterns of keys that are not weights of the policy, such as 'obs_rms.*', if a file holds any."""
    order: str = "step"
    """What orders the files of a folder: step, the one number in which their names differ, or if that is not clear what
    they state; stated, what they state in any case; name; mtime, the time of modification; or a regular expression that
    finds the step in each name, such as 'iter_([0-9]+)'."""
    normaliser: PathArg | None = None
    """The file with VecNormalize's statistics, which are folded into the first layer; "none" if observations were not
    normalised. By default the file beside the checkpoints, if the run's files say that it used VecNormalize."""
    num_checkpoints: int | None = None
    """Take only the first so many checkpoints of each trial. By default all are taken, and all trials must have equally
    many."""
    max_bytes: int | None = None
    """The largest size of a file, and of what a zip unpacks to. By default 1 GiB, and less for a zip that unpacks to
    many times its size."""

    def run(self) -> None:
        options = {it.name: getattr(self, it.name) for it in dataclasses.fields(self)}
        sources, output, dry_run = (options.pop(name) for name in ("sources", "output", "dry_run"))
        options["env_kwargs"] = env_kwargs_of("import", self.env_kwargs)
        if options["env_kwargs"]:
            from tipl.collecting.env_checks import check_env_kwargs

            for env_id in self._env_ids():
                check_env_kwargs(env_id, options["env_kwargs"])
        if dry_run:
            self._describe(sources, options)
            return
        if output is None:
            raise ValueError("import: --output must be given, where the store goes; or --dry-run")
        store = tipl.import_checkpoints(sources, output, **options)
        print(f"store      {self.output}: {store.summary()}")
        note = store.config["source"].get("note")
        if note:
            print(f"note       {note}")

    def _env_ids(self) -> set[str]:
        """Return the environment that was given, else those of the stores among the sources."""
        if self.env_id != "unknown":
            return {self.env_id}
        return {tipl.Store.open(it).env_id for it in self.sources if (it / "zarr.json").exists()}

    def _describe(self, sources: tuple[Path, ...], options: dict[str, Any]) -> None:
        """Print what would be imported, or, where that is refused, what there is to choose from."""
        from tipl.storing.importer import describe_first_file, describe_import

        try:
            lines = describe_import(sources, **options)
        except ValueError:
            for label, text in describe_first_file(sources, pattern=self.pattern, max_bytes=self.max_bytes):
                print(f"{label:<10} {text}")
            raise
        for label, text in lines:
            print(f"{label:<10} {text}")


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the weights of a forecast or a store as a checkpoint file that your own library loads, or as ONNX.

    Example: tipl export forecast.safetensors --like logs/seed0/rl_model_100000_steps.zip --output forecast.zip

    Example: tipl export forecast.safetensors --format onnx --output policy.onnx
    """

    weights: tyro.conf.Positional[PathArg]
    """A forecast written by `tipl rollout`, or a store."""
    output: PathArg
    """The new file; must not exist."""
    format: Literal["checkpoint", "onnx"] = "checkpoint"
    """A file like --like, or an ONNX model of the deterministic policy: observations in, actions out."""
    like: PathArg | None = None
    """A checkpoint file of the same policy. The new file is a copy of it with other weights in the actor. Needed unless
    --format onnx."""
    checkpoint: int | None = None
    """Which checkpoint to write, as its index in the path; by default the last."""
    trial: int = 0
    """Which trial to take, where the weights are a store's."""
    actor: tuple[str, ...] | None = None
    """How the actor's keys in --like begin, where that file holds several networks and the weights do not say which."""
    normaliser: PathArg | None = None
    """If VecNormalize's statistics were folded into the weights, the file of the statistics that the new file will be
    used with; by default the one beside --like. "none" leaves them folded in, for observations as they are. An ONNX
    model always holds them inside; with this file it also clips observations as VecNormalize does."""
    env_id: str | None = None
    """For ONNX, the Gymnasium id of the task, whose bounds actions are clipped to; by default the store's. "none"
    leaves actions as they are."""
    max_bytes: int | None = None
    """The largest size of --like, and of what it unpacks to, as in `tipl import`."""

    def run(self) -> None:
        others = ("like", "actor", "max_bytes") if self.format == "onnx" else ("env_id",)
        for name in others:
            if getattr(self, name) is not None:
                raise ValueError(f"export: --{name.replace('_', '-')} must not be given with --format {self.format}")
        if self.format == "onnx":
            tipl.export_onnx(
                self.weights,
                self.output,
                checkpoint=self.checkpoint,
                trial=self.trial,
                env_id=self.env_id,
                normaliser=self.normaliser,
            )
            print(f"model      {self.output}")
            return
        if self.like is None:
            raise ValueError("export: --like must be given, the file that the new one is a copy of; or --format onnx")
        tipl.export_checkpoint(
            self.weights,
            self.like,
            self.output,
            checkpoint=self.checkpoint,
            trial=self.trial,
            actor=self.actor,
            normaliser=self.normaliser,
            max_bytes=self.max_bytes,
        )
        print(f"checkpoint {self.output}")
