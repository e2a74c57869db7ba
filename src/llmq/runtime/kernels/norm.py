"""Residual addition and root-mean-square normalization (Zhang & Sennrich, 2019) in one pass.

residual [tokens, hidden]   ← residual + x          in place, rounded to its type
result   [tokens, hidden]   = weight · residual / √(mean(residual²) + eps)     rounded to that type, or to 8 bits
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.runtime.kernels import runs_triton
from llmq.runtime.kernels.quantize_rows import QuantizedRows, quantize_rows_reference


def add_rms_norm(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add ``x`` to ``residual`` in place, and return the sum normalized.

    residual, x  [tokens, hidden], contiguous in hidden; x may be None: nothing is added
    weight       [hidden], of the type of ``residual`` or fp32
    The mean is fp32; the normalized value is rounded to the wider type of the two before the weight multiplies it.
    """
    if not runs_triton(residual if x is None else x):
        return add_rms_norm_reference(residual, x, weight, eps)
    from llmq.runtime.kernels.norm_triton import add_rms_norm_triton

    return add_rms_norm_triton(residual, x, weight, eps)


def add_rms_norm_reference(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """``add_rms_norm`` in plain PyTorch."""
    if x is not None:
        residual += x
    wide = residual.to(torch.promote_types(residual.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * normal.to(torch.promote_types(residual.dtype, weight.dtype))).to(residual.dtype)


def add_rms_norm_quantize(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float, number: str) -> QuantizedRows:
    """``add_rms_norm``, and ``quantize_rows`` of its result to ``number``, in one pass."""
    if not runs_triton(residual):
        return quantize_rows_reference(add_rms_norm_reference(residual, x, weight, eps), number)
    from llmq.runtime.kernels.norm_triton import add_rms_norm_quantize_triton

    return add_rms_norm_quantize_triton(residual, x, weight, eps, number)
