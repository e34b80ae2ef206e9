"""What a sequence model costs on a device before it exists: times, work, memory and energy over distributions of lengths.

Costs are of the programs of `edgesdk.sequence.costs` by the planner's own cost law. No framework is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from edgesdk.errors import InputError, UnknownName
from edgesdk.graph.types import ModelGraph, Unit
from edgesdk.noun import Part
from edgesdk.plan.answering import added, spread
from edgesdk.plan.lengths import Lengths
from edgesdk.plan.types import Estimate, MemoryAnswer, Precision, Spread
from edgesdk.sequence.card import NATIVE_BITS, token_bytes
from edgesdk.sequence.costs import Program, cache_slots, programs
from edgesdk.sequence.sizes import refuse_narrow

if TYPE_CHECKING:
    from edgesdk.device import ComputeUnit, DeviceProfile
    from edgesdk.efficiency import Efficiency
    from edgesdk.sequence.config import SequenceConfig

Weights = Literal["fp32", "int8", "int4"]
"""What the matrices are held in: int8 and int4 (groups of 32) with activations rounded as the runtime goes."""
_PRECISION: dict[str, Precision] = {"fp32": "fp32", "int8": "int8-dynamic", "int4": "int4-g32"}


@dataclass(frozen=True)
class Where:
    """A device with a runtime on it."""

    device: DeviceProfile
    runtime: str
    threads: int
    weights: Weights
    efficiency: Efficiency
    cache_bits: int = 32

    @cached_property
    def compute(self) -> ComputeUnit:
        return self.device.unit(next(r.unit for r in self.device.runtimes if r.name == self.runtime))

    def precision(self, unit: Unit) -> Precision:
        """What this runtime really holds a unit in."""
        from edgesdk.plan.options import table

        wanted = _PRECISION[self.weights]
        if unit.op == "embedding" and wanted != "fp32":
            wanted = "int8-weight-only"
        allowed = table(self.runtime).get(unit.op, ())
        if wanted == "int4-g32" and unit.cols % 32:
            wanted = "int8-dynamic"
        return wanted if unit.weight_elements and wanted in allowed else "fp32"


def places(
    device: DeviceProfile, weights: Weights, runtime: str | None, threads: int | None, cache_bits: int = 32
) -> list[Where]:  # fmt: skip
    """The runtimes of `device` that edgesdk lowers for and that hold `weights`, or the one asked for.

    Raises `UnknownName` for a runtime the device lacks and `InputError` where none holds these weights, or for too many threads.
    """
    from edgesdk.plan.rates import efficiency_for
    from edgesdk.target import target_for

    here = {r.name: r for r in device.runtimes}
    if runtime is not None and runtime not in here:
        raise UnknownName(f"runtime on {device.name}", runtime, here)
    target = target_for(device)
    found = []
    names = [runtime] if runtime else ["native"] if cache_bits in NATIVE_BITS else [*target.runtimes]
    if cache_bits in NATIVE_BITS:
        refuse_narrow(cache_bits, names[0], device.name, "native" in here)
    for name in (n for n in names if n in here):
        if _PRECISION[weights] not in here[name].precisions:
            continue
        compute = device.unit(here[name].unit)
        n = threads or target.default_threads
        if n > compute.cores:
            raise InputError(f"--threads {n}: {device.name}'s {compute.name} has {compute.cores} cores", "ask for fewer threads")
        found.append(Where(device, name, n, weights, efficiency_for(device, compute, name, n), cache_bits))
    if not found:
        raise InputError(
            f"{device.name} has no runtime that runs {weights} weights", f"its runtimes: {', '.join(here)}; try --weights int8"
        )
    return found


class SequenceCost(Part):
    """One answer to a batch of texts. Seconds, bytes, joules; all predicted."""

    first_token: Spread  # encode or prefill, and what else it takes
    per_token: Estimate | None  # each further token; None: all come at once
    answer: Spread
    tokens_per_s: Estimate  # tokens written over the time of the answer, all texts of the batch
    flops: float  # 2 x MACs of an answer, padding included, all texts of the batch
    weight_bytes: int
    self_cache_bytes: int  # of the largest bucket
    cross_cache_bytes: int
    memory: MemoryAnswer
    energy_j: Estimate | None  # the power of the device's power mode x time: an upper bound, not a measurement
    power_w: float | None


def buckets_of(lengths: Lengths) -> dict[int, float]:
    """Source length that programs are exported with → share of texts; those that no text takes are left out."""
    found: dict[int, float] = {}
    for value, share in zip(lengths.values, lengths.shares, strict=True):
        fit = min(s for s in lengths.sizes if s >= value)
        found[fit] = found.get(fit, 0.0) + share
    return found


def _scaled(e: Estimate, by: float) -> Estimate:
    return Estimate(value=e.value * by, low=e.low * by, high=e.high * by)


def program_estimate(program: Program, where: Where) -> Estimate:
    """Seconds of one call, by the planner's cost law; equal layers are costed once."""
    from edgesdk.plan.cost import call_seconds, fused, total, unit_cost, weight_traffic

    graph, quiet = program.graph, fused(program.graph)
    held = [where.precision(u) for u in graph.units]
    weights = sum(weight_traffic(u, p) * n for u, p, n in zip(graph.units, held, program.times, strict=True) if u.weight)
    costs = []
    for unit, precision, n in zip(graph.units, held, program.times, strict=True):
        if unit.name not in quiet:
            size = weights + graph.peak_activation_bytes
            one = unit_cost(unit, precision, where.device, where.runtime, where.threads, where.efficiency, working_set=size)
            costs += [one] * n
    return total(costs, where.efficiency, call_seconds(graph, "fp32", where.efficiency))


def memory_of(config: SequenceConfig, where: Where, batch: int, sources: list[int], slots: int) -> MemoryAnswer:
    """Every bucket's programs loaded at once; the weights they share are held once, but where each packs its own copy."""
    from edgesdk.graph.memory import memory_answer, packed_again, weight_bytes
    from edgesdk.plan.setting import RUNTIME_BYTES

    made = [p for s in sources for p in programs(config, batch, s, slots, 1, alike=True, cache_bits=where.cache_bits)]
    graph = ModelGraph.model_construct(
        name=config.layout, source="torch", model_digest=config.digest(), layout=config.layout, methods=tuple(p.graph for p in made), not_counted=()
    )  # fmt: skip
    held = {(p.graph.name, u.name): where.precision(u) for p in made for u in p.graph.units}
    answer = memory_answer(graph, held, where.runtime, where.device)
    weights = {
        u.weight: n * weight_bytes(u, where.precision(u), where.runtime)
        for p in made
        for u, n in zip(p.graph.units, p.times, strict=True)
        if u.weight
    }
    own = answer.runtime_bytes or RUNTIME_BYTES.get(where.runtime)
    new = {
        "weights_bytes": sum(weights.values()),
        "packed_bytes": sum(n * weights[w] for w, n in packed_again(graph, where.runtime).items()),
    }
    peak = answer.peak_bytes + sum(n - getattr(answer, k) for k, n in new.items()) + (own or 0) - (answer.runtime_bytes or 0)
    return answer.model_copy(update={**new, "runtime_bytes": own, "peak_bytes": peak})


@dataclass(frozen=True)
class Parts:
    """Of one bucket: seconds until the first token and of each further one, and the MACs of both."""

    opening: Estimate
    decode: Estimate | None
    opening_macs: int
    decode_macs: int

    def answer(self, written: float) -> Estimate:
        return added([(self.opening, 1.0), *([(self.decode, written - 1.0)] if self.decode else [])])


def parts_of(config: SequenceConfig, where: Where, batch: int, source: int, slots: int) -> Parts:
    """The programs for a source of `source` tokens and answers of `slots`."""
    made = {p.graph.name: p for p in programs(config, batch, source, slots, 2, alike=True, cache_bits=where.cache_bits)}
    seconds = {name: program_estimate(p, where) for name, p in made.items()}
    first = [n for n in made if n != "decode" or config.encoder is not None]  # behind an encoder, decode gives the first token, too
    return Parts(
        added([(seconds[n], 1.0) for n in first]), seconds.get("decode"), sum(made[n].macs for n in first),
        made["decode"].macs if "decode" in made else 0,
    )  # fmt: skip


def times(config: SequenceConfig, where: Where, read: int, written: int, batch: int = 1) -> tuple[Estimate, Estimate]:
    """Seconds to the first token and of the whole answer, with programs of exactly these lengths. Raises what `cost` raises."""
    _refuse(config, read, written, read)
    parts = parts_of(config, where, batch, read, written)
    return parts.opening, parts.answer(written)


def cost(config: SequenceConfig, where: Where, source: Lengths, output: Lengths, *, batch: int = 1) -> SequenceCost:
    """What `config` costs for texts of these lengths. Lengths read and written are taken as independent.

    Raises `InputError` where the layout cannot do it: positions that end too early, a CTC model that must write more than it reads.
    """
    shares, slots = buckets_of(source), output.largest
    _refuse(config, source.values[0], slots, max(shares))
    made = [(parts_of(config, where, batch, bucket, slots), share) for bucket, share in shares.items()]
    answers = [(p.answer(n), share * part) for p, share in made for n, part in zip(output.values, output.shares, strict=True)]
    whole, memory = added(answers), memory_of(config, where, batch, list(shares), slots)
    held, power, tokens = _caches(config, batch, max(shares), slots, where.cache_bits), _power(where.device), batch * output.mean
    return SequenceCost(
        first_token=spread([(p.opening, share) for p, share in made]), answer=spread(answers),
        per_token=added([(p.decode, share) for p, share in made if p.decode]) if config.decoder else None,
        tokens_per_s=Estimate(value=tokens / whole.value, low=tokens / whole.high, high=tokens / whole.low),
        flops=sum(share * 2.0 * (p.opening_macs + p.decode_macs * (output.mean - 1)) for p, share in made),
        weight_bytes=memory.weights_bytes, self_cache_bytes=held[0], cross_cache_bytes=held[1], memory=memory,
        energy_j=_scaled(whole, power) if power else None, power_w=power,
    )  # fmt: skip


def _refuse(config: SequenceConfig, shortest: int, written: int, bucket: int) -> None:
    if config.decoder is None and written > shortest:
        raise InputError(
            f"encoder-ctc writes at most as many tokens as it reads: {written} asked of {shortest}",
            "ask for shorter outputs, or another layout",
        )
    last = bucket + written if config.encoder is None else max(bucket, written)
    if config.positions in ("learned", "sinusoidal") and last > config.max_positions:
        raise InputError(
            f"max_positions = {config.max_positions}: {last} are needed", "give shorter lengths, or a model with more positions"
        )


def _caches(config: SequenceConfig, batch: int, source: int, slots: int, bits: int) -> tuple[int, int]:
    """Bytes of the caches of one session: self-attention and cross-attention."""
    stack = config.decoder
    if stack is None:
        return 0, 0
    pair = 2 * batch * stack.kv_heads * token_bytes(bits, stack.head)
    held = cache_slots(config, slots if config.encoder is not None else source + slots)
    return pair * sum(held), pair * source * stack.layers if config.encoder is not None else 0


def _power(device: DeviceProfile) -> float | None:
    return next((m.power_w for m in device.power_modes if m.name == device.default_power_mode), None)
