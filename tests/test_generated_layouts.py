"""Hundreds of checkpoint layouts: whatever a file holds beside the actor, that is taken whole and alone, or asked for.

A layout is a library's policy, as the library writes it or as users do: behind the prefix of a wrapper, inside other
dicts, beside critics, targets, averages, optimisers, statistics and counters. What is imported is compared with the
layout that made it.
"""

import dataclasses
import itertools
import random
import string
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_checkpoints import sb3_zip
from torch import Tensor, nn

from tipl.policy import PolicySpec
from tipl.storing.foreign_files import find_actor_in, read_checkpoint_file
from tipl.storing.importer import import_checkpoints
from tipl.storing.key_roles import words

State = dict[str, Tensor]


@dataclasses.dataclass
class Layout:
    """A file's content, which of its tensors are the actor's, and whether a library writes it like that."""

    content: Any
    actor: list[Tensor]
    is_known: bool
    words: str
    as_zip: bool = False


def linear(prefix: str, fan_in: int, fan_out: int) -> State:
    return {f"{prefix}.weight": torch.randn(fan_out, fan_in), f"{prefix}.bias": torch.randn(fan_out)}


def mlp(prefix: str, sizes: list[int], every: int = 2) -> State:
    state: State = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        state |= linear(f"{prefix}{every * i}", fan_in, fan_out)
    return state


def cleanrl(draw: random.Random, sizes: list[int]) -> tuple[State, State]:
    actor = {"actor_logstd": torch.randn(1, sizes[-1])} | mlp("actor_mean.", sizes)
    return actor, mlp("critic.", [*sizes[:-1], 1])


def rsl_rl(draw: random.Random, sizes: list[int]) -> tuple[State, State]:
    spread = draw.choice(["std", "log_std"])
    actor = {spread: torch.rand(sizes[-1]) + 0.5} | mlp("actor.", sizes)
    return actor, mlp("critic.", [sizes[0] + draw.choice([0, 3]), *sizes[1:-1], 1])


def sb3_ppo(draw: random.Random, sizes: list[int]) -> tuple[State, State]:
    *hidden, last = sizes
    actor = {"log_std": torch.randn(last)} | mlp("mlp_extractor.policy_net.", hidden)
    actor |= linear("action_net", hidden[-1], last)
    critic = mlp("mlp_extractor.value_net.", hidden) | linear("value_net", hidden[-1], 1)
    return actor, critic


def sb3_sac(draw: random.Random, sizes: list[int]) -> tuple[State, State]:
    *hidden, last = sizes
    actor = mlp("actor.latent_pi.", hidden) | linear("actor.mu", hidden[-1], last)
    actor |= linear("actor.log_std", hidden[-1], last)
    critics: State = {}
    for name in ("critic.qf0.", "critic.qf1.", "critic_target.qf0.", "critic_target.qf1."):
        critics |= mlp(name, [sizes[0] + last, *sizes[1:-1], 1])
    return actor, critics


def sb3_td3(draw: random.Random, sizes: list[int]) -> tuple[State, State]:
    actor, critics = mlp("actor.mu.", sizes), mlp("actor_target.mu.", sizes)
    for name in ("critic.qf0.", "critic_target.qf0."):
        critics |= mlp(name, [sizes[0] + sizes[-1], *sizes[1:-1], 1])
    return actor, critics


def own(draw: random.Random, sizes: list[int]) -> tuple[State, State]:
    """A user's own names."""
    name = draw.choice(["policy.", "net.", "pi.", "actor_net.", "body.layers."])
    actor = mlp(name, sizes, every=draw.choice([1, 2]))
    if draw.random() < 0.5:
        actor["log_std"] = torch.randn(sizes[-1])
    critic = draw.choice(["", "critic.", "vf.", "q1.", "value_function.", "target_q."])
    return actor, mlp(critic, [*sizes[:-1], 1]) if critic else {}


LIBRARIES: dict[str, Callable[[random.Random, list[int]], tuple[State, State]]] = {
    "cleanrl": cleanrl,
    "rsl_rl": rsl_rl,
    "sb3 ppo": sb3_ppo,
    "sb3 sac": sb3_sac,
    "sb3 td3": sb3_td3,
    "own": own,
}
WRAPPERS = ("", "", "", "module.", "_orig_mod.", "agent.", "module._orig_mod.", "ema_model.")
BESIDE: dict[str, Callable[[State], State]] = {
    "nothing": lambda state: {},
    "a loose temperature": lambda state: {"log_alpha": torch.zeros(1)},
    "an average": lambda state: {f"ema.{key}": value.clone() for key, value in state.items()},
    "an older copy": lambda state: {f"old.{key}": value + 1 for key, value in state.items()},
    "statistics": lambda state: {"obs_rms.mean": torch.zeros(3), "obs_rms.var": torch.ones(3)},
    "a counter": lambda state: {"steps": torch.tensor(7)},
    "a value head": lambda state: {"value_head.weight": torch.ones(1, 5), "value_head.bias": torch.zeros(1)},
}


def layout(seed: int) -> Layout:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    library = draw.choice(list(LIBRARIES))
    sizes = [draw.randint(2, 6), *(draw.choice([3, 4, 7, 8]) for _ in range(draw.randint(1, 3))), draw.randint(1, 3)]
    actor, critics = LIBRARIES[library](draw, sizes)
    parts = [actor, critics] if draw.random() < 0.7 else [critics, actor]
    state: State = {**parts[0], **parts[1]}
    is_known = library != "own" and draw.random() < 0.4
    wrapper = draw.choice([it for it in WRAPPERS if not is_known or it != "ema_model."])
    beside = "nothing" if is_known else draw.choice(list(BESIDE))
    state = {wrapper + key: value for key, value in state.items()} | BESIDE[beside](actor)
    words = f"{library} {sizes}, behind {wrapper!r}, beside {beside}"
    if library.startswith("sb3"):
        return Layout(state, list(actor.values()), is_known, words, as_zip=True)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
    written = {"cleanrl": "", "rsl_rl": "model_state_dict"}.get(library, "")
    inside = written if is_known else draw.choice(["", "model_state_dict", "state_dict", "policy", "agent"])
    content: Any = state if not inside else {inside: state, "optimizer_state_dict": optimizer, "iter": seed}
    return Layout(content, list(actor.values()), is_known, f"{words}, inside {inside!r}")


def save(made: Layout, folder: Path) -> Path:
    if not made.as_zip:
        torch.save(made.content, folder / "model_7.pt")
        return folder / "model_7.pt"
    return sb3_zip(folder / "model_7.zip", made.content, num_timesteps=7)


def taken(made: Layout, folder: Path, actor: str | None = None) -> list[list[float]] | str:
    """Return the tensors that import takes for the actor's, or why it takes none."""
    return taken_of(save(made, folder), actor)


def taken_of(path: Path, actor: str | None = None) -> list[list[float]] | str:
    file = read_checkpoint_file(path)
    try:
        found = find_actor_in(path, file, "tanh", actor)
    except ValueError as error:
        said = str(error)
    else:
        return numbers(file.state[key] for key in found.keys)
    assert "\n" not in said
    assert path.name in said
    return said


def numbers(tensors: Iterable[Tensor]) -> list[list[float]]:
    return sorted(tensor.flatten().tolist() for tensor in tensors)


@pytest.mark.parametrize("block", range(4))
def test_no_actor_is_taken_wrongly(block: int, tmp_path: Path) -> None:
    known = others = 0
    for seed in range(100 * block, 100 * (block + 1)):
        made = layout(seed)
        got = taken(made, tmp_path)
        if isinstance(got, str):
            assert not made.is_known, f"{made.words}: {got}"
            continue
        assert got == sorted(value.flatten().tolist() for value in made.actor), made.words
        known += made.is_known
        others += not made.is_known
    assert known >= 20
    assert others >= 1


# ---- second networks of any name

NETWORKS = """
critic critics value q v qf vf q1 q2 valuefn state_value action_value advantage adv baseline return_head reward
cost safety discriminator disc generator icm rnd curiosity dynamics world_model forward_model inverse_model aux
predictor decoder prior posterior teacher expert behavior reference ref old target targ ema polyak slow best prev
snapshot vnet qnet critic_net twin ensemble termination option_critic goal planner skill selector gate_net probe
uncertainty estimator adaptation history classifier net model network policy actor pi main mlp student state_net
head"""
"""Names of other networks, some of which an actor may have too."""
ACTORS = ("policy", "actor", "pi", "net", "actor_net", "policyNet", "Actor", "mlp", "main", "zork", "agent.pi")


def drawn_name(draw: random.Random) -> str:
    """A network's name: of what people train, or of no language, in any case and style, perhaps with a word more."""
    letters = "".join(draw.choice(string.ascii_lowercase) for _ in range(draw.randint(4, 9)))
    name = draw.choice([*NETWORKS.split(), letters, letters])
    before, behind = (
        draw.choice(["", "", "", "my_", "new_", "the_"]),
        draw.choice(["", "", "", "_net", "_mlp", "_b", "2"]),
    )
    name = f"{before}{name}{behind}"
    pascal = "".join(word.capitalize() for word in name.split("_"))
    return draw.choice([name, name, pascal, pascal[:1].lower() + pascal[1:], name.upper(), name.replace("_", "")])


def two_networks(seed: int) -> tuple[random.Random, State, State]:
    """A policy and another network, whose layers may fit behind those of the policy."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    obs_dim, act_dim = draw.randint(2, 5), draw.randint(2, 5)
    hidden = [draw.choice([4, 8]) for _ in range(draw.randint(1, 2))]
    name, other = draw.choice(ACTORS), drawn_name(draw)
    while words(other.replace(".", "_")) == words(name.replace(".", "_")):
        other = drawn_name(draw)
    actor = mlp(f"{name}.", [obs_dim, *hidden, act_dim])
    if draw.random() < 0.5:
        actor["log_std"] = torch.randn(act_dim)
    first = draw.choice([obs_dim, obs_dim + act_dim, act_dim])
    return draw, actor, mlp(f"{other}.", [first, *draw.choice([hidden, [6]]), draw.choice([1, 1, act_dim, obs_dim])])


def in_file(draw: random.Random, actor: State, other: State, folder: Path) -> Path:
    """Both networks as torch, Flax, NumPy or TorchScript write them, behind the same prefix or none."""
    wrapper = draw.choice(["", "", "module.", "_orig_mod.", "agent.", "net.inner."])
    state = {wrapper + key: it for it_is in draw.sample([actor, other], 2) for key, it in it_is.items()}
    kind = draw.choice(["torch", "torch", "npz", "torchscript", "nested"])
    path = folder / f"model_7.{'npz' if kind == 'npz' else 'pt'}"
    if kind == "npz":
        np.savez(path, **{key.replace(".", "/"): it.numpy() for key, it in state.items()})
    elif kind == "torchscript":
        scripted(state).save(path)
    else:
        torch.save(state if kind == "torch" else {"model_state_dict": state, "iter": 3}, path)
    return path


class Container(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def scripted(state: State) -> Any:
    """A TorchScript module with this state."""
    root = Container()
    for key, tensor in state.items():
        *parts, leaf = key.split(".")
        module: nn.Module = root
        for part in parts:
            if part not in dict(module.named_children()):
                module.add_module(part, Container())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(tensor))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer versions of torch
        return torch.jit.script(root)


@pytest.mark.parametrize("block", range(4))
def test_no_second_network_of_any_name_is_taken(block: int, tmp_path: Path) -> None:
    alone = 0
    for seed in range(150 * block, 150 * (block + 1)):
        draw, actor, other = two_networks(seed)
        path = in_file(draw, actor, other, tmp_path)
        got = taken_of(path)
        if isinstance(got, str):
            assert "--actor" in got or "as ignore" in got, got
            continue
        assert got == numbers(actor.values()), f"{list(actor)} and {list(other)}: took both"
        alone += 1
    assert alone >= 1


def test_a_second_head_of_any_name_is_never_taken(tmp_path: Path) -> None:
    """Actor and critic share all layers but the last."""
    for seed in range(150):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        trunk = linear("fc1", 3, 8) | linear("fc2", 8, 8)
        head = draw.choice(["fc_pi", "fc_mu", "mean", "actor", "policy_head", "fc3"])
        other = drawn_name(draw)
        if words(other) == words(head):
            continue
        actor = trunk | linear(head, 8, 2)
        path = in_file(draw, actor, linear(other, 8, 1), tmp_path)
        got = taken_of(path)
        assert isinstance(got, str) or got == numbers(actor.values()), f"{head} and {other}"


CRITICS = ("critic", "Critic", "criticNet", "value_net", "valueNet", "vf", "VF", "q1", "Q1", "qf2", "old", "policy_old")
CRITICS += ("target", "pi_targ", "critic_target", "baseline", "teacher", "ema", "Q_net", "stateValue", "vfHead")


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod.", "agent.ac."])
def test_all_but_critics_has_no_critic(wrapper: str, tmp_path: Path) -> None:
    """`actor=""` leaves out what a critic, a target or a copy is called, behind any prefix, or is refused."""
    refused = 0
    for seed, name in enumerate(CRITICS):
        torch.manual_seed(seed)
        actor, critic = mlp("pi.", [3, 8, 2]), mlp(f"{name}.", [3, 8, 1])
        path = tmp_path / "model_7.pt"
        torch.save({wrapper + key: it for key, it in (actor | critic).items()}, path)
        got = taken_of(path, "")
        refused += isinstance(got, str)
        assert isinstance(got, str) or got == numbers(actor.values()), name
    assert refused <= 2


# ---- entries beside a state

ENTRIES = (
    "obs_scaler",
    "scaler",
    "infos",
    "running",
    "whitening",
    "obsRms",
    "normalizer",
    "filter",
    "stats",
    "env",
    "zork",
)


@pytest.mark.parametrize("library", ["rsl_rl", "cleanrl"])
def test_no_statistics_beside_a_state_are_lost_in_silence(library: str, tmp_path: Path) -> None:
    """Whatever they are called, and whatever holds their numbers; what the refusal says to pass leaves them out."""
    section = {"rsl_rl": "model_state_dict", "cleanrl": "model_weights"}[library]
    path = tmp_path / "model_7.pt"
    for seed in range(60):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        actor, critics = LIBRARIES[library](draw, [4, 8, 2])
        letters = "".join(draw.choice(string.ascii_lowercase) for _ in range(6))
        name, spread = draw.choice([*ENTRIES, letters]), draw.choice(["var", "std", "M2", "running_var"])
        kind: Callable[[Tensor], Any] = draw.choice([torch.clone, Tensor.numpy, Tensor.tolist])
        mean, var = kind(torch.randn(4)), kind(torch.rand(4))
        nested = {"mean": mean, spread: var}
        beside = draw.choice(
            [{name: nested}, {name: {"inner": nested}}, {f"{name}_mean": mean, f"{name}_{spread}": var}]
        )
        torch.save({section: actor | critics, **beside, "iter": 7}, path)
        with pytest.raises(ValueError, match=rf"model_7\.pt: .*{next(iter(beside))}.*as ignore") as caught:
            import_checkpoints([path], tmp_path / "none", activation="tanh")
        assert "\n" not in str(caught.value)
        ignore = [f"{entry}*" for entry in beside]
        store = import_checkpoints([path], tmp_path / f"store{seed}", activation="tanh", ignore=ignore)
        torch.save({section: actor | critics, "iter": 7}, path)
        alone = import_checkpoints([path], tmp_path / f"alone{seed}", activation="tanh")
        assert store.policy == alone.policy
        assert (store.trial(0).weights() == alone.trial(0).weights()).all()


@pytest.mark.parametrize(
    "name", ["return_rms", "ret_rms", "reward_rms", "value_normalizer", "rewardNormalizer", "returnRMS"]
)
def test_statistics_of_returns_are_left_out(name: str, tmp_path: Path) -> None:
    actor, critics = cleanrl(random.Random(0), [4, 8, 2])
    rms = {"mean": np.zeros(()), "var": np.ones(()), "count": 1e-4}
    observations = {"mean": np.zeros(4), "var": np.ones(4), "count": 1e-4}
    path = tmp_path / "model_7.cleanrl_model"
    for values in (rms, {key: torch.as_tensor(it) for key, it in rms.items()}):
        content = {"model_weights": actor | critics, "obs_rms": observations, name: values}
        torch.save(content, path)
        plain = import_checkpoints([path], tmp_path / f"a{values is rms}", activation="tanh")
        said = import_checkpoints([path], tmp_path / f"b{values is rms}", activation="tanh", ignore=f"{name}*")
        assert plain.policy == said.policy == PolicySpec(4, 2, (8,), "tanh")
    flat = actor | critics | {f"{name}.mean": torch.zeros(1), f"{name}.var": torch.ones(1)}
    torch.save(flat, path)
    assert taken_of(path) == numbers(actor.values())
