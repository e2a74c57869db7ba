"""A picture of a plan: memory against the length of sequences, and where the GPU ends. Readable in black and white."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmq.errors import LlmqError
from llmq.memplan.plan import MemoryPlan
from llmq.memplan.report import parts, verdict

GIB = 2**30
POINTS = 65
GREYS = {"weights": "0.25", "KV cache": "0.5", "activations": "0.7", "context": "0.88"}
"""Of the parts, 0 being black."""


def draw(plan: MemoryPlan, path: Path) -> None:
    """Write a PNG, SVG or PDF, as the name of ``path`` says. LlmqError when it cannot be written."""
    from matplotlib.figure import Figure

    lengths = [max(1, plan.max_model_len * point // (POINTS - 1)) for point in range(POINTS)]
    sizes = [parts(replace(plan, max_model_len=length)) for length in lengths]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    layers = [[size[name] / GIB for size in sizes] for name in sizes[0]]
    axes.stackplot(lengths, layers, labels=list(sizes[0]), colors=[GREYS[name] for name in sizes[0]])
    if plan.budget is not None:
        axes.axhline(plan.budget / GIB, color="black", linestyle="--", label=f"{plan.utilization:.0%} of the GPU")
    axes.set(title=verdict(plan), xlabel=f"tokens of each of {plan.batch_size:,} sequences", ylabel="GiB")
    axes.title.set_fontsize(9)
    axes.margins(x=0)
    axes.legend(loc="upper left", reverse=True)  # as they lie
    try:
        figure.savefig(path)
    except OSError as error:
        raise LlmqError(f"{path} cannot be written: {error.strerror}") from None
