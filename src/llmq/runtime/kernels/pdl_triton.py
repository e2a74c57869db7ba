"""Programmatic dependent launch (Hopper and later): a kernel starts while the one before it in the stream ends.

    one kernel    ……… last programs run ─┐ all have run: its results are there
    the next      programs start, read what no kernel writes (weights) │ wait │ read and write the rest

A kernel that is launched so calls ``wait`` before it touches anything that another kernel writes or reads. From then
on the next one may start; its programs take the room that this kernel's leave.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def pdl(device: torch.device) -> dict[str, bool]:
    """The launch option and the constant of a kernel that calls ``wait``."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": capable, "launch_pdl": capable}


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the kernel before; let the next one start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


PREFETCH = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"
)


@triton.jit
def prefetch(pointers, sizes):
    """Ask for ``sizes`` bytes, multiples of 16, from each of ``pointers`` to be brought into the L2 cache."""
    tl.inline_asm_elementwise(
        PREFETCH, "=r,l,r", [pointers.to(tl.int64), sizes], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip
