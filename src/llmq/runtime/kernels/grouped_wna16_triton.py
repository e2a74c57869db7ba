"""Device code of ``grouped``, for packed weights: as ``wna16`` has it, each program with one expert's rows.

program (tile of assignments, tile of N)      acc [BLOCK_N, BLOCK_M], fp32

    for each step of 128 channels:   words [BLOCK_N, 32] → planes 0, 1, …
                                     acc += scale · Σ plane_i · x[:, the 32 channels of plane i]ᵀ
"""


# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.grouped_triton import tile_rows
from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.routing import Routing
from llmq.runtime.kernels.silu_triton import silu_product
from llmq.runtime.kernels.wna16 import PLANE, STEP, PackedWeight
from llmq.runtime.kernels.wna16_triton import (
    INTERPRETED,
    Launch,
    e4m3,
    look_up4,
    offset_of,
    scale_of,
    table_of,
    unpack4,
    unpack8,
)

# (gated, block_m) → launch parameters; a gated program takes block_n rows of gate, and of up.
LAUNCHES = {
    (True, 16): Launch(16, 64, 4, 3),
    (True, 32): Launch(32, 64, 4, 3),
    (True, 64): Launch(64, 64, 4, 3),
    (False, 16): Launch(16, 64, 4, 4),
    (False, 32): Launch(32, 128, 4, 4),
    (False, 64): Launch(64, 64, 4, 4),
}
WIDE = Launch(16, 32, 8, 1)  # of fp32, without a matrix unit; a bigger tile spills gigabytes


def launch_for(gated: bool, block_m: int, element_size: int) -> Launch:
    """Launch parameters for activations of so many bytes."""
    return LAUNCHES[gated, block_m] if element_size == 2 else WIDE._replace(block_m=block_m)


def grouped_wna16_triton(
    x: Tensor, packed: PackedWeight, routing: Routing, bias: Tensor | None, *, gated: bool
) -> Tensor:
    """``grouped_matmul`` through Triton."""
    if packed.order is not None:
        x = x.index_select(1, packed.order)
    if x.stride(1) != 1:
        x = x.contiguous()
    assignments, size = len(routing.order), packed.out_features // routing.experts
    features = size // 2 if gated else size
    launch = launch_for(gated, routing.block_m, x.element_size())
    out = torch.empty(assignments, features, dtype=x.dtype, device=x.device)
    grouped_wna16_kernel[len(routing.tile_experts), triton.cdiv(features, launch.block_n)](
        x, packed.words, packed.meta, table_of(packed.number, x.device), bias, out, routing.order, routing.starts,
        routing.tile_experts, routing.tile_starts, packed.out_features, size, features, packed.in_features,
        x.stride(0), assignments // max(len(x), 1), GATED=gated, WHOLE_STEPS=packed.in_features % STEP == 0,
        BITS=packed.bits, NUMBER=packed.number,
        PER_GROUP=0 if packed.group_length >= packed.in_features else packed.group_length // PLANE,
        BF16_SCALE=packed.scale_dtype == torch.bfloat16, ASM=not INTERPRETED and x.element_size() == 2,
        BLOCK_M=routing.block_m, BLOCK_N=launch.block_n, STAGES=launch.stages, num_warps=launch.warps, **pdl(x.device),
    )  # fmt: skip
    return out


@triton.jit
def load_plane(at_x, first, is_x, in_features, WHOLE_STEPS: tl.constexpr):
    """x [32, BLOCK_M], the 32 channels from ``first`` on."""
    inside = is_x if WHOLE_STEPS else is_x & (first + tl.arange(0, 32) < in_features)[:, None]
    return tl.load(at_x + first, mask=inside, other=0.0)


@triton.jit
def add_step(
    acc, x_planes, words, meta, table, n, is_n, step, rows,
    BITS: tl.constexpr, NUMBER: tl.constexpr, PER_GROUP: tl.constexpr, BF16_SCALE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``acc`` plus one step's product with the rows ``n`` of a weight of ``rows`` rows."""
    PLANES: tl.constexpr = 16 // BITS
    TYPE: tl.constexpr = x_planes[0].dtype
    j = tl.arange(0, 32)
    tile_size = tl.cast(rows, tl.int64) * 32  # words may have more than 2^31 elements
    # A group of the whole row is one of four planes whose scale is always the same.
    SHARED: tl.constexpr = 4 if PER_GROUP == 0 else PER_GROUP
    at = meta + n if PER_GROUP == 0 else meta + step * (4 // SHARED) * rows + n
    m0 = tl.load(at, mask=is_n, other=0)
    m1, m2, m3 = m0, m0, m0
    if SHARED == 1:
        m1 = tl.load(at + rows, mask=is_n, other=0)
    if SHARED <= 2:
        m2 = tl.load(at + (2 // SHARED) * rows, mask=is_n, other=0)
        m3 = m2
    if SHARED == 1:
        m3 = tl.load(at + 3 * rows, mask=is_n, other=0)
    metas = (m0, m1, m2, m3)
    if NUMBER == "int":
        offsets = (
            offset_of(m0, BITS, ASM, TYPE), offset_of(m1, BITS, ASM, TYPE),
            offset_of(m2, BITS, ASM, TYPE), offset_of(m3, BITS, ASM, TYPE),
        )  # fmt: skip
    for plane in tl.static_range(4):
        if plane % PLANES == 0:
            at_words = words + (step * (4 // PLANES) + plane // PLANES) * tile_size
            packed = tl.load(at_words + n[:, None] * 32 + j[None, :], mask=is_n[:, None], other=0)
            if NUMBER == "e4m3":
                planes = (e4m3(packed, TYPE), e4m3(packed >> 8, TYPE))
            elif NUMBER != "int":
                planes = look_up4(packed, table, TYPE)
            elif BITS == 4:
                planes = unpack4(packed, offsets, ASM, TYPE)
            else:
                planes = unpack8(packed, offsets[plane], offsets[plane + 1], ASM, TYPE)
        if plane % SHARED == 0:
            part = tl.dot(planes[plane % PLANES], x_planes[plane], input_precision="ieee")
        else:
            part = tl.dot(planes[plane % PLANES], x_planes[plane], part, input_precision="ieee")
        if plane % SHARED == SHARED - 1:
            acc += part * scale_of(metas[plane], NUMBER, BF16_SCALE)[:, None]
    return acc


@triton.jit(do_not_specialize=["repeats"])
def grouped_wna16_kernel(
    x, words, meta, table, bias, out, order, starts, tile_experts, tile_starts, rows, size, features, in_features,
    x_stride, repeats,
    GATED: tl.constexpr, WHOLE_STEPS: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr, PER_GROUP: tl.constexpr,
    BF16_SCALE: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs of one expert's assignments."""
    within = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, 32)
    is_n = within < features
    wait(PDL)
    expert, assignment, is_m = tile_rows(order, starts, tile_experts, tile_starts, BLOCK_M)
    if expert < 0:
        return
    n = expert * size + within
    at_x = x + (assignment // repeats).to(tl.int64)[None, :] * x_stride + j[:, None]
    is_x = is_m[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for step in tl.range(0, tl.cdiv(in_features, 128), num_stages=STAGES):
        x0 = load_plane(at_x, step * 128, is_x, in_features, WHOLE_STEPS)
        x1 = load_plane(at_x, step * 128 + 32, is_x, in_features, WHOLE_STEPS)
        x2 = load_plane(at_x, step * 128 + 64, is_x, in_features, WHOLE_STEPS)
        x3 = load_plane(at_x, step * 128 + 96, is_x, in_features, WHOLE_STEPS)
        planes = (x0, x1, x2, x3)
        acc = add_step(
            acc, planes, words, meta, table, n, is_n, step, rows, BITS, NUMBER, PER_GROUP, BF16_SCALE, ASM
        )  # fmt: skip
        if GATED:
            up = add_step(
                up, planes, words, meta, table, n + features, is_n, step, rows, BITS, NUMBER, PER_GROUP, BF16_SCALE, ASM
            )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(bias + n + features, mask=is_n, other=0.0).to(tl.float32)[:, None]
    y = acc.to(out.dtype.element_ty)
    if GATED:
        y = silu_product(y, up.to(out.dtype.element_ty))
    at_out = assignment.to(tl.int64)[None, :] * features + within[:, None]
    tl.store(out + at_out, y, mask=is_n[:, None] & is_m[None, :])
