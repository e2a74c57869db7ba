"""A product whose sum over K was divided among programs, before their shares are added up.

sums [splits, M, N]     y[m, n] = (Σ_s sums[s, m, n]) · x_scales[m] · weight_scales[n]  +  bias[n]

The splits are added in order. Where a norm comes next, it does so while it reads them: one kernel less, and the same
bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.runtime.kernels import runs_triton


@dataclass(frozen=True, slots=True)
class SplitSums:
    """sums                     int32 or fp32 [splits, M, N]
    x_scales, weight_scales  fp32 [M, 1] and [N], or both None: 1
    bias                     [N]; None: 0
    dtype                    of the result
    """

    sums: Tensor
    x_scales: Tensor | None
    weight_scales: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype

    def whole(self) -> Tensor:
        """The result, [M, N]."""
        if not runs_triton(self.sums):
            return self._whole_reference()
        from llmq.runtime.kernels.split_k_triton import add_splits

        return add_splits(self)

    def _whole_reference(self) -> Tensor:
        total = self.sums[0].clone()
        for part in self.sums[1:]:
            total += part
        out = total.float()
        if self.x_scales is not None and self.weight_scales is not None:
            out = out * self.weight_scales * self.x_scales
        return (out if self.bias is None else out + self.bias.float()).to(self.dtype)


def whole(product: Tensor | SplitSums) -> Tensor:
    """``product`` with its splits, if it has any, added up."""
    return product.whole() if isinstance(product, SplitSums) else product
