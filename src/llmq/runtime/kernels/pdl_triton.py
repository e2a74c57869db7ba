"""Programmatic dependent launch (Hopper and later): a kernel starts while the one before it in the stream ends.

    one kernel    … last programs │
    the next         start │ wait │ read, compute, write …

A kernel that is launched so calls ``wait`` before it touches what another one writes or reads. From then on the next
may start: its programs take the room that this kernel's leave. Not sooner: programs that wait two kernels ahead are in
the way of those that work (an 8B layer's products in int4 took 89 µs instead of 53 at one row, on an H200). Only a
small kernel behind a long one, attention, calls ``start_next`` first of all: the product behind it has half its weight
in shared memory when its activations come. What a kernel reads before its own ``wait`` is written by no kernel before
it in the step: weights, what describes the step, and what the cache has of earlier ones.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llmq.runtime.kernels import capability


@cache
def pdl(device: torch.device) -> dict[str, bool]:
    """The launch option and the constant of a kernel that calls ``wait``."""
    capable = capability(device) >= (9, 0)
    return {"PDL": capable, "launch_pdl": capable}


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the kernel before; let the next one start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def start_next(PDL: tl.constexpr):
    """Let the next kernel start though this one still waits."""
    if PDL:
        gdc_launch_dependents()
