"""How the libraries name the parameters of their MLP actors, and which `PolicySpec` such an actor is.

Stable-Baselines3   PPO, A2C                        mlp_extractor.policy_net.<2 i>, action_net, log_std
                    these with discrete actions     the same without log_std
                    SAC, and sb3-contrib's TQC      actor.latent_pi.<2 i>, actor.mu, actor.log_std: a layer
                    these with gSDE                 actor.latent_pi.<2 i>, actor.mu or actor.mu.0, actor.log_std
                    TD3, DDPG                       actor.mu.<2 i>
                    DQN                             q_net.q_net.<2 i>
CleanRL             continuous PPO                  actor_mean.<2 i>, actor_logstd
                    PPO, discrete actions           actor.<2 i>
rsl_rl              PPO                             mlp.<2 i> or actor.<2 i>, and one of four names of the spread
"""

import dataclasses
from collections.abc import Mapping

from tipl.policy import ACTIVATIONS, Outputs, PolicySpec, Spread

Shapes = Mapping[str, tuple[int, ...]]

STATISTICS = "observation_statistics."
"""Prefix of the keys of statistics that are not the state's own, `_mean` and `_std`, which divides as it is."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How one library names the parameters of an MLP actor: keys <hidden><2 i>.weight, and a head."""

    kind: str
    log_std: str
    """The key of a parameter, or how the keys of a layer begin (`spread`); "" for none."""
    hidden: str
    head: str | None = None
    """None where the head is numbered like the hidden layers, after the last of them."""
    activation: str = "tanh"
    """The library's default."""
    std_is_log: bool = True
    normalisers: tuple[str, ...] = ()
    """Possible prefixes of an observation normaliser's keys."""
    encoders: tuple[str, ...] = ()
    """Prefixes of keys of networks that may precede the MLP; with one, the actor is of kind "other"."""
    spread: Spread = "parameter"
    squash: bool = False
    needs_gsde: bool = False
    needs_limit: bool = False
    """Whether the mean is clipped, to what no key says."""
    outputs: Outputs = "means"
    """Where these are of discrete actions, no key says so: `Settings.discrete` must."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a library says of an actor beside its tensors."""

    activation: str | None = None
    """Between the layers; None: the library's default."""
    squash: bool = False
    """Whether actions are the tanh of the mean also where the library's default is that they are not."""
    mean_limit: float | None = None
    """To what the mean is clipped where the library's network clips it; None where that is not known."""
    discrete: bool = False
    """Whether an MLP without standard deviations chooses one of several discrete actions."""


@dataclasses.dataclass(frozen=True)
class Match:
    """An MLP actor among the parameters of a state."""

    family: Family
    policy: PolicySpec
    keys: tuple[str, ...]
    """In the order of the policy's layout."""
    normaliser: str
    """Prefix of the keys of the observation normaliser; "" for none."""


_OLD_NORMALISERS = ("actor_obs_normalizer.", "obs_norm_state_dict.")  # rsl_rl 3 and rsl_rl 2
_SB3_ENCODERS = ("features_extractor.", "pi_features_extractor.", "lstm_actor.", "mlp_extractor.shared_net.")
_PPO = Family(
    "sb3",
    "log_std",
    "mlp_extractor.policy_net.",
    "action_net.",
    normalisers=(STATISTICS,),
    encoders=_SB3_ENCODERS,
)
_SAC = Family(
    "sb3",
    "actor.log_std.",
    "actor.latent_pi.",
    "actor.mu.",
    activation="relu",
    normalisers=(STATISTICS,),
    # With more of its own parts it has batch normalisation between the layers (CrossQ), or is of another library.
    encoders=("actor.features_extractor.", "actor.latent_pi.", "actor.mu.", "actor.log_std"),
    spread="head",
    squash=True,
)
_SAC_GSDE = dataclasses.replace(_SAC, log_std="actor.log_std", spread="parameter", needs_gsde=True)
FAMILIES = (
    _PPO,
    dataclasses.replace(_PPO, log_std="", spread="none", outputs="logits"),
    Family(
        "sb3",
        "",
        "q_net.q_net.",
        activation="relu",
        normalisers=(STATISTICS,),
        encoders=("q_net.features_extractor.",),
        spread="none",
        outputs="values",
    ),  # DQN
    _SAC,
    _SAC_GSDE,  # with clip_mean=0
    dataclasses.replace(_SAC_GSDE, head="actor.mu.0.", needs_limit=True),  # mu.1 clips
    dataclasses.replace(_SAC, log_std="", hidden="actor.mu.", head=None, spread="none"),  # TD3 and DDPG
    Family("cleanrl", "actor_logstd", "actor_mean.", normalisers=(STATISTICS,)),
    Family(
        "cleanrl",
        "",
        "actor.",
        normalisers=(STATISTICS,),
        encoders=("network.", "extra_layer."),
        spread="none",
        outputs="logits",
    ),
    Family("rsl_rl", "distribution.log_std_param", "mlp.", None, "elu", True, ("obs_normalizer.",), ("rnn.", "cnns.")),
    Family("rsl_rl", "distribution.std_param", "mlp.", None, "elu", False, ("obs_normalizer.",), ("rnn.", "cnns.")),
    Family("rsl_rl", "log_std", "actor.", None, "elu", True, _OLD_NORMALISERS, ("memory_a.",)),
    Family("rsl_rl", "std", "actor.", None, "elu", False, _OLD_NORMALISERS, ("memory_a.",)),
)


def match(shapes: Shapes, settings: Settings) -> Match | None:
    """Return the actor if the keys of `shapes` are exactly those of an MLP of one of the libraries, else None."""
    found = (_match(family, shapes, settings) for family in families(settings))
    return next((it for it in found if it is not None), None)


def families(settings: Settings) -> list[Family]:
    """Return the families that an actor of these settings can be of."""
    return [it for it in FAMILIES if it.outputs == "means" or settings.discrete]


def _match(family: Family, shapes: Shapes, settings: Settings) -> Match | None:
    layers, keys = layers_of(family, shapes)
    normaliser = next((prefix for prefix in family.normalisers if f"{prefix}_mean" in shapes), "")
    if {key for key in shapes if not (normaliser and key.startswith(normaliser))} != set(keys) or not layers:
        return None
    weights = [shapes[f"{layer}weight"] for layer in layers]
    activation = family.activation if settings.activation is None else settings.activation
    if activation not in ACTIVATIONS or any(len(shape) != 2 for shape in weights):
        return None
    sizes = (weights[0][1], *(shape[0] for shape in weights))
    gsde = family.kind == "sb3" and family.spread == "parameter" and shapes[family.log_std] == sizes[-2:]
    limit = settings.mean_limit if family.needs_limit else None
    if (family.needs_gsde and not gsde) or (family.needs_limit and limit is None):
        return None
    squash = family.squash or (gsde and settings.squash)
    policy = PolicySpec(
        sizes[0],
        sizes[-1],
        sizes[1:-1],
        activation,  # type: ignore[arg-type]  # checked above
        gsde=gsde,
        spread=family.spread,
        squash=squash,
        mean_limit=limit,
        outputs=family.outputs,
    )
    if any(shapes[key] not in (shape, (1, *shape)) for key, shape in zip(keys, policy.shapes.values(), strict=True)):
        return None
    return Match(family, policy, keys, normaliser)


def layers_of(family: Family, shapes: Shapes) -> tuple[list[str], tuple[str, ...]]:
    """Return the prefixes of the layers' keys, and all keys of the actor in the order of a PolicySpec."""
    layers: list[str] = []
    while f"{family.hidden}{2 * len(layers)}.weight" in shapes:
        layers.append(f"{family.hidden}{2 * len(layers)}.")
    layers += [family.head] if family.head else []
    heads = [family.log_std] if family.spread == "head" else []
    keys = tuple(layer + name for layer in layers + heads for name in ("weight", "bias"))
    return layers, ((family.log_std, *keys) if family.spread == "parameter" else keys)
