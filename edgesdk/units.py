"""Sizes, times and energies as people write them, and back.

Inside edgesdk every size is an `int` in bytes, every time a `float` in seconds, every energy one in joules; these functions are the only door.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from edgesdk.errors import InputError

_BYTES = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9,
    "k": 2**10, "m": 2**20, "g": 2**30,
    "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "min": 60.0}
_RATES = {"bit": 0.125, "kbit": 125.0, "mbit": 1.25e5, "gbit": 1.25e8, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9}
_JOULES = {"": 1.0, "j": 1.0, "mj": 1e-3, "uj": 1e-6, "µj": 1e-6, "kj": 1e3}


def _split(text: str, kind: str, units: dict[str, float] | dict[str, int], example: str) -> tuple[float, str]:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Zµ]*)\s*", text)
    if not match or match[2].lower() not in units:
        raise InputError(f"'{text}' is not {kind}", f"write it like {example}; units: {', '.join(u for u in units if u)}")
    return float(match[1]), match[2].lower()


def parse_bytes(text: str) -> int:
    """`512MB` → 512000000, `4GiB` → 4294967296. Raises `InputError`."""
    number, unit = _split(text, "a size", _BYTES, "512MB or 4GiB")
    return round(number * _BYTES[unit])


def parse_seconds(text: str) -> float:
    """`20ms` → 0.02. Raises `InputError`."""
    number, unit = _split(text, "a time", _SECONDS, "20ms or 1.5s")
    return number * _SECONDS[unit]


def parse_latencies(texts: Iterable[str]) -> dict[str, float]:
    """`["20ms", "decode=2ms"]` → {"": 0.02, "decode": 0.002}: of one whole answer, and of one call of a method. Raises `InputError`."""
    found: dict[str, float] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if (name := name.strip() if sign else "") in found:
            raise InputError(
                f"latency '{text}': {name or 'the whole answer'} has one already", "give each once: 20ms for a whole answer, decode=2ms"
            )
        found[name] = parse_seconds(value if sign else text)
    return found


def parse_joules(text: str) -> float:
    """`5mJ` → 0.005. Raises `InputError`."""
    number, unit = _split(text, "an energy", _JOULES, "5mJ or 0.2J")
    return number * _JOULES[unit]


def parse_rate(text: str) -> float:
    """`100Mbit` or `12MB`, a second → bytes a second. Raises `InputError`."""
    number, unit = _split(text.removesuffix("/s"), "rate", _RATES, "100Mbit or 12MB (a second)")
    if not number:
        raise InputError(f"'{text}' carries nothing", "give a rate above 0")
    return number * _RATES[unit]


def parse_share(text: str) -> float:
    """`1%` → 0.01, `0.01` → 0.01. Raises `InputError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if not match:
        raise InputError(f"'{text}' is not a share", "write it like 1% or 0.01")
    return float(match[1]) / (100.0 if match[2] else 1.0)


def show_bytes(n: int | float | None) -> str:
    """Bytes for a table: `1.23 MB`; `–` for unknown."""
    if n is None:
        return "–"
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}" if abs(n) < 1000 * size else f"{n / size:.0f} {unit}"
    return f"{n:.0f} B"


def show_seconds(t: float | None) -> str:
    """Seconds for a table: `1.23 ms`; `–` for unknown."""
    if t is None:
        return "–"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(t) >= size:
            return f"{t / size:.3g} {unit}"
    return f"{t / 1e-9:.3g} ns"


def show_joules(e: float | None) -> str:
    """Joules for a table: `1.23 mJ`; `–` for unknown."""
    if e is None:
        return "–"
    for unit, size in (("J", 1.0), ("mJ", 1e-3)):
        if abs(e) >= size:
            return f"{e / size:.3g} {unit}"
    return f"{e / 1e-6:.3g} µJ"


def show_amount(metric: str, value: float) -> str:
    """What is taken of a budget: bytes, times and energies by its name, all else as a share."""
    if metric in ("memory", "storage"):
        return show_bytes(value)
    if metric.startswith("latency"):
        return show_seconds(value)
    return show_joules(value) if metric == "energy" else f"{value:.2%}"
