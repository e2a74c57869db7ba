"""Bring a weight into the L2 cache before the kernel that multiplies by it may read its activations.

Every product follows a small kernel, during which the memory would idle:

    small kernel   read, compute, write │
    product        prefetch …           │ wait │ read, multiply …
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

PREFETCH = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"
)


@triton.jit
def prefetch(pointers, sizes):
    """Ask for ``sizes`` bytes, multiples of 16, from each of ``pointers`` to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        PREFETCH, "=r,l,r", [pointers.to(tl.int64), sizes], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip
