"""The picture of a forecast: its plane against NumPy's SVD, what it says, the file, and `tipl rollout --plot`."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from factories import SPEC, bare_forecaster, make_store, random_path

import tipl
from tipl.cli.trial_forecast import TrialForecast
from tipl.forecasting.forecaster import check_and_forecast
from tipl.judging.predictors import Linear, MeanPath, canonical_coordinates
from tipl.judging.training_path import TrainingPath
from tipl.storing.store import Store
from tipl.subspace.plane import Plane
from tipl.subspace.prefix import Prefix

PATH = random_path(30, 200, 0)
OBSERVED, TRUTH = PATH[:12], PATH[12:]
FORECAST = (TRUTH + 0.05 * random_path(18, 200, 1)).astype(np.float32)


def text_of(svg: Path) -> str:
    """All words of a picture, in the order of the file."""
    lines = re.findall(r"<text[^>]*>(.*?)</text>", svg.read_text(), re.DOTALL)
    return " ".join(" ".join(re.sub(r"<[^>]*>", " ", line).split()) for line in lines).replace(
        "\N{NO-BREAK SPACE}", " "
    )


# ---------------------------------------------------------------- the plane


def test_a_plane_is_of_the_two_first_singular_directions() -> None:
    displacements = (PATH - PATH[0]).astype(np.float64)
    left, singular, right = np.linalg.svd(displacements, full_matrices=False)
    energy = singular**2 / (singular**2).sum()
    plane = Plane.of(PATH)
    np.testing.assert_allclose(plane.shares, energy[:2], rtol=1e-6)
    assert plane.hidden == pytest.approx(energy[2:].sum(), rel=1e-5)
    scale = np.linalg.norm(displacements[-1])
    expected = (left * singular)[:, :2] / scale
    points = plane.points(PATH)
    np.testing.assert_allclose(abs(points), abs(expected), atol=1e-5)
    np.testing.assert_allclose(points[0], 0.0, atol=1e-6)
    everywhere, seen = plane.distances(FORECAST[-1], PATH[-1])
    off = FORECAST[-1].astype(np.float64) - PATH[-1]
    assert everywhere == pytest.approx(np.linalg.norm(off) / scale, rel=1e-6)
    assert seen == pytest.approx(np.linalg.norm(right[:2] @ off) / scale, rel=1e-4)


def test_a_path_in_a_plane_hides_nothing_and_what_leaves_it_is_not_seen() -> None:
    flat = np.zeros((10, 5), np.float32)
    flat[:, 0], flat[:, 1] = np.arange(10), np.arange(10) ** 2
    plane = Plane.of(flat)
    assert plane.hidden == pytest.approx(0.0, abs=1e-9)
    away = flat[-1].copy()
    away[4] += 3.0
    everywhere, seen = plane.distances(away, flat[-1])
    assert everywhere == pytest.approx(3.0 / np.linalg.norm(flat[-1]))
    assert seen == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------- the picture


@pytest.mark.slow
def test_the_picture_says_what_it_shows_and_what_it_hides(tmp_path: Path) -> None:
    for name in ("one", "two"):
        rivals = {"mean_path": FORECAST[:5], "a rival of mine": FORECAST}
        plot = tmp_path / f"{name}.svg"
        tipl.plot_forecast(plot, OBSERVED, FORECAST, truth=TRUTH, rivals=rivals, title="a run, 40 % seen")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    text, plane = text_of(tmp_path / "one.svg"), Plane.of(PATH)
    assert "a run, 40 % seen" in text
    for label in ("observed", "true path", "TIPL", "persistence", "mean path", "a rival of mine"):
        assert label in text
    for direction, share in enumerate(plane.shares, 1):
        assert f"direction {direction}: {100 * round(share, 4):.3g} % of the squared displacement" in text
    hidden = f"{100 * round(plane.hidden, 4):.3g} %"
    assert f"Outside this plane: {hidden} of the squared displacement of the true path" in text
    everywhere, seen = plane.distances(FORECAST[-1], TRUTH[-1])
    assert "the truth 18 checkpoints ahead, in all weights (in this plane)" in text
    assert text.count(f"{everywhere:.2f} ({seen:.2f})") == 2  # TIPL's and that of the rival with the same forecast
    assert "mean path 0" not in text  # it does not go so far
    last = plane.distances(OBSERVED[-1], TRUTH[-1])
    assert f"persistence {last[0]:.2f} ({last[1]:.2f})" in text


def test_without_a_truth_the_plane_is_that_of_the_forecast(tmp_path: Path) -> None:
    tipl.plot_forecast(tmp_path / "plot.svg", OBSERVED, FORECAST)
    text, plane = text_of(tmp_path / "plot.svg"), Plane.of(np.concatenate([OBSERVED, FORECAST]))
    assert f"direction 1: {100 * round(plane.shares[0], 4):.3g} %" in text
    assert "What really came is not known." in text
    assert "true path" not in text
    assert "linear" in text


def test_a_png_is_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    tipl.plot_forecast(tmp_path / "new" / "plot.png", OBSERVED, FORECAST, truth=TRUTH[:3], rivals={})
    with Image.open(tmp_path / "new" / "plot.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    assert [it.name for it in (tmp_path / "new").iterdir()] == ["plot.png"]


def test_a_picture_is_never_overwritten_unasked(tmp_path: Path, unrendered: None) -> None:
    plot = tmp_path / "plot.svg"
    plot.write_text("mine")
    with pytest.raises(FileExistsError, match=r"plot_forecast: .*plot\.svg exists"):
        tipl.plot_forecast(plot, OBSERVED, FORECAST)
    assert plot.read_text() == "mine"
    tipl.plot_forecast(plot, OBSERVED, FORECAST, overwrite=True)
    assert plot.read_text() != "mine"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"path": "plot.pdf"}, ValueError, r"path must end in \.svg or \.png, got plot\.pdf"),
        ({"observed": OBSERVED[:3]}, ValueError, r"observed must have shape \(m, p\) with m >= 4, got \(3, 200\)"),
        ({"observed": OBSERVED.astype(float)}, TypeError, "observed must be float32, got float64"),
        ({"forecast": FORECAST[:, :7]}, ValueError, r"forecast must have shape \(m, 200\) with m >= 1, got \(18, 7\)"),
        ({"forecast": FORECAST[0]}, ValueError, r"forecast must have shape \(m, 200\) with m >= 1, got \(200,\)"),
        ({"truth": TRUTH[:0]}, ValueError, r"truth must have shape \(m, 200\) with m >= 1, got \(0, 200\)"),
        ({"truth": TRUTH * np.float32("nan")}, ValueError, "truth must be finite, got NaN or Inf"),
        ({"rivals": {"x": FORECAST[None]}}, ValueError, r"rivals\['x'\] must have shape .* got \(1, 18, 200\)"),
        ({"truth": OBSERVED[:1]}, ValueError, "the weights at the prefix's end equal the initial weights"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changed, error, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"path": "plot.svg", "observed": OBSERVED, "forecast": FORECAST} | changed
    with pytest.raises(error, match=message):
        tipl.plot_forecast(**arguments)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- tipl rollout --plot


def test_rivals_learn_from_the_other_trials(tmp_path: Path) -> None:
    store, forecaster = make_store(tmp_path / "store.zarr", 4, 20), bare_forecaster(20)
    path = store.trial(2).weights()
    ahead = check_and_forecast(forecaster, path[:9], 11, layout=store.policy)[0].at()
    found = TrialForecast(store, forecaster, 2, 1, path, 8, ahead)
    np.testing.assert_array_equal(found.checkpoints, np.arange(9, 20))
    np.testing.assert_array_equal(found.truth, path[9:])
    rivals = found.rivals()
    assert rivals is not None
    assert {name: it.shape for name, it in rivals.items()} == dict.fromkeys(
        ("linear", "mean_path"), (11, SPEC.num_params)
    )
    windows = [Linear(w).forecast(Prefix(path[:9]), found.horizons) for w in (1, 2, 4, 6, 8)]
    assert any(np.array_equal(rivals["linear"], it) for it in windows)
    weights = np.stack([store.trial(i).weights() for i in range(3)])
    weights[0] = weights[0, 0]  # a run that stands still teaches nothing
    still = Store.create(tmp_path / "still.zarr", env_id=store.env_id, policy=SPEC, seeds=range(3), config={})
    still.append(weights, np.zeros((3, 20), np.int64), np.zeros((3, 20)))
    still.close()
    for number, teachers in ((1, [2]), (2, [1])):
        it = TrialForecast(Store.open(still.path), forecaster, number, 1, weights[number], 8, ahead)
        mean = MeanPath.fit(canonical_coordinates([TrainingPath.of(weights[i], SPEC, 0) for i in teachers], 8, 6))
        found_rivals = it.rivals()
        assert found_rivals is not None
        expected = mean.forecast(Prefix(weights[number, :9]), it.horizons)
        np.testing.assert_array_equal(found_rivals["mean_path"], expected)
    alone = TrialForecast(make_store(tmp_path / "one.zarr", 1, 20), forecaster, 0, 1, path, 8, ahead)
    assert alone.rivals() is None


@pytest.mark.slow
def test_the_command_draws_what_it_forecast(tmp_path: Path, run_tipl: Callable[..., int], capsys) -> None:
    store, plot = make_store(tmp_path / "store.zarr", 3, 20), tmp_path / "path.svg"
    plot.write_text("mine")
    command = ["rollout", "--store", store.path, "--trial", 1, "--prefix", 0.5, "--plot", plot]
    assert run_tipl(*command, "--output", tmp_path / "f.safetensors") == 2
    assert "path.svg exists" in capsys.readouterr().err
    assert not (tmp_path / "f.safetensors").exists()
    assert run_tipl(*command, "--overwrite", "--output", plot) == 2
    assert "output and plot must be two files" in capsys.readouterr().err
    assert run_tipl(*command, "--overwrite", "--output", tmp_path / "f.safetensors") == 0
    forecast, drawn = capsys.readouterr().out.splitlines()
    assert forecast.startswith("forecast ")
    assert drawn == f"plot       {plot}"
    text = text_of(plot)
    for words in ("trial 1, 50 % of the path observed", "true path", "mean path", "9 checkpoints ahead"):
        assert words in text
    further = [*command[:-1], tmp_path / "further.svg", "--output", tmp_path / "g.safetensors", "--horizon", 20]
    assert run_tipl(*further) == 0  # the mean path and the truth end before the forecast does
    assert "9 checkpoints ahead" in text_of(tmp_path / "further.svg")
