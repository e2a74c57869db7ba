"""config.json of any decoder → its ``Architecture``: what it weighs, and what its layers keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from llmq.checkpoint.config import DTYPE_BYTES, read_json
from llmq.errors import LlmqError
from llmq.memplan.architecture import Architecture, LayerCache, merge
from llmq.memplan.blocks import Block, read_blocks
from llmq.memplan.families import FAMILIES, UNKNOWN, Family
from llmq.memplan.fields import Fields, class_defaults
from llmq.memplan.parameters import count_weights
from llmq.memplan.widths import delta_widths, head_dim, mamba_width, mlp_elements, num_kv_heads

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
    "bart", "blenderbot", "encoder-decoder", "idefics", "led", "longt5", "m2m_100", "marian", "mbart", "mllama",
    "mllama_text_model", "moonshine", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet",
    "seamless_m4t", "speech_to_text", "switch_transformers", "t5", "t5gemma", "trocr", "udop", "umt5", "whisper",
}  # fmt: skip
"""Architectures some of whose layers attend to what an encoder makes."""


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

    blocks = read_blocks(fields, family)
    caches = {block: _cache(block, family) for block in set(blocks)}
    return Architecture(
        model_type=model_type,
        hidden_size=fields.size("hidden_size"),
        vocab_size=fields.size("vocab_size"),
        mlp_elements=max(mlp_elements(block, family) for block in caches),
        layers=tuple(caches[block] for block in blocks),
        weights=merge(count_weights(fields, family, blocks)),
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
    return quantization or None  # an empty one says nothing


def _cache(block: Block, family: Family) -> LayerCache:
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
    heads = num_kv_heads(fields, family, kind)
    window = {"full": None, "sliding": "sliding_window", "chunked": "attention_chunk_size"}[kind]
    tokens = None if window is None else fields.size(window)
    return LayerCache(kind, heads, 2 * heads * head_dim(fields, family, kind), tokens)


def _state(fields: Fields, family: Family) -> LayerCache:
    if family.mixer == "delta":
        keys, values = delta_widths(fields)
        convolved, taps = 2 * keys + values, fields.size("linear_conv_kernel_dim")
        return LayerCache(
            "state",
            conv_elements=convolved * taps,
            state_elements=values * fields.size("linear_key_head_dim"),
        )
    inner, states = mamba_width(fields, family), fields.size("state_size")
    convolved = inner if family.mixer == "mamba" else inner + 2 * fields.size("mamba_n_groups") * states
    return LayerCache("state", conv_elements=convolved * fields.size("conv_kernel"), state_elements=inner * states)
