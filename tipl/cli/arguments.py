"""The kinds of argument that commands share."""

from pathlib import Path
from typing import Annotated

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
RayArg = Annotated[str | None, arg(metavar="ADDRESS|local")]
