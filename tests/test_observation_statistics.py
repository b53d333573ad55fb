"""VecNormalize's statistics: read from pickles of which nothing is run, and folded into policies."""

import io
import json
import os
import pickle
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path
from typing import Any

import gymnasium
import gymnasium.wrappers as wrappers
import numpy as np
import pytest
import safetensors.torch
import torch
from foreign_checkpoints import ppo_zip
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from hostile_files import mutated_pickles

import tipl
from tipl.cli import main
from tipl.collecting.policy_network import mean_action
from tipl.forecasting.calibration import recalibrate
from tipl.forecasting.forecaster import load_pretrained
from tipl.storing.exporter import export_checkpoint
from tipl.storing.foreign_files import find_actor_in, read_checkpoint_file
from tipl.storing.importer import describe_import, import_checkpoints
from tipl.storing.inert_pickle import Made, Name, PickleError, array_of, number_of, read_inert
from tipl.storing.live_wrappers import wrapping_of
from tipl.storing.observation_statistics import find_statistics, live_statistics, read_statistics
from tipl.storing.store import Store

OBS_DIM = 3


class RunningMeanStd:
    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.mean, self.var, self.count = rng.normal(size=OBS_DIM), rng.uniform(0.1, 9.0, OBS_DIM), 64.0


class VecNormalize:
    def __init__(self, seed: int = 0, **others: Any) -> None:
        self.norm_obs, self.norm_reward = True, True
        self.obs_rms, self.ret_rms = RunningMeanStd(seed), RunningMeanStd(seed + 1)
        self.clip_obs, self.epsilon = 10.0, 1e-8
        self.space = {
            "low": np.full(OBS_DIM, -np.inf, np.float32),
            "dtype": np.dtype("f4"),
            "rng": np.random.default_rng(),
        }
        self.old_obs, self.infos = np.zeros((2, OBS_DIM)), [{}, {"a": (1, 2.5, None, True, b"x", {3})}]
        for name, value in others.items():
            setattr(self, name, value)


RunningMeanStd.__module__ = "stable_baselines3.common.running_mean_std"
VecNormalize.__module__ = "stable_baselines3.common.vec_env.vec_normalize"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pickle find the two classes where Stable-Baselines3 has them."""
    for kind in (RunningMeanStd, VecNormalize):
        module = types.ModuleType(kind.__module__)
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, kind.__module__, module)


def pickled(normaliser: VecNormalize, path: Path, protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(normaliser, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_gives_the_numbers(protocol, tmp_path):
    normaliser = VecNormalize(clip_obs=5.0)
    found = read_statistics(pickled(normaliser, tmp_path / "a.pkl", protocol))
    assert found is not None
    np.testing.assert_array_equal(found.mean, normaliser.obs_rms.mean)
    np.testing.assert_array_equal(found.std, np.sqrt(normaliser.obs_rms.var + 1e-8))
    assert found.clip == 5.0
    live = live_statistics(normaliser)
    assert (live.mean.tobytes(), live.std.tobytes(), live.clip) == (found.mean.tobytes(), found.std.tobytes(), 5.0)
    assert read_statistics(pickled(VecNormalize(norm_obs=False), tmp_path / "b.pkl", protocol)) is None


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_out_as_they_are(protocol):
    value = {"a": [1, -2, 2**70, 2.5, True, None, "text", b"bytes", bytearray(b"b"), (), (1, (2,)), {1, 2}], 3: {}}
    if protocol < 5:
        value["a"] = [it for it in value["a"] if not isinstance(it, bytearray)]  # pickled by a call
    if protocol < 4:
        value["a"] = [it for it in value["a"] if not isinstance(it, set)]
    if protocol < 3:
        value["a"] = [it for it in value["a"] if not isinstance(it, bytes)]
    assert read_inert(pickle.dumps(value, protocol)) == value
    shared: list[Any] = [[1]]
    shared.append(shared[0])
    found = read_inert(pickle.dumps(shared, protocol))
    assert found[0] is found[1]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i4", "i8", "u2", "?", ">f8", ">i4"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_and_numbers_of_numpy(dtype, protocol):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for it in (array, np.asfortranarray(array), array[:0], array[0, 0, 0:1].reshape(())):
        found = array_of(read_inert(pickle.dumps(it, protocol)))
        assert found is not None
        np.testing.assert_array_equal(found, it)
    assert number_of(read_inert(pickle.dumps(array[1, 2, 3], protocol))) == float(array[1, 2, 3])
    assert number_of(2) == 2.0
    assert number_of(True) is None
    assert number_of("2") is None
    assert array_of([1.0]) is None


def test_nothing_is_run(tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    found = read_inert(pickle.dumps(Evil()))
    assert isinstance(found, Made)
    assert found.name == Name(os.system.__module__, "system")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        RuntimeError, match=r"evil.pkl holds no VecNormalize but posix.system, and nothing else is read"
    ):
        read_statistics(tmp_path / "evil.pkl")
    inside = pickled(VecNormalize(), tmp_path / "inside.pkl")
    normaliser = VecNormalize()
    normaliser.venv = Evil()
    inside.write_bytes(pickle.dumps(normaliser))
    assert read_statistics(inside) is not None  # it is left as it is
    normaliser.obs_rms = Evil()
    inside.write_bytes(pickle.dumps(normaliser))
    with pytest.raises(RuntimeError, match="its obs_rms has no mean and variance"):
        read_statistics(inside)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged"),
        (b"never a pickle", "is damaged"),
        (pickle.dumps(5)[:-1], "is damaged"),
        (b"cos\nsystem\nQ.", "holds BINPERSID, which reaches beyond the file"),
        (b"Pname\n.", "holds PERSID, which reaches beyond the file"),
        (b"\x82\x01.", "holds EXT1, which reaches beyond the file"),
        (b"\x80\x05\x97.", "holds NEXT_BUFFER, which reaches beyond the file"),
        (b"(.", "is damaged"),
        (b"N(.", "is damaged"),
        (b"0.", "is damaged"),
        (b"]}b.", "sets a state on a list"),
        (b"NNa.", "appends to a NoneType"),
        (b"}(NtNs.", "has a key of type tuple"),
        (b"N" * (2**18 + 1) + b".", "has more than 262,144 parts"),
        (b"r\xff\xff\xff\xff.", "is damaged"),
        (b"Nr\xff\xff\xff\xff.", None),  # a memo as large as its numbers would take gigabytes
    ],
)
def test_what_is_no_pickle_or_reaches_beyond_it_is_refused(data, message):
    if message is None:
        assert read_inert(data) is None
        return
    with pytest.raises(PickleError, match=message):
        read_inert(data)


def outcome_of(path: Path) -> Any:
    try:
        return read_statistics(path)
    except RuntimeError as error:
        return error


def test_damaged_files_run_nothing_and_take_little(tmp_path):
    """Mutations of a file: whatever they hold is refused, or read as numbers."""
    whole = pickle.dumps(VecNormalize(), 4)
    path, refused = tmp_path / "a.pkl", 0
    tracemalloc.start()
    for data in mutated_pickles(whole, 3000):
        path.write_bytes(data)
        found = outcome_of(path)
        if isinstance(found, RuntimeError):
            assert str(path) in str(found)
            assert len(str(found)) < 1000
            refused += 1
        else:
            assert found is None or (np.isfinite(found.mean).all() and (found.std > 0.0).all())
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    assert refused > 500


# ---- where they lie

SAID = {"_last_original_obs": {":type:": "<class 'numpy.ndarray'>", ":serialized:": "gASV"}}
STEPS = (64, 128)


def run_of(folder: Path, **settings: Any) -> list[Path]:
    return [ppo_zip(folder / f"rl_model_{step}_steps.zip", step, **settings) for step in STEPS]


LAYOUTS = {
    "the documentation's": {"vec_normalize.pkl": STEPS},
    "RL Zoo's": {"Pendulum-v1/vecnormalize.pkl": STEPS},
    "CheckpointCallback's": {f"rl_model_vecnormalize_{step}_steps.pkl": (step,) for step in STEPS},
    "CheckpointCallback's with the last beside": {
        "rl_model_vecnormalize_64_steps.pkl": (64,),
        "rl_model_vecnormalize_128_steps.pkl": (128,),
        "vec_normalize.pkl": (),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_statistics_are_found_in_every_layout_and_folded_into_the_first_layer(layout, one_by_one, tmp_path):
    run = tmp_path / "run"
    files = run_of(run, **SAID)
    of_step = {}
    for seed, (name, steps) in enumerate(LAYOUTS[layout].items()):
        normaliser = VecNormalize(10 * seed)
        pickled(normaliser, run / name)
        of_step |= dict.fromkeys(steps, normaliser)
    store = import_checkpoints(files if one_by_one else [run], tmp_path / "store")
    note = store.config["source"]["note"]
    assert note.startswith("the observation statistics of VecNormalize are folded into the first layer")
    assert "beyond 10 standard deviations" in note
    assert ("stand for all checkpoints" in note) == (len(LAYOUTS[layout]) == 1)
    assert not store.is_unnormalised
    obs = np.random.default_rng(5).normal(size=(1, 20, OBS_DIM)).astype(np.float32)
    for i, (step, path) in enumerate(zip(STEPS, files, strict=True)):
        file = read_checkpoint_file(path)
        actor = find_actor_in(path, file)
        running = of_step[step].obs_rms
        seen = ((obs - running.mean) / np.sqrt(running.var + 1e-8)).astype(np.float32)
        expected = mean_action(actor.policy, torch.from_numpy(actor.flatten(file.state))[None], torch.from_numpy(seen))
        row = torch.from_numpy(store.trial(0).weights(i, i + 1).copy())
        torch.testing.assert_close(
            mean_action(store.policy, row, torch.from_numpy(obs)), expected, rtol=1e-5, atol=1e-5
        )


def test_an_export_divides_the_statistics_out_again(tmp_path):
    files = run_of(tmp_path / "run", **SAID)
    pickled(VecNormalize(), tmp_path / "run" / "vec_normalize.pkl")
    store = import_checkpoints([tmp_path / "run"], tmp_path / "store")
    exported = export_checkpoint(store.path, files[0], tmp_path / "run" / "exported.zip", checkpoint=1)
    want, got = (read_checkpoint_file(path).state for path in (files[1], exported))
    for key in want:
        torch.testing.assert_close(got[key], read_checkpoint_file(files[0]).state[key] if "value" in key else want[key])
    moved = tmp_path / "elsewhere" / "a.zip"
    moved.parent.mkdir()
    moved.write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match=r"pass as normaliser the file of those that belong to .*a\.zip"):
        export_checkpoint(store.path, moved, tmp_path / "b.zip")
    statistics = tmp_path / "run" / "vec_normalize.pkl"
    again = export_checkpoint(store.path, moved, tmp_path / "b.zip", checkpoint=1, normaliser=statistics)
    torch.testing.assert_close(read_checkpoint_file(again).state["action_net.weight"], want["action_net.weight"])
    import_checkpoints([again], tmp_path / "again", normaliser=statistics)
    np.testing.assert_allclose(
        Store.open(tmp_path / "again").trial(0).weights()[0], store.trial(0).weights()[1], rtol=1e-6, atol=1e-7
    )


def test_a_normalised_run_without_statistics_is_imported_but_not_judged(tmp_path):
    run_of(tmp_path / "run", **SAID)
    store = import_checkpoints([tmp_path / "run"], tmp_path / "store", env_id="InvertedPendulum-v5")
    assert store.is_unnormalised
    assert (
        "whose statistics do not lie beside the checkpoints: pass their file as normaliser"
        in store.config["source"]["note"]
    )
    assert import_checkpoints([store.path], tmp_path / "joined").is_unnormalised
    with pytest.raises(
        ValueError, match=r"saw observations through VecNormalize.*import the checkpoint files again with normaliser"
    ):
        tipl.evaluate(store, load_pretrained(), tmp_path / "evaluation")
    with pytest.raises(ValueError, match="the simulator cannot run the policies"):
        recalibrate([store], tmp_path / "calibrated")
    ignored = import_checkpoints([tmp_path / "run"], tmp_path / "none", normaliser="none")
    assert not ignored.is_unnormalised
    assert ignored.trial(0).weights().tobytes() == store.trial(0).weights().tobytes()


def test_statistics_of_an_env_that_left_observations_alone_are_not_missed(tmp_path):
    run_of(tmp_path / "run", **SAID)
    pickled(VecNormalize(norm_obs=False), tmp_path / "run" / "vec_normalize.pkl")
    store = import_checkpoints([tmp_path / "run"], tmp_path / "store")
    assert not store.is_unnormalised
    assert "note" not in store.config["source"]


def test_statistics_beside_a_run_that_does_not_say_so_are_not_used_but_named(tmp_path):
    run_of(tmp_path / "run")
    pickled(VecNormalize(), tmp_path / "run" / "vec_normalize.pkl")
    store = import_checkpoints([tmp_path / "run"], tmp_path / "store")
    assert (
        "vec_normalize.pkl lies beside the checkpoints, which do not say that they used it"
        in store.config["source"]["note"]
    )
    assert not store.is_unnormalised
    used = import_checkpoints([tmp_path / "run"], tmp_path / "used", normaliser=tmp_path / "run" / "vec_normalize.pkl")
    assert used.trial(0).weights().tobytes() != store.trial(0).weights().tobytes()


def save_policy(path: Path, state: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_beside_a_policy_alone_are_asked_about(suffix, layout, tmp_path):
    """A policy that was saved without its model cannot say whether it saw normalised observations."""
    run = tmp_path / "run"
    state = read_checkpoint_file(ppo_zip(tmp_path / "a.zip")).state
    files = [save_policy(run / f"rl_model_{step}_steps{suffix}", state) for step in STEPS]
    for name in LAYOUTS[layout]:
        pickled(VecNormalize(), run / name)
    with pytest.raises(
        ValueError, match=r"^import: .*\.pkl lies beside .* does not say .*say with normaliser .* none if"
    ):
        import_checkpoints([run], tmp_path / "store", activation="tanh")
    assert not (tmp_path / "store").exists()
    plain = import_checkpoints([run], tmp_path / "none", activation="tanh", normaliser="none")
    assert "note" not in plain.config["source"]
    folded = import_checkpoints(
        [run], tmp_path / "folded", activation="tanh", normaliser=run / next(iter(LAYOUTS[layout]))
    )
    assert "folded into the first layer" in folded.config["source"]["note"]
    assert plain.trial(0).weights().tobytes() != folded.trial(0).weights().tobytes()
    with pytest.raises(
        ValueError, match=r"not clear which .*\(--normaliser\), or none if they belong to no checkpoint"
    ):
        pickled(VecNormalize(), run / "a" / "vec_normalize.pkl")
        pickled(VecNormalize(), run / "b" / "vec_normalize.pkl")
        import_checkpoints([save_policy(run / f"other{suffix}", state)], tmp_path / "store", activation="tanh")
    save_policy(tmp_path / "cnn" / f"a{suffix}", {"w": torch.ones(2)})
    pickled(VecNormalize(), tmp_path / "cnn" / "vec_normalize.pkl")
    import_checkpoints([tmp_path / "cnn"], tmp_path / "cnn_store")  # that no first layer could take in
    assert len(files) == 2


def test_statistics_that_could_belong_to_another_checkpoint_are_refused_with_the_choice(tmp_path):
    run = tmp_path / "run"
    files = run_of(run, **SAID)
    several = {
        "two for all": ["vec_normalize.pkl", "old/vecnormalize.pkl"],
        "of one checkpoint alone": ["rl_model_vecnormalize_64_steps.pkl"],
        "of another step": ["rl_model_vecnormalize_32_steps.pkl"],
        "of another run": ["other_vecnormalize_64_steps.pkl", "other_vecnormalize_128_steps.pkl"],
        "of another model": ["best_vecnormalize.pkl"],
    }
    for names in several.values():
        for name in names:
            pickled(VecNormalize(), run / name)
        with pytest.raises(ValueError, match=r"not clear which statistics .*choose one for all with normaliser"):
            import_checkpoints([run], tmp_path / "store")
        assert not (tmp_path / "store").exists()
        for name in names:
            (run / name).unlink()
    pickled(VecNormalize(), run / "rl_model_vecnormalize_64_steps.pkl")
    with pytest.raises(
        ValueError, match=r"belong to .*rl_model_128_steps.zip: .*vecnormalize_64_steps.pkl; choose one"
    ):
        find_statistics(files)
    pickled(VecNormalize(5), run / "vec_normalize.pkl")
    note = import_checkpoints([run], tmp_path / "store").config["source"]["note"]
    assert f"{run / 'vec_normalize.pkl'}" not in note  # it stands for one checkpoint
    assert find_statistics(files) == dict(
        zip(files, (run / "rl_model_vecnormalize_64_steps.pkl", run / "vec_normalize.pkl"), strict=True)
    )


def test_statistics_that_do_not_fit_are_not_used(tmp_path):
    run_of(tmp_path / "run", **SAID)
    running = RunningMeanStd(0)
    running.mean = running.var = np.ones(5)
    statistics = pickled(VecNormalize(obs_rms=running), tmp_path / "run" / "vec_normalize.pkl")
    store = import_checkpoints([tmp_path / "run"], tmp_path / "store")
    assert store.is_unnormalised
    assert "not of as many observations as the policy has" in store.config["source"]["note"]
    with pytest.raises(ValueError, match="of the observation normaliser, must exist with 3 numbers"):
        describe_import([tmp_path / "run"], normaliser=statistics)
    with pytest.raises(ValueError, match=r"normaliser is for checkpoint files, and .* is a store"):
        import_checkpoints([store.path], tmp_path / "again", normaliser=statistics)
    with pytest.raises(FileNotFoundError, match=r"no file of VecNormalize's statistics .*lost\.pkl"):
        describe_import([tmp_path / "run"], normaliser=tmp_path / "lost.pkl")
    running.var = np.full(5, -1.0)
    pickled(VecNormalize(obs_rms=running), tmp_path / "run" / "vec_normalize.pkl")
    with pytest.raises(RuntimeError, match="mean and variance must be finite, and the variance not negative"):
        import_checkpoints([tmp_path / "run"], tmp_path / "other")
    pickled(VecNormalize(obs_rms={"a": running}), tmp_path / "run" / "vec_normalize.pkl")
    with pytest.raises(RuntimeError, match="statistics of several observations, a Dict space"):
        import_checkpoints([tmp_path / "run"], tmp_path / "other")


def laughing(depth: int = 40) -> bytes:
    """A list of two lists of two lists ... that are the same: small until it is written out."""
    return b"]q\x00" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(depth))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04" + laughing() + b"h\x28\x8c\x01a\x93.",  # as a module
        b"\x80\x04" + laughing() + b"h\x28)R.",  # called
    ],
)
def test_names_are_text_and_nothing_large_is_written_out(data, tmp_path):
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(RuntimeError, match=r"a\.pkl (is damaged|holds)") as refused:
        read_statistics(tmp_path / "a.pkl")
    assert len(str(refused.value)) < 500


def test_arrays_are_of_plain_numbers_and_not_too_long(tmp_path):
    for dtype, order in ((["f8"], "<"), ("f8", ["<"]), ("O", "|"), ("f8", "?")):
        made = Made(Name("numpy", "dtype"), (dtype, False, True), (3, order, None, None, None, -1, -1, 0))
        array = Made(Name("numpy.core.multiarray", "_reconstruct"), (), (1, (1,), made, False, bytes(8)))
        with pytest.raises(PickleError, match="not of plain numbers"):
            array_of(array)
    running = RunningMeanStd(0)
    running.mean = running.var = np.ones(2**20 + 1, np.uint8)
    with pytest.raises(RuntimeError, match="an array of 1,048,577 numbers, at most 1,048,576 are read"):
        read_statistics(pickled(VecNormalize(obs_rms=running), tmp_path / "a.pkl"))


# ---- live


class Agent(torch.nn.Module):
    """As CleanRL names its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.actor_mean = torch.nn.Sequential(torch.nn.Linear(OBS_DIM, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.actor_logstd = torch.nn.Parameter(torch.zeros(1, 2))


def test_a_recorder_folds_what_normalises_now(tmp_path):
    agent, normaliser = Agent(), VecNormalize()
    with tipl.Recorder(tmp_path / "a.zarr") as recorder:
        recorder.log(agent, env_steps=0, normaliser=normaliser)
        assert recorder.holds(agent, normaliser=normaliser)
        normaliser.obs_rms.mean = normaliser.obs_rms.mean + 1.0
        assert recorder.holds(agent, normaliser=normaliser)  # statistics go on where weights stay
        with torch.no_grad():
            agent.actor_mean[2].bias += 1.0
        assert not recorder.holds(agent, normaliser=normaliser)
        with pytest.raises(ValueError, match="normaliser must be given in every call or in none"):
            recorder.log(agent, env_steps=1)
        normaliser.norm_obs = False
        with pytest.raises(ValueError, match="normaliser must be given in every call or in none"):
            recorder.log(agent, env_steps=1, normaliser=normaliser)
        recorder.log(agent, env_steps=1, normaliser=normaliser.obs_rms)
        with pytest.raises(ValueError, match="normaliser must have obs_rms, or mean and var, got object"):
            recorder.log(agent, env_steps=2, normaliser=object())
    store = Store.open(tmp_path / "a.zarr")
    assert (
        "statistics of VecNormalize are folded into the first layer of each checkpoint; what VecNormalize clips, "
        "observations beyond 10 standard deviations, is not clipped"
    ) in store.config["source"]["note"]
    obs = torch.randn(1, 9, OBS_DIM)
    running = normaliser.obs_rms
    seen = (obs.double() - torch.from_numpy(running.mean)) / torch.from_numpy(np.sqrt(running.var + 1e-8))
    row = torch.from_numpy(store.trial(0).weights(1, 2).copy())
    torch.testing.assert_close(mean_action(store.policy, row, obs)[0], agent.actor_mean(seen.float())[0].detach())
    with (
        tipl.Recorder(tmp_path / "a.zarr", resume=True) as recorder,
        pytest.raises(ValueError, match="its keys or its normaliser are others"),
    ):
        recorder.log(agent, env_steps=5)


class Env(gymnasium.Env):
    """Observations and actions of the sizes of `Agent`."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.np_random.normal(2.0, 3.0, OBS_DIM).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        return self.np_random.normal(2.0, 3.0, OBS_DIM).astype(np.float32), 1.0, False, False, {}


def cleanrls(function: Any = lambda obs: np.clip(obs, -10, 10)) -> Any:
    """The wrappers of CleanRL's ppo_continuous_action.py."""
    env = wrappers.FlattenObservation(Env())
    env = wrappers.ClipAction(wrappers.RecordEpisodeStatistics(env))
    env = wrappers.NormalizeObservation(env)
    env = wrappers.TransformObservation(env, function, env.observation_space)
    return wrappers.TransformReward(wrappers.NormalizeReward(env), lambda reward: float(np.clip(reward, -10, 10)))


def used(env: Any) -> Any:
    env.reset(seed=0)
    for _ in range(5):
        env.step(env.action_space.sample())
    return env


AS_NORMALISER = {
    "NormalizeObservation": lambda: wrappers.NormalizeObservation(Env()),
    "its statistics": lambda: wrappers.NormalizeObservation(Env()).obs_rms,
    "CleanRL's wrappers": cleanrls,
    "CleanRL's envs": lambda: SyncVectorEnv([cleanrls]),
    "watched envs": lambda: wrappers.vector.RecordEpisodeStatistics(SyncVectorEnv([cleanrls])),
    "a vector's": lambda: wrappers.vector.NormalizeObservation(SyncVectorEnv([Env] * 3)),
    "within a vector's": lambda: wrappers.vector.NormalizeReward(
        wrappers.vector.NormalizeObservation(SyncVectorEnv([Env] * 3))
    ),
}


@pytest.mark.filterwarnings("ignore")  # Gymnasium's, of spaces
@pytest.mark.parametrize("kind", AS_NORMALISER)
def test_a_recorder_looks_for_the_normaliser_in_environments(kind, tmp_path):
    normaliser, agent = AS_NORMALISER[kind](), Agent()
    if hasattr(normaliser, "step"):
        used(normaliser)
    with tipl.Recorder(tmp_path / "run") as recorder:
        for step in range(2):
            recorder.log(agent, env_steps=step, normaliser=normaliser)
            if hasattr(normaliser, "step"):
                used(normaliser)
        recorder.log(agent, env_steps=2, normaliser=normaliser)
    store = Store.open(recorder.path)
    note = store.config["source"]["note"]
    assert "are folded into the first layer of each checkpoint" in note
    assert ("what TransformObservation clips, normalised observations beyond [-10, 10], is not clipped" in note) == (
        "CleanRL" in kind or kind == "watched envs"
    )
    running = normaliser
    while not hasattr(running, "mean"):
        running = vars(running).get("obs_rms") or (running.envs[0] if hasattr(running, "envs") else running.env)
    obs = torch.randn(1, 9, OBS_DIM)
    seen = (obs.double() - torch.from_numpy(running.mean)) / torch.from_numpy(np.sqrt(running.var + 1e-8))
    row = torch.from_numpy(store.trial(0).weights()[-1:].copy())
    torch.testing.assert_close(mean_action(store.policy, row, obs)[0], agent.actor_mean(seen.float())[0].detach())


REFUSED_NORMALISERS = {
    "several": (
        lambda: SyncVectorEnv([cleanrls, cleanrls]),
        "NormalizeObservation, of which each of the 2 environments has one with other statistics: pass the one",
    ),
    "none": (Env, "and so must an environment's wrapper, got Env without"),
    "none in a vector": (lambda: SyncVectorEnv([Env, Env]), "wrapper, got SyncVectorEnv without"),
    "twice": (lambda: wrappers.NormalizeObservation(cleanrls()), None),  # it is named itself
    "twice, within": (
        lambda: wrappers.NormalizeReward(wrappers.NormalizeObservation(cleanrls())),
        "NormalizeObservation over NormalizeObservation, which normalise twice",
    ),
    "more than a clip": (
        lambda: cleanrls(lambda obs: np.clip(2 * obs, -10, 10)),
        "TransformObservation, which changes observations: pass the one NormalizeObservation",
    ),
    "another function": (lambda: cleanrls(np.tanh), "TransformObservation, which changes observations"),
    "actions": (
        lambda: wrappers.TransformAction(cleanrls(), lambda action: -action, Env.action_space),
        "TransformAction, which changes actions: pass",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED_NORMALISERS)
def test_a_normaliser_that_is_not_clear_is_refused_with_what_was_found(kind, tmp_path):
    make, message = REFUSED_NORMALISERS[kind]
    with tipl.Recorder(tmp_path / "run") as recorder:
        if message is None:
            recorder.log(Agent(), env_steps=0, normaliser=used(make()))
            return
        with pytest.raises(ValueError, match=rf"^log: normaliser.*{message}") as refused:
            recorder.log(Agent(), env_steps=0, normaliser=used(make()))
    assert "\n" not in str(refused.value)
    assert not recorder.path.exists()


def test_environments_in_other_processes_show_no_statistics(tmp_path):
    envs = AsyncVectorEnv([cleanrls])
    try:
        with (
            tipl.Recorder(tmp_path / "run") as recorder,
            pytest.raises(ValueError, match=r"^log: normaliser: the environments of AsyncVectorEnv run in other proc"),
        ):
            recorder.log(Agent(), env_steps=0, normaliser=envs)
    finally:
        envs.close()


@pytest.mark.parametrize(
    ("function", "limits"),
    [
        (lambda obs: np.clip(obs, -10, 10), "[-10, 10]"),
        (lambda x: np.clip(x, -2.5, 5), "[-2.5, 5]"),
        (lambda obs: obs.clip(-5, 5), "[-5, 5]"),
        (lambda obs: np.clip(obs, -10, 10) * 2, ""),
        (lambda obs: np.clip(obs + 1, -10, 10), ""),
        (lambda obs: np.clip(obs, obs, 10), ""),
        (lambda obs: np.maximum(obs, 0), ""),
        (lambda obs: -obs.clip(-5, 5), ""),
        (lambda obs: obs, ""),
        (lambda obs, low=1: np.clip(obs, -low, low), ""),
        (np.tanh, ""),
    ],
)
def test_functions_that_clip_and_do_nothing_else_are_known_by_their_code(function, limits):
    env = wrappers.TransformObservation(wrappers.NormalizeObservation(Env()), function, Env.observation_space)
    found = wrapping_of(env)
    assert found.clips == (
        (f"what TransformObservation clips, normalised observations beyond {limits}, is not clipped",) if limits else ()
    )
    assert bool(found.changes) == (not limits)


def test_json_of_a_zip_is_enough_to_know(tmp_path):
    path = ppo_zip(tmp_path / "a.zip", 1, **SAID)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        assert json.loads(archive.read("data"))["_last_original_obs"]
    assert read_checkpoint_file(path).normalised
    assert not read_checkpoint_file(ppo_zip(tmp_path / "b.zip", 1)).normalised


# ---- what would be imported


def test_a_dry_run_says_what_each_tensor_is_taken_for_and_writes_nothing(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    run_of(run, **SAID)
    pickled(VecNormalize(), run / "vec_normalize.pkl")
    lines = describe_import([run], env_id="Pendulum-v1")
    assert ("file", str(run / "rl_model_64_steps.zip")) in lines
    assert ("tensor", "log_std (1,): the actor's") in lines
    assert ("tensor", "action_net.weight (1, 8): the actor's") in lines
    assert ("tensor", "value_net.weight (1, 8): a critic's") in lines
    assert any(text.endswith("the observation normaliser's, folded into the first layer") for _, text in lines)
    expected = f"{run}: 2 checkpoints, rl_model_64_steps.zip at env step 64 to rl_model_128_steps.zip at 128"
    assert ("trial", expected) in lines
    assert dict(lines)["note"].startswith("the observation statistics of VecNormalize are folded")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    monkeypatch.setattr(sys, "argv", ["tipl", "import", str(run), "--dry-run"])
    main()
    said = capsys.readouterr().out
    assert "tensor     mlp_extractor.policy_net.0.weight (8, 3): the actor's" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    stored = import_checkpoints([run], tmp_path / "store")
    assert ("trial", f"{stored.path}, trial 0: 2 checkpoints, env steps 64 to 128") in describe_import([stored.path])


def test_a_dry_run_reads_the_weights_too(tmp_path):
    path = ppo_zip(tmp_path / "a.zip", 1)
    state = read_checkpoint_file(path)
    state.state["action_net.bias"][:] = np.nan
    path.write_bytes(state.to_bytes())
    with pytest.raises(ValueError, match=r"action_net.bias must be finite"):
        describe_import([path])


def test_a_refused_dry_run_says_what_there_is_to_choose_from(tmp_path, capsys, monkeypatch):
    torch.save({"a": {"w.weight": torch.ones(2, 2)}, "b": {"w.weight": torch.ones(2, 2)}}, tmp_path / "a.pt")
    monkeypatch.setattr(sys, "argv", ["tipl", "import", str(tmp_path / "a.pt"), "--dry-run"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr()
    assert "tensor     b.w.weight (2, 2): not chosen\n" in said.out
    assert "not clear which is the policy's" in said.err


def test_what_is_not_clear_is_refused_in_a_dry_run_too(tmp_path):
    torch.save({"a": {"w.weight": torch.ones(2, 2)}, "b": {"w.weight": torch.ones(2, 2)}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="not clear which is the policy's"):
        describe_import([tmp_path / "a.pt"])
    lines = describe_import([tmp_path / "a.pt"], actor="a.")
    assert [text for label, text in lines if label == "tensor"] == [
        "a.w.weight (2, 2): the actor's",
        "b.w.weight (2, 2): not chosen",
    ]
