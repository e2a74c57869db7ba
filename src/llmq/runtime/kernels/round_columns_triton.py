"""Device code of ``round_columns``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from llmq.runtime.kernels.round_columns import MAX_COLUMNS

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
ROWS = 32


def round_columns_triton(
    columns: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """``round_columns`` through Triton."""
    count, out = columns.shape
    codes, errors = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    round_columns_kernel[triton.cdiv(out, ROWS),](
        columns.contiguous(),
        factor.t().contiguous(),
        scales,
        zeros,
        groups,
        codes,
        errors,
        count,
        out,
        MAX_CODE=max_code,
        COLUMNS=MAX_COLUMNS,
        ROWS=ROWS,
        num_warps=1,
    )
    return codes, errors


@triton.jit
def round_columns_kernel(
    columns,
    factor,
    scales,
    zeros,
    groups,
    codes,
    errors,
    count,
    out,
    MAX_CODE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of the weight. ``factor`` is transposed: what a column is compensated by lies together."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < out
    before = tl.arange(0, COLUMNS)
    made = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for i in range(count):
        weights = tl.load(factor + i * count + before, mask=before < i, other=0.0)
        column = tl.load(columns + i * out + row, mask=inside, other=0.0) - tl.sum(weights[:, None] * made, 0)
        group = tl.load(groups + i)
        scale = tl.load(scales + group * out + row, mask=inside, other=1.0)
        zero = tl.load(zeros + group * out + row, mask=inside, other=0.0)
        place = tl.div_rn(column, scale)
        # 1.5 · 2^23 is where a float's step is 1
        code = (place + 12582912.0) - 12582912.0 if INTERPRETED else libdevice.rint(place)
        code = tl.minimum(tl.maximum(code + zero, 0.0), MAX_CODE)
        error = tl.div_rn(column - scale * (code - zero), tl.load(factor + i * count + i))
        made = tl.where((before == i)[:, None], error[None, :], made)
        tl.store(codes + i * out + row, code.to(tl.uint8), mask=inside)
        tl.store(errors + i * out + row, error, mask=inside)
