"""Channels cut and weights quantized without any data, in closed form: what is damaged is rebuilt from the other channels in the next layer.

Source: UDFC, "Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning" (arXiv:2308.07209). Its assumption: a damaged channel is a
linear combination of the others. With a the channels as they were and a' as they are now (cut or rounded), the next layer W reads T·a' + t in
place of a, (T, t) = argmin E‖a - T·a' - t‖² + λ‖T - 1‖² = (E[(a - a') a'ᵀ])(E[a' a'ᵀ] + λ)⁻¹ + 1, so that W becomes W·T and its bias takes W·t.
Ours: the moments hold behind the activation, too. A layer with a batch norm gives channels of mean β and deviation |γ| whatever comes in; how they
go together follows from the angles between its rows, input channels taken as uncorrelated. Moments are taken over a fixed set of normal draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from edgesdk.compress.cut_costs import Order, share_out
from edgesdk.compress.dependency import Axis, Trace, trace
from edgesdk.compress.dependency import Family as Units
from edgesdk.compress.gptq import scales
from edgesdk.compress.neurons import Part, order_of
from edgesdk.compress.refit import running_order
from edgesdk.compress.rtn import RtnConfig, to_code
from edgesdk.compress.shrink import cuttable, edits_of, module_at
from edgesdk.compress.surgery import Edit, apply_edits
from edgesdk.compress.types import Change, Config, Family, Need, Step
from edgesdk.compress.weights import holders, set_weight, weights_of
from edgesdk.errors import InputError
from edgesdk.packed import Code, decode

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

DRAWS = 4096


class UdfcConfig(Config):
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.3  # share of the weights to cut out as whole channels; 0: only quantize
    bits: Annotated[int, Field(ge=2, le=8)] = 6  # of what stays
    group: Annotated[int, Field(ge=0)] = 0  # columns that share a scale; 0: a whole row
    quantize: bool = True
    compensate: bool = True
    near: Annotated[float, Field(ge=0, lt=1)] = (
        0.5  # how far neighbouring places of an image are taken to go together when channels are cut
    )
    strength: Annotated[float, Field(gt=0)] = 0.02  # λ, as a share of the channels' mean square


@dataclass
class Link:
    """Channels that one layer makes and others read: `norm` is the batch norm between, `act` what lies behind it."""

    units: Units
    maker: Axis
    norm: str | None
    readers: list[Axis]
    act: Any

    def rows(self, spec: ModelSpec) -> torch.Tensor:
        """The maker's weight, float64 [channels, fan-in]."""
        weight: torch.Tensor = module_at(spec, self.maker.path).weight.detach()
        return weight.double().reshape(len(weight), -1)


ACTIVATIONS = (
    torch.nn.functional.relu, torch.nn.functional.silu, torch.nn.functional.gelu, torch.nn.functional.hardswish, torch.nn.functional.relu6, torch.sigmoid,
    torch.tanh, torch.nn.functional.elu, torch.nn.functional.leaky_relu,
)  # fmt: skip


def links_of(spec: ModelSpec, found: Trace) -> list[Link]:
    """The families that one layer alone makes and that are read behind an activation."""
    answer = []
    for family in found.families:
        made = [a for a in family.axes if a.dim == 0 and a.tensor == "weight" and module_at(spec, a.path).weight.dim() > 1]
        norms = [
            a.path
            for a in family.axes
            if isinstance(module_at(spec, a.path), torch.nn.modules.batchnorm._BatchNorm) and a.tensor == "weight"
        ]
        readers = [a for a in family.readers if hasattr(module_at(spec, a.path), "bias")]
        single = all(len(unit[made[0]]) == 1 for unit in family.units) if made else False
        whole = bool(made) and len(family.units) == module_at(spec, made[0].path).weight.shape[0]
        if family.exact and len(made) == 1 and len(norms) <= 1 and readers and single and whole:
            last = norms[0] if norms else made[0].path
            answer.append(Link(family, made[0], norms[0] if norms else None, readers, activation(spec, last, readers[0].path)))
    return answer


def activation(spec: ModelSpec, before: str, after: str) -> Any:
    """The function between two modules, tried on the example inputs; relu where shapes change on the way and nothing is negative."""
    seen: dict[str, torch.Tensor] = {}
    with ExitStack() as undo, torch.no_grad():
        undo.callback(module_at(spec, before).register_forward_hook(lambda m, i, o: seen.__setitem__("out", o)).remove)
        undo.callback(module_at(spec, after).register_forward_pre_hook(lambda m, i: seen.__setitem__("in", i[0])).remove)
        for entry in spec.methods.values():
            entry.module(*entry.example_inputs)
    made, read = seen.get("out"), seen.get("in")
    if made is None or read is None:
        return torch.nn.functional.relu
    if made.shape == read.shape:
        for act in ACTIVATIONS:
            if torch.allclose(act(made), read, atol=1e-5):
                return act
        return lambda x: x
    return torch.nn.functional.relu if float(read.min()) >= 0 else lambda x: x


def channels(spec: ModelSpec, link: Link, rows: torch.Tensor, whole: torch.Tensor, near: float) -> torch.Tensor:
    """What the readers get for random inputs, float64 [draws, channels]. `rows` [channels, fan-in] may be damaged, the batch norm's statistics
    belong to the `whole` ones; `near` is how far neighbouring places of an image are taken to go together."""
    weight, generator = module_at(spec, link.maker.path).weight, torch.Generator().manual_seed(0)
    places = int(weight[0, 0].numel())
    alone, shared = (torch.randn(DRAWS, rows.shape[1] // places, n, generator=generator, dtype=torch.float64) for n in (places, 1))
    x = (near**0.5 * shared + (1 - near) ** 0.5 * alone).reshape(DRAWS, -1)
    z = x @ rows.T
    if link.norm is not None:
        norm = module_at(spec, link.norm)
        gain, bias = norm.weight.detach().double(), norm.bias.detach().double()
        z = bias + gain * z / (x @ whole.T).std(0).clamp_min(1e-12)
    else:
        bias = module_at(spec, link.maker.path).bias
        z = z + (0.0 if bias is None else bias.detach().double())
    out: torch.Tensor = link.act(z)
    return out


def rebuilt(was: torch.Tensor, now: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, t) with was ≈ now @ Tᵀ + t for channels [draws, n] and [draws, k], T near the identity where nothing speaks against it (k = n)."""
    ones = torch.ones(len(now), 1, dtype=now.dtype)
    a = torch.cat([now, ones], 1)
    start = torch.eye(now.shape[1], dtype=now.dtype) if was.shape == now.shape else torch.zeros(was.shape[1], now.shape[1], dtype=now.dtype)
    gram = a.T @ a / len(a)
    ridge = torch.full((len(gram),), strength * float(gram.diagonal()[:-1].mean()) + 1e-12, dtype=now.dtype)
    ridge[-1] = 1e-12
    moved = torch.linalg.solve(gram + torch.diag(ridge), a.T @ (was - now @ start.T) / len(a)).T
    return start + moved[:, :-1], moved[:, -1]


def read_through(spec: ModelSpec, link: Link, change: torch.Tensor, shift: torch.Tensor) -> None:
    """The readers get a' and are made to act as if they got T·a' + t: W ← W·T, bias += W·t, in place. `change` [n, n], `shift` [n]."""
    with torch.no_grad():
        for axis in link.readers:
            module = module_at(spec, axis.path)
            weight = module.weight
            index = torch.tensor([unit[axis] for unit in link.units.units])  # [n, spread]: several columns where a channel was flattened
            rest = int(weight[0, 0].numel())
            w = weight.double().reshape(len(weight), -1, rest)[:, index]  # [rows, n, spread, kernel]
            new = torch.einsum("rnsk,nm->rmsk", w, change)
            if module.bias is not None:
                module.bias += torch.einsum("rnsk,n->r", w, shift).to(module.bias.dtype)
            flat = weight.double().reshape(len(weight), -1, rest).clone()
            flat[:, index.reshape(-1)] = new.reshape(len(weight), -1, rest)
            weight.copy_(flat.reshape(weight.shape))


class Udfc:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "udfc"
    family: ClassVar[Family] = "data-free"
    source: ClassVar[str] = "UDFC (arXiv:2308.07209)"
    needs: ClassVar[frozenset[Need]] = frozenset()
    config: ClassVar[type[UdfcConfig]] = UdfcConfig

    def why_not(self, spec: ModelSpec, config: UdfcConfig) -> str | None:
        return "ratio=0 and quantize=false ask for nothing" if not config.ratio and not config.quantize else None

    def options(self, spec: ModelSpec) -> Sequence[UdfcConfig]:
        return [UdfcConfig(ratio=r, bits=b) for r, b in ((0.5, 4), (0.3, 4), (0.3, 6), (0.2, 6), (0.0, 6), (0.0, 8))]

    def apply(self, spec: ModelSpec, config: UdfcConfig, step: Step) -> Change:
        edits: list[Edit] = []
        notes: list[str] = []
        if config.ratio:
            edits, notes = cut(spec, config, step)
        codes = quantize(spec, config, step) if config.quantize else {}
        return Change(tuple(edits), tuple(notes), codes)


def cut(spec: ModelSpec, config: UdfcConfig, step: Step) -> tuple[list[Edit], list[str]]:
    """Cut channels out of the families that one layer makes, each rebuilt from those that stay; in place. Raises `InputError`."""
    found = trace(spec)
    links = links_of(spec, found)
    standing = {f.name: f for f in cuttable(spec, [link.units for link in links], step)}
    links = [link for link in links if link.units.name in standing]
    if not links:
        raise InputError(
            f"{spec.name} has no channels that one layer makes and another reads", "use structured, or udfc:ratio=0 to quantize alone"
        )
    orders, values = [], []
    for link in links:
        link.units = standing[link.units.name]
        rows = link.rows(spec)
        values.append(channels(spec, link, rows, rows, config.near))
        orders.append(weighed(spec, link, values[-1]))
    taken = share_out(spec, found, orders, config.ratio, False, 1)
    edits: list[Edit] = []
    notes: list[str] = []
    for link, order, n, a in zip(links, orders, taken, values, strict=True):
        kept = sorted(set(range(len(link.units.units))) - set(order.gone[:n]))
        if n and config.compensate:
            change, shift = rebuilt(a, a[:, kept], config.strength)
            gone = sorted(order.gone[:n])
            whole, moved = torch.eye(a.shape[1], dtype=a.dtype), torch.zeros(a.shape[1], dtype=a.dtype)
            whole[gone] = 0
            whole[torch.tensor(gone)[:, None], torch.tensor(kept)[None]] = change[gone]
            moved[gone] = shift[gone]
            read_through(spec, link, whole, moved)
        if n:
            edits += edits_of(spec, link.units, kept)
            notes.append(f"{link.units.name}: {n} of {len(link.units.units)} channels cut")
    apply_edits(spec, edits)
    return edits, notes


def weighed(spec: ModelSpec, link: Link, a: torch.Tensor) -> Order:
    """The channels from the first to go to the last."""
    one = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
    gram, parts = one.T @ one / len(one), []
    gram = gram + torch.eye(len(gram), dtype=gram.dtype) * 1e-9 * float(gram.diagonal().mean())
    for axis in link.readers:
        weight = module_at(spec, axis.path).weight.detach().double()
        index = torch.tensor([unit[axis] for unit in link.units.units])
        w = weight.reshape(len(weight), -1, int(weight[0, 0].numel()))[:, index].permute(0, 2, 3, 1).reshape(-1, a.shape[1])
        matrix = torch.cat([w, torch.zeros(len(w), 1, dtype=w.dtype)], 1)
        parts.append(Part(matrix, gram, [[u] for u in range(a.shape[1])], 1e-3))
    return order_of(link.units, parts, "pivots")


def quantize(spec: ModelSpec, config: UdfcConfig, step: Step) -> dict[str, Code]:
    """Every weight on a grid, one layer after the other, what each lost rebuilt in the next; in place."""
    links = {link.maker.path: link for link in links_of(spec, trace(spec))} if config.compensate else {}
    held = {uses[0][1]: name for name, uses in holders(spec).items()}
    order = [p for p in running_order(spec, list(held)) if p in held]
    codes: dict[str, Code] = {}
    for i, path in enumerate([*order, *(p for p in held if p not in order)]):
        step(f"quantizing {path or 'the model'}", i / len(held))
        weight = weights_of(spec)[held[path]]
        codes[weight.name] = on_grid(weight.matrix, config)
        link = links.get(path)
        before = link.rows(spec) if link else None
        set_weight(spec, weight.name, torch.from_numpy(decode(codes[weight.name])))
        if link is not None and before is not None and not any(held.get(a.path) in codes for a in link.readers):
            was, now = channels(spec, link, before, before, 0.0), channels(spec, link, link.rows(spec), before, 0.0)
            read_through(spec, link, *rebuilt(was, now, config.strength))
    return codes


def on_grid(matrix: torch.Tensor, config: UdfcConfig) -> Code:
    """Rounded to nearest on scales of the least squared error."""
    levels, group = 2**config.bits, config.group
    group = group if 0 < group < matrix.shape[1] else 0
    scale, zero = scales(matrix, torch.ones_like(matrix), levels, group, True, True)
    width = group or matrix.shape[1]
    s, z = (t.repeat_interleave(width, 1)[:, : matrix.shape[1]] for t in (scale, zero))
    q = torch.clamp(torch.round(matrix / s + z), 0, levels - 1)
    return to_code(q, scale, None, RtnConfig(bits=config.bits, group=group))


METHOD: Any = Udfc()
