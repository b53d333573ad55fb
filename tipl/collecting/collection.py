"""Collection: populations of PPO trials learn, and every iteration leaves a checkpoint of each trial in a store.

Row 0 of a trial is its initial policy, row k its policy after k iterations. Checkpoints are appended on a thread of
their own while the next iteration runs.

Trials that learn in lockstep (`ppo.Population`), in one process, are a shard: all of them, or as many as one worker of
a Ray cluster takes. A trial depends on its seed alone, and so does not show how it was sharded.

A collection that was cut off, at whatever moment, goes on with the same arguments, and its store comes out as if
nothing had happened, to the bit: every few seconds a population's state is saved (`resume.py`), later iterations are
run once more, and what they give is compared with the checkpoints that are there. Without a saved state (Gymnasium's
own environments have none) that means all iterations. A worker that dies on a cluster is nothing but that.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tipl.cluster import Cluster, connected
from tipl.collecting.curves import Curves
from tipl.collecting.envs import make_vec
from tipl.collecting.population import IterationStats, Population, PopulationState, PPOConfig, environment_seeds
from tipl.collecting.resume import Unfinished
from tipl.files.locations import Location, location
from tipl.files.publishing import claimed
from tipl.policy import PolicySpec
from tipl.storing.store import Store
from tipl.storing.store_writer import StoreInUse

Columns = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]  # weights, env_steps, episodic_return

Row = tuple[int, Columns, IterationStats | None]  # checkpoint, what is appended, what the iteration before it gave

MAX_TRIALS = 1_000_000  # that a collection may be asked for
WORKER_TRIALS = 16  # in the shard of a worker, at most: full speed, and little to do again for one that dies
LOCK_SECONDS = 30.0  # that a worker waits for another one to give up its trials, who may have been killed
M_MMAP_THRESHOLD = -3  # of malloc.h
SAVE_SECONDS = 5.0  # between two saved states, at least; being cut off costs that and an iteration, at most


def collect(
    output: str | Location,
    *,
    env_id: str,
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
    progress: bool = True,
) -> Store:
    """Run PPO on `num_trials` independent trials and return the store of their checkpoints, written to `output`.

    An unfinished collection at `output` goes on from where it was cut off. Its store is then the same, to the bit, as
    that of an uninterrupted one, where library versions and the processor's instruction sets are the same; a warning
    names those that are not.

    Args:
        output: a folder, or a URL that fsspec knows (s3://bucket/name). Two collections into one URL at the same time
            do not notice each other.
        total_timesteps: environment steps of each trial, rounded up to whole iterations of ppo.batch_size.
        seed: trial i's seed is `trial_seeds(seed, num_trials)[i]`.
        ppo: by default PPOConfig(), Stable-Baselines3's hyperparameters.
        shared_init: start all trials from the initial weights of trial 0.
        init_seed: start all trials from the initial weights of a trial under this seed. With `seeds[0]` of another
            store of shared_init, more runs from its start.
        num_threads: by default one a core, of a worker one; may change when an unfinished collection goes on.
        ray: collect on the Ray cluster at this address, whose workers must all reach `output`; "local": on one that is
            started here.
        trials_per_shard: trials that learn together and that one worker takes; by default all, on a cluster at most
            16. An unfinished collection goes on with what it was begun with.
        tensorboard: a folder for curves of every trial and, of a single shard, their mean, under CleanRL's tags (see
            `curves`).
        progress: show a bar on a terminal's stderr, and one line at the end.

    Raises:
        FileExistsError: `output` is a complete collection or something else, or `tensorboard` holds another's curves;
            nothing is touched.
        ValueError, TypeError: a wrong argument, one that is not that of the unfinished collection at `output`, or an
            environment that cannot be used; nothing is written.
        ConnectionError: there is no Ray cluster at `ray`; nothing is written.
        OutputInUse: another process is collecting into `output`.
        RuntimeError: an iteration or its append failed, and the text says what was kept in the store; or the
            unfinished store is damaged, open in another process, or not what these arguments give here.
        KeyboardInterrupt: on Ctrl-C, with such a text too.
    """
    output, ppo = location(output), PPOConfig() if ppo is None else ppo
    for name, value, least in (
        ("num_trials", num_trials, 1),
        ("total_timesteps", total_timesteps, 1),
        ("seed", seed, 0),
        ("init_seed", 0 if init_seed is None else init_seed, 0),
        ("trials_per_shard", 1 if trials_per_shard is None else trials_per_shard, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"collect: {name} must be an int of at least {least}, got {value!r}")
    if num_trials > MAX_TRIALS:
        raise ValueError(f"collect: num_trials must be at most {MAX_TRIALS:,}, got {num_trials:,}")
    if init_seed is not None and init_seed >= 2**32:
        raise ValueError(f"collect: init_seed must lie below 2**32, as trial seeds do, got {init_seed}")
    config = {
        "num_trials": num_trials,
        "total_timesteps": total_timesteps,
        "seed": seed,
        "shared_init": shared_init or init_seed is not None,
        **({} if init_seed is None else {"init_seed": init_seed}),
        "ppo": dataclasses.asdict(ppo),
    }
    num_iterations = math.ceil(total_timesteps / ppo.batch_size)
    with claimed(output, "collect"):
        store = _reopen(output, env_id, config) if output.exists() else None
        with contextlib.nullcontext() if ray is None else connected(ray) as cluster:
            if trials_per_shard is None:
                trials_per_shard = num_trials
                if cluster is not None:
                    trials_per_shard = min(WORKER_TRIALS, -(-num_trials // max(1, cluster.num_cpus)))
            if cluster is not None:
                cluster.check(_worker_threads(num_threads))
            policy = _policy(env_id, ppo, num_threads)
            if tensorboard is not None:
                Curves(tensorboard, range(num_trials), resumed=store is not None)
            if store is None:
                seeds = trial_seeds(seed, num_trials)
                store = Store.create(output, env_id=env_id, policy=policy, seeds=seeds, config=config)
                store.close()
            else:
                _warn_of_versions(store)
            shards = _shards(num_trials, Unfinished(store).begin(trials_per_shard))
            display = _Display(env_id, store, shards, num_iterations, ppo.batch_size, shown=progress)
            with display:
                if cluster is None:
                    for shard in shards:
                        collect_shard(output, shard, num_threads, tensorboard, display)
                else:
                    _collect_on(cluster, store, shards, num_threads, tensorboard, display)
        Unfinished(store).remove()
        store = Store.open(output)
        display.finish(store)
        return store


def collect_shard(
    path: str | Location,
    trials: range,
    num_threads: int | None = None,
    tensorboard: str | Path | None = None,
    display: "_Display | None" = None,
) -> None:
    """Collect the missing checkpoints of some trials of the unfinished collection at `path`, as `collect` says.

    The display is that of the process which collects all shards; a worker has none, and is patient with a predecessor.
    """
    _give_memory_back()
    store = _open_shard(location(path), trials, LOCK_SECONDS if display is None else 0.0)
    with store:
        config, seeds = store.config, [store.seeds[i] for i in trials]
        ppo = PPOConfig(**{**config["ppo"], "hidden_sizes": tuple(config["ppo"]["hidden_sizes"])})
        num_iterations = math.ceil(config["total_timesteps"] / ppo.batch_size)
        num_checkpoints = min(store.commits(trials))
        if num_checkpoints > num_iterations:
            return
        env_seeds = environment_seeds(seeds, ppo.num_envs)
        env = make_vec(store.env_id, len(env_seeds), seeds=env_seeds, num_threads=num_threads)
        with contextlib.closing(env):
            population = Population(
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
            _run(population, store, trials, num_iterations, display, curves)


def num_checkpoints_asked(store: Store) -> int | None:
    """Return how many checkpoints of a trial the store has when its collection is complete; None if not collected."""
    steps, ppo = store.config.get("total_timesteps"), store.config.get("ppo")
    if not isinstance(steps, int) or not isinstance(ppo, dict):  # a recorder's config may hold anything
        return None
    batch_size = ppo.get("num_steps"), ppo.get("num_envs", 1)  # older stores know of one environment alone
    if not all(isinstance(size, int) and size > 0 for size in batch_size):
        return None
    return 1 - (-steps // math.prod(batch_size))


def is_complete(store: Store) -> bool:
    """Return whether the store is no unfinished collection: there is nothing more to come."""
    asked = num_checkpoints_asked(store)
    return not Unfinished(store).exists() and (asked is None or store.num_checkpoints >= asked)


def trial_seeds(seed: int, num_trials: int) -> list[int]:
    """Return the trials' seeds, ints below 2**32.

    Trial i's is the first 32-bit word of `np.random.SeedSequence(seed, spawn_key=(i,))`: it depends on neither the
    number of trials nor the other trials, so that a trial comes out the same in any part of a larger collection.
    """
    return [int(np.random.SeedSequence(seed, spawn_key=(i,)).generate_state(1)[0]) for i in range(num_trials)]


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return dotted name -> value of a store's config, both as JSON has them."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(config)).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": x for inner, x in flat_config(value).items()}
        else:
            flat[name] = value
    return flat


def _give_memory_back() -> None:
    """Let glibc map every array of a megabyte or more, so that a freed one goes back to the system at once.

    By default it would learn from the first that are freed to keep the like in its heap: a quarter of what 256
    HalfCheetahs take. Holds for the process.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def _policy(env_id: str, ppo: PPOConfig, num_threads: int | None) -> PolicySpec:
    """Return the trials' policy. Raises what a population would for such an environment and such arguments."""
    env = make_vec(env_id, ppo.num_envs, seeds=range(ppo.num_envs), num_threads=num_threads)
    with contextlib.closing(env):
        return Population(env, ppo, [0], num_iterations=1, num_threads=num_threads).spec


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
    display: "_Display",
) -> None:
    """Collect the shards on a cluster."""
    threads = _worker_threads(num_threads)
    calls = [(str(store.path), shard, threads, tensorboard) for shard in shards]
    try:
        cluster.map(collect_shard, calls, num_cpus=threads, poll=display.poll)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"collect: interrupted; {_kept(store, shards)}") from None


def _open_shard(path: Location, trials: range, patience: float) -> Store:
    """Return the store, open for appending to `trials`; wait some seconds for another writer to give them up."""
    given_up = time.monotonic() + patience
    while True:
        try:
            return Store.open(path, writable=trials)
        except StoreInUse:
            if time.monotonic() > given_up:
                raise
        time.sleep(0.1)


def _reopen(output: Location, env_id: str, config: dict[str, Any]) -> Store:
    """Return the unfinished collection at `output`, which must be of these arguments, open for appending."""
    try:
        store = Store.open(output)
    except FileNotFoundError:
        raise FileExistsError(f"collect: {output} exists and is no store; choose another output or remove it") from None
    if is_complete(store):
        raise FileExistsError(f"collect: {output} exists and is complete; choose another output or remove it")
    ppo = dataclasses.asdict(PPOConfig()) | store.config["ppo"]  # settings that an older store lacks were the defaults
    began = {**store.config, "ppo": ppo}
    found, given = (flat_config({"env_id": id, **c}) for id, c in ((store.env_id, began), (env_id, config)))
    for name in [*given, *(found.keys() - given.keys())]:
        if found.get(name, "nothing") != given.get(name, "nothing"):
            was, now = (x.get(name, "nothing") for x in (found, given))
            raise ValueError(
                f"collect: {output} holds an unfinished collection with {name} = {was}, got {now}; "
                "give its arguments to go on with it, or choose another output"
            )
    return store


def _warn_of_versions(store: Store) -> None:
    """Warn of what could change the last bits of the rest of an unfinished collection."""
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
    """Set the population to the latest state whose checkpoint is in the store; without any, leave it at its start."""
    start = population.get_state()
    for state in Unfinished(store).states(trials).load(num_checkpoints):
        k = state.env_steps // population.config.batch_size
        with contextlib.suppress(ValueError):  # it is of another population altogether
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
    trials: range,
    num_iterations: int,
    display: "_Display | None",
    curves: Curves | None,
) -> None:
    """Append the initial checkpoints and those after each iteration, and close the store, whatever happens."""
    try:
        with _Appender(store, trials, population.config.batch_size, curves) as appender:
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
    """Say what of these trials is in the store."""
    counts = [min(store.commits(shard)) for shard in shards]
    low, high = min(counts), max(counts)
    number = f"{low}" if low == high else f"{low} to {high}"
    which = f"{len(store)} trials"
    if sum(map(len, shards)) < len(store):
        which = f"the trials {shards[0].start} to {shards[-1].stop - 1}"
    kept = f"{number} of {num_checkpoints_asked(store)} checkpoints of each of {which} are kept"
    return f"{kept} in {store.path}; the same command goes on from there"


class _Appender:
    """Appends a population's checkpoints on a thread of its own; a failure is raised by the next append, or on exit.

    Checkpoints that are there already, because they came after the last saved state, must be what they were. Behind a
    URL, where every file is a request, chunks are written when they are full.
    """

    def __init__(self, store: Store, trials: range, batch_size: int, curves: Curves | None) -> None:
        self._store, self._batch_size, self._curves = store, batch_size, curves
        self._there = [store.trial(i) for i in trials]
        self._states = Unfinished(store).states(trials)
        self._saved_at = time.monotonic()
        self._rows_at_once = 1 if isinstance(store.path, Path) else self._there[0].chunk_rows
        self._rows: list[Row] = []  # not yet handed to the thread
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tipl-append")
        self._pending: Future[None] | None = None

    def append(self, population: Population, stats: IterationStats | None) -> None:
        """Append the population's checkpoint, and what the iteration before it gave, if there was one."""
        self._finish()
        weights = population.weights()[:, None]  # (N, 1, p), a copy: the population learns on
        env_steps = np.full((len(weights), 1), population.env_steps, np.int64)
        episodic_return = np.full(len(weights), np.nan) if stats is None else stats.episodic_return
        k = population.env_steps // self._batch_size
        self._rows.append((k, (weights, env_steps, episodic_return[:, None]), stats))
        if (k + 1) % self._rows_at_once == 0:
            state = None
            # The start needs none: it follows from the seeds.
            if k and time.monotonic() - self._saved_at >= SAVE_SECONDS:
                state, self._saved_at = population.get_state(), time.monotonic()
            self._hand_over(state)

    def _hand_over(self, state: PopulationState | None) -> None:
        rows, self._rows = self._rows, []
        self._pending = self._thread.submit(self._append, rows, state)

    def _append(self, rows: list["Row"], state: PopulationState | None) -> None:
        """Append or compare the checkpoints; then save the state after the last of them, if any."""
        new = []
        for k, columns, _ in rows:
            if k < self._there[0].num_checkpoints:
                self._compare(k, columns)
            else:
                new.append(columns)
        if new:
            self._store.append(*(new[0] if len(new) == 1 else (np.concatenate(x, 1) for x in zip(*new, strict=True))))
        for k, _, stats in rows:
            if self._curves is not None and stats is not None:
                self._curves.write(k * self._batch_size, stats, self._batch_size)
        if state is not None:
            self._states.save(state, rows[-1][0] + 1)

    def _compare(self, k: int, columns: Columns) -> None:
        for i, trial in enumerate(self._there):
            weights, env_steps, episodic_return = (column[i, 0] for column in columns)
            if not (
                np.array_equal(weights, trial.weights(k, k + 1)[0])
                and env_steps == trial.env_steps[k]
                and np.array_equal(episodic_return, trial.episodic_return[k], equal_nan=True)
            ):
                raise RuntimeError(
                    f"checkpoint {k} of trial {trial.index} comes out otherwise than it is in the store, which was "
                    "made by other versions or on another kind of processor: finish it there, or choose another output"
                )

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._finish()
            if self._rows:
                self._hand_over(None)
                self._finish()
        finally:
            self._thread.shutdown()
            self._store.close()


class _Display:
    """A bar on stderr, where that is a terminal, with the rate and the mean return; and one line at the end."""

    def __init__(
        self, title: str, store: Store, shards: list[range], num_iterations: int, batch_size: int, *, shown: bool
    ) -> None:
        self._console = Console(stderr=True, quiet=not shown)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=2,
            transient=True,
            disable=not (shown and self._console.is_terminal),
        )
        self._store, self._shards, self._batch_size = store, shards, batch_size
        self._task = self._progress.add_task(title, total=num_iterations * len(shards), figures="")
        self._num_iterations = num_iterations
        self._num_steps, self._steps_there = 0, 0
        self._start = time.perf_counter()

    def begin(self, trials: range, num_checkpoints: int, num_iterations: int) -> None:
        """Say where a shard goes on, if some of its checkpoints are there: after so many iterations."""
        before = self._shards.index(trials) * self._num_iterations
        self._progress.update(self._task, completed=before + num_iterations)
        if num_checkpoints == 0:
            return
        which = "" if len(self._shards) == 1 else f" of the trials {trials.start} to {trials.stop - 1}"
        line = (
            f"{self._store.path}: {num_checkpoints} checkpoints{which} are there; goes on after iteration "
            f"{num_iterations}"
        )
        if num_iterations == 0 and num_checkpoints > 1:
            line += ", since no state was saved: what is there is computed once more and compared"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def advance(self, trials: range, episodic_return: NDArray[np.float64]) -> None:
        """Show that a shard in this process has made an iteration."""
        self._num_steps += len(trials) * self._batch_size
        known = episodic_return[~np.isnan(episodic_return)]
        mean = f"{known.mean():,.1f}" if len(known) else "-"
        self._progress.update(self._task, advance=1, figures=f"{self._rate()}, return {mean}")

    def poll(self, num_ended: int) -> None:
        """Show what shards in other processes have committed."""
        if self._progress.disable:
            return
        iterations = [max(0, count - 1) for count in self._store.commits(shard.start for shard in self._shards)]
        steps = sum(n * len(shard) for n, shard in zip(iterations, self._shards, strict=True)) * self._batch_size
        if not self._steps_there:
            self._steps_there = steps
        self._num_steps = steps - self._steps_there
        figures = f"{self._rate()}, {num_ended} of {len(self._shards)} shards"
        self._progress.update(self._task, completed=sum(iterations), figures=figures)

    def finish(self, store: Store) -> None:
        seconds = time.perf_counter() - self._start
        steps = f", {self._rate()}" if self._num_steps else ""
        line = f"{store.path}: {store.summary()}; {seconds:,.0f} s{steps}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _rate(self) -> str:
        return f"{self._num_steps / (time.perf_counter() - self._start):,.0f} env steps/s"

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
