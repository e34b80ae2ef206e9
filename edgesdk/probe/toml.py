"""A profile as TOML, in the form of the shipped ones: plain fields, then a table or a list of tables each, then the sources."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any


def toml(raw: Mapping[str, Any]) -> str:
    """`raw` (strings, numbers, booleans, lists, dicts; None is left out) as TOML text."""
    parts = ["\n".join(f"{_key(k)} = {_value(v)}" for k, v in raw.items() if v is not None and not _is_table(v))]
    for key, value in raw.items():
        for table in value if isinstance(value, list) and _is_table(value) else [value] if isinstance(value, dict) else []:
            head = f"[[{_key(key)}]]" if isinstance(value, list) else f"[{_key(key)}]"
            parts.append("\n".join([head, *_lines(table)]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_table(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value))


def _lines(table: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{_key(k)} = {_value(v)}" for k, v in table.items() if v is not None)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(_lines(value)) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e9 else repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
