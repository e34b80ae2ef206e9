"""Automatic choice: every weight gets one option of the methods allowed, so that the model's loss is least within a size, or its size within a loss.

The additive problem is solved exactly (see `knapsack`), then refined on the true loss (see `evolve`). Nothing here looks at evaluation
data except `drop`, which is a promise about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from edgesdk.compress.engine import Engine
from edgesdk.compress.evolve import evolve
from edgesdk.compress.knapsack import Choice, choose
from edgesdk.compress.loss import Loss
from edgesdk.compress.table import OptionRow, Options, arrays, options_of
from edgesdk.compress.types import Change, Config, Family, Need, Step
from edgesdk.compress.weights import replaced, set_weight, weights_of
from edgesdk.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from edgesdk.model import ModelSpec

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


class AutoConfig(Config):
    bits: Annotated[float, Field(gt=0, le=32)] | None = None  # stored bits a weight, on average
    bytes: Annotated[int, Field(gt=0)] | None = None  # of all weights as they are stored
    drop: Annotated[float, Field(ge=0, le=1)] | None = None  # of evaluated quality, 0..1: the smallest model found that keeps to it
    count: Literal["stored", "resident"] = (
        "stored"  # bytes in the file, entropy-coded; or with a fixed number of bits, as a kernel reads them
    )
    methods: tuple[str, ...] | str = ()  # stages like gptq:bits=3; several in one text are divided by |
    score: Literal["loss", "interaction", "fisher", "change", "zscore", "uniform"] = "loss"  # what foretells a weight's loss
    generations: Annotated[int, Field(ge=0, le=1000)] = 12  # of evolution on the true loss; 0: the additive answer
    seed: int = 0
    engine: str = ""  # where codes are made: "", "processes:4", "dask", "tcp://host:8786"

    @model_validator(mode="after")
    def _one(self) -> AutoConfig:
        if sum(v is not None for v in (self.bits, self.bytes, self.drop)) != 1:
            raise ValueError("give one of bits, bytes and drop")
        return self


@dataclass
class _Search:
    spec: ModelSpec
    config: AutoConfig
    options: Options
    loss: Callable[[int], Loss] | None  # by how few of the cases it takes; None: no calibration data
    step: Step

    def __post_init__(self) -> None:
        self.names, self.rows, self.losses, self.sizes = arrays(self.options.table)

    def within(self, limit: float) -> tuple[tuple[int, ...], str]:
        """The options (by number) of least loss within a size, and how they were found. Raises `DoesNotFit`."""
        least = sum(r[0].bytes for r in self.rows)
        if limit < least:
            raise DoesNotFit(
                f"{self.spec.name}: its smallest options take {least} bytes, {int(limit)} are allowed", "allow more, or further methods"
            )
        found = choose(self.losses, self.sizes[None], [limit])
        picked = tuple(int(p) for p in found.picked)
        if not self.config.generations or self.loss is None:
            return picked, _told(found)
        judges = [lambda c, every=every: self.true(c, every) for every in (8, 2, 1)]
        grown = evolve(
            picked, self.sizes, [len(r) for r in self.rows], limit, judges,
            generations=self.config.generations, seed=self.config.seed, step=lambda text, share: self.step(text, 0.9 + 0.1 * share),
        )  # fmt: skip
        return (
            grown.picked,
            f"{_told(found)}; evolution on the true loss: {grown.start:.4g} to {grown.loss:.4g} in {grown.evaluations} tries",
        )

    def chosen(self, picked: Sequence[int]) -> dict[str, OptionRow]:
        return {n: self.rows[i][p] for i, (n, p) in enumerate(zip(self.names, picked, strict=True))}

    def values(self, picked: Sequence[int]) -> dict[str, Any]:
        return {n: self.options.value(row) for n, row in self.chosen(picked).items() if row.key}

    def true(self, picked: Sequence[int], every: int = 1) -> float:
        assert self.loss is not None
        with replaced(self.spec, self.values(picked)):
            return self.loss(every)(self.spec)

    def smallest(self, drop: float) -> tuple[tuple[int, ...], str]:
        """Bisection over the size; quality is evaluated at most ten times. Raises `DoesNotFit` where nothing keeps to the drop."""
        from edgesdk.plan.fake_quant import run

        evaluate = self.spec.evaluate
        if evaluate is None:
            raise InputError(f"auto:drop={drop}: {self.spec.name} has no evaluate()", "give a size instead: auto:bits=4")
        before = float(evaluate(run(self.spec)))
        low, high = float(sum(r[0].bytes for r in self.rows)), float(sum(r[-1].bytes for r in self.rows))
        best: tuple[tuple[int, ...], str] | None = None
        most = sum(min((r.bytes for r in mine if r.error < 1e-3), default=mine[-1].bytes) for mine in self.rows)
        tried = 0
        for limit in (float(most), high):
            if best is None:
                got = self._keeps(limit, before - drop, evaluate)
                tried += 1
                if got:
                    best, high = got, limit
                else:
                    low = limit
        if best is None:
            raise DoesNotFit(
                f"{self.spec.name}: no choice of options keeps to a drop of {drop:g}", "allow a larger drop, or further methods"
            )
        while tried < 10 and high > 1.01 * low:
            limit = (low * high) ** 0.5
            got = self._keeps(limit, before - drop, evaluate)
            tried += 1
            best, high, low = (got, limit, low) if got else (best, high, limit)
        return best[0], f"{best[1]}; {tried} sizes evaluated to keep to a drop of {drop:g}"

    def _keeps(self, limit: float, wanted: float, evaluate: Any) -> tuple[tuple[int, ...], str] | None:
        from edgesdk.plan.fake_quant import run

        picked, told = self.within(limit)
        self.step(f"evaluating {int(limit)} bytes", 0.9)
        with replaced(self.spec, self.values(picked)):
            return (picked, told) if float(evaluate(run(self.spec))) >= wanted - 1e-12 else None


def _told(found: Choice) -> str:
    return f"additive loss {found.loss:.4g}, gap {found.gap:.2%} by {found.by} in {found.seconds * 1e3:.0f} ms"


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
        if config.drop is not None:
            picked, told = search.smallest(config.drop)
        else:
            elements = sum(search.options.table.elements.values())
            picked, told = search.within(config.bytes if config.bytes is not None else config.bits * elements / 8)  # type: ignore[operator]
        codes = {n: search.options.code(row) for n, row in search.chosen(picked).items() if row.key}
        for name, value in search.values(picked).items():
            set_weight(spec, name, value)
        made_by = {n: (row.method, row.settings, row.error) for n, row in search.chosen(picked).items()}
        return Change(notes=(f"auto: {told}",), codes=codes, made_by=made_by)


def searched(spec: ModelSpec, config: AutoConfig, step: Step) -> _Search:
    """The options of a model, ready to be chosen from. Raises `InputError`."""
    from edgesdk.compress.pipeline import stages_of

    data = spec.calibration is not None
    given = config.methods.split("|") if isinstance(config.methods, str) else config.methods
    stages = stages_of([g for g in given if g] or (WITHOUT_DATA if not data else STAGES if config.count == "stored" else RESIDENT))
    score = config.score if data or config.score in ("zscore", "uniform") else "zscore"
    loss = cache(lambda every: Loss(spec.reference or spec, every=every)) if data else None
    options = options_of(spec, stages, lambda: loss(2), score, Engine(config.engine), step, resident=config.count == "resident")  # type: ignore[misc]
    return _Search(spec, config, options, loss, step)


METHOD = Auto()
