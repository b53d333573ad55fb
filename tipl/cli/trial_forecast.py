"""What `tipl rollout` and `tipl video` share: one trial of a store, observed up to a prefix and continued."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import tipl
from tipl.subspace.prefix_end import MIN_PREFIX_END, prefix_end_of

if TYPE_CHECKING:
    from tipl.forecasting.forecast import Ahead

MAX_TEACHERS = 64
"""Other trials that rivals learn from, at most."""


@dataclasses.dataclass(frozen=True)
class TrialForecast:
    """A trial's path, thinned to fit the model, and the forecast of what follows its prefix."""

    store: "tipl.Store"
    forecaster: "tipl.Forecaster"
    trial: int
    every: int
    """The path holds every n-th checkpoint of the trial."""
    path: NDArray[np.float32]
    """(T, p)"""
    prefix_end: int
    ahead: "Ahead"
    """The forecast of n checkpoints."""

    @property
    def horizons(self) -> NDArray[np.int64]:
        """1, 2, ... n."""
        return np.arange(1, len(self.ahead.weights) + 1)

    @property
    def checkpoints(self) -> NDArray[np.int64]:
        """The trial's checkpoint that each row of the forecast is of, (n,)."""
        return self.every * (self.prefix_end + self.horizons)

    @property
    def observed(self) -> NDArray[np.float32]:
        """(h+1, p)"""
        return self.path[: self.prefix_end + 1]

    @property
    def truth(self) -> NDArray[np.float32]:
        """What followed, as far as the store and the forecast both go, (m, p)."""
        return self.path[self.prefix_end + 1 :][: len(self.ahead.weights)]

    @classmethod
    def of(
        cls,
        owner: str,
        store: str,
        model: Path | None,
        *,
        trial: int,
        prefix: float,
        every: int | None,
        horizon: int | None,
        device: str = "cpu",
    ) -> "TrialForecast":
        """Return the forecast that a command's arguments ask for; error texts begin with `owner`.

        Raises ValueError where an argument is out of range, and what `tipl.rollout` raises.
        """
        from tipl.forecasting.forecaster import check_and_forecast

        check_prefix(owner, prefix)
        opened = tipl.Store.open(store)
        if not 0 <= trial < opened.num_trials:
            raise ValueError(f"{owner}: trial must lie in [0, {opened.num_trials}), got {trial}")
        forecaster = tipl.load_pretrained() if model is None else tipl.Forecaster.load(model)
        of_trial, max_len = opened.trial(trial), forecaster.model.config.max_len
        every = -(-(of_trial.num_checkpoints - 1) // (max_len - 1)) if every is None else every
        if every < 1:
            raise ValueError(f"{owner}: every must be at least 1, got {every}")
        path = of_trial.weights()[::every]
        prefix_end = prefix_end_of(prefix, len(path))
        shown = f"prefix {prefix:g} of a path of {len(path)} checkpoints"
        if every > 1:
            shown = f"prefix {prefix:g} of every {every} of {of_trial.num_checkpoints} checkpoints"
        horizon = _checked_horizon(f"{owner}: {shown}", prefix_end, len(path), horizon, max_len)
        observed = path[: prefix_end + 1]
        (forecast,) = check_and_forecast(forecaster, observed, horizon, layout=opened.policy, device=device)
        return cls(opened, forecaster, trial, every, path, prefix_end, forecast.at())

    def rivals(self) -> dict[str, NDArray[np.float32]] | None:
        """Return what linear extrapolation and the mean path forecast, taught by other trials of the store.

        These are the trials that taught the forecaster or, where it was trained on other stores, any; MAX_TEACHERS at
        most. None where no other trial is as long as this one, or the prefix is the whole path.
        """
        from tipl.judging.predictors import Linear, MeanPath, canonical_coordinates
        from tipl.judging.training_path import TrainingPath
        from tipl.subspace.prefix import Prefix

        length, store = self.store.trial(self.trial).num_checkpoints, self.store
        source = self.forecaster.source_of(store)
        among = range(store.num_trials) if source is None else source["split"]["train"]
        teachers = [i for i in among if i != self.trial and store.trial(i).num_checkpoints == length][:MAX_TEACHERS]
        horizons = self.horizons[: len(self.truth)]
        paths = (store.trial(i).weights()[:: self.every] for i in teachers) if len(horizons) else ()
        training = [TrainingPath.of(path, store.policy, seed) for seed, path in enumerate(paths)]
        training = [it for it in training if it.walked(self.prefix_end) > 0]  # one that stands still teaches nothing
        if not training:
            return None
        coordinates = canonical_coordinates(training, self.prefix_end, self.forecaster.model.config.n_components)
        prefix = Prefix(self.observed)
        return {
            "linear": Linear.fit(training, self.prefix_end).forecast(prefix, self.horizons),
            "mean_path": MeanPath.fit(coordinates).forecast(prefix, horizons),
        }


def _checked_horizon(shown: str, prefix_end: int, length: int, horizon: int | None, max_len: int) -> int:
    """Return how many checkpoints to forecast after a prefix, by default to the end of a path of `length` checkpoints.

    Raises ValueError, beginning with `shown`, the prefix in words, where it is too short or leaves no room for them.
    """
    held, room = prefix_end + 1, max_len - 1 - prefix_end
    if prefix_end < MIN_PREFIX_END:
        least = MIN_PREFIX_END + 1
        raise ValueError(f"{shown} must hold at least {least}, got {held}: choose a larger prefix or a smaller every")
    if room < 1:
        raise ValueError(
            f"{shown} must leave room for a forecast: it holds {held}, and the model knows paths of {max_len}; choose "
            "a smaller prefix or a larger every"
        )
    if horizon is None:
        if held == length:
            raise ValueError(f"{shown} leaves nothing to forecast: choose a smaller prefix, or a horizon up to {room}")
        if length > max_len:
            raise ValueError(
                f"{shown} cannot be continued to the end: the model knows paths of {max_len}; choose a larger every, "
                f"or a horizon up to {room}"
            )
        return length - held
    if not 1 <= horizon <= room:
        raise ValueError(
            f"{shown}: horizon must lie in [1, {room}], because the prefix holds {held} and the model knows paths of "
            f"{max_len}, got {horizon}"
        )
    return horizon


def check_prefix(owner: str, prefix: float) -> None:
    """Raise ValueError where `prefix` is no share of a path."""
    if not 0.0 < prefix <= 1.0:
        raise ValueError(f"{owner}: prefix must be a share of the path in (0, 1], got {prefix}")
