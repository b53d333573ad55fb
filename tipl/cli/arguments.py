"""The kinds of argument that commands share."""

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from tipl.files.locations import location


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
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"{command}: env_kwargs must be a JSON object, such as '{{\"ctrl_cost_weight\": 0.05}}', got {text!r:.80}"
        )
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")
