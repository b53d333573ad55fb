"""TensorBoard curves: read back with TensorBoard's own reader, they are what the iterations gave."""

import dataclasses
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from factories import ENV_ID, TINY_PPO
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from tipl.collecting.collection import collect
from tipl.collecting.curves import LOSSES, TAGS, Curves
from tipl.collecting.population import Population
from tipl.collecting.population_records import IterationStats
from tipl.storing.store import Store

PPO = dataclasses.replace(TINY_PPO, learning_rate=1e-3)


def stats(seed: int, num_trials: int = 3) -> IterationStats:
    rng = np.random.default_rng(seed)
    return IterationStats(
        **{name: rng.normal(size=num_trials) for name in (*LOSSES, "episodic_return")},
        num_episodes=np.ones(num_trials, np.int64),
        learning_rate=0.1 / (1 + seed),
        seconds={"env": 0.25, "policy": 0.25, "update": 0.5},
    )


def curve(run: Path, tag: str) -> tuple[list[int], list[float]]:
    """Return the steps and values that TensorBoard shows of one tag of a run."""
    events = EventAccumulator(str(run), size_guidance={SCALARS: 0}).Reload()
    scalars = events.Scalars(tag) if tag in events.Tags()[SCALARS] else []
    return [scalar.step for scalar in scalars], [scalar.value for scalar in scalars]


def test_tensorboard_reads_back_every_figure_of_every_trial_and_their_mean(tmp_path):
    curves, rows = Curves(tmp_path / "tb", range(3)), [stats(seed) for seed in range(4)]
    for k, row in enumerate(rows):
        curves.write(32 * (k + 1), row, 32)
    runs = ["mean", "trial_0000", "trial_0001", "trial_0002"]
    assert sorted(path.name for path in (tmp_path / "tb").iterdir()) == runs
    assert set(TAGS) == {
        "charts/episodic_return", "charts/SPS", "charts/learning_rate", "losses/policy_loss", "losses/value_loss",
        "losses/entropy", "losses/approx_kl", "losses/clipfrac", "losses/explained_variance",
    }  # fmt: skip
    for name in runs:
        events = EventAccumulator(str(tmp_path / "tb" / name)).Reload()
        assert set(events.Tags()[SCALARS]) == set(TAGS)
        for tag in TAGS:
            steps, values = curve(tmp_path / "tb" / name, tag)
            given = {
                "SPS": [np.full(3, 32.0)] * 4,
                "learning_rate": [np.full(3, row.learning_rate) for row in rows],
            }.get(Path(tag).name) or [getattr(row, Path(tag).name) for row in rows]
            expected = [column.mean() if name == "mean" else column[int(name[-4:])] for column in given]
            assert steps == [32, 64, 96, 128]
            np.testing.assert_allclose(values, expected, rtol=1e-6)  # TensorBoard's scalars are float32


def test_points_have_the_times_at_which_their_iterations_ended(tmp_path, monkeypatch):
    times = itertools.count(1000.0)
    clock = SimpleNamespace(time=lambda: next(times), monotonic=lambda: 0.0)
    monkeypatch.setattr("tipl.collecting.checkpoint_appender.time", clock)
    tiny = {"env_id": ENV_ID, "num_trials": 2, "total_timesteps": 4 * 32, "ppo": TINY_PPO, "progress": False}
    collect(tmp_path / "store", tensorboard=tmp_path / "tb", **tiny)
    points = EventAccumulator(str(tmp_path / "tb" / "mean")).Reload().Scalars("charts/SPS")
    assert [(point.step, point.wall_time) for point in points] == [(32 * k, 1000.0 + k) for k in range(1, 5)]


def test_what_is_not_known_has_no_point_and_no_part_in_the_mean(tmp_path):
    curves = Curves(tmp_path, range(3))
    for k, returns in enumerate(([np.nan] * 3, [4.0, np.nan, 6.0], [1.0, 2.0, 3.0])):
        row = stats(k)
        row.episodic_return[:] = returns
        curves.write(k, row, 32)
    tag = "charts/episodic_return"
    assert curve(tmp_path / "trial_0000", tag) == ([1, 2], [4.0, 1.0])
    assert curve(tmp_path / "trial_0001", tag) == ([2], [2.0])
    assert curve(tmp_path / "mean", tag) == ([1, 2], [5.0, 2.0])
    assert curve(tmp_path / "trial_0001", "losses/entropy")[0] == [0, 1, 2]


def test_no_thread_and_no_open_file_stays_and_each_run_has_one_file(tmp_path):
    Curves(tmp_path / "warm", range(1)).write(0, stats(0, 1), 32)  # imports tensorboard
    threads, files = threading.enumerate(), os.listdir("/proc/self/fd")
    curves = Curves(tmp_path / "tb", range(64))
    for k in range(5):
        curves.write(k, stats(k, 64), 32)
        assert threading.enumerate() == threads
        assert os.listdir("/proc/self/fd") == files
    assert len(list((tmp_path / "tb").rglob("*tfevents*"))) == 65


def test_a_resumed_collection_goes_on_in_a_new_file_without_doubled_points(tmp_path):
    first = Curves(tmp_path, range(2))
    for k in range(1, 6):
        first.write(32 * k, stats(k, 2), 32)
    second = Curves(tmp_path, range(2), resumed=True)
    for k in range(4, 8):  # two iterations had not reached the store
        second.write(32 * k, stats(100 + k, 2), 32)
    for name, i in (("trial_0000", 0), ("trial_0001", 1)):
        expected = [stats(k, 2).entropy[i] for k in (1, 2, 3)] + [stats(100 + k, 2).entropy[i] for k in (4, 5, 6, 7)]
        steps, values = curve(tmp_path / name, "losses/entropy")
        assert steps == [32 * k for k in range(1, 8)]
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        assert len(list((tmp_path / name).iterdir())) == 2


def test_half_a_record_of_a_full_disk_hides_nothing_but_itself(tmp_path):
    first = Curves(tmp_path, range(1))
    for k in (1, 2, 3):
        first.write(k, stats(k, 1), 32)
    (file,) = (tmp_path / "trial_0000").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    second = Curves(tmp_path, range(1), resumed=True)
    second.write(3, stats(3, 1), 32)
    assert curve(tmp_path / "trial_0000", "losses/entropy")[0] == [1, 2, 3]


def test_a_folder_that_cannot_take_the_curves_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"tensorboard: .*file must be a folder, but .*file is a file"):
        Curves(tmp_path / "file", range(2))
    Curves(tmp_path / "tb", range(2)).write(1, stats(1, 2), 32)
    with pytest.raises(FileExistsError, match="trial_0000 holds the curves of another collection; choose a new folder"):
        Curves(tmp_path / "tb", range(2))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a folder's mode says nothing to root
    with pytest.raises(PermissionError, match=r"tensorboard: the folder .*new cannot be written"):
        Curves(tmp_path / "new", range(2))


# ---------------------------------------------------------------- of a collection


def collect_tiny(output: Path, **arguments) -> Store:
    defaults = {"env_id": "InvertedPendulum-v5", "num_trials": 3, "total_timesteps": 4 * 32, "ppo": PPO}
    return collect(output, **defaults | arguments, progress=False)


def test_the_curves_of_a_collection_are_its_iterations_and_its_store(tmp_path, monkeypatch):
    iterate, seen = Population.iterate, []

    def spy(population: Population) -> IterationStats:
        seen.append(iterate(population))
        return seen[-1]

    monkeypatch.setattr(Population, "iterate", spy)
    store = collect_tiny(tmp_path / "store", tensorboard=tmp_path / "logs" / "tb")
    for i in range(3):
        run, trial = tmp_path / "logs" / "tb" / f"trial_{i:04d}", store.trial(i)
        known = ~np.isnan(trial.episodic_return)
        steps, values = curve(run, "charts/episodic_return")
        assert steps == trial.env_steps[known].tolist()
        np.testing.assert_allclose(values, trial.episodic_return[known], rtol=1e-6)
        for name in LOSSES:
            steps, values = curve(run, f"losses/{name}")
            expected = np.array([getattr(stats, name)[i] for stats in seen])
            known = np.isfinite(expected)
            assert steps == trial.env_steps[1:][known].tolist()
            np.testing.assert_allclose(values, expected[known], rtol=1e-6, err_msg=name)
        steps, values = curve(run, "charts/SPS")
        np.testing.assert_allclose(values, [32 / sum(stats.seconds.values()) for stats in seen], rtol=1e-6)


def test_without_the_option_nothing_is_written_and_the_store_is_the_same(tmp_path):
    stores = [collect_tiny(tmp_path / "without"), collect_tiny(tmp_path / "with", tensorboard=tmp_path / "tb")]
    assert {path.name for path in tmp_path.iterdir()} == {"without", "with", "tb"}
    assert not list((tmp_path / "without").rglob("*tfevents*"))
    without, with_curves = ([store.trial(i).weights() for i in range(3)] for store in stores)
    np.testing.assert_array_equal(without, with_curves)


@pytest.mark.slow
def test_tensorboard_is_not_imported_before_curves_are_written():
    code = "import sys, tipl.collecting.collection, tipl.collecting.curves; sys.exit('tensorboard' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_curves_of_a_collection_that_was_cut_off_have_each_point_once(tmp_path, monkeypatch):
    iterate = Population.iterate

    def failing(population: Population) -> IterationStats:
        if population.env_steps == 64:
            raise ArithmeticError("cut off")
        return iterate(population)

    arguments = {"tensorboard": tmp_path / "tb"}
    with monkeypatch.context() as context, pytest.raises(RuntimeError, match="cut off"):
        context.setattr(Population, "iterate", failing)
        collect_tiny(tmp_path / "store", **arguments)
    assert curve(tmp_path / "tb" / "mean", "losses/entropy")[0] == [32, 64]
    store = collect_tiny(tmp_path / "store", **arguments)
    for i in range(3):
        trial = store.trial(i)
        known = ~np.isnan(trial.episodic_return)
        steps, values = curve(tmp_path / "tb" / f"trial_{i:04d}", "charts/episodic_return")
        assert steps == trial.env_steps[known].tolist()
        np.testing.assert_allclose(values, trial.episodic_return[known], rtol=1e-6)
    assert curve(tmp_path / "tb" / "mean", "losses/entropy")[0] == [32, 64, 96, 128]


def test_a_bad_folder_stops_a_collection_before_it_begins(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"must be a folder, but .*file is a file"):
        collect_tiny(tmp_path / "store", tensorboard=tmp_path / "file")
    collect_tiny(tmp_path / "one", tensorboard=tmp_path / "tb")
    with pytest.raises(FileExistsError, match="holds the curves of another collection"):
        collect_tiny(tmp_path / "store", tensorboard=tmp_path / "tb")
    assert not (tmp_path / "store").exists()
