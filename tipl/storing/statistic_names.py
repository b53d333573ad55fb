"""Names that may be those of statistics by which observations or rewards are normalised: import asks about them.

Libraries name them as they like, and a word that gives them away in one place means nothing in another. So each place
in which names are met has a pattern of its own.
"""

import re
from collections.abc import Mapping, Sequence

from tipl.storing.key_roles import word_set, words

_RUNNING = "rms|running_mean_std"

_KEY_PART = re.compile(
    rf"([^.]*_)?({_RUNNING}|normali[sz]ers?|normali[sz]ation)(_[^.]*)?|(obs|observation|rew|reward|ret|return)s?_"
    r"(norm|mean|var|std|stats?|statistics)(_[^.]*)?|(log_)?(alpha|temp|temperature|ent(ropy)?_coef)"
)
_ENTRY = re.compile(
    rf"(?!.*(rew|ret|value))(.*_)?((obs|observation|state)s?_?(rms|norm|mean|var|std|stat)|{_RUNNING}|normali[sz]).*"
)
_SCRIPT_PART = re.compile(rf"([^.]*_)?({_RUNNING}|normali[sz]er?s?|normali[sz]ation|preprocessor)(_[^.]*)?")
_SCRIPT_MEAN = re.compile(r"_?(obs_|observation_)?(running_)?mean")


def in_key(key: str) -> bool:
    """Return whether a state's key may be of statistics of observations or rewards, or of SAC's temperature."""
    parts = key.split(".")
    temperature = words(parts[-1])
    return any(map(_KEY_PART.fullmatch, parts)) or bool(temperature & _HEAT and temperature <= _TEMPERATURE)


_HEAT = word_set("alpha temp temperature ent entropy")
_TEMPERATURE = _HEAT | word_set("log coef coefficient")
_MOMENT = word_set("mean var variance")
_SEEN = word_set("obs observation observations input inputs state states")
_SCALED_BY = word_set(
    "scaler filter whitening whitener standardizer standardiser rms stats statistics normalizer normaliser zscore"
)


def may_be_statistics(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the keys that may be of statistics of observations or rewards, or of SAC's temperature.

    A mean or a variance is one unless it lies beside a weight or a bias, as in a batch normalisation between layers.
    """
    found = []
    for key in shapes:
        parent, dot, leaf = key.rpartition(".")
        name, above = words(leaf), parent.rpartition(".")[2]
        is_moment = bool(name & _MOMENT or (name & _SEEN and name & {"std", "stddev"}))
        is_weight = bool(name & {"weight", "bias", "kernel"})
        is_scaled = bool(words(above) & _SCALED_BY)
        is_layers = any(f"{parent}{dot}{it}" in shapes for it in ("weight", "bias", "gamma"))
        if in_key(key) or (not is_weight and not is_layers and (is_moment or is_scaled)):
            found.append(key)
    return found


def is_entry(name: str) -> bool:
    """Return whether an entry beside a state may be statistics of observations."""
    return _ENTRY.fullmatch(name) is not None


_LOGGED = word_set(
    "returns return rewards reward ret rew loss losses history score scores episode episodes metric metrics log logs"
    " eval evaluation wandb success curve"
)
_SETTINGS = word_set(
    "lr lrs betas args config cfg conf hparams hyperparameters kwargs settings seed seeds time times step steps best "
    "length lengths"
)
"""Words of entries beside a state whose lists of numbers are none of the policy's, unless they are called a mean."""


def is_list_of(path: Sequence[str]) -> bool:
    """Return whether a list of numbers under these names beside a state may be of statistics of observations."""
    found = frozenset().union(*map(words, path))
    if any(words(name) & _SEEN or is_entry(name) for name in path):
        return True
    return not found & _LOGGED and (bool(found & _MOMENT) or not found & _SETTINGS)


def in_script(key: str) -> bool:
    """Return whether a tensor of a TorchScript file may be of statistics of observations."""
    parts = key.split(".")
    return any(map(_SCRIPT_PART.fullmatch, parts)) or _SCRIPT_MEAN.fullmatch(parts[-1]) is not None
