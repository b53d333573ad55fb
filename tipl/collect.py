"""Collection: a population of PPO trials learns, and every iteration leaves a checkpoint of each in a store.

N trials learn in lockstep (`ppo.Population`), in environments of their own. Row 0 of a trial is its initial policy, row
k its policy after k iterations. Checkpoints are appended on a thread of their own while the next iteration runs.

A collection that was cut off, at whatever moment, goes on with the same arguments, and its store comes out as if
nothing had happened, to the bit: every few seconds the population's state is saved (`resume.py`), later iterations are
run once more, and what they give is compared with the checkpoints that are there. Without a saved state (Gymnasium's
own environments have none) that means all iterations.
"""

import contextlib
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

from tipl.curves import Curves
from tipl.envs import make_vec
from tipl.ppo import IterationStats, Population, PopulationState, PPOConfig, environment_seeds
from tipl.resume import SavedStates
from tipl.store import Store

Columns = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]  # weights, env_steps, episodic_return

SAVE_SECONDS = 5.0  # between two saved states, at least; being cut off costs that and an iteration, at most


def collect(
    output: str | Path,
    *,
    env_id: str,
    num_trials: int,
    total_timesteps: int,
    seed: int = 0,
    ppo: PPOConfig | None = None,
    shared_init: bool = False,
    num_threads: int | None = None,
    tensorboard: str | Path | None = None,
    progress: bool = True,
) -> Store:
    """Run PPO on `num_trials` independent trials and return the store of their checkpoints, written to `output`.

    An unfinished collection at `output` goes on from where it was cut off. Its store is then the same, to the bit, as
    that of an uninterrupted one, where library versions and the processor's instruction sets are the same; a warning
    names those that are not.

    Args:
        total_timesteps: environment steps of each trial, rounded up to whole iterations of ppo.batch_size.
        seed: trial i's seed is `trial_seeds(seed, num_trials)[i]`.
        ppo: by default PPOConfig(), Stable-Baselines3's hyperparameters.
        shared_init: start all trials from the initial weights of trial 0.
        num_threads: by default one a core; may change when an unfinished collection goes on.
        tensorboard: a folder for curves of every trial and their mean under CleanRL's tags (see `curves`).
        progress: show a bar on a terminal's stderr, and one line at the end.

    Raises:
        FileExistsError: `output` is a complete collection or something else, or `tensorboard` holds another's curves;
            nothing is touched.
        ValueError, TypeError: a wrong argument, one that is not that of the unfinished collection at `output`, or an
            environment that cannot be used; nothing is written.
        RuntimeError: an iteration or its append failed, and the text says what was kept in the store; or the
            unfinished store is damaged, open in another process, or not what these arguments give here.
        KeyboardInterrupt: on Ctrl-C, with such a text too.
    """
    output, ppo = Path(output), PPOConfig() if ppo is None else ppo
    for name, value, least in (
        ("num_trials", num_trials, 1),
        ("total_timesteps", total_timesteps, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"collect: {name} must be an int of at least {least}, got {value!r}")
    config = {
        "num_trials": num_trials,
        "total_timesteps": total_timesteps,
        "seed": seed,
        "shared_init": shared_init,
        "ppo": dataclasses.asdict(ppo),
    }
    seeds = trial_seeds(seed, num_trials)
    num_iterations = math.ceil(total_timesteps / ppo.batch_size)
    display = _Display(env_id, num_iterations, num_trials * ppo.batch_size, shown=progress)
    store = _reopen(output, env_id, config) if output.exists() else None
    with contextlib.ExitStack() as stack:
        if store is not None:
            stack.enter_context(store)
        if store is None or store.num_checkpoints <= num_iterations:
            env_seeds = environment_seeds(seeds, ppo.num_envs)
            env = make_vec(env_id, len(env_seeds), seeds=env_seeds, num_threads=num_threads)
            stack.callback(env.close)
            population = Population(
                env, ppo, seeds, num_iterations=num_iterations, shared_init=shared_init, num_threads=num_threads
            )
            curves = None if tensorboard is None else Curves(tensorboard, num_trials, resumed=store is not None)
            if store is None:
                store = Store.create(output, env_id=env_id, policy=population.spec, seeds=seeds, config=config)
                stack.enter_context(store)
            else:
                _warn_of_versions(store)
                _restore(population, store)
                display.resume(store, population.env_steps // ppo.batch_size)
            SavedStates(output).begin()
            with display:
                _run(population, store, num_iterations, display, curves)
    SavedStates(output).remove()
    store = Store.open(output)
    display.finish(store)
    return store


def num_checkpoints_asked(store: Store) -> int | None:
    """Return how many checkpoints of a trial the store has when its collection is complete; None if not collected."""
    config = store.config
    if "total_timesteps" not in config or "ppo" not in config:
        return None
    batch_size = config["ppo"]["num_steps"] * config["ppo"].get("num_envs", 1)  # older stores know of one alone
    num_iterations: int = -(-config["total_timesteps"] // batch_size)
    return 1 + num_iterations


def is_complete(store: Store) -> bool:
    """Return whether the store is no unfinished collection: there is nothing more to come."""
    asked = num_checkpoints_asked(store)
    return not SavedStates(store.path).exist() and (asked is None or store.num_checkpoints >= asked)


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


def _reopen(output: Path, env_id: str, config: dict[str, Any]) -> Store:
    """Return the unfinished collection at `output`, which must be of these arguments, open for appending."""
    try:
        store = Store.open(output)
    except FileNotFoundError:
        raise FileExistsError(f"collect: {output} exists and is no store; choose another output or remove it") from None
    if is_complete(store):
        raise FileExistsError(f"collect: {output} exists and is complete; choose another output or remove it")
    found, given = (flat_config({"env_id": id, **c}) for id, c in ((store.env_id, store.config), (env_id, config)))
    for name in [*given, *(found.keys() - given.keys())]:
        if found.get(name, "nothing") != given.get(name, "nothing"):
            was, now = (x.get(name, "nothing") for x in (found, given))
            raise ValueError(
                f"collect: {output} holds an unfinished collection with {name} = {was}, got {now}; "
                "give its arguments to go on with it, or choose another output"
            )
    return Store.open(output, writable=True)


def _warn_of_versions(store: Store) -> None:
    """Warn of what could change the last bits of the rest of an unfinished collection."""
    try:
        changed = SavedStates(store.path).changed_versions()
    except RuntimeError as error:
        changed = {}
        warnings.warn(f"collect: {error}; whether versions have changed is not known", stacklevel=3)
    for name, (then, now) in changed.items():
        warnings.warn(
            f"collect: {store.path} was begun with {name} {then} and goes on with {name} {now}: the rest may differ "
            "in its last bits from an uninterrupted collection",
            stacklevel=3,
        )


def _restore(population: Population, store: Store) -> None:
    """Set the population to the latest state whose checkpoint is in the store; without any, leave it at its start."""
    start = population.get_state()
    for state in SavedStates(store.path).load(store.num_checkpoints):
        k = state.env_steps // population.config.batch_size
        with contextlib.suppress(ValueError):  # it is of another population altogether
            population.set_state(state)
            there = [store.trial(i).weights(k, k + 1)[0] for i in range(len(store))]
            if np.array_equal(population.weights(), there):
                return
        warnings.warn(f"collect: a state saved in {store.path} is not that of its checkpoint {k}", stacklevel=3)
    if start is not None:
        population.set_state(start)


def _run(population: Population, store: Store, num_iterations: int, display: "_Display", curves: Curves | None) -> None:
    """Append the initial checkpoints and those after each iteration, and close the store, whatever happens."""
    try:
        with _Appender(store, population.config.batch_size, curves) as appender:
            if population.env_steps == 0:
                appender.append(population, None)
            for _ in range(population.env_steps // population.config.batch_size, num_iterations):
                stats = population.iterate()
                appender.append(population, stats)
                display.advance(stats.episodic_return)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"collect: interrupted; {_kept(store, num_iterations + 1)}") from None
    except Exception as error:
        raise RuntimeError(
            f"collect: failed: {type(error).__name__}: {error}; {_kept(store, num_iterations + 1)}"
        ) from error


def _kept(store: Store, total: int) -> str:
    kept = f"{store.num_checkpoints} of {total} checkpoints of each of {store.num_trials} trials are kept"
    return f"{kept} in {store.path}; the same command goes on from there"


class _Appender:
    """Appends a population's checkpoints on a thread of its own; a failure is raised by the next append, or on exit.

    Checkpoints that are there already, because they came after the last saved state, must be what they were.
    """

    def __init__(self, store: Store, batch_size: int, curves: Curves | None) -> None:
        self._store, self._batch_size, self._curves = store, batch_size, curves
        self._there = [store.trial(i) for i in range(len(store))]
        self._states = SavedStates(store.path)
        self._saved_at = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tipl-append")
        self._pending: Future[None] | None = None

    def append(self, population: Population, stats: IterationStats | None) -> None:
        """Append the population's checkpoint, and what the iteration before it gave, if there was one."""
        self._finish()
        weights = population.weights()[:, None]  # (N, 1, p), a copy: the population learns on
        env_steps = np.full((len(weights), 1), population.env_steps, np.int64)
        episodic_return = np.full(len(weights), np.nan) if stats is None else stats.episodic_return
        columns = (weights, env_steps, episodic_return[:, None])
        state = None
        # The start needs none: it follows from the seeds.
        if population.env_steps and time.monotonic() - self._saved_at >= SAVE_SECONDS:
            state, self._saved_at = population.get_state(), time.monotonic()
        self._pending = self._thread.submit(self._append, population.env_steps, columns, stats, state)

    def _append(
        self, steps: int, columns: Columns, stats: IterationStats | None, state: PopulationState | None
    ) -> None:
        """Append or compare the checkpoint after these env steps; then save the state of that moment, if any."""
        k = steps // self._batch_size
        if k < self._there[0].num_checkpoints:
            self._compare(k, columns)
        else:
            self._store.append(*columns)
        if self._curves is not None and stats is not None:
            self._curves.write(steps, stats, self._batch_size)
        if state is not None:
            self._states.save(state, k + 1)

    def _compare(self, k: int, columns: Columns) -> None:
        for i, trial in enumerate(self._there):
            weights, env_steps, episodic_return = (column[i, 0] for column in columns)
            if not (
                np.array_equal(weights, trial.weights(k, k + 1)[0])
                and env_steps == trial.env_steps[k]
                and np.array_equal(episodic_return, trial.episodic_return[k], equal_nan=True)
            ):
                raise RuntimeError(
                    f"checkpoint {k} of trial {i} comes out otherwise than it is in the store, which was made by other "
                    "versions or on another kind of processor: finish it there, or choose another output"
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
        finally:
            self._thread.shutdown()
            self._store.close()


class _Display:
    """A bar on stderr, where that is a terminal, with the rate and the mean return; and one line at the end."""

    def __init__(self, title: str, num_iterations: int, steps_per_iteration: int, *, shown: bool) -> None:
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
        self._task = self._progress.add_task(title, total=num_iterations, figures="")
        self._steps_per_iteration, self._num_steps = steps_per_iteration, 0
        self._start = time.perf_counter()

    def resume(self, store: Store, num_iterations: int) -> None:
        """Say where an unfinished collection goes on: after so many iterations."""
        self._progress.update(self._task, completed=num_iterations)
        line = f"{store.path}: {store.num_checkpoints} checkpoints are there; goes on after iteration {num_iterations}"
        if num_iterations == 0 and store.num_checkpoints > 1:
            line += ", since no state was saved: what is there is computed once more and compared"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def advance(self, episodic_return: NDArray[np.float64]) -> None:
        self._num_steps += self._steps_per_iteration
        known = episodic_return[~np.isnan(episodic_return)]
        mean = f"{known.mean():,.1f}" if len(known) else "-"
        self._progress.update(self._task, advance=1, figures=f"{self._rate()}, return {mean}")

    def finish(self, store: Store) -> None:
        seconds = time.perf_counter() - self._start
        line = f"{store.path}: {store.summary()}; {seconds:,.0f} s, {self._rate()}"
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
