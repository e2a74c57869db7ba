"""The angles of all RoPE scalings are those of transformers, within the trained context and beyond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmq.checkpoint.config import read_config
from llmq.runtime.rotary import rotary_angles

ORIGINAL = 64
FACTORS = {"short_factor": [1.0 + n / 16 for n in range(8)], "long_factor": [1.0 + n for n in range(8)]}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn, all fields": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "attention_factor": 1.5,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, "factor": 4.0, **FACTORS},
    "longrope, no factor": {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, **FACTORS},
    "half of the channels": {"rope_type": "default", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("length", [ORIGINAL, 3 * ORIGINAL], ids=["within", "beyond"])
@pytest.mark.parametrize("kind", KINDS)
def test_angles_are_those_of_transformers(kind: str, length: int, tmp_path: Path) -> None:
    fields = {"rope_theta": 10_000.0} | KINDS[kind]
    # Dynamic scaling takes max_position_embeddings for the original context; Phi-3 alone rotates a part.
    positions = ORIGINAL if kind == "dynamic" else 4 * ORIGINAL
    name = "Phi3" if kind == "half of the channels" else "Llama"
    config = getattr(transformers, f"{name}Config")(
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=32,
        vocab_size=8,
        max_position_embeddings=positions,
        rope_parameters=fields,
        architectures=[f"{name}ForCausalLM"],
        pad_token_id=None,
    )
    config.save_pretrained(tmp_path)
    ours = read_config(tmp_path).for_context(length)
    model = transformers.AutoModel.from_config(config)
    cos, sin = model.rotary_emb(torch.zeros(1), torch.arange(length)[None])
    for angles, expected in zip(rotary_angles(ours, torch.arange(length))[ours.ropes[0]], (cos, sin), strict=True):
        torch.testing.assert_close(torch.cat((angles, angles), -1)[:, 0], expected[0], rtol=1e-5, atol=2e-5)
