"""What a model weighs, matrix by matrix: shapes as in transformers 5."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from llmq.memplan.architecture import Weight
from llmq.memplan.blocks import Block
from llmq.memplan.families import Bias, Family, LayerKind
from llmq.memplan.fields import Fields
from llmq.memplan.widths import (
    delta_widths,
    dense_width,
    expert_width,
    head_dim,
    mamba_width,
    num_kv_heads,
    shared_width,
)


def count_weights(fields: Fields, family: Family, blocks: Sequence[Block]) -> Iterator[Weight]:
    """The weights of the whole model, those that are alike not yet added up."""
    yield from _ends(fields, family)
    for block, number in Counter(blocks).items():
        for weight in _block_weights(block, family):
            yield replace(weight, copies=number * weight.copies, active=number * weight.active)
    per_layer = fields.maybe_size("hidden_size_per_layer_input")
    if per_layer is not None:
        yield from _per_layer_inputs(fields, per_layer, len(blocks))


def _block_weights(block: Block, family: Family) -> Iterator[Weight]:
    fields = block.fields
    match block.kind:
        case "conv":
            yield from _short_convolution(fields)
        case "recurrent":
            yield from _mixer(fields, family)
        case "both":
            yield from _mixer(fields, family)
            yield from _attention(fields, family, "full", keeps=True)
        case kind:
            yield from _attention(fields, family, kind, keeps=block.keeps)
    if family.mlp and (not block.has_experts or family.experts_beside):
        wide = not block.keeps and fields.flag("use_double_wide_mlp")
        yield from _feed_forward(fields, family, dense_width(fields, family) * (1 + wide))
    if block.has_experts:
        yield from _experts(fields, family)
    norms = family.norms if isinstance(family.norms, int) else family.norms(fields)
    yield Weight("norm", _norm_size(fields, family), copies=norms, active=norms)
    if family.block_vector:
        yield Weight("other", family.block_vector)
    if family.altup:
        yield from _altup_block(fields)


def _ends(fields: Fields, family: Family) -> Iterator[Weight]:
    """Embeddings, final norm, head."""
    hidden, vocab = fields.size("hidden_size"), fields.size("vocab_size")
    embedded = fields.maybe_size("word_embed_proj_dim") or hidden
    yield Weight("embedding", vocab, embedded, sharded=True)
    if embedded != hidden:
        yield Weight("embedding_projection", hidden, embedded, copies=2, active=2)
    if family.positions is not None:
        yield Weight("positions", fields.size("max_position_embeddings") + family.positions, hidden)
    if family.embedding_norm:
        yield Weight("norm", _norm_size(fields, family))
    if fields.value("do_layer_norm_before") is not False:
        yield Weight("norm", _norm_size(fields, family))
    if not fields.flag("tie_word_embeddings"):
        yield Weight("head", vocab, embedded, sharded=True)
    if _is_on(fields, family.head_bias):
        yield Weight("head_bias", vocab, sharded=True)
    if family.altup:
        projections = 2 * (fields.size("altup_num_inputs") - 1)
        yield Weight("altup_projection", hidden, hidden, projections, projections)


def _altup_block(fields: Fields) -> Iterator[Weight]:
    """Gemma 3n: the mixing of a block's streams (AltUp), and its path of low rank (LAuReL)."""
    hidden, streams = fields.size("hidden_size"), fields.size("altup_num_inputs")
    yield Weight("altup", streams * (streams + streams**2) + (streams + 2) * hidden)
    yield Weight("laurel_left", fields.size("laurel_rank"), hidden, linear=True)
    yield Weight("laurel_right", hidden, fields.size("laurel_rank"), linear=True)
    yield Weight("laurel_norm", hidden)


def _per_layer_inputs(fields: Fields, size: int, layers: int) -> Iterator[Weight]:
    """Gemma 3n and 4: a second embedding, of which each block adds its part."""
    hidden = fields.size("hidden_size")
    yield Weight("embedding_per_layer", fields.size("vocab_size_per_layer_input"), layers * size, sharded=True)
    yield Weight("per_layer_projection", layers * size, hidden)
    yield Weight("per_layer_norm", size)
    yield Weight("per_layer_input_gate", size, hidden, layers, layers, linear=True)
    yield Weight("per_layer_projection", hidden, size, layers, layers, linear=True)
    yield Weight("per_layer_norm", hidden, 1, layers, layers)


def _norm_size(fields: Fields, family: Family) -> int:
    return family.norm_vectors * fields.size("hidden_size")


def _attention(fields: Fields, family: Family, kind: LayerKind, *, keeps: bool) -> Iterator[Weight]:
    if fields.maybe_size("kv_lora_rank") is not None:
        yield from _latent_attention(fields)
        return
    hidden, dim = fields.size("hidden_size"), head_dim(fields, family, kind)
    heads, kv_heads = fields.size("num_attention_heads"), num_kv_heads(fields, family, kind)
    query, value = heads * dim, kv_heads * dim
    projected = query * (2 if family.query_gate else 1)
    if family.fused_qkv:
        yield Weight("qkv_proj", projected + 2 * value, hidden, linear=True, sharded=True)
    else:
        yield Weight("q_proj", projected, hidden, linear=True, sharded=True)
    if keeps and not family.fused_qkv:
        yield Weight("k_proj", value, hidden, linear=True, sharded=True, kv_heads=kv_heads)
        if not (kind == "full" and fields.flag("attention_k_eq_v")):
            yield Weight("v_proj", value, hidden, linear=True, sharded=True, kv_heads=kv_heads)
    yield Weight("o_proj", hidden, query, linear=True, sharded=True)
    if _is_on(fields, family.qkv_bias):
        yield Weight("qkv_bias", projected + 2 * value)
    if _is_on(fields, family.o_bias):
        yield Weight("o_bias", hidden)
    if family.sinks:
        yield Weight("sinks", heads)
    if family.qk_norm and (family.qk_norm_if is None or fields.flag(family.qk_norm_if)):
        yield from _qk_norm(family, dim, heads, kv_heads, keeps=keeps)


def _qk_norm(family: Family, dim: int, heads: int, kv_heads: int, *, keeps: bool) -> Iterator[Weight]:
    if family.qk_norm == "head":
        yield Weight("qk_norm", (1 + keeps) * family.norm_vectors * dim)
    else:
        yield Weight("qk_norm", (heads + kv_heads) * dim)


def _latent_attention(fields: Fields) -> Iterator[Weight]:
    """MLA: queries, and keys with values, by way of a narrow latent; only the latter's is kept."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    latent, rope, plain = fields.size("kv_lora_rank"), fields.size("qk_rope_head_dim"), fields.size("qk_nope_head_dim")
    value = fields.maybe_size("v_head_dim") or hidden // heads
    query_latent = fields.maybe_size("q_lora_rank")
    bias = fields.flag("attention_bias")
    if query_latent is None:
        yield Weight("q_proj", heads * (plain + rope), hidden, linear=True, sharded=True)
    else:
        yield Weight("q_a_proj", query_latent, hidden, linear=True)
        yield Weight("latent_norm", query_latent)
        yield Weight("q_b_proj", heads * (plain + rope), query_latent, linear=True, sharded=True)
        if bias:
            yield Weight("latent_bias", query_latent)
    yield Weight("kv_a_proj", latent + rope, hidden, linear=True)
    yield Weight("latent_norm", latent)
    yield Weight("kv_b_proj", heads * (plain + value), latent, linear=True, sharded=True)
    yield Weight("o_proj", hidden, heads * value, linear=True, sharded=True)
    if bias:
        yield Weight("latent_bias", latent + rope + hidden)


def _experts(fields: Fields, family: Family) -> Iterator[Weight]:
    hidden, width = fields.size("hidden_size"), expert_width(fields)
    experts, active = fields.size("num_experts"), fields.size("num_experts_per_tok")
    if active > experts:
        raise fields.wrong("num_experts_per_tok", f"must be at most the {experts} experts", active)
    yield Weight("router", experts, hidden)
    if family.router_bias:
        yield Weight("router_bias", experts)
    if family.experts_beside:
        yield Weight("router_scales", experts + 4 * hidden)
    for name, out, inp in (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)):
        yield Weight(f"experts.{name}", out, inp, experts, active, linear=True, sharded=True)
    if family.expert_bias:
        yield Weight("experts.bias", 2 * width + hidden, 1, experts, active, sharded=True)
    shared = shared_width(fields, family)
    if shared:
        yield from _feed_forward(fields, family, shared)
    if shared and family.shared_gate:
        yield Weight("shared_gate", 1, hidden)


def _feed_forward(fields: Fields, family: Family, width: int) -> Iterator[Weight]:
    hidden, inner = fields.size("hidden_size"), (2 if family.gated else 1) * width
    if family.fused_mlp or not family.gated:
        yield Weight("up_proj", inner, hidden, linear=True, sharded=True)
    else:
        yield Weight("gate_proj", width, hidden, linear=True, sharded=True)
        yield Weight("up_proj", width, hidden, linear=True, sharded=True)
    yield Weight("down_proj", hidden, width, linear=True, sharded=True)
    if _is_on(fields, family.mlp_bias):
        yield Weight("mlp_bias", inner + hidden)


def _mixer(fields: Fields, family: Family) -> Iterator[Weight]:
    match family.mixer:
        case "mamba":
            yield from _mamba(fields, family)
        case "mamba2":
            yield from _mamba2(fields, family)
        case "delta":
            yield from _delta_net(fields)


def _mamba(fields: Fields, family: Family) -> Iterator[Weight]:
    hidden, inner, states = fields.size("hidden_size"), mamba_width(fields, family), fields.size("state_size")
    rank = fields.maybe_size("time_step_rank") or -(-hidden // 16)
    yield Weight("in_proj", 2 * inner, hidden, linear=True, sharded=True)
    yield Weight("x_proj", rank + 2 * states, inner, linear=True, sharded=True)
    yield Weight("dt_proj", inner, rank, linear=True, sharded=True)
    yield Weight("out_proj", hidden, inner, linear=True, sharded=True)
    yield Weight("convolution", inner, fields.size("conv_kernel"), sharded=True)
    yield Weight("A_log", inner, states, sharded=True)
    yield Weight("mixer_vectors", (2 + fields.flag("use_conv_bias")) * inner)  # of dt_proj, D, convolution
    if fields.flag("mamba_proj_bias"):
        yield Weight("mixer_bias", 2 * inner + hidden)
    if family.mixer_norm:
        yield Weight("mixer_norm", rank + 2 * states)


def _mamba2(fields: Fields, family: Family) -> Iterator[Weight]:
    hidden, inner, states = fields.size("hidden_size"), mamba_width(fields, family), fields.size("state_size")
    heads = fields.size("mamba_n_heads")
    convolved = inner + 2 * fields.size("mamba_n_groups") * states
    yield Weight("in_proj", inner + convolved + heads, hidden, linear=True, sharded=True)
    yield Weight("out_proj", hidden, inner, linear=True, sharded=True)
    yield Weight("convolution", convolved, fields.size("conv_kernel"), sharded=True)
    yield Weight("mixer_vectors", 3 * heads + fields.flag("use_conv_bias") * convolved)  # dt, A, D, convolution
    if fields.flag("mamba_proj_bias"):
        yield Weight("mixer_bias", inner + convolved + heads + hidden)
    if family.mixer_norm or fields.flag("mamba_rms_norm"):
        yield Weight("mixer_norm", inner)


def _delta_net(fields: Fields) -> Iterator[Weight]:
    hidden, value_heads = fields.size("hidden_size"), fields.size("linear_num_value_heads")
    keys, values = delta_widths(fields)
    yield Weight("in_proj_qkvz", 2 * keys + 2 * values, hidden, linear=True, sharded=True)
    yield Weight("in_proj_ba", 2 * value_heads, hidden, linear=True, sharded=True)
    yield Weight("out_proj", hidden, values, linear=True, sharded=True)
    yield Weight("convolution", 2 * keys + values, fields.size("linear_conv_kernel_dim"), sharded=True)
    yield Weight("mixer_vectors", 2 * value_heads + fields.size("linear_value_head_dim"))  # dt, A, norm


def _short_convolution(fields: Fields) -> Iterator[Weight]:
    hidden, taps = fields.size("hidden_size"), fields.size("conv_L_cache")
    yield Weight("in_proj", 3 * hidden, hidden, linear=True, sharded=True)
    yield Weight("out_proj", hidden, hidden, linear=True, sharded=True)
    yield Weight("convolution", hidden, taps, sharded=True)
    if fields.flag("conv_bias"):
        yield Weight("mixer_bias", 5 * hidden)


def _is_on(fields: Fields, bias: Bias) -> bool:
    return fields.flag(bias) if isinstance(bias, str) else bias
