"""QuantizedWeight: one linear layer's quantized weights, unpacked. Every format packs it and unpacks to it.

weight[n, k] = scales[n, g] · (number(codes[n, k]) − zero_points[n, g])      g = group_index[k], or k // group length
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

from llmq.scheme import E4M3, FP4, INT, NF4, Scheme

TABLES = {
    # Quantiles of a normal distribution (Dettmers et al., "QLoRA", 2023), as bitsandbytes has them.
    NF4: (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # A sign, two bits of exponent, one of mantissa, divided by the largest, 12.
    FP4: tuple(
        sign * value / 12.0 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}  # fmt: skip


def numbers(number: str, device: torch.device | str = "cpu") -> Tensor:
    """What each code of ``number`` stands for, fp32 [codes]; not of integers, which stand for themselves."""
    import torch

    if number == E4M3:
        return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    return torch.tensor(TABLES[number], device=device)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """codes        uint8 [out, in], in ``[0, 2^bits)``
    scales       floating [out, groups]
    zero_points  uint8 [out, groups]; 0 where the scheme's number has none
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

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on ``device``."""
        index = None if self.group_index is None else self.group_index.to(device)
        codes, scales, zeros = (part.to(device) for part in (self.codes, self.scales, self.zero_points))
        return replace(self, codes=codes, scales=scales, zero_points=zeros, group_index=index)

    def dequantize(self) -> Tensor:
        """The weight [out, in] in fp32."""
        import torch

        index, scheme = self.group_index, self.scheme
        if index is None:
            in_features = self.shape[1]
            index = torch.arange(in_features, device=self.codes.device) // scheme.group_length(in_features)
        if scheme.number == INT:
            values = self.codes.float()
        else:
            values = numbers(scheme.number, self.codes.device)[self.codes.long()]
        return values.sub_(self.zero_points.float()[:, index]).mul_(self.scales.float()[:, index])
