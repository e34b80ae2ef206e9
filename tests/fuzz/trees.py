"""Changes to JSON by its parts, so that what comes out still is JSON and reaches the checks of fields."""

from __future__ import annotations

import json
import random
from typing import Any

ATOMS: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1 << 63,
    10**400,
    1e308,
    1.5,
    "",
    "x",
    "../x",
    "\ud800",
    "a" * 300,
    [],
    {},
    [None],
    {"x": 1},
    float("nan"),
)


def inside(data: bytes, seed: int) -> bytes | None:
    """`change` of JSON, or of the JSON that a made bundle begins with (see `made.bundle`); None where there is none."""
    if data[:1] == b"\1":
        head, mark, rest = data[1:].partition(b"\xff")
        changed = change(head, seed)
        return None if changed is None else b"\1" + changed + mark + rest
    return change(data, seed)


def change(data: bytes, seed: int) -> bytes | None:
    """`data` with one to four of its parts replaced, removed, doubled or moved; None where it is no JSON object or list."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(tree, (dict, list)):
        return None
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        spots = _spots(tree, [])
        if not spots:
            break
        holder, key = rng.choice(spots)
        what = rng.randrange(5)
        if what == 0:
            del holder[key]
        elif what == 1:
            other, name = rng.choice(spots)
            holder[key] = other[name] if name in other or isinstance(other, list) else None
        elif what == 2 and isinstance(holder, list):
            holder.insert(key, holder[key])
        elif what == 3 and isinstance(holder, dict):
            holder[rng.choice(("x", key + "x", ""))] = rng.choice(ATOMS)
        else:
            holder[key] = rng.choice(ATOMS)
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):  # it holds itself, or a number without end
        return None


def _spots(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(what holds it, its key or index) of every part; an hundred thousand at most."""
    stack = [node]
    while stack and len(found) < 100_000:
        top = stack.pop()
        pairs = top.items() if isinstance(top, dict) else enumerate(top) if isinstance(top, list) else ()
        for key, value in list(pairs):
            found.append((top, key))
            stack.append(value)
    return found
