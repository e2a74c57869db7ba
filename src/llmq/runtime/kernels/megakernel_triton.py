"""Device code of ``megakernel``.

One program on each of PROGRAMS multiprocessors, all there at once. Each has its share of the rows of every weight, over
all of K, so that no two add to one output; what it reads of them is one stream, through a ring of shared memory that is
filled STAGES chunks ahead, whatever the program waits for:

    memory           o … │ gate, up …             │ down …            │ q, k, v …
    matrix unit          o … │ barrier │ gate, up …       │ barrier │ down …      │ barrier │ q, k, v …

    ring  [STAGES, WARPS, 32 rows, LANE]    a chunk: 32 rows of a weight, a slice of LANE channels for each warp
    x     [channels of BLOCK, 8 rows]       what the weight's rows are multiplied by, in slices of LANE channels too

    acc [WARPS, 16, 8]  += w [WARPS, 16, LANE] · x [WARPS, LANE, 8]       for each half of a chunk's rows
    out [16, 8]          = Σ over the warps

The halves are of gate and up where silu takes both, and neighbours elsewhere. A barrier of the grid stands where a norm
or a product takes whole rows of what all programs computed; each then brings these rows into its x, through the norm
and the rounding to 8 bits, for itself.
"""

# ruff: noqa: SIM102, SIM300 (a type is no constant, and the device would compute an `and`)
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from llmq.runtime.kernels.megakernel import CHUNK_BYTES, LONGEST, MOST_ROWS, PROGRAMS, ROWS, STAGES, Between
from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.quantize_rows import LARGEST, SMALLEST_MAX
from llmq.runtime.kernels.quantize_rows_triton import ROUND
from llmq.runtime.kernels.silu_triton import SILU

WARPS = gl.constexpr(CHUNK_BYTES // 128)
HALF = gl.constexpr(ROWS // 2)  # what an instruction takes
BLOCK = gl.constexpr(LONGEST)
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
TINY = gl.constexpr(SMALLEST_MAX)
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [8, 1, 1], [1, 16, 8]))
SUMS = gl.constexpr(gl.BlockedLayout([8, 1, 1], [1, 4, 8], [1, 4, 2], [2, 1, 0]))  # a sum over the warps in one thread
OUT = gl.constexpr(gl.SliceLayout(0, SUMS))


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
def block_of(channels):
    """So many of a row's channels are in registers at once."""
    return min(int(BLOCK), triton.next_power_of_2(int(channels)))


@gluon.jit
def fetch(ring, weight, piece, slot, K: gl.constexpr, SHARE: gl.constexpr, GATED: gl.constexpr):
    """Start the copy of chunk number ``piece`` of the program's rows of a weight into a slot of the ring.

    It has SHARE of the rows; if GATED, SHARE of the gate's, and as many, as far behind, of up's.
    """
    WIDTH: gl.constexpr = ring.dtype.primitive_bitwidth // 8
    LANE: gl.constexpr = 128 // WIDTH
    LAYOUT: gl.constexpr = spread(WIDTH, 32)
    CHUNKS: gl.constexpr = K // (WARPS * LANE)
    tile, chunk = piece // CHUNKS, piece % CHUNKS
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    row = gl.arange(0, 2 * HALF, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    lane = gl.arange(0, LANE, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    if GATED:
        within = tile * HALF + row % HALF
        n = row // HALF * (gl.num_programs(0) * SHARE) + gl.program_id(0) * SHARE + within
    else:
        within = tile * 2 * HALF + row
        n = gl.program_id(0) * SHARE + within
    at = n * K + (chunk * WARPS + warp) * LANE + lane
    inside, at = gl.broadcast(within < SHARE, at)
    async_copy.async_copy_global_to_shared(ring.index(slot), weight + at, mask=inside)


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
def by_row(values, LAYOUT: gl.constexpr, GREATEST: gl.constexpr):
    """The sum, or GREATEST, of each row of ``values`` [slices, rows, LANE]: [rows]."""
    flat = values.permute((1, 0, 2)).reshape((values.shape[1], values.shape[0] * values.shape[2]))
    found = gl.max(flat, 1) if GREATEST else gl.sum(flat, 1)
    return gl.convert_layout(found, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))


@gluon.jit
def normed(values, w, eps, WIDTH: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr):
    """Whole rows through a norm of weight ``w``."""
    wide = values.to(gl.float32)
    squares = by_row(wide * wide, spread(WIDTH, BLOCK_M), False)
    normal = wide * gl.rsqrt(squares / K + eps)[None, :, None]
    return (normal.to(w.dtype).to(gl.float32) * w.to(gl.float32)).to(values.dtype)


@gluon.jit
def greatest(values, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr):
    """max|row| of whole rows."""
    return gl.maximum(by_row(gl.abs(values.to(gl.float32)), spread(WIDTH, BLOCK_M), True), TINY)


@gluon.jit
def load_greatest(maxima, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr):
    """max|row| of whole rows, as all programs have found it."""
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, gl.SliceLayout(2, spread(WIDTH, BLOCK_M))))
    return gl.maximum(gl.load(maxima + m, cache_modifier=".cg").to(gl.float32, bitcast=True), TINY)


@gluon.jit
def put(x, values, most, BLOCK_M: gl.constexpr, LARGEST: gl.constexpr):
    """Store ``values`` in ``x``; in 8 bits if LARGEST is not 0, by the scale that ``most`` gives."""
    LAYOUT: gl.constexpr = spread(x.dtype.primitive_bitwidth // 8, BLOCK_M)
    if LARGEST > 0:
        scaled = values.to(gl.float32) * gl.div_rn(gl.full_like(most, LARGEST), most)[None, :, None]
        if x.dtype == gl.int8:
            bits = gl.inline_asm_elementwise(ROUND, "=r,f", [scaled], dtype=gl.int32, is_pure=True, pack=1)
            values = bits.to(gl.int8)
        else:
            values = gl.minimum(gl.maximum(scaled, -LARGEST), LARGEST).to(x.dtype)
    if BLOCK_M == 1:
        values, _ = gl.broadcast(values, gl.full([1, 8, 1], 0, values.dtype, LAYOUT))
    x.slice(0, values.shape[0], dim=0).store(values)


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
    ring, x, sums, weight, scales, next_weight, values, source, most, out, maxima, slot, rows,
    K: gl.constexpr, SHARE: gl.constexpr, GATED: gl.constexpr, ADD: gl.constexpr,
    NEXT_K: gl.constexpr, NEXT_SHARE: gl.constexpr, NEXT_GATED: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, LARGEST: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The program's share of one product into ``out``, added to what is there if ADD, or silu(gate) · up if GATED, with
    max|row| of it into ``maxima``. → the slot of the next weight's first chunk

    values  the rows that are multiplied, or the first block of ``source``, which has more channels than x
    """
    WIDTH: gl.constexpr = ring.dtype.primitive_bitwidth // 8
    LANE: gl.constexpr = 128 // WIDTH
    CHUNKS: gl.constexpr = K // (WARPS * LANE)
    BLOCK_CHUNKS: gl.constexpr = BLOCK // (WARPS * LANE)
    STEP: gl.constexpr = HALF if GATED else 2 * HALF
    NEXT_STEP: gl.constexpr = HALF if NEXT_GATED else 2 * HALF
    PIECES: gl.constexpr = (SHARE + STEP - 1) // STEP * CHUNKS
    NEXT_PIECES: gl.constexpr = (NEXT_SHARE + NEXT_STEP - 1) // NEXT_STEP * (NEXT_K // (WARPS * LANE))
    TOTAL: gl.constexpr = gl.int32 if ring.dtype == gl.int8 else gl.float32
    TYPE: gl.constexpr = out.dtype.element_ty
    STRIDE: gl.constexpr = SHARE * PROGRAMS
    SECOND: gl.constexpr = STRIDE if GATED else HALF  # from a row of a chunk's first half to that of its second
    in_slices = x._reinterpret(x.dtype, [BLOCK_CHUNKS, WARPS, 8, LANE], swizzled(WIDTH))
    row = gl.arange(0, HALF, layout=gl.SliceLayout(1, OUT))[:, None]
    m = gl.arange(0, 8, layout=gl.SliceLayout(0, OUT))[None, :]
    first_n = gl.program_id(0) * SHARE
    if LARGEST > 0:
        m_scales = gl.convert_layout(gl.div_rn(most, gl.full_like(most, LARGEST)), gl.SliceLayout(0, OUT))[None, :]
        largest = gl.zeros([8], gl.float32, gl.SliceLayout(0, OUT))
    if source is None:
        put(x, values, most, BLOCK_M, LARGEST)
    for tile in range(PIECES // CHUNKS):
        n = first_n + tile * STEP + row
        is_0, is_1 = n < first_n + SHARE, n + (0 if GATED else HALF) < first_n + SHARE
        in_0, in_1 = (m < rows) & is_0, (m < rows) & is_1
        at = out + m * STRIDE + n
        if ADD:
            before_0, before_1 = gl.load(at, mask=in_0, other=0.0), gl.load(at + HALF, mask=in_1, other=0.0)
        if LARGEST > 0:
            n_scales_0 = gl.load(scales + n, mask=is_0, other=0.0)
            n_scales_1 = gl.load(scales + n + SECOND, mask=is_1, other=0.0)
        acc_0 = gl.zeros([WARPS, HALF, 8], TOTAL, MMA)
        acc_1 = gl.zeros([WARPS, HALF, 8], TOTAL, MMA)
        for block in range((CHUNKS + BLOCK_CHUNKS - 1) // BLOCK_CHUNKS):
            first = block * BLOCK_CHUNKS
            if source is not None:
                put(x, values, most, BLOCK_M, LARGEST)
                values = load_rows(source, (block + 1) * BLOCK, rows, WIDTH, K, BLOCK_M)
            for chunk in range(first, gl.minimum(first + BLOCK_CHUNKS, CHUNKS)):
                async_copy.wait_group(STAGES - 1)
                tl.debug_barrier()
                these = in_slices.index(chunk - first).permute((0, 2, 1)).load(operand(1, WIDTH))
                w = ring.index(slot)
                w_0 = w.slice(0, HALF, dim=1).load(operand(0, WIDTH))
                w_1 = w.slice(HALF, HALF, dim=1).load(operand(0, WIDTH))
                tl.debug_barrier()  # all have the chunk in registers: its slot is free
                ahead = tile * CHUNKS + chunk + STAGES
                if ahead < PIECES:
                    fetch(ring, weight, ahead, slot, K, SHARE, GATED)
                elif next_weight is not None:
                    if ahead - PIECES < NEXT_PIECES:
                        fetch(ring, next_weight, ahead - PIECES, slot, NEXT_K, NEXT_SHARE, NEXT_GATED)
                async_copy.commit_group()
                if WIDTH == 1 and TOTAL == gl.float32:  # the small instruction has no FP8 on Hopper
                    these, w_0, w_1 = these.to(gl.float16), w_0.to(gl.float16), w_1.to(gl.float16)
                acc_0 = mma_v2(w_0, these, acc_0)
                acc_1 = mma_v2(w_1, these, acc_1)
                slot = (slot + 1) % STAGES
        # Through shared memory at once: of a reduction across warps, Triton makes several turns.
        sums.slice(0, HALF, dim=1).store(acc_0)
        sums.slice(HALF, HALF, dim=1).store(acc_1)
        total_0 = gl.sum(sums.slice(0, HALF, dim=1).load(SUMS), 0).to(gl.float32)
        total_1 = gl.sum(sums.slice(HALF, HALF, dim=1).load(SUMS), 0).to(gl.float32)
        if LARGEST > 0:
            total_0, total_1 = total_0 * n_scales_0 * m_scales, total_1 * n_scales_1 * m_scales
        sum_0, sum_1 = total_0.to(TYPE), total_1.to(TYPE)
        if GATED:
            wide = sum_0.to(gl.float32)
            silu = gl.inline_asm_elementwise(SILU, "=f,f", [wide], dtype=gl.float32, is_pure=True, pack=1)
            gated = (silu.to(TYPE).to(gl.float32) * sum_1.to(gl.float32)).to(TYPE)
            gl.store(at, gated, mask=in_0)
            if LARGEST > 0:
                largest = gl.maximum(largest, gl.max(gl.where(in_0, gl.abs(gated.to(gl.float32)), 0.0), 0))
        else:
            if ADD:
                sum_0 = (before_0.to(gl.float32) + sum_0.to(gl.float32)).to(TYPE)
                sum_1 = (before_1.to(gl.float32) + sum_1.to(gl.float32)).to(TYPE)
            gl.store(at, sum_0, mask=in_0)
            gl.store(at + HALF, sum_1, mask=in_1)
    if GATED and LARGEST > 0:
        # Numbers that are not negative are in the order of their bits.
        each = gl.arange(0, 8, layout=gl.SliceLayout(0, OUT))
        gl.atomic_max(maxima + each, largest.to(gl.int32, bitcast=True), mask=each < rows, sem="relaxed")
    return slot


@gluon.jit(do_not_specialize=["rows"])
def megakernel(
    mixed, residual, gated, maxima, out, o, o_scales, norm, gate_up, gate_up_scales, down, down_scales, next_norm, qkv,
    qkv_scales, ticket, rows, eps, HEADS: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr, QKV: gl.constexpr,
    BLOCK_M: gl.constexpr, LARGEST: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """All of a layer between two attentions, for up to BLOCK_M rows."""
    TYPE: gl.constexpr = o.dtype.element_ty
    WIDTH: gl.constexpr = TYPE.primitive_bitwidth // 8
    H: gl.constexpr = HIDDEN // PROGRAMS
    G: gl.constexpr = INNER // PROGRAMS
    Q: gl.constexpr = QKV // PROGRAMS
    ring = gl.allocate_shared_memory(TYPE, [STAGES, WARPS, 2 * HALF, 128 // WIDTH], swizzled(WIDTH))
    x = gl.allocate_shared_memory(TYPE, [BLOCK // (128 // WIDTH), 8, 128 // WIDTH], swizzled(WIDTH))
    sums = gl.allocate_shared_memory(gl.int32 if TYPE == gl.int8 else gl.float32, [WARPS, 2 * HALF, 8], PLAIN)
    O_PIECES: gl.constexpr = (H + 2 * HALF - 1) // (2 * HALF) * (HEADS * WIDTH // (WARPS * 128))
    for stage in gl.static_range(STAGES):
        if stage < O_PIECES:
            fetch(ring, o, stage, stage, HEADS, H, False)
        else:
            fetch(ring, gate_up, stage - O_PIECES, stage, HIDDEN, G, True)
        async_copy.commit_group()
    wait(PDL)
    values = load_rows(mixed, 0, rows, WIDTH, HEADS, BLOCK_M)
    slot = 0
    begun = gl.load(ticket, volatile=True) & -PROGRAMS  # others may have drawn already
    if LARGEST > 0:
        if gl.program_id(0) == 0:  # before the first barrier, for what comes behind it
            each = gl.arange(0, 8, layout=gl.SliceLayout(0, OUT))
            gl.store(maxima + each, gl.full_like(each, 0))
    most = greatest(values, WIDTH, BLOCK_M) if LARGEST > 0 else None
    slot = multiply(
        ring, x, sums, o, o_scales, gate_up, values, None, most, residual, None, slot, rows, HEADS, H, False, True,
        HIDDEN, G, True, BLOCK_M, STAGES, LARGEST, PROGRAMS,
    )  # fmt: skip
    w = load_norm(norm, WIDTH, HIDDEN, BLOCK_M)
    barrier(ticket, begun + PROGRAMS)
    values = normed(load_rows(residual, 0, rows, WIDTH, HIDDEN, BLOCK_M), w, eps, WIDTH, HIDDEN, BLOCK_M)
    most = greatest(values, WIDTH, BLOCK_M) if LARGEST > 0 else None
    slot = multiply(
        ring, x, sums, gate_up, gate_up_scales, down, values, None, most, gated, maxima, slot, rows, HIDDEN, G, True,
        False, INNER, H, False, BLOCK_M, STAGES, LARGEST, PROGRAMS,
    )  # fmt: skip
    barrier(ticket, begun + 2 * PROGRAMS)
    values = load_rows(gated, 0, rows, WIDTH, INNER, BLOCK_M)
    most = load_greatest(maxima, WIDTH, BLOCK_M) if LARGEST > 0 else None
    slot = multiply(
        ring, x, sums, down, down_scales, qkv, values, gated, most, residual, None, slot, rows, INNER, H, False, True,
        HIDDEN, Q, False, BLOCK_M, STAGES, LARGEST, PROGRAMS,
    )  # fmt: skip
    if QKV > 0:
        w = load_norm(next_norm, WIDTH, HIDDEN, BLOCK_M)
        barrier(ticket, begun + 3 * PROGRAMS)
        values = normed(load_rows(residual, 0, rows, WIDTH, HIDDEN, BLOCK_M), w, eps, WIDTH, HIDDEN, BLOCK_M)
        most = greatest(values, WIDTH, BLOCK_M) if LARGEST > 0 else None
        multiply(
            ring, x, sums, qkv, qkv_scales, None, values, None, most, out, None, slot, rows, HIDDEN, Q, False, False,
            HIDDEN, 0, False, BLOCK_M, STAGES, LARGEST, PROGRAMS,
        )  # fmt: skip
    async_copy.wait_group(0)


@cache
def ticket(device: torch.device) -> Tensor:
    """What programs draw that wait for each other. It only grows, so that nobody has to set it back; there is one for a
    device, so these kernels run on one stream at a time."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a layer once before capturing it in a CUDA graph")
    return torch.zeros(1, dtype=torch.int32, device=device)


def megakernel_triton(mixed: Tensor, residual: Tensor, between: Between) -> Tensor | None:
    """``megakernel`` through Triton."""
    (rows, heads), hidden = mixed.shape, residual.shape[1]
    inner = between.down.values.shape[1]
    next_norm, qkv = between.following or (None, None)
    gated = torch.empty(rows, inner, dtype=mixed.dtype, device=mixed.device)
    maxima = torch.empty(MOST_ROWS, dtype=torch.int32, device=mixed.device)
    out = torch.empty(rows, 0 if qkv is None else len(qkv.values), dtype=mixed.dtype, device=mixed.device)
    megakernel[PROGRAMS,](
        mixed, residual, gated, maxima, out, *between.o, between.norm, *between.gate_up, *between.down, next_norm,
        *(qkv or (None, None)), ticket(mixed.device), rows, between.eps,
        HEADS=heads, HIDDEN=hidden, INNER=inner, QKV=out.shape[1], BLOCK_M=1 if rows == 1 else MOST_ROWS,
        LARGEST=0.0 if between.number is None else LARGEST[between.number],
        STAGES=STAGES[between.o.values.itemsize], PROGRAMS=PROGRAMS, num_warps=WARPS.value, **pdl(mixed.device),
    )  # fmt: skip
    return None if qkv is None else out
