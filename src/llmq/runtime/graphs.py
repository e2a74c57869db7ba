"""CUDA graphs: short steps are replayed by one launch, instead of launching hundreds of kernels each.

A step, of new tokens alone or with chunks of prompts among them, is padded to one of a few numbers of tokens, and of
rows; padding reads and writes block 0. For each such shape, and power of two above the longest row, a graph is captured
when it comes for the second time. All share one pool of memory, and read what they are given from the same ints.
Long steps have one only of small models, and only those that need no padding: full ones, where prompts wait.

    rows of the plan   | row 0 | row 1: a chunk of a prompt | … | padding | … | nothing | … |
    tokens in each         1       many                             1               0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmq.plan import PlanRow
from llmq.runtime.batch import Batch, Shape, batch_shape, fill, view

MAX_TOKENS = 512
"""A longer step takes the device longer than launching its kernels one by one takes the host …"""
MAX_HIDDEN = 2**23
"""… unless its hidden states, tokens × hidden size, are so few: on an H200 8,192 tokens of Qwen3-0.6B take 15 ms, and
launching their kernels 16 to 33."""
MIN_KV_LENGTH = 1024
CHUNK = 64
"""Where all rows have as many tokens, no kernel of few queries is launched for nobody."""
NOBODY = -1
"""The sequence id of a row of padding."""

Forward = Callable[[Batch, bool], tuple[Tensor, Tensor | None]]
"""The hidden states of the last token of each row of a batch, and where asked for, a token drawn for each."""


def power_of_two(number: int) -> int:
    """The next one from ``number`` on."""
    return 1 << (number - 1).bit_length()


def padded_size(size: int) -> int:
    """1, 2, 4, 8, 16, 24, …, 64, 80, …, 128, 160, …: at most a quarter more than ``size`` above 8."""
    power = power_of_two(size)
    step = power if power <= 8 else max(8, power // 8)
    return -(-size // step) * step


def padded_kv_length(length: int) -> int:
    """The power of two from ``length`` on."""
    return max(MIN_KV_LENGTH, power_of_two(length))


def padded_rows(rows: Sequence[PlanRow]) -> list[PlanRow]:
    """``rows``, and behind them as many of one token as make their tokens one of the sizes; then, with chunks of
    prompts among them, as many of nothing as make the rows a power of two."""
    tokens = sum(len(row.tokens) for row in rows)
    padding = PlanRow(NOBODY, 0, (0,), tuple([0] for _ in rows[0].block_tables), None)
    padded = [*rows, *[padding] * (padded_size(tokens) - tokens)]
    if tokens == len(rows):
        return padded
    return [*padded, *[padding._replace(tokens=())] * (power_of_two(len(padded)) - len(padded))]


def padded_shape(rows: Sequence[PlanRow], drawn: int) -> Shape:
    """The shape of a step of ``padded_rows``, with bounds that many steps share."""
    exact = batch_shape(rows, drawn)
    shortest = CHUNK if all(len(row.tokens) >= CHUNK for row in rows if row.tokens) else 0
    longest = 1 if exact.max_query_length == 1 else exact.tokens
    kv_length = padded_kv_length(exact.max_kv_length)
    return replace(exact, min_query_length=shortest, max_query_length=longest, max_kv_length=kv_length)


class StepGraphs:
    """The graphs of ``forward``."""

    def __init__(self, forward: Forward, drawn: int, groups: int, hidden_size: int, device: str) -> None:
        """For steps of up to ``drawn`` rows, a power of two."""
        self._forward = forward
        self._longest = max(MAX_TOKENS, MAX_HIDDEN // hidden_size)
        largest = Shape(drawn, self._longest, drawn, groups, 0, 1, 1)
        self._ints = torch.zeros(largest.starts[-1], dtype=torch.int32, device=device)
        self.drawn = self._ints[:drawn]
        """Where the graphs look for the tokens that were drawn last."""
        self._met: set[tuple[Shape, bool]] = set()
        self._graphs: dict[tuple[Shape, bool], tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor | None]]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def take(self, tokens: int) -> bool:
        """Whether a step of so many tokens is replayed."""
        return tokens <= MAX_TOKENS or tokens == padded_size(tokens) <= self._longest

    def run(self, rows: Sequence[PlanRow], block_size: int, draws: bool) -> tuple[Tensor, Tensor | None]:
        """What ``forward`` makes of ``padded_rows``, of a step that the graphs ``take``."""
        drawn = len(self.drawn)
        shape = padded_shape(rows, drawn)
        ints = torch.frombuffer(fill(rows, shape, block_size), dtype=torch.int32).pin_memory()
        self._ints[drawn : drawn + len(ints)].copy_(ints, non_blocking=True)
        batch, key = view(self._ints, shape), (shape, draws)
        if key not in self._met:
            # This also compiles what is not compiled yet, which a capture cannot do.
            result = self._forward(batch, draws)
            self._met.add(key)
            return result
        if key not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                out = self._forward(batch, draws)
            self._graphs[key] = (graph, out)
        graph, out = self._graphs[key]
        graph.replay()
        return out
