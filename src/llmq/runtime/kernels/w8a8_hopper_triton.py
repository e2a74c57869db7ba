"""Device code of ``w8a8`` for integers and many rows on Hopper: each warp has one task, and the matrix unit always has
the next.

    1 warp                  asks for x and weight, step after step and tile after tile, up to STAGES steps ahead
    4 warps a consumer      acc [64, 256] += x [64, STEP] · weight [256, STEP]ᵀ, of rows of its own; after the last step

                                acc → · scales + bias → shared memory → out

                            by the copy engine, while the steps of the next tile arrive

There is a program for each multiprocessor, which does one tile after another. Its warps meet at barriers: ``ready``
counts the bytes of a step, ``free`` the consumers that have multiplied it. Triton gives all warps the same task, so
that this is Gluon, the level below. FP8 is PyTorch's: as fast as this there, and with less power, which is what a full
card is short of.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llmq.runtime.kernels import multiprocessors
from llmq.runtime.kernels.pdl_triton import wait
from llmq.runtime.kernels.quantize_rows import QuantizedRows
from llmq.runtime.kernels.split_k_triton import scaled
from llmq.runtime.kernels.w8a8 import Weight8
from llmq.scheme import INT

FEWEST_ROWS = 257  # fewer are short of programs, not of arithmetic
ROWS = gl.constexpr(64)  # of a consumer
COLUMNS = gl.constexpr(256)
BOX = gl.constexpr(128)  # rows of the weight in one copy
STEP = gl.constexpr(128)  # channels
PART = gl.constexpr(64)  # columns that are stored in one go
GROUP = gl.constexpr(8)  # tiles of M that are done one after another, while their rows of the weight are in the cache
CODES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
OUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


class Launch(NamedTuple):
    """What a program takes; ``registers``: of a thread, on the average, as many as there are."""

    consumers: int
    stages: int
    registers: int


TWO, THREE = Launch(2, 4, 168), Launch(3, 3, 128)


def launch_for(rows: int, tiles_n: int, programs: int, *, biased: bool) -> Launch:
    """Three consumers read fewer bytes a product, and so take less power; two where with three the last programs would
    keep the others waiting, or a bias would take the registers that there are."""
    two, three = (
        triton.cdiv(triton.cdiv(rows, launch.consumers * ROWS.value) * tiles_n, programs) * launch.consumers
        for launch in (TWO, THREE)
    )
    return TWO if biased or three > 1.05 * two else THREE


def takes(x: QuantizedRows, weight: Weight8, dtype: torch.dtype) -> bool:
    """Whether ``w8a8_matmul_hopper`` multiplies such rows by such a weight."""
    rows, in_features = x.codes.shape
    whole = in_features % 16 == 0 and len(weight.codes) % 16 == 0  # as the copy engine wants it
    return weight.number == INT and rows >= FEWEST_ROWS and whole and dtype.itemsize == 2


def w8a8_matmul_hopper(x: QuantizedRows, weight: Weight8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``w8a8_matmul`` of what it ``takes``."""
    (rows, in_features), out_features = x.codes.shape, len(weight.codes)
    out = torch.empty(rows, out_features, dtype=dtype, device=x.codes.device)
    tiles_n, programs = triton.cdiv(out_features, COLUMNS.value), multiprocessors(out.device)
    launch = launch_for(rows, tiles_n, programs, biased=bias is not None)
    tiles = triton.cdiv(rows, launch.consumers * ROWS.value) * tiles_n
    w8a8_hopper_kernel[min(tiles, programs),](
        TensorDescriptor.from_tensor(x.codes, [ROWS.value, STEP.value], CODES),
        TensorDescriptor.from_tensor(weight.codes, [BOX.value, STEP.value], CODES),
        TensorDescriptor.from_tensor(out, [ROWS.value, PART.value], OUT),
        x.scales, weight.scales, bias, rows, out_features, triton.cdiv(in_features, STEP.value),
        CONSUMERS=launch.consumers, STAGES=launch.stages, num_warps=4, maxnreg=launch.registers, launch_pdl=True,
    )  # fmt: skip
    return out


@gluon.jit
def place_of(tile, tiles_m, tiles_n, CONSUMERS: gl.constexpr):
    """First row and first column of a tile: down GROUP tiles of M, then on to the next tile of N."""
    group = tile // (GROUP * tiles_n)
    within = tile % (GROUP * tiles_n)
    height = gl.minimum(tiles_m - group * GROUP, GROUP)
    return (group * GROUP + within % height) * CONSUMERS * ROWS, within // height * COLUMNS


@gluon.jit
def halves(tile):
    """[m, 2n] → two of [m, n], in the registers that they are in."""
    M: gl.constexpr = tile.shape[0]
    N: gl.constexpr = tile.shape[1] // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    left, right = tile.reshape([M, 2, N]).permute(0, 2, 1).split()
    return gl.convert_layout(left, LAYOUT), gl.convert_layout(right, LAYOUT)


@gluon.jit
def produce(at_x, at_weight, shared, sizes, CONSUMERS: gl.constexpr):
    """Ask for all steps of all tiles of this program, each as soon as its slot is free."""
    x, weight, _, ready, free = shared
    _, _, steps, tiles_m, tiles_n = sizes
    STAGES: gl.constexpr = weight.shape[0]
    wait(True)
    count = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        first_m, first_n = place_of(tile, tiles_m, tiles_n, CONSUMERS)
        for step in range(steps):
            slot = count % STAGES
            mbarrier.wait(free.index(slot), (count // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(slot), (CONSUMERS * ROWS + COLUMNS) * STEP)
            for consumer in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(
                    at_x, [first_m + consumer * ROWS, step * STEP], ready.index(slot),
                    x.index(slot * CONSUMERS + consumer),
                )  # fmt: skip
            for box in gl.static_range(COLUMNS // BOX):
                tma.async_copy_global_to_shared(
                    at_weight, [first_n + box * BOX, step * STEP], ready.index(slot),
                    weight.index(slot).slice(box * BOX, BOX, dim=0),
                )  # fmt: skip
            count += 1


@gluon.jit
def consume(
    at_out, shared, x_scales, weight_scales, bias, sizes, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr
):  # fmt: skip
    """Multiply, scale and store the rows of one consumer, of all tiles of this program."""
    x, weight, stored, ready, free = shared
    rows, out_features, steps, tiles_m, tiles_n = sizes
    STAGES: gl.constexpr = weight.shape[0]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    STORED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    wait(True)
    count = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        acc = gl.zeros([ROWS, COLUMNS], gl.int32, layout=MMA)
        for step in range(steps):
            slot = count % STAGES
            mbarrier.wait(ready.index(slot), count // STAGES & 1)
            acc = warpgroup_mma(
                x.index(slot * CONSUMERS + CONSUMER), weight.index(slot).permute((1, 0)), acc, use_acc=step > 0,
                is_async=True,
            )  # fmt: skip
            # The step before has been multiplied, and this one keeps the matrix unit busy.
            acc = warpgroup_mma_wait(1, [acc])
            mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1, pred=step > 0)
            count += 1
        sums = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index((count + STAGES - 1) % STAGES), count=1)
        first_m, first_n = place_of(tile, tiles_m, tiles_n, CONSUMERS)
        first_m += CONSUMER * ROWS
        m = first_m + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORED))
        m_scales = gl.load(x_scales + m, mask=m < rows, other=0.0)[:, None]
        left, right = halves(sums)
        parts = halves(left) + halves(right)
        for part in gl.static_range(len(parts)):
            # Part by part: the scales of all columns would not fit into the registers of three consumers.
            n = first_n + part * PART + gl.arange(0, PART, layout=gl.SliceLayout(0, STORED))
            is_n = n < out_features
            n_scales = gl.load(weight_scales + n, mask=is_n, other=0.0)[None, :]
            n_bias = None if bias is None else gl.load(bias + n, mask=is_n, other=0.0)[None, :]
            result = scaled(parts[part], m_scales, n_scales, n_bias)
            place = stored.index(CONSUMER * 2 + part % 2)
            tma.store_wait(1)
            tl.debug_barrier()
            place.store(result.to(at_out.dtype))
            fence_async_shared()
            tl.debug_barrier()
            tma.async_copy_shared_to_global(at_out, [first_m, first_n + part * PART], place)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "steps"])
def w8a8_hopper_kernel(
    at_x, at_weight, at_out, x_scales, weight_scales, bias, rows, out_features, steps,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All tiles of outputs; of x [M, K], weight [N, K] and out [M, N] there are descriptors."""
    x = gl.allocate_shared_memory(at_x.dtype, [STAGES * CONSUMERS, ROWS, STEP], at_x.layout)
    weight = gl.allocate_shared_memory(at_x.dtype, [STAGES, COLUMNS, STEP], at_weight.layout)
    stored = gl.allocate_shared_memory(at_out.dtype, [2 * CONSUMERS, ROWS, PART], at_out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=CONSUMERS)
    fence_async_shared()
    shared = (x, weight, stored, ready, free)
    sizes = (rows, out_features, steps, gl.cdiv(rows, CONSUMERS * ROWS), gl.cdiv(out_features, COLUMNS))
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (at_out, shared, x_scales, weight_scales, bias, sizes, 0, CONSUMERS)),
                (consume, (at_out, shared, x_scales, weight_scales, bias, sizes, 1, CONSUMERS)),
                (produce, (at_x, at_weight, shared, sizes, CONSUMERS)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (at_out, shared, x_scales, weight_scales, bias, sizes, 0, CONSUMERS)),
                (consume, (at_out, shared, x_scales, weight_scales, bias, sizes, 1, CONSUMERS)),
                (consume, (at_out, shared, x_scales, weight_scales, bias, sizes, 2, CONSUMERS)),
                (produce, (at_x, at_weight, shared, sizes, CONSUMERS)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
