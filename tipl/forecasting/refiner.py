"""Refine a forecast weight by weight, beyond what the directions of a prefix can represent.

Shapes  m weights of a run (all p or a sample), h = prefix_end, n horizon in checkpoints; leading axes are runs.

A forecast in a prefix basis stays within the span of what was seen, and most of its error lies outside that span (0.27
of 0.36 on InvertedPendulum at a 20 % prefix). One small network, the same for every weight of every run, sees a
weight's own past, the Transformer's forecast for it, and what the two neurons that it joins have done, and predicts the
weight's displacement. That is not a linear function of the prefix, so it can leave the prefix's span. The idea is that
of weight nowcasting (Jang et al. 2023, ICML, "Learning to Boost Training by Periodic Nowcasting Near Future Weights"),
which looks at each weight alone.

All inputs are divided by the root mean square displacement of the weight's tensor, so that runs, layers and tasks look
alike. A policy stays the same if a hidden tanh unit and all its weights are negated; hence the network is odd: with
every signed input negated it gives the negated answer.

`Refiner.forward` is the definition, in torch. Forecasts and training use the native engine (`csrc/refiner.h`), which
tests/test_refiner.py compares with it in float64.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from tipl import _core
from tipl.files.sealed import load_arrays, save_arrays
from tipl.forecasting.transformer import arrays_of, set_arrays
from tipl.policy import Layout
from tipl.threads import torch_threads

LAGS = tuple(0.1 * i for i in range(10))
"""At which shares of the prefix a weight's past is looked at; the last checkpoint but one is added."""
RANK = 2
"""Rank of the approximation to a matrix's displacement, which tells what moved together from what moved alone."""
KINDS = ("log_std", "first weight", "first bias", "weight", "bias", "last weight", "last bias", "other")

_SIGNED = len(LAGS) + 4  # lags, last step, start, whole, recent; the forecast makes one more
_UNSIGNED = 5  # spread, row, column, bend, pace
_PLACE = 3
_BOUND = 5.0  # the network's inputs are clipped to this; outliers count in the linear part alone
_BLOCK = 2**18  # weights refined at once, so that little memory is needed beside the forecast
_LARGE = 512  # the least side of a matrix whose singular vectors are not all computed
_LAST_STEP_GAIN = 3.0  # a single step is small beside the displacements at the lags
_LINEAR_GAIN = 0.3  # keeps the linear part's first steps as small as the network's
_MAX_GROWTH = 2.0  # of a displacement beyond the prefix: about the root of how much longer the path gets
_SMALL = 1e-3  # added to an RMS of initial weights, which can be zero


def kinds_of(layout: Layout) -> NDArray[np.int64]:
    """Return the index into `KINDS` of each weight (p,)."""
    matrices = [name for name, shape in layout.shapes.items() if len(shape) > 1 and "log_std" not in name]
    kinds, place = [], "other"
    for name, shape in layout.shapes.items():
        if "log_std" in name:
            kind = "log_std"
        elif len(shape) > 1:
            place = "first " if name == matrices[0] else "last " if name == matrices[-1] else ""
            kind = f"{place}weight"
        else:
            kind = f"{place}bias" if place != "other" and len(shape) == 1 else "other"
        kinds.append(np.full(int(np.prod(shape)), KINDS.index(kind)))
    return np.concatenate(kinds)


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a prefix shows of m weights, all float32."""

    features: Tensor
    """(..., m, 19): `signed`, then `unsigned`."""
    scale: Tensor
    """(..., m): RMS of theta_h - theta_0 over the weight's tensor."""
    kind: Tensor
    """(..., m) int64, indices into KINDS."""

    @classmethod
    def of(cls, prefix: NDArray[np.float32], layout: Layout) -> "Observed":
        """Return what a prefix (h+1, p) shows of all its p weights."""
        h = len(prefix) - 1
        at = [round(share * h) for share in LAGS] + [h - 1, h // 2, h]
        features, scales = torch.empty(layout.num_params, _SIGNED + _UNSIGNED), torch.empty(layout.num_params)
        for offset, shape in layout.layout.values():
            here = slice(offset, offset + int(np.prod(shape)))
            *past, last, middle, end = (_moved(prefix[:, here], i) for i in at)
            start = torch.from_numpy(prefix[0, here].copy())
            scale, first, whole, recent, spread, row, column = _of_tensor(start, end, end - middle, shape)
            unit = torch.where(scale > 0, scale, 1.0)  # a tensor that stood still: all its features are zero
            scales[here] = scale
            lags = ((x - end).div_(unit) for x in past)
            last_step = _LAST_STEP_GAIN * (end - last) / unit
            of_tensor = (first, whole / unit, recent / unit, spread, row, column)
            for i, feature in enumerate(itertools.chain(lags, (last_step,), of_tensor)):
                features[here, i] = feature
        last, middle, end = (_moved(prefix, i) for i in at[-3:])
        for i, x in ((-2, middle), (-1, last)):
            features[:, i] = torch.log((end - x).norm() / end.norm().clamp(min=1e-30) + 1e-6)
        return cls(features, scales, torch.from_numpy(kinds_of(layout)))

    @property
    def signed(self) -> Tensor:
        """(..., m, 14): displacements from theta_h at the lags, and _LAST_STEP_GAIN times the last step, over `scale`;
        theta_0 over its tensor's RMS; rank-2 approximations of all that the tensor has moved, and of the second half of
        it, over `scale`."""
        return self.features[..., :_SIGNED]

    @property
    def unsigned(self) -> Tensor:
        """(..., m, 5), logarithms: `scale` over the RMS of theta_0; RMS of the row and of the column over `scale`; how
        much of the run's path its second half and its last step are."""
        return self.features[..., _SIGNED:]

    @property
    def unit(self) -> Tensor:
        """(..., m): `scale`, or 1 for a tensor that stood still."""
        return torch.where(self.scale > 0, self.scale, 1.0)

    def take(self, index: Any) -> "Observed":
        """Return what is known of some of the weights, or of some of the runs."""
        return Observed(*(value[index] for value in vars(self).values()))

    @classmethod
    def stack(cls, runs: Sequence["Observed"]) -> "Observed":
        """Return what is known of several runs' weights, with an axis for the runs in front."""
        return cls(*(torch.stack(values) for values in zip(*(vars(run).values() for run in runs), strict=True)))


def _moved(path: NDArray[np.float32], checkpoint: int) -> Tensor:
    return torch.from_numpy(path[checkpoint] - path[0])


def _of_tensor(start: Tensor, end: Tensor, recent: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return scale, start, whole, recent, spread, row, column of `Observed` for one tensor's weights, (7, size)."""
    scale, first = (x.square().mean().sqrt() for x in (end, start))
    unit = torch.where(scale > 0, scale, 1.0)
    if len(shape) > 1:
        matrix = end.view(shape[0], -1)
        row, column = (matrix.square().mean(axis, keepdim=True).sqrt().expand_as(matrix).reshape(-1) for axis in (1, 0))
        whole, recent = (_low_rank(x.view(shape[0], -1)).reshape(-1) for x in (end, recent))
    else:
        row, column, whole = end.abs(), end.abs(), end
    return torch.stack(
        [
            scale.expand_as(end),
            start / (first + _SMALL),
            whole,
            recent,
            (0.5 * torch.log(scale / (first + _SMALL) + 1e-6)).expand_as(end),
            torch.log(row / unit + 1e-2),
            torch.log(column / unit + 1e-2),
        ]
    )


def _low_rank(matrix: Tensor) -> Tensor:
    """Return the nearest matrix of RANK; of a large one about the nearest, in time linear in its size."""
    if min(matrix.shape) > _LARGE:
        draws = torch.Generator().manual_seed(0)
        rows = torch.randn(4 * RANK, len(matrix), generator=draws) @ matrix
        for _ in range(8):  # subspace iteration
            rows = torch.linalg.qr((rows @ matrix.T @ matrix).T).Q.T
        return _low_rank(matrix @ rows.T) @ rows
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = (left[:, :RANK] * singular[:RANK]) @ right[:RANK]
    return nearest


def growth_of(prefix_end: int, horizon: Tensor) -> Tensor:
    """Return about how much farther than in the prefix a path comes in `horizon` (...) more checkpoints."""
    return (horizon / prefix_end).sqrt().clamp(max=_MAX_GROWTH)


class Refiner(nn.Module):
    """The network: zero at first, so that an untrained one leaves every forecast as it is."""

    def __init__(self, hidden: int = 64, max_len: int = 64) -> None:
        super().__init__()
        self.hidden, self.max_len = hidden, max_len
        about = _UNSIGNED + len(KINDS) + _PLACE
        self.signed = nn.Linear(_SIGNED + 1, hidden, bias=False)
        self.unsigned = nn.Linear(about, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, 1, bias=False)
        self.linear = nn.Linear(len(KINDS) + _PLACE, _SIGNED + 1)
        for zero in (self.head.weight, self.linear.weight, self.linear.bias):
            nn.init.zeros_(zero)

    def forward(self, seen: Observed, forecast: Tensor, prefix_end: int, horizon: Tensor) -> Tensor:
        """Return displacements from theta_h (..., m), refined from those that the Transformer forecasts (..., m).

        `horizon` (...) counts checkpoints after `prefix_end`, one value for each run.
        """
        x = torch.cat([seen.signed, (forecast / seen.unit)[..., None]], -1)  # (..., m, X)
        place = self.place(prefix_end, horizon)[..., None, :].expand(*x.shape[:-1], _PLACE)
        where = torch.cat([F.one_hot(seen.kind, len(KINDS)).to(x.dtype), place], -1)
        odd, even = self.signed(x.clamp(-_BOUND, _BOUND)), self.unsigned(torch.cat([seen.unsigned, where], -1))
        answer = 0.5 * (self._answer(even + odd) - self._answer(even - odd)) + _LINEAR_GAIN * (
            self.linear(where) * x
        ).sum(-1)
        refined: Tensor = forecast + seen.scale * growth_of(prefix_end, horizon)[..., None] * answer
        return refined

    def place(self, prefix_end: int, horizon: Tensor) -> Tensor:
        """Return what the network is told of horizons (...), (..., 3)."""
        end = torch.full_like(horizon, prefix_end / self.max_len)
        return torch.stack([torch.log(horizon / prefix_end), end, horizon / self.max_len], -1)

    def _answer(self, z: Tensor) -> Tensor:
        answer: Tensor = self.head(F.gelu(self.middle(F.gelu(z))))
        return answer.squeeze(-1)

    def engine(self, num_threads: int | None = None) -> _core.Refiner:
        """Return the native engine of networks of this size, on as many threads as torch has unless told otherwise."""
        return _core.Refiner(
            hidden=self.hidden,
            num_signed=_SIGNED,
            num_unsigned=_UNSIGNED,
            num_kinds=len(KINDS),
            bound=_BOUND,
            linear_gain=_LINEAR_GAIN,
            num_threads=torch.get_num_threads() if num_threads is None else num_threads,
        )

    @torch.inference_mode()
    def flat(self) -> NDArray[np.float32]:
        """Return a copy of all parameters (P,), as the engine reads them."""
        return parameters_to_vector(self.parameters()).numpy()

    @torch.inference_mode()
    def refine(
        self, prefix: NDArray[np.float32], layout: Layout, forecast: NDArray[np.float32], horizons: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return forecast weights (n, p) at `horizons` (n,) after a prefix (h+1, p), refined.

        The weights of one horizon have the same bits whichever other horizons are asked for, with any number of
        threads."""
        prefix_end, steps = len(prefix) - 1, torch.from_numpy(horizons).float()
        with torch_threads(1):  # the last bits of what a prefix shows depend on their number
            seen = Observed.of(prefix, layout)
        engine, flat, place = self.engine(), self.flat(), self.place(prefix_end, steps)[None].numpy()
        refined = np.empty_like(forecast, order="C")
        for start in range(0, len(seen.scale), _BLOCK):
            here = slice(start, start + _BLOCK)
            block, given = seen.take(here), torch.from_numpy(forecast[:, here])
            moved = torch.from_numpy(np.ascontiguousarray(forecast[:, here] - prefix[-1, here])).div_(block.unit)
            answers = torch.from_numpy(
                engine.answer(flat, block.features[None].numpy(), block.kind[None].numpy(), moved[None].numpy(), place)
            )[0]
            answers.mul_(growth_of(prefix_end, steps)[:, None]).mul_(block.scale)
            torch.add(given, answers, out=torch.from_numpy(refined[:, here]))
        return refined

    def save(self, path: Path) -> None:
        save_arrays(path, arrays_of(self), {"hidden": self.hidden, "max_len": self.max_len})

    @classmethod
    def load(cls, path: Path) -> "Refiner":
        """Return the refiner in `path`. Raises FileNotFoundError or, where the file is damaged, RuntimeError."""
        if not path.is_file():
            raise FileNotFoundError(f"Refiner.load: there is no file {path}")
        arrays, record = load_arrays(path, "Refiner.load")
        try:
            if not {"hidden", "max_len"} <= record.keys() or "middle.weight" not in arrays:
                raise ValueError("expected a record of hidden and max_len, and the array middle.weight")
            hidden, max_len = int(record["hidden"]), int(record["max_len"])
            if hidden < 1 or max_len < 1 or arrays["middle.weight"].shape != (hidden, hidden):
                raise ValueError(f"hidden = {hidden} and max_len = {max_len} do not fit its arrays")
            refiner = cls(hidden, max_len)
            set_arrays(refiner, arrays)
        except (LookupError, TypeError, ValueError) as error:
            raise RuntimeError(f"Refiner.load: {path} is damaged: {error}") from error
        return refiner.eval()
