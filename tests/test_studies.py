"""The studies in studies/: what they write checkpoints in, that it leaks no future, and that they run."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import SPEC, TINY_TRAIN, make_store
from synthetic_run import make_results, make_rows

from tipl.files.manifest import write_manifest
from tipl.forecasting.confidence import expected_calibration_error
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.sources import Source, Split, split_trials
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training import train
from tipl.forecasting.training_data import load_training_data
from tipl.forecasting.transformer import ModelConfig
from tipl.jumping.ledger import Ledger
from tipl.report.results import read_results
from tipl.storing.store import Store
from tipl.subspace.basis import Basis

sys.path.append(str(Path(__file__).parent.parent / "studies"))
import autoencoder
import calibration
import choose_d
import compare_libraries
import compare_representations as study
import pool_gains
import representations as coders
import train_faster
from average_checkpoints import running_mean
from compare_forecasters import NUM_SAMPLES, Heads, Spread, with_returns
from update_directions import share

pytestmark = pytest.mark.slow

END = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("studies") / "store.zarr", 8, 24)


@pytest.fixture(scope="module")
def path(store):
    return store.trial(0).weights()


def coordinates_of(path, by, end=END):
    """A path (T, k) in each orthonormal way that reads nothing but its prefix."""
    if by == "cut":
        grams = np.concatenate(coders.grams_of(path, [columns[None] for columns in tensors()]))
        return coders.cut_coordinates(grams, end, 4, float(np.linalg.norm(path[end] - path[0])))
    if by == "row":
        unit = float(np.linalg.norm(path[end] - path[0]))
        kinds = [coders.svd_coordinates(it, end, 2, unit) for it in coders.grams_of(path, coders.tokens_of(SPEC, by))]
        return np.concatenate([it.reshape(len(path), -1) for it in kinds], 1)
    tokens = coders.tokens_of(SPEC, by)
    return coders.prefix_svd(tokens, [min(3, kind.size) for kind in tokens])[0](path, [end])[0]


def tensors():
    return [offset + np.arange(int(np.prod(shape))) for offset, shape in SPEC.layout.values()]


@pytest.mark.parametrize("by", ["whole", "layer", "kind", "row"])
def test_tokens_share_no_weight_and_leave_none_out(by):
    held = np.concatenate([kind.ravel() for kind in coders.tokens_of(SPEC, by)])
    np.testing.assert_array_equal(np.sort(held), np.arange(SPEC.num_params))


def test_weights_between_hidden_neurons_are_held_by_both():
    first, second, rest = coders.tokens_of(SPEC, "neuron")
    assert (first.shape, second.shape) == ((16, 4 + 1 + 16), (16, 16 + 1 + 1))
    held = np.bincount(np.concatenate([first.ravel(), second.ravel(), rest.ravel()]), minlength=SPEC.num_params)
    offset, shape = SPEC.layout["policy_net.2.weight"]
    between = offset + np.arange(np.prod(shape)).reshape(shape)
    assert (held[between] == 2).all()
    assert held.sum() == SPEC.num_params + between.size
    assert first[3, 5 + 7] == second[7, 3] == between[7, 3]


def test_one_group_is_the_basis_of_the_prefix(path):
    basis = Basis.from_prefix(path[: END + 1], 3)
    expected = (path - path[0]) @ basis.directions.T / basis.scale
    np.testing.assert_allclose(coordinates_of(path, "whole"), expected, atol=1e-4)


@pytest.mark.parametrize("by", ["layer", "kind", "row", "cut"])
def test_coordinates_are_lengths_of_projections_on_the_prefix_of_each_group(path, by):
    """Against an orthonormal basis by NumPy's SVD, of each group's own prefix or of the cut directions."""
    moved = (path - path[0]).astype(np.float64)
    groups = tensors() if by == "cut" else [columns for kind in coders.tokens_of(SPEC, by) for columns in kind]
    width = 2 if by == "row" else 3
    whole = np.linalg.svd(moved[: END + 1], full_matrices=False)[2][:4]
    squares = np.zeros(len(path))
    for columns in groups:
        seen = whole[:, columns] if by == "cut" else moved[: END + 1, columns]
        _, singular, directions = np.linalg.svd(seen, full_matrices=False)
        directions = directions[singular > 1e-6 * singular[0]][: None if by == "cut" else width]
        squares += np.square(moved[:, columns] @ directions.T).sum(1)
    coordinates = coordinates_of(path, by) * np.linalg.norm(moved[END])
    np.testing.assert_allclose(np.square(coordinates).sum(1), squares, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("by", ["whole", "layer", "kind", "row", "cut"])
def test_the_future_does_not_change_how_the_prefix_is_written(path, by):
    other = path.copy()
    other[END + 1 :] += np.random.default_rng(0).normal(size=other[END + 1 :].shape).astype(np.float32)
    before, after = coordinates_of(path, by), coordinates_of(other, by)
    np.testing.assert_allclose(after[: END + 1], before[: END + 1], rtol=0, atol=1e-6)
    assert np.abs(after[-1] - before[-1]).max() > 1e-3  # the future itself is written otherwise


@pytest.mark.parametrize("by", ["whole", "layer", "kind", "row", "cut"])
def test_no_floor_is_above_persistence(path, by):
    _, distances, outside = coders.orthonormal(path, END, coordinates_of(path, by))
    still = np.linalg.norm(path - path[END], axis=1) / np.linalg.norm(path[END] - path[0])
    assert outside[END] == 0.0
    assert (outside <= still + 1e-6).all()
    assert (outside[END + 1 :] < 0.95 * still[END + 1 :]).all()
    np.testing.assert_allclose(distances[END], 1.0, rtol=1e-6)


def test_padding_comes_last(path):
    tokens = coders.tokens_of(SPEC, "layer")
    coordinates, rank = coders.prefix_svd(tokens, [1, 3, 9, 3])
    written = coordinates(path, [4])[0]
    assert rank(4) == 1 + 3 + 4 + 3
    assert (np.abs(written[:, : rank(4)]).max(0) > 0).all()
    assert (written[:, rank(4) :] == 0).all()


def test_forecasts_are_made_in_the_coordinates_that_were_learned(path):
    groups = coders.tokens_of(SPEC, "layer"), [1, 3, 6, 3]
    basis = coders.GroupedForecaster(None, groups=groups).basis_of(path[: END + 1])
    np.testing.assert_allclose(basis.encode(path), coders.prefix_svd(*groups)[0](path, [END])[0], atol=1e-4)
    np.testing.assert_allclose(basis.decode(basis.encode(path[END : END + 1]))[0], path[END], atol=1e-6)
    np.testing.assert_allclose(basis.directions @ basis.directions.T, np.eye(13), atol=1e-5)


def test_coordinates_are_dealt_to_where_paths_go_on(store):
    tokens = coders.tokens_of(SPEC, "layer")
    paths = [store.trial(i).weights() for i in range(3)]
    for it in paths:
        it[:, tokens[2][0]] = it[0, tokens[2][0]] + 1e-3 * (it[:, tokens[2][0]] - it[0, tokens[2][0]])
    sizes = [kind.size for kind in tokens]
    widths = coders.deal_widths([coders.grams_of(it, tokens) for it in paths], [8, 16], sizes, 10)
    assert sum(widths) == 10
    assert widths[0] == 1  # log_std has one weight
    assert widths[2] == 1  # it hardly moves


@pytest.mark.parametrize("by", ["layer", "neuron"])
def test_an_untrained_autoencoder_is_persistence_and_any_passes_through_the_last_checkpoint(path, by):
    tokens = coders.tokens_of(SPEC, by)
    moved = autoencoder.moved_of(path, END)
    end = moved[END : END + 1].expand(len(moved), -1)
    model = autoencoder.Autoencoder(tokens, [2] * len(tokens), [0.1] * len(tokens))
    kept = tokens[-1 if by == "neuron" else 0].ravel()  # no more weights than numbers: written as they are
    assert kept.size <= 2
    others = np.setdiff1d(np.arange(SPEC.num_params), kept)
    torch.testing.assert_close(model(moved, end)[:, others], end[:, others])
    torch.testing.assert_close(model(moved, end)[:, kept], moved[:, kept])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    torch.testing.assert_close(model(moved, end)[END], moved[END])
    assert (model(moved, end)[-1, others] - end[-1, others]).abs().max() > 0.1


def test_ridge_finds_a_law_that_tokens_share():
    rng = np.random.default_rng(0)
    sides = []
    for num_trials in (6, 2, 2):
        z = rng.normal(size=(num_trials, 9, 20, 2)).astype(np.float32)
        z[:, -1] = z[:, 4] + 0.5 * (z[:, 4] - z[:, 0]) - 0.25 * (z[:, 2] - z[:, 0])[..., ::-1]
        sides.append([[trial] for trial in z])
    forecasts = coders.ridge(sides, 4)
    for (forecast,), (truth,) in zip(forecasts, sides[2], strict=True):
        np.testing.assert_allclose(forecast, truth[-1], atol=1e-2)


def test_all_representations_run(store):
    config = dataclasses.replace(TINY_TRAIN, n_components=study.WIDTH, steps=4, refine_steps=2)
    it = study.Study(store, config)
    persistence = np.array(it.errors(lambda path, end: path[end]))
    results = {name: make() for name, make in it.representations().items()}
    for name, result in results.items():
        assert np.shape(result.forecast) == persistence.shape == (4, 2)
        assert result.numbers >= study.WIDTH
        is_group = name.startswith("prefix SVD") and not name.endswith("neurons")
        assert (result.refined is not None) == is_group
        if not name.startswith("autoencoder"):
            assert (np.array(result.floor) <= persistence + 1e-6).all()
            if name != "directions cut by tensor":  # its ridge mixes more directions than these
                assert (np.array(result.floor) <= np.array(result.forecast) + 1e-6).all()
    task = {
        "env_id": store.env_id,
        "num_checkpoints": 24,
        "trials": 2,
        "persistence": persistence.tolist(),
        "results": {name: dataclasses.asdict(result) for name, result in results.items()},
    }
    assert study.table(task).count("\n") == 1 + len(results)
    assert study.plot([task]).svg().startswith(b"<?xml")


def test_k_is_chosen_by_validation_trials(store, tmp_path, monkeypatch):
    monkeypatch.setattr(choose_d, "COMPONENTS", (2, 16))
    config = dataclasses.replace(TINY_TRAIN, steps=4, refine_steps=2, confidence_trials=0)
    task = choose_d.study(store, config, tmp_path)
    assert task == choose_d.study(store, config, tmp_path)  # from the forecasters that it kept
    best = min(task["results"], key=lambda it: it["validation"])
    assert task["chosen"] == best["k"]
    source = Source.of(store, config)
    for result in task["results"]:
        for i, trial in enumerate(source.split.heldout):
            path = source.path(trial)
            basis = Basis.from_prefix(path[:10], result["k"])  # 40 % of 24 checkpoints
            floor = basis.residual(path[-1:])[0] / np.linalg.norm(path[-1] - path[0])
            assert result["heldout"]["basis_floor"][1][i] == pytest.approx(floor, rel=1e-4)
            assert result["heldout"]["transformer"][1][i] >= floor
            shared = Basis.from_trials([store.trial(it) for it in source.split.train], result["k"]).through(path[9])
            floor = shared.residual(path[-1:])[0] / np.linalg.norm(path[-1] - path[0])
            assert result["heldout"]["shared_floor"][1][i] == pytest.approx(floor, rel=1e-4)
    by_k = {result["k"]: np.mean(result["heldout"]["tipl"]) for result in task["results"]}
    assert choose_d.chosen_to_default(task).value == pytest.approx(by_k[task["chosen"]] / by_k[16])
    assert choose_d.plot([task]).svg().startswith(b"<?xml")
    assert choose_d.table([task]).count(f"**{task['chosen']}**") == 1


def test_calibration_judges_every_run_of_another_store_alone(store, tmp_path):
    config = dataclasses.replace(TINY_TRAIN, steps=4, refine_steps=2, confidence_trials=2)
    forecaster = Forecaster.load(train(store, tmp_path / "model", config, progress=False))
    with pytest.raises(SystemExit, match="not trained on"):
        calibration.judge(forecaster, store, 1)
    fresh = make_store(tmp_path / "fresh.zarr", 3, 24, seed=100)
    task = calibration.judge(forecaster, fresh, 1)
    path, said = fresh.trial(2).weights(), []
    for h in (5, 9, 14, 18):  # of 24 checkpoints
        horizons = sorted({min(n, 23 - h) for n in (2, 5, 9, 23)})
        said.append(forecaster.forecast([path[: h + 1]], [23 - h])[0].confidence(horizons))
    np.testing.assert_allclose(task["predicted"][2], np.concatenate(said), rtol=0, atol=6e-5)  # of four digits
    predicted, outcomes = np.array(task["predicted"]).ravel(), np.array(task["outcomes"]).ravel()
    assert calibration.found_in(task).error.value == pytest.approx(expected_calibration_error(predicted, outcomes))
    best = np.mean((outcomes - outcomes.mean()) ** 2)
    assert calibration.skill(task).value == pytest.approx(1 - np.mean((predicted - outcomes) ** 2) / best)
    assert calibration.plot([task, task]).svg().startswith(b"<?xml")
    assert calibration.table([task, task]).count("\n") == 4


def test_gains_are_pooled_over_the_runs_of_several_evaluations(store, tmp_path, monkeypatch, capsys):
    parts = []
    for name, heldout in (("one", [0, 1, 2]), ("other", [3, 4])):
        (tmp_path / name).mkdir()
        results = make_results(store, heldout, make_rows(store, heldout))
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        write_manifest(tmp_path / name)
        parts.append(pool_gains.returns_of(read_results(tmp_path / name / "results.json"), 0.2, 0.26))
    found = pool_gains.shares(pool_gains.pooled(parts))
    gains = {name: sum((part[name] - part["persistence"]).sum() for part in parts) for name in ("tipl", "truth")}
    assert found["tipl"].value == pytest.approx(gains["tipl"] / gains["truth"])
    assert found["tipl"].low < found["tipl"].value < found["tipl"].high
    with pytest.raises(SystemExit, match=r"expected prefix 0\.3 and horizon 0\.2 of the path"):
        pool_gains.returns_of(read_results(tmp_path / "one" / "results.json"), 0.3, 0.2)
    folders = [tmp_path / name for name in ("one", "other", "one")]  # as many runs twice are two columns
    command = ["pool_gains.py", *folders, "--horizons", 0.26, "--output", tmp_path / "g.svg"]
    monkeypatch.setattr(sys, "argv", [str(it) for it in command])
    pool_gains.main()
    assert "26% ahead, 3 runs | 26% ahead, 2 runs | 26% ahead, 3 runs | 26% ahead, all 8" in capsys.readouterr().out
    assert [len(it["truth"]) for it in json.loads((tmp_path / "g.json").read_text())["horizons"]["0.26"]] == [3, 2, 3]


# ---------------------------------------------------------------- ways to forecast, averages, directions


def test_other_models_forecast_from_the_prefix_alone():
    config = ModelConfig(n_components=4, n_layer=1, n_head=2, d_model=8, d_ff=16, max_len=12, dropout=0.0)
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    for architecture in (Heads, Spread):
        torch.manual_seed(0)
        model = architecture(config).eval()
        torch.testing.assert_close(model.unroll(x, 7), x[:, -1:].expand(-1, 7, -1))  # untrained: persistence
        torch.nn.init.normal_(model.head.weight)
        path = model.unroll(x, 7)
        assert path.shape == (3, 7, 4)
        torch.testing.assert_close(path[:, :3], model.unroll(x, 3))
        torch.testing.assert_close(path[:1], model.unroll(x[:1], 7))


def test_sampled_rollouts_scatter_about_the_rollout_as_their_spread_says():
    config = ModelConfig(n_components=4, n_layer=1, n_head=2, d_model=8, d_ff=16, max_len=12, dropout=0.0)
    model = Spread(config).eval()  # untrained: a random walk of deviation exp(-3) a step
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    ends = model.sample(x, 7, torch.Generator().manual_seed(0))
    assert ends.shape == (NUM_SAMPLES, 3, 4)
    deviation = np.exp(-3) * np.sqrt(7)
    assert (ends - x[:, -1]).std().item() == pytest.approx(deviation, rel=0.1)
    torch.testing.assert_close(model.sample(x, 7, torch.Generator().manual_seed(0)), ends)


def test_returns_as_coordinates_tell_nothing_of_a_held_out_trials_future(tmp_path):
    config = TrainConfig(n_components=4, steps=1, heldout_fraction=0.3)
    wider = []
    for last in (5.0, 500.0):
        store = store_of(tmp_path / f"{last}.zarr", last)
        source = Source.of(store, config)
        data = load_training_data([source], config)
        judged = load_training_data([Source(store, Split(source.split.train, source.split.heldout, []), 16)], config)
        for target in (False, True):
            training, heldout = with_returns(data, judged.validation, source, config, target=target)
            assert training.examples.coordinates.shape[-1] == heldout.cases[0].paths.shape[-1] == 5 + target
            wider.append([case.paths[:, : case.prefix_end + 1] for case in heldout.cases])
    for before, after in zip(wider[:2], wider[2:], strict=True):  # the held-out trials' last returns differ
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)


def store_of(path, last):
    """Return six random trials; those that the default seed holds out end with the return `last`."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((6, 16, SPEC.num_params)).cumsum(1).astype(np.float32)
    returns = rng.uniform(0, 10, (6, 16))
    heldout = split_trials(6, TrainConfig(heldout_fraction=0.3)).heldout
    returns[heldout, -1] = last
    steps = np.tile(np.arange(16), (6, 1))
    with Store.create(path, env_id="InvertedPendulum-v5", policy=SPEC, seeds=range(6), config={}) as store:
        store.append(weights, steps, returns)
    return Store.open(path)


def test_running_mean_and_share():
    rows = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    means = running_mean(rows, 4)
    for t in range(9):
        np.testing.assert_allclose(means[t], rows[max(0, t - 3) : t + 1].mean(0), rtol=1e-5, atol=1e-6)
    directions, inside = np.eye(5)[:2] * 3.0, np.array([3.0, 4.0, 0.0, 0.0, 0.0])
    assert share(directions, inside) == pytest.approx(1.0)
    assert share(directions[:1], inside) == pytest.approx(9 / 25)
    assert share(directions, np.eye(5)[4]) == pytest.approx(0.0)


def ledger_with(curves: np.ndarray) -> Ledger:
    return Ledger("E", list(range(len(curves))), 10, curves.T.tolist())


def test_steps_to_return_are_paired_and_never_is_never():
    rng = np.random.default_rng(0)
    plain = np.linspace(0, 100, 20) + rng.normal(0, 1, (8, 1))
    faster, flat = np.minimum(plain * 2, 100), np.zeros_like(plain)
    ledgers = {"plain": ledger_with(plain), "TIPL": ledger_with(faster), "rival": ledger_with(flat)}
    given = {"chosen": {arm: {} for arm in ledgers}, "settings_tried": dict.fromkeys(ledgers, 1)}
    target = plain.mean(0)[-5:].mean()
    rows = {row["arm"]: row for row in train_faster.rows_of("E", given, ledgers)}
    expected = (np.argmax(faster.mean(0) >= target) + 1) / 20
    assert rows["TIPL"]["ratio_to_plain"] == expected
    assert rows["TIPL"]["ratio_low"] <= rows["TIPL"]["ratio_to_plain"] <= rows["TIPL"]["ratio_high"]
    assert rows["TIPL"]["ratio_to_best_rival"] is not None
    assert rows["plain"]["return_difference"] == rows["plain"]["difference_low"] == 0.0
    assert rows["rival"]["ratio_to_plain"] is None
    assert rows["rival"]["probability_of_improvement"] == 0.0


UNTUNED = ("plain", "random forecaster", "rl-zoo3", "TIPL zero-shot on plain")
"""Arms with nothing to choose: defaults, a control, published settings, and defaults again."""


def test_every_arm_tries_equally_many_settings():
    experiments = json.loads(train_faster.SETTINGS.read_text())
    for name, given in experiments.items():
        counts = {arm: len(train_faster.settings_of(it["grid"])) for arm, it in given["arms"].items()}
        if name.endswith(("-zero-shot", "-included")):
            assert set(counts.values()) == {1}  # all was chosen elsewhere, or is a default
        else:
            tried = {counts[arm] for arm in counts if arm not in UNTUNED}
            assert tried == ({12} if "tuned PPO" in counts else set())
        assert given["tuning_seed"] != given["final_seed"]
    fresh = {(given.get("task", name), given["final_seed"]) for name, given in experiments.items()}
    assert len(fresh) == len(experiments)


def test_settings_of_a_grid():
    settings = train_faster.settings_of({"ppo.learning_rate": [1.0, 2.0], "move": "outer", "step": [1.5]})
    assert settings == [{"ppo": {"learning_rate": rate}, "move": "outer", "step": 1.5} for rate in (1.0, 2.0)]


@pytest.mark.filterwarnings("ignore")  # Stable-Baselines3's
def test_libraries_are_compared(tmp_path, monkeypatch, capsys):
    output = tmp_path / "libraries.json"
    command = ["compare_libraries.py", "--seconds", "0.5", "--output", str(output)]
    for names in (["sb3-ppo", "sb3-dqn"], ["sb3-ppo", "cleanrl"]):
        monkeypatch.setattr(sys, "argv", [*command, *names])
        compare_libraries.main()
    rows = {row["name"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ["sb3-ppo", "sb3-dqn", "cleanrl"]
    for row in rows.values():
        assert 0.0 < row["actions"]["greatest"] < 10.0
        assert row["actions"]["difference"] < 1e-6
        assert row["exported_actions"] == 0.0
        assert row["returns"]["difference"] == row["exported_returns"]["difference"] == 0.0
        assert min(row["returns"]["library"]) > 0.0
    assert rows["sb3-dqn"]["actions"]["other_choices"] == 0
    monkeypatch.setattr(sys, "argv", [*command, "a3c"])
    with pytest.raises(SystemExit):
        compare_libraries.main()
    assert "NAME: must be of sb3-ppo, " in capsys.readouterr().err


def test_a_policy_that_acts_otherwise_is_seen(tmp_path):
    trained = compare_libraries.ROWS["cleanrl"][1](0.5, tmp_path)
    load = trained.load
    other = dataclasses.replace(trained, load=lambda path: compare_libraries.Policy(lambda obs: load(path)(obs) + 0.5))
    row = compare_libraries.compare(other, tmp_path)
    assert row["actions"]["difference"] == pytest.approx(0.5, abs=1e-6)
    assert row["returns"]["difference"] > 0.0
