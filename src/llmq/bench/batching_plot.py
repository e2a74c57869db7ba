"""A picture of the ways to batch: speed, wasted seats, latency, and time against length. Good in black and white."""

from __future__ import annotations

from pathlib import Path

from llmq.bench.batching import BatchingReport


def draw_batching(report: BatchingReport, path: Path) -> None:
    """Three panels: tokens/s with the share of wasted seats; latency of requests that come one by one; one answer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    speed, latency, growth = figure.subplots(1, 3)
    names = [result.way.name.replace(" ", "\n", 1) for result in report.results]
    used = [result.output_throughput for result in report.results]
    bars = speed.bar(names, used, color="white", edgecolor="black")
    speed.bar_label(bars, [f"{value:,.0f}" for value in used], fontsize=8)
    for bar, result in zip(bars, report.results, strict=True):
        if result.wasted > 0.005:
            place = (bar.get_x() + bar.get_width() / 2, bar.get_height() / 2)
            speed.text(*place, f"{result.wasted:.0%}\nof seats\nwasted", ha="center", va="center", fontsize=8)
    speed.set(title="output tokens/s, all requests there at the start")
    batched = [result for result in report.results if result.one_by_one is not None]
    for result, style in zip(batched, (":", "--", "-"), strict=True):
        assert result.one_by_one is not None
        found = result.one_by_one.metrics.latencies["e2el"]
        if found is not None:
            shares, seconds = zip(*((p, ms / 1e3) for p, ms in found.percentiles.items()), strict=True)
            latency.plot(seconds, shares, f"ko{style}", fillstyle="none", label=result.way.name)
    latency.set(
        title=f"latency, {report.request_rate:.2f} requests/s one by one",
        xlabel="seconds",
        ylabel="% of requests that took no longer",
        xlim=(0, None),
    )
    for one, style in zip(report.growth, ("--", "-"), strict=True):
        label = f"{one.way.name}: twice the length, {one.doubling:.1f} × the time"
        growth.plot(range(1, len(one.seconds) + 1), one.seconds, f"k{style}", label=label)
    highest = max(one.seconds[-1] for one in report.growth)
    growth.set(title="one answer", xlabel="tokens", ylabel="seconds since the start", ylim=(0, 1.25 * highest))
    for axes in (speed, latency, growth):
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=8)
    latency.legend(fontsize=8, loc="lower right")
    growth.legend(fontsize=8)
    figure.suptitle(
        f"{Path(report.setup.model).name} on {report.setup.device_name}, {report.seats} at once", fontsize=10
    )
    figure.savefig(path, dpi=150)
