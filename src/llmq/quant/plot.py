"""The picture of a report: the error of every kind of layer, along the decoder blocks. Kinds have markers and dashes of
their own, so that it is read in black and white too. Needs matplotlib, which is optional."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

from llmq.quant.report import LayerReport, QuantizationReport, errors_by_kind

PLOT = "quantization_report.png"
MARKERS = "osD^v<>PX*"
DASHES = ("-", "--", "-.", ":")
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which those who are colour-blind tell apart."""


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_plot(folder: Path, report: QuantizationReport) -> None:
    """The picture as a file of ``folder``; none where matplotlib is missing, or no error is known."""
    curves = {kind: by_block(layers) for kind, layers in errors_by_kind(report.layers).items()}
    if not curves or not can_plot():
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for number, (kind, errors) in enumerate(curves.items()):
        style = {"marker": MARKERS[number % len(MARKERS)], "linestyle": DASHES[number % len(DASHES)]}
        colour, hollow = COLOURS[number % len(COLOURS)], "white" if number % 2 else None
        axes.plot(list(errors), list(errors.values()), color=colour, markerfacecolor=hollow, label=kind, **style)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(
        "decoder block (−1: the head)" if any(-1 in errors for errors in curves.values()) else "decoder block"
    )
    axes.set_ylabel(f"relative squared error of the\n{report.error_of}")
    axes.set_title(f"{report.model}: {report.scheme} by {report.method}")
    axes.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(folder / PLOT, dpi=150, metadata={"Software": None})


def by_block(layers: list[LayerReport]) -> dict[int, float]:
    """Blocks → the mean error of the layers in each, of which experts are many. The head, in no block, is at −1."""
    errors: dict[int, list[float]] = {}
    for layer in layers:
        number = re.search(r"\.(\d+)\.", layer.name)
        errors.setdefault(int(number[1]) if number else -1, []).append(layer.error)
    return {block: fmean(each) for block, each in sorted(errors.items())}
