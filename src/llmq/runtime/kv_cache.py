"""The KV cache on the device, and the place in main memory that preempted requests are moved to.

pool   [layers of a group, 2, num_blocks, block_size, kv_heads, head_dim]
                           │  └── block 0 is where padding reads and writes
                           └── keys, values
scales [layers of a group, 2, num_blocks, kv_heads, block_size]        of a pool of int8, fp32
swap   [blocks of a piece, layers of a group, 2, block_size, kv_heads, head_dim], and of scales, in main memory
slot of a token = block · block_size + offset in the block

All groups of layers are of one size and share the blocks: a block belongs to one group at a time.

Blocks travel to main memory and back on a stream of their own, while the one that computes goes on:

    computes   │ … step n │ gather the blocks that go │ step n + 1 …        │ wait │ put the blocks that came in place │
    copies                                            │ them → main memory │ main memory → the device │
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmq.checkpoint.config import ModelConfig
from llmq.plan import StepPlan, layer_groups
from llmq.runtime.device import on_device
from llmq.runtime.kernels.kv_write import Scales

PIECE_BYTES = 2**26
"""Of main memory that is pinned at once: a power of two, which is what torch takes."""


@dataclass(frozen=True, slots=True)
class _Store:
    """Keys and values, or their scales: ``pool`` on the device, and ``pieces`` of ``cpu_blocks`` in main memory."""

    pool: Tensor
    cpu_blocks: int
    pieces: list[Tensor] = field(default_factory=list)

    @property
    def blocks(self) -> Tensor:
        """The pool, block by block."""
        return self.pool.movedim(2, 0)

    def home(self, block: int) -> Tensor:
        """Where a block lies in main memory. It is pinned piece by piece, as more is needed than ever was: all at
        once, 16 GiB take seven seconds of a start."""
        room = min(self.cpu_blocks, max(1, PIECE_BYTES // self.blocks[0].nbytes))
        while len(self.pieces) <= block // room:
            shape, on_gpu = (room, *self.blocks.shape[1:]), self.pool.is_cuda
            self.pieces.append(torch.empty(shape, dtype=self.pool.dtype, pin_memory=on_gpu))
        return self.pieces[block // room][block % room]


class KVCache:
    """The pool, allocated once for the life of the engine, and the swap space."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: str,
        cpu_blocks: int = 0,
        layer_scales: Tensor | None = None,
    ) -> None:
        """Allocate the pool. It is zeroed because attention multiplies masked positions by 0, and 0 · NaN is NaN.

        dtype         of keys and values as they are kept; int8 and e4m3 as in ``write_kv``
        layer_scales  for e4m3, fp32 [num_layers, 2]: of each layer's keys and values; None: all are 1
        """
        self.groups = layer_groups(config.windows)
        self._places = {
            layer: (number, index)
            for number, group in enumerate(self.groups)
            for index, layer in enumerate(group.layers)
        }
        block = (block_size, config.num_kv_heads, config.head_dim)
        layers = len(self.groups[0].layers)
        stores: list[tuple[tuple[int, ...], torch.dtype]] = [(block, dtype)]
        if dtype == torch.int8:
            stores.append(((config.num_kv_heads, block_size), torch.float32))
        self._stores = [
            _Store(torch.zeros((layers, 2, num_blocks, *each), dtype=kind, device=device), cpu_blocks)
            for each, kind in stores
        ]
        self._copies = None if device == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = self._stores[0].pool
        self.block_size = block_size
        self._layer_scales = layer_scales
        if dtype == torch.float8_e4m3fn and layer_scales is None:
            self._layer_scales = torch.ones(config.num_layers, 2, device=device)

    @property
    def num_bytes(self) -> int:
        """Of the pool and its scales."""
        return sum(store.pool.nbytes for store in self._stores)

    def layer(self, layer: int) -> tuple[Tensor, Tensor, Scales | None]:
        """Keys and values of one layer, each [num_blocks, block_size, kv_heads, head_dim], and their scales."""
        _, index = self._places[layer]
        scales = None
        if self._layer_scales is not None:
            scales = self._layer_scales[layer, :1], self._layer_scales[layer, 1:]
        elif len(self._stores) > 1:
            of_tokens = self._stores[1].pool
            scales = of_tokens[index, 0], of_tokens[index, 1]
        return self.pool[index, 0], self.pool[index, 1], scales

    def group_of(self, layer: int) -> int:
        return self._places[layer][0]

    def move(self, plan: StepPlan) -> None:
        """The moves of a step, in their order: swap out, swap in, copy."""
        for store in self._stores:
            if plan.swap_out:
                self._swap_out(store, plan.swap_out)
            if plan.swap_in:
                self._swap_in(store, plan.swap_in)
            if plan.copies:
                source, target = on_device(plan.copies, torch.int64, store.pool.device).unbind(1)
                store.blocks[target] = store.blocks[source]

    def _swap_out(self, store: _Store, pairs: Sequence[tuple[int, int]]) -> None:
        here = on_device([block for block, _ in pairs], torch.int64, store.pool.device)
        going = store.blocks[here].contiguous()  # from now on others may have the pool's blocks
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(going.device))
            going.record_stream(self._copies)
        with torch.cuda.stream(self._copies):
            for block, (_, there) in zip(going, pairs, strict=True):
                store.home(there).copy_(block, non_blocking=True)

    def _swap_in(self, store: _Store, pairs: Sequence[tuple[int, int]]) -> None:
        with torch.cuda.stream(self._copies):
            coming = store.pool.new_empty(len(pairs), *store.blocks.shape[1:])
            for block, (there, _) in zip(coming, pairs, strict=True):
                block.copy_(store.home(there), non_blocking=True)
        if self._copies is not None:
            step = torch.cuda.current_stream(coming.device)
            step.wait_stream(self._copies)
            coming.record_stream(step)
        here = on_device([block for _, block in pairs], torch.int64, store.pool.device)
        store.blocks[here] = coming
