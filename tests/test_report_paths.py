"""The spectra of paths against slow ones and closed forms, and the figure of a store."""

from pathlib import Path

import numpy as np
import pytest
from factories import SPEC, make_store
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import tipl.report.paths
from tipl.report.paths import PathSpectrum, path_spectrum, plot_store, quartiles
from tipl.storing.store import Store

pytestmark = pytest.mark.slow

TURNS = np.linspace(0, 2 * np.pi, 41)  # a closed circle: the last angle is the first


def store_of(folder: Path, *paths: NDArray[np.float64]) -> Store:
    """Return a store of one trial a path, each (T, n) in the plane of the first n weights and zero elsewhere."""
    weights = np.zeros((len(paths), len(paths[0]), SPEC.num_params), np.float32)
    for row, path in zip(weights, paths, strict=True):
        row[:, : path.shape[1]] = path
    steps = np.tile(100 * np.arange(weights.shape[1], dtype=np.int64), (len(paths), 1))
    with Store.create(folder, env_id="Hopper-v5", policy=SPEC, seeds=list(range(len(paths))), config={}) as store:
        store.append(weights, steps, np.sqrt(steps))
    return store


def spectrum_of(folder: Path, path: NDArray[np.float64]) -> PathSpectrum:
    return path_spectrum(store_of(folder, path).trial(0))


def slow_spectrum(theta: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The singular values and detour ratios of a path theta (T, p), the obvious way."""
    left, singular_values, _ = np.linalg.svd(theta - theta[0], full_matrices=False)
    coordinates = left * singular_values
    ratios = []
    for c in coordinates.T:
        length = sum(abs(c[t + 1] - c[t]) for t in range(len(c) - 1))
        ratios.append(length / abs(c[-1] - c[0]))
    return singular_values, np.array(ratios)


def slow_dimensionality(singular_values: NDArray[np.float64], share: float) -> int:
    k = 1
    while sum(singular_values[:k] ** 2) < share * sum(singular_values**2):
        k += 1
    return k


# ---------------------------------------------------------------- numbers


def test_a_spectrum_equals_numpys_svd_in_float64(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 3, 31)
    for i in range(3):
        spectrum = path_spectrum(store.trial(i))
        singular_values, ratios = slow_spectrum(store.trial(i).weights().astype(np.float64))
        np.testing.assert_allclose(spectrum.singular_values, singular_values[:30], rtol=1e-6)
        np.testing.assert_allclose(spectrum.detour_ratios, ratios[:16], rtol=1e-6)
        np.testing.assert_allclose(spectrum.explained[-1], 1.0)
        for share in (0.5, 0.9, 0.95, 0.99, 0.999):
            assert spectrum.dimensionality(share) == slow_dimensionality(singular_values, share)
        assert path_spectrum(store.trial(i), n_components=3).coordinates.shape == (31, 3)


def test_a_straight_line_has_one_direction_and_no_detour(tmp_path: Path) -> None:
    spectrum = spectrum_of(tmp_path / "store", np.arange(20.0)[:, None] * [3.0, 4.0])
    assert spectrum.dimensionality(1.0 - 1e-12) == 1
    np.testing.assert_allclose(spectrum.singular_values[0], 5.0 * np.sqrt(np.sum(np.arange(20.0) ** 2)))
    np.testing.assert_allclose(spectrum.detour_ratios, [1.0])
    np.testing.assert_allclose(abs(spectrum.coordinates[:, 0]), 5.0 * np.arange(20.0))


def test_a_circle_has_two_directions_and_ends_where_it_began(tmp_path: Path) -> None:
    spectrum = spectrum_of(tmp_path / "store", np.column_stack([np.cos(TURNS), np.sin(TURNS)]).round(9))
    assert spectrum.dimensionality(1.0 - 1e-9) == 2
    # theta_t - theta_0 = (cos - 1, sin) over 40 steps and the closing one: energies 40 (1/2 + 1) and 40 / 2.
    np.testing.assert_allclose(spectrum.singular_values[:2] ** 2, [60.0, 20.0], rtol=1e-6)
    assert spectrum.detour_ratios[0] > 1e6


def test_there_and_most_of_the_way_back_is_a_long_detour(tmp_path: Path) -> None:
    there_and_back = np.concatenate([np.arange(11.0), np.arange(9.0, 0.0, -1.0)])  # 0 .. 10 .. 1: 19 steps for 1
    spectrum = spectrum_of(tmp_path / "store", there_and_back[:, None])
    assert spectrum.dimensionality(1.0 - 1e-12) == 1
    np.testing.assert_allclose(spectrum.detour_ratios, [19.0])
    closed = spectrum_of(tmp_path / "closed", np.append(there_and_back, 0.0)[:, None])
    assert closed.detour_ratios == np.inf


def test_a_path_that_does_not_move_has_no_directions(tmp_path: Path) -> None:
    for steps in (1, 5):
        spectrum = spectrum_of(tmp_path / str(steps), np.ones((steps, 2)))
        assert spectrum.dimensionality(0.9) == 0
        assert len(spectrum.explained) == len(spectrum.detour_ratios) == 0


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=8), st.floats(0.01, 1.0))
def test_dimensionality_is_the_fewest_directions_that_suffice(values: list[float], share: float) -> None:
    spectrum = PathSpectrum(np.sort(np.array(values))[::-1], np.zeros((1, 0)))
    k = spectrum.dimensionality(share)
    assert 1 <= k <= len(values)
    assert spectrum.explained[k - 1] >= share
    assert k == 1 or spectrum.explained[k - 2] < share


def test_a_share_must_be_one() -> None:
    for share in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"dimensionality: share must lie in \(0, 1\], got"):
            PathSpectrum(np.ones(2), np.zeros((3, 2))).dimensionality(share)


@pytest.mark.parametrize("limit", ["MAX_CHECKPOINTS", "MAX_BYTES"])
def test_every_nth_checkpoint_stands_for_a_long_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    trial = make_store(tmp_path / "store", 1, 31).trial(0)
    monkeypatch.setattr(tipl.report.paths, limit, 8 if limit == "MAX_CHECKPOINTS" else 8 * 4 * SPEC.num_params)
    singular_values, ratios = slow_spectrum(trial.weights().astype(np.float64)[::4])
    spectrum = path_spectrum(trial)
    np.testing.assert_allclose(spectrum.singular_values, singular_values[:7], rtol=1e-6)
    np.testing.assert_allclose(spectrum.detour_ratios, ratios[:7], rtol=1e-6)


def test_quartiles_are_of_the_known_values() -> None:
    curves = np.array([[np.nan, 1.0, 0.0], [np.nan, 2.0, 1.0], [np.nan, np.nan, 2.0], [np.nan, 3.0, 3.0]])
    np.testing.assert_array_equal(quartiles(curves), [[np.nan, 1.5, 0.75], [np.nan, 2.0, 1.5], [np.nan, 2.5, 2.25]])


# ---------------------------------------------------------------- the figure


def test_the_same_store_gives_the_same_bytes_and_no_date(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 4, 31)
    for suffix, magic in (("svg", b"<?xml"), ("png", b"\x89PNG\r\n\x1a\n")):
        for name in ("one", "two"):
            plot_store(store, tmp_path / "new" / f"{name}.{suffix}")
        one, two = ((tmp_path / "new" / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two
        assert one.startswith(magic)
    svg = (tmp_path / "new" / "one.svg").read_text()
    assert "date" not in svg.lower()
    for text in ("InvertedPendulum-v5: learning curves", "Detour ratio", "Energy explained", "Dimensionality"):
        assert text in svg
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"one.svg", "one.png", "two.svg", "two.png"}


def test_a_trial_that_does_not_move_is_drawn_by_its_returns_alone(tmp_path: Path) -> None:
    line, circle = np.arange(41.0)[:, None] * [1.0, 2.0], np.column_stack([np.cos(TURNS), np.sin(TURNS)])
    store = store_of(tmp_path / "store", line, line, circle, np.zeros((41, 1)))
    plot_store(store, tmp_path / "plot.svg")
    svg = (tmp_path / "plot.svg").read_text()
    assert "median of 4 trials" in svg


def test_trials_of_unlike_lengths_and_unknown_returns_are_drawn(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", np.arange(9.0)[:, None] * [1.0, 2.0], np.arange(9.0)[:, None] ** 2)
    long, short = store.trial(0), store_of(tmp_path / "short", np.arange(4.0)[:, None] * [2.0]).trial(0)
    returns = tipl.report.paths._returns_at(long.env_steps, short)
    np.testing.assert_allclose(returns, [*np.sqrt(100.0 * np.arange(4)), *[np.nan] * 5])
    spectra = [path_spectrum(trial) for trial in (long, short)]
    assert tipl.report.paths.store_plot("x", [long, short], spectra).svg().endswith(b"</svg>\n")
    unknown = Store.create(tmp_path / "unknown", env_id="x", policy=SPEC, seeds=[0], config={})
    weights = np.random.default_rng(0).normal(size=(1, 3, SPEC.num_params)).astype(np.float32)
    unknown.append(weights, np.zeros((1, 3), np.int64), np.full((1, 3), np.nan))
    unknown.close()
    plot_store(unknown, tmp_path / "unknown.svg")


def test_a_figure_is_never_overwritten_unasked_and_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store", 2, 5)
    path = tmp_path / "plot.svg"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"plot_store: .*plot\.svg exists"):
        plot_store(store, path)
    assert path.read_text() == "mine"
    plot_store(store, path, overwrite=True)
    drawn = path.read_bytes()
    assert drawn.startswith(b"<?xml")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_store(store, path, overwrite=True)
    assert path.read_bytes() == drawn
    assert {entry.name for entry in tmp_path.iterdir()} == {"store", "plot.svg"}


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", 2, 5)
    with pytest.raises(ValueError, match=r"plot_store: path must end in \.svg or \.png, got .*plot\.pdf"):
        plot_store(store, tmp_path / "plot.pdf")
    still = store_of(tmp_path / "still", np.ones((3, 2)))
    empty = Store.create(tmp_path / "empty", env_id="Hopper-v5", policy=SPEC, seeds=[1], config={})
    empty.close()
    for unmoved in (still, empty):
        with pytest.raises(ValueError, match="plot_store: no trial has moved from its first checkpoint"):
            plot_store(unmoved, tmp_path / "plot.svg")
    assert not (tmp_path / "plot.svg").exists()
