"""Checkpoint files of other libraries, read without running code, and written back as the same kind of file.

    Stable-Baselines3   .zip with a member policy.pth; its member `data` holds pickles, which are never decoded
    safetensors         key -> tensor
    torch.save          of a state_dict (CleanRL, plain), of (actor's state_dict, ...) as CleanRL's SAC and TD3 save, or
                        of a dict with one under model_state_dict, actor_state_dict (rsl_rl) or state_dict

torch files are loaded with weights_only=True and nothing else: a file that needs more is refused.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tipl.actors import Actor, find_actor

SUFFIXES = (".zip", ".cleanrl_model", ".pt", ".pth", ".safetensors")

_SECTIONS = ("actor_state_dict", "model_state_dict", "state_dict")
_POLICY = "policy.pth"


@dataclass
class CheckpointFile:
    """A checkpoint file in memory. Writing to the tensors of `state` changes what `to_bytes` returns."""

    format: Literal["sb3", "safetensors", "torch"]
    state: dict[str, Tensor]
    env_steps: int | None = None
    """SB3's num_timesteps, or rsl_rl's iteration; None where the file does not say."""
    activation: str | None = None
    """Where the file says it."""
    _content: Any = None
    """What else it takes to write the file: the zip's bytes and policy.pth, the metadata, or what torch.load gave."""

    def to_bytes(self) -> bytes:
        """Return the file with the tensors as they are now and all else as it was read."""
        if self.format == "safetensors":
            return safetensors.torch.save(self.state, self._content)
        if self.format == "torch":
            return _torch_bytes(self._content)
        archive, policy = self._content
        written = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(written, "w") as target:
            for member in source.infolist():
                target.writestr(member, _torch_bytes(policy) if member.filename == _POLICY else source.read(member))
        return written.getvalue()


def read_checkpoint_file(path: str | Path) -> CheckpointFile:
    """Return the checkpoint file at `path`; its contents decide what it is, not its name.

    Raises FileNotFoundError where there is none; RuntimeError where it is damaged, holds no state, or could be loaded
    only by running code from it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path, data)
        if path.suffix == ".zip" or _members(data) & {_POLICY}:
            return _read_sb3(data)
        return _read_torch(data)
    except _NotReadableError as error:
        raise RuntimeError(f"{path} {error}") from error
    except pickle.UnpicklingError as error:
        raise RuntimeError(
            f"{path} is damaged, or holds more than tensors and plain values and was not loaded, because loading it "
            f"could run code: {_first_line(error)}"
        ) from error
    except Exception as error:  # what zipfile, torch and safetensors raise on damaged files is no closed set
        raise RuntimeError(f"{path} is damaged: {type(error).__name__}: {_first_line(error)}") from error


def find_actor_in(path: str | Path, file: CheckpointFile, activation: str | None = None) -> Actor:
    """Return the actor in a checkpoint file; `activation` counts where the file does not say it.

    Raises ValueError, naming `path`, where there is none.
    """
    try:
        return find_actor(file.state, file.activation or activation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _NotReadableError(Exception):
    """What is wrong with a whole file, as the end of a sentence."""


def _read_safetensors(path: Path, data: bytes) -> CheckpointFile:
    state = dict(sorted(safetensors.torch.load(data).items()))  # they come in any order
    with safetensors.safe_open(path, "pt") as file:
        return CheckpointFile("safetensors", state, _content=file.metadata())


def _read_sb3(data: bytes) -> CheckpointFile:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if _POLICY not in archive.namelist():
            raise _NotReadableError(f"is no zip of Stable-Baselines3: it has no member {_POLICY}")
        damaged = archive.testzip()
        if damaged is not None:
            raise _NotReadableError(f"is damaged: its member {damaged} fails its checksum")
        policy = _load(archive.read(_POLICY))
        settings = json.loads(archive.read("data")) if "data" in archive.namelist() else {}
    steps = settings.get("num_timesteps")
    chosen = str((settings.get("policy_kwargs") or {}).get("activation_fn", ""))
    return CheckpointFile(
        "sb3",
        _state(policy),
        steps if isinstance(steps, int) else None,
        # "<class 'torch.nn.modules.activation.ReLU'>": SB3 writes a class's name beside its pickle
        chosen.rstrip("'>").rpartition(".")[2].lower() or "tanh",
        (data, policy),
    )


def _read_torch(data: bytes) -> CheckpointFile:
    content = _load(data)
    iteration = content.get("iter") if isinstance(content, Mapping) else None
    return CheckpointFile("torch", _state(content), iteration if isinstance(iteration, int) else None, None, content)


def _state(content: Any) -> dict[str, Tensor]:
    """Return the policy's state in what torch.load gave: the very tensors, under the keys of the state_dict."""
    if isinstance(content, tuple) and content and isinstance(content[0], Mapping):
        content = content[0]  # CleanRL's SAC, TD3 and DDPG: (actor, critic, ...)
    if not isinstance(content, Mapping):
        raise _NotReadableError(f"holds no state_dict but a {type(content).__name__}")
    section = next((name for name in _SECTIONS if isinstance(content.get(name), Mapping)), None)
    state = _tensors(content if section is None else content[section])
    normaliser = content.get("obs_norm_state_dict")  # rsl_rl 2 saves it beside model_state_dict
    if section == "model_state_dict" and isinstance(normaliser, Mapping):
        state |= {f"obs_norm_state_dict.{key}": value for key, value in _tensors(normaliser).items()}
    if not state:
        sections = ", ".join(_SECTIONS)
        raise _NotReadableError(f"holds no state_dict: neither tensors nor one of {sections}, but {list(content)[:8]}")
    return state


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(key): value for key, value in mapping.items() if isinstance(value, Tensor)}


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _torch_bytes(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _members(data: bytes) -> set[str]:
    """Return the names in a zip, none where `data` is not one."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return set()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return set(archive.namelist())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
