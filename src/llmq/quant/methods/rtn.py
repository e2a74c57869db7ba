"""Round to nearest: each weight to the closest point of its group's grid. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.quant.affine import encode, fit_grid, per_channel
from llmq.scheme import E4M3, Scheme


def quantize_weight(weight: Tensor, scheme: Scheme, curvature: Tensor | None = None) -> QuantizedWeight:
    """Quantize ``weight`` fp32 [out, in] to integers or e4m3. Grids are clipped where ``fit_grid`` finds that
    ``curvature`` is better served so, and span all weights without it."""
    scales, zeros = fit_grid(weight, scheme, curvature)
    wide = per_channel(scales, weight.shape[1])
    if scheme.number == E4M3:
        codes = (weight / wide).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = encode(weight, wide, per_channel(zeros, weight.shape[1]), scheme.max_code).to(torch.uint8)
    return QuantizedWeight(scheme, codes, scales, zeros)
