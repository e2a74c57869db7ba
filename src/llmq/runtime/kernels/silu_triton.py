"""Device code of ``silu``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq.runtime.kernels.pdl_triton import pdl, wait
from llmq.runtime.kernels.quantize_rows import LARGEST, QuantizedRows
from llmq.runtime.kernels.quantize_rows_triton import INTERPRETED, empty_rows, row_warps, store_quantized

BLOCK = 1024
# x / (1 + e^−x) in five instructions. Those that Triton makes of it are three times as many, for the sake of
# denormal numbers, and a row that one program quantizes waits for them.
SILU = tl.constexpr(
    "{ .reg .f32 e; mul.ftz.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.ftz.f32 e, e, 0f3F800000;"
    "rcp.approx.ftz.f32 e, e; mul.ftz.f32 $0, $1, e; }"
)


def silu_mul_triton(gate: Tensor, up: Tensor) -> Tensor:
    """``silu_mul`` through Triton."""
    tokens, width = gate.shape
    out = torch.empty(tokens, width, dtype=gate.dtype, device=gate.device)
    if tokens:
        silu_mul_kernel[tokens, triton.cdiv(width, BLOCK)](
            gate, up, out, width, gate.stride(0), up.stride(0), BLOCK=BLOCK, num_warps=4, **pdl(out.device)
        )
    return out


def silu_mul_quantize_triton(gate: Tensor, up: Tensor, number: str) -> QuantizedRows:
    """``silu_mul_quantize`` through Triton: one program a token, which keeps it in registers."""
    tokens, width = gate.shape
    out = empty_rows(gate, number)
    if tokens:
        block = triton.next_power_of_2(width)
        silu_mul_quantize_kernel[tokens,](
            gate, up, *out, width, gate.stride(0), up.stride(0),
            LARGEST=LARGEST[number], BLOCK=block, num_warps=row_warps(block), **pdl(gate.device),
        )  # fmt: skip
    return out


@triton.jit
def silu_product(gate, up):
    """silu(gate) · up."""
    wide = gate.to(tl.float32)
    if INTERPRETED:
        silu = wide / (1.0 + tl.exp(-wide))
    else:
        silu = tl.inline_asm_elementwise(SILU, "=f,f", [wide], dtype=tl.float32, is_pure=True, pack=1)
    return (silu.to(gate.dtype).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def gated(gate, up, inside):
    """silu(gate) · up at these addresses, zero outside."""
    return silu_product(tl.load(gate, mask=inside, other=0.0), tl.load(up, mask=inside, other=0.0))


@triton.jit
def silu_mul_kernel(gate, up, out, width, gate_stride, up_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wait(PDL)
    product = gated(gate + token * gate_stride + column, up + token * up_stride + column, inside)
    tl.store(out + token * width + column, product, mask=inside)


@triton.jit
def silu_mul_quantize_kernel(
    gate,
    up,
    codes,
    scales,
    width,
    gate_stride,
    up_stride,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token: the whole row in one block."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    wait(PDL)
    product = gated(gate + token * gate_stride + column, up + token * up_stride + column, inside)
    store_quantized(product.to(tl.float32), codes, scales, token, column, inside, width, LARGEST)
