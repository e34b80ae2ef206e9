"""Measure this machine: memory bandwidth per level, and what each runtime reaches per operator class and precision.

Micro-programs are lowered once (and kept), run in this process by the runtime itself, and a cost law is fitted to the medians:
overhead + per_output × outputs + max(operations / rate, traffic). A call costs something for each input and output, and for their elements.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.agent.speed import read_rates
from edgesdk.calibrate_places import PROGRAM, Here, Place
from edgesdk.efficiency import Efficiency, OpRate
from edgesdk.errors import InputError, MissingTool, UnknownName
from edgesdk.native.formats import ROUNDED
from edgesdk.plan.cost import TILE

if TYPE_CHECKING:
    from edgesdk.device import ComputeUnit, DeviceProfile
    from edgesdk.graph.types import MethodGraph, Unit
    from edgesdk.model import ModelSpec
    from edgesdk.plan.types import Precision
    from edgesdk.transport.base import Transport

Step = Callable[[str, float], None]
RUNTIMES = ("litert", "executorch", "native")
PRECISIONS = ("fp32", "int8-static", "int8-dynamic", "int8-weight-only", "int4-g32")
PASSES = 2
LEAST_SD = 0.06
"""No residual is claimed to be smaller than this: repeated measurements on an idle machine differ by about as much."""

WHOLE_SD = 0.22
"""Residual of whole models beside that of single operators: as tests/bench/host_prediction.py measured on models left out."""


@dataclass(frozen=True)
class Sample:
    """One micro-program at one precision: the median of its calls, in seconds."""

    method: MethodGraph
    precision: str
    choice: Mapping[str, str]  # unit → precision
    seconds: float


def calibrate(
    device: str | None = None,
    *,
    on: str | Transport | None = None,
    runtime: str | None = None,
    threads: int = 1,
    precisions: Sequence[str] | None = None,
    allow_emulated: bool = False,
    python: str | None = None,
    wait_s: float = 0.0,
    step: Step | None = None,
    save: bool = True,
) -> list[Efficiency]:
    """Calibrate `runtime`, or every runtime installed, and keep the answer where `plan --device …` finds it.

    `on`: the link of a device that was probed (`edgesdk devices probe`); `device`: its profile's name, if the board has several. Without `on` this
    machine. `precisions`: these alone (default: all that a runtime builds). `python`, `wait_s`, `allow_emulated` are of a link.

    Raises `InputError` for another device than the one that is reached and for an emulated one, `MissingTool` when the runtime is not installed, and
    `LinkError` (the same call goes on from what was timed).
    """
    from edgesdk.calibrate_on import calibrate_on
    from edgesdk.devices import HOSTS, load_device
    from edgesdk.runner import installed

    step = step or (lambda text, share: None)
    for precision in precisions or ():
        if precision not in PRECISIONS:
            raise UnknownName("precision", precision, PRECISIONS)
    if on is not None:
        return calibrate_on(
            on, device, runtime=runtime, threads=threads, precisions=precisions, allow_emulated=allow_emulated, python=python, wait_s=wait_s, step=step,
            save=save,
        )  # fmt: skip
    if device is not None and device not in HOSTS:
        raise InputError(
            f"--device {device}: only this machine can be calibrated without a link", f"edgesdk calibrate --on LINK --device {device}"
        )
    here = installed()
    wanted = [runtime] if runtime else [r for r in RUNTIMES if r in here]
    if not wanted or any(r not in RUNTIMES or r not in here for r in wanted):
        names = runtime or " or ".join(RUNTIMES)
        raise MissingTool(f"{names} is not installed here", "pip install -c constraints.txt 'edgesdk[executorch,litert,kernels]'")
    with tempfile.TemporaryDirectory() as folder:
        return every_runtime(load_device("host"), {r: here[r] for r in wanted}, threads, Here(Path(folder)), step, precisions, save=save)


def every_runtime(
    profile: DeviceProfile, wanted: Mapping[str, str], threads: int, place: Place, step: Step, precisions: Sequence[str] | None = None,
    *, save: bool = True, marks: Mapping[str, Any] | None = None,
) -> list[Efficiency]:  # fmt: skip
    """The efficiencies of the runtimes `wanted` (→ version) on `profile`, measured at `place`; `marks` is written into each."""
    from edgesdk import calibrate_native as native
    from edgesdk.plan.rates import calibration_path

    if not 1 <= threads <= profile.units[0].cores:
        raise InputError(f"--threads {threads}: {profile.name} has {profile.units[0].cores} cores", "ask for fewer threads")
    step("memory bandwidth", 0.0)
    levels = bandwidths(profile, place)
    answers = []
    for i, (name, version) in enumerate(wanted.items()):

        def part(text: str, share: float, i: int = i, name: str = name) -> None:
            step(f"{name}: {text}", 0.05 + 0.95 * (i + share) / len(wanted))

        if name == "native":
            samples = native.measure(profile, threads, part, place, precisions or native.PRECISIONS)
        else:
            samples = measure(name, threads, part, place, precisions or PRECISIONS)
        levels = least_disturbed(levels, bandwidths(profile, place))  # apart in time: others read the memory, too
        if name == "native":
            answer = native.fit(profile, version, threads, levels, samples)
        else:
            answer = fit(profile, name, version, threads, levels, samples)
        answer = answer.model_copy(update=dict(marks or {}))
        if save:
            answer.save(calibration_path(profile, name, threads))
        answers.append(answer)
    return answers


def bandwidths(profile: DeviceProfile, place: Place | None = None) -> dict[str, float]:
    """Bytes a second one thread reads, by level, from maxima of arrays that fit half of it (four times the last cache for memory)."""
    sizes = {f"L{c.level}": c.size_bytes // 2 for c in profile.units[0].caches}
    biggest = max((c.size_bytes for c in profile.units[0].caches), default=8 << 20)
    sizes["memory"] = min(4 * biggest, 256 << 20)
    return place.rates(sizes) if place else read_rates(sizes)


def least_disturbed(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """The faster of two measurements of each level's bandwidth: other work only ever slows them, and each is in order, so this is, too."""
    return {level: max(one[level], other[level]) for level in one}


def measure(runtime: str, threads: int, step: Step, place: Place, precisions: Sequence[str] = PRECISIONS) -> list[Sample]:
    """Lower (or take from the cache) and time every micro-program at every precision the runtime builds."""
    from edgesdk.graph import trace
    from edgesdk.micro import micro_spec
    from edgesdk.plan.harm import one_thread

    with one_thread():
        native = _native_here(runtime) if place.here else ()
        spec = micro_spec(between=bool(native))
        graph = trace(spec)
        choices = {p: _choices(runtime, p, graph.methods) for p in (*precisions, *native) if p in native or _builds(runtime, p)}
        opened = []
        for part in _programs(runtime, spec, choices, step):
            inputs = {m: [t.numpy() for t in spec.methods[m].example_inputs] for p in part.precisions for m in choices[p]}
            opened.append((part, place.open(_files(part, native), runtime, threads, inputs)))
        best: dict[tuple[str, str], float] = {}
        for i, (turn, (part, timer)) in enumerate(place.turns(opened, PASSES)):
            pairs = [(precision, method) for precision in part.precisions for method in choices[precision]]
            for j, (precision, method) in enumerate(pairs):
                step(
                    f"timing {', '.join(part.precisions)} ({turn + 1} of {PASSES})",
                    0.6 + 0.4 * (i + j / len(pairs)) / (PASSES * len(opened)),
                )
                seconds = timer(part.name(precision, method), method, turn)
                best[precision, method] = min(seconds, best.get((precision, method), math.inf))
    return [Sample(graph.method(m), p, choices[p][m], seconds) for (p, m), seconds in best.items()]


def _files(part: Part, native: Sequence[str]) -> dict[str, bytes]:
    """The program, and the operators of its units on our own kernels."""
    from edgesdk.kernels.cpu import host_targets
    from edgesdk.lower.native_units import library_of
    from edgesdk.runner import OPERATORS

    files = {PROGRAM: part.content}
    if set(part.precisions) & set(native):
        files[OPERATORS] = library_of(part.content, host_targets()[0])
    return files


@dataclass(frozen=True)
class Part:
    """A program that holds the micro-programs of some precisions."""

    content: bytes
    precisions: tuple[str, ...]
    name: Callable[[str, str], str]  # (precision, method) → the program's method


def _programs(runtime: str, spec: ModelSpec, choices: Mapping[str, Mapping[str, Mapping[str, str]]], step: Step) -> list[Part]:
    from edgesdk.micro_lower import lower_executorch_parts, lower_litert_parts

    if runtime == "litert":
        step("lowering fp32 (once; kept in the cache)", 0.0)
        content = _kept(spec, runtime, "fp32", lambda: lower_litert_parts(spec))
        parts = [Part(content, ("fp32",), lambda _, method: method)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "float.tflite")
            path.write_bytes(content)
            for i, precision in enumerate(p for p in choices if p != "fp32"):
                step(f"quantizing to {precision}", 0.4 + 0.05 * i)
                parts.append(Part(_requantized(path, precision), (precision,), lambda _, method: method))
        return parts
    parts = []
    static = [p for p in choices if p == "int8-static"]  # made of a traced graph; the others are made of modules
    for i, together in enumerate(([p for p in choices if p not in static], static)):
        branches = {f"{p}:{m}": (m, c) for p in together for m, c in choices[p].items()}
        text = f"lowering {', '.join(together)} (once; kept in the cache)"
        step(text, 0.4 * i)

        def say(stage: str, i: int = i, text: str = text) -> None:
            step(f"{text}: {stage}", 0.4 * i + 0.02)

        if branches:
            make = partial(lower_executorch_parts, spec, branches, say)
            parts.append(Part(_kept(spec, runtime, "+".join(together), make), tuple(together), lambda p, method: f"{p}:{method}"))
    return parts


def _kept(spec: ModelSpec, runtime: str, what: str, make: Callable[[], bytes]) -> bytes:
    """`make()`, kept in the cache by the micro-programs' content and the runtime's version."""
    from edgesdk import __version__
    from edgesdk.cache import cache_dir
    from edgesdk.kernels.cpu import host_targets
    from edgesdk.kernels.panels import LAYOUT
    from edgesdk.runner import installed

    form = (LAYOUT, host_targets()[0]) if "native" in what else ()  # of weights on our own kernels
    key = hashlib.sha256(repr((spec.digest, runtime, what, form, sorted(installed().items()), __version__)).encode()).hexdigest()[:40]
    path = cache_dir("lowered") / f"micro-{key}"
    if path.exists():
        return path.read_bytes()
    content = make()
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)
    return content


def _native_here(runtime: str) -> tuple[Precision, ...]:
    """What single linear layers of a runtime's programs may take on our own kernels, where the operator can be compiled here."""
    from edgesdk.kernels.cpu import host_targets
    from edgesdk.native.operator_build import missing

    return ROUNDED if runtime == "executorch" and not missing(host_targets()[0]) else ()


def _builds(runtime: str, precision: str) -> bool:
    from edgesdk.plan.options import table

    return any(precision in kinds for kinds in table(runtime).values())


def _takes(runtime: str, unit: Unit, precision: str) -> bool:
    from edgesdk.plan.options import table

    if not unit.weight_elements or (precision == "int4-g32" and unit.cols % 32):
        return False
    if precision in ROUNDED:
        return unit.op == "linear"
    return precision in table(runtime).get(unit.op, ())


def _choices(runtime: str, precision: str, methods: Sequence[MethodGraph]) -> dict[str, dict[str, str]]:
    """Method → unit → precision, for the methods that a precision changes. LiteRT's static int8 takes operators without weights along."""
    if precision == "fp32":
        return {m.name: {} for m in methods}
    if precision == "int8-static":  # which would turn back and forth around what stays float between its layers
        methods = [m for m in methods if not m.name.startswith("between")]
    along = runtime == "litert" and precision == "int8-static"
    found = {m.name: {u.name: precision for u in m.units if _takes(runtime, u, precision) or (along and not u.weight)} for m in methods}
    return {m: c for m, c in found.items() if c}


def _requantized(float_file: Path, precision: str) -> bytes:
    """The float `.tflite` with every operator that can take it at `precision`; converted from PyTorch only once."""
    from edgesdk.graph import trace
    from edgesdk.lower import lower
    from edgesdk.model import ModelSpec

    spec = ModelSpec(name="calibration", digest=hashlib.sha256(float_file.read_bytes()).hexdigest(), flatbuffer=float_file)
    units = [(m.name, u) for m in trace(spec).methods for u in m.units]
    return lower(spec, "litert", {(m, u.name): precision for m, u in units if _takes("litert", u, precision)})


def fit(
    profile: DeviceProfile, runtime: str, version: str, threads: int, levels: dict[str, float], samples: Sequence[Sample]
) -> Efficiency:
    """The cost law's parameters for every operator class and precision that was measured, with residuals."""
    rows: list[OpRate] = []
    head: dict[str, Any] = {
        "device": profile.name, "runtime": runtime, "runtime_version": version, "threads": threads, "origin": "calibrated",
        "bandwidth_bytes_per_s": levels, "tile": TILE if profile.arch == "x86_64" else TILE // 2, "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    compute = profile.unit(next(r.unit for r in profile.runtimes if r.name == runtime))
    spread = []
    for precision in dict.fromkeys(s.precision for s in samples):
        mine = [s for s in samples if s.precision == precision]
        new, residuals = _fit_precision(profile, compute, runtime, head, rows, mine, precision)
        rows += new
        spread += residuals
    sd = math.sqrt(sum(r * r for r in spread) / max(1, len(spread)))
    call = next((r.overhead_s for r in rows if r.op == "call"), 0.0)
    plain = next((r for r in rows if r.op == "elementwise"), None)
    if plain:  # what was not measured by itself moves data about as fast
        rows.append(plain.model_copy(update={"op": "*", "precision": "*", "log_sd": max(0.5, plain.log_sd)}))
    return Efficiency(**head, rows=tuple(rows), call_overhead_s=call, call_log_sd=math.hypot(WHOLE_SD, 0.5 * sd))


def _fit_precision(
    profile: DeviceProfile, compute: ComputeUnit, runtime: str, head: dict[str, Any], known: list[OpRate], samples: list[Sample],
    precision: str,
) -> tuple[list[OpRate], list[float]]:  # fmt: skip
    """Fit (overhead, rate, per output) of each class, the weights a second of linear layers, and the call's (overhead, per tensor, per element) at
    once, on log residuals."""
    import numpy as np
    from scipy.optimize import least_squares

    from edgesdk.plan.cost import kind_of

    ops = sorted({kind_of(u) for s in samples for u in s.method.units if precision == "fp32" or u.name in s.choice})
    ops = [op for op in ops if op != "reshape"]
    names = ["call", *ops] if precision in ("fp32", "int8-static") else ops  # inputs and outputs stay float elsewhere
    if precision == ROUNDED[0]:
        names = [*ops, "break"]  # a delegate more, which the others of them cost, too
    top = max(compute.peak_ops_per_s.values()) / compute.cores
    tensor = next((r.per_tensor_s for r in known if r.op == "call"), 1e-6)
    start = np.log([v for n in names for v in ((2e-6, tensor, 1e-9) if n == "call" else (1e-6, 0.2 * top if n in _MACS else 2e9, 1e-10))])
    apart = "linear" in names and precision in ("int8-dynamic", "int4-g32", *ROUNDED)
    start = np.append(start, np.log(5e10)) if apart else start
    measured = np.log([s.seconds for s in samples])

    def rows_of(x: Any) -> list[OpRate]:
        v = np.exp(np.clip(x, -32, 40))
        found = []
        for i, name in enumerate(names):
            over, middle, out = (float(part) for part in v[3 * i : 3 * i + 3])
            second = {"ops_per_s": 1e12, "per_tensor_s": middle} if name == "call" else {"ops_per_s": 1e12 if name == "break" else middle}
            found.append(
                OpRate(
                    op=name,
                    precision=precision,
                    overhead_s=over,
                    per_output_s=out,
                    **second,
                    weights_per_s=float(v[-1]) if apart and name == "linear" else None,
                    log_sd=0.1,
                    n=len(samples),
                    source="calibrated here",
                )
            )
        return found

    def residuals(x: Any) -> Any:
        law = Efficiency(**head, rows=(*known, *rows_of(x)))
        predicted = [predict(s, profile, runtime, law) for s in samples]
        return np.concatenate([np.log(predicted) - measured, 0.02 * (x - start)])  # a weak pull keeps what no sample tells near its start

    answer = least_squares(residuals, start, diff_step=np.full(start.size, 1e-3), max_nfev=40)
    left = [float(r) for r in residuals(answer.x)[: len(samples)]]
    spread: dict[str, list[float]] = {}
    for sample, r in zip(samples, left, strict=True):
        for op in {kind_of(u) for u in sample.method.units}:
            spread.setdefault(op, []).append(r)

    def sd(op: str) -> float:
        values = spread.get(op, left)
        return max(LEAST_SD, math.sqrt(sum(v * v for v in values) / max(1, len(values) - 1)))

    return [r.model_copy(update={"log_sd": sd(r.op), "n": len(spread.get(r.op, left))}) for r in rows_of(answer.x)], left


_MACS = ("linear", "conv2d", "depthwise_conv2d", "matmul", "attention", "conv1d")


def predict(sample: Sample, profile: DeviceProfile, runtime: str, law: Efficiency) -> float:
    """Seconds a call of a micro-program by the planner's own cost law."""
    from edgesdk.plan.cost import method_seconds

    return method_seconds(sample.method, lambda unit: sample.choice.get(unit.name, "fp32"), profile, runtime, law)
