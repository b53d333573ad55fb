"""What the modules of a live policy say of how it acts, which its parameters do not hold.

The layers of an actor are known by their keys. Where they lie in a torch.nn.Sequential, all that lies before, between
and behind them is seen; where a module's own code joins them, only what it holds beside them.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from torch import nn

from tipl.policy import ACTIVATIONS, PolicySpec
from tipl.storing.foreign_actors import Actor
from tipl.storing.foreign_files import SB3_LIBRARIES, space_not_run
from tipl.storing.tensor_checks import shown

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.ELU: "elu", nn.SiLU: "silu"}
_NO_EFFECT = (nn.Identity, nn.Flatten, nn.Unflatten)  # on a vector's numbers
_BOUNDED = (nn.Tanh, nn.Hardtanh, nn.Sigmoid, nn.Softsign)
_HALVES = "NormalParamExtractor"  # TorchRL's, which parts means and deviations


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the modules of an actor show."""

    activation: str | None = None
    """The one that lies between all layers; None where no module shows it."""
    doubt: str = ""
    """In words, what else lies among the layers, so that the simulator may act otherwise."""
    is_certain: bool = True
    """False where only the caller can say what the modules in doubt do: their classes are not torch's, or code that is
    not read may use them elsewhere."""

    def question(self) -> str:
        """Return in words, where there is a doubt, what the caller must say."""
        if self.is_certain:
            return f"{self.doubt}: {_HOW_TO_RECORD}"
        return (
            f"{self.doubt}: pass activation, one of {', '.join(ACTIVATIONS)}, if that acts between all layers and "
            f"nothing behind them, or {_OTHER}"
        )

    def contradiction(self, activation: str) -> str:
        """Return in words how the modules contradict the activation that the caller says; "" where they do not."""
        if self.doubt and self.is_certain:
            return self.question()
        if self.activation is None or self.activation == activation or activation not in ACTIVATIONS:
            return ""
        return (
            f"activation says {activation}, but {self.activation} lies between its layers: leave it out, or pass the "
            "state_dict if the policy acts otherwise than its modules show"
        )


_OTHER = 'activation="other" to record the weights without running them'
_HOW_TO_RECORD = (
    f"the simulator runs MLPs with one of {', '.join(ACTIVATIONS)} between all layers and nothing else; pass {_OTHER}, "
    "or the state_dict with the activation if that is how the policy acts"
)


def seen_in(policy: nn.Module, actor: Actor) -> Seen:
    """Return what the modules of `policy` show of its actor, an MLP; nothing of other actors."""
    if not isinstance(actor.policy, PolicySpec):
        return Seen()
    if before := _before_the_layers(policy, actor):
        return Seen(doubt=before)
    layers = [
        key.rpartition(".")[0]
        for key, name in zip(actor.keys, actor.policy.shapes, strict=True)
        if name.endswith(".weight") and not name.startswith("log_std")
    ]
    row = list(_in_order("", policy, layers))
    if [it for it in row if isinstance(it, str)] != layers:
        return Seen()  # the modules are made in another order than they are used, or are not those of the keys
    places = [row.index(layer) for layer in layers]
    head, tail = (
        [it for it in part if isinstance(it, nn.Module)] for part in (row[: places[0]], row[places[-1] + 1 :])
    )
    for found, where in ((head, "before the first layer"), (_surprising(tail, actor), "behind the last layer")):
        if odd := [it for it in found if not isinstance(it, _NO_EFFECT)]:
            return Seen(doubt=f"{_named(odd)} {where}")
    gaps = [row[start + 1 : stop] for start, stop in itertools.pairwise(places)]
    return _between(gaps, _loose(policy, layers))


_Item = str | nn.Module | None
"""A layer's path, another module, or None where code that is not read joins what comes before and after."""


def _in_order(path: str, module: nn.Module, layers: Sequence[str]) -> Iterator[_Item]:
    """Yield the actor's layers and what lies among them, in the order in which they are made."""
    if path in layers:
        yield path
        return
    children = [(f"{path}.{name}" if path else name, child) for name, child in _parts(module)]
    is_list = isinstance(module, nn.ModuleList) and any(name in layers for name, _ in children)
    is_row = isinstance(module, nn.Sequential) or is_list
    for name, child in children:
        if name in layers or _holds(name, layers):
            yield from _in_order(name, child, layers)
            if not is_row:
                yield None
        elif is_row:
            yield from _expanded(child)


def _parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a module's parts by their names, one that is used twice too, which torch's named_children gives once."""
    return [(name, part) for name, part in module._modules.items() if part is not None]


def _holds(path: str, layers: Sequence[str]) -> bool:
    return any(layer.startswith(f"{path}.") for layer in layers)


def _expanded(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of which a torch.nn.Sequential consists, or the module itself."""
    if isinstance(module, nn.Sequential):
        for _, child in _parts(module):
            yield from _expanded(child)
    else:
        yield module


def _surprising(tail: Sequence[nn.Module], actor: Actor) -> list[nn.Module]:
    """Return those modules behind the last layer of which the actor's kind does not tell what they do."""
    policy = actor.policy
    assert isinstance(policy, PolicySpec)
    expected: tuple[type[nn.Module], ...] = ()
    if policy.squash:
        expected += (nn.Tanh,)
    if policy.mean_limit is not None:
        expected += (nn.Hardtanh,)
    if policy.outputs == "logits":
        expected += (nn.LogSoftmax,)
    return [
        it
        for it in tail
        if type(it) not in expected and not list(it.parameters()) and type(it).__name__ != _HALVES  # those are keys
    ]


def _between(gaps: Sequence[Sequence[_Item]], loose: Sequence[nn.Module]) -> Seen:
    """Return what lies between each two layers in a row; `loose` are modules that lie beside them in code."""
    names: dict[str, None] = {}
    is_hidden = False
    for gap in gaps:
        modules = [it for it in gap if isinstance(it, nn.Module) and not isinstance(it, _NO_EFFECT)]
        if not modules and None in gap:
            is_hidden = True
            continue
        name = _name_of(modules[0]) if len(modules) == 1 else None
        if name is None:
            odd = [it for it in modules if _name_of(it) is None] or modules
            is_certain = any(type(it).__module__.startswith("torch.") for it in odd) or not modules
            what = _named(odd) if odd else "nothing lies"
            return Seen(doubt=f"{what} between two of its layers", is_certain=is_certain)
        names[name] = None
    if is_hidden:
        beside = [it for it in loose if type(it).__module__ == nn.Tanh.__module__]
        unknown = [it for it in beside if _name_of(it) is None]
        names |= {name: None for it in beside if (name := _name_of(it)) is not None}
        if unknown or len(names) > 1:
            return Seen(doubt=f"{_named(beside)} beside its layers", is_certain=False)
    elif any(isinstance(it, _BOUNDED) for it in loose):
        bounded = [it for it in loose if isinstance(it, _BOUNDED)]
        return Seen(doubt=f"{_named(bounded)} beside its layers, perhaps behind the last", is_certain=False)
    if len(names) > 1:
        return Seen(doubt=f"{' and '.join(names)} lie between its layers")
    return Seen(next(iter(names), None))


def _name_of(module: nn.Module) -> str | None:
    """Return the activation that a module is, None for any other module."""
    is_plain = not isinstance(module, nn.ELU) or module.alpha == 1.0
    return _ACTIVATIONS.get(type(module)) if is_plain else None


def _named(modules: Sequence[nn.Module]) -> str:
    """Return the modules as the beginning of a sentence."""
    names = dict.fromkeys(shown(repr(it).splitlines()[0]) for it in modules)
    return f"{' and '.join(names)} {'lies' if len(names) == 1 else 'lie'}"


def _loose(policy: nn.Module, layers: Sequence[str]) -> list[nn.Module]:
    """Return the modules without parts that code which holds the layers may use: those of a layer's holders that are no
    torch.nn.Sequential."""
    found: list[nn.Module] = []
    for path, module in policy.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList) and (not path or _holds(path, layers)):
            found += [it for it in module.children() if not list(it.children()) and not list(it.parameters())]
    return found


def _before_the_layers(policy: nn.Module, actor: Actor) -> str:
    """Return in words what a policy of SB3's does to observations without parameters, "" for nothing."""
    if actor.kind != "sb3":
        return ""
    for module in policy.modules():
        kinds = {it.__name__ for it in type(module).__mro__}
        own = type(module).__module__
        if "BaseFeaturesExtractor" in kinds and not f"{own}.".startswith(SB3_LIBRARIES):
            return f"its observations pass through a features extractor of its own, {shown(type(module).__name__)}"
    return space_not_run(str(type(getattr(policy, "observation_space", None))))
