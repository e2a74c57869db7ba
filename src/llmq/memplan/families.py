"""How decoder architectures differ from Llama: one entry each, after the models of transformers 5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from llmq.memplan.fields import Fields

LayerKind = Literal["full", "sliding", "chunked", "recurrent", "conv", "both"]
"""``both``: attention and a state space side by side."""
LayerKinds = Callable[[Fields, int], list[LayerKind]]
Bias = bool | str
"""There is one or not; or the name of the field that says so."""


def full(fields: Fields, layers: int) -> list[LayerKind]:
    return ["full"] * layers


def uses_experts(fields: Fields, layer: int) -> bool:
    """Has the layer experts, as most mixtures say it?"""
    first, step = fields.maybe_size("first_k_dense_replace") or 0, fields.maybe_size("decoder_sparse_step") or 1
    return layer >= first and (layer + 1) % step == 0 and layer not in (fields.list_of(int, "mlp_only_layers") or [])


def key_value_heads(fields: Fields) -> int:
    return fields.maybe_size("num_key_value_heads") or fields.size("num_attention_heads")


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture, by what is not as in Llama.

    layer_kinds   of each layer, where there are no ``layer_types``
    mixer         what recurrent layers are; mixer_norm: with a norm of its own
    norms         in a block, of ``norm_vectors`` each: weight, and perhaps bias
    qk_norm       of queries and keys: over a head, heads (for each head its own) or full (all heads at once);
                  qk_norm_if: only where this field is true
    qkv_bias, o_bias, mlp_bias, router_bias, expert_bias, head_bias  there is one
    query_gate    queries are twice as wide, half of them a gate
    sinks         a number for each head that attention can go to instead of tokens
    gated         an MLP of three matrices; else of two; mlp: there is one at all
    fused_qkv, fused_mlp  one matrix for three, or for two
    dense_size    the field with the width of MLPs without experts
    sparse        has a layer experts, where ``num_experts`` are named at all
    shared_expert one of the experts' size that every token goes through; shared_gate: weighed by a gate
    experts_beside  beside an MLP without experts, with norms and scales of their own (Gemma 4)
    positions     rows of a table of positions beyond the context; None: there is no table
    global_dim    of heads of layers that attend to all, where nothing else is said (Gemma 4)
    altup         several streams of hidden states, and a second, narrow path through each block (Gemma 3n)
    embedding_norm  the embedding is normed
    block_vector  further numbers in a block
    """

    layer_kinds: LayerKinds = full
    kv_heads: Callable[[Fields], int] = key_value_heads
    mixer: Literal["mamba", "mamba2", "delta"] = "mamba2"
    mixer_norm: bool = False
    norms: int | Callable[[Fields], int] = 2
    norm_vectors: int = 1
    qk_norm: Literal["head", "heads", "full"] | None = None
    qk_norm_if: str | None = None
    qkv_bias: Bias = "attention_bias"
    o_bias: Bias = "attention_bias"
    query_gate: bool = False
    sinks: bool = False
    mlp: bool = True
    gated: bool = True
    mlp_bias: Bias = False
    fused_qkv: bool = False
    fused_mlp: bool = False
    dense_size: str = "intermediate_size"
    sparse: Callable[[Fields, int], bool] = uses_experts
    router_bias: bool = False
    expert_bias: bool = False
    shared_expert: bool = False
    shared_gate: bool = False
    head_bias: Bias = False
    experts_beside: bool = False
    positions: int | None = None
    global_dim: int | None = None
    altup: bool = False
    embedding_norm: bool = False
    block_vector: int = 0


# Which layers are of which kind


def uniform(fields: Fields, layers: int) -> list[LayerKind]:
    """All slide, if there is a window."""
    return ["full" if fields.maybe_size("sliding_window") is None else "sliding"] * layers


def uniform_if_used(fields: Fields, layers: int) -> list[LayerKind]:
    """All slide, if there is a window and use_sliding_window."""
    return uniform(fields, layers) if fields.flag("use_sliding_window") else full(fields, layers)


def from_max_window_layers(fields: Fields, layers: int) -> list[LayerKind]:
    """Those from max_window_layers on slide, if the window is used."""
    first = fields.maybe_size("max_window_layers") or 0
    kinds = uniform_if_used(fields, layers)
    return [kind if layer >= first else "full" for layer, kind in enumerate(kinds)]


def even_below_max_window_layers(fields: Fields, layers: int) -> list[LayerKind]:
    """Every other layer below max_window_layers slides, if the window is used."""
    most = fields.maybe_size("max_window_layers") or 0
    kinds = uniform_if_used(fields, layers)
    return [kind if layer % 2 == 0 and layer < most else "full" for layer, kind in enumerate(kinds)]


def one_full_in(number: int, others: LayerKind, field: str = "") -> LayerKinds:
    """The last of each ``number`` layers attends to all; ``field`` may say another number, or a pattern like LLLG."""

    def kinds(fields: Fields, layers: int) -> list[LayerKind]:
        pattern = fields.value(field)
        period = len(pattern) if isinstance(pattern, str) and pattern else fields.maybe_size(field) or number
        if others == "sliding" and fields.maybe_size("sliding_window") is None:
            return full(fields, layers)
        return ["full" if (layer + 1) % period == 0 else others for layer in range(layers)]

    return kinds


def _has_rope(fields: Fields, layers: int) -> list[bool]:
    listed = fields.list_of(int, "no_rope_layers")
    if listed:
        if len(listed) != layers:
            raise fields.wrong("no_rope_layers", f"must have an entry for each of {layers} layers", listed)
        return [rope != 0 for rope in listed]
    period = fields.size("no_rope_layer_interval")
    return [(layer + 1) % period != 0 for layer in range(layers)]


def chunked_with_rope(fields: Fields, layers: int) -> list[LayerKind]:
    return ["chunked" if rope else "full" for rope in _has_rope(fields, layers)]


def sliding_without_rope(fields: Fields, layers: int) -> list[LayerKind]:
    """The layers without positions slide, if the window is used."""
    kinds = uniform_if_used(fields, layers)
    return ["full" if rope else kind for rope, kind in zip(_has_rope(fields, layers), kinds, strict=True)]


def periodic(fields: Fields, layers: int) -> list[LayerKind]:
    """One layer of each period attends, the others have a state."""
    period, offset = fields.size("attn_layer_period"), fields.maybe_size("attn_layer_offset") or 0
    return ["full" if layer % period == offset else "recurrent" for layer in range(layers)]


def listed_full(others: LayerKind, *, without_list: LayerKind) -> LayerKinds:
    """The layers that a list names attend."""

    def kinds(fields: Fields, layers: int) -> list[LayerKind]:
        named = fields.list_of(int, "full_attn_idxs")
        if named is None:
            return [without_list] * layers
        return ["full" if layer in named else others for layer in range(layers)]

    return kinds


def every_layer(kind: LayerKind) -> LayerKinds:
    return lambda fields, layers: [kind] * layers


# Which layers have experts, and how many key-value heads, where the usual fields do not say


def _jamba_experts(fields: Fields, layer: int) -> bool:
    return layer % fields.size("expert_layer_period") == (fields.maybe_size("expert_layer_offset") or 0)


def _llama4_experts(fields: Fields, layer: int) -> bool:
    listed = fields.list_of(int, "moe_layers")
    return layer in listed if listed else (layer + 1) % fields.size("interleave_moe_layer_step") == 0


def _multi_query(fields: Fields) -> int:
    return 1 if fields.flag("multi_query") else fields.size("num_attention_heads")


def _falcon_heads(fields: Fields) -> int:
    return key_value_heads(fields) if fields.flag("new_decoder_architecture") else _multi_query(fields)


def _falcon_norms(fields: Fields) -> int:
    if fields.flag("new_decoder_architecture"):
        return fields.maybe_size("num_ln_in_parallel_attn") or 2
    return 1 if fields.flag("parallel_attn") else 2


def _stablelm_norms(fields: Fields) -> int:
    return 1 if fields.flag("use_parallel_residual") else 2


def _gemma4_experts(fields: Fields, layer: int) -> bool:
    return fields.flag("enable_moe_block")


def _mpt_heads(fields: Fields) -> int:
    return fields.within("attn_config").maybe_size("kv_n_heads") or fields.size("num_attention_heads")


LLAMA = Family(mlp_bias="mlp_bias")
_NO_MLP_BIAS = Family()
_NO_BIAS = Family(qkv_bias=False, o_bias=False)
_LAYER_NORMS = Family(norm_vectors=2, gated=False, qkv_bias=True, o_bias=True, mlp_bias=True)
_GPT2 = replace(_LAYER_NORMS, fused_qkv=True, positions=0)
_MAMBA = Family(layer_kinds=every_layer("recurrent"), norms=1, mlp=False, mixer="mamba")
_GEMMA2 = Family(layer_kinds=one_full_in(2, "sliding"), norms=4)
_DELTA = Family(
    layer_kinds=one_full_in(4, "recurrent", "full_attention_interval"),
    mixer="delta",
    qk_norm="head",
    query_gate=True,
    shared_gate=True,
)

FAMILIES: dict[str, Family] = {
    "apertus": Family(gated=False, qk_norm="head", block_vector=2),
    "arcee": replace(LLAMA, gated=False),
    "bamba": replace(LLAMA, layer_kinds=listed_full("recurrent", without_list="recurrent"), mixer_norm=True),
    "bloom": replace(_LAYER_NORMS, fused_qkv=True, embedding_norm=True),
    "cohere": Family(norms=1, qk_norm="heads", qk_norm_if="use_qk_norm"),
    "cohere2": Family(norms=1, layer_kinds=one_full_in(4, "sliding", "sliding_window_pattern")),
    "deepseek_v2": _NO_MLP_BIAS,
    "deepseek_v3": _NO_MLP_BIAS,
    "ernie4_5": Family(qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias"),
    "exaone4": replace(_NO_BIAS, layer_kinds=one_full_in(4, "sliding", "sliding_window_pattern"), qk_norm="head"),
    "falcon": Family(
        kv_heads=_falcon_heads,
        norms=_falcon_norms,
        norm_vectors=2,
        gated=False,
        qkv_bias="bias",
        o_bias="bias",
        mlp_bias="bias",
        fused_qkv=True,
    ),
    "falcon_h1": replace(LLAMA, layer_kinds=every_layer("both")),
    "falcon_mamba": _MAMBA,
    "gemma": _NO_MLP_BIAS,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, layer_kinds=one_full_in(6, "sliding", "sliding_window_pattern"), qk_norm="head"),
    "gemma3n_text": replace(_GEMMA2, layer_kinds=one_full_in(5, "sliding"), qk_norm="head", altup=True),
    "gemma4_text": replace(
        _GEMMA2,
        layer_kinds=one_full_in(6, "sliding"),
        qk_norm="head",
        global_dim=512,
        sparse=_gemma4_experts,
        experts_beside=True,
    ),
    "glm": Family(o_bias=False, fused_mlp=True),
    "glm4": Family(o_bias=False, fused_mlp=True, norms=4),
    "glm4_moe": Family(o_bias=False, qk_norm="head", qk_norm_if="use_qk_norm"),
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, kv_heads=_multi_query),
    "gpt_neox": replace(_LAYER_NORMS, fused_qkv=True, qkv_bias="attention_bias", o_bias="attention_bias"),
    "gpt_oss": Family(layer_kinds=one_full_in(2, "sliding"), sinks=True, router_bias=True, expert_bias=True),
    "gptj": replace(_LAYER_NORMS, qkv_bias=False, o_bias=False, norms=1, head_bias=True),
    "granite": LLAMA,
    "granitemoe": _NO_MLP_BIAS,
    "granitemoehybrid": Family(
        layer_kinds=every_layer("recurrent"), mixer_norm=True, fused_mlp=True, dense_size="shared_intermediate_size"
    ),
    "granitemoeshared": Family(fused_mlp=True),
    "helium": replace(LLAMA, o_bias=False),
    "hunyuan_v1_dense": Family(qk_norm="head"),
    "jamba": replace(_NO_BIAS, layer_kinds=periodic, mixer="mamba", mixer_norm=True, sparse=_jamba_experts),
    "lfm2": replace(_NO_BIAS, layer_kinds=listed_full("conv", without_list="full"), qk_norm="head"),
    "llama": LLAMA,
    "llama4_text": Family(
        layer_kinds=chunked_with_rope, sparse=_llama4_experts, shared_expert=True, dense_size="intermediate_size_mlp"
    ),
    "mamba": _MAMBA,
    "mamba2": replace(_MAMBA, mixer="mamba2", mixer_norm=True),
    "minicpm3": LLAMA,
    "minimax_m2": replace(_NO_BIAS, qk_norm="full"),
    "ministral3": replace(_NO_BIAS, layer_kinds=uniform),
    "mistral": replace(_NO_BIAS, layer_kinds=uniform),
    "mixtral": replace(_NO_BIAS, layer_kinds=uniform),
    "mpt": replace(_NO_BIAS, kv_heads=_mpt_heads, gated=False, fused_qkv=True),
    "nemotron": replace(LLAMA, norm_vectors=2, gated=False),
    "olmo": Family(norm_vectors=0),
    "olmo2": Family(qk_norm="full"),
    "olmo3": Family(layer_kinds=one_full_in(4, "sliding"), qk_norm="full"),
    "olmoe": Family(qk_norm="full"),
    "opt": replace(_LAYER_NORMS, qkv_bias="enable_bias", o_bias="enable_bias", mlp_bias="enable_bias", positions=2),
    "phi": replace(_LAYER_NORMS, norms=1, qk_norm="head", qk_norm_if="qk_layernorm", head_bias=True),
    "phi3": replace(_NO_BIAS, layer_kinds=uniform, fused_qkv=True, fused_mlp=True),
    "phimoe": Family(layer_kinds=uniform, norm_vectors=2, head_bias="lm_head_bias"),
    "qwen2": replace(_NO_BIAS, layer_kinds=from_max_window_layers, qkv_bias=True),
    "qwen2_moe": replace(_NO_BIAS, layer_kinds=even_below_max_window_layers, qkv_bias="qkv_bias", shared_gate=True),
    "qwen3": Family(layer_kinds=from_max_window_layers, qk_norm="head"),
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_moe": Family(layer_kinds=uniform_if_used, qk_norm="head"),
    "qwen3_next": _DELTA,
    "seed_oss": replace(LLAMA, o_bias="attention_out_bias"),
    "smollm3": replace(LLAMA, layer_kinds=sliding_without_rope),
    "stablelm": replace(
        _NO_BIAS,
        norms=_stablelm_norms,
        norm_vectors=2,
        qkv_bias="use_qkv_bias",
        qk_norm="heads",
        qk_norm_if="qk_layernorm",
    ),
    "starcoder2": replace(
        _LAYER_NORMS, layer_kinds=uniform, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias"
    ),
}
UNKNOWN = replace(LLAMA, layer_kinds=uniform_if_used)
"""A Llama with whatever its config.json names."""
