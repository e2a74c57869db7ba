"""A picture of a sweep: speed and latency against load, and where the knee is. Readable in black and white."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmq.bench.sweep import SweepReport


def draw_sweep(report: SweepReport, path: Path) -> None:
    """Output tokens/s, and below it TTFT and TPOT, p50 and p99, against the load."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    loads = [f"{cell.load:g}" for cell in report.cells]  # as names: the last may be infinite
    figure = Figure(figsize=(8, 6), layout="constrained")
    speed, times = figure.subplots(2, sharex=True)
    speed.plot(loads, [cell.metrics.output_throughput for cell in report.cells], "ko-")
    speed.set(ylabel="output tokens/s", ylim=(0, None))
    for name, marker in (("ttft", "o"), ("tpot", "s")):
        for p, line in (("p50", "-"), ("p99", ":")):
            found = [cell.details[f"{p}_{name}_ms"] for cell in report.cells]
            label = f"{name.upper()} {p}"
            times.plot(loads, found, f"{marker}{line}", color="black" if name == "ttft" else "gray", label=label)
    times.set(ylabel="ms", yscale="log", xlabel=report.axis.replace("_", " "))
    times.yaxis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    for axes in (speed, times):
        if report.knee is not None:
            knee = f"{report.knee:g}"
            axes.axvline(knee, color="black", linestyle="--", linewidth=0.8, label=f"knee: {knee}")
    times.legend()
    figure.savefig(path)
