"""Split K: a product's sum over K, divided among programs so that a narrow weight keeps all multiprocessors busy.

    sums [splits, M, N]     each split's, of the type of the accumulator

They are added in order, whoever is done first: in a small batch by the program that finishes a tile last, in a bigger
one by reduce_kernel, which has all multiprocessors to do it.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.pdl_triton import pdl, wait

REDUCE_ROWS = 8  # above, a kernel of its own adds the splits


class Launch(NamedTuple):
    """What a program takes; K is split so that there are about so many of them."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int
    boxes: int = 1  # copies of the weight that make a step, where a kernel takes several


def steps_per_split(tiles: int, steps: int, programs: int) -> int:
    """Of the ``steps`` of K, for ``tiles`` to make about so many ``programs``."""
    return int(triton.cdiv(steps, max(1, min(programs // tiles, steps // 4, 16))))


@cache
def counters(device: torch.device) -> Tensor:
    """For each tile of outputs, how many splits are done: zero before a launch, and put back by its last program.

    There is one set for a device, so products run on one stream at a time.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a quantized layer once before capturing it in a CUDA graph")
    return torch.zeros(2**16, dtype=torch.int32, device=device)


def reduce_splits(
    sums: Tensor, x_scales: Tensor | None, weight_scales: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    """out [M, N] ← the splits' sum · x_scales [M] · weight_scales [N] + bias [N], of what is there of these."""
    splits, rows, out_features = sums.shape
    block = 256 if rows <= 32 else 1024  # for few rows so many programs that each has little to wait for
    reduce_kernel[rows, triton.cdiv(out_features, block)](
        sums, x_scales, weight_scales, bias, out, rows, out_features,
        SPLITS=splits, BLOCK=block, num_warps=block // 256, **pdl(out.device),
    )  # fmt: skip


@triton.jit
def is_last(counter):
    """Whether all other splits of this program's tile, of ``tl.num_programs(1)``, are in memory."""
    # All threads' stores come before the count, and the count before the last program's loads.
    tl.debug_barrier()
    done = tl.atomic_add(counter, 1, sem="acq_rel")
    last = done == tl.num_programs(1) - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_splits(sums, at, inside, size, splits):
    """The sum, in order, of what all splits have stored ``at`` their ``size`` elements."""
    total = tl.load(sums + at, mask=inside, other=0)
    for split in tl.range(1, splits, num_stages=4):
        total += tl.load(sums + split * size + at, mask=inside, other=0)
    return total


@triton.jit
def scaled(sums, x_scales, weight_scales, bias):
    """The outputs, fp32, that a product's ``sums`` are; scales and bias broadcast to their shape, or are None.

    Wherever 8-bit products are scaled it is in this order: a row has the same bits in a batch of any size.
    """
    result = sums.to(tl.float32)
    if weight_scales is not None:
        result = result * weight_scales * x_scales
    if bias is not None:
        result += bias.to(tl.float32)
    return result


@triton.jit(do_not_specialize=["rows"])
def reduce_kernel(
    sums, x_scales, weight_scales, bias, out, rows, out_features,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK outputs of one row of the batch."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < out_features
    n_scales = None if weight_scales is None else tl.load(weight_scales + n, mask=inside, other=0.0)
    n_bias = None if bias is None else tl.load(bias + n, mask=inside, other=0.0)
    wait(PDL)
    size = tl.cast(rows, tl.int64) * out_features
    total = tl.load(sums + row * out_features + n, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):  # unrolled: all loads at once
        total += tl.load(sums + split * size + row * out_features + n, mask=inside, other=0)
    m_scale = None if x_scales is None else tl.load(x_scales + row)
    result = scaled(total, m_scale, n_scales, n_bias)
    tl.store(out + row * out_features + n, result.to(out.dtype.element_ty), mask=inside)
