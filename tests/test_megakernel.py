"""From attention to attention in one kernel: which layers it takes, and that it computes what they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import VARIANTS, save_variant
from torch import Tensor

from llmq.runtime import decoder
from llmq.runtime.decoder import CausalAttention, Decoder, DecoderLayer
from llmq.runtime.kernels.quantize_rows import quantize_rows
from llmq.runtime.kernels.w8a8 import Weight8
from llmq.runtime.linear import W8A8Linear, make_batch_invariant
from llmq.runtime.loader import load_decoder, open_source
from llmq.scheme import E4M3, INT

TOKENS = torch.arange(8)
OTHERS = {"llama-biases", "qwen2", "gemma2", "gemma3", "mixtral", "qwen3-moe"}
"""Architectures with more between two attentions than the kernel has: biases, norms behind, gelu, experts."""


def load(folder: Path, name: str) -> Decoder:
    return load_decoder(open_source(save_variant(folder / name, name), "cpu", torch.bfloat16, 32))


@torch.inference_mode()
def logits(model: Decoder) -> Tensor:
    return model.logits(model(TOKENS, torch.arange(len(TOKENS)), CausalAttention(len(TOKENS))))


def in_8_bits(model: Decoder, number: str) -> Decoder:
    for name, layer in list(model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            rows = quantize_rows(layer.weight, number)
            model.layers.set_submodule(name, W8A8Linear(Weight8(rows.codes, rows.scales[:, 0]), None, torch.bfloat16))
    return model


def spans(model: Decoder) -> list[bool]:
    """Of each layer, whether there is a kernel from its attention on."""
    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    return [layer.until(after) is not None for layer, after in zip(layers, [*layers[1:], None], strict=True)]


@pytest.mark.parametrize("name", VARIANTS)
def test_architectures_with_more_between_two_attentions_go_kernel_by_kernel(name: str, tmp_path: Path) -> None:
    assert all(spans(load(tmp_path, name))) == (not any(name.startswith(other) for other in OTHERS))


def test_a_batch_invariant_model_goes_kernel_by_kernel(tmp_path: Path) -> None:
    model = load(tmp_path, "llama")
    make_batch_invariant(model)
    assert not any(spans(model))


@pytest.mark.parametrize("change", [lambda m: m, lambda m: in_8_bits(m, INT), lambda m: in_8_bits(m, E4M3)])
def test_from_attention_to_attention_logits_are_those_of_the_layers(
    change: Callable[[Decoder], Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = change(load(tmp_path, "qwen3"))
    assert all(spans(model))
    by_layer = logits(model)
    monkeypatch.setattr(decoder, "has_room", lambda device: True)
    monkeypatch.setattr(decoder, "takes", lambda rows, dtype, between: True)
    assert torch.equal(logits(model), by_layer)
