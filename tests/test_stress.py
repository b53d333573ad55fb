"""The stress harness itself: the fault injector hits what it should, and lost, late and wrong trials are counted."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from stress.children import Ended
from stress.content import content, differences, leftovers
from stress.disturbed import unclear
from stress.faults import build_library
from stress.rows import Table, Trial, as_text, failures

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fault") / "fault.so"
    build_library(path)
    return path


def under_fault(library: Path, folder: Path, fault: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run Python's `script` in the folder, with `report` a file for what the fault hits."""
    armed = f"""
import os
from stress.faults import Fault
report = os.open("report", os.O_CREAT | os.O_WRONLY)
Fault({fault}).arm(report)
{script}
"""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "TIPL_FAULT_LIBRARY": str(library),
        "PYTHONPATH": str(HERE),
    }
    return subprocess.run(
        [sys.executable, "-c", armed], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


WRITE_THREE = """
for i in range(3):
    try:
        fd = os.open(f"data{i}", os.O_CREAT | os.O_WRONLY)
        print(i, os.write(fd, b"12345678"))
    except OSError as error:
        print(i, error.errno)
"""


@pytest.mark.parametrize(
    ("fault", "expected", "hit"),
    [
        ('"w", "/data", 2, "once", 28', ["0 8", "1 28", "2 8"], ["w data1"]),
        ('"w", "/data", 2, "from then on", 122', ["0 8", "1 122", "2 122"], ["w data1", "w data2"]),
        ('"w", "/data", 1, "short"', ["0 4", "1 8", "2 8"], ["w data0"]),
        ('"o", "data", 3, "once", 30', ["0 8", "1 8", "2 30"], ["o data2"]),
        ('"ow", "data1", 0, "trace"', ["0 8", "1 8", "2 8"], ["o data1", "w data1"]),
        ('"w", "elsewhere", 1, "once", 5', ["0 8", "1 8", "2 8"], []),
        ('"w", "/data", 4, "once", 5', ["0 8", "1 8", "2 8"], []),
    ],
)  # fmt: skip
def test_the_nth_operation_fails_and_no_other(library, tmp_path, fault, expected, hit):
    ended = under_fault(library, tmp_path, fault, WRITE_THREE)
    assert ended.stdout.splitlines() == expected, ended.stderr
    report = (tmp_path / "report").read_text().splitlines()
    assert [line.replace(f"{tmp_path}/", "") for line in report] == hit


OPERATIONS = [
    ("n", 'os.rename("old", "new")'),
    ("n", 'os.replace("old", "new")'),
    ("u", 'os.unlink("old")'),
    ("u", 'os.rmdir("folder")'),
    ("m", 'os.mkdir("old3")'),
    ("l", 'os.link("old", "old2")'),
    ("l", 'os.symlink("old", "old2")'),
    ("i", 'open("old")'),
    ("o", 'open("old", "a")'),
    ("r", 'open("old").read()'),
    ("r", 'import mmap; mmap.mmap(os.open("old", os.O_RDONLY), 0, prot=mmap.PROT_READ)'),
    ("s", 'os.fsync(os.open("old", os.O_WRONLY))'),
    ("s", 'os.fdatasync(os.open("old", os.O_WRONLY))'),
    ("c", 'os.close(os.open("old", os.O_WRONLY))'),
    ("t", 'os.truncate("old", 1)'),
    ("t", 'os.ftruncate(os.open("old", os.O_WRONLY), 1)'),
    ("t", 'os.posix_fallocate(os.open("old", os.O_WRONLY), 0, 9)'),
    ("k", 'import fcntl; fcntl.flock(open("old"), fcntl.LOCK_EX)'),
    ("d", 'os.listdir("folder")'),
    ("w", 'os.pwrite(os.open("old", os.O_WRONLY), b"1", 0)'),
    ("w", 'os.writev(os.open("old", os.O_WRONLY), [b"1"])'),
    ("w", 'os.sendfile(os.open("old", os.O_WRONLY), os.open("full", os.O_RDONLY), 0, 8)'),
    ("w", 'os.copy_file_range(os.open("full", os.O_RDONLY), os.open("old", os.O_WRONLY), 8)'),
]
"""One operation of each kind and each function, on files that are there."""


def test_operations_of_every_kind_fail(library, tmp_path):
    (tmp_path / "old").write_text("12345678")
    (tmp_path / "full").write_text("12345678")
    (tmp_path / "folder").mkdir()
    script = f"""
for kind, operation in {OPERATIONS!r}:
    for under in ("nothing of this name", {{"u": "o", "d": "folder"}}.get(kind, "old")):
        Fault(kind, under, 1, "once", 5).arm(report)
        try:
            exec(operation)
        except OSError as error:
            print(error.errno, kind, operation)
        if "nothing" in under:
            Fault("", "", 0, "trace").arm(-1)
            for path in ("new", "old2", "old3"):
                if os.path.lexists(path):
                    os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
            os.path.exists("folder") or os.mkdir("folder")
            open("old", "w").write("12345678")
"""
    ended = under_fault(library, tmp_path, '"", "", 0, "trace"', script)
    assert ended.stdout.splitlines() == [f"5 {kind} {operation}" for kind, operation in OPERATIONS], ended.stderr


def test_a_process_dies_at_an_operation(library, tmp_path):
    (tmp_path / "old").write_text("1")
    ended = under_fault(library, tmp_path, '"n", "old", 1, "kill"', 'os.rename("old", "new")')
    assert ended.returncode == -9
    assert (tmp_path / "old").exists()
    assert "old" in (tmp_path / "report").read_text()


def test_lost_late_and_failed_trials_are_counted_and_the_others_made(tmp_path):
    script = """
import json, os, time
from stress.rows import Table, Trial
from stress.workers import Workers

def work(number):
    if number == 3:
        os.kill(os.getpid(), 11)
    if number == 4:
        time.sleep(60)
    trial = Trial(f"command {number % 2}")
    trial.add("silent" if number == 5 else "identical", "another output")
    return trial

table = Table("test", 0)
Workers(table, work, lambda number: f"command {number % 2}", limit=1.0).make(10)
print("rows", json.dumps(table.rows()))
"""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    rows = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("rows")).removeprefix("rows "))
    marks = [{name: row[name] for name in ("tried", "identical", "silent", "crashed", "hung")} for row in rows]
    assert marks == [
        {"tried": 5, "identical": 4, "silent": 0, "crashed": 0, "hung": 1},
        {"tried": 5, "identical": 3, "silent": 1, "crashed": 1, "hung": 0},
    ]
    assert failures(rows) == 3
    assert rows[1]["examples"]["silent"][0]["trial"] == 5


def test_rows_add_up():
    table = Table("kills", 0)
    for number in range(3):
        table.add(number, Trial("train", Counter({"blocked_rerun": 1}), messages={"blocked_rerun": "exists"}))
    table.add(3, Trial("train", happened=False))
    table.add(4, Trial("collect", Counter({"identical": 1})))
    lines = [line.split() for line in as_text(table.rows()).splitlines()]
    assert lines[-1][:4] == ["kills", "all", "4", "1"]
    assert len(table.rows()[1]["examples"]["blocked_rerun"]) == 1  # of equal messages one is enough


def ended(err: str, status: int = 2) -> Ended:
    return Ended(status, "", err, "", 1.0, 1.0, 1.0, 0)


@pytest.mark.parametrize(
    ("err", "fault"),
    [
        ("tipl: error: /here/out: No space left on device\n", ""),
        ("a line of progress\ntipl: error: /here/out: No space left on device\n", ""),
        ("tipl: error: [Errno 28] No space left on device\n", "no path"),
        ("tipl: error: /here/out is damaged:\n\tsize mismatch\n", "not one line"),
        ("tipl: error: /here/\x1b[2Jout is damaged\n", "control characters"),
        ("", "not one line"),
    ],
)
def test_what_is_clear(err, fault):
    assert unclear(ended(err), "/here") == fault


def test_what_is_the_same(tmp_path):
    for name, seconds, rows in (("one", 1.5, [1]), ("two", 99.0, [1]), ("three", 1.5, [2])):
        folder = tmp_path / name / "evaluation"
        (folder / "tb").mkdir(parents=True)
        (folder / "tb" / f"events.{name}").write_text(name)
        (folder / "results.json").write_text(json.dumps({"seconds": {"train": seconds}, "rows": rows}))
        (folder / "report.html").write_text(f"<dd>train {seconds} s</dd>")
    one, two, three = (content(tmp_path / name / "evaluation") for name in ("one", "two", "three"))
    assert sorted(one) == ["report.html", "results.json"]
    assert differences(two, one) == ""
    assert differences(three, one) == "results.json differs"
    assert differences({}, one) == "report.html is missing, results.json is missing"
    (tmp_path / "one" / ".evaluation.partial").mkdir()
    (tmp_path / "one" / "evaluation" / ".results.json.17.partial").touch()
    assert leftovers(tmp_path / "one" / "evaluation") == [".evaluation.partial", "evaluation/.results.json.17.partial"]
