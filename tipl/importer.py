"""Import: the user's own runs, checkpoint files of other libraries, into a store.

One folder of checkpoint files is one trial. What the files are and which tensor lies where in a row is kept in the
store's config, under "source".
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tipl.actors import Actor, differences
from tipl.checkpoint_files import SUFFIXES, find_actor_in, read_checkpoint_file
from tipl.policy import Layout
from tipl.publishing import published
from tipl.store import Store, Trial

BLOCK_BYTES = 2**26  # of weights, read before they are appended together

Rows = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]  # (b, p), (b,), (b,)


def import_checkpoints(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    env_id: str = "unknown",
    pattern: str = "*",
    activation: str | None = None,
    num_checkpoints: int | None = None,
) -> Store:
    """Return a new store at `output` with the checkpoints of other libraries' runs, a trial a folder.

    Reads Stable-Baselines3's .zip (PPO, A2C, SAC, TD3, ...), CleanRL's .cleanrl_model, rsl_rl's model_*.pt, and
    state_dicts in .safetensors, .pt and .pth; never with pickle. Which tensors are the actor's: `tipl.actors`. The
    files of a folder are taken in the order of the steps in their names: the number before "_steps", or else the last
    one; names without numbers in their own order. `env_steps` is what the file says (SB3's num_timesteps, rsl_rl's
    iteration), or else that number, or else the index. Returns are in no such file: `episodic_return` is NaN.

    Args:
        sources: folders, one a trial; or files, together one trial; or stores (of `Recorder`, `tipl import`, ...), all
            of whose trials are taken.
        env_id: the Gymnasium id, which the files do not know; `tipl evaluate` needs it. By default that of the stores.
        pattern: of the names to take in each folder, like "rl_model_*_steps.zip".
        activation: between the layers, where the files do not say it: tanh, relu or elu. By default the library's own.
        num_checkpoints: take the first so many of each trial; by default all, and all trials must hold equally many.

    Raises:
        FileExistsError: `output` exists; nothing is touched.
        FileNotFoundError: a source is not there or holds no checkpoint.
        ValueError: trials differ in layout or length, steps that are no order, weights that are not finite.
        RuntimeError: a file is damaged, or could be loaded only by running code from it.
        In every case nothing is left at `output`.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"import: output {output} exists already; choose another folder or remove it")
    runs = _runs([Path(source) for source in sources], pattern, activation)
    env_ids = {run.env_id for run in runs} - {"unknown"} if env_id == "unknown" else {env_id}
    if len(env_ids) > 1:
        raise ValueError(f"import: the stores are of several env_ids, {sorted(env_ids)}; pass one if they are the same")
    for run in runs[1:]:
        _check_equal(runs[0], run)
    lengths = [run.num_checkpoints for run in runs]
    wanted = lengths[0] if num_checkpoints is None else num_checkpoints
    for run in runs:
        if wanted < 1 or (run.num_checkpoints != wanted if num_checkpoints is None else run.num_checkpoints < wanted):
            raise ValueError(
                f"import: all trials must hold equally many checkpoints, but {runs[0].name} holds {lengths[0]} and "
                f"{run.name} {run.num_checkpoints}; num_checkpoints takes the first {min(lengths)} or fewer of each, "
                f"got {num_checkpoints}"
            )
    source = {**runs[0].source, "trials": [run.name for run in runs]}
    notes = [run.source["note"] for run in runs if "note" in run.source]
    config = {"source": source | ({"note": notes[0]} if notes else {})}
    policy = runs[0].policy
    with published(output, "import", manifest=False) as aside:
        store = Store.create(
            aside, env_id="".join(env_ids) or "unknown", policy=policy, seeds=range(len(runs)), config=config
        )
        with store:
            block = max(1, BLOCK_BYTES // (4 * policy.num_params * len(runs)))
            for start in range(0, wanted, block):
                parts = [run.read(start, min(start + block, wanted)) for run in runs]
                store.append(*(np.stack(column) for column in zip(*parts, strict=True)))
    return Store.open(output)


def source_record(actor: Actor, file_format: str) -> dict[str, Any]:
    """Return what a store's config keeps under "source", plain JSON."""
    record: dict[str, Any] = {"format": file_format, "actor": actor.to_dict()}
    if actor.kind == "cleanrl":
        record["note"] = (
            "CleanRL does not save the statistics with which it normalised observations: in the simulator these "
            "policies do not reach the returns that they had"
        )
    elif actor.kind == "rsl_rl" and actor.normaliser:
        record["note"] = "the observation normaliser of each checkpoint is folded into its first layer"
    elif actor.kind == "other":
        record["note"] = "the simulator cannot run these policies: train and rollout work, evaluate does not"
    return record


class _Run(Protocol):
    """The checkpoints of one trial, wherever they are."""

    name: str
    env_id: str
    policy: Layout
    source: dict[str, Any]
    num_checkpoints: int

    def read(self, start: int, stop: int) -> Rows: ...


class _FileRun:
    """A trial in checkpoint files."""

    env_id = "unknown"

    def __init__(self, name: str, paths: Sequence[Path], activation: str | None) -> None:
        self.name = name
        self.paths, self.steps = _in_order(name, paths)
        self.num_checkpoints = len(paths)
        self.activation = activation
        first = read_checkpoint_file(self.paths[0])
        self.actor = find_actor_in(self.paths[0], first, activation)
        self.policy = self.actor.policy
        self.source = source_record(self.actor, first.format)
        self._last = (-1, self.paths[0])

    def read(self, start: int, stop: int) -> Rows:
        weights = np.empty((stop - start, self.policy.num_params), np.float32)
        env_steps = np.empty(stop - start, np.int64)
        for i, path in enumerate(self.paths[start:stop]):
            file = read_checkpoint_file(path)
            found = find_actor_in(path, file, self.activation)
            if found != self.actor:
                difference = differences(self.policy, found.policy) or "its keys are others"
                raise ValueError(f"import: {path} does not fit {self.paths[0]}: {difference}")
            try:
                weights[i] = self.actor.flatten(file.state)
            except ValueError as error:
                raise ValueError(f"import: {path}: {error}") from error
            env_steps[i] = self.steps[start + i] if file.env_steps is None else file.env_steps
            last, before = self._last
            if env_steps[i] < last:
                raise ValueError(
                    f"import: {path} says that it is of step {env_steps[i]}, but comes after {before} of step {last}: "
                    "the names must hold the order"
                )
            self._last = (int(env_steps[i]), path)
        return weights, env_steps, np.full(stop - start, np.nan)


class _StoredRun:
    """A trial of another store."""

    def __init__(self, store: Store, trial: Trial) -> None:
        self.name = f"{store.path}, trial {trial.index}"
        self.env_id = store.env_id
        self.policy = store.policy
        self.source = {name: value for name, value in store.config.get("source", {}).items() if name != "trials"}
        self.num_checkpoints = trial.num_checkpoints
        self.trial = trial

    def read(self, start: int, stop: int) -> Rows:
        part = slice(start, stop)
        return self.trial.weights(start, stop), self.trial.env_steps[part], self.trial.episodic_return[part]


def _runs(sources: list[Path], pattern: str, activation: str | None) -> list[_Run]:
    """Return the trials that the sources hold, in their order."""
    if not sources:
        raise ValueError("import: sources must be some folders or files, got none")
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"import: there is no {source}")
    files = [source for source in sources if source.is_file()]
    if files and len(files) < len(sources):
        folder = next(source for source in sources if source.is_dir())
        raise ValueError(f"import: sources must be folders, or files, not both, got {folder} and {files[0]}")
    if files:
        return [_FileRun(f"the files from {files[0]} on", files, activation)]
    runs: list[_Run] = []
    for folder in sources:
        if (folder / "zarr.json").exists():
            store = Store.open(folder)
            runs += [_StoredRun(store, store.trial(i)) for i in range(store.num_trials)]
            continue
        paths = [path for path in sorted(folder.glob(pattern)) if path.suffix in SUFFIXES and path.is_file()]
        if not paths:
            raise FileNotFoundError(
                f"import: {folder} holds no checkpoint: no file {pattern} that ends in one of {', '.join(SUFFIXES)}"
            )
        run = _FileRun(str(folder), paths, activation)
        if run.source["format"] == "sb3" and any(folder.glob("*vecnormalize*.pkl")):
            run.source["note"] = (
                "observations were normalised by VecNormalize, whose statistics lie in pickles, which are not read: in "
                "the simulator these policies do not reach the returns that they had"
            )
        runs.append(run)
    return runs


def _check_equal(first: _Run, other: _Run) -> None:
    """Raise ValueError unless both trials may lie in one store."""
    difference = differences(first.policy, other.policy)
    if not difference and first.source.get("actor") != other.source.get("actor"):
        difference = "the kind of its checkpoints is another"
    if difference:
        raise ValueError(f"import: {other.name} does not fit {first.name}: {difference}")


def _in_order(name: str, paths: Sequence[Path]) -> tuple[list[Path], list[int]]:
    """Return the files in the order of the steps in their names, and those steps."""
    steps = {path: _steps_in_name(path) for path in paths}
    unknown = [path for path, step in steps.items() if step is None]
    if len(unknown) == len(paths):
        return sorted(paths), list(range(len(paths)))
    if unknown:
        raise ValueError(
            f"import: {name}: {unknown[0].name} has no number of steps in its name, as the others have: name the "
            "files, or choose them with a pattern"
        )
    ordered = sorted((step, path) for path, step in steps.items() if step is not None)
    for (step, path), (next_step, next_path) in itertools.pairwise(ordered):
        if step == next_step:
            raise ValueError(
                f"import: {name}: {path.name} and {next_path.name} are both of step {step}: name the files, or choose "
                "them with a pattern"
            )
    return [path for _, path in ordered], [step for step, _ in ordered]


def _steps_in_name(path: Path) -> int | None:
    """Return the number before "_steps" in a file's name, or else the last number, or None."""
    numbers = re.findall(r"(\d+)_steps", path.stem) or re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else None
