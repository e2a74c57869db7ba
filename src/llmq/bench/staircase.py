"""Decode speed at many batch sizes from one batch, whose sequences end in turns.

    sequences running                      tokens/s at a size: size / median gap between two steps that both brought a
    8 ████████                             token to so many sequences, once all prompts are computed
    4         ████████
    2                 ████████
    1                         ████████     → time

Prompts are computed once for all sizes. Contexts grow by STEPS from one size to the next, for every model alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from llmq.errors import LlmqError

STEPS = 24
"""Steps at each size."""


def output_lengths(batch_sizes: Sequence[int], lead: int) -> list[int]:
    """Tokens of each sequence of the largest batch, so that STEPS steps or so are at each size; the first ``lead``
    tokens are for the time in which prompts are still computed."""
    falling = sorted(batch_sizes, reverse=True)
    lengths: list[int] = []
    for level, (size, below) in enumerate(pairwise([*falling, 0]), 1):
        lengths += [lead + level * STEPS] * (size - below)
    return lengths


def decode_speeds(token_times: Sequence[Sequence[float]], batch_sizes: Sequence[int]) -> dict[int, float]:
    """Tokens/s by batch size, of sequences whose tokens came at these times. Tokens of one step have one time.
    LlmqError when a batch never ran whole."""
    at = Counter(time for own in token_times for time in own)
    settled = max(own[0] for own in token_times)
    gaps: dict[int, list[float]] = defaultdict(list)
    for before, after in pairwise(sorted(time for time in at if time >= settled)):
        if at[before] == at[after]:
            gaps[at[after]].append(after - before)
    missing = [size for size in batch_sizes if not gaps[size]]
    if missing:
        raise LlmqError(
            f"{missing[0]} sequences never ran at once", "give the KV cache more memory, or smaller batches"
        )
    return {size: size / median(gaps[size]) for size in sorted(batch_sizes)}
