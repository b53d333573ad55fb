"""The versions of everything on which the last bits of a training run depend."""

import functools
import importlib.metadata
import platform

import torch

from tipl import _core


def versions(*packages: str) -> dict[str, str]:
    """Return name -> version of these packages, and the CPU's instruction sets as "cpu"."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_core.isa()}"
    return {name: _version(name) for name in packages} | {"cpu": cpu}


@functools.cache
def _version(package: str) -> str:
    return importlib.metadata.version(package)  # which takes milliseconds


def changed_versions(then: dict[str, str], now: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Return name -> (version then, version now) of every version that differs."""
    return {name: (then.get(name, "none"), now[name]) for name in now if then.get(name, "none") != now[name]}
