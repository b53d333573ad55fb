"""JSON is checked against the dataclass that describes it before it is used."""

import dataclasses
import functools
import json
import math
from typing import Any, TypeVar

import pydantic
import pydantic_core

from tipl.files.locations import Location

T = TypeVar("T")


def parse_json(data: bytes, path: Location) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises RuntimeError, naming `path`, where it is not one."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise RuntimeError(f"{path} is damaged: expected a JSON object, got {_shown(document)}")
    return document


def plain_json(name: str, value: Any) -> Any:
    """Return `value` with the types that JSON gives it.

    Raises TypeError, naming `name`, for a type that JSON does not have; ValueError for what `parse` could not read
    back: numbers that are not finite, text that is no Unicode, very deep nesting.
    """
    try:
        text = json.dumps(value, allow_nan=False)
        pydantic_core.from_json(text)
        return json.loads(text)
    except TypeError as error:
        raise TypeError(f"{name} must be plain JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be plain JSON: {error}") from error


def is_plain_json(value: Any) -> bool:
    """Return whether JSON can hold the value; it makes lists of tuples."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        return all(map(is_plain_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain_json(it) for key, it in value.items())
    return value is None or isinstance(value, bool | int | str)


def parse(kind: type[T], document: dict[str, Any], path: Location, *, more: bool = False) -> T:
    """Return an instance of the dataclass `kind` with the fields in `document`, plain JSON read from `path`.

    Unknown fields are refused; with `more`, unknown fields at the top level are ignored.

    Raises RuntimeError with the path, the first wrong field, what was expected and what was found.
    """
    try:
        adapter: pydantic.TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]
        if more:
            known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
            document = {name: value for name, value in document.items() if name in known}
        return adapter.validate_json(json.dumps(document), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the document"
        message = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] in ("missing", "value_error") else f", got {_shown(first['input'])}"
        raise RuntimeError(f"{path}: {field}: {message}{found}") from error
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"{path} is damaged: {error}") from error


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
