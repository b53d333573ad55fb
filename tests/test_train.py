"""Training: whole-trial splits, examples, the loss, and a run on synthetic paths."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_run import make_store
from test_model import random_model

from tipl.basis import Centre, prefix_coordinates, trajectory_gram
from tipl.rollout import Forecaster, rollout
from tipl.train import (
    Batch,
    Examples,
    TrainConfig,
    Trainer,
    TrainingData,
    Validation,
    load_training_data,
    loss_of,
    split_trials,
    train,
)

TINY = TrainConfig(n_components=6, n_layer=1, n_head=2, d_model=16, steps=40, batch_size=8, max_prefixes=6)


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
    before = load_training_data(store, split, TINY)
    for i in split.heldout:  # a damaged trial raises when it is read
        for chunk in (tmp_path / "store.zarr" / f"trial_{i:04d}" / "weights").glob("c*"):
            chunk.unlink()
    after = load_training_data(store, split, TINY)
    torch.testing.assert_close(after.examples.coordinates, before.examples.coordinates, rtol=0, atol=0)


def test_examples_are_the_prefix_coordinates_of_the_trials(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 3, 16)
    grams = [trajectory_gram(store.trial(i).weights()) for i in range(3)]
    examples = Examples.of_prefixes(grams, [3, 8], 6)
    paths = np.array([prefix_coordinates(gram, 8, 6) for gram in grams])
    distances = [np.sqrt(gram[-1, -1] / gram[8, 8]) for gram in grams]
    mean = np.average(paths, axis=0, weights=np.square(distances) ** -1.0)
    np.testing.assert_allclose(examples.centre.at(8), mean, atol=1e-6)
    np.testing.assert_allclose(examples.coordinates[2, 1], paths[2] - mean, atol=1e-6)
    assert examples.filled.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    path = store.trial(2).weights()
    norm = np.linalg.norm(path[-1] - path[0]) / np.linalg.norm(path[8] - path[0])
    assert float(examples.norms[2, 1]) == pytest.approx(norm, rel=1e-4)


def test_sampled_examples_are_mixtures_at_one_prefix() -> None:
    paths = torch.arange(4.0)[:, None, None, None].expand(4, 1, 10, 2)  # trial i is i everywhere
    centre = Centre(np.array([3, 5]), np.zeros((2, 10, 2), np.float32))
    examples = Examples(paths, torch.tensor([3, 5]), torch.ones(2, 2), torch.ones(4, 2), centre)
    generator = torch.Generator().manual_seed(0)
    unmixed = examples.sample(TrainConfig(mixing=0.0, batch_size=64), generator)
    assert set(unmixed.x.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    mixed = examples.sample(TrainConfig(mixing=1.0, batch_size=64), generator)
    assert len(mixed.x[:, 0, 0].unique()) > 32
    assert 0.0 <= float(mixed.x.min()) <= float(mixed.x.max()) <= 3.0
    flipped = examples.sample(TrainConfig(flip_probability=0.5, batch_size=64), generator).x
    assert (flipped < 0).any()
    assert (flipped.abs() == flipped.abs()[:, :1]).all()  # a coordinate is flipped over a whole trajectory
    assert {examples.sample(TINY, generator).prefix_end for _ in range(20)} == {3, 5}


def test_loss_is_relative_and_ignores_padding() -> None:
    model, x = random_model(), torch.randn(4, 12, 5)
    filled, norms = torch.tensor([1.0, 1, 1, 0, 0]), torch.full((4,), 2.0)
    batch, noise = Batch(x, 6, filled, norms), torch.zeros_like(x)
    forecast = model.unroll((x * filled)[:, :7], 5)
    expected = (((forecast - x[:, 7:]) ** 2 * filled).sum() / 4.0) / (4 * 5)
    torch.testing.assert_close(loss_of(model, batch, noise, teacher_forced=False), expected)
    spoilt = x.clone()
    spoilt[..., 3:] += 9.0
    for teacher_forced in (True, False):
        of_x, of_spoilt = (
            loss_of(model, Batch(y, 6, filled, norms), noise, teacher_forced=teacher_forced) for y in (x, spoilt)
        )
        torch.testing.assert_close(of_x, of_spoilt)


def test_training_learns_what_the_prefix_tells() -> None:
    """Straight lines of random slopes about a mean path: what the centre cannot know, the prefix shows."""
    slopes = np.random.default_rng(0).standard_normal((24, 1, 1, 2))
    paths = (np.arange(12)[:, None] / 11 * (1.0 + slopes)).astype(np.float32)  # (N, 1, T, k)
    examples = Examples.of_paths(paths[:16, 0], np.ones(16), [4, 6, 8])
    validation = Validation(12)
    for end in validation.prefix_ends:
        validation.add(paths[16:, 0] - examples.centre.at(end), np.zeros(8), np.ones(8))
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
    trainer = Trainer(TrainingData(examples, validation, None), config)
    of_the_mean_path = trainer.validate()
    for _ in range(config.steps):
        trainer.step()
    assert trainer.validate() < 0.3 * of_the_mean_path


def test_a_model_folder_reads_back(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 10, 16)
    folder = train(store, tmp_path / "model", TINY, progress=False)
    curves = json.loads((folder / "training.json").read_text())
    assert curves["best_error"] == min(curves["validation_error"])
    assert len(curves["steps"]) == len(curves["train_loss"]) == len(curves["validation_error"])
    assert list((folder / "tb").glob("events.*"))

    forecaster = Forecaster.load(folder)
    assert forecaster.config["split"] == vars(split_trials(10, TINY))
    assert rollout(forecaster, store.trial(0).weights(0, 8), 8).shape == (1, 8, store.policy.num_params)
    with pytest.raises(FileExistsError, match=r"output .* exists already"):
        train(store, folder, TINY, progress=False)


def test_same_seed_same_model(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 14)
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(store, tmp_path / name, TrainConfig(**{**vars(TINY), "steps": 10, "seed": seed}), progress=False)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_shared_basis_goes_with_the_model(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.zarr", 6, 14)
    folder = train(store, tmp_path / "model", TrainConfig(**{**vars(TINY), "basis": "shared"}), progress=False)
    forecaster = Forecaster.load(folder)
    assert forecaster.shared_basis is not None
    assert forecaster.shared_basis.n_components == 6
    assert rollout(forecaster, store.trial(0).weights(0, 8), 3).shape == (1, 3, store.policy.num_params)


def test_rejections(tmp_path: Path) -> None:
    store = make_store(tmp_path / "short.zarr", 4, 4)
    with pytest.raises(ValueError, match="at least 5 checkpoints, got 4"):
        train(store, tmp_path / "model", TINY, progress=False)
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        TrainConfig(steps=0)
    with pytest.raises(ValueError, match=r"heldout_fraction must lie in \[0, 1\), got 1.0"):
        TrainConfig(heldout_fraction=1.0)
