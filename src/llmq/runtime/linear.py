"""Linear layers behind one call, ``layer(x) → y``: dense (``nn.Linear``), and weight-only integers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmq.checkpoint.quantized_weight import QuantizedWeight


def quantized_linear(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """A layer that multiplies by ``weight``. Its codes are widened once here: right everywhere, small nowhere."""
    out_features, in_features = weight.shape
    with torch.device("meta"):
        layer = nn.Linear(in_features, out_features, bias=bias is not None)
    layer.weight = nn.Parameter(weight.dequantize().to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
