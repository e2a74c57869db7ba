"""ModelConfig: config.json and generation_config.json, read once into typed facts. No torch.

Field names, and what a missing field means, follow the Hugging Face configuration classes of each architecture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmq.checkpoint.rope import Rope, Theta, read_rope
from llmq.errors import LlmqError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""The names of config.json for what gates the MLP."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""The kinds of layers, as ``layer_types`` names them."""
SEPARATE = {"quant_config.json": "awq", "quantize_config.json": "gptq"}
"""Files that say what config.json has as ``quantization_config``, and the method that they may not name."""
MEND = "mend config.json, or fetch it again"
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
"""The checkpoint's names of what is in no decoder block."""


def block_name(layer: int) -> str:
    """The checkpoint's name of a decoder block."""
    return f"model.layers.{layer}"


@dataclass(frozen=True, slots=True)
class LinearNames:
    """What the checkpoints of an architecture call the linear layers of a block.

    One name for several projections: their matrices lie in it one on top of the other.
    """

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    feed_forward: str = "mlp"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class Architecture:
    """``defaults``: what the configuration class of transformers assumes where config.json says nothing, as far as it
    differs from Llama's."""

    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    names: LinearNames = LinearNames()


_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32_768}
_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama"),
    "MistralForCausalLM": Architecture(
        "mistral", {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072}
    ),
    "Qwen2ForCausalLM": Architecture("qwen2", _QWEN),
    "Qwen3ForCausalLM": Architecture("qwen3", _QWEN | {"head_dim": 128}),
    "Phi3ForCausalLM": Architecture(
        "phi3",
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        LinearNames(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    ),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        _GEMMA
        | {"max_position_embeddings": 8192, "sliding_window_pattern": 2}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        _GEMMA | {"max_position_embeddings": 131_072, "sliding_window_pattern": 6, "rope_theta": 1e6},
    ),
    "MixtralForCausalLM": Architecture(
        "mixtral",
        {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072, "rope_theta": 1e6}
        | {"num_experts": 8, "num_experts_per_tok": 2},
        LinearNames(feed_forward="block_sparse_moe", gate_up=("w1", "w3"), down="w2"),
    ),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        _QWEN | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
}


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of each block's MLP (Shazeer et al., 2017).

    count              MLPs, among which a router chooses for each token
    per_token          as many as these, the likeliest
    intermediate_size  of each
    renormalized       the probabilities of those chosen, which weigh their outputs, are made to add up to 1
    """

    count: int
    per_token: int
    intermediate_size: int
    renormalized: bool


@dataclass(frozen=True, slots=True)
class LinearStage:
    """Linear layers of a block whose inputs can be seen in one pass, once the stages before it have been computed.

    half    of the block's two, ``DecoderLayer.mix`` and ``DecoderLayer.finish``: the one in which they run
    groups  names within the block; those of one group have the very same inputs
    """

    half: Literal["mix", "finish"]
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family or one of its relatives, as its folder describes it."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    """Tokens of the longest sequence that is run: some RoPE scalings depend on it."""
    rms_norm_eps: float
    ropes: tuple[Rope, ...]
    """For each layer."""
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
    names: LinearNames = LinearNames()
    experts: Experts | None = None
    activation: Activation = "silu"
    norm_offset: float = 0.0
    """Norms multiply by their weight plus this."""
    post_norms: bool = False
    """What attention and MLP give is normed, too, before it is added to the residual."""
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """Multiplies the scores; None: 1/√head_dim."""
    attention_softcap: float | None = None
    """A score s becomes softcap · tanh(s / softcap)."""
    logits_softcap: float | None = None

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def linear_stages(self) -> tuple[LinearStage, ...]:
        """The linear layers of one decoder block in the order of computation. Each expert's are layers of their own;
        the router is not among them."""
        names, mlps = self.names, [self.names.feed_forward]
        if self.experts is not None:
            mlps = [f"{names.feed_forward}.experts.{number}" for number in range(self.experts.count)]
        return (
            LinearStage("mix", (tuple(f"self_attn.{name}" for name in names.qkv),)),
            LinearStage("finish", (("self_attn.o_proj",),)),
            LinearStage("finish", tuple(tuple(f"{mlp}.{name}" for name in names.gate_up) for mlp in mlps)),
            LinearStage("finish", tuple((f"{mlp}.{names.down}",) for mlp in mlps)),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The layers of ``linear_stages``: name within the block → (out_features, in_features)."""
        hidden = self.hidden_size
        inner = self.intermediate_size if self.experts is None else self.experts.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = _stacked(self.names.qkv, (q, kv, kv), hidden) | _stacked(self.names.gate_up, (inner, inner), hidden)
        shapes |= {"o_proj": (hidden, q), self.names.down: (hidden, inner)}
        layers = (name for stage in self.linear_stages for group in stage.groups for name in group)
        return {name: shapes[name.rpartition(".")[2]] for name in layers}

    @property
    def all_linears(self) -> dict[str, tuple[int, int]]:
        """``linears`` of all decoder blocks: name in the checkpoint → (out_features, in_features)."""
        linears = self.linears
        return {
            f"{block_name(layer)}.{name}": shape for layer in range(self.num_layers) for name, shape in linears.items()
        }

    @property
    def mlp_elements(self) -> int:
        """Numbers that the MLP of a block has for one token at once; experts' outputs are kept until all have run."""
        if self.experts is None:
            return 3 * self.intermediate_size
        return self.experts.per_token * (3 * self.experts.intermediate_size + self.hidden_size)

    def for_context(self, tokens: int) -> ModelConfig:
        """The model as it runs where no sequence is longer than ``tokens``."""
        return replace(self, context_length=min(tokens, self.context_length))


def _stacked(names: Sequence[str], sizes: Sequence[int], in_features: int) -> dict[str, tuple[int, int]]:
    """Name → (out_features, in_features) of projections of these ``sizes``, or of the one that they are stacked in."""
    outs = sizes if len(names) == len(sizes) else (sum(sizes),)
    return {name: (out, in_features) for name, out in zip(names, outs, strict=True)}


_Size = Annotated[int, Field(strict=True, gt=0, lt=2**31)]
_Layers = Annotated[int, Field(strict=True, gt=0, le=10_000)]
_Real = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Raw(BaseModel):
    """The fields of config.json that matter, checked. Aliases and defaults are those of transformers."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Layers
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    vocab_size: _Size
    max_position_embeddings: _Size = 2048
    original_max_position_embeddings: _Size | None = None
    rms_norm_eps: _Real = 1e-6
    rope_theta: Theta = 10_000.0
    rope_local_base_freq: Theta = 10_000.0
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    hidden_activation: str | None = None
    query_pre_attn_scalar: _Real = 256.0
    attn_logit_softcapping: _Real | None = None
    final_logit_softcapping: _Real | None = None
    use_bidirectional_attention: bool | None = None
    sliding_window: _Size | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    sliding_window_pattern: _Size | None = None
    layer_types: list[str] | None = None
    num_local_experts: _Size | None = None
    num_experts: _Size | None = None
    num_experts_per_tok: _Size | None = None
    moe_intermediate_size: _Size | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: _Size = 1
    mlp_only_layers: list[int] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    quantization_config: dict[str, Any] | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


def read_config(folder: Path) -> ModelConfig:
    """The facts of the model in ``folder``.

    Raises LlmqError when config.json is missing or malformed, contradicts itself, or describes an architecture, an
    activation or a RoPE scaling that llmq does not run.
    """
    raw_json = read_json(folder / "config.json")
    architecture = _architecture(folder, raw_json.get("architectures"))
    model_type = architecture.model_type
    try:
        raw = _Raw.model_validate({**architecture.defaults, **raw_json})
        kinds = _layer_kinds(model_type, raw)
        ropes = _read_ropes(model_type, raw, kinds)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise LlmqError(f"{folder / 'config.json'}: field {location!r}: {first['msg']}", MEND) from None

    gemma = model_type.startswith("gemma")
    activation = raw.hidden_activation if gemma and raw.hidden_activation is not None else raw.hidden_act
    if activation not in ACTIVATIONS:
        raise LlmqError(
            f"{folder}: the activation {activation!r} is not supported", f"llmq runs {', '.join(ACTIVATIONS)}"
        )
    dtype = raw.dtype or raw.torch_dtype or "float32"
    if dtype not in DTYPE_BYTES:
        raise LlmqError(f"{folder}: the dtype {dtype!r} is not supported", f"use {', '.join(DTYPE_BYTES)}")
    if raw.num_attention_heads % raw.kv_heads:
        raise LlmqError(
            f"{folder}: {raw.num_attention_heads} attention heads cannot share {raw.kv_heads} key-value heads", MEND
        )
    if raw.use_bidirectional_attention:
        raise LlmqError(f"{folder}: tokens that see later ones are not supported", "llmq runs causal attention")

    return ModelConfig(
        model_type=model_type,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=raw.kv_heads,
        head_dim=raw.head_size,
        vocab_size=raw.vocab_size,
        context_length=max(rope.reach(raw.max_position_embeddings) for rope in ropes),
        rms_norm_eps=raw.rms_norm_eps,
        ropes=ropes,
        windows=tuple(raw.sliding_window if kind == SLIDING else None for kind in kinds),
        tied_embeddings=raw.tie_word_embeddings,
        qkv_bias=raw.attention_bias or model_type == "qwen2",
        o_bias=raw.attention_bias and model_type != "qwen2",
        mlp_bias=raw.mlp_bias and model_type == "llama",
        qk_norm=model_type in ("qwen3", "qwen3_moe", "gemma3_text"),
        dtype=dtype,
        bos_token_id=raw.bos_token_id,
        eos_token_ids=_read_eos(folder, raw),
        quantization=raw.quantization_config or _separate_quantization(folder),
        names=architecture.names,
        experts=_read_experts(model_type, raw) if model_type in ("mixtral", "qwen3_moe") else None,
        activation=ACTIVATIONS[activation],
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        embedding_scale=math.sqrt(raw.hidden_size) if gemma else 1.0,
        attention_scale=raw.query_pre_attn_scalar**-0.5 if gemma else None,
        attention_softcap=raw.attn_logit_softcapping if model_type == "gemma2" else None,
        logits_softcap=raw.final_logit_softcapping if gemma else None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``; LlmqError if the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LlmqError(f"{path.parent} has no {path.name}", "point at a Hugging Face model folder") from None
    except (OSError, ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise LlmqError(f"{path} cannot be read: {error}", f"mend {path.name}, or fetch it again") from None
    if not isinstance(value, dict):
        raise LlmqError(f"{path} does not hold a JSON object", f"mend {path.name}, or fetch it again")
    return value


def _architecture(folder: Path, names: object) -> Architecture:
    if not isinstance(names, list) or not names:
        raise LlmqError(f"{folder / 'config.json'}: field 'architectures' does not name one", MEND)
    found = ARCHITECTURES.get(str(names[0]))
    if found is None:
        raise LlmqError(
            f"{folder}: the architecture {names[0]} is not supported", f"llmq runs {', '.join(ARCHITECTURES)}"
        )
    return found


def _separate_quantization(folder: Path) -> Mapping[str, Any] | None:
    """What AutoAWQ's and AutoGPTQ's own folders say in a file beside config.json, in place of it."""
    for name, method in SEPARATE.items():
        if (folder / name).exists():
            return {"quant_method": method, **read_json(folder / name)}
    return None


def _layer_kinds(model_type: str, raw: _Raw) -> tuple[str, ...]:
    """FULL or SLIDING, for each layer."""
    layers = raw.num_hidden_layers
    if model_type in ("mistral", "phi3", "mixtral"):
        return (SLIDING,) * layers
    if model_type == "llama" or (model_type.startswith("qwen") and not raw.use_sliding_window):
        return (FULL,) * layers
    if model_type == "qwen3_moe":
        return (SLIDING,) * layers
    if raw.layer_types is not None:
        if len(raw.layer_types) != layers:
            raise LlmqError(f"config.json names {len(raw.layer_types)} layer_types for {layers} layers", MEND)
        for kind in set(raw.layer_types) - {FULL, SLIDING}:
            raise LlmqError(f"layers of {kind!r} are not supported", f"llmq runs {FULL} and {SLIDING}")
        return tuple(raw.layer_types)
    if raw.sliding_window_pattern is not None:
        return tuple(SLIDING if (layer + 1) % raw.sliding_window_pattern else FULL for layer in range(layers))
    return tuple(SLIDING if layer >= raw.max_window_layers else FULL for layer in range(layers))


def _read_ropes(model_type: str, raw: _Raw, kinds: Sequence[str]) -> tuple[Rope, ...]:
    """For each layer. Gemma-3 has an angle of its own for sliding layers, which no ``rope_scaling`` scales."""
    both = raw.rope_parameters or raw.rope_scaling or {}
    local = model_type == "gemma3_text"
    ropes = {}
    for kind in set(kinds):
        nested = both.get(kind)
        fields = nested if isinstance(nested, dict) else {} if local and kind == SLIDING else both
        if model_type == "phi3" and fields.get("rope_type", fields.get("type")) in ("su", "yarn"):
            fields = fields | {"rope_type": "longrope"}  # what Phi-3 called it at first
        if raw.original_max_position_embeddings is not None:
            fields = fields | {"original_max_position_embeddings": raw.original_max_position_embeddings}
        ropes[kind] = read_rope(
            fields,
            theta=raw.rope_local_base_freq if local and kind == SLIDING else raw.rope_theta,
            fraction=raw.partial_rotary_factor,
            context=raw.max_position_embeddings,
            head_dim=raw.head_size,
        )
    return tuple(ropes[kind] for kind in kinds)


def _read_experts(model_type: str, raw: _Raw) -> Experts:
    count, per_token = raw.num_local_experts or raw.num_experts, raw.num_experts_per_tok
    mixtral = model_type == "mixtral"
    inner = raw.intermediate_size if mixtral else raw.moe_intermediate_size
    if count is None or per_token is None or inner is None or per_token > count:
        raise LlmqError(f"config.json has {per_token} experts of {inner} for each token, of {count} in all", MEND)
    dense = set(raw.mlp_only_layers or ()) & set(range(raw.num_hidden_layers))
    if not mixtral and (dense or raw.decoder_sparse_step > 1):
        raise LlmqError(
            "layers without experts between layers with them are not supported",
            "llmq runs models whose mlp_only_layers is empty and whose decoder_sparse_step is 1",
        )
    return Experts(count, per_token, inner, renormalized=mixtral or raw.norm_topk_prob)


def _read_eos(folder: Path, raw: _Raw) -> tuple[int, ...]:
    """Every id that ends a generation: generation_config.json has the last word, config.json the first."""
    eos: Any = raw.eos_token_id
    generation = folder / "generation_config.json"
    if generation.exists():
        eos = read_json(generation).get("eos_token_id", eos)
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) for token in ids):
        raise LlmqError(
            f"{generation}: eos_token_id must be a token id or a list of them",
            f"mend {generation.name}, or fetch it again",
        )
    return tuple(ids)
