"""Every weight's options: what each takes in bytes, what it does to the weight's outputs, and what that does to the model's.

Codes and measurements are kept in the cache by content, so that another budget costs a search only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edgesdk.cache import cache_dir
from edgesdk.compress.engine import Engine
from edgesdk.compress.masks import mask_of
from edgesdk.compress.registry import METHODS, configured
from edgesdk.compress.types import Step
from edgesdk.compress.weights import output_error, replaced, stats_of, weights_of
from edgesdk.errors import InputError
from edgesdk.lower.inject import is_grid
from edgesdk.noun import Noun, Part
from edgesdk.packed import Code, decode, pack, unpack
from edgesdk.packed.entropy import PackedError

if TYPE_CHECKING:
    import torch

    from edgesdk.compress.loss import Loss
    from edgesdk.compress.pipeline import Stage
    from edgesdk.compress.types import Stats, Weight
    from edgesdk.model import ModelSpec


Native = Literal["", "int8", "int4-g32"]


class OptionRow(Part):
    weight: str
    method: str
    settings: dict[str, Any]
    key: str  # of the code in the cache; "" for the weight as it is
    bytes: int
    error: float  # relative squared error of the weight's outputs over the calibration inputs
    loss: float  # of the model with this option alone, measured or drawn between measured ones
    native: Native = ""  # the form that runtimes run it in as it is; "": they run what it decodes to


class OptionTable(Noun):
    """All options of a model, by weight; within a weight fewest bytes first, none worse than a smaller one of the same native form or of none."""

    KIND: ClassVar[str] = "options"

    model: str
    score: str
    elements: dict[str, int]
    rows: tuple[OptionRow, ...]

    def of(self, weight: str) -> list[OptionRow]:
        return [r for r in self.rows if r.weight == weight]


def read_code(key: str) -> Code | None:
    """A code kept in the cache, or None."""
    with contextlib.suppress(OSError, PackedError):
        return unpack(_place(key).read_bytes())
    return None


def _place(key: str) -> Path:
    return cache_dir("codes") / f"{key}.code"


def _keep(key: str, content: bytes) -> None:
    path = _place(key)
    part = path.with_suffix(f".{os.getpid()}.part")
    with contextlib.suppress(OSError):  # a full disk costs time, not the answer
        part.write_bytes(content)
        part.replace(path)


@cache
def _version(method: str) -> str:
    """sha256 of a method's own source and of the shared pieces codes are made of: an edited method makes its codes again."""
    packed = ("edgesdk.packed", *(f"edgesdk.packed.{n}" for n in ("entropy", "arrays", "matrices")))
    names = [METHODS[method], *packed, *(f"edgesdk.compress.{n}" for n in ("weights", "gptq", "rate", "walk"))]
    text = "".join(inspect.getsource(importlib.import_module(name)) for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Job:
    """One code to make: picklable, so that it can be made elsewhere."""

    weight: Weight
    stats: Stats | None
    method: str
    settings: dict[str, Any]

    def key(self) -> str:
        """What the code is kept under. Statistics count as float32: sums in float64 differ in their last bits from run to run."""
        total = hashlib.sha256(json.dumps([self.method, self.settings, _version(self.method)], sort_keys=True).encode())
        for t in (
            self.weight.matrix,
            self.weight.original,
            self.weight.kept,
            *((self.stats.gram.float(), self.stats.fisher) if self.stats else ()),
        ):
            total.update(t.detach().contiguous().numpy().tobytes() if t is not None else b"none")
        total.update(pack(self.weight.coded) if self.weight.coded is not None else b"")
        return total.hexdigest()[:40]


def make_code(job: _Job) -> bytes:
    """The packed code of a job. Runs on any worker of an engine."""
    found, settings = configured(job.method, job.settings)
    assert found.level == "weight"
    return pack(found.apply(job.weight, job.stats, settings))


@dataclass
class Options:
    """A table and what belongs to it while it is being used: decoded values of options, by key."""

    table: OptionTable
    spec: ModelSpec
    key: str  # what the table is kept under
    decoded: dict[str, torch.Tensor] = field(default_factory=dict)

    def value(self, row: OptionRow) -> torch.Tensor:
        """The weight [rows, cols] under an option. Raises `InputError` when its code has left the cache."""
        import torch

        if row.key not in self.decoded:
            self.decoded[row.key] = torch.from_numpy(decode(self.code(row)))
        return self.decoded[row.key]

    def code(self, row: OptionRow) -> Code:
        code = read_code(row.key)
        if code is None:
            raise InputError(f"the code of {row.weight} is no longer in the cache", "run the same command again: it is made anew")
        return code


def options_of(
    spec: ModelSpec, stages: Sequence[Stage], loss: Callable[[], Loss], score: str, engine: Engine, step: Step, *, resident: bool = False
) -> Options:
    """The table of all weights of `spec` under `stages` (weight methods only). `resident`: bytes count with a fixed number of bits.

    Raises `InputError`: a model method among the stages, a weight that holds NaN, no calibration data where a method needs it.
    """
    import re

    ready = []
    for stage in stages:
        found, config = configured(stage.method, stage.settings)
        if found.level != "weight":
            raise InputError(
                f"{stage.method} changes whole models, so it is no option of a single weight", "put it before auto in the recipe"
            )
        ready.append((stage, found, config))
    whole = _whole_key(spec, stages, [c for _, _, c in ready], score, resident)
    kept = cache_dir("options") / f"{whole}.json"
    if kept.exists():
        with contextlib.suppress(InputError):
            table = OptionTable.load(kept)
            if all(_place(r.key).exists() for r in table.rows if r.key):
                return Options(table, spec, whole)
    weights = {n: replace(w, coded=c, kept=mask_of(c) if c else None) for n, w in weights_of(spec).items() for c in [spec.codes.get(n)]}
    needs = frozenset().union(*(found.needs for _, found, _ in ready))
    stats = stats_of(spec, gradients="gradients" in needs, step=step) if needs else {}
    jobs = [
        _Job(w, stats.get(n) if found.needs else None, stage.method, config.model_dump(mode="json"))
        for n, w in weights.items() for stage, found, config in ready
        if re.search(stage.only, n) and not found.why_not(w, config) and (n in stats or not found.needs or w.op == "embedding")
    ]  # fmt: skip
    keys = [job.key() for job in jobs]
    _make(jobs, keys, engine, step)
    rows = [r for n, w in weights.items() for r in _useful(_rows(w, jobs, keys, stats.get(n), resident))]
    table = OptionTable(model=spec.name, score=score, elements={n: w.matrix.numel() for n, w in weights.items()}, rows=())
    options = Options(table, spec, whole)
    scored = _scored(options, rows, loss, score, step)
    options.table = options.table.model_copy(update={"rows": tuple(scored)})
    with contextlib.suppress(OSError):
        options.table.save(kept)
    return options


def _whole_key(spec: ModelSpec, stages: Sequence[Stage], configs: Sequence[Any], score: str, resident: bool) -> str:
    """What a table is kept under: the weights, their codes, what they are compared with, the calibration inputs, the stages and their sources."""
    from edgesdk.compress.pipeline import digest_of
    from edgesdk.plan.fake_quant import samples

    made = [[s.method, s.only, c.model_dump(mode="json"), _version(s.method)] for s, c in zip(stages, configs, strict=True)]
    reference = digest_of(spec.reference, ()) if spec.reference is not None else ""
    total = hashlib.sha256(json.dumps([digest_of(spec, ()), reference, score, resident, made, "native"], sort_keys=True).encode())
    for code in spec.codes.values():
        total.update(pack(code))
    for method in spec.methods if spec.calibration is not None else ():
        for sample in samples(spec, method, 64):
            for x in sample:
                total.update(x.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:40]


def _make(jobs: Sequence[_Job], keys: Sequence[str], engine: Engine, step: Step) -> None:
    missing = [(job, key) for job, key in zip(jobs, keys, strict=True) if not _place(key).exists()]
    for i, ((job, key), content) in enumerate(zip(missing, engine.map(make_code, [j for j, _ in missing]), strict=True)):
        step(f"coding {job.weight.name} with {job.method}", 0.6 * i / len(missing))
        _keep(key, content)


def _rows(weight: Weight, jobs: Sequence[_Job], keys: Sequence[str], stats: Stats | None, resident: bool) -> Iterator[OptionRow]:
    import torch

    yield OptionRow(weight=weight.name, method="", settings={}, key="", bytes=_now(weight, resident), error=0.0, loss=0.0)
    for job, key in zip(jobs, keys, strict=True):
        if job.weight.name == weight.name:
            code = read_code(key)
            if code is None:
                raise InputError("the cache of codes cannot be written", "free some disk space, or set EDGESDK_CACHE to another folder")
            error = output_error(weight, torch.from_numpy(decode(code)), stats)
            size = len(pack(code, entropy=False)) if resident else _place(key).stat().st_size
            row = OptionRow(weight=weight.name, method=job.method, settings=job.settings, key=key, bytes=size, error=error, loss=0.0)
            yield row.model_copy(update={"native": "int8" if is_grid(code, 8, 0) else "int4-g32" if is_grid(code, 4, 32) else ""})


def _now(weight: Weight, resident: bool) -> int:
    return len(pack(weight.coded, entropy=not resident)) if weight.coded is not None else 4 * weight.matrix.numel()


def pruned(rows: Iterable[OptionRow]) -> list[OptionRow]:
    """Fewest bytes first, and only those with less error than every smaller one."""
    kept: list[OptionRow] = []
    for row in sorted(rows, key=lambda r: (r.bytes, r.error)):
        if not kept or row.error < kept[-1].error:
            kept.append(row)
    return kept


def _useful(rows: Iterable[OptionRow]) -> list[OptionRow]:
    """Those that are worth something in some form: rows of no native form, and beside them those of each one."""
    mine = list(rows)
    kinds = {r.native for r in mine} | {""}
    kept = {id(r) for kind in kinds for r in pruned(r for r in mine if r.native in ("", kind)) if r.native == kind}
    return sorted((r for r in mine if id(r) in kept), key=lambda r: (r.bytes, r.error))


def _scored(options: Options, rows: list[OptionRow], loss: Callable[[], Loss], score: str, step: Step) -> list[OptionRow]:
    """Rows with their losses: measured at a weight's smallest and middle option (log-log between them), or a score times the error."""
    from edgesdk.compress.scores import scores

    by = {name: [r for r in rows if r.weight == name] for name in options.table.elements}
    best = {name: pruned(mine) for name, mine in by.items()}
    if score != "loss":
        probes = {n: mine[0] for n, mine in best.items() if mine[0].key}
        found = scores(score, options, probes, loss, step)
        return [r.model_copy(update={"loss": found.get(r.weight, 0.0) * r.error}) for r in rows]
    measure, answer = loss(), []
    for i, (name, mine) in enumerate(by.items()):
        step(f"sensitivity of {name}", 0.6 + 0.3 * i / len(by))
        tried = [r for r in probes_of(best[name]) if r.error > 0]
        points = []
        for row in tried:
            with replaced(options.spec, {name: options.value(row)}):
                points.append((row.error, max(measure(options.spec), 1e-12)))
        answer += [r.model_copy(update={"loss": drawn(points, r.error)}) for r in mine]
    return answer


def probes_of(rows: Sequence[OptionRow]) -> list[OptionRow]:
    """The rows of a weight, as `pruned` gives them, whose losses are measured: the smallest and the middle one."""
    return list({0: rows[0], len(rows) // 2: rows[len(rows) // 2]}.values())


def drawn(points: Sequence[tuple[float, float]], error: float) -> float:
    """The loss at an error: on the line through the measured points in logarithms; one point alone, or less, is proportional."""
    if error <= 0 or not points:
        return 0.0
    (e0, l0), (e1, l1) = points[0], points[-1]
    slope = math.log(l0 / l1) / math.log(e0 / e1) if e0 > e1 > 0 else 1.0
    slope = min(3.0, max(0.5, slope))
    base = (e0, l0) if abs(math.log(error / e0)) < abs(math.log(error / e1)) else (e1, l1)
    return float(base[1] * (error / base[0]) ** slope)
