"""`tipl verify`: computes all checksums of what tipl wrote, and reports every problem, not only the first."""

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tipl.collecting.resume import Unfinished
from tipl.files.hub_errors import Unreachable
from tipl.files.locations import Location, exists, location
from tipl.files.manifest import NAME as MANIFEST
from tipl.files.manifest import problems_in
from tipl.files.sealed import UncheckedWarning, load_arrays, load_json
from tipl.progress import progress_bar
from tipl.storing.run_state import state_problems
from tipl.storing.store import Store
from tipl.storing.store_records import Commit, trial_name
from tipl.storing.zoo import INDEX, load_zoo

BAR_SECONDS = 2.0  # verifications that take longer show a bar


@dataclass
class Verification:
    """The result of `verify`."""

    problems: list[str] = field(default_factory=list)
    """One line for each problem, naming the file and the rows; empty where there is none."""
    num_chunks: int = 0
    """Number of intact chunks."""
    num_bytes: int = 0
    """Size of these chunks."""
    whole: list[str] = field(default_factory=list)
    """One line for each intact store, folder or file."""

    def summary(self) -> str:
        """Return one line that lists what is intact."""
        return "; ".join(self.whole)


def verify(path: str | Location, *, progress: bool = False) -> Verification:
    """Check all that tipl wrote at `path`: a store, a zoo, a folder with a manifest, a file, or a folder of these.

    Behind a URL, a store or a zoo. Nothing is changed. Raises FileNotFoundError where `path` does not exist, ValueError
    where tipl wrote nothing there, ConnectionError where the server of a URL does not answer or refuses.
    """
    path = location(path)
    if not isinstance(path, Path) and exists(path / INDEX):
        return _verify_zoo(path, progress)
    if not isinstance(path, Path) or _is_store(path):
        return verify_store(path, progress=progress)
    found = Verification()
    if not path.exists():
        raise FileNotFoundError(f"verify: there is no {path}")
    if path.is_file():
        if path.suffix not in LOADERS:
            raise ValueError(f"verify: {path} is no file that tipl writes with a checksum")
        _verify_file(path, found)
    else:
        _verify_folder(path, found, progress)
    if not found.problems and not found.whole:
        raise ValueError(f"verify: there is nothing in {path} that tipl writes with a checksum")
    return found


LOADERS = {".json": load_json, ".safetensors": load_arrays}
"""Suffix -> reader of files that contain their own checksum."""


def _verify_folder(folder: Path, found: Verification, progress: bool) -> None:
    """Check a folder and its subfolders, except those whose name begins with a dot, which are not complete yet."""
    if (folder / MANIFEST).exists():
        problems = problems_in(folder)
        found.problems += problems
        if not problems:
            found.whole.append(f"the files of {folder}")
    if (folder / INDEX).exists():
        with _noted(found):
            found.problems += load_zoo(folder).problems()
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if _is_store(path):
            store = verify_store(path, progress=progress)
            found.problems += store.problems
            found.whole += store.whole
        elif path.is_dir() and not path.is_symlink():
            _verify_folder(path, found, progress)
        elif path.suffix in LOADERS and not (folder / MANIFEST).exists():
            _verify_file(path, found)


def _verify_zoo(folder: Location, progress: bool) -> Verification:
    """Check the index of a zoo and the stores that it names."""
    found = Verification()
    with _noted(found):
        zoo = load_zoo(folder)
        found.problems += zoo.problems()
        for path in (entry.path for entries in zoo.tasks.values() for entry in entries):
            with contextlib.suppress(FileNotFoundError):  # which is among the problems already
                store = verify_store(folder / path, progress=progress)
                found.problems += [f"{path}: {problem}" for problem in store.problems]
                found.whole += [f"{path}: {it}" for it in store.whole]
    return found


def _verify_file(path: Path, found: Verification) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncheckedWarning)
        try:
            LOADERS[path.suffix](path, "verify")
            found.whole.append(str(path))
        except (OSError, RuntimeError, UncheckedWarning) as error:
            found.problems.append(str(error))


def _is_store(path: Path) -> bool:
    return (path / "zarr.json").exists() or (path / trial_name(0)).exists()


def verify_store(path: str | Location, *, progress: bool = False) -> Verification:
    """Read the whole store at `path` and return its problems; nothing is changed.

    Every trial's documents and commit record must be intact and consistent. Every chunk with committed rows must exist,
    with the right size and checksum, and be the one that was committed in its place. The saved states of an unfinished
    collection, and the state of a recorded run's training, must be intact and belong to it; in any other store than an
    unfinished one all trials must have equally many checkpoints.
    `progress` shows a bar on stderr, or lines where that is no terminal.

    Raises FileNotFoundError where there is no store.
    """
    path, found = location(path), Verification()
    try:
        store = Store.open(path)
    except RuntimeError as error:  # without the root's document it is not known which files there should be
        return Verification([str(error)])
    commits: dict[int, Commit] = {}
    started, bar = time.monotonic(), progress_bar(progress)
    task = bar.add_task("verify", total=store.num_trials, note="")
    with contextlib.ExitStack() as stack:
        for i in range(store.num_trials):
            with _noted(found):
                commits[i] = store.trials.read_commit(i)
                _verify_trial(store, i, commits[i], found)
            bar.advance(task)
            if not bar.live.is_started and time.monotonic() - started > BAR_SECONDS:
                stack.enter_context(bar)
    if Unfinished(store).exists():
        found.problems += Unfinished(store).problems()
    else:
        found.problems += _differing(commits)
    if len(commits) == store.num_trials:
        found.problems += state_problems(store)
    if not found.problems:
        fewest = min(commit.num_checkpoints for commit in commits.values())
        checkpoints = f"{store.num_trials} trials x {fewest} checkpoints"
        found.whole.append(f"{checkpoints}, {found.num_chunks} chunks, {found.num_bytes / 1e6:.1f} MB")
    return found


def _differing(commits: dict[int, Commit]) -> list[str]:
    """Return one line for each trial of a complete store that differs from the others."""
    most = max((commit.num_checkpoints for commit in commits.values()), default=0)
    checked = any(commit.checksums is not None for commit in commits.values())
    problems = []
    for i, commit in commits.items():
        n = commit.num_checkpoints
        if n < most:
            problems.append(f"trial {i}: has {n} checkpoints, others have {most}: an append was cut off")
        if checked and commit.checksums is None:
            problems.append(f"trial {i}: has no record of its chunks, as others have: it may be of another store")
    return problems


def _verify_trial(store: Store, i: int, commit: Commit, found: Verification) -> None:
    owner = f"trial {i}"
    for array in store.trials.arrays:
        folder = store.path / trial_name(i) / array.name
        with _noted(found):
            array.check_document(folder, owner, commit.num_checkpoints)
        for chunk, in_chunk, in_trial in array.chunks(0, commit.num_checkpoints):
            with _noted(found):
                rows = array.read_chunk(folder, owner, chunk, committed=commit.of_chunk(array, chunk))
                if commit.checksums is None and array.holds_fill(rows[in_chunk]):
                    which = f"{array.name} rows {in_trial.start}:{in_trial.stop}"
                    raise RuntimeError(f"{owner}: {which} are committed but not on disk")
                found.num_chunks += 1
                found.num_bytes += rows.nbytes


@contextlib.contextmanager
def _noted(found: Verification) -> Iterator[None]:
    """Add an exception to the problems found, and continue."""
    try:
        yield
    except Unreachable:
        raise
    except (RuntimeError, OSError) as error:
        found.problems.append(str(error))
