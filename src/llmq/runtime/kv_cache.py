"""The KV cache on the device: one pool of blocks.

pool [layers, 2, num_blocks, block_size, kv_heads, head_dim]
              │  └── block 0 is where padding reads and writes
              └── keys, values
slot of a token = block · block_size + offset in the block
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.checkpoint.config import ModelConfig


class KVCache:
    """The pool, allocated once for the life of the engine."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: str) -> None:
        """Allocate the pool. It is zeroed because attention multiplies masked positions by 0, and 0 · NaN is NaN."""
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.pool = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [num_blocks, block_size, kv_heads, head_dim]."""
        return self.pool[layer, 0], self.pool[layer, 1]
