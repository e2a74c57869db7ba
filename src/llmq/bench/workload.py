"""Random prompts of one length. No torch."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from llmq.errors import USAGE, LlmqError


@dataclass(frozen=True, slots=True)
class Workload:
    """num_prompts   requests, all there at the start
    input_len     tokens of each prompt
    output_len    tokens generated for each, whatever they are
    seed          of the prompts
    """

    num_prompts: int = 64
    input_len: int = 128
    output_len: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise LlmqError(
                    f"{name} must be 1 or more, not {getattr(self, name)}", f"check {flag}", exit_code=USAGE
                )

    def check_context(self, context_length: int) -> None:
        """Raise LlmqError unless prompt and output fit a context of so many tokens."""
        needed = self.input_len + self.output_len
        if needed > context_length:
            raise LlmqError(
                f"{self.input_len} tokens in and {self.output_len} out make {needed}, "
                f"and the model's context is {context_length}",
                "lower --input-len or --output-len",
                exit_code=USAGE,
            )

    def prompts(self, vocab_size: int, excluded: Collection[int]) -> list[list[int]]:
        """Token ids drawn uniformly from the vocabulary without ``excluded``."""
        return self._draw("measured", self.num_prompts, vocab_size, excluded)

    def warm_up_prompts(self, number: int, vocab_size: int, excluded: Collection[int]) -> list[list[int]]:
        """Other prompts of the same length, so that nothing of the measured ones is warm but the machine."""
        return self._draw("warm-up", number, vocab_size, excluded)

    def _draw(self, purpose: str, number: int, vocab_size: int, excluded: Collection[int]) -> list[list[int]]:
        noise = random.Random(f"{purpose} {self.seed}")
        choices = [token for token in range(vocab_size) if token not in excluded]
        return [noise.choices(choices, k=self.input_len) for _ in range(number)]
