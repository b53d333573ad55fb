"""The limits of this machine, measured in the run that uses them: reading memory, multiplying matrices.

    python bench/roofs.py   # prints the roofs

Reading is measured at the footprint in question, since caches have no sharp edges; `roofs.cpp` is compiled on the spot.
"""

import ctypes
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tipl import _core

MIB = 1 << 20
LEVELS = {"L2": 1 * MIB, "L3": 16 * MIB, "DRAM": 256 * MIB}
"""Footprints that represent a level of the memory hierarchy in the record."""


def cache_bytes(level: int) -> int:
    """Return the size of one cache of this level in bytes; 0 where the kernel does not report it."""
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if int((cache / "level").read_text()) == level:
            return int((cache / "size").read_text().strip().removesuffix("K")) * 1024
    return 0


def compile_reader() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "roofs.so"
        source = Path(__file__).with_suffix(".cpp")
        options = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
        subprocess.run([os.environ.get("CXX", "c++"), *options, source, "-o", library], check=True)
        reader = ctypes.CDLL(str(library))
    reader.read_gbps.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    reader.read_gbps.restype = ctypes.c_double
    return reader


def gemm_gflops(dtype: torch.dtype, n: int = 2048, repeats: int = 5) -> float:
    """GFLOP/s of torch's (n, n) x (n, n), the best of `repeats`."""
    a = torch.randn(n, n).to(dtype)
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[1:]) / 1e9


@dataclass
class Roofs:
    """Roofs of all cores together. Memory's speed wanders on a shared machine: `reading_s` measures it each time."""

    num_threads: int = field(default_factory=_core.available_cpus)
    reader: ctypes.CDLL = field(default_factory=compile_reader)
    gemm: dict[str, float] = field(default_factory=dict)
    """float32, bfloat16 -> GFLOP/s."""

    def reading_s(self, num_bytes: float) -> float:
        """Return the seconds that reading so many bytes takes now, right after reading them once."""
        gbps = self.reader.read_gbps(
            int(min(num_bytes, 1024 * MIB)), self.num_threads, max(2, int(64e6 / num_bytes)), 2
        )
        return num_bytes / gbps / 1e9

    def gemm_gflops(self, dtype: str) -> float:
        if dtype not in self.gemm:
            self.gemm[dtype] = gemm_gflops(getattr(torch, dtype))
        # Without instructions for bfloat16 its products are float32's: torch's own are then slower than they need be.
        return max(self.gemm[dtype], self.gemm_gflops("float32")) if dtype != "float32" else self.gemm[dtype]

    def level(self, num_bytes: float) -> str:
        """Return the cache level that holds this footprint: every core has an L2, all share the L3."""
        if num_bytes <= self.num_threads * cache_bytes(2):
            return "L2"
        return "L3" if num_bytes <= cache_bytes(3) else "DRAM"

    def share(self, seconds: float, reading_s: float, num_bytes: float, flops: float, dtype: str) -> tuple[float, str]:
        """Return how close `seconds` comes to the roof, in percent, and which roof it is: L2, L3, DRAM or flops."""
        computing_s = flops / self.gemm_gflops(dtype) / 1e9
        binds = self.level(num_bytes) if reading_s >= computing_s else "flops"
        return 100 * max(reading_s, computing_s) / seconds, binds

    def record(self) -> dict[str, dict[str, float]]:
        """Return the best GB/s of each level and GFLOP/s of each type."""
        levels = {
            f"{name} ({size // MIB} MiB)": self.reader.read_gbps(size, self.num_threads, max(2, 512 * MIB // size), 12)
            for name, size in LEVELS.items()
        }
        return {
            "read_gbps": levels,
            "gemm_gflops": {dtype: self.gemm_gflops(dtype) for dtype in ("float32", "bfloat16")},
        }


if __name__ == "__main__":
    for name, values in Roofs().record().items():
        print(name, ", ".join(f"{key}: {value:.0f}" for key, value in values.items()))
