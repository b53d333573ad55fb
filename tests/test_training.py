"""Training: whole-trial splits, examples, the loss, and a run on synthetic paths."""

import dataclasses
import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import TINY_TRAIN, make_store, random_model
from torch.utils._python_dispatch import TorchDispatchMode

import tipl.collecting.curves
import tipl.forecasting.training_state
from tipl.forecasting.forecaster import Forecaster, rollout
from tipl.forecasting.refiner_training import _RefinerTraining
from tipl.forecasting.sources import Source, split_trials, thin
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training import Trainer, loss_of, train
from tipl.forecasting.training_data import (
    Batch,
    Case,
    Draws,
    Examples,
    TrainingData,
    Validation,
    Written,
    load_training_data,
)
from tipl.storing.store import Store
from tipl.subspace.basis import Basis, Centre, prefix_coordinates, trajectory_gram

TINY = dataclasses.replace(TINY_TRAIN, n_components=6, steps=40, max_prefixes=6, refine_steps=20, confidence_trials=1)


def test_split_is_by_whole_trials_and_by_seed() -> None:
    split = split_trials(20, TINY)
    assert sorted(split.train + split.validation + split.heldout) == list(range(20))
    assert (len(split.train), len(split.validation), len(split.heldout)) == (13, 3, 4)
    assert split == split_trials(20, TINY)
    assert split != split_trials(20, TrainConfig(seed=1))
    smallest = split_trials(3, TINY)
    assert (len(smallest.train), len(smallest.validation), len(smallest.heldout)) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"at least 3 trials .* got 2"):
        split_trials(2, TINY)


def test_held_out_trials_are_never_read(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 16)
    split = split_trials(6, TINY)
    before = load_training_data([Source.of(store, TINY)], TINY)
    for i in split.heldout:  # a damaged trial raises when it is read
        for chunk in (tmp_path / "store.zarr" / f"trial_{i:04d}" / "weights").glob("c*"):
            chunk.unlink()
    after = load_training_data([Source.of(store, TINY)], TINY)
    torch.testing.assert_close(after.examples.coordinates, before.examples.coordinates, rtol=0, atol=0)


def test_examples_are_the_prefix_coordinates_of_the_trials(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 16)
    split = split_trials(6, TINY)
    data = load_training_data([Source.of(store, TINY)], TINY)
    ends = data.examples.prefix_ends.tolist()
    assert data.examples.filled[ends.index(3)].tolist() == [1, 1, 1, 0, 0, 0]
    assert data.examples.filled[ends.index(8)].tolist() == [1] * 6
    paths = np.array([prefix_coordinates(trajectory_gram(store.trial(i).weights()), 8, 6) for i in split.train])
    np.testing.assert_allclose(
        data.examples.coordinates[:, ends.index(8)], paths - data.examples.centre.at(8), atol=1e-6
    )

    weights = store.trial(split.train[2]).weights()
    basis = Basis.from_prefix(weights[:9], 6)
    distances = np.linalg.norm(weights - weights[0], axis=1) / basis.scale
    np.testing.assert_allclose(data.examples.distances[2, ends.index(8)], distances, rtol=1e-4)
    outside = basis.residual(weights) / basis.scale
    np.testing.assert_allclose(data.examples.outside[2, ends.index(8)], outside, rtol=1e-2, atol=1e-3)


def test_no_constant_path_errs_less_than_the_centre(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 12, 16)
    data = load_training_data([Source.of(store, TINY)], TINY)
    examples, row = data.examples, 4
    distances, outside = (x[:, row, -1].double() for x in (examples.distances, examples.outside))

    def error(shift: torch.Tensor) -> float:
        inside = (examples.coordinates[:, row, -1] - shift).norm(dim=-1)
        return float((torch.hypot(inside, outside) / distances).mean())

    least = error(torch.zeros(6))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert error(0.1 * torch.randn(6, generator=generator)) > least
    plain_mean = examples.coordinates[:, row, -1].mean(0)
    assert error(plain_mean) > least


@pytest.mark.slow
def test_validation_errs_as_evaluate_does(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 16)
    for basis in ("prefix", "shared"):
        folder = train(store, tmp_path / basis, TrainConfig(**{**vars(TINY), "basis": basis}), progress=False)
        forecaster = Forecaster.load(folder)
        training = json.loads((folder / "training.json").read_text())

        def mean_error(forecaster: Forecaster) -> float:
            errors = []
            for i in forecaster.config["stores"][0]["split"]["validation"]:
                weights = store.trial(i).weights()
                for end in Validation.prefix_ends(16):
                    forecast = rollout(weights[: end + 1], 15 - end, forecaster)[0, -1]
                    errors.append(np.linalg.norm(forecast - weights[-1]) / np.linalg.norm(weights[-1] - weights[0]))
            return float(np.mean(errors))

        assert training["refined_error"] == pytest.approx(mean_error(forecaster), rel=1e-3)
        unrefined = dataclasses.replace(forecaster, refiner=None)
        assert training["unrefined_error"] == pytest.approx(mean_error(unrefined), rel=1e-3)
        forecaster.centre.trust[:] = 1.0
        assert training["best_error"] == pytest.approx(mean_error(unrefined), rel=1e-3)


def test_sampled_examples_are_mixtures_at_one_prefix() -> None:
    paths = torch.arange(4.0)[:, None, None, None].expand(4, 2, 10, 2)  # trial i is i everywhere
    centre = Centre(np.array([3, 5]), np.zeros((2, 10, 2), np.float32), np.ones(2))
    lengths = paths[..., 0]
    examples = Examples(paths, lengths, lengths, torch.tensor([3, 5]), torch.ones(2, 2), centre)
    unmixed = sample(examples, TrainConfig(mixing=0.0, batch_size=64))
    assert set(unmixed.x.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    mixed = sample(examples, TrainConfig(mixing=1.0, batch_size=64))
    assert len(mixed.x[:, 0, 0].unique()) > 32
    assert 0.0 <= float(mixed.x.min()) <= float(mixed.x.max()) <= 3.0
    assert (mixed.x == mixed.distances[..., None]).all()
    assert (mixed.distances == mixed.outside).all()
    flipped = sample(examples, TrainConfig(flip_probability=0.5, batch_size=64)).x
    assert (flipped < 0).any()
    assert (flipped.abs() == flipped.abs()[:, :1]).all()  # a coordinate is flipped over a whole trajectory
    draws = Draws(TINY)
    assert {examples.sample(TINY, draws).prefix_end for _ in range(20)} == {3, 5}


def sample(examples: Examples, config: TrainConfig) -> Batch:
    return examples.sample(config, Draws(config))


class OneDevice(TorchDispatchMode):
    """Refuses what moves data from one device to another."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "_copy_from", "set_"):
            devices = {it.device.type for it in (*arguments, result) if isinstance(it, torch.Tensor)}
            assert len(devices) == 1, f"{name} moves data: {devices}"
        return result


@pytest.mark.parametrize("teacher_forced", [0.0, 1.0])
def test_no_step_moves_data_between_devices_or_waits_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_forced: float
) -> None:
    """On torch's device "meta", which computes nothing and cannot be read."""
    store = make_store(tmp_path / "store.zarr", 6, 16)
    config = dataclasses.replace(TINY, device="meta", teacher_forced=teacher_forced)
    monkeypatch.setattr(Draws, "generator_of", staticmethod(lambda device, seed: None))
    trainer = Trainer(load_training_data([Source.of(store, config)], config), config)
    with OneDevice():
        for _ in range(3):
            assert trainer.step().device.type == "meta"
        with pytest.raises(AssertionError, match=r"_to_copy moves data"):
            torch.zeros(2).to("meta")
    with pytest.raises(RuntimeError):
        trainer.step().item()


def test_loss_is_the_relative_error_and_ignores_padding() -> None:
    model, x = random_model(), torch.randn(4, 12, 5)
    filled, distances, outside = torch.tensor([1.0, 1, 1, 0, 0]), 1.0 + torch.rand(4, 12), torch.rand(4, 12)
    batch, noise = Batch(x, 6, filled, distances, outside), torch.zeros_like(x)
    forecast = model.unroll((x * filled)[:, :7], 5)
    inside = ((forecast - x[:, 7:]) * filled).norm(dim=-1)  # (B, n)
    expected = (torch.hypot(inside, outside[:, 7:]) / distances[:, 7:]).mean()
    torch.testing.assert_close(loss_of(model, batch, noise, teacher_forced=False), expected)
    one_step = (
        (model(x * filled, torch.full((4,), 6))[:, :-1] - x[:, 1:]) * filled / distances[:, -1, None, None]
    ) ** 2
    weight = torch.tensor([0.1] * 6 + [1.0] * 5)
    expected = (one_step.sum(-1) * weight).sum(1).mean() / weight.sum()
    torch.testing.assert_close(loss_of(model, batch, noise, teacher_forced=True), expected)
    spoilt = x.clone()
    spoilt[..., 3:] += 9.0
    for teacher_forced in (True, False):
        of_x, of_spoilt = (
            loss_of(model, Batch(y, 6, filled, distances, outside), noise, teacher_forced=teacher_forced)
            for y in (x, spoilt)
        )
        torch.testing.assert_close(of_x, of_spoilt)


def lines_about_a_mean_path(num_trials: int) -> list[list[Written]]:
    """Straight lines of random slopes, (T, 2): what the mean path cannot know, the prefix shows."""
    slopes = np.random.default_rng(0).standard_normal((num_trials, 1, 2))
    paths = (np.arange(12)[:, None] / 11 * (1.0 + slopes)).astype(np.float32)
    return [[(path, np.ones(12), np.zeros(12))] * 3 for path in paths]


@pytest.mark.slow
def test_training_learns_what_the_prefix_tells() -> None:
    trials = lines_about_a_mean_path(24)
    examples = Examples.of(trials[:16], [4, 6, 8], torch.ones(3, 2))
    paths = np.array([trial[0][0] for trial in trials[16:]])
    cases = [Case(end, paths - examples.centre.at(end), np.ones(8), np.zeros(8), 2) for end in (4, 8)]
    config = TrainConfig(
        n_components=2,
        n_layer=1,
        n_head=2,
        d_model=16,
        steps=150,
        batch_size=16,
        learning_rate=1e-2,
        weight_decay=0.0,
        dropout=0.0,
        ema_decay=0.9,
    )
    trainer = Trainer(TrainingData(examples, Validation(cases), None), config)
    of_the_mean_path = trainer.validate()
    for _ in range(config.steps):
        trainer.step()
    assert trainer.validate() < 0.3 * of_the_mean_path
    assert min(trainer.data.validation.trust(trainer.average)) >= 0.9


def test_what_is_outside_a_basis_is_its_residual(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 16)
    split = split_trials(6, TINY)
    data = load_training_data([Source.of(store, TINY)], TrainConfig(**{**vars(TINY), "basis": "shared"}))
    weights = store.trial(split.train[1]).weights()
    for row, end in enumerate(data.examples.prefix_ends.tolist()):
        basis = data.shared_basis.through(weights[end])
        outside = basis.residual(weights) / basis.scale
        np.testing.assert_allclose(data.examples.outside[1, row], outside, rtol=1e-2, atol=2e-3)


def test_padding_does_not_count_in_validation() -> None:
    paths = np.zeros((3, 12, 5), np.float32)
    forecast = np.array([3.0, 4.0, 7.0, 7.0, 7.0])
    assert Case(6, paths, np.full(3, 2.0), np.zeros(3), 2).error(forecast) == pytest.approx(2.5)
    assert Case(6, paths, np.full(3, 2.0), np.full(3, 12.0), 2).error(forecast) == pytest.approx(6.5)


def test_what_only_guesses_is_not_trusted() -> None:
    paths = np.random.default_rng(0).standard_normal((200, 12, 5)).astype(np.float32)  # noise: nothing to know
    paths[:, 6] = 0.0
    validation = Validation([Case(6, paths, np.ones(200), np.zeros(200), 5)])
    model = random_model()
    (trust,) = validation.trust(model)
    forecast = validation.forecasts(model)[0]
    assert trust < 0.5
    assert validation.cases[0].error(trust * forecast) < validation.cases[0].error(forecast)


def test_forecasts_depart_from_the_mean_path_as_far_as_they_are_trusted(tiny_model: Path) -> None:
    forecaster = Forecaster.load(tiny_model)
    with torch.no_grad():
        forecaster.model.head.weight.normal_()
    coordinates = np.random.default_rng(0).standard_normal((2, 9, TINY_TRAIN.n_components)).astype(np.float32)

    def forecast(*shares: float) -> np.ndarray:
        trust = np.interp(forecaster.centre.ends, [6, 10], shares)
        trusting = dataclasses.replace(forecaster, centre=dataclasses.replace(forecaster.centre, trust=trust))
        return np.array(trusting.continue_coordinates(coordinates, [5, 5]))

    mean = forecaster.centre.at(8)
    of_mean_path = coordinates[:, -1:] + mean[9:14] - mean[8]
    np.testing.assert_allclose(forecast(0.0, 0.0), of_mean_path, atol=1e-6)
    half = (forecast(1.0, 1.0) + of_mean_path) / 2
    np.testing.assert_allclose(forecast(0.0, 1.0), half, rtol=1e-4, atol=1e-5)
    assert abs(half - of_mean_path).max() > 0.01


def test_a_model_folder_reads_back(whole: Path) -> None:
    store, folder = Store.open(whole.with_name("store.zarr")), whole
    curves = json.loads((folder / "training.json").read_text())
    assert curves["best_error"] == min(curves["validation_error"])
    assert len(curves["steps"]) == len(curves["train_loss"]) == len(curves["validation_error"])
    assert list((folder / "tb").glob("events.*"))

    forecaster = Forecaster.load(folder)
    assert forecaster.config["stores"][0]["split"] == vars(split_trials(8, TINY))
    assert rollout(store.trial(0).weights(0, 8), 8, forecaster).shape == (1, 8, store.policy.num_params)
    with pytest.raises(FileExistsError, match=r"output .* exists already"):
        train(store, folder, TINY, progress=False)


@pytest.mark.slow
def test_the_training_curve_is_the_mean_error_between_validations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, errors = Trainer.step, []

    def recorded(trainer: Trainer) -> float:
        errors.append(step(trainer))
        return errors[-1]

    monkeypatch.setattr(Trainer, "step", recorded)
    store = make_store(tmp_path / "store.zarr", 6, 14)
    train(store, tmp_path / "model", TrainConfig(**{**vars(TINY), "patience": 20}), progress=False)
    curve = json.loads((tmp_path / "model" / "training.json").read_text())
    assert curve["steps"] == list(range(2, 41, 2))
    np.testing.assert_allclose(curve["train_loss"], np.reshape(errors, (20, 2)).mean(1))


@pytest.mark.slow
def test_same_seed_same_model(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 14)
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(store, tmp_path / name, TrainConfig(**{**vars(TINY), "steps": 10, "seed": seed}), progress=False)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a model folder, but for those that hold times."""
    times = ("training.json", "manifest.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in times}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of TINY that nothing disturbed; its store is beside it."""
    folder = tmp_path_factory.mktemp("whole")
    return train(make_store(folder / "store.zarr", 8, 16), folder / "model", TINY, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cut_off", [("Trainer", 1), ("Trainer", 17), ("_RefinerTraining", 1), ("_RefinerTraining", 17)]
)
def test_a_training_that_is_cut_off_goes_on_and_ends_the_same(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_off: tuple[str, int]
) -> None:
    monkeypatch.setattr(tipl.forecasting.training_state, "SAVE_SECONDS", 0.0)
    store = Store.open(whole.with_name("store.zarr"))
    part, last = cut_off
    kind = {"Trainer": Trainer, "_RefinerTraining": _RefinerTraining}[part]
    step, steps_taken = kind.step, []

    def failing_step(self: Any) -> Any:
        if self.step_count == last and last not in steps_taken:
            steps_taken.append(last)
            raise KeyboardInterrupt
        steps_taken.append(self.step_count)
        return step(self)

    monkeypatch.setattr(kind, "step", failing_step)
    with pytest.raises(KeyboardInterrupt):
        train(store, tmp_path / "model", TINY, progress=False)
    assert not (tmp_path / "model").exists()
    train(store, tmp_path / "model", TINY, progress=False)
    assert steps_taken.count(last - 1) == 1  # what was done is not done again
    assert files_of(tmp_path / "model") == files_of(whole)
    curves = [json.loads((it / "training.json").read_text()) | {"seconds": 0} for it in (whole, tmp_path / "model")]
    assert curves[0] == curves[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.slow
def test_a_saved_state_of_other_settings_or_a_damaged_one_is_not_used(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tipl.forecasting.training_state, "SAVE_SECONDS", 0.0)
    store, other = Store.open(whole.with_name("store.zarr")), dataclasses.replace(TINY, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tipl.forecasting.training"], "train_refiner", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(store, tmp_path / "model", other, progress=False)
        kept = tmp_path / ".model.partial" / ".state_transformer.safetensors"
        cut = kept.read_bytes()[:-9]
        (kept.parent / "strides.safetensors").write_bytes(b"of the training that was cut off")
    train(store, tmp_path / "model", TINY, progress=False)
    assert files_of(tmp_path / "model") == files_of(whole)
    (tmp_path / ".again.partial").mkdir()
    (tmp_path / ".again.partial" / kept.name).write_bytes(cut)
    with pytest.warns(UserWarning, match=r"is damaged: .*; training starts again"):
        train(store, tmp_path / "again", TINY, progress=False)
    assert files_of(tmp_path / "again") == files_of(whole)


def test_a_full_disk_stops_tensorboard_and_not_the_training(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, events: list[Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tipl.collecting.curves, "_append", full)
    with pytest.warns(UserWarning, match=r"no more curves are written to .*tb: No space left on device"):
        folder = train(tiny_store, tmp_path / "model", TINY_TRAIN, progress=False)
    assert Forecaster.load(folder).refiner is not None


def test_a_shared_basis_goes_with_the_model(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 14)
    folder = train(store, tmp_path / "model", TrainConfig(**{**vars(TINY), "basis": "shared"}), progress=False)
    forecaster = Forecaster.load(folder)
    assert forecaster.shared_basis is not None
    assert forecaster.shared_basis.n_components == 6
    assert rollout(store.trial(0).weights(0, 8), 3, forecaster).shape == (1, 3, store.policy.num_params)


def test_rejections(tmp_path: Path) -> None:
    store = make_store(tmp_path / "short.zarr", 4, 4)
    with pytest.raises(ValueError, match="at least 5 checkpoints, got 4"):
        train(store, tmp_path / "model", TINY, progress=False)
    assert not (tmp_path / "model").exists()
    for name, value, message in (
        ("steps", 0, "must be at least 1, got 0"),
        ("heldout_fraction", 1.0, r"must lie in \[0, 1\), got 1.0"),
        ("teacher_forced", 1.5, r"must lie in \[0, 1\], got 1.5"),
        ("trust", -0.1, r"must lie in \[0, 1\], got -0.1"),
        ("learning_rate", float("nan"), "must be positive and finite, got nan"),
        ("mixing", -1.0, "must be finite and not negative, got -1.0"),
        ("seed", -1, r"must lie in \[0, 2\*\*63\), got -1"),
        ("seed", 2**63, r"must lie in \[0, 2\*\*63\), got 9223372036854775808"),
    ):
        with pytest.raises(ValueError, match=f"TrainConfig: {name} {message}"):
            TrainConfig(**{name: value})


@pytest.mark.slow
def test_several_stores_teach_one_forecaster(tmp_path: Path) -> None:
    """Stores of other lengths are thinned to one; what each was split into is known afterwards."""
    short, long = make_store(tmp_path / "short.zarr", 5, 16), make_store(tmp_path / "long.zarr", 6, 31, "Hopper-v5")
    with pytest.raises(ValueError, match=r"stores must hold paths of one length, .* 16 checkpoints, .* has 31"):
        train([short, long], tmp_path / "model", TINY, progress=False)
    config = dataclasses.replace(TINY, num_checkpoints=16)
    forecaster = Forecaster.load(train([short, long], tmp_path / "model", config, progress=False))
    assert [it["env_id"] for it in forecaster.config["stores"]] == ["InvertedPendulum-v5", "Hopper-v5"]
    source = forecaster.source_of(long)
    assert source is not None
    assert source["split"] == vars(split_trials(6, config))
    assert forecaster.source_of(make_store(tmp_path / "other.zarr", 4, 16)) is None
    np.testing.assert_array_equal(Source.of(long, config).path(0), long.trial(0).weights()[::2])
    with pytest.raises(ValueError, match="num_checkpoints must be at most 16"):
        Source.of(short, dataclasses.replace(TINY, num_checkpoints=17))
    with pytest.raises(ValueError, match="a shared basis is of one store, got 2"):
        train([short, long], tmp_path / "shared", dataclasses.replace(config, basis="shared"), progress=False)
    with pytest.raises(ValueError, match="a store or several, got none"):
        train([], tmp_path / "none", TINY)
    copy = Store.open(shutil.copytree(short.path, tmp_path / "copy.zarr"))
    with pytest.raises(ValueError, match=r"short.zarr and .*copy.zarr hold the same runs: give one of them"):
        train([short, long, copy], tmp_path / "twice", config)
    assert not (tmp_path / "twice").exists()


def test_thinning_is_even_and_starts_at_theta_0() -> None:
    rows = np.arange(62, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(thin(rows, 62), rows)
    np.testing.assert_array_equal(thin(rows, 16)[:, 0], np.arange(0, 61, 4))
    np.testing.assert_array_equal(thin(rows, 40)[:, 0], np.arange(40))
