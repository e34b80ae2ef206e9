"""An exported program as a model like any other: its calls of linear, convolution and embedding operators become layers again.

`torch.export` leaves operators that read parameters by name; compression, statistics of inputs and surgery look at layers. A layer takes the place
of the module that held its weight, so that names stay as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


def layered(module: GraphModule) -> GraphModule:
    """The same program, with layers. What reads something else than a parameter as its weight stays an operator."""
    import torch.fx

    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
        elif node.op == "call_function" and (layer := _layer_of(module, node)) is not None:
            x, made, path = layer
            with graph.inserting_after(node):
                call = graph.call_module(_placed(module, made, path), (x,))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    _plain_calls(graph)
    return torch.fx.GraphModule(module, graph)


def _plain_calls(graph: Any) -> None:
    """Where tensors go in and one or a tuple comes out, nothing has to be flattened at every call (and torch warns when that is copied)."""
    from torch.fx.graph import CodeGen
    from torch.utils._pytree import tree_structure

    info = getattr(graph._codegen, "pytree_info", None)
    output = graph.output_node()
    inputs = sum(node.op == "placeholder" for node in graph.nodes)
    if info is None or info.in_spec != tree_structure(((0,) * inputs, {})):
        return
    results = tuple(output.args[0])
    if info.out_spec == tree_structure(0):
        output.args = results
    elif info.out_spec == tree_structure((0,) * len(results)):
        output.args = (results,)
    else:
        return
    graph.set_codegen(CodeGen())


def _layer_of(module: GraphModule, node: Node) -> tuple[Any, Any, str] | None:
    """(input, layer, the weight's path) of an operator that a layer can stand for."""
    from torch import nn

    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    args: dict[str, Any] = {
        a.name: node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value if a.has_default_value() else None)
        for i, a in enumerate(schema.arguments)
    }
    weight, bias = (_parameter(module, args.get(name)) for name in ("weight", "bias"))
    if weight is None or (args.get("bias") is not None and bias is None):
        return None
    rows, cols = int(weight.shape[0]), int(weight.shape[1]) if weight.dim() > 1 else 0
    x, name = args.get("input"), schema.name
    layer: Any = None
    if name == "aten::linear" and weight.dim() == 2:
        layer = nn.Linear(cols, rows, bias is not None, device="meta")
    elif name == "aten::embedding" and not args["scale_grad_by_freq"] and not args["sparse"]:
        x, layer = args["indices"], nn.Embedding(rows, cols, None if args["padding_idx"] < 0 else args["padding_idx"], device="meta")
    elif name in ("aten::conv1d", "aten::conv2d") or (name == "aten::convolution" and not args["transposed"] and weight.dim() in (3, 4)):
        kind = nn.Conv1d if weight.dim() == 3 else nn.Conv2d
        padding = args["padding"] if isinstance(args["padding"], str) else tuple(args["padding"])
        stride, dilation = tuple(args["stride"]), tuple(args["dilation"])
        size, groups = tuple(weight.shape[2:]), args["groups"]
        layer = kind(cols * groups, rows, size, stride, padding, dilation, groups, bias is not None, device="meta")
    if layer is None:
        return None
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return x, layer.train(module.training), str(args["weight"].target)


def _parameter(module: GraphModule, node: Any) -> Any:
    """The parameter that a node reads, or None."""
    from torch import nn
    from torch.fx import Node

    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    found: Any = module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found if isinstance(found, nn.Parameter) and found.is_floating_point() else None


def _placed(module: GraphModule, layer: Any, path: str) -> str:
    """Where a layer is put: in place of what held nothing but its weight and bias; where that is another layer by now, or holds more, beside it."""
    owner, _, tensor = path.rpartition(".")
    held = module.get_submodule(owner)
    own = dict(held.named_parameters(recurse=False))
    bias = getattr(layer, "bias", None)
    if _same(held, layer):
        return owner
    plain = owner and tensor == "weight" and not list(held.children()) and not list(held.buffers(recurse=False))
    if plain and hasattr(held, "forward") and not _is_layer(held) and own.keys() <= {"weight", "bias"} and own.get("bias") is bias:
        module.set_submodule(owner, layer)
        return owner
    name, number = f"{path.replace('.', '_')}_{type(layer).__name__.lower()}", 1
    while hasattr(module, name) and not _same(getattr(module, name), layer):
        name, number = f"{name.rstrip('0123456789')}{number}", number + 1
    setattr(module, name, layer)
    return name


def _is_layer(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding)


def _same(one: Any, other: Any) -> bool:
    """The same parameters and settings: a layer that is called twice is one layer."""
    if type(one) is not type(other) or not _is_layer(one):
        return False
    return (
        one.weight is other.weight and getattr(one, "bias", None) is getattr(other, "bias", None) and one.extra_repr() == other.extra_repr()
    )
