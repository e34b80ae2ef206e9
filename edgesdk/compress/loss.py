"""What compression does to a model's outputs, measured on calibration inputs without labels.

A sequence model writes whole answers, fed with the tokens of the uncompressed one, so that errors travel through its caches as they will on the
device. Of other models every method is run for itself, on its own calibration inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgesdk.compress.weights import need_data, suited_threads
from edgesdk.errors import InputError

if TYPE_CHECKING:
    import torch

    from edgesdk.compress.generated import Answers
    from edgesdk.model import ModelSpec

TOGETHER = 64
"""Samples that are run at once."""


@dataclass
class _Part:
    """Samples of one method that are run together: inputs [rows, …] each, and what a sequence model answered to them."""

    method: str
    inputs: list[torch.Tensor]
    answers: Answers | None = None


class Loss:
    """`loss(spec)`: the divergence of a compressed twin from `spec` as it was when this was made; 0 is none.

    Outputs that look like logits count by the Kullback-Leibler divergence of their softmax in nats, others by their squared error over their
    variance; the mean over samples (of answers, over their tokens) and outputs. `every`: only one in so many samples. Raises `InputError`
    without calibration data.
    """

    def __init__(self, spec: ModelSpec, most: int = 512, every: int = 1) -> None:
        from edgesdk.compress.generated import chain_of, stacked

        need_data(spec)
        assert spec.calibration is not None
        self.chain = chain_of(spec)
        given = {self.chain.first: self.chain.samples(spec)} if self.chain else {m: spec.calibration(m) for m in spec.methods}
        self.rows = {m: _distinct(rows)[:most][::every] for m, rows in given.items()}
        if not any(self.rows.values()):
            raise InputError(f"{spec.name}: its calibration function gives no inputs", "let it yield at least a few")
        alike = [(m, inputs) for m, rows in self.rows.items() for inputs in stacked(rows)]
        self.parts = [_Part(m, [x[at : at + TOGETHER] for x in inputs]) for m, inputs in alike for at in range(0, len(inputs[0]), TOGETHER)]
        self.alone: dict[str, bool] = {}
        self.wanted = {c: outs for c, outs in self._outputs(spec).items() if outs[0].is_floating_point()}
        self.soft = {c: self.chain is not None or self._is_soft(*c) for c in self.wanted}

    def _is_soft(self, method: str, output: int) -> bool:
        """Logits: their softmax is mostly sure of itself, and they are not an input's shape again (as an autoencoder's answer is)."""
        import torch

        outs = self.wanted[method, output]
        width = outs[0].shape[-1] if outs[0].dim() > 1 else 0
        same = any(x.shape == outs[0].shape[1:] for x in self.rows[method][0]) or any(o.shape[-1] != width for o in outs)
        if width < 2 or same:
            return False
        sure = torch.cat([torch.softmax(o.double(), -1).amax(-1).reshape(-1) for o in outs])
        return float(sure.mean()) > max(0.4, 2 / width)

    def __call__(self, spec: ModelSpec) -> float:
        made = self._outputs(spec)
        total, count = 0.0, 0
        for which, asked in self.wanted.items():
            rows = sum(len(a) for a in asked)
            total += rows * self._distance(self.soft[which], made[which], asked)
            count += rows
        return total / max(1, count)

    def _outputs(self, spec: ModelSpec) -> dict[tuple[str, int], list[torch.Tensor]]:
        """(method, output) → its values, [rows, …] of every part; of a sequence model, the logits [tokens, vocabulary] of its answers."""
        found: dict[tuple[str, int], list[torch.Tensor]] = {}
        for method, outs in self._run(spec):
            for i, out in enumerate(outs):
                found.setdefault((method, i), []).append(out)
        return found

    def _run(self, spec: ModelSpec) -> Iterator[tuple[str, list[torch.Tensor]]]:
        import torch

        from edgesdk.compress.generated import Calls, chain_of

        calls, chain = Calls(spec), chain_of(spec)  # its own: layers may have left
        calls.alone = self.alone
        with torch.no_grad(), suited_threads(spec):
            for part in self.parts:
                if self.chain is None or chain is None:
                    yield part.method, calls(part.method, part.inputs)
                    continue
                made = chain.answer(calls, part.inputs, forced=part.answers)
                part.answers = part.answers or made
                yield part.method, [made.logits[part.answers.valid]]

    def _distance(self, soft: bool, got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
        import torch

        if soft:
            a, b = (torch.cat([x.double().reshape(-1, x.shape[-1]) for x in xs]) for xs in (got, wanted))
            p, q = torch.log_softmax(b, -1), torch.log_softmax(a, -1)
            return float((p.exp() * (p - q)).sum(-1).mean())
        a, b = (torch.cat([x.double().reshape(-1) for x in xs]) for xs in (got, wanted))
        return float(((a - b) ** 2).mean() / (b.var(unbiased=False) + 1e-12))


def _hash(x: torch.Tensor) -> bytes:
    raw = x.detach().cpu().contiguous().numpy().tobytes()
    return hashlib.sha1(str((tuple(x.shape), x.dtype)).encode() + raw, usedforsecurity=False).digest()


def _distinct(samples: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return list({b"".join(_hash(x) for x in s): s for s in reversed(list(samples))}.values())[::-1]
