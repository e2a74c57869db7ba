"""Products whose rows do not depend on the batch: a row has the same bits alone, among thousands, and computed again.

(He, "Defeating Nondeterminism in LLM Inference", 2025.) They are the grouped products of a single expert: tiles of
several sizes, all of K in one program, the same channels in the same order. No library and no split of K that looks at
the number of rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmq.runtime.kernels.grouped import GroupedWeight, block_m_for, grouped_matmul
from llmq.runtime.kernels.quantize_rows import QuantizedRows
from llmq.runtime.kernels.routing import Routing, most_tiles
from llmq.runtime.kernels.w8a8 import Weight8, w8a8_matmul
from llmq.scheme import INT


def invariant_matmul(
    x: Tensor | QuantizedRows, weight: GroupedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x`` [M, K] times ``weight`` [N, K], transposed, plus ``bias`` [N] → ``dtype`` [M, N].

    ``x`` is in 8 bits where the weight is a ``Weight8``. Sums of integers are exact in any order.
    """
    if isinstance(weight, Weight8) and weight.number == INT:
        assert isinstance(x, QuantizedRows)
        return w8a8_matmul(x, weight, bias, dtype)
    rows = x.codes if isinstance(x, QuantizedRows) else x
    routing = _one_expert(len(rows), block_m_for(len(rows), [weight], 1), rows.device)
    return grouped_matmul(x, weight, routing, dtype, bias=bias)


def _one_expert(rows: int, block_m: int, device: torch.device) -> Routing:
    """All rows in order."""
    room = 1 << (rows - 1).bit_length()
    count, tiles = _counting(room, 1, device), most_tiles(rows, 1, block_m)
    ends = _ends(rows, device)
    zeros, starts = _counting(room, 0, device), _counting(room, block_m, device)
    return Routing(count[:rows], ends, zeros[:tiles], starts[:tiles], block_m)


@cache
def _counting(room: int, step: int, device: torch.device) -> Tensor:
    """0, step, 2 · step, …: kept, as a CUDA graph that reads it keeps only its address."""
    return torch.arange(room, dtype=torch.int32, device=device) * step


@cache
def _ends(rows: int, device: torch.device) -> Tensor:
    return torch.tensor([0, rows], dtype=torch.int32).to(device)
