"""What the names in a state's keys say: which name a critic, a target network, an optimiser or statistics.

A key is split at its dots into parts, and a part into words, at underscores, digits and capitals: "valueNet_1" has the
words value and net. Words are compared without case. A name says something *surely* only if all of its words are known;
where one is not, as in critic_free_head, it is in doubt, and import asks.
"""

import functools
import re
from collections.abc import Iterable, Mapping

Shapes = Mapping[str, tuple[int, ...]]

_DIGITS = re.compile(r"\d+")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


ACTOR = word_set("actor actors policy pi student")
CRITIC = word_set("critic critics")
Q = word_set("q qf qs qnet qnets qnetwork qfunc qfunction qvalue qvalues qhead quantile")
VALUE = word_set("value values baseline v vf vs vnet vnets vnetwork vfunc vfunction vhead")
TARGET = word_set("target targets targ tgt")
COPY = word_set("old ema polyak teacher ref reference frozen slow lagged prev previous")
OTHER = word_set("discriminator")
OPTIMISER = word_set(
    "optim optims optimizer optimizers optimiser optimisers sched scheduler schedulers schedule schedules"
)

LAYER = word_set(
    "fc linear lin dense affine fully connected layer layers hidden h l net nets network networks mlp module modules "
    "model main seq sequential container params a"
)
BLOCK = word_set("block blocks layer layers h stage stages res residual resblock cell")
TRUNK = word_set(
    "encoder enc features feature extractor trunk torso body base backbone shared stem embed embedding embeddings cnn "
    "cnns conv convs rnn lstm gru memory preprocess wte wpe"
)
RECURRENT = word_set("rnn lstm gru memory")
_SEEN = word_set("input in obs observation state")
SPREAD = word_set("std logstd sigma var logvar scale stddev")
HEAD = word_set("mean means mu loc logits action actions act out output head heads final last dist decoder")
INNER = word_set(
    "norm ln bn attn attention self query key value q k v proj dropout ff ffn ih hh transformer to w res residual cell"
)
"""Words for parts of layers, which need not follow each other in the order of the file."""
NETWORK_PART = ACTOR | LAYER | BLOCK | TRUNK | _SEEN | SPREAD | HEAD | INNER | word_set("weight kernel bias log")
"""Words that name one network or parts of it, none of which is another network's."""

_NORMALISER = word_set(
    "normalizer normaliser normalization norm preprocessor rms running mean std var stats statistics"
)
_BESIDE_CRITIC = (LAYER | TRUNK | _SEEN | TARGET | _NORMALISER | CRITIC) - word_set("embed embedding embeddings main")
_BESIDE_CRITIC |= word_set(
    "aux auxiliary central asymmetric privileged twin double local online head heads out output func function fn q v "
    "value values dict weight weights bias ensemble logits"
)
_REWARD = word_set("return returns ret reward rewards rew value values")
_STATISTIC = _NORMALISER | word_set("meanstd scaler stat normalizers normalisers")
_STATISTIC_LEAF = re.compile(
    r"_?(running_)?(mean|var|variance|std|m2|count|n|current_count|epsilon|eps)", re.IGNORECASE
)

_LIBRARIES_CRITICS = re.compile(
    r"value_net\.|vf_features_extractor\.|mlp_extractor\.value_net\.|memory_c\.|critic_mlp\.|value\.|value_layer\."
    r"|value_mean_std\."
)
"""How the keys of critics begin that SB3, rsl_rl, rl_games and skrl name without the word."""


@functools.lru_cache(maxsize=4096)
def words(name: str) -> frozenset[str]:
    """Return the words of a part of a key, in small letters."""
    return frozenset(it.lower() for it in _WORD.findall(name))


def names_critic(name: str) -> bool:
    """Return whether a part surely names a critic or a value network; one of actor and critic together does not."""
    found = words(name)
    return bool(found & (CRITIC | VALUE | Q)) and found <= CRITIC | VALUE | Q | _BESIDE_CRITIC


def names_target(name: str) -> bool:
    """Return whether a part surely names a target network, or an older or averaged copy of a network."""
    found = words(name)
    return bool(found & (TARGET | COPY)) and found <= TARGET | COPY | CRITIC | VALUE | Q | ACTOR | LAYER


def names_optimiser(name: str) -> bool:
    """Return whether a part names an optimiser or a schedule."""
    return any(it in OPTIMISER or it.endswith(("optimizer", "optimiser", "scheduler")) for it in words(name))


def names_return_statistics(name: str) -> bool:
    """Return whether a name is one of statistics by which returns, rewards or values are normalised."""
    found = words(name)
    return bool(found & _REWARD and found & _STATISTIC) and found <= _REWARD | _STATISTIC | word_set("state dict")


def of_return_statistics(key: str) -> bool:
    """Return whether a key is that of statistics of returns, rewards or values."""
    *parts, leaf = key.split(".")
    named = bool(parts) and names_return_statistics(parts[0]) and _STATISTIC_LEAF.fullmatch(leaf) is not None
    return named or (not parts and names_return_statistics(leaf))


def may_be_anothers(part: str) -> bool:
    """Return whether a part of a key has a word by which networks other than an actor are called."""
    return bool(words(part) & (CRITIC | VALUE | Q | TARGET | COPY | OTHER))


def is_attention(part: str, parts: Iterable[str]) -> bool:
    """Return whether a part with the word value, v or q is one of a query, a key and a value, all among `parts`."""
    found = words(part)
    if found & (CRITIC | TARGET | COPY | OTHER):
        return False
    for word, other in (("value", "key"), ("values", "keys"), ("v", "k"), ("q", "k")):
        if word in found and any(words(it) == found - {word} | {other} for it in parts):
            return True
    return False


def left_out(shapes: Shapes) -> dict[str, str]:
    """Return whose each key surely is, as libraries name them: "critic", "target" or "returns"; others are not there.

    Only the first part of a key counts.
    """
    counterparts = {_place(key, shape) for key, shape in shapes.items()}
    firsts = {key.partition(".")[0] for key in shapes}
    roles = {}
    for key, shape in shapes.items():
        first, dot, rest = key.partition(".")
        name, digits = _name(first)
        if of_return_statistics(key):
            roles[key] = "returns"
        elif name & TARGET and dot:
            is_librarys = first.lower().endswith("_target") and bool(name & (ACTOR | CRITIC | Q | VALUE))
            if (name - TARGET, digits, rest, shape) in counterparts or (is_librarys and names_target(first)):
                roles[key] = "target"
        elif (name & CRITIC and names_critic(first)) or (
            _LIBRARIES_CRITICS.match(key) and not is_attention(first, firsts)
        ):
            roles[key] = "critic"
    return roles


def left_out_anywhere(shapes: Shapes) -> dict[str, str]:
    """Return whose each key surely is by any of its parts: "critic", "target", "optimiser" or "returns"; "doubt" where
    a part may be another network's. Other keys are not there."""
    around = {part for key in shapes for part in key.split(".")}
    roles = left_out(shapes)
    for key in shapes:
        parts = key.split(".")
        for part in [] if key in roles else parts[:-1] or parts:
            is_both = bool(words(part) & ACTOR and words(part) & (CRITIC | VALUE))  # as in actor_critic
            if names_optimiser(part):
                roles[key] = "optimiser"
            elif may_be_anothers(part) and not is_both and not is_attention(part, around):
                roles[key] = "target" if names_target(part) else "critic" if names_critic(part) else "doubt"
            if key in roles:
                break
    return roles


def _name(part: str) -> tuple[frozenset[str], tuple[str, ...]]:
    return words(part), tuple(_DIGITS.findall(part))


def _place(key: str, shape: tuple[int, ...]) -> tuple[frozenset[str], tuple[str, ...], str, tuple[int, ...]]:
    first, _, rest = key.partition(".")
    return *_name(first), rest, shape
