"""Device code of ``gumbel``.

A row is divided among programs, each of which keeps the best of its part; the one that is done last looks at them all:

    logits[r]   | part 0 | part 1 | part 2 … |      → scores, tokens [rows, parts]   → drawn [rows]
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.gumbel import GOLDEN, MIX_1, MIX_2, MOST
from llmq.runtime.kernels.split_k_triton import counters, is_last

PART = 4096  # tokens that a program looks at
BLOCK = 1024  # of them at a time


def draw_gumbel_triton(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """``draw_gumbel`` through Triton."""
    rows, vocabulary = logits.shape
    parts = triton.cdiv(vocabulary, PART)
    scores = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    drawn = torch.empty(rows, dtype=torch.int64, device=logits.device)
    draw_kernel[rows, parts](
        logits, temperatures, seeds, positions, scores, tokens, counters(logits.device), drawn, vocabulary,
        logits.stride(0), GOLDEN=GOLDEN, MIX_1=MIX_1, MIX_2=MIX_2, MOST=MOST, PART=PART, BLOCK=BLOCK,
        PARTS=triton.next_power_of_2(parts), num_warps=4,
    )  # fmt: skip
    return drawn


@triton.jit
def mix(x, MIX_1: tl.constexpr, MIX_2: tl.constexpr):
    """splitmix64's finalizer on signed integers."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@triton.jit
def draw_kernel(
    logits, temperatures, seeds, positions, scores, tokens, counters, drawn, vocabulary, logits_stride,
    GOLDEN: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr, MOST: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The best of one part of one row, and in the last program of the row, of all."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature = tl.load(temperatures + row).to(tl.float32)
    key = mix(tl.load(seeds + row) * GOLDEN + tl.load(positions + row), MIX_1, MIX_2)
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    of_best = part * PART + tl.arange(0, BLOCK)
    for start in tl.static_range(0, PART, BLOCK):
        token = part * PART + start + tl.arange(0, BLOCK)
        logit = tl.load(logits + row * logits_stride + token, mask=token < vocabulary, other=float("-inf"))
        score = logit.to(tl.float32)
        if temperature > 0:
            state = mix(key + token.to(tl.int64) * GOLDEN, MIX_1, MIX_2)
            x = ((state >> 33) & 0x7FFFFFFF).to(tl.int32).to(tl.float32)
            x = tl.minimum((x + 0.5) * (1.0 / 2147483648.0), MOST)
            # log(1 − x) loses all of a small x; its series does not.
            noise = tl.where(x < 0.004, x * (1.0 + x * (0.5 + x * (1.0 / 3.0))), -tl.log(1.0 - x))
            score = score / temperature - tl.log(noise)
        better = score > best
        best = tl.where(better, score, best)
        of_best = tl.where(better, token, of_best)
    highest, token = first_of_highest(best, of_best)
    at = row * tl.num_programs(1)
    tl.store(scores + at + part, highest)
    tl.store(tokens + at + part, token)
    if not is_last(counters + row):
        return
    each = tl.arange(0, PARTS)
    inside = each < tl.num_programs(1)
    best = tl.load(scores + at + each, mask=inside, other=float("-inf"))
    of_best = tl.load(tokens + at + each, mask=inside, other=2147483647)
    highest, token = first_of_highest(best, of_best)
    tl.store(drawn + row, token.to(tl.int64))


@triton.jit
def first_of_highest(scores, tokens):
    """The highest score, and its token: of equals the first, as argmax has it."""
    highest = tl.max(scores, 0)
    return highest, tl.min(tl.where(scores == highest, tokens, 2147483647), 0)
