"""Round to nearest: each weight to the closest point of its group's grid. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.quant.affine import encode, fit_grid, per_channel
from llmq.scheme import Scheme


def quantize_weight(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None) -> QuantizedWeight:
    """Quantize ``weight`` fp32 [out, in]. ``hessian`` is not looked at."""
    scales, zeros = fit_grid(weight, scheme)
    in_features = weight.shape[1]
    codes = encode(weight, per_channel(scales, in_features), per_channel(zeros, in_features), scheme.max_code)
    return QuantizedWeight(scheme, codes.to(torch.uint8), scales, zeros)
