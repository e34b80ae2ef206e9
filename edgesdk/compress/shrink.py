"""Cutting units out of a model: which cuts the code of the model stands, what each would cost, how many where, and making good for it.

The cost of a unit is what the layers that read it lose when the columns that stay are refitted as well as they can be (the structured form of
Optimal Brain Surgeon): for the columns J of a unit and H the second moments of the reader's inputs, Σ_r s_r · W_rJ · ((H⁻¹)_JJ)⁻¹ · W_rJᵀ,
with s_r how much the model's outputs feel output r. Afterwards the readers are fitted again to what they gave in the whole model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgesdk.compress.dependency import Axis, Family, Trace, holders_of
from edgesdk.compress.surgery import Edit, apply_edits
from edgesdk.compress.types import Step
from edgesdk.compress.weights import rows_in
from edgesdk.plan.fake_quant import samples

if TYPE_CHECKING:
    import torch

    from edgesdk.model import ModelSpec


def copy_of(spec: ModelSpec) -> ModelSpec:
    """The same model with modules of its own (those that methods share stay shared)."""
    return replace(spec, methods=copy.deepcopy(spec.methods), codes=dict(spec.codes))


def remembered(spec: ModelSpec) -> ModelSpec:
    """The same model and modules; its calibration inputs are made only once."""
    return replace(spec, calibration=functools.cache(spec.calibration)) if spec.calibration else spec


def module_at(spec: ModelSpec, path: str) -> Any:
    for entry in spec.methods.values():
        found = dict(entry.module.named_modules(remove_duplicate=False)).get(path)
        if found is not None:
            return found
    raise KeyError(path)


# ---- cutting


def edits_of(spec: ModelSpec, family: Family, kept: Sequence[int]) -> list[Edit]:
    """The edits that leave only the units `kept` of a family. One edit for each axis, over the indices that stay."""
    gone = [u for u in range(len(family.units)) if u not in set(kept)]
    edits: list[Edit] = []
    for axis in family.axes:
        lost = {i for u in gone for i in family.units[u][axis]}
        size = int(getattr(module_at(spec, axis.path), axis.tensor).shape[axis.dim])
        index = [i for i in range(size) if i not in lost]
        edits.append({"do": "keep", "path": axis.path, "tensor": axis.tensor, "dim": axis.dim, "index": index})
    edits += [{"do": "set", "path": path, "name": name, "value": each * len(kept)} for path, name, each in family.numbers]
    return edits


def mask(spec: ModelSpec, family: Family, gone: Sequence[int]) -> None:
    """Nothing reads the units `gone` any more; shapes stay."""
    import torch

    with torch.no_grad():
        for axis in family.readers:
            columns = [i for u in gone for i in family.units[u][axis]]
            module_at(spec, axis.path).weight[:, columns] = 0


def outputs(spec: ModelSpec) -> list[torch.Tensor]:
    """All float outputs of all methods for the example inputs."""
    import torch

    found: list[torch.Tensor] = []
    with torch.no_grad():
        for entry in spec.methods.values():
            out = entry.module(*entry.example_inputs)
            found += [o for o in (out if isinstance(out, tuple | list) else (out,)) if o.is_floating_point()]
    return found


def same_outputs(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 1e-4) -> bool:
    """Equal shapes and values, relative to the largest of each output."""
    return all(
        x.shape == y.shape and bool((x - y).abs().max() <= tolerance * x.abs().max().clamp_min(1e-6)) for x, y in zip(a, b, strict=True)
    )


def _numbers(spec: ModelSpec, family: Family) -> list[tuple[tuple[str, str, int], ...]]:
    """Guesses which integers the modules around a family keep of its size: none, then the counts, then the widths as well."""
    count = len(family.units)
    makers = [a for a in family.axes if a.dim == 0 and a.tensor == "weight"]
    each = len(family.units[0][makers[0]]) if makers else 1
    around = {p for a in family.axes for p in (a.path.rpartition(".")[0], a.path.rpartition(".")[0].rpartition(".")[0])}
    counts, widths = [], []
    for path in sorted(around):
        try:
            own = vars(module_at(spec, path))
        except KeyError:
            continue
        counts += [(path, n, 1) for n, v in own.items() if type(v) is int and v == count]
        widths += [(path, n, each) for n, v in own.items() if type(v) is int and v == count * each and each > 1]
    return [(), *([tuple(counts)] if counts else []), *([(*counts, *widths)] if widths else [])]


def cuttable(spec: ModelSpec, families: Sequence[Family], step: Step | None = None) -> list[Family]:
    """The families whose units really can be cut out: one is cut on a copy, which must run and give what the masked model gives."""
    answer = []
    for i, family in enumerate(families):
        if step:
            step(f"trying to cut {family.name}", i / len(families))
        masked = copy_of(spec)
        mask(masked, family, [0])
        wanted = outputs(masked)
        for numbers in _numbers(spec, family):
            attempt, trial = replace(family, numbers=numbers), copy_of(spec)
            try:
                apply_edits(trial, edits_of(trial, attempt, range(1, len(family.units))))
                got = outputs(trial)
            except (RuntimeError, ValueError, TypeError, IndexError):
                continue
            if same_outputs(wanted, got) if family.exact else all(a.shape == b.shape for a, b in zip(wanted, got, strict=True)):
                answer.append(attempt)
                break
    return answer


# ---- what units cost


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


def moments(spec: ModelSpec, teacher: ModelSpec | None, paths: Sequence[str], most: int = 64) -> dict[str, tuple[Any, Any]]:
    """Path → second moments of (inputs, 1) [cols + 1, cols + 1], and of the teacher's outputs with them [rows, cols + 1] (None without teacher).

    Both models are given the same inputs; float64, means over positions.
    """
    import torch

    sums: dict[str, list[Any]] = {}
    seen: list[tuple[str, Any]] = []
    with ExitStack() as undo, torch.no_grad():
        for path in paths:
            module = module_at(spec, path)

            def note(m: Any, inputs: Any, path: str = path) -> None:
                seen.append((path, _with_one(rows_in(m, inputs[0])[0])))

            undo.callback(module.register_forward_pre_hook(note).remove)
        wanted: list[tuple[str, Any]] = []
        for path in paths:
            if teacher is None:
                break

            def keep(m: Any, inputs: Any, out: Any, path: str = path) -> None:
                last = out if m.weight.dim() == 2 else out.movedim(1, -1)
                wanted.append((path, last.reshape(-1, last.shape[-1]).double()))

            undo.callback(module_at(teacher, path).register_forward_hook(keep).remove)
        for method, entry in spec.methods.items():
            for sample in samples(spec, method, most):
                seen.clear()
                wanted.clear()
                entry.module(*sample)
                if teacher:
                    teacher.methods[method].module(*sample)
                for i, (path, x) in enumerate(seen):
                    cross = wanted[i][1].T @ x if teacher else None
                    had = sums.setdefault(path, [0.0, 0.0, 0])
                    had[0], had[2] = had[0] + x.T @ x, had[2] + len(x)
                    had[1] = had[1] + cross if cross is not None else None
    return {p: (gram / n, cross / n if cross is not None else None) for p, (gram, cross, n) in sums.items()}


def _with_one(x: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def damped(gram: torch.Tensor, share: float = 1e-3) -> torch.Tensor:
    """With `share` of the mean of its diagonal added to the diagonal; never singular."""
    import torch

    return gram + torch.eye(len(gram), dtype=gram.dtype) * (share * float(gram.diagonal().mean()) + 1e-10)


def matrix_of(module: Any) -> torch.Tensor:
    """[rows, cols + 1] float64: the weight of a linear or convolution and its bias (0 where it has none)."""
    import torch

    weight = module.weight.detach().double().reshape(module.weight.shape[0], -1)
    bias = torch.zeros(len(weight), 1, dtype=torch.float64) if module.bias is None else module.bias.detach().double()[:, None]
    return torch.cat([weight, bias], 1)


def set_matrix(module: Any, matrix: torch.Tensor) -> None:
    """Put [rows, cols + 1] back, the bias where there is one."""
    import torch

    with torch.no_grad():
        module.weight.copy_(matrix[:, :-1].reshape(module.weight.shape))
        if module.bias is not None:
            module.bias.copy_(matrix[:, -1])


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


# ---- how many where


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


# ---- making good


Rows = dict[str, list[int]]
"""Path → which outputs of the whole model's layer are left, in their order."""


def note_rows(rows: Rows, edits: Sequence[Edit]) -> None:
    """Keep `rows` true after `edits`."""
    for edit in edits:
        if edit["do"] == "keep" and edit["tensor"] == "weight" and edit["dim"] == 0:
            before = rows.get(edit["path"])
            rows[edit["path"]] = [before[i] if before else i for i in edit["index"]]


def refit(
    spec: ModelSpec, teacher: ModelSpec, paths: Sequence[str], rows: Rows, *, most: int = 64, share: float = 1e-3, step: Step | None = None
) -> None:
    """Fit linears and convolutions, one after the other in the order they run, so that they give what they gave in the teacher:
    W ← W + (C - W·G)(G + λI)⁻¹ with G the second moments of the inputs they get now and C those of the wanted outputs with them. In place."""
    import torch

    for i, path in enumerate(running_order(spec, paths)):
        if step:
            step(f"fitting {path}", i / len(paths))
        gram, cross = moments(spec, teacher, [path], most)[path]
        module = module_at(spec, path)
        matrix = matrix_of(module)
        cross = cross[rows[path]] if path in rows else cross
        if module.bias is None:
            gram, cross = gram[:-1, :-1], cross[:, :-1]
        now = matrix[:, : gram.shape[0]]
        change = torch.linalg.solve(damped(gram, share), (cross - now @ gram).T).T
        matrix[:, : gram.shape[0]] += change
        if bool(torch.isfinite(matrix).all()):
            set_matrix(module, matrix)


def running_order(spec: ModelSpec, paths: Sequence[str]) -> list[str]:
    """The paths in the order in which the methods first run them; those that never run are left out."""
    import torch

    seen: list[str] = []
    with ExitStack() as undo, torch.no_grad():
        for path in paths:

            def note(m: Any, inputs: Any, path: str = path) -> None:
                if path not in seen:
                    seen.append(path)

            undo.callback(module_at(spec, path).register_forward_pre_hook(note).remove)
        for entry in spec.methods.values():
            entry.module(*entry.example_inputs)
    return seen
