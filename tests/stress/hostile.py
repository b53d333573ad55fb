"""Hostile input: files, names and numbers that no tipl and no careful user gives. Each is refused in one line, soon, in
little memory, and nothing is written elsewhere than to the output. To be taken as it is, where it is valid, is as well.
"""

import importlib
import importlib.util
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from factories import ENV_ID

from tipl.storing.zarr_files import write_group

from . import children
from .campaign import Campaign
from .children import GIB, Ended, Setting
from .disturbed import unclear
from .hostile_values import (
    FOREIGN_FILES,
    SPECIAL_FILES,
    TENSOR_FILES,
    TEXTS,
    VALUES,
    Foreign,
    with_value,
    without_key,
)
from .pipeline import COMMANDS, as_typed
from .rows import Trial

CPU_SECONDS = 5.0
WALL_SECONDS = 30.0
"""Other work runs beside; what waits for nothing ends far sooner."""
PEAK_BYTES = GIB

Make = Callable[["Box", random.Random], list[str]]
"""Makes the hostile thing in a box and returns the command's arguments."""


@dataclass(frozen=True)
class Case:
    command: str
    kind: str
    make: Make
    names_path: bool = True
    """Whether an error must name a path in the box."""


@dataclass(frozen=True)
class Box:
    """A folder of its own for a case: copies of what commands read, a working folder and, alone, the output."""

    folder: Path

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def input(self, path: str) -> Path:
        """Return where a path of the pipeline is; what commands go on with lies where outputs do."""
        return (self.output if path.startswith((UNFINISHED, RUN)) else self.folder / "input") / path

    def named(self, arguments: list[str]) -> tuple[str, ...]:
        """Return how the paths of the output begin that the arguments name, and of what is made beside it.

        None where that is a URL, which no command takes, or something that was there.
        """
        names = [it.partition("=")[2] for it in arguments if it.startswith(("--output=", "--plot="))]
        paths = [os.path.normpath(os.path.join(self.work, name)) for name in names if "://" not in name]
        new = [path for path in paths if os.path.islink(path) or not os.path.exists(path)]
        starts = []
        for path in new:
            while not os.path.lexists(os.path.dirname(path)):  # folders that are made for it
                path = os.path.dirname(path)
            starts += [path, os.path.join(os.path.dirname(path), ".")]
        return tuple(starts)

    def listing(self, left_out: tuple[str, ...] = ()) -> dict[str, tuple[int, int, int]]:
        """Return what lies outside the output: path -> (mode, size, time of the last change)."""
        found: dict[str, tuple[int, int, int]] = {}
        for root, folders, files in os.walk(self.folder):
            for name in [*folders, *files]:
                path = os.path.join(root, name)
                state = os.lstat(path)
                is_folder = os.path.isdir(path) and not os.path.islink(path)
                found[path] = (state.st_mode, 0 if is_folder else state.st_size, 0 if is_folder else state.st_mtime_ns)
            if root == str(self.folder):
                folders.remove("output")
        return {path: state for path, state in found.items() if not path.startswith(left_out)}


class Hostile(Campaign):
    name = "hostile"
    counts: ClassVar = {"smoke": 60, "full": 500}
    limit = 120.0

    def prepare(self) -> None:
        cases = list(all_cases())
        random.Random(f"hostile {self.seed}").shuffle(cases)
        self.cases = cases
        print(f"hostile    {len(cases)} cases, {len({it.kind for it in cases})} kinds", flush=True)

    def row(self, number: int) -> str:
        return self.cases[number % len(self.cases)].command

    def attempt(self, number: int, rng: random.Random) -> Trial:
        case = self.cases[number % len(self.cases)]
        box = Box(self.folder(number))
        self._fill(box)
        trial = Trial(case.command, story=case.kind)
        arguments = case.make(box, rng)
        trial.story += f": tipl {' '.join(arguments)}".encode(errors="backslashreplace").decode()[:300]
        named = box.named(arguments)
        before = box.listing(named)
        setting = Setting(timeout=WALL_SECONDS, room_bytes=2 * GIB, folder=box.work, heeds_permissions=True)
        ended = children.run(as_typed(arguments), setting)
        self._judge(trial, ended, box if case.names_path else None)
        if outside := changes(before, box.listing(named)):
            trial.add("escaped", ", ".join(outside)[:400])
        shutil.rmtree(box.folder)
        return trial

    def _fill(self, box: Box) -> None:
        if box.folder.exists():
            shutil.rmtree(box.folder)
        box.output.mkdir(parents=True)
        for path in (STORE, MODEL, EVALUATION, "checkpoints", "tensors", UNFINISHED, RUN):
            shutil.copytree(
                self.pipeline.folder / path, box.input(path), dirs_exist_ok=True, ignore=shutil.ignore_patterns("tb")
            )
        box.input("rollout").mkdir()
        shutil.copy(self.pipeline.of("rollout"), box.input("rollout"))
        box.work.mkdir()

    def _judge(self, trial: Trial, ended: Ended, box: Box | None) -> None:
        said = ended.err.strip()[-300:]
        if ended.timed_out or ended.cpu_seconds > CPU_SECONDS:
            trial.add("hung", f"{ended.seconds:.0f} s, {ended.cpu_seconds:.0f} s of the processor; {said}")
        if ended.peak_bytes > PEAK_BYTES:
            trial.add("oversized", f"{ended.peak_bytes / GIB:.1f} GiB; {said}")
        if ended.crashed:
            trial.add("crashed", f"status {ended.status}: {ended.message[:300]}")
        elif ended.status and not ended.timed_out:
            fault = "" if is_clear_without_error_line(ended) else unclear(ended, *([box.folder] if box else []))
            if fault:
                trial.add("unclear", f"{fault}: {said}")
            else:
                trial.add("refused_clearly")


def is_clear_without_error_line(ended: Ended) -> bool:
    """Whether the parser of arguments has refused them, or `store verify` has said what is damaged."""
    return "For full helptext" in ended.err or (ended.status == 1 and "\ndamaged " in f"\n{ended.out}")


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


# ---- the cases


def all_cases() -> Iterator[Case]:
    yield from _document_cases()
    yield from _tensor_cases()
    yield from _special_cases()
    yield from _output_cases()
    yield from _number_cases()
    yield from _foreign_cases()


STORE, MODEL, EVALUATION = "collect/store.zarr", "train/model", "evaluate/evaluation"
UNFINISHED, RUN, FORECAST = "unfinished/store.zarr", "run/run", "rollout/forecast.safetensors"


def arguments_of(command: str, box: Box, output: str | None = None) -> list[str]:
    """Return a command's arguments that read what is in the box."""
    store, model, evaluation = (str(box.input(it)) for it in (STORE, MODEL, EVALUATION))
    tiny = [str(it) for it in COMMANDS["run"].arguments(_NoPipeline())[1:-2]]  # without the seed
    collect, train = tiny[: tiny.index("--train.n-components")], tiny[tiny.index("--train.n-components") :]
    judge = [it.replace("--evaluate.", "--") for it in train[train.index("--evaluate.prefixes") :]]
    train = [it.replace("--train.", "--") for it in train[: train.index("--evaluate.prefixes")]]
    output = str(box.output / "out") if output is None else output
    placed = f"--output={output}"
    return {
        "collect": ["collect", *collect, placed],
        "collect on": ["collect", *collect, "--seed", "0", f"--output={box.input(UNFINISHED)}"],
        "train": ["train", "--store", store, *train, placed],
        "calibrate": ["calibrate", "--store", store, "--model", model, "--num-trials", "2", placed],
        "rollout": ["rollout", "--store", store, "--model", model, "--prefix", "0.5", placed],
        "import": ["import", str(box.input("checkpoints")), "--env-id", ENV_ID, "--activation", "tanh", placed],
        "import tensors": ["import", str(box.input("tensors")), "--env-id", ENV_ID, placed],
        "import stores": ["import", store, placed],
        "export": [
            "export", str(box.input(FORECAST)), "--like", str(box.input("checkpoints") / "policy_0.pt"), placed
        ],
        "evaluate": ["evaluate", "--store", store, "--model", model, *judge, placed],
        "report": ["report", "--store", store, "--evaluation", evaluation, "--model", model, placed],
        "run on": ["run", *tiny, "--seed", "0", "--resume", f"--output={box.input(RUN)}"],
        "store verify": ["store", "verify", store],
        "store info": ["store", "info", store, f"--plot={output}.svg"],
    }[command]  # fmt: skip


class _NoPipeline:
    seed = 0


DOCUMENTS = (
    (f"{MODEL}/config.json", ("rollout", "evaluate", "calibrate")),
    (f"{MODEL}/training.json", ("report",)),
    (f"{EVALUATION}/results.json", ("report",)),
    (f"{STORE}/zarr.json", ("store info", "store verify", "train", "rollout", "report", "import stores", "evaluate")),
    (f"{STORE}/trial_0000/zarr.json", ("store info", "store verify", "train", "rollout", "import stores")),
    (f"{STORE}/trial_0000/weights/zarr.json", ("store info", "store verify", "train", "rollout")),
    (f"{UNFINISHED}/zarr.json", ("collect on",)),
    (f"{UNFINISHED}/resume/zarr.json", ("collect on",)),
    (f"{RUN}/seconds.json", ("run on",)),
    (f"{RUN}/model/training.json", ("run on",)),
    (f"{RUN}/evaluation/results.json", ("run on",)),
)
"""JSON documents, and commands that read them."""

HUGE = (
    (f"{MODEL}/config.json", "rollout", ("model", "n_layer"), 10**9),
    (f"{MODEL}/config.json", "rollout", ("model", "d_model"), 2**40),
    (f"{MODEL}/config.json", "rollout", ("model", "max_len"), 10**12),
    (f"{MODEL}/config.json", "evaluate", ("num_checkpoints",), 2**62),
    (f"{STORE}/trial_0000/zarr.json", "store info", ("num_checkpoints",), 2**62),
    (f"{STORE}/trial_0000/zarr.json", "train", ("num_checkpoints",), 2**62),
    (f"{STORE}/trial_0000/zarr.json", "store verify", ("num_checkpoints",), 2**40),
    (f"{STORE}/zarr.json", "store info", ("chunk_rows",), 2**40),
    (f"{STORE}/zarr.json", "store verify", ("chunk_rows",), 0),
    (f"{STORE}/zarr.json", "store info", ("policy", "hidden_sizes"), [10**9, 10**9]),
    (f"{STORE}/zarr.json", "store info", ("seeds",), list(range(10**6))),
    (f"{STORE}/zarr.json", "rollout", ("policy", "obs_dim"), 10**12),
    (f"{UNFINISHED}/zarr.json", "collect on", ("config", "total_timesteps"), 2**62),
    (f"{UNFINISHED}/resume/zarr.json", "collect on", ("trials_per_shard",), 0),
    (f"{UNFINISHED}/resume/zarr.json", "collect on", ("trials_per_shard",), 2**62),
    (f"{EVALUATION}/results.json", "report", ("rows", 0, "horizon"), 2**62),
    (f"{EVALUATION}/results.json", "report", ("settings", "n_components"), 10**12),
)
"""Numbers that would take all memory or time, where they stand, and who reads them."""


def _sealed(file: Path) -> None:
    """Let the manifest of a file's folder say what the file is now, so that its content is what is judged."""
    if (file.parent / "manifest.json").exists():
        importlib.import_module("tipl.files.manifest").write_manifest(file.parent)


def _rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON document; a store's group gets the checksum that fits."""
    document = json.loads(path.read_text())
    if document.get("node_type") == "group":
        attributes = {name: value for name, value in document["attributes"].items() if name != "crc32c"}
        changed = change(attributes)
        try:
            write_group(path.parent, changed)
            return
        except ValueError:  # NaN and infinities, which tipl does not write
            document["attributes"] = changed
            path.write_text(json.dumps(document))
            return
    path.write_text(json.dumps(change(document)))
    _sealed(path)


def _document_cases() -> Iterator[Case]:
    def valued(file: str, command: str, value: Any, box: Box, rng: random.Random) -> list[str]:
        _rewrite(box.input(file), lambda document: with_value(document, value, rng))
        return arguments_of(command, box)

    def keyless(file: str, command: str, box: Box, rng: random.Random) -> list[str]:
        _rewrite(box.input(file), lambda document: without_key(document, rng))
        return arguments_of(command, box)

    def told(file: str, command: str, text: Callable[[str], bytes], box: Box, rng: random.Random) -> list[str]:
        box.input(file).write_bytes(text(box.input(file).read_text()))
        _sealed(box.input(file))
        return arguments_of(command, box)

    def huge(file: str, command: str, place: tuple[Any, ...], value: Any, box: Box, rng: random.Random) -> list[str]:
        def change(document: Any) -> Any:
            inner = document
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            return document

        _rewrite(box.input(file), change)
        return arguments_of(command, box)

    for file, command, place, value in HUGE:
        yield Case(command, f"{Path(file).name}: huge {place[-1]}", partial(huge, file, command, place, value))
    for file, readers in DOCUMENTS:
        name = "/".join(Path(file).parts[-2:])
        for command in readers:
            for kind, value in VALUES.items():
                yield Case(command, f"{name}: {kind}", partial(valued, file, command, value))
            yield Case(command, f"{name}: key missing", partial(keyless, file, command))
            for kind, text in TEXTS.items():
                yield Case(command, f"{name}: {kind}", partial(told, file, command, text))


PARTS = ("model", "centre", "refiner", "confidence", "strides")
TENSORS = (
    *((f"{MODEL}/{part}.safetensors", ("rollout", "evaluate")) for part in PARTS),
    (FORECAST, ("export",)),
    (f"{EVALUATION}/coordinates.safetensors", ("report",)),
    ("tensors/policy_0.safetensors", ("import tensors",)),
    (f"{UNFINISHED}/resume", ("collect on",)),
)  # fmt: skip
"""safetensors files, and commands that read them."""


def _tensor_cases() -> Iterator[Case]:
    def lied(file: str, command: str, lie: Callable[[bytes], bytes], box: Box, rng: random.Random) -> list[str]:
        path = box.input(file)
        for it in sorted(path.glob("*/state_*")) if path.is_dir() else [path]:
            it.write_bytes(lie(it.read_bytes()))
            _sealed(it)
        return arguments_of(command, box)

    for file, readers in TENSORS:
        for command in readers:
            for kind, lie in TENSOR_FILES.items():
                yield Case(command, f"{Path(file).name}: {kind}", partial(lied, file, command, lie))


SPECIAL = (
    (f"{MODEL}/config.json", ("rollout", "evaluate")),
    (f"{MODEL}/model.safetensors", ("rollout",)),
    (f"{MODEL}/refiner.safetensors", ("rollout",)),
    (f"{MODEL}/confidence.safetensors", ("rollout",)),
    (f"{MODEL}/training.json", ("report",)),
    (MODEL, ("rollout", "evaluate", "calibrate")),
    (STORE, ("train", "store info", "store verify", "import stores", "report")),
    (f"{STORE}/zarr.json", ("train", "store info", "store verify")),
    (f"{STORE}/trial_0000", ("train", "store info", "store verify")),
    (f"{STORE}/trial_0000/weights/c.0.0", ("train", "store info", "store verify")),
    (f"{EVALUATION}/results.json", ("report",)),
    (f"{EVALUATION}/coordinates.safetensors", ("report",)),
    (EVALUATION, ("report",)),
    (FORECAST, ("export",)),
    ("checkpoints/policy_0.pt", ("import", "export")),
    ("checkpoints", ("import",)),
    (f"{RUN}/seconds.json", ("run on",)),
    (f"{RUN}/store.zarr", ("run on",)),
    (f"{UNFINISHED}/resume/zarr.json", ("collect on",)),
)
"""What special files stand in place of, and commands that read it."""


def _special_cases() -> Iterator[Case]:
    def placed(file: str, command: str, make: Callable[[Path], object], box: Box, rng: random.Random) -> list[str]:
        path = box.input(file)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)
        return arguments_of(command, box)

    for file, readers in SPECIAL:
        for command in readers:
            for kind, make in SPECIAL_FILES.items():
                yield Case(command, f"{Path(file).name}: {kind}", partial(placed, file, command, make))


OUTPUTS: dict[str, str] = {
    "name with a newline": "{output}/a\nb",
    "name with escapes": "{output}/\x1b[2Ja\x07",
    "name of no UTF-8": os.fsdecode(b"{output}/\xff\xfe"),
    "name of 300 letters": "{output}/" + "x" * 300,
    "path of 5000 letters": "{output}/" + "x/" * 2500 + "x",
    "name of a space": "{output}/ ",
    "name with braces": "{output}/%s{{0}}$HOME`id`",
    "name that reads backwards": "{output}/\u202egpj.exe",
    "dash": "-",
    "two dashes": "--",
    "option": "--help",
    "empty": "",
    "dot": ".",
    "parent": "..",
    "root": "/",
    "ends in a slash": "{output}/out/",
    "ends in a dot": "{output}/out/.",
    "file URL": "file://{output}/out",
    "file URL with capitals": "FILE://{output}/out",
    "http URL": "http://127.0.0.1:9/out",
    "unknown URL": "nonsense://out",
    "memory URL": "memory://out",
    "tilde": "~/out",
    "null device": "/dev/null",
    "full device": "/dev/full",
    "below a device": "/dev/null/out",
    "proc": "/proc/self/out",
    "below a file": "{work}/file/out",
    "a file": "{work}/file",
    "a folder": "{work}/folder",
    "link to nothing": "{work}/nowhere",
    "link to itself": "{work}/loop",
    "below a link to itself": "{work}/loop/out",
    "fifo": "{work}/fifo",
    "below a read-only folder": "{work}/readonly/out",
    "below an unreadable folder": "{work}/closed/out",
    "its own input": "{input}",
    "inside its own input": "{input}/out",
}
"""Names of outputs. `--output=NAME` takes all of them."""

WRITERS = (
    "collect",
    "train",
    "calibrate",
    "rollout",
    "import",
    "import stores",
    "export",
    "evaluate",
    "report",
    "store info",
)


def _output_cases() -> Iterator[Case]:
    def placed(command: str, pattern: str, box: Box, rng: random.Random) -> list[str]:
        (box.work / "file").write_text("mine")
        (box.work / "folder").mkdir()
        (box.work / "folder" / "mine").write_text("mine")
        (box.work / "nowhere").symlink_to("nothing")
        (box.work / "loop").symlink_to("loop")
        os.mkfifo(box.work / "fifo")
        (box.work / "readonly").mkdir(mode=0o555)
        (box.work / "closed").mkdir(mode=0o000)
        source = {"export": FORECAST, "import": "checkpoints", "report": EVALUATION}.get(command, STORE)
        output = pattern.format(output=box.output, work=box.work, input=box.input(source))
        return arguments_of(command, box, output)

    for command in WRITERS:
        for kind, pattern in OUTPUTS.items():
            yield Case(command, f"output: {kind}", partial(placed, command, pattern), names_path=False)


VAST, HUGE_SEED = "10000000000000", "99999999999999999999999"
COUNTS = (VAST, "-1", "0")
INDICES = (str(2**62), HUGE_SEED, "-1", "0")
SHARES = ("nan", "inf", "-1", "1e308")
TEXTS_GIVEN = ("a\nb", "\x1b[2J", "", "x" * 10**5)
NUMBERS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("collect", ("--num-trials", "--total-timesteps"), COUNTS),
    ("collect", ("--ppo.num-envs", "--ppo.num-steps", "--ppo.hidden-sizes"), COUNTS),
    ("collect", ("--seed", "--init-seed", "--num-threads", "--trials-per-shard"), (HUGE_SEED, "-1", "0")),
    ("collect", ("--ppo.learning-rate", "--ppo.gamma", "--ppo.clip-coef"), SHARES),
    ("collect", ("--env-id",), ("nonsense", "../../x", "os:system", *TEXTS_GIVEN)),
    ("collect", ("--ray",), ("nonsense", "127.0.0.1:9", "127.0.0.1:99999", "")),
    ("train", ("--n-layer", "--d-model", "--n-components"), COUNTS),
    ("train", ("--batch-size", "--d-refine", "--num-checkpoints"), COUNTS),
    ("train", ("--learning-rate", "--noise", "--trust", "--heldout-fraction", "--ema-decay"), SHARES),
    ("train", ("--device",), ("cuda", "nonsense", "meta", "")),
    ("train", ("--seed",), ("-1", HUGE_SEED)),
    ("rollout", ("--trial", "--every", "--horizon"), INDICES),
    ("rollout", ("--prefix",), ("nan", "inf", "-1", "0", "1", "2", "1e-300")),
    ("export", ("--checkpoint", "--trial"), INDICES[:-1]),
    ("import", ("--num-checkpoints",), (VAST, "-1", "0")),
    ("import", ("--pattern",), ("..", "../**/*", "/etc/*", "[", "", "a\nb", "**")),
    ("import", ("--env-id",), TEXTS_GIVEN),
    ("calibrate", ("--num-trials", "--num-threads"), ("-1", "0", HUGE_SEED)),
    ("evaluate", ("--prefixes", "--horizons"), ("nan", "inf", "0", "1", "1e-300")),
    ("evaluate", ("--num-episodes", "--max-trials", "--num-threads"), ("-1", "0")),
    ("evaluate", ("--seed",), ("-1", HUGE_SEED)),
)
"""Command, options, and values for each of them."""


def _number_cases() -> Iterator[Case]:
    def given(command: str, option: str, value: str, box: Box, rng: random.Random) -> list[str]:
        return [*arguments_of(command, box), f"{option}={value}"]

    for command, options, values in NUMBERS:
        for option in options:
            for value in values:
                shown = value if len(value) < 30 else "long"
                yield Case(command, f"{option} {shown!r}", partial(given, command, option, value), names_path=False)


def _foreign_cases() -> Iterator[Case]:
    """Those here and, where the tests have them, of tests/hostile_files.py: HOSTILE[kind] is a maker and a pattern."""
    makers = dict(FOREIGN_FILES)
    if importlib.util.find_spec("hostile_files"):
        makers |= {kind: maker for kind, (maker, _) in importlib.import_module("hostile_files").HOSTILE.items()}

    def made(command: str, make: Foreign, box: Box, rng: random.Random) -> list[str]:
        folder = box.input("foreign")
        folder.mkdir()
        path = make(folder, rng)
        if command == "import":
            return ["import", str(path), "--env-id", ENV_ID, "--activation", "tanh", f"--output={box.output / 'out'}"]
        return ["export", str(box.input(FORECAST)), "--like", str(path), f"--output={box.output / 'out'}"]

    for kind, make in makers.items():
        for command in ("import", "export"):
            yield Case(command, f"foreign: {kind}", partial(made, command, make))
