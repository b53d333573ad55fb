"""The reproduction: every regime once and one page of them; nothing is done twice; what is in-sample says so."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from factories import TINY_PPO, TINY_TRAIN, make_store
from pages import text_of

from tipl.collecting.collection import collect
from tipl.forecasting.forecaster import Forecaster, source_to_judge
from tipl.forecasting.sources import split_trials
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training import train
from tipl.judging.evaluate_config import EvaluateConfig
from tipl.judging.evaluation import evaluate
from tipl.report import write_report
from tipl.reproduction import REGIMES, TASKS, TaskSettings, experiments, reproduce
from tipl.storing.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hasty_nowcaster")]

MODULE, PIPELINE = (sys.modules[f"tipl.{name}"] for name in ("reproduction", "pipeline"))
ENV = "InvertedPendulum-v4"
TASK = TaskSettings(
    num_trials=5,
    total_timesteps=15 * TINY_PPO.num_steps,
    ppo=TINY_PPO,
    train=TINY_TRAIN,
    evaluate=EvaluateConfig(num_episodes=1),
    shared_components=6,
)
PARTS = [f"{ENV}/{regime.name}/{part}" for regime in REGIMES for part in ("model", "evaluation", "report")]


@pytest.fixture(autouse=True)
def tiny_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    _make_tiny(monkeypatch)


def _make_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "TASKS", {ENV: TASK})


def _draw_nothing(folder: Path, **content: object) -> Path:
    folder.mkdir(exist_ok=True)
    page = folder / "report.html"
    page.write_text("drawn")
    return page


def _draw_no_joint(page: Path, parts: object, **content: object) -> Path:
    page.write_text("drawn")
    return page


@pytest.fixture
def quick_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIPELINE, "write_report", _draw_nothing)
    monkeypatch.setattr(MODULE, "write_reproduction", _draw_no_joint)


@pytest.fixture(scope="module")
def finished(
    hasty_nowcaster: None,
    render_nothing: Callable[[pytest.MonkeyPatch], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    def draw_two(folder: Path, **content: object) -> Path:
        """Draw the reports whose words are looked at."""
        if "shared-init" in folder.parts:
            return _draw_nothing(folder)
        with pytest.MonkeyPatch.context() as patch:
            render_nothing(patch)
            return write_report(folder, **content)

    output = tmp_path_factory.mktemp("reproduction") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        _make_tiny(monkeypatch)
        monkeypatch.setattr(PIPELINE, "write_report", draw_two)
        reproduce(output, progress=False)
    return output


def written(output: Path) -> dict[Path, int]:
    """When each file was written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- what comes out


def test_results_are_those_of_the_evaluations(finished: Path) -> None:
    joint = json.loads((finished / "results.json").read_text())
    assert (joint["format"], joint["version"]) == ("tipl-reproduction", 1)
    assert joint["machine"]["cores"] >= 1
    own = []
    for it in experiments(finished):
        document = json.loads(it.folder.results.read_text())
        assert joint["settings"][it.name] == document["settings"]
        own += [{"regime": it.regime.name, **row} for row in document["rows"]]
    assert joint["rows"] == own
    assert {row["regime"] for row in own} == {"independent", "shared-init", "in-sample"}
    assert {row["prefix"] for row in own} == {0.2, 0.4, 0.6, 0.8}
    stages = {f"{ENV}/{regime.name}/{stage}" for regime in REGIMES for stage in ("train", "evaluate", "report")}
    stages |= {f"{ENV}/{store}/collect" for store in ("independent", "shared-init")}
    assert set(joint["seconds"]) == stages
    assert min(joint["seconds"].values()) > 0


def test_every_regime_is_what_it_is_called(finished: Path) -> None:
    first = {name: Store.open(finished / ENV / f"{name}.zarr") for name in ("independent", "shared-init")}
    starts = {name: {store.trial(i).weights(0, 1).tobytes() for i in range(5)} for name, store in first.items()}
    assert (len(starts["independent"]), len(starts["shared-init"])) == (5, 1)
    settings = json.loads((finished / "results.json").read_text())["settings"]
    found = {name.split("/")[1]: it for name, it in settings.items()}
    assert {name: it["train"]["basis"] for name, it in found.items()} == {
        "independent": "prefix", "shared-init": "shared", "in-sample": "shared",
    }  # fmt: skip
    assert {name: it["collect"]["shared_init"] for name, it in found.items()} == {
        "independent": False, "shared-init": True, "in-sample": False,
    }  # fmt: skip
    for name in ("independent", "shared-init"):
        assert not found[name]["train"]["in_sample"]
        seen = {*found[name]["train_trials"], *found[name]["validation_trials"]}
        assert not seen & set(found[name]["heldout_trials"])
    assert found["in-sample"]["train"]["in_sample"]
    assert found["in-sample"]["train_trials"] == found["in-sample"]["heldout_trials"] == list(range(5))
    rows = json.loads((finished / "results.json").read_text())["rows"]  # in-sample, another run would be the run itself
    assert {it["regime"] for it in rows if it["predictor"] == "another_run"} == {"independent", "shared-init"}


def test_the_page_has_its_parts(finished: Path) -> None:
    source = (finished / "reproduction.html").read_text()
    assert not re.search(r"https?:|@import|<script|<link", source)
    text = text_of(source)
    for regime in REGIMES:
        assert regime.title in text
        assert regime.description in text
    assert text.count("lower than persistence's by") == 3
    assert text.count("This is a fit, not a forecast.") == text.count("Trials that were trained on") == 1
    assert source.count("<table") == 2 * 3
    assert source.count("<svg role") == 2 * 3 * 4
    links = [link for link in re.findall(r'href="([^"#]+)"', source) if link.endswith(".html")]
    assert links == [f"{ENV}/{regime.name}/report/report.html" for regime in REGIMES]
    pictures = sorted(path.name for path in finished.glob("*.png"))
    assert pictures == [f"{ENV}_repw.png", f"{ENV}_wpe.png"]
    for target in (*links, *pictures):
        assert target in source
        assert (finished / target).stat().st_size > 0
    for picture in pictures:
        assert (finished / picture).stat().st_size < 120_000


def test_only_the_report_in_sample_says_so(finished: Path) -> None:
    for it in (experiments(finished)[0], experiments(finished)[2]):
        text = text_of(it.folder.report.read_text())
        assert ("In-sample: the forecaster" in text) == ("5, of which 5 judged" in text) == it.regime.in_sample
        assert ("held-out" in text) == ("never saw" in text) == ("5, of which 1 held out" in text)
        assert ("held-out" in text) != it.regime.in_sample


# ---------------------------------------------------------------- going on


def test_a_second_call_does_nothing(
    finished: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = written(finished)
    assert run_tipl("reproduce", "--output", finished) == 0
    assert written(finished) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"report     {finished / 'reproduction.html'}"
    assert sum(line.startswith("model ") for line in lines) == 3
    tables = [line for line in lines if "relative weight error at the end of the path" in line]
    assert [line.rpartition(" over ")[2] for line in tables] == ["held-out trials"] * 2 + [
        "trials that it was trained on"
    ]


@pytest.mark.usefixtures("quick_pages")
def test_a_cut_off_goes_on(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    before = written(output)
    first, _, last = experiments(output)
    shutil.rmtree(first.folder.evaluation)
    for part in (last.folder.model, last.folder.evaluation):
        shutil.rmtree(part)
    partial = last.folder.path / ".model.partial" / "tb" / "events"
    partial.parent.mkdir(parents=True)
    partial.write_text("of a training that was cut off")
    for kept in (first.store, first.folder.model, experiments(output)[1].folder.evaluation, last.folder.report.parent):
        kept.with_name(f".{kept.name}.claim").touch()  # of a process that was killed just after publishing it
    said = []
    assert (
        reproduce(output, on_stage=lambda kind, path: said.append(kind), progress=False) == output / "reproduction.html"
    )
    assert said == ["store", "model", "results", "report"] * 3
    after = written(output)
    names = [{path for path in it if "tfevents" not in path.name} for it in (before, after)]
    assert names[0] == names[1]
    assert list(output.rglob(".*.claim")) == []
    for path in (first.folder.model / "config.json", experiments(output)[1].folder.results, first.store / "zarr.json"):
        assert after[path] == before[path]
    for path in (
        first.folder.results,
        first.folder.report,
        last.folder.model / "config.json",
        output / "reproduction.html",
    ):
        assert after[path] > before[path]
    same = [json.loads((it / "results.json").read_text())["rows"] for it in (finished, output)]
    assert same[0] == same[1]


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, run_tipl: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PIPELINE.training, "train", interrupted)
    assert run_tipl("reproduce", "--output", tmp_path / "out") == 130
    expected = f"tipl: interrupted. reproduce: what is finished is kept in {tmp_path / 'out'}; the same command goes on"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    assert (tmp_path / "out" / ENV / "independent.zarr").exists()


def test_what_is_of_other_settings_is_refused(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    other = TaskSettings(**{**vars(TASK), "train": TrainConfig(**{**vars(TINY_TRAIN), "steps": 6})})
    monkeypatch.setattr(MODULE, "TASKS", {ENV: other})
    with pytest.raises(ValueError, match=r"independent/model was trained with other settings"):
        reproduce(output, progress=False)
    monkeypatch.setattr(MODULE, "TASKS", {ENV: TaskSettings(**{**vars(TASK), "num_trials": 6})})
    with pytest.raises(ValueError, match=r"expected .*'num_trials': 6.* got .*'num_trials': 5"):
        reproduce(output, progress=False)
    _make_tiny(monkeypatch)
    shutil.rmtree(output / ENV / "independent" / "model")
    with pytest.raises(FileExistsError, match=r"the model of .*evaluation is gone"):
        reproduce(output, progress=False)
    shutil.rmtree(output / ENV / "independent.zarr")
    with pytest.raises(ValueError, match=rf"not in .*: give it again with --stores {ENV}=PATH"):
        reproduce(output, progress=False)


# ---------------------------------------------------------------- the user's own store


@pytest.mark.usefixtures("quick_pages")
def test_a_given_store_is_taken(tmp_path: Path, run_tipl: Callable[..., int]) -> None:
    given = tmp_path / "given.zarr"
    collect(given, env_id=ENV, num_trials=4, total_timesteps=15 * 64, seed=3, ppo=TINY_PPO, progress=False)
    assert run_tipl("reproduce", "--output", tmp_path / "out", "--stores", f"{ENV}={given}") == 0
    first, second, third = experiments(tmp_path / "out")
    assert not first.store.exists()
    for it, num_trials, seed in ((first, 4, 3), (second, 5, 0), (third, 4, 3)):
        settings = json.loads(it.folder.results.read_text())["settings"]
        assert (settings["num_trials"], settings["collect"]["seed"]) == (num_trials, seed)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hopper", f"at least 3 trials of {ENV} with initial weights of their own, got 5 of Hopper-v4"),
        ("few", f"at least 3 trials of {ENV} with initial weights of their own, got 2 of {ENV}"),
        ("shared", "got trials that start from the same weights"),
        ("short", "prefix 0.2 of a path of 8 checkpoints"),
        ("none", "there is no trajectory store"),
    ],
)
def test_a_wrong_store_is_refused(
    name: str, message: str, finished: Path, tmp_path: Path, run_tipl: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "store.zarr"
    if name == "shared":
        path = finished / ENV / "shared-init.zarr"
    elif name != "none":
        make_store(
            path, 2 if name == "few" else 5, 8 if name == "short" else 16, "Hopper-v4" if name == "hopper" else ENV
        )
    assert run_tipl("reproduce", "--output", tmp_path / "out", "--stores", f"{ENV}={path}") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [("store.zarr", "expects ENV=PATH"), ("Hopper-v4=store.zarr", f"must be of {ENV}, got 'Hopper-v4'")],
)
def test_a_wrong_option_is_refused(
    given: str, message: str, tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tipl("reproduce", "--output", tmp_path / "out", "--stores", given) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- in-sample


def test_in_sample_all_trials_teach_and_judge() -> None:
    everyone = list(range(20))
    split = split_trials(20, TrainConfig(in_sample=True))
    assert split.train == split.heldout == everyone
    assert set(split.validation) < set(everyone)
    assert len(split.validation) == len(split_trials(20, TrainConfig()).validation)


def test_max_trials_bounds_what_is_judged(tiny_store: Store, tmp_path: Path) -> None:
    config = TrainConfig(**{**vars(TINY_TRAIN), "in_sample": True, "basis": "shared"})
    forecaster = Forecaster.load(train(tiny_store, tmp_path / "model", config, progress=False))
    judge = EvaluateConfig(prefixes=(0.4,), horizons=(0.2,), num_episodes=1, max_trials=2)
    target = evaluate(tiny_store, forecaster, tmp_path / "evaluation", judge, progress=False)
    results = json.loads(target.read_text())
    assert results["settings"]["heldout_trials"] == [0, 1]
    assert results["settings"]["train_trials"] == list(range(6))
    assert {row["trial"] for row in results["rows"]} == {0, 1}
    with pytest.raises(ValueError, match="max_trials must be at least 1, got 0"):
        EvaluateConfig(max_trials=0)


def test_a_model_of_an_in_sample_fit_judges_other_stores_on_held_out_trials(tiny_store: Store, tmp_path: Path) -> None:
    config = TrainConfig(**{**vars(TINY_TRAIN), "in_sample": True})
    forecaster = Forecaster.load(train(tiny_store, tmp_path / "model", config, progress=False))
    other = make_store(tmp_path / "b.zarr", 6, 16, "Hopper-v4")
    split = source_to_judge(other, forecaster).split
    assert len(split.heldout) == 1
    assert not set(split.train) & set(split.heldout)


def test_the_tasks_are_as_large_as_the_issue_asks() -> None:
    assert list(TASKS) == ["InvertedPendulum-v4", "HalfCheetah-v4"]
    for task in TASKS.values():
        assert task.num_trials >= 48
        assert task.evaluate.prefixes == (0.2, 0.4, 0.6, 0.8)
        for regime in REGIMES:
            assert regime.train_config(task).in_sample == regime.in_sample
