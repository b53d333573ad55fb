"""Parameters of Brax and MuJoCo Playground, as brax.io.model.save_params pickles them: read without running a pickle.

    (statistics, policy, value)     PPO; a list where they came from Brax's checkpoint.load
    (statistics, policy)            PPO of older releases, SAC

`statistics` is Brax's RunningStatisticsState, whose mean and std become running_statistics.mean and .std; policy and
value are Flax's parameters, which become policy.hidden_0.kernel and so on, without the outer "params" and with the
kernels of Dense layers as views (out, in), as in torch.nn.Linear. Arrays are JAX's or NumPy's. Nothing of the pickle is
run (`inert_pickle.py`), and one that uses any other name is refused. Writing puts the numbers of the arrays into the
file where they lay, and changes nothing else.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tipl.storing.actor_families import RUNNING_STATISTICS
from tipl.storing.inert_pickle import (
    NUMPY_NAMES,
    ArrayParts,
    Content,
    Made,
    Name,
    PickleError,
    parts_of,
    read_inert,
)
from tipl.storing.not_readable import NotReadableError
from tipl.storing.tensor_checks import shown

_MODULE = "brax.training.acme.running_statistics"
_STATE = Name(_MODULE, "RunningStatisticsState")
_FROZEN_DICT = Name("flax.core.frozen_dict", "FrozenDict")
_JAX_ARRAYS = (Name("jax._src.array", "_reconstruct_array"), Name("jax._src.device_array", "reconstruct_device_array"))
_BESIDE = (Name(_MODULE, "NormalizationMode"), Name("brax.training.types", "UInt64"))  # in the statistics; not read
_NAMES = frozenset({_STATE, _FROZEN_DICT, *_JAX_ARRAYS, *_BESIDE, *NUMPY_NAMES})
_MAX_ENTRIES = 2**12  # of all dicts together
_MAX_NAME = 1000
_PARTS = ("policy", "value")
_OBSERVATION = "state"  # of several observations, the one that a policy sees by default (policy_obs_key)


@dataclasses.dataclass(frozen=True)
class BraxFile:
    """A file's state, its bytes, and where in them the arrays of its networks lie."""

    state: dict[str, Tensor]
    data: bytes
    arrays: dict[str, tuple[ArrayParts, Tensor]]
    """What the pickle says of each array of the networks, and the tensor in `state`, or of which a view is there."""
    doubt: str
    """As in `StateDict`."""
    note: str
    """What a user of the weights must know about them."""


def is_brax(data: bytes) -> bool:
    """Return whether the bytes can be a pickle of Brax's parameters: all of them hold running statistics."""
    return data.startswith(b"\x80") and _MODULE.encode() in data


def read_brax(data: bytes) -> BraxFile:
    """Return what a file of Brax's holds. Raises NotReadableError where the pickle holds anything else."""
    try:
        content = read_inert(data, names=_NAMES)
        if not isinstance(content, tuple | list) or len(content) not in (2, 3):
            raise PickleError("holds no (statistics, policy, value) of Brax's, and nothing else is read from a pickle")
        statistics = _statistics(content[0])
        networks: dict[str, ArrayParts] = {}
        for part, tree in zip(_PARTS, content[1:], strict=False):
            for name, array in _arrays(tree, part):
                if name in networks:
                    raise PickleError(f"holds two arrays under one name, {name}, if its parts are joined by dots")
                networks[name] = array
        starts = [_start(it) for it in (*statistics.values(), *networks.values()) if it.content]
        if len(set(starts)) < len(starts):
            raise PickleError("holds two arrays that share their numbers, and was not loaded")
    except PickleError as error:
        raise NotReadableError(shown(error)) from error
    arrays = {name: (parts, _tensor(parts)) for name, parts in networks.items()}
    seen, doubt, note = _seen(statistics)
    state = {f"{RUNNING_STATISTICS}{name}": _tensor(it) for name, it in seen.items()}
    for name, (_, tensor) in arrays.items():
        is_kernel = name.endswith("kernel") and tensor.ndim == 2
        state[name] = tensor.T if is_kernel else tensor
    return BraxFile(state, data, arrays, doubt, note)


def brax_bytes(file: BraxFile) -> bytes:
    """Return the bytes of a file that `read_brax` returned, with its arrays as they are now."""
    written = bytearray(file.data)
    for parts, tensor in file.arrays.values():
        content = tensor.numpy().astype(parts.dtype).tobytes(parts.order)
        if content:
            written[_start(parts) : _start(parts) + len(content)] = content
    return bytes(written)


def _statistics(made: Any) -> dict[str, ArrayParts]:
    """Return mean and std of the observations, of several by name: mean.state, mean.privileged_state, std.state, ..."""
    if not isinstance(made, Made) or made.name != _STATE or not isinstance(made.state, dict):
        name = made.name if isinstance(made, Made) else type(made).__name__
        raise PickleError(f"holds {name} in the place of Brax's RunningStatisticsState")
    fields = {name: made.state.get(name) for name in ("mean", "std")}
    return {name.removeprefix("statistics."): it for name, it in _arrays(fields, "statistics")}


def _seen(statistics: dict[str, ArrayParts]) -> tuple[dict[str, ArrayParts], str, str]:
    """Return mean and std of what the policy sees, any doubt about it, and a note."""
    if set(statistics) <= {"mean", "std"}:
        return statistics, "", ""
    names = ("mean", "std")
    chosen = {name: statistics[key] for name in names if (key := f"{name}.{_OBSERVATION}") in statistics}
    if len(chosen) == len(names):
        note = f"of several observations, the policy is taken to see {_OBSERVATION}, as by default (policy_obs_key)"
        return chosen, "", note
    found = ", ".join(list(statistics)[:4])
    return (
        statistics,
        f"it has statistics of several observations, {found}, and it is not clear which the policy sees",
        "",
    )


def _arrays(tree: Any, name: str) -> Iterator[tuple[str, ArrayParts]]:
    """Yield (name, array) for each array in a tree of dicts."""
    todo, entries = [(tree, name)], 0
    while todo:
        tree, name = todo.pop()
        if isinstance(tree, Made) and tree.name == _FROZEN_DICT and isinstance(tree.arguments, tuple):
            tree = tree.arguments[0] if tree.arguments else None
        if isinstance(tree, dict):
            entries += 1 + len(tree)
            if entries > _MAX_ENTRIES:
                raise PickleError(f"holds more than {_MAX_ENTRIES:,} entries")
            if set(tree) == {"params"}:
                todo.append((tree["params"], name))
            else:
                todo += [(it, _joined(name, key)) for key, it in reversed(tree.items())]
        elif (parts := parts_of(_plain_array(tree))) is not None:
            yield name, parts
        else:
            what = tree.name if isinstance(tree, Made) else type(tree).__name__
            raise PickleError(f"holds {what} at {name}, and nothing but arrays is read there")


def _joined(name: str, key: Any) -> str:
    joined = f"{name}.{key}"
    if not isinstance(key, str) or len(joined) > _MAX_NAME:
        raise PickleError(f"has the key {key!s:.100} in {name:.100}, and no name of an array")
    return joined


def _plain_array(value: Any) -> Any:
    """Return what stands for NumPy's array where the value stands for a JAX array made of it, else the value."""
    if not (isinstance(value, Made) and value.name in _JAX_ARRAYS):
        return value
    if not isinstance(value.arguments, tuple) or len(value.arguments) != 4 or not isinstance(value.arguments[0], Name):
        raise PickleError("is damaged: a JAX array is not made of NumPy's")
    function, arguments, state, _ = value.arguments
    return Made(function, arguments, state)


def _start(parts: ArrayParts) -> int:
    """Return where in the file an array's numbers begin."""
    if not isinstance(parts.content, Content):
        raise PickleError("is a pickle of a protocol before 3, whose arrays are not read")
    return parts.content.start


def _tensor(parts: ArrayParts) -> Tensor:
    return torch.from_numpy(np.array(parts.array(), parts.dtype.newbyteorder("="), order="C"))
