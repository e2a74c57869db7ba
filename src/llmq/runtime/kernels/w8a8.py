"""Linear layers with 8-bit weights and 8-bit activations: int8, or FP8 of type e4m3.

y[m, n] = (Σ_k x[m, k] · w[n, k]) · x_scale[m] · w_scale[n]  +  bias[n]          x, w: codes; scales: fp32

Nothing is unpacked: the matrix unit multiplies the codes as they are. Sums of integers are exact, in int32; sums of
floats are fp32, but for long batches. Weights stay in the order of the checkpoint, [N, K], in which K, as the unit
wants it, is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.runtime.kernels import runs_triton
from llmq.runtime.kernels.quantize_rows import CODES, QuantizedRows
from llmq.scheme import E4M3, INT


@dataclass(frozen=True, slots=True)
class Weight8:
    """codes   int8 or float8_e4m3fn [N, K]
    scales  fp32 [N]
    """

    codes: Tensor
    scales: Tensor

    @property
    def number(self) -> str:
        return INT if self.codes.dtype == torch.int8 else E4M3


def pack_w8a8(weight: QuantizedWeight) -> Weight8:
    """Codes as the numbers they stand for, of a scheme whose activations have 8 bits: a scale for each row of N."""
    scheme = weight.scheme
    codes = weight.codes ^ scheme.middle_code if scheme.number == INT else weight.codes
    return Weight8(codes.view(CODES[scheme.number]), weight.scales[:, 0].float().contiguous())


def merge_w8a8(weights: Sequence[Weight8]) -> Weight8 | None:
    """The rows of all ``weights`` in one; None if their numbers or input channels differ."""
    codes = [weight.codes for weight in weights]
    if any((c.dtype, c.shape[1]) != (codes[0].dtype, codes[0].shape[1]) for c in codes):
        return None
    return Weight8(torch.cat(codes), torch.cat([weight.scales for weight in weights]))


def w8a8_matmul(x: QuantizedRows, weight: Weight8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of ``x`` [M, K] times the weight [N, K], transposed, plus ``bias`` [N] → ``dtype`` [M, N].

    The order in which floats are summed depends on N and K, and on M only through the kernel and the tile that it
    chooses; integers are exact.
    """
    if not runs_triton(x.codes):
        return w8a8_matmul_reference(x, weight, bias, dtype)
    from llmq.runtime.kernels.w8a8_triton import w8a8_matmul_triton

    return w8a8_matmul_triton(x, weight, bias, dtype)


def w8a8_matmul_reference(x: QuantizedRows, weight: Weight8, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``w8a8_matmul`` in plain PyTorch, but for integers' product, which PyTorch has: exact too."""
    wide = torch.promote_types(dtype, torch.float32)
    if x.codes.dtype == torch.int8 and sums_int8_exactly(x.codes.device):
        sums = torch._int_mm(x.codes, weight.codes.t()).to(wide)
    elif x.codes.dtype == torch.int8:
        sums = (x.codes.double() @ weight.codes.double().t()).to(wide)
    else:
        sums = x.codes.to(wide) @ weight.codes.to(wide).t()
    out = sums * x.scales * weight.scales
    return (out if bias is None else out + bias).to(dtype)


@cache
def sums_int8_exactly(device: torch.device) -> bool:
    """Whether PyTorch's product of int8 is exact there. On an x86 CPU without VNNI, oneDNN adds two products in 16 bits
    and clips what does not fit (https://oneapi-src.github.io/oneDNN/dev_guide_int8_computations.html)."""
    largest = torch.full((32, 64), 127, dtype=torch.int8, device=device)
    return bool((torch._int_mm(largest, largest.t()) == 64 * 127**2).all())
