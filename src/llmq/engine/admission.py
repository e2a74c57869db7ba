"""The first of the four checks that a request passes: at submission, whether it can ever run here at all.

The other three are the scheduler's, step by step: blocks, tokens, sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmq import memory
from llmq.engine.blocks import BlockManager
from llmq.engine.options import EngineOptions
from llmq.engine.request import SamplingParams
from llmq.errors import CHECK_FAILED, FAILED, LlmqError

Check = Literal["context", "step", "sequences", "blocks"]


class Rejected(LlmqError):
    """A request that can never run here. ``check`` is the limit that it is over."""

    def __init__(self, check: Check, message: str, hint: str, *, exit_code: int = FAILED) -> None:
        super().__init__(message, hint, exit_code=exit_code)
        self.check: Check = check


@dataclass(frozen=True, slots=True)
class Limits:
    """What no request may exceed. ``context`` tokens of a sequence, ``block_bytes`` of a block of the pool."""

    context: int
    block_bytes: int
    options: EngineOptions
    blocks: BlockManager

    def truncated(self, prompt_ids: list[int], params: SamplingParams) -> list[int]:
        """The prompt, cut as ``params`` say if there would be no room for the answer."""
        longest = self.context - (params.max_tokens or 1)
        if params.truncate == "error" or len(prompt_ids) < self.context or longest < 1:
            return prompt_ids
        return prompt_ids[-longest:] if params.truncate == "left" else prompt_ids[:longest]

    def max_total(self, prompt_tokens: int, params: SamplingParams) -> int:
        """How long a completion may get, prompt included. Rejected, with the numbers, when it can never run."""
        options, blocks = self.options, self.blocks
        if prompt_tokens >= self.context:
            most = self.context - 1
            hint = f"shorten the prompt to {most} tokens or fewer, or pass --truncate left"
            if params.truncate != "error":
                hint = f"lower --max-tokens to {most} or less: the prompt is cut to what the answer leaves"
            raise Rejected(
                "context",
                f"the prompt has {prompt_tokens} tokens and the model's context is {self.context}, the answer included",
                hint,
            )
        if options.scheduler == "prefill-first" and prompt_tokens > options.batched_tokens:
            raise Rejected(
                "step",
                f"the prompt has {prompt_tokens} tokens and a step computes {options.batched_tokens}",
                "raise --max-num-batched-tokens, or pass --scheduler mixed, which computes prompts in chunks",
            )
        if params.width > options.seats:
            raise Rejected(
                "sequences",
                f"the request is {params.width} sequences and {options.seats} may run at once",
                f"raise --max-num-seqs and --max-num-batched-tokens to {params.width}, or ask for fewer",
            )
        longest = blocks.longest(prompt_tokens, params.width)
        if params.max_tokens is None:
            wanted = min(self.context, max(longest, prompt_tokens + 1))
        else:
            wanted = min(self.context, prompt_tokens + params.max_tokens)
        if blocks.worst_case(prompt_tokens, wanted, params.width) > blocks.total:
            several = "" if params.width == 1 else f"in each of {params.width} sequences, "
            raise Rejected(
                "blocks",
                f"prompt and answer may take {wanted} tokens and the whole KV cache holds {longest} {several}".strip(
                    ", "
                ),
                f"lower --max-tokens, or raise --kv-cache-memory to "
                f"{self.cache_size(blocks.worst_case(prompt_tokens, wanted, params.width))}",
                exit_code=CHECK_FAILED,
            )
        return wanted

    def cache_size(self, blocks: int) -> str:
        """A size for --kv-cache-memory that holds so many blocks."""
        return format_cache_size(blocks, self.block_bytes)


def format_cache_size(blocks: int, block_bytes: int) -> str:
    """A size for --kv-cache-memory of so many blocks and the reserved one, in whole MiB."""
    size = (blocks + memory.RESERVED_BLOCKS) * block_bytes
    return f"{-(-size // 2**20)}MiB"
