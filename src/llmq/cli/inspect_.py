"""``llmq inspect``"""

from __future__ import annotations

from collections import defaultdict

import typer

from llmq.checkpoint.inspect import Inspection, LayerInfo
from llmq.checkpoint.inspect import inspect as run
from llmq.cli import options
from llmq.cli.console import out, print_json, table
from llmq.errors import CHECK_FAILED
from llmq.memory import format_bytes


def inspect(model: options.Model, revision: options.Revision = None, json: options.Json = False) -> None:
    """Show how a model folder's weights are stored, and what in it does not fit together. Loads no weight.

    Exits with 3 when something does not fit.

    llmq inspect demo
    """
    inspection = run(model, revision)
    if json:
        print_json("llmq.inspect/1", inspection.to_json())
    else:
        _print(inspection)
    if inspection.problems:
        raise typer.Exit(CHECK_FAILED)


def _print(inspection: Inspection) -> None:
    facts = table("folder", inspection.folder)
    facts.columns[1].justify = "left"
    facts.add_row("architecture", f"{inspection.architecture}, {inspection.dtype}")
    facts.add_row("format", inspection.format or "not quantized")
    if inspection.format is not None:
        facts.add_row("written by", inspection.written_by or "nobody says")
    rest = inspection.num_bytes - inspection.linear_bytes
    linear = format_bytes(inspection.linear_bytes)
    facts.add_row("size", f"{format_bytes(inspection.num_bytes)}: linear layers {linear}, others {format_bytes(rest)}")
    if inspection.effective_bits is not None:
        facts.add_row("bits a quantized weight", f"{inspection.effective_bits:.2f}")
    out.print(facts)
    out.print()
    alike: dict[tuple[str, str, int, int], list[LayerInfo]] = defaultdict(list)
    for layer in inspection.layers:
        kind = layer.name.rpartition(".")[2]
        alike[kind, layer.scheme, layer.out_features, layer.in_features].append(layer)
    layers = table("layers", "number", "shape", "scheme", "size")
    for (kind, scheme, out_features, in_features), group in alike.items():
        size = format_bytes(sum(layer.num_bytes for layer in group))
        layers.add_row(kind, str(len(group)), f"{out_features} × {in_features}", scheme, size)
    out.print(layers)
    for number, problem in enumerate(inspection.problems):
        out.print(f"{'' if number else chr(10)}does not fit: {problem}")
