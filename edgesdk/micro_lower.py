"""Lower all micro-programs at once, then cut the program into one method each.

Exporting and lowering a method costs about a second of the exporters' own work, however small it is: two dozen micro-programs lowered as branches of one
method, and cut apart afterwards, take a tenth of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from edgesdk.model import Method, ModelSpec


def groups(links: Iterable[Sequence[Hashable]]) -> dict[Hashable, Hashable]:
    """Item → the item that stands for all those it is linked with, directly or through others."""
    parent: dict[Hashable, Hashable] = {}

    def find(x: Hashable) -> Hashable:
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for link in links:
        for other in link[1:]:
            parent[find(other)] = find(link[0])
        if link:
            find(link[0])
    return {x: find(x) for x in list(parent)}


def combined(spec: ModelSpec, branches: Sequence[str]) -> ModelSpec:
    """One method, `forward`, that runs the methods `branches` side by side: all their inputs, all their outputs. A name may come twice."""
    import torch

    counts = [len(spec.methods[b].example_inputs) for b in branches]

    class Parts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList([copy.deepcopy(spec.methods[b].module) for b in branches])

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            left = iter(inputs)
            outputs: list[torch.Tensor] = []
            for part, count in zip(self.parts, counts, strict=True):
                made = part(*(next(left) for _ in range(count)))
                outputs += made if isinstance(made, tuple) else [made]
            return tuple(outputs)

    example = tuple(x for b in branches for x in spec.methods[b].example_inputs)
    method = Method(Parts().eval().requires_grad_(False), example)
    return ModelSpec(name=spec.name, digest=spec.digest, methods={"forward": method}, calibration=lambda _: [example] * 2)


def ends_of(spec: ModelSpec, branches: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The branch of every input and of every output of what `combined` makes; `branches` maps a branch's name to its method."""
    inputs: list[str] = []
    outputs: list[str] = []
    for name, method in branches.items():
        made = spec.methods[method].module(*spec.methods[method].example_inputs)
        inputs += [name] * len(spec.methods[method].example_inputs)
        outputs += [name] * (len(made) if isinstance(made, tuple) else 1)
    return inputs, outputs


def lower_executorch_parts(spec: ModelSpec, branches: Mapping[str, tuple[str, Mapping[str, str]]], say: Callable[[str], None]) -> bytes:
    """A `.pte` with one method a branch: `branches` maps its name to (method of `spec`, unit → precision)."""
    from edgesdk.lower.executorch import lower_executorch

    whole = combined(spec, [method for method, _ in branches.values()])
    choice: dict[tuple[str, str], str] = {}
    for i, (_, units) in enumerate(branches.values()):
        choice.update({("forward", f"parts.{i}.{u}"): p for u, p in units.items()})
    inputs, outputs = ends_of(spec, {name: method for name, (method, _) in branches.items()})
    return cut_pte(lower_executorch(whole, choice, say, partitioner=[one_partition_a_branch(inputs)]), outputs)


def one_partition_a_branch(inputs: Sequence[str]) -> Any:
    """XNNPACK's partitioner, with the partitions split so that none holds operators of two branches. `inputs`: the branch of each input."""
    number = {name: i for i, name in enumerate(dict.fromkeys(inputs))}
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    class Split(XnnpackPartitioner):  # type: ignore[misc]
        def partition(self, exported_program: Any) -> Any:
            result = super().partition(exported_program)
            nodes = list(exported_program.graph.nodes)
            ends = exported_program.graph_signature.user_inputs
            at = {name: number[branch] for name, branch in zip(ends, inputs, strict=True)}
            branch = {n: at[n.name] for n in nodes if n.op == "placeholder" and n.name in at}
            for node in nodes:
                known = [branch[a] for a in node.all_input_nodes if a in branch]
                if known:
                    branch[node] = known[0]
            for node in reversed(nodes):  # weights, and what is made of weights alone, go with their user
                known = [branch[u] for u in node.users if u in branch]
                if node not in branch and known:
                    branch[node] = known[0]
            tags = {}
            for node in nodes:
                tag = node.meta.get("delegation_tag")
                if tag:
                    node.meta["delegation_tag"] = f"{tag}-{branch[node]}"
                    tags[node.meta["delegation_tag"]] = result.partition_tags[tag]
            result.partition_tags = tags
            return result

    return Split()


def cut_pte(content: bytes, names: Sequence[str]) -> bytes:
    """The only method of a `.pte` as one method a name; `names` says which each output belongs to. It keeps the instructions these hang on."""
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
    from executorch.exir.schema import Chain, DelegateCall, Tensor

    file = deserialize_pte_binary(content)
    (whole,) = file.program.execution_plan
    planned = {i for i, v in enumerate(whole.values) if isinstance(v.val, Tensor) and v.val.allocation_info is not None}
    calls = [(c, [a for a in c.instr_args.args if a in planned]) for c in whole.chains[0].instructions]
    ends = _by_name(names, whole.outputs)
    group = groups([used for _, used in calls] + [(i,) for i in whole.inputs] + list(ends.values()))
    plans = []
    for name, outputs in ends.items():
        mine = [copy.deepcopy(c) for c, used in calls if group[used[0]] == group[outputs[0]]]
        kept = [c.instr_args.delegate_index for c in mine if isinstance(c.instr_args, DelegateCall)]
        for call in mine:
            if isinstance(call.instr_args, DelegateCall):
                call.instr_args.delegate_index = kept.index(call.instr_args.delegate_index)
        inputs = [i for i in whole.inputs if group[i] == group[outputs[0]]]
        plan = copy.copy(whole)
        plan.name, plan.inputs, plan.outputs = name, inputs, outputs
        plan.chains = [Chain(inputs=[], outputs=[], instructions=mine, stacktrace=None)]
        plan.delegates = [whole.delegates[i] for i in kept]
        plans.append(plan)
    file.program.execution_plan = plans
    return bytes(serialize_pte_binary(file, extract_delegate_segments=True, segment_alignment=128))


def _by_name(names: Sequence[str], outputs: Sequence[int]) -> dict[str, list[int]]:
    """Name → its outputs, in order."""
    found: dict[str, list[int]] = {}
    for name, output in zip(names, outputs, strict=True):
        found.setdefault(name, []).append(output)
    return found


def lower_litert_parts(spec: ModelSpec) -> bytes:
    """A float `.tflite` with one signature a method of `spec`."""
    from edgesdk.lower.litert import convert_float

    return cut_tflite(convert_float(combined(spec, list(spec.methods))), ends_of(spec, {name: name for name in spec.methods})[1])


def cut_tflite(content: bytes, names: Sequence[str]) -> bytes:
    """The only signature of a `.tflite` as one signature and subgraph a name; `names` says which each output belongs to."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    (signature,), whole = model.signatureDefs, model.subgraphs[0]
    constant = {i for i, t in enumerate(whole.tensors) if (b := model.buffers[t.buffer]).data is not None or b.offset > 1}
    live = [[i for i in (*op.inputs, *op.outputs) if i >= 0 and i not in constant] for op in whole.operators]
    ends = [sorted(maps, key=lambda m: int(m.name.decode().rsplit("_", 1)[-1])) for maps in (signature.inputs, signature.outputs)]
    wanted = _by_name(names, [m.tensorIndex for m in ends[1]])
    group = groups([*live, *[(m.tensorIndex,) for m in ends[0]], *wanted.values()])
    graphs, signatures = [], []
    for number, (name, outputs) in enumerate(wanted.items()):
        mine = [copy.deepcopy(op) for op, used in zip(whole.operators, live, strict=True) if group[used[0]] == group[outputs[0]]]
        inputs = [m.tensorIndex for m in ends[0] if group[m.tensorIndex] == group[outputs[0]]]
        used = [*inputs, *dict.fromkeys(int(i) for op in mine for i in (*op.inputs, *op.outputs) if i >= 0)]
        place = {old: new for new, old in enumerate(dict.fromkeys(used))}
        graph = schema.SubGraphT()
        graph.name, graph.tensors = name, [copy.deepcopy(whole.tensors[i]) for i in place]
        for tensor in graph.tensors:  # a constant may serve several branches; the quantizer wants names that occur once
            tensor.name = f"{name}/{tensor.name.decode()}"
        for op in mine:
            op.inputs, op.outputs = [place.get(int(i), -1) for i in op.inputs], [place[int(i)] for i in op.outputs]
        graph.operators, graph.inputs, graph.outputs = mine, [place[i] for i in inputs], [place[i] for i in outputs]
        graphs.append(graph)
        made = schema.SignatureDefT()
        made.signatureKey, made.subgraphIndex = name, number if number == 0 else len(model.subgraphs) - 1 + number
        made.inputs = [_map(schema, f"args_{i}", t) for i, t in enumerate(graph.inputs)]
        made.outputs = [_map(schema, f"output_{i}", t) for i, t in enumerate(graph.outputs)]
        signatures.append(made)
    model.subgraphs = [graphs[0], *model.subgraphs[1:], *graphs[1:]]  # what refers to another subgraph still finds it
    model.signatureDefs = signatures
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _map(schema: Any, name: str, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, index
    return entry
