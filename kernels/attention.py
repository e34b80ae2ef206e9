"""What callers of `attend` must know beside its args: how keys and values are held in slots, and how much room scores take."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgesdk.sequence.card import groups

FORMS = {"": 32, "half": 16, "int8": 8, "int4": 4}
"""What stands behind `attend_` → bits of a number: float32; float16; int8 with a float32 scale a token and head [B, K, slots]; int4, two a byte,
with float16 scales and least values of each group [B, K, slots, 2 · groups] (see `edgesdk.sequence.card`)."""
ROWS = 4
"""Rows of queries that go through the keys and values of their head together."""


def kernel(form: str, size: int) -> str:
    """The name for heads of `size` floats."""
    return "_".join(filter(None, ("attend", form, str(size))))


def room(form: str, size: int, parts: int, seen: int) -> Any:
    """`scores` for `parts` heads that see slots and new tokens, `seen` together."""
    return np.zeros((parts, ROWS * (groups(size) if form == "int4" else 1), seen), np.float32)
