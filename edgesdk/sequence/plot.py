"""A layout search as a figure: time to the first token and of an answer over the length of the input, with the crossover points."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesdk.errors import InputError, MissingTool

if TYPE_CHECKING:
    from edgesdk.sequence.search import LayoutSearch, Metric


def draw(answer: LayoutSearch, path: str | Path) -> Path:
    """Write the figure. Raises `MissingTool` without matplotlib and `InputError` for a form it cannot write."""
    try:
        import matplotlib
    except ImportError:
        raise MissingTool("--plot needs matplotlib", "pip install -c constraints.txt 'edgesdk[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path(path)
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.2), sharex=True)
    try:
        if path.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
            raise InputError(f"--plot {path}: no figure ends so", "name a .png, .svg or .pdf")
        metrics: tuple[Metric, ...] = ("first token", "answer")
        for axis, metric in zip(axes, metrics, strict=True):
            _panel(axis, answer, metric)
        axes[1].legend(fontsize=7, loc="upper left")
        figure.suptitle(
            f"{answer.device}, {answer.weights} weights, batch {answer.batch}, {round(answer.output_length.mean)} tokens written (predicted)",
            fontsize=11,
        )
        figure.tight_layout()
        try:
            figure.savefig(path, dpi=110)
        except OSError as error:
            raise InputError(f"--plot {path}: cannot be written ({error})", "name a file in a folder that exists") from None
    finally:
        pyplot.close(figure)
    return path


def _panel(axis: Any, answer: LayoutSearch, metric: Metric) -> None:
    for i, curve in enumerate(c for c in answer.curves if c.metric == metric):
        known = [(n, s) for n, s in zip(answer.lengths, curve.seconds, strict=True) if s is not None]
        if known:
            style = {"linewidth": 2.4, "color": "black"} if curve.layout == "decoder-only" else {"color": f"C{i}"}
            axis.plot(*zip(*known, strict=True), marker="o", markersize=3, label=curve.layout, **style)
    for crossing in answer.crossovers:
        if crossing.metric == metric and crossing.over == "input" and crossing.leads:
            axis.axvline(crossing.at, linestyle=":", color="grey", linewidth=1)
            axis.annotate(
                f"{crossing.at}: {crossing.by}", (crossing.at, 0.01), xycoords=("data", "axes fraction"), rotation=90, fontsize=6,
                ha="right", va="bottom", color="grey",
            )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="tokens read", ylabel="seconds", title=metric)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axis.grid(alpha=0.3, which="major")
