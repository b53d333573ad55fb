"""Training, calibration and evaluation on a collection that is still going on, or was cut off."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from factories import SPEC, TINY_EVALUATE, TINY_TRAIN, flags, make_store

from tipl.collecting.resume import Unfinished
from tipl.forecasting.forecaster import Forecaster, source_to_judge
from tipl.forecasting.sources import Source
from tipl.forecasting.training import train
from tipl.storing.store import Store

pytestmark = pytest.mark.usefixtures("hasty_nowcaster", "one_thread")

ASKED_FOR_25 = {"total_timesteps": 24 * 32, "ppo": {"num_steps": 32}}


def unfinished_store(path: Path, num_checkpoints: int = 16) -> Store:
    """Six trials that will have 25 checkpoints, as a collection leaves them when it is cut off."""
    store = make_store(path, 6, num_checkpoints, config=ASKED_FOR_25)
    store.close()
    Unfinished(store).begin(6)
    return store


def append(store: Store, num_checkpoints: int, trials: range | None = None) -> None:
    """Collect so many more checkpoints."""
    shape = (len(trials or store.seeds), num_checkpoints)
    weights = np.random.default_rng(0).normal(size=(*shape, SPEC.num_params)).astype(np.float32)
    with Store.open(store.path, writable=trials or True) as opened:
        opened.append(weights, np.zeros(shape, np.int64), np.zeros(shape))


@pytest.mark.filterwarnings("always")
def test_each_stage_says_what_it_uses(
    tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    store, model = unfinished_store(tmp_path / "store"), tmp_path / "model"
    stages = {
        "train": ("--output", model, *flags(TINY_TRAIN)),
        "calibrate": ("--model", model, "--output", tmp_path / "calibrated", "--num-trials", 1),
        "evaluate": ("--model", model, "--output", tmp_path / "evaluation", *flags(TINY_EVALUATE)),
    }
    for stage, arguments in stages.items():
        assert run_tipl(stage, "--store", store.path, *arguments) == 0
        warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert warned == [
            f"tipl: warning: {stage}: {store.path} is an unfinished collection: 16 of 25 checkpoints of each of 6 "
            "trials are there, and only these are used; the same `tipl collect` goes on with it"
        ]
    assert Forecaster.load(model).model.config.max_len == 16


@pytest.mark.parametrize(("num_checkpoints", "shard", "found"), [(2, None, "2"), (16, range(2), "16 to 19")])
def test_too_few_or_unequal_checkpoints_are_refused(
    num_checkpoints: int, shard: range | None, found: str, tmp_path: Path
) -> None:
    store = unfinished_store(tmp_path / "store", num_checkpoints)
    if shard is not None:  # on a cluster, one worker is ahead of another
        append(store, 3, shard)
    message = (
        rf"{found} of 25 checkpoints of each of 6 trials are there, and all need equally many, at least 5; the same"
    )
    with pytest.raises(ValueError, match=message):
        train(store, tmp_path / "model", TINY_TRAIN, progress=False)
    assert not (tmp_path / "model").exists()


def test_paths_are_thinned_alike_while_the_collection_goes_on(tmp_path: Path) -> None:
    store = unfinished_store(tmp_path / "store", 9)
    source = Source.of(store, dataclasses.replace(TINY_TRAIN, num_checkpoints=8))
    before = source.path(0)
    append(store, 16)
    np.testing.assert_array_equal(source.path(0), before)


def test_a_thinned_model_does_not_judge_the_paths_that_have_grown(tmp_path: Path) -> None:
    """The store would be thinned more than the model's training was: every second checkpoint, not every one."""
    store = unfinished_store(tmp_path / "store", 9)
    config = dataclasses.replace(TINY_TRAIN, num_checkpoints=8, refine_steps=0)
    with pytest.warns(UserWarning, match=re.escape("9 of 25 checkpoints")):
        forecaster = Forecaster.load(train(store, tmp_path / "model", config, progress=False))
    assert source_to_judge(store, forecaster).path_length == 9
    append(store, 16)
    with pytest.raises(ValueError, match=r"was trained on num_checkpoints = 9, the store has 25"):
        source_to_judge(Store.open(store.path), forecaster)
