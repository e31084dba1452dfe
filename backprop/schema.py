"""The JSON Schema of events: the contract with those who read them."""

import types
import typing
from collections.abc import Mapping, Sequence

from backprop.events import EVENT_VERSION, JSON, KINDS


def schema() -> dict[str, JSON]:
    """Give the JSON Schema (2020-12) of one line of `--json` or `events.jsonl`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "backprop event",
        "oneOf": [_schema_of(cls, kind) for cls, kind in KINDS.items()],
    }


def _schema_of(cls: type, kind: str) -> dict[str, JSON]:
    hints = typing.get_type_hints(cls)
    properties: dict[str, JSON] = {
        "v": {"const": EVENT_VERSION},
        "t": {"type": "string", "format": "date-time"},
        "event": {"const": kind},
    }
    for name, hint in hints.items():
        properties[name] = _schema_of_type(hint)
    return {
        "title": kind,
        "description": (cls.__doc__ or "").strip(),
        "type": "object",
        "properties": properties,
        "required": list(properties),
    }


_PRIMITIVES: dict[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _schema_of_type(hint: object) -> dict[str, JSON]:
    if hint in _PRIMITIVES:
        return {"type": _PRIMITIVES[hint]}
    if isinstance(hint, types.UnionType):
        return {"type": ["null" if one is type(None) else _PRIMITIVES[one] for one in typing.get_args(hint)]}
    if typing.get_origin(hint) is Sequence:
        return {"type": "array"}
    if typing.get_origin(hint) is Mapping:
        value = typing.get_args(hint)[1]
        if isinstance(value, types.UnionType) or value not in _PRIMITIVES:
            return {"type": "object"}
        return {"type": "object", "additionalProperties": _schema_of_type(value)}
    raise TypeError(f"no JSON Schema for {hint}")
