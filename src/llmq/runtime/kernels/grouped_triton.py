"""Device code of ``grouped``, for dense weights and those of 8 bits.

    program (tile of assignments, tile of N)      acc [BLOCK_N, BLOCK_M], fp32 or int32

        for each step of BLOCK_K channels:   acc += w [BLOCK_N, BLOCK_K] · x [BLOCK_M, BLOCK_K]ᵀ

The rows of x are gathered as they are loaded. A gated program has two accumulators, one of gate and one of up.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.quantize_rows import QuantizedRows
from llmq.runtime.kernels.routing import Routing
from llmq.runtime.kernels.silu_triton import silu_product
from llmq.runtime.kernels.w8a8 import Weight8

PROMOTE = tl.constexpr(128)  # channels of FP8 whose sum the matrix unit keeps before it is added in fp32


class Launch(NamedTuple):
    """What a program takes; block_k in bytes of a row."""

    block_n: int
    block_k: int
    warps: int
    stages: int


# (gated, block_m) → launch parameters; a gated program takes block_n rows of gate, and of up. Tiles of 64 rows of the
# weight and more go through one kind of matrix instruction, so that sums have the same bits in a tile of any size.
LAUNCHES = {
    (True, 16): Launch(64, 256, 4, 3),
    (True, 32): Launch(64, 128, 4, 4),
    (True, 64): Launch(64, 128, 4, 4),
    (True, 128): Launch(64, 128, 8, 4),
    (False, 16): Launch(64, 256, 4, 4),
    (False, 32): Launch(64, 256, 4, 3),
    (False, 64): Launch(128, 128, 8, 4),
    (False, 128): Launch(128, 128, 8, 4),
}
WIDE = Launch(32, 128, 4, 2)  # of fp32, without a matrix unit


def launch_for(gated: bool, block_m: int, element_size: int) -> Launch:
    """Launch parameters for activations of so many bytes."""
    return LAUNCHES[gated, block_m] if element_size < 4 else WIDE


def grouped_matmul_triton(
    x: Tensor | QuantizedRows,
    weight: Tensor | Weight8,
    routing: Routing,
    dtype: torch.dtype,
    bias: Tensor | None,
    *,
    gated: bool,
) -> Tensor:
    """``grouped_matmul`` through Triton."""
    rows, x_scales = x if isinstance(x, QuantizedRows) else (x, None)
    matrix, weight_scales = (weight.codes, weight.scales) if isinstance(weight, Weight8) else (weight, None)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    assignments, in_features = len(routing.order), rows.shape[1]
    size = len(matrix) // routing.experts
    features = size // 2 if gated else size
    launch = launch_for(gated, routing.block_m, rows.element_size())
    block_k = launch.block_k // rows.element_size()
    out = torch.empty(assignments, features, dtype=dtype, device=rows.device)
    grouped_kernel[len(routing.tile_experts), triton.cdiv(features, launch.block_n)](
        rows, x_scales, matrix, weight_scales, bias, out, routing.order, routing.starts, routing.tile_experts,
        routing.tile_starts, size, features, in_features, rows.stride(0), assignments // max(len(rows), 1),
        GATED=gated, WHOLE_STEPS=in_features % block_k == 0, BLOCK_M=routing.block_m, BLOCK_N=launch.block_n,
        BLOCK_K=block_k, STAGES=launch.stages, num_warps=launch.warps, **pdl(out.device),
    )  # fmt: skip
    return out


@triton.jit
def tile_rows(order, starts, tile_experts, tile_starts, BLOCK_M: tl.constexpr):
    """The expert of this program's tile, −1 if there is none; its assignments [BLOCK_M]; which of them there are."""
    expert = tl.load(tile_experts + tl.program_id(0))
    place = tl.load(tile_starts + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    is_m = place < tl.load(starts + tl.maximum(expert, 0) + 1)
    return expert, tl.load(order + place, mask=is_m, other=0), is_m


@triton.jit(do_not_specialize=["repeats"])
def grouped_kernel(
    x, x_scales, weight, weight_scales, bias, out, order, starts, tile_experts, tile_starts, size, features,
    in_features, x_stride, repeats,
    GATED: tl.constexpr, WHOLE_STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs of one expert's assignments."""
    TOTAL: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_n = n < features
    wait(PDL)
    expert, assignment, is_m = tile_rows(order, starts, tile_experts, tile_starts, BLOCK_M)
    if expert < 0:
        return
    row = assignment // repeats
    at_weight = weight + (expert * size + n).to(tl.int64)[:, None] * in_features + k[None, :]
    at_up = at_weight + tl.cast(features, tl.int64) * in_features
    at_x = x + row.to(tl.int64)[None, :] * x_stride + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=TOTAL)
    up = tl.zeros([BLOCK_N, BLOCK_M], dtype=TOTAL)
    for start in tl.range(0, in_features, BLOCK_K, num_stages=STAGES):
        is_k = start + k < in_features
        is_w = is_n[:, None] if WHOLE_STEPS else is_n[:, None] & is_k[None, :]
        is_x = is_m[None, :] if WHOLE_STEPS else is_m[None, :] & is_k[:, None]
        x_tile = tl.load(at_x + start, mask=is_x, other=0.0)
        w_tile = tl.load(at_weight + start, mask=is_w, other=0.0)
        acc = tl.dot(w_tile, x_tile, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTE, out_dtype=TOTAL)
        if GATED:
            u_tile = tl.load(at_up + start, mask=is_w, other=0.0)
            up = tl.dot(u_tile, x_tile, up, input_precision="ieee", max_num_imprecise_acc=PROMOTE, out_dtype=TOTAL)
    result = acc.to(tl.float32)
    raised = up.to(tl.float32)
    if weight_scales is not None:
        m_scales = tl.load(x_scales + row, mask=is_m, other=0.0)[None, :]
        at_scales = weight_scales + expert * size + n
        result = result * tl.load(at_scales, mask=is_n, other=0.0)[:, None] * m_scales
        if GATED:
            raised = raised * tl.load(at_scales + features, mask=is_n, other=0.0)[:, None] * m_scales
    if bias is not None:
        at_bias = bias + expert * size + n
        result += tl.load(at_bias, mask=is_n, other=0.0).to(tl.float32)[:, None]
        if GATED:
            raised += tl.load(at_bias + features, mask=is_n, other=0.0).to(tl.float32)[:, None]
    y = result.to(out.dtype.element_ty)
    if GATED:
        y = silu_product(y, raised.to(out.dtype.element_ty))
    at_out = assignment.to(tl.int64)[None, :] * features + n[:, None]
    tl.store(out + at_out, y, mask=is_n[:, None] & is_m[None, :])
