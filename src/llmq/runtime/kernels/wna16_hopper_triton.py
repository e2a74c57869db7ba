"""Device code of ``wna16`` for many rows and integers of 4 bits on Hopper, whose matrix unit multiplies while the
threads that asked for it go on. They unpack the next weights meanwhile:

    threads        unpack 0 1 │ scale acc │ unpack 2 3 │ unpack 0 1 of the next step │ wait │ scale acc │ unpack 2 3 …
    matrix unit               │           │ planes 0 1 │ planes 2 3                         │           │ planes 0 1 …
    copies         words and x of STAGES − 1 steps on → shared memory; the first words before x is there

Triton waits for each product, so that this is Gluon, the level below, where layouts and waiting are written out.

The sum of a tile is kept in units of the scale that the step's channels have:

    acc ← acc · (scale of the group before / scale) + Σ plane_i · x[:, the 32 channels of plane i]ᵀ

which takes no registers for the sum of a group, so that a program has a tile of twice the size.
"""

# ruff: noqa: SIM300 (TYPE is no constant but a type)
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

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
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llmq.runtime.kernels.pdl_triton import wait
from llmq.runtime.kernels.split_k_triton import Launch, reduce_splits, steps_per_split
from llmq.runtime.kernels.wna16 import STEP, PackedWeight
from llmq.runtime.kernels.wna16_triton import offset_of, scale_of, unpack_asm
from llmq.scheme import INT

# rows up to → launch parameters, measured on an H200.
LAUNCHES = {64: Launch(64, 128, 4, 3, 264), 128: Launch(128, 128, 4, 3, 132), 256: Launch(256, 128, 8, 3, 132)}
FEWEST_ROWS = 33  # for fewer, the kernel of every GPU is faster
SMALLEST = gl.constexpr(2.0**-64)  # a smaller scale is taken for this, which is nothing beside others
WORDS = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
X = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

LOW_BF16, HIGH_BF16 = (gl.constexpr(unpack_asm("bf16x2", planes, offsets=1)) for planes in ((0, 1), (2, 3)))
LOW_FP16, HIGH_FP16 = (gl.constexpr(unpack_asm("f16x2", planes, offsets=1)) for planes in ((0, 1), (2, 3)))


def takes(x: Tensor, packed: PackedWeight) -> bool:
    """Whether ``wna16_matmul_hopper`` multiplies such rows by such a weight."""
    return (
        len(x) >= FEWEST_ROWS
        and (packed.number, packed.bits, x.element_size()) == (INT, 4, 2)
        and packed.in_features % STEP == 0
        and (packed.group_length % STEP == 0 or packed.group_length >= packed.in_features)
        and x.stride(0) * x.element_size() % 16 == x.data_ptr() % 16 == 0  # or else there is no descriptor of it
    )


def wna16_matmul_hopper(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """``wna16_matmul`` of what it ``takes``; ``x`` is in packed order."""
    (rows, in_features), out_features = x.shape, packed.out_features
    launch = next((launch for most, launch in LAUNCHES.items() if rows <= most), LAUNCHES[256])
    steps = in_features // STEP
    per_split = steps_per_split(triton.cdiv(out_features, launch.block_n), steps, launch.programs)
    splits = triton.cdiv(steps, per_split)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    sums = torch.empty(splits, rows, out_features, dtype=torch.float32, device=x.device) if splits > 1 else None
    tiles_m = triton.cdiv(rows, launch.block_m)
    wna16_hopper_kernel[triton.cdiv(out_features, launch.block_n) * tiles_m, splits](
        TensorDescriptor.from_tensor(x, [launch.block_m, 64], X),
        TensorDescriptor.from_tensor(packed.words.view(-1, 32), [launch.block_n, 32], WORDS),
        packed.meta, bias, out, sums, rows, out_features, steps, per_split, tiles_m,
        STEPS_PER_GROUP=steps if packed.group_length >= in_features else packed.group_length // STEP,
        BF16_SCALE=packed.scale_dtype == torch.bfloat16, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
        STAGES=launch.stages, num_warps=launch.warps, launch_pdl=True,
    )  # fmt: skip
    if sums is not None:
        reduce_splits(sums, None, None, bias, out)
    return out


@gluon.jit
def unpack(words, offsets, HIGH: gl.constexpr, TYPE: gl.constexpr):
    """words [n, 32] → planes 0 and 1, or if HIGH 2 and 3, [n, 32] of code − zero."""
    if TYPE == gl.bfloat16:
        planes = gl.inline_asm_elementwise(
            HIGH_BF16 if HIGH else LOW_BF16, "=r,=r,r,r", [words, offsets],
            dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        planes = gl.inline_asm_elementwise(
            HIGH_FP16 if HIGH else LOW_FP16, "=r,=r,r,r", [words, offsets],
            dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return planes


@gluon.jit
def fetch_words(at_words, words, ready, step, last, slot, n, out_features, BYTES: gl.constexpr):
    """Start the copy of a step's words, and have ``ready`` count them and the step's x; nothing after the last step."""
    is_step = step < last
    mbarrier.expect(ready.index(slot), BYTES, pred=is_step)
    tma.async_copy_global_to_shared(
        at_words, [step * out_features + n, 0], ready.index(slot), words.index(slot), pred=is_step
    )


@gluon.jit
def fetch_x(at_x, x, ready, step, last, slot, m):
    """Start the copy of a step's activations."""
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(
            at_x, [m, step * 128 + half * 64], ready.index(slot), x.index(2 * slot + half), pred=step < last
        )


@gluon.jit
def multiply(plane, x, slot, INDEX: gl.constexpr, acc):
    """Start ``acc`` + plane · x[:, its 32 channels]ᵀ."""
    x_plane = x.index(2 * slot + INDEX // 2).slice(INDEX % 2 * 32, 32, dim=1)
    return warpgroup_mma(plane, x_plane.permute((1, 0)), acc, is_async=True)


@gluon.jit(do_not_specialize=["rows", "steps", "steps_per_split", "tiles_m"])
def wna16_hopper_kernel(
    at_x, at_words, meta, bias, out, sums, rows, out_features, steps, steps_per_split, tiles_m,
    STEPS_PER_GROUP: gl.constexpr, BF16_SCALE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of outputs, summed over one split of K; of x [M, K] and words [tiles · N, 32] there are descriptors."""
    TYPE: gl.constexpr = at_x.dtype
    BYTES: gl.constexpr = BLOCK_N * 64 + BLOCK_M * 256
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    PLANE: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    # Programs that share a tile of the weight are neighbours, so that all but one find it in the cache.
    first_n = gl.program_id(0) // tiles_m * BLOCK_N
    first_m = gl.program_id(0) % tiles_m * BLOCK_M
    first = gl.program_id(1) * steps_per_split
    last = gl.minimum(first + steps_per_split, steps)
    x = gl.allocate_shared_memory(TYPE, [2 * STAGES, BLOCK_M, 64], at_x.layout)
    words = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, 32], at_words.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    for stage in gl.static_range(STAGES - 1):
        fetch_words(at_words, words, ready, first + stage, last, stage, first_n, out_features, BYTES)
    wait(True)
    for stage in gl.static_range(STAGES - 1):
        fetch_x(at_x, x, ready, first + stage, last, stage, first_m)

    n = first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
    is_n = n < out_features
    of_group = gl.load(meta + first // STEPS_PER_GROUP * out_features + n, mask=is_n, other=0)
    unit = gl.full([BLOCK_N], 1.0, gl.float32, layout=gl.SliceLayout(1, MMA))
    acc = warpgroup_mma_init(gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=MMA))
    for step in range(first, last):
        slot = (step - first) % STAGES
        scale = scale_of(of_group, "int", BF16_SCALE)
        scale = gl.where(gl.abs(scale) < SMALLEST, SMALLEST, scale)
        offset = gl.convert_layout(offset_of(of_group, 4, True, TYPE), gl.SliceLayout(1, PLANE))
        of_group = gl.load(
            meta + gl.minimum(step + 1, steps - 1) // STEPS_PER_GROUP * out_features + n, mask=is_n, other=0
        )
        mbarrier.wait(ready.index(slot), (step - first) // STAGES & 1)
        packed, offsets = gl.broadcast(words.index(slot).load(PLANE), offset[:, None])
        plane0, plane1 = unpack(packed, offsets, False, TYPE)
        total = warpgroup_mma_wait(0, [acc]) * (unit / scale)[:, None]
        unit = scale
        acc = multiply(plane0, x, slot, 0, total)
        acc = multiply(plane1, x, slot, 1, acc)
        plane2, plane3 = unpack(packed, offsets, True, TYPE)
        acc = multiply(plane2, x, slot, 2, acc)
        acc = multiply(plane3, x, slot, 3, acc)
        # All warps have waited for their products of the step before, and its slot is free.
        tl.debug_barrier()
        ahead, free = step + STAGES - 1, (step - first + STAGES - 1) % STAGES
        fetch_words(at_words, words, ready, ahead, last, free, first_n, out_features, BYTES)
        fetch_x(at_x, x, ready, ahead, last, free, first_m)
    total = warpgroup_mma_wait(0, [acc]) * unit[:, None]
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))
    m = first_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
    inside = (m < rows)[None, :] & is_n[:, None]
    at_out = m[None, :].to(gl.int64) * out_features + n[:, None]
    if sums is not None:
        gl.store(sums + gl.program_id(1).to(gl.int64) * rows * out_features + at_out, total, mask=inside)
    else:
        if bias is not None:
            total += gl.load(bias + n, mask=is_n, other=0.0).to(gl.float32)[:, None]
        gl.store(out + at_out, total.to(TYPE), mask=inside)
