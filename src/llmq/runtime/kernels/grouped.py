"""Products of a mixture of experts: each token's by the weights of its experts, all experts in one launch.

y[a, n] = Σ_k x[row of a, k] · weight[expert of a · N + n, k]  +  bias[expert of a · N + n]
                                                                         a: an assignment of a token to an expert

weight       | expert 0: N rows | expert 1: N rows | …       one weight for all, dense, of 8 bits, or packed
gated        | gate: N / 2 | up: N / 2 |      an expert's rows, and y is silu(gate) · up, [assignments, N / 2]

The row of an assignment is its token's, or its own where x has one for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from llmq.runtime.kernels import runs_triton
from llmq.runtime.kernels.quantize_rows import QuantizedRows
from llmq.runtime.kernels.routing import Routing
from llmq.runtime.kernels.silu import silu_mul_reference
from llmq.runtime.kernels.w8a8 import Weight8, w8a8_matmul_reference
from llmq.runtime.kernels.wna16 import PackedWeight, wna16_matmul_reference

GroupedWeight = Tensor | Weight8 | PackedWeight
BLOCKS_M = (16, 32, 64, 128)
"""Assignments in a tile, for all of which an expert's rows are read once."""
LARGEST_PACKED = 64
"""Of packed weights, whose unpacked planes and sums share the registers."""


def block_m_for(assignments: int, weights: Sequence[GroupedWeight], experts: int) -> int:
    """The tile that an expert's assignments about fill, if all have equally many, for products by ``weights``."""
    largest = LARGEST_PACKED if any(isinstance(weight, PackedWeight) for weight in weights) else BLOCKS_M[-1]
    return next(block for block in BLOCKS_M if block == largest or assignments <= block * experts)


def out_features(weight: GroupedWeight) -> int:
    """Of all experts together."""
    if isinstance(weight, PackedWeight):
        return weight.out_features
    return len(weight.codes if isinstance(weight, Weight8) else weight)


def grouped_matmul(
    x: Tensor | QuantizedRows,
    weight: GroupedWeight,
    routing: Routing,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """The products as drawn above → ``dtype`` [assignments, N or N / 2].

    x     [tokens or assignments, K], in 8 bits where the weight is a ``Weight8``
    bias  [experts · N]
    Sums are fp32, or int32 of integers; gate and up are rounded to ``dtype`` before silu, as ``silu_mul`` has them.
    A tile of any size adds the same channels in the same order by the same instruction: an assignment's result does
    not depend on the others.
    """
    rows = x.codes if isinstance(x, QuantizedRows) else x
    if not runs_triton(rows):
        return grouped_matmul_reference(x, weight, routing, dtype, bias=bias, gated=gated)
    if isinstance(weight, PackedWeight):
        from llmq.runtime.kernels.grouped_wna16_triton import grouped_wna16_triton

        return grouped_wna16_triton(rows, weight, routing, bias, gated=gated)
    from llmq.runtime.kernels.grouped_triton import grouped_matmul_triton

    return grouped_matmul_triton(x, weight, routing, dtype, bias, gated=gated)


def grouped_matmul_reference(
    x: Tensor | QuantizedRows,
    weight: GroupedWeight,
    routing: Routing,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """``grouped_matmul`` in plain PyTorch: a product for each expert that has any tokens."""
    rows = x.codes if isinstance(x, QuantizedRows) else x
    repeats, size = len(routing.order) // len(rows), out_features(weight) // routing.experts
    out = torch.empty(len(routing.order), size // 2 if gated else size, dtype=dtype, device=rows.device)
    of_each = torch.split(routing.order.long(), routing.starts.diff().tolist())
    for expert, assignments in enumerate(of_each):
        if len(assignments):
            at, own = assignments // repeats, slice(expert * size, (expert + 1) * size)
            y = _product(x, at, weight, own, None if bias is None else bias[own], dtype)
            out[assignments] = silu_mul_reference(*y.chunk(2, dim=1)) if gated else y
    return out


def _product(
    x: Tensor | QuantizedRows, at: Tensor, weight: GroupedWeight, own: slice, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The rows ``at`` of ``x`` times the rows ``own`` of ``weight``, transposed, plus ``bias``."""
    if isinstance(weight, Weight8):
        assert isinstance(x, QuantizedRows)
        rows, part = QuantizedRows(x.codes[at], x.scales[at]), Weight8(weight.codes[own], weight.scales[own])
        return w8a8_matmul_reference(rows, part, bias, dtype)
    assert isinstance(x, Tensor)
    if isinstance(weight, PackedWeight):
        packed = replace(weight, words=weight.words[:, own], meta=weight.meta[:, own])
        return wna16_matmul_reference(x[at], packed, bias)
    return F.linear(x[at], weight[own], bias)
