"""Rounding of each token's activations to 8 bits, by a scale found as it runs ("dynamic, per token").

codes  [tokens, width]   = round(x · largest / max|x|)     of each row; int8, to even, or e4m3
scales [tokens, 1]       = max|x| / largest                largest: 127 of int8, 448 of e4m3

x ≈ scales · codes. The range is symmetric, so that a product of codes needs no correction for a zero point.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmq.runtime.kernels import runs_triton
from llmq.scheme import E4M3, INT

CODES = {INT: torch.int8, E4M3: torch.float8_e4m3fn}
LARGEST = {INT: 127.0, E4M3: 448.0}
SMALLEST_MAX = 1e-20  # what max|x| is taken for in a row of zeros


class QuantizedRows(NamedTuple):
    """codes   int8 or float8_e4m3fn [tokens, width]
    scales  fp32 [tokens, 1]
    """

    codes: Tensor
    scales: Tensor


def quantize_rows(x: Tensor, number: str) -> QuantizedRows:
    """``x`` [tokens, width], contiguous in width, in 8 bits of ``number``: ``int`` or ``e4m3``.

    Computed in fp32, with divisions that are rounded correctly: a CPU and a GPU give the same codes.
    """
    if not runs_triton(x):
        return quantize_rows_reference(x, number)
    from llmq.runtime.kernels.quantize_rows_triton import quantize_rows_triton

    return quantize_rows_triton(x, number)


def quantize_rows_reference(x: Tensor, number: str) -> QuantizedRows:
    """``quantize_rows`` in plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    most = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_MAX)
    largest = torch.full_like(most, LARGEST[number])  # a number divided by a tensor is rounded twice
    codes = wide * (largest / most)
    if number == INT:
        codes = codes.round()
    return QuantizedRows(codes.to(CODES[number]), (most / largest).float())
