"""QuantizedWeight: one linear layer's integer weights, unpacked. Every format packs it and unpacks to it.

weight[n, k] = scales[n, g] · (codes[n, k] − zero_points[n, g])      g = group_index[k], or k // group length
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

from llmq.scheme import Scheme


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """codes        uint8 [out, in], in ``[0, 2^bits)``
    scales       floating [out, groups]
    zero_points  uint8 [out, groups]
    group_index  int64 [in], or None where group g holds the g-th run of consecutive channels
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    group_index: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """The weight [out, in] in fp32."""
        import torch

        index = self.group_index
        if index is None:
            in_features = self.shape[1]
            index = torch.arange(in_features, device=self.codes.device) // self.scheme.group_length(in_features)
        scales, zeros = self.scales.float()[:, index], self.zero_points.float()[:, index]
        return scales * (self.codes.float() - zeros)
