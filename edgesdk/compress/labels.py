"""Labels that go through a model's graph beside its values: which elements belong to one unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def ids_of(labels: torch.Tensor) -> list[int]:
    """The labels that occur, none left out but 0."""
    import numpy as np

    return [int(i) for i in np.unique(labels.numpy()) if i]


class Labels:
    """Labels 1, 2, … with union-find; 0 is no label. `fixed` labels cannot be cut, `normed` ones were averaged over."""

    def __init__(self) -> None:
        self.parent = [0]
        self.axes: dict[tuple[int, int], torch.Tensor] = {}
        self.fixed: set[int] = set()
        self.normed: set[int] = set()

    def axis(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        """The labels along one dimension of a parameter, the same at every use."""
        import torch

        key = (id(value), dim)
        if key not in self.axes:
            start, n = len(self.parent), value.shape[dim]
            self.parent += range(start, start + n)
            self.axes[key] = torch.arange(start, start + n)
        return self.axes[key]

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Elementwise one unit from now on, broadcast; where one has no label the other's."""
        import torch

        shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
        a, b = a.expand(shape), b.expand(shape)
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)])[:, (a != 0).reshape(-1) & (b != 0).reshape(-1)]
        for x, y in sorted(set(zip(*pairs.tolist(), strict=True))):
            self.parent[self.find(x)] = self.find(y)
        return torch.where(a != 0, a, b)

    def merge(self, labels: torch.Tensor) -> int:
        """All of these are one unit from now on; its label, or 0 where there is none."""
        found = ids_of(labels)
        for other in found[1:]:
            self.parent[self.find(other)] = self.find(found[0])
        return int(found[0]) if found else 0

    def fix(self, labels: torch.Tensor) -> None:
        self.fixed |= set(ids_of(labels))

    def canon(self, labels: torch.Tensor) -> torch.Tensor:
        import numpy as np
        import torch

        found, where = np.unique(labels.numpy(), return_inverse=True)
        return torch.tensor([self.find(int(i)) for i in found], dtype=torch.long)[torch.from_numpy(where.reshape(labels.shape))]

    def along(self, labels: torch.Tensor, dims: list[int]) -> tuple[torch.Tensor, bool]:
        """Labels with `dims` reduced to one, and whether they were the same all along (then nothing was mixed)."""
        plain = self.canon(labels)
        top, low = plain, plain
        for d in dims:
            top, low = top.amax(d, keepdim=True), low.amin(d, keepdim=True)
        return top, bool((top == low).all())
