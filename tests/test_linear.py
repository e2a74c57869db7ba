"""Quantized layers: what each scheme multiplies by, and layers merged into one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from test_kernels_reference import draw_weight
from torch import Tensor, nn
from torch.nn import functional as F

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.runtime.kernels.quantize_rows import quantize_rows
from llmq.runtime.kernels.wna16 import pack_wna16
from llmq.runtime.linear import WeightOnlyLinear, input_number, merge, quantized_linear
from llmq.scheme import E4M3, INT, NF4, Scheme

W8A8, FP8 = Scheme(8, -1, activation_bits=8), Scheme(8, -1, number=E4M3, activation_bits=8)
Make = Callable[[int, bool], nn.Module]


def dense(out_features: int, bias: bool) -> nn.Module:
    return nn.Linear(256, out_features, bias=bias).requires_grad_(False)


def weight_only(scheme: Scheme) -> Make:
    """What a GPU has; a CPU has it dense."""
    return lambda out_features, bias: WeightOnlyLinear(
        pack_wna16(draw_weight((out_features, 256), scheme), torch.float32), drawn_bias(out_features, bias)
    )


def rounded(scheme: Scheme) -> Make:
    return lambda out_features, bias: quantized_linear(
        draw_weight((out_features, 256), scheme), drawn_bias(out_features, bias), torch.float32
    )


def drawn_bias(out_features: int, bias: bool) -> Tensor | None:
    return torch.randn(out_features) if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "make",
    [dense, weight_only(Scheme(4, 128)), weight_only(Scheme(8, -1, False)), weight_only(Scheme(4, 64, number=NF4)),
     rounded(W8A8), rounded(FP8)],
)  # fmt: skip
def test_a_merged_layer_gives_the_outputs_of_all_side_by_side(make: Make, bias: bool) -> None:
    torch.manual_seed(0)
    layers = [make(out_features, bias) for out_features in (64, 16, 16)]
    merged = merge(layers)
    assert merged is not None
    x = torch.randn(5, 256)
    torch.testing.assert_close(merged(x), torch.cat([layer(x) for layer in layers], dim=1))


def test_layers_of_two_kinds_are_not_merged() -> None:
    torch.manual_seed(0)
    four, eight, grouped = (weight_only(Scheme(bits, group)) for bits, group in ((4, 128), (8, 128), (4, 64)))
    for one, other in (
        (dense(8, True), dense(8, False)),
        (dense(8, False), four(8, False)),
        (dense(8, False), nn.Linear(128, 8, bias=False)),
        (dense(8, False), dense(8, False).half()),
        (four(8, False), eight(8, False)),
        (four(8, False), grouped(8, False)),
        (rounded(W8A8)(8, False), rounded(FP8)(8, False)),
    ):
        assert merge([one, other]) is None


def test_channels_in_the_same_order_are_merged_and_others_are_not() -> None:
    torch.manual_seed(0)
    first, second = (draw_weight((8, 256), Scheme(4, 64), act_order=True) for _ in range(2))
    alike = QuantizedWeight(first.scheme, second.codes, second.scales, second.zero_points, first.group_index)
    layers = [WeightOnlyLinear(pack_wna16(weight, torch.float32), None) for weight in (first, alike, second)]
    merged = merge(layers[:2])
    assert merged is not None
    x = torch.randn(3, 256)
    torch.testing.assert_close(merged(x), torch.cat([layer(x) for layer in layers[:2]], dim=1))
    assert merge([layers[0], layers[2]]) is None


@pytest.mark.parametrize("scheme", [W8A8, FP8], ids=str)
def test_eight_bit_activations_are_rounded_and_nothing_else(scheme: Scheme) -> None:
    torch.manual_seed(0)
    weight = draw_weight((40, 256), scheme)
    x, bias = torch.randn(7, 256), torch.randn(40)
    layer = quantized_linear(weight, bias, torch.float32)
    rows = quantize_rows(x, scheme.number)
    exact = F.linear(rows.codes.double() * rows.scales, weight.dequantize().double(), bias.double())
    assert (layer(x) - exact).norm() <= 1e-6 * exact.norm()
    assert layer(x).equal(layer(rows))
    assert input_number(layer) == scheme.number
    assert input_number(dense(8, False)) is None


def test_a_product_of_integers_is_exact_before_scaling() -> None:
    """Sums beyond 2^24, which fp32 would round."""
    weight = draw_weight((8, 4096), W8A8)
    ones = QuantizedWeight(W8A8, torch.full_like(weight.codes, 255), torch.ones(8, 1), weight.zero_points)
    layer = quantized_linear(ones, None, torch.float64)
    x = torch.full((1, 4096), 127.0, dtype=torch.float64)
    x[0, 0] = 126.0
    assert layer(x).eq(127 * (127 * 4096 - 1)).all()


def test_it_is_exact_on_a_cpu_that_clips_the_sum_of_two_products() -> None:
    """As those without VNNI do in 8 bits; oneDNN takes any for one that is told so before it starts."""
    test = f"{__file__}::{test_a_product_of_integers_is_exact_before_scaling.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    subprocess.run(command, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, check=True)


@pytest.mark.parametrize(
    "scheme",
    [Scheme(2, 32), Scheme(3, 64, False), Scheme(5, 128), Scheme(6, -1, False), Scheme(8, 128, number=E4M3),
     Scheme(8, 0), Scheme(4, 64, number=NF4), Scheme(4, 64, number="fp4")],
    ids=str,
)  # fmt: skip
def test_weight_only_layers_multiply_by_the_dequantized_weight(scheme: Scheme) -> None:
    torch.manual_seed(0)
    weight = draw_weight((24, 256), scheme)
    x = torch.randn(3, 256, dtype=torch.float64)
    exact = x @ weight.dequantize().double().t()
    packed = WeightOnlyLinear(pack_wna16(weight, torch.float64), None)
    for layer in (packed, quantized_linear(weight, None, torch.float64)):
        assert (layer(x) - exact).norm() <= 1e-6 * exact.norm()
    assert scheme.number != INT or packed.packed.unpack()[0].equal(weight.codes)
