"""How far a student's intermediate values are from a teacher's, for distillation. All take pooled values [samples, width], float32.

mse     squared error over the variance, through a learned linear map where the widths differ (FitNets, arXiv:1412.6550)
cka     1 - linear centred kernel alignment: compares similarities between samples, for any widths (arXiv:1905.00414)
mi      -I_alpha, a lower bound of the mutual information with a learned critic (arXiv:1905.06922), as Distiller (arXiv:2109.11105) uses it
stages  every stage gives logits of its own through a learned map, which learn the teacher's (One-for-All, arXiv:2310.19444)
The learned maps are used in training only and thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Kind = Literal["none", "mse", "cka", "mi", "stages"]
ALPHA = 0.9
GAMMA = 1.5


def pooled(x: torch.Tensor) -> torch.Tensor:
    """[samples, 1, …] of a module → [samples, width]: channels of images [.., c, h, w] and features of sequences [.., time, d] over all places."""
    if x.dim() == 5:
        return x.mean((1, 3, 4))
    if x.dim() == 4:
        return x.mean((1, 2))
    return x.reshape(len(x), -1)


class Comparison:
    """One kind of comparison over pairs of stages; `parameters` are what it learns on the way."""

    def __init__(self, kind: Kind, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], classes: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kind = kind
        self.maps: list[torch.Tensor] = []
        for s, t in zip(student, teacher, strict=True):
            a, b = pooled(s).shape[1], pooled(t).shape[1]
            out = {"mse": b if a != b else 0, "mi": b, "stages": classes}.get(kind, 0)
            self.maps.append((torch.randn(a, out, generator=generator) / a**0.5).requires_grad_(out > 0))

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [m for m in self.maps if m.numel()]

    def __call__(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        """The mean over the stages; `logits` [samples, classes] of the teacher."""
        parts = [self._one(pooled(s), pooled(t), m, logits) for s, t, m in zip(student, teacher, self.maps, strict=True)]
        return torch.stack(parts).mean()

    def _one(self, s: torch.Tensor, t: torch.Tensor, learned: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if self.kind == "stages":
            return enhanced(s @ learned, logits)
        if self.kind == "cka":
            return 1 - cka(s, t)
        if self.kind == "mi":
            return -information(s @ learned, t)
        mapped = s @ learned if learned.numel() else s
        return ((mapped - t) ** 2).mean() / (t.var(unbiased=False) + 1e-6)


def cka(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Linear centred kernel alignment of [samples, a] and [samples, b], 0 … 1."""
    x, y = x - x.mean(0), y - y.mean(0)
    k, other = x @ x.T, y @ y.T
    alike: torch.Tensor = (k * other).sum() / ((k * k).sum() * (other * other).sum()).sqrt().clamp_min(1e-12)
    return alike


def information(mapped: torch.Tensor, t: torch.Tensor, alpha: float = ALPHA) -> torch.Tensor:
    """I_alpha of pairs (row of `mapped`, row of `t`), both [samples, width]; the critic is their scaled inner product."""
    t = (t - t.mean(0)) / (t.std(0, unbiased=False) + 1e-4)
    scores = (mapped @ t.T / t.shape[1] ** 0.5).clamp(-20, 20)  # [i, j]: sample i of the student with j of the teacher
    e = scores.exp()
    base = alpha * e.mean(1) + (1 - alpha)
    n = len(e)
    other = (e / base[:, None]).sum() - (e.diagonal() / base).sum()
    bound: torch.Tensor = 1 + (scores.diagonal() - base.log()).mean() - other / max(1, n * (n - 1))
    return bound


def enhanced(s: torch.Tensor, wanted: torch.Tensor, gamma: float = GAMMA) -> torch.Tensor:
    """Cross entropy with the teacher's distribution, its first choice weighted up: weights (p + 1)^gamma - 1 for that class, p^gamma for others
    (without labels the teacher's first choice stands for the right class)."""
    p = torch.softmax(wanted, -1)
    top = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).float()
    weight = (p + top) ** gamma - top
    return -(weight * torch.log_softmax(s, -1)).sum(-1).mean()
