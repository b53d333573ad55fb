"""The README, CONTRIBUTING and docs/: every Python block runs, every command parses, and what is named is there."""

import contextlib
import functools
import io
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import tyro
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import tipl
from tipl.cli.commands import Command

sys.path.append(str(Path(__file__).parents[1] / "bench"))
import table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = Sybil(parsers=[PythonCodeBlockParser()], path=str(ROOT))
OTHERS_COMMANDS = ("ray", "tensorboard", "pip")
OURS = re.compile(r"(tipl|csrc|tests|bench|studies|docs|\.ci|\.github)/[\w./*-]*")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shell_lines(text: str) -> list[str]:
    """Return the commands of all shell blocks, without comments."""
    lines = [line for language, block in FENCE.findall(text) if language == "sh" for line in block.splitlines()]
    return [shlex.join(words) for words in (shlex.split(line, comments=True) for line in lines) if words]


def inline_codes(text: str) -> list[str]:
    return [" ".join(code.split()) for code in INLINE.findall(FENCE.sub("", text))]


def commands(text: str) -> list[list[str]]:
    """Return the words of every command that a page gives, in blocks and in sentences."""
    inline = [code for code in inline_codes(text) if code.startswith(("make ", "tipl ", "python ", "pytest "))]
    return [shlex.split(line) for line in shell_lines(text) + inline]


@functools.cache
def options_of(*command: str) -> frozenset[str]:
    """Return the options that `tipl COMMAND --help` shows."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ending:
        tyro.cli(Command, prog="tipl", args=[*command, "--help"])
    assert ending.value.code == 0, f"tipl {' '.join(command)} is no command"
    return frozenset(re.findall(r"--[a-z0-9.-]+", shown.getvalue()))


def check_tipl(words: list[str]) -> None:
    """Parse a complete command of tipl; of one that a sentence names, look for the command and its options."""
    if words[1] == "COMMAND":
        return
    if "--output" in words and "..." not in words:
        tyro.cli(Command, prog="tipl", args=words[1:])  # exits where it does not parse
        return
    command = words[1:3] if words[1] == "store" else words[1:2]
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert options <= options_of(*command), f"tipl {' '.join(command)} has no {options - options_of(*command)}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=named)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in PYTHON.parse(page):
        block.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_are_there(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page.read_text()):
        if words == ["tipl", "--version"]:
            continue  # test_cuda.py runs it
        if words[0] == "tipl":
            check_tipl(words)
        elif words[0] == "make":
            assert words[1] in targets, f"make {words[1]} is no target"
        elif words[0] == "python":
            assert words[1] == "-m" or (ROOT / words[1]).is_file(), f"{words[1]} is not there"
        elif words[0] == "pytest":
            assert (ROOT / words[1]).exists(), f"{words[1]} is not there"
        else:
            assert words[0] in OTHERS_COMMANDS, f"{shlex.join(words)} is not checked by this test"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_paths_are_there(page: Path) -> None:
    text = page.read_text()
    words = [word for code in shell_lines(text) + inline_codes(text) for word in code.split()]
    for path in filter(OURS.fullmatch, words):
        assert any(ROOT.glob(path)), f"{path} is not there"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    """Those within docs/ are checked by `make docs`."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        assert link.startswith("https://") or (ROOT / link).exists(), f"{link} is not there"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_guide_shows_every_command() -> None:
    guide = (ROOT / "docs" / "guide" / "command-line.md").read_text()
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        tyro.cli(Command, prog="tipl", args=["--help"])
    names = re.search(r"\{([a-z,]+)\}", shown.getvalue())
    assert names is not None
    for name in names[1].split(","):
        assert f"| `tipl {name}" in guide


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: tipl\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(set(tipl.__all__) - {"__version__"})


def test_the_architecture_page_has_the_packages_in_their_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text().partition("| layer |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in page.splitlines()[2:]]
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert rows == [layer.split(" | ") for layer in contract["layers"]]


def test_tables_of_speed_have_their_places() -> None:
    """Each between its markers, and the summary's rows among those that `make bench` measures."""
    speed = (ROOT / "docs" / "speed.md").read_text()
    for name in table.TABLES:
        assert f"<!-- bench:{name} -->" in speed
        assert f"<!-- /bench:{name} -->" in speed
    baselines = json.loads((ROOT / "bench" / "baseline.json").read_text())
    assert table.SUMMARY.keys() <= {tuple(name.split(" | ")[1:]) for name in baselines["avx512bf16"]["ratios"]}
