"""A tiny pipeline: the commands of tipl on a few trials of a small policy, in a second or less each.

Commands are run in a fork of this process, by `tipl.cli.main`, as typed, but for six things: the sizes that `demo` and
`reproduce` have built in; the seconds between two saved states of a collection, which are none, so that every iteration
saves one; the parsing of arguments and the search for an OpenGL that works, which are done once; the drawing of
figures, which takes most of a report's seconds and touches no file; and the hub, which is one of our own.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import tyro
from factories import ENV_ID, TINY_EVALUATE, TINY_PPO, TINY_TRAIN, flags
from hub_server import TOKEN, USER, Server

import tipl
from tipl import _core, cli
from tipl.cli import commands, run_commands
from tipl.collecting.offscreen import offscreen_platform
from tipl.report.plots import Plot
from tipl.reproduction import TaskSettings
from tipl.storing.store import Store
from tipl.subspace.streaming_svd import StreamingSVD

from . import children
from . import content as content_module
from .children import Ended, Setting
from .content import content, differences
from .faults import KINDS, Fault

NUM_TRIALS, NUM_CHECKPOINTS = 5, 13
RUN: dict[str, Any] = {"num_trials": NUM_TRIALS, "total_timesteps": TINY_PPO.num_steps * (NUM_CHECKPOINTS - 1)}


@dataclass(frozen=True)
class Command:
    """A command of tipl with all its arguments but the output."""

    name: str
    arguments: Callable[["Pipeline"], Sequence[object]]
    output: str = "out"
    """The name of what it writes."""
    flag: str = "--output"
    """The option that takes it."""
    resume: tuple[str, ...] = ()
    """What is added where it is to go on."""
    resumes: bool = False
    """Whether the same command goes on where it was cut off, with or without such an argument."""


_SIZES: list[object] = ["--num-trials", RUN["num_trials"], "--total-timesteps", RUN["total_timesteps"]]
_COLLECT = [*_SIZES, *flags(TINY_PPO, "ppo.")]
_TRAIN, _EVALUATE = flags(TINY_TRAIN), flags(TINY_EVALUATE)
_RUN = [*_COLLECT, *flags(TINY_TRAIN, "train."), *flags(TINY_EVALUATE, "evaluate.")]

COMMANDS = {
    it.name: it
    for it in (
        Command("collect", lambda p: ["collect", *_COLLECT, "--seed", p.seed], "store.zarr", resumes=True),
        Command("train", lambda p: ["train", "--store", p.of("collect"), *_TRAIN], "model"),
        Command(
            "train shared", lambda p: ["train", "--store", p.of("collect"), *_TRAIN, "--basis", "shared"], "shared"
        ),
        Command(
            "calibrate",
            lambda p: ["calibrate", "--store", p.of("collect"), "--model", p.of("train"), "--num-trials", 2],
            "calibrated",
        ),
        Command(
            "rollout",
            lambda p: ["rollout", "--store", p.of("collect"), "--model", p.of("train"), "--prefix", 0.5],
            "forecast.safetensors",
        ),
        Command(
            "import", lambda p: ["import", p.checkpoints, "--env-id", ENV_ID, "--activation", "tanh"], "imported.zarr"
        ),
        Command(
            "export",
            lambda p: ["export", p.of("rollout"), "--like", p.checkpoints / "policy_0.pt"],
            "exported.pt",
        ),
        Command(
            "evaluate",
            lambda p: ["evaluate", "--store", p.of("collect"), "--model", p.of("train"), *_EVALUATE],
            "evaluation",
        ),
        Command(
            "report",
            lambda p: [
                *("report", "--store", p.of("collect"), "--evaluation", p.of("evaluate")),
                *("--model", p.of("train")),
            ],
            "report",
        ),
        Command(
            "accelerate",
            lambda p: [
                *("accelerate", "--model", p.of("train"), *_COLLECT, "--seed", p.seed),
                *("--jumps.start", 3, "--jumps.max-jumps", 3),
            ],
            "faster",
            resumes=True,
        ),
        Command(
            "import stores", lambda p: ["import", p.of("collect"), p.of("accelerate") / "store.zarr"], "joined.zarr"
        ),
        Command("zoo", lambda p: ["zoo", p.of("collect"), p.of("import"), "--license", "mit"], "zoo"),
        Command("pull", lambda p: ["pull", p.repo_id], "pulled.zarr"),
        Command(
            "video",
            lambda p: [
                *("video", "--store", p.of("collect"), "--model", p.of("train"), "--prefix", 0.5),
                *("--seconds", 0.2, "--width", 64, "--height", 64),
            ],
            "film.mp4",
        ),
        Command("store info", lambda p: ["store", "info", p.of("collect")], "plot.svg", "--plot"),
        Command("score", lambda p: ["score", p.of("collect"), "--num-episodes", 1, "--every", 6], "scores.json"),
        Command(
            "compare",
            lambda p: ["compare", p.of("accelerate"), p.of("accelerate") / "ledger.json"],
            "curves.svg",
            "--plot",
        ),
        Command("run", lambda p: ["run", *_RUN, "--seed", p.seed], "run", resume=("--resume",), resumes=True),
        Command("demo", lambda p: ["demo"], "demo", resume=("--resume",), resumes=True),
        Command("reproduce", lambda p: ["reproduce"], "reproduction", resumes=True),
    )
}


class Pipeline:
    """The outputs of all commands, undisturbed, in a folder; `seed` makes other trials."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed = folder, seed
        self.checkpoints, self.tensors = folder / "checkpoints", folder / "tensors"
        self.sketch = folder / "sketch.safetensors"
        self.unfinished = folder / "unfinished" / "store.zarr"
        self.repo_id = f"{USER}/seed-{seed}"
        """The repository on the hub that `pull` gets."""
        self.seconds: dict[str, float] = {}
        self.contents: dict[str, dict[str, str]] = {}
        self.operations: dict[str, dict[str, int]] = {}
        """Command -> kind of file operation -> how many of them it makes below its output's folder."""

    def of(self, name: str) -> Path:
        """Return where the output of a command is."""
        return self.folder / name.replace(" ", "-") / COMMANDS[name].output

    def make(self) -> None:
        """Run all commands in this process, which is to be a child, and note what it has imported in the end."""
        for name, command in COMMANDS.items():
            if name == "import":
                self._make_inputs()
            elif name == "pull":
                self.push()
            self.of(name).parent.mkdir(parents=True)
            work(command, self, self.of(name))()
        (self.folder / "modules.txt").write_text("\n".join(sys.modules))

    def push(self) -> None:
        """Put the store that `collect` made on the hub, in a child as all else."""
        tipl.push(self.of("collect"), self.repo_id, progress=False)

    def _make_inputs(self) -> None:
        """Write the first trial as Stable-Baselines3 names its tensors, and a sketch of its rows."""
        store = Store.open(self.of("collect"))
        weights = store.trial(0).weights()
        for folder in (self.checkpoints, self.tensors):
            folder.mkdir(parents=True)
        for i, row in enumerate(weights):
            state = {}
            for key, (offset, shape) in store.policy.layout.items():
                tensor = torch.from_numpy(row[offset : offset + math.prod(shape)].reshape(shape).copy())
                state[key.replace("policy_net.", "mlp_extractor.policy_net.")] = tensor
            torch.save(state, self.checkpoints / f"policy_{i}.pt")
            safetensors.torch.save_file(state, self.tensors / f"policy_{i}.safetensors")
        StreamingSVD(3, seed=self.seed).partial_fit(weights).save(self.sketch)

    def difference(self, name: str, output: Path) -> str:
        """Return where an output of the command differs from the undisturbed one, "" where it does not."""
        return differences(content(output), self.contents[name])


def run(
    command: Command,
    pipeline: Pipeline,
    output: Path,
    setting: Setting,
    *,
    more: Sequence[str] = (),
) -> Ended:
    """Run a command that writes to `output` in a child."""
    return children.run(work(command, pipeline, output, more), setting)


def work(command: Command, pipeline: Pipeline, output: Path, more: Sequence[str] = ()) -> Callable[[], None]:
    """Return what the child is to do."""
    placed = _parsed((*(str(it) for it in command.arguments(pipeline)), command.flag, "OUTPUT", *more))
    return partial(_main, _placed(placed, command.flag.removeprefix("--"), output))


def _placed(parsed: Any, field: str, output: Path) -> Any:
    """Return a parsed command that writes to `output`, which `field` of it or of its subcommand says."""
    if not hasattr(parsed, field):
        return dataclasses.replace(parsed, command=_placed(parsed.command, field, output))
    return dataclasses.replace(parsed, **{field: type(getattr(parsed, field))(output)})


def as_typed(arguments: Sequence[str]) -> Callable[[], None]:
    """Return what a child is to do that is given these arguments, with their parsing."""

    def typed() -> None:
        sys.argv = ["tipl", *arguments]
        cli.main()

    return typed


def _main(command: object) -> None:
    tyro.cli = lambda *_, **__: command  # type: ignore[assignment]
    cli.main()


_PARSE = tyro.cli  # which `_main` puts something else in the place of


@cache
def _parsed(arguments: tuple[str, ...]) -> Any:
    return _PARSE(commands.Command, args=list(arguments))


def make_small() -> None:
    """Let this process and its forks run commands as said above."""
    tasks = {ENV_ID: TaskSettings(**RUN, ppo=TINY_PPO, train=TINY_TRAIN, evaluate=TINY_EVALUATE, shared_components=6)}
    sys.modules["tipl.reproduction"].TASKS = tasks  # type: ignore[attr-defined]
    sys.modules["tipl.collecting.collection"].SAVE_SECONDS = 0.0  # type: ignore[attr-defined]
    whole_run = run_commands.Run

    def small_run(output: Path, *, resume: bool = False, **_: Any) -> run_commands.Run:
        return whole_run(
            output, env_id=ENV_ID, **RUN, resume=resume, ppo=TINY_PPO, train=TINY_TRAIN, evaluate=TINY_EVALUATE
        )

    run_commands.Run = small_run  # type: ignore[misc, assignment]  # for `demo`; the parser has the class already
    Plot.png = lambda plot, *_: f"a picture of {plot.name}".encode()  # type: ignore[method-assign]
    Plot.svg = Plot.png  # type: ignore[method-assign, assignment]
    Plot.svgs = lambda plot: [f"<svg><!-- {plot.name} --></svg>"]  # type: ignore[method-assign]
    try:
        offscreen_platform()  # found once for all forks, by processes that it starts
    except RuntimeError as error:
        print(f"stress: video is left out: {error}", flush=True)
        del COMMANDS["video"]


def make_twins(cache: Path) -> tuple[Pipeline, Pipeline]:
    """Return the pipeline, and one of other trials; made in the folder `cache`, unless they are there already.

    Raises RuntimeError where a command fails, or gives another output the second time.
    """
    make_small()
    start_hub(cache / "hub")
    folder = cache / _version()
    pipeline, twin = Pipeline(folder / "pipeline"), Pipeline(folder / "twin", seed=1)
    notes = folder / "notes.json"
    if not notes.exists():
        shutil.rmtree(folder, ignore_errors=True)
        print("stress: runs every command undisturbed, twice", flush=True)
        _checked("the pipeline", children.run(pipeline.make, Setting(timeout=600)))
        import_all(pipeline.folder / "modules.txt")
        pipeline.contents = {name: content(pipeline.of(name)) for name in COMMANDS}
        making = children.start(twin.make, Setting())
        _make_again(pipeline, folder / "again")
        _checked("the twin", making.wait(Setting(timeout=600)))
        for it in (pipeline, twin):
            _leave_unfinished(it, nth=2 * pipeline.operations["collect"]["n"] // 3)
        notes.write_text(json.dumps([pipeline.seconds, pipeline.contents, pipeline.operations]))
    else:
        _checked("push", children.run(pipeline.push, Setting()))
    import_all(pipeline.folder / "modules.txt")
    pipeline.seconds, pipeline.contents, pipeline.operations = json.loads(notes.read_text())
    return pipeline, twin


def start_hub(home: Path) -> None:
    """Let huggingface_hub, which is to be imported after this, ask a hub that a child serves as long as we live."""
    server = Server()  # it listens already
    children.start(server.serve_forever, Setting())
    server.server_close()
    os.environ |= {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


OPENGL = ("OpenGL", "mujoco.egl", "mujoco.osmesa")
"""Modules that open a display when they are imported, which no fork can share."""


def import_all(listing: Path) -> None:
    """Import here what `listing` says that commands import, so that children need not."""
    for name in listing.read_text().split():
        if name not in sys.modules and not name.startswith(("__", "ray", *OPENGL)):
            try:
                importlib.import_module(name)
            except Exception as error:
                print(f"stress: {name} is not imported ahead: {error}", file=sys.stderr)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("stress: a thread runs in the process whose forks run commands; they would lack it")


def _make_again(pipeline: Pipeline, folder: Path) -> None:
    """See that commands give the same twice, how long each takes with all imports done, and count operations."""
    for name, command in COMMANDS.items():
        output = folder / name.replace(" ", "-") / command.output
        output.parent.mkdir(parents=True)
        trace = Fault("".join(KINDS), str(output.parent), 0, "trace")
        ended = run(command, pipeline, output, Setting(fault=trace, timeout=600))
        _checked(name, ended)
        pipeline.seconds[name] = ended.seconds
        pipeline.operations[name] = Counter(line[0] for line in ended.hit.splitlines())
        if difference := pipeline.difference(name, output):
            raise RuntimeError(f"stress: {name} gives another output the second time: {difference}")
    shutil.rmtree(folder)


def _leave_unfinished(pipeline: Pipeline, nth: int) -> None:
    """Leave a collection in the pipeline's folder that was killed at its `nth` rename."""
    output = pipeline.unfinished
    output.parent.mkdir()
    fault = Fault("n", str(output.parent), nth, "kill")
    ended = run(COMMANDS["collect"], pipeline, output, Setting(fault=fault, timeout=600))
    if not ended.killed or not output.exists():
        raise RuntimeError(f"stress: no unfinished collection: status {ended.status}, {ended.err}")


def _checked(name: str, ended: Ended) -> None:
    if ended.status:
        raise RuntimeError(f"stress: {name} fails undisturbed with status {ended.status}: {ended.err}")


def _version() -> str:
    """Return a digest of all that decides what commands write."""
    kinds = (".py", ".json", ".safetensors")
    sources = [it for it in sorted(Path(cli.__file__).parent.parent.rglob("*")) if it.suffix in kinds]
    native = Path(_core.__file__)
    state = hashlib.blake2b(digest_size=8)
    state.update(f"{sorted(COMMANDS)} {len(os.sched_getaffinity(0))}".encode())  # x264 notes its number of threads
    for file in (*sources, native, Path(__file__), Path(content_module.__file__)):
        state.update(file.read_bytes())
    return state.hexdigest()
