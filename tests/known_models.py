"""The config.json of models whose sizes are known, and random ones of the same family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from llmq.checkpoint.config import ModelConfig, read_config
from llmq.checkpoint.rope import Rope

LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LLAMA_31_8B = LLAMA_2_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
MISTRAL_7B = LLAMA_2_7B | {
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
QWEN_25_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "torch_dtype": "bfloat16",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 32768,
}


def write_config(folder: Path, fields: dict[str, Any]) -> Path:
    """A model folder that has nothing but its config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def config_of(folder: Path, fields: dict[str, Any]) -> ModelConfig:
    return read_config(write_config(folder, fields))


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    """Random decoders with ``num_heads · head_dim = hidden_size``."""
    kv_heads, head_dim = draw(st.integers(1, 8)), draw(st.sampled_from([32, 64, 128]))
    heads = kv_heads * draw(st.integers(1, 8))
    layers = draw(st.integers(1, 8))
    return ModelConfig(
        model_type="llama",
        hidden_size=heads * head_dim,
        intermediate_size=32 * draw(st.integers(1, 64)),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=draw(st.integers(1, 100_000)),
        context_length=draw(st.integers(1, 100_000)),
        rms_norm_eps=1e-5,
        ropes=(Rope(),) * layers,
        windows=(None,) * layers,
        tied_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        bos_token_id=None,
        eos_token_ids=(),
        quantization=None,
    )
