"""The kinds of argument that commands share."""

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from tipl.files.locations import location
from tipl.files.schema import plain_json


def _local_path(texts: list[str]) -> Path:
    """Return the path that was given, perhaps as a file:// URL."""
    path = location(texts[0]) if texts[0].startswith("file://") else Path(texts[0])
    assert isinstance(path, Path)
    return path


PathArg = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_local_path,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
StoreArg = Annotated[str, arg(metavar="PATH|URL")]  # s3://bucket/name, or whatever else fsspec knows
FreshArg = Annotated[str | None, arg(metavar="PATH|URL")]
EnvKwargsArg = Annotated[str | None, arg(metavar="JSON")]
RayArg = Annotated[str | None, arg(metavar="ADDRESS|local")]


def env_kwargs_of(command: str, text: str | None) -> dict[str, Any] | None:
    """Return the JSON object in --env-kwargs, None where it was not given. Raises ValueError for anything else."""
    if text is None:
        return None
    try:
        value = plain_json("it", json.loads(text, parse_constant=_refuse, object_pairs_hook=_each_once))
        if isinstance(value, dict):
            return value
        reason = ""
    except (ValueError, RecursionError) as error:
        reason = f": {error}"
    expected = "a JSON object, such as '{\"ctrl_cost_weight\": 0.05}'"
    raise ValueError(f"{command}: env_kwargs must be {expected}, got {text!r:.80}{reason}")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ValueError where it has two values for one name."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it gives {max(names, key=names.count)!r:.40} twice")
    return made


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")
