"""All that a recorded run's training needs to go on, kept in its store.

    training_state/zarr.json            group, so that tools for Zarr know the folder
    training_state/state.safetensors    the state at the newest checkpoint: arrays, and a tree of JSON (`state_tree.py`)

The file is replaced whole just before its checkpoint is appended, and has a copy of that checkpoint. So a run killed
between the two loses nothing: whoever resumes it appends the copy. The file names its store and the checkpoints before
its own, and has a checksum over everything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tipl.files.locations import exists, make_folder
from tipl.files.schema import parse
from tipl.files.sealed import Arrays, load_arrays, save_arrays
from tipl.storing.state_tree import (
    RANDOM_NUMBERS,
    decode,
    encode,
    global_random_states,
    random_state,
    set_random_state,
)
from tipl.storing.store import Store
from tipl.storing.zarr_files import write_group

FOLDER, FILE = "training_state", "state.safetensors"
FORMAT, VERSION = "tipl-training-state", 1
_CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class _Saved:
    """The JSON record in the file, beside its arrays and without the tree."""

    format: str
    version: int
    store: str
    before: str
    """Fingerprint of the store before the state's own checkpoint."""
    num_checkpoints: Annotated[int, Field(ge=1)]
    env_steps: Annotated[int, Field(ge=0)]
    episodic_return: float | None


@dataclass(frozen=True)
class TrainingState:
    """The state of a run's training at one of its checkpoints."""

    num_checkpoints: int
    """Checkpoints in the store with this one."""
    env_steps: int
    episodic_return: float
    """NaN where no episode had ended."""
    weights: NDArray[np.float32]
    """The checkpoint, (p,)."""
    entries: dict[str, Any]
    """What `Recorder.log` was given, state_dicts in place of the objects that have one."""
    random: dict[str, Any]
    """The states of the generators of random numbers that the process shares."""


Encoded = tuple[Arrays, dict[str, Any]]


def encode_state(state: Mapping[str, Any]) -> Encoded:
    """Return arrays and JSON of the entries of a state, and of the process's random numbers.

    Raises TypeError where an entry is neither a tree, nor a generator of random numbers, nor has a state_dict.
    """
    arrays: Arrays = {}
    tree = {name: encode(_content(entry), arrays, f"log: state[{name!r}]") for name, entry in state.items()}
    return arrays, {"entries": tree, "random": encode(global_random_states(), arrays, "log: random numbers")}


def _content(entry: Any) -> Any:
    if isinstance(entry, RANDOM_NUMBERS):
        return random_state(entry)
    return entry.state_dict() if hasattr(entry, "state_dict") else entry


def put_back(entry: Any, saved: Any) -> None:
    """Put what was saved back into an object with a load_state_dict or a generator of random numbers.

    Raises ValueError where the object is another one than was saved, TypeError where it is neither.
    """
    if not isinstance(entry, RANDOM_NUMBERS) and not hasattr(entry, "load_state_dict"):
        kind = type(entry).__name__
        raise TypeError(f"it must have a load_state_dict or be a generator of random numbers, got {kind}")
    try:
        if isinstance(entry, RANDOM_NUMBERS):
            set_random_state(entry, saved)
        else:
            entry.load_state_dict(saved)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # of torch, NumPy and Python
        raise ValueError(" ".join(str(error).split())) from error


def save_state(
    store: Store, encoded: Encoded, weights: NDArray[np.float32], env_steps: int, episodic_return: float | None
) -> None:
    """Replace the state in `store` by that of the checkpoint to be appended next: weights (p,)."""
    folder = store.path / FOLDER
    if not exists(folder / "zarr.json"):
        make_folder(folder)
        write_group(folder, {"store": store.digest})
    arrays, tree = encoded
    record = {
        "format": FORMAT,
        "version": VERSION,
        "store": store.digest,
        "before": store.fingerprint(),
        "num_checkpoints": store.num_checkpoints + 1,
        "env_steps": env_steps,
        "episodic_return": None if episodic_return is None or np.isnan(episodic_return) else float(episodic_return),
        "tree": tree,
    }
    save_arrays(folder / FILE, {**arrays, _CHECKPOINT: weights}, record)


def load_state(store: Store, owner: str) -> TrainingState | None:
    """Return the state in `store`, or None where it keeps none; error texts begin with `owner`.

    Raises RuntimeError where the state is damaged, of another run, or not that of the newest checkpoint or of the one
    to be appended next.
    """
    path = store.path / FOLDER / FILE
    if not path.exists():
        return None
    arrays, record = load_arrays(path, owner)
    tree = record.pop("tree", None)
    if (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise RuntimeError(f"{owner}: {path} is no state that this tipl reads")
    saved = parse(_Saved, record, path)
    try:
        weights = arrays.pop(_CHECKPOINT)
        entries = {name: decode(node, arrays) for name, node in tree["entries"].items()}
        random = decode(tree["random"], arrays)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise RuntimeError(f"{owner}: {path} is damaged: {error}") from error
    there, own = store.num_checkpoints, saved.num_checkpoints
    if saved.store != store.digest or weights.shape != (store.policy.num_params,):
        raise RuntimeError(f"{owner}: {path} is of another store, {saved.store!r:.20}")
    if there not in (own - 1, own):
        raise RuntimeError(
            f"{owner}: {path} is the state at checkpoint {own}, but the store has {there}: it was recorded on without "
            "its state, or checkpoints were lost"
        )
    if not (store.fingerprint() == saved.before if there < own else _is_last(store, weights, saved.env_steps)):
        raise RuntimeError(f"{owner}: {path} is of another run: the store's checkpoints are not those that it followed")
    returned = np.nan if saved.episodic_return is None else saved.episodic_return
    return TrainingState(own, saved.env_steps, returned, weights, entries, random)


def _is_last(store: Store, weights: NDArray[np.float32], env_steps: int) -> bool:
    trial = store.trial(0)
    n = trial.num_checkpoints
    return int(trial.env_steps[-1]) == env_steps and np.array_equal(trial.weights(n - 1, n)[0], weights)


def state_problems(store: Store) -> list[str]:
    """Return one line where the state in `store` is damaged or belongs elsewhere."""
    try:
        load_state(store, "training state")
    except RuntimeError as error:
        return [str(error)]
    return []
