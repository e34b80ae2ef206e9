"""The cost law: what a case costs, given fitted parameters.

    time = Σ over layers of ((macs / (peak · efficiency))^P + (bytes / bandwidth)^P)^(1/P) + overhead an operator, + a fixed overhead

Everything fitted is the logarithm of a positive factor with a prior (mean, spread), so devices and models that no row
names fall back to physics. What a device, a runtime or a model adds to this law is in `effects.py`. All tables are flat
arrays over (case, layer), so one evaluation is a few numpy calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgesdk.predict.layers import OPS, Layer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

PARTS: tuple[str, ...] = (*OPS, "traffic", "op", "fixed")
"""What the time of a case is made of: computing by operator, waiting for memory, overhead by operator, overhead of a call."""
P = 1.5  # how far compute and traffic overlap: 1 not at all, ∞ fully


@dataclass(frozen=True)
class Case:
    """One thing to predict, in SI units, on one engine."""

    engine: str
    variant: str
    precision: str
    device: str
    model: str
    layers: tuple[Layer, ...] = field(compare=False)
    peak: float  # MAC/s of the unit at this precision and thread count, if scaling were perfect
    bandwidth: float  # bytes/s
    spread: float  # peak / one core's peak: 1 on one thread
    clock: float  # Hz; overheads scale with it on a CPU
    weight_bytes: float  # of one element
    act_bytes: float
    per: float = 1.0  # the time is divided by this (prompt tokens)
    core: str = "?"  # the kind of the fastest core

    @property
    def width(self) -> str:
        """Which arithmetic the layers run on: "float" or "integer"."""
        return "float" if self.precision in ("fp16", "fp32") else "integer"


def prior(engine: str) -> dict[str, tuple[float, float]]:
    """Name → (mean, spread) of the log of each physical parameter of an engine."""
    from math import log

    kind = engine.removeprefix("llm-").replace("ort", "cpu")
    base = {"cpu": (0.45, 1.3), "vulkan": (0.12, 0.5), "gpu": (0.35, 0.5), "npu": (0.25, 0.5)}[kind]
    out = {f"eff:{op}": (log(base[0]), 0.5) for op in OPS}
    out["eff:elem"] = (log({"cpu": 0.1, "npu": 0.005}.get(engine, 0.02)), 0.7)
    out["eff:act"] = (log({"cpu": 0.03, "npu": 0.003}.get(engine, 0.02)), 0.8)
    out["eff:gconv"] = (log(base[0] / 2), 0.5)
    out["eff:conv3"] = (log(base[1]), 0.5)
    out["eff:dw"] = (log(base[0] / (2 if engine == "cpu" else 8)), 0.7)
    out["bandwidth"] = (log(0.65), 0.2) if engine.startswith("llm") else (log(0.6), 0.4)
    if engine == "llm-cpu":
        out["eff:fc"] = (log(0.6), 0.4)
    out["acts"] = (log({"npu": 0.15, "gpu": 0.5}.get(engine, 0.5)), 0.7)
    out["op"] = (log({"cpu": 8e-6, "vulkan": 2e-5, "gpu": 8e-6, "npu": 2e-6}[kind]), 0.8)
    out["fixed"] = (log({"cpu": 5e-5, "vulkan": 3e-4, "gpu": 5e-4, "npu": 1.2e-4}[kind]), 0.8)
    out["scaling"] = (log(0.9), 0.08)
    out["lanes"] = (log(4.0 if engine == "cpu" else 24.0), 0.7)
    out["rows"] = (log(4.0 if engine == "cpu" else 30.0), 0.8)
    out["wino"] = (log(4.0), 0.6) if engine == "cpu" else (0.0, 0.2)
    for op in ("conv", "conv3", "pw", "dw"):
        out[f"int8:{op}"] = (log(0.45 if engine == "cpu" else 0.7), 0.5)
    out["int8:other"] = (log(0.5), 0.6)
    return out


class Table:
    """Many cases of one engine, laid out flat."""

    def __init__(self, cases: list[Case]) -> None:
        import numpy as np

        self.cases = cases
        counts = [len(c.layers) for c in cases]
        self.row = np.repeat(np.arange(len(cases)), counts)
        flat = [layer for c in cases for layer in c.layers]
        self.op = np.array([OPS.index(x.op) for x in flat], dtype=np.int64)
        self.macs = np.array([x.macs or x.writes for x in flat])
        weight = np.repeat([c.weight_bytes for c in cases], counts)
        act = np.repeat([c.act_bytes for c in cases], counts)
        self.weights = np.array([x.weights for x in flat]) * weight
        self.acts = np.array([x.reads + x.writes for x in flat]) * act
        self.winograd = self.op == OPS.index("conv3")
        tall = [x.macs / x.weights if x.weights and x.op != "fc" else 1e9 for x in flat]
        self.positions = np.array(tall)  # output positions of a convolution: few of them fill the unit badly
        self.channels = np.array([float(x.channels or 64) for x in flat])
        self.peak = np.array([c.peak for c in cases])
        self.band = np.array([c.bandwidth for c in cases])
        self.spread = np.log(np.array([c.spread for c in cases]))
        self.clock = np.array([2e9 / c.clock for c in cases])
        self.int8 = np.array([c.precision in ("int8", "int4", "w8a16") for c in cases])[self.row]
        self.per = np.array([c.per for c in cases])

    def parts(self, p: dict[str, float]) -> tuple[Array, Array]:
        """(log time of each case, share of that time by part) from the log parameters `p`; shares are cases × `PARTS`."""
        import numpy as np

        eff = np.array([p[f"eff:{op}"] for op in OPS])
        low = np.array([p.get(f"int8:{op}", p["int8:other"]) for op in OPS])
        rate = np.exp(eff[self.op] + np.where(self.int8, low[self.op], 0.0)) * self.channels / (self.channels + np.exp(p["lanes"]))
        rate *= self.positions / (self.positions + np.exp(p["rows"]))
        scale = self.peak * np.exp((np.exp(p["scaling"]) - 1.0) * self.spread)
        compute = (self.macs / (rate * scale[self.row])) ** P
        moved = self.weights * np.where(self.winograd, np.exp(p["wino"]), 1.0) + np.exp(p["acts"]) * self.acts
        both = compute + (moved / (np.exp(p["bandwidth"]) * self.band[self.row])) ** P
        body = both ** (1 / P)
        computed = body * compute / both
        n, k = len(self.cases), len(OPS)
        split = np.zeros((n, len(PARTS)))
        split[:, :k] = np.bincount(self.row * k + self.op, weights=computed, minlength=n * k).reshape(n, k)
        split[:, k] = np.bincount(self.row, weights=body - computed, minlength=n)
        split[:, k + 1] = np.bincount(self.row, weights=np.exp(p["op"]) * self.clock[self.row], minlength=n)
        split[:, k + 2] = np.exp(p["fixed"]) * self.clock
        total = split.sum(axis=1)
        return np.asarray(np.log(total / self.per)), split / total[:, None]
