"""Folding: scales that move between operations change nothing of what a block computes, and no weight that stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VARIANTS, save_variant

from llmq.quant.activations import HiddenStates
from llmq.quant.methods import awq, smoothquant
from llmq.runtime.decoder import CausalAttention, Decoder
from llmq.runtime.loader import Source, load_decoder, load_layer, open_source
from llmq.scheme import Scheme

W3, W8A8 = Scheme(3, 32), Scheme(8, -1, activation_bits=8)


def opened(folder: Path, variant: str) -> tuple[Source, Decoder, torch.Tensor]:
    """A tiny model, its layers one by one as they are on disk, and token ids [windows, tokens]."""
    source = open_source(save_variant(folder / "model", variant), "cpu", torch.float32, 32)
    model = load_decoder(source)
    for number in range(source.config.num_layers):
        model.layers[number] = load_layer(source, number)
    return source, model, torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))


def logits(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).repeat(len(ids))
    return model.logits(model(ids.flatten(), positions, CausalAttention(ids.shape[1])))


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_method_changes_what_the_float_model_computes(tmp_path: Path, variant: str, method: str) -> None:
    source, model, ids = opened(tmp_path, variant)
    config = source.config
    with torch.inference_mode():
        before, states = logits(model, ids), HiddenStates(source, ids)
        for block in model.layers:
            weights = {name: parameter.clone() for name, parameter in block.named_parameters()}
            if method == "awq":
                changed = awq.fold(block, config, states, dict.fromkeys(config.linears, W3))
            else:
                changed = smoothquant.fold(block, config, states, dict.fromkeys(config.linears, W8A8), 0.8)
            moved = {name for name, value in block.named_parameters() if not torch.equal(value, weights[name])}
            assert moved
            assert {name for name in moved if name.removesuffix(".weight") not in config.linears} == set(changed)
            states.mix(block)
            states.finish(block)
        after = logits(model, ids)
    assert (after - before).abs().max() < 1e-3 * before.abs().max()
