"""Device code of ``embedding``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def embedding_triton(token_ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    """``embedding`` through Triton."""
    tokens, hidden = len(token_ids), weight.shape[1]
    out = torch.empty(tokens, hidden, dtype=weight.dtype, device=weight.device)
    if tokens:
        embedding_kernel[tokens, triton.cdiv(hidden, BLOCK)](
            token_ids, weight, out, hidden, scale, SCALED=scale != 1, BLOCK=BLOCK, num_warps=4
        )
    return out


@triton.jit
def embedding_kernel(token_ids, weight, out, hidden, scale, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK channels of one token."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < hidden
    row = tl.load(token_ids + token).to(tl.int64)
    state = tl.load(weight + row * hidden + channel, mask=inside, other=0.0)
    if SCALED:
        kind = state.dtype
        state = (state.to(tl.float32) * tl.cast(scale, kind).to(tl.float32)).to(kind)
    tl.store(out + token * hidden + channel, state, mask=inside)
