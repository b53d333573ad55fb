"""The order and the env steps of a run's checkpoint files, from the numbers in their names and the files' contents.

rl_model_100_steps.zip and rl_model_200_steps.zip differ in one number, which is the step. Names that differ in several
numbers, in their words, or in the number after "seed" may belong to several runs. Then the files are ordered by the
steps that they state themselves, and refused if these do not differ, unless the caller says which number is the step,
or by what else the files are ordered.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tipl.storing.tensor_checks import shown

_NUMBER = re.compile(r"\d+(?:\.\d+)*(?:[eE]\d+|[kKmM](?![a-zA-Z]))?", re.ASCII)
_ENV_ID = re.compile(r"-v\d+", re.ASCII)
_RUN_BEFORE = re.compile(r"(seed|run|trial|rank|worker|env|agent|fold)s?[_=-]?$", re.IGNORECASE)
_PROGRESS_BEFORE = re.compile(r"(epoch|ep|episode|iter|iteration|update|ckpt|checkpoint)s?[_=-]?$", re.IGNORECASE)
_BESIDE_THE_STEP = re.compile(
    r"(epoch|ep|episode|iter|iteration|update|rew|reward|return|score|loss|kl|time)s?[_=-]*$", re.IGNORECASE
)
_STEP_BEFORE, _STEP_BEHIND = (
    re.compile(r"steps?[_=-]?$", re.IGNORECASE),
    re.compile(r"[_-]?(time)?steps?", re.IGNORECASE),
)
_UNIT_BEHIND = re.compile(r"(epoch|ep|episode|iter|iteration|update|th|st|nd|rd)s?([^a-zA-Z]|$)", re.IGNORECASE)
_MINUS_BEFORE = re.compile(r"(^|[_=])-$")
_DATE = re.compile(r"(?<!\d)(19|20)\d\d[-_.]?(0[1-9]|1[0-2])[-_.]?(0[1-9]|[12]\d|3[01])(?!\d)", re.ASCII)


STEP, STATED, NAME, MTIME = "step", "stated", "name", "mtime"
"""What files can be ordered by; any other order is a regular expression."""

Stated = Callable[[], Sequence[int | None]]
"""Reads the step that each file states itself; None where it states none."""


@dataclasses.dataclass(frozen=True)
class Order:
    """The files of a run in order."""

    paths: list[Path]
    named: list[int] | None = None
    """The steps in their names, if these order them."""
    is_marked: bool = False
    """Whether the names, or the caller, say that this number is the step; else it is the only one that varies."""


def is_pattern(order: str) -> bool:
    return order not in (STEP, STATED, NAME, MTIME)


def in_order(run: str, paths: Sequence[Path], stated: Stated, order: str = STEP) -> Order:
    """Return the files in order.

    With "step" the names say which number it is. If they hold none, or do not say it clearly, the files are ordered by
    what they state; those that state nothing stay as given if their names hold no numbers. "stated" orders by what the
    files state in any case, "name" and "mtime" by the names as texts and by the times of modification. Anything else is
    a regular expression searched in each name; its group, or without one the whole match, is the step. Raises
    ValueError where the order is not clear.
    """
    if order == NAME:
        return Order(sorted(paths, key=lambda path: path.name))
    if order == MTIME:
        return Order(_by_mtime(run, paths))
    if order == STATED:
        found = _by_stated(paths, stated())
        if found is None:
            raise ValueError(f"import: {run}: the files do not each state a step of their own: {_HOW_ELSE}")
        return Order(found)
    if order != STEP:
        return _by_steps(run, paths, _matched(run, paths, order), is_marked=True)
    unclear = None
    try:
        texts, is_marked = _steps_in_names(run, paths)
        if texts is not None:
            return _by_steps(run, paths, texts, is_marked)
    except ValueError as error:
        unclear = error
    found = _by_stated(paths, stated()) if len(paths) > 1 else None
    if found is None and unclear is not None:
        raise unclear
    return Order(list(paths) if found is None else found)


def _by_stated(paths: Sequence[Path], steps: Sequence[int | None]) -> list[Path] | None:
    """Return the files in the order of these steps, or None unless each has a step of its own."""
    known = [step for step in steps if step is not None]
    if len(known) < len(paths) or len(set(known)) < len(known):
        return None
    return [path for _, path in sorted(zip(known, paths, strict=True))]


def _by_steps(run: str, paths: Sequence[Path], texts: Sequence[str], is_marked: bool) -> Order:
    for path, text in zip(paths, texts, strict=True):
        if not re.fullmatch(r"[0-9]+", text):
            raise ValueError(f"import: {run}: the step in {shown(path.name)} must be a whole number, got {shown(text)}")
        if int(text) >= 2**63:
            raise ValueError(f"import: {run}: the step in {shown(path.name)} must be below 2^63, got {text}")
    ordered = sorted(zip(map(int, texts), paths, strict=True))
    for (step, path), (next_step, next_path) in itertools.pairwise(ordered):
        if step == next_step:
            raise ValueError(
                f"import: {run}: {shown(path.name)} and {shown(next_path.name)} are both of step {step}: name the "
                "files, or choose them with a pattern (--pattern)"
            )
    return Order([path for _, path in ordered], [step for step, _ in ordered], is_marked)


def _by_mtime(run: str, paths: Sequence[Path]) -> list[Path]:
    timed = sorted((path.stat().st_mtime_ns, path) for path in paths)
    for (time, path), (next_time, next_path) in itertools.pairwise(timed):
        if time == next_time:
            raise ValueError(
                f"import: {run}: {shown(path.name)} and {shown(next_path.name)} were modified at the same moment: "
                "order them by something else"
            )
    return [path for _, path in timed]


def chosen_steps(
    paths: Sequence[Path],
    named: Sequence[int] | None,
    said: Sequence[int | None],
    order: str,
    *,
    said_by: str,
    is_unit: bool,
    is_marked: bool,
) -> tuple[list[int], str]:
    """Return the env steps of `paths`, which are in order, and a note if names and files disagree or both are silent.

    `named` are the numbers in the names, `said` those in the files, which store them as `said_by`. With `is_unit`, the
    files are known to count env steps and are preferred if they grow; otherwise the names are preferred. If they do not
    grow, although no count was begun anew, they contradict names in which nothing marks the number as the step
    (`is_marked`). Raises ValueError there, where the step of a single file is not clear, and where the files' steps are
    all there is and do not grow.
    """
    known = [step for step in said if step is not None]
    by = "times of modification" if order == MTIME else "names"
    if len(known) < len(paths):
        may_say = len(paths) == 1 and _NUMBER.search(_ENV_ID.sub("", paths[0].stem))
        if named is None and (known or (order == STEP and may_say)):
            raise ValueError(f"import: {shown(paths[0])}: neither its name nor the file says the step: {_HOW}")
        if named is not None:
            note = "" if is_marked else "env_steps are the numbers in the names, which nothing marks as steps"
            return list(named), note if len(paths) > 1 else ""
        note = f"env_steps are indices: the files are taken in the order of their {by}"
        return list(range(len(paths))), note if len(paths) > 1 else ""
    if named == known:
        return known, ""
    falling = next((i for i, (one, other) in enumerate(itertools.pairwise(known)) if one >= other), None)
    files = f"what the files say ({said_by}), {_range(known)}"
    if named is None:
        if falling is None:
            return known, ""
        if order in (NAME, MTIME) and len(set(known)) == 1:
            note = f"env_steps are indices in the order of the {by}: {files}, does not grow"
            return list(range(len(paths))), note
        raise ValueError(
            f"import: {shown(paths[falling + 1])} says that it is of step {known[falling + 1]}, but comes after "
            f"{shown(paths[falling])} of step {known[falling]}: the names must hold the order"
        )
    names = f"the numbers in the names, {_range(named)}"
    if falling is None:
        if is_unit:
            return known, f"env_steps are {files}, not {names}"
        return list(named), f"env_steps are {names}, not {files}, which differs"
    if is_unit and not is_marked and not _begun_anew(named, known):
        one, other = (f"{shown(paths[i].name)} says that it is of step {known[i]}" for i in (falling, falling + 1))
        how = _HOW_ELSE if len(set(known)) < len(known) else _HOW
        raise ValueError(
            f"import: {one}, {other}: the numbers in the names are no steps, or the files are of several runs: {how}"
        )
    return list(named), f"env_steps are {names}, not {files}, which does not grow"


def _begun_anew(named: Sequence[int], said: Sequence[int]) -> bool:
    """Return whether `said` counts as `named` does, but for some times from zero again, as SB3's learn() does."""
    pairs = zip(itertools.pairwise(named), itertools.pairwise(said), strict=True)
    return all(step - before in (count - last, count) for (before, step), (last, count) in pairs)


_HOW_ELSE = "say with order (--order) which number it is, such as 'iter_([0-9]+)', or to go by name or mtime"
_HOW = f"{_HOW_ELSE}, or by stated, what the files state"


def _range(steps: Sequence[int]) -> str:
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _matched(run: str, paths: Sequence[Path], pattern: str) -> list[str]:
    """Return the text of the step that the pattern finds in each name."""
    try:
        step = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"import: order must be step, stated, name, mtime or a regular expression, got {pattern!r}: {error}"
        ) from error
    found = []
    for path in paths:
        match = step.search(path.name)
        if match is None or match[match.lastindex or 0] is None:
            raise ValueError(f"import: {run}: order {pattern!r} finds no step in {shown(path.name)}")
        found.append(match[match.lastindex or 0])
    return found


def _steps_in_names(run: str, paths: Sequence[Path]) -> tuple[list[str] | None, bool]:
    """Return the number in each name that is the step, or None where the names hold no numbers, and whether the names
    mark it as the step."""
    if len(paths) == 1:
        words, numbers = _split(_ENV_ID.sub("", paths[0].stem))
        marked = [number for i, number in enumerate(numbers) if _is_marked(words, i)]
        candidates = marked or numbers
        return (candidates if len(candidates) == 1 else None), bool(marked)
    split = [_split(path.stem) for path in paths]
    without = [path for path, (_, numbers) in zip(paths, split, strict=True) if not numbers]
    if len(without) == len(paths):
        return None, False
    if without:
        raise ValueError(
            f"import: {run}: {shown(without[0].name)} has no number of steps in its name, as the others have: name the "
            "files, or choose them with a pattern (--pattern)"
        )
    kinds = {(*words, path.suffix): path for path, (words, _) in zip(paths, split, strict=True)}
    if len(kinds) > 1:
        one, other = [shown(path.name) for path in kinds.values()][:2]
        raise ValueError(
            f"import: {run}: {one} and {other} are named differently, as if of several runs: choose the files with a "
            f"pattern (--pattern), or {_HOW}"
        )
    words, columns = split[0][0], list(zip(*(numbers for _, numbers in split), strict=True))
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1] or [len(columns) - 1]
    marked_columns = [i for i in range(len(columns)) if _is_marked(words, i)]
    steps = [i for i in varying if i in marked_columns] if marked_columns else varying
    others = [i for i in varying if i not in steps]
    if len(steps) != 1 or not all(_BESIDE_THE_STEP.search(words[i]) for i in others):
        what = "in several numbers" if len(varying) > 1 else "in a number that does not look like a step"
        raise _unclear(run, paths, what)
    i = steps[0]
    if _RUN_BEFORE.search(words[i]):
        raise _unclear(run, paths, "in a number that does not look like a step")
    if i not in marked_columns and (what := _not_a_step(words, columns, i, paths)):
        raise _unclear(run, paths, f"in a number that {what}")
    is_alone = not words[i] and not words[i + 1]
    return list(columns[i]), i in marked_columns or is_alone or bool(_PROGRESS_BEFORE.search(words[i]))


def _unclear(run: str, paths: Sequence[Path], what: str) -> ValueError:
    one, other = (shown(path.name) for path in (paths[0], paths[-1]))
    return ValueError(f"import: {run}: names differ {what}, like {one} and {other}, as if of several runs: {_HOW}")


def _not_a_step(words: Sequence[str], columns: Sequence[tuple[str, ...]], i: int, paths: Sequence[Path]) -> str:
    """Return what number i of the names seems to be if it is no whole number of its own; else an empty text."""
    if any(_DATE.search(path.stem) for path in paths):
        return "may be part of a date"
    if _MINUS_BEFORE.search(words[i]):
        return "seems to be negative"
    if re.match(r"[a-zA-Z]", words[i + 1]) and not _UNIT_BEHIND.match(words[i + 1]):
        return f"runs on into {shown(words[i + 1])}"
    if i + 1 < len(columns) and words[i + 1] in ("_", ",") and all(len(text) == 3 for text in columns[i + 1]):
        return "may be the thousands of a larger one"
    return ""


def _split(stem: str) -> tuple[list[str], list[str]]:
    """Return the words before, between and after the numbers of a name, and the numbers."""
    return _NUMBER.split(stem), _NUMBER.findall(stem)


def _is_marked(words: Sequence[str], i: int) -> bool:
    """Return whether the words around number i of a name say that it is the step."""
    if _STEP_BEFORE.search(words[i]):
        return True
    behind = _STEP_BEHIND.match(words[i + 1])
    # In ep_10_steps_1000 the word belongs to the number behind it.
    belongs_to_next = i + 2 < len(words) and _STEP_BEFORE.search(words[i + 1])
    return bool(behind) and not belongs_to_next
