"""Where encoder and decoder run: on the same unit of a device, on two of its units, or the encoder on a bigger machine over a link.

Costs are those of `estimate` for each program where it runs, and what crosses between them: keys and values for cross-attention, once an answer.
Between units of one device these are copied in memory; over a link they go in few bits (see `split`), after the link's latency both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from edgesdk.device import DeviceProfile
from edgesdk.errors import InputError
from edgesdk.graph.memory import weight_bytes
from edgesdk.graph.types import Unit
from edgesdk.noun import Noun, Part
from edgesdk.plan.rates import efficiency_for
from edgesdk.plan.types import Estimate, Precision
from edgesdk.sequence.config import SequenceConfig
from edgesdk.sequence.costs import Program, programs
from edgesdk.sequence.estimate import Weights, Where, places, program_estimate
from edgesdk.target import target_for

HEADER_BYTES = 400
"""Of one exchange over the link: frames' headers, both ways (measured: 330 to 420 with `split`)."""
CHANNEL_BYTES = 4
"""Middle and step of one channel of one array, two float16."""


class Link(Part):
    """`bits` a value on the wire, before entropy coding, which is left out: how much it saves depends on the text."""

    bytes_per_s: PositiveFloat
    latency_s: NonNegativeFloat  # one way
    bits: PositiveInt = 8


class Placement(Part):
    """Seconds, bytes; predicted. `over_s` is the link's or the copy's part of the first token."""

    encoder: str  # "runtime on unit" or "runtime on unit of device"
    decoder: str
    first_token: Estimate
    per_token: Estimate
    answer: Estimate
    over_bytes: NonNegativeInt
    over_s: NonNegativeFloat
    weight_bytes: NonNegativeInt  # on the device itself
    wins: bool = False


class PlacementTable(Noun):
    """Rows by the time of an answer."""

    KIND: ClassVar[str] = "placements"

    layout: str
    device: str
    helper: str | None
    link: Link | None
    input_length: PositiveInt
    output_length: PositiveInt
    rows: tuple[Placement, ...]


class _Accelerator(Where):
    """A GPU or NPU through a runtime that edgesdk costs and that is built for with the vendor's own software: matrices in fp16, or in int8
    where the unit has no fp16."""

    def precision(self, unit: Unit) -> Precision:
        listed = next(r.precisions for r in self.device.runtimes if r.name == self.runtime)
        return ("fp16" if "fp16" in listed else "int8-static") if unit.weight_elements else "fp32"


def _accelerators(device: DeviceProfile, weights: Weights) -> list[Where]:
    """One runtime for each unit that is not a CPU: the first that edgesdk's target names."""
    found: dict[str, Where] = {}
    for runtime in target_for(device).build_only:
        for r in device.runtimes:
            compute = device.unit(r.unit)
            if r.name == runtime and compute.kind != "cpu" and r.unit not in found and {"fp16", "int8-static"} & set(r.precisions):
                found[r.unit] = _Accelerator(device, runtime, 1, weights, efficiency_for(device, compute, runtime, 1))
    return list(found.values())


@dataclass(frozen=True)
class _Side:
    where: Where
    away: bool

    @property
    def told(self) -> str:
        name = f"{self.where.runtime} on {self.where.compute.name}"
        return f"{name} of {self.where.device.name}" if self.away else name


def crossing(config: SequenceConfig, source: int, batch: int = 1, bits: int = 32) -> int:
    """Bytes of the keys and values that the encoder hands over for `source` tokens."""
    stack = config.decoder
    if config.encoder is None or stack is None:
        return 0
    channels = 2 * stack.layers * batch * stack.kv_heads * stack.head
    return channels * source * bits // 8 + (channels * CHANNEL_BYTES if bits < 32 else 0)


def placements(
    config: SequenceConfig,
    device: DeviceProfile,
    read: int,
    written: int,
    *,
    weights: Weights = "int8",
    cache_bits: int = 32,
    batch: int = 1,
    threads: int | None = None,
    helper: DeviceProfile | None = None,
    link: Link | None = None,
    name: str = "",
) -> PlacementTable:
    """Every pair of places for an encoder-decoder that reads `read` tokens and writes `written`. `name`: how the layout is called.

    Raises `InputError` for a layout without both an encoder and a decoder, and for a helper without a link.
    """
    if config.encoder is None or config.decoder is None:
        raise InputError(f"layout {config.layout} has one part: there is nothing to place apart", "give an encoder-decoder")
    if (helper is None) != (link is None):
        raise InputError("a helper goes with a link", "give both: --helper DEVICE --link-rate 100Mbit --link-latency 5ms")
    here = [_Side(w, False) for w in [*places(device, weights, None, threads), *_accelerators(device, weights)]]
    away = [_Side(w, True) for w in [*places(helper, weights, None, None), *_accelerators(helper, weights)]] if helper else []
    made = {p.graph.name: p for p in programs(config, batch, read, written, written, alike=True, cache_bits=cache_bits)}
    pairs = [(e, d) for d in here for e in [*here, *away] if e.away or e == d or e.where.compute != d.where.compute]
    rows = [_row(config, made, e, d, read, written, batch, link) for e, d in pairs]
    rows.sort(key=lambda r: r.answer.value)
    rows[0] = rows[0].model_copy(update={"wins": True})
    return PlacementTable(
        layout=name or config.layout,
        device=device.name,
        helper=helper.name if helper else None,
        link=link,
        input_length=read,
        output_length=written,
        rows=tuple(rows),
    )


def _row(
    config: SequenceConfig, made: dict[str, Program], encoder: _Side, decoder: _Side, read: int, written: int, batch: int, link: Link | None
) -> Placement:
    encode, decode = program_estimate(made["encode"], encoder.where), program_estimate(made["decode"], decoder.where)
    if encoder.away:
        assert link is not None
        over = crossing(config, read, batch, link.bits) + 12 * batch * read + HEADER_BYTES
        seconds = over / link.bytes_per_s + 2 * link.latency_s
    elif encoder.where.compute.name != decoder.where.compute.name:
        over = crossing(config, read, batch)
        seconds = 2 * over / decoder.where.device.memory.bandwidth_bytes_per_s  # read and written
    else:
        over, seconds = 0, 0.0
    ends = {k: getattr(encode, k) + seconds + getattr(decode, k) for k in ("value", "low", "high")}
    whole = {k: ends[k] + (written - 1) * getattr(decode, k) for k in ("value", "low", "high")}
    return Placement(
        encoder=encoder.told, decoder=decoder.told, first_token=Estimate(**ends), per_token=decode, answer=Estimate(**whole),
        over_bytes=over, over_s=seconds, weight_bytes=_weights(made, [] if encoder.away else [("encode", encoder)], decoder),
    )  # fmt: skip


def _weights(made: dict[str, Program], encode: Sequence[tuple[str, _Side]], decoder: _Side) -> int:
    """Bytes of the weights that the device itself holds; what both parts use is held once where they share a unit."""
    held: dict[tuple[str, str], int] = {}
    for name, side in (*encode, ("decode", decoder)):
        for unit, n in zip(made[name].graph.units, made[name].times, strict=True):
            if unit.weight:
                held[side.where.compute.name, unit.weight] = n * weight_bytes(unit, side.where.precision(unit), side.where.runtime)
    return sum(held.values())
