"""What slow stages show: a bar on a terminal, lines elsewhere."""

import re

import pytest

import tipl.progress
from tipl.progress import hide_progress, progress_bar


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since some time, which the test moves on."""
    now = [100.0]
    monkeypatch.setattr(tipl.progress.time, "monotonic", lambda: now[0])
    return now


def steps(clock: list[float], shown: bool = True, seconds: float = 4.0) -> None:
    with progress_bar(shown) as bar:
        task = bar.add_task("train", total=1200, note="")
        for step in range(1, 1201):
            clock[0] += seconds / 100
            bar.update(task, advance=1, note=f"error {1 / step:.2f}")


def test_a_line_every_ten_seconds_where_stderr_is_no_terminal(clock, capsys):
    steps(clock)  # 48 seconds in all
    lines = capsys.readouterr().err.splitlines()
    counts = [float(line.removeprefix("train: ").partition(" of 1,200, ")[0].replace(",", "")) for line in lines]
    assert counts == pytest.approx([250, 500, 750, 1000], abs=2)  # the clock's sums are rounded
    assert lines[1].endswith(", error 0.00")
    assert all(re.search(r"[\d,.]+/s, \d+:\d\d:\d\d to go", line) for line in lines)


def test_nothing_in_quick_stages_or_where_it_is_not_shown(clock, capsys):
    steps(clock, seconds=0.8)
    steps(clock, shown=False)
    assert capsys.readouterr().err == ""


def test_nothing_once_progress_is_hidden(clock, capsys, monkeypatch):
    monkeypatch.setattr(tipl.progress, "_hidden", False)
    hide_progress()
    steps(clock)
    assert capsys.readouterr().err == ""


def test_advance_writes_lines_too(clock, capsys):
    with progress_bar(True) as bar:
        task = bar.add_task("verify", total=None, note="")
        clock[0] += 11
        bar.advance(task)
    assert capsys.readouterr().err.startswith("verify: 1")
