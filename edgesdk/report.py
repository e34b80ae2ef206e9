"""Report: raw samples and the conditions they were taken under; everything else is derived.

Unknown is None, never 0. Predicted and measured never share a field.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from edgesdk.noun import Noun, Part

Mode = Literal["cold", "warm", "burst", "sustained"]


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
    governor: str | None = None  # "performance"; several clusters: "cpu0-3 schedutil, cpu4-7 performance"


class Moment(Part):
    """What the device was like between two chunks of calls; what it does not tell is left out."""

    at_s: float  # on the measurement's own clock, which `starts_s` of samples and `power` share
    clocks_hz: dict[str, float] = {}  # cluster of cores ("cpu0-3") or "gpu" → its clock
    governors: dict[str, str] = {}  # cluster → governor
    temperatures_c: dict[str, float] = {}  # thermal zone, as the system names it → °C
    throttle: tuple[str, ...] | None = None  # what holds the device back right now; () nothing, None: it does not say
    others: float | None = None  # share of all cores' time since the moment before that other processes took
    steal: float | None = None  # share that the hypervisor took


class Chunk(Part):
    """Calls without a pause between two moments: samples `first` … `first + count - 1` of their method."""

    first: int
    count: int
    start_s: float  # on the measurement's clock
    end_s: float
    calls: int  # with those that were not timed


class Steady(Part):
    """A sustained run: how fast at first, how fast later."""

    burst_p50_s: float  # of the first chunk
    sustained_p50_s: float  # of the last third of the time
    ratio: float  # sustained / burst
    changed_at_s: float | None = None  # on the measurement's clock, where the medians of chunks change most, if they do


class Summary(Part):
    """What a tool told that keeps no single times; a figure that it does not give is None."""

    tool: str  # "benchmark_model"
    calls: int
    mean_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    std_s: float | None = None
    p5_s: float | None = None
    p95_s: float | None = None
    warmup_calls: int | None = None
    warmup_mean_s: float | None = None


class MethodSamples(Part):
    method: str
    cold_s: float | None  # first call after load
    samples_s: tuple[float, ...]  # raw, in order, run time alone; empty where a tool gave a `summary` only
    p50_s: float | None  # None: neither samples nor the summary tell
    p90_s: float | None
    p99_s: float | None
    starts_s: tuple[float, ...] = ()  # when each sample began, on the measurement's clock
    waits_s: tuple[float, ...] = ()  # with --rate: from a sample's arrival to its start, in no way part of its run time
    wait_p50_s: float | None = None
    wait_p99_s: float | None = None
    every: int = 1  # one call in so many is a sample
    chunks: tuple[Chunk, ...] = ()
    steady: Steady | None = None  # of a sustained run
    summary: Summary | None = None


class Power(Part):
    """Watts over time, idle at first, as the sensor gave them."""

    sensor: str  # "ina3221 VDD_IN"
    covers: str  # "whole board", "CPU package"
    times_s: tuple[float, ...]  # on the measurement's clock
    watts: tuple[float, ...]
    interval_s: float  # median between two readings
    idle_w: float | None  # mean before the first call
    idle_s: float  # over so long
    sampler_share: float | None = None  # of one core that reading the sensor took


class Energy(Part):
    """Of one call of a method: the trapezoid rule over its chunks, divided by their calls."""

    method: str
    gross_j: float
    net_j: float | None  # less the idle power over the same time
    uncertainty_j: float  # standard, of the integration (edges of chunks between two readings, their scatter) and of the idle power
    calls: int
    seconds: float  # integrated over


class Memory(Part):
    """Bytes of the measured process."""

    peak_pss_bytes: int | None = (
        None  # its share of what it shares with others counted once, larger of those read before and behind the calls
    )
    gpu_bytes: int | None = None
    reasons: dict[str, str] = {}  # "pss", "gpu" → why it is None


class OperatorTime(Part):
    method: str
    unit: str
    op: str
    median_s: float
    share: float  # of the sum over listed operators
    is_mean: bool = False  # `median_s` is a mean: the tool that timed it tells no other figure


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


class Measurement(Part):
    """How it was measured."""

    mode: Mode = "warm"
    job: str | None = None  # its id on the device
    duration_s: float | None = None  # asked for; None: by a count of calls
    rate_hz: float | None = None  # arrivals were scheduled; None: each call began when the one before ended
    page_cache: str | None = None  # cold: "dropped", or why not


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
    how: Measurement = Measurement()
    moments: tuple[Moment, ...] = ()
    power: Power | None = None
    power_reasons: tuple[str, ...] = ()  # "no working sensor: …", one for each that was tried
    energy: tuple[Energy, ...] = ()
    memory: Memory = Memory()
