"""Whether a decoder's passes run on all threads or on one: csrc/cpu/team_choice.h with made-up times."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

CSRC = Path(__file__).parents[1] / "csrc"

# Reads how long each pass would take on all threads and on one; prints whether it was run on one.
PROGRAM = """
#include <iostream>

#include "cpu/team_choice.h"

int main() {
  tipl::TeamChoice choice;
  for (double shared, alone; std::cin >> shared >> alone;) {
    std::cout << choice.alone() << ' ';
    choice.took(1e6, choice.alone() ? alone : shared);
  }
}
"""

QUICK, ALONE, SLICE = 1e-4, 1.9e-4, 3e-3
"""Seconds of a pass on two threads, on one, and of another process's time slice."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("there is no c++")
    folder = tmp_path_factory.mktemp("team_choice")
    (folder / "choices.cpp").write_text(PROGRAM)
    subprocess.run([compiler, "-std=c++20", f"-I{CSRC}", "choices.cpp", "-o", "choices"], cwd=folder, check=True)
    return folder / "choices"


def choices(program: Path, shared: np.ndarray, alone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each pass was run on one thread, and how long it took."""
    text = "\n".join(f"{s} {a}" for s, a in zip(shared, alone, strict=True))
    out = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout
    was_alone = np.array(out.split(), int).astype(bool)
    return was_alone, np.where(was_alone, alone, shared)


def times(mean: float, num_passes: int) -> np.ndarray:
    return mean * np.random.default_rng(0).uniform(0.95, 1.3, num_passes)


def test_without_other_processes_all_threads_run_every_pass(program):
    was_alone, _ = choices(program, times(QUICK, 20_000), times(ALONE, 20_000))
    assert not was_alone.any()


def test_beside_a_process_that_stops_them_often_passes_run_on_one_thread(program):
    shared = times(QUICK, 20_000)
    shared[::5] += SLICE
    was_alone, seconds = choices(program, shared, times(ALONE, 20_000))
    assert was_alone.mean() > 0.95
    assert seconds.sum() < 1.1 * times(ALONE, 20_000).sum()


def test_all_threads_go_on_where_one_is_slower_still(program):
    shared = times(QUICK, 20_000)
    shared[::30] += SLICE
    was_alone, seconds = choices(program, shared, times(3 * QUICK, 20_000))
    assert 0 < was_alone.mean() < 0.1
    assert seconds.sum() < 1.05 * shared.sum()


def test_all_threads_go_on_when_the_other_process_has_ended(program):
    shared = times(QUICK, 40_000)
    shared[:10_000:5] += SLICE
    was_alone, _ = choices(program, shared, times(ALONE, 40_000))
    assert was_alone[:10_000].mean() > 0.9
    assert not was_alone[30_000:].any()


@pytest.mark.parametrize("alone", [0.8, 3.2], ids=["16 threads", "64 threads"])
def test_trials_of_long_passes_are_rare(program, alone):
    shared = np.full(2000, 0.12)
    shared[:5] = 0.05
    was_alone, seconds = choices(program, shared, np.full(2000, alone))
    assert was_alone.any()
    assert seconds.sum() < 1.12 * shared.sum()
