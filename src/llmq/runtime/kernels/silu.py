"""The gate of SwiGLU (Shazeer, 2020): silu(gate) · up, with silu(g) = g / (1 + e^−g)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llmq.runtime.kernels import runs_triton
from llmq.runtime.kernels.quantize_rows import QuantizedRows, quantize_rows_reference


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, both [tokens, width] and contiguous in width: halves of a merged projection, say
    → [tokens, width].

    silu is computed in fp32 and rounded to the type of ``gate`` before it multiplies.
    """
    if not runs_triton(gate):
        return silu_mul_reference(gate, up)
    from llmq.runtime.kernels.silu_triton import silu_mul_triton

    return silu_mul_triton(gate, up)


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """``silu_mul`` in plain PyTorch."""
    return F.silu(gate) * up


def silu_mul_quantize(gate: Tensor, up: Tensor, number: str) -> QuantizedRows:
    """``silu_mul``, and ``quantize_rows`` of its result to ``number``, in one pass: the same bits as one by one."""
    if not runs_triton(gate):
        return quantize_rows_reference(silu_mul_reference(gate, up), number)
    from llmq.runtime.kernels.silu_triton import silu_mul_quantize_triton

    return silu_mul_quantize_triton(gate, up, number)
