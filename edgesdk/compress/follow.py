"""Following labels through an exported method, node by node: a rule for every operator says how its output's labels come from those of its inputs.

An operator that is not known fixes all it reads: nothing of it can be cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgesdk.compress.labels import Labels, ids_of
from edgesdk.graph.torch_trace import export

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

_MOVES = {
    "view", "reshape", "_unsafe_view", "permute", "transpose", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "slice", "select", "cat",
    "concat", "stack", "split", "split_with_sizes", "chunk", "unbind", "contiguous", "clone", "repeat", "repeat_interleave", "index_select",
    "alias", "detach", "t", "numpy_T", "movedim", "narrow", "roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "expand_as",
    "view_as", "lift_fresh", "lift_fresh_copy", "tile", "constant_pad_nd", "pad", "swapaxes", "adjoint", "matrix_H", "mT",
}  # fmt: skip
_SAME = {
    "to", "_to_copy", "type_as", "dropout", "feature_dropout", "alpha_dropout", "relu", "gelu", "silu", "tanh", "sigmoid", "hardtanh", "hardswish",
    "hardsigmoid", "leaky_relu", "elu", "selu", "celu", "neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square", "clamp", "clamp_min",
    "clamp_max", "relu6", "softplus", "mish", "erf", "sin", "cos", "reciprocal", "logical_not", "sign", "round", "floor", "ceil", "float", "half",
}  # fmt: skip
_JOINS = {
    "add", "sub", "mul", "div", "maximum", "minimum", "where", "pow", "rsub", "addcmul", "masked_fill", "eq", "ne", "lt", "gt", "ge", "le",
    "bitwise_and", "logical_and", "logical_or", "lerp", "multiply", "divide", "subtract",
}  # fmt: skip
_POOLS = {
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
    "upsample_nearest2d", "upsample_bilinear2d",
}  # fmt: skip
_REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "logsumexp"}


class Walk:
    """One exported method, node by node, with real values and labels."""

    def __init__(self, spec: ModelSpec, name: str, labels: Labels, positions: dict[int, int]) -> None:
        entry = spec.methods[name]
        self.labels, self.positions, self.unroll = labels, positions, entry.unroll
        self.values: dict[str, Any] = {}
        self.marks: dict[str, Any] = {}
        self.params: set[int] = set()
        program = export(entry, name)
        tensors = {**program.state_dict, **program.constants}
        held = {**dict(entry.module.named_parameters(remove_duplicate=False)), **dict(entry.module.named_buffers(remove_duplicate=False))}
        signature = program.graph_signature
        kinds = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        inputs = iter(entry.example_inputs)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, kinds, held, tensors, inputs)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                for out in self._flat(node.args):
                    labels.fix(out)

    def _placeholder(self, node: Any, kinds: dict[str, str], held: dict[str, Any], tensors: dict[str, Any], inputs: Any) -> None:
        import torch

        if node.name not in kinds:
            self.values[node.name], self.marks[node.name] = next(inputs), None
            return
        target = kinds[node.name]
        value = held.get(target, tensors.get(target))
        self.values[node.name], self.marks[node.name] = value, None
        if target in held and isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim():
            self.params.add(id(value))

    def _mark(self, node: Any) -> Any:
        """The labels of a node; a parameter that is used as it is has those of its last dimension of more than one element."""
        value, mark = self.values.get(node.name), self.marks.get(node.name)
        if value is None or id(value) not in self.params:
            return mark
        dims = [d for d, n in enumerate(value.shape) if n > 1]
        if not dims:
            return None
        shape = [value.shape[d] if d == dims[-1] else 1 for d in range(value.dim())]
        return self.labels.axis(value, dims[-1]).reshape(shape).expand(value.shape)

    def _flat(self, args: Any) -> list[Any]:
        import torch.fx

        found: list[Any] = []
        torch.fx.map_arg(args, lambda n: found.append(self._mark(n)))
        return [f for f in found if f is not None and not isinstance(f, tuple)]

    def _real(self, args: Any) -> Any:
        import torch.fx

        return torch.fx.map_arg(args, lambda n: self.values[n.name])

    def _call(self, node: Any) -> None:
        import torch

        with torch.no_grad():
            value = node.target(*self._real(node.args), **self._real(node.kwargs))
        self.values[node.name] = value
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        rule: Callable[[Any, Any], Any] | None = getattr(self, "_on_" + _rule_of(name), None)
        known = self._flat((node.args, node.kwargs))
        if rule is not None and (known or name in ("linear", "conv1d", "conv2d", "embedding", "getitem")):
            self.marks[node.name] = rule(node, value)
            return
        for mark in known:
            self.labels.fix(mark)
        for source in node.all_input_nodes:  # a weight that an unknown operator reads
            held = self.values[source.name]
            if id(held) in self.params:
                for dim in range(held.dim()):
                    self.labels.fix(self.labels.axis(held, dim))
        self.marks[node.name] = None

    def _input(self, node: Any, i: int = 0) -> Any:
        import torch

        if len(node.args) <= i or not isinstance(node.args[i], torch.fx.Node):
            return None
        return self._mark(node.args[i])

    # ---- rules: (node, real output) → labels of the output

    def _on_getitem(self, node: Any, value: Any) -> Any:
        mark = self.marks.get(node.args[0].name)
        return mark[node.args[1]] if isinstance(mark, tuple | list) else None

    def _on_move(self, node: Any, value: Any) -> Any:
        import torch
        import torch.fx

        def marked(n: Any) -> Any:
            mark, real = self._mark(n), self.values[n.name]
            if mark is None and isinstance(real, torch.Tensor):
                return torch.zeros(real.shape, dtype=torch.float64) if real.is_floating_point() else real
            return mark.to(torch.float64) if isinstance(mark, torch.Tensor) else real

        args, kwargs = torch.fx.map_arg(node.args, marked), torch.fx.map_arg(node.kwargs, marked)
        if "pad" in getattr(node.target, "__name__", "") and len(args) > 2 and isinstance(args[-1], int | float):
            args = (*args[:-1], 0.0)
        out = node.target(*args, **kwargs)
        return tuple(o.long() for o in out) if isinstance(out, tuple | list) else out.long()

    def _on_same(self, node: Any, value: Any) -> Any:
        return self._input(node)

    def _on_join(self, node: Any, value: Any) -> Any:
        import torch

        total = torch.zeros(value.shape, dtype=torch.long)
        for mark in self._flat((node.args, node.kwargs)):
            total = self.labels.join(total, mark)
        return total

    def _on_pool(self, node: Any, value: Any) -> Any:
        mark, out = self._input(node), value[0] if isinstance(value, tuple) else value
        dims = list(range(2, mark.dim()))
        top, same = self.labels.along(mark, dims)
        if not same:
            self.labels.fix(mark)
        result = top.expand(out.shape)
        return (result, None) if isinstance(value, tuple) else result

    def _on_reduction(self, node: Any, value: Any) -> Any:
        mark = self._input(node)
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [given] if isinstance(given, int) else list(given or range(mark.dim()))
        dims = [d % mark.dim() for d in dims]
        top, same = self.labels.along(mark, dims)
        if not same:  # averaged over units: what comes out belongs to none of them
            self.labels.normed |= set(ids_of(mark))
            return None
        for d in sorted(dims, reverse=True):
            top = top if value.dim() == mark.dim() else top.squeeze(d)
        return top.expand(value.shape)

    def _on_softmax(self, node: Any, value: Any) -> Any:
        mark = self._input(node)
        top, same = self.labels.along(mark, [node.args[1] % mark.dim()])
        if not same:
            self.labels.fix(mark)
            return None
        return top.expand(value.shape)

    def _on_layer_norm(self, node: Any, value: Any) -> Any:
        mark, last = self._input(node), len(node.args[1])
        _, same = self.labels.along(mark, list(range(mark.dim() - last, mark.dim())))
        if not same:
            self.labels.normed |= set(ids_of(mark))
        for i in range(2, len(node.args)):
            gain = self._input(node, i)
            mark = mark if gain is None else self.labels.join(mark, gain)
        return mark

    def _on_batch_norm(self, node: Any, value: Any) -> Any:
        mark = self._input(node)
        for i in range(1, 5):
            gain = self._input(node, i)
            if gain is not None:
                mark = self.labels.join(mark, gain.reshape(1, -1, *[1] * (mark.dim() - 2)).expand(mark.shape))
        return mark[0] if isinstance(value, tuple) and not isinstance(mark, tuple) else mark

    def _weight(self, node: Any) -> tuple[Any, Any]:
        weight = self.values[node.args[1].name]
        bias = self.values[node.args[2].name] if len(node.args) > 2 and node.args[2] is not None else None
        return weight, bias

    def _rows(self, weight: Any, bias: Any) -> Any:
        rows = self.labels.axis(weight, 0)
        return rows if bias is None else self.labels.join(rows, self.labels.axis(bias, 0))

    def _on_linear(self, node: Any, value: Any) -> Any:
        weight, bias = self._weight(node)
        rows, mark = self._rows(weight, bias), self._input(node)
        self.positions[id(weight)] = self.positions.get(id(weight), 0) + self.unroll * (value.numel() // value.shape[-1])
        cols = self.labels.axis(weight, 1)
        if id(weight) not in self.params:  # computed, or moved: not a weight that can be cut
            self.labels.fix(cols)
            self.labels.fix(rows)
        if mark is None:
            self.labels.fix(cols)
        else:
            self.labels.join(mark, cols)
            self._unlabelled(mark, cols)
        return rows.expand(value.shape)

    def _unlabelled(self, mark: Any, cols: Any) -> None:
        """Columns that read something without a label stay."""
        self.labels.fix(cols.expand(mark.shape)[mark == 0])

    def _on_conv(self, node: Any, value: Any) -> Any:
        weight, bias = self._weight(node)
        rows, mark = self._rows(weight, bias), self._input(node)
        batch = (-1,) + (1,) * (weight.dim() - 2)
        self.positions[id(weight)] = self.positions.get(id(weight), 0) + self.unroll * math.prod(value.shape[-(weight.dim() - 2) :])
        grouped = weight.shape[0] > 1 and node.args[6] if len(node.args) > 6 else 1
        cols = self.labels.axis(weight, 1)
        if grouped > 1 and weight.shape[1] == 1 and weight.shape[0] == grouped:
            if mark is not None:
                self.labels.join(mark.amax(tuple(range(mark.dim() - weight.dim() + 2, mark.dim())), keepdim=True), rows.reshape(batch))
                self.labels.join(mark, rows.reshape(batch))
            else:
                self.labels.fix(rows)
        elif grouped > 1 or mark is None:
            self.labels.fix(cols)
            if mark is not None:
                self.labels.fix(mark)
            if grouped > 1:
                self.labels.fix(rows)
        else:
            self.labels.join(mark, cols.reshape(batch))
            self._unlabelled(mark, cols.reshape(batch))
        return rows.reshape(batch).expand(value.shape)

    def _on_embedding(self, node: Any, value: Any) -> Any:
        weight = self.values[node.args[0].name]
        self.labels.fix(self.labels.axis(weight, 0))
        return self.labels.axis(weight, 1).expand(value.shape)

    def _on_matmul(self, node: Any, value: Any) -> Any:
        import torch

        a, b = self._input(node), self._input(node, 1)
        a = torch.zeros(self.values[node.args[0].name].shape, dtype=torch.long) if a is None else a
        b = torch.zeros(self.values[node.args[1].name].shape, dtype=torch.long) if b is None else b
        if a.dim() < 2 or b.dim() < 2:
            self.labels.fix(a)
            self.labels.fix(b)
            return None
        out = torch.zeros(value.shape, dtype=torch.long)
        a, b = a.expand(*value.shape[:-2], *a.shape[-2:]), b.expand(*value.shape[:-2], *b.shape[-2:])
        flat = out.reshape(-1, *value.shape[-2:])
        for i, (x, y) in enumerate(zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)):
            if bool(x.any()) and bool(y.any()):  # queries · keys, or weights · values of one head
                flat[i] = self.labels.merge(torch.cat([x.reshape(-1), y.reshape(-1)]))
                continue
            side, dim = (x, 1) if bool(x.any()) else (y, 0)
            top, same = self.labels.along(side, [dim])
            if not same:
                self.labels.fix(side)
            flat[i] = top
        return flat.reshape(value.shape)

    def _on_attention(self, node: Any, value: Any) -> Any:
        import torch

        marks = [self._input(node, i) for i in range(3)]
        if any(m is None for m in marks) or len({m.shape[:-2] for m in marks}) > 1:
            for m in marks:
                if m is not None:
                    self.labels.fix(m)
            return None
        heads = [m.reshape(-1, *m.shape[-2:]) for m in marks]
        out = torch.zeros(value.shape, dtype=torch.long).reshape(-1, *value.shape[-2:])
        for i in range(len(out)):
            out[i] = self.labels.merge(torch.cat([h[i].reshape(-1) for h in heads]))
        return out.reshape(value.shape)


def _rule_of(name: str) -> str:
    name = name.removesuffix("_") if not name.startswith("__") else name
    if name in ("linear", "embedding", "getitem", "layer_norm", "rms_norm"):
        return name.replace("rms_norm", "layer_norm")
    for rule, names in (("move", _MOVES), ("same", _SAME), ("join", _JOINS), ("pool", _POOLS), ("reduction", _REDUCTIONS)):
        if name in names:
            return rule
    others = {
        "conv1d": "conv", "conv2d": "conv", "convolution": "conv", "matmul": "matmul", "bmm": "matmul", "scaled_dot_product_attention": "attention",
        "softmax": "softmax", "_softmax": "softmax", "log_softmax": "softmax", "batch_norm": "batch_norm",
        "_native_batch_norm_legit_no_training": "batch_norm",
    }  # fmt: skip
    return others.get(name, "nothing")
