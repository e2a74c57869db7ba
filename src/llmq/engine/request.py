"""What is asked of the engine, and where each answer stands.

A sequence has no phases, only three counters:

    total      prompt tokens and generated tokens
    computed   of those, how many have their keys and values in the cache
    scheduled  of those, how many the current step computes

A chunk of a prompt, the newest token, and a sequence that starts over after a preemption are all ``total − computed``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from llmq.errors import USAGE, LlmqError
from llmq.plan import RowSampling, TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_LOGPROBS = 50
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a completion is drawn.

    max_tokens   tokens to generate at most; None: until the model's context is full
    temperature  0: always the likeliest token
    top_k        draw among the k likeliest; 0: among all
    top_p        draw among the likeliest whose probabilities reach p
    seed         of the noise: the same seed gives the same tokens, whatever else is in the batch
    stop         texts that end the completion, and are not part of it
    n            completions of the prompt; sample i uses seed + i
    logprobs     log-probabilities of the drawn and of the k likeliest tokens, before temperature; None: none
    ignore_eos   go on past an end-of-text token
    """

    max_tokens: int | None = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "1 or more"),
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 or more"),
            (self.top_k >= 0, "top_k", "0 (all) or more"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", "0 or more, below 2^63"),
            (all(self.stop), "stop", "made of texts that are not empty"),
            (self.n >= 1, "n", "1 or more"),
            (self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"from 0 to {MAX_LOGPROBS}"),
        )
        for valid, name, rule in checks:
            if not valid:
                flag = f"--{name.replace('_', '-')}"
                raise LlmqError(f"{name} must be {rule}, not {getattr(self, name)}", f"check {flag}", exit_code=USAGE)


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion in the making. ``sequence_id`` grows with arrival: the smaller, the earlier."""

    sequence_id: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    max_total: int
    """Tokens, prompt included, at which the completion is as long as it may get."""
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)
    computed: int = 0
    scheduled: int = 0
    block_table: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def total(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return self.total - self.computed

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Token ids at positions ``start`` … ``stop − 1``."""
        prompt = len(self.prompt_ids)
        return tuple(self.prompt_ids[start:stop]) + tuple(
            self.output_ids[max(start - prompt, 0) : max(stop - prompt, 0)]
        )

    @property
    def sampling(self) -> RowSampling:
        params = self.params
        return RowSampling(params.temperature, params.top_k, params.top_p, self.seed, params.logprobs)
