"""Linear layers with weights of up to 8 bits and activations of 16 or 32.

y[m, n] = Σ_k x[m, k] · scale[n, g] · (number(code[n, k]) − zero[n, g])  +  bias[n]          g: the group of channel k

Weights are packed once, at load, in the order in which the kernel reads them. Codes of 2 and 3 bits take 4, those of
5 and 6 take 8:

words  int16 [tiles, N, 32]     the codes of 32 channels in each bit plane, 16 / bits planes a word

       4 bits:  word [t, n, j]  | k+96 | k+64 | k+32 | k |     k = 128·t + j
                                 15                     0
       8 bits:  word [t, n, j]  |    k+32     |     k    |     k =  64·t + j
                                 15                     0

meta   int32 [groups, N]        | zero point | scale's 16 bits |         of integers
                                 31        16 15              0
                                |        scale, fp32           |         of nf4, fp4 and e4m3, which have no zero point
                                (groups rounded up to whole steps)

A plane has 32 consecutive channels, so that a group of 32, 64, 128 or all is a whole number of planes, and the
activations that meet a plane lie side by side. A channel order other than 0 … K − 1 (GPTQ's act-order) is put right by
packing the channels group by group, and gathering the activations in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from llmq.checkpoint.quantized_weight import QuantizedWeight, numbers
from llmq.runtime.kernels import runs_triton
from llmq.runtime.kernels.silu import silu_mul_reference
from llmq.scheme import INT

PLANE = 32  # channels in a bit plane
STEP = 128  # channels that the kernel takes at a time; K is padded to a multiple


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """words, meta  as drawn above
    order         int64 [K]: the channel that is packed k-th; None: they are in order
    number        what a code stands for: see ``Scheme``
    bits          that a code takes here: 4 or 8
    scale_dtype   float16, bfloat16 or float32: what the scale's bits in ``meta`` are
    group_length  channels that share a scale
    """

    words: Tensor
    meta: Tensor
    order: Tensor | None
    number: str
    bits: int
    scale_dtype: torch.dtype
    group_length: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.words.shape[1]

    @property
    def layout(self) -> tuple[object, ...]:
        """What weights have in common that can lie in one."""
        return self.number, self.bits, self.scale_dtype, self.group_length, self.in_features

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [N, K] in packed order; scales [N, groups]; zero points uint8 [N, groups]."""
        shifts = torch.arange(0, 16, self.bits, dtype=torch.int16, device=self.words.device)
        planes = (self.words[:, :, None, :] >> shifts[:, None]) & (2**self.bits - 1)
        codes = planes.permute(1, 0, 2, 3).reshape(self.out_features, -1)[:, : self.in_features]
        meta = self.meta[: -(-self.in_features // self.group_length)].t().contiguous()
        if self.number != INT:
            return codes.to(torch.uint8), meta.view(torch.float32), torch.zeros_like(meta, dtype=torch.uint8)
        return codes.to(torch.uint8), meta.to(torch.int16).view(self.scale_dtype), (meta >> 16).to(torch.uint8)


def pack_wna16(weight: QuantizedWeight, dtype: torch.dtype) -> PackedWeight:
    """Pack ``weight`` for activations of ``dtype``. Scales of integers keep the 16-bit type they have, or else take
    ``dtype``'s; others are fp32.

    ValueError on groups that are not of one length, or whose length is no multiple of 32.
    """
    out_features, in_features = weight.shape
    number, length = weight.scheme.number, weight.scheme.group_length(in_features)
    bits = 4 if weight.scheme.bits <= 4 else 8
    if length % PLANE and length != in_features:
        raise ValueError(f"groups of {length} channels are not a multiple of {PLANE}")
    codes, order = weight.codes, None
    if weight.group_index is not None:
        order = torch.argsort(weight.group_index, stable=True)
        if not torch.equal(weight.group_index[order], torch.arange(in_features, device=order.device) // length):
            raise ValueError(f"the groups of a weight do not all have {length} channels")
        codes = codes[:, order]
    codes = F.pad(codes, (0, -in_features % STEP))
    planes = codes.view(out_features, -1, 16 // bits, PLANE).permute(1, 0, 2, 3).int()
    shifts = torch.arange(0, 16, bits, dtype=torch.int32, device=codes.device)
    words = (planes << shifts[:, None]).sum(2).to(torch.int16)

    scale_dtype = torch.float32 if number != INT else weight.scales.dtype
    if number != INT:
        meta = weight.scales.float().view(torch.int32).t()
    else:
        if scale_dtype not in (torch.float16, torch.bfloat16):
            scale_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        scale_bits = weight.scales.to(scale_dtype).view(torch.int16).int() & 0xFFFF
        meta = (weight.zero_points.int() << 16 | scale_bits).t()
    if length < in_features:
        meta = F.pad(meta, (0, 0, 0, -len(meta) % max(STEP // length, 1)))
    return PackedWeight(words.contiguous(), meta.contiguous(), order, number, bits, scale_dtype, length, in_features)


def merge_wna16(weights: Sequence[PackedWeight]) -> PackedWeight | None:
    """The rows of all ``weights`` in one; None if their layouts or the orders of their channels differ."""
    first, *others = weights
    if any(weight.layout != first.layout for weight in others):
        return None
    orders = [weight.order for weight in weights if weight.order is not None]
    if len(orders) not in (0, len(weights)) or not all(order.equal(orders[0]) for order in orders):
        return None
    words, meta = (torch.cat(parts, dim=1) for parts in zip(*((w.words, w.meta) for w in weights), strict=True))
    return replace(first, words=words, meta=meta)


def wna16_matmul(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, gated: bool = False) -> Tensor:
    """``x`` [M, K] times the packed weight [N, K], transposed, plus ``bias`` [N] → [M, N], of the type of ``x``; if
    ``gated``, ``silu_mul`` of its halves → [M, N / 2], the same bits as one after the other.

    On a GPU a batch of up to FUSED_ROWS, on Hopper of twice as many, goes through a kernel that unpacks in
    registers. For a longer one, whose time goes into arithmetic, the weight is widened to the type of ``x`` and
    multiplied by the library.
    Sums are fp32. Up to 32 rows their order depends on N and K, never on the batch: the same row, the same bits.
    """
    if packed.order is not None:
        x = x.index_select(1, packed.order)
    if runs_triton(x):
        from llmq.runtime.kernels.wna16_triton import wna16_matmul_triton as matmul
    else:
        matmul = _matmul_reference
    out: Tensor = matmul(x, packed, bias, gated)
    return out


def wna16_matmul_reference(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, *, gated: bool = False
) -> Tensor:
    """``wna16_matmul`` in plain PyTorch: widened to fp32 (or the wider type of ``x``) and multiplied."""
    return _matmul_reference(x if packed.order is None else x.index_select(1, packed.order), packed, bias, gated)


def _matmul_reference(x: Tensor, packed: PackedWeight, bias: Tensor | None, gated: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    codes, scales, zeros = packed.unpack()
    group = torch.arange(packed.in_features, device=x.device) // packed.group_length
    values = codes if packed.number == INT else numbers(packed.number, x.device)[codes.long()]
    weight = scales.to(wide)[:, group] * (values.to(wide) - zeros.to(wide)[:, group])
    out = F.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)
    return silu_mul_reference(*out.chunk(2, dim=1)) if gated else out
