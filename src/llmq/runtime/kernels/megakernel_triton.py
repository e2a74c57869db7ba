"""Device code of ``megakernel``.

One program on each of PROGRAMS multiprocessors, all there at once. Each has its share of the rows of every weight, over
all of K, so that no two add to one output; what it reads of them is one stream, through a ring of shared memory that is
filled ahead, whatever the program waits for:

    memory           o … │ gate, up …             │ down …            │ q, k, v …
    matrix unit          o … │ barrier │ gate, up …       │ barrier │ down …      │ barrier │ q, k, v …

    ring  [STAGES, WARPS, 32 rows, LANE]    a chunk: 32 rows of a weight, a slice of LANE channels for each warp
    x     [channels of BLOCK, 8 rows]       what the weight's rows are multiplied by, in slices of LANE channels too

    acc [WARPS, 16, 8]  += w [WARPS, 16, LANE] · x [WARPS, LANE, 8]       for each half of a chunk's rows
    out [16, 8]          = Σ over the warps

Of 4 bits, a slice is a tile of 128 channels as ``wna16`` packs them, 64 bytes of a row, and each warp has two. Scales
and zero points come with the words; a word's planes are side by side in registers, as the instruction takes them:

    metas [STAGES, 16 tiles, 32 rows]
    acc [tiles, 16, 8]  += scale [tiles, 16] · ((words − zero) [tiles, 16, 128] · x [tiles, 128, 8])

The halves are of gate and up where silu takes both, and neighbours elsewhere. A barrier of the grid stands where a norm
or a product takes whole rows of what all programs computed; each then brings these rows into its x, through the norm
and the rounding to 8 bits, for itself. Of more than one row, rounding takes longer than another barrier does: there
each program rounds its own channels for all.

    own channels, Σ x², max|x| │ barrier │ own channels through the norm, rounded │ barrier │ all channels → x
"""

# ruff: noqa: SIM102, SIM300 (a type is no constant, and the device would compute an `and`)
# mypy: disable-error-code="assignment, untyped-decorator, no-untyped-def, no-untyped-call"

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from llmq.runtime.kernels.megakernel import (
    CHUNK_BYTES,
    LONGEST,
    MOST_ROWS,
    PROGRAMS,
    ROWS,
    STAGES,
    Between,
    Weight,
)
from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.quantize_rows import CODES, LARGEST, SMALLEST_MAX
from llmq.runtime.kernels.quantize_rows_triton import rounded
from llmq.runtime.kernels.rope_triton import normed
from llmq.runtime.kernels.silu_triton import silu_product
from llmq.runtime.kernels.split_k_triton import scaled
from llmq.runtime.kernels.wna16 import PLANE, PackedWeight
from llmq.runtime.kernels.wna16_triton import scale_of

WARPS = gl.constexpr(CHUNK_BYTES // 128)
HALF = gl.constexpr(ROWS // 2)  # what an instruction takes
BLOCK = gl.constexpr(LONGEST)
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
METAS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
AT_METAS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0]))
# The lowest 8 bits of a bf16 alone are that integer · 2^-133, subnormal or not: a code is a number where it stands, and
# only those of the upper byte are moved. Even planes are codes · 2^-133, and odd ones 16 times that; x makes up for it
# by EVEN and ODD, so large that products stay within fp32's range. Sums are of the UNIT 2^-69 then.
UNPACK = gl.constexpr(
    "{ .reg .b32 t; and.b32 $0, $4, 0x000F000F; and.b32 $1, $4, 0x00F000F0;"
    "shr.u32 t, $4, 8; and.b32 $2, t, 0x000F000F; and.b32 $3, t, 0x00F000F0; }"
)
EVEN, ODD = gl.constexpr(2.0**64), gl.constexpr(2.0**60)
UNIT = gl.constexpr(2.0**-69)
TINY = gl.constexpr(SMALLEST_MAX)
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [8, 1, 1], [1, 16, 8]))
SUMS = gl.constexpr(gl.BlockedLayout([8, 1, 1], [1, 4, 8], [1, 4, 2], [2, 1, 0]))  # a sum over the warps in one thread
OUT = gl.constexpr(gl.SliceLayout(0, SUMS))
WORDS = gl.constexpr(gl.BlockedLayout([1, 1, 4], [4, 1, 8], [1, 8, 1], [2, 1, 0]))  # [slices, rows, words of a slice]
OWN = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [8, 1], [1, 0]))  # [rows, channels of the program]
FOUND = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [8, 1], [1, 0]))  # [rows, programs]


@gluon.constexpr_function
def operand(index, width):
    """Of numbers of so many bytes, as the instruction takes them."""
    return gl.DotOperandLayout(index, MMA, 4 // width)


@gluon.constexpr_function
def swizzled(width):
    """Of [slices, rows, LANE], where a slice of a row is 128 bytes."""
    return gl.SwizzledSharedLayout(16 // width, 1, 8, [2, 1, 0])


@gluon.constexpr_function
def spread(width, rows):
    """[slices, rows, LANE] in registers, 16 bytes a thread: of one row all warps take slices, of more a row each."""
    warps = {1: [8, 1, 1], 8: [1, 8, 1], 32: [2, 4, 1]}[rows]
    return gl.BlockedLayout([1, 1, 16 // width], [4, 1, 8], warps, [2, 1, 0])


@gluon.constexpr_function
def ring_shape(type, stages):
    """[stages, slices, rows, LANE], in elements of ``type``."""
    if type == gl.int16:
        return [int(stages), CHUNK_BYTES // (2 * PLANE), ROWS, PLANE]
    return [int(stages), CHUNK_BYTES // 128, ROWS, 1024 // type.primitive_bitwidth]


@gluon.constexpr_function
def ring_layouts(type):
    """Of a chunk, in shared memory and in the registers of those who copy it, 16 bytes a thread."""
    width = type.primitive_bitwidth // 8
    if type == gl.int16:
        return gl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0]), gl.BlockedLayout([1, 1, 8], [1, 8, 4], [2, 4, 1], [2, 1, 0])
    return swizzled(width), spread(width, 32)


@gluon.constexpr_function
def chunk_of(type):
    """Channels of a chunk."""
    return CHUNK_BYTES * (4 if type == gl.int16 else 1) * 8 // type.primitive_bitwidth


@gluon.constexpr_function
def pieces(channels, share, gated, type):
    """Chunks of a program's share of the rows of a weight."""
    return -(-int(share) // (ROWS // 2 if gated else ROWS)) * (int(channels) // chunk_of(type))


@gluon.constexpr_function
def power_of_2(number):
    """The next one."""
    return triton.next_power_of_2(int(number))


@gluon.constexpr_function
def block_of(channels):
    """So many of a row's channels are in registers at once."""
    return min(int(BLOCK), triton.next_power_of_2(int(channels)))


@gluon.jit
def rows_of(row, tile, SHARE: gl.constexpr, GATED: gl.constexpr):
    """The rows of a weight that are the rows ``row`` of a chunk, and which of them the program has.

    It has SHARE of the rows; if GATED, SHARE of the gate's, and as many, as far behind, of up's.
    """
    if GATED:
        within = tile * HALF + row % HALF
        n = row // HALF * (gl.num_programs(0) * SHARE) + gl.program_id(0) * SHARE + within
    else:
        within = tile * 2 * HALF + row
        n = gl.program_id(0) * SHARE + within
    return n, within < SHARE


@gluon.jit
def fetch(ring, metas, weight, scales, piece, slot, K: gl.constexpr, SHARE: gl.constexpr, GATED: gl.constexpr):
    """Start the copy of chunk number ``piece`` of the program's rows of a weight into a slot of the ring."""
    SLICES: gl.constexpr = ring.shape[1]
    LANE: gl.constexpr = ring.shape[3]
    LAYOUT: gl.constexpr = ring_layouts(ring.dtype)[1]
    CHUNKS: gl.constexpr = K // chunk_of(ring.dtype)
    tile, chunk = piece // CHUNKS, piece % CHUNKS
    part = gl.arange(0, SLICES, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    row = gl.arange(0, 2 * HALF, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    lane = gl.arange(0, LANE, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    n, inside = rows_of(row, tile, SHARE, GATED)
    if metas is None:
        at = n * K + (chunk * SLICES + part) * LANE + lane
    else:
        all_rows = gl.num_programs(0) * SHARE * (2 if GATED else 1)
        at = ((chunk * SLICES + part) * all_rows + n) * LANE + lane
        group = gl.arange(0, SLICES, layout=gl.SliceLayout(1, AT_METAS))[:, None]
        n, is_meta = rows_of(gl.arange(0, 2 * HALF, layout=gl.SliceLayout(0, AT_METAS))[None, :], tile, SHARE, GATED)
        is_meta, at_metas = gl.broadcast(is_meta, (chunk * SLICES + group) * all_rows + n)
        async_copy.async_copy_global_to_shared(metas.index(slot), scales + at_metas, mask=is_meta)
    inside, at = gl.broadcast(inside, at)
    async_copy.async_copy_global_to_shared(ring.index(slot), weight + at, mask=inside)


@gluon.jit
def widen(words):
    """words [tiles, rows, 32] → their codes [tiles, rows, 128], as UNPACK says; both as the instruction takes them."""
    planes = gl.inline_asm_elementwise(
        UNPACK, "=r,=r,=r,=r,r", [words],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip
    pairs = gl.join(gl.join(planes[0], planes[2]), gl.join(planes[1], planes[3])).permute((0, 1, 3, 4, 2))
    whole = pairs.reshape((words.shape[0], words.shape[1], 4 * words.shape[2]))
    return gl.convert_layout(whole, operand(0, 2), assert_trivial=True)


@gluon.jit
def sums_of(x, acc):
    """For each of ``acc``, the sum of its tile's x."""
    ones = gl.full([acc.shape[0], acc.shape[1], x.shape[1] // 4], 0x1111, gl.int16, operand(0, 2))
    return mma_v2(widen(ones), x, gl.zeros_like(acc))


@gluon.jit
def add_words(acc, words, metas, x, x_sums, BF16_SCALE: gl.constexpr):
    """``acc`` + scale · (words − zero) · x."""
    zero = (metas >> 16).to(gl.float32)[:, :, None]
    part = mma_v2(widen(words), x, gl.zeros_like(acc)) - zero * x_sums
    return acc + part * scale_of(metas, "int", BF16_SCALE)[:, :, None]


@gluon.jit
def add_chunk(acc_0, acc_1, ring, metas, slot, x, x_sums, BF16_SCALE: gl.constexpr):
    """``acc_0`` and ``acc_1`` + the halves of the chunk in a slot · x."""
    WIDTH: gl.constexpr = ring.dtype.primitive_bitwidth // 8
    w_0 = ring.index(slot).slice(0, HALF, dim=1).load(operand(0, WIDTH))
    w_1 = ring.index(slot).slice(HALF, HALF, dim=1).load(operand(0, WIDTH))
    if metas is not None:
        metas_0 = metas.index(slot).slice(0, HALF, dim=1).load(gl.SliceLayout(2, MMA))
        metas_1 = metas.index(slot).slice(HALF, HALF, dim=1).load(gl.SliceLayout(2, MMA))
        acc_0 = add_words(acc_0, w_0, metas_0, x, x_sums, BF16_SCALE)
        acc_1 = add_words(acc_1, w_1, metas_1, x, x_sums, BF16_SCALE)
    else:
        if WIDTH == 1 and acc_0.dtype == gl.float32:  # the small instruction has no FP8 on Hopper
            x, w_0, w_1 = x.to(gl.float16), w_0.to(gl.float16), w_1.to(gl.float16)
        acc_0, acc_1 = mma_v2(w_0, x, acc_0), mma_v2(w_1, x, acc_1)
    return acc_0, acc_1


@gluon.jit
def turn(
    ring, metas, weight, scales, next_weight, next_scales, piece, slot,
    K: gl.constexpr, SHARE: gl.constexpr, GATED: gl.constexpr,
    NEXT_K: gl.constexpr, NEXT_SHARE: gl.constexpr, NEXT_GATED: gl.constexpr,
):  # fmt: skip
    """Wait for chunk number ``piece``, in ``slot``; start the copy of a later one into the slot before."""
    STAGES: gl.constexpr = ring.shape[0]
    PIECES: gl.constexpr = pieces(K, SHARE, GATED, ring.dtype)
    async_copy.wait_group(STAGES - 2)
    tl.debug_barrier()  # all have multiplied the chunk before: its slot is free
    ahead, free = piece + STAGES - 1, (slot + STAGES - 1) % STAGES
    if ahead < PIECES:
        fetch(ring, metas, weight, scales, ahead, free, K, SHARE, GATED)
    elif next_weight is not None:
        if ahead - PIECES < pieces(NEXT_K, NEXT_SHARE, NEXT_GATED, ring.dtype):
            fetch(ring, metas, next_weight, next_scales, ahead - PIECES, free, NEXT_K, NEXT_SHARE, NEXT_GATED)
    async_copy.commit_group()


@gluon.jit
def channels(first, WIDTH: gl.constexpr, CHANNELS: gl.constexpr, BLOCK_M: gl.constexpr):
    """The CHANNELS from ``first`` on, as ``load_rows`` has them: [slices, 1, LANE]."""
    LANE: gl.constexpr = 128 // WIDTH
    LAYOUT: gl.constexpr = spread(WIDTH, BLOCK_M)
    piece = gl.arange(0, CHANNELS // LANE, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    lane = gl.arange(0, LANE, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    return first + piece * LANE + lane


@gluon.jit
def load_norm(norm, WIDTH: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr):
    """A norm's weight [slices, 1, LANE]."""
    k = channels(0, WIDTH, block_of(K), BLOCK_M)
    return gl.load(norm + k, mask=k < K, other=0.0)


@gluon.jit
def load_rows(source, first, rows, WIDTH: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr):
    """A block of the channels of ``source`` [rows, K], from ``first`` on: [slices, BLOCK_M, LANE]."""
    LAYOUT: gl.constexpr = spread(WIDTH, BLOCK_M)
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    k = channels(first, WIDTH, block_of(K), BLOCK_M)
    return gl.load(source + m * K + k, mask=(m < rows) & (k < K), other=0.0, cache_modifier=".cg")


@gluon.jit
def load_codes(codes, block, rows, K: gl.constexpr):
    """Block number ``block`` of the channels of ``codes`` [rows, K], four to a word: [slices, 8, 32]."""
    SLICES: gl.constexpr = block_of(K) // 128
    part = gl.arange(0, SLICES, layout=gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None, None]
    m = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :, None]
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    k = (block * SLICES + part) * 32 + word
    words = codes.to(gl.pointer_type(gl.int32), bitcast=True)
    return gl.load(words + m * (K // 4) + k, mask=(m < rows) & (k < K // 4), other=0, cache_modifier=".cg")


@gluon.jit
def load_block(source, block, rows, WIDTH: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr):
    """A block of the channels of ``source``, rows or codes, as ``put`` takes them."""
    if source.dtype.element_ty.primitive_bitwidth == 8:
        values = load_codes(source, block, rows, K)
    else:
        values = load_rows(source, block * BLOCK, rows, WIDTH, K, BLOCK_M)
    return values


@gluon.jit
def by_row(values, LAYOUT: gl.constexpr, GREATEST: gl.constexpr):
    """The sum, or GREATEST, of each row of ``values`` [slices, rows, LANE]: [rows]."""
    flat = values.permute((1, 0, 2)).reshape((values.shape[1], values.shape[0] * values.shape[2]))
    found = gl.max(flat, 1) if GREATEST else gl.sum(flat, 1)
    return gl.convert_layout(found, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))


@gluon.jit
def through_norm(values, w, eps, WIDTH: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr):
    """Whole rows through a norm of weight ``w``."""
    wide = values.to(gl.float32)
    squares = by_row(wide * wide, spread(WIDTH, BLOCK_M), False)
    return normed(values, gl.rsqrt(squares / K + eps)[None, :, None], w)


@gluon.jit
def greatest(values, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr):
    """max|row| of whole rows."""
    return gl.maximum(by_row(gl.abs(values.to(gl.float32)), spread(WIDTH, BLOCK_M), True), TINY)


@gluon.jit
def load_found(found, number: gl.constexpr, PROGRAMS: gl.constexpr):
    """What each program found of its channels of each row: the sum of their squares (0), the greatest (1)."""
    m = gl.arange(0, 8, layout=gl.SliceLayout(1, FOUND))[:, None]
    program = gl.arange(0, PROGRAMS, layout=gl.SliceLayout(0, FOUND))[None, :]
    return gl.load(found + (number * 8 + m) * PROGRAMS + program, cache_modifier=".cg")


@gluon.jit
def load_greatest(found, WIDTH: gl.constexpr, PROGRAMS: gl.constexpr):
    """max|row| of one row."""
    most = gl.max(gl.max(load_found(found, 1, PROGRAMS), 1), 0)  # what other rows have is 0
    return gl.full([1], gl.maximum(most, TINY), gl.float32, gl.SliceLayout(0, gl.SliceLayout(2, spread(WIDTH, 1))))


@gluon.jit
def in_8_bits(values, most, TYPE: gl.constexpr, LARGEST: gl.constexpr):
    """``values`` as codes of TYPE, by the scale that ``most`` gives; see ``round_own`` for what is clipped."""
    scaled = values.to(gl.float32) * gl.div_rn(gl.full_like(most, LARGEST), most)
    scaled = gl.minimum(gl.maximum(scaled, -LARGEST), LARGEST)
    return rounded(scaled, TYPE) if TYPE == gl.int8 else scaled.to(TYPE)


@gluon.jit
def round_own(
    source, norm, codes, found, rows, eps, K: gl.constexpr, SHARE: gl.constexpr, LARGEST: gl.constexpr,
    PROGRAMS: gl.constexpr,
):  # fmt: skip
    """Round the program's channels of ``source`` [rows, K], through a norm if there is one, into ``codes``. → max|row|

    Behind a norm that is max|x · w| times the factor of the row, which is known before the norm is: its two roundings
    may bring the greatest up by 2^-7, a step of int8, which is clipped.
    """
    ROW: gl.constexpr = gl.SliceLayout(1, OWN)
    m = gl.arange(0, 8, layout=ROW)[:, None]
    own = gl.arange(0, power_of_2(SHARE), layout=gl.SliceLayout(0, OWN))[None, :]
    inside = (m < rows) & (own < SHARE)
    k = gl.program_id(0) * SHARE + own
    values = gl.load(source + m * K + k, mask=inside, other=0.0, cache_modifier=".cg")
    most = gl.convert_layout(gl.max(load_found(found, 1, PROGRAMS), 1), ROW)
    if norm is not None:
        w = gl.load(norm + k, mask=own < SHARE, other=0.0)
        squares = gl.convert_layout(gl.sum(load_found(found, 0, PROGRAMS), 1), ROW)
        factor = gl.rsqrt(squares / K + eps)
        values = normed(values, factor[:, None], w)
        most *= factor
    most = gl.maximum(most, TINY)
    gl.store(codes + m * K + k, in_8_bits(values, most[:, None], codes.dtype.element_ty, LARGEST), mask=inside)
    return most


@gluon.jit
def put(x, values, most, BLOCK_M: gl.constexpr, LARGEST: gl.constexpr):
    """Store ``values`` in ``x``: words of codes, or numbers, in 8 bits if LARGEST is not 0, by the scale that ``most``
    gives."""
    if values.dtype == gl.int32:
        words = x._reinterpret(gl.int32, [x.shape[0], 8, 32], swizzled(4))
        words.slice(0, values.shape[0], dim=0).store(values)
    else:
        LAYOUT: gl.constexpr = spread(x.dtype.primitive_bitwidth // 8, BLOCK_M)
        if LARGEST > 0:
            values = in_8_bits(values, most[None, :, None], x.dtype, LARGEST)
        if x.shape[2] > values.shape[2]:
            lane = gl.arange(0, values.shape[2], layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
            values *= gl.where(lane < values.shape[2] // 2, EVEN, ODD).to(values.dtype)
        if BLOCK_M == 1:
            values, _ = gl.broadcast(values, gl.full([1, 8, 1], 0, values.dtype, LAYOUT))
        if x.shape[2] > values.shape[2]:  # two slices side by side
            pairs = values.reshape((values.shape[0] // 2, 2, 8, values.shape[2])).permute((0, 2, 1, 3))
            values = pairs.reshape((values.shape[0] // 2, 8, 2 * values.shape[2]))
        x.slice(0, values.shape[0], dim=0).store(values)


@gluon.jit
def load_x(x, ring, chunk):
    """What a chunk of weights is multiplied by."""
    WIDTH: gl.constexpr = x.dtype.primitive_bitwidth // 8
    SHAPE: gl.constexpr = [BLOCK // chunk_of(ring.dtype), ring.shape[1], 8, x.shape[2]]
    in_slices = x._reinterpret(x.dtype, SHAPE, swizzled(WIDTH))
    return in_slices.index(chunk).permute((0, 2, 1)).load(operand(1, WIDTH))


@gluon.jit
def barrier(ticket, all_here):
    """Wait until the ticket is ``all_here``, for each program draws one, and see what they all wrote."""
    tl.debug_barrier()
    gl.atomic_add(ticket, 1, sem="release")
    while gl.atomic_add(ticket, 0, sem="acquire") - all_here < 0:  # an addition of nothing is a load
        pass
    tl.debug_barrier()


@gluon.jit
def multiply(
    ring, metas, x, sums, weight, scales, next_weight, next_scales, values, source, most, out, norm, found, slot, rows,
    K: gl.constexpr, SHARE: gl.constexpr, GATED: gl.constexpr, ADD: gl.constexpr,
    NEXT_K: gl.constexpr, NEXT_SHARE: gl.constexpr, NEXT_GATED: gl.constexpr,
    BLOCK_M: gl.constexpr, LARGEST: gl.constexpr, BF16_SCALE: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The program's share of one product into ``out``, added to what is there if ADD, or silu(gate) · up if GATED.
    → the slot of the next weight's first chunk

    values  the rows that are multiplied, or the first block of ``source``, which has more channels than x
    norm    what each program brings its own channels through next; None: nobody, or each all of them
    found   what rounding takes to know of them
    """
    WIDTH: gl.constexpr = ring.dtype.primitive_bitwidth // 8
    SLICES: gl.constexpr = ring.shape[1]
    CHUNKS: gl.constexpr = K // chunk_of(ring.dtype)
    BLOCK_CHUNKS: gl.constexpr = BLOCK // chunk_of(ring.dtype)
    TILES: gl.constexpr = pieces(K, SHARE, GATED, ring.dtype) // CHUNKS
    STEP: gl.constexpr = HALF if GATED else 2 * HALF
    TOTAL: gl.constexpr = gl.int32 if ring.dtype == gl.int8 else gl.float32
    TYPE: gl.constexpr = out.dtype.element_ty
    STRIDE: gl.constexpr = SHARE * PROGRAMS
    SECOND: gl.constexpr = STRIDE if GATED else HALF  # from a row of a chunk's first half to that of its second
    row = gl.arange(0, HALF, layout=gl.SliceLayout(1, OUT))[:, None]
    m = gl.arange(0, 8, layout=gl.SliceLayout(0, OUT))[None, :]
    first_n = gl.program_id(0) * SHARE
    squares = gl.zeros([8], gl.float32, gl.SliceLayout(0, OUT))
    largest = gl.zeros([8], gl.float32, gl.SliceLayout(0, OUT))
    if LARGEST > 0:
        m_scales = gl.convert_layout(gl.div_rn(most, gl.full_like(most, LARGEST)), gl.SliceLayout(0, OUT))[None, :]
    if source is None:
        put(x, values, most, BLOCK_M, LARGEST)
    KEPT: gl.constexpr = metas is not None and source is None and TILES > 1  # all of x, in registers
    if KEPT:
        tl.debug_barrier()
        kept, kept_sums = (), ()
        for chunk in gl.static_range(CHUNKS):
            kept += (load_x(x, ring, chunk),)
            kept_sums += (sums_of(kept[chunk], gl.zeros([SLICES, HALF, 8], TOTAL, MMA)),)
    for tile in range(TILES):
        n = first_n + tile * STEP + row
        is_0, is_1 = n < first_n + SHARE, n + (0 if GATED else HALF) < first_n + SHARE
        in_0, in_1 = (m < rows) & is_0, (m < rows) & is_1
        at = out + m * STRIDE + n
        if ADD:
            before_0, before_1 = gl.load(at, mask=in_0, other=0.0), gl.load(at + HALF, mask=in_1, other=0.0)
        if norm is not None:
            norm_0 = gl.load(norm + n, mask=is_0, other=0.0).to(gl.float32)
            norm_1 = gl.load(norm + n + HALF, mask=is_1, other=0.0).to(gl.float32)
        if LARGEST > 0:
            n_scales_0 = gl.load(scales + n, mask=is_0, other=0.0)
            n_scales_1 = gl.load(scales + n + SECOND, mask=is_1, other=0.0)
        acc_0 = gl.zeros([SLICES, HALF, 8], TOTAL, MMA)
        acc_1 = gl.zeros([SLICES, HALF, 8], TOTAL, MMA)
        if KEPT:
            for chunk in gl.static_range(CHUNKS):
                turn(
                    ring, metas, weight, scales, next_weight, next_scales, tile * CHUNKS + chunk, slot, K, SHARE, GATED,
                    NEXT_K, NEXT_SHARE, NEXT_GATED,
                )  # fmt: skip
                acc_0, acc_1 = add_chunk(acc_0, acc_1, ring, metas, slot, kept[chunk], kept_sums[chunk], BF16_SCALE)
                slot = (slot + 1) % ring.shape[0]
        else:
            for block in range((CHUNKS + BLOCK_CHUNKS - 1) // BLOCK_CHUNKS):
                first = block * BLOCK_CHUNKS
                if source is not None:
                    put(x, values, most, BLOCK_M, LARGEST)
                    values = load_block(source, block + 1, rows, WIDTH, K, BLOCK_M)
                for chunk in range(first, gl.minimum(first + BLOCK_CHUNKS, CHUNKS)):
                    turn(
                        ring, metas, weight, scales, next_weight, next_scales, tile * CHUNKS + chunk, slot,
                        K, SHARE, GATED, NEXT_K, NEXT_SHARE, NEXT_GATED,
                    )  # fmt: skip
                    these = load_x(x, ring, chunk - first)
                    x_sums = None if metas is None else sums_of(these, acc_0)
                    acc_0, acc_1 = add_chunk(acc_0, acc_1, ring, metas, slot, these, x_sums, BF16_SCALE)
                    slot = (slot + 1) % ring.shape[0]
        # Through shared memory at once: of a reduction across warps, Triton makes several turns.
        sums[0].store(acc_0)
        sums[1].store(acc_1)
        total_0 = gl.sum(sums[0].load(SUMS), 0).to(gl.float32)
        total_1 = gl.sum(sums[1].load(SUMS), 0).to(gl.float32)
        if metas is not None:
            total_0, total_1 = total_0 / UNIT, total_1 / UNIT
        if LARGEST > 0:
            total_0, total_1 = scaled(total_0, m_scales, n_scales_0, None), scaled(total_1, m_scales, n_scales_1, None)
        sum_0, sum_1 = total_0.to(TYPE), total_1.to(TYPE)
        if GATED:
            gated = silu_product(sum_0, sum_1)
            gl.store(at, gated, mask=in_0)
            if LARGEST > 0:
                largest = gl.maximum(largest, gl.max(gl.where(in_0, gl.abs(gated.to(gl.float32)), 0.0), 0))
        else:
            if ADD:
                sum_0 = (before_0.to(gl.float32) + sum_0.to(gl.float32)).to(TYPE)
                sum_1 = (before_1.to(gl.float32) + sum_1.to(gl.float32)).to(TYPE)
            gl.store(at, sum_0, mask=in_0)
            gl.store(at + HALF, sum_1, mask=in_1)
            if norm is not None:
                wide_0 = gl.where(in_0, sum_0.to(gl.float32), 0.0)
                wide_1 = gl.where(in_1, sum_1.to(gl.float32), 0.0)
                squares += gl.sum(wide_0 * wide_0 + wide_1 * wide_1, 0)
                largest = gl.maximum(largest, gl.max(gl.maximum(gl.abs(wide_0 * norm_0), gl.abs(wide_1 * norm_1)), 0))
    part = found + gl.arange(0, 8, layout=gl.SliceLayout(0, OUT)) * PROGRAMS + gl.program_id(0)
    if norm is not None:
        gl.store(part, squares)
    if norm is not None or (GATED and LARGEST > 0):
        gl.store(part + 8 * PROGRAMS, largest)
    return slot


@gluon.jit
def whole_rows(
    source, norm, codes, found, ticket, here, rows, eps, WIDTH: gl.constexpr, K: gl.constexpr, SHARE: gl.constexpr,
    BLOCK_M: gl.constexpr, LARGEST: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """What all programs brought to ``source`` [rows, K] once they are ``here``, through a norm if there is one.
    → its first block as ``put`` takes it, max|row|, and where they are next"""
    most = 0.0  # of what is not rounded
    if BLOCK_M > 1 and LARGEST > 0:
        barrier(ticket, here)
        most = round_own(source, norm, codes, found, rows, eps, K, SHARE, LARGEST, PROGRAMS)
        here += PROGRAMS
        barrier(ticket, here)
        values = load_codes(codes, 0, rows, K)
    else:
        if norm is not None:
            w = load_norm(norm, WIDTH, K, BLOCK_M)
        barrier(ticket, here)
        values = load_rows(source, 0, rows, WIDTH, K, BLOCK_M)
        if norm is not None:
            values = through_norm(values, w, eps, WIDTH, K, BLOCK_M)
        if LARGEST > 0:
            most = load_greatest(found, WIDTH, PROGRAMS) if norm is None else greatest(values, WIDTH, BLOCK_M)
    return values, most, here + PROGRAMS


@gluon.jit(do_not_specialize=["rows"])
def megakernel(
    mixed, residual, gated, codes, found, out, o, o_scales, norm, gate_up, gate_up_scales, down, down_scales, next_norm,
    qkv, qkv_scales, ticket, rows, eps, HEADS: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr,
    QKV: gl.constexpr, BLOCK_M: gl.constexpr, LARGEST: gl.constexpr, BF16_SCALE: gl.constexpr, STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """All of a layer between two attentions, for up to BLOCK_M rows."""
    TYPE: gl.constexpr = o.dtype.element_ty
    WIDTH: gl.constexpr = TYPE.primitive_bitwidth // 8
    H: gl.constexpr = HIDDEN // PROGRAMS
    G: gl.constexpr = INNER // PROGRAMS
    Q: gl.constexpr = QKV // PROGRAMS
    SHARED: gl.constexpr = BLOCK_M > 1 and LARGEST > 0  # the rounding
    SHAPE: gl.constexpr = ring_shape(TYPE, STAGES)
    ring = gl.allocate_shared_memory(TYPE, SHAPE, ring_layouts(TYPE)[0])
    if TYPE == gl.int16:
        metas = gl.allocate_shared_memory(gl.int32, [STAGES, SHAPE[1], 2 * HALF], METAS)
        x = gl.allocate_shared_memory(mixed.dtype.element_ty, [BLOCK // 128, 8, 128], swizzled(WIDTH))
    else:
        metas = None
        x = gl.allocate_shared_memory(TYPE, [BLOCK // (128 // WIDTH), 8, 128 // WIDTH], swizzled(WIDTH))
    TOTAL: gl.constexpr = gl.int32 if TYPE == gl.int8 else gl.float32
    sums = (
        gl.allocate_shared_memory(TOTAL, [SHAPE[1], HALF, 8], PLAIN),
        gl.allocate_shared_memory(TOTAL, [SHAPE[1], HALF, 8], PLAIN),
    )
    O_PIECES: gl.constexpr = pieces(HEADS, H, False, TYPE)
    for stage in gl.static_range(STAGES - 1):
        if stage < O_PIECES:
            fetch(ring, metas, o, o_scales, stage, stage, HEADS, H, False)
        else:
            fetch(ring, metas, gate_up, gate_up_scales, stage - O_PIECES, stage, HIDDEN, G, True)
        async_copy.commit_group()
    wait(PDL)
    values = load_rows(mixed, 0, rows, WIDTH, HEADS, BLOCK_M)
    slot = 0
    begun = gl.load(ticket, volatile=True) & -PROGRAMS  # others may have drawn already
    most = greatest(values, WIDTH, BLOCK_M) if LARGEST > 0 else None
    slot = multiply(
        ring, metas, x, sums, o, o_scales, gate_up, gate_up_scales, values, None, most, residual,
        norm if SHARED else None, found, slot, rows, HEADS, H, False, True, HIDDEN, G, True, BLOCK_M, LARGEST,
        BF16_SCALE, PROGRAMS,
    )  # fmt: skip
    values, most, here = whole_rows(
        residual, norm, codes, found, ticket, begun + PROGRAMS, rows, eps, WIDTH, HIDDEN, H, BLOCK_M, LARGEST, PROGRAMS
    )
    slot = multiply(
        ring, metas, x, sums, gate_up, gate_up_scales, down, down_scales, values, None, most, gated, None, found, slot,
        rows, HIDDEN, G, True, False, INNER, H, False, BLOCK_M, LARGEST, BF16_SCALE, PROGRAMS,
    )  # fmt: skip
    values, most, here = whole_rows(
        gated, None, codes, found, ticket, here, rows, eps, WIDTH, INNER, G, BLOCK_M, LARGEST, PROGRAMS
    )
    slot = multiply(
        ring, metas, x, sums, down, down_scales, qkv, qkv_scales, values, codes if SHARED else gated, most, residual,
        next_norm if SHARED else None, found, slot, rows, INNER, H, False, True, HIDDEN, Q, False, BLOCK_M, LARGEST,
        BF16_SCALE, PROGRAMS,
    )  # fmt: skip
    if QKV > 0:
        values, most, here = whole_rows(
            residual, next_norm, codes, found, ticket, here, rows, eps, WIDTH, HIDDEN, H, BLOCK_M, LARGEST, PROGRAMS
        )
        multiply(
            ring, metas, x, sums, qkv, qkv_scales, None, None, values, None, most, out, None, found, slot, rows, HIDDEN,
            Q, False, False, HIDDEN, 0, False, BLOCK_M, LARGEST, BF16_SCALE, PROGRAMS,
        )  # fmt: skip
    async_copy.wait_group(0)


@cache
def ticket(device: torch.device) -> Tensor:
    """What programs draw that wait for each other. It only grows, so that nobody has to set it back; there is one for a
    device, so these kernels run on one stream at a time."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a layer once before capturing it in a CUDA graph")
    return torch.zeros(1, dtype=torch.int32, device=device)


def operands(weight: Weight | PackedWeight | None) -> tuple[Tensor | None, Tensor | None]:
    """A weight as the kernel takes it."""
    if weight is None:
        return None, None
    return (weight.words, weight.meta) if isinstance(weight, PackedWeight) else weight


def megakernel_triton(mixed: Tensor, residual: Tensor, between: Between) -> Tensor | None:
    """``megakernel`` through Triton."""
    (rows, heads), hidden = mixed.shape, residual.shape[1]
    inner = between.down.in_features
    next_norm, qkv = between.following or (None, None)
    gated = torch.empty(rows, inner, dtype=mixed.dtype, device=mixed.device)
    shape = rows, max(hidden, inner)
    codes = torch.empty(shape, dtype=CODES[between.number], device=mixed.device) if between.number else None
    found = torch.empty(2, MOST_ROWS, PROGRAMS, dtype=torch.float32, device=mixed.device)
    out = torch.empty(rows, 0 if qkv is None else qkv.out_features, dtype=mixed.dtype, device=mixed.device)
    megakernel[PROGRAMS,](
        mixed, residual, gated, codes, found, out, *operands(between.o), between.norm, *operands(between.gate_up),
        *operands(between.down), next_norm, *operands(qkv), ticket(mixed.device), rows, between.eps,
        HEADS=heads, HIDDEN=hidden, INNER=inner, QKV=out.shape[1], BLOCK_M=1 if rows == 1 else MOST_ROWS,
        LARGEST=0.0 if between.number is None else LARGEST[between.number],
        BF16_SCALE=isinstance(between.o, PackedWeight) and between.o.scale_dtype == torch.bfloat16,
        STAGES=STAGES[between.o.bits], PROGRAMS=PROGRAMS, num_warps=WARPS.value, **pdl(mixed.device),
    )  # fmt: skip
    return None if qkv is None else out
