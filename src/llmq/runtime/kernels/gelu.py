"""The gate of GeGLU (Shazeer, 2020): gelu(gate) · up, with gelu(g) = g / 2 · (1 + tanh(√(2/π) · (g + 0.044715 g³)))."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llmq.runtime.kernels import runs_triton


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up, both [tokens, width] and contiguous in width: halves of a merged projection, say
    → [tokens, width].

    gelu is computed in fp32 and rounded to the type of ``gate`` before it multiplies.
    """
    if not runs_triton(gate):
        return gelu_mul_reference(gate, up)
    from llmq.runtime.kernels.gelu_triton import gelu_mul_triton

    return gelu_mul_triton(gate, up)


def gelu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu_mul`` in plain PyTorch."""
    return F.gelu(gate, approximate="tanh") * up
