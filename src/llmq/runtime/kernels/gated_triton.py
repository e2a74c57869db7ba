"""A product that ends in the gate of SwiGLU: a tile has as many rows of the gate as of what it multiplies.

weight [N, K]      | gate: N/2 rows | up: N/2 rows |
tile of N          | BLOCK_N/2 rows of the gate | the same of up |      → BLOCK_N/2 outputs
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from llmq.runtime.kernels.silu_triton import silu_product


@triton.jit
def tile_rows(tile, out_features, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """The rows of a tile of the weight, and which of them there are."""
    index = tl.arange(0, BLOCK_N)
    if GATED:
        HALF: tl.constexpr = BLOCK_N // 2
        within = tile * HALF + index % HALF
        n, is_n = within + index // HALF * (out_features // 2), within < out_features // 2
    else:
        n = tile * BLOCK_N + index
        is_n = n < out_features
    return n, is_n


@triton.jit
def store_gated(acc, out, tile, m, is_m, out_features, BLOCK_N: tl.constexpr):
    """silu(gate) · up [M, N / 2] ← the sums of a tile, [BLOCK_N, BLOCK_M]."""
    HALF: tl.constexpr = BLOCK_N // 2
    gate, up = tl.split(tl.reshape(acc, [2, HALF, acc.shape[1]]).permute(1, 2, 0))
    n = tile * HALF + tl.arange(0, HALF)
    inside = (n < out_features // 2)[:, None] & is_m[None, :]
    at = m[None, :].to(tl.int64) * (out_features // 2) + n[:, None]
    TYPE: tl.constexpr = out.dtype.element_ty
    tl.store(out + at, silu_product(gate.to(TYPE), up.to(TYPE)), mask=inside)
