"""`sequence.json`: what a runtime must know to generate with a bundle's programs. Standard library only; goes to the device as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

NAME = "sequence.json"
ROLES = ("encode", "prefill", "decode", "draft")
CACHE_BITS = (32, 8)
"""What the programs' caches may be held in: float32, or int8 codes with a scale a token and head."""


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
    `cache_bits`: 8 where the programs' caches are int8 (see `caches.codes`); left out, they are float32.
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
