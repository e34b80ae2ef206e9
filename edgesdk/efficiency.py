"""Efficiency: what a runtime reaches of a device's peaks, per operator class and precision, with residuals.

From calibration on the device itself, from a fit over published measurements, or, where neither exists, a wide prior.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from edgesdk.noun import Noun, Part

Origin = Literal["calibrated", "fitted", "prior"]


class OpRate(Part):
    """Time of one operator = overhead_s + per_output_s × outputs + max(operations / rate, bytes / bandwidth of the level it streams from).

    `operations` is 2 × MACs, or the elements read and written for operators without MACs. Exactly one of `ops_per_s` (of the whole
    unit at the given threads) and `share_of_peak` (of the unit's peak for the arithmetic dtype, times the threads used / cores) is set.
    """

    op: str  # edgesdk.graph.types.Op; "*" matches every operator that has no row of its own
    precision: str  # edgesdk.plan.types.Precision; "int8" stands for every integer one, "*" matches every precision
    ops_per_s: PositiveFloat | None = None
    share_of_peak: Annotated[float, Field(gt=0, le=1)] | None = None
    weights_per_s: PositiveFloat | None = None  # at most, of linear layers: what taking weights apart costs however few inputs they meet
    per_output_s: NonNegativeFloat = 0.0
    per_tensor_s: NonNegativeFloat = 0.0  # of op "call" alone, what a call costs beside its operators: for each input and output
    overhead_s: NonNegativeFloat = 0.0
    log_sd: NonNegativeFloat  # standard deviation of log(measured / predicted)
    n: NonNegativeInt = 0  # measurements behind the row
    source: str


class Efficiency(Noun):
    """`bandwidth_bytes_per_s` is by level: "L1", "L2", "L3", "memory"; a level that is absent is taken from the device's profile."""

    KIND: ClassVar[str] = "efficiency"

    device: str
    runtime: str
    runtime_version: str | None = None
    threads: PositiveInt = 1
    power_mode: str | None = None
    board: str | None = None  # the board it was measured on (`DeviceProfile.board.id`); it holds for that one alone
    emulated: bool = False  # times of an emulator, which say nothing of silicon
    origin: Origin
    rows: tuple[OpRate, ...]
    bandwidth_bytes_per_s: dict[str, PositiveFloat] = Field(default_factory=dict)
    tile: PositiveInt | None = None  # output channels the matrix kernels compute at a time, where the rows were fitted with it
    call_overhead_s: NonNegativeFloat = 0.0
    call_log_sd: NonNegativeFloat = 0.0  # of whole calls, beside the rows' own residuals (what the sum of units leaves out)
    runtime_bytes: PositiveInt | None = None  # resident memory of the runtime itself, measured
    when: str | None = None  # ISO 8601, UTC
    notes: tuple[str, ...] = ()

    def row(self, op: str, precision: str) -> OpRate | None:
        """The row of an operator class and precision, else of int8 for every integer precision, else of any precision or operator; None where nothing fits."""
        table = {(r.op, r.precision): r for r in self.rows}
        width = "int8" if precision.startswith("int") else precision
        for key in ((op, precision), (op, width), (op, "*"), ("*", precision), ("*", width), ("*", "*")):
            if key in table:
                return table[key]
        return None
