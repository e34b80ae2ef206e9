"""What the runtimes' own tools print, read into figures. A figure that was not printed is None; none is worked out from others.

Formats of ExecuTorch's `executor_runner` (examples/portable/executor_runner), TensorFlow Lite's and LiteRT's `benchmark_model`
(tflite/tools/benchmark; `benchmark_litert_model` prints the same) and LiteRT's `run_model` (litert/tools).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MB = 1 << 20


@dataclass(frozen=True)
class Operator:
    """One row of a tool's own profile."""

    name: str
    op: str
    mean_s: float
    delegate: bool = False  # a step inside a delegate, which has a row of its own


@dataclass(frozen=True)
class Told:
    """What one run of a tool told."""

    load_s: float | None = None  # program and method, or "Init"
    first_s: float | None = None
    samples_s: tuple[float, ...] = ()  # every call, in order, where each was printed
    calls: int | None = None  # that the figures below are of
    mean_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    std_s: float | None = None
    p5_s: float | None = None
    p50_s: float | None = None
    p95_s: float | None = None
    warmup_calls: int | None = None
    warmup_mean_s: float | None = None
    load_bytes: int | None = None  # what the process grew by while it loaded
    all_bytes: int | None = None  # and until the end
    peak_bytes: int | None = None  # of the process
    operators: tuple[Operator, ...] = ()


def _number(pattern: str, text: str) -> float | None:
    found = re.search(pattern, text)
    return float(found[1]) if found else None


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


_FLOAT = r"(\d{1,18}(?:\.\d+)?(?:e[+-]?\d{1,2})?)"
_ITERATION = re.compile(r"Iteration (\d{1,18}) of (\d{1,18}): " + _FLOAT + " ms")
_EXECUTED = re.compile(r"Model executed successfully (\d{1,18}) time\(s\) in " + _FLOAT + " ms")


def executor_runner(text: str) -> Told:
    """Its log, from stderr or logcat. Older ones print no time of a single call, the oldest no time at all."""
    found = [(int(m[1]), int(m[2]), float(m[3]) / 1e3) for m in _ITERATION.finditer(text)]
    whole = bool(found) and len(found) == found[0][1] and all(n == i for i, (n, _, _) in enumerate(found, 1))  # logcat may drop lines
    samples = tuple(s for _, _, s in found) if whole else ()
    total = _EXECUTED.search(text)
    calls = int(total[1]) if total else None
    return Told(
        load_s=_scaled(_number(r"Model loaded in " + _FLOAT + " ms", text), 1e-3),
        first_s=samples[0] if samples else None,
        samples_s=samples,
        calls=calls,
        mean_s=float(total[2]) / 1e3 / calls if total and calls else None,
    )


_STATISTICS = re.compile(r"(?:^|\s)count=(\d{1,18})((?: \w+=\S+)*)(\(all same\))?")
_TIMINGS = re.compile(r"nference timings in us: (.*)")


def _statistics(line: str) -> dict[str, float] | None:
    """`count=50 first=… curr=… min=… max=… avg=… std=… [p5=… median=… p95=…]` in seconds but for the count; of equal values only `curr` is printed."""
    found = _STATISTICS.search(line)
    if found is None or "(bytes)" in line or "(microseconds)" in line:
        return None
    values = {k: float(v.removesuffix("(all")) / 1e6 for k, _, v in (pair.partition("=") for pair in found[2].split()) if _is_number(v)}
    if "curr" in values and "avg" not in values and int(found[1]):
        same = values["curr"]
        values |= {"first": same, "min": same, "max": same, "avg": same, "std": 0.0}
    return {"count": float(found[1]), **values}


def _is_number(text: str) -> bool:
    return re.fullmatch(_FLOAT + r"(\(all)?", text, re.ASCII) is not None


def benchmark_model(text: str) -> Told:
    """What it logs; old ones have another last line, and no percentiles."""
    before, _, _ = text.partition("Inference timings in us")
    rows = [s for s in map(_statistics, (before if "Inference timings" in text else text).splitlines()) if s]
    main = rows[-1] if rows else {}
    warmup = rows[-2] if len(rows) > 1 else {}
    last = _TIMINGS.search(text)
    timings = (
        {k.strip(): float(v) / 1e6 for k, _, v in (p.partition(":") for p in last[1].split(",")) if _is_number(v.strip())} if last else {}
    )
    footprint = re.search(r"emory footprint (?:delta from the start of the tool )?\(MB\): init=" + _FLOAT + " overall=" + _FLOAT, text)
    peak = _number(r"Overall peak memory footprint \(MB\) via periodic monitoring: " + _FLOAT, text)
    return Told(
        load_s=timings.get("Init"),
        first_s=timings.get("First inference") or warmup.get("first"),
        calls=int(main["count"]) if main else None,
        mean_s=main.get("avg", timings.get("Inference (avg)", timings.get("Inference"))),
        min_s=main.get("min"),
        max_s=main.get("max"),
        std_s=main.get("std"),
        p5_s=main.get("p5"),
        p50_s=main.get("median"),
        p95_s=main.get("p95"),
        warmup_calls=int(warmup["count"]) if warmup else None,
        warmup_mean_s=warmup.get("avg"),
        load_bytes=int(float(footprint[1]) * MB) if footprint else None,
        all_bytes=int(float(footprint[2]) * MB) if footprint else None,
        peak_bytes=int(peak * MB) if peak else None,
        operators=_operators(text),
    )


def _operators(text: str) -> tuple[Operator, ...]:
    """The tables "Run Order" of the regular runs: the graph's, then what delegates did inside."""
    lines = text.partition("Operator-wise Profiling Info for Regular Benchmark Runs")[2].splitlines()
    if not lines:  # old ones had one table
        lines = [] if "Profiling Info for" in text else text.splitlines()
    found: list[Operator] = []
    columns: list[str] = []
    wanted = delegate = False
    for line in lines:
        if "Delegate internal" in line:
            delegate = True
        if "=====" in line:
            wanted, columns = "Run Order" in line, []
        elif wanted and "[node type]" in line:
            columns = [c.strip(" []\t") for c in line.split("\t")]
        elif columns and (row := _row(line, columns)) is not None:
            found.append(Operator(row[0], row[1], row[2], delegate))
        elif not line.strip():
            columns = []
    return tuple(found)


def _row(line: str, columns: list[str]) -> tuple[str, str, float] | None:
    fields = [f.strip() for f in line.split("\t")]
    if len(fields) != len(columns):
        return None
    cells = dict(zip(columns, fields, strict=True))
    if not _is_number(cells.get("avg ms", "")):
        return None
    return cells.get("Name", ""), cells.get("node type", ""), float(cells["avg ms"]) / 1e3


def run_model(text: str) -> Told:
    """First, slowest, fastest and mean."""

    def of(what: str) -> float | None:
        return _scaled(_number(what + r" took (?:average )?(\d{1,18}) microseconds", text), 1e-6)

    return Told(
        first_s=of("First run"),
        max_s=of("Slowest run"),
        min_s=of("Fastest run"),
        mean_s=of("All runs"),
        calls=int(n) if (n := _number(r"Run model for (\d{1,18}) times", text)) is not None else None,
    )
