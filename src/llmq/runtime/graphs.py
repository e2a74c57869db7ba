"""CUDA graphs: short steps are replayed by one launch, instead of launching hundreds of kernels each.

A step of one token a row is padded to one of a few numbers of rows; padding rows read and write block 0. For each
number of rows, and power of two above the longest row, a graph is captured when it is first needed. All share one pool
of memory, and read what they are given from the same ints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmq.plan import PlanRow
from llmq.runtime.batch import Batch, Shape, batch_shape, fill, view

MAX_ROWS = 512
"""A longer step takes the device longer than launching its kernels one by one takes the host."""
MIN_KV_LENGTH = 1024

Forward = Callable[[Batch], Tensor]


def padded_rows(rows: int) -> int:
    """1, 2, 4, 8, 16, 24, …, 64, 80, …, 128, 160, …: at most a quarter more than ``rows`` above 8."""
    power = 1 << (rows - 1).bit_length()
    step = power if power <= 8 else max(8, power // 8)
    return -(-rows // step) * step


def padded_kv_length(length: int) -> int:
    """The power of two from ``length`` on."""
    return max(MIN_KV_LENGTH, 1 << (length - 1).bit_length())


class DecodeGraphs:
    """The graphs of ``forward``, for steps of one token a row."""

    def __init__(self, forward: Forward, drawn: int, groups: int, device: str) -> None:
        self._forward = forward
        self._ints = torch.zeros(
            Shape(drawn, MAX_ROWS, MAX_ROWS, groups, 1, 1).starts[-1], dtype=torch.int32, device=device
        )
        self.drawn = self._ints[:drawn]
        """Where the graphs look for the tokens that were drawn last."""
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, rows: Sequence[PlanRow], block_size: int) -> Tensor:
        """What ``forward`` makes of ``rows``, whose number is one of ``padded_rows``."""
        drawn = len(self.drawn)
        exact = batch_shape(rows, drawn)
        shape = replace(exact, max_kv_length=padded_kv_length(exact.max_kv_length))
        ints = torch.frombuffer(fill(rows, shape, block_size), dtype=torch.int32).pin_memory()
        self._ints[drawn : drawn + len(ints)].copy_(ints, non_blocking=True)
        if shape in self._graphs:
            graph, out = self._graphs[shape]
            graph.replay()
            return out
        batch = view(self._ints, shape)
        # This compiles what is not compiled yet, which a capture cannot do, and it is the step.
        result = self._forward(batch)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = self._forward(batch)
        self._graphs[shape] = (graph, out)
        return result
