"""Layer tables: what a network computes and moves, layer by layer, with no weights and no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Op = Literal["conv", "conv3", "gconv", "pw", "dw", "fc", "bmm", "act", "elem"]
"""conv: k×k convolution; conv3: 3×3 stride 1 (Winograd applies); gconv: grouped; pw: 1×1 or a matmul with weights over many
positions; dw: depthwise or nearly so; fc: a matmul over one position; bmm: activation × activation; act: swish, GELU, softmax,
layer norm and their like, which take an exponential or a reduction an element; elem: the rest (add, pool, copy)."""
OPS: tuple[Op, ...] = ("conv", "conv3", "gconv", "pw", "dw", "fc", "bmm", "act", "elem")


@dataclass(frozen=True)
class Layer:
    """One operator at batch 1. `weights`, `reads` and `writes` are in elements, not bytes."""

    op: Op
    macs: float
    weights: float
    reads: float
    writes: float
    channels: int = 0  # output channels, for how well the vector lanes are filled


@dataclass
class Net:
    """Builds a layer table while it follows the shape (channels, height, width)."""

    c: int
    h: int
    w: int
    layers: list[Layer] = field(default_factory=list)

    @property
    def size(self) -> float:
        return float(self.c * self.h * self.w)

    def conv(self, out: int, k: int | tuple[int, int] = 1, s: int = 1, groups: int = 1, act: bool = True, same: bool = True) -> Net:
        """A convolution (its batch norm folded, its activation fused); shape follows 'same' or 'valid' padding."""
        kh, kw = (k, k) if isinstance(k, int) else k
        reads, cin = self.size, self.c
        if same:
            self.h, self.w = -(-self.h // s), -(-self.w // s)
        else:
            self.h, self.w = (self.h - kh) // s + 1, (self.w - kw) // s + 1
        self.c = out
        weights = kh * kw * (cin // groups) * out
        op: Op = "conv"
        if groups > 1 and cin // groups <= 4:
            op = "dw"
        elif groups > 1:
            op = "gconv"
        elif kh == kw == 1:
            op = "pw"
        elif kh == kw == 3 and s == 1 and groups == 1:
            op = "conv3"
        self.layers.append(Layer(op, float(weights) * self.h * self.w, weights, reads, self.size, out))
        return self

    def dw(self, k: int = 3, s: int = 1) -> Net:
        return self.conv(self.c, k, s, groups=self.c)

    def pool(self, k: int = 2, s: int = 2, same: bool = True) -> Net:
        """Max or average pooling."""
        reads = self.size
        if same:
            self.h, self.w = -(-self.h // s), -(-self.w // s)
        else:
            self.h, self.w = (self.h - k) // s + 1, (self.w - k) // s + 1
        self.layers.append(Layer("elem", 0.0, 0.0, reads, self.size, self.c))
        return self

    def elem(self, inputs: int = 1, times: int = 1) -> Net:
        """`times` element-wise operators (add, norm, activation not fused), each reading `inputs` tensors of the shape."""
        self.layers.extend(Layer("elem", 0.0, 0.0, inputs * self.size, self.size, self.c) for _ in range(times))
        return self

    def act(self, times: int = 1) -> Net:
        """`times` activations that are not fused into the operator before (swish, GELU) or norms over channels."""
        self.layers.extend(Layer("act", 0.0, 0.0, self.size, self.size, self.c) for _ in range(times))
        return self

    def gap(self) -> Net:
        """Global average pooling."""
        self.layers.append(Layer("elem", 0.0, 0.0, self.size, float(self.c), self.c))
        self.h = self.w = 1
        return self

    def fc(self, out: int) -> Net:
        """A fully connected layer over everything."""
        n = self.size
        self.c, self.h, self.w = out, 1, 1
        self.layers.append(Layer("fc", n * out, n * out, n, float(out), out))
        return self

    def se(self, squeeze: int) -> Net:
        """Squeeze and excite: pool, two small matmuls, a scaling."""
        c, h, w = self.c, self.h, self.w
        self.gap().fc(squeeze).fc(c)
        self.c, self.h, self.w = c, h, w
        return self.elem()

    def branch(self) -> Net:
        """A net that starts at this shape and writes into the same table."""
        return Net(self.c, self.h, self.w, self.layers)

    def to(self, c: int, like: Net | None = None) -> Net:
        """Only the shape changes (a free concatenation or split)."""
        self.c = c
        if like is not None:
            self.h, self.w = like.h, like.w
        return self

    def up(self) -> Net:
        """Nearest up-sampling by two."""
        reads = self.size
        self.h, self.w = self.h * 2, self.w * 2
        self.layers.append(Layer("elem", 0.0, 0.0, reads, self.size, self.c))
        return self

    def matmul(self, tokens: int, n_in: int, n_out: int) -> Net:
        """A linear layer over `tokens` positions."""
        op: Op = "pw" if tokens > 1 else "fc"
        self.layers.append(Layer(op, float(tokens) * n_in * n_out, float(n_in) * n_out, float(tokens * n_in), float(tokens * n_out), n_out))
        return self

    def bmm(self, batch: int, m: int, k: int, n: int) -> Net:
        """`batch` products (m×k)·(k×n) of activations."""
        self.layers.append(Layer("bmm", float(batch * m * k * n), 0.0, float(batch * (m * k + k * n)), float(batch * m * n), n))
        return self

    def plain(self, elements: float, inputs: int = 1, op: Op = "act") -> Net:
        """An operator over `elements`: a softmax, norm or activation, or with "elem" an addition or a copy."""
        self.layers.append(Layer(op, 0.0, 0.0, inputs * elements, elements, 0))
        return self
