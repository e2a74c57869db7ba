"""The decoder blocks that a config.json describes, each by its kind."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.memplan.families import Family, LayerKind
from llmq.memplan.fields import Fields

MAX_LAYERS = 1000
LAYER_TYPES: dict[str, LayerKind] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "recurrent",
    "mamba": "recurrent",
    "mamba2": "recurrent",
    "conv": "conv",
    "hybrid": "both",
}


@dataclass(frozen=True, slots=True)
class Block:
    """A decoder block. ``keeps``: it has keys and values of its own."""

    fields: Fields
    kind: LayerKind
    keeps: bool
    has_experts: bool


def read_blocks(fields: Fields, family: Family) -> list[Block]:
    """The blocks from the first to the last. LlmqError where ``layer_types`` and their number contradict each other."""
    kinds = _layer_kinds(fields, family)
    keeping = len(kinds) - (fields.maybe_size("num_kv_shared_layers") or 0)
    has_experts = fields.maybe_size("num_experts") is not None
    return [
        Block(fields.of_layer(layer), kind, layer < keeping, has_experts and family.sparse(fields, layer))
        for layer, kind in enumerate(kinds)
    ]


def _layer_kinds(fields: Fields, family: Family) -> list[LayerKind]:
    layers = fields.size("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise fields.wrong("num_hidden_layers", f"must be at most {MAX_LAYERS:,}", layers)
    listed = fields.list_of(str, "layer_types")
    if listed is None:
        return family.layer_kinds(fields, layers)
    if len(listed) != layers:
        raise fields.wrong("layer_types", f"must name each of {layers} layers", listed)
    unknown = next((name for name in listed if name not in LAYER_TYPES), None)
    if unknown is not None:
        raise fields.wrong("layer_types", f"must be of {', '.join(LAYER_TYPES)}", unknown)
    kinds = [LAYER_TYPES[name] for name in listed]
    unused = fields.value("use_sliding_window") is False or fields.maybe_size("sliding_window") is None
    return ["full" if unused and kind == "sliding" else kind for kind in kinds]
