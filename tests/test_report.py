"""The report: its figures, its numbers against slow ones, what it refuses, and that it needs nothing but itself."""

import base64
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import scipy.stats
from factories import make_store
from hypothesis import given
from hypothesis import strategies as st
from pages import Page
from synthetic_run import PREFIXES, Run, at_end

from tipl.report.document import FIGURES
from tipl.report.intervals import Estimate
from tipl.report.page import MINUS, TIMES, fmt, fmt_interval, fmt_percent, fmt_seconds
from tipl.report.plots import NBSP, THEME, Plot
from tipl.report.results import predictor_info

pytestmark = pytest.mark.slow  # they share a run whose report takes a while to draw


def numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"-?[\d,]*\.?\d+", text.replace(MINUS, "-"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("run"), num_trials=20, num_heldout=9)
    run.report()
    return run


@pytest.fixture(scope="module")
def page(run: Run) -> Page:
    return Page((run.output / "report.html").read_text())


def tiny_run(folder: Path) -> Run:
    """A run of few figures, to change and damage."""
    run = Run(folder, prefixes=(0.4,))
    run.leave_out("coordinates.safetensors")
    return run


@pytest.fixture
def tiny(tmp_path: Path, unrendered: None) -> Run:
    return tiny_run(tmp_path)


@pytest.fixture
def rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A tiny run whose page has its figures; the files beside it are empty."""
    monkeypatch.setattr(Plot, "png", lambda *_: b"")
    return tiny_run(tmp_path)


# ---------------------------------------------------------------- the page and its figures


def test_every_figure_is_a_picture_beside_the_page(run: Run) -> None:
    assert {path.name for path in run.output.iterdir()} == {
        "report.html",
        "manifest.json",
        *(f"{name}.png" for name in FIGURES),
    }
    for name in FIGURES:
        data = (run.output / f"{name}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = np.frombuffer(data[16:24], ">u4")
        assert width >= 600
        assert height >= 400
        assert len(data) > 10_000, f"{name}.png is all but empty"


def test_the_page_needs_nothing_but_itself(run: Run, page: Page) -> None:
    source = (run.output / "report.html").read_text()
    assert not re.search(r"https?:|@import|<script|<link|javascript:", source)
    targets = [attrs[key] for _, attrs in page.elements for key in ("src", "href", "data") if key in attrs]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for target in targets:
        assert target is not None
        assert target[1:] in ids if target.startswith("#") else (run.output / target).is_file()
    for reference in re.findall(r"url\(([^)]*)\)", source):
        assert reference[0] == "#"
        assert reference[1:] in ids


def test_figures_take_all_their_colours_from_the_theme(run: Run) -> None:
    body = (run.output / "report.html").read_text().split("</style>")[1]
    assert body.count("<svg") > 20
    assert not re.search(r"#[0-9a-fA-F]{6}\b", body)
    assert set(re.findall(r"var\(--([\w-]+)\)", body)) <= set(THEME)
    light_colors = [light for light, _ in THEME.values()]
    assert len(set(light_colors)) == len(light_colors)


@pytest.mark.slow
def test_the_same_results_give_the_same_page(rendered: Run) -> None:
    rc_params = dict(matplotlib.rcParams)
    first = rendered.report().read_bytes()
    assert rendered.report(overwrite=True).read_bytes() == first
    assert dict(matplotlib.rcParams) == rc_params


def test_what_was_run_stands_at_the_top(page: Page) -> None:
    text = page.text.replace(NBSP, " ")
    for fact in (
        "InvertedPendulum-v5", "20, of which 9 held out", "31 checkpoints, 61,440 env steps", "370 weights",
        "348,000 parameters", "16 episodes", "collect 61 s, train 95 s, evaluate 17 s", "A server of today, 2 cores",
    ):  # fmt: skip
        assert fact in text


# ---------------------------------------------------------------- its numbers


def slow_mean_and_interval(values: list[float]) -> tuple[float, float, float]:
    """The obvious bootstrap, one resample after the other, with other random numbers."""
    rng = np.random.default_rng(99)
    means = sorted(float(np.mean(rng.choice(values, len(values)))) for _ in range(2000))
    return float(np.mean(values)), means[49], means[1949]


COLUMNS = ["tipl", "persistence", "linear", "rank1", "mean_path", "basis_floor", "return_floor"]


@pytest.mark.parametrize(
    ("place", "measure", "columns"),
    [
        (0, "wpe_relative", COLUMNS[:-1]),
        (2, "wpe", COLUMNS[:-1]),
        (3, "repw", COLUMNS),
        (7, "action_difference", COLUMNS[:-1]),
    ],
)
def test_error_tables_equal_a_slow_computation(
    run: Run, page: Page, place: int, measure: str, columns: list[str]
) -> None:
    head, *body = page.tables[place]
    assert head == ["prefix", *(predictor_info(name).label for name in columns)]
    assert [row[0].split("|")[0].replace(NBSP, "") for row in body] == ["20%", "40%", "60%", "80%"]
    for prefix, row in zip(PREFIXES, body, strict=True):
        for name, cell in zip(columns, row[1:], strict=True):
            mean, low, high = slow_mean_and_interval(at_end(run.rows, prefix, name, measure))
            shown, interval = cell.split("|")
            assert shown == fmt(mean)
            if measure != "wpe":  # its powers of ten are read by eye
                assert numbers(interval) == pytest.approx([low, high], abs=0.12 * (high - low) + 0.01 * mean)


def test_divergence_table_holds_interquartile_means(run: Run, page: Page) -> None:
    for prefix, row in zip(PREFIXES, page.tables[8][1:], strict=True):
        for name, cell in zip(COLUMNS[:-1], row[1:], strict=True):
            middle = scipy.stats.trim_mean(np.repeat(at_end(run.rows, prefix, name, "kl"), 4), 0.25)
            assert cell.split("|")[0] == fmt(middle)


def test_ranking_equals_a_slow_computation(run: Run, page: Page) -> None:
    head, *body = page.tables[1]
    assert head == ["predictor", "relative error", "mean rank"]
    names = COLUMNS[:5]
    errors = np.array([[at_end(run.rows, f, name, "wpe_relative") for f in PREFIXES] for name in names])  # (P, F, n)
    ranks = scipy.stats.rankdata(errors, axis=0).mean((1, 2))
    order = np.argsort(errors.mean((1, 2)))
    for place, (i, row) in enumerate(zip(order, body, strict=True), 1):
        assert row[0] == f"{place}. {predictor_info(names[i]).label}"
        assert row[1].split("|")[0] == fmt(errors[i].mean())
        assert row[2].split("|")[0] == fmt(ranks[i])


def test_share_tables_equal_a_slow_computation(run: Run, page: Page) -> None:
    names = ["tipl", "linear", "rank1", "mean_path", "basis_floor"]
    results = run.read()
    every = [(f, horizon) for f in PREFIXES for horizon in results.horizons[f].tolist()]
    for place, cells in ((5, [(f, int(results.horizons[f][-1])) for f in PREFIXES]), (6, every)):
        head, *body = page.tables[place]
        assert head == ["prefix", "trials that gain", *(predictor_info(name).label for name in names)]
        for (prefix, horizon), row in zip(cells, body, strict=True):
            noise = results.at("repw", prefix, "return_floor", horizon).mean()
            start = results.at("return_predicted", prefix, "persistence", horizon)
            future = results.at("return_true", prefix, "tipl", horizon) - start
            assert row[0].split("|")[1].replace(NBSP, " ") == f"{horizon} ahead"
            assert row[1] == f"{(future > noise).sum()} of 9"
            for name, cell in zip(names, row[2:], strict=True):
                shares = ((results.at("return_predicted", prefix, name, horizon) - start) / future)[future > noise]
                middle = scipy.stats.trim_mean(np.repeat(shares, 4), 0.25)
                shown, interval = cell.split("|")
                assert shown == fmt_percent(middle)
                if interval:
                    low, high = numbers(interval)
                    assert low <= round(100 * middle) <= high


def test_diversity_stands_beside_the_truths(run: Run, page: Page) -> None:
    head, *body = next(table for table in page.tables if "true policies" in table[0])
    assert head[:3] == ["prefix", "true policies", "TIPL"]
    for prefix, row in zip(PREFIXES, body, strict=True):
        entries = [entry for entry in run.results["diversity"] if entry["prefix"] == prefix]
        last = max(entry["horizon"] for entry in entries)
        of = {entry["predictor"]: entry for entry in entries if entry["horizon"] == last}
        for name, cell in zip(["truth", *COLUMNS[:-1]], row[1:], strict=True):
            assert cell == f"{fmt(of[name]['action_variance'])}|return ± {fmt(of[name]['return_std'])}"


def test_gain_table_equals_a_slow_computation(run: Run, page: Page) -> None:
    head, *body = page.tables[4]
    names = ["tipl", "linear", "rank1", "mean_path", "basis_floor"]
    assert head == ["prefix", "future gain", *(predictor_info(name).label for name in names)]
    for prefix, row in zip(PREFIXES, body, strict=True):
        start = np.array(at_end(run.rows, prefix, "persistence", "return_predicted"))
        future = np.array(at_end(run.rows, prefix, "persistence", "return_true")) - start
        assert row[1].split("|")[0] == fmt(future.mean())
        for name, cell in zip(names, row[2:], strict=True):
            gained = np.array(at_end(run.rows, prefix, name, "return_predicted")) - start
            assert cell.split("|")[0] == fmt_percent(gained.sum() / future.sum())


def test_best_predictor_is_marked_and_a_floor_never(run: Run, page: Page) -> None:
    source = (run.output / "report.html").read_text()
    best = re.findall(r'<td class="([^"]*best[^"]*)"', source)
    every_horizon = len(page.tables[6]) - 1  # rows of the one table with more than the end of the path
    assert len(best) == 7 * 4 + every_horizon  # seven tables of four prefixes, no ties
    assert set(best) == {"best"}  # never "best quiet"
    for row in page.tables[0][1:]:
        means = [numbers(cell.split("|")[0])[0] for cell in row[1:6]]
        assert means.index(min(means)) == 0


# ---------------------------------------------------------------- what else may come


def test_one_trial_no_coordinates_no_training_and_a_name_that_is_markup(tmp_path: Path, unrendered: None) -> None:
    env_id = "<script>alert('$x_1$')</script>"
    run = Run(tmp_path, num_trials=2, num_heldout=1, prefixes=(0.4,), env_id=env_id)
    run.leave_out("coordinates.safetensors")
    source = run.report(training=None).read_text()
    assert "<script" not in source
    assert "&lt;script&gt;" in source
    page = Page(source)
    assert env_id in page.text
    assert "This is one held-out trial." in page.text
    assert "The evaluation left no coordinates" in page.text
    assert not (run.output / "coordinates.png").exists()
    assert "[" not in "".join(cell for row in page.tables[0] for cell in row)


@pytest.mark.slow
def test_missing_returns_and_unknown_predictors(rendered: Run) -> None:
    for row in list(rendered.rows):
        row["return_true"] = row["return_predicted"] = row["repw"] = None if row["trial"] % 2 else math.nan
        if row["predictor"] == "linear":
            rendered.rows.append(row | {"predictor": "kalman <b> $x_1$", "wpe_relative": 50 * row["wpe_relative"]})
    rendered.write()
    page = Page(rendered.report().read_text())
    assert "These results hold no returns." in page.text
    assert "Nothing can be said about the return" in page.text
    assert "kalman <b> $x_1$" in page.tables[0][0]
    assert page.tables[0][0][-1] == "basis floor"
    assert "off the scale" in page.text


def test_returns_of_some_predictors_only(tmp_path: Path, unrendered: None) -> None:
    run = Run(tmp_path, prefixes=(0.2, 0.6))
    for row in run.rows:
        if row["predictor"] == "tipl" or row["prefix"] == 0.6:
            row["return_predicted"] = row["repw"] = None
    run.write()
    page = Page(run.report(training=None).read_text())
    gain = page.tables[4]
    assert gain[1][2] == "\N{EN DASH}"
    assert gain[2][2] == "not measured"


def test_returns_of_floors_only(tiny: Run) -> None:
    for row in tiny.rows:
        if row["predictor"] != "basis_floor":
            row["return_true"] = row["return_predicted"] = row["repw"] = None
    tiny.write()
    assert "Returns, true against forecast" in Page(tiny.report(training=None).read_text()).text


def test_results_of_an_earlier_version_have_no_actions(tiny: Run) -> None:
    del tiny.results["diversity"]
    for row in tiny.rows:
        del row["action_difference"], row["kl"]
    tiny.write()
    page = Page(tiny.report(training=None).read_text())
    assert "These results hold no comparison of actions." in page.text
    assert "Share of the future gain (IQM) at every horizon" in page.text
    left_out = {"action_difference.png", "kl.png", "action_variance.png"}
    assert not left_out & {path.name for path in tiny.output.iterdir()}


def test_results_without_confidence_memorisation_and_causality(tiny: Run) -> None:
    del tiny.results["memorisation"], tiny.results["causality"]
    for row in tiny.rows:
        row.pop("confidence", None)
    tiny.write()
    page = Page(tiny.report(training=None).read_text())
    assert "These results hold no confidence" in page.text
    assert "Is it the average path?" in page.text
    assert "Does it copy training paths?" not in page.text
    assert "Does it see the future?" not in page.text
    assert not {"reliability.png", "memorisation.png"} & {path.name for path in tiny.output.iterdir()}


def test_one_held_out_trial_has_no_diversity_to_show(tiny: Run) -> None:
    for entry in tiny.results["diversity"]:
        entry["action_variance"] = entry["return_std"] = None
    trial = tiny.heldout[0]
    for name in ("rows", "memorisation"):
        tiny.results[name] = [entry for entry in tiny.results[name] if entry["trial"] == trial]
    tiny.write()
    page = Page(tiny.report(training=None).read_text())
    assert "Do the forecast policies collapse to one?" not in page.text
    assert "Action difference" in page.text


def test_results_without_tipl(tiny: Run) -> None:
    tiny.results["rows"] = [row for row in tiny.rows if row["predictor"] != "tipl"]
    tiny.write()
    assert "These results hold no forecast of TIPL." in Page(tiny.report(training=None).read_text()).text


# ---------------------------------------------------------------- what is refused


def test_an_existing_report_is_kept(tiny: Run) -> None:
    tiny.output.mkdir()
    kept, stale = tiny.output / "report.html", tiny.output / "coordinates.png"
    kept.write_text("mine")
    with pytest.raises(FileExistsError, match=r"report exists and is not empty; choose another folder"):
        tiny.report()
    assert kept.read_text() == "mine"
    stale.write_text("of an earlier report")
    tiny.report(overwrite=True)
    assert "Forecasting" in kept.read_text()
    assert not stale.exists()


def test_output_must_be_a_folder(tiny: Run) -> None:
    tiny.output.write_text("mine")
    with pytest.raises(FileExistsError, match=r"output must be a folder, but .*report is a file"):
        tiny.report()


def test_nothing_is_written_of_damaged_results(tiny: Run) -> None:
    tiny.rows[5].pop("wpe")
    tiny.write()
    with pytest.raises(RuntimeError, match=r"results\.json is damaged or not of tipl: rows\[5\] lacks 'wpe'"):
        tiny.report()
    assert not tiny.output.exists()


def test_videos_stand_in_the_page(tiny: Run, tmp_path: Path) -> None:
    films = [tmp_path / "trial3.mp4", tmp_path / "trial<4>.mp4"]
    for i, film in enumerate(films):
        film.write_bytes(b"\0\0\0\x18ftypisom" + bytes([i]) * 1000)
    tiny.report(videos=films)
    page = Page((tiny.output / "report.html").read_text())
    sources = [attrs["src"] or "" for name, attrs in page.elements if name == "video"]
    for film, source in zip(films, sources, strict=True):
        assert base64.b64decode(source.removeprefix("data:video/mp4;base64,")) == film.read_bytes()
        assert film.name in page.text


def test_what_is_no_video_of_a_page_is_refused(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = tmp_path / "film.mp4"
    with pytest.raises(FileNotFoundError, match=r"film\.mp4"):
        tiny.report(videos=[film])
    film.write_bytes(b"\x89PNG, not a film")
    with pytest.raises(ValueError, match=r"videos must be \.mp4 files, and .*film\.mp4 is none"):
        tiny.report(videos=[film])
    film.write_bytes(b"\0\0\0\x18ftypisom")
    monkeypatch.setattr("tipl.report.document.MAX_VIDEO_BYTES", 20)
    other = film.with_name("other.mp4")
    other.write_bytes(film.read_bytes())
    with pytest.raises(ValueError, match=r"the videos have 24 bytes, and a page has at most 20"):
        tiny.report(videos=[film, other])
    assert not tiny.output.exists()


def test_files_that_are_not_there(tiny: Run) -> None:
    with pytest.raises(FileNotFoundError, match=r"training\.json does not exist; `tipl train` writes it"):
        tiny.report(training=tiny.output / "training.json")
    with pytest.raises(FileNotFoundError, match=r"results\.json does not exist; `tipl evaluate` writes it"):
        tiny.report(evaluation=tiny.output)


def test_results_of_another_store(tiny: Run, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other.zarr", 6, 5, "Ant-v5")
    with pytest.raises(ValueError, match="is of env_id 'InvertedPendulum-v5', the store of 'Ant-v5'"):
        tiny.report(store=other)
    tinyer = make_store(tmp_path / "tinyer.zarr", 2, 5)
    with pytest.raises(ValueError, match="judges trial 5, the store has 2 trials"):
        tiny.report(store=tinyer)


# ---------------------------------------------------------------- parts


@given(st.floats(-1e12, 1e12, allow_nan=False))
def test_numbers_keep_three_digits(value: float) -> None:
    text = fmt(value).replace(MINUS, "-").replace(",", "").replace(NBSP, "")
    mantissa, _, exponent = text.partition(f"{TIMES}10")
    shown = float(mantissa) * 10.0 ** int(exponent.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)
    assert shown == pytest.approx(value, rel=0.0051)


def test_formats() -> None:
    shown = [fmt(v).replace(NBSP, " ") for v in (1234.5, 99.96, -12.34, 1.5, 0.26851, 0.0123, 3e-5, 0.0, math.nan)]
    times, dash = f"3.00 {TIMES} 10⁻⁵", "\N{EN DASH}"
    assert shown == ["1,234", "100", f"{MINUS}12.3", "1.50", "0.269", "0.0123", times, "0", dash]
    assert [fmt_percent(v).replace(NBSP, " ") for v in (0.243, -0.111, -0.001)] == ["24 %", f"{MINUS}11 %", "0 %"]
    assert fmt_interval(Estimate(0.5, -0.11, 1.2), as_percent=True).replace(NBSP, " ") == f"[{MINUS}11, 120 %]"
    assert fmt_interval(Estimate(0.5)) == ""
    assert [fmt_seconds(v).replace(NBSP, " ") for v in (0.52, 61.2, 200, 7300)] == [
        "0.52 s",
        "61 s",
        "3 min 20 s",
        "2 h 1 min",
    ]
