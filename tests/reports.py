"""Reports for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgesdk.report import Chunk, Comparison, Conditions, Energy, Measurement, Moment, OperatorTime, Power, Report, Steady
from edgesdk.trust import judge, method_samples

CONDITIONS = Conditions(
    when="2026-01-01T00:00:00+00:00", device="host", link="local", emulated=False, machine="m", system="s", runtime="litert",
    runtime_version="2", threads=1, clock_after_hz=2e9, clock_before_hz=2e9,
)  # fmt: skip


def report_of(samples: Sequence[float] | dict[str, Sequence[float]], *, report: dict[str, Any] | None = None, **conditions: Any) -> Report:
    """A report of one method `forward`, or of those given; `report` replaces fields of it, the rest fields of its conditions."""
    c = CONDITIONS.model_copy(update=conditions)
    given = samples if isinstance(samples, dict) else {"forward": samples}
    methods = tuple(method_samples(name, None, s) for name, s in given.items())
    made = Report(
        bundle_digest="0" * 64, model_name="tiny", conditions=c, load_cold_s=None, load_warm_s=None, methods=methods, peak_rss_bytes=None,
        trust=judge(c, methods),
    )  # fmt: skip
    return made.model_copy(update=report or {})


def full_report(seed: int = 0, slower: float = 1.0, device: str = "raspberry-pi-5") -> Report:
    """A made-up sustained run with everything that a report can hold: two methods, chunks, clocks, temperatures, throttling, power, operators."""
    import numpy as np

    rng = np.random.default_rng(seed)
    methods, chunks_of, clock = [], {"prefill": 6, "decode": 14}, 0.0
    moments, energy = [_moment(0.0, 0)], []
    for name, typical in (("prefill", 0.0124), ("decode", 0.0021)):
        starts, samples, chunks = [], [], []
        for c in range(chunks_of[name]):
            first, begun = len(samples), clock
            for _ in range(40):
                slow = slower * (1 + 0.18 * max(0.0, len(moments) - 10) / 10)
                took = float(typical * slow * np.exp(rng.normal(0, 0.02)) * (1 + (rng.random() < 0.01) * 2))
                starts.append(clock)
                samples.append(took)
                clock += took
            chunks.append(Chunk(first=first, count=40, start_s=begun, end_s=clock, calls=40))
            clock += 0.05
            moments.append(_moment(clock, len(moments)))
            del c
        steady = Steady(burst_p50_s=samples[20], sustained_p50_s=samples[-20], ratio=samples[-20] / samples[20], changed_at_s=clock * 0.8)
        timed = method_samples(name, 3 * typical, samples)
        methods.append(timed.model_copy(update={"starts_s": tuple(starts), "chunks": tuple(chunks), "steady": steady}))
        energy.append(
            Energy(
                method=name, gross_j=5 * typical, net_j=3 * typical, uncertainty_j=0.1 * typical, calls=len(samples), seconds=sum(samples)
            )
        )
    times = tuple(float(t) for t in np.arange(0, clock, 0.02))
    watts = tuple(2.4 + (2.1 if t > 0.3 else 0.0) + float(rng.normal(0, 0.08)) for t in times)
    ops = [
        ("encoder.layers.0.attention.query", "linear"),
        ("encoder.layers.0.attention", "attention"),
        ("encoder.layers.0.feed_forward.up", "linear"),
    ]
    ops += [(f"decoder.layers.{i}.feed_forward.down_projection", "linear") for i in range(8)] + [
        ("norm", "norm"),
        ("embedding", "embedding"),
    ]
    sizes = [1 / (i + 1.5) for i in range(len(ops))]
    operators = tuple(
        OperatorTime(method="prefill", unit=u, op=o, median_s=s * 2e-3, share=s / sum(sizes)) for (u, o), s in zip(ops, sizes, strict=True)
    )
    rows = [("latency prefill", 0.0118, 0.0095, 0.0147, 0.0125, "s"), ("latency decode", 0.0031, 0.0026, 0.0037, 0.00215, "s")]
    rows += [("memory of the program", 2.1e7, None, None, 2.4e7, "bytes")]
    comparisons = tuple(
        Comparison.model_validate({"name": n, "predicted": p, "predicted_low": lo, "predicted_high": hi, "measured": m, "unit": u})
        for n, p, lo, hi, m, u in rows
    )
    made = report_of(
        [1e-3] * 20, device=device, machine="aarch64, Cortex-A76, Raspberry Pi 5 Model B Rev 1.0", system="Linux 6.6.31", runtime="executorch",
        runtime_version="1.4.1", threads=4, temperature_before_c=46.2, temperature_after_c=81.4, clock_before_hz=2.4e9, clock_after_hz=2.0e9,
        governor="ondemand", throttled=True, link="ssh://pi@board",
        report={
            "model_name": "normalizer", "methods": tuple(methods), "moments": tuple(moments), "operators": operators, "comparisons": comparisons,
            "operators_route": "each unit lowered alone and timed on this host", "energy": tuple(energy), "peak_rss_bytes": 71_000_000,
            "rss_before_load_bytes": 47_000_000, "rss_start_bytes": 12_000_000, "load_cold_s": 0.21, "load_warm_s": 0.04, "runtime_import_s": 0.4,
            "power": Power(
                sensor="ina3221 VDD_IN", covers="whole board", times_s=times, watts=watts, interval_s=0.02, idle_w=2.4, idle_s=0.3
            ),
            "how": Measurement(mode="sustained", duration_s=clock),
        },
    )  # fmt: skip
    return made.model_copy(update={"trust": judge(made.conditions, made.methods)})


def _moment(at_s: float, index: int) -> Moment:
    hot = index > 12
    return Moment(
        at_s=at_s, clocks_hz={"cpu0-3": 2.0e9 if hot else 2.4e9, "gpu": 0.8e9}, temperatures_c={"cpu-thermal": 46 + min(36, 3 * index), "nvme": 40},
        throttle=("soft temperature limit",) if hot else (), governors={"cpu0-3": "ondemand"},
    )  # fmt: skip
