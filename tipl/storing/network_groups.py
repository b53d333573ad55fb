"""Whether tensors make one network, by the containers and shapes of its layers.

One network is a chain of layers under one container, however it is called, or containers whose names say that they are
parts of one: trunks such as an encoder, one actor, its heads. Several containers are more than one network where a name
says nothing of the kind, where two of them could each be the actor, or where a layer does not take what the one before
it gives.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping

from tipl.storing.actor_families import FAMILIES, begins_again
from tipl.storing.key_roles import ACTOR, BLOCK, CRITIC, HEAD, INNER, NETWORK_PART, RECURRENT, SPREAD, TRUNK, words
from tipl.storing.tensor_checks import shown

Shapes = Mapping[str, tuple[int, ...]]

_FLAX_KERNEL = re.compile(r"((?:.*\.)?Dense_)(\d+)\.kernel")
_OWN_NAMES = ("weight", "kernel", "bias", "in_proj", "embedding")
_DIGITS = re.compile(r"\d+")
_MAX_DEPTH = 32  # of modules in modules


@dataclasses.dataclass
class _Group:
    """A module with layers, and the modules in it that have some."""

    path: str
    """How its keys begin, without the last dot."""
    layers: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    children: "dict[str, _Group]" = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    def innermost(self) -> "_Group":
        """Return the module itself, or the only one in it that has layers, and so on."""
        inside = self
        while len(inside.children) == 1:
            (inside,) = inside.children.values()
        return inside

    def all(self) -> "Iterator[_Group]":
        yield self
        for child in self.children.values():
            yield from child.all()


def several_networks(
    shapes: Shapes, *, root: str = "", also: frozenset[str] = frozenset(), is_mlp: bool = False
) -> str:
    """Return in words why the tensors may be those of more than one network, or "" where they make one.

    `root` is what was taken from the beginnings of their keys; `also` are words that name the network beside those that
    any may have. With `is_mlp` the caller will take an MLP alone, so that its containers do not matter.
    """
    doubt = _second_chain(shapes, root) or _twins(shapes)
    return doubt or (
        "" if is_mlp or _is_librarys(shapes) else _doubt(_tree(shapes, root), root, also, _is_numbered(shapes))
    )


def _tree(shapes: Shapes, root: str) -> _Group:
    """Return the modules that have layers: parameters of two dimensions or more."""
    tree = _Group(root.removesuffix("."))
    for key, shape in shapes.items():
        leaf = key.rpartition(".")[2]
        is_layers = leaf.startswith(_OWN_NAMES)
        is_small = not is_layers and (1 in shape or words(leaf) & SPREAD)  # such as log_std, and a position's embedding
        if len(shape) < 2 or is_small:
            continue
        parts = key.split(".", _MAX_DEPTH)
        group = tree
        for part in parts[:-1] if is_layers else parts:
            group.layers.append(shape)
            group = group.children.setdefault(part, _Group(f"{group.path}.{part}".removeprefix(".")))
        group.layers.append(shape)
    return tree


def _is_librarys(shapes: Shapes) -> bool:
    """Return whether all keys are parts of one library's actor, by their beginnings, though it may be of another kind
    than those that the simulator can run."""
    for family in FAMILIES:
        own = re.compile(rf"{re.escape(family.hidden)}\d+\.[^.]+$")
        around = tuple(it for it in (family.log_std, family.head, *family.encoders, *family.normalisers) if it)
        layers = [shape for key, shape in shapes.items() if own.match(key) and len(shape) == 2]
        if layers and all(own.match(key) or key.startswith(around) for key in shapes):
            return all(_fits_before(encoder, layers[0], shapes) for encoder in family.encoders)
    return False


def _fits_before(encoder: str, first: tuple[int, ...], shapes: Shapes) -> bool:
    """Return whether an encoder of a name that may be anything's, as CleanRL's network, gives what the MLP takes, and
    takes something else."""
    own = [shape for key, shape in shapes.items() if key.startswith(encoder) and len(shape) == 2]
    if not own or "." in encoder.rstrip(".") or words(encoder) & TRUNK:
        return True
    return own[-1][0] == first[1] != own[0][1]


def _is_numbered(shapes: Shapes) -> bool:
    """Return whether a library numbers the layers of its actors like that."""
    return any(f"{family.hidden}0.{family.names[0]}" in shapes for family in FAMILIES)


def _doubt(group: _Group, root: str, also: frozenset[str], is_numbered: bool) -> str:
    inside = group.innermost()
    groups = list(inside.children.values())
    if len(groups) < 2 or _is_actors(inside, root):
        return ""
    unknown = [it for it in groups if not words(it.name) <= NETWORK_PART | also and "proj" not in words(it.name)]
    stems = {_DIGITS.sub("", it.name) for it in groups if len(it.layers) == 1}
    are_numbered = len(stems) == 1 and all(len(it.layers) == 1 and _DIGITS.search(it.name) for it in groups)
    if unknown and not are_numbered:
        return f"{_shown(groups)} have layers of their own, and nothing says that {_shown(unknown)} is the actor's"
    whole = [it for it in groups if it.children and len(it.layers) > 1 and not words(it.name) & TRUNK]
    if len(whole) > 1 and not _are_blocks(whole, inside.name):
        return f"{_shown(whole)} may each be the actor"
    heads = [it for it in groups if len(it.layers) == 1 and words(it.name) & HEAD and not words(it.name) & SPREAD]
    if len(heads) > 1:
        return f"{_shown(heads)} may each be the actor's last layer"
    if not _are_blocks(groups, inside.name) and (broken := _broken(groups, is_numbered)):
        return broken
    for it in groups:
        if not words(it.name) & TRUNK and (doubt := _doubt(it, root, also, is_numbered)):
            return doubt
    return ""


def _is_actors(group: _Group, root: str) -> bool:
    """Return whether a module lies in one called actor, which not all of the file does: whatever is in it is the
    actor's."""
    parts = f"{group.path}."[len(root) :].split(".")
    return any("actor" in words(part) and not words(part) & CRITIC for part in parts)


def _are_blocks(groups: list[_Group], parent: str) -> bool:
    """Return whether groups are numbered parts of one network: blocks, or such that each gives as much as it takes."""
    names = {_DIGITS.sub("", it.name) for it in groups}
    if len(names) > 1:
        return False
    name = words(names.pop() or parent)
    are_layers = all(not it.children and len(it.layers) == 1 and len(it.layers[0]) == 2 for it in groups)
    return bool(name & BLOCK and name <= BLOCK and not are_layers) or all(
        it.layers == groups[0].layers and it.layers[0][-1] == it.layers[-1][0] and not name & (ACTOR | HEAD)
        for it in groups
    )


def _broken(groups: list[_Group], is_numbered: bool) -> str:
    """Return in words which layer does not take what the one before it gives, "" where they make one chain.

    Numbers in their names order them, else the file, whose order may be that of the alphabet: then it is enough that
    one layer takes what none gives, and one gives what none takes.
    """
    chain = [it for it in groups if not words(it.name) & (TRUNK | SPREAD)]
    if any(len(shape) != 2 for it in chain for shape in it.layers) or any(_is_inner(it) for it in chain):
        return ""
    if any(words(it.name) & RECURRENT for it in groups):  # which may lie between two of the layers
        return ""
    ends = [(it.layers[0][1], it.layers[-1][0]) for it in chain]
    if len({_DIGITS.sub("", it.name) for it in chain}) == 1:
        chain.sort(key=lambda it: [int(number) for number in _DIGITS.findall(it.name)])
    elif not is_numbered:
        first = [i for i, (takes, _) in enumerate(ends) if all(takes != gives for _, gives in ends[:i] + ends[i + 1 :])]
        last = [i for i, (_, gives) in enumerate(ends) if all(takes != gives for takes, _ in ends[:i] + ends[i + 1 :])]
        if len(first) == len(last) == 1:
            return ""
    for i, (before, it) in enumerate(itertools.pairwise(chain)):
        takes, gives = it.layers[0][1], before.layers[-1][0]
        earlier = {chain[0].layers[0][1], *(other.layers[-1][0] for other in chain[:i])}
        if takes != gives and (not is_numbered or takes in earlier):
            return (
                f"{shown(it.path)} takes {takes} numbers and {shown(before.path)} before it gives {gives}: it may be "
                "another head or begin another network"
            )
    return ""


def _is_inner(group: _Group) -> bool:
    """Return whether a layer is one of a kind that does not follow those before it in the file, as in attention."""
    return any(words(it.name) & INNER for it in group.all())


def _shown(groups: list[_Group]) -> str:
    names = [f"{shown(it.path)}." if it.layers else shown(it.path) for it in groups]
    return f"[{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}]"


def _second_chain(shapes: Shapes, root: str) -> str:
    """Return in words which of the layers that Flax numbers in the order in which a module makes them does not follow
    the one before, so that it may begin a critic; "" for none."""
    chains: dict[str, list[tuple[int, str, tuple[int, ...]]]] = {}
    for key, shape in shapes.items():
        if (found := _FLAX_KERNEL.fullmatch(key)) is not None and len(shape) == 2:
            chains.setdefault(found[1], []).append((int(found[2]), root + key, shape))
    for chain in map(sorted, chains.values()):
        _, first_key, first = chain[0]
        for (_, before, last), (_, key, shape) in itertools.pairwise(chain):
            if shape[1] != last[0]:
                why = f"takes {shape[1]} numbers and {shown(before)} before it gives {last[0]}"
            elif begins_again(first, shape):
                why = f"has the shape of {shown(first_key)}"
            else:
                continue
            return f"{shown(key)} {why}: it may begin a critic or another network"
    return ""


def _twins(shapes: Shapes) -> str:
    """Return in words which two networks have equal shapes, or "" for none.

    Repeated blocks of one network have equal shapes too, but a block has as many inputs as outputs.
    """
    keys = [key.split(".") for key in shapes]
    while len({key[0] for key in keys}) == 1 and all(len(key) > 1 for key in keys):
        keys = [key[1:] for key in keys]
    networks: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for key, shape in zip(keys, shapes.values(), strict=True):
        networks.setdefault(key[0], []).append((".".join(key[1:]), shape))
    seen: dict[tuple[tuple[str, tuple[int, ...]], ...], str] = {}
    for name, network in networks.items():
        matrices = [shape for _, shape in network if len(shape) == 2]
        other = seen.setdefault(tuple(network), name)
        if other != name and len(matrices) > 1 and matrices[0][1] != matrices[-1][0]:
            return f"{shown(other)} and {shown(name)} are two networks of equal shapes"
    return ""
