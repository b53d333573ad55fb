"""TorchScript files: their weights are read, forecast and written back, and none of their code is run."""

import functools
import io
import pickle
import random
import struct
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import Calls, zip_bytes
from torch import Tensor, nn

import tipl
from tipl.collecting.policy_network import mean_action
from tipl.policy import PolicySpec
from tipl.storing.foreign_files import find_actor_in, read_checkpoint_file
from tipl.storing.importer import describe_import

OBS_DIM, ACT_DIM = 3, 2


@pytest.fixture(autouse=True)
def _deprecated() -> Iterator[None]:
    """torch says so of torch.jit, from one release or another."""
    with warnings.catch_warnings(action="ignore"):
        yield


def mlp(*between: nn.Module, seed: int = 0, out: int = ACT_DIM) -> nn.Sequential:
    """Layers of width 4 with these modules between them, of which the last may be Identity."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(OBS_DIM, 4)]
    for module in between:
        layers += [module, nn.Linear(4, 4)]
    layers[-1] = nn.Linear(4 if between else OBS_DIM, out)
    return nn.Sequential(*layers)


class Empirical(nn.Module):
    """The normaliser of rsl_rl."""

    def __init__(self, eps: float = 1e-2) -> None:
        super().__init__()
        self.eps = eps
        self.until: int | None = None
        self.register_buffer("_mean", torch.randn(1, OBS_DIM))
        self.register_buffer("_var", torch.rand(1, OBS_DIM) + 0.5)
        self.register_buffer("_std", self._var.sqrt())
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self._mean) / (self._std + self.eps)


class Exported(nn.Module):
    """What IsaacLab exports: an actor behind a normaliser or Identity."""

    def __init__(self, actor: nn.Module, normalizer: nn.Module) -> None:
        super().__init__()
        self.is_recurrent = False
        self.actor, self.normalizer = actor, normalizer

    def forward(self, x: Tensor) -> Tensor:
        return self.actor(self.normalizer(x))


class RslRl(nn.Module):
    """The policy of rsl_rl 3, scripted as a whole."""

    def __init__(self, seed: int = 0, eps: float = 1e-2) -> None:
        super().__init__()
        self.actor, self.critic = mlp(nn.ELU(), nn.ELU(), seed=seed), mlp(nn.Tanh(), nn.Tanh(), out=1)
        self.actor_obs_normalizer = Empirical(eps)
        self.std = nn.Parameter(torch.rand(ACT_DIM) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.actor(self.actor_obs_normalizer(x))


class Functional(nn.Module):
    """An MLP whose activations are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(OBS_DIM, 4), nn.Linear(4, 4), nn.Linear(4, ACT_DIM)])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.net):
            x = layer(x) if i == 0 else layer(torch.relu(x))
        return x


class Alone(nn.Module):
    """Any module in a module, with more attributes."""

    def __init__(self, net: nn.Module, **more: Any) -> None:
        super().__init__()
        self.net = net
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def script(module: nn.Module) -> Any:
    return torch.jit.script(module.eval())


def trace(module: nn.Module) -> Any:
    return torch.jit.trace(module.eval(), torch.randn(2, OBS_DIM))


def saved(module: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.save(module if isinstance(module, torch.jit.ScriptModule) else script(module), path)
    return path


def content_of(module: Any) -> bytes:
    file = io.BytesIO()
    torch.jit.save(module if isinstance(module, torch.jit.ScriptModule) else script(module), file)
    return file.getvalue()


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# ---- what is read


@pytest.mark.parametrize("how", [script, trace])
@pytest.mark.parametrize(
    "module",
    [
        mlp(nn.Tanh(), nn.Tanh()),
        Exported(mlp(nn.ELU(), nn.ELU()), Empirical()),
        RslRl(),
        Functional(),
        Alone(mlp(nn.ReLU()), scale=torch.ones(2)),
        Exported(mlp(nn.BatchNorm1d(4), nn.LayerNorm(4)), nn.Identity()),
    ],
    ids=["Sequential", "IsaacLab", "rsl_rl", "functional", "attribute", "norms"],
)
def test_the_state_is_that_of_the_module(module: nn.Module, how: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    file = read_checkpoint_file(saved(how(module), tmp_path / "m_1.pt"))
    expected = dict(module.state_dict())
    if how is script and hasattr(module, "scale"):  # tracing leaves out what is not used
        expected |= {"scale": module.scale}
    assert file.format == "torchscript"
    assert file.state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert file.state[key].dtype == tensor.dtype
        assert torch.equal(file.state[key], tensor), key


def test_classes_of_mangled_names(tmp_path: Path) -> None:
    module = torch.jit.script(Exported(mlp(nn.ELU(), nn.ELU()), nn.Identity()))
    path = saved(module, tmp_path / "m_1.pt")
    assert b"___torch_mangle_" in members_of(path.read_bytes())["m_1/data.pkl"]
    classes = read_checkpoint_file(path).script.classes  # type: ignore[union-attr]
    assert classes["actor.2"] == "torch.nn.modules.linear.Linear"
    assert [classes[f"actor.{i}"] for i in (1, 3)] == ["torch.nn.modules.activation.ELU"] * 2


@pytest.mark.parametrize("tensor", [torch.randn(4, 3).T, torch.randn(20)[3:15].view(3, 4), torch.randn(5, 8)[1:4, ::2]])
def test_views_of_storages(tensor: Tensor, tmp_path: Path) -> None:
    path = saved(Alone(nn.Identity(), w=tensor, v=tensor.clone()), tmp_path / "m_1.pt")
    file = read_checkpoint_file(path)
    assert torch.equal(file.state["w"], tensor)
    file.state["w"] += 1
    (tmp_path / "out.pt").write_bytes(file.to_bytes())
    again = torch.jit.load(tmp_path / "out.pt")
    assert torch.equal(again.w, tensor + 1)
    assert torch.equal(again.v, tensor)


def test_lists_and_dicts_of_tensors(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.several = [torch.ones(2), torch.zeros(3)]
            self.named = {"a": torch.full((2,), 3.0)}
            self.names, self.pair = ["a", "b"], (1, "b")

        def forward(self, x: Tensor) -> Tensor:
            return x + self.several[0] + self.named["a"] + len(self.names) + self.pair[0]

    state = read_checkpoint_file(saved(Holder(), tmp_path / "m_1.pt")).state
    assert {key: it.tolist() for key, it in state.items()} == {
        "several.0": [1.0, 1.0],
        "several.1": [0.0, 0.0, 0.0],
        "named.a": [3.0, 3.0],
    }


def test_shared_modules(tmp_path: Path) -> None:
    """They are one network under two names, and weights that occur twice count once."""
    act, net = nn.ELU(), mlp(nn.ELU())
    shared = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2))
    path = saved(Exported(shared, nn.Identity()), tmp_path / "m_1.pt")
    store = tipl.import_checkpoints([path], tmp_path / "a", discrete="logits")
    assert isinstance(store.policy, PolicySpec)
    assert (store.policy.activation, store.policy.hidden_sizes) == ("elu", (4, 4))
    path = saved(Alone(net, twin=net), tmp_path / "m_2.pt")
    file = read_checkpoint_file(path)
    assert file.state["net.0.weight"] is file.state["twin.0.weight"]
    count = sum(it.numel() for it in net.parameters())
    assert tipl.import_checkpoints([path], tmp_path / "b").policy.num_params == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    module = mlp(nn.Tanh()).to(dtype)
    path = saved(module, tmp_path / "m_1.pt")
    store = tipl.import_checkpoints([path], tmp_path / "store")
    exact = torch.cat([it.detach().float().flatten() for it in module.parameters()])
    np.testing.assert_array_equal(store.trial(0).weights()[0], exact.numpy())
    again = torch.jit.load(tipl.export_checkpoint(store.path, path, tmp_path / "out.pt"))
    for new, old in zip(again.parameters(), module.parameters(), strict=True):
        assert torch.equal(new, old)
        assert new.dtype == dtype


# ---- which of them the simulator runs


def test_a_continuous_mlp_is_forecast_and_not_run(
    tmp_path: Path, run_tipl: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """As rsl_rl 2 and legged_gym export it: nothing but the code says whether actions are its output or their tanh."""
    for i in (1, 2):
        saved(mlp(nn.ELU(), nn.ELU(), seed=i), tmp_path / f"run/policy_{i}.pt")
    assert run_tipl("import", tmp_path / "run", "--output", tmp_path / "store", "--env-id", "Hopper-v5") == 0
    output = capsys.readouterr().out
    assert "the code of the TorchScript file was not read" in output
    assert "the simulator cannot run these policies" in output
    store = tipl.Store.open(tmp_path / "store")
    assert store.config["source"]["format"] == "torchscript"
    assert not isinstance(store.policy, PolicySpec)
    assert store.trial(0).env_steps.tolist() == [1, 2]


@pytest.mark.parametrize("how", [script, trace])
def test_discrete_actions_are_run(how: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    module = Alone(mlp(nn.ReLU(), nn.ReLU()))
    path = saved(how(module), tmp_path / "m_1.pt")
    store = tipl.import_checkpoints([path], tmp_path / "store", discrete="logits")  # the modules say the activation
    assert isinstance(store.policy, PolicySpec)
    obs = torch.randn(50, OBS_DIM)
    outputs = mean_action(store.policy, torch.from_numpy(store.trial(0).weights()), obs[None])[0]
    torch.testing.assert_close(outputs, module(obs).detach())
    like = saved(how(Alone(mlp(nn.ReLU(), nn.ReLU(), seed=1))), tmp_path / "m_2.pt")
    written = tipl.export_checkpoint(store.path, like, tmp_path / "out.pt")
    assert torch.equal(torch.jit.load(written)(obs), torch.jit.load(path)(obs))


@pytest.mark.parametrize(
    "save",
    [lambda it, path: saved(script(it), path), lambda it, path: torch.save(it.state_dict(), path)],
    ids=["TorchScript", "state_dict"],
)
def test_discrete_actions_are_exported_to_a_file_that_does_not_say_them(
    save: Callable[[nn.Module, Path], Any], tmp_path: Path
) -> None:
    path = saved(script(mlp(nn.Tanh())), tmp_path / "m_1.pt")
    store = tipl.import_checkpoints([path], tmp_path / "s", discrete="logits")
    other = nn.Sequential(OrderedDict(net=mlp(nn.Tanh(), seed=1)))  # the layers have other names
    like = tmp_path / "like.pt"
    save(other, like)
    written = tipl.export_checkpoint(store.path, like, tmp_path / "out.pt")
    expected = list(torch.jit.load(path).state_dict().values())
    for tensor, old in zip(read_checkpoint_file(written).state.values(), expected, strict=True):
        assert torch.equal(tensor, old)
    narrow = saved(script(nn.Sequential(nn.Linear(OBS_DIM, 3), nn.Tanh(), nn.Linear(3, ACT_DIM))), tmp_path / "n.pt")
    with pytest.raises(
        ValueError, match=r"n.pt does not fit .*: policy_net.0.weight has shape \(3, 3\) instead of \(4, 3\)"
    ):
        tipl.export_checkpoint(store.path, narrow, tmp_path / "other.pt")


def test_modules_of_the_activation_may_lie_elsewhere(tmp_path: Path) -> None:
    """One that forward uses between all layers; the critic may have others."""
    path = saved(Alone(Functional(), act=nn.ReLU(), critic=mlp(nn.Tanh(), out=1)), tmp_path / "m_1.pt")
    with pytest.raises(ValueError, match="activation must be given"):
        tipl.import_checkpoints([path], tmp_path / "store", discrete="logits")
    store = tipl.import_checkpoints([path], tmp_path / "store", discrete="logits", activation="relu")
    assert isinstance(store.policy, PolicySpec)
    with pytest.raises(ValueError, match=r"could not run, act of class torch\.nn\.modules\.activation\.ReLU"):
        tipl.import_checkpoints([path], tmp_path / "other", discrete="logits", activation="tanh")


def test_the_policy_of_rsl_rl_is_run_with_its_normaliser(tmp_path: Path) -> None:
    module = RslRl()
    path = saved(module, tmp_path / "m_1.pt")
    store = tipl.import_checkpoints([path], tmp_path / "store")
    note = store.config["source"]["note"]
    assert "normaliser of each checkpoint is folded" in note
    assert "the alpha of ELU is in the code" in note
    assert isinstance(store.policy, PolicySpec)
    assert store.policy.activation == "elu"  # though the critic has another
    obs = torch.randn(50, OBS_DIM)
    actions = mean_action(store.policy, torch.from_numpy(store.trial(0).weights()), obs[None])[0]
    torch.testing.assert_close(actions, module(obs).detach(), rtol=1e-4, atol=1e-5)
    traced = tipl.import_checkpoints([saved(trace(module), tmp_path / "m_2.pt")], tmp_path / "traced")
    assert "the epsilon of actor_obs_normalizer is in the code" in traced.config["source"]["note"]


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "IsaacLab, normalised": (
        lambda: Exported(mlp(nn.ELU(), nn.ELU()), Empirical()),
        {},
        r"normalizer\._mean, .* may be statistics .* import the run's own checkpoints, .*'normalizer\.\*' as ignore",
    ),
    "IsaacLab, normalised, its layers chosen": (
        lambda: Exported(mlp(nn.ELU(), nn.ELU()), Empirical()),
        {"actor": "actor."},
        r"normalizer\._mean, .* may be statistics",
    ),
    "normalised by an unknown module": (
        lambda: Alone(mlp(nn.ELU()), filter=nn.BatchNorm1d(3, affine=False)),
        {"actor": "net."},
        r"filter\.running_mean may be statistics",
    ),
    "discrete, normalised": (
        lambda: Exported(mlp(nn.ELU(), nn.ELU()), Empirical()),
        {"discrete": "logits"},
        r"normalizer\._mean, .* may be statistics",
    ),
    "another epsilon": (lambda: RslRl(eps=1e-3), {}, "actor_obs_normalizer, has the epsilon 0.001; only 0.01 can"),
    "functional": (lambda: Functional(), {"discrete": "logits"}, "activation must be given, one of tanh, relu, elu"),
    "another activation": (
        lambda: mlp(nn.ELU(), nn.ELU()),
        {"discrete": "logits", "activation": "tanh"},
        "activation says tanh, but between the layers lies elu: leave it out",
    ),
    "two kinds": (
        lambda: mlp(nn.ELU(), nn.Tanh()),
        {"discrete": "logits", "activation": "elu"},
        "could not run, elu and tanh between the layers: leave discrete out",
    ),
    "mish": (lambda: mlp(nn.Mish()), {"discrete": "values"}, "could not run, mish between the layers"),
    "some functional": (
        lambda: nn.Sequential(*mlp(nn.ReLU(), nn.Identity())),
        {"discrete": "values", "activation": "relu"},
        "could not run, nothing and relu between the layers",
    ),
    "layer normalisation": (
        lambda: mlp(nn.LayerNorm(4, elementwise_affine=False)),
        {"discrete": "logits", "activation": "elu"},
        r"could not run, torch\.nn\.modules\.normalization\.LayerNorm between the layers",
    ),
    "a tanh behind the last layer": (
        lambda: nn.Sequential(*mlp(nn.ReLU()), nn.Tanh()),
        {"discrete": "logits"},
        "could not run, tanh behind the last layer",
    ),
    "a module elsewhere": (
        lambda: Alone(mlp(nn.ReLU()), squash=nn.Tanh()),
        {"discrete": "logits"},
        r"could not run, squash of class torch\.nn\.modules\.activation\.Tanh: leave",
    ),
    "a module behind": (
        lambda: nn.Sequential(mlp(nn.ReLU()), nn.Softmax(-1)),
        {"discrete": "logits"},
        r"could not run, 1 of class torch\.nn\.modules\.activation\.Softmax: leave",
    ),
    "a normaliser without tensors": (
        lambda: Exported(mlp(nn.ReLU()), nn.LayerNorm(3, elementwise_affine=False)),
        {"discrete": "logits"},
        r"could not run, normalizer of class torch\.nn\.modules\.normalization\.LayerNorm: leave",
    ),
    "constants": (
        lambda: trace(Listed()),
        {"discrete": "logits"},
        r"could not run, constants of the code that are tensors \(1\)",
    ),
    "frozen": (
        lambda: torch.jit.freeze(script(mlp(nn.ELU()))),
        {},
        r"is a frozen TorchScript module \(torch\.jit\.freeze\), .* save the module before it is frozen",
    ),
    "no weights": (lambda: nn.Identity(), {}, "no floating-point tensor of an actor is there"),
    "stride 0": (lambda: Alone(nn.Identity(), w=torch.ones(1).expand(10)), {}, "has fewer numbers than its shape"),
    "complex": (lambda: Alone(nn.Identity(), w=torch.ones(2) * 1j), {}, "w is torch.complex64"),
    "views of one storage": (lambda: overlapping(), {}, "a and b share memory but are not equal"),
    "sparse": (lambda: Alone(nn.Identity(), w=torch.eye(3).to_sparse()), {}, "_rebuild_sparse_tensor at w, which"),
}  # fmt: skip


class Listed(nn.Module):
    """An MLP beside a list of tensors, of which tracing makes constants of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.shift = mlp(nn.ELU()), [torch.ones(3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - self.shift[0])


def overlapping() -> nn.Module:
    whole = torch.randn(8)
    return Alone(nn.Identity(), a=whole[:6], b=whole[2:])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_in_doubt_is_refused(kind: str, tmp_path: Path) -> None:
    make, options, message = REFUSED[kind]
    path = saved(make(), tmp_path / "m_1.pt")
    with pytest.raises((ValueError, RuntimeError), match=rf"m_1\.pt:? .*({message})"):
        tipl.import_checkpoints([path], tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_what_is_ignored_is_noted(tmp_path: Path) -> None:
    path = saved(Exported(mlp(nn.ELU(), nn.ELU()), Empirical()), tmp_path / "m_1.pt")
    store = tipl.import_checkpoints([path], tmp_path / "store", ignore="normalizer.*")
    assert "normalizer._mean, normalizer._var, normalizer._std and what belongs to it" in store.config["source"]["note"]
    assert not isinstance(store.policy, PolicySpec)
    lines = describe_import([path], ignore="normalizer.*")
    assert ("tensor", "actor.0.weight (4, 3): the actor's") in lines


# ---- export


@pytest.mark.parametrize("how", [script, trace])
def test_export_acts_as_the_new_weights(how: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    """The same file but for the storages of the actor: the normaliser's stay."""
    modules = [Exported(mlp(nn.ELU(), nn.ELU(), seed=i), Empirical()) for i in (1, 2)]
    first, second = (saved(how(it), tmp_path / f"{i}/model.pt") for i, it in enumerate(modules))
    store = tipl.import_checkpoints([second], tmp_path / "store", ignore="normalizer.*")
    written = tipl.export_checkpoint(store.path, first, tmp_path / "out.pt")
    modules[0].actor.load_state_dict(modules[1].actor.state_dict())
    obs = torch.randn(20, OBS_DIM)
    torch.testing.assert_close(torch.jit.load(written)(obs), modules[0](obs), rtol=1e-5, atol=1e-6)
    before, after = members_of(first.read_bytes()), members_of(written.read_bytes())
    assert list(before) == list(after)
    changed = [name for name in before if before[name] != after[name]]
    assert len(changed) == 6
    assert all(name.startswith("model/data/") for name in changed)
    same = tipl.export_checkpoint(store.path, second, tmp_path / "same.pt")
    assert members_of(same.read_bytes()) == members_of(second.read_bytes())
    with zipfile.ZipFile(written) as archive:
        for member in archive.infolist():
            name, extra = struct.unpack_from("<HH", written.read_bytes(), member.header_offset + 26)
            assert (member.header_offset + 30 + name + extra) % 64 == 0  # as torch writes them


def test_export_takes_the_normaliser_out_again(tmp_path: Path) -> None:
    module = RslRl()
    path = saved(module, tmp_path / "m_1.pt")
    store = tipl.import_checkpoints([path], tmp_path / "store")
    again = torch.jit.load(tipl.export_checkpoint(store.path, path, tmp_path / "out.pt"))
    for key, tensor in module.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"like\.pt: activation says elu, but between the layers lies relu"):
        module.actor[1] = module.actor[3] = nn.ReLU()
        tipl.export_checkpoint(store.path, saved(module, tmp_path / "like.pt"), tmp_path / "other.pt")


def test_tensors_of_one_storage_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    path = saved(Alone(nn.Identity(), a=whole[:4], b=whole[4:8]), tmp_path / "m_1.pt")
    assert sum("/data/" in name for name in members_of(path.read_bytes())) <= 2  # one storage, and an id
    store = tipl.import_checkpoints([path], tmp_path / "store")
    row = store.trial(0).weights()[0]
    again = torch.jit.load(tipl.export_checkpoint(row + 1, path, tmp_path / "out.pt"))
    assert (again.a.tolist(), again.b.tolist()) == ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0])


# ---- damaged and hostile ones

RAISES = b"raise SystemExit('code of the file was run')\nimport nothing_of_this_name\n"


def test_no_code_is_run(tmp_path: Path) -> None:
    """Not even looked at: the members may hold anything."""
    members = members_of(content_of(mlp(nn.Tanh())))
    changed = {name: RAISES if "/code/" in name else data for name, data in members.items()}
    (tmp_path / "m_1.pt").write_bytes(zip_bytes(changed))
    store = tipl.import_checkpoints([tmp_path / "m_1.pt"], tmp_path / "store")
    written = tipl.export_checkpoint(store.path, tmp_path / "m_1.pt", tmp_path / "out.pt")
    assert members_of(written.read_bytes()) == changed


@functools.cache
def base() -> bytes:
    with warnings.catch_warnings(action="ignore"):
        return content_of(Exported(mlp(nn.ELU(), nn.ELU()), nn.Identity()))


def with_pickle(pickled: bytes, name: str = "data.pkl", **more: bytes) -> bytes:
    members = {"a/data.pkl": pickle.dumps({}, 2), "a/constants.pkl": pickle.dumps((), 2), "a/version": b"3\n"}
    members |= {"a/byteorder": b"little", "a/data/0": bytes(12), "a/code/__torch__.py": RAISES}
    return zip_bytes(members | {f"a/{name}": pickled} | {f"a/{key}": it for key, it in more.items()})


NEW = b"c__torch__\nM\n)\x81"
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n%bX\x01\0\0\x000X\x03\0\0\0cpu%btQ%b%b%b\x89"
    b"ccollections\nOrderedDict\n)RtR"
)
"""A tensor of the storage 0: the storage's class and count, and offset, shape and strides."""


def module(*attributes: tuple[bytes, bytes]) -> bytes:
    """The opcodes of a module of these attributes, each given as its name and its opcodes."""
    items = b"".join(b"X" + struct.pack("<I", len(name)) + name + value for name, value in attributes)
    return NEW + b"}(" + items + b"ub"


def tensor(
    kind: bytes = b"FloatStorage\n", count: bytes = b"K\x03", offset: bytes = b"K\x00", shape: bytes = b"K\x03\x85",
    strides: bytes = b"K\x01\x85",
) -> bytes:  # fmt: skip
    return TENSOR % (kind, count, offset, shape, strides)


def holding(value: bytes) -> bytes:
    return with_pickle(b"\x80\x02" + module((b"w", value)) + b".")


def nested(depth: int) -> bytes:
    return with_pickle(b"\x80\x02" + (NEW + b"}X\x01\0\0\0a") * depth + module() + b"sb" * depth + b".")


def doubled(depth: int) -> bytes:
    """A module that has one module twice, which has one twice, and so on: walked by name there are 2^depth."""
    pickled = b"\x80\x02" + module() + b"q\x00"
    for i in range(depth):
        get = b"h" + bytes([i])
        pickled += b"0" + module((b"a", get), (b"b", get)) + b"q" + bytes([i + 1])
    return with_pickle(pickled + b".")


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a call": (lambda: holding(pickle.dumps(Calls(len, "run"), 2)[2:-1]), r"with a (__builtin__|builtins)\.len"),
    "a call for a module": (lambda: with_pickle(pickle.dumps(Calls(len, "run"), 2)), "data.pkl holds no module"),
    "no module": (lambda: with_pickle(pickle.dumps({"w": 1}, 2)), "data.pkl holds no module"),
    "a packed object": (
        lambda: holding(b"c__torch__.torch.classes.quantized\nLinearPackedParamsBase\n)\x81K\x01b"),
        "LinearPackedParamsBase at w, which is no plain tensor",
    ),
    "a module with a state of another kind": (lambda: holding(NEW + b"K\x01b"), r"with a __torch__\.M at w"),
    "a module without a state": (lambda: holding(NEW), r"with a __torch__\.M at w"),
    "nested": (lambda: nested(5000), "modules more than 64 deep"),
    "shared": (lambda: doubled(40), "more than 32,768 parts"),
    "a cycle": (lambda: with_pickle(b"\x80\x02" + NEW + b"q\x00}X\x01\0\0\0ah\x00sb."), "more than 64 deep"),
    "a list in itself": (lambda: holding(b"]q\x00h\x00a"), "more than 64 deep"),
    "many parts": (lambda: holding(b"](" + b"N" * 2**17 + b"e"), "more than 32,768 parts"),
    "many opcodes": (lambda: holding(b"](" + b"N" * 2**19 + b"e"), "has more than 262,144 parts"),
    "a storage that lies": (lambda: holding(tensor(count=b"J\xff\xff\xff\x7f")), "must have 8,589,934,588 bytes"),
    "a storage of a negative size": (lambda: holding(tensor(count=b"J\xff\xff\xff\xff")), "of a kind that is not read"),
    "a storage of no kind": (lambda: holding(tensor(kind=b"QInt8Storage\n")), "a kind that is not read: QInt8"),
    "a storage that is missing": (
        lambda: holding(tensor().replace(b"\x01\0\0\x000X", b"\x01\0\0\x005X")),
        r"a/data/5 must have 12 bytes, got None",
    ),
    "a storage of another folder": (
        lambda: holding(tensor().replace(b"\x01\0\0\x000X", b"\x0a\0\0\0../versionX")), r"must have 12 bytes, got None"
    ),
    "a storage twice": (
        lambda: with_pickle(
            b"\x80\x02" + module((b"a", tensor()), (b"b", tensor(kind=b"IntStorage\n"))) + b"."
        ),
        "a/data/0 is declared in two ways",
    ),
    "a shape that lies": (lambda: holding(tensor(shape=b"J\xff\xff\xff\x7f\x85")), "reaches beyond its storage of 3"),
    "a shape beyond all": (
        lambda: holding(tensor(shape=(b"\x8a\x09" + b"\xff" * 8 + b"\0") * 1 + b"\x85", strides=b"K\x00\x85")),
        "is damaged",
    ),
    "a negative stride": (lambda: holding(tensor(strides=b"J\xff\xff\xff\xff\x85")), "no possible shape"),
    "an offset": (lambda: holding(tensor(offset=b"K\x01")), "reaches beyond its storage of 3 numbers"),
    "an offset that is true": (lambda: holding(tensor(offset=b"\x88")), "no possible shape"),
    "strides of another length": (lambda: holding(tensor(strides=b")")), "no possible shape"),
    "a name with a dot": (
        lambda: with_pickle(b"\x80\x02" + module((b"a.b", tensor())) + b"."), "has an attribute named a.b"
    ),
    "another persistent id": (lambda: holding(b"K\x01Q"), "a storage is described in another way"),
    "a storage alone": (
        lambda: holding(b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x03tQ"),
        "with a _Declared at w|with a storage",
    ),
    "big-endian": (lambda: with_pickle(b"\x80\x02" + module() + b".", byteorder=b"big"), "of another byte order"),
    "without a module": (lambda: zip_bytes({"a/constants.pkl": b"", "a/version": b"3"}), "not one that torch.jit.save"),
    "constants that are none": (lambda: with_pickle(b"junk", "constants.pkl"), "its pickle is damaged"),
    "members elsewhere": (lambda: zip_bytes(members_of(base()) | {"b/c": b""}), "not one that torch.jit.save wrote"),
    "bytes behind the end": (lambda: base() + b"more", "is damaged|bytes before its beginning or behind its end"),
    "a bomb": (
        lambda: zip_bytes(members_of(base()) | {"archive/data/9": bytes(65 * 2**20)}, zipfile.ZIP_DEFLATED),
        "and was not unpacked",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    make, message = HOSTILE[kind]
    (tmp_path / "m_1.pt").write_bytes(make())
    begin = time.process_time()
    with pytest.raises((RuntimeError, ValueError), match=rf"m_1\.pt.*({message})") as caught:
        tipl.import_checkpoints([tmp_path / "m_1.pt"], tmp_path / "store")
    assert time.process_time() - begin < 2
    assert str(caught.value).isprintable()


def test_the_storages_of_a_file_in_which_they_are_right(tmp_path: Path) -> None:
    """The files of the tests above, without what is wrong with them, are read."""
    (tmp_path / "m_1.pt").write_bytes(holding(tensor()))
    assert read_checkpoint_file(tmp_path / "m_1.pt").state["w"].tolist() == [0.0, 0.0, 0.0]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Of 300 in which bytes are changed, cut out or put in, none is read as something else, and none takes long."""
    path, data = tmp_path / "m_1.pt", base()
    path.write_bytes(data)
    expected, slowest, read = read_checkpoint_file(path), 0.0, 0
    lines: list[str] = []
    for seed in range(300):
        draw = random.Random(seed)
        changed = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(changed))
            kind = draw.choice(["bit", "bit", "byte", "cut", "insert", "end"])
            if kind == "bit":
                changed[at] ^= 1 << draw.randrange(8)
            elif kind == "byte":
                changed[at] = draw.randrange(256)
            elif kind == "cut":
                del changed[at : at + draw.randint(1, 40)]
            elif kind == "insert":
                changed[at:at] = draw.randbytes(draw.randint(1, 40))
            else:
                del changed[max(at, 30) :]
        path.write_bytes(changed)
        begin = time.process_time()
        try:
            found = read_checkpoint_file(path)
        except RuntimeError as error:
            lines.append(str(error))
        else:  # a byte was changed that says nothing, such as of a time or of the padding
            read += 1
            assert found.state.keys() == expected.state.keys()
            assert all(torch.equal(found.state[key], it) for key, it in expected.state.items())
            assert found.script.classes == expected.script.classes  # type: ignore[union-attr]
        slowest = max(slowest, time.process_time() - begin)
    assert all(map(str.isprintable, lines))
    assert slowest < 2
    assert read < 150


def test_damaged_pickles_are_refused_or_read_whole(tmp_path: Path) -> None:
    """Of 300 with a right checksum: what is read has only tensors of the file's bytes, and can be written back."""
    members = members_of(base())
    path = tmp_path / "m_1.pt"
    lines: list[str] = []
    for seed in range(300):
        draw = random.Random(seed)
        changed = bytearray(members["archive/data.pkl"])
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(zip_bytes(members | {"archive/data.pkl": bytes(changed)}))
        begin = time.process_time()
        try:
            file = read_checkpoint_file(path)
            find_actor_in(path, file, "elu", discrete="logits")
            assert members_of(file.to_bytes()) == members_of(path.read_bytes())
        except (RuntimeError, ValueError) as error:
            lines.append(str(error))
        assert time.process_time() - begin < 2
    assert all(map(str.isprintable, lines))
