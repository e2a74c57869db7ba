"""config.json of any decoder → its ``Architecture``: what it weighs, and what its layers keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmq.checkpoint.config import DTYPE_BYTES, read_json
from llmq.errors import LlmqError
from llmq.memplan.architecture import Architecture, LayerCache, Weight, merge
from llmq.memplan.families import FAMILIES, UNKNOWN, Bias, Family, LayerKind
from llmq.memplan.fields import Fields, class_defaults

MAX_LAYERS = 1000
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
SAME_AS = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "kimi_k2": "deepseek_v3",
    "llama4": "llama4_text",
    "llava": "llama",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}
"""Text models under another name, or under that of the whole of which they are a part."""
CROSS_ATTENTION = {
    *("bart", "blenderbot", "encoder-decoder", "idefics", "led", "longt5", "m2m_100", "marian", "mbart", "mllama"),
    *("mllama_text_model", "moonshine", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet"),
    *("seamless_m4t", "speech_to_text", "switch_transformers", "t5", "t5gemma", "trocr", "udop", "umt5", "whisper"),
}
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


def read_architecture(path: Path) -> Architecture:
    """The architecture of the config.json at ``path``. See ``describe``."""
    return describe(read_json(path), str(path))


def describe(raw: Mapping[str, Any], path: str = "config.json") -> Architecture:
    """The architecture of a config.json; of a model that also sees or hears, its language model.

    Raises LlmqError, which names ``path``, on a field that is missing or cannot be, and on cross-attention, which
    keeps what no field of a config.json says.
    """
    assumptions: list[str] = []
    text = _language_model(raw, path, assumptions)
    model_type = _model_type(text, path)
    if model_type in CROSS_ATTENTION or raw.get("is_encoder_decoder") is True:
        raise LlmqError(
            f"{path}: {model_type} attends to an encoder's outputs, which llmq memplan does not plan",
            "it plans decoder-only language models",
        )
    if model_type not in FAMILIES:
        assumptions.append(f"{model_type!r} is not known here: it is counted as a Llama with the fields that it names")
    fields, family = Fields(text, class_defaults().get(model_type, {}), path), FAMILIES.get(model_type, UNKNOWN)
    if fields.maybe_size("num_nextn_predict_layers") is not None:
        assumptions.append("layers that predict further tokens (MTP) are not counted")

    blocks = _blocks(fields, family)
    caches = {block: _cache(block, family) for block in set(blocks)}
    return Architecture(
        model_type=model_type,
        hidden_size=fields.size("hidden_size"),
        vocab_size=fields.size("vocab_size"),
        mlp_elements=max(_mlp_elements(block, family) for block in caches),
        layers=tuple(caches[block] for block in blocks),
        weights=merge(_weights(fields, family, blocks)),
        dtype=_dtype(fields, "dtype") or "float32",
        context_length=fields.maybe_size("max_position_embeddings"),
        state_dtype=_dtype(fields, "mamba_ssm_dtype"),
        quantization=_quantization(raw, fields),
        assumptions=tuple(assumptions),
        known=model_type in FAMILIES,
    )


def _language_model(raw: Mapping[str, Any], path: str, assumptions: list[str]) -> Mapping[str, Any]:
    """The fields of the language model, which may be nested, with what the whole says of it."""
    name = next((name for name in NESTED if name in raw), None)
    if name is None:
        return raw
    inner = raw[name]
    if not isinstance(inner, dict):
        raise Fields(raw, {}, path).wrong(name, "must be an object", inner)
    assumptions.append(f"only the language model, {name}, is counted")
    outer = {key: raw[key] for key in ("model_type", "tie_word_embeddings", "dtype", "torch_dtype") if key in raw}
    return _language_model(outer | inner, path, assumptions)


def _model_type(raw: Mapping[str, Any], path: str) -> str:
    fields = Fields(raw, {}, path)
    model_type = fields.text("model_type")
    if model_type is None:
        classes = fields.list_of(str, "architectures")
        if not classes:
            raise LlmqError(f"{path}: field 'model_type' is missing", "point at the config.json of a language model")
        name = classes[0].split("For")[0].removesuffix("LMHeadModel").lower()  # LlamaForCausalLM → llama
        model_type = next((known for known in (*FAMILIES, *SAME_AS) if known.replace("_", "") == name), name)
    return SAME_AS.get(model_type, model_type)


def _dtype(fields: Fields, name: str) -> str | None:
    dtype = fields.text(name)
    if dtype is not None and dtype.removeprefix("torch.") not in DTYPE_BYTES:
        raise fields.wrong(name, f"must be one of {', '.join(DTYPE_BYTES)}", dtype)
    return None if dtype is None else dtype.removeprefix("torch.")


def _quantization(raw: Mapping[str, Any], fields: Fields) -> Mapping[str, Any] | None:
    quantization = raw.get("quantization_config") or fields.value("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise fields.wrong("quantization_config", "must be an object", quantization)
    return quantization


@dataclass(frozen=True, slots=True)
class _Block:
    """A decoder block. ``keeps``: it has keys and values of its own."""

    fields: Fields
    kind: LayerKind
    keeps: bool
    has_experts: bool


def _blocks(fields: Fields, family: Family) -> list[_Block]:
    kinds = _layer_kinds(fields, family)
    keeping = len(kinds) - (fields.maybe_size("num_kv_shared_layers") or 0)
    has_experts = fields.maybe_size("num_experts") is not None
    return [
        _Block(fields.of_layer(layer), kind, layer < keeping, has_experts and family.sparse(fields, layer))
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


# What a layer keeps


def _cache(block: _Block, family: Family) -> LayerCache:
    fields = block.fields
    if not block.keeps:
        return LayerCache("shared")
    match block.kind:
        case "conv":
            return LayerCache("state", conv_elements=fields.size("hidden_size") * fields.size("conv_L_cache"))
        case "recurrent":
            return _state(fields, family)
        case "both":
            state, attention = _state(fields, family), _cache(replace(block, kind="full"), family)
            return replace(attention, conv_elements=state.conv_elements, state_elements=state.state_elements)
        case kind:
            return _attention_cache(fields, family, kind)


def _attention_cache(fields: Fields, family: Family, kind: Literal["full", "sliding", "chunked"]) -> LayerCache:
    latent = fields.maybe_size("kv_lora_rank")
    if latent is not None:
        return LayerCache("latent", token_elements=latent + fields.size("qk_rope_head_dim"))
    heads = _kv_heads(fields, family, kind)
    window = {"full": None, "sliding": "sliding_window", "chunked": "attention_chunk_size"}[kind]
    tokens = None if window is None else fields.size(window)
    return LayerCache(kind, heads, 2 * heads * _head_dim(fields, family, kind), tokens)


def _state(fields: Fields, family: Family) -> LayerCache:
    if family.mixer == "delta":
        keys, values = _delta_widths(fields)
        convolved, taps = 2 * keys + values, fields.size("linear_conv_kernel_dim")
        return LayerCache(
            "state",
            conv_elements=convolved * taps,
            state_elements=values * fields.size("linear_key_head_dim"),
        )
    inner, states = _mamba_width(fields, family), fields.size("state_size")
    convolved = inner if family.mixer == "mamba" else inner + 2 * fields.size("mamba_n_groups") * states
    return LayerCache("state", conv_elements=convolved * fields.size("conv_kernel"), state_elements=inner * states)


# Sizes


def _kv_heads(fields: Fields, family: Family, kind: LayerKind) -> int:
    heads, kv_heads = fields.size("num_attention_heads"), family.kv_heads(fields)
    if kind == "full" and family.global_dim and fields.flag("attention_k_eq_v"):
        kv_heads = fields.maybe_size("num_global_key_value_heads") or kv_heads
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"must divide the {heads} attention heads", kv_heads)
    return kv_heads


def _head_dim(fields: Fields, family: Family, kind: LayerKind) -> int:
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if kind == "full" and family.global_dim and fields.value("per_layer_config") is None:
        return fields.maybe_size("global_head_dim") or family.global_dim
    named = fields.maybe_size("head_dim")
    if named is None and hidden < heads:
        raise fields.wrong("num_attention_heads", f"must be at most hidden_size, {hidden}", heads)
    return named or hidden // heads


def _dense_width(fields: Fields, family: Family) -> int:
    named = fields.maybe_size(family.dense_size)
    if named is None:
        return (fields.maybe_size("expansion_ratio") or 4) * fields.size("hidden_size")
    if not fields.flag("block_auto_adjust_ff_dim"):
        return named
    factor, multiple = fields.value("block_ffn_dim_multiplier"), fields.size("block_multiple_of")
    if not isinstance(factor, int | float) or not 0 < factor < 100:
        raise fields.wrong("block_ffn_dim_multiplier", "must be a number above 0 and below 100", factor)
    return -(-int(factor * (2 * named // 3)) // multiple) * multiple


def _expert_width(fields: Fields) -> int:
    return fields.maybe_size("moe_intermediate_size") or fields.size("intermediate_size")


def _shared_width(fields: Fields, family: Family) -> int:
    """Of the expert that every token goes through; 0: there is none."""
    if family.shared_expert:
        return _expert_width(fields)
    shared = fields.maybe_size("n_shared_experts") or 0
    return fields.maybe_size("shared_expert_intermediate_size") or shared * _expert_width(fields)


def _mlp_elements(block: _Block, family: Family) -> int:
    """Of one token: what gates, what is gated, and their product; of experts also each one's output."""
    fields = block.fields
    if not family.mlp:
        return 3 * _mamba_width(fields, family)
    if not block.has_experts:
        return 3 * _dense_width(fields, family)
    beside = _dense_width(fields, family) if family.experts_beside else _shared_width(fields, family)
    each = 3 * _expert_width(fields) + fields.size("hidden_size")
    return fields.size("num_experts_per_tok") * each + 3 * beside


def _mamba_width(fields: Fields, family: Family) -> int:
    expanded = fields.size("expand") * fields.size("hidden_size")
    if family.mixer == "mamba2":
        return fields.maybe_size("mamba_d_ssm") or expanded
    # Of a block that has an MLP as well, intermediate_size is the MLP's.
    return expanded if family.mlp else fields.maybe_size("intermediate_size") or expanded


def _delta_widths(fields: Fields) -> tuple[int, int]:
    """Of all keys, and of all values, of a gated DeltaNet."""
    keys = fields.size("linear_num_key_heads") * fields.size("linear_key_head_dim")
    return keys, fields.size("linear_num_value_heads") * fields.size("linear_value_head_dim")


def _is_on(fields: Fields, bias: Bias) -> bool:
    return fields.flag(bias) if isinstance(bias, str) else bias


# What it weighs


def _weights(fields: Fields, family: Family, blocks: list[_Block]) -> Iterator[Weight]:
    yield from _ends(fields, family)
    for block, number in Counter(blocks).items():
        for weight in _block_weights(block, family):
            yield replace(weight, copies=number * weight.copies, active=number * weight.active)
    per_layer = fields.maybe_size("hidden_size_per_layer_input")
    if per_layer is not None:
        yield from _per_layer_inputs(fields, per_layer, len(blocks))


def _block_weights(block: _Block, family: Family) -> Iterator[Weight]:
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
        yield from _feed_forward(fields, family, _dense_width(fields, family) * (1 + wide))
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
    hidden, dim = fields.size("hidden_size"), _head_dim(fields, family, kind)
    heads, kv_heads = fields.size("num_attention_heads"), _kv_heads(fields, family, kind)
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
    hidden, width = fields.size("hidden_size"), _expert_width(fields)
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
    shared = _shared_width(fields, family)
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
    hidden, inner, states = fields.size("hidden_size"), _mamba_width(fields, family), fields.size("state_size")
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
    hidden, inner, states = fields.size("hidden_size"), _mamba_width(fields, family), fields.size("state_size")
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
    keys, values = _delta_widths(fields)
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
