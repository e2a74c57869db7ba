"""The block tables of a step's rows, on the device. Only what is new travels there.

matrix  int32 [rows, columns]     | table of the plan's row r | left over from rows before: never read |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.runtime.device import on_device


class BlockTables:
    """The tables of one group of layers: of ``rows`` rows of at most ``columns`` blocks.

    A row of a plan names the very same list as in the step before unless its table is another: then it has only grown.
    """

    def __init__(self, rows: int, columns: int, device: str) -> None:
        self.matrix = torch.zeros((rows, columns), dtype=torch.int32, device=device)
        self._tables: list[Sequence[int]] = [()] * rows
        self._lengths = [0] * rows

    def update(self, tables: Sequence[Sequence[int]]) -> Tensor:
        """The matrix, in which row r now begins with ``tables[r]``. The host does not wait for that."""
        columns = self.matrix.shape[1]
        places: list[int] = []
        blocks: list[int] = []
        for row, table in enumerate(tables):
            same, length = table is self._tables[row], self._lengths[row]
            if same and length == len(table):
                continue
            first = length if same else 0
            places.extend(range(row * columns + first, row * columns + len(table)))
            blocks.extend(table[first:])
            self._tables[row], self._lengths[row] = table, len(table)
        if places:
            at, new = on_device([places, blocks], torch.int32, self.matrix.device)
            self.matrix.view(-1)[at] = new
        return self.matrix
