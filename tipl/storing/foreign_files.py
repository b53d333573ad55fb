"""Checkpoint files of other libraries, read without running code, and written back as the same kind of file.

    Stable-Baselines3   .zip with a member policy.pth; its member `data` holds pickles, none of which is run
    safetensors         key -> tensor
    Flax's msgpack, .npz    parameters by name (`array_files.py`)
    Brax's save_params  a pickle, which is not run (`brax_files.py`)
    torch.save          a state_dict, or what `state_dicts.py` finds one in: files of CleanRL, rsl_rl, rl_games, skrl
    torch.jit.save      TorchScript: the tensors of its modules, without its code (`torchscript_files.py`)

torch files are loaded with weights_only=True; a file that needs more is refused. A file is read whole into memory, and
refused if it changes meanwhile. The sizes and objects that it declares are limited before any are made
(`torch_files.py`).
"""

import base64
import fnmatch
import io
import json
import math
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl.files.locations import read_file
from tipl.files.sealed import sorted_metadata
from tipl.policy import Outputs
from tipl.storing.actor_families import Settings
from tipl.storing.array_files import flax_bytes, is_flax, npz_bytes, read_flax, read_npz
from tipl.storing.brax_files import brax_bytes, is_brax, read_brax
from tipl.storing.foreign_actors import Actor, find_actor, how_to_choose
from tipl.storing.inert_pickle import PickleError, array_of, read_inert
from tipl.storing.not_readable import NotReadableError
from tipl.storing.state_dicts import find_state, is_clear, step_of
from tipl.storing.tensor_checks import shown
from tipl.storing.torch_files import MAX_BYTES, check_directory, load_torch, open_zip
from tipl.storing.torchscript_actors import activation_said, find_scripted_actor, notes_of
from tipl.storing.torchscript_files import TorchScript, is_torchscript, read_torchscript

SUFFIXES = (".zip", ".cleanrl_model", ".pt", ".pth", ".safetensors", ".msgpack", ".npz")

_POLICY = "policy.pth"
_SBX = (
    "is a zip of SBX, or of Stable-Baselines3 without a policy.pth: its policy is a pickle, which was not loaded, "
    "because loading it could run code: save model.policy.actor_state.params with flax.serialization.to_bytes"
)
OWN_CLASS = "the policy is of a class of its own, from {module}: what that does beside the layers is not known"
_JSON_BYTES = 2**25  # most bytes of a safetensors header or SB3's settings; parsed, these take up to 25 times as much
SB3_LIBRARIES = ("stable_baselines3.", "sb3_contrib.")
_CLIP_MEAN = 2.0  # SB3's default
_PICKLED = {":type:", ":serialized:"}
_DISCRETE = ".spaces.discrete.Discrete'>"  # of gymnasium, or of gym in older files


@dataclass
class CheckpointFile:
    """A checkpoint file in memory. Writing to the tensors of `state` changes what `to_bytes` returns."""

    format: Literal["sb3", "safetensors", "torch", "flax", "npz", "brax", "torchscript"]
    state: dict[str, Tensor]
    env_steps: int | None = None
    """SB3's num_timesteps, rl_games' frame, rsl_rl's iteration or Flax's step; None where the file does not say."""
    activation: str | None = None
    """None where the file does not say."""
    is_default: bool = False
    """Whether SB3 says the activation by saying none, which leaves its default."""
    squash: bool = False
    """Whether SB3 says that a policy with gSDE takes the tanh of its mean; those of SAC and TD3 always do."""
    mean_limit: float | None = None
    """To what SB3 says that SAC with gSDE clips its mean, where it clips it."""
    discrete: bool = False
    """Whether SB3 says that the action space is Discrete; or the file is CleanRL's, whose only MLP without standard
    deviations under the name `actor` is that of its PPO for discrete actions."""
    doubt: str = ""
    """Why it is not clear which part of the file is the policy's state; `state` then holds all parts, as part.key."""
    own_class: str = ""
    """The module of an SB3 policy's class if that is not one of SB3's; its default activation is then unknown."""
    normalised: bool | None = False
    """Whether SB3 says that the policy's observations came through VecNormalize; None where it may be either."""
    said_by: str = "num_timesteps"
    """The entry that says `env_steps`: "num_timesteps", "iter", "frame" or "step"."""
    step_in_name: str = ""
    """A regular expression whose group is the step in the names that the library gives its files."""
    note: str = ""
    """What a user of the weights must know about them."""
    before: str = ""
    """What SB3 says to lie between the observations and the layers that the simulator does not run; "" for nothing."""
    script: TorchScript | None = None
    """What a TorchScript file holds beside `state`."""
    unread: tuple[str, ...] = ()
    """Names, joined by dots, of what may be statistics of observations and is not in `state`."""
    beside: tuple[str, ...] = ()
    """Names of the file's entries that are not in `state`."""
    _content: Any = None
    """The rest of the file: a zip's bytes and its policy.pth, a safetensors file's metadata, torch.load's result ..."""

    def leave_out(self, pattern: str) -> bool:
        """Leave out of `state`, and of the doubts, what the pattern matches, by its name or that of an entry that it
        lies in; return whether there is anything of that name."""
        keys = [key for key in self.state if _matches(key, pattern, self.doubt)]
        for key in keys:
            del self.state[key]
        unread = [name for name in self.unread if _matches(name, pattern, "entry")]
        self.unread = tuple(name for name in self.unread if name not in unread)
        if keys and self.doubt and is_clear(self.state):
            self.doubt = ""
        return bool(keys or unread) or any(_matches(name, pattern, "entry") for name in self.beside)

    def activation_of(self, actor: Actor) -> str | None:
        """Return what the file says of the activation between the actor's layers; None where it does not say it."""
        return self.activation if self.script is None else activation_said(self.script, actor)

    @property
    def is_activation_known(self) -> bool:
        """Whether the file says one of torch's own activations, and not a class or a function of the run's own."""
        return self.activation is not None and self.activation.isidentifier()

    def contradiction(self, activation: str | None) -> str:
        """Return in words how SB3's settings contradict the activation that the caller gives; "" where they do not."""
        if self.format != "sb3" or activation is None or not self.is_activation_known or self.activation == activation:
            return ""
        default = ", the default of Stable-Baselines3 for this policy" if self.is_default else ""
        return f"activation says {activation}, but the zip says {self.activation}{default}: leave it out"

    def notes_of(self, actor: Actor) -> list[str]:
        """Return what a user of the actor's weights must know about them."""
        return [self.note, *([] if self.script is None else notes_of(self.script, self.state, actor))]

    def to_bytes(self) -> bytes:
        """Return the file with the tensors as they are now and all else as it was read."""
        if self.format == "safetensors":
            return sorted_metadata(safetensors.torch.save(self.state, self._content))
        if self.format == "torch":
            return _torch_bytes(self._content)
        if self.format == "flax":
            return flax_bytes(self._content)
        if self.format == "npz":
            return npz_bytes(self._content)
        if self.format == "brax":
            return brax_bytes(self._content)
        if self.script is not None:
            return self.script.to_bytes()
        archive, policy = self._content
        written = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(written, "w") as target:
            for member in source.infolist():
                target.writestr(member, _torch_bytes(policy) if member.filename == _POLICY else source.read(member))
        return written.getvalue()


def read_checkpoint_file(path: str | Path, *, max_bytes: int | None = None) -> CheckpointFile:
    """Return the checkpoint file at `path`. Its format is recognised by its contents, not its name.

    `max_bytes` limits the size of the file and the unpacked size of a zip; by default 1 GiB, and less for a zip that
    unpacks to many times its size.

    Raises FileNotFoundError where `path` does not exist; RuntimeError where the file is damaged, holds no state, needs
    too much memory, changes while it is read, or could be loaded only by running code from it; OSError where it cannot
    be read.
    """
    path = Path(path)
    data = _read(path, MAX_BYTES if max_bytes is None else max_bytes)
    try:
        if path.suffix == ".safetensors" or data[8:9] == b"{":
            return _read_safetensors(data)
        if zipfile.is_zipfile(io.BytesIO(data)):
            with open_zip(data, max_bytes) as archive:
                names = archive.namelist()
                if _POLICY in names:
                    return _read_sb3(archive, data, max_bytes)
                if "_stable_baselines3_version" in names:
                    raise NotReadableError(_SBX)
                if names and all(name.endswith(".npy") for name in names):
                    state, doubt, arrays = read_npz(archive)
                    return CheckpointFile("npz", state, doubt=doubt, _content=arrays)
                if is_torchscript(names):
                    check_directory(archive, data)
                    script = read_torchscript(archive, data)
                    return CheckpointFile("torchscript", dict(script.state), script=script)
        if is_flax(data):
            state, doubt, tree = read_flax(data)
            step = step_of(tree.get("step"), "step")
            return CheckpointFile("flax", state, env_steps=step, doubt=doubt, said_by="step", _content=tree)
        if is_brax(data):
            brax = read_brax(data)
            return CheckpointFile("brax", brax.state, doubt=brax.doubt, note=brax.note, _content=brax)
        return _read_torch(data, max_bytes, is_cleanrl=path.suffix == ".cleanrl_model")
    except NotReadableError as error:
        raise RuntimeError(f"{shown(path)} {shown(error)}") from error
    except pickle.UnpicklingError as error:
        raise RuntimeError(
            f"{shown(path)} is damaged, or holds more than tensors and plain values and was not loaded, because "
            f"loading it could run code: {_first_line(error)}"
        ) from error
    except Exception as error:  # zipfile, torch and safetensors raise many kinds of exception on damaged files
        raise RuntimeError(f"{shown(path)} is damaged: {type(error).__name__}: {_first_line(error)}") from error


def find_actor_in(
    path: str | Path,
    file: CheckpointFile,
    activation: str | None = None,
    actor: str | Sequence[str] | None = None,
    discrete: Outputs | None = None,
    squash: bool = False,
    halves: bool = False,
) -> Actor:
    """Return the actor in a checkpoint file, as `find_actor` does; what the caller says is used where the file does not
    say it.

    Raises ValueError, naming `path`, where there is no actor, or its tensors or its activation are not clear, or the
    file says something else.
    """
    try:
        if discrete is not None and file.format == "sb3" and not file.discrete:
            raise ValueError(
                "discrete says that actions are discrete, but the zip's action space is not Discrete, or masks choose "
                "among its actions"
            )
        if file.doubt and actor is None:
            raise ValueError(f"{file.doubt}: {how_to_choose(file.state)}")
        if file.unread and actor is None:
            raise ValueError(_unread(file.unread))
        # An activation that is none of the simulator's makes the actor one that is not run.
        said = file.before or (file.activation if file.is_activation_known or activation is None else activation)
        settings = Settings(said or activation, file.squash or squash, file.mean_limit, file.discrete, discrete, halves)
        if file.script is not None:
            return find_scripted_actor(file.script, file.state, settings, actor)
        found = find_actor(file.state, settings, actor)
        if found.kind == "sb3" and file.own_class and not (file.activation or activation):
            raise ValueError(
                f"its policy is of a class of its own, from {shown(file.own_class)}, and the file does not say the "
                "activation: pass activation"
            )
        return found
    except ValueError as error:
        raise ValueError(f"{shown(path)}: {error}") from error


def _unread(names: Sequence[str]) -> str:
    """Return in words what entries that were not read may hold, and how to say that they do not matter."""
    entries = dict.fromkeys(f"{name.partition('.')[0]}{'.*' if '.' in name else ''}" for name in names)
    return (
        f"its entry {shown(names[0])} may hold statistics of observations, which are read from obs_rms with mean and "
        f"var: pass {' and '.join(repr(shown(it)) for it in entries)} as ignore (--ignore) if it does not matter"
    )


def _matches(name: str, pattern: str, doubt: str) -> bool:
    """Return whether a pattern matches a name or, in a file whose entries are in doubt, the entry that it lies in."""
    entry = name.partition(".")[0]
    return fnmatch.fnmatch(name, pattern) or (
        bool(doubt) and (fnmatch.fnmatch(entry, pattern) or fnmatch.fnmatch(f"{entry}.", pattern))
    )


def _read(path: Path, max_bytes: int) -> bytes:
    """Return the contents of a regular file, as `read_file` does, with errors as `read_checkpoint_file` raises them."""
    try:
        found = os.stat(path)  # before opening, which may have an effect on a device
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no checkpoint file {shown(path)}") from error
    if not stat.S_ISREG(found.st_mode):
        raise RuntimeError(f"{shown(path)} is no file but a {_kind(found.st_mode)}")
    if found.st_size > max_bytes:
        raise RuntimeError(
            f"{shown(path)} has {found.st_size:,} bytes, and was not read; max_bytes, {max_bytes:,} now, allows more"
        )
    try:
        return read_file(path, max_bytes=max_bytes)
    except OSError as error:
        if error.errno is not None:
            raise
        raise RuntimeError(shown(error)) from error


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _read_safetensors(data: bytes) -> CheckpointFile:
    length = int.from_bytes(data[:8], "little")
    if length > _JSON_BYTES:
        raise NotReadableError(
            f"is damaged: its header says that it has {length:,} bytes, at most {_JSON_BYTES:,} are read"
        )
    state = dict(sorted(safetensors.torch.load(data).items()))  # safetensors gives them in any order
    return CheckpointFile("safetensors", state, _content=json.loads(data[8 : 8 + length]).get("__metadata__"))


def _read_sb3(archive: zipfile.ZipFile, data: bytes, max_bytes: int | None) -> CheckpointFile:
    policy = load_torch(archive.read(_POLICY), max_bytes)
    settings = {}
    if "data" in archive.namelist():
        length = archive.getinfo("data").file_size
        if length > _JSON_BYTES:
            raise NotReadableError(
                f"has {length:,} bytes of settings, its member data; at most {_JSON_BYTES:,} are read"
            )
        settings = json.loads(archive.read("data"))
    if not isinstance(settings, dict):
        raise NotReadableError("is damaged: its member data, the settings, is no JSON object")
    kwargs = settings.get("policy_kwargs")
    # SB3 writes what JSON cannot hold as a pickle, and beside it the entries' names.
    says_kwargs = isinstance(kwargs, dict) and not (":serialized:" in kwargs and kwargs.keys() <= _PICKLED)
    kwargs = kwargs if isinstance(kwargs, dict) else {}
    chosen = _named(kwargs, "activation_fn")
    module = _named(settings.get("policy_class"), "__module__")
    own_class = "" if f"{module}.".startswith(SB3_LIBRARIES) else module
    found = find_state(policy, is_cleanrl=False)
    is_on_policy = any(f".{name}." in f".{key}" for name in ("action_net", "mlp_extractor") for key in found.state)
    default = ("tanh" if is_on_policy else "relu") if says_kwargs and not own_class else None
    before = _before_the_layers(settings, kwargs)
    return CheckpointFile(
        "sb3",
        found.state,
        step_of(settings.get("num_timesteps"), "num_timesteps"),
        _activation(chosen) if chosen else default,
        is_default=not chosen,
        squash=kwargs.get("squash_output") is True,
        mean_limit=_mean_limit(kwargs),
        # Masks, which no file holds, decide with sb3-contrib's MaskablePPO which actions there are.
        discrete=_named(settings.get("action_space"), ":type:").endswith(_DISCRETE)
        and ".maskable." not in f"{module}.",
        doubt=found.doubt,
        own_class=own_class,
        normalised=_saw_normalised(settings, is_on_policy=is_on_policy),
        note=before or (OWN_CLASS.format(module=shown(own_class)) if own_class else ""),
        before=before,
        _content=(data, policy),
    )


def _named(setting: Any, name: str) -> str:
    """Return the entry `name` of one of SB3's settings as text, "" for none. SB3 writes class names beside pickles."""
    value = setting.get(name) if isinstance(setting, dict) else None
    return "" if value is None else str(value)


def _activation(chosen: str) -> str:
    """Return "tanh" for "<class 'torch.nn.modules.activation.Tanh'>" and so on, and any other text unchanged.

    The simulator cannot run policies with those other activations.
    """
    match = re.fullmatch(r"<class 'torch\.nn\.modules\.activation\.(\w+)'>", chosen)
    return match[1].lower() if match else chosen


def _saw_normalised(settings: Mapping[str, Any], *, is_on_policy: bool) -> bool | None:
    """Return whether the run's observations came through VecNormalize, None where the settings leave it open.

    On-policy algorithms keep the last original observation only then. Off-policy ones always do; there the numbers tell
    where the environment's are float64, because VecNormalize makes float32 of them.
    """
    if settings.get("_last_original_obs") is None:
        return False
    if is_on_policy:
        return True
    seen, original = (_array_in(settings.get(name)) for name in ("_last_obs", "_last_original_obs"))
    if seen is None or original is None:
        return None
    if seen.dtype != np.float32 or np.array_equal(seen, original):  # the latter with norm_obs=False
        return False
    return True if original.dtype != np.float32 else None


def _array_in(setting: Any) -> NDArray[Any] | None:
    """Return the array that one of SB3's settings holds as a pickle, which is not run; None for anything else."""
    pickled = setting.get(":serialized:") if isinstance(setting, dict) else None
    if not isinstance(pickled, str):
        return None
    try:
        return array_of(read_inert(base64.b64decode(pickled, validate=True)))
    except (PickleError, ValueError):
        return None


def _mean_limit(kwargs: Mapping[str, Any]) -> float | None:
    """Return SB3's clip_mean, None where it is no positive number."""
    limit = kwargs.get("clip_mean", _CLIP_MEAN)
    is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
    return float(limit) if is_number and 0.0 < limit < math.inf else None


def _before_the_layers(settings: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str:
    """Return in words what lies between the observations and the policy's layers that is not run here, "" for nothing.

    Neither a Dict of vectors nor a features extractor without parameters shows in the policy's tensors.
    """
    extractor = _named(kwargs, "features_extractor_class")
    if extractor and not extractor.startswith(tuple(f"<class '{library}" for library in SB3_LIBRARIES)):
        return f"observations pass through a features extractor of the run's own, {shown(extractor)}, not run here"
    return space_not_run(_named(settings.get("observation_space"), ":type:"))


def space_not_run(kind: str) -> str:
    """Return in words what SB3 does to observations of a space that are not vectors, which is not done here, "" for
    other spaces; `kind` is the text of the space's class."""
    found = re.search(r"\.spaces\.\w+\.(Dict|Discrete|MultiDiscrete|MultiBinary)'>$", kind)
    if found is None:
        return ""
    if found[1] == "Dict":
        return "observations are a Dict, whose entries SB3's MultiInputPolicy joins, which is not done here"
    return f"observations are of a {found[1]} space, which SB3 turns into vectors, which is not done here"


def _read_torch(data: bytes, max_bytes: int | None, *, is_cleanrl: bool) -> CheckpointFile:
    content = load_torch(data, max_bytes)
    found = find_state(content, is_cleanrl=is_cleanrl)
    return CheckpointFile(
        "torch",
        found.state,
        found.step,
        discrete=is_cleanrl,
        doubt=found.doubt,
        said_by=found.said_by,
        step_in_name=found.step_in_name,
        unread=found.unread,
        beside=found.beside,
        _content=content,
    )


def _torch_bytes(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _first_line(error: Exception) -> str:
    return shown((str(error).strip().splitlines() or ["no reason given"])[0])
