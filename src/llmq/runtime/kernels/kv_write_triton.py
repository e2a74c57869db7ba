"""Device code of ``kv_write``."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from llmq.runtime.kernels.kv_write import Scales
from llmq.runtime.kernels.quantize_rows_triton import TINY, rounded


def scale_strides(scales: Scales | None) -> tuple[int, int]:
    """Of a block's and of a head's scales; those of a layer have none."""
    if scales is None or scales[0].dim() == 1:
        return 0, 0
    if scales[0].stride() != scales[1].stride() or scales[0].stride(2) != 1:
        raise ValueError("the scales of keys and values must have the same strides, and be contiguous in block_size")
    block, head, _ = scales[0].stride()
    return block, head


@triton.jit
def store_heads(heads, to, dim, scales, at, is_head, is_channel):
    """Store ``heads`` [n, channels ``dim``] of one token in a cache, at the places ``to`` [n], rounded if it has
    ``scales``; where those are the heads' own, they are stored too, at ``at`` [n]."""
    if scales is not None:
        heads = heads.to(tl.float32)
        if to.dtype.element_ty == tl.int8:
            most = tl.maximum(tl.max(tl.abs(heads), 1), TINY)
            tl.store(scales + at, tl.div_rn(most, 127.0), mask=is_head)
            inverse = tl.div_rn(127.0, most)[:, None]
        else:
            inverse = tl.div_rn(1.0, tl.load(scales))
        heads = rounded(heads * inverse, to.dtype.element_ty)
    tl.store(to[:, None] + dim[None, :], heads, mask=is_head[:, None] & is_channel[None, :])
