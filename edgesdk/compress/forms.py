"""What options run as on a device, and what they take of its budgets.

A code decides what is stored. What a weight runs as is a form: one of the planner's precisions. Runtimes hold what a code decodes to as float32, or round
it to int8 a channel; a grid of 4 bits with a scale for 32 columns runs as int4 as it is; a low-rank code runs multiplied out, or as two thinner layers.
Errors of forms do not depend on the device and are kept in the cache; uses come from the planner's own table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgesdk.cache import cached
from edgesdk.compress.lord import unsplit
from edgesdk.compress.table import Options, drawn, probes_of, pruned
from edgesdk.compress.types import Step
from edgesdk.compress.weights import holders, output_error, replaced, stats_of, weights_of
from edgesdk.devices import load_device
from edgesdk.errors import UnknownName
from edgesdk.graph import trace
from edgesdk.graph.memory import weight_bytes
from edgesdk.graph.types import Unit
from edgesdk.noun import Noun, Part
from edgesdk.packed import Code, decode, pack
from edgesdk.plan.cost import working_set
from edgesdk.plan.fake_quant import Ranges, round_inputs, round_weight
from edgesdk.plan.harm import Harm
from edgesdk.plan.setting import Setting, cost_of, need_power, offered_by, power_of, runtimes_of, setting_of, table_of
from edgesdk.plan.subject import Facts, Subject
from edgesdk.plan.types import Precision, Workload

if TYPE_CHECKING:
    import torch

    from edgesdk.compress.table import OptionRow
    from edgesdk.compress.types import Stats, Weight
    from edgesdk.graph.types import MethodGraph
    from edgesdk.model import ModelSpec

INT8: tuple[Precision, ...] = ("int8-dynamic", "int8-weight-only", "int8-static")


class Way(Part):
    """An option of a weight in one form."""

    weight: str
    option: int  # its place among the weight's options
    form: Precision
    rank: int = 0  # above 0: as two layers with this many channels in between
    bytes: int  # stored
    error: float
    loss: float


class Ways(Noun):
    KIND: ClassVar[str] = "ways"

    rows: tuple[Way, ...]


def halves(code: Code) -> tuple[Code, Code]:
    """A low-rank code as those of the two layers, the first one first, with a scale in every grid."""

    def full(part: Code) -> Code:
        if part.kind != "grid" or part.arrays[1].size:
            return part
        return replace(part, arrays=(part.arrays[0], np.ones((part.shape[0], 1), np.float16), part.arrays[2]))

    return full(code.parts[1]), full(code.parts[0])


def in_form(code: Code | None, matrix: torch.Tensor, way: Way) -> torch.Tensor:
    """The weight [rows, cols] as it runs. `matrix` is what the code decodes to; `code` is needed for two layers only."""
    import torch

    if way.rank:
        assert code is not None
        first, second = (torch.from_numpy(decode(half)) for half in halves(code))
        return round_weight(second, way.form) @ round_weight(first, way.form)
    return round_weight(matrix, way.form) if way.form in INT8 else matrix


def ways_of(options: Options, step: Step) -> Ways:
    """Every option of every weight in every form that some runtime may have. Kept in the cache beside the options."""
    return cached("options", f"{options.key}-ways", Ways, lambda: Ways(rows=tuple(_all_ways(options, step))))


def _all_ways(options: Options, step: Step) -> Iterator[Way]:
    spec, weights, held = options.spec, weights_of(options.spec), holders(options.spec)
    stats = stats_of(spec, step=step) if spec.calibration is not None else {}
    for i, (name, weight) in enumerate(weights.items()):
        step(f"forms of {name}", 0.9 * i / len(weights))
        rows, seen = options.table.of(name), stats.get(name)
        points = [(r.error, r.loss) for r in probes_of(pruned(rows)) if r.error > 0 and r.loss > 0]
        splits = unsplit(spec, weight, held[name]) is None
        for at, row in enumerate(rows):
            for way in _ways(options, weight, row, at, splits):
                error = way.error + _noise(weight, seen, way)
                if way.form in INT8 or way.rank:
                    code = options.code(row) if row.key else None
                    value = options.value(row) if row.key else weight.matrix
                    error += output_error(weight, in_form(code, value, way), seen)
                yield way.model_copy(update={"error": error, "loss": drawn(points, error) if error != row.error else row.loss})


def _ways(options: Options, weight: Weight, row: OptionRow, at: int, splits: bool) -> Iterator[Way]:
    """Without the error of the form where that is to be worked out."""
    plain = Way(weight=weight.name, option=at, form="fp32", bytes=row.bytes, error=row.error, loss=row.loss)
    yield plain
    yield from (plain.model_copy(update={"form": form, "error": 0.0}) for form in INT8 if weight.op != "embedding" or form == INT8[1])
    if row.native == "int4-g32":
        yield plain.model_copy(update={"form": "int4-g32"})
    if not splits or not row.key:
        return
    code = options.code(row)
    if code.kind == "lowrank":
        size, rank = sum(len(pack(half)) for half in halves(code)), code.parts[0].shape[1]
        two = plain.model_copy(update={"rank": rank, "bytes": size, "error": 0.0})
        yield from (two.model_copy(update={"form": form}) for form in ("fp32", *INT8))


def _noise(weight: Weight, stats: Stats | None, way: Way) -> float:
    """The relative output error of inputs rounded to int8, each evenly by up to half a step: by a range of their own for each position, about that of as
    many normal numbers, or by one range for all."""
    if stats is None or way.form in ("fp32", "int8-weight-only"):
        return 0.0
    power = float(stats.gram.diagonal(dim1=1, dim2=2).mean())  # mean square of an input
    span = 2 * float(stats.absmax.max()) if way.form == "int8-static" else 2 * math.sqrt(2 * power * math.log(max(2, weight.cols)))
    w = weight.matrix.double().reshape(stats.gram.shape[0], -1, weight.cols)
    import torch

    signal = float(torch.einsum("gri,gij,grj->", w, stats.gram, w))
    return (span / 255) ** 2 / 12 * float((w * w).sum()) / max(signal, 1e-30) * (2 if way.rank else 1)


@dataclass
class Problem:
    """The ways of every weight on one runtime of a device (or on none: stored bytes only), what they lose, and what they take."""

    names: list[str]
    ways: list[list[Way]]
    setting: Setting | None = None
    uses: list[list[dict[str, float]]] = field(default_factory=list)  # by weight and way: memory, latency, latency:METHOD, energy
    fixed: dict[str, float] = field(default_factory=dict)  # what no choice changes

    @property
    def where(self) -> str:
        s = self.setting
        return f" on {s.device.name} with {s.runtime}{', all in static int8' if s.whole else ''}" if s else ""

    def kept_for(self, metrics: Sequence[str]) -> Problem:
        """Only ways that are better than each other one in something that counts, fewest bytes first."""
        ways, uses = [], []
        for mine, taken in zip(self.ways, self.uses, strict=True):
            rows = np.array([[w.loss, *(u.get(k, w.bytes) for k in metrics)] for w, u in zip(mine, taken, strict=True)])
            order = sorted(range(len(mine)), key=lambda j: (mine[j].bytes, mine[j].error, *rows[j]))
            kept: list[int] = []
            for j in order:
                if not any((rows[k] <= rows[j]).all() for k in kept):
                    kept = [k for k in kept if not (rows[j] <= rows[k]).all()] + [j]
            ways.append([mine[j] for j in kept])
            uses.append([taken[j] for j in kept])
        return replace(self, ways=ways, uses=uses)

    def arrays(self, metrics: Sequence[str]) -> tuple[Any, Any]:
        """Losses [weights, ways], inf where a weight has no such way, and uses [metrics, weights, ways]."""
        width = max(len(mine) for mine in self.ways)
        loss, use = np.full((len(self.ways), width), np.inf), np.zeros((len(metrics), len(self.ways), width))
        for i, (mine, taken) in enumerate(zip(self.ways, self.uses, strict=True)):
            loss[i, : len(mine)] = [w.loss for w in mine]
            for k, metric in enumerate(metrics):
                use[k, i, : len(mine)] = [w.bytes if metric == "storage" else u[metric] for w, u in zip(mine, taken, strict=True)]
        return loss, use


def stored_only(options: Options) -> Problem:
    """Every option as it decodes, counted by its stored bytes."""
    names = list(options.table.elements)
    ways = []
    for name in names:
        rows = options.table.of(name)
        at = {id(r): i for i, r in enumerate(rows)}
        ways.append([Way(weight=name, option=at[id(r)], form="fp32", bytes=r.bytes, error=r.error, loss=r.loss) for r in pruned(rows)])
    return Problem(names, ways, None, [[{} for _ in mine] for mine in ways])


def on_setting(options: Options, ways: Ways, s: Setting) -> Problem | None:
    """The ways that a runtime really has; None where it has none for some weight (static int8 throughout)."""
    table, fixed, _ = table_of(s, slower=True)
    offered = {(o.group, o.precision): dict(o.use) for o in table}
    names = list(options.table.elements)
    for group in {o.group for o in table} - set(names):  # weights that no method compresses stay as they are
        first = next(o for o in table if o.group == group)
        fixed = {k: v + first.use.get(k, 0.0) for k, v in fixed.items()}
    known = {g for g, _ in offered}
    calls = _calls(s)
    kept: dict[str, tuple[list[Way], list[dict[str, float]]]] = {n: ([], []) for n in names}
    nothing = {k: 0.0 for k in fixed if k != "storage"}
    for way in ways.rows:
        if way.weight not in known:
            use = nothing if way.form == "fp32" and not way.rank else None
        elif way.rank:
            use = _split_use(s, calls[way.weight], way)
        else:
            use = offered.get((way.weight, way.form))
        if use is not None:
            kept[way.weight][0].append(way)
            kept[way.weight][1].append({k: use.get(k, 0.0) for k in nothing})
    if not all(mine for mine, _ in kept.values()):
        return None
    return Problem(names, [kept[n][0] for n in names], s, [kept[n][1] for n in names], fixed)


def _calls(s: Setting) -> dict[str, list[tuple[MethodGraph, Unit]]]:
    found: dict[str, list[tuple[MethodGraph, Unit]]] = {}
    for method in s.graph.methods:
        for unit in method.units:
            if unit.weight:
                found.setdefault(unit.weight, []).append((method, unit))
    return found


def split_units(unit: Unit, rank: int) -> tuple[Unit, Unit]:
    """A linear or convolution unit as two with `rank` channels in between."""
    positions, path = unit.macs // max(1, unit.rows * unit.cols), unit.name.split("#")[0]
    first = {"name": f"{path}.0", "weight": f"{path}.0.weight", "rows": rank, "macs": positions * rank * unit.cols}
    second = {"name": f"{path}.1", "weight": f"{path}.1.weight", "cols": rank, "macs": positions * rank * unit.rows}
    return (
        unit.model_copy(update={**first, "out_elements": positions * rank, "bias_elements": 0}),
        unit.model_copy(update={**second, "in_elements": positions * rank}),
    )


def _split_use(s: Setting, calls: Sequence[tuple[MethodGraph, Unit]], way: Way) -> dict[str, float] | None:
    use: dict[str, float] = {"latency": 0.0, "memory": 0.0}
    for method, unit in calls:
        pair, touched = split_units(unit, way.rank), working_set(method, {})
        if not all(way.form in offered_by(s, half, method.name) for half in pair):
            return None
        value = sum(cost_of(s, half, way.form, touched).seconds for half in pair)
        use["latency"] += value * method.unroll
        use[f"latency:{method.name}"] = use.get(f"latency:{method.name}", 0.0) + value
        use["memory"] = float(sum(weight_bytes(half, way.form, s.runtime) for half in pair))
    return use | {"energy": use["latency"] * (power_of(s.device) or 0.0)}


@contextmanager
def running(spec: ModelSpec, values: Mapping[str, torch.Tensor], forms: Mapping[str, str], ranges: Ranges) -> Iterator[None]:
    """Within it the weights have these values, and inputs of those that run in int8 are rounded as the runtimes round them."""
    import torch

    with replaced(spec, values), ExitStack() as undo:
        held = holders(spec)
        for name, form in forms.items():
            for module in {id(m): m for _, _, m in held[name]}.values():
                if form not in ("fp32", "int8-weight-only") and not isinstance(module, torch.nn.Embedding):
                    undo.callback(round_inputs(module, form, ranges.get(name)).remove)
        yield


class _Loaded(Subject):
    """A model that is at hand, whatever earlier stages made of it."""

    def __init__(self, spec: ModelSpec) -> None:
        from edgesdk.compress.pipeline import digest_of

        self.ref = ""
        now = replace(spec, digest=digest_of(spec, ()))
        self.facts = Facts(
            name=spec.name, model_digest=now.digest, layout=spec.layout, quality_name=spec.quality_name,
            has_calibration=spec.calibration is not None, has_evaluate=spec.evaluate is not None,
        )  # fmt: skip
        self.__dict__ |= {"spec": spec, "graph": trace(now)}


def settings_of(spec: ModelSpec, device: str, runtime: str, threads: int | None, methods: Iterable[str], energy: bool) -> list[Setting]:
    """A device's runtimes as the planner sees them, each also with all of the model in static int8 where every weight can take that.

    `methods`: those with a latency budget; `energy`: whether there is a budget of it.
    Raises `InputError`: unknown device, runtime or method, too many threads, no power figure for a budget of energy.
    """
    profile = load_device(device)
    for method in methods:
        if method not in spec.methods:
            raise UnknownName(f"method of {spec.name}", method, spec.methods)
    if energy:
        need_power(profile)
    subject = _Loaded(spec)
    nothing = Harm(model_digest=subject.facts.model_digest, kind="rounding", quality=None, rows=())
    found = []
    for name in runtimes_of(profile, runtime or None, subject.graph, subject.facts.native):
        each = setting_of(subject, subject.graph, nothing, profile, name, threads, Workload())
        whole = replace(each, whole=True)
        weighted = [(m.name, u) for m in subject.graph.methods for u in m.units if u.weight_elements]
        found += [each, whole] if all(offered_by(whole, u, m) == ["int8-static"] for m, u in weighted) else [each]
    return found
