"""Device code of ``norm``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_rms_norm_triton(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """``add_rms_norm`` through Triton: one program a token, which keeps it in registers."""
    tokens, hidden = residual.shape
    out = torch.empty(tokens, hidden, dtype=residual.dtype, device=residual.device)
    if tokens:
        block = triton.next_power_of_2(hidden)
        add_rms_norm_kernel[tokens,](
            residual, residual if x is None else x, weight, out, hidden, residual.stride(0),
            residual.stride(0) if x is None else x.stride(0), eps,
            ADD=x is not None, BLOCK=block, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return out


@triton.jit
def add_rms_norm_kernel(
    residual, x, weight, out, hidden, residual_stride, x_stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """One token: the whole row in one block."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    at = residual + token * residual_stride + column
    total = tl.load(at, mask=inside, other=0.0)
    if ADD:
        added = tl.load(x + token * x_stride + column, mask=inside, other=0.0)
        total = (total.to(tl.float32) + added.to(tl.float32)).to(total.dtype)
        tl.store(at, total, mask=inside)
    wide = total.to(tl.float32)
    normal = wide * tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    scaled = normal.to(total.dtype).to(tl.float32) * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, scaled.to(total.dtype), mask=inside)
