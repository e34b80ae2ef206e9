"""PyTorch → ModelGraph: each method through torch.export, one unit an operator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgesdk.errors import InputError
from edgesdk.graph.types import MethodGraph, Op, TensorInfo, Unit

if TYPE_CHECKING:
    import torch

    from edgesdk.model import Method

_KINDS: dict[str, Op] = {
    "linear": "linear", "addmm": "linear", "mm": "linear", "conv1d": "conv1d", "conv2d": "conv2d", "convolution": "conv2d",
    "embedding": "embedding", "matmul": "matmul", "bmm": "matmul", "scaled_dot_product_attention": "attention",
    "layer_norm": "norm", "rms_norm": "norm", "batch_norm": "norm", "group_norm": "norm", "_native_batch_norm_legit_no_training": "norm",
    "softmax": "softmax", "_softmax": "softmax", "log_softmax": "softmax",
    "gru": "recurrent", "lstm": "recurrent",
}  # fmt: skip
_ACTIVATIONS = {
    "relu",
    "relu_",
    "gelu",
    "silu",
    "silu_",
    "sigmoid",
    "tanh",
    "hardswish",
    "hardswish_",
    "hardsigmoid",
    "relu6",
    "hardtanh",
    "hardtanh_",
    "leaky_relu",
}
CACHES, CROSS = ("self_k", "self_v", "past", "kv_cache"), "cross"
"""What is in the names of inputs that are keys and values: of self-attention, of cross-attention."""
_POOLS = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "sum", "amax"}
_VIEWS = {
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "expand", "slice", "select", "t", "alias", "detach", "contiguous",
    "_to_copy", "to", "dropout", "clone", "_assert_tensor_metadata", "chunk", "split", "unflatten", "numpy_T", "getitem", "lift_fresh_copy",
}  # fmt: skip
_ALIASES = _VIEWS - {"contiguous", "clone", "_to_copy"}  # share storage with their input


def fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values with plain strides: numpy's `array[None]` gives a stride of 0, which ExecuTorch refuses."""
    import torch

    return tuple(torch.empty(t.shape, dtype=t.dtype).copy_(t) if isinstance(t, torch.Tensor) else t for t in inputs)


def export(method: Method, name: str) -> Any:
    """The exported program of a method. Raises `InputError` naming the method and the reason."""
    import torch

    try:
        with torch.no_grad():
            return torch.export.export(method.module.eval(), fresh(method.example_inputs), strict=False)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"method '{name}' cannot be exported: {reason[:200]}", "torch.export must accept it with static shapes") from None


def trace_method(method: Method, name: str) -> MethodGraph:
    """Export and cut into units. MACs are counted per call; shapes are those of the example inputs."""
    program = export(method, name)
    signature = program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    units: list[Unit] = []
    taken: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and (unit := _unit(node, weights)):
            taken[unit.name] = taken.get(unit.name, 0) + 1
            units.append(unit if taken[unit.name] == 1 else unit.model_copy(update={"name": f"{unit.name}#{taken[unit.name]}"}))
    inputs = [_info(n) for n in program.graph.nodes if n.op == "placeholder" and n.name in signature.user_inputs]
    told = getattr(method.module, "input_names", ())  # of a module that takes any number of inputs (see `sequence.export`)
    if len(told) == len(inputs):
        inputs = [i.model_copy(update={"name": n}) for i, n in zip(inputs, told, strict=True)]
    output = next(n for n in program.graph.nodes if n.op == "output")
    outputs = [_info(n) for n in output.args[0] if hasattr(n, "meta")]
    names = [i.name for i in inputs]
    return MethodGraph(
        name=name, units=tuple(units), inputs=tuple(inputs), outputs=tuple(outputs), peak_activation_bytes=_peak(program), unroll=method.unroll,
        cache_inputs=tuple(n for n in names if any(k in n for k in CACHES)), cross_cache_inputs=tuple(n for n in names if CROSS in n),
    )  # fmt: skip


def takes_caches(method: Method, program: Any) -> bool:
    """Whether inputs of an exported program are keys and values, told by their names."""
    names = (*program.graph_signature.user_inputs, *getattr(method.module, "input_names", ()))
    return any(k in str(n) for n in names for k in (*CACHES, CROSS))


def _value(node: Any) -> Any:
    value = node.meta.get("val")
    return value[0] if isinstance(value, list | tuple) and value else value


def _info(node: Any) -> TensorInfo:
    value = _value(node)
    return TensorInfo(name=node.name, shape=tuple(int(d) for d in value.shape), dtype=str(value.dtype).removeprefix("torch."))


def _elements(node: Any) -> int:
    value = _value(node)
    return int(value.numel()) if hasattr(value, "numel") else 0


def _base(node: Any) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return str(name).split(".")[0]


def _path(node: Any) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("L['self'].").replace("L['self']", "")


def _unit(node: Any, weights: dict[str, str]) -> Unit | None:
    base = _base(node)
    args = list(node.all_input_nodes)
    tensors = [a for a in args if a.name not in weights]
    params = [a for a in args if a.name in weights]
    out = _elements(node)
    if base.startswith(("sym_", "_assert", "_guard")) or (base in ("eq", "arange", "full", "zeros", "ones") and not tensors):
        return None
    kind: Op = _KINDS.get(base) or (
        "activation" if base in _ACTIVATIONS else "pool" if base in _POOLS else "reshape" if base in _VIEWS else "elementwise"
    )
    if kind == "linear" and not params:
        kind = "matmul"
    if _from_codes(node):
        kind = "quantize"
    name = _path(node) if kind in ("linear", "conv1d", "conv2d", "embedding", "norm", "recurrent") and params else node.name
    fields: dict[str, Any] = {"in_elements": sum(_elements(a) for a in tensors), "out_elements": out}
    if kind == "reshape":
        fields["in_elements"] = fields["out_elements"] = 0 if base in _ALIASES else out
    if params and kind in ("linear", "conv1d", "conv2d", "embedding", "recurrent"):
        shape = tuple(int(d) for d in _value(params[0]).shape)
        cols = math.prod(shape[1:])
        fields |= {"weight": weights[params[0].name], "weight_shape": shape, "rows": shape[0], "cols": cols}
        fields["bias_elements"] = sum(_elements(p) for p in params[1:])
        fields["macs"] = 0 if kind == "embedding" else out * cols
        if kind in ("conv1d", "conv2d"):
            groups = int(node.args[6]) if len(node.args) > 6 else 1
            kind = "depthwise_conv2d" if groups > 1 and groups == shape[0] else kind
            fields["detail"] = {"groups": groups, "kernel": shape[-1], "in_channels": shape[1] * groups}
        if kind == "recurrent":
            fields["rows"], fields["cols"] = sum(_elements(p) for p in params), 1
            fields["bias_elements"], fields["macs"] = 0, fields["rows"] * int(_value(tensors[0]).shape[-2])
        if kind == "embedding":
            fields["in_elements"] = out
    elif params:
        fields["bias_elements"] = sum(_elements(p) for p in params)
        fields["weight"] = weights[params[0].name]
    if kind == "matmul":
        fields["macs"] = out * int(_value(tensors[0]).shape[-1])
    if kind == "attention":
        q, k = _value(tensors[0]).shape, _value(tensors[1]).shape
        fields["macs"] = 2 * math.prod(int(d) for d in q) * int(k[-2])
    return Unit(name=name or node.name, op=kind, **fields)


def _from_codes(node: Any) -> bool:
    """Whether the codes of a cache, or its float16, become numbers."""
    given = node.all_input_nodes[:1]
    if _base(node) == "from_small_codes":
        return True
    return (
        _base(node) in ("to", "_to_copy") and bool(given) and str(getattr(_value(given[0]), "dtype", "")) in ("torch.int8", "torch.float16")
    )


def _root(node: Any) -> Any:
    while node.op == "call_function" and _base(node) in _ALIASES and node.all_input_nodes and not _from_codes(node):
        node = node.all_input_nodes[0]
    return node


def _peak(program: torch.export.ExportedProgram) -> int:
    """Largest sum of live intermediate bytes over the graph's order; inputs, weights and outputs are not counted."""
    nodes = list(program.graph.nodes)
    results = {_root(n) for n in nodes[-1].all_input_nodes}
    last: dict[Any, int] = {}
    for i, node in enumerate(nodes):
        for used in node.all_input_nodes:
            last[_root(used)] = i
    live = peak = 0
    ends: dict[int, int] = {}
    for i, node in enumerate(nodes):
        if node.op == "call_function" and _root(node) is node and node not in results and node in last:
            value = _value(node)
            size = _elements(node) * value.element_size() if hasattr(value, "element_size") else 0
            live += size
            ends[last[node]] = ends.get(last[node], 0) + size
        peak = max(peak, live)
        live -= ends.pop(i, 0)
    return peak
