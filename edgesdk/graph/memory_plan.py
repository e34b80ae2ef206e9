"""A runtime's own memory plan, known before the program is built: a dry lowering for ExecuTorch, the arena for LiteRT.

Kept in the cache by model and runtime, so that planning again (or after a build, which tells the same) costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgesdk.noun import Noun

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from edgesdk.model import ModelSpec


class RuntimePlan(Noun):
    """`planned`: method → bytes the runtime sets aside for inputs, outputs and what is between its operators. `constants_bytes`: stored
    constants that belong to no unit of the graph (numbers an exporter lifts out of the code)."""

    KIND: ClassVar[str] = "runtime-memory-plan"

    runtime: str
    planned: dict[str, int]
    constants_bytes: int = 0


def _path(model_digest: str, runtime: str, static: bool) -> Path:
    from edgesdk import __version__
    from edgesdk.cache import cache_dir
    from edgesdk.runner import installed

    key = repr(("kept", model_digest, runtime, static, installed().get(runtime), __version__))
    return cache_dir("memory") / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"


def known(model_digest: str, runtime: str, precisions: Iterable[str] = ()) -> RuntimePlan | None:
    """The plan of a model on a runtime where an earlier build or dry lowering told it; None where none did.

    Dynamic int8 and int4 change nothing that is planned (XNNPACK rounds inside itself); static int8 has a plan of its own.
    """
    from edgesdk.errors import InputError

    for static in (True, False) if "int8-static" in set(precisions) else (False,):
        path = _path(model_digest, runtime, static)
        if path.exists():
            with contextlib.suppress(InputError):
                return RuntimePlan.load(path)
    return None


def remember(plan: RuntimePlan, model_digest: str, precisions: Iterable[str] = ()) -> None:
    """Keep a plan for `known`. A full disk costs time later, not the answer."""
    with contextlib.suppress(OSError):
        plan.save(_path(model_digest, plan.runtime, "int8-static" in set(precisions)))


def dry_plan(spec: ModelSpec, choice: Mapping[tuple[str, str], str] | None = None) -> RuntimePlan:
    """ExecuTorch's own memory plan of `spec`, by its own partitioner and planner, with a delegate that compiles nothing: no XNNPACK program
    is made and no weight is packed, which saves about half of the time and all of the space. Remembered.

    Raises `MissingTool` without ExecuTorch and `InputError` where the model cannot be exported.
    """
    from edgesdk.lower.executorch import lower_executorch, memory_plan

    left: dict[str, int] = {}
    sizes = memory_plan(lower_executorch(spec, choice or {}, lambda text: None, partitioner=[_dry_partitioner(left)]))
    plan = RuntimePlan(runtime="executorch", planned=per_method(sizes), constants_bytes=sizes["constants"] - sum(left.values()))
    remember(plan, spec.digest, set((choice or {}).values()))
    return plan


def per_method(sizes: Mapping[str, int]) -> dict[str, int]:
    """`lower.executorch.memory_plan`'s buffers added up by method."""
    planned: dict[str, int] = {}
    for key, size in sizes.items():
        if key.startswith("planned:"):
            method = key.split(":")[1]
            planned[method] = planned.get(method, 0) + size
    return planned


def _dry_partitioner(left: dict[str, int]) -> Any:
    """XNNPACK's partitioner with its partitions given to a delegate that stores nothing. `left` takes the bytes of the model's own weights
    that no partition holds, by name: the rest of the dry program's constants is what the exporter made."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.partitioner import DelegationSpec

    name = _dry_delegate().__name__

    class Dry(XnnpackPartitioner):  # type: ignore[misc]
        def partition(self, exported_program: Any) -> Any:
            result = super().partition(exported_program)
            result.partition_tags = {tag: DelegationSpec(name, []) for tag in result.partition_tags}
            signature = exported_program.graph_signature
            names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
            for node in exported_program.graph.nodes:
                called = names.get(node.name, "_lifted_tensor_constant")
                if (
                    node.op == "placeholder"
                    and node.users
                    and "delegation_tag" not in node.meta
                    and "_lifted_tensor_constant" not in called
                ):
                    left[called] = node.meta["val"].numel() * node.meta["val"].element_size()
            return result

    return Dry()


_DRY: list[Any] = []


def _dry_delegate() -> Any:
    """The delegate that compiles nothing; made once, as ExecuTorch finds delegates by the names of existing classes. Its name says XNNPACK:
    the planner adds 64 bytes to every buffer that XNNPACK reads, for reads past the end."""
    from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult

    if not _DRY:

        class XnnpackDryRun(BackendDetails):  # type: ignore[misc]
            @staticmethod
            def preprocess(edge_program: Any, compile_specs: Any) -> Any:
                return PreprocessResult(processed_bytes=b"")

        _DRY.append(XnnpackDryRun)
    return _DRY[0]
