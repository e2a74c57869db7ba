"""BlockManager: which blocks of the KV cache belong to which sequence."""

from __future__ import annotations

from collections import deque

from llmq.engine.request import Sequence
from llmq.memory import RESERVED_BLOCKS, blocks_for


class BlockManager:
    """Hands out the blocks of one pool.

    pool   | 0 | 1 | 2 | 3 | … | num_blocks − 1 |
             │   └── free, or in exactly one sequence's block table
             └── reserved: where padding reads and writes
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(RESERVED_BLOCKS, num_blocks))

    @property
    def total(self) -> int:
        """Blocks that sequences can own."""
        return self.num_blocks - RESERVED_BLOCKS

    @property
    def capacity(self) -> int:
        """Tokens that the whole pool holds of one sequence."""
        return self.total * self.block_size

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def fits(self, sequence: Sequence) -> bool:
        """Whether there are free blocks for all tokens that ``sequence`` has so far."""
        return self._missing(sequence) <= len(self._free)

    def grow(self, sequence: Sequence) -> None:
        """Lengthen the block table until it holds all tokens that ``sequence`` has so far."""
        for _ in range(self._missing(sequence)):
            sequence.block_table.append(self._free.popleft())

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks; what they hold is forgotten."""
        self._free.extend(reversed(sequence.block_table))
        sequence.block_table.clear()
        sequence.computed = 0

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Raise RuntimeError unless every block is free or in one table, once."""
        owned = [block for sequence in sequences for block in sequence.block_table]
        seen = sorted([*owned, *self._free])
        if seen != list(range(RESERVED_BLOCKS, self.num_blocks)):
            raise RuntimeError(f"{len(owned)} blocks owned and {len(self._free)} free, of {self.total}")

    def _missing(self, sequence: Sequence) -> int:
        return blocks_for(sequence.total, self.block_size) - len(sequence.block_table)
