"""The kernels of the runtime: each a pair, a plain PyTorch reference and a Triton kernel, behind one function.

``<kernel>.py`` has the function, the one docstring, the launch parameters and the reference; ``<kernel>_triton.py`` has
the device code and is imported only where it runs, so that a machine without Triton never needs it. The reference runs
everywhere and says what is right; the Triton kernel is faster, and never different beyond rounding.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

MAX_TILES = 2**16


def runs_triton(x: Tensor) -> bool:
    """Whether kernels on ``x`` run through Triton: on a GPU, or anywhere under Triton's own interpreter (for tests)."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def counters(device: torch.device) -> Tensor:
    """For each tile that several programs of a launch share, how many of them are done: int32 [MAX_TILES].

    Zero before a launch and again after it: the program that is last, and joins their results, puts it back. There is
    one set for a device, so kernels that use it run on one stream at a time.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a step once before capturing it in a CUDA graph")
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
