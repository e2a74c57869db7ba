"""ModelConfig: config.json and generation_config.json, read once into typed facts. No torch.

Field names, and what a missing field means, follow the Hugging Face configuration classes of each architecture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from llmq.errors import LlmqError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SEPARATE = {"quant_config.json": "awq", "quantize_config.json": "gptq"}
"""Files that say what config.json has as ``quantization_config``, and the method that they may not name."""
MISTRAL_DEFAULT_WINDOW = 4096
"""transformers' MistralConfig slides over 4,096 tokens when config.json does not name a window."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base, and how the frequencies are scaled beyond the trained context."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family, as its folder describes it."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    """For each layer, the tokens a query sees (itself included), or None for all."""
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: Mapping[str, Any] | None
    """``quantization_config`` as the folder has it; ``checkpoint.formats`` reads it."""

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder block: name within the block → (out_features, in_features)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }


_Size = Annotated[int, Field(strict=True, gt=0, lt=2**31)]
_Layers = Annotated[int, Field(strict=True, gt=0, le=10_000)]


class _Raw(BaseModel):
    """The fields of config.json that matter, checked. Aliases and defaults are those of transformers."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    architectures: list[str] = Field(min_length=1)
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Layers
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    vocab_size: _Size
    max_position_embeddings: _Size = 2048
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: _Size | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    quantization_config: dict[str, Any] | None = None


class _RawRope(BaseModel):
    model_config = ConfigDict(extra="ignore")

    rope_theta: PositiveFloat | None = None
    rope_type: str = "default"
    factor: PositiveFloat = 1.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: _Size = 8192


def read_config(folder: Path) -> ModelConfig:
    """The facts of the model in ``folder``.

    Raises LlmqError when config.json is missing or malformed, or describes an architecture, an activation or a
    RoPE scaling that llmq does not run.
    """
    raw_json = read_json(folder / "config.json")
    try:
        raw = _Raw.model_validate(raw_json)
        rope = _read_rope(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise LlmqError(f"{folder / 'config.json'}: field {field!r}: {first['msg']}") from None

    architecture = raw.architectures[0]
    model_type = ARCHITECTURES.get(architecture)
    if model_type is None:
        raise LlmqError(
            f"{folder}: the architecture {architecture} is not supported",
            f"llmq runs {', '.join(ARCHITECTURES)}",
        )
    if raw.hidden_act != "silu":
        raise LlmqError(f"{folder}: the activation {raw.hidden_act!r} is not supported", "llmq runs 'silu'")
    dtype = raw.dtype or raw.torch_dtype or "float32"
    if dtype not in DTYPE_BYTES:
        raise LlmqError(f"{folder}: the dtype {dtype!r} is not supported", f"use {', '.join(DTYPE_BYTES)}")
    kv_heads = raw.num_key_value_heads or raw.num_attention_heads
    head_dim = raw.head_dim or raw.hidden_size // raw.num_attention_heads
    if head_dim < 2 or head_dim % 2:
        raise LlmqError(f"{folder}: heads of {head_dim} channels cannot be rotated in pairs")
    if raw.num_attention_heads % kv_heads:
        raise LlmqError(f"{folder}: {raw.num_attention_heads} attention heads cannot share {kv_heads} key-value heads")

    return ModelConfig(
        model_type=model_type,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=raw.vocab_size,
        context_length=raw.max_position_embeddings,
        rms_norm_eps=raw.rms_norm_eps,
        rope=rope,
        windows=_read_windows(model_type, raw, "sliding_window" in raw_json),
        tied_embeddings=raw.tie_word_embeddings,
        qkv_bias=raw.attention_bias or model_type == "qwen2",
        o_bias=raw.attention_bias and model_type != "qwen2",
        mlp_bias=raw.mlp_bias and model_type == "llama",
        qk_norm=model_type == "qwen3",
        dtype=dtype,
        bos_token_id=raw.bos_token_id,
        eos_token_ids=_read_eos(folder, raw),
        quantization=raw.quantization_config or _separate_quantization(folder),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``; LlmqError if the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LlmqError(f"{path.parent} has no {path.name}", "point at a Hugging Face model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LlmqError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise LlmqError(f"{path} does not hold a JSON object")
    return value


def _separate_quantization(folder: Path) -> Mapping[str, Any] | None:
    """What AutoAWQ's and AutoGPTQ's own folders say in a file beside config.json, in place of it."""
    for name, method in SEPARATE.items():
        if (folder / name).exists():
            return {"quant_method": method, **read_json(folder / name)}
    return None


def _read_rope(raw: _Raw) -> Rope:
    # transformers 5 keeps everything under rope_parameters; before, rope_theta stood beside rope_scaling,
    # whose kind was first called "type".
    fields = dict(raw.rope_parameters or raw.rope_scaling or {})
    fields.setdefault("rope_type", fields.get("type", "default"))
    scaling = _RawRope.model_validate(fields)
    theta = scaling.rope_theta or raw.rope_theta
    match scaling.rope_type:
        case "default":
            return Rope(theta)
        case "linear":
            return Rope(theta, "linear", scaling.factor)
        case "llama3":
            return Rope(
                theta,
                "llama3",
                scaling.factor,
                scaling.low_freq_factor,
                scaling.high_freq_factor,
                scaling.original_max_position_embeddings,
            )
        case other:
            raise LlmqError(f"the RoPE scaling {other!r} is not supported", "llmq runs default, linear, llama3")


def _read_windows(model_type: str, raw: _Raw, window_named: bool) -> tuple[int | None, ...]:
    layers = raw.num_hidden_layers
    window = raw.sliding_window
    if model_type == "mistral":
        return (window if window_named else MISTRAL_DEFAULT_WINDOW,) * layers
    if model_type not in ("qwen2", "qwen3") or not raw.use_sliding_window or window is None:
        return (None,) * layers
    if raw.layer_types is not None:
        if len(raw.layer_types) != layers:
            raise LlmqError(f"config.json names {len(raw.layer_types)} layer_types for {layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in raw.layer_types)
    return tuple(window if layer >= raw.max_window_layers else None for layer in range(layers))


def _read_eos(folder: Path, raw: _Raw) -> tuple[int, ...]:
    """Every id that ends a generation: generation_config.json has the last word, config.json the first."""
    eos: Any = raw.eos_token_id
    generation = folder / "generation_config.json"
    if generation.exists():
        eos = read_json(generation).get("eos_token_id", eos)
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) for token in ids):
        raise LlmqError(f"{generation}: eos_token_id must be a token id or a list of them")
    return tuple(ids)
