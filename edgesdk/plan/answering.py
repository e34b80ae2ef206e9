"""How often each program of a sequence model runs for one answer, on average over lengths read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgesdk.errors import InputError
from edgesdk.plan.lengths import Lengths

if TYPE_CHECKING:
    from edgesdk.graph.types import MethodGraph, ModelGraph
    from edgesdk.plan.types import Workload


def _slots(method: MethodGraph) -> int:
    return max(t.shape[-2] for t in method.inputs if t.name in method.cache_inputs)


def _source(method: MethodGraph) -> int:
    """Tokens that a method takes of the source: those its cross caches hold, else the length of its first input; 0 for a plain decode."""
    crossed = [t.shape[-2] for t in method.inputs if t.name in method.cross_cache_inputs]
    if crossed or method.cache_inputs:
        return max(crossed, default=0)
    return int(method.inputs[0].shape[-1])


def answering(graph: ModelGraph, workload: Workload) -> ModelGraph:
    """The graph with each method called as often as an answer of the workload's lengths calls it, on average.

    Of programs for several lengths each text takes the smallest that holds it; those that guess tokens, or check several at once, are not called.
    Raises `InputError` where the model writes no sequence, or holds no such lengths.
    """
    read, written = workload.read, workload.written
    if read is None and written is None:
        return graph
    decodes = [m for m in graph.methods if m.cache_inputs]
    if not decodes:
        option = f"--output-length {written}" if written else f"--input-length {read}"
        raise InputError(f"{option}: {graph.name} writes no sequence", "leave it out, or give a model with a decode method and caches")
    held = max(_slots(m) for m in decodes)
    if written and written.largest > held:
        raise InputError(
            f"--output-length {written}: the caches of {graph.name} hold {held} tokens", "ask for fewer, or export it with longer caches"
        )
    sizes = sorted({_source(m) for m in graph.methods} - {0})
    if read and sizes and read.largest > sizes[-1]:
        raise InputError(
            f"--input-length {read}: the programs of {graph.name} take {sizes[-1]} tokens", "ask for fewer, or export it for longer inputs"
        )
    caches = sorted({_slots(m) for m in decodes})
    behind = any(m.cross_cache_inputs for m in decodes)  # the source is in the encoder, not in the caches
    methods = [m.model_copy(update={"unroll": _calls(m, read, written, sizes, caches, behind)}) for m in graph.methods]
    return graph.model_copy(update={"methods": tuple(methods)})


def _calls(
    method: MethodGraph, read: Lengths | None, written: Lengths | None, sizes: list[int], caches: list[int], behind: bool
) -> float:  # fmt: skip
    """Expected calls of one method."""
    if "_x" in method.name or method.name.startswith("draft"):
        return 0.0
    source, total = _source(method), 0.0
    below = max((s for s in sizes if s < source), default=0)
    for n, share in zip(read.values, read.shares, strict=True) if read else ((source, 1.0),):
        if read and source and len(sizes) > 1 and not below < n <= source:
            continue
        if not method.cache_inputs:
            total += share * (1.0 if read else method.unroll)
        elif written is None:
            total += share * method.unroll
        else:
            first = 0 if behind or read is None or len(caches) == 1 else n
            total += share * sum(
                part * _steps(_slots(method), caches, first, w) for w, part in zip(written.values, written.shares, strict=True)
            )
    return total


def _steps(slots: int, caches: list[int], first: int, count: int) -> int:
    """Of `count` tokens behind `first`, those that are written while a cache of `slots` is the smallest that holds what is before them."""
    low = max((c for c in caches if c < slots), default=-1)
    high = slots if slots < caches[-1] else first + count
    return max(0, min(high, first + count - 1) - max(low, first - 1))
