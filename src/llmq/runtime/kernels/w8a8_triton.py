"""Device code of ``w8a8``.

In a small batch the product is taken as weights · xᵀ, so that a batch of 8 fills the matrix unit as well as one of 64:

    program (tile of N and M, split of K)      acc [BLOCK_N, BLOCK_M], int32 or fp32

        for each step of BLOCK_K channels:   acc += w [BLOCK_N, BLOCK_K] · x [BLOCK_M, BLOCK_K]ᵀ

Hopper's matrix unit adds products of FP8 with fewer bits than fp32 has: every PROMOTE channels the sum is taken out of
it and added to one in fp32.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.pdl_triton import pdl, prefetch, wait
from llmq.runtime.kernels.quantize_rows import QuantizedRows
from llmq.runtime.kernels.split_k_triton import (
    REDUCE_ROWS,
    counters,
    is_last,
    reduce_splits,
    steps_per_split,
    sum_splits,
)
from llmq.runtime.kernels.w8a8 import Weight8

STEP = 256  # channels that K is split by
PROMOTE = tl.constexpr(128)
PREFETCHED = 32768  # bytes of the weight that a program asks for before its activations are there


class Launch(NamedTuple):
    """What a program takes."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# rows up to → launch parameters, measured on an H200.
LAUNCHES = {
    16: Launch(16, 64, 256, 4, 4),
    32: Launch(32, 64, 256, 4, 4),
    64: Launch(64, 64, 256, 4, 3),
    128: Launch(128, 128, 128, 8, 4),
}
LARGE = Launch(256, 128, 128, 8, 3)
SPLIT_ROWS = 64  # above, there are tiles enough without splitting K


def launch_for(rows: int) -> Launch:
    """Launch parameters for a batch of ``rows``."""
    return next((launch for most, launch in LAUNCHES.items() if rows <= most), LARGE)


def w8a8_matmul_triton(x: QuantizedRows, weight: Weight8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``w8a8_matmul`` through Triton."""
    (rows, in_features), out_features = x.codes.shape, len(weight.codes)
    device = x.codes.device
    out = torch.empty(rows, out_features, dtype=dtype, device=device)
    if rows == 0:
        return out
    launch = launch_for(rows)
    steps = triton.cdiv(in_features, STEP)
    per_split = steps_per_split(out_features, steps) if rows <= SPLIT_ROWS else steps
    splits = triton.cdiv(steps, per_split)
    reduced = splits > 1 and rows > REDUCE_ROWS
    total = torch.int32 if x.codes.dtype == torch.int8 else torch.float32
    sums = torch.empty(splits if splits > 1 else 0, rows, out_features, dtype=total, device=device)
    tiles_m = triton.cdiv(rows, launch.block_m)
    w8a8_kernel[triton.cdiv(out_features, launch.block_n) * tiles_m, splits](
        x.codes, x.scales, weight.codes, weight.scales, bias, out, sums, counters(device), rows, out_features,
        in_features, per_split * (STEP // launch.block_k), tiles_m, WHOLE_STEPS=in_features % STEP == 0,
        SPLIT=splits > 1, REDUCED=reduced, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k,
        STAGES=launch.stages, PREFETCHED=PREFETCHED, num_warps=launch.warps, **pdl(device),
    )  # fmt: skip
    if reduced:
        reduce_splits(sums, x.scales, weight.scales, bias, out)
    return out


@triton.jit(do_not_specialize=["rows", "steps_per_split", "tiles_m"])
def w8a8_kernel(
    x, x_scales, weight, weight_scales, bias, out, sums, counters, rows, out_features, in_features, steps_per_split,
    tiles_m,
    WHOLE_STEPS: tl.constexpr, SPLIT: tl.constexpr, REDUCED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PREFETCHED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs, summed over one split of K."""
    TOTAL: tl.constexpr = sums.dtype.element_ty
    # Programs that share a tile of the weight are neighbours, so that all but one find it in the cache.
    n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    is_n, is_m = n < out_features, m < rows
    first = tl.program_id(1) * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(in_features, BLOCK_K))
    at_weight = weight + n.to(tl.int64) * in_features
    if PDL and WHOLE_STEPS:
        size = tl.minimum((last - first) * BLOCK_K, PREFETCHED // BLOCK_N)
        prefetch(at_weight + first * BLOCK_K, tl.where(is_n, size, 0))
    wait(PDL)
    at_x = x + m.to(tl.int64) * in_features
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=TOTAL)
    for step in tl.range(first, last, num_stages=STAGES):
        channel = step * BLOCK_K + k
        is_k = channel < in_features
        is_w = is_n[:, None] if WHOLE_STEPS else is_n[:, None] & is_k[None, :]
        is_x = is_m[None, :] if WHOLE_STEPS else is_m[None, :] & is_k[:, None]
        w_tile = tl.load(at_weight[:, None] + channel[None, :], mask=is_w, other=0.0)
        x_tile = tl.load(at_x[None, :] + channel[:, None], mask=is_x, other=0.0)
        acc = tl.dot(w_tile, x_tile, acc, max_num_imprecise_acc=PROMOTE, out_dtype=TOTAL)
    inside = is_n[:, None] & is_m[None, :]
    at_out = m[None, :].to(tl.int64) * out_features + n[:, None]
    if SPLIT:
        size = tl.cast(rows, tl.int64) * out_features
        tl.store(sums + tl.program_id(1) * size + at_out, acc, mask=inside)
        if REDUCED:
            return
        if not is_last(counters + tl.program_id(0)):
            return
        acc = sum_splits(sums, at_out, inside, size, tl.num_programs(1))
    scale = (
        tl.load(weight_scales + n, mask=is_n, other=0.0)[:, None] * tl.load(x_scales + m, mask=is_m, other=0.0)[None, :]
    )
    result = acc.to(tl.float32) * scale
    if bias is not None:
        result += tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at_out, result.to(out.dtype.element_ty), mask=inside)
