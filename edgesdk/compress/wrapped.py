"""Modules that compression puts before a layer: rounded inputs, and inputs turned by a Kronecker product."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RoundInput(nn.Module):
    """Every row of the last dimension (every sample of an image) on 2^bits points of its own range, zero among them; `share` of the range is kept."""

    def __init__(self, bits: int, share: float, image: bool) -> None:
        super().__init__()
        self.bits, self.share, self.image = bits, share, image

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dims = list(range(1, x.dim())) if self.image else [-1]
        low = torch.amin(x, dims, keepdim=True).clamp_max(0.0) * self.share
        high = torch.amax(x, dims, keepdim=True).clamp_min(0.0) * self.share
        scale = (high - low).clamp_min(1e-12) / (2**self.bits - 1)
        zero = torch.round(-low / scale)
        points: torch.Tensor = torch.clamp(torch.round(x / scale) + zero, 0, 2**self.bits - 1) - zero
        answer: torch.Tensor = points * scale
        return answer


class Flatten(nn.Module):
    """x [..., a·b] → the rows of x / scale, as [a, b] matrices, to leftᵀ · X · right: x · (left ⊗ right)."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.eye(a)), nn.Parameter(torch.eye(b))
        self.scale = nn.Parameter(torch.ones(a * b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.left.shape[0], self.right.shape[0]
        turned = torch.matmul(self.left.transpose(0, 1), torch.matmul((x * self.scale).reshape(*x.shape[:-1], a, b), self.right))
        return turned.reshape(x.shape)


def wrap(module: Any, edit: dict[str, Any]) -> nn.Module:
    """The sequence that takes the place of a Linear or a convolution."""
    if edit["do"] == "flatten":
        first: nn.Module = Flatten(*edit["sizes"])
    else:
        first = RoundInput(edit["bits"], edit["share"], image=not isinstance(module, nn.Linear))
    return nn.Sequential(first, module).train(module.training)
