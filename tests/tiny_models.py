"""Tiny, randomly initialised model folders, written by transformers, each with a tokenizer that works.

Two layers of hidden size 128 in fp32. Biases and norms are random too: at their usual 0 and 1, mistakes with them
would not show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONFIG_CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "phi3": "Phi3Config",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "mixtral": "MixtralConfig",
    "qwen3-moe": "Qwen3MoeConfig",
}
BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
GEMMA: dict[str, Any] = {"head_dim": 64, "query_pre_attn_scalar": 48, "sliding_window": 16}
BYTES, BOS, EOS = 256, "<s>", "</s>"
VOCAB_SIZE = BYTES + 2
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 64}),
    "llama-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "qwen3-yarn": (
        "qwen3",
        {
            "head_dim": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "phi3": ("phi3", {"pad_token_id": 0, "sliding_window": 16}),
    "phi3-partial": (
        "phi3",
        {
            "pad_token_id": 0,
            "original_max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.75,
                "factor": 4.0,
                "short_factor": [1.0 + number / 16 for number in range(12)],
                "long_factor": [1.0 + number for number in range(12)],
            },
        },
    ),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}),
    "gemma3": ("gemma3", GEMMA | {"tie_word_embeddings": True, "layer_types": ["sliding_attention", "full_attention"]}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3-moe": (
        "qwen3-moe",
        {
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
}
"""What the supported architectures differ in: name → arguments of ``save_tiny``."""


def save_tiny(
    folder: Path, architecture: str = "llama", *, seed: int = 0, dtype: str = "float32", **fields: Any
) -> Path:
    """Write a tiny model of ``architecture``, one of ``CONFIG_CLASSES``, to ``folder``; ``fields`` go into its config.
    Returns ``folder``."""
    import torch
    import transformers

    tokenizer = byte_tokenizer()
    config = getattr(transformers, CONFIG_CLASSES[architecture])(
        **BASE
        | {"vocab_size": VOCAB_SIZE, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        | {"dtype": dtype}
        | fields
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centred = name.endswith("bias") or architecture.startswith("gemma")  # Gemma's norms add 1 to theirs
                torch.nn.init.normal_(parameter, mean=0.0 if centred else 1.0, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_variant(folder: Path, variant: str) -> Path:
    """One of ``VARIANTS``."""
    architecture, fields = VARIANTS[variant]
    return save_tiny(folder, architecture, **fields)


def byte_tokenizer() -> Any:
    """A token for each byte, ``<s>`` before every text, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab | {BOS: BYTES, EOS: BYTES + 1}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BYTES)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
