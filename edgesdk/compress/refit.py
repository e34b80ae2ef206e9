"""Linears and convolutions as matrices with their bias, second moments of what they get, and fitting them to what they gave in another model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from edgesdk.compress.shrink import module_at
from edgesdk.compress.surgery import Edit
from edgesdk.compress.types import Step
from edgesdk.compress.weights import rows_in
from edgesdk.plan.fake_quant import samples

if TYPE_CHECKING:
    import torch

    from edgesdk.model import ModelSpec


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
