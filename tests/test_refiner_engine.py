"""The native refiner: its answers, its loss and their gradient, against the definition in torch in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from tipl import _core
from tipl.forecasting.refiner import KINDS, Observed, Refiner, growth_of

PREFIX_END = 7


def refiner_of(hidden: int) -> Refiner:
    """Return a refiner in which every parameter counts."""
    torch.manual_seed(0)
    refiner = Refiner(hidden, 30)
    for parameter in refiner.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    return refiner.eval()


class Case:
    """R runs of m weights, at J horizons each."""

    def __init__(self, refiner: Refiner, runs: int, weights: int, horizons: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.refiner = refiner
        # Some of the signed inputs lie beyond the bound of 5.
        self.features = 3.0 * torch.randn(runs, weights, 19, generator=generator)
        self.kinds = torch.randint(len(KINDS), (runs, weights), generator=generator)
        self.forecasts = 3.0 * torch.randn(runs, horizons, weights, generator=generator)
        self.steps = torch.randint(1, 20, (runs, horizons), generator=generator).float()
        self.gain = torch.rand(runs, weights, generator=generator)
        self.offset = torch.randn(runs, weights, generator=generator)
        places = refiner.place(PREFIX_END, self.steps)
        self.inputs = [it.numpy() for it in (self.features, self.kinds, self.forecasts, places)]

    def answers(self, refiner: Refiner) -> Tensor:
        """Return what torch answers, in the precision of the refiner."""
        dtype = next(refiner.parameters()).dtype
        features, forecasts, steps = (it.to(dtype) for it in (self.features, self.forecasts, self.steps))
        answers = []
        for j in range(forecasts.shape[1]):
            seen = Observed(features, torch.ones_like(features[..., 0]), self.kinds)
            refined = refiner(seen, forecasts[:, j], PREFIX_END, steps[:, j])
            answers.append((refined - forecasts[:, j]) / growth_of(PREFIX_END, steps[:, j])[:, None])
        return torch.stack(answers, 1)

    def loss(self, refiner: Refiner) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return torch's errors (R,), and the gradient of their mean."""
        errors = (self.gain * self.answers(refiner)[:, 0] + self.offset).square().sum(-1).sqrt()
        refiner.zero_grad()
        errors.mean().backward()
        return errors.detach().numpy(), parameters_to_vector([it.grad for it in refiner.parameters()]).numpy()


def error(value: Any, truth: Any) -> float:
    value, truth = np.asarray(value), np.asarray(truth)
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize(
    ("hidden", "runs", "weights", "horizons"),
    [(64, 1, 300, 3), (64, 2, 128, 1), (8, 1, 129, 2), (5, 3, 1, 4), (1, 1, 17, 1), (130, 1, 40, 1)],
)
def test_answers_equal_torchs_in_float64(hidden, runs, weights, horizons):
    case = Case(refiner_of(hidden), runs, weights, horizons)
    answers = case.refiner.engine(2).answer(case.refiner.flat(), *case.inputs)
    truth = case.answers(copy.deepcopy(case.refiner).double()).detach()
    assert answers.shape == truth.shape
    assert error(answers, truth) < 2.0 * error(case.answers(case.refiner).detach(), truth) + 2e-7


@pytest.mark.parametrize(
    ("hidden", "runs", "weights"), [(64, 16, 256), (64, 2, 300), (8, 3, 33), (5, 1, 1), (1, 2, 16), (130, 1, 40)]
)
def test_errors_and_gradients_equal_torchs_in_float64(hidden, runs, weights):
    case = Case(refiner_of(hidden), runs, weights, 1)
    got = case.refiner.engine(2).loss(case.refiner.flat(), *case.inputs, case.gain.numpy(), case.offset.numpy())
    torchs, truth = case.loss(case.refiner), case.loss(copy.deepcopy(case.refiner).double())
    for value, in_float32, true in zip(got, torchs, truth, strict=True):
        assert value.shape == true.shape
        assert error(value, true) < 2.0 * error(in_float32, true) + 3e-7


def test_an_error_of_zero_has_no_gradient():
    case = Case(refiner_of(8), 2, 20, 1)
    nothing = np.zeros((2, 20), np.float32)
    errors, grad = case.refiner.engine(1).loss(case.refiner.flat(), *case.inputs, nothing, nothing)
    assert not errors.any()
    assert not grad.any()


def test_same_bits_with_any_number_of_threads_and_in_any_company():
    case = Case(refiner_of(64), 5, 200, 3)
    features, kinds, forecasts, places = case.inputs
    flat = case.refiner.flat()
    answers = [case.refiner.engine(threads).answer(flat, *case.inputs) for threads in (1, 2, 3, 1)]
    for other in answers[1:]:
        np.testing.assert_array_equal(other, answers[0])
    alone = case.refiner.engine(1).answer(
        flat,
        *(it[2:3, 40:].copy() for it in (features, kinds)),
        forecasts[2:3, 1:2, 40:].copy(),
        places[2:3, 1:2].copy(),
    )
    np.testing.assert_array_equal(alone[0, 0], answers[0][2, 1, 40:])

    one = Case(refiner_of(64), 5, 200, 1)
    losses = [
        one.refiner.engine(threads).loss(flat, *one.inputs, one.gain.numpy(), one.offset.numpy())
        for threads in (1, 2, 3)
    ]
    for errors, grad in losses[1:]:
        np.testing.assert_array_equal(errors, losses[0][0])
        np.testing.assert_array_equal(grad, losses[0][1])


def test_what_cannot_be_is_refused():
    case = Case(refiner_of(4), 2, 6, 1)
    engine, flat = case.refiner.engine(1), case.refiner.flat()
    features, kinds, forecasts, places = case.inputs
    assert engine.num_params == len(flat)
    gain = case.gain.numpy()
    for arguments, message in (
        ((flat[1:], features, kinds, forecasts, places), r"answer: params must have shape \(P,\)"),
        ((flat, features[..., 1:].copy(), kinds, forecasts, places), r"features must have shape \(R, m, F\)"),
        ((flat, features, kinds[:, 1:].copy(), forecasts, places), "kinds must have shape"),
        ((flat, features, kinds + 3, forecasts, places), r"answer: kinds must lie in \[0, 8\)"),
        ((flat, features, kinds - 8, forecasts, places), r"answer: kinds must lie in \[0, 8\)"),
        ((flat, features, kinds, forecasts[:1], places), "forecasts must have shape"),
        ((flat, features, kinds, forecasts, places[..., :2].copy()), "places must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.answer(*arguments)
    with pytest.raises(ValueError, match="loss: gain must have shape"):
        engine.loss(flat, *case.inputs, gain[:1], gain)
    two = Case(refiner_of(4), 2, 6, 2)
    with pytest.raises(ValueError, match="loss: forecasts must hold one horizon, got 2"):
        engine.loss(flat, *two.inputs, gain, gain)
    with pytest.raises(ValueError, match=r"loss: features must hold at least one run, got 0"):
        engine.loss(flat, *(it[:0] for it in case.inputs), gain[:0], gain[:0])
    with pytest.raises(ValueError, match=r"Refiner: hidden must lie in \[1, 4096\], got 0"):
        _core.Refiner(hidden=0, num_signed=14, num_unsigned=5, num_kinds=8, bound=5.0, linear_gain=0.3, num_threads=1)
    with pytest.raises(TypeError, match="features must be a NumPy array of float32, got float64"):
        engine.answer(flat, features.astype(np.float64), kinds, forecasts, places)
    assert engine.answer(flat, *(it[:, :0] for it in (features, kinds)), forecasts[..., :0], places).shape == (2, 1, 0)
