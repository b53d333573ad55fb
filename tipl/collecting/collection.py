"""Collection: populations of PPO trials learn, and every iteration adds a checkpoint of each trial to a store.

Row 0 of a trial is its initial policy, row k its policy after k iterations. Checkpoints are appended on a separate
thread while the next iteration runs.

A shard is a set of trials that learn in lockstep in one process (`population.Population`): all trials, or on a Ray
cluster as many as one worker takes. A trial depends on its seed alone, so it is the same however trials are sharded.

An interrupted collection continues when `collect` is called again with the same arguments, and its store comes out
bit for bit as if it had not been interrupted. For this, each population's state is saved every few seconds
(`resume.py`). On continuing, the iterations after the saved state run again, and those whose checkpoints are already in
the store are compared with them. Where no state could be saved, as with Gymnasium's own environments, all iterations
run again. On a cluster, the trials of a worker that dies continue in the same way.
"""

import contextlib
import ctypes
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tipl.cluster import Cluster, connected
from tipl.collecting.checkpoint_appender import CheckpointAppender
from tipl.collecting.collection_display import CollectionDisplay
from tipl.collecting.curves import Curves
from tipl.collecting.envs import make_vec
from tipl.collecting.population import Population, environment_seeds
from tipl.collecting.ppo_config import PPOConfig
from tipl.collecting.resume import Unfinished
from tipl.collecting.settings import config_of, num_checkpoints_asked, reopened
from tipl.files.locations import Location, location
from tipl.files.publishing import check_output, claimed
from tipl.policy import ParameterLayout, PolicySpec
from tipl.storing.store import Store
from tipl.storing.store_writer import StoreInUse

PopulationFactory = Callable[..., Population]

MAX_TRIALS = 1_000_000  # most trials that a collection may be asked for
WORKER_TRIALS = 16  # most trials in a cluster worker's shard: enough for full speed, and little to repeat if it dies
LOCK_SECONDS = 30.0  # how long a worker waits for the previous one, perhaps just killed, to release its trials
M_MMAP_THRESHOLD = -3  # from malloc.h
SAVE_SECONDS = 5.0  # least time between two saved states; an interruption costs at most this and one iteration


# Over 60 lines because its docstring, the reference of all arguments and errors, takes half of them.
def collect(
    output: str | Location,
    *,
    env_id: str,
    env_kwargs: Mapping[str, Any] | None = None,
    num_trials: int,
    total_timesteps: int,
    seed: int = 0,
    ppo: PPOConfig | None = None,
    shared_init: bool = False,
    init_seed: int | None = None,
    num_threads: int | None = None,
    ray: str | None = None,
    trials_per_shard: int | None = None,
    tensorboard: str | Path | None = None,
    record_critic: str | Location | None = None,
    progress: bool = True,
    population: PopulationFactory = Population,
    settings: Mapping[str, Any] | None = None,
    shown_path: Path | None = None,
) -> Store:
    """Run PPO on `num_trials` independent trials and return the store of their checkpoints, written to `output`.

    An unfinished collection at `output` continues where it was interrupted. Its store then equals, bit for bit, that of
    an uninterrupted collection, provided that library versions and the processor's instruction sets are the same; a
    warning names those that are not.

    Args:
        output: a folder, or a URL that fsspec knows (s3://bucket/name). Behind a URL nothing stops two collections from
            writing to the same place at once.
        env_kwargs: further arguments of the environment, plain JSON, such as {"ctrl_cost_weight": 0.05}; the store
            keeps them. The environment is then Gymnasium's own, which is slower.
        total_timesteps: environment steps of each trial, rounded up to whole iterations of ppo.batch_size.
        seed: trial i's seed is `trial_seeds(seed, num_trials)[i]`.
        ppo: by default PPOConfig(), Stable-Baselines3's hyperparameters.
        shared_init: start all trials from the initial weights of trial 0.
        init_seed: start all trials from the initial weights that a trial with this seed has. `seeds[0]` of a store
            collected with shared_init gives more trials with the same start.
        num_threads: by default one per core, or one per worker on a cluster; may change when a collection continues.
        ray: collect on the Ray cluster at this address, whose workers must all be able to write `output`; "local"
            starts a cluster on this machine.
        trials_per_shard: trials that learn together in one process or worker; by default all, on a cluster at most 16.
            A collection that continues keeps the number that it was begun with.
        tensorboard: a folder for curves of every trial and, where there is a single shard, of their mean, under
            CleanRL's tags (see `curves`).
        record_critic: a second store, for the paths of the critics' weights; a forecaster trained on both stores can
            forecast critics too.
        progress: show a bar on stderr, or lines where that is no terminal, and one line at the end.
        population, settings: what learns, called as `Population` is, and the settings, plain JSON, that make it
            another one; they are kept in the store's config. Not on a cluster.
        shown_path: where the store will lie once it is complete, for the lines on stderr; by default `output`.

    Raises:
        FileExistsError: `output` is a complete collection or no store at all, or `tensorboard` holds the curves of
            another collection; nothing is touched.
        ValueError, TypeError: an argument is wrong or differs from that of the unfinished collection at `output`, or
            the environment cannot be used; nothing is written.
        ConnectionError: no Ray cluster answers at `ray`; nothing is written.
        OutputInUse: another process is collecting into `output`.
        RuntimeError: an iteration or its append failed; the text says how many checkpoints the store has. Or the
            unfinished store is damaged, open in another process, or differs from what these arguments compute here.
        KeyboardInterrupt: on Ctrl-C; the text says how many checkpoints the store has.
    """
    output, ppo, env_kwargs = location(output), PPOConfig() if ppo is None else ppo, dict(env_kwargs or {})
    _check_ints(
        num_trials=(num_trials, 1),
        total_timesteps=(total_timesteps, 1),
        seed=(seed, 0),
        init_seed=(0 if init_seed is None else init_seed, 0),
        trials_per_shard=(1 if trials_per_shard is None else trials_per_shard, 1),
    )
    if num_trials > MAX_TRIALS:
        raise ValueError(f"collect: num_trials must be at most {MAX_TRIALS:,}, got {num_trials:,}")
    if init_seed is not None and init_seed >= 2**32:
        raise ValueError(f"collect: init_seed must lie below 2**32, as trial seeds do, got {init_seed}")
    config = config_of(
        num_trials=num_trials,
        total_timesteps=total_timesteps,
        seed=seed,
        ppo=ppo,
        shared_init=shared_init,
        init_seed=init_seed,
        record_critic=record_critic is not None,
        more=settings,
    )
    if ray is not None and population is not Population:
        raise ValueError("collect: population must be Population on a Ray cluster")
    critics = None if record_critic is None else location(record_critic)
    if critics is not None:
        check_output(critics, "collect", "record_critic")
    num_iterations = math.ceil(total_timesteps / ppo.batch_size)
    with claimed(output, "collect"):
        asked = {"env_id": env_id, "env_kwargs": env_kwargs, **config}
        store = reopened(output, asked) if output.exists() else None
        with contextlib.nullcontext() if ray is None else connected(ray) as cluster:
            if cluster is not None:
                cluster.check(_worker_threads(num_threads))
            policy, critic = _layouts(env_id, env_kwargs, ppo, num_threads)
            if tensorboard is not None:
                Curves(tensorboard, range(num_trials), resumed=store is not None)
            if store is None:
                seeds = trial_seeds(seed, num_trials)
                store = Store.create(
                    output, env_id=env_id, env_kwargs=env_kwargs, policy=policy, seeds=seeds, config=config
                )
                store.close()
            else:
                _warn_of_versions(store)
            if critics is not None:
                _prepare_critics(critics, store, critic)
            if trials_per_shard is None:
                trials_per_shard = _default_trials_per_shard(num_trials, cluster)
            shards = _shards(num_trials, Unfinished(store).begin(trials_per_shard))
            display = CollectionDisplay(
                env_id, store, shards, num_iterations, ppo.batch_size, path=shown_path or store.path, shown=progress
            )
            with display:
                if cluster is None:
                    for shard in shards:
                        collect_shard(
                            output, shard, num_threads, tensorboard, critics, SAVE_SECONDS, display, population
                        )
                else:
                    _collect_on(cluster, store, shards, num_threads, tensorboard, critics, display)
        Unfinished(store).remove()
        store = Store.open(output)
        display.finish(store)
        return store


def collect_shard(
    path: str | Location,
    trials: range,
    num_threads: int | None = None,
    tensorboard: str | Path | None = None,
    critics: str | Location | None = None,
    save_seconds: float = SAVE_SECONDS,
    display: CollectionDisplay | None = None,
    make_population: PopulationFactory = Population,
) -> None:
    """Collect the missing checkpoints of one shard, `trials`, of the unfinished collection at `path`.

    Raises what `collect` raises for a failed iteration or a damaged store. A cluster worker has no `display`, and waits
    `LOCK_SECONDS` for its predecessor to release the trials.
    """
    _give_memory_back()
    patience = LOCK_SECONDS if display is None else 0.0
    store = _open_shard(location(path), trials, patience)
    critic_store = None if critics is None else _open_shard(location(critics), trials, patience)
    with store, contextlib.nullcontext() if critic_store is None else critic_store:
        config, seeds = store.config, [store.seeds[i] for i in trials]
        ppo = PPOConfig.from_dict(config["ppo"])
        num_iterations = math.ceil(config["total_timesteps"] / ppo.batch_size)
        num_checkpoints = min(min(it.commits(trials)) for it in (store, critic_store) if it is not None)
        if num_checkpoints > num_iterations:
            return
        env_seeds = environment_seeds(seeds, ppo.num_envs)
        env = make_vec(
            store.env_id, len(env_seeds), seeds=env_seeds, num_threads=num_threads, env_kwargs=store.env_kwargs
        )
        with contextlib.closing(env):
            population = make_population(
                env,
                ppo,
                seeds,
                num_iterations=num_iterations,
                init_seed=config.get("init_seed", store.seeds[0]) if config["shared_init"] else None,
                num_threads=num_threads,
            )
            _restore(population, store, trials, num_checkpoints)
            if display is not None:
                display.begin(trials, num_checkpoints, population.env_steps // ppo.batch_size)
            curves = None
            if tensorboard is not None:
                curves = Curves(tensorboard, trials, mean=len(trials) == len(store), resumed=True)
            _run(population, store, critic_store, trials, num_iterations, save_seconds, display, curves)


def trial_seeds(seed: int, num_trials: int) -> list[int]:
    """Return the seeds of all trials, ints below 2**32.

    Trial i's seed is the first 32-bit word of `np.random.SeedSequence(seed, spawn_key=(i,))`. It depends neither on the
    number of trials nor on the other trials, so trial i is the same in a larger or smaller collection.
    """
    return [int(np.random.SeedSequence(seed, spawn_key=(i,)).generate_state(1)[0]) for i in range(num_trials)]


def _check_ints(**arguments: tuple[Any, int]) -> None:
    """Raise ValueError unless each argument, given with the least value allowed, is an int of at least that."""
    for name, (value, least) in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"collect: {name} must be an int of at least {least}, got {value!r}")


def _give_memory_back() -> None:
    """Make glibc allocate arrays of 1 MiB or more with mmap, so that freed ones return to the system at once.

    By default glibc raises this threshold as such arrays are freed and keeps them in its heap, which held a quarter of
    the memory of a collection with 256 HalfCheetah trials. This setting holds for the whole process.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def _layouts(
    env_id: str, env_kwargs: Mapping[str, Any] | None, ppo: PPOConfig, num_threads: int | None
) -> tuple[PolicySpec, ParameterLayout]:
    """Return the trials' policy and critic. Raises what `make_vec` and `Population` raise for these arguments."""
    env = make_vec(env_id, ppo.num_envs, seeds=range(ppo.num_envs), num_threads=num_threads, env_kwargs=env_kwargs)
    with contextlib.closing(env):
        population = Population(env, ppo, [0], num_iterations=1, num_threads=num_threads)
        return population.spec, population.critic_layout


def _prepare_critics(path: Location, store: Store, layout: ParameterLayout) -> None:
    """Make the store of critics that belongs to a collection, or check that the one there does."""
    if not path.exists():
        config = {**store.config, "part": "critic"}
        Store.create(
            path,
            env_id=store.env_id,
            env_kwargs=store.env_kwargs,
            policy=layout,
            seeds=store.seeds,
            config=config,
        ).close()
        return
    critics = Store.open(path)
    if (critics.config, critics.seeds) != ({**store.config, "part": "critic"}, store.seeds):
        raise FileExistsError(
            f"collect: record_critic: {path} exists and is not of the collection in {store.path}; choose another path"
        )


def _default_trials_per_shard(num_trials: int, cluster: Cluster | None) -> int:
    if cluster is None:
        return num_trials
    return min(WORKER_TRIALS, -(-num_trials // max(1, cluster.num_cpus)))


def _shards(num_trials: int, trials_per_shard: int) -> list[range]:
    starts = range(0, num_trials, trials_per_shard)
    return [range(start, min(start + trials_per_shard, num_trials)) for start in starts]


def _worker_threads(num_threads: int | None) -> int:
    return 1 if num_threads is None else num_threads


def _collect_on(
    cluster: Cluster,
    store: Store,
    shards: list[range],
    num_threads: int | None,
    tensorboard: str | Path | None,
    critics: Location | None,
    display: CollectionDisplay,
) -> None:
    """Collect the shards on a cluster."""
    threads = _worker_threads(num_threads)
    there = None if critics is None else str(critics)
    calls = [(str(store.path), shard, threads, tensorboard, there, SAVE_SECONDS) for shard in shards]
    try:
        cluster.map(collect_shard, calls, num_cpus=threads, poll=display.poll)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"collect: interrupted; {_kept(store, shards)}") from None


def _open_shard(path: Location, trials: range, patience: float) -> Store:
    """Return the store, open for appending to `trials`; wait up to `patience` seconds for another writer to end."""
    given_up = time.monotonic() + patience
    while True:
        try:
            return Store.open(path, writable=trials)
        except StoreInUse:
            if time.monotonic() > given_up:
                raise
        time.sleep(0.1)


def _warn_of_versions(store: Store) -> None:
    """Warn of changed versions, which may change the last bits of the checkpoints still to come."""
    try:
        changed = Unfinished(store).changed_versions()
    except RuntimeError as error:
        changed = {}
        warnings.warn(f"collect: {error}; whether versions have changed is not known", stacklevel=3)
    for name, (then, now) in changed.items():
        warnings.warn(
            f"collect: {store.path} was begun with {name} {then} and goes on with {name} {now}: the rest may differ "
            "in its last bits from an uninterrupted collection",
            stacklevel=3,
        )


def _restore(population: Population, store: Store, trials: range, num_checkpoints: int) -> None:
    """Set the population to the latest saved state whose checkpoint is in the store; if there is none, to its start."""
    start = population.get_state()
    for state in Unfinished(store).states(trials).load(num_checkpoints):
        k = state.env_steps // population.config.batch_size
        with contextlib.suppress(ValueError):  # a state with arrays of other shapes, from a different population
            population.set_state(state)
            there = [store.trial(i).weights(k, k + 1)[0] for i in trials]
            if np.array_equal(population.weights(), there):
                return
        warnings.warn(f"collect: a state saved in {store.path} is not that of its checkpoint {k}", stacklevel=3)
    if start is not None:
        population.set_state(start)


def _run(
    population: Population,
    store: Store,
    critic_store: Store | None,
    trials: range,
    num_iterations: int,
    save_seconds: float,
    display: CollectionDisplay | None,
    curves: Curves | None,
) -> None:
    """Append the initial checkpoints and those after each iteration; close the store, also on a failure."""
    try:
        with CheckpointAppender(
            store, trials, population.config.batch_size, curves, save_seconds, critic_store
        ) as appender:
            if population.env_steps == 0:
                appender.append(population, None)
            for _ in range(population.env_steps // population.config.batch_size, num_iterations):
                stats = population.iterate()
                appender.append(population, stats)
                if display is not None:
                    display.advance(trials, stats.episodic_return)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"collect: interrupted; {_kept(store, [trials])}") from None
    except Exception as error:
        kept = _kept(store, [trials])
        raise RuntimeError(f"collect: failed: {type(error).__name__}: {error}; {kept}") from error


def _kept(store: Store, shards: list[range]) -> str:
    """Return, for the end of a message, how many checkpoints of these trials are in the store."""
    counts = [min(store.commits(shard)) for shard in shards]
    low, high = min(counts), max(counts)
    number = f"{low}" if low == high else f"{low} to {high}"
    which = f"{len(store)} trials"
    if sum(map(len, shards)) < len(store):
        which = f"the trials {shards[0].start} to {shards[-1].stop - 1}"
    kept = f"{number} of {num_checkpoints_asked(store)} checkpoints of each of {which} are kept"
    return f"{kept} in {store.path}; the same command goes on from there"
