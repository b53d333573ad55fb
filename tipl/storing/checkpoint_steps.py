"""The order and the env steps of a run's checkpoint files, from the numbers in their names and the files' contents.

rl_model_100_steps.zip and rl_model_200_steps.zip differ in one number, which is the step. Names that differ in several
numbers, in their words, or in the number after "seed" may belong to several runs, and are refused unless the caller
says which number is the step, or by what else the files are ordered.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from tipl.storing.tensor_checks import shown

_NUMBER = re.compile(r"\d+(?:\.\d+)*(?:[eE]\d+|[kKmM](?![a-zA-Z]))?", re.ASCII)
_ENV_ID = re.compile(r"-v\d+", re.ASCII)
_RUN_BEFORE = re.compile(r"(seed|run|trial|rank|worker|env|agent|fold)s?[_=-]?$", re.IGNORECASE)
_STEP_BEFORE, _STEP_BEHIND = (
    re.compile(r"steps?[_=-]?$", re.IGNORECASE),
    re.compile(r"[_-]?(time)?steps?", re.IGNORECASE),
)


STEP, NAME, MTIME = "step", "name", "mtime"
"""What files can be ordered by; any other order is a regular expression."""


def is_pattern(order: str) -> bool:
    return order not in (STEP, NAME, MTIME)


def in_order(run: str, paths: Sequence[Path], order: str = STEP) -> tuple[list[Path], list[int] | None]:
    """Return the files in order, and the steps in their names, by which they are ordered.

    With "step" the names say which number it is; if they hold none, the files are returned as given, and None. "name"
    and "mtime" order by the names as texts and by the times of modification, without steps. Anything else is a regular
    expression searched in each name; its group, or without one the whole match, is the step. Raises ValueError where
    the order is not clear.
    """
    if order == NAME:
        return sorted(paths, key=lambda path: path.name), None
    if order == MTIME:
        return _by_mtime(run, paths), None
    texts = _steps_in_names(run, paths) if order == STEP else _matched(run, paths, order)
    if texts is None:
        return list(paths), None
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
    return [path for _, path in ordered], [step for step, _ in ordered]


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
) -> tuple[list[int], str]:
    """Return the env steps of `paths`, which are in order, and a note if names and files disagree or both are silent.

    `named` are the numbers in the names, `said` those in the files, which store them as `said_by`. With `is_unit`, the
    files are known to count env steps and are preferred if they grow; otherwise the names are preferred. Raises
    ValueError where the step of a single file is not clear, or the files' steps are all there is and do not grow.
    """
    known = [step for step in said if step is not None]
    if len(known) < len(paths):
        may_say = len(paths) == 1 and _NUMBER.search(_ENV_ID.sub("", paths[0].stem))
        if named is None and (known or (order == STEP and may_say)):
            raise ValueError(f"import: {shown(paths[0])}: neither its name nor the file says the step: {_HOW}")
        by = "times of modification" if order == MTIME else "names"
        note = "" if named is not None else f"env_steps are indices: the files are taken in the order of their {by}"
        return list(range(len(paths)) if named is None else named), note if len(paths) > 1 else ""
    if named == known:
        return known, ""
    falling = next((i for i, (one, other) in enumerate(itertools.pairwise(known)) if one >= other), None)
    if named is None:
        if falling is not None:
            raise ValueError(
                f"import: {shown(paths[falling + 1])} says that it is of step {known[falling + 1]}, but comes after "
                f"{shown(paths[falling])} of step {known[falling]}: the names must hold the order"
            )
        return known, ""
    names, files = f"the numbers in the names, {_range(named)}", f"what the files say ({said_by}), {_range(known)}"
    if is_unit and falling is None:
        return known, f"env_steps are {files}, not {names}"
    return list(named), f"env_steps are {names}, not {files}, which " + (
        "differs" if falling is None else "does not grow"
    )


_HOW = "say with order (--order) which number it is, such as 'iter_([0-9]+)', or to go by name or mtime"


def _range(steps: Sequence[int]) -> str:
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _matched(run: str, paths: Sequence[Path], pattern: str) -> list[str]:
    """Return the text of the step that the pattern finds in each name."""
    try:
        step = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"import: order must be step, name, mtime or a regular expression, got {pattern!r}: {error}"
        ) from error
    found = []
    for path in paths:
        match = step.search(path.name)
        if match is None or match[match.lastindex or 0] is None:
            raise ValueError(f"import: {run}: order {pattern!r} finds no step in {shown(path.name)}")
        found.append(match[match.lastindex or 0])
    return found


def _steps_in_names(run: str, paths: Sequence[Path]) -> list[str] | None:
    """Return the number in each name that is the step, or None where the names hold no numbers."""
    if len(paths) == 1:
        words, numbers = _split(_ENV_ID.sub("", paths[0].stem))
        marked = [number for i, number in enumerate(numbers) if _is_marked(words, i)]
        candidates = marked or numbers
        return candidates if len(candidates) == 1 else None
    split = [_split(path.stem) for path in paths]
    without = [path for path, (_, numbers) in zip(paths, split, strict=True) if not numbers]
    if len(without) == len(paths):
        return None
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
    i = varying[-1]
    if len(varying) > 1 or (marked_columns and i not in marked_columns) or _RUN_BEFORE.search(words[i]):
        one, other = (shown(path.name) for path in (paths[0], paths[-1]))
        what = "in several numbers" if len(varying) > 1 else "in a number that does not look like a step"
        raise ValueError(f"import: {run}: names differ {what}, like {one} and {other}, as if of several runs: {_HOW}")
    return list(columns[i])


def _split(stem: str) -> tuple[list[str], list[str]]:
    """Return the words before, between and after the numbers of a name, and the numbers."""
    return _NUMBER.split(stem), _NUMBER.findall(stem)


def _is_marked(words: Sequence[str], i: int) -> bool:
    """Return whether the words around number i of a name say that it is the step."""
    return bool(_STEP_BEFORE.search(words[i]) or _STEP_BEHIND.match(words[i + 1]))
