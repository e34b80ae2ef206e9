"""Budget, Workload and Plan. Plain data; imports no runtime."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from edgesdk.noun import Noun, Part
from edgesdk.plan.lengths import Lengths
from edgesdk.sequence.sizes import Sizes

Precision = Literal[
    "fp32", "fp16", "int8-static", "int8-dynamic", "int8-weight-only", "int4-g32", "as-is", "native-int8", "native-int8-g32", "native-int4",
    "native-int4-g32", "native-int3", "native-int3-g32", "native-int2", "native-int2-g32", "native-table4", "native-table4-g32", "native-table3",
    "native-table3-g32", "native-table2", "native-table2-g32",
]  # fmt: skip
"""int4-g32: int4 weights in groups of 32, int8 dynamic activations (8da4w). as-is: a quantized flatbuffer kept. native-…: a unit of an ExecuTorch
program on our own kernels (`native.formats`)."""


class Workload(Part):
    batch: PositiveInt = 1
    input_length: PositiveInt | Lengths | None = None  # tokens of source or prompt of a sequence model; None: the model's own
    output_length: PositiveInt | Lengths | None = None  # tokens of one answer of a sequence model; None: the model's own `unroll`
    sustained: bool = False
    draft: Annotated[int, Field(ge=2)] | None = None  # tokens that a further program of a sequence model checks at once
    cache_bits: Literal[32, 16, 8, 4] | None = None  # of a sequence model's caches; None: 32, and fewer where memory forces it or they pay

    @property
    def sizes(self) -> Sizes:
        """As `load_model` takes them: what programs must hold. Caches of several lengths are made only where they are named."""
        read, written = self.read, self.written
        return Sizes(
            read.sizes if read else (), (written.buckets or (written.largest,)) if written else (), self.draft, self.cache_bits or 32
        )

    @property
    def read(self) -> Lengths | None:
        return Lengths.of([(self.input_length, 1.0)]) if isinstance(self.input_length, int) else self.input_length

    @property
    def written(self) -> Lengths | None:
        return Lengths.of([(self.output_length, 1.0)]) if isinstance(self.output_length, int) else self.output_length


class Budget(Part):
    """Any subset. Times are of one whole answer unless a method is named."""

    memory_bytes: PositiveInt | None = None
    latency_s: PositiveFloat | None = None
    method_latency_s: dict[str, PositiveFloat] = Field(default_factory=dict)  # per call of a method
    storage_bytes: PositiveInt | None = None
    energy_j: PositiveFloat | None = None  # of one whole answer, at most: the power mode's watts for as long as it takes
    quality_drop: Annotated[float, Field(ge=0, le=1)] | None = None


class Estimate(Part):
    """A prediction with its interval (80% unless said otherwise)."""

    value: float
    low: float
    high: float


class Spread(Part):
    """Over the distribution of lengths: the expected value with its interval, the median and what nine of ten texts stay below."""

    mean: Estimate
    p50: float
    p90: float


class Answers(Part):
    """Of a sequence model: the lengths that it has programs for, and seconds of answers of the lengths it is planned for."""

    inputs: tuple[int, ...]  # tokens of source or prompt; of several, a text takes the smallest that holds it
    caches: tuple[int, ...]  # slots of the caches, which move to the next size when they are full
    first_token: Spread
    per_token: Estimate  # each further token
    whole: Spread


class UnitPlan(Part):
    unit: str
    method: str
    op: str
    precision: Precision
    runtime: str = ""  # what runs it: the plan's, or "native" for our own kernels inside it
    weight_bytes: int  # with scales and zero points; 0 for a weight counted at its first use
    latency: Estimate  # seconds a call
    ops: float | None = None  # operations a call: 2 a MAC, or the elements that it reads and writes; None: planned before they were kept
    moved_bytes: float | None = None  # weights and activations that a call reads and writes
    bound: str  # "compute", "L1", "L2", "L3", "memory", "overhead"
    harm: float | None = None  # predicted quality drop, 0..1; None: unknown
    why: str


class MemoryAnswer(Part):
    """Bytes. `peak_bytes` is their sum, without weights that are read out of flash: what must fit beside the system."""

    weights_bytes: int
    activations_bytes: int
    cache_bytes: int
    cross_cache_bytes: int
    io_bytes: int
    packed_bytes: int = 0  # weights that several methods use and each packs for itself (XNNPACK): all copies but the first
    runtime_bytes: int | None  # None: unknown for this device
    delegate_bytes: int | None = None  # inside a delegate (XNNPACK's workspace), which no runtime's plan shows: at most, by liveness
    peak_bytes: int
    from_runtime: bool = False  # True once the lowered program's own memory plan replaced the estimate
    not_counted: tuple[str, ...] = ()


class Built(Part):
    """What a candidate became when it was really built and evaluated on this host."""

    program_bytes: int | None = None
    quality: float | None = None  # of the built program on held-out data
    refused: str | None = None  # why it was not built, or failed its check


class Candidate(Part):
    """One point of the front."""

    layout: str
    runtime: str
    precisions: dict[str, int]  # precision → number of units
    memory_bytes: int
    storage_bytes: int
    latency: Estimate
    quality_drop: float | None
    choice: dict[str, str] = Field(default_factory=dict)  # "method/unit" → precision, fp32 left out
    built: Built | None = None  # with --verify


class Drafting(Part):
    """A way of guessing tokens that one call checks together, and what it is predicted to bring (see `sequence.drafting`)."""

    kind: str  # "copy", "count"
    tokens: PositiveInt  # that one call checks, the last decided one among them
    rate: float | None  # of guessed tokens that were right
    answers: int  # that it was replayed on
    speedup: float  # of whole answers
    pays: bool


class SolverProof(Part):
    name: str  # "HiGHS"
    status: str
    objective: float
    bound: float
    gap: float  # (objective - bound) / max(|objective|, tiny)
    seconds: float


class BudgetCheck(Part):
    name: str
    limit: float
    reached: float
    fits: bool


class Plan(Noun):
    KIND: ClassVar[str] = "plan"

    model: str  # the reference given to --model
    model_name: str
    layout: str
    device: str
    runtime: str  # "executorch" | "litert" | …
    unit: str  # compute unit of the device
    threads: PositiveInt
    power_mode: str | None
    workload: Workload
    budget: Budget
    fits: bool
    checks: tuple[BudgetCheck, ...]  # the binding one first
    units: tuple[UnitPlan, ...]
    latency: Estimate  # seconds for one whole answer
    method_latency: dict[str, Estimate]  # seconds a call
    memory: MemoryAnswer
    storage_bytes: int
    quality: float | None  # reference quality on held-out data
    quality_drop: float | None  # predicted for this plan
    answers: Answers | None = None  # of a sequence model with caches
    drafting: Drafting | None = None  # of a sequence model with a program that checks several tokens; the bundle guesses where it pays
    proof: SolverProof
    front: tuple[Candidate, ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    digests: dict[str, str]  # model, graph, device, calibration, edgesdk

    def precision_of(self, method: str, unit: str) -> Precision:
        return next((u.precision for u in self.units if u.method == method and u.unit == unit), "fp32")
