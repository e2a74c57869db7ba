"""Device code of ``dense`` and ``w8a8`` for few rows on Hopper: products that take as long as reading the weight does.

    program (tile of N and M, split of K)      acc [BLOCK_N, BLOCK_M]  += w [BLOCK_N, BOX] · x [BLOCK_M, BOX]ᵀ

    copies         w of STAGES − 1 steps │ wait for the kernel before │ x of those steps │ w and x of a step more …
    matrix unit                                                                           step 0 │ step 1 …

The copy engine brings both tiles to shared memory, from where the matrix unit takes them; no thread touches a weight.
The first weights are on their way while the kernel before still writes x. A step is one or two boxes of 128 bytes of
K, the width that the layout of shared memory is swizzled in: of two, warps wait for each other half as often. This is
Gluon, as Triton copies nothing before x is there.
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
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llmq.runtime.kernels.pdl_triton import wait
from llmq.runtime.kernels.split_k_triton import Launch, reduce_splits, scaled, steps_per_split

BOX_BYTES = 128  # of K
WHOLE = 2048  # bytes of K that are not worth a sum of splits


# Rows up to → launch parameters, measured on an H200.
LAUNCHES = {
    32: Launch(32, 64, 4, 6, 132),
    64: Launch(64, 64, 4, 6, 132),
    128: Launch(128, 64, 4, 4, 264),
    192: Launch(64, 128, 4, 4, 264),
    256: Launch(256, 64, 8, 5, 132),
}
# Of 8 bits; and of a weight with tiles for all multiprocessors.
FEW = {16: Launch(16, 64, 4, 4, 264, 2), 32: Launch(32, 64, 4, 4, 264, 2), 64: Launch(64, 64, 4, 3, 264, 2)}
FEW_WIDE = {16: Launch(16, 128, 8, 4, 132), 32: Launch(32, 128, 8, 4, 132), 64: Launch(64, 128, 8, 4, 132)}
WIDE = 16_384  # outputs
SMALL = 2**23  # numbers of 16 bits: bigger weights the kernels of ``dense`` read as fast


def launch_for(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> Launch | None:
    """Launch parameters for ``rows`` rows of ``dtype`` and a weight of this shape; None where others are faster."""
    table, wide = LAUNCHES, out_features > WIDE
    if dtype.itemsize == 2:
        faster = 16 < rows <= 64 and out_features * in_features <= SMALL
    elif rows <= 64:
        table = FEW_WIDE if wide else FEW
        faster = rows > 8
    elif rows <= 128:
        faster = not wide
    else:
        faster = rows <= (256 if dtype == torch.int8 else 192) and out_features <= 4096
    return next(launch for most, launch in table.items() if rows <= most) if faster else None


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether K is whole steps, and there are descriptors of both for the copy engine."""
    size = x.element_size()
    return (
        x.shape[1] * size % BOX_BYTES == 0
        and x.stride(1) == weight.stride(1) == 1
        and x.stride(0) * size % 16 == x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


def tile_layout(element_bits: int) -> gl.NVMMASharedLayout:
    """How a tile of x or of the weight lies in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=BOX_BYTES, element_bitwidth=element_bits, rank=2)


def skinny_matmul(
    x: Tensor,
    weight: Tensor,
    x_scales: Tensor | None,
    weight_scales: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    launch: Launch,
) -> Tensor:
    """``x`` [M, K] times ``weight`` [N, K], transposed, with what there is of scales and bias → ``dtype`` [M, N]."""
    (rows, in_features), out_features = x.shape, len(weight)
    box = BOX_BYTES // x.element_size()
    tiles_m, tiles_n = triton.cdiv(rows, launch.block_m), triton.cdiv(out_features, launch.block_n)
    steps = triton.cdiv(in_features, launch.boxes * box)
    whole = in_features * x.element_size() <= WHOLE
    per_split = steps if whole else steps_per_split(tiles_m * tiles_n, steps, launch.programs)
    splits = triton.cdiv(steps, per_split)
    out = torch.empty(rows, out_features, dtype=dtype, device=x.device)
    total = torch.int32 if x.dtype == torch.int8 else torch.float32
    sums = torch.empty(splits, rows, out_features, dtype=total, device=x.device) if splits > 1 else None
    layout = tile_layout(8 * x.element_size())
    skinny_kernel[tiles_n * tiles_m, splits](
        TensorDescriptor.from_tensor(x, [launch.block_m, box], layout), x_scales,
        TensorDescriptor.from_tensor(weight, [launch.block_n, box], layout), weight_scales,
        bias, out, sums, rows, out_features, steps, per_split, tiles_m,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, STAGES=launch.stages, BOXES=launch.boxes,
        num_warps=launch.warps, launch_pdl=True,
    )  # fmt: skip
    if sums is not None:
        reduce_splits(sums, x_scales, weight_scales, bias, out)
    return out


@gluon.jit
def fetch(at_tile, tiles, ready, step, last, slot, first_row, BOXES: gl.constexpr):
    """Start the copy of a step's tile; nothing after the last step."""
    BOX: gl.constexpr = at_tile.block_type.shape[1]
    for box in gl.static_range(BOXES):
        tma.async_copy_global_to_shared(
            at_tile, [first_row, (step * BOXES + box) * BOX], ready.index(slot), tiles.index(slot * BOXES + box),
            pred=step < last,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["rows", "steps", "steps_per_split", "tiles_m"])
def skinny_kernel(
    at_x, x_scales, at_weight, weight_scales, bias, out, sums, rows, out_features, steps, steps_per_split, tiles_m,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """One tile of outputs, summed over one split of K; of x [M, K] and weight [N, K] there are descriptors."""
    TYPE: gl.constexpr = at_x.dtype
    TOTAL: gl.constexpr = gl.int32 if TYPE == gl.int8 else gl.float32
    BOX: gl.constexpr = at_x.block_type.shape[1]
    BYTES: gl.constexpr = BOXES * (at_weight.block_type.nbytes + at_x.block_type.nbytes)
    # A warpgroup has 64 outputs of the tile; where that is all of them, the next ones take other rows.
    DOWN: gl.constexpr = min(gl.num_warps(), BLOCK_N // 16)
    ACROSS: gl.constexpr = gl.num_warps() // DOWN
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [DOWN, ACROSS], [16, BLOCK_M // ACROSS, BOX // 4])
    # Programs that share a tile of the weight are neighbours, so that all but one find it in the cache.
    first_n = gl.program_id(0) // tiles_m * BLOCK_N
    first_m = gl.program_id(0) % tiles_m * BLOCK_M
    first = gl.program_id(1) * steps_per_split
    last = gl.minimum(first + steps_per_split, steps)
    weight = gl.allocate_shared_memory(TYPE, [STAGES * BOXES, BLOCK_N, BOX], at_weight.layout)
    x = gl.allocate_shared_memory(TYPE, [STAGES * BOXES, BLOCK_M, BOX], at_x.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()
    for stage in gl.static_range(STAGES - 1):
        mbarrier.expect(ready.index(stage), BYTES, pred=first + stage < last)
        fetch(at_weight, weight, ready, first + stage, last, stage, first_n, BOXES)
    wait(True)
    for stage in gl.static_range(STAGES - 1):
        fetch(at_x, x, ready, first + stage, last, stage, first_m, BOXES)

    acc = gl.zeros([BLOCK_N, BLOCK_M], TOTAL, layout=MMA)
    for step in range(first, last):
        slot = (step - first) % STAGES
        mbarrier.wait(ready.index(slot), (step - first) // STAGES & 1)
        if TYPE == gl.float8e4nv:
            # The matrix unit adds products of FP8 with fewer bits than fp32 has: never more than a box of them.
            products = (acc,)
            for box in gl.static_range(BOXES):
                products += (warpgroup_mma(  # type: ignore[assignment]
                    weight.index(slot * BOXES + box), x.index(slot * BOXES + box).permute((1, 0)),
                    gl.zeros([BLOCK_N, BLOCK_M], TOTAL, layout=MMA), use_acc=False, is_async=True,
                ),)  # fmt: skip
            products = warpgroup_mma_wait(0, products)
            acc = products[0]
            for box in gl.static_range(BOXES):
                acc += products[1 + box]
        else:
            for box in gl.static_range(BOXES):
                acc = warpgroup_mma(
                    weight.index(slot * BOXES + box), x.index(slot * BOXES + box).permute((1, 0)), acc, is_async=True
                )
            acc = warpgroup_mma_wait(BOXES, [acc])
        # All warps have waited for their product of the step before, and its slot is free.
        tl.debug_barrier()
        ahead, free = step + STAGES - 1, (step - first + STAGES - 1) % STAGES
        mbarrier.expect(ready.index(free), BYTES, pred=ahead < last)
        fetch(at_weight, weight, ready, ahead, last, free, first_n, BOXES)
        fetch(at_x, x, ready, ahead, last, free, first_m, BOXES)
    if TYPE != gl.float8e4nv:
        acc = warpgroup_mma_wait(0, [acc])
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))

    n = first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
    m = first_m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
    is_n, is_m = n < out_features, m < rows
    inside = is_m[None, :] & is_n[:, None]
    at_out = m[None, :].to(gl.int64) * out_features + n[:, None]
    if sums is not None:
        gl.store(sums + gl.program_id(1).to(gl.int64) * rows * out_features + at_out, acc, mask=inside)
    else:
        n_scales = None if weight_scales is None else gl.load(weight_scales + n, mask=is_n, other=0.0)[:, None]
        m_scales = None if x_scales is None else gl.load(x_scales + m, mask=is_m, other=0.0)[None, :]
        n_bias = None if bias is None else gl.load(bias + n, mask=is_n, other=0.0)[:, None]
        result = scaled(acc, m_scales, n_scales, n_bias)
        gl.store(out + at_out, result.to(out.dtype.element_ty), mask=inside)
