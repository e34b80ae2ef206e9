"""Lengths of texts in tokens: one length, an even range, or a histogram."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import PositiveFloat, PositiveInt, model_validator

from edgesdk.errors import InputError
from edgesdk.noun import Part

POINTS = 64
"""A range is taken at this many lengths at most, evenly spaced."""


class Lengths(Part):
    """Lengths in rising order, each with its share of all texts; the shares add up to 1."""

    values: tuple[PositiveInt, ...]
    shares: tuple[PositiveFloat, ...]
    buckets: tuple[PositiveInt, ...] = ()  # lengths that programs are made for, where they were named

    @model_validator(mode="after")
    def _whole(self) -> Lengths:
        if not self.values or len(self.values) != len(self.shares) or list(self.values) != sorted(set(self.values)):
            raise ValueError("wanted rising lengths with a share each")
        if abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"the shares add up to {sum(self.shares):.4g}, not 1")
        if self.buckets and (list(self.buckets) != sorted(set(self.buckets)) or self.buckets[-1] < self.values[-1]):
            raise ValueError(f"wanted rising buckets, the last of which holds {self.values[-1]}")
        return self

    @classmethod
    def of(cls, counts: Iterable[tuple[int, float]]) -> Lengths:
        """From (length, count) pairs; equal lengths are joined."""
        held: dict[int, float] = {}
        for length, count in counts:
            held[length] = held.get(length, 0.0) + count
        total = sum(held.values())
        return cls(values=tuple(sorted(held)), shares=tuple(held[v] / total for v in sorted(held)))

    @property
    def mean(self) -> float:
        return sum(v * s for v, s in zip(self.values, self.shares, strict=True))

    @property
    def largest(self) -> int:
        return self.values[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """What programs that read such texts are made for: the buckets that were named, else the one length, or powers of two up to the longest."""
        if self.buckets:
            return self.buckets
        rising = (2**n for n in range(4, self.largest.bit_length()))
        return (*(() if self.is_point else (s for s in rising if s < self.largest)), self.largest)

    @property
    def is_point(self) -> bool:
        return len(self.values) == 1

    def __str__(self) -> str:
        if self.is_point:
            return str(self.values[0])
        few = ", ".join(map(str, self.values)) if len(self.values) <= 4 else f"{self.values[0]}–{self.largest}"
        return f"{few} (mean {self.mean:.0f})"


def quantile(pairs: Iterable[tuple[float, float]], q: float) -> float:
    """The least value that at least the share `q` of (value, share) pairs does not exceed."""
    rising = sorted(pairs)
    reached = 0.0
    for value, share in rising:
        reached += share
        if reached >= q - 1e-9:
            return value
    return rising[-1][0]


def parse_buckets(text: str, option: str = "--buckets") -> tuple[int, ...]:
    """`128,512` → (128, 512). Raises `InputError` naming `option`."""
    fields = text.split(",")
    if not all(re.fullmatch(r"\s*0*[1-9]\d*\s*", f) for f in fields):
        raise InputError(f"{option} {text}: not lengths", "write them like 128,512")
    return tuple(sorted({int(f) for f in fields}))


def parse_lengths(text: str, option: str = "--input-length", buckets: str | None = None) -> Lengths:
    """`256`; `64,128,256` (these, equally often, and programs for them); `64-512` (all lengths between equally often); or a file: a length a line,
    or a length and how often it occurs. `buckets`: `128,512`, what programs are made for instead.

    Raises `InputError` naming `option` and, in a file, the line.
    """
    lengths = _lengths(text, option)
    sizes = parse_buckets(buckets) if buckets else lengths.buckets
    if sizes and sizes[-1] < lengths.largest:
        raise InputError(f"--buckets {buckets}: none holds {lengths.largest} tokens", f"the largest must hold {lengths.largest}")
    return lengths.model_copy(update={"buckets": sizes})


def _lengths(text: str, option: str) -> Lengths:
    hint = "write it like 256, 64,128,256, 64-512, or name a file with a length a line (and how often, behind a blank or a comma)"
    if "," in text and not Path(text).is_file():
        sizes = parse_buckets(text, option)
        return Lengths.of((n, 1.0) for n in sizes).model_copy(update={"buckets": sizes})
    if match := re.fullmatch(r"\s*(\d+)\s*(?:[-–]\s*(\d+))?\s*", text):
        low, high = int(match[1]), int(match[2] or match[1])
        if not 1 <= low <= high:
            raise InputError(f"{option} {text}: lengths are 1 or more and rise", hint)
        points = min(POINTS, high - low + 1)
        return Lengths.of((low + round(i * (high - low) / max(points - 1, 1)), 1.0) for i in range(points))
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{option} {text}: neither a length nor a file that can be read", hint) from None
    found = []
    for i, line in enumerate(lines, 1):
        fields = re.split(r"[,\s]+", line.split("#")[0].strip())
        if fields == [""]:
            continue
        length, count = 0, 1.0
        with contextlib.suppress(ValueError):
            length, count = int(fields[0]), float(fields[1]) if len(fields) > 1 else 1.0
        if length < 1 or not 0 < count < float("inf") or len(fields) > 2:
            raise InputError(f"{option} {text}: line {i} = {line!r}", hint)
        found.append((length, count))
    if not found:
        raise InputError(f"{option} {text}: no lengths in it", hint)
    return Lengths.of(found)
