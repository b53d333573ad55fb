"""Bases: canonical coordinates, their two ways of being computed, what they cannot represent, and their files."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from factories import make_store, random_path

from tipl.subspace.basis import Basis, Centre, prefix_coordinates, trajectory_gram
from tipl.subspace.prefix_end import MIN_PREFIX_END

EPS = np.finfo(np.float32).eps


@pytest.mark.parametrize("prefix_end", [MIN_PREFIX_END, 6, 12, 28])
def test_prefix_coordinates_are_those_of_an_exact_svd(prefix_end: int) -> None:
    path, k = random_path(30, 200, 0), 5
    displacement = path.astype(np.float64) - path[0]
    directions = np.linalg.svd(displacement[: prefix_end + 1], full_matrices=False)[2][: min(k, prefix_end)]
    expected = displacement @ directions.T / np.linalg.norm(displacement[prefix_end])
    expected *= np.where(expected[prefix_end] < 0, -1, 1)

    from_gram = prefix_coordinates(trajectory_gram(path), prefix_end, k)
    basis = Basis.from_prefix(path[: prefix_end + 1], k)

    rank = len(directions)
    # Two float32 roundings of numbers of the size of the path; singular vectors amplify them by the inverse gap.
    bound = 1e4 * EPS * np.abs(expected).max()
    np.testing.assert_allclose(from_gram[:, :rank], expected, rtol=0, atol=bound)
    np.testing.assert_allclose(basis.encode(path)[:, :rank], expected, rtol=0, atol=bound)
    assert not from_gram[:, rank:].any()
    assert not basis.directions[rank:].any()


def test_canonical_scale_and_sign() -> None:
    path = random_path(20, 100, 1)
    coordinates = prefix_coordinates(trajectory_gram(path), 9, 9)
    assert not coordinates[0].any()
    assert (coordinates[9] >= 0).all()
    assert np.linalg.norm(coordinates[9]) == pytest.approx(1.0, rel=1e-5)


def test_coordinates_ignore_the_unit_and_the_rotation_of_weights() -> None:
    """What lets one forecaster serve other tasks and network sizes."""
    path = random_path(20, 60, 2)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((60, 60)))[0]
    moved = (7.0 * (path.astype(np.float64) @ rotation) + 3.0).astype(np.float32)
    one, other = (prefix_coordinates(trajectory_gram(p), 8, 4) for p in (path, moved))
    np.testing.assert_allclose(one, other, atol=2e-3)


def test_the_future_does_not_touch_a_prefix_basis() -> None:
    path = random_path(20, 60, 3)
    changed = path.copy()
    changed[9:] += 5.0
    one, other = (prefix_coordinates(trajectory_gram(p), 8, 4) for p in (path, changed))
    np.testing.assert_array_equal(one[:9], other[:9])


def test_decode_undoes_encode_inside_the_prefix() -> None:
    path = random_path(12, 80, 4)
    basis = Basis.from_prefix(path[:7], 6)  # rank 6: the whole prefix is spanned
    np.testing.assert_allclose(basis.decode(basis.encode(path[:7])), path[:7], atol=40 * EPS * np.abs(path).max())
    assert (basis.residual(path[:7]) < 1e-4 * np.linalg.norm(path[6] - path[0])).all()


def test_residual_is_what_the_span_misses() -> None:
    path = random_path(30, 80, 5)
    basis = Basis.from_prefix(path[:10], 4)
    displacement = path.astype(np.float64) - path[0]
    v = np.linalg.svd(displacement[:10], full_matrices=False)[2][:4]
    since_prefix = displacement - displacement[9]  # the basis passes through theta_h
    expected = np.linalg.norm(since_prefix - since_prefix @ v.T @ v, axis=1)
    np.testing.assert_allclose(basis.residual(path), expected, rtol=1e-3, atol=1e-4)


def test_a_basis_through_a_checkpoint_holds_it_and_leaves_the_coordinates() -> None:
    path = random_path(30, 80, 6)
    basis = Basis.from_prefix(path[:20], 4)
    moved = basis.through(path[25])
    np.testing.assert_allclose(moved.decode(moved.encode(path[25:26])), path[25:26], atol=1e-5)
    np.testing.assert_allclose(moved.encode(path), basis.encode(path), atol=1e-5)


@pytest.mark.parametrize(("num_params", "n_components"), [(60, 4), (1031, 16)])
def test_a_checkpoint_has_the_same_bits_alone_as_among_others(num_params: int, n_components: int) -> None:
    path = random_path(30, num_params, 8)
    basis = Basis.from_prefix(path[:20], n_components)
    coordinates = basis.encode(path)
    weights = basis.decode(coordinates)
    for rows in ([29], [3, 1], [*range(7)], [*range(29, -1, -1)]):
        np.testing.assert_array_equal(basis.encode(path[rows]), coordinates[rows])
        np.testing.assert_array_equal(basis.decode(coordinates[rows]), weights[rows])


def test_a_path_of_rank_one_has_one_coordinate() -> None:
    direction = np.random.default_rng(0).standard_normal(50)
    path = (1.0 + np.arange(10)[:, None] * direction).astype(np.float32)
    coordinates = prefix_coordinates(trajectory_gram(path), 8, 4)
    np.testing.assert_allclose(coordinates[:, 0], np.arange(10) / 8, atol=1e-4)
    np.testing.assert_allclose(coordinates[:, 1:], 0.0, atol=1e-3)


def test_shared_basis_explains_the_trials_it_was_fitted_on(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", num_trials=4, num_checkpoints=20)
    basis = Basis.from_trials([store.trial(i) for i in range(3)], 12)
    rows = np.concatenate([store.trial(i).weights() for i in range(3)])
    np.testing.assert_allclose(basis.directions @ basis.directions.T, np.eye(12), atol=1e-4)
    assert basis.encode(rows)[:, 0].std() == pytest.approx(1.0, rel=1e-2)

    def floor(i: int) -> float:
        path = store.trial(i).weights()
        return float(basis.residual(path)[-1] / np.linalg.norm(path[-1] - path[0]))

    assert max(floor(i) for i in range(3)) < 0.2
    assert floor(3) > 0.8  # it does not carry over to an initialisation that it never saw


def test_basis_file_round_trip(tmp_path: Path) -> None:
    basis = Basis.from_prefix(random_path(10, 30, 6), 4)
    basis.save(tmp_path / "basis.safetensors")
    loaded = Basis.load(tmp_path / "basis.safetensors")
    np.testing.assert_array_equal(loaded.origin, basis.origin)
    np.testing.assert_array_equal(loaded.directions, basis.directions)
    assert loaded.scale == basis.scale


def test_centre_is_exact_at_its_ends_and_interpolates_between(tmp_path: Path) -> None:
    paths = np.random.default_rng(0).standard_normal((3, 12, 4)).astype(np.float32)
    centre = Centre(np.array([3, 5, 9]), paths, np.array([1.0, 0.5, 0.0]))
    centre.save(tmp_path / "centre.safetensors")
    loaded = Centre.load(tmp_path / "centre.safetensors")
    for i, end in enumerate((3, 5, 9)):
        np.testing.assert_array_equal(loaded.at(end), paths[i])
    np.testing.assert_allclose(loaded.at(6), 0.75 * paths[1] + 0.25 * paths[2], rtol=1e-6)
    np.testing.assert_array_equal(loaded.at(10), paths[2])
    np.testing.assert_array_equal([loaded.trust_at(end) for end in (2, 4, 5, 9)], [1.0, 0.75, 0.5, 0.0])
    one = Centre(np.array([3]), paths[:1], np.ones(1))
    np.testing.assert_array_equal(one.at(7), paths[0])
    dataclasses.replace(centre, trust=np.ones(2)).save(tmp_path / "centre.safetensors")
    with pytest.raises(RuntimeError, match="Centre.load: .* is damaged: expected"):  # noqa: RUF043
        Centre.load(tmp_path / "centre.safetensors")
    dataclasses.replace(centre, ends=np.array(3)).save(tmp_path / "centre.safetensors")
    with pytest.raises(RuntimeError, match="Centre.load: .* is damaged: expected"):  # noqa: RUF043
        Centre.load(tmp_path / "centre.safetensors")
    (tmp_path / "centre.safetensors").write_bytes(b"")
    with pytest.raises(RuntimeError, match="Centre.load: .* is damaged"):  # noqa: RUF043
        Centre.load(tmp_path / "centre.safetensors")


def test_rejections(tmp_path: Path) -> None:
    path = random_path(10, 30, 7)
    with pytest.raises(ValueError, match=r"a prefix must hold at least 4 checkpoints .* got 3"):
        Basis.from_prefix(path[:3], 4)
    with pytest.raises(ValueError, match="the path has no scale"):
        Basis.from_prefix(np.repeat(path[:1], 6, 0), 4)
    spoilt = path.copy()
    spoilt[4, 5] = np.nan
    with pytest.raises(ValueError, match="finite, got nan at row 4, column 5"):
        Basis.from_prefix(spoilt, 4)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Basis.load(tmp_path / "nothing")
    (tmp_path / "cut").write_bytes(b"\x10\x00")
    with pytest.raises(RuntimeError, match="cut is damaged"):
        Basis.load(tmp_path / "cut")
