"""Device code of ``routing``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.routing import Routing, most_tiles

CHUNK = 1024  # assignments that a program looks at at a time
COLUMNS = 1024


def choose_triton(logits: Tensor, per_token: int, renormalized: bool) -> tuple[Tensor, Tensor]:
    """``choose`` through Triton: one program a token."""
    tokens, experts = logits.shape
    weights = torch.empty(tokens, per_token, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, per_token, dtype=torch.int32, device=logits.device)
    if tokens:
        choose_kernel[tokens,](
            logits, weights, chosen, logits.stride(0), experts, PER_TOKEN=per_token, RENORMALIZED=renormalized,
            SLOTS=triton.next_power_of_2(per_token), BLOCK=triton.next_power_of_2(experts), num_warps=1,
            **pdl(logits.device),
        )  # fmt: skip
    return weights, chosen


def sort_by_expert_triton(chosen: Tensor, experts: int, block_m: int) -> Routing:
    """``sort_by_expert`` through Triton: one program an expert, which looks at all assignments."""
    assignments = chosen.numel()
    tiles = most_tiles(assignments, experts, block_m)
    order, starts, tile_experts, tile_starts = (
        torch.empty(size, dtype=torch.int32, device=chosen.device) for size in (assignments, experts + 1, tiles, tiles)
    )
    sort_kernel[experts,](
        chosen, order, starts, tile_experts, tile_starts, assignments, experts, tiles, BLOCK_M=block_m,
        BINS=triton.next_power_of_2(experts + 1), CHUNK=min(CHUNK, max(128, triton.next_power_of_2(assignments))),
        num_warps=4, **pdl(chosen.device),
    )  # fmt: skip
    return Routing(order, starts, tile_experts, tile_starts, block_m)


def combine_triton(answers: Tensor, weights: Tensor) -> Tensor:
    """``combine`` through Triton."""
    (tokens, per_token), width = weights.shape, answers.shape[1]
    out = torch.empty(tokens, width, dtype=answers.dtype, device=answers.device)
    if tokens:
        combine_kernel[tokens, triton.cdiv(width, COLUMNS)](
            answers, weights, out, width, PER_TOKEN=per_token, BLOCK=COLUMNS, num_warps=4, **pdl(out.device)
        )
    return out


@triton.jit
def choose_kernel(
    logits, weights, chosen, logits_stride, experts,
    PER_TOKEN: tl.constexpr, RENORMALIZED: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The experts of one token: the greatest probability, PER_TOKEN times; of equals the first."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    wait(PDL)
    own = tl.load(logits + token * logits_stride + expert, mask=expert < experts, other=float("-inf")).to(tl.float32)
    p = tl.exp(own - tl.max(own, 0))
    p = tl.where(expert < experts, p / tl.sum(p, 0), -1.0)
    best = tl.zeros([SLOTS], dtype=tl.float32)
    at = tl.zeros([SLOTS], dtype=tl.int32)
    for turn in tl.static_range(PER_TOKEN):
        # NaN has no place: any expert will do, for its answer is NaN.
        index = tl.minimum(tl.argmax(p, 0), experts - 1)
        best = tl.where(slot == turn, tl.max(p, 0), best)
        at = tl.where(slot == turn, index, at)
        p = tl.where(expert == index, -1.0, p)
    if RENORMALIZED:
        best = best / tl.sum(best, 0)
    tl.store(weights + token * PER_TOKEN + slot, best, mask=slot < PER_TOKEN)
    tl.store(chosen + token * PER_TOKEN + slot, at, mask=slot < PER_TOKEN)


@triton.jit(do_not_specialize=["assignments", "tiles"])
def sort_kernel(
    chosen, order, starts, tile_experts, tile_starts, assignments, experts, tiles,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The place of one expert's assignments in the order, and its tiles."""
    own = tl.program_id(0)
    bins = tl.arange(0, BINS)
    step = tl.arange(0, CHUNK)
    wait(PDL)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for first in tl.range(0, assignments, CHUNK):
        a = first + step
        counts += tl.histogram(tl.load(chosen + a, mask=a < assignments, other=BINS - 1), BINS)
    counts = tl.where(bins < experts, counts, 0)
    start = tl.sum(tl.where(bins < own, counts, 0), 0)
    tl.store(starts + own, start)

    of_each = (counts + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.sum(tl.where(bins < own, of_each, 0), 0)
    end_tile = first_tile + tl.sum(tl.where(bins == own, of_each, 0), 0)
    for first in tl.range(first_tile, end_tile, 32):
        tile = first + tl.arange(0, 32)
        tl.store(tile_experts + tile, own, mask=tile < end_tile)
        tl.store(tile_starts + tile, start + (tile - first_tile) * BLOCK_M, mask=tile < end_tile)
    if own == experts - 1:
        tl.store(starts + experts, assignments)
        for first in tl.range(end_tile, tiles, 32):
            tile = first + tl.arange(0, 32)
            tl.store(tile_experts + tile, -1, mask=tile < tiles)
            tl.store(tile_starts + tile, 0, mask=tile < tiles)

    for first in tl.range(0, assignments, CHUNK):
        a = first + step
        mine = tl.load(chosen + a, mask=a < assignments, other=-1) == own
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + start + rank, a, mask=mine)
        start += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def combine_kernel(answers, weights, out, width, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wait(PDL)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for slot in tl.static_range(PER_TOKEN):
        a = token * PER_TOKEN + slot
        answer = tl.load(answers + a * width + column, mask=inside, other=0.0)
        acc += tl.load(weights + a) * answer.to(tl.float32)
    tl.store(out + token * width + column, acc.to(out.dtype.element_ty), mask=inside)
