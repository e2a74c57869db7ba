"""From attention to attention in one kernel: which layers it takes, and that it computes what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, save_variant
from torch import Tensor

from llmq.quant.methods.rtn import quantize_weight
from llmq.runtime import decoder
from llmq.runtime.decoder import CausalAttention, Decoder, DecoderLayer
from llmq.runtime.kernels import megakernel
from llmq.runtime.kernels.megakernel import Between
from llmq.runtime.kernels.quantize_rows import quantize_rows
from llmq.runtime.kernels.w8a8 import Weight8
from llmq.runtime.kernels.wna16 import PackedWeight, pack_wna16
from llmq.runtime.linear import W8A8Linear, WeightOnlyLinear, make_batch_invariant
from llmq.runtime.loader import load_decoder, open_source
from llmq.scheme import E4M3, INT, NF4, Scheme

OTHERS = {"llama-biases", "qwen2", "gemma2", "gemma3", "mixtral", "qwen3-moe"}
"""Architectures with more between two attentions than the kernel has: biases, norms behind, gelu, experts."""


def load(folder: Path, name: str) -> Decoder:
    return load_decoder(open_source(save_variant(folder / name, name), "cpu", torch.bfloat16, 32))


@torch.inference_mode()
def logits(model: Decoder, tokens: int) -> Tensor:
    return model.logits(model(torch.arange(tokens), torch.arange(tokens), CausalAttention(tokens)))


def in_8_bits(model: Decoder, number: str) -> Decoder:
    for name, layer in list(model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            rows = quantize_rows(layer.weight, number)
            model.layers.set_submodule(name, W8A8Linear(Weight8(rows.codes, rows.scales[:, 0]), None, torch.bfloat16))
    return model


def in_4_bits(model: Decoder) -> Decoder:
    for name, layer in list(model.layers.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            packed = pack_wna16(quantize_weight(layer.weight.float(), Scheme(4, 32, False)), torch.bfloat16)
            model.layers.set_submodule(name, WeightOnlyLinear(packed, None))
    return model


def packed(out_features: int, in_features: int, **changes: Any) -> PackedWeight:
    """A weight of 4 bits of which only the shape is there."""
    groups = in_features // 128
    words = torch.empty(groups, out_features, 32, dtype=torch.int16, device="meta")
    meta = torch.empty(groups, out_features, dtype=torch.int32, device="meta")
    return replace(PackedWeight(words, meta, None, INT, 4, torch.float16, 128, in_features), **changes)


def of_8b(**changes: Any) -> Between:
    """A layer of Llama 3 8B in 4 bits, but for ``changes`` of its gate and up."""
    norm = torch.empty(4096, dtype=torch.bfloat16, device="meta")
    return Between(
        packed(4096, 4096), norm, packed(28672, 4096, **changes), packed(4096, 14336), (norm, packed(6144, 4096)), 1e-5
    )


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


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("change", [lambda m: m, lambda m: in_8_bits(m, INT), lambda m: in_8_bits(m, E4M3), in_4_bits])
def test_from_attention_to_attention_logits_are_those_of_the_layers(
    change: Callable[[Decoder], Decoder], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = change(load(tmp_path, "qwen3"))
    assert all(spans(model))
    by_layer = logits(model, tokens)
    monkeypatch.setattr(decoder, "has_room", lambda device: True)
    monkeypatch.setattr(decoder, "takes", lambda rows, dtype, between: True)
    assert torch.equal(logits(model, tokens), by_layer)


def test_of_weights_in_4_bits_it_takes_integers_in_order_by_groups_of_128(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megakernel, "has_room", lambda device: True)

    def taken(**changes: Any) -> bool:
        return megakernel.takes(1, torch.bfloat16, of_8b(**changes))

    assert taken()
    assert megakernel.takes(8, torch.bfloat16, of_8b())
    assert not megakernel.takes(9, torch.bfloat16, of_8b())
    assert not taken(order=torch.arange(4096))
    assert not taken(group_length=64)
    assert not taken(number=NF4)
    assert not taken(bits=8)
    assert not taken(scale_dtype=torch.bfloat16)  # of one type in a layer
    assert not megakernel.takes(1, torch.float16, of_8b())  # whose lowest bits are no such numbers
