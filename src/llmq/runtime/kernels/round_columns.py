"""GPTQ's inner loop: round some columns of a weight one after another, each error made good by those that follow.

    column i  ← column i − Σ over k < i of factor[k, i] · error k
    code i    = clamp(round(column i / scale) + zero, 0, max_code)
    error i   = (column i − scale · (code i − zero)) / factor[i, i]

Rows of the weight do not know of each other. A program has 32 of them, one for each of its threads, which keeps the
errors of all columns of its row in registers, so that nothing has to wait for anything:

    columns [columns, out]      out →  | 32 rows | 32 rows | …
                            columns ↓  | one thread a row, downwards
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.runtime.kernels import runs_triton

MAX_COLUMNS = 128
"""Whose errors fit a thread's registers."""


def round_columns(
    columns: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Codes uint8 and errors fp32, both [columns, out].

    columns        fp32 [columns, out], at most MAX_COLUMNS
    factor         fp32 [columns, columns], upper triangular
    scales, zeros  fp32 [groups, out], and the group of each column, int64 [columns]

    Source: Frantar et al., "GPTQ", ICLR 2023, algorithm 1.
    """
    if not runs_triton(columns):
        return round_columns_reference(columns, factor, scales, zeros, groups, max_code)
    from llmq.runtime.kernels.round_columns_triton import round_columns_triton

    return round_columns_triton(columns, factor, scales, zeros, groups, max_code)


def round_columns_reference(
    columns: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """``round_columns`` in plain PyTorch."""
    left, errors = columns.clone(), torch.empty_like(columns)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    for i, group in enumerate(groups.tolist()):
        scale, zero = scales[group], zeros[group]
        code = (left[i] / scale).round_().add_(zero).clamp_(0, max_code)
        errors[i] = (left[i] - scale * (code - zero)) / factor[i, i]
        left[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        codes[i] = code
    return codes, errors
