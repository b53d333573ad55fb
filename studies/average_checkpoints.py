"""How predictable is a path without its jitter? Makes a store whose checkpoints are running means of another store's.

    python studies/average_checkpoints.py runs/reacher.zarr --window 8 --output runs/reacher-averaged.zarr

Row t is the mean of the rows t - window + 1 .. t, or of fewer at the start. Its env_steps and return are those of the
original row t, and so its return is that of another policy; `tipl evaluate` runs the averaged policies. The output is a
store for `tipl train` and `tipl evaluate`; there is no record and no figure.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from study import command_line

from tipl.storing.store import Store


def running_mean(weights: NDArray[np.float32], window: int) -> NDArray[np.float32]:
    """Return the mean (T, p) of up to `window` rows of weights (T, p) that end with each row."""
    total = np.cumsum(weights, 0, dtype=np.float64)
    total[window:] -= total[:-window].copy()
    count = np.minimum(np.arange(1, len(weights) + 1), window)
    return (total / count[:, None]).astype(np.float32)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--window", type=int, default=8, help="checkpoints in each mean")
    parser.add_argument("--output", type=Path, required=True, help="the new store")
    arguments = parser.parse_args()
    if arguments.window < 1:
        parser.error(f"--window must be at least 1, got {arguments.window}")
    source = Store.open(arguments.store)
    trials = [source.trial(i) for i in range(source.num_trials)]
    config = {**source.config, "averaged": {"window": arguments.window}}
    with Store.create(
        arguments.output, env_id=source.env_id, policy=source.policy, seeds=source.seeds, config=config
    ) as store:
        store.append(
            np.stack([running_mean(trial.weights(), arguments.window) for trial in trials]),
            np.stack([trial.env_steps for trial in trials]),
            np.stack([trial.episodic_return for trial in trials]),
        )


if __name__ == "__main__":
    main()
