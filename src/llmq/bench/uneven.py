"""Requests whose answers differ in length, and the steps that batches of them take. No torch."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

from llmq.errors import USAGE, LlmqError

ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Requests:
    """num_prompts  how many
    input_len    tokens of each prompt
    longest      tokens generated for the longest
    spread       the shortest gets longest / spread; the logarithms of the lengths are uniform between
    growth       tokens of the one long answer
    seed         of all that is drawn
    """

    num_prompts: int = 128
    input_len: int = 8
    longest: int = 128
    spread: int = 16
    growth: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "longest", "spread"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise LlmqError(f"{flag} is {getattr(self, name)}", "make it 1 or more", exit_code=USAGE)
        if self.spread > self.longest or self.growth < 2:
            raise LlmqError("--spread is at most --longest, and --growth 2 or more", "check them", exit_code=USAGE)

    @property
    def output_lens(self) -> list[int]:
        noise = random.Random(f"lengths {self.seed}")
        return [round(self.longest / self.spread ** noise.random()) for _ in range(self.num_prompts)]


def count_steps(output_lens: Sequence[int], seats: int) -> tuple[int, int]:
    """Steps that static and continuous batching take for answers of these lengths, in this order, all there at the
    start: the sum of each batch's longest; and the end of the last when each takes the first seat that is free."""
    static = sum(max(output_lens[first : first + seats]) for first in range(0, len(output_lens), seats))
    free = [0] * seats
    for length in output_lens:
        heapq.heapreplace(free, free[0] + length)
    return static, max(free)
