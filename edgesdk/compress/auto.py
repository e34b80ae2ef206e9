"""Automatic choice: every weight gets one option of the methods allowed, so that the model's loss is least within budgets, or what it takes within a loss.

Budgets are stored bytes and, on a device, memory, latency and energy as the planner predicts them (see `forms`). The additive problem is solved exactly
(see `knapsack`), then refined on the true loss (see `evolve`). Nothing here looks at evaluation data except `drop`, which is a promise about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from edgesdk.compress.engine import Engine
from edgesdk.compress.forms import settings_of
from edgesdk.compress.loss import Loss
from edgesdk.compress.search import Search
from edgesdk.compress.table import options_of
from edgesdk.compress.types import Change, Config, Family, Need, Step
from edgesdk.compress.weights import weights_of
from edgesdk.units import parse_bytes, parse_joules, parse_latencies

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec
    from edgesdk.plan.types import Budget

STAGES = ("gptq:bits=8,group=0", *(f"gptq:rate={r}" for r in (0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)))
"""What is tried where the recipe names no methods."""
RESIDENT = (
    *(f"gptq:bits={b},group={g}" for b in (2, 2.5, 3, 3.5, 4, 5, 6, 8) for g in (0, 32)),
    "any4:bits=4",
    "any4:bits=3",
    "vptq:bits=2",
)
"""The same where bytes are counted as a kernel indexes them."""
WITHOUT_DATA = (
    "rtn:bits=8,group=0",
    "rtn:bits=6,group=0",
    "rtn:bits=4,group=0",
    "rtn:bits=4,group=32",
    "rtn:bits=3,group=32",
    "rtn:bits=2,group=32",
)


ON_DEVICE = ("gptq:bits=4,group=32", "svd:size=0.5", "svd:size=0.25")
"""What is tried besides on a device: the grid that runs as int4, and factors that run as two thinner layers."""


def _text(parse: Callable[[str], Any]) -> BeforeValidator:
    return BeforeValidator(lambda v: parse(v) if isinstance(v, str) else v)


class AutoConfig(Config):
    bits: Annotated[float, Field(gt=0, le=32)] | None = None  # stored bits a weight, on average
    bytes: Annotated[int, _text(parse_bytes), Field(gt=0)] | None = None  # of all weights as they are stored
    drop: Annotated[float, Field(ge=0, le=1)] | None = None  # of evaluated quality, 0..1: a promise that is kept
    device: str = ""  # a name, an alias or a TOML file; the budgets below are for it
    runtime: str = ""  # "": the best of those it has
    threads: Annotated[int, Field(ge=1)] | None = None
    latency: Annotated[str, BeforeValidator(lambda v: f"{v:.9f}" if isinstance(v, int | float) else v)] = (
        ""  # 20ms (a whole answer), decode=2ms|prefill=9ms
    )
    memory: Annotated[int, _text(parse_bytes), Field(gt=0)] | None = None  # bytes, all that a model takes, its runtime included
    energy: Annotated[float, _text(parse_joules), Field(gt=0)] | None = None  # joules of one whole answer, at most
    minimise: Literal["", "loss", "bytes", "latency"] = ""  # within the budgets; "": the loss, or with `drop` the bytes
    count: Literal["stored", "resident"] = (
        "stored"  # bytes in the file, entropy-coded; or with a fixed number of bits, as a kernel reads them
    )
    methods: tuple[str, ...] | str = ()  # stages like gptq:bits=3; several in one text are divided by |
    score: Literal["loss", "interaction", "fisher", "change", "zscore", "uniform"] = "loss"  # what foretells a weight's loss
    generations: Annotated[int, Field(ge=0, le=1000)] = 12  # of evolution on the true loss; 0: the additive answer
    seed: int = 0
    engine: str = ""  # where codes are made: "", "processes:4", "dask", "tcp://host:8786"

    @model_validator(mode="after")
    def _agrees(self) -> AutoConfig:
        if sum(v is not None for v in (self.bits, self.bytes)) > 1:
            raise ValueError("give one of bits and bytes")
        timed = {"latency": self.latency, "memory": self.memory, "energy": self.energy, "runtime": self.runtime, "threads": self.threads}
        alone = [k for k, v in timed.items() if v] if not self.device else []
        if alone:
            raise ValueError(f"{alone[0]} depends on the device: give device, too")
        if not any((self.bits, self.bytes, self.drop is not None, self.latency, self.memory, self.energy)):
            raise ValueError("give a budget: bits, bytes or drop, or with a device latency, memory or energy")
        if self.drop is not None and self.minimise == "loss":
            raise ValueError("drop holds the quality: minimise bytes or latency")
        if self.drop is None and self.minimise in ("bytes", "latency"):
            raise ValueError(f"minimise={self.minimise} needs drop: the quality that may be lost for it")
        if self.minimise == "latency" and not self.device:
            raise ValueError("latency depends on the device: give device, too")
        if any(s <= 0 for s in self.latencies().values()):
            raise ValueError(f"latency={self.latency}: no time at all is too little")
        return self

    def latencies(self) -> dict[str, float]:
        """Seconds by method; "" is one whole answer."""
        return parse_latencies(t for t in self.latency.split("|") if t.strip())

    def limits(self, elements: int) -> dict[str, float]:
        """What may be taken, by metric; `elements` is how many weights there are."""
        size = self.bytes if self.bytes is not None else self.bits * elements / 8 if self.bits is not None else None
        timed = {f"latency:{m}" if m else "latency": s for m, s in self.latencies().items()}
        given = {"storage": size, "memory": self.memory, **timed, "energy": self.energy}
        return {k: float(v) for k, v in given.items() if v is not None}


def as_settings(budget: Budget) -> dict[str, Any]:
    """A plan's budget as settings of `auto`."""
    times = {"": budget.latency_s, **budget.method_latency_s}
    latency = "|".join(f"{m}={s:.9f}" if m else f"{s:.9f}" for m, s in times.items() if s is not None)
    given = {
        "bytes": budget.storage_bytes, "drop": budget.quality_drop, "latency": latency, "memory": budget.memory_bytes, "energy": budget.energy_j,
    }  # fmt: skip
    return {k: v for k, v in given.items() if v not in (None, "")}


class Auto:
    level: ClassVar[Literal["model"]] = "model"
    name: ClassVar[str] = "auto"
    family: ClassVar[Family] = "mixed"
    source: ClassVar[str] = "multiple-choice knapsack with a Lagrangian bound; EvoPress (arXiv:2410.14649)"
    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    config: ClassVar[type[AutoConfig]] = AutoConfig

    def why_not(self, spec: ModelSpec, config: AutoConfig) -> str | None:
        return None if weights_of(spec) else "it has no linear, convolution or embedding weights"

    def options(self, spec: ModelSpec) -> Sequence[AutoConfig]:
        return [AutoConfig(bits=b) for b in (2.5, 3, 3.5, 4, 6, 8)]

    def apply(self, spec: ModelSpec, config: AutoConfig, step: Step) -> Change:
        search = searched(spec, config, step)
        limits = config.limits(sum(search.options.table.elements.values()))
        if config.drop is None:
            found = search.within(limits)
        else:
            found = search.smallest(config.drop, limits, "latency" if config.minimise == "latency" else "storage")
        return search.change(found)


def searched(spec: ModelSpec, config: AutoConfig, step: Step) -> Search:
    """The options of a model, ready to be chosen from. Raises `InputError`."""
    from edgesdk.compress.pipeline import stages_of

    data = spec.calibration is not None
    given = config.methods.split("|") if isinstance(config.methods, str) else config.methods
    usual = (*(STAGES if config.count == "stored" else RESIDENT), *(ON_DEVICE if config.device else ())) if data else WITHOUT_DATA
    stages = stages_of([g for g in given if g] or usual)
    settings = []
    if config.device:  # before anything that takes long
        timed = [m for m in config.latencies() if m]
        settings = settings_of(spec, config.device, config.runtime, config.threads, timed, config.energy is not None)
    score = config.score if data or config.score in ("zscore", "uniform") else "zscore"
    loss = cache(lambda every: Loss(spec.reference or spec, every=every)) if data else None
    options = options_of(spec, stages, lambda: loss(2), score, Engine(config.engine), step, resident=config.count == "resident")  # type: ignore[misc]
    return Search(options, settings, loss if config.generations else None, step, config.generations, config.seed)


METHOD = Auto()
