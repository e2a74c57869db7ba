"""Device code of ``wna16``.

The product is taken as weights · xᵀ, so that the weights, which are unpacked in registers, are the operand that the
matrix unit reads from registers, and a batch of 8 fills it as well as one of 64:

    program (tile of N and M, split of K)      acc [BLOCK_N, BLOCK_M], fp32

        for each step of 128 channels:   words [BLOCK_N, 32] → planes 0, 1, …
                                         acc += scale · Σ plane_i · x[:, the 32 channels of plane i]ᵀ

The scale multiplies the fp32 sum of its group, not the weights: that costs less and rounds nothing. Where a group is
whole steps, the four planes of 4 bits lie side by side in the registers, and a step is one product.

A gated program has the same columns of gate and of up, and stores what the gate lets through:

    n      | tile · BLOCK_N / 2 … of gate | the same of up |
    out                silu(gate) · up
"""

# ruff: noqa: SIM300 (TYPE is no constant but a type)
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from llmq.checkpoint.quantized_weight import numbers
from llmq.memory import FUSED_ROWS
from llmq.runtime.kernels import is_hopper
from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.prefetch_triton import prefetch
from llmq.runtime.kernels.silu_triton import silu_mul_triton, silu_product
from llmq.runtime.kernels.split_k_triton import (
    REDUCE_ROWS,
    counters,
    is_last,
    reduce_splits,
    steps_per_split,
    sum_splits,
)
from llmq.runtime.kernels.wna16 import PLANE, STEP, PackedWeight
from llmq.scheme import E4M3, INT

PROGRAMS = 528  # enough to keep an H200's 132 multiprocessors in loads: four each
GATED_ROWS = range(9, 33)  # whose gate is taken in the product; for fewer a kernel behind it was faster on an H200
AHEAD = 1  # steps whose words are brought into the L2 cache before there are activations
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """What a program takes."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# (bits, rows up to) → launch parameters, measured on an H200.
LAUNCHES = {
    (4, 8): Launch(8, 64, 2, 4),
    (4, 16): Launch(16, 128, 4, 4),
    (4, 32): Launch(32, 128, 4, 4),
    (4, 64): Launch(64, 128, 4, 3),
    (8, 8): Launch(8, 128, 4, 3),
    (8, 16): Launch(16, 128, 4, 4),
    (8, 32): Launch(32, 128, 4, 4),
    (8, 64): Launch(64, 256, 8, 4),
}


def launch_for(bits: int, rows: int, element_size: int) -> Launch:
    """Launch parameters for a batch of ``rows``, of elements of so many bytes."""
    block_m = next((most for width, most in LAUNCHES if width == bits and rows <= most), 64)
    return LAUNCHES[bits, block_m] if element_size == 2 else Launch(block_m, 64, 4, 2)


def split_length(packed: PackedWeight) -> int:
    """Steps of K in a split: up to a quarter more where that makes splits of one length.

    They depend on the weight alone, so that a row's result does not depend on the batch.
    """
    steps = triton.cdiv(packed.in_features, STEP)
    length = steps_per_split(triton.cdiv(packed.out_features, 64), steps, PROGRAMS)
    return next((longer for longer in range(length, length * 5 // 4 + 1) if steps % longer == 0), length)


def wna16_matmul_triton(x: Tensor, packed: PackedWeight, bias: Tensor | None, gated: bool) -> Tensor:
    """``wna16_matmul`` through Triton; ``x`` is in packed order."""
    if gated and not (len(x) in GATED_ROWS and split_length(packed) * STEP >= packed.in_features):
        gate, up = wna16_matmul_triton(x, packed, bias, False).chunk(2, dim=1)
        return silu_mul_triton(gate, up)
    rows, out_features = x.shape[0], packed.out_features
    if x.stride(1) != 1:
        x = x.contiguous()
    if is_hopper(x.device):
        from llmq.runtime.kernels.wna16_hopper_triton import takes, wna16_matmul_hopper

        if takes(x, packed):
            return wna16_matmul_hopper(x, packed, bias)
    if rows > FUSED_ROWS:
        return F.linear(x, dequantize(packed, x.dtype), bias)
    whole_groups = packed.group_length % STEP == 0 or packed.group_length >= packed.in_features
    launch = launch_for(packed.bits, rows, x.element_size())
    steps, per_split = triton.cdiv(packed.in_features, STEP), split_length(packed)
    splits = triton.cdiv(steps, per_split)
    reduced = splits > 1 and rows > REDUCE_ROWS
    width, block_n = (out_features // 2, launch.block_n // 2) if gated else (out_features, launch.block_n)
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    sums = torch.empty(splits if splits > 1 else 0, rows, out_features, dtype=torch.float32, device=x.device)
    tiles_m = triton.cdiv(rows, launch.block_m)
    wna16_kernel[triton.cdiv(width, block_n) * tiles_m, splits](
        x, packed.words, packed.meta, table_of(packed.number, x.device), bias, out, sums, counters(x.device), rows,
        out_features, packed.in_features, x.stride(0), steps, per_split, tiles_m, **_format(packed), SPLIT=splits > 1,
        REDUCED=reduced, GATED=gated, ASM=not INTERPRETED and x.element_size() == 2,
        JOINED=packed.bits == 4 and launch.block_m > 8 and whole_groups,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, STAGES=launch.stages, AHEAD=AHEAD,
        num_warps=launch.warps, **pdl(x.device),
    )  # fmt: skip
    if reduced:
        reduce_splits(sums, None, None, bias, out)
    return out


@cache
def table_of(number: str, device: torch.device) -> Tensor | None:
    """What the kernels look a code of ``number`` up in: fp32 [codes]; None: they compute it."""
    return None if number in (INT, E4M3) else numbers(number, device)


def dequantize(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in ``dtype``, its channels in packed order."""
    out_features, in_features = packed.out_features, packed.in_features
    weight = torch.empty(out_features, in_features, dtype=dtype, device=packed.words.device)
    block_n = 32
    dequantize_kernel[triton.cdiv(in_features, STEP), triton.cdiv(out_features, block_n)](
        packed.words, packed.meta, table_of(packed.number, weight.device), weight, out_features, in_features,
        **_format(packed), BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return weight


def _format(packed: PackedWeight) -> dict[str, object]:
    whole_row = packed.group_length >= packed.in_features
    return {
        "WHOLE_STEPS": packed.in_features % STEP == 0,
        "BITS": packed.bits,
        "NUMBER": packed.number,
        "PER_GROUP": 0 if whole_row else packed.group_length // PLANE,
        "BF16_SCALE": packed.scale_dtype == torch.bfloat16,
    }


# An integer below 16 (256) in the low mantissa bits of 128 (1024) in bf16 (fp16) is that number plus the integer, and
# taking off the number and the zero point is exact. Two weights at once: for a plane one shift, one and-or, one fused
# multiply-add. 8 bits do not fit bf16's mantissa: they go through fp32, where the number is 2^23.
def unpack_asm(kind: str, planes: Sequence[int], offsets: int) -> str:
    """Assembly of so many ``planes`` of 4 bits, of pairs of words that come behind them; then each plane's offset, or
    one of all."""
    magic, one = (0x43004300, 0x3F803F80) if kind == "bf16x2" else (0x64006400, 0x3C003C00)
    count = len(planes)
    body = "".join(
        f"shr.u32 t, ${count}, {4 * plane}; lop3.b32 t, t, 0x000F000F, {magic:#x}, 0xEA;"
        f"fma.rn.{kind} ${index}, t, one, ${count + 1 + index % offsets};"
        for index, plane in enumerate(planes)
    )
    return f"{{ .reg .b32 t, one; mov.b32 one, {one:#x}; {body} }}"


UNPACK4_BF16 = tl.constexpr(unpack_asm("bf16x2", range(4), offsets=4))
UNPACK4_FP16 = tl.constexpr(unpack_asm("f16x2", range(4), offsets=4))
UNPACK8_FP16 = tl.constexpr(
    "{ .reg .b32 t, one; mov.b32 one, 0x3C003C00;"
    "prmt.b32 t, $2, 0x64646464, 0x4240; fma.rn.f16x2 $0, t, one, $3;"
    "prmt.b32 t, $2, 0x64646464, 0x4341; fma.rn.f16x2 $1, t, one, $4; }"
)
UNPACK8_BF16 = tl.constexpr(
    "{ .reg .b32 a, b; .reg .f32 p, q;"
    "prmt.b32 a, $2, 0x4B000000, 0x7540; prmt.b32 b, $2, 0x4B000000, 0x7542;"
    "mov.b32 p, a; mov.b32 q, b; add.f32 p, p, $3; add.f32 q, q, $4; cvt.rn.bf16x2.f32 $0, q, p;"
    "prmt.b32 a, $2, 0x4B000000, 0x7541; prmt.b32 b, $2, 0x4B000000, 0x7543;"
    "mov.b32 p, a; mov.b32 q, b; add.f32 p, p, $5; add.f32 q, q, $6; cvt.rn.bf16x2.f32 $1, q, p; }"
)


@triton.jit
def offset_of(meta, BITS: tl.constexpr, ASM: tl.constexpr, TYPE: tl.constexpr):
    """What unpack adds to a code: −zero, less the number that the code is packed into."""
    zero = meta >> 16
    if not ASM:
        offset = -zero.to(tl.float32)
    elif BITS == 8 and TYPE == tl.bfloat16:
        offset = -8388608.0 - zero.to(tl.float32)
    elif TYPE == tl.bfloat16:
        offset = (zero | 0xC300).to(tl.int16)
    else:
        offset = (zero | 0xE400).to(tl.int16)
    return offset


@triton.jit
def scale_of(meta, NUMBER: tl.constexpr, BF16_SCALE: tl.constexpr):
    """The scale in fp32."""
    if NUMBER == "e4m3":
        scale = meta.to(tl.float32, bitcast=True) * 256.0  # see e4m3
    elif NUMBER != "int":
        scale = meta.to(tl.float32, bitcast=True)
    elif BF16_SCALE:
        scale = (meta << 16).to(tl.float32, bitcast=True)
    else:
        scale = meta.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale


@triton.jit
def e4m3(codes, TYPE: tl.constexpr):
    """1/256 of what codes of e4m3 stand for, exact: with their bits in those of fp16, whose exponent is wider."""
    bits = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(TYPE)


@triton.jit
def look_up4(words, table, TYPE: tl.constexpr):
    """words [n, 32] → four planes [n, 32] of what the table has for their codes."""
    return (
        tl.load(table + (words & 15).to(tl.int32)).to(TYPE), tl.load(table + ((words >> 4) & 15).to(tl.int32)).to(TYPE),
        tl.load(table + ((words >> 8) & 15).to(tl.int32)).to(TYPE),
        tl.load(table + ((words >> 12) & 15).to(tl.int32)).to(TYPE),
    )  # fmt: skip


@triton.jit
def unpack4(words, offsets, ASM: tl.constexpr, TYPE: tl.constexpr):
    """words [n, 32] → four planes [n, 32] of code − zero, exact in any TYPE; offsets: [n] for each plane."""
    o0, o1, o2, o3 = offsets[0][:, None], offsets[1][:, None], offsets[2][:, None], offsets[3][:, None]
    if not ASM:
        p0 = ((words & 15).to(tl.float32) + o0).to(TYPE)
        p1 = (((words >> 4) & 15).to(tl.float32) + o1).to(TYPE)
        p2 = (((words >> 8) & 15).to(tl.float32) + o2).to(TYPE)
        p3 = (((words >> 12) & 15).to(tl.float32) + o3).to(TYPE)
        planes = (p0, p1, p2, p3)
    elif TYPE == tl.bfloat16:
        planes = tl.inline_asm_elementwise(
            UNPACK4_BF16, "=r,=r,=r,=r,r,r,r,r,r", [words, o0, o1, o2, o3],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        planes = tl.inline_asm_elementwise(
            UNPACK4_FP16, "=r,=r,=r,=r,r,r,r,r,r", [words, o0, o1, o2, o3],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return planes


@triton.jit
def unpack8(words, offset0, offset1, ASM: tl.constexpr, TYPE: tl.constexpr):
    """words [n, 32] → two planes [n, 32] of code − zero, exact in any TYPE; an offset [n] for each plane."""
    o0, o1 = offset0[:, None], offset1[:, None]
    if not ASM:
        planes = (((words & 255).to(tl.float32) + o0).to(TYPE), (((words >> 8) & 255).to(tl.float32) + o1).to(TYPE))
    elif TYPE == tl.bfloat16:
        planes = tl.inline_asm_elementwise(
            UNPACK8_BF16, "=r,=r,r,f,f,f,f", [words, o0, o1],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        planes = tl.inline_asm_elementwise(
            UNPACK8_FP16, "=r,=r,r,r,r", [words, o0, o1], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    return planes


@triton.jit
def side_by_side(planes):
    """Four planes [n, 32] as [n, 128], in registers: one product takes what four would wait for in turn."""
    pairs = tl.join(tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3]))
    return pairs.permute(0, 2, 3, 1).reshape(planes[0].shape[0], 128)


@triton.jit
def load_x(x, m, k, x_stride, is_x, in_features, WHOLE_STEPS: tl.constexpr):
    """Channels ``k`` of the rows ``m`` of x, [k, m]."""
    inside = is_x if WHOLE_STEPS else is_x & (k < in_features)[:, None]
    return tl.load(x + m[None, :] * x_stride + k[:, None], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows", "steps", "steps_per_split", "tiles_m"])
def wna16_kernel(
    x, words, meta, table, bias, out, sums, counters, rows, out_features, in_features, x_stride, steps,
    steps_per_split, tiles_m,
    WHOLE_STEPS: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr, PER_GROUP: tl.constexpr,
    BF16_SCALE: tl.constexpr, SPLIT: tl.constexpr, REDUCED: tl.constexpr, GATED: tl.constexpr, ASM: tl.constexpr,
    JOINED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs, summed over one split of K."""
    PLANES: tl.constexpr = 16 // BITS
    TYPE: tl.constexpr = x.dtype.element_ty
    # Programs that share a tile of the weight are neighbours, so that all but one find it in the cache.
    tile, i = tl.program_id(0) // tiles_m, tl.arange(0, BLOCK_N)
    if GATED:
        # Half of the tile's rows are gate's, and half the same of up's.
        HALF: tl.constexpr = BLOCK_N // 2
        width = out_features // 2
        n = i // HALF * width + tile * HALF + i % HALF
        is_n = tile * HALF + i % HALF < width
    else:
        n = tile * BLOCK_N + i
        is_n = n < out_features
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, 32)
    is_x = (m < rows)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    tile_size = tl.cast(out_features, tl.int64) * 32  # words may have more than 2^31 elements
    first = tl.program_id(1) * steps_per_split
    last = tl.minimum(first + steps_per_split, steps)
    if PDL and JOINED:
        for ahead in tl.static_range(AHEAD):
            at_row = words + (first + ahead) * tile_size + n * 32
            prefetch(at_row, tl.where(is_n & (first + ahead < last), 64, 0))
    wait(PDL)
    if PER_GROUP == 0:
        of_row = tl.load(meta + n, mask=is_n, other=0)
        if NUMBER == "int":
            offset = offset_of(of_row, BITS, ASM, TYPE)
            offsets = (offset, offset, offset, offset)
    # Unlike the launch option, num_stages here stages all loads through shared memory, those of meta too.
    for step in tl.range(first, last, num_stages=STAGES):
        if PER_GROUP > 0:
            # The step has 4 // PER_GROUP groups; here one for each of its planes.
            at = meta + step * (4 // PER_GROUP) * out_features + n
            m0 = tl.load(at, mask=is_n, other=0)
            m1, m2, m3 = m0, m0, m0
            if PER_GROUP == 1:
                m1 = tl.load(at + out_features, mask=is_n, other=0)
            if PER_GROUP <= 2:
                m2 = tl.load(at + (2 // PER_GROUP) * out_features, mask=is_n, other=0)
                m3 = m2
            if PER_GROUP == 1:
                m3 = tl.load(at + 3 * out_features, mask=is_n, other=0)
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
            if not JOINED:
                x_plane = load_x(x, m, step * 128 + plane * 32 + j, x_stride, is_x, in_features, WHOLE_STEPS)
                if PER_GROUP == 0:
                    acc = tl.dot(planes[plane % PLANES], x_plane, acc, input_precision="ieee")
                else:
                    if plane % PER_GROUP == 0:
                        part = tl.dot(planes[plane % PLANES], x_plane, input_precision="ieee")
                    else:
                        part = tl.dot(planes[plane % PLANES], x_plane, part, input_precision="ieee")
                    if plane % PER_GROUP == PER_GROUP - 1:
                        acc += part * scale_of(metas[plane], NUMBER, BF16_SCALE)[:, None]
        if JOINED:
            x_step = load_x(x, m, step * 128 + tl.arange(0, 128), x_stride, is_x, in_features, WHOLE_STEPS)
            if PER_GROUP == 0:
                acc = tl.dot(side_by_side(planes), x_step, acc, input_precision="ieee")
            else:
                part = tl.dot(side_by_side(planes), x_step, input_precision="ieee")
                acc += part * scale_of(metas[0], NUMBER, BF16_SCALE)[:, None]
    if PER_GROUP == 0:
        acc *= scale_of(of_row, NUMBER, BF16_SCALE)[:, None]
    inside = is_x & is_n[:, None]
    at_out = m[None, :].to(tl.int64) * out_features + n[:, None]
    if SPLIT:
        size = tl.cast(rows, tl.int64) * out_features
        tl.store(sums + tl.program_id(1) * size + at_out, acc, mask=inside)
        if REDUCED:
            return
        if not is_last(counters + tl.program_id(0)):
            return
        acc = sum_splits(sums, at_out, inside, size, tl.num_programs(1))
    if bias is not None:
        acc += tl.load(bias + n, mask=is_n, other=0.0).to(tl.float32)[:, None]
    y = acc.to(TYPE)
    if GATED:
        gate, up = tl.split(y.reshape(2, HALF, BLOCK_M).permute(1, 2, 0))
        y = silu_product(gate, up)
        column = tile * HALF + tl.arange(0, HALF)
        inside = is_x & (column < width)[:, None]
        at_out = m[None, :].to(tl.int64) * width + column[:, None]
    tl.store(out + at_out, y, mask=inside)


@triton.jit
def dequantize_kernel(
    words, meta, table, weight, out_features, in_features,
    WHOLE_STEPS: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr, PER_GROUP: tl.constexpr,
    BF16_SCALE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of K of one tile of rows of the weight."""
    PLANES: tl.constexpr = 16 // BITS
    step = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, 32)
    is_n = n < out_features
    for index in tl.static_range(4):
        tile = step * (4 // PLANES) + index // PLANES
        at = (tile.to(tl.int64) * out_features + n)[:, None] * 32 + j[None, :]
        packed = tl.load(words + at, mask=is_n[:, None], other=0)
        codes = (packed >> (index % PLANES * BITS)) & (2**BITS - 1)
        group = 0 if PER_GROUP == 0 else step * (4 // PER_GROUP) + index // PER_GROUP
        of_group = tl.load(meta + group * out_features + n, mask=is_n, other=0)
        if NUMBER == "e4m3":
            values = e4m3(codes, tl.float32)
        elif NUMBER != "int":
            values = tl.load(table + codes.to(tl.int32))
        else:
            values = codes.to(tl.float32) - (of_group >> 16).to(tl.float32)[:, None]
        wide = values * scale_of(of_group, NUMBER, BF16_SCALE)[:, None]
        k = step * 128 + index * 32 + j
        inside = is_n[:, None] & (k < in_features)[None, :]
        at_weight = n.to(tl.int64)[:, None] * in_features + k[None, :]
        tl.store(weight + at_weight, wide.to(weight.dtype.element_ty), mask=inside)
