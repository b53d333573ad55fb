"""The optimiser step of both networks, and the saved state from which an interrupted `train` goes on.

    .NAME.partial/.state_transformer.safetensors    the last state of each network, in the unfinished model folder
    .NAME.partial/.state_refiner.safetensors

A state is saved every few seconds, and the trained model has the same bits as without the interruption. A state holds a
hash of the settings, stores and versions that it belongs to, and a call with others does not use it.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from tipl.files.sealed import json_digest, load_arrays, save_arrays
from tipl.forecasting.transformer import arrays_of, set_arrays

SAVE_SECONDS = 5.0
"""The least time between two saved states."""


class SavedState:
    """The last saved state of one network's training. Without a folder nothing is saved and nothing found."""

    def __init__(self, folder: Path | None, part: str, settings: Mapping[str, Any]) -> None:
        self._path = None if folder is None else folder / f".state_{part}.safetensors"
        self._settings = json_digest(settings)
        self._saved_at = time.monotonic()

    @staticmethod
    def is_one(path: Path) -> bool:
        """Return whether the file is a saved state."""
        return path.name.startswith(".state_") and path.suffix == ".safetensors"

    def load(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """Return the arrays and the record that were saved with these settings, or None."""
        if self._path is None or not self._path.exists():
            return None
        try:
            arrays, record = load_arrays(self._path, "train")
        except RuntimeError as error:
            warnings.warn(f"{error}; training starts again", stacklevel=2)
            return None
        return (arrays, record["state"]) if record.get("settings") == self._settings else None

    def save_if_due(self, state: Callable[[], tuple[dict[str, NDArray[Any]], dict[str, Any]]]) -> None:
        """Save what `state` returns, if the last time was SAVE_SECONDS ago."""
        if self._path is not None and time.monotonic() - self._saved_at >= SAVE_SECONDS:
            arrays, record = state()
            save_arrays(self._path, arrays, {"settings": self._settings, "state": record})
            self._saved_at = time.monotonic()

    def remove(self) -> None:
        """Remove the state: the part is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def split_like(flat: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return views of all parameters' numbers one after the other, (P,): one of each parameter's shape."""
    like = list(parameters)
    parts = torch.split(flat, [parameter.numel() for parameter in like])
    return [part.view_as(parameter) for part, parameter in zip(parts, like, strict=True)]


def set_gradient(model: nn.Module, grad: Tensor) -> None:
    """Give each parameter its part of a gradient by all of them, (P,)."""
    for parameter, part in zip(model.parameters(), split_like(grad, model.parameters()), strict=True):
        parameter.grad = part


def take_step(
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    step_count: int,
    *,
    ema_decay: float,
) -> None:
    """Take step number `step_count`, counted from 1: `model` follows its gradients, and `average` its parameters."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    with torch.no_grad():
        decay = min(ema_decay, step_count / (step_count + 10))  # soon forget the first weights
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)


def pack(
    modules: Mapping[str, nn.Module | Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    generators: Sequence[torch.Generator],
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return arrays and a record of plain JSON that hold modules (or their state_dicts), optimiser and generators.

    torch's global generator is included.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for part, module in modules.items():
        named = arrays_of(module) if isinstance(module, nn.Module) else {k: v.numpy() for k, v in module.items()}
        arrays |= {f"{part}.{name}": array for name, array in named.items()}
    state = optimizer.state_dict()
    for index, moments in state["state"].items():
        arrays |= {f"optimizer.{index}.{name}": moment.numpy() for name, moment in moments.items()}
    arrays |= {f"generator.{i}": it.get_state().numpy() for i, it in enumerate(generators)}
    arrays["generator.global"] = torch.get_rng_state().numpy()
    return arrays, {"groups": state["param_groups"]}


def unpack(
    arrays: Mapping[str, NDArray[Any]],
    record: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    generators: Sequence[torch.Generator],
) -> None:
    """Restore the state that `pack` returned, and set the schedule to the record's `step`."""
    for part, module in modules.items():
        set_arrays(module, part_of(arrays, part))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, array in part_of(arrays, "optimizer").items():
        index, _, moment = name.partition(".")
        moments.setdefault(int(index), {})[moment] = torch.from_numpy(np.array(array))
    optimizer.load_state_dict({"state": moments, "param_groups": record["groups"]})
    for i, generator in enumerate(generators):
        generator.set_state(torch.from_numpy(arrays[f"generator.{i}"].copy()))
    torch.set_rng_state(torch.from_numpy(arrays["generator.global"].copy()))
    schedule.last_epoch, schedule._step_count = record["step"], record["step"] + 1


def part_of(arrays: Mapping[str, NDArray[Any]], part: str) -> dict[str, NDArray[Any]]:
    """Return the arrays whose names begin with `part`, without that beginning."""
    return {name.removeprefix(f"{part}."): x for name, x in arrays.items() if name.startswith(f"{part}.")}
