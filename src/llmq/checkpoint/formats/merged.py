"""Layers that other runtimes compute as one.

vLLM and SGLang load the three projections of an attention as ``qkv_proj`` and the two of a gated MLP as
``gate_up_proj``. They ask a folder's config about those names, which stand for no tensor in it: what is said of the
parts has to be said of the whole too. Of parts that differ they have no way to load.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def with_merged(names: Collection[str]) -> list[str]:
    """``names`` of layers, and after them those of what is merged from layers that are all among them."""
    return [*names, *(whole for whole, parts in merged_layers(names) if parts <= set(names))]


def merged_layers(names: Collection[str]) -> Iterator[tuple[str, set[str]]]:
    """What is merged of layers that are among ``names``: its name, and those of all its parts."""
    for name in names:
        block, _, last = name.rpartition(".")
        for whole, parts in MERGED.items():
            if last == parts[0]:
                yield f"{block}.{whole}", {f"{block}.{part}" for part in parts}
