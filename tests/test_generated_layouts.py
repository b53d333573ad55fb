"""Hundreds of checkpoint layouts: whatever a file holds beside the actor, that is taken whole and alone, or asked for.

A layout is a library's policy, as the library writes it or as users do: behind the prefix of a wrapper, inside other
dicts, beside critics, targets, averages, optimisers, statistics and counters. What is imported is compared with the
layout that made it.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_checkpoints import sb3_zip
from torch import Tensor

from tipl.storing.foreign_files import find_actor_in, read_checkpoint_file

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
    wrapper = "" if is_known else draw.choice(WRAPPERS)
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


def taken(made: Layout, folder: Path) -> list[list[float]] | str:
    """Return the tensors that import takes for the actor's, or why it takes none."""
    path = save(made, folder)
    try:
        file = read_checkpoint_file(path)
        found = find_actor_in(path, file, "tanh")
        return sorted(file.state[key].flatten().tolist() for key in found.keys)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("block", range(4))
def test_no_actor_is_taken_wrongly(block: int, tmp_path: Path) -> None:
    known = others = 0
    for seed in range(100 * block, 100 * (block + 1)):
        made = layout(seed)
        got = taken(made, tmp_path)
        if isinstance(got, str):
            assert "\n" not in got
            assert not made.is_known, f"{made.words}: {got}"
            continue
        assert got == sorted(value.flatten().tolist() for value in made.actor), made.words
        known += made.is_known
        others += not made.is_known
    assert known >= 20
    assert others >= 1
