"""What cutting a unit out would cost, and how many to cut where.

The cost of a unit is what the layers that read it lose when the columns that stay are refitted as well as they can be (the structured form of
Optimal Brain Surgeon): for the columns J of a unit and H the second moments of the reader's inputs, Σ_r s_r · W_rJ · ((H⁻¹)_JJ)⁻¹ · W_rJᵀ,
with s_r how much the model's outputs feel output r.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgesdk.compress.dependency import Axis, Family, Trace, holders_of
from edgesdk.compress.refit import damped, matrix_of, moments
from edgesdk.compress.shrink import module_at
from edgesdk.plan.fake_quant import samples

if TYPE_CHECKING:
    import torch

    from edgesdk.model import ModelSpec


@dataclass
class Reader:
    """A layer that reads units: its weight [rows, cols + 1] with the bias last (0 without), second moments of (inputs, 1), and row weights."""

    weight: torch.Tensor
    inverse: torch.Tensor
    felt: torch.Tensor
    columns: list[list[int]]  # unit → columns


def felt_outputs(spec: ModelSpec, modules: dict[str, Any], most: int = 16) -> dict[str, torch.Tensor]:
    """Module → how much the model's outputs feel each of its own: mean squared gradient [rows] of random projections of the outputs,
    each output scaled to a variance of 1. Backward passes, but no labels."""
    import torch

    total = {p: torch.zeros(m.weight.shape[0], dtype=torch.float64) for p, m in modules.items()}
    probes: list[tuple[str, Any]] = []
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as undo, torch.enable_grad():
        for path, module in modules.items():

            def probe(m: Any, inputs: Any, out: Any, path: str = path) -> Any:
                zero = torch.zeros_like(out, requires_grad=True)
                probes.append((path, zero))
                return out + zero

            undo.callback(module.register_forward_hook(probe).remove)
        for method, entry in spec.methods.items():
            for sample in samples(spec, method, most):
                probes.clear()
                out = entry.module(*sample)
                floats = [o for o in (out if isinstance(out, tuple | list) else (out,)) if o.is_floating_point() and o.requires_grad]
                if not floats or not probes:
                    continue
                loss = torch.stack([(o / o.detach().std(unbiased=False).clamp_min(1e-6) * torch.randn(o.shape, generator=generator)).sum()
                                    / o.numel() ** 0.5 for o in floats]).sum()  # fmt: skip
                for (path, _), g in zip(probes, torch.autograd.grad(loss, [z for _, z in probes], allow_unused=True), strict=True):
                    if g is not None:
                        rows = total[path].numel()
                        last = (
                            g.reshape(-1, rows)
                            if g.shape[-1] == rows and modules[path].weight.dim() == 2
                            else g.movedim(1, -1).reshape(-1, rows)
                        )
                        total[path] += (last.double() ** 2).mean(0)
    return total


def _reader(spec: ModelSpec, family: Family, axis: Axis, gram: torch.Tensor | None, felt: torch.Tensor) -> Reader:
    import torch

    module = module_at(spec, axis.path)
    matrix = matrix_of(module)
    kernel = module.weight[0, 0].numel()
    columns = [[i * kernel + k for i in unit[axis] for k in range(kernel)] for unit in family.units]
    if gram is None:  # no data: the input of a unit is taken to be as large as the rows that make it
        scale = torch.ones(matrix.shape[1], dtype=torch.float64)
        for unit, own in zip(family.units, columns, strict=True):
            scale[own] = _size_of_rows(spec, family, unit)
        gram = torch.diag(scale)
    if module.bias is None:  # then nothing can stand for a constant
        gram = gram.clone()
        gram[-1, :-1] = gram[:-1, -1] = 0
    return Reader(matrix, torch.linalg.inv(damped(gram)), felt, columns)


def _size_of_rows(spec: ModelSpec, family: Family, unit: dict[Axis, list[int]]) -> float:
    """The mean square of the weights of the rows that make a unit, over all layers that do, multiplied."""
    total = 1.0
    for axis in family.axes:
        if axis.dim == 0 and axis.tensor == "weight":
            weight = getattr(module_at(spec, axis.path), axis.tensor).detach().double()
            rows = weight[unit[axis]].reshape(len(unit[axis]), -1)
            total *= float((rows * rows).sum(1).mean() / (weight.reshape(len(weight), -1) ** 2).sum(1).mean().clamp_min(1e-30))
    return total


def readers_of(spec: ModelSpec, families: Sequence[Family], importance: str) -> list[list[Reader]]:
    """The readers of each family. importance: "output" weighs a reader's outputs by what the model's outputs feel of them (gradients),
    "layer" by one over their own mean square (no gradients), "magnitude" has no data at all."""
    import torch

    paths = sorted({a.path for f in families for a in f.readers})
    modules = {p: module_at(spec, p) for p in paths if hasattr(module_at(spec, p), "bias")}
    found = moments(spec, None, list(modules)) if importance != "magnitude" else {}
    felt = felt_outputs(spec, modules) if importance == "output" else {}
    answer = []
    for family in families:
        own = []
        for axis in family.readers:
            if axis.path not in modules:
                continue
            gram = found[axis.path][0] if axis.path in found else None
            rows = felt.get(axis.path)
            if rows is None:
                w = matrix_of(modules[axis.path])
                power = ((w @ gram) * w).sum() if gram is not None else (w * w).sum()
                rows = torch.full((len(w),), 1.0 / max(float(power), 1e-30), dtype=torch.float64)
            own.append(_reader(spec, family, axis, gram, rows))
        answer.append(own)
    return answer


@dataclass
class Order:
    """The units of a family from the cheapest to the dearest to cut; `error` [units + 1] is what cutting the first k costs."""

    family: Family
    gone: list[int]
    error: list[float]


def order_of(family: Family, readers: list[Reader], most: int) -> Order:
    """Cut one unit after the other (in steps of 1/64 of a large family), each time the cheapest, and refit what stays."""
    import torch

    alive, gone, error = list(range(len(family.units))), list[int](), [0.0]
    chunk = max(1, len(alive) // 512)
    while len(gone) < most:
        cost = torch.zeros(len(alive), dtype=torch.float64)
        for r in readers:
            index = torch.tensor([r.columns[u] for u in alive])
            block = r.inverse[index[:, :, None], index[:, None, :]]  # [alive, J, J]
            w = r.weight[:, index].transpose(0, 1)  # [alive, rows, J]
            cost += ((w @ torch.linalg.inv(block)) * w).sum(2) @ r.felt
        picked = [alive[i] for i in torch.argsort(cost)[: min(chunk, most - len(gone))].tolist()]
        for u in picked:
            error.append(error[-1] + max(0.0, float(cost[alive.index(u)])))
        _remove(readers, picked)
        gone += picked
        alive = [u for u in alive if u not in set(picked)]
    return Order(family, gone, error)


def _remove(readers: list[Reader], units: list[int]) -> None:
    import torch

    for r in readers:
        j = torch.tensor([c for u in units for c in r.columns[u]])
        solved = torch.linalg.solve(r.inverse[j][:, j], r.inverse[j])  # [J, cols]
        r.weight = r.weight - r.weight[:, j] @ solved
        r.inverse = r.inverse - r.inverse[:, j] @ solved
        r.weight[:, j] = 0
        r.inverse[j] = r.inverse[:, j] = 0
        r.inverse[j, j] = 1.0


def sizes(spec: ModelSpec, trace: Trace, macs: bool) -> dict[int, float]:
    """Parameter id → what an element of it counts: 1, or how often it is multiplied."""
    held = holders_of(spec)
    return {
        i: float(trace.positions.get(places[0][0], 0) if places[0][1] == "weight" else 0) if macs else 1.0 for i, places in held.items()
    }


def share_out(spec: ModelSpec, trace: Trace, orders: list[Order], ratio: float, macs: bool, multiple: int) -> list[int]:
    """How many units each family loses so that the parameters (or MACs) fall by `ratio` at the least total error: always the cut with
    the least error for what it saves, over stretches of any length. The target is met as far as families of at least one unit can."""
    worth = sizes(spec, trace, macs)
    places: dict[tuple[str, str], int] = {place: i for i, held in holders_of(spec).items() for place in held}
    shapes = {id(p): list(p.shape) for e in spec.methods.values() for p in e.module.parameters()}

    def total() -> float:
        return sum(worth.get(i, 0.0 if macs else 1.0) * _product(s) for i, s in shapes.items())

    def saved(order: Order) -> float:
        found = {(places[a.path, a.tensor], a.dim): len(i) for a, i in order.family.units[0].items() if places[a.path, a.tensor] in shapes}
        return sum(worth[i] * _product(shapes[i]) / shapes[i][dim] * n for (i, dim), n in found.items())

    wanted, taken = total() * (1 - ratio), [0] * len(orders)
    while total() > wanted + 1e-9:
        best: tuple[float, int, int] | None = None
        for f, order in enumerate(orders):
            unit = saved(order)
            step = multiple if len(order.family.units) % multiple == 0 and len(order.family.units) > multiple else 1
            longest = len(order.gone) - taken[f]
            need = -(-int(max(1.0, (total() - wanted) / max(unit, 1e-12)) + 0.999) // step) * step
            for n in range(step, min(longest, need) + 1, step):
                slope = (order.error[taken[f] + n] - order.error[taken[f]]) / max(n * unit, 1e-12)
                if unit > 0 and (best is None or slope < best[0]):
                    best = (slope, f, n)
        if best is None:
            break
        _, f, n = best
        done: set[tuple[int, int]] = set()
        for axis, index in orders[f].family.units[0].items():
            key = (places[axis.path, axis.tensor], axis.dim)
            if key[0] in shapes and key not in done:
                done.add(key)
                shapes[key[0]][axis.dim] -= n * len(index)
        taken[f] += n
    return taken


def _product(shape: list[int]) -> float:
    total = 1.0
    for n in shape:
        total *= n
    return total
