"""A report's samples as a picture, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path

from edgesdk.errors import InputError, MissingTool
from edgesdk.report import Report
from edgesdk.units import show_seconds


def draw(report: Report, path: Path) -> None:
    """Samples in order and as a histogram, one row a method. Raises `MissingTool` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise MissingTool("a picture needs matplotlib", "pip install 'edgesdk[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(report.methods), 2, figsize=(10, 3 * len(report.methods)), squeeze=False)
    for (left, right), m in zip(axes, report.methods, strict=True):
        milliseconds = [s * 1e3 for s in m.samples_s]
        left.plot(milliseconds, ".-", linewidth=0.7)
        if m.p50_s is not None:
            left.axhline(m.p50_s * 1e3, color="grey", linewidth=0.7)
        left.set(xlabel="call", ylabel="ms", title=f"{m.method}: p50 {show_seconds(m.p50_s)}, p90 {show_seconds(m.p90_s)}")
        right.hist(milliseconds, bins=min(40, max(5, len(milliseconds) // 3)))
        right.set(xlabel="ms", ylabel="calls")
    figure.suptitle(f"{report.model_name} on {report.conditions.device} ({report.trust.verdict})")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be written ({error})", "give a name that ends in .png, .svg or .pdf") from None
    finally:
        pyplot.close(figure)
