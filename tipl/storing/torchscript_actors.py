"""Which actor a TorchScript file holds, and what the classes of its modules say of how it acts.

Its tensors are searched as those of any state_dict (`foreign_actors.find_actor`). What forward does is code, which is
not read. But the modules that lie between two numbered layers, as in a torch.nn.Sequential, are known by their classes:

    one kind of torch.nn.modules.activation between all layers     says the activation
    nothing between them                                           says nothing: the activation is asked for
    anything else between them or behind the last                  the policy is not one that the simulator could run
    other modules elsewhere, beside an MLP of any names            the same

A normaliser of observations is folded into the first layer where the policy's library is known. Elsewhere the file is
refused until the caller ignores it, because the simulator would act without it.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from tipl.policy import ACTIVATIONS, PolicySpec
from tipl.storing.actor_families import Settings, normaliser_of
from tipl.storing.foreign_actors import Actor, find_actor
from tipl.storing.key_roles import left_out
from tipl.storing.statistic_names import in_script
from tipl.storing.tensor_checks import shown
from tipl.storing.torchscript_files import TorchScript

_ACTIVATION = re.compile(r"torch\.nn\.modules\.activation\.(\w+)")
_LINEAR = "torch.nn.modules.linear.Linear"
_CONTAINERS = "torch.nn.modules.container."
_IDENTITY = "torch.nn.modules.linear.Identity"
_CODE = (
    "the code of the TorchScript file was not read: what it does beside the layers, such as normalising observations, "
    "or squashing or rescaling actions, is not known"
)


def find_scripted_actor(
    script: TorchScript, state: Mapping[str, Tensor], settings: Settings, actor: str | Sequence[str] | None = None
) -> Actor:
    """Return the actor in `state`, what the caller left of the file's; arguments as in `find_actor`.

    Raises ValueError where `find_actor` does, where statistics of observations would be left out, and where the caller
    says another activation than the modules do, or discrete outputs of layers that the simulator could not run.
    """
    try:
        found = find_actor(state, settings, actor)
    except ValueError:
        _refuse_statistics(state, None)
        raise
    _refuse_statistics(state, found)
    if not isinstance(found.policy, PolicySpec):
        return found
    said, otherwise = _between_layers(script.classes, found, found.policy)
    if settings.outputs is not None and not otherwise:
        otherwise = _elsewhere(script.classes, found, said or settings.activation)
    if script.constants:
        otherwise = f"constants of the code that are tensors ({script.constants})"
    if otherwise:
        if settings.outputs is not None:
            raise ValueError(
                f"discrete says that the outputs are {settings.outputs} of discrete actions, but among the layers "
                f"{', '.join(map(shown, found.keys))} there is what the simulator could not run, {shown(otherwise)}: "
                "leave discrete out"
            )
        _refuse_statistics(state, None)  # none can be folded in
        return find_actor(state, dataclasses.replace(settings, activation=otherwise), actor)  # of kind "other"
    _check_epsilon(script, found)
    if said is None:
        return found
    if settings.activation not in (None, said):
        raise ValueError(f"activation says {settings.activation}, but between the layers lies {said}: leave it out")
    return find_actor(state, dataclasses.replace(settings, activation=said), actor)


def activation_said(script: TorchScript, actor: Actor) -> str | None:
    """Return the activation between the actor's layers, None where no module says it."""
    return _between_layers(script.classes, actor, actor.policy)[0] if isinstance(actor.policy, PolicySpec) else None


def notes_of(script: TorchScript, state: Mapping[str, Tensor], actor: Actor) -> list[str]:
    """Return what a user of the weights must know of the file that they came from."""
    notes = [_CODE]
    if script.constants:
        notes.append(f"{script.constants} of its tensors are constants of the code, and are not read")
    if left := [key for key in _statistics(script.state) if key not in state]:
        notes.append(f"{_some(left)} and what belongs to it is left out, as ignore says")
    if activation_said(script, actor) == "elu":
        notes.append("the alpha of ELU is in the code, and taken to be 1")
    if actor.normaliser and _epsilon(script, actor) is None:
        name = shown(actor.normaliser.rstrip("."))
        notes.append(f"the epsilon of {name} is in the code, and taken to be its library's default")
    return notes


def _between_layers(classes: Mapping[str, str], actor: Actor, policy: PolicySpec) -> tuple[str | None, str]:
    """Return the activation that lies between the layers of an MLP, None where none does; and what else there is, as
    text, that the simulator would not run, "" for nothing.
    """
    layers = [key.rpartition(".")[0] for key in actor.keys if key.endswith(".weight")]
    other = [classes.get(layer, "") for layer in layers if classes.get(layer) != _LINEAR]
    if other:
        return None, f"a layer of class {other[0] or 'unknown'}"
    parents = {layer.rpartition(".")[0]: dict[str, str]() for layer in layers}
    for path, name in classes.items():
        parent, _, child = path.rpartition(".")
        if path and parent in parents:
            parents[parent][child] = name
    numbered = {layer: parents[layer.rpartition(".")[0]] for layer in layers}
    num_hidden = len(policy.hidden_sizes)
    between = [_behind(layer.rpartition(".")[2], numbered[layer]) for layer in layers[:num_hidden]]
    behind = [it for layer in layers[num_hidden:] for it in _behind(layer.rpartition(".")[2], numbered[layer])]
    if behind not in ([], ["tanh"] if policy.squash else []):
        return None, f"{' and '.join(behind)} behind the last layer"
    kinds = {tuple(names) for names in between}
    if kinds <= {()}:
        return None, ""
    if len(kinds) == 1 and (names := next(iter(kinds)))[0] in ACTIVATIONS and len(names) == 1:
        return names[0], ""
    return None, " and ".join(sorted({" ".join(names) or "nothing" for names in kinds})) + " between the layers"


def _behind(layer: str, children: Mapping[str, str]) -> list[str]:
    """Return the modules between a layer and the next one, or the end, where all of them have numbers for names.

    `children` are the classes of the modules that lie in one with the layer, by name. Activations are named as in
    ACTIVATIONS, such as tanh, and others by their class.
    """
    if not all(name.isdecimal() for name in children):
        return []
    found = []
    for name in sorted((it for it in children if int(it) > int(layer)), key=int):
        kind = children[name]
        if kind == _LINEAR:
            break
        if kind != _IDENTITY:
            match = _ACTIVATION.fullmatch(kind)
            found.append(match[1].lower() if match else kind)
    return found


def _elsewhere(classes: Mapping[str, str], actor: Actor, activation: str | None) -> str:
    """Return, as text, which module that lies elsewhere than between the actor's layers may do something to what these
    take or give, "" for none. Modules of the activation may be what forward puts between the layers.
    """
    layers = {key.rpartition(".")[0] for key in actor.keys}
    around = {""}
    for layer in layers:
        parts = layer.split(".")
        around |= {".".join(parts[:i]) for i in range(1, len(parts))}
    judged = {layer.rpartition(".")[0] for layer in layers if layer.rpartition(".")[2].isdecimal()}
    for path, kind in classes.items():
        parent, _, name = path.rpartition(".")
        if path in layers | around or (parent in judged and name.isdecimal()) or left_out({f"{path}.weight": ()}):
            continue
        match = _ACTIVATION.fullmatch(kind)
        is_activation = match is not None and activation in (None, match[1].lower())
        if not is_activation and kind != _IDENTITY and not kind.startswith(_CONTAINERS):
            return f"{path} of class {kind}"
    return ""


def _refuse_statistics(state: Mapping[str, Tensor], found: Actor | None) -> None:
    """Raise ValueError where the actor, or None, would be used without statistics of observations that are there."""
    left = [
        key
        for key in _statistics(state)
        if found is None or not (key in found.keys or (found.normaliser and key.startswith(found.normaliser)))
    ]
    if left:
        parent = left[0].rpartition(".")[0]
        pattern = f"{parent}.*" if parent else left[0]
        raise ValueError(
            f"{_some(left)} may be statistics with which observations are normalised, and cannot be folded into these "
            "layers: import the run's own checkpoints, or forecast the layers alone with "
            f"{shown(pattern)!r} as ignore, which leaves it in the files as it is"
        )


def _statistics(state: Mapping[str, Tensor]) -> list[str]:
    """Return the keys that may be statistics of observations, by their names; critics' are not meant."""
    others = left_out({key: tuple(tensor.shape) for key, tensor in state.items()})
    return [
        key
        for key, tensor in state.items()
        if in_script(key) and tensor.is_floating_point() and tensor.numel() and key not in others
    ]


def _epsilon(script: TorchScript, actor: Actor) -> float | None:
    """Return what the file says of the number that is added to a normaliser's spread, None for nothing."""
    found = (script.numbers.get(f"{actor.normaliser}{name}") for name in ("eps", "epsilon"))
    return next((it for it in found if it is not None), None)


def _check_epsilon(script: TorchScript, actor: Actor) -> None:
    """Raise ValueError where the file says another epsilon of the normaliser than the library's default."""
    epsilon = _epsilon(script, actor) if actor.normaliser else None
    if epsilon is None:
        return
    known = normaliser_of(actor.normaliser)
    default = max(known.in_root, known.outside)
    if epsilon != default:
        raise ValueError(
            f"its normaliser, {shown(actor.normaliser.rstrip('.'))}, has the epsilon {epsilon:g}; only {default:g} can "
            "be folded into the first layer: import the run's own checkpoints"
        )


def _some(keys: Sequence[str]) -> str:
    return f"{', '.join(map(shown, keys[:3]))}{', ...' if len(keys) > 3 else ''}"
