"""Parameters of Brax and MuJoCo Playground: policies act as there, exports change only the policy, no pickle is run.

The files are made by hand, in the layout that brax.io.model.save_params writes, with classes that stand for those of
Brax, Flax and JAX. What the policies do is computed here in float64, from their arrays alone.
"""

import enum
import itertools
import os
import pickle
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import mutated_pickles
from numpy.typing import NDArray

import tipl
from tipl.collecting.policy_network import actions_of, mean_action
from tipl.policy import ParameterLayout, PolicySpec
from tipl.storing.actor_families import Settings
from tipl.storing.foreign_actors import find_actor
from tipl.storing.foreign_files import read_checkpoint_file
from tipl.storing.importer import describe_import
from tipl.storing.store import Store

SIZES = (3, 8, 6, 2)
VALUES = {"std_param": "value", "std_logparam": "log_value"}


class RunningStatisticsState:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class NormalizationMode(enum.IntEnum):
    WELFORD = 0


class UInt64:
    def __init__(self, hi: Any, lo: Any) -> None:
        self.hi, self.lo = hi, lo


class FrozenDict:
    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return FrozenDict, (self.content,)


def _reconstruct_array(function: Any, arguments: Any, state: Any, _: Any) -> Any:
    array = function(*arguments)
    array.__setstate__(state)
    return JaxArray(array)


class JaxArray:
    def __init__(self, value: Any) -> None:
        self.value = np.asarray(value)

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.value

    def __reduce__(self) -> Any:
        return _reconstruct_array, (*self.value.__reduce__(), {"weak_type": False})


PLACES = {
    "brax.training.acme.running_statistics": (RunningStatisticsState, NormalizationMode),
    "brax.training.types": (UInt64,),
    "flax.core.frozen_dict": (FrozenDict,),
    "jax._src.array": (_reconstruct_array,),
}
for place, things in PLACES.items():
    for thing in things:
        thing.__module__ = place  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pickle find what stands for the libraries where they have it."""
    for place, things in PLACES.items():
        for parent in itertools.accumulate(place.split("."), "{}.{}".format):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        for thing in things:
            setattr(sys.modules[place], thing.__name__, thing)  # type: ignore[attr-defined]


def mlp(sizes: tuple[int, ...], rng: np.random.Generator) -> dict[str, Any]:
    return {
        f"hidden_{i}": {
            "bias": rng.normal(size=out).astype(np.float32),
            "kernel": rng.normal(size=(fan_in, out)).astype(np.float32),
        }
        for i, (fan_in, out) in enumerate(itertools.pairwise(sizes))
    }


def params(seed: int = 0, spread: str = "halves", sizes: tuple[int, ...] = SIZES) -> tuple[Any, ...]:
    """What PPO of Brax trains: statistics, policy and value; the policy of a "tanh_normal" distribution has two
    outputs for each action, one of a "normal" distribution `spread`, std_param or std_logparam."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=sizes[0]), rng.uniform(0.1, 3.0, sizes[0])
    statistics = RunningStatisticsState(
        mean=mean.astype(np.float32),
        std=std.astype(np.float32),
        count=UInt64(np.uint32(0), np.uint32(4096)),
        summed_variance=(4096 * std**2).astype(np.float32),
        std_eps=0.0,
        mode=NormalizationMode.WELFORD,
    )
    if spread == "halves":
        policy = mlp((*sizes[:-1], 2 * sizes[-1]), rng)
    else:
        hidden = mlp(sizes, rng)
        _, head = hidden.popitem()
        number = rng.uniform(0.5, 2.0, sizes[-1]).astype(np.float32)
        policy = {"MLP_0": hidden, "Dense_0": head, spread: {VALUES[spread]: number}}
    return statistics, {"params": policy}, {"params": mlp((*sizes[:-1], 1), rng)}


def with_arrays(tree: Any, kind: type) -> Any:
    """The tree with arrays of another kind."""
    if isinstance(tree, dict):
        return {key: with_arrays(it, kind) for key, it in tree.items()}
    if isinstance(tree, RunningStatisticsState | UInt64):
        changed = RunningStatisticsState(**with_arrays(tree.__dict__, kind))
        changed.__class__ = type(tree)
        return changed
    return kind(tree) if isinstance(tree, np.ndarray | np.generic) else tree


def several_observations(content: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with observations by name, of which the policy sees one."""
    statistics = content[0]
    for name in ("mean", "std", "summed_variance"):
        own = getattr(statistics, name)
        setattr(statistics, name, {"privileged_state": np.ones(9, np.float32), "state": own})
    return content


KINDS: dict[str, Any] = {
    "JAX arrays": lambda content: tuple(with_arrays(it, JaxArray) for it in content),
    "NumPy arrays, a list": list,
    "several observations": several_observations,
    "frozen dicts": lambda content: (content[0], *map(FrozenDict, content[1:])),
    "SAC": lambda content: content[:2],
}


def saved(content: Any, path: Path, protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def exact_actions(content: tuple[Any, ...], obs: NDArray[np.float32], *, normalised: bool = True) -> NDArray[Any]:
    """The mode of Brax's distribution for observations (n, obs_dim), in float64."""
    statistics, policy = content[:2]
    layers = policy["params"]
    is_normal = "MLP_0" in layers
    if is_normal:
        layers = {**layers["MLP_0"], "head": layers["Dense_0"]}
    x = obs.astype(np.float64)
    x = (x - statistics.mean) / statistics.std if normalised else x
    for i, layer in enumerate(layers.values()):
        x = x / (1 + np.exp(-x)) if i else x
        x = x @ layer["kernel"].astype(np.float64) + layer["bias"]
    return x if is_normal else np.tanh(x[:, : x.shape[1] // 2])


def actions(spec: Any, row: NDArray[np.float32], obs: NDArray[np.float32]) -> NDArray[np.float64]:
    means = mean_action(spec, torch.from_numpy(row.copy())[None], torch.from_numpy(obs)[None])[0].numpy()
    return actions_of(spec, means, -np.ones(spec.act_dim), np.ones(spec.act_dim))


OBS = np.random.default_rng(9).normal(size=(200, SIZES[0])).astype(np.float32)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_acts_as_in_brax_and_is_exported(kind: str, protocol: int, tmp_path: Path) -> None:
    for seed in (0, 1):
        saved(KINDS[kind](params(seed)), tmp_path / f"run/params_{seed * 10}.pkl", protocol)
    store = tipl.import_checkpoints([tmp_path / "run"], tmp_path / "store", activation="silu")
    assert store.policy == PolicySpec(3, 2, (8, 6), "silu", spread="halves", squash=True)
    assert list(store.trial(0).env_steps) == [0, 10]
    row = store.trial(0).weights()[1]
    np.testing.assert_allclose(actions(store.policy, row, OBS), exact_actions(params(1), OBS), atol=1e-5)
    note = store.config["source"]["note"]
    assert "without normalize_observations, pass 'running_statistics.*' as ignore" in note
    assert ("is taken to see state, as by default" in note) == (kind == "several observations")

    like = tmp_path / "run/params_0.pkl"
    written = tipl.export_checkpoint(store.path, like, tmp_path / "out.pkl")
    before, after = like.read_bytes(), written.read_bytes()
    assert len(before) == len(after)
    old, new = (read_checkpoint_file(path).state for path in (like, written))
    for key in old:
        assert torch.equal(old[key], new[key]) != key.startswith("policy."), key
    whole = pickle.loads(after)  # which the library's own load_params does
    layers = (whole[1].content if kind == "frozen dicts" else whole[1])["params"]
    exported = (
        params(0)[0],
        {"params": {name: {k: np.array(v) for k, v in it.items()} for name, it in layers.items()}},
    )
    np.testing.assert_allclose(exact_actions(exported, OBS), exact_actions(params(1), OBS), atol=1e-5)
    changed = {i for i in range(len(before)) if before[i] != after[i]}
    policy = {i for key in new if key.startswith("policy.") for i in places(before, old[key], key)}
    assert changed <= policy


def places(data: bytes, tensor: torch.Tensor, key: str) -> range:
    """Where the numbers of an array lie in a file."""
    content = (tensor.T if key.endswith("kernel") else tensor).numpy().tobytes()
    assert data.count(content) == 1
    return range(data.index(content), data.index(content) + len(content))


@pytest.mark.parametrize("spread", ["std_param", "std_logparam"])
def test_a_normal_distribution_has_standard_deviations_of_its_own(spread: str, tmp_path: Path) -> None:
    made = params(2, spread)
    path = saved(made, tmp_path / "params_1.pkl")
    store = tipl.import_checkpoints([path], tmp_path / "store", activation="silu")
    assert store.policy == PolicySpec(3, 2, (8, 6), "silu")
    row = store.trial(0).weights()[0]
    np.testing.assert_allclose(actions(store.policy, row, OBS), exact_actions(made, OBS), rtol=1e-4, atol=1e-4)
    (number,) = made[1]["params"][spread].values()
    expected = np.log(number) if spread == "std_param" else number
    np.testing.assert_allclose(row[:2], expected, rtol=1e-6, atol=1e-7)
    again = pickle.loads(tipl.export_checkpoint(store.path, path, tmp_path / "out.pkl").read_bytes())
    np.testing.assert_allclose(exact_actions(again, OBS), exact_actions(made, OBS), rtol=1e-5, atol=1e-5)


def test_what_the_file_does_not_say_must_be_said(tmp_path: Path) -> None:
    path = saved(params(), tmp_path / "params_1")
    with pytest.raises(ValueError, match=r"activation must be given, .* the library's default is silu"):
        tipl.import_checkpoints([path], tmp_path / "store")
    store = tipl.import_checkpoints([path], tmp_path / "store", activation="tanh")
    assert isinstance(store.policy, PolicySpec)
    assert store.policy.activation == "tanh"
    lines = describe_import([path], activation="silu")
    assert (
        "tensor",
        "running_statistics.mean (3,): the observation normaliser's, folded into the first layer",
    ) in lines
    assert ("tensor", "policy.hidden_2.kernel (4, 6): the actor's action_net.weight") in lines
    assert ("tensor", "value.hidden_2.kernel (1, 6): a critic's") in lines
    assert any("standard deviations by the second half of the last layer" in text for _, text in lines)


def test_statistics_that_the_run_did_not_use_are_left_out(tmp_path: Path) -> None:
    """Brax keeps and saves them also where normalize_observations is False."""
    made = params(3)
    path = saved(made, tmp_path / "params_1.pkl")
    store = tipl.import_checkpoints([path], tmp_path / "store", activation="silu", ignore="running_statistics.*")
    row = store.trial(0).weights()[0]
    np.testing.assert_allclose(actions(store.policy, row, OBS), exact_actions(made, OBS, normalised=False), atol=1e-5)
    assert "normalize_observations" not in store.config["source"].get("note", "")
    assert tipl.export_checkpoint(store.path, path, tmp_path / "out.pkl").read_bytes() == path.read_bytes()


def test_a_network_that_is_no_such_mlp_is_not_run(tmp_path: Path) -> None:
    odd = params(sizes=(3, 8, 2))
    odd[1]["params"]["hidden_1"] = {"bias": np.ones(3, np.float32), "kernel": np.ones((8, 3), np.float32)}
    path = saved(odd, tmp_path / "odd.pkl")
    with pytest.raises(ValueError, match="running_statistics, which the actor chosen leaves out"):
        tipl.import_checkpoints([path], tmp_path / "store", activation="silu", actor="policy.")
    ignored = {"activation": "silu", "ignore": "running_statistics.*"}
    assert isinstance(tipl.import_checkpoints([path], tmp_path / "a", **ignored).policy, ParameterLayout)
    normed = params()
    normed[1]["params"]["LayerNorm_0"] = {"scale": np.ones(8, np.float32)}
    with pytest.raises(ValueError, match=r"beside the actor of brax .* lies \[policy\.LayerNorm_0\.scale\]"):
        tipl.import_checkpoints([saved(normed, tmp_path / "n.pkl")], tmp_path / "store", activation="silu")
    store = tipl.import_checkpoints([tmp_path / "n.pkl"], tmp_path / "b", actor="policy.", **ignored)
    assert isinstance(store.policy, ParameterLayout)
    assert store.policy.shapes["policy.LayerNorm_0.scale"] == (8,)
    assert (
        tipl.export_checkpoint(store.path, tmp_path / "n.pkl", tmp_path / "out.pkl").read_bytes()
        == (tmp_path / "n.pkl").read_bytes()
    )


def test_observations_of_other_names_are_asked_about(tmp_path: Path) -> None:
    content = params()
    for name in ("mean", "std"):
        setattr(content[0], name, {"proprio": getattr(content[0], name), "pixels": np.ones(6, np.float32)})
    path = saved(content, tmp_path / "params.pkl")
    with pytest.raises(
        ValueError, match=r"statistics of several observations, mean\.proprio, .* which the policy sees"
    ):
        tipl.import_checkpoints([path], tmp_path / "store", activation="silu")
    store = tipl.import_checkpoints([path], tmp_path / "store", activation="silu", actor="policy.")
    assert isinstance(store.policy, ParameterLayout)


def test_checkpoints_of_orbax_are_refused_with_what_to_do(tmp_path: Path) -> None:
    step = tmp_path / "run/checkpoints/000000010240"
    step.mkdir(parents=True)
    (step / "manifest.ocdbt").write_bytes(b"\x0c\xdb")
    (step / "ppo_network_config.json").write_text("{}")
    for source in (tmp_path / "run", step.parent, step):
        with pytest.raises(
            ValueError, match=r"000000010240 is a checkpoint of Orbax.*load.*checkpoint\.load.*save_params"
        ):
            tipl.import_checkpoints([source], tmp_path / "store")


class Evil:
    """A pickle that makes a folder where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def changed(where: str, value: Any) -> Any:
    """Parameters with another value at one place, such as "1.params.hidden_0.bias"."""
    content: Any = list(params())
    *path, last = where.split(".")
    part = content
    for name in path:
        part = part[int(name)] if isinstance(part, list) else part.__dict__ if hasattr(part, "mean") else part[name]
    part = part.__dict__ if hasattr(part, "mean") else part
    part[int(last) if isinstance(part, list) else last] = value
    return tuple(content)


@pytest.mark.parametrize(
    "where", ["0", "0.mean", "0.count", "0.mode", "0.std_eps", "1", "1.params", "1.params.hidden_0.bias", "2.params.x"]
)
def test_code_is_refused_by_name_wherever_it_lies(where: str, tmp_path: Path) -> None:
    path = saved(changed(where, Evil(tmp_path / "ran")), tmp_path / "params.pkl")
    if where == "0":  # then nothing else says that it is Brax's
        path.write_bytes(pickle.dumps((Evil(tmp_path / "ran"), RunningStatisticsState()), 4))
    with pytest.raises(RuntimeError, match=r"params\.pkl holds posix\.mkdir, and was not loaded, because loading it"):
        read_checkpoint_file(path)
    assert not (tmp_path / "ran").exists()


SHARED = np.ones(6, np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RunningStatisticsState(), r"holds no \(statistics, policy, value\) of Brax's, and nothing else is read"),
        ((*params(), 1), "holds no .statistics, policy, value. of Brax's"),
        ((*params()[:1], [1]), "holds list at policy, and nothing but arrays is read there"),
        ((params()[0], {"a": None}), r"holds NoneType at policy\.a, and nothing but arrays"),
        ((params()[0], {"a": np.array([None])}), "is damaged: an array's shape or content is none"),
        ((params()[0], {"a": np.array([1], "M8[s]")}), "holds an array that is not of plain numbers"),
        ((params()[0], {1: SHARED}), "has the key 1 in policy, and no name of an array"),
        ((params()[0], {"a" * 2000: SHARED}), "has the key a{100} in policy"),
        ((params()[0], {"a.b": SHARED, "a": {"b": SHARED + 1}}), r"holds two arrays under one name, policy\.a\.b"),
        ((params()[0], {str(i): {} for i in range(5000)}), "holds more than 4,096 entries"),
        ((RunningStatisticsState(mean=SHARED), {"a": SHARED}), "holds NoneType at statistics.std"),
    ],
)
def test_other_pickles_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = saved(content, tmp_path / "params.pkl")
    with pytest.raises(RuntimeError, match=message):
        read_checkpoint_file(path)


def test_arrays_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Writing to one would change the other."""
    shared = JaxArray(SHARED)
    path = saved((params()[0], {"a": shared, "b": shared}), tmp_path / "params.pkl")
    with pytest.raises(RuntimeError, match="holds two arrays that share their numbers"):
        read_checkpoint_file(path)
    with pytest.raises(RuntimeError, match="is a pickle of a protocol before 3, whose arrays are not read"):
        read_checkpoint_file(saved(params(), tmp_path / "old.pkl", 2))


def test_statistics_that_cannot_be_folded_in_are_refused(tmp_path: Path) -> None:
    for field, value, message in (
        ("mean", SHARED, r"running_statistics\.mean, of the observation normaliser, must exist with 3 numbers"),
        ("std", -SHARED[:3], r"running_statistics\.std must not be negative"),
        ("std", 0 * SHARED[:3], "policy.hidden_0.kernel, normalised, must be finite"),
        ("mean", SHARED[:3] * np.nan, r"running_statistics\.mean and running_statistics\.std must be finite"),
    ):
        path = saved(changed(f"0.{field}", value), tmp_path / "params.pkl")
        with pytest.raises(ValueError, match=message):
            tipl.import_checkpoints([path], tmp_path / "store", activation="silu")
    assert not (tmp_path / "store").exists()


def test_damaged_files_run_nothing_and_take_little(tmp_path: Path) -> None:
    """Mutations of a file: whatever they hold is refused, or read as numbers and written as it was."""
    whole = pickle.dumps(KINDS["JAX arrays"](params(sizes=(2, 3, 1))), 4)
    path, refused = tmp_path / "a.pkl", 0
    tracemalloc.start()
    for data in mutated_pickles(whole, 1000):
        path.write_bytes(data)
        try:
            file = read_checkpoint_file(path)
            assert file.to_bytes() == data
            row = find_actor(file.state, Settings("silu")).flatten(file.state)
        except (RuntimeError, ValueError):
            refused += 1
        else:
            assert np.isfinite(row).all()
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    assert 100 < refused < 1000


def test_pickles_beside_other_checkpoints_are_none(tmp_path: Path) -> None:
    saved(params(), tmp_path / "run/params_1.pkl")
    torch.save({"w": torch.ones(3)}, tmp_path / "run/model_1.pt")
    store = tipl.import_checkpoints([tmp_path / "run"], tmp_path / "store")
    assert isinstance(store, Store)
    assert store.policy.num_params == 3
