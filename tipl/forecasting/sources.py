"""Stores as the forecaster sees them: which trials teach, which choose, which judge, and how paths are thinned."""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tipl.collecting.settings import is_complete, num_checkpoints_asked
from tipl.forecasting.train_config import TrainConfig
from tipl.storing.store import Store
from tipl.subspace.prefix_end import MIN_PREFIX_END


@dataclass(frozen=True)
class Split:
    """Which trials teach, which choose, which judge: disjoint trial numbers, unless in-sample."""

    train: list[int]
    validation: list[int]
    heldout: list[int]


def split_trials(num_trials: int, config: TrainConfig) -> Split:
    """Split whole trials at random by `config.seed`; at least one on each side. In-sample, all teach and all judge.

    Raises ValueError where there are fewer than three trials.
    """
    if num_trials < 3:
        raise ValueError(
            f"train: the store must hold at least 3 trials (training, validation, held out), got {num_trials}"
        )
    order = np.random.default_rng(config.seed).permutation(num_trials)
    num_heldout = min(max(1, round(num_trials * config.heldout_fraction)), num_trials - 2)
    num_validation = min(max(1, round(num_trials * config.validation_fraction)), num_trials - num_heldout - 1)
    heldout, validation, train = np.split(order, [num_heldout, num_heldout + num_validation])
    if config.in_sample:
        heldout = train = order
    return Split(sorted(train.tolist()), sorted(validation.tolist()), sorted(heldout.tolist()))


@dataclass(frozen=True)
class Source:
    """A store, how its trials are split, and how many checkpoints T of each path are looked at."""

    store: Store
    split: Split
    num_checkpoints: int
    path_length: int | None = None
    """Checkpoints of each path, of which T are looked at: a collection that goes on may add more meanwhile. None takes
    what is there."""

    @classmethod
    def of(cls, store: Store, config: TrainConfig) -> "Source":
        """Return the source that `config` makes of a store."""
        split = split_trials(store.num_trials, config)
        lengths = {trial: store.trial(trial).num_checkpoints for trial in split.train + split.validation}
        first = lengths[split.train[0]]
        for trial, length in lengths.items():
            if length != first:
                raise ValueError(
                    f"train: all trials must hold the same number of checkpoints, trial {split.train[0]} has "
                    f"{first}, trial {trial} has {length}"
                )
        if config.num_checkpoints is not None and config.num_checkpoints > first:
            raise ValueError(
                f"train: num_checkpoints must be at most {first}, as the paths in {store.path} are long, got "
                f"{config.num_checkpoints}"
            )
        return cls(store, split, config.num_checkpoints or first, first)

    def learned(self, config: TrainConfig) -> tuple[list[int], list[int]]:
        """Return the training and the validation trials that are read."""
        return self.split.train[: config.max_trials], self.split.validation[: max(1, config.max_trials // 4)]

    def path(self, trial: int) -> NDArray[np.float32]:
        """Return the weights (T, p) of a trial, thinned evenly."""
        return thin(self.store.trial(trial).weights(stop=self.path_length), self.num_checkpoints)


def thin(weights: NDArray[np.float32], num_checkpoints: int) -> NDArray[np.float32]:
    """Return T = num_checkpoints rows of (T', p), evenly spaced from the first on, as far apart as T' allows."""
    return weights[:: (len(weights) - 1) // (num_checkpoints - 1)][:num_checkpoints]


def warn_if_unfinished(stage: str, store: Store) -> None:
    """Warn that the store is an unfinished collection, of which only what is there is used; a finished one is silent.

    Raises ValueError where nothing can be learned from it yet: its paths differ in length, or are too short.
    """
    if is_complete(store):
        return
    commits = store.commits(range(store.num_trials))
    low, high = min(commits), max(commits)
    number = f"{low}" if low == high else f"{low} to {high}"
    asked = num_checkpoints_asked(store)
    number += "" if asked is None else f" of {asked}"
    found = f"{stage}: {store.path} is an unfinished collection: {number} checkpoints of each of {len(store)} trials"
    goes_on = "the same `tipl collect` goes on with it"
    if low != high or low < MIN_PREFIX_END + 2:
        raise ValueError(f"{found} are there, and all need equally many, at least {MIN_PREFIX_END + 2}; {goes_on}")
    warnings.warn(f"{found} are there, and only these are used; {goes_on}", stacklevel=3)
