"""What compression does to a model's outputs, measured on calibration inputs without labels.

Calibration gives every method's inputs for themselves. Where an input equals what another method answered to another sample (an encoder's
keys and values, a cache), the two are linked and replayed as one: errors travel as they will on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgesdk.compress.weights import need_data, suited_threads
from edgesdk.errors import InputError

if TYPE_CHECKING:
    import torch

    from edgesdk.model import ModelSpec

Link = tuple[str, int, int]
"""A method, one of its samples, one of its outputs."""


@dataclass
class _Step:
    """Samples of one method that are run together; `fed` are the inputs that other steps make: argument → (own rows, method, output, rows)."""

    method: str
    rows: list[int]
    inputs: list[torch.Tensor]  # [rows, …]
    fed: dict[int, list[tuple[list[int], str, int, list[int]]]]


class Loss:
    """`loss(spec)`: the divergence of a compressed twin from `spec` as it was when this was made; 0 is none.

    Outputs that look like logits count by the Kullback-Leibler divergence of their softmax in nats, others by their squared error over their
    variance; the mean over samples and over the outputs that no other sample takes in. Raises `InputError` without calibration data.
    """

    def __init__(self, spec: ModelSpec, most: int = 512, every: int = 1) -> None:
        import torch

        need_data(spec)
        assert spec.calibration is not None
        self.given = {m: _distinct(spec.calibration(m))[:most] for m in spec.methods}
        if not any(self.given.values()):
            raise InputError(f"{spec.name}: its calibration function gives no inputs", "let it yield at least a few")
        with torch.no_grad(), suited_threads(spec):
            answers = {m: [_outputs(spec.methods[m].module(*s)) for s in rows] for m, rows in self.given.items()}
        self._link(answers, every)
        self.wanted = {(m, o): list(outs) for m, rows in answers.items() if rows for o, outs in enumerate(zip(*rows, strict=True))}
        self.looped: set[str] = set()
        taken = {(m, o) for s in self.steps for f in s.fed.values() for _, m, o, _ in f}
        free = [c for c, outs in self.wanted.items() if outs[0].is_floating_point()]
        self.counted = [c for c in free if c not in taken] or free
        self.soft = {c: self._is_soft(*c) for c in self.counted}

    def _link(self, answers: dict[str, list[list[torch.Tensor]]], every: int) -> None:
        known: dict[bytes, list[Link]] = {}
        for method, rows in answers.items():
            for i, outs in enumerate(rows):
                for o, value in enumerate(outs):
                    key = _key(value)
                    if key:
                        known.setdefault(key, []).append((method, i, o))
        links: dict[tuple[str, int], dict[int, Link]] = {}
        shared: list[tuple[tuple[str, int], int, list[Link]]] = []  # inputs that several samples could have made, such as a mask
        for method, given in self.given.items():
            for i, sample in enumerate(given):
                makers = {a: [m for m in known.get(_key(x) or b"", []) if m[:2] != (method, i)] for a, x in enumerate(sample)}
                links[method, i] = {a: could[0] for a, could in makers.items() if len(could) == 1}
                shared += [((method, i), a, could) for a, could in makers.items() if len(could) > 1]
        depth: dict[tuple[str, int], int] = {}
        root: dict[tuple[str, int], tuple[str, int]] = {}
        for start in links:
            _settle(start, links, depth, root)
        for start, arg, could in shared:
            mine = [f for f in could if root[f[:2]] == root[start] and depth[f[:2]] < depth[start]]
            if mine:
                links[start][arg] = mine[0]
        roots = sorted(set(root.values()), key=lambda r: (list(self.given).index(r[0]), r[1]))
        kept = set(roots[::every])
        self.rows = {m: [i for i in range(len(rows)) if root[m, i] in kept] for m, rows in self.given.items()}
        self.steps: list[_Step] = []
        import torch

        for level in range(1 + max(depth.values(), default=0)):
            for method, rows_of in self.rows.items():
                alike: dict[tuple[Any, ...], list[int]] = {}
                for i in rows_of:
                    if depth[method, i] == level:
                        alike.setdefault(tuple(x.shape for x in self.given[method][i]), []).append(i)
                for now in alike.values():
                    inputs = [torch.stack(list(x)) for x in zip(*(self.given[method][i] for i in now), strict=True)]
                    self.steps.append(_Step(method, now, inputs, _fed([links[method, i] for i in now])))

    def _is_soft(self, method: str, output: int) -> bool:
        """Logits: their softmax is mostly sure of itself, and they are not an input's shape again (as an autoencoder's answer is)."""
        import torch

        outs = self.wanted[method, output]
        width = outs[0].shape[-1] if outs[0].dim() else 0
        same = any(x.shape == outs[0].shape for x in self.given[method][0]) or any(o.dim() == 0 or o.shape[-1] != width for o in outs)
        if width < 2 or same:
            return False
        sure = torch.cat([torch.softmax(o.double(), -1).amax(-1).reshape(-1) for o in outs])
        return float(sure.mean()) > max(0.4, 2 / width)

    def __call__(self, spec: ModelSpec) -> float:
        import torch

        got: dict[tuple[str, int], dict[int, torch.Tensor]] = {c: {} for c in self.wanted}
        with torch.no_grad(), suited_threads(spec):
            for step in self.steps:
                inputs = list(step.inputs)
                for arg, feeds in step.fed.items():
                    inputs[arg] = inputs[arg].clone()
                    for mine, method, output, rows in feeds:
                        inputs[arg][mine] = torch.stack([got[method, output][r] for r in rows])
                for o, value in enumerate(self._run(step, spec.methods[step.method].module, inputs)):
                    got[step.method, o].update(zip(step.rows, value, strict=True))
        total, count = 0.0, 0
        for method, output in self.counted:
            rows = self.rows[method]
            if rows:
                made, asked = got[method, output], self.wanted[method, output]
                total += len(rows) * self._distance(self.soft[method, output], [made[r] for r in rows], [asked[r] for r in rows])
                count += len(rows)
        return total / max(1, count)

    def _distance(self, soft: bool, got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
        import torch

        if soft:
            a, b = (torch.cat([x.double().reshape(-1, x.shape[-1]) for x in xs]) for xs in (got, wanted))
            p, q = torch.log_softmax(b, -1), torch.log_softmax(a, -1)
            return float((p.exp() * (p - q)).sum(-1).mean())
        a, b = (torch.cat([x.double().reshape(-1) for x in xs]) for xs in (got, wanted))
        return float(((a - b) ** 2).mean() / (b.var(unbiased=False) + 1e-12))

    def _run(self, step: _Step, module: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs [rows, …]: all samples at once where the module allows that (`torch.vmap`), else one by one."""
        import torch

        if step.method not in self.looped and len(step.rows) > 1:
            try:
                return _outputs(torch.vmap(lambda *x: module(*x), chunk_size=64, randomness="error")(*inputs))
            except (RuntimeError, ValueError, TypeError, IndexError):
                self.looped.add(step.method)
        rows = [_outputs(module(*(x[i] for x in inputs))) for i in range(len(step.rows))]
        return [torch.stack(o) for o in zip(*rows, strict=True)]


def _settle(start: tuple[str, int], links: Any, depth: dict[Any, int], root: dict[Any, Any]) -> None:
    """Depth and root of a sample and all it is fed by; a link that closes a circle is cut."""
    stack, open_ = [start], {start}
    while stack:
        at = stack[-1]
        for arg in [a for a, link in links[at].items() if link[:2] in open_ and link[:2] != at and link[:2] not in depth]:
            if links[at][arg][:2] in stack:
                del links[at][arg]
        todo = [link[:2] for link in links[at].values() if link[:2] not in depth]
        if todo:
            stack.append(todo[0])
            open_.add(todo[0])
            continue
        stack.pop()
        before = [link[:2] for link in links[at].values()]
        depth[at] = 1 + max((depth[b] for b in before), default=-1)
        root[at] = root[before[0]] if before else at


def _fed(links: Sequence[dict[int, Link]]) -> dict[int, list[tuple[list[int], str, int, list[int]]]]:
    fed: dict[int, dict[tuple[str, int], tuple[list[int], list[int]]]] = {}
    for row, mine in enumerate(links):
        for arg, (method, sample, output) in mine.items():
            here, there = fed.setdefault(arg, {}).setdefault((method, output), ([], []))
            here.append(row)
            there.append(sample)
    return {arg: [(mine, m, o, rows) for (m, o), (mine, rows) in feeds.items()] for arg, feeds in fed.items()}


def _outputs(out: Any) -> list[torch.Tensor]:
    return list(out) if isinstance(out, tuple | list) else [out]


def _key(x: torch.Tensor) -> bytes | None:
    """What a tensor is recognised by; None for whole numbers, few values and constants."""
    if not x.is_floating_point() or x.numel() < 8 or bool((x == x.reshape(-1)[0]).all()):
        return None
    return _hash(x)


def _hash(x: torch.Tensor) -> bytes:
    raw = x.detach().cpu().contiguous().numpy().tobytes()
    return hashlib.sha1(str((tuple(x.shape), x.dtype)).encode() + raw, usedforsecurity=False).digest()


def _distinct(samples: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return list({b"".join(_hash(x) for x in s): s for s in reversed(list(samples))}.values())[::-1]
