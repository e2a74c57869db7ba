"""Device code of ``gelu``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
TWICE_ROOT = tl.constexpr(2 * math.sqrt(2 / math.pi))


def gelu_mul_triton(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu_mul`` through Triton."""
    tokens, width = gate.shape
    out = torch.empty(tokens, width, dtype=gate.dtype, device=gate.device)
    if tokens:
        gelu_mul_kernel[tokens, triton.cdiv(width, BLOCK)](
            gate, up, out, width, gate.stride(0), up.stride(0), BLOCK=BLOCK, num_warps=4
        )
    return out


@triton.jit
def gelu_mul_kernel(gate, up, out, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    """BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + token * gate_stride + column, mask=inside, other=0.0)
    u = tl.load(up + token * up_stride + column, mask=inside, other=0.0)
    wide = g.to(tl.float32)
    # (1 + tanh(x)) / 2 = 1 / (1 + e^−2x)
    gelu = (wide / (1.0 + tl.exp((wide + 0.044715 * wide * wide * wide) * -TWICE_ROOT))).to(g.dtype)
    tl.store(out + token * width + column, (gelu.to(tl.float32) * u.to(tl.float32)).to(g.dtype), mask=inside)
