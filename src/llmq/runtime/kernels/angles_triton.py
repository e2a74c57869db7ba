"""Device code of ``angles``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from llmq.runtime.kernels.quantize_rows_triton import INTERPRETED


def cos_and_sin_triton(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """``cos_and_sin`` through Triton: one program a token."""
    tokens, pairs = len(positions), len(frequencies)
    cos, sin = torch.empty(2, tokens, 1, pairs, dtype=torch.float32, device=frequencies.device)
    if tokens:
        cos_and_sin_kernel[tokens,](
            positions, frequencies, cos, sin, pairs, factor, BLOCK=triton.next_power_of_2(pairs), num_warps=1
        )
    return cos, sin


@triton.jit
def cos_and_sin_kernel(positions, frequencies, cos, sin, pairs, factor, BLOCK: tl.constexpr):
    """All pairs of one token."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < pairs
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + pair, mask=inside, other=0.0)
    at = token * pairs + pair
    # Triton's own are approximations, which are wrong far from 0.
    if INTERPRETED:
        cosine, sine = tl.cos(angle), tl.sin(angle)
    else:
        cosine, sine = libdevice.cos(angle), libdevice.sin(angle)
    tl.store(cos + at, cosine * factor, mask=inside)
    tl.store(sin + at, sine * factor, mask=inside)
