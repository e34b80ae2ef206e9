"""`sequence.json`: what a runtime must know to generate with a bundle's programs. Standard library only; goes to the device as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

NAME = "sequence.json"
ROLES = ("encode", "prefill", "decode", "draft")
CACHE_BITS = (32, 16, 8, 4)
"""What the programs' caches may be held in: float32, float16, int8 codes with a scale a token and head, int4 codes with a scale and a least
value a token and 64 columns of a head (see `caches.held`)."""
NATIVE_BITS = (16, 4)
"""Those that only our own kernels read."""
GROUP = 64
"""Columns of a head that share a scale in caches of 4 bits."""


def groups(head: int) -> int:
    """Into how many groups of columns a head of so many is divided where each has a scale of its own."""
    return head // GROUP if head % GROUP == 0 else 1


def layout_of(bits: int, head: int) -> list[tuple[str, int]]:
    """What keys (and again values) of `bits` are held in: numpy's name of the kind, and how many of it a token and head (0: one, without a dimension)."""
    kinds = {32: [("float32", head)], 16: [("float16", head)], 8: [("int8", head), ("float32", 0)]}
    return kinds.get(bits) or [("uint8", head // 2), ("float16", 2 * groups(head))]


def token_bytes(bits: int, head: int) -> int:
    """Bytes of the keys of one token and head."""
    return sum({"float32": 4, "float16": 2, "int8": 1, "uint8": 1}[kind] * max(1, n) for kind, n in layout_of(bits, head))


class SequenceError(ValueError):
    """`what` cannot be generated from; `hint` says what to do."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


class Card:
    """The content of `sequence.json`, checked.

    `methods`: name → {"role", "batch", "source" (S, 0 without encoder), "cache" (T, 0 where it has none), "tokens" (N)}.
    `caches`: one entry per self-attention cache, in the order of the inputs: {"heads": K, "head": D, "window": W or 0}; `cross`: the
    same for cross-attention, {"heads", "head"}. `start`: tokens a generation begins with; `eos`: tokens that end it.
    `cache_bits`: of `CACHE_BITS`, what the programs' caches are held in; left out, they are float32.
    `draft`, where it is there: the kind of guesses (see `drafts`) that pay with these programs.
    `suppress`: tokens that are never chosen, `suppress_first`: not as an answer's first; both may be left out.
    `vocab`, `layout`, `pad`, `max_output` (tokens) and `tokenizer` ({"kind": "characters" | "bytes" | "hugging-face" | "none", …}).
    """

    FIELDS = ("layout", "vocab", "methods", "caches", "cross", "start", "eos", "pad", "max_output", "tokenizer")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        missing = [f for f in self.FIELDS if f not in fields]
        if missing:
            raise ValueError(f"{NAME} has no {', '.join(missing)}")
        self.layout: str = str(fields["layout"])
        self.vocab = int(fields["vocab"])
        self.methods: dict[str, dict[str, Any]] = {str(n): dict(m) for n, m in fields["methods"].items()}
        self.caches: tuple[dict[str, int], ...] = tuple(dict(c) for c in fields["caches"])
        self.cross: tuple[dict[str, int], ...] = tuple(dict(c) for c in fields["cross"])
        self.start: tuple[int, ...] = tuple(int(t) for t in fields["start"])
        self.eos: tuple[int, ...] = tuple(int(t) for t in fields["eos"])
        self.pad, self.max_output = int(fields["pad"]), int(fields["max_output"])
        self.tokenizer: dict[str, Any] = dict(fields["tokenizer"])
        self.draft = str(fields.get("draft", ""))
        self.cache_bits = int(fields.get("cache_bits", 32))
        if self.cache_bits not in CACHE_BITS:
            raise ValueError(f"{NAME}: caches of {self.cache_bits} bits, known: {', '.join(map(str, CACHE_BITS))}")
        self.suppress, self.suppress_first = (tuple(int(t) for t in fields.get(f, ())) for f in ("suppress", "suppress_first"))
        for name, method in self.methods.items():
            if method.get("role") not in ROLES:
                raise ValueError(f"{NAME}: method {name} has role {method.get('role')!r}, known: {', '.join(ROLES)}")

    @classmethod
    def read(cls, content: bytes) -> Card:
        """Raises `ValueError` where it is not one."""
        data = json.loads(content)
        if not isinstance(data, dict) or data.get("kind") != "sequence" or data.get("schema_version") != 1:
            raise ValueError(f"{NAME}: not a sequence of schema_version 1")
        return cls(data)

    def to_bytes(self) -> bytes:
        more = [f for f in ("draft", "suppress", "suppress_first") if getattr(self, f)]
        more += ["cache_bits"] if self.cache_bits != 32 else []
        fields = {f: getattr(self, f) for f in (*self.FIELDS, *more)}
        return json.dumps({"kind": "sequence", "schema_version": 1, **fields}, indent=1, sort_keys=True).encode()
