"""Collection: a population of PPO trials learns, and every iteration leaves a checkpoint of each in a store.

N trials learn in lockstep (`ppo.Population`), one environment each. Row 0 of a trial is its initial policy, row k its
policy after k iterations. Checkpoints are appended on a thread of their own while the next iteration runs.
"""

import dataclasses
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tipl.envs import make_vec
from tipl.ppo import Population, PPOConfig
from tipl.store import Store


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
    progress: bool = True,
) -> Store:
    """Run PPO on `num_trials` independent trials and return the store of their checkpoints, written to `output`.

    Args:
        total_timesteps: environment steps of each trial, rounded up to whole iterations of ppo.num_steps.
        seed: trial i's seed is `trial_seeds(seed, num_trials)[i]`.
        ppo: by default PPOConfig(), Stable-Baselines3's hyperparameters.
        shared_init: start all trials from the initial weights of trial 0.
        num_threads: by default one a core.
        progress: show a bar on a terminal's stderr, and one line at the end.

    Raises:
        FileExistsError: `output` exists; nothing is touched.
        ValueError, TypeError: a wrong argument, or an environment that cannot be used; nothing is written.
        RuntimeError: an iteration or its append failed; the text says what was kept in the store.
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
    if output.exists():
        raise FileExistsError(f"collect: {output} exists; choose another output or remove it")
    seeds = trial_seeds(seed, num_trials)
    num_iterations = math.ceil(total_timesteps / ppo.num_steps)
    env = make_vec(env_id, num_trials, seeds=seeds, num_threads=num_threads)
    try:
        population = Population(env, ppo, seeds, shared_init=shared_init, num_threads=num_threads)
        config = {
            "num_trials": num_trials,
            "total_timesteps": total_timesteps,
            "seed": seed,
            "shared_init": shared_init,
            "ppo": dataclasses.asdict(ppo),
        }
        store = Store.create(output, env_id=env_id, policy=population.spec, seeds=seeds, config=config)
        with _Display(env_id, num_iterations, num_trials * ppo.num_steps, shown=progress) as display:
            _run(population, store, num_iterations, display)
    finally:
        env.close()
    store = Store.open(output)
    display.finish(store)
    return store


def trial_seeds(seed: int, num_trials: int) -> list[int]:
    """Return the trials' seeds, ints below 2**32.

    Trial i's is the first 32-bit word of `np.random.SeedSequence(seed, spawn_key=(i,))`: it depends on neither the
    number of trials nor the other trials, so that a trial comes out the same in any part of a larger collection.
    """
    return [int(np.random.SeedSequence(seed, spawn_key=(i,)).generate_state(1)[0]) for i in range(num_trials)]


def _run(population: Population, store: Store, num_iterations: int, display: "_Display") -> None:
    """Append the initial checkpoints and those after each iteration, and close the store, whatever happens."""
    try:
        with _Appender(store) as appender:
            appender.append(population, np.full(store.num_trials, np.nan))
            for _ in range(num_iterations):
                stats = population.iterate()
                appender.append(population, stats.episodic_return)
                display.advance(stats.episodic_return)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"collect: interrupted; {_kept(store, num_iterations + 1)}") from None
    except Exception as error:
        raise RuntimeError(
            f"collect: failed: {type(error).__name__}: {error}; {_kept(store, num_iterations + 1)}"
        ) from error


def _kept(store: Store, total: int) -> str:
    return (
        f"{store.num_checkpoints} of {total} checkpoints of each of {store.num_trials} trials are kept in {store.path}"
    )


class _Appender:
    """Appends a population's checkpoints on a thread of its own; a failure is raised by the next append, or on exit."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tipl-append")
        self._pending: Future[None] | None = None

    def append(self, population: Population, episodic_return: NDArray[np.float64]) -> None:
        self._finish()
        weights = population.weights()[:, None]  # (N, 1, p), a copy: the population learns on
        env_steps = np.full((len(weights), 1), population.env_steps, np.int64)
        self._pending = self._thread.submit(self._store.append, weights, env_steps, episodic_return[:, None])

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
