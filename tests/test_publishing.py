"""Outputs: one process makes each, nothing stands at its place before it is complete, and nothing blocks a rerun."""

import contextlib
import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tipl.files.locations import location, make_folder, naming, read_file
from tipl.files.manifest import check_folder
from tipl.files.publishing import OutputInUse, claimed, published, remove, remove_left_behind

HOLD = """
import sys, time
from pathlib import Path
from tipl.files.publishing import published
with published(Path(sys.argv[1]), "train") as aside:
    aside.mkdir()
    (aside / "half.json").write_text("{}")
    print("claimed", flush=True)
    time.sleep(60)
"""


def make(output: Path, text: str = "{}") -> None:
    with published(output, "train") as aside:
        aside.mkdir()
        (aside / "config.json").write_text(text)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_published_whole_with_a_manifest(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "model"
    with published(output, "train") as aside:
        assert not output.exists()
        aside.mkdir()
        (aside / "config.json").write_text("{}")
    assert names_in(output.parent) == ["model"]
    assert names_in(output) == ["config.json", "manifest.json"]
    assert check_folder(output)
    with pytest.raises(FileExistsError, match=r"train: output .*model exists already; choose another one or remove it"):
        make(output)


def test_a_file_is_published_whole(tmp_path: Path) -> None:
    with published(tmp_path / "forecast", "rollout") as aside:
        aside.write_bytes(b"x")
        assert not (tmp_path / "forecast").exists()
    assert names_in(tmp_path) == ["forecast"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_failure_leaves_nothing_and_blocks_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), published(tmp_path / "model", "train") as aside:
        aside.mkdir()
        (aside / "config.json").write_text("half")
        raise error
    assert names_in(tmp_path) == []
    make(tmp_path / "model")


def test_after_a_failure_folders_that_were_made_for_nothing_are_gone(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    for failing in (published, claimed):
        with pytest.raises(KeyboardInterrupt), failing(tmp_path / "before" / "a" / "b" / "model", "train"):
            raise KeyboardInterrupt
        assert names_in(tmp_path) == ["before"]
        assert names_in(tmp_path / "before") == []
    with pytest.raises(KeyboardInterrupt), published(tmp_path / "a" / "b" / "model", "train"):
        (tmp_path / "a" / "other").write_text("")
        raise KeyboardInterrupt
    assert names_in(tmp_path / "a") == ["other"]


@pytest.mark.parametrize("output", ["", ".", "/", "..", "a/.."])
def test_an_output_without_a_name_is_refused(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = (
        rf"train: output must end in the name of what is made, such as runs/new, got '{re.escape(output or '.')}'"
    )
    with pytest.raises(ValueError, match=expected):
        make(Path(output))
    with pytest.raises(ValueError, match=expected), claimed(Path(output), "train"):
        pass
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("rest", ["model", "deep/model"])
def test_a_file_in_the_place_of_a_folder_is_named(rest: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    expected = rf"train: output {file}/{rest} cannot be made: {file} is a file, not a folder"
    with pytest.raises(NotADirectoryError, match=expected):
        make(file / rest)
    with pytest.raises(NotADirectoryError, match=expected), claimed(file / rest, "train"):
        pass
    with pytest.raises(NotADirectoryError, match=rf"{file} is a file, not a folder"):
        make_folder(file / rest)
    assert names_in(tmp_path) == ["file"]


def test_what_is_resumable_is_kept_for_the_next_call(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), published(tmp_path / "model", "train", resumable=True) as aside:
        aside.mkdir()
        (aside / "state").write_text("3")
        raise KeyboardInterrupt
    assert not (tmp_path / "model").exists()
    with published(tmp_path / "model", "train", resumable=True) as aside:
        assert (aside / "state").read_text() == "3"


def test_a_second_process_is_told_who_makes_the_output_and_a_killed_one_blocks_nothing(tmp_path: Path) -> None:
    output = tmp_path / "model"
    with subprocess.Popen([sys.executable, "-c", HOLD, output], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        who = rf"process {holder.pid} on .* \(tipl train\)"
        with pytest.raises(OutputInUse, match=rf"train: .*model is being written by {who}; wait for it, or choose"):
            make(output)
        assert names_in(tmp_path / ".model.partial") == ["half.json"]
        holder.kill()
    assert not output.exists()
    make(output)
    assert names_in(tmp_path) == ["model"]
    assert names_in(output) == ["config.json", "manifest.json"]


def test_one_process_cannot_claim_an_output_twice(tmp_path: Path) -> None:
    with (
        claimed(tmp_path / "run", "run"),
        pytest.raises(OutputInUse, match=str(os.getpid())),
        claimed(tmp_path / "run", "run"),
    ):
        pass
    with claimed(tmp_path / "run", "run"):
        assert json.loads((tmp_path / ".run.claim").read_text())["pid"] == os.getpid()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_warning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def no_locks(file: int, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="lies on a file system without locks"):
        make(tmp_path / "model")
    assert check_folder(tmp_path / "model")


def test_an_error_of_the_lock_itself_names_the_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file"):
        make(tmp_path / "file" / "model")


def test_half_written_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    for name in (".seconds.json.123.partial", ".model.partial", "kept.partial"):
        (tmp_path / name).write_text("")
    remove_left_behind(tmp_path)
    assert names_in(tmp_path) == [".model.partial", "kept.partial"]


def test_an_output_that_is_made_again_leaves_nothing_of_a_dead_process(tmp_path: Path) -> None:
    for name in (".out.1.partial", "..out.partial.1.partial", ".other.1.partial", ".out.partial", ".out.claim"):
        (tmp_path / name).write_text("")
    with published(tmp_path / "out", "rollout") as aside:
        aside.write_text("x")
    assert names_in(tmp_path) == [".other.1.partial", "out"]
    (tmp_path / ".out.claim").write_text("")
    with pytest.raises(FileExistsError):
        make(tmp_path / "out")
    assert names_in(tmp_path) == [".other.1.partial", "out"]


def test_a_failure_to_remove_a_folder_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "last").touch()

    def fail(path: object, *, dir_fd: int | None = None) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(OSError, match=r"Input/output error") as caught:
        remove(tmp_path / "states")
    assert str(tmp_path / "states") in str(caught.value)
    assert "last" in str(caught.value)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    assert location(f"file://{tmp_path}/x") == tmp_path / "x"


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=rf"{name} must be a regular file|Is a directory: '.*{name}'"):
            read_file(tmp_path / name)
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**31)
    with pytest.raises(OSError, match=r"huge must have at most 1,073,741,824 bytes, got 2,147,483,648"):
        read_file(tmp_path / "huge")


def test_an_error_of_the_system_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*weights'"), naming(tmp_path / "weights"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"^what it is$"), naming(tmp_path), contextlib.nullcontext():
        raise OSError("what it is")
