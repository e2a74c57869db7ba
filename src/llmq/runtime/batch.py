"""Batch: a step as tensors on the device. One copy takes all its integers there, behind the tokens drawn last.

ints  int32   | drawn | token ids | sources | positions | slots of group 0 | …
                D       T           T         T           T
              … | query starts | KV lengths | order | longest | seeds | temperatures |
                  R + 1          R            R       1         2 R     R

T tokens of R rows lie end to end; D is room for the tokens that the step before draws. Each part begins at a multiple
of 16 bytes: kernels are compiled for that.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llmq.plan import PlanRow

ALIGNMENT = 4
"""Integers in 16 bytes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells apart batches that run the same kernels on the same grids: D, T, R, groups of layers, and bounds of a
    row's tokens in the step and in the cache."""

    drawn: int
    tokens: int
    rows: int
    groups: int
    min_query_length: int
    max_query_length: int
    max_kv_length: int

    @property
    def parts(self) -> tuple[int, ...]:
        """Length of each part, but for what was drawn."""
        return (*[self.tokens] * (3 + self.groups), self.rows + 1, self.rows, self.rows, 1, 2 * self.rows, self.rows)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each part begins, and last, where the ints end."""
        return tuple(accumulate((length + -length % ALIGNMENT for length in self.parts), initial=self.drawn))


@dataclass(frozen=True, slots=True)
class Batch:
    """ints                       all of it, as drawn above
    sources                    [T]: where in it the id of each token is, given or drawn
    positions                  [T]
    slots                      [T] for each group of layers: where the token's keys and values go
    query_starts, kv_lengths   [R + 1], [R]; see ``paged_attention``
    order                      [R]: the rows, the longest first
    longest                    [1]: the greatest of kv_lengths
    seeds, temperatures        int64 [R], fp32 [R], to draw each row's next token by; 0 where none is drawn
    """

    shape: Shape
    ints: Tensor
    sources: Tensor
    positions: Tensor
    slots: tuple[Tensor, ...]
    query_starts: Tensor
    kv_lengths: Tensor
    order: Tensor
    longest: Tensor
    seeds: Tensor
    temperatures: Tensor

    @property
    def last(self) -> Tensor:
        """[R]: the last token of each row."""
        return self.query_starts[1:] - 1


def batch_shape(rows: Sequence[PlanRow], drawn: int) -> Shape:
    """The shape of a step of ``rows``, with the bounds as they are."""
    lengths = [len(row.tokens) for row in rows]
    ends = [row.end for row in rows]
    return Shape(drawn, sum(lengths), len(rows), len(rows[0].block_tables), min(lengths), max(lengths), max(ends))


def fill(rows: Sequence[PlanRow], shape: Shape, block_size: int) -> array[int]:
    """The ints of a step of ``rows``, but for what was drawn."""
    parts = [array("i") for _ in shape.parts]
    token_ids, sources, positions, *slots, query_starts, kv_lengths, order, longest, seeds, temperatures = parts
    sources.extend(range(shape.drawn, shape.drawn + shape.tokens))
    query_starts.append(0)
    for row in rows:
        start, end = row.start, row.start + len(row.tokens)
        token_ids.extend(row.tokens)
        if row.tokens and row.tokens[-1] < 0:  # only the newest of a sequence can be unknown
            sources[len(token_ids) - 1] = -1 - row.tokens[-1]
        positions.extend(range(start, end))
        for into, table in zip(slots, row.block_tables, strict=True):
            place = start
            while place < end:  # a block at a time
                stop = min(end, place - place % block_size + block_size)
                first = table[place // block_size] * block_size + place % block_size
                into.extend(range(first, first + stop - place))
                place = stop
        query_starts.append(len(token_ids))
        kv_lengths.append(end)
    order.extend(sorted(range(len(rows)), key=kv_lengths.__getitem__, reverse=True))
    longest.append(max(kv_lengths))
    drawing = [row.sampling for row in rows]
    seeds.frombytes(array("q", [one.seed if one else 0 for one in drawing]).tobytes())
    temperatures.frombytes(array("f", [one.temperature if one else 0.0 for one in drawing]).tobytes())
    whole = array("i")
    for part in parts:
        whole.extend(part)
        whole.extend([0] * (-len(part) % ALIGNMENT))
    return whole


def view(ints: Tensor, shape: Shape) -> Batch:
    """The batch of ``shape`` that lies in ``ints``."""
    parts = [ints[start : start + length] for start, length in zip(shape.starts, shape.parts, strict=False)]
    _, sources, positions, *slots, query_starts, kv_lengths, order, longest, seeds, temperatures = parts
    return Batch(
        shape,
        ints,
        sources,
        positions,
        tuple(slots),
        query_starts,
        kv_lengths,
        order,
        longest,
        seeds.view(torch.int64),
        temperatures.view(torch.float32),
    )
