"""How many heads and how wide a part of a block is, which config.json says in several ways."""

from __future__ import annotations

from llmq.memplan.blocks import Block
from llmq.memplan.families import Family, LayerKind
from llmq.memplan.fields import Fields


def num_kv_heads(fields: Fields, family: Family, kind: LayerKind) -> int:
    """LlmqError unless they divide the query heads."""
    heads, kv_heads = fields.size("num_attention_heads"), family.kv_heads(fields)
    if kind == "full" and family.global_dim and fields.flag("attention_k_eq_v"):
        kv_heads = fields.maybe_size("num_global_key_value_heads") or kv_heads
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"must divide the {heads} attention heads", kv_heads)
    return kv_heads


def head_dim(fields: Fields, family: Family, kind: LayerKind) -> int:
    """Channels of a head."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if kind == "full" and family.global_dim and fields.value("per_layer_config") is None:
        return fields.maybe_size("global_head_dim") or family.global_dim
    named = fields.maybe_size("head_dim")
    if named is None and hidden < heads:
        raise fields.wrong("num_attention_heads", f"must be at most hidden_size, {hidden}", heads)
    return named or hidden // heads


def dense_width(fields: Fields, family: Family) -> int:
    """Of the hidden layer of an MLP without experts."""
    named = fields.maybe_size(family.dense_size)
    if named is None:
        return (fields.maybe_size("expansion_ratio") or 4) * fields.size("hidden_size")
    if not fields.flag("block_auto_adjust_ff_dim"):
        return named
    factor, multiple = fields.value("block_ffn_dim_multiplier"), fields.size("block_multiple_of")
    if not isinstance(factor, int | float) or not 0 < factor < 100:
        raise fields.wrong("block_ffn_dim_multiplier", "must be a number above 0 and below 100", factor)
    return -(-int(factor * (2 * named // 3)) // multiple) * multiple


def expert_width(fields: Fields) -> int:
    return fields.maybe_size("moe_intermediate_size") or fields.size("intermediate_size")


def shared_width(fields: Fields, family: Family) -> int:
    """Of the expert that every token goes through; 0: there is none."""
    if family.shared_expert:
        return expert_width(fields)
    shared = fields.maybe_size("n_shared_experts") or 0
    return fields.maybe_size("shared_expert_intermediate_size") or shared * expert_width(fields)


def mlp_elements(block: Block, family: Family) -> int:
    """Of one token: what gates, what is gated, and their product; of experts also each one's output."""
    fields = block.fields
    if not family.mlp:
        return 3 * mamba_width(fields, family)
    if not block.has_experts:
        return 3 * dense_width(fields, family)
    beside = dense_width(fields, family) if family.experts_beside else shared_width(fields, family)
    each = 3 * expert_width(fields) + fields.size("hidden_size")
    return fields.size("num_experts_per_tok") * each + 3 * beside


def mamba_width(fields: Fields, family: Family) -> int:
    """Channels of a state space."""
    expanded = fields.size("expand") * fields.size("hidden_size")
    if family.mixer == "mamba2":
        return fields.maybe_size("mamba_d_ssm") or expanded
    # Of a block that has an MLP as well, intermediate_size is the MLP's.
    return expanded if family.mlp else fields.maybe_size("intermediate_size") or expanded


def delta_widths(fields: Fields) -> tuple[int, int]:
    """Of all keys, and of all values, of a gated DeltaNet."""
    keys = fields.size("linear_num_key_heads") * fields.size("linear_key_head_dim")
    return keys, fields.size("linear_num_value_heads") * fields.size("linear_value_head_dim")
