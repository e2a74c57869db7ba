"""Device code of ``norm``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.quantize_rows import LARGEST, QuantizedRows
from llmq.runtime.kernels.quantize_rows_triton import empty_rows, row_warps, store_quantized


def add_rms_norm_triton(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """``add_rms_norm`` through Triton."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    _launch(residual, x, weight, eps, out, None, 0.0)
    return out


def add_rms_norm_quantize_triton(
    residual: Tensor, x: Tensor | None, weight: Tensor, eps: float, number: str
) -> QuantizedRows:
    """``add_rms_norm_quantize`` through Triton."""
    out = empty_rows(residual, number)
    _launch(residual, x, weight, eps, *out, LARGEST[number])
    return out


def _launch(
    residual: Tensor, x: Tensor | None, weight: Tensor, eps: float, out: Tensor, scales: Tensor | None, largest: float
) -> None:
    """One program a token, which keeps it in registers."""
    tokens, hidden = residual.shape
    if tokens:
        block = triton.next_power_of_2(hidden)
        add_rms_norm_kernel[tokens,](
            residual, residual if x is None else x, weight, out, scales, hidden, residual.stride(0),
            residual.stride(0) if x is None else x.stride(0), eps,
            ADD=x is not None, LARGEST=largest, BLOCK=block, num_warps=row_warps(block), **pdl(out.device),
        )  # fmt: skip


@triton.jit
def add_rms_norm_kernel(
    residual, x, weight, out, scales, hidden, residual_stride, x_stride, eps,
    ADD: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: the whole row in one block."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    w = tl.load(weight + column, mask=inside, other=0.0)
    wait(PDL)
    at = residual + token * residual_stride + column
    total = tl.load(at, mask=inside, other=0.0)
    if ADD:
        added = tl.load(x + token * x_stride + column, mask=inside, other=0.0)
        total = (total.to(tl.float32) + added.to(tl.float32)).to(total.dtype)
        tl.store(at, total, mask=inside)
    wide = total.to(tl.float32)
    normal = wide * tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    scaled = normal.to(w.dtype).to(tl.float32) * w.to(tl.float32)
    rounded = scaled.to(total.dtype)
    if LARGEST > 0:
        store_quantized(rounded.to(tl.float32), out, scales, token, column, inside, hidden, LARGEST)
    else:
        tl.store(out + token * hidden + column, rounded, mask=inside)
