"""Device code of ``w8a8``: a kernel for each size of batch, which are short of different things.

    up to 8     of bytes in flight: few outputs, all of K in one program, whose warps take a slice of it each

                    acc [SLICES, BLOCK_N, BLOCK_M]  += w [SLICES, BLOCK_N, BLOCK_K] · x [SLICES, BLOCK_K, BLOCK_M]
                    out [BLOCK_N, BLOCK_M]           = Σ over the slices

    up to 256   of programs: tiles of outputs, a long K split among programs

                    acc [BLOCK_N, BLOCK_M]  += w [BLOCK_N, BLOCK_K] · x [BLOCK_K, BLOCK_M]

    above       of arithmetic: big tiles, loaded by the copy engine; FP8 by PyTorch. From 65 rows on where there are
                such tiles for all multiprocessors, and FP8 from 129 on. From 257 on Hopper has w8a8_hopper_triton

                    acc [BLOCK_M, BLOCK_N]  += x [BLOCK_M, BLOCK_K] · w [BLOCK_N, BLOCK_K]ᵀ

On Hopper most products of 9 to 256 rows are those of ``skinny_hopper_triton``.

The weights come first in small products, as the matrix unit's tile is 16 or 64 by 8. Hopper's adds products of FP8
with fewer bits than fp32 has: every PROMOTE channels the sum is taken out of it and added to one in fp32. PyTorch's
product leaves it in, as vLLM's does: a tenth faster, and 3e-3 off, where rounding to FP8 is off by 3e-2.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llmq.runtime.kernels import is_hopper, skinny_hopper_triton, w8a8_hopper_triton
from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.quantize_rows import QuantizedRows
from llmq.runtime.kernels.split_k_triton import reduce_splits, scaled, steps_per_split
from llmq.runtime.kernels.w8a8 import Weight8
from llmq.scheme import E4M3, INT

PROMOTE = tl.constexpr(128)
SPLIT_STEP = 256  # channels: what a split is a multiple of
SLICES = 4
GROUP = 8  # tiles of M whose programs are neighbours, so that they find the weight in the cache
MULTIPROCESSORS = 132  # of an H200


class Launch(NamedTuple):
    """What a program takes."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# Rows up to → launch parameters, measured on an H200.
SLICED = {8: Launch(8, 16, 256, 4, 3)}
SPLIT = {
    INT: {
        16: Launch(16, 64, 256, 4, 4),
        32: Launch(32, 64, 256, 4, 4),
        64: Launch(64, 64, 256, 4, 3),
        256: Launch(64, 64, 128, 4, 4),
    },
    E4M3: {  # a step is PROMOTE: between two sums of one the matrix unit would idle
        16: Launch(16, 64, 128, 4, 6),
        32: Launch(32, 64, 128, 4, 6),
        128: Launch(64, 64, 128, 4, 4),
    },
}
LONG = 8192  # channels: a sum of fewer is not split where there are tiles for half of the multiprocessors
LONG_SPLIT = {256: Launch(128, 64, 128, 4, 4)}  # of long sums, from 65 rows on
# Number → launch parameters, of weights that the L2 cache holds beside the activations, and of bigger ones.
LARGE = {INT: Launch(128, 128, 128, 4, 3), E4M3: Launch(128, 128, 128, 8, 4)}
HUGE = {INT: Launch(256, 128, 128, 8, 4), E4M3: Launch(256, 128, 128, 8, 4)}
CACHED = 2**25  # bytes


def w8a8_matmul_triton(x: QuantizedRows, weight: Weight8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``w8a8_matmul`` through Triton, or PyTorch's product."""
    (rows, in_features), out_features = x.codes.shape, len(weight.codes)
    on_hopper = is_hopper(x.codes.device)
    skinny = skinny_hopper_triton.launch_for(rows, out_features, in_features, x.codes.dtype)
    if on_hopper and skinny is not None and skinny_hopper_triton.takes(x.codes, weight.codes):
        return skinny_hopper_triton.skinny_matmul(
            x.codes, weight.codes, x.scales, weight.scales, bias, dtype, skinny
        )  # fmt: skip
    whole = in_features % 16 == 0 and out_features % 16 == 0  # as the copy engine and PyTorch's product want it
    kernel, launch = kernel_for(rows, out_features, in_features, weight.number)
    if kernel is large_kernel and not whole:
        kernel, launch = split_kernel, max(SPLIT[weight.number].items())[1]
    if kernel is large_kernel and on_hopper and w8a8_hopper_triton.takes(x, weight, dtype):
        return w8a8_hopper_triton.w8a8_matmul_hopper(x, weight, bias, dtype)
    if kernel is large_kernel and weight.number == E4M3 and dtype == torch.bfloat16 and x.codes.is_cuda:
        return torch._scaled_mm(
            x.codes, weight.codes.t(), x.scales, weight.scales[None, :], bias, out_dtype=dtype, use_fast_accum=True
        )
    out = torch.empty(rows, out_features, dtype=dtype, device=x.codes.device)
    if rows:
        run = {sliced_kernel: _sliced, split_kernel: _split, large_kernel: _large}[kernel]
        run(x, weight, bias, out, launch)
    return out


def kernel_for(rows: int, out_features: int, in_features: int, number: str) -> tuple[Any, Launch]:
    """The kernel that multiplies ``rows`` by such a weight, and its launch parameters."""
    for most, launch in SLICED.items():
        if rows <= most:
            return sliced_kernel, launch
    split, large = SPLIT[number], LARGE[number]
    tiles = triton.cdiv(rows, large.block_m) * triton.cdiv(out_features, large.block_n)
    if rows > max(split) or (rows > 64 and tiles >= MULTIPROCESSORS):
        huge = rows > 128 and out_features * in_features > CACHED
        return large_kernel, HUGE[number] if huge else large
    table = LONG_SPLIT if rows > 64 and in_features >= LONG else split
    return split_kernel, next(launch for most, launch in table.items() if rows <= most)


def _sliced(x: QuantizedRows, weight: Weight8, bias: Tensor | None, out: Tensor, launch: Launch) -> None:
    (rows, in_features), out_features = x.codes.shape, len(weight.codes)
    sliced_kernel[triton.cdiv(out_features, launch.block_n),](
        x.codes, x.scales, weight.codes, weight.scales, bias, out, rows, out_features, in_features,
        WHOLE_STEPS=in_features % (SLICES * launch.block_k) == 0, SLICES=SLICES, BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, STAGES=launch.stages, num_warps=launch.warps, **pdl(out.device),
    )  # fmt: skip


def _split(x: QuantizedRows, weight: Weight8, bias: Tensor | None, out: Tensor, launch: Launch) -> None:
    (rows, in_features), out_features = x.codes.shape, len(weight.codes)
    tiles_n, tiles_m = triton.cdiv(out_features, launch.block_n), triton.cdiv(rows, launch.block_m)
    steps = triton.cdiv(in_features, SPLIT_STEP)
    programs = 2 * MULTIPROCESSORS if in_features >= LONG else MULTIPROCESSORS // 2
    per_split = steps_per_split(tiles_n * tiles_m, steps, programs)
    splits = triton.cdiv(steps, per_split)
    total = torch.int32 if weight.number == INT else torch.float32
    sums = torch.empty(splits if splits > 1 else 0, rows, out_features, dtype=total, device=out.device)
    split_kernel[tiles_n * tiles_m, splits](
        x.codes, x.scales, weight.codes, weight.scales, bias, out, sums, rows, out_features,
        in_features, per_split * (SPLIT_STEP // launch.block_k), tiles_m, WHOLE_STEPS=in_features % SPLIT_STEP == 0,
        SPLIT=splits > 1, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k,
        STAGES=launch.stages, num_warps=launch.warps, **pdl(out.device),
    )  # fmt: skip
    if splits > 1:
        reduce_splits(sums, x.scales, weight.scales, bias, out)


def _large(x: QuantizedRows, weight: Weight8, bias: Tensor | None, out: Tensor, launch: Launch) -> None:
    rows, out_features = out.shape
    large_kernel[triton.cdiv(rows, launch.block_m) * triton.cdiv(out_features, launch.block_n),](
        TensorDescriptor.from_tensor(x.codes, [launch.block_m, launch.block_k]), x.scales,
        TensorDescriptor.from_tensor(weight.codes, [launch.block_n, launch.block_k]), weight.scales, bias, out,
        rows, out_features, x.codes.shape[1], BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k, STAGES=launch.stages, GROUP=GROUP, num_warps=launch.warps, **pdl(out.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def sliced_kernel(
    x, x_scales, weight, weight_scales, bias, out, rows, out_features, in_features,
    WHOLE_STEPS: tl.constexpr, SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all rows."""
    TOTAL: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, SLICES)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    is_n, is_m = n < out_features, m < rows
    n_scales = tl.load(weight_scales + n, mask=is_n, other=0.0)[:, None]
    n_bias = None if bias is None else tl.load(bias + n, mask=is_n, other=0.0)[:, None]
    at_weight = weight + n.to(tl.int64)[None, :, None] * in_features + k[:, None, :]
    at_x = x + m[None, None, :] * in_features + k[:, :, None]
    wait(PDL)
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], dtype=TOTAL)
    for start in tl.range(0, in_features, SLICES * BLOCK_K, num_stages=STAGES):
        is_k = start + k < in_features
        is_w = is_n[None, :, None] if WHOLE_STEPS else is_n[None, :, None] & is_k[:, None, :]
        is_x = is_m[None, None, :] if WHOLE_STEPS else is_m[None, None, :] & is_k[:, :, None]
        w_tile = tl.load(at_weight + start, mask=is_w, other=0.0)
        x_tile = tl.load(at_x + start, mask=is_x, other=0.0)
        acc = tl.dot(w_tile, x_tile, acc, out_dtype=TOTAL)
    m_scales = tl.load(x_scales + m, mask=is_m, other=0.0)[None, :]
    result = scaled(tl.sum(acc, 0), m_scales, n_scales, n_bias)
    inside = is_n[:, None] & is_m[None, :]
    tl.store(out + m[None, :] * out_features + n[:, None], result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps_per_split", "tiles_m"])
def split_kernel(
    x, x_scales, weight, weight_scales, bias, out, sums, rows, out_features, in_features, steps_per_split,
    tiles_m,
    WHOLE_STEPS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs, summed over one split of K."""
    TOTAL: tl.constexpr = sums.dtype.element_ty
    # Programs that share a tile of the weight are neighbours, so that all but one find it in the cache.
    n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    is_n, is_m = n < out_features, m < rows
    at_weight = weight + n.to(tl.int64)[:, None] * in_features + k[None, :]
    at_x = x + m.to(tl.int64)[None, :] * in_features + k[:, None]
    first = tl.program_id(1) * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(in_features, BLOCK_K))
    n_scales = tl.load(weight_scales + n, mask=is_n, other=0.0)[:, None]
    n_bias = None if bias is None else tl.load(bias + n, mask=is_n, other=0.0)[:, None]
    wait(PDL)
    m_scales = tl.load(x_scales + m, mask=is_m, other=0.0)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=TOTAL)
    for step in tl.range(first, last, num_stages=STAGES):
        start = step * BLOCK_K
        is_k = start + k < in_features
        is_w = is_n[:, None] if WHOLE_STEPS else is_n[:, None] & is_k[None, :]
        is_x = is_m[None, :] if WHOLE_STEPS else is_m[None, :] & is_k[:, None]
        w_tile = tl.load(at_weight + start, mask=is_w, other=0.0)
        x_tile = tl.load(at_x + start, mask=is_x, other=0.0)
        acc = tl.dot(w_tile, x_tile, acc, max_num_imprecise_acc=PROMOTE, out_dtype=TOTAL)
    inside = is_n[:, None] & is_m[None, :]
    at_out = m[None, :].to(tl.int64) * out_features + n[:, None]
    if SPLIT:
        size = tl.cast(rows, tl.int64) * out_features
        tl.store(sums + tl.program_id(1) * size + at_out, acc, mask=inside)
        return
    result = scaled(acc, m_scales, n_scales, n_bias)
    tl.store(out + at_out, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def large_kernel(
    x, x_scales, weight, weight_scales, bias, out, rows, out_features, in_features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs; x [M, K] and weight [N, K] are descriptors of tensors."""
    TOTAL: tl.constexpr = tl.int32 if x.dtype == tl.int8 else tl.float32
    # Down GROUP tiles of M, then on to the next tile of N.
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    within = tl.program_id(0) % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    first_m = (group * GROUP + within % height) * BLOCK_M
    first_n = within // height * BLOCK_N
    wait(PDL)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=TOTAL)
    for start in tl.range(0, in_features, BLOCK_K, num_stages=STAGES):
        x_tile, w_tile = x.load([first_m, start]), weight.load([first_n, start])
        acc = tl.dot(x_tile, w_tile.T, acc, max_num_imprecise_acc=PROMOTE, out_dtype=TOTAL)
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    is_m, is_n = m < rows, n < out_features
    n_scales = tl.load(weight_scales + n, mask=is_n, other=0.0)[None, :]
    n_bias = None if bias is None else tl.load(bias + n, mask=is_n, other=0.0)[None, :]
    m_scales = tl.load(x_scales + m, mask=is_m, other=0.0)[:, None]
    result = scaled(acc, m_scales, n_scales, n_bias)
    at_out = m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(out + at_out, result.to(out.dtype.element_ty), mask=is_m[:, None] & is_n[None, :])
