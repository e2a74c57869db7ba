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

MOST_ROWS = 8
MOST_VALUES = 8192
"""Rows · hidden: every program norms and rounds all rows, and of more that takes as long as the one kernel saves. Two
rows take as long as MOST_ROWS."""
PROGRAMS = 128
"""Each has the same share of the rows of every weight, ``ROWS`` at a time,"""
ROWS = 32
CHUNK_BYTES = 1024
"""and so many bytes of each."""
STAGES = {1: 5, 2: 4}
"""Bytes of a weight's number → chunks that are on their way, as many as there is shared memory for."""
LONGEST = 4096
"""Channels of a row that a program norms, or rounds."""


class Weight(NamedTuple):
    """values  [N, K], of the activations' type, or codes of 8 bits
    scales  fp32 [N], of codes
    """

    values: Tensor
    scales: Tensor | None


@dataclass(frozen=True, slots=True)
class Between:
    """The weights between two attentions.

    o          [hidden, heads · head_dim]
    norm       [hidden]
    gate_up    [2 · inner, hidden]
    down       [hidden, inner]
    following  the norm, and the queries', keys' and values' weight [qkv, hidden], of the next layer; or None
    """

    o: Weight
    norm: Tensor
    gate_up: Weight
    down: Weight
    following: tuple[Tensor, Weight] | None
    eps: float

    @property
    def number(self) -> str | None:
        """What rows are rounded to; None: they are not."""
        return None if self.o.scales is None else Weight8(self.o.values, self.o.scales).number


def takes(rows: int, dtype: torch.dtype, between: Between) -> bool:
    """Whether ``megakernel`` runs ``rows`` of ``dtype`` in one kernel."""
    o, gate_up, down = between.o.values, between.gate_up.values, between.down.values
    values = [o, gate_up, down, *([between.following[1].values] if between.following else [])]
    chunks = [-(-len(v) // PROGRAMS // ROWS) * v.shape[1] * v.itemsize // CHUNK_BYTES for v in values]
    return (
        0 < rows <= MOST_ROWS
        and (1 if rows == 1 else MOST_ROWS) * len(o) <= MOST_VALUES
        and dtype.itemsize == 2
        and o.dtype in (dtype, *CODES.values())
        and all(v.dtype == o.dtype for v in values)
        and all(v.shape[1] * v.itemsize % CHUNK_BYTES == 0 for v in values)
        and all(size % PROGRAMS == 0 for size in (len(o), down.shape[1], len(values[-1])))
        and max(o.shape) <= LONGEST
        and min(chunks) > 1
        and min(chunks[1:3]) >= STAGES[o.itemsize]  # what is on its way is of one weight and the next
        and has_room(o.device)
    )


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

    def product(x: Tensor | QuantizedRows, weight: Weight) -> Tensor:
        if isinstance(x, Tensor):
            return dense_matmul(x, weight.values)
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
