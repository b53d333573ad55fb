"""The command line as a user meets it: every stage once, one line for every mistake, nothing lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from factories import TINY_EVALUATE, TINY_PPO, TINY_TRAIN, flags
from processes import run_python

import tipl.progress
from tipl import pipeline
from tipl.files.publishing import claimed, published
from tipl.files.sealed import load_json
from tipl.storing.store import Store

COLLECT = ["--total-timesteps", str(10 * TINY_PPO.num_steps), *flags(TINY_PPO, "ppo.")]
TRAIN, EVALUATE = flags(TINY_TRAIN), flags(TINY_EVALUATE)
RUN = ["--num-trials", "4", *COLLECT, *flags(TINY_TRAIN, "train."), *flags(TINY_EVALUATE, "evaluate.")]


@pytest.fixture(scope="module")
def finished_run(
    hasty_nowcaster: None,
    render_nothing: Callable[[pytest.MonkeyPatch], None],
    run_tipl: Callable[..., int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    output = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        render_nothing(patch)
        assert run_tipl("run", "--output", output, *RUN) == 0
    return output


def test_run_leaves_every_stage(finished_run: Path) -> None:
    assert Store.open(finished_run / "store.zarr").num_checkpoints == 11
    for name in ("model/model.safetensors", "evaluation/results.json", "report/report.html", "seconds.json"):
        assert (finished_run / name).stat().st_size > 0
    assert set(load_json(finished_run / "seconds.json", "test")) == {"collect", "train", "evaluate", "report"}


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_stages_one_by_one_give_what_run_gives(
    finished_run: Path, tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    store, model, evaluation = tmp_path / "s.zarr", tmp_path / "model", tmp_path / "evaluation"
    assert run_tipl("collect", "--output", store, "--num-trials", 4, *COLLECT) == 0
    assert run_tipl("train", "--store", store, "--output", model, *TRAIN) == 0
    judged = ["--store", store, "--model", model]
    assert run_tipl("evaluate", *judged, "--output", evaluation, *EVALUATE) == 0
    one, other = (json.loads((run / "evaluation/results.json").read_text()) for run in (finished_run, tmp_path))
    assert one["rows"] == other["rows"]
    assert "relative weight error at the end of the path" in capsys.readouterr().out

    report = ["report", "--store", store, "--evaluation", evaluation, "--output", tmp_path / "report"]
    assert run_tipl(*report) == 0
    assert run_tipl(*report) == 2
    assert "exists" in capsys.readouterr().err
    assert run_tipl(*report, "--overwrite") == 0

    fresh = ["--fresh", tmp_path / "fresh.zarr", "--output", tmp_path / "fresh"]
    assert run_tipl("evaluate", *judged, *fresh, *EVALUATE) == 2
    assert "there is no trajectory store" in capsys.readouterr().err
    assert run_tipl("collect", "--output", fresh[1], "--seed", 1, "--num-trials", 2, *COLLECT) == 0
    assert run_tipl("evaluate", *judged, *fresh, *EVALUATE) == 0
    assert {row["trial"] for row in json.loads((tmp_path / "fresh/results.json").read_text())["rows"]} == {0, 1}

    again = ["calibrate", *judged, "--output", tmp_path / "calibrated", "--num-trials", 2]
    assert run_tipl(*again) == 0
    assert (tmp_path / "calibrated/strides.safetensors").is_file()
    assert run_tipl(*again) == 2
    assert "exists already" in capsys.readouterr().err

    forecast = tmp_path / "forecast.safetensors"
    command = ["rollout", *judged, "--trial", 1, "--prefix", 0.5, "--output", forecast]
    assert run_tipl(*command) == 0
    arrays = safetensors.numpy.load_file(forecast)
    assert arrays["checkpoint"].tolist() == [6, 7, 8, 9, 10]
    assert arrays["weights"].shape == (5, Store.open(store).policy.num_params)
    assert run_tipl(*command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_resume_keeps_finished_stages(
    finished_run: Path,
    tmp_path: Path,
    run_tipl: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tipl.progress, "_hidden", False)  # which --quiet changes for the whole process
    output = tmp_path / "run"
    shutil.copytree(finished_run, output)
    shutil.rmtree(output / "evaluation")
    (output / "report" / "report.html").unlink()
    for stage in ("store.zarr", "model"):  # of a process that was killed just after publishing them
        (output / f".{stage}.claim").touch()
    model = (output / "model" / "model.safetensors").stat().st_mtime_ns
    command = ["run", "--output", output, *RUN]
    assert run_tipl(*command) == 0  # what was cut off goes on
    assert (output / "model" / "model.safetensors").stat().st_mtime_ns == model
    assert (output / "report" / "report.html").exists()
    assert list(output.glob(".*")) == []
    assert run_tipl(*command) == 2
    assert "choose another folder or pass --resume" in capsys.readouterr().err
    assert run_tipl("--quiet", *command, "--resume") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert re.search(r"\nseconds    collect \d+, train \d+, evaluate \d+, report \d+: \d+ in all\n$", said.out)
    for name, value in (("--num-trials", 5), ("--train.steps", 11)):
        other = command.copy()
        other[other.index(name) + 1] = value
        assert run_tipl(*other, "--resume") == 2
        began = f"was begun with {name[2:].replace('-', '_')} = {command[command.index(name) + 1]}, got {value}"
        assert began in capsys.readouterr().err
    (output / "run.json").unlink()  # of an older tipl, whose settings nobody knows but the store's
    command[command.index("--num-trials") + 1] = 5
    assert run_tipl(*command, "--resume") == 2
    assert "run: expected 11 checkpoints of 5 trials" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("unrendered")
def test_resume_goes_on_after_a_training_that_was_cut_off(
    finished_run: Path, tmp_path: Path, run_tipl: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished_run, output)
    for folder in ("model", "evaluation", "report"):
        shutil.rmtree(output / folder)
    whole = pipeline.training.train

    def cut_off(store: Store, folder: Path, *args: Any, **kwargs: Any) -> Path:
        with published(folder, "train", resumable=True) as aside:
            (aside / "tb").mkdir(parents=True)
            raise KeyboardInterrupt

    command = ["run", "--output", output, *RUN]
    monkeypatch.setattr(pipeline.training, "train", cut_off)
    assert run_tipl(*command) == 130
    assert not (output / "model").exists()
    monkeypatch.setattr(pipeline.training, "train", whole)
    assert run_tipl(*command) == 0
    assert (output / "report" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "--env-id", "HalfCheeta-v5", "--output", "OUT"], "HalfCheetah-v5"),
        (["collect", "--env-id", "FrozenLake-v1", "--output", "OUT"], "FrozenLake-v1"),
        (["run", "--env-id", "FrozenLake-v1", "--output", "OUT"], "the observations of FrozenLake-v1 must be a Box"),
        (["collect", "--num-trials", "0", "--output", "OUT"], "num_trials"),
        (["collect", "--output", "STORE"], "exists"),
        (
            ["collect", "--output", "."],
            "collect: output must end in the name of what is made, such as runs/new, got",
        ),
        (["collect", "--output", "FILE/y"], "/y cannot be made: "),
        (["collect", "--output", "OUT", "--record-critic", "."], "collect: record_critic must end in the name"),
        (["collect", "--output", "OUT/y", "--tensorboard", "FILE/y"], "run.json is a file"),
        (["train", "--store", "STORE", "--output", "/"], "train: output must end in the name of what is made"),
        (["train", "--store", "STORE", "--output", "FILE/y", "--heldout-fraction", "0"], "run.json is a file, not a"),
        (["store", "info", "STORE", "--plot", "FILE/y.svg"], "run.json is a file, not a folder"),
        (["report", "--store", "STORE", "--evaluation", "NONE", "--output", ".", "--overwrite"], "report: output must"),
        (["run", "--output", "OUT", "--total-timesteps", "2048"], "prefix 0.2 of a path of 2 checkpoints"),
        (["train", "--store", "NONE", "--output", "OUT"], "there is no trajectory store"),
        (["evaluate", "--store", "STORE", "--model", "NONE", "--output", "OUT"], "is no model folder"),
        (["evaluate", "--store", "STORE", "--model", "MODEL", "--fresh", "STORE", "--output", "OUT"], "other seeds"),
        (["rollout", "--model", "MODEL", "--store", "STORE", "--trial", "9", "--output", "OUT"], "trial"),
        (
            ["rollout", "--model", "MODEL", "--store", "STORE", "--prefix", "0.1", "--output", "OUT"],
            "rollout: prefix 0.1 of a path of 11 checkpoints must hold at least 4, got 2: choose a larger prefix",
        ),
        (
            ["rollout", "--model", "MODEL", "--store", "STORE", "--prefix", "1", "--output", "OUT"],
            "rollout: prefix 1 of a path of 11 checkpoints must leave room for a forecast: it holds 11",
        ),
        (
            ["rollout", "--model", "MODEL", "--store", "STORE", "--horizon", "8", "--output", "OUT"],
            "prefix 0.4 of a path of 11 checkpoints: horizon must lie in [1, 6], because the prefix holds 5",
        ),
        (["report", "--store", "STORE", "--evaluation", "NONE", "--output", "OUT"], "does not exist"),
        (["import", "NONE", "--output", "OUT"], "there is no"),
        (["import", "MODEL", "--output", "OUT", "--pattern", "*.json"], "holds no checkpoint"),
        (["import", "MODEL", "--output", "STORE"], "exists already"),
        (["export", "STORE", "--like", "NONE", "--output", "OUT"], "there is no checkpoint file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, finished_run: Path, tmp_path: Path, run_tipl: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {
        "OUT": tmp_path / "out", "NONE": tmp_path / "none", "STORE": finished_run / "store.zarr",
        "MODEL": finished_run / "model", "FILE": finished_run / "run.json",
    }  # fmt: skip
    for name, place in places.items():
        arguments = [str(place) + it.removeprefix(name) if it.startswith(name) else it for it in arguments]
    assert run_tipl(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tipl: error: ")
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_collection_keeps_what_was_committed(tmp_path: Path) -> None:
    output = tmp_path / "store.zarr"
    command = [sys.executable, "-c", "from tipl.cli import main; main()", "collect", "--output", str(output)]
    command += ["--num-trials", "3", "--total-timesteps", "64000000", *flags(TINY_PPO, "ppo.")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (
            (output / "zarr.json").exists() and Store.open(output).num_checkpoints > 3
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith("tipl: interrupted.")
    assert "Traceback" not in errors
    store = Store.open(output)
    assert store.num_checkpoints > 3
    for i in range(3):
        assert store.trial(i).weights().shape[0] == store.trial(i).num_checkpoints


@pytest.mark.parametrize("module", ["numpy", "tyro", "tipl.progress", "tipl.cli.commands", "tipl.files.locations"])
def test_ctrl_c_before_all_is_imported_is_one_line(module: str) -> None:
    code = (
        "import signal, sys; from tipl.cli import main\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.argv = ['tipl', 'verify', '.']; main()"
    )
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "tipl: interrupted.\n")


def test_help_teaches(run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tipl("--help") == 0
    text = capsys.readouterr().out
    for name in (
        "collect",
        "train",
        "rollout",
        "import",
        "export",
        "evaluate",
        "report",
        "run",
        "demo",
        "reproduce",
        "verify",
        "Example",
    ):
        assert name in text


def test_help_loads_no_slow_library() -> None:
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            "import atexit, sys; from tipl.cli import main\n"
            "slow = {'torch', 'mujoco', 'matplotlib', 'zarr', 'onnx', 'imageio_ffmpeg'}\n"
            "atexit.register(lambda: print('loaded', *(slow & set(sys.modules))))\n"
            "main()",
            "collect",
            "--help",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--num-trials" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "loaded"


@pytest.mark.slow
def test_a_store_is_drawn_and_its_curves_go_where_they_are_asked_for(
    tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    store, curves, plot = tmp_path / "s.zarr", tmp_path / "curves", tmp_path / "plot.svg"
    collect = ["collect", "--output", store, "--num-trials", 2, *COLLECT]
    collect += ["--ppo.optimizer", "sgd", "--ppo.no-learn-log-std", "--ppo.log-std-init", "-0.5"]
    assert run_tipl(*collect, "--tensorboard", curves) == 0
    assert {path.name for path in curves.iterdir()} == {"trial_0000", "trial_0001", "mean"}
    assert run_tipl("store", "info", store, "--plot", plot) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[-1].split() == ["plot", str(plot)]
    assert {"ppo.optimizer = sgd", "ppo.learn_log_std = False", "ppo.log_std_init = -0.5"} <= set(lines)
    assert plot.read_bytes().startswith(b"<?xml")
    assert run_tipl("store", "info", store, "--plot", plot) == 2
    assert f"plot_store: {plot} exists" in capsys.readouterr().err
    assert run_tipl("store", "info", store, "--plot", plot, "--overwrite") == 0
    collect[2] = tmp_path / "other.zarr"
    assert run_tipl(*collect, "--tensorboard", curves) == 2
    assert "holds the curves of another collection" in capsys.readouterr().err
    assert not (tmp_path / "other.zarr").exists()


@pytest.mark.parametrize("size", [0, 100_000])
def test_output_that_nobody_reads_any_more_is_no_error(size: int) -> None:
    """As behind `| head`: a text that waits in the buffer until the end, and one that does not fit into it."""
    code = (
        "import sys; from tipl.cli import main, store_commands; sys.argv = ['tipl', 'verify', '.']; "
        f"store_commands.Verify.run = lambda _: print({size} * 'x', 'x'); main()"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_verify_finds_what_is_damaged_anywhere_in_a_run(
    finished_run: Path, tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    assert run_tipl("verify", run) == 0
    assert capsys.readouterr().out.startswith(f"ok         {run}: ")
    damaged = ["model/centre.safetensors", "evaluation/results.json", "report/report.html", "seconds.json", "run.json"]
    for name in damaged:
        data = bytearray((run / name).read_bytes())
        data[len(data) // 2] ^= 1
        (run / name).write_bytes(data)
    assert run_tipl("verify", run) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"damaged    {run}: {len(damaged)} problems"
    for name in damaged:
        assert any(str(run / name) in line for line in lines[:-1])
    for command in (
        ["evaluate", "--store", run / "store.zarr", "--model", run / "model", "--output", tmp_path / "e"],
        ["report", "--store", run / "store.zarr", "--evaluation", run / "evaluation", "--output", tmp_path / "r"],
    ):
        assert run_tipl(*command) == 2
        assert "is damaged or of another folder" in capsys.readouterr().err


def test_a_folder_of_an_older_tipl_is_read_with_one_line_of_warning(
    finished_run: Path, tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(finished_run / "model", tmp_path / "model"))
    (model / "manifest.json").unlink()
    for path in model.glob("*.safetensors"):
        arrays = safetensors.numpy.load_file(path)
        sizes = {"hidden": str(TINY_TRAIN.d_refine), "max_len": "11"} if path.stem == "refiner" else None
        safetensors.numpy.save_file(arrays, path, sizes)
    command = ["rollout", "--store", finished_run / "store.zarr", "--model", model, "--output", tmp_path / "f"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run_tipl(*command) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"tipl: warning: {model} has no checksum (an older tipl wrote it): damage in it cannot be found"]


def test_two_commands_that_make_one_output_do_not_meet(
    finished_run: Path, tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rollout", "--store", finished_run / "store.zarr", "--output", tmp_path / "f"]
    with claimed(tmp_path / "f", "train"):
        assert run_tipl(*command) == 2
    assert f"is being written by process {os.getpid()} on" in capsys.readouterr().err


@pytest.mark.slow
def test_urls_and_odd_names(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_tipl: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["rollout", "--store", f"file://{finished_run}/store.zarr", "--output"]
    assert run_tipl(*command, f"file://{tmp_path}/f.safetensors") == 0
    assert (tmp_path / "f.safetensors").is_file()
    assert run_tipl(*command, "s3://bucket/f") == 2
    assert "must be a local path" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)  # where a URL that is taken for a path would leave a folder
    plot = ["store", "info", finished_run / "store.zarr", "--plot"]
    assert run_tipl(*plot, f"file://{tmp_path}/plot.svg") == 0
    assert run_tipl(*plot, "memory://plot.svg") == 2
    assert "plot must be a local path" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.safetensors", "plot.svg"]
    assert run_tipl("verify", tmp_path / "no\n\x1b[31mname") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "\\x1b[31mname" in error
