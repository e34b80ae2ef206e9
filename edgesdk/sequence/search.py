"""Layouts under one budget of parameters or memory, each sized to it, costed on a device and compared over lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import PositiveInt

from edgesdk.errors import DoesNotFit, InputError
from edgesdk.noun import Noun, Part
from edgesdk.plan.lengths import Lengths
from edgesdk.sequence.config import SequenceConfig
from edgesdk.sequence.estimate import SequenceCost, Weights, Where, cost, memory_of, places, times
from edgesdk.sequence.placement import Link, PlacementTable, placements
from edgesdk.sequence.shapes import DEFAULT_PARAMETERS, LAYOUTS, base_config, sized

Step = Callable[[str, float], None]
Metric = Literal["first token", "answer"]
Over = Literal["input", "output"]
METRICS: tuple[Metric, ...] = ("first token", "answer")
SAME_TIME = 1.02
"""Times this close are the same, as far as any prediction can tell."""
GRID = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Lengths of the curves, beside those asked for."""

_RETURN = "up to 6 points above decoder-only on average, distilled from a decoder-only teacher (Return of the Encoder, 1B and below)"
EVIDENCE: dict[str, str] = {
    "encoder-decoder 2/3": _RETURN,
    "encoder-decoder, one-layer decoder": "better than non-autoregressive translation at its speed (Deep Encoder, Shallow Decoder)",
    "encoder-ctc": "speech only: translation up to 25% better, relatively (OWSM-CTC)",
}
"""Published quality by layout; what is not here has none that we know."""


class ShapeRow(Part):
    """A layout as it would run at its best runtime; `refused` says why it cannot, and then there is no cost."""

    layout: str
    config: SequenceConfig
    parameters: int
    runtime: str | None = None
    fits: bool = False
    cost: SequenceCost | None = None
    refused: str | None = None
    evidence: str | None = None  # published quality, never computed


class Crossover(Part):
    """From `at` tokens on `by` is faster than `of`; the other length stays at `fixed`."""

    metric: Metric
    over: Over
    at: PositiveInt
    by: str
    of: str
    fixed: PositiveInt
    leads: bool  # `by` is the fastest of all from here on


class Curve(Part):
    """Seconds of a layout at each of a table's lengths; None where it cannot do them."""

    layout: str
    metric: Metric
    seconds: tuple[float | None, ...]


class LayoutSearch(Noun):
    """`rows` in order of the expected time of an answer, those that fit first."""

    KIND: ClassVar[str] = "layout-search"

    device: str
    weights: Weights
    cache_bits: int = 32
    threads: PositiveInt
    batch: PositiveInt
    input_length: Lengths
    output_length: Lengths
    parameters: int | None
    memory_bytes: int
    power_mode: str | None
    rows: tuple[ShapeRow, ...]
    lengths: tuple[int, ...]  # of the curves, tokens read
    curves: tuple[Curve, ...]
    crossovers: tuple[Crossover, ...]
    notes: tuple[str, ...]
    placements: tuple[PlacementTable, ...] = ()  # where asked for: of each encoder-decoder, at the mean lengths

    @property
    def best(self) -> ShapeRow:
        return self.rows[0]


def search(
    device: str, *, parameters: int | None = None, memory: int | None = None, base: SequenceConfig | None = None, dim: int | None = None,
    vocab: int = 32128, input_length: Lengths, output_length: Lengths, batch: int = 1, weights: Weights = "int8",
    runtime: str | None = None, threads: int | None = None, cache_bits: int = 32, step: Step | None = None,
) -> LayoutSearch:  # fmt: skip
    """Cost every layout on `device`; the fastest that fits comes first.

    `parameters` sizes each layout; without them the `memory` does (the largest of each that fits it); with both, what does not fit says so.
    `base` gives the widths; without it they follow from the parameters and `dim`, as in the published comparison.
    Raises `InputError`, `UnknownName`, and `DoesNotFit` where memory holds no layout at all.
    """
    from edgesdk.devices import load_device

    profile, step = load_device(device), step or (lambda text, share: None)
    where = places(profile, weights, runtime, threads, cache_bits)
    limit = memory or profile.usable_bytes
    if base is not None and base.sound is not None:
        raise InputError("--config: a model of sound", "give a configuration that reads tokens")
    if parameters is None and memory is None:
        parameters = base.parameters if base else DEFAULT_PARAMETERS
    task = Task(input_length, output_length, batch)
    rows, left_out = [], []
    for i, name in enumerate(LAYOUTS):
        step(name, 0.5 * i / len(LAYOUTS))
        try:
            rows.append(_row(name, _config(name, base, parameters, limit, where, task, dim, vocab), where, task, limit))
        except (InputError, DoesNotFit) as error:
            left_out.append((name, error))
    if not rows:
        raise left_out[0][1]
    rows.sort(key=lambda r: (r.cost is None, not r.fits, r.cost.answer.mean.value if r.cost else 0.0))
    table = Curves(tuple(r for r in rows if r.cost is not None), where, task, step)
    return LayoutSearch(
        device=profile.name, weights=weights, cache_bits=cache_bits, threads=where[0].threads, batch=batch, input_length=input_length, output_length=output_length,
        parameters=parameters, memory_bytes=limit, power_mode=profile.default_power_mode, rows=tuple(rows), lengths=table.lengths,
        curves=table.curves(), crossovers=table.crossovers(), notes=_notes(where, rows) + tuple(f"left out: {name} ({error.what})" for name, error in left_out),
    )  # fmt: skip


class Task:
    """What is to be done: the lengths read and written, the texts at once."""

    def __init__(self, source: Lengths, output: Lengths, batch: int) -> None:
        self.source, self.output, self.batch = source, output, batch


def _config(
    name: str, base: SequenceConfig | None, parameters: int | None, limit: int, where: Sequence[Where], task: Task, dim: int | None, vocab: int
) -> SequenceConfig:  # fmt: skip
    if parameters is not None:
        return sized(name, base or base_config(parameters, dim, vocab), parameters)
    return _to_memory(name, base, where, limit, task, dim, vocab)


def _to_memory(
    name: str, base: SequenceConfig | None, where: Sequence[Where], memory: int, task: Task, dim: int | None, vocab: int
) -> SequenceConfig:  # fmt: skip
    """The largest of a layout whose programs fit `memory` bytes. Raises `DoesNotFit` where none does."""
    low, high, found = 10_000, 2 * memory, None
    while high > low * 1.01:
        middle = round((low * high) ** 0.5)
        try:
            config = sized(name, base or base_config(middle, dim, vocab), middle)
        except InputError:  # too small for its width or its vocabulary
            low = middle
            continue
        peak = min(memory_of(config, w, task.batch, [task.source.largest], task.output.largest).peak_bytes for w in where)
        low, high, found = (middle, high, config) if peak <= memory else (low, middle, found)
    if found is None:
        raise DoesNotFit(f"--memory {memory}: not the smallest {name} fits", "allow more memory, or give a smaller --vocab or --dim")
    return found


def _row(name: str, config: SequenceConfig, where: Sequence[Where], task: Task, limit: int) -> ShapeRow:
    """At the runtime where it fits and answers fastest; of equally fast ones, where it takes the least memory."""
    row = ShapeRow(layout=name, config=config, parameters=config.parameters, evidence=EVIDENCE.get(name))
    try:
        made = [(w, cost(config, w, task.source, task.output, batch=task.batch)) for w in where]
    except InputError as error:
        return row.model_copy(update={"refused": error.what})
    made = [m for m in made if m[1].memory.peak_bytes <= limit] or made
    fastest = min(c.answer.mean.value for _, c in made)
    at, best = min((m for m in made if m[1].answer.mean.value <= SAME_TIME * fastest), key=lambda m: m[1].memory.peak_bytes)
    return row.model_copy(update={"runtime": at.runtime, "fits": best.memory.peak_bytes <= limit, "cost": best})


class Curves:
    """Times of the rows over lengths, each with programs of exactly that length, and where they cross."""

    def __init__(self, rows: tuple[ShapeRow, ...], where: Sequence[Where], task: Task, step: Step) -> None:
        self.rows, self.task, self.step = rows, task, step
        self.where = {w.runtime: w for w in where}
        self.fixed = {"input": round(task.source.mean), "output": round(task.output.mean)}
        self.lengths = tuple(sorted({*GRID, self.fixed["input"]}))
        self.known: dict[tuple[str, int, int], tuple[float, float]] = {}

    def seconds(self, row: ShapeRow, metric: Metric, read: int, written: int) -> float:
        """Of one answer or of its first token; infinite where the layout cannot do it."""
        key = (row.layout, read, written)
        if key not in self.known:
            try:
                first, whole = times(row.config, self.where[row.runtime or ""], read, written, self.task.batch)
                self.known[key] = first.value, whole.value
            except InputError:
                self.known[key] = math.inf, math.inf
        return self.known[key][METRICS.index(metric)]

    def curves(self) -> tuple[Curve, ...]:
        found = []
        for i, row in enumerate(self.rows):
            self.step(f"{row.layout} over lengths", 0.5 + 0.5 * i / len(self.rows))
            for metric in METRICS:
                seconds = [self.seconds(row, metric, n, self.fixed["output"]) for n in self.lengths]
                found.append(Curve(layout=row.layout, metric=metric, seconds=tuple(s if s < math.inf else None for s in seconds)))
        return tuple(found)

    def crossovers(self) -> tuple[Crossover, ...]:
        """Where the fastest layout changes, and where any layout passes decoder-only, over each length with the other one held."""
        over: tuple[tuple[Metric, Over], ...] = (("first token", "input"), ("answer", "input"), ("answer", "output"))
        return tuple(c for metric, length in over for c in self._crossings(metric, length))

    def _crossings(self, metric: Metric, over: Over) -> list[Crossover]:
        other = self.fixed["output" if over == "input" else "input"]
        grid = sorted({*GRID, self.fixed[over]})

        def at(row: ShapeRow, n: int) -> float:
            return self.seconds(row, metric, *((n, other) if over == "input" else (other, n)))

        def fastest(n: int) -> ShapeRow:
            return min(self.rows, key=lambda r: at(r, n))

        def crossing(n: int, by: ShapeRow, of: ShapeRow) -> Crossover:
            return Crossover(metric=metric, over=over, at=n, by=by.layout, of=of.layout, fixed=other, leads=fastest(n) is by)

        found = []
        for low, high in pairwise(grid):
            while (first := fastest(low)) is not fastest(high):
                low = _first_change(lambda n, first=first: fastest(n) is first, low, high)  # type: ignore[misc]
                found.append(crossing(low, fastest(low), first))
        for plain in (r for r in self.rows if r.layout == "decoder-only"):
            for row in (r for r in self.rows if r is not plain):

                def ahead(n: int, row: ShapeRow = row, plain: ShapeRow = plain) -> bool:
                    return at(row, n) < at(plain, n)

                for low, high in pairwise(grid):
                    ends = sorted((at(row, high), at(plain, high)))
                    if ahead(low) != ahead(high) and ends[1] > SAME_TIME * ends[0]:
                        n = _first_change(ahead, low, high)
                        found.append(crossing(n, row, plain) if ahead(n) else crossing(n, plain, row))
        return found


def _first_change(test: Callable[[int], bool], low: int, high: int) -> int:
    """A length above `low`, `high` at most, where `test` is no longer what it is at `low`, but is still so just below."""
    start = test(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if test(middle) == start else (low, middle)
    return high


def _notes(where: Sequence[Where], rows: Sequence[ShapeRow]) -> tuple[str, ...]:
    notes = [f"times on {w.runtime}: {w.efficiency.origin}" + (f", {w.efficiency.notes[0]}" if w.efficiency.notes else "") for w in where]
    power = next((r.cost.power_w for r in rows if r.cost), None)
    if power:
        notes.append(f"energy: {power:g} W of the power mode x time; an upper bound, not a measurement")
    return (*notes, "quality: what is published for a layout, where anything is; nothing here was trained or measured")


def placed(answer: LayoutSearch, helper: str | None = None, link: Link | None = None) -> LayoutSearch:
    """The search with every place that encoder and decoder of its layouts may have, those of the fastest layout first.

    Raises what `placements` raises, `InputError` where no layout has both, and `UnknownName` for the helper.
    """
    from edgesdk.devices import load_device

    device, other = load_device(answer.device), load_device(helper) if helper else None
    read, written = max(1, round(answer.input_length.mean)), max(1, round(answer.output_length.mean))
    tables = [
        placements(
            r.config, device, read, written, weights=answer.weights, batch=answer.batch, threads=answer.threads, helper=other, link=link, name=r.layout,
            cache_bits=answer.cache_bits,
        )
        for r in answer.rows
        if r.config.layout == "encoder-decoder" and r.cost is not None
    ]  # fmt: skip
    if not tables:
        raise InputError("none of these layouts has an encoder and a decoder", "leave --config or --buckets out")
    return answer.model_copy(update={"placements": tuple(sorted(tables, key=lambda t: t.rows[0].answer.value))})
