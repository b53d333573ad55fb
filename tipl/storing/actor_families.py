"""How the libraries name the parameters of their MLP actors, and which `PolicySpec` such an actor is.

Stable-Baselines3   PPO, A2C                        mlp_extractor.policy_net.<2 i>, action_net, log_std
                    these with discrete actions     the same without log_std
                    SAC, and sb3-contrib's TQC      actor.latent_pi.<2 i>, actor.mu, actor.log_std: a layer
                    these with gSDE                 actor.latent_pi.<2 i>, actor.mu or actor.mu.0, actor.log_std
                    TD3, DDPG                       actor.mu.<2 i>
                    DQN                             q_net.q_net.<2 i>
CleanRL             continuous PPO                  actor_mean.<2 i>, actor_logstd; obs_rms.mean and obs_rms.var where
                                                    its file has statistics of the observations
                    PPO, discrete actions           actor.<2 i>
rsl_rl              PPO                             mlp.<2 i> or actor.<2 i>, and one of four names of the spread
                    state-dependent deviations      mlp.<2 i> alone, if said (`Settings.halves`)
rl_games            A2C, PPO                        a2c_network.actor_mlp.<2 i>, a2c_network.mu, a2c_network.sigma
                    these with discrete actions     the same with a2c_network.logits, without sigma
skrl                Gaussian models                 policy.net.<2 i> or policy.net_container.<2 i>, one of four names of
                                                    the last layer or none, policy.log_std_parameter
TorchRL             ProbabilisticActor              module.0.module.0.<2 i>, module.0.module.1.state_independent_scale
                    with NormalParamExtractor       module.0.module.<2 i> or module.0.module.0.<2 i>, if said
Brax                PPO, SAC                        policy.hidden_<i>, the last with means and more (`brax_files.py`)
                    PPO, distribution_type normal   policy.MLP_0.hidden_<i>, policy.Dense_0, std_param or std_logparam
Flax                a module with log_std           Dense_<i>, whose kernels are read transposed, log_std
any other           discrete actions, if said       <prefix><i> or <prefix><2 i>, and nothing else; Flax's Dense_<i> too
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from tipl.policy import ACTIVATIONS, Outputs, PolicySpec, Spread

Shapes = Mapping[str, tuple[int, ...]]

STATISTICS = "observation_statistics."
"""Prefix of the keys of statistics that are not the state's own, `_mean` and `_std`, which divides as it is."""
RUNNING = "obs_rms."
"""Prefix of the keys of `mean` and `var` as Gymnasium's NormalizeObservation has them, saved beside a state."""
RUNNING_STATISTICS = "running_statistics."
"""Prefix of the keys of Brax's `mean` and `std`."""


@dataclasses.dataclass(frozen=True)
class Normaliser:
    """How a library names the statistics of its observations. The network sees (obs - mean) / divisor."""

    prefix: str
    spread: str = "_std"
    """The key, behind the prefix, of a standard deviation, or with `is_variance` of a variance."""
    mean: str = "_mean"
    is_variance: bool = False
    in_root: float = 0.0
    """What is added to the variance."""
    outside: float = 0.0
    """What is added to the standard deviation. No library's file says these two; they are its defaults."""
    clip: float | None = None
    """What the network sees is clipped to +-clip, which cannot be folded into a layer."""


_RUNNING = {"mean": "running_mean", "is_variance": True, "clip": 5.0}
NORMALISERS = (
    Normaliser(STATISTICS),
    Normaliser("actor_obs_normalizer.", outside=1e-2),  # rsl_rl 3
    Normaliser("obs_normalizer.", outside=1e-2),  # rsl_rl 4 and 5
    Normaliser("normalizer.", outside=1e-2),  # the module that rsl_rl and IsaacLab export
    Normaliser("obs_norm_state_dict.", outside=1e-2),  # rsl_rl 2
    Normaliser("running_mean_std.", "running_var", in_root=1e-5, **_RUNNING),  # type: ignore[arg-type]  # rl_games
    Normaliser("observation_preprocessor.", "running_variance", outside=1e-8, **_RUNNING),  # type: ignore[arg-type]
    Normaliser("state_preprocessor.", "running_variance", outside=1e-8, **_RUNNING),  # type: ignore[arg-type]
    Normaliser(RUNNING_STATISTICS, "std", "mean"),
    Normaliser(RUNNING, "var", "mean", is_variance=True, in_root=1e-8, clip=10.0),  # Gymnasium's; CleanRL clips
)


def normaliser_of(prefix: str) -> Normaliser:
    """Return the normaliser whose keys begin with `prefix`, which may have more before the library's own name."""
    return next(it for it in NORMALISERS if prefix.endswith(it.prefix))


@dataclasses.dataclass(frozen=True)
class Family:
    """How one library names the parameters of an MLP actor: keys <hidden><every i>.weight, and a head."""

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
    """Where these are of discrete actions, no key says so, unless `shows_outputs`: `Settings.discrete` must."""
    shows_outputs: bool = False
    every: int = 2
    """By how much the numbers of two layers in a row differ."""
    names: tuple[str, str] = ("weight", "bias")
    others: tuple[str, ...] = ()
    """Prefixes of keys that are the library's critic's and no part of the actor."""
    rescale: bool = False
    """Whether the mean is clipped to [-1, 1], and this rescaled to the action space."""
    needs_halves: bool = False
    """Whether no key tells its two outputs for each action from outputs of another kind: `Settings.halves` must."""


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
    outputs: Outputs | None = None
    """What the caller says that the outputs of such an MLP are, "logits" or "values"; it may then have any names."""
    halves: bool = False
    """Whether the caller says that an MLP without standard deviations has two outputs for each action, of which the
    second half become standard deviations."""


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
_RL_GAMES_ACTOR = Family(
    "rl_games",
    "a2c_network.sigma",
    "a2c_network.actor_mlp.",
    "a2c_network.mu.",
    "elu",
    normalisers=("running_mean_std.",),
    others=("a2c_network.critic_mlp.", "a2c_network.value.", "value_mean_std."),
    rescale=True,
)
_RL_GAMES = (
    _RL_GAMES_ACTOR,
    dataclasses.replace(
        _RL_GAMES_ACTOR,
        log_std="",
        head="a2c_network.logits.",
        spread="none",
        rescale=False,
        outputs="logits",
        shows_outputs=True,
    ),
)
_SKRL_MODELS: tuple[tuple[Outputs, str], ...] = (("means", "policy."), ("means", ""), ("logits", "policy."))
_SKRL = tuple(
    Family(
        "skrl",
        f"{model}log_std_parameter" if outputs == "means" else "",
        f"{model}{hidden}.",
        f"{model}{head}." if head else None,
        "elu",
        normalisers=("observation_preprocessor.", "state_preprocessor."),
        others=("value.", "value_preprocessor.", "state_preprocessor.", f"{model}value_layer."),
        spread="parameter" if outputs == "means" else "none",
        outputs=outputs,
    )
    for outputs, model in _SKRL_MODELS
    for hidden in ("net", "net_container")
    for head in ("output_layer", "policy_layer", "mean_layer", None)
)
_TORCHRL = Family(
    "torchrl", "module.0.module.1.state_independent_scale", "module.0.module.0.", normalisers=(STATISTICS,)
)
_FLAX = Family("flax", "log_std", "Dense_", normalisers=(STATISTICS,), every=1, names=("kernel", "bias"))
_TORCHRL_HALVES = tuple(
    dataclasses.replace(_TORCHRL, log_std="", hidden=hidden, spread="halves", needs_halves=True)
    for hidden in ("module.0.module.", "module.0.module.0.")
)
_BRAX_HALVES = Family(
    "brax",
    "",
    "policy.hidden_",
    activation="silu",
    normalisers=(RUNNING_STATISTICS,),
    spread="halves",
    squash=True,
    every=1,
    names=("kernel", "bias"),
    others=("value.",),
)
_BRAX_NORMAL = dataclasses.replace(
    _BRAX_HALVES,
    log_std="policy.std_logparam.log_value",
    hidden="policy.MLP_0.hidden_",
    head="policy.Dense_0.",
    spread="parameter",
    squash=False,
)
_BRAX = (
    _BRAX_HALVES,
    _BRAX_NORMAL,
    dataclasses.replace(_BRAX_NORMAL, log_std="policy.std_param.value", std_is_log=False),
)
_RSL_RL = Family(
    "rsl_rl", "distribution.log_std_param", "mlp.", None, "elu", True, ("obs_normalizer.",), ("rnn.", "cnns.")
)
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
    Family("cleanrl", "actor_logstd", "actor_mean.", normalisers=(STATISTICS, RUNNING)),
    Family(
        "cleanrl",
        "",
        "actor.",
        normalisers=(STATISTICS, RUNNING),
        encoders=("network.", "extra_layer."),
        spread="none",
        outputs="logits",
    ),
    *_RL_GAMES,
    *_SKRL,
    _TORCHRL,
    *_TORCHRL_HALVES,
    *_BRAX,
    _FLAX,
    _RSL_RL,
    dataclasses.replace(_RSL_RL, log_std="distribution.std_param", std_is_log=False),
    dataclasses.replace(_RSL_RL, log_std="", spread="halves", needs_halves=True),
    Family("rsl_rl", "log_std", "actor.", None, "elu", True, _OLD_NORMALISERS, ("memory_a.",)),
    Family("rsl_rl", "std", "actor.", None, "elu", False, _OLD_NORMALISERS, ("memory_a.",)),
)


_NUMBERED = re.compile(r"((?:.*\.)?(?:Dense_)?)(\d+)\.(weight|kernel|bias)")


def match(shapes: Shapes, settings: Settings) -> Match | None:
    """Return the actor if the keys of `shapes` are exactly those of an MLP of one of the libraries, else None."""
    found = _first(families(settings), shapes, settings)
    numbered = _of_any_names(shapes, settings.outputs)
    named = [it for it in FAMILIES if not it.needs_halves]
    if found is not None or numbered is None or _first(named, shapes, settings) is not None:
        return found  # keys of another library's policy say more than the caller
    return _match(numbered, shapes, settings)


def _first(candidates: Iterable[Family], shapes: Shapes, settings: Settings) -> Match | None:
    found = (_match(family, shapes, settings) for family in candidates)
    return next((it for it in found if it is not None), None)


def families(settings: Settings) -> list[Family]:
    """Return the families that an actor of these settings can be of."""
    if settings.outputs is not None:
        return [it for it in FAMILIES if it.outputs == settings.outputs]
    if settings.halves:
        return [it for it in FAMILIES if it.spread == "halves"]
    said = ("sb3", "cleanrl") if settings.discrete else ()  # whose files, or the caller, can say so of such keys
    known = (it for it in FAMILIES if not it.needs_halves)
    return [it for it in known if it.outputs == "means" or it.shows_outputs or it.kind in said]


def _of_any_names(shapes: Shapes, outputs: Outputs | None) -> Family | None:
    """Return how the layers are named that a torch.nn.Sequential or ModuleList numbers, if that is all there is."""
    keys = [key for key in shapes if not key.startswith(STATISTICS)]
    found = [it for key in keys if (it := _NUMBERED.fullmatch(key)) is not None]
    if outputs is None or not found or len(found) < len(keys) or len({it[1] for it in found}) > 1:
        return None
    numbers = sorted({int(it[2]) for it in found})
    every = numbers[1] - numbers[0] if len(numbers) > 1 else 2
    if every > 2:  # a layer without parameters but an effect, such as a normalisation, may lie between
        return None
    names = ("kernel" if any(it[3] == "kernel" for it in found) else "weight", "bias")
    plain = Family("mlp", "", found[0][1], normalisers=(STATISTICS,), spread="none", outputs=outputs, every=every)
    return dataclasses.replace(plain, names=names)


def _match(family: Family, shapes: Shapes, settings: Settings) -> Match | None:
    layers, keys = layers_of(family, shapes)
    normaliser = next((it for it in family.normalisers if f"{it}{normaliser_of(it).mean}" in shapes), "")
    beside = (*family.others, *([normaliser] if normaliser else []))
    if {key for key in shapes if key in keys or not key.startswith(beside)} != set(keys) or not layers:
        return None
    weights = [shapes[f"{layer}{family.names[0]}"] for layer in layers]
    activation = family.activation if settings.activation is None else settings.activation
    if activation not in ACTIVATIONS or any(len(shape) != 2 for shape in weights):
        return None
    sizes = (weights[0][1], *(shape[0] for shape in weights))
    if family.spread == "halves":
        if sizes[-1] % 2:
            return None
        sizes = (*sizes[:-1], sizes[-1] // 2)
    gsde = family.kind == "sb3" and family.spread == "parameter" and shapes[family.log_std] == sizes[-2:]
    limit = settings.mean_limit if family.needs_limit else 1.0 if family.rescale else None
    if (family.needs_gsde and not gsde) or (family.needs_limit and limit is None):
        return None
    if settings.outputs is not None and sizes[-1] < 2:  # one action is no choice: a critic, or one with a critic behind
        return None
    if family.kind in ("flax", "mlp") and any(begins_again(weights[0], shape) for shape in weights[1:]):
        return None
    squash = family.squash or ((gsde or family.kind == "torchrl") and settings.squash)
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
        rescale=family.rescale,
    )
    if any(shapes[key] not in (shape, (1, *shape)) for key, shape in zip(keys, policy.shapes.values(), strict=True)):
        return None
    return Match(family, policy, keys, normaliser)


def begins_again(first: tuple[int, ...], layer: tuple[int, ...]) -> bool:
    """Return whether a later layer has the shape of the first one, as where a second network's layers follow."""
    return layer == first and first[0] != first[1]


def layers_of(family: Family, shapes: Shapes) -> tuple[list[str], tuple[str, ...]]:
    """Return the prefixes of the layers' keys, and all keys of the actor in the order of a PolicySpec."""
    weight = family.names[0]
    layers: list[str] = []
    while f"{family.hidden}{family.every * len(layers)}.{weight}" in shapes:
        layers.append(f"{family.hidden}{family.every * len(layers)}.")
    layers += [family.head] if family.head else []
    heads = [family.log_std] if family.spread == "head" else []
    keys = tuple(layer + name for layer in layers + heads for name in family.names)
    return layers, ((family.log_std, *keys) if family.spread == "parameter" else keys)
