"""Damage: one file of what tipl wrote is flipped, cut, zeroed, swapped or gone; then it is loaded as a user would.

In this process, hundreds of times a second. Silent is what loads without an error or a warning and gives something
else than the undamaged file; what gives the same, as white space in JSON does, is identical. `tipl verify` is judged by
the same: where a load gives something else or fails, it must find a problem.
"""

import os
import random
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from factories import ENV_ID, TINY_PPO

from tipl.cli.printing import end_of_path_table
from tipl.collecting.collection import collect
from tipl.files.sealed import load_json
from tipl.forecasting.forecaster import Forecaster
from tipl.jumping.ledger import Ledger
from tipl.report.results import read_coordinates, read_results, read_training
from tipl.stage_seconds import StageSeconds
from tipl.storing.exporter import export_checkpoint
from tipl.storing.store import Store
from tipl.subspace.streaming_svd import StreamingSVD
from tipl.verification import verify

from .campaign import Campaign
from .children import GIB, data_bytes
from .digest import digest
from .pipeline import RUN, Pipeline
from .rows import Trial

CLEAR = (ValueError, RuntimeError, OSError, FloatingPointError)
"""What the command line turns into one line."""

Load = Callable[[Path], Any]


# ---- what is damaged, and how it is loaded


@dataclass(frozen=True)
class Subject:
    """Files of a pipeline that are damaged, and what a user gets of the output that they belong to."""

    row: str
    path: str
    """Of the output, in the pipeline's folder."""
    files: str
    """A pattern of names in it; "" where the output is a file."""
    load: Load


def _store(path: Path) -> Any:
    store = Store.open(path)
    trials = [store.trial(i) for i in range(store.num_trials)]
    columns = [(it.seed, it.weights(), it.env_steps, it.episodic_return) for it in trials]
    return store.env_id, store.policy, store.seeds, store.config, columns


def _gone_on(path: Path) -> Any:
    """Return the store of an unfinished collection when it has gone on to its end."""
    copy = path.with_name("gone_on.zarr")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    return _store(collect(copy, env_id=ENV_ID, **RUN, ppo=TINY_PPO, progress=False).path)


def _results(path: Path) -> Any:
    return read_results(path / "results.json"), end_of_path_table(path / "results.json")


def _exported(path: Path) -> Any:
    like = path.parent.parent / "checkpoints" / "policy_0.pt"
    exported = path.parent / "exported.pt"
    exported.unlink(missing_ok=True)
    export_checkpoint(path, like, exported)
    return exported.read_bytes()


def _sketch(path: Path) -> Any:
    sketch = StreamingSVD.load(path, num_threads=1)
    names = ("components_", "singular_values_", "coordinates_", "mean_", "residual_", "n_samples_seen_")
    return sketch.get_params(), [getattr(sketch, name) for name in names]


def _problems(path: Path) -> list[str]:
    """Return the problems that tipl finds, by the general check where it has one."""
    return verify(path).problems


UNFINISHED, STORE, MODEL, EVALUATION = (
    "unfinished/store.zarr",
    "collect/store.zarr",
    "train/model",
    "evaluate/evaluation",
)
SUBJECTS = (
    Subject("store: group", STORE, "zarr.json", _store),
    Subject("store: trial", STORE, "trial_*/zarr.json", _store),
    Subject("store: array", STORE, "trial_*/*/zarr.json", _store),
    Subject("store: weights", STORE, "trial_*/weights/c.*", _store),
    Subject("store: env_steps", STORE, "trial_*/env_steps/c.*", _store),
    Subject("store: returns", STORE, "trial_*/episodic_return/c.*", _store),
    Subject("resume: group", UNFINISHED, "resume/zarr.json", _gone_on),
    Subject("resume: state", UNFINISHED, "resume/trial_*/state_*", _gone_on),
    Subject("model: config", MODEL, "config.json", Forecaster.load),
    Subject("model: model", MODEL, "model.safetensors", Forecaster.load),
    Subject("model: centre", MODEL, "centre.safetensors", Forecaster.load),
    Subject("model: refiner", MODEL, "refiner.safetensors", Forecaster.load),
    Subject("model: confidence", MODEL, "confidence.safetensors", Forecaster.load),
    Subject("model: strides", MODEL, "strides.safetensors", Forecaster.load),
    Subject("model: basis", "train-shared/shared", "basis.safetensors", Forecaster.load),
    Subject("model: training", MODEL, "training.json", lambda path: read_training(path / "training.json")),
    Subject("results", EVALUATION, "results.json", _results),
    Subject(
        "coordinates",
        EVALUATION,
        "coordinates.safetensors",
        lambda path: read_coordinates(path / "coordinates.safetensors"),
    ),
    Subject("ledger", "accelerate/faster", "ledger.json", lambda path: Ledger.load(path / "ledger.json").to_dict()),
    Subject("scores", "score/scores.json", "", lambda path: load_json(path, "scores")),
    Subject("forecast", "rollout/forecast.safetensors", "", _exported),
    Subject("seconds", "run/run", "seconds.json", lambda path: StageSeconds(path / "seconds.json").read()),
    Subject("sketch", "sketch.safetensors", "", _sketch),
    Subject("report", "report/report", "*.*", lambda path: None),
)


# ---- the damage

Damaged = Callable[[bytes, random.Random], bytes]


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _flip_many(data: bytes, rng: random.Random) -> bytes:
    for _ in range(8):
        data = _flip(data, rng)
    return data


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _zero(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice((1, 8, 64, 4096))
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]


def _append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\0", b"\n", b"}", data[-64:]))


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice((1, 8, 64))
    return data[:at] + data[at : at + length] + data[at:]


def _digit(data: bytes, rng: random.Random) -> bytes:
    digits = [at for at, byte in enumerate(data) if 48 <= byte < 58]
    if not digits:
        return data
    at = rng.choice(digits)
    return data[:at] + bytes([48 + rng.randrange(10)]) + data[at + 1 :]


IN_PLACE: dict[str, Damaged] = {
    "bit flipped": _flip,
    "eight bits flipped": _flip_many,
    "cut": _cut,
    "emptied": lambda data, rng: b"",
    "zeroed": _zero,
    "appended to": _append,
    "part repeated": _repeat,
    "digit changed": _digit,
}
OTHERS = ("swapped with its like", "swapped with any other", "swapped with another run's", "missing")
WEIGHTS = {"bit flipped": 6.0, "swapped with another run's": 2.0, "swapped with its like": 2.0}
"""How often, where it is not once."""


class Damage(Campaign):
    name = "damage"
    counts: ClassVar = {"smoke": 3000, "full": 100_000}
    limit = 30.0

    def row(self, number: int) -> str:
        return self._chosen(self.rng(number))[2]

    def _chosen(self, rng: random.Random) -> tuple[Subject, bool, str]:
        """Return what is damaged, whether it is `tipl verify` that judges, and the row."""
        verifies = rng.random() < 0.3
        subjects = [it for it in SUBJECTS if verifies or it.row != "report"]  # which nothing else loads
        subject = rng.choices(subjects, [0.1 if it.load is _gone_on else 1.0 for it in subjects])[0]
        return subject, verifies, f"verify {subject.row}" if verifies else subject.row

    def attempt(self, number: int, rng: random.Random) -> Trial:
        subject, verifies, row = self._chosen(rng)
        trial = Trial(row)
        root = self._copies.folder
        target = root / subject.path
        file = rng.choice(sorted(target.glob(subject.files))) if subject.files else target
        names = (*IN_PLACE, *(OTHERS if subject.files else ("missing",)))  # a file alone, of another run, is that run's
        how = rng.choices(names, [WEIGHTS.get(name, 1.0) for name in names])[0]
        trial.story = f"{how}: {file.relative_to(root)}"
        changed = self._changed(how, file, subject, rng)
        kept = {path: path.read_bytes() for path in changed}
        if all(changed[path] == data for path, data in kept.items()):
            trial.happened = False
            return trial
        try:
            for path, data in changed.items():
                path.unlink() if data is None else path.write_bytes(data)
            self._judge(trial, subject, target, verifies)
        finally:
            for path, data in kept.items():
                path.write_bytes(data)
        return trial

    def _changed(self, how: str, file: Path, subject: Subject, rng: random.Random) -> dict[Path, bytes | None]:
        """Return what becomes of which files."""
        data = file.read_bytes()
        if how in IN_PLACE:
            return {file: IN_PLACE[how](data, rng)}
        if how == "missing":
            return {file: None}
        if how == "swapped with another run's":
            other = self.twin.folder / file.relative_to(self._copies.folder)
            return {file: other.read_bytes() if other.exists() else data}
        target = self._copies.folder / subject.path
        pattern = subject.files if how == "swapped with its like" else "**/*"
        others = [it for it in sorted(target.glob(pattern)) if it.is_file()]
        other = rng.choice(others)
        return {file: other.read_bytes(), other: data}

    def _judge(self, trial: Trial, subject: Subject, target: Path, verifies: bool) -> None:
        error, value, told = _loaded(subject, target)
        same = error is None and value == self._copies.digests[subject.row]
        if verifies:
            _judge_verify(trial, target, same=same and subject.row != "report")
        elif isinstance(error, CLEAR):
            if fault := _fault_of(str(error), target):
                trial.add("unclear", f"{fault}: {type(error).__name__}: {error}")
            else:
                trial.add("refused_clearly")
        elif error is not None:
            trial.add("crashed", f"{type(error).__name__}: {error}"[:400])
        elif same:
            trial.add("identical")
        elif told:
            trial.add("refused_clearly")
        else:
            trial.add("silent", "loads, and gives something else")

    @property
    def _copies(self) -> "_Copies":
        """Of the pipeline, for this process."""
        if getattr(self, "_mine", (0, None))[0] != os.getpid():
            self._mine = os.getpid(), _Copies(self.pipeline, self.scratch / f"damage{os.getpid()}")
        return self._mine[1]


class _Copies:
    """A copy of a pipeline's folder, and digests of what loads from it undamaged."""

    def __init__(self, pipeline: Pipeline, folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + 2 * GIB,) * 2)
        shutil.copytree(pipeline.folder, folder)
        self.folder = folder
        self.digests = {subject.row: digest(subject.load(folder / subject.path)) for subject in SUBJECTS}


def _loaded(subject: Subject, target: Path) -> tuple[Exception | None, str, list[Any]]:
    """Return what was raised, a digest of what was loaded, and the warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            return None, digest(subject.load(target)), told
        except Exception as error:
            return error, "", told


def _judge_verify(trial: Trial, target: Path, *, same: bool) -> None:
    """Count what `tipl verify` says of damage after which a load gives the `same`, or not."""
    try:
        problems = _problems(target)
    except CLEAR as error:
        problems = [str(error)]
    except Exception as error:
        trial.add("crashed", f"{type(error).__name__}: {error}"[:400])
        return
    if problems:
        trial.add("refused_clearly")
    elif same:
        trial.add("identical")
    else:
        trial.add("silent", "verifies as whole, and does not load, or gives something else")


def _fault_of(message: str, target: Path) -> str:
    if "\n" in message.strip():
        return "not one line"
    if str(target) not in message and "gone_on.zarr" not in message:
        return "no path"
    return ""
