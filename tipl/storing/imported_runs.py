"""The runs of an import: the checkpoints of one trial each, in order, from files of other libraries or from a store."""

import collections
import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tipl.policy import Layout, Outputs, PolicySpec
from tipl.storing.checkpoint_steps import STEP, chosen_steps, in_order, is_pattern
from tipl.storing.foreign_actors import Actor, differences, roles_of, statistics_left_out
from tipl.storing.foreign_files import SUFFIXES, CheckpointFile, find_actor_in, read_checkpoint_file
from tipl.storing.import_notes import activation_missing, source_record
from tipl.storing.observation_statistics import FOLDED_NOTE, ObservationStatistics, find_statistics, read_statistics
from tipl.storing.store import UNKNOWN, UNNORMALISED, Store, Trial
from tipl.storing.tensor_checks import shown

_INSIDE = ("checkpoints", "nn")
_NO_CHECKPOINTS = ("evaluations.npz",)  # SB3's EvalCallback writes it beside best_model.zip
_PICKLE = ".pkl"
Rows = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]  # (b, p), (b,), (b,)


@dataclasses.dataclass(frozen=True)
class Reading:
    """The arguments of `import_checkpoints` that say how to read files."""

    activation: str | None
    actor: str | Sequence[str] | None
    discrete: Outputs | None
    squash: bool | None
    halves: bool
    ignore: tuple[str, ...]
    order: str
    normaliser: str | Path | None
    num_checkpoints: int | None
    max_bytes: int | None

    def __post_init__(self) -> None:
        if self.halves and self.discrete is not None:
            raise ValueError(
                f"import: halves is for continuous actions, and discrete says {self.discrete}: leave one of them out"
            )

    def read(self, path: Path, statistics: ObservationStatistics | None) -> tuple[CheckpointFile, Actor]:
        file = read_checkpoint_file(path, max_bytes=self.max_bytes)
        for pattern in self.ignore:
            if not file.leave_out(pattern):
                raise ValueError(f"import: {shown(path)}: ignore {pattern!r} matches none of its tensors")
        if statistics is not None:
            file.state |= statistics.to_state()
        found = find_actor_in(path, file, self.activation, self.actor, self.discrete, self.squash is True, self.halves)
        if contradiction := file.contradiction(self.activation):
            raise ValueError(f"import: {shown(path)}: {contradiction}")
        if self.squash is not None and found.kind != "torchrl":
            raise ValueError(
                f"import: {shown(path)}: squash is for the policies of TorchRL, whose files do not say it; this one is "
                f"of kind {found.kind}"
            )
        return file, found

    def order_of(self, paths: Sequence[Path]) -> str:
        """Return what orders the files: where nothing was said, the number that their library puts into all names."""
        if self.order != STEP:
            return self.order
        known = read_checkpoint_file(paths[0], max_bytes=self.max_bytes).step_in_name
        return known if known and all(re.search(known, path.name) for path in paths) else STEP

    def stated(self, paths: Sequence[Path]) -> list[int | None]:
        """Return the step that each file states."""
        return [read_checkpoint_file(path, max_bytes=self.max_bytes).env_steps for path in paths]

    def normalisers(self, paths: Sequence[Path], actor: Actor) -> "_Normalisers":
        """Return the statistics of a run's checkpoints (in order), of which the last says whether it was normalised."""
        if str(self.normaliser) == "none":
            return _Normalisers()
        if self.normaliser is not None:
            return _Normalisers.of(dict.fromkeys(paths, Path(self.normaliser)))
        last = read_checkpoint_file(paths[-1], max_bytes=self.max_bytes)
        if last.format != "sb3":
            return _of_a_policy_alone(paths, actor)
        try:
            found = find_statistics(paths)
        except ValueError as error:
            if last.normalised is not False and actor.kind == "sb3":
                raise ValueError(f"import: {error}") from error
            found = {}
        if actor.kind != "sb3":
            return _Normalisers(note=_NOT_FOLDED if found else "")
        if last.normalised:
            read = _Normalisers.of(found)
            if not found or not read.fit(actor):
                return _Normalisers(note=_UNFIT if found else _WITHOUT_STATISTICS, unnormalised=True)
            return read
        if not found:
            return _Normalisers(note="" if last.normalised is False else _MAYBE_NORMALISED)
        if last.normalised is None and (read := _Normalisers.of(found)).fit(actor):
            return read
        unused = next(iter(found.values())).name
        return _Normalisers(
            note=f"{shown(unused)} lies beside the checkpoints, which do not say that they used it: its statistics "
            "are not folded in; pass it as normaliser if they did"
        )


def _of_a_policy_alone(paths: Sequence[Path], actor: Actor) -> "_Normalisers":
    """Return no statistics for files that are no zips of SB3's, and so do not say whether they saw normalised
    observations. Raises ValueError where the simulator could run their policies and VecNormalize's lie beside them."""
    if actor.normaliser or not isinstance(actor.policy, PolicySpec):
        return _Normalisers()
    try:
        found = find_statistics(paths)
    except ValueError as error:
        raise ValueError(f"import: {error}, or none if they belong to no checkpoint here") from error
    if found:
        path, statistics = next(iter(found.items()))
        raise ValueError(
            f"import: {shown(statistics)} lies beside {shown(path)}, which does not say whether its policy saw "
            "observations through that VecNormalize: say with normaliser (--normaliser) the file, or none if it did not"
        )
    return _Normalisers()


_NOT_FOLDED = (
    "statistics of VecNormalize lie beside the checkpoints: they are not folded into networks of this kind, and have to"
    " stay with the weights"
)
_WITHOUT_STATISTICS = (
    "observations came through VecNormalize, whose statistics do not lie beside the checkpoints: pass their file as "
    'normaliser, or "none" if it left observations as they are (norm_obs=False); as it is, these policies cannot be run'
    " in the simulator"
)
_SQUASHED = "nothing says what becomes of the network's output: actions are taken to be its tanh, as in TD3 and SAC"
_MAYBE_NORMALISED = (
    "the files do not say whether observations came through VecNormalize, and none of its statistics lie beside them: "
    "observations are taken to be as the environment gives them"
)
_UNFIT = (
    "the statistics of VecNormalize beside the checkpoints are not of as many observations as the policy has: another "
    "wrapper comes after it, and these policies cannot be run in the simulator"
)


@dataclasses.dataclass(frozen=True)
class _Normalisers:
    """With which statistics a run's checkpoints saw their observations."""

    of_path: dict[Path, ObservationStatistics] = dataclasses.field(default_factory=dict)
    note: str = ""
    unnormalised: bool = False

    @classmethod
    def of(cls, files: dict[Path, Path]) -> "_Normalisers":
        """Return what the files of statistics hold, by the checkpoints that they belong to."""
        read = {file: read_statistics(file) for file in dict.fromkeys(files.values())}
        of_path = {path: it for path, file in files.items() if (it := read[file]) is not None}
        if not of_path:
            return cls()  # norm_obs=False
        notes = [FOLDED_NOTE.format(clip=next(iter(of_path.values())).clip)]
        uses = collections.Counter(files.values())
        for file, count in uses.items():
            if count > 1:
                whose = "all checkpoints" if len(uses) == 1 else f"{count} checkpoints without a file of their own"
                notes.append(f"the statistics in {shown(file)}, of one moment, stand for {whose}")
        return cls(of_path, "; ".join(notes))

    def fit(self, actor: Actor) -> bool:
        """Return whether the statistics are of as many observations as the actor has."""
        dims = {it.mean.size for it in self.of_path.values()}
        return not isinstance(actor.policy, PolicySpec) or dims <= {actor.policy.obs_dim}


class Run(Protocol):
    """The checkpoints of one trial, from files or from a store."""

    name: str
    env_id: str
    env_kwargs: dict[str, Any]
    policy: Layout
    source: dict[str, Any]
    num_checkpoints: int
    seed: int | None
    """The one that it was trained with, where that is known."""

    def read(self, start: int, stop: int) -> Rows: ...

    def described(self, length: int) -> str:
        """Return in words where the first `length` checkpoints are."""
        ...


class FileRun:
    """A trial in checkpoint files.

    Every file is read twice: first for its step and layout, on which the new store's settings depend, and then, once
    the store exists, for its weights. Keeping the weights from the first reading could exceed the memory.
    """

    env_id = UNKNOWN
    seed: int | None = None

    def __init__(self, name: str, paths: Sequence[Path], reading: Reading) -> None:
        self.name, self.reading = shown(name), reading
        self.env_kwargs: dict[str, Any] = {}  # the files do not say them
        order = in_order(self.name, paths, lambda: reading.stated(paths), reading.order_of(paths))
        self.num_checkpoints = len(paths)
        self.paths = order.paths[: reading.num_checkpoints]
        first, self.actor = reading.read(self.paths[0], None)
        unsaid = not first.before and first.activation_of(self.actor) is None and reading.activation is None
        if isinstance(self.actor.policy, PolicySpec) and unsaid:
            raise ValueError(f"import: {shown(self.paths[0])}: {activation_missing(self.actor.policy)}")
        if self.actor.kind == "torchrl" and reading.squash is None:
            raise ValueError(
                f"import: {shown(self.paths[0])}: squash must be given, as nothing says it: True where actions are the "
                "tanh of the network's output, rescaled to the action space (TanhNormal), else False"
            )
        self.normalisers = reading.normalisers(self.paths, self.actor)
        if self.paths[0] in self.normalisers.of_path:
            first, self.actor = reading.read(self.paths[0], self.normalisers.of_path[self.paths[0]])
        self.policy = self.actor.policy
        self.said = [first.env_steps]
        notes = dict.fromkeys((self.normalisers.note, *first.notes_of(self.actor)))
        for path in self.paths[1:]:
            file = self._read_alike(path)
            self.said.append(file.env_steps)
            notes |= dict.fromkeys(file.notes_of(self.actor))
        if order.named is not None and is_pattern(reading.order):
            self.steps, note = order.named[: len(self.paths)], ""
        else:
            self.steps, note = chosen_steps(
                self.paths,
                None if order.named is None else order.named[: len(self.paths)],
                self.said,
                reading.order,
                said_by=first.said_by,
                is_unit=first.said_by not in ("iter", "step"),
                is_marked=order.is_marked,
            )
        squashes = isinstance(self.policy, PolicySpec) and self.policy.squash and self.actor.kind != "brax"
        squashes = squashes and first.activation is None and reading.squash is None
        self.source = source_record(self.actor, first.format, *notes, note, _SQUASHED if squashes else "")
        if self.normalisers.unnormalised:
            self.source[UNNORMALISED] = True
        if left_out := statistics_left_out(first.state, self.actor, reading.actor):
            entry = shown(left_out.rpartition(".")[0] or left_out)
            self.source[UNNORMALISED] = (
                f"{shown(left_out)}, which the actor chosen leaves out, may be of statistics of observations: import "
                f"the files again with ignore (--ignore '{entry}*') if observations were not normalised"
            )

    def read(self, start: int, stop: int) -> Rows:
        weights = np.empty((stop - start, self.policy.num_params), np.float32)
        for i, path in enumerate(self.paths[start:stop]):
            file = self._read_alike(path)
            if file.env_steps != self.said[start + i]:
                raise RuntimeError(f"import: {shown(path)} changed while it was read")
            try:
                weights[i] = self.actor.flatten(file.state)
            except ValueError as error:
                raise ValueError(f"import: {shown(path)}: {error}") from error
        return weights, np.array(self.steps[start:stop], np.int64), np.full(stop - start, np.nan)

    def described(self, length: int) -> str:
        names = [shown(self.paths[i].name) for i in (0, length - 1)]
        return f", {names[0]} at env step {self.steps[0]:,} to {names[1]} at {self.steps[length - 1]:,}"

    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Return key, shape and part of each floating-point tensor of the first file, as `roles_of` does."""
        first, _ = self.reading.read(self.paths[0], self.normalisers.of_path.get(self.paths[0]))
        return [(shown(key), shape, role) for key, shape, role in roles_of(first.state, self.actor)]

    def _read_alike(self, path: Path) -> CheckpointFile:
        """Return the file, whose actor must equal that of the first one."""
        file, found = self.reading.read(path, self.normalisers.of_path.get(path))
        if found != self.actor:
            difference = differences(self.policy, found.policy) or "its keys are others"
            raise ValueError(f"import: {shown(path)} does not fit {shown(self.paths[0])}: {difference}")
        return file


class StoredRun:
    """A trial of another store."""

    def __init__(self, store: Store, trial: Trial) -> None:
        self.name = f"{shown(store.path)}, trial {trial.index}"
        self.env_id, self.env_kwargs = store.env_id, store.env_kwargs
        self.policy = store.policy
        self.source = {name: value for name, value in store.config.get("source", {}).items() if name != "trials"}
        self.num_checkpoints = trial.num_checkpoints
        self.trial = trial
        is_number = "source" in store.config and trial.seed < store.num_trials  # a recording's, or an older import's
        self.seed = None if is_number else trial.seed

    def read(self, start: int, stop: int) -> Rows:
        part = slice(start, stop)
        return self.trial.weights(start, stop), self.trial.env_steps[part], self.trial.episodic_return[part]

    def described(self, length: int) -> str:
        steps = self.trial.env_steps
        return f", env steps {int(steps[0]):,} to {int(steps[length - 1]):,}"


def runs_of(sources: list[Path], pattern: str, reading: Reading) -> list[Run]:
    """Return the trials that the sources hold, in their order."""
    if not sources:
        raise ValueError("import: sources must be some folders or files, got none")
    seen: set[tuple[int, int]] = set()
    twice = None
    for source in sources:
        try:
            found = source.stat()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"import: there is no {shown(source)}") from error
        place = found.st_dev, found.st_ino
        twice = source if twice is None and place in seen else twice
        seen.add(place)
    if twice is not None:
        raise ValueError(f"import: {shown(twice)} is given twice")
    folders = [source for source in sources if source.is_dir()]
    files = [source for source in sources if not source.is_dir()]
    if files and folders:
        raise ValueError(
            f"import: sources must be folders, or files, not both, got {shown(folders[0])} and {shown(files[0])}"
        )
    if files:
        return [FileRun(f"the files from {files[0]} on", files, reading)]
    runs: list[Run] = []
    for folder in folders:
        if (folder / "zarr.json").exists():
            if reading.normaliser is not None:
                raise ValueError(
                    f"import: normaliser is for checkpoint files, and {shown(folder)} is a store: import its files"
                )
            store = Store.open(folder)
            runs += [StoredRun(store, store.trial(i)) for i in range(store.num_trials)]
            continue
        os.scandir(folder).close()  # raises if the folder may not be read, where glob would find nothing
        paths = _checkpoints(folder, pattern)
        if not paths:
            _refuse_orbax(folder)
            raise FileNotFoundError(
                f"import: {shown(folder)} holds no checkpoint: no file {shown(pattern)} that ends in one of "
                f"{', '.join((*SUFFIXES, _PICKLE))}"
            )
        runs.append(FileRun(str(folder), paths, reading))
    return runs


def _checkpoints(folder: Path, pattern: str) -> list[Path]:
    """Return the files that the pattern and their suffixes say are a run's checkpoints: in its folder, or where skrl
    and rl_games put them in it. Pickles are meant only where there is nothing else: SB3 writes some beside its zips.
    Raises ValueError where there are some in several of these places."""
    for suffixes in (SUFFIXES, (_PICKLE,)):
        found = []
        for place in (folder, *(folder / name for name in _INSIDE)):
            # Paths that are not files, such as broken links, stay in the list, so that reading them raises an error.
            names = sorted(path for path in place.glob(pattern) if not path.name.startswith((".", *_NO_CHECKPOINTS)))
            if paths := [path for path in names if path.suffix.lower() in suffixes]:
                found.append(paths)
        if len(found) > 1:
            own, inner = ("itself" if it[0].parent == folder else f"in {it[0].parent.name}" for it in found[:2])
            raise ValueError(
                f"import: {shown(folder)} holds checkpoints {own}, like {shown(found[0][0].name)}, and {inner}: name "
                "the folder or the files that are the run"
            )
        if found:
            return found[0]
    return []


def _refuse_orbax(folder: Path) -> None:
    """Raise ValueError where the folder holds checkpoints of Orbax, which are folders in a database's format."""
    for place in ("", "*/", "*/*/"):
        if found := sorted(folder.glob(f"{place}manifest.ocdbt")):
            raise ValueError(
                f"import: {shown(found[0].parent)} is a checkpoint of Orbax, a database that is not read here: load "
                "it with its library, Brax's with params = brax.training.checkpoint.load(folder), and save that with "
                "brax.io.model.save_params(path, params), or other networks' with flax.serialization.to_bytes"
            )


def first_file(sources: Sequence[Path], pattern: str) -> Path | None:
    """Return the first checkpoint file among the sources, None where they are stores or hold none."""
    files = [file for it in sources for file in (_checkpoints(it, pattern) if it.is_dir() else [it])]
    return files[0] if files and not (sources[0] / "zarr.json").exists() else None


def seeds_of(runs: Sequence[Run], length: int) -> list[int]:
    """Return a seed for each run, by which a model knows again the runs that it was trained on, wherever they lie.

    A run of unknown seed has a number made of its first weights; several that began with the same weights have numbers
    made of their first and last ones.
    """
    seeds = [_number_of(run.read(0, 1)) if run.seed is None else run.seed for run in runs]
    count = collections.Counter(seeds)
    return [
        seed if count[seed] == 1 else _number_of(run.read(0, 1), run.read(length - 1, length))
        for run, seed in zip(runs, seeds, strict=True)
    ]


def _number_of(*rows: Rows) -> int:
    """Return a number below 2**48 that follows from the weights alone."""
    digest = hashlib.sha256(b"".join(weights.tobytes() for weights, _, _ in rows)).digest()
    return int.from_bytes(digest[:6], "big")


def common_length(runs: Sequence[Run], num_checkpoints: int | None) -> int:
    """Return how many checkpoints to take from each trial. Raises ValueError where a trial has too few, or too many."""
    lengths = [run.num_checkpoints for run in runs]
    wanted = lengths[0] if num_checkpoints is None else num_checkpoints
    for run in runs:
        if wanted < 1 or (run.num_checkpoints != wanted if num_checkpoints is None else run.num_checkpoints < wanted):
            raise ValueError(
                f"import: all trials must hold equally many checkpoints, but {runs[0].name} holds {lengths[0]} and "
                f"{run.name} {run.num_checkpoints}; num_checkpoints takes the first {min(lengths)} or fewer of each, "
                f"got {num_checkpoints}"
            )
    return wanted


def check_equal(first: Run, other: Run) -> None:
    """Raise ValueError unless both trials fit into one store."""
    difference = differences(first.policy, other.policy)
    if not difference and first.source.get("actor") != other.source.get("actor"):
        difference = "the kind of its checkpoints is another"
    if difference:
        raise ValueError(f"import: {other.name} does not fit {first.name}: {difference}")
