"""Device code of ``dense``.

The product is taken as weight · xᵀ, so that a batch of 8 fills the matrix unit as well as one of 64:

    program (tile of N, split of K)      acc [BLOCK_N, BLOCK_M], fp32

        for each step of BLOCK_K channels:   acc += w [BLOCK_N, BLOCK_K] · x [BLOCK_M, BLOCK_K]ᵀ
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.prefetch_triton import prefetch
from llmq.runtime.kernels.split_k_triton import counters, is_last, sum_splits

PREFETCHED = 32768  # bytes of the weight that a program asks for before its activations are there
PROGRAMS = 132  # one on each of an H200's multiprocessors
SHORTEST_SPLIT = 512  # channels
WHOLE = 1024  # channels that up to WHOLE_ROWS rows are not worth a sum of splits
WHOLE_ROWS = 16


class Launch(NamedTuple):
    """What a program takes; found by measuring on an H200."""

    block_n: int
    block_k: int
    warps: int
    stages: int

    def splits(self, rows: int, out_features: int, in_features: int) -> int:
        """Parts of K that keep PROGRAMS programs busy, or as many as are worth it."""
        if rows <= WHOLE_ROWS and in_features <= WHOLE:
            return 1
        tiles = triton.cdiv(out_features, self.block_n)
        return max(1, min(PROGRAMS // int(tiles), in_features // max(self.block_k, SHORTEST_SPLIT)))


NARROW = Launch(32, 512, 4, 3)
MIDDLE = Launch(64, 256, 4, 4)
WIDE = Launch(64, 128, 4, 4)  # two programs on a multiprocessor


def launch_for(rows: int, out_features: int, in_features: int) -> Launch:
    """Launch parameters for ``rows`` rows and a weight of this shape."""
    tiles = triton.cdiv(out_features, MIDDLE.block_n)
    if tiles > PROGRAMS:
        return WIDE
    few = tiles * MIDDLE.splits(rows, out_features, in_features) <= PROGRAMS // 2
    return NARROW if few and rows > WHOLE_ROWS and in_features % NARROW.block_k == 0 else MIDDLE


def dense_matmul_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``dense_matmul`` through Triton."""
    (rows, in_features), out_features = x.shape, weight.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    launch = launch_for(rows, out_features, in_features)
    tiles, steps = triton.cdiv(out_features, launch.block_n), in_features // launch.block_k
    per_split = triton.cdiv(steps, launch.splits(rows, out_features, in_features))
    splits = triton.cdiv(steps, per_split)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    sums = torch.empty(splits if splits > 1 else 0, rows, out_features, dtype=torch.float32, device=x.device)
    dense_kernel[tiles, splits](
        x, weight, bias, out, sums, counters(x.device), rows, out_features, in_features, x.stride(0), per_split,
        SPLIT=splits > 1, BLOCK_M=16 if rows <= 16 else 32, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k,
        STAGES=launch.stages, PREFETCHED=PREFETCHED, PIECES=launch.warps * 32 // launch.block_n,
        num_warps=launch.warps, **pdl(x.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "per_split"])
def dense_kernel(
    x, weight, bias, out, sums, counters, rows, out_features, in_features, x_stride, per_split,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PREFETCHED: tl.constexpr, PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs, summed over one split of K."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    is_n, is_m = n < out_features, m < rows
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, in_features // BLOCK_K)
    at_weight = weight + n.to(tl.int64) * in_features
    if PDL:
        # A row of the tile in PIECES, one for each thread: what threads have in common they would all ask for.
        size = tl.minimum((last - first) * BLOCK_K * 2, PREFETCHED // BLOCK_N) // PIECES
        piece = tl.arange(0, BLOCK_N * PIECES)
        row = tl.program_id(0) * BLOCK_N + piece // PIECES
        at_piece = weight + row.to(tl.int64) * in_features + first * BLOCK_K + piece % PIECES * (size // 2)
        prefetch(at_piece, tl.where(row < out_features, size, 0))
    wait(PDL)
    at_x = x + m * x_stride
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        channel = step * BLOCK_K + k
        w_tile = tl.load(at_weight[:, None] + channel[None, :], mask=is_n[:, None], other=0.0)
        x_tile = tl.load(at_x[None, :] + channel[:, None], mask=is_m[None, :], other=0.0)
        acc = tl.dot(w_tile, x_tile, acc)
    inside = is_n[:, None] & is_m[None, :]
    at_out = m[None, :] * out_features + n[:, None]
    if SPLIT:
        size = rows * out_features
        tl.store(sums + tl.program_id(1).to(tl.int64) * size + at_out, acc, mask=inside)
        if not is_last(counters + tl.program_id(0)):
            return
        acc = sum_splits(sums, at_out, inside, size, tl.num_programs(1))
    if bias is not None:
        acc += tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=inside)
