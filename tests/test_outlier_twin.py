"""The outlier twin computes what its original computes, from activations of another kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from outlier_twin import CHANNELS, FACTOR, save_twin
from tiny_models import save_tiny
from torch import Tensor

from llmq.runtime.decoder import CausalAttention
from llmq.runtime.loader import load_decoder, open_source

IDS = torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(0))


def logits_and_normed(folder: Path) -> tuple[Tensor, list[Tensor]]:
    """The logits of a text, and what the norms before linears write on the way."""
    model = load_decoder(open_source(folder, "cpu", torch.float32))
    normed: list[Tensor] = []
    for layer in model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda _module, _inputs, output: normed.append(output))
    return model.logits(model(IDS, torch.arange(len(IDS)), CausalAttention(len(IDS)))), normed


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_its_logits_are_the_original_s(tmp_path: Path, architecture: str) -> None:
    source = save_tiny(tmp_path / "model", architecture)
    before, _ = logits_and_normed(source)
    after, _ = logits_and_normed(save_twin(source, tmp_path / "twin"))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_a_few_channels_of_its_linears_inputs_tower_over_the_rest(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    _, before = logits_and_normed(source)
    _, after = logits_and_normed(save_twin(source, tmp_path / "twin"))
    assert len(after) == len(before) == 2 * 2
    for plain, outlying in zip(before, after, strict=True):
        ratio = outlying.norm(dim=0) / plain.norm(dim=0)
        raised = ratio > FACTOR / 2
        assert raised.sum() == CHANNELS
        torch.testing.assert_close(ratio, torch.where(raised, FACTOR, 1.0), rtol=1e-3, atol=0)
