"""A small model of every architecture that the planner knows: fields for its configuration class in transformers."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 256,
}
OLD_NAMES = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": 50}
SLIDING = {"sliding_window": 16}
EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2}
DELTA = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
FINE_EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 2}

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", BASE),
    "arcee": ("arcee", BASE | {"mlp_bias": True}),
    "bamba": ("bamba", BASE | MAMBA2 | {"attn_layer_indices": [1]}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 50}),
    "cohere": ("cohere", BASE | {"use_qk_norm": True}),
    "cohere2": ("cohere2", BASE | SLIDING),
    "deepseek-v2": ("deepseek_v2", BASE | MLA | FINE_EXPERTS | {"first_k_dense_replace": 1, "q_lora_rank": None}),
    "deepseek-v3": (
        "deepseek_v3",
        BASE | MLA | FINE_EXPERTS | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "attention_bias": True},
    ),
    "ernie": ("ernie4_5", BASE | {"use_bias": True}),
    "exaone4": ("exaone4", BASE | SLIDING),
    "falcon-7b": ("falcon", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}),
    "falcon-40b": (
        "falcon",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "vocab_size": 50,
            "bias": True,
        },
    ),
    "falcon-h1": ("falcon_h1", BASE | MAMBA2 | {"mamba_d_ssm": 128, "mamba_rms_norm": True}),
    "falcon-mamba": ("falcon_mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 8}),
    "gemma": ("gemma", BASE | {"head_dim": 32}),
    "gemma2": ("gemma2", BASE | SLIDING | {"head_dim": 32}),
    "gemma3": ("gemma3_text", BASE | SLIDING | {"head_dim": 32, "num_hidden_layers": 7}),
    "gemma3n": (
        "gemma3n_text",
        BASE
        | SLIDING
        | {
            "head_dim": 16,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": 50,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
        },
    ),
    "gemma4": (
        "gemma4_text",
        BASE
        | SLIDING
        | {
            "head_dim": 16,
            "global_head_dim": 32,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": 50,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "gemma4-moe": (
        "gemma4_text",
        BASE
        | SLIDING
        | {
            "head_dim": 16,
            "num_hidden_layers": 6,
            "global_head_dim": 32,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "glm": ("glm", BASE | {"head_dim": 16}),
    "glm4": ("glm4", BASE | {"head_dim": 16}),
    "glm4-moe": ("glm4_moe", BASE | FINE_EXPERTS | {"use_qk_norm": True, "head_dim": 16}),
    "gpt2": ("gpt2", OLD_NAMES),
    "gpt-bigcode": ("gpt_bigcode", OLD_NAMES),
    "gpt-neox": ("gpt_neox", {name: value for name, value in BASE.items() if name != "num_key_value_heads"}),
    "gpt-oss": ("gpt_oss", BASE | SLIDING | EXPERTS | {"head_dim": 32}),
    "gptj": ("gptj", OLD_NAMES | {"rotary_dim": 8}),
    "granite": ("granite", BASE | {"attention_bias": True}),
    "granite-moe": ("granitemoe", BASE | EXPERTS),
    "granite-moe-hybrid": (
        "granitemoehybrid",
        BASE
        | EXPERTS
        | MAMBA2
        | {"shared_intermediate_size": 40, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "granite-moe-shared": ("granitemoeshared", BASE | EXPERTS | {"shared_intermediate_size": 40}),
    "helium": ("helium", BASE | {"head_dim": 16}),
    "hunyuan": ("hunyuan_v1_dense", BASE | {"head_dim": 16}),
    "jamba": (
        "jamba",
        BASE
        | {"num_experts": 6, "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 8, "mamba_dt_rank": 5},
    ),
    "lfm2": ("lfm2", BASE | {"full_attn_idxs": [1, 3], "block_multiple_of": 16}),
    "llama": ("llama", BASE),
    "llama-biases": ("llama", BASE | {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama4": (
        "llama4_text",
        BASE
        | EXPERTS
        | {
            "head_dim": 16,
            "attention_chunk_size": 16,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 112,
            "num_experts_per_tok": 1,
        },
    ),
    "mamba": ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 50, "use_bias": True}),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "vocab_size": 50,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 2,
        },
    ),
    "minicpm3": ("minicpm3", BASE | MLA),
    "minimax-m2": ("minimax_m2", BASE | EXPERTS | {"head_dim": 32}),
    "ministral3": ("ministral3", BASE | {"head_dim": 32}),
    "mistral": ("mistral", BASE | SLIDING),
    "mixtral": ("mixtral", BASE | EXPERTS),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 50, "max_seq_len": 64}),
    "nemotron": ("nemotron", BASE),
    "olmo": ("olmo", BASE),
    "olmo2": ("olmo2", BASE),
    "olmo3": ("olmo3", BASE | SLIDING),
    "olmoe": ("olmoe", BASE | {"num_experts": 6, "num_experts_per_tok": 2}),
    "opt": (
        "opt",
        {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 50,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 48,
        },
    ),
    "phi": ("phi", BASE | {"qk_layernorm": True}),
    "phi3": ("phi3", BASE | SLIDING),
    "phimoe": ("phimoe", BASE | EXPERTS | {"lm_head_bias": True}),
    "qwen2": ("qwen2", BASE),
    "qwen2-window": ("qwen2", BASE | SLIDING | {"use_sliding_window": True, "max_window_layers": 3}),
    "qwen2-moe": (
        "qwen2_moe",
        BASE
        | {
            "num_experts": 6,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3": ("qwen3", BASE | {"head_dim": 32}),
    "qwen3-moe": ("qwen3_moe", BASE | {"num_experts": 12, "moe_intermediate_size": 24, "decoder_sparse_step": 2}),
    "qwen3-next": (
        "qwen3_next",
        BASE | DELTA | {"num_experts": 12, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "qwen3.5": ("qwen3_5_text", BASE | DELTA),
    "qwen3.5-moe": (
        "qwen3_5_moe_text",
        BASE | DELTA | {"num_experts": 12, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    ),
    "seed-oss": ("seed_oss", BASE | {"head_dim": 16}),
    "smollm3": ("smollm3", BASE | SLIDING | {"use_sliding_window": True}),
    "stablelm": ("stablelm", BASE | {"use_qkv_bias": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", BASE | SLIDING),
}
"""name → (model_type, fields)."""
