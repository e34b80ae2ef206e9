"""Cutting units out of a model: the edits that do it, and which cuts the code of the model stands. See `cut_costs` for what each would cost and
how many go where, `refit` for making good."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgesdk.compress.dependency import Family
from edgesdk.compress.surgery import Edit, apply_edits
from edgesdk.compress.types import Step

if TYPE_CHECKING:
    import torch

    from edgesdk.model import ModelSpec


def copy_of(spec: ModelSpec) -> ModelSpec:
    """The same model with modules of its own (those that methods share stay shared)."""
    return replace(spec, methods=copy.deepcopy(spec.methods), codes=dict(spec.codes))


def module_at(spec: ModelSpec, path: str) -> Any:
    for entry in spec.methods.values():
        found = dict(entry.module.named_modules(remove_duplicate=False)).get(path)
        if found is not None:
            return found
    raise KeyError(path)


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
