"""All that a dense decoder layer does between two attentions, in one kernel: for batches so small that a layer is the
time it takes to read its weights, and each kernel of its own starts and ends with the memory idle.

residual   ← residual + mixed · oᵀ                                    in place
gated      = silu(gate · norm(residual)) · up · norm(residual)
residual   ← residual + gated · downᵀ
result     = norm of the next layer(residual) · qkv of the next layerᵀ

Every product, sum and norm is rounded as by the kernel of its own, and rows to 8 bits where the weights are of 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.runtime.kernels import is_hopper, multiprocessors, runs_triton
from llmq.runtime.kernels.dense import dense_matmul
from llmq.runtime.kernels.norm import add_rms_norm, add_rms_norm_quantize
from llmq.runtime.kernels.quantize_rows import CODES, QuantizedRows, quantize_rows
from llmq.runtime.kernels.silu import silu_mul, silu_mul_quantize
from llmq.runtime.kernels.w8a8 import Weight8, w8a8_matmul
from llmq.runtime.kernels.wna16 import STEP, PackedWeight, wna16_matmul
from llmq.scheme import INT

MOST_ROWS = 8
MOST_VALUES = 8192
"""Rows · hidden up to which the projections behind the next norm are worth having in the kernel. Of more, attention has
much to read, and begins while they run: not while one kernel has all shared memory."""
PROGRAMS = 128
"""Each has the same share of the rows of every weight, ``ROWS`` at a time,"""
ROWS = 32
CHUNK_BYTES = 1024
"""and so many bytes of each."""
STAGES = {4: 4, 8: 5, 16: 4}
"""Bits of a weight's number → chunks that are on their way, as many as there is shared memory for."""
LONGEST = 4096
"""Channels of a row that a program norms, or rounds."""


class Weight(NamedTuple):
    """values  [N, K], of the activations' type, or codes of 8 bits
    scales  fp32 [N], of codes
    """

    values: Tensor
    scales: Tensor | None

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    @property
    def bits(self) -> int:
        return 8 * self.values.itemsize


@dataclass(frozen=True, slots=True)
class Between:
    """The weights between two attentions.

    o          [hidden, heads · head_dim]
    norm       [hidden]
    gate_up    [2 · inner, hidden]
    down       [hidden, inner]
    following  the norm, and the queries', keys' and values' weight [qkv, hidden], of the next layer; None: kernels of
               their own are to follow
    """

    o: Weight | PackedWeight
    norm: Tensor
    gate_up: Weight | PackedWeight
    down: Weight | PackedWeight
    following: tuple[Tensor, Weight | PackedWeight] | None
    eps: float

    @property
    def number(self) -> str | None:
        """What rows are rounded to; None: they are not."""
        if isinstance(self.o, PackedWeight) or self.o.scales is None:
            return None
        return Weight8(self.o.values, self.o.scales).number


def takes(rows: int, dtype: torch.dtype, between: Between) -> bool:
    """Whether ``megakernel`` runs ``rows`` of ``dtype`` in one kernel."""
    o, gate_up, down = between.o, between.gate_up, between.down
    weights = [o, gate_up, down, *([between.following[1]] if between.following else [])]
    form = form_of(o, dtype)
    chunks = [-(-w.out_features // PROGRAMS // ROWS) * w.in_features * w.bits // 8 // CHUNK_BYTES for w in weights]
    return (
        0 < rows <= MOST_ROWS
        and dtype.itemsize == 2
        and form is not None
        and all(form_of(w, dtype) == form for w in weights)
        and all(w.in_features * w.bits // 8 % CHUNK_BYTES == 0 for w in weights)
        and all(size % PROGRAMS == 0 for size in (o.out_features, down.in_features, weights[-1].out_features))
        and max(o.out_features, o.in_features) <= LONGEST
        and min(chunks) > 1
        and min(chunks[1:3]) >= STAGES[o.bits]  # what is on its way is of one weight and the next
        and has_room(between.norm.device)
    )


def form_of(weight: Weight | PackedWeight, dtype: torch.dtype) -> tuple[int, torch.dtype] | None:
    """What weights have in common that one kernel reads; None if none does, for activations of ``dtype``."""
    if isinstance(weight, Weight):
        return (weight.bits, weight.values.dtype) if weight.values.dtype in (dtype, *CODES.values()) else None
    taken = (weight.number, weight.bits, weight.group_length, dtype) == (INT, 4, STEP, torch.bfloat16)
    return (weight.bits, weight.scale_dtype) if taken and weight.order is None else None


def has_room(device: torch.device) -> bool:
    """Whether PROGRAMS run at once, each on a multiprocessor of its own with as much shared memory as Hopper's."""
    return is_hopper(device) and multiprocessors(device) >= PROGRAMS


def megakernel(mixed: Tensor, residual: Tensor, between: Between) -> Tensor | None:
    """Add the attention's output, from ``mixed`` [rows, heads · head_dim], and the MLP's to ``residual`` [rows, hidden]
    in place → the next layer's queries, keys and values as they are projected, [rows, qkv]; None behind the last."""
    if not (runs_triton(mixed) and takes(len(mixed), mixed.dtype, between)):
        return megakernel_reference(mixed, residual, between)
    from llmq.runtime.kernels.megakernel_triton import megakernel_triton

    return megakernel_triton(mixed, residual, between)


def megakernel_reference(mixed: Tensor, residual: Tensor, between: Between) -> Tensor | None:
    """``megakernel``, one kernel after another."""
    number, eps = between.number, between.eps

    def product(x: Tensor | QuantizedRows, weight: Weight | PackedWeight) -> Tensor:
        if isinstance(x, Tensor):
            return wna16_matmul(x, weight) if isinstance(weight, PackedWeight) else dense_matmul(x, weight.values)
        assert isinstance(weight, Weight)
        assert weight.scales is not None
        return w8a8_matmul(x, Weight8(weight.values, weight.scales), None, mixed.dtype)

    def normed(x: Tensor, norm: Tensor) -> Tensor | QuantizedRows:
        if number is None:
            return add_rms_norm(residual, x, norm, eps)
        return add_rms_norm_quantize(residual, x, norm, eps, number)

    x = normed(product(mixed if number is None else quantize_rows(mixed, number), between.o), between.norm)
    gate, up = product(x, between.gate_up).chunk(2, dim=1)
    x = product(silu_mul(gate, up) if number is None else silu_mul_quantize(gate, up, number), between.down)
    if between.following is None:
        residual += x
        return None
    norm, qkv = between.following
    return product(normed(x, norm), qkv)
