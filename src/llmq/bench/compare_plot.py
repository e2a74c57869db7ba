"""A picture of schemes side by side: decode speed over batch sizes, the workload, quality. Good in black and white."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from llmq.bench.compare_report import CompareReport

STYLES = ("ko-", "ks--", "k^:", "kD-.", "kv-", "kP--")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")


def draw_compare(report: CompareReport, path: Path) -> None:
    """Decode speed beside the first scheme's, a line a scheme and a mark a batch size; bars for the rest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    judged = any(row.quality is not None for row in report.rows)
    ratios = [2.4, 1, 1] if judged else [2.4, 1]
    speed, work, *rest = figure.subplots(1, len(ratios), width_ratios=ratios)
    first = report.rows[0].scheme
    for row, style in zip(report.rows, cycle(STYLES), strict=False):
        found = [report.decode_ratio(row.scheme, first, batch) for batch in report.batch_sizes]
        speed.plot(report.batch_sizes, found, style, label=row.scheme, markersize=5, fillstyle="none")
    for (scheme, other), batch in report.crossovers.items():
        if first not in (scheme, other):
            speed.axvline(batch, color="gray", linewidth=0.8)
            label = f"{scheme} overtakes {other}: {batch:.0f}"
            speed.text(batch, 0.02, label, rotation=90, fontsize=7, ha="right", transform=speed.get_xaxis_transform())
    speed.set(xscale="log", xlabel="sequences decoded at once", ylabel=f"decode speed, {first} = 1", ylim=(0, None))
    speed.set_xticks(report.batch_sizes, [str(batch) for batch in report.batch_sizes])
    speed.minorticks_off()
    speed.legend(fontsize=8, ncols=len(report.rows), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    _bars(work, report, [row.output_throughput for row in report.rows], "{:,.0f}")
    work.set(title=f"{report.workload_name}: output tokens/s")
    for axes in rest:
        _bars(axes, report, [0.0 if row.quality is None else row.quality.kl.value for row in report.rows], "{:.4f}")
        axes.set(title=f"KL from {first}, nats a token")
    for axes in (work, *rest):
        axes.title.set_fontsize(9)
    figure.suptitle(f"{Path(report.setup.model).name} on {report.setup.device_name}", fontsize=10)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, report: CompareReport, values: list[float], form: str) -> None:
    names = [row.scheme for row in report.rows]
    bars = axes.bar(names, values, color="white", edgecolor="black", width=0.6)
    for bar, hatch in zip(bars, cycle(HATCHES), strict=False):
        bar.set_hatch(hatch)
    axes.bar_label(bars, [form.format(value) for value in values], fontsize=7)
    axes.tick_params(axis="x", labelsize=8)
