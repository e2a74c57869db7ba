"""KV caches of 8 bits to test with, made by other means than the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.runtime.kernels.kv_write import Scales
from llmq.runtime.kernels.quantize_rows import CODES
from llmq.scheme import E4M3, INT


def rounded_caches(caches: Sequence[Tensor], number: str) -> tuple[list[Tensor], Scales, list[Tensor]]:
    """Keys and values in 8 bits of ``number``, their scales, and what these stand for; NaN stays NaN."""
    codes, scales, numbers = [], [], []
    for cache in caches:
        if number == INT:
            scale = (cache.abs().amax(-1) / 127).float()
            codes.append((cache / scale[..., None]).round().nan_to_num(77).to(torch.int8))
            scales.append(scale.transpose(1, 2).contiguous())
            numbers.append(codes[-1] * scale[..., None].double())
        else:
            scales.append(torch.tensor([0.013 * (1 + len(scales))], device=cache.device))
            codes.append((cache / scales[-1]).clamp(-448, 448).to(torch.float8_e4m3fn))
            numbers.append(codes[-1].double() * scales[-1])
    return codes, (scales[0], scales[1]), numbers


def empty_cache(number: str, blocks: int, block_size: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Scales]:
    """Keys and values of 0, stacked, with scales of 0, but for those of a layer."""
    codes = torch.zeros(2, blocks, block_size, kv_heads, head_dim).to(CODES[number])
    if number == E4M3:
        return codes, (torch.tensor([1 / 128]), torch.tensor([1 / 256]))
    scales = torch.zeros(2, blocks, kv_heads, block_size)
    return codes, (scales[0], scales[1])
