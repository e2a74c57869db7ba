"""Device code of ``wna16`` for many rows and integers of 4 bits on Hopper, whose matrix unit multiplies while the
threads that asked for it go on.

One warpgroup unpacks the next weights meanwhile, and asks for words and x of STAGES − 1 steps on:

    threads         unpack 0 1 │ wait, scale acc │ multiply 0 1 │ unpack 2 3 │ multiply 2 3 │ fetch │ wait for 0 1 …
    matrix unit     planes 2 3 of the step before               │ planes 0 1              │ planes 2 3            …

Of a big tile two warpgroups have half of the channels each. While one waits for its products, the matrix unit has
those of the other, or the other unpacks; they meet nowhere, and so take turns by themselves. One more warp fetches:

    4 warps         wait for a step │ unpack, multiply │ wait │ its slot is free, scale acc │ wait for a step │ unpack …
    4 warps         … │ wait │ its slot is free, scale acc │ wait for a step │ unpack, multiply │ wait │ its slot is …
    1 warp          words and x of a step → each slot that both are done with; the first words before x is there

Triton waits for each product and gives all warps one task, so that this is Gluon, the level below.

The sum of a tile is kept in units of the scale that the step's channels have:

    acc ← acc · (scale of the group before / scale) + Σ plane_i · x[:, the 32 channels of plane i]ᵀ

which takes no registers for the sum of a group, so that a program has a tile of twice the size. A tensor has a power of
two of rows, but a tile may have two sums: one of 160 rows has one of 128 and one of 32.

The matrix unit reads a plane from registers, which the compiler gives to others as soon as nobody names it: who waits
for a product names its planes.
"""

# ruff: noqa: SIM300 (TYPE is no constant but a type)
# mypy: disable-error-code="assignment, untyped-decorator, no-untyped-def, no-untyped-call"

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

from llmq.runtime.kernels.pdl_triton import wait
from llmq.runtime.kernels.split_k_triton import Launch, reduce_splits, steps_per_split
from llmq.runtime.kernels.wna16 import STEP, PackedWeight
from llmq.runtime.kernels.wna16_triton import offset_of, scale_of, unpack_asm
from llmq.scheme import INT

# Rows up to → launch parameters, measured on an H200; 8 warps are two warpgroups that take turns.
LAUNCHES = {64: Launch(64, 128, 4, 4, 264), 128: Launch(128, 128, 4, 3, 132), 256: Launch(256, 128, 8, 3, 132)}
# Where whole tiles of so many outputs keep most multiprocessors busy.
WIDE = {64: Launch(64, 256, 8, 4, 132), 128: Launch(128, 256, 8, 3, 132)}
UNIT = 32  # rows: a tile has no more of them than it must
BOX = 64  # of them in one copy, by a warp that does nothing else
REGISTERS = gl.constexpr(240)  # of a thread that multiplies, where another warp fetches
FETCHING = gl.constexpr(24)  # of one of that warp
AVERAGE = 168  # of both warpgroups and the four warps that the fetching one counts as: all there are
FEWEST_ROWS = 33  # for fewer, the kernel of every GPU is faster
MOST_ROWS = 512  # for more, widening the weight once and multiplying through the library is faster
SMALLEST = gl.constexpr(2.0**-64)  # a smaller scale is taken for this, which is nothing beside others
WORDS = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
X = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

LOW_BF16, HIGH_BF16 = (gl.constexpr(unpack_asm("bf16x2", planes, offsets=1)) for planes in ((0, 1), (2, 3)))
LOW_FP16, HIGH_FP16 = (gl.constexpr(unpack_asm("f16x2", planes, offsets=1)) for planes in ((0, 1), (2, 3)))


def takes(x: Tensor, packed: PackedWeight) -> bool:
    """Whether ``wna16_matmul_hopper`` multiplies such rows by such a weight."""
    return (
        FEWEST_ROWS <= len(x) <= MOST_ROWS
        and (packed.number, packed.bits, x.element_size()) == (INT, 4, 2)
        and packed.in_features % STEP == 0
        and (packed.group_length % STEP == 0 or packed.group_length >= packed.in_features)
        and x.stride(0) * x.element_size() % 16 == x.data_ptr() % 16 == 0  # or else there is no descriptor of it
    )


def launch_for(rows: int, out_features: int) -> Launch:
    """Launch parameters of a product of ``rows`` by a weight [out_features, K]."""
    enough = out_features // WIDE[64].block_n >= WIDE[64].programs * 3 // 4
    table = LAUNCHES | WIDE if enough else LAUNCHES
    return next((launch for most, launch in table.items() if rows <= most), table[256])


def rows_of_tile(rows: int, tiles: int) -> int:
    """What each of ``tiles`` has of ``rows``, in whole UNITs: of one power of two or two of them."""
    tile = -(-rows // (tiles * UNIT)) * UNIT
    return tile if tile.bit_count() <= 2 else 1 << tile.bit_length()


def wna16_matmul_hopper(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """``wna16_matmul`` of what it ``takes``; ``x`` is in packed order."""
    (rows, in_features), out_features = x.shape, packed.out_features
    launch = launch_for(rows, out_features)
    steps, tiles_n = in_features // STEP, triton.cdiv(out_features, launch.block_n)
    tiles_m = triton.cdiv(rows, launch.block_m)
    per_split = steps_per_split(tiles_n * tiles_m, steps, launch.programs)
    splits = triton.cdiv(steps, per_split)
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    sums = torch.empty(splits, rows, out_features, dtype=torch.float32, device=x.device) if splits > 1 else None
    turns = launch.warps == 8
    wna16_hopper_kernel[tiles_n * tiles_m, splits](
        TensorDescriptor.from_tensor(x, [BOX if turns else launch.block_m, 64], X),
        TensorDescriptor.from_tensor(packed.words.view(-1, 32), [launch.block_n, 32], WORDS),
        packed.meta, bias, out, sums, rows, out_features, steps, per_split, tiles_m,
        STEPS_PER_GROUP=steps if packed.group_length >= in_features else packed.group_length // STEP,
        BF16_SCALE=packed.scale_dtype == torch.bfloat16, TILE_M=rows_of_tile(rows, tiles_m), TURNS=turns,
        BLOCK_M=launch.block_m, STAGES=launch.stages, num_warps=4, maxnreg=AVERAGE if turns else None, launch_pdl=True,
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


@gluon.constexpr_function
def parts_of(tile_m):
    """How many sums there are of a tile's rows, each of a power of two of them."""
    return tile_m.bit_count()


@gluon.constexpr_function
def rows_of(tile_m, part):
    """Of the larger part or the smaller."""
    larger = 1 << tile_m.bit_length() - 1
    return larger if part == 0 else tile_m - larger


@gluon.constexpr_function
def first_of(tile_m, part):
    return 0 if part == 0 else rows_of(tile_m, 0)


@gluon.constexpr_function
def sum_layout(tile_m, part):
    """How the sum [n, rows] of that part of a tile's rows lies in the registers of a warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows_of(tile_m, part), 16])


@gluon.jit
def fetch_words(at_words, words, ready, step, last, slot, n, out_features, BYTES: gl.constexpr):
    """Start the copy of a step's words, and have ``ready`` count them and the step's x; nothing after the last step."""
    is_step = step < last
    mbarrier.expect(ready.index(slot), BYTES, pred=is_step)
    tma.async_copy_global_to_shared(
        at_words, [step * out_features + n, 0], ready.index(slot), words.index(slot), pred=is_step
    )


@gluon.jit
def fetch_x(at_x, x, ready, step, last, slot, m, TILE_M: gl.constexpr):
    """Start the copy of a step's activations, in boxes: what is outside of x takes as long."""
    BOX: gl.constexpr = at_x.block_type.shape[0]
    for half in gl.static_range(2):
        for box in gl.static_range((TILE_M + BOX - 1) // BOX):
            tma.async_copy_global_to_shared(
                at_x, [m + box * BOX, step * 128 + half * 64], ready.index(slot),
                x.index(2 * slot + half).slice(box * BOX, BOX), pred=step < last,
            )  # fmt: skip


@gluon.jit
def multiply(plane, x, slot, INDEX: gl.constexpr, sums, TILE_M: gl.constexpr):
    """Start, for each part of the rows, its sum + plane · x[rows, the 32 channels of the plane]ᵀ."""
    x_plane = x.index(2 * slot + INDEX // 2).slice(INDEX % 2 * 32, 32, dim=1)
    started = ()
    for part in gl.static_range(len(sums)):
        rows = x_plane.slice(first_of(TILE_M, part), rows_of(TILE_M, part), dim=0).permute((1, 0))
        factor = gl.convert_layout(plane, gl.DotOperandLayout(0, sum_layout(TILE_M, part), 2), assert_trivial=True)
        started += (warpgroup_mma(factor, rows, sums[part], is_async=True),)
    return started


@gluon.jit
def wait_for(RUNNING: gl.constexpr, sums, planes):
    """Wait until no more than RUNNING planes are being multiplied, and ``planes`` are not."""
    waited = warpgroup_mma_wait(RUNNING * len(sums), sums + planes)
    done = ()
    for part in gl.static_range(len(sums)):
        done += (waited[part],)
    return done


@gluon.jit
def scaled(sums, factor, TILE_M: gl.constexpr):
    """sums [n, rows of a part] · factor [n]"""
    products = ()
    for part in gl.static_range(len(sums)):
        of_part = gl.convert_layout(factor, gl.SliceLayout(1, sum_layout(TILE_M, part)), assert_trivial=True)
        products += (sums[part] * of_part[:, None],)
    return products


@gluon.jit
def store(total, bias, out, sums, rows, out_features, first_m, first_n):
    """total [n, m] + bias → out, or total → this split's sums."""
    m = first_m + gl.arange(0, total.shape[1], layout=gl.SliceLayout(0, total.type.layout))
    n = first_n + gl.arange(0, total.shape[0], layout=gl.SliceLayout(1, total.type.layout))
    is_n = n < out_features
    inside = (m < rows)[None, :] & is_n[:, None]
    at_out = m[None, :].to(gl.int64) * out_features + n[:, None]
    if sums is not None:
        gl.store(sums + gl.program_id(1).to(gl.int64) * rows * out_features + at_out, total, mask=inside)
    else:
        if bias is not None:
            total += gl.load(bias + n, mask=is_n, other=0.0).to(gl.float32)[:, None]
        gl.store(out + at_out, total.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def fetch(inputs, slots, size, tile, TILE_M: gl.constexpr, BYTES: gl.constexpr):
    """Ask for all steps: of STAGES the words at once and x when it is there, of the others both when a slot is free."""
    at_x, at_words, _, _ = inputs
    x, words, ready, free = slots
    _, out_features, _ = size
    first_m, first_n, first, last = tile
    STAGES: gl.constexpr = words.shape[0]
    for stage in gl.static_range(STAGES):
        fetch_words(at_words, words, ready, first + stage, last, stage, first_n, out_features, BYTES)
    wait(True)
    for stage in gl.static_range(STAGES):
        fetch_x(at_x, x, ready, first + stage, last, stage, first_m, TILE_M)
    for step in range(first + STAGES, last):
        slot = (step - first) % STAGES
        mbarrier.wait(free.index(slot), ((step - first) // STAGES & 1) ^ 1)
        fetch_words(at_words, words, ready, step, last, slot, first_n, out_features, BYTES)
        fetch_x(at_x, x, ready, step, last, slot, first_m, TILE_M)


@gluon.jit
def multiply_part(
    inputs, slots, outputs, size, tile, PART: gl.constexpr, PARTS: gl.constexpr, TILE_M: gl.constexpr,
    BYTES: gl.constexpr, STEPS_PER_GROUP: gl.constexpr, BF16_SCALE: gl.constexpr,
):  # fmt: skip
    """What a warpgroup does: PART of PARTS of the tile's weights. One that is alone also fetches what it multiplies,
    and unpacks the next planes while the last ones are multiplied; one of two leaves the matrix unit to the other."""
    at_x, at_words, meta, bias = inputs
    x, words, ready, free = slots
    out, sums = outputs
    rows, out_features, steps = size
    first_m, first_n, first, last = tile
    TYPE: gl.constexpr = at_x.dtype
    STAGES: gl.constexpr = words.shape[0]
    CHANNELS: gl.constexpr = words.shape[1] // PARTS
    SUM: gl.constexpr = sum_layout(TILE_M, 0)
    PLANE: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    n = first_n + PART * CHANNELS + gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, SUM))
    is_n = n < out_features
    of_group = gl.load(meta + first // STEPS_PER_GROUP * out_features + n, mask=is_n, other=0)
    unit = gl.full([CHANNELS], 1.0, gl.float32, layout=gl.SliceLayout(1, SUM))
    acc = ()
    for part in gl.static_range(parts_of(TILE_M)):
        acc += (gl.zeros([CHANNELS, rows_of(TILE_M, part)], gl.float32, layout=sum_layout(TILE_M, part)),)
    plane2 = gl.zeros([CHANNELS, 32], TYPE, layout=PLANE)
    plane3 = plane2
    for step in range(first, last):
        slot = (step - first) % STAGES
        scale = scale_of(of_group, "int", BF16_SCALE)
        scale = gl.where(gl.abs(scale) < SMALLEST, SMALLEST, scale)
        offset = gl.convert_layout(offset_of(of_group, 4, True, TYPE), gl.SliceLayout(1, PLANE))
        of_group = gl.load(
            meta + gl.minimum(step + 1, steps - 1) // STEPS_PER_GROUP * out_features + n, mask=is_n, other=0
        )
        mbarrier.wait(ready.index(slot), (step - first) // STAGES & 1)
        packed, offsets = gl.broadcast(words.index(slot).slice(PART * CHANNELS, CHANNELS).load(PLANE), offset[:, None])
        plane0, plane1 = unpack(packed, offsets, False, TYPE)
        if PARTS == 1:
            acc = wait_for(0, acc, (plane2, plane3))
        acc = multiply(plane0, x, slot, 0, scaled(acc, unit / scale, TILE_M), TILE_M)
        unit = scale
        acc = multiply(plane1, x, slot, 1, acc, TILE_M)
        plane2, plane3 = unpack(packed, offsets, True, TYPE)
        acc = multiply(plane2, x, slot, 2, acc, TILE_M)
        acc = multiply(plane3, x, slot, 3, acc, TILE_M)
        if PARTS == 1:
            # All warps have waited for their products of the step before, and its slot is free.
            tl.debug_barrier()
            ahead, before = step + STAGES - 1, (step - first + STAGES - 1) % STAGES
            fetch_words(at_words, words, ready, ahead, last, before, first_n, out_features, BYTES)
            fetch_x(at_x, x, ready, ahead, last, before, first_m, TILE_M)
            acc = wait_for(2, acc, (plane0, plane1))
        else:
            acc = wait_for(0, acc, (plane0, plane1, plane2, plane3))
            mbarrier.arrive(free.index(slot), count=1)
    if PARTS == 1:
        acc = wait_for(0, acc, (plane2, plane3))
    acc = scaled(acc, unit, TILE_M)
    for part in gl.static_range(len(acc)):
        store(
            acc[part], bias, out, sums, rows, out_features, first_m + first_of(TILE_M, part),
            first_n + PART * CHANNELS,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["rows", "steps", "steps_per_split", "tiles_m"])
def wna16_hopper_kernel(
    at_x, at_words, meta, bias, out, sums, rows, out_features, steps, steps_per_split, tiles_m,
    STEPS_PER_GROUP: gl.constexpr, BF16_SCALE: gl.constexpr, TILE_M: gl.constexpr, TURNS: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of outputs, summed over one split of K; of x [M, K] and words [tiles · N, 32] there are descriptors."""
    BLOCK_N: gl.constexpr = at_words.block_type.shape[0]
    BOX: gl.constexpr = at_x.block_type.shape[0]
    BYTES: gl.constexpr = BLOCK_N * 64 + (TILE_M + BOX - 1) // BOX * BOX * 256
    # Programs that share a tile of the weight are neighbours, so that all but one find it in the cache.
    first_n = gl.program_id(0) // tiles_m * BLOCK_N
    first_m = gl.program_id(0) % tiles_m * TILE_M
    first = gl.program_id(1) * steps_per_split
    last = gl.minimum(first + steps_per_split, steps)
    x = gl.allocate_shared_memory(at_x.dtype, [2 * STAGES, BLOCK_M, 64], at_x.layout)
    words = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, 32], at_words.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    inputs = (at_x, at_words, meta, bias)
    slots = (x, words, ready, free)
    outputs = (out, sums)
    size = (rows, out_features, steps)
    tile = (first_m, first_n, first, last)
    if TURNS:
        gl.warp_specialize(
            [(multiply_part, (inputs, slots, outputs, size, tile, 0, 2, TILE_M, BYTES, STEPS_PER_GROUP, BF16_SCALE)),
             (multiply_part, (inputs, slots, outputs, size, tile, 1, 2, TILE_M, BYTES, STEPS_PER_GROUP, BF16_SCALE)),
             (fetch, (inputs, slots, size, tile, TILE_M, BYTES))],
            [4, 1], [REGISTERS, FETCHING],
        )  # fmt: skip
    else:
        for stage in gl.static_range(STAGES - 1):
            fetch_words(at_words, words, ready, first + stage, last, stage, first_n, out_features, BYTES)
        wait(True)
        for stage in gl.static_range(STAGES - 1):
            fetch_x(at_x, x, ready, first + stage, last, stage, first_m, TILE_M)
        multiply_part(inputs, slots, outputs, size, tile, 0, 1, TILE_M, BYTES, STEPS_PER_GROUP, BF16_SCALE)
