"""In which order the files of a run are taken, and at which env steps: names of any kind, with or without own steps."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_checkpoints import ppo_zip
from safetensors.torch import save_file

from tipl.storing.importer import import_checkpoints


def write_zips(folder: Path, stated: dict[str, int]) -> Path:
    """Write an SB3 zip for each name, which states so many num_timesteps."""
    for name, steps in stated.items():
        ppo_zip(folder / name, steps)
    return folder


def write_states(folder: Path, names: list[str]) -> Path:
    """Write for each name a state that states no step, whose one weight is its place in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        save_file({"w": torch.full((1,), float(i))}, folder / name)
    return folder


def env_steps(source: Path, output: Path, order: str = "step") -> list[int]:
    return import_checkpoints([source], output, order=order).trial(0).env_steps.tolist()


@pytest.mark.parametrize(
    "stated",
    [
        {"a.zip": 200, "b.zip": 100},
        {"m_1_rew10.zip": 100, "m_2_rew5.zip": 200},
        {"m_100k.zip": 100, "m_1e5.zip": 200},
        {"step_100_v1.zip": 100, "step_200_v2.zip": 200},
        {"s1_100_steps.zip": 100, "s2_200_steps.zip": 200},
        {"final.zip": 300, "m_100.zip": 100, "m_200.zip": 200},
        {"run-2024-01-06.zip": 100, "run-2024-01-05.zip": 200},
    ],
)
def test_files_state_the_order_that_their_names_do_not(stated: dict[str, int], tmp_path: Path) -> None:
    run = write_zips(tmp_path / "run", stated)
    assert env_steps(run, tmp_path / "store") == sorted(stated.values())


@pytest.mark.parametrize(
    "stated",
    [
        {"best_250.zip": 200, "best_310.zip": 100},  # rewards
        {"s1.zip": 200, "s2.zip": 200},  # two runs
        {"lr_1.zip": 128, "lr_2.zip": 128, "lr_3.zip": 128},
        {"m_1.zip": 100, "m_2.zip": 200, "m_3.zip": 150},
    ],
)
def test_names_that_what_is_stated_contradicts_are_refused(stated: dict[str, int], tmp_path: Path) -> None:
    run = write_zips(tmp_path / "run", stated)
    with pytest.raises(ValueError, match=r"the numbers in the names are no steps, or the files are of several runs"):
        env_steps(run, tmp_path / "store")
    if len(set(stated.values())) == len(stated):
        assert env_steps(run, tmp_path / "stated", "stated") == sorted(stated.values())
    else:
        with pytest.raises(ValueError, match="the files do not each state a step of their own"):
            env_steps(run, tmp_path / "stated", "stated")
    by_number = env_steps(run, tmp_path / "named", r"_?([0-9]+)\.zip")
    assert by_number == sorted(by_number)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["m_100_000", "m_200_000"], "may be the thousands of a larger one"),
        (["m_1,000", "m_2,000"], "may be the thousands of a larger one"),
        (["m_-100", "m_-50"], "seems to be negative"),
        (["m=-100", "m=-50"], "seems to be negative"),
        (["run-2024-01-05", "run-2024-01-06"], "may be part of a date"),
        (["day20240105", "day20240106"], "may be part of a date"),
        (["ckpt-1f", "ckpt-2f"], "runs on into f"),
        (["step_100_v1", "step_200_v2"], "in several numbers"),
    ],
)
def test_numbers_that_may_be_no_steps_are_refused(names: list[str], what: str, tmp_path: Path) -> None:
    run = write_states(tmp_path / "run", [f"{name}.safetensors" for name in names])
    with pytest.raises(ValueError, match=f"names differ .*{what}"):
        env_steps(run, tmp_path / "store")


def test_names_of_any_kind_give_their_steps_or_are_refused(tmp_path: Path) -> None:
    """Seeded: a step among other numbers and words. What is taken has the steps that were written."""
    taken, refusals = 0, []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        steps = np.sort(rng.choice(10 ** rng.integers(2, 8), int(rng.integers(2, 5)), replace=False)) + 1
        before, behind = rng.choice(["model", "ckpt", "rl-model", "agent_0", "Hopper-v5_ppo", "seed3", "x2"], 2)
        gap, mark = rng.choice(["_", "-", "."]), rng.choice(["", "step{}", "{}_steps", "steps{}", "iter{}", "{}step"])
        other = rng.choice(["", "", "seed", "rew", "ep", "v", "lr"])
        others = rng.integers(0, 10 ** rng.integers(1, 4), len(steps))
        names = []
        for step, number in zip(steps, others, strict=True):
            marked = (mark or "{}").format(f"{gap if mark.startswith('step') else ''}{step}")
            parts = [str(before), marked, *([f"{other}{gap}{number}"] if other else []), *([str(behind)] * (seed % 2))]
            names.append(f"{gap.join(parts)}.safetensors")
        if len(set(names)) < len(names):
            continue
        run = write_states(tmp_path / f"run{seed}", names)
        try:
            store = import_checkpoints([run], tmp_path / f"store{seed}")
        except ValueError as error:
            refusals.append(str(error))
            continue
        taken += 1
        assert store.trial(0).weights()[:, 0].tolist() == list(range(len(steps))), names
        assert store.trial(0).env_steps.tolist() == steps.tolist(), names
    assert taken > 100
    assert all(refusal.startswith("import: ") and "\n" not in refusal for refusal in refusals)


def test_checkpoints_in_two_places_of_a_folder_are_not_one_run(tmp_path: Path) -> None:
    run = write_zips(tmp_path / "run", {"final.zip": 300})
    write_zips(run / "checkpoints", {"m_100.zip": 100, "m_200.zip": 200})
    with pytest.raises(ValueError, match=r"run holds checkpoints itself, like final\.zip, and in checkpoints: "):
        import_checkpoints([run], tmp_path / "store")
    assert env_steps(run / "checkpoints", tmp_path / "inner") == [100, 200]


def test_a_source_given_twice_is_refused(tmp_path: Path) -> None:
    """Its twin could lie among the trials held out."""
    run = write_zips(tmp_path / "run", {"m_100.zip": 100, "m_200.zip": 200})
    for sources in ([run, run], [run, tmp_path / "x" / ".." / "run"], [run / "m_100.zip"] * 2):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"import: .* is given twice"):
            import_checkpoints(sources, tmp_path / "store")


def test_numbers_that_nothing_marks_as_steps_leave_a_note(tmp_path: Path) -> None:
    for names, is_marked in ((["lr_1", "lr_2"], False), (["step_1", "step_2"], True)):
        run = write_states(tmp_path / names[0], [f"{name}.safetensors" for name in names])
        store = import_checkpoints([run], tmp_path / f"{names[0]}.zarr")
        noted = "env_steps are the numbers in the names, which nothing marks as steps" in store.config["source"]["note"]
        assert noted == (not is_marked)


@pytest.mark.parametrize("names", [["100", "200", "300"], ["model_iter1", "model_iter2", "model_iter10"]])
def test_numbers_that_are_marked_or_alone_order_files_of_equal_counts(names: list[str], tmp_path: Path) -> None:
    """A count that begins anew at each learn(), of equally many steps."""
    run = write_zips(tmp_path / "run", {f"{name}.zip": 128 for name in names})
    assert env_steps(run, tmp_path / "store") == [int(name.removeprefix("model_iter")) for name in names]


def test_each_order_that_a_refusal_of_equal_counts_names_works(tmp_path: Path) -> None:
    run = write_zips(tmp_path / "run", {f"ppo_{i}.zip": 128 for i in range(3)})
    with pytest.raises(ValueError, match=r"such as 'iter_\(\[0-9\]\+\)', or to go by name or mtime$"):
        env_steps(run, tmp_path / "store")
    for i in range(3):
        os.utime(run / f"ppo_{i}.zip", ns=(0, 10**9 * (3 - i)))
    assert env_steps(run, tmp_path / "name", "name") == [0, 1, 2]
    assert env_steps(run, tmp_path / "mtime", "mtime") == [0, 1, 2]
    assert env_steps(run, tmp_path / "number", "ppo_([0-9]+)") == [0, 1, 2]


def test_what_evaluation_callbacks_write_is_no_checkpoint(tmp_path: Path) -> None:
    run = write_zips(tmp_path / "run", {"best_model.zip": 128})
    np.savez(run / "evaluations.npz", results=np.ones((2, 3)))
    assert env_steps(run, tmp_path / "store") == [128]
