"""Device code of ``quantize_rows``, and the last step of the kernels that quantize what they compute."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.pdl_triton import pdl, start_next, wait
from llmq.runtime.kernels.quantize_rows import CODES, LARGEST, SMALLEST_MAX, QuantizedRows

TINY = tl.constexpr(SMALLEST_MAX)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# A float's step is 1 from 1.5 · 2^23 on: the low byte of the sum is the integer. Converting to one would go through the
# unit of exponentials and divisions, an eighth as fast; and as .rn the sum is not fused with the product before it.
ROUND = tl.constexpr("{ .reg .f32 t; add.rn.f32 t, $1, 0f4B400000; mov.b32 $0, t; }")


def empty_rows(x: Tensor, number: str) -> QuantizedRows:
    """What a kernel fills with ``store_quantized``: room for ``x``."""
    return QuantizedRows(
        torch.empty(x.shape, dtype=CODES[number], device=x.device),
        torch.empty(len(x), 1, dtype=torch.float32, device=x.device),
    )


def row_warps(block: int) -> int:
    """Warps of a program that keeps a row of ``block`` elements in registers."""
    return max(1, min(16, block // 512))


def quantize_rows_triton(x: Tensor, number: str) -> QuantizedRows:
    """``quantize_rows`` through Triton: one program a token, which keeps it in registers."""
    tokens, width = x.shape
    out = empty_rows(x, number)
    if tokens:
        block = triton.next_power_of_2(width)
        quantize_rows_kernel[tokens,](
            x,
            *out,
            width,
            x.stride(0),
            LARGEST=LARGEST[number],
            BLOCK=block,
            num_warps=row_warps(block),
            **pdl(x.device),
        )
    return out


@triton.jit
def rounded(scaled, TYPE: tl.constexpr):
    """``scaled``, fp32, as codes of TYPE."""
    if TYPE != tl.int8:  # noqa: SIM300 (it is a type, no constant)
        code = tl.clamp(scaled, -448.0, 448.0).to(TYPE)
    elif INTERPRETED:
        code = ((scaled + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        bits = tl.inline_asm_elementwise(ROUND, "=r,f", [scaled], dtype=tl.int32, is_pure=True, pack=1)
        code = bits.to(tl.int8)
    return code


@triton.jit
def store_quantized(row, codes, scales, token, column, inside, width, LARGEST: tl.constexpr):
    """Quantize ``row``, fp32, zero outside, and store it as that of ``token``."""
    most = tl.maximum(tl.max(tl.abs(row), 0), TINY)
    scaled = row * tl.div_rn(LARGEST, most)
    tl.store(codes + token * width + column, rounded(scaled, codes.dtype.element_ty), mask=inside)
    tl.store(scales + token, tl.div_rn(most, LARGEST))


@triton.jit
def quantize_rows_kernel(
    x, codes, scales, width, x_stride, LARGEST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One token: the whole row in one block."""
    start_next(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    wait(PDL)
    row = tl.load(x + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    store_quantized(row, codes, scales, token, column, inside, width, LARGEST)
