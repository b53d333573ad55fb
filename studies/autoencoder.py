"""Autoencoders of checkpoints, for `compare_representations.py`: one MLP for all tokens of a kind.

Shapes  p weights, h = prefix_end, N tokens of a kind, d weights and c numbers per token, B batch.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from representations import Tokens, Weights
from torch import Tensor, nn

from tipl.progress import progress_bar


def moved_of(path: Weights, end: int) -> Tensor:
    """Return (theta_t - theta_0) / |theta_h - theta_0|, (T, p)."""
    return torch.from_numpy((path - path[0]) / np.linalg.norm(path[end] - path[0]))


def weights_of(moved: torch.Tensor, path: Weights, end: int) -> Weights:
    """Return the weights (p,) for displacements (1, p) in units of |theta_h - theta_0|."""
    return np.asarray(path[0] + moved[0].numpy() * np.linalg.norm(path[end] - path[0]))


class Autoencoder(nn.Module):
    """One MLP d -> c -> d for each kind of token; kinds with d <= c are not encoded. Untrained, it is persistence."""

    def __init__(self, tokens: Tokens, widths: Sequence[int], scales: Sequence[float], hidden: int = 128) -> None:
        """The displacements of each kind are divided by its entry of `scales`."""
        super().__init__()
        self.tokens, self.widths, self.scales = [torch.from_numpy(kind) for kind in tokens], widths, scales
        self.holders = torch.bincount(torch.cat([kind.ravel() for kind in self.tokens])).float()  # (p,)
        self.encoders, self.decoders = nn.ModuleList(), nn.ModuleList()
        for (_, d), c in zip((kind.shape for kind in tokens), widths, strict=True):
            last = nn.Linear(hidden, d)
            nn.init.zeros_(last.weight)
            coders = (
                nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, c)),
                nn.Sequential(nn.Linear(c, hidden), nn.GELU(), last),
            )
            for coder, known in zip(coders, (self.encoders, self.decoders), strict=True):
                known.append(coder if d > c else nn.Identity())

    def encode(self, moved: Tensor) -> list[Tensor]:
        """Return the numbers (B, N, c) of each kind for displacements (B, p)."""
        parts = zip(self.tokens, self.scales, self.encoders, strict=True)
        return [encoder(moved[:, kind] / scale) for kind, scale, encoder in parts]

    def decode(self, numbers: Sequence[Tensor], at_end: Sequence[Tensor], end: Tensor) -> Tensor:
        """Return displacements (B, p); the numbers `at_end` decode exactly to `end` (B, p), the displacements at h.

        A weight that belongs to two neurons gets the mean of their values.
        """
        total = torch.zeros_like(end)
        for kind, scale, decoder, *z in zip(self.tokens, self.scales, self.decoders, numbers, at_end, strict=True):
            total.index_add_(1, kind.ravel(), scale * (decoder(z[0]) - decoder(z[1])).flatten(1))
        return end + total / self.holders

    def forward(self, moved: Tensor, end: Tensor) -> Tensor:
        """Return displacements (B, p) encoded and decoded."""
        return self.decode(self.encode(moved), self.encode(end), end)


def train_autoencoder(
    tokens: Tokens,
    widths: Sequence[int],
    training: Sequence[Weights],
    validation: Sequence[Weights],
    ends: Sequence[int],
    steps: int,
    seed: int = 0,
) -> Autoencoder:
    """Minimise the floor at random (trial, h, t > h) of training trials; return the best model on validation trials."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    sizes = torch.stack([moved_of(path, end)[-1] for path in training for end in ends])
    model = Autoencoder(tokens, widths, [float(sizes[:, kind].square().mean().sqrt()) for kind in tokens])
    average, best, state = copy.deepcopy(model), np.inf, copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    judged = [moved_of(path, end)[[end, -1]] for path in validation for end in ends]
    batch_size, length = (32 if len(tokens[0]) == 1 else 8), len(training[0])  # tokens are many or few
    with progress_bar(True) as bar:
        task = bar.add_task("autoencoder", total=steps, note="")
        for step in range(steps + 1):
            if step % max(1, steps // 20) == 0:
                with torch.inference_mode():
                    error = _relative(average, torch.stack(judged)).item()
                if error < best:
                    best, state = error, copy.deepcopy(average.state_dict())
                bar.update(task, note=f"validation floor {error:.3f}, best {best:.3f}")
            if step == steps:
                break
            batch = []
            for trial in rng.integers(len(training), size=batch_size):
                end = int(rng.integers(min(ends), max(ends) + 1))
                t = int(rng.integers(end + 1, length))
                batch.append(moved_of(training[trial][[0, end, t]], 1)[1:])
            optimizer.zero_grad()
            _relative(model, torch.stack(batch)).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for averaged, current in zip(average.parameters(), model.parameters(), strict=True):
                    averaged.lerp_(current, 1.0 - min(0.99, step / (step + 10)))
            bar.advance(task)
    average.load_state_dict(state)
    return average.eval().requires_grad_(False)


def _relative(model: Autoencoder, pairs: Tensor) -> Tensor:
    """Return the mean relative floor of displacements at h and ahead, pairs (B, 2, p)."""
    end, ahead = pairs.unbind(1)
    errors: Tensor = (model(ahead, end) - ahead).norm(dim=1) / ahead.norm(dim=1)
    return errors.mean()
