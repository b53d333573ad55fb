"""Files from strangers: each is refused with one line that names it and the reason, in little memory."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hostile_files import HOSTILE, make

from tipl.files.sealed import _digest
from tipl.storing.foreign_files import read_checkpoint_file
from tipl.storing.importer import import_checkpoints


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(
    kind: str, tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    source = make(kind, tmp_path / "run")
    before = sorted(os.listdir(tmp_path / "run"))
    assert run_tipl("import", source, "--output", tmp_path / "store") == 2
    error = capsys.readouterr().err
    assert error.startswith("tipl: error: ")
    assert error.endswith("\n")
    assert error[:-1].isprintable(), "more than one line, or letters that a terminal obeys"
    assert len(error) < 4000
    assert re.search(HOSTILE[kind][1], error)
    assert "model" in error or "mmm" in error  # which file
    assert os.listdir(tmp_path) == ["run"]
    assert sorted(os.listdir(tmp_path / "run")) == before


IN_LITTLE_MEMORY = """
import pathlib, resource, sys, tempfile
import tipl
from hostile_files import HOSTILE, make
pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)
for kind in HOSTILE:
    with tempfile.TemporaryDirectory() as folder:
        try:
            tipl.import_checkpoints([make(kind, pathlib.Path(folder), seed=1)], pathlib.Path(folder, "store"))
        except (ValueError, RuntimeError, OSError) as error:
            assert "MemoryError" not in str(error), (kind, error)
        else:
            sys.exit(f"{kind} was imported")
"""


@pytest.mark.slow
def test_no_hostile_file_takes_more_than_a_gigabyte() -> None:
    """Not even of addresses: every kind, from another seed, in a process that cannot have more."""
    if sys.platform != "linux":
        pytest.skip("limits the memory of a process as Linux does")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", IN_LITTLE_MEMORY], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_more_is_read_if_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model_1.pt"
    torch.save({"w": torch.zeros(100)}, path)
    size = path.stat().st_size
    with pytest.raises(RuntimeError, match=rf"has {size:,} bytes, and was not read; max_bytes, 100 now, allows more"):
        import_checkpoints([path], tmp_path / "store", max_bytes=100)
    assert import_checkpoints([path], tmp_path / "store", max_bytes=size).num_checkpoints == 1
    source = make("zip bomb", tmp_path)
    with pytest.raises(RuntimeError, match=r"begins with b'.x00"):  # it is unpacked now, and is no policy
        read_checkpoint_file(source, max_bytes=2**28)


@pytest.mark.parametrize("change", [b"more", b""])
def test_a_file_that_changes_while_it_is_read_is_refused(
    change: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model_1.pt"
    torch.save({"w": torch.zeros(100)}, path)
    fstat, calls = os.fstat, []

    def changing(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        calls.append(status)
        if len(calls) == 1:  # between looking at the file and reading it
            path.write_bytes(path.read_bytes() + change if change else b"")
        return status

    monkeypatch.setattr(os, "fstat", changing)
    with pytest.raises(RuntimeError, match=r"model_1\.pt changed while it was read"):
        read_checkpoint_file(path)


@pytest.mark.parametrize(
    "record",
    [
        b"3",
        b"[]",
        b"[" * 10**5,
        b'{"policy": 3}',
        b'{"policy": {}}',
        b'{"source": 3}',
        b'{"source": {"actor": {"kind": 1}}}',
    ],
)
def test_a_forecast_that_lies_about_itself_is_refused(
    record: bytes, tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {"weights": np.ones((2, 3), np.float32), "checkpoint": np.array([7, 8])}
    metadata = {"tipl": record.decode(), "sha256": _digest(record.decode(), arrays)}
    safetensors.numpy.save_file(arrays, tmp_path / "f\n.safetensors", metadata)
    torch.save({"w": torch.ones(3)}, tmp_path / "like.pt")
    forecast, like, output = tmp_path / "f\n.safetensors", tmp_path / "like.pt", tmp_path / "out.pt"
    assert run_tipl("export", forecast, "--like", like, "--output", output) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"tipl: error: export: .*/f\\n\.safetensors is damaged.*\n", error)
    assert error[:-1].isprintable()
    assert not output.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("what", ["run", "run/model_1.pt"])
def test_what_may_not_be_read_is_named(what: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"w": torch.zeros(2)}, tmp_path / "run" / "model_1.pt")
    (tmp_path / what).chmod(0)
    with pytest.raises(PermissionError, match=rf"Permission denied: '.*{what}'"):
        import_checkpoints([tmp_path / "run"], tmp_path / "store")
    (tmp_path / what).chmod(0o700)


def test_a_file_that_is_replaced_between_two_readings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model_1.pt"
    readings = []

    def replacing(*arguments: object, **named: object) -> object:
        readings.append(path)
        torch.save({"state_dict": {"w": torch.zeros(2)}, "iter": len(readings)}, path)
        return read_checkpoint_file(path)

    torch.save({"w": torch.zeros(2)}, path)
    monkeypatch.setattr("tipl.storing.imported_runs.read_checkpoint_file", replacing)
    with pytest.raises(RuntimeError, match=r"model_1\.pt changed while it was read"):
        import_checkpoints([path], tmp_path / "store")
    assert not (tmp_path / "store").exists()
