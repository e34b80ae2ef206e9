"""How often each program of a sequence model runs for one answer, over the lengths read and written, and what answers then cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgesdk.errors import InputError
from edgesdk.plan.lengths import Lengths, quantile
from edgesdk.plan.types import Answers, Estimate, Spread

if TYPE_CHECKING:
    from edgesdk.graph.types import MethodGraph, ModelGraph
    from edgesdk.plan.types import Workload


def added(pairs: Iterable[tuple[Estimate, float]]) -> Estimate:
    """A weighted sum; bounds add up: the parts' errors are taken as fully correlated, which is the careful side."""
    held = list(pairs)
    return Estimate(**{k: sum(getattr(e, k) * by for e, by in held) for k in ("value", "low", "high")})


def spread(pairs: list[tuple[Estimate, float]]) -> Spread:
    """Of (estimate, share) pairs."""
    values = [(e.value, share) for e, share in pairs]
    return Spread(mean=added(pairs), p50=quantile(values, 0.5), p90=quantile(values, 0.9))


def _slots(method: MethodGraph) -> int:
    return max(t.shape[-2] for t in method.inputs if t.name in method.cache_inputs)


def _source(method: MethodGraph) -> int:
    """Tokens that a method takes of the source: those its cross caches hold, else those its mask or first input has; 0 for a plain decode."""
    crossed = [t.shape[-2] for t in method.inputs if t.name in method.cross_cache_inputs]
    if crossed or method.cache_inputs:
        return max(crossed, default=0)
    masks = (t for t in method.inputs if t.name == "source_mask")  # sound has two frames for a place of it
    return int(next(masks, method.inputs[0]).shape[-1])


@dataclass(frozen=True)
class Program:
    """A method by the lengths that it holds: `source` 0 where it reads none, `slots` None where it has no caches."""

    name: str
    unroll: float
    source: int
    slots: int | None


class Programs:
    """The methods of a graph that answers call; those that guess tokens, or check several at once, are left out."""

    def __init__(self, graph: ModelGraph) -> None:
        kept = [m for m in graph.methods if "_x" not in m.name and not m.name.startswith("draft")]
        self.every = [Program(m.name, m.unroll, _source(m), _slots(m) if m.cache_inputs else None) for m in kept]
        self.decodes = [p for p in self.every if p.slots is not None]
        self.inputs = tuple(sorted({p.source for p in self.every} - {0}))
        self.caches = tuple(sorted({p.slots for p in self.decodes if p.slots is not None}))
        self._behind = any(m.cross_cache_inputs for m in kept)  # the source is in the encoder, not in the caches
        self._prefills = any(m.name.startswith("prefill") for m in kept)  # which give the first token

    def _fit(self, read: int | None) -> int:
        """The source length whose programs a text takes; of an unknown one, the usual."""
        if read is not None:
            return next((s for s in self.inputs if s >= read), 0)
        return next((p.source for p in self.every if p.slots is None and p.unroll), 0)

    def calls(self, read: int | None, written: int | None) -> dict[str, float]:
        """Method → its calls for one answer. Of a length that is None, calls are the model's own."""
        fit, found = self._fit(read), {}
        for p in self.every:
            if len(self.inputs) > 1 and fit and p.source not in (0, fit):
                continue
            if p.slots is None:
                found[p.name] = 1.0 if read is not None else p.unroll
            elif written is None:
                found[p.name] = p.unroll
            else:
                first = 0 if self._behind or len(self.caches) == 1 else read or fit
                found[p.name] = float(_steps(p.slots, self.caches, first, written - self._prefills))
        return found

    def opening(self, read: int | None) -> dict[str, float]:
        """The calls until the first token is there."""
        return self.calls(read, 1)


def _steps(slots: int, caches: tuple[int, ...], first: int, count: int) -> int:
    """Of `count` tokens behind `first`, those that are written while a cache of `slots` is the smallest that holds what is before them."""
    low = max((c for c in caches if c < slots), default=-1)
    high = slots if slots < caches[-1] else first + count
    return max(0, min(high, first + count - 1) - max(low, first - 1))


def _pairs(lengths: Lengths | None) -> list[tuple[int | None, float]]:
    return list(zip(lengths.values, lengths.shares, strict=True)) if lengths else [(None, 1.0)]


def _answers(workload: Workload) -> Iterable[tuple[int | None, int | None, float]]:
    """(read, written, share of texts); the two lengths are taken as independent."""
    written = _pairs(workload.written)
    return ((n, w, share * part) for n, share in _pairs(workload.read) for w, part in written)


def answering(graph: ModelGraph, workload: Workload) -> ModelGraph:
    """The graph with each method called as often as an answer of the workload's lengths calls it, on average.

    Of programs for several lengths each text takes the smallest that holds it.
    Raises `InputError` where the model writes no sequence, or holds no such lengths.
    """
    read, written, programs = workload.read, workload.written, Programs(graph)
    if read is None and written is None:
        return graph
    if not programs.decodes:
        option = f"--output-length {written}" if written else f"--input-length {read}"
        raise InputError(f"{option}: {graph.name} writes no sequence", "leave it out, or give a model with a decode method and caches")
    if written and written.largest > (held := programs.caches[-1]):
        raise InputError(
            f"--output-length {written}: the caches of {graph.name} hold {held} tokens", "ask for fewer, or export it with longer caches"
        )
    if read and programs.inputs and read.largest > (most := programs.inputs[-1]):
        raise InputError(
            f"--input-length {read}: the programs of {graph.name} take {most} tokens", "ask for fewer, or export it for longer inputs"
        )
    total = dict.fromkeys((m.name for m in graph.methods), 0.0)
    for n, w, share in _answers(workload):
        for name, count in programs.calls(n, w).items():
            total[name] += share * count
    return graph.model_copy(update={"methods": tuple(m.model_copy(update={"unroll": total[m.name]}) for m in graph.methods)})


def answers_of(graph: ModelGraph, workload: Workload, seconds: Mapping[str, Estimate]) -> Answers | None:
    """What an answer takes, where a call of a method takes `seconds`; None of a model that keeps no caches. `graph`: of `answering`."""
    programs = Programs(graph)
    if not programs.decodes:
        return None

    def took(calls: Mapping[str, float]) -> Estimate:
        return added((seconds[name], count) for name, count in calls.items())

    steps = [(seconds[p.name], p.unroll) for p in programs.decodes]
    every = sum(count for _, count in steps) or 1.0
    return Answers(
        inputs=programs.inputs,
        caches=programs.caches,
        first_token=spread([(took(programs.opening(n)), share) for n, share in _pairs(workload.read)]),
        per_token=added((e, count / every) for e, count in steps),
        whole=spread([(took(programs.calls(n, w)), share) for n, w, share in _answers(workload)]),
    )
