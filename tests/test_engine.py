"""The engine's ground: instruction set, random numbers, threads."""

import os

import numpy as np
import pytest
from processes import IMPORT_CORE, ISAS, LANES, run_python

from tipl import _core

# ---- instruction set


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_overrides_the_instruction_set_or_the_import_fails(isa):
    done = run_python(IMPORT_CORE + "print(_core.isa(), _core.lanes())", TIPL_ISA=isa)
    if done.returncode == 0:
        assert done.stdout.split() == [isa, str(LANES[isa])]
    else:
        assert f"ImportError: TIPL_ISA: this CPU lacks {isa}; it supports baseline" in done.stderr


def test_an_unknown_instruction_set_fails_the_import():
    done = run_python(IMPORT_CORE, TIPL_ISA="sse9")
    assert done.returncode != 0
    assert "ImportError: TIPL_ISA must be one of baseline, avx2, avx512, avx512bf16, got 'sse9'" in done.stderr


def test_a_command_says_in_one_line_that_the_instruction_set_is_unknown():
    code = 'import sys; sys.argv = ["tipl", {!r}]; from tipl.cli import main; main()'
    done = run_python(code.format("--version"), TIPL_ISA="sse9")
    assert done.returncode == 2
    expected = "tipl: error: TIPL_ISA must be one of baseline, avx2, avx512, avx512bf16, got 'sse9'\n"
    assert done.stderr == expected
    assert run_python(code.format("--help"), TIPL_ISA="sse9").returncode == 0


def test_the_best_supported_instruction_set_is_the_default():
    assert _core.choose_isa(None, ISAS) == "avx512bf16"
    assert _core.choose_isa(None, ISAS[:3]) == "avx512"
    assert _core.choose_isa(None, ISAS[:2]) == "avx2"
    assert _core.choose_isa(None, ISAS[:1]) == "baseline"


def test_an_instruction_set_that_the_cpu_lacks_is_refused():
    assert _core.choose_isa("avx2", ISAS) == "avx2"
    with pytest.raises(RuntimeError, match=r"^TIPL_ISA: this CPU lacks avx512; it supports baseline, avx2$"):
        _core.choose_isa("avx512", ISAS[:2])
    with pytest.raises(RuntimeError, match=r"^TIPL_ISA must be one of baseline, avx2, avx512, avx512bf16, got ''$"):
        _core.choose_isa("", ISAS)
    with pytest.raises(ValueError, match=r"^choose_isa: supported must not be empty$"):
        _core.choose_isa(None, [])


# ---- random numbers


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_random123s_known_answers(counter, key, words):
    assert _core.philox4x32(counter, key) == words


def test_normals_are_standard_normal():
    values = np.array([_core.normal4(3, 0, i) for i in range(50_000)])  # 200,000 values
    moments = [np.mean(values**n) for n in (1, 2, 3, 4)]
    standard_errors = np.sqrt(np.array([1, 2, 15, 96]) / values.size)
    assert (np.abs(np.subtract(moments, [0, 1, 0, 3])) < 5 * standard_errors).all()
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 5 / np.sqrt(50_000)


def test_each_of_seed_stream_and_index_changes_the_normals():
    blocks = {tuple(_core.normal4(*where)) for where in [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (2**40, 2, 3)]}
    assert len(blocks) == 5
    assert _core.normal4(1, 2, 3) == _core.normal4(1, 2, 3)


# ---- threads


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("items", [0, 1, 2, 6, 7, 100])
def test_items_are_shared_in_order_and_evenly(num_threads, items):
    owners = _core.ThreadPool(num_threads).owners(items)
    assert np.array_equal(owners, np.sort(owners))
    shares = np.bincount(owners, minlength=num_threads)
    assert len(shares) == num_threads
    assert shares.max() - shares.min() <= 1


@pytest.mark.parametrize("item", [0, 5, 9])
def test_a_throwing_worker_throws_here_and_the_pool_lives_on(item):
    pool = _core.ThreadPool(5)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=f"^owners: item {item} failed on rank {item // 2}$"):
            pool.owners(10, fail_at=[item])
        assert pool.owners(10).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_the_first_of_several_exceptions_is_thrown():
    with pytest.raises(RuntimeError, match=r"^owners: item 4 failed on rank 2$"):
        _core.ThreadPool(5).owners(10, fail_at=[8, 4, 6])


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_barriers_hold(num_threads):
    assert _core.ThreadPool(num_threads).barriers_hold(200)


@pytest.mark.parametrize("num_threads", [0, -1, 1025])
def test_a_senseless_number_of_threads_is_refused(num_threads):
    with pytest.raises(ValueError, match=rf"^num_threads must lie in \[1, 1024\], got {num_threads}$"):
        _core.ThreadPool(num_threads)


def test_available_cpus_are_those_of_the_affinity_mask():
    assert _core.available_cpus() == len(os.sched_getaffinity(0))
    first = min(os.sched_getaffinity(0))
    done = run_python(IMPORT_CORE + f"os.sched_setaffinity(0, [{first}]); print(_core.available_cpus())")
    assert done.stdout == "1\n", done.stderr


def test_the_pool_works_in_a_forked_child_and_in_its_parent():
    done = run_python(
        IMPORT_CORE
        + """
pool = _core.ThreadPool(3)
before = pool.owners(9).tolist()
child = os.fork()
if child == 0:
    after = pool.owners(9).tolist()
    del pool
    os._exit(0 if after == before else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert pool.owners(9).tolist() == before
"""
    )
    assert done.returncode == 0, done.stderr
