"""ModelSpec + precisions → an ExecuTorch `.pte`: XNNPACK delegates, several methods in one file that share their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from edgesdk.errors import InputError, MissingTool
from edgesdk.graph.torch_trace import fresh, takes_caches
from edgesdk.kernels.cpu import host_targets
from edgesdk.lower.inject import codes_by_module, inject
from edgesdk.lower.native_units import any_native, put_in
from edgesdk.lower.quiet import quiet, silent
from edgesdk.native.formats import is_native
from edgesdk.plan.fake_quant import samples

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

Choice = Mapping[tuple[str, str], str]
"""(method, unit name) → precision; what is absent stays fp32."""


def _module_name(unit: str) -> str:
    return unit.split("#")[0]


def refuse_unapplied(spec: ModelSpec, choice: Choice) -> None:
    """Raise `InputError` for a precision that would be dropped without a word, or differ between methods that share the weight."""
    import torch

    linear, table, any_kind = torch.nn.Linear, torch.nn.Embedding, torch.nn.Module
    kinds = {"int8-dynamic": linear, "int4-g32": linear, "int8-weight-only": table, "int8-static": any_kind, "fp32": any_kind}
    taken: dict[int, tuple[str, str]] = {}
    for (method, unit), precision in choice.items():
        module = dict(spec.methods[method].module.named_modules()).get(_module_name(unit))
        weight = getattr(module, "weight", None)
        if weight is None and precision in ("fp32", "int8-static"):
            continue
        allowed = kinds.get(precision, linear if is_native(precision) else None)
        if allowed is None or not isinstance(module, allowed):
            raise InputError(f"{method}/{unit}: {precision} cannot be applied in a .pte", "plan again, or choose --runtime litert")
        where, other = taken.setdefault(id(weight), (f"{method}/{unit}", precision))
        if other != precision:
            raise InputError(
                f"{method}/{unit}: {precision}, but {where} is {other} and is the same weight", "give a shared weight one precision"
            )


def quantized_modules(spec: ModelSpec, choice: Choice, target: str = "") -> dict[str, Any]:
    """A copy of the methods' modules with the dynamic precisions applied (weights shared by methods stay shared): they compute what the
    program does, but for the order of sums and for XNNPACK's approximation of GELU. `target`: of units on our own kernels; "" for this machine's."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    modules = copy.deepcopy({name: m.module for name, m in spec.methods.items()})
    codes = codes_by_module(spec)
    configs = {
        "int8-dynamic": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)),
        "int4-g32": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),  # type: ignore[attr-defined]
    }
    done: set[int] = set()
    for precision, config in configs.items():
        for name, module in modules.items():
            wanted = {_module_name(unit) for (method, unit), p in choice.items() if method == name and p == precision}

            def pick(m: torch.nn.Module, fqn: str, wanted: set[str] = wanted, done: set[int] = done) -> bool:
                return isinstance(m, torch.nn.Linear) and fqn in wanted and id(m) not in done

            chosen = {fqn: m for fqn, m in module.named_modules() if pick(m, fqn)}
            if chosen:
                with quiet():
                    quantize_(module, config, filter_fn=pick)
                done |= {id(m) for m in chosen.values()}
            for fqn, m in chosen.items():
                if (name, fqn) in codes:
                    inject(m.weight, codes[name, fqn], precision)
                if precision == "int4-g32":  # as XNNPACK holds them
                    m.weight.scale.copy_(m.weight.scale.to(torch.bfloat16).to(m.weight.scale.dtype))
    _round_tables(modules, choice)
    put_in(spec, modules, choice, target or host_targets()[0])
    return modules


def _round_tables(modules: dict[str, Any], choice: Choice) -> None:
    """Put an `Int8Table` where an embedding is to be one, the same in all methods that share it."""
    made: dict[int, Any] = {}
    for (method, unit), precision in choice.items():
        if precision == "int8-weight-only":
            parent, _, name = _module_name(unit).rpartition(".")
            owner = modules[method].get_submodule(parent)
            table = getattr(owner, name)
            if not isinstance(table, _table_kind()):
                made.setdefault(id(table), _table_kind()(table.weight))
                setattr(owner, name, made[id(table)])


@cache
def _table_kind() -> Any:
    """The class `Int8Table`, made when torch is there."""
    import torch

    class Int8Table(torch.nn.Module):
        """An embedding of int8 rows with a scale each, in operators that ExecuTorch has without a library of quantized ones."""

        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127.0
            self.register_buffer("table", torch.clamp(torch.round(weight / scale), -127, 127).to(torch.int8))
            self.register_buffer("scale", scale)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            look = torch.nn.functional.embedding
            return look(ids, self.table).to(torch.float32) * look(ids, self.scale)  # type: ignore[arg-type]

    return Int8Table


def _static(module: Any, spec: ModelSpec, method: str, units: set[str]) -> Any:
    """PT2E int8 (per channel) of the named units, ranges from the model's calibration data."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    inputs = fresh(spec.methods[method].example_inputs)
    config = get_symmetric_quantization_config(is_per_channel=True)
    quantizer = XNNPACKQuantizer().set_global(config)
    everything = {n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d)} <= units
    if not everything:
        quantizer.set_filter_function(_follows(units))
    prepared = prepare_pt2e(torch.export.export(module, inputs, strict=False).module(check_guards=False), quantizer)
    for sample in samples(spec, method, 64):
        prepared(*sample)
    return convert_pt2e(prepared)


def _follows(units: set[str]) -> Callable[[Any], bool]:
    """Accepts the operators of `units`, and those without weights that follow them alone (a relu, an addition of two of them):
    the quantizer's own selection by module name leaves a convolution out when a relu stands behind it."""

    def accept(node: Any) -> bool:
        if node.op != "call_function":
            return True  # an input or a weight decides nothing
        stack = node.meta.get("nn_module_stack") or {}
        weighted = any(a.op == "get_attr" for a in node.all_input_nodes)
        if weighted:
            return bool(stack) and list(stack.values())[-1][0].removeprefix("L['self'].") in units
        return bool(node.all_input_nodes) and all(accept(a) for a in node.all_input_nodes)

    return accept


def lower_executorch(
    spec: ModelSpec,
    choice: Choice,
    say: Callable[[str], None],
    delegate: str = "xnnpack",
    partitioner: list[Any] | None = None,
    target: str = "",
) -> bytes:
    """The `.pte` bytes. `delegate`: "xnnpack", "vulkan", "coreml" or "portable"; `partitioner`: another way to cut the graph for it; `target`: the
    instructions of units on our own kernels, "" for this machine's.

    Raises `MissingTool` where the SDK is absent.
    """
    try:
        with silent():
            import torch
            import torchao.quantization  # noqa: F401  (talks when it is first imported)
            from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
            from executorch.exir.passes import MemoryPlanningPass
    except ImportError:
        raise MissingTool("executorch is not installed", "pip install -c constraints.txt 'edgesdk[executorch]'") from None
    refuse_unapplied(spec, choice)
    with torch.no_grad(), quiet():
        say("quantizing")
        modules = quantized_modules(spec, choice, target)
        programs = {}
        for name, module in modules.items():
            static = {_module_name(unit) for (method, unit), p in choice.items() if method == name and p == "int8-static"}
            say(f"exporting {name}")
            ready = _static(module, spec, name, static) if static else module
            exported = torch.export.export(ready, fresh(spec.methods[name].example_inputs), strict=False)
            programs[name] = _with_strides(exported)
            if delegate == "xnnpack":
                programs[name] = _with_dequantized_caches(programs[name])
        say("lowering to .pte")
        config = EdgeCompileConfig(_check_ir_validity=False)
        lowered = to_edge_transform_and_lower(programs, partitioner=partitioner or partitioners(delegate), compile_config=config)
        # caches stay where their owner keeps them: a program that takes any has no room of its own for its inputs, and copies none
        kept = {name: takes_caches(spec.methods[name], program) for name, program in programs.items()}
        planning = {name: MemoryPlanningPass(alloc_graph_input=not kept[name]) for name in programs}
        aligned = 64 if any_native(choice.values()) else None
        backend = ExecutorchBackendConfig(memory_planning_pass=planning, constant_tensor_alignment=aligned)
        return bytes(lowered.to_executorch(backend).buffer)


def _with_strides(program: Any) -> Any:
    """`max_pool2d(x, 2)` leaves its stride out, which XNNPACK's partitioner does not expect: it is written out (stride = kernel)."""
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target) == "aten.max_pool2d.default" and len(node.args) == 2:
            node.args = (*node.args, node.args[1])
    program.graph_module.recompile()
    return program


def _with_dequantized_caches(program: Any) -> Any:
    """int8 inputs that become float32 are dequantized with a scale of 1: XNNPACK takes that into its delegate, a conversion stays outside,
    where all caches would be float at once."""
    import torch
    import torch.ao.quantization.fx._decomposed

    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target) == "aten.to.dtype" and node.args[1] == torch.float32:
            given = node.args[0]
            if given.op == "placeholder" and given.meta["val"].dtype == torch.int8:
                node.target, node.args, node.kwargs = dequantize, (given, 1.0, 0, -128, 127, torch.int8), {}
    program.graph_module.recompile()
    return program


def partitioners(delegate: str) -> list[Any]:
    """The partitioners of a delegate; imports only the one asked for."""
    if delegate == "portable":
        return []
    if delegate == "xnnpack":
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

        return [XnnpackPartitioner()]
    if delegate == "vulkan":
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

        return [VulkanPartitioner()]
    if delegate == "coreml":
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner

        return [CoreMLPartitioner()]
    hints = {
        "qnn": ("Qualcomm's AI Engine Direct SDK", "get it from Qualcomm, set QNN_SDK_ROOT, and build ExecuTorch's Qualcomm backend"),
        "cuda": ("ExecuTorch's CUDA backend", "run on the Jetson with NVIDIA's JetPack and triton installed"),
        "ethos-u": ("Arm's Vela and TOSA tools", "pip install 'executorch[ethos-u]' py-cpuinfo in an environment of its own"),
    }
    tool, hint = hints.get(delegate, (f"a delegate named '{delegate}'", "choose another --runtime"))
    raise MissingTool(f"{tool} is needed to lower for {delegate} and is not here", hint)


def memory_plan(content: bytes) -> dict[str, int]:
    """The program's own numbers, in bytes: `planned:<method>:<buffer>`, `constants`, `delegates`, `program`."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    with quiet():
        parsed = deserialize_pte_binary(content)
    program = getattr(parsed, "program", parsed)
    named = getattr(parsed, "named_data", None)
    answer = {"program": len(content)}
    for plan in program.execution_plan:
        for i, size in enumerate(plan.non_const_buffer_sizes[1:]):
            answer[f"planned:{plan.name}:{i}"] = int(size)
    answer["constants"] = sum(len(b.storage) for b in program.constant_buffer) + sum(len(b) for b in (named.buffers if named else ()))
    answer["delegates"] = sum(len(d.data) for d in program.backend_delegate_data)
    return answer
