"""Split K: a product whose sum over K was divided among programs, with each split's part still to be added."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SplitSums(NamedTuple):
    """out [M, N] = (Σ sums) · x_scales · weight_scales + bias, rounded to ``dtype``: to add where it is read.

    sums           [splits, M, N]   fp32, or int32 of 8-bit integers; added in order
    x_scales       [M, 1]           fp32; None, like the two below: there are none
    weight_scales  [N]              fp32
    bias           [N]
    """

    sums: Tensor
    x_scales: Tensor | None
    weight_scales: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype


def whole(product: Tensor | SplitSums) -> Tensor:
    """The product, [M, N]: its splits added, by a kernel of their own, where it is in splits."""
    if isinstance(product, Tensor):
        return product
    from llmq.runtime.kernels.split_k_triton import reduce_splits

    _, rows, out_features = product.sums.shape
    out = torch.empty(rows, out_features, dtype=product.dtype, device=product.sums.device)
    reduce_splits(*product[:4], out)
    return out


def add_splits_reference(split: SplitSums) -> Tensor:
    """``whole`` in plain PyTorch."""
    out = split.sums[0].clone()
    for sums in split.sums[1:]:
        out += sums
    out = out.float()
    if split.x_scales is not None and split.weight_scales is not None:
        out = out * split.weight_scales * split.x_scales
    return (out if split.bias is None else out + split.bias).to(split.dtype)
