"""Rows of published measurements: read, checked, and turned into cases."""

from __future__ import annotations

import csv
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TextIO

from edgesdk.errors import InputError
from edgesdk.predict import names, sequence
from edgesdk.predict.layers import Layer
from edgesdk.predict.machines import Machine, find_machine
from edgesdk.predict.physics import Case

COLUMNS = ("device", "model", "precision", "runtime", "threads", "value", "unit", "note", "source")
CONTEXT = 256  # tokens in the cache while decoding, where a row states none
PROMPT = 128  # tokens of a prompt, where a row states none
OLD_NPU = {"qcs6490", "qcm6690", "snapdragon-7-gen4"}  # ONNX Runtime left quantized programs on the CPU of these


@dataclass(frozen=True)
class Row:
    """One published measurement. `seconds` is the time of one inference, one token decoded or one prompt token."""

    line: int
    device: str
    model: str
    precision: str
    runtime: str
    threads: int | None
    value: float
    unit: str
    note: str
    source: str

    @property
    def rate(self) -> bool:
        """The value is tokens a second, not a time."""
        return "/s" in self.unit

    @property
    def seconds(self) -> float:
        if self.rate:
            return 1.0 / self.value
        return self.value * (1.0 if self.unit.strip() == "s" else 1e-6 if self.unit.strip() in ("us", "µs") else 1e-3)


def _row(data: dict[str, str | None], line: int, where: str) -> Row:
    cells = {k: (data.get(k) or "").strip() for k in COLUMNS}
    hint = "correct the cell and run the command again"
    try:
        value = float(cells["value"])
        threads = int(cells["threads"]) if cells["threads"] else None
    except ValueError:
        bad = "value" if not _is_number(cells["value"]) else "threads"
        raise InputError(f"{where}: line {line}: {bad} = '{cells[bad]}' is not a number", hint) from None
    if not 0 < value < float("inf"):
        raise InputError(f"{where}: line {line}: value = '{cells['value']}' is not above zero", hint)
    if threads is not None and threads < 1:
        raise InputError(f"{where}: line {line}: threads = '{threads}' is not at least 1", hint)
    unit = cells["unit"]
    if unit.split()[:1] not in (["ms"], ["s"], ["us"], ["µs"], ["tok/s"], ["tokens/s"]):
        raise InputError(f"{where}: line {line}: unit = '{unit}' is not known", "write ms, s, us, 'tok/s decode' or 'tok/s prompt'")
    c = cells
    return Row(line, c["device"], c["model"], c["precision"], c["runtime"], threads, value, unit, c["note"], c["source"])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read(handle: TextIO, where: str) -> list[Row]:
    reader = csv.DictReader(handle)
    missing = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
    if missing:
        raise InputError(f"{where}: column '{missing[0]}' is missing", f"the header must be {','.join(COLUMNS)}")
    rows = [_row(data, reader.line_num, where) for data in reader]
    if not rows:
        raise InputError(f"{where}: has no rows", "give at least one measurement")
    return rows


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a CSV file. Raises `InputError` naming the file, the line and the cell."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as handle:
            return _read(handle, str(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})", f"give a CSV file with the columns {','.join(COLUMNS)}") from None


def _llm_layers(model: sequence.Language, prompt: bool) -> tuple[Layer, ...]:
    n = PROMPT if prompt else 1
    d, one = model.d, model.block_weights / model.layers / 4
    op = "pw" if prompt else "fc"
    body = [Layer(op, n * one, one, float(n * d), float(n * d), d) for _ in range(4 * model.layers)]  # type: ignore[arg-type]
    cache = model.cache_elements(CONTEXT) / 2
    return (
        *body,
        Layer("fc", model.head_weights, model.head_weights, float(d), float(model.vocab), d),
        Layer("bmm", cache * n, 0.0, cache, 0.0, d),
    )


def _cpu(machine: Machine, kind: str, threads: int, program: str) -> tuple[float, float, float]:
    """(peak MAC/s, bandwidth, spread) of `threads` cores at a data type."""
    dtype = 2 if kind in ("int8", "int4", "w8a16") else 1 if kind == "fp16" else 0
    one, total = machine.cpu_peak(dtype, threads, program)
    share = machine.one_core / machine.bandwidth
    used = sum(min(core[3] / machine.cores[0][3], 1.0) for core in machine.cores[:threads])
    return total, machine.bandwidth * (1 - (1 - share) ** used), total / one


@cache
def _net(model: str, hub: bool) -> tuple[Layer, ...] | None:
    net = names.cnn_or_transformer(model, hub)
    return tuple(net.layers) if net else None


def case_of(row: Row) -> Case | str:
    """The case a row asks for, or why it is unknown."""
    machine = find_machine(row.device)
    if machine is None:
        return f"device '{row.device}' is not known"
    prec = names.precision(row.precision, row.model)
    quantized = prec.kind in ("int8", "int4", "w8a16")
    has_gpu = bool(machine.gpu)
    hub = bool(machine.npu) and bool(re.search("ai-?hub", f"{row.source} {row.runtime}".lower().replace(" ", "-")))
    net = None if row.rate else _net(row.model, hub)
    attention = sum(layer.op == "bmm" for layer in net or ()) >= 8
    rt = names.runtime(row.runtime, row.device, row.note, quantized, bool(machine.npu), has_gpu, machine.name in OLD_NPU, attention)
    if rt is None:
        return f"runtime '{row.runtime}' is not known"
    llm = row.rate
    model_name = names.canonical(row.model)
    if llm:
        found = names.language(row.model)
        if found is None:
            return f"model '{row.model}' is not known"
        model_name, layers = found[0], _llm_layers(found[1], "prompt" in row.unit or "prefill" in row.unit)
    else:
        if net is None:
            return f"model '{row.model}' is not known"
        layers = net
    return _case(row, machine, rt, prec, model_name, layers, llm, attention)


def _case(
    row: Row, machine: Machine, rt: names.Runtime, prec: names.Precision, model: str, layers: tuple[Layer, ...], llm: bool, attention: bool
) -> Case | str:
    kind, spread, clock = prec.kind, 1.0, 2e9
    if rt.engine in ("cpu", "ort"):
        if kind == "fp":
            kind = "fp16" if rt.variant in ("llama.cpp", "ollama", "llamafile", "whisper.cpp", "ncnn", "ncnn-2021") else "fp32"
        if rt.engine == "ort" and (kind == "w8a16" or attention):
            kind = "fp32"  # ONNX Runtime's CPU kernels take 8-bit activations only, and no quantized attention: the rest runs as floats
        if rt.variant.startswith(("pytorch", "torchscript", "tf-", "paddle")):
            kind = "fp32"
        alone = "ultralytics" in row.runtime.lower() and rt.variant in ("tflite", "paddle")  # these take one thread unless told
        threads = min(row.threads or (1 if alone else machine.default_threads()), len(machine.cores))
        peak, band, spread = _cpu(machine, kind, threads, rt.variant)
        clock = machine.cores[0][3]
    else:
        if rt.engine == "npu":
            kind = "fp16" if kind in ("fp", "fp32", "fp16") else kind
            peaks = machine.npu
        else:
            kind = "fp16" if kind == "fp" or rt.engine == "vulkan" else kind
            peaks = machine.gpu
        key = {"w8a16": "int8", "int4": "int8"}.get(kind, kind)
        if llm and rt.engine == "gpu":
            key = "fp16"
        if key not in peaks:
            return f"the {rt.engine} of '{machine.name}' has no known {kind} peak"
        peak, band = peaks[key], machine.bandwidth
        if rt.engine == "npu":
            clock = 2e9 * (machine.npu["int8"] / 22.5e12) ** 0.8  # an NPU's overheads shrink with its generation as its peak grows
    if rt.variant in machine.plain and kind == "fp16":
        kind = "fp32"
    wide = kind == "fp32" or (kind == "fp16" and rt.engine in ("cpu", "ort") and machine.cores[0][0] == machine.cores[0][1] and not llm)
    wb = 4.0 if wide else prec.weight_bits / 8
    ab = 4.0 if wide else (1.0 if kind == "int8" and not llm else 2.0)
    per = float(PROMPT) if llm and ("prompt" in row.unit or "prefill" in row.unit) else 1.0
    engine = f"llm-{rt.engine}" if llm else rt.engine
    return Case(engine, rt.variant, kind, machine.name, model, layers, peak, band, spread, clock, wb, ab, per, machine.core)
