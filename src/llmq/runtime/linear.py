"""Linear layers behind one call, ``layer(x) → y``: dense (``nn.Linear``), and weight-only integers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.runtime.kernels.wna16 import PackedWeight, pack_wna16, wna16_matmul


class WeightOnlyLinear(nn.Module):
    """Integer weights that stay packed in memory and are widened in the registers of the product."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias
        self.in_features, self.out_features = packed.in_features, packed.out_features

    def forward(self, x: Tensor) -> Tensor:
        return wna16_matmul(x, self.packed, self.bias)


def quantized_linear(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """A layer that multiplies by ``weight``. On a GPU it stays packed: fewer bytes to hold, and to read for each token.
    A CPU gains no speed from that, so there the codes are widened to ``dtype`` once."""
    if weight.codes.is_cuda:
        return WeightOnlyLinear(pack_wna16(weight, dtype), bias)
    out_features, in_features = weight.shape
    with torch.device("meta"):
        layer = nn.Linear(in_features, out_features, bias=bias is not None)
    layer.weight = nn.Parameter(weight.dequantize().to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def resident_bytes(model: nn.Module) -> int:
    """What the weights of ``model`` take where it runs; a weight that two layers share counts once."""
    packed = [layer.packed for layer in model.modules() if isinstance(layer, WeightOnlyLinear)]
    tensors = [*model.parameters(), *(tensor for weight in packed for tensor in (weight.words, weight.meta))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
