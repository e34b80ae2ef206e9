"""Models as graphs of units, and their exact bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgesdk.graph.types import MethodGraph, ModelGraph, TensorInfo, Unit

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

__all__ = ["MethodGraph", "ModelGraph", "TensorInfo", "Unit", "trace"]


def trace(spec: ModelSpec) -> ModelGraph:
    """The graph of `spec`, kept in the cache by its digest. Raises `InputError` when it cannot be read or exported."""
    from edgesdk import __version__
    from edgesdk.cache import cached

    return cached("graphs", f"{spec.digest[:32]}-{__version__}", ModelGraph, lambda: _trace(spec))


def _trace(spec: ModelSpec) -> ModelGraph:
    if spec.flatbuffer is not None:
        from edgesdk.graph.tflite_read import read_tflite

        methods, source = read_tflite(spec.flatbuffer), "tflite"
    else:
        from edgesdk.graph.torch_trace import trace_method

        methods, source = tuple(trace_method(m, n) for n, m in spec.methods.items()), "torch"
    left_out = ("scratch buffers inside the runtime's operators", "allocator overhead")
    return ModelGraph.check(
        {
            "name": spec.name,
            "source": source,
            "model_digest": spec.digest,
            "layout": spec.layout,
            "methods": methods,
            "not_counted": left_out,
        },
        spec.name,
    )
