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
every signed input negated it gives the negated answer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tipl.files.sealed import load_arrays, save_arrays
from tipl.forecasting.transformer import arrays_of, set_arrays
from tipl.policy import Layout
from tipl.threads import torch_threads

LAGS = tuple(0.1 * i for i in range(10))
"""At which shares of the prefix a weight's past is looked at; the last checkpoint but one is added."""
RANK = 2
"""Rank of the approximation to a matrix's displacement, which tells what moved together from what moved alone."""
KINDS = ("log_std", "first weight", "first bias", "weight", "bias", "last weight", "last bias", "other")

_SIGNED = len(LAGS) + 5  # lags, last step, start, whole, recent, forecast
_UNSIGNED = 5  # spread, row, column, bend, pace
_PLACE = 3
_BOUND = 5.0  # the network's inputs are clipped to this; outliers count in the linear part alone
_BLOCK = 2048  # weights refined at once: their activations stay in the cache, twice as fast as all weights at once
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

    past: Tensor
    """(..., m, len(LAGS) + 1): displacements from theta_h at the lags, and _LAST_STEP_GAIN times the last step, over
    `scale`."""
    signed: Tensor
    """(..., m, 3): theta_0 over its tensor's RMS; rank-2 approximations of all that the tensor has moved, and of the
    second half of it, over `scale`."""
    unsigned: Tensor
    """(..., m, 5), logarithms: `scale` over the RMS of theta_0; RMS of the row and of the column over `scale`; how much
    of the run's path its second half and its last step are."""
    scale: Tensor
    """(..., m): RMS of theta_h - theta_0 over the weight's tensor."""
    kind: Tensor
    """(..., m) int64, indices into KINDS."""

    @classmethod
    def of(cls, prefix: NDArray[np.float32], layout: Layout) -> "Observed":
        """Return what a prefix (h+1, p) shows of all its p weights."""
        h = len(prefix) - 1
        start = torch.from_numpy(prefix[0].copy())
        at = [round(share * h) for share in LAGS] + [h - 1, h // 2, h]
        moved = torch.from_numpy(prefix[at]) - start  # (lags + 3, p)
        *past, last, middle, end = moved
        parts = []
        for offset, shape in layout.layout.values():
            size = int(np.prod(shape))
            here = slice(offset, offset + size)
            parts.append(_of_tensor(start[here], end[here], (end - middle)[here], shape))
        scale, first, whole, recent, spread, row, column = torch.cat(parts, 1)
        unit = torch.where(scale > 0, scale, 1.0)  # a tensor that stood still: all its features are zero
        bend, pace = (
            torch.log((end - x).norm() / end.norm().clamp(min=1e-30) + 1e-6).expand_as(scale) for x in (middle, last)
        )
        return cls(
            past=torch.stack([*((x - end) / unit for x in past), _LAST_STEP_GAIN * (end - last) / unit], -1),
            signed=torch.stack([first, whole / unit, recent / unit], -1),
            unsigned=torch.stack([spread, row, column, bend, pace], -1),
            scale=scale,
            kind=torch.from_numpy(kinds_of(layout)),
        )

    def take(self, index: Any) -> "Observed":
        """Return what is known of some of the weights, or of some of the runs."""
        return Observed(*(value[index] for value in vars(self).values()))

    @classmethod
    def stack(cls, runs: Sequence["Observed"]) -> "Observed":
        """Return what is known of several runs' weights, with an axis for the runs in front."""
        return cls(*(torch.stack(values) for values in zip(*(vars(run).values() for run in runs), strict=True)))


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
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = (left[:, :RANK] * singular[:RANK]) @ right[:RANK]
    return nearest


class Refiner(nn.Module):
    """The network: zero at first, so that an untrained one leaves every forecast as it is."""

    def __init__(self, hidden: int = 64, max_len: int = 64) -> None:
        super().__init__()
        self.hidden, self.max_len = hidden, max_len
        about = _UNSIGNED + len(KINDS) + _PLACE
        self.signed = nn.Linear(_SIGNED, hidden, bias=False)
        self.unsigned = nn.Linear(about, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, 1, bias=False)
        self.linear = nn.Linear(len(KINDS) + _PLACE, _SIGNED)
        for zero in (self.head.weight, self.linear.weight, self.linear.bias):
            nn.init.zeros_(zero)

    def forward(self, seen: Observed, forecast: Tensor, prefix_end: int, horizon: Tensor) -> Tensor:
        """Return displacements from theta_h (..., m), refined from those that the Transformer forecasts (..., m).

        `horizon` (...) counts checkpoints after `prefix_end`, one value for each run.
        """
        unit = torch.where(seen.scale > 0, seen.scale, 1.0)
        x = torch.cat([seen.past, seen.signed, (forecast / unit)[..., None]], -1)  # (..., m, X)
        n = horizon[..., None, None].expand(*x.shape[:-1], 1)
        place = torch.cat(
            [torch.log(n / prefix_end), torch.full_like(n, prefix_end / self.max_len), n / self.max_len], -1
        )
        where = torch.cat([F.one_hot(seen.kind, len(KINDS)).to(x.dtype), place], -1)
        odd, even = self.signed(x.clamp(-_BOUND, _BOUND)), self.unsigned(torch.cat([seen.unsigned, where], -1))
        answer = 0.5 * (self._answer(even + odd) - self._answer(even - odd)) + _LINEAR_GAIN * (
            self.linear(where) * x
        ).sum(-1)
        growth = (n[..., 0] / prefix_end).sqrt().clamp(max=_MAX_GROWTH)  # about how a path's displacement grows
        refined: Tensor = forecast + seen.scale * growth * answer
        return refined

    def _answer(self, z: Tensor) -> Tensor:
        answer: Tensor = self.head(F.gelu(self.middle(F.gelu(z))))
        return answer.squeeze(-1)

    @torch.inference_mode()
    def refine(
        self, prefix: NDArray[np.float32], layout: Layout, forecast: NDArray[np.float32], horizons: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return forecast weights (n, p) at `horizons` (n,) after a prefix (h+1, p), refined.

        The weights of one horizon have the same bits whichever other horizons are asked for, with any number of
        threads."""
        with torch_threads(1):  # the last bits of a matrix product depend on their number
            seen, last = Observed.of(prefix, layout), torch.from_numpy(prefix[-1].copy())
            parts = [slice(start, start + _BLOCK) for start in range(0, len(last), _BLOCK)]
            blocks = [seen.take(part) for part in parts]
            refined = []
            for row, n in zip(forecast, horizons, strict=True):
                moved, horizon = torch.from_numpy(row) - last, torch.tensor(float(n))
                answers = [
                    self(block, moved[part], len(prefix) - 1, horizon)
                    for block, part in zip(blocks, parts, strict=True)
                ]
                refined.append(last + torch.cat(answers))
        return torch.stack(refined).numpy()

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
