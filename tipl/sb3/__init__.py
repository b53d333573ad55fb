"""Callbacks of Stable-Baselines3. One records the path of the actor's weights, and resumes a run that was cut off; the
other lets a run jump along a forecast of its weights. They need the extra `sb3`."""

try:
    import stable_baselines3  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("tipl.sb3 needs stable-baselines3, the extra `sb3` of tipl", name=error.name) from error

from tipl.sb3.jumping import JumpCallback
from tipl.sb3.recording import RecorderCallback, resume

__all__ = ["JumpCallback", "RecorderCallback", "resume"]
