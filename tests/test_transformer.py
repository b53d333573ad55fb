"""The forecaster: causality, the two ways of continuing, and its files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import MODEL_CONFIG, random_model
from reference import forecaster, random_forecaster

from tipl.forecasting.transformer import TrajectoryTransformer, load_model, save_model


def test_no_output_depends_on_a_later_input() -> None:
    model, (B, T, k) = random_model(), (3, 12, 5)
    x, prefix_end = torch.randn(B, T, k), torch.tensor([3, 6, 11])
    before = model(x, prefix_end)
    for t in range(T):
        changed = x.clone()
        changed[:, t] += 1.0
        after = model(changed, prefix_end)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=0)
        assert (after[:, t] != before[:, t]).any()


def test_forward_equals_the_float64_oracle() -> None:
    x, prefix_end = np.random.default_rng(0).standard_normal((3, 12, 5)).astype(np.float32), np.array([3, 6, 11])
    got = random_model()(torch.from_numpy(x), torch.from_numpy(prefix_end)).detach().numpy()
    expected = forecaster(MODEL_CONFIG, random_forecaster(MODEL_CONFIG, 0), x, prefix_end)
    np.testing.assert_allclose(got, expected, atol=100 * np.finfo(np.float32).eps)


def test_unroll_equals_recomputation_and_lets_gradients_through() -> None:
    model, x = random_model(), torch.randn(3, 7, 5)
    torch.testing.assert_close(model.unroll(x, 17), model.rollout(x, 17), rtol=0, atol=1e-4)
    observed = x.clone().requires_grad_()
    model.unroll(observed, 4)[:, -1].sum().backward()
    assert observed.grad is not None
    assert (observed.grad != 0).any(dim=-1).all()


def test_an_untrained_model_is_persistence() -> None:
    x = torch.randn(2, 6, 5)
    path = TrajectoryTransformer(MODEL_CONFIG).eval().rollout(x, 5)
    torch.testing.assert_close(path, x[:, -1:].expand(2, 5, 5), rtol=0, atol=0)


def test_model_folder_round_trip(tmp_path: Path) -> None:
    model = random_model()
    save_model(model, tmp_path / "model", {"env_id": "X-v0"})
    loaded, config = load_model(tmp_path / "model")
    x, prefix_end = torch.randn(2, 9, 5), torch.tensor([4, 8])
    torch.testing.assert_close(loaded(x, prefix_end), model(x, prefix_end), rtol=0, atol=0)
    assert config["env_id"] == "X-v0"
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


def test_damaged_model_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no model folder: config\.json is missing"):
        load_model(tmp_path / "nothing")
    folder = tmp_path / "model"
    save_model(random_model(), folder)
    config = (folder / "config.json").read_text()
    weights = (folder / "model.safetensors").read_bytes()

    (folder / "config.json").write_text(config[:40])
    with pytest.raises(RuntimeError, match=r"config\.json is damaged"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(json.loads(config) | {"format": "else"}))
    with pytest.raises(RuntimeError, match="format: Input should be 'tipl-model', got 'else'"):
        load_model(folder)
    (folder / "config.json").write_text(config.replace('"d_model": 16', '"d_model": 18'))
    with pytest.raises(RuntimeError, match=r"model\.safetensors does not fit its config\.json"):
        load_model(folder)

    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights[:-7])
    with pytest.raises(RuntimeError, match=r"model\.safetensors is damaged"):
        load_model(folder)
    model = random_model()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    save_model(model, folder)
    with pytest.raises(RuntimeError, match="holds NaN or Inf"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 0}, r"n_layer must be an int in \[1, 1048576\], got 0"),
        ({"d_model": 17}, "d_model must be a multiple of n_head = 2, got 17"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_config_rejections(change: dict[str, float], message: str) -> None:
    import dataclasses

    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODEL_CONFIG, **change)  # type: ignore[arg-type]


def test_forward_rejections() -> None:
    model = random_model()
    with pytest.raises(ValueError, match=r"x must have shape \(B, T, 5\), got \(2, 9, 4\)"):
        model(torch.zeros(2, 9, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="at most max_len = 24 checkpoints, got 25"):
        model.unroll(torch.zeros(2, 9, 5), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 10**9}, r"model: ModelConfig: n_layer must be an int in \[1, 1048576\], got 1000000000"),
        ({"n_layer": 10**6}, r"model\.safetensors does not fit its config\.json: it holds too few parameters"),
        ({"n_layer": 1.5}, r"config\.json: model\.n_layer: Input should be a valid integer, got 1\.5"),
        ({"n_layer": "3"}, r"config\.json: model\.n_layer: Input should be a valid integer, got '3'"),
        ({"width": 3}, r"config\.json: model\.width: Unexpected keyword argument, got 3"),
        ({"out_scale": float("inf")}, r"model: ModelConfig: out_scale must be finite, got inf"),
    ],
)
def test_a_config_that_no_model_has_is_refused_by_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_model(random_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model": config["model"] | change}))
    with pytest.raises(RuntimeError, match=message):
        load_model(tmp_path)
