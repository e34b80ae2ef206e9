"""Report: raw samples and the conditions they were taken under; everything else is derived.

Unknown is None, never 0. Predicted and measured never share a field.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from edgesdk.noun import Noun, Part


class Conditions(Part):
    when: str  # ISO 8601, UTC
    device: str  # profile name, or "local"
    link: str
    emulated: bool  # timings of an emulator predict no silicon
    machine: str
    system: str
    runtime: str
    runtime_version: str
    threads: int
    power_mode: str | None = None
    clock_before_hz: float | None = None
    clock_after_hz: float | None = None
    temperature_before_c: float | None = None
    temperature_after_c: float | None = None
    throttled: bool | None = None


class MethodSamples(Part):
    method: str
    cold_s: float | None  # first call after load
    samples_s: tuple[float, ...]  # raw, in order
    p50_s: float
    p90_s: float
    p99_s: float


class OperatorTime(Part):
    method: str
    unit: str
    op: str
    median_s: float
    share: float  # of the sum over listed operators


class Comparison(Part):
    name: str  # "latency forward", "memory peak"
    predicted: float | None
    predicted_low: float | None
    predicted_high: float | None
    measured: float | None
    unit: Literal["s", "bytes"]


class Trust(Part):
    verdict: Literal["good", "noisy", "throttled", "emulated"]
    reasons: tuple[str, ...]


class Report(Noun):
    KIND: ClassVar[str] = "report"

    bundle_digest: str
    model_name: str
    conditions: Conditions
    load_cold_s: float | None  # the program's first load in a fresh process, the runtime imported before
    load_warm_s: float | None  # loaded once more in the same process
    methods: tuple[MethodSamples, ...]
    peak_rss_bytes: int | None
    rss_before_load_bytes: int | None = None  # with the runtime imported, without the program
    rss_start_bytes: int | None = None  # before the runtime was imported
    runtime_import_s: float | None = None
    operators: tuple[OperatorTime, ...] = ()
    operators_route: str | None = None  # how the per-operator times were obtained
    comparisons: tuple[Comparison, ...] = ()
    trust: Trust
