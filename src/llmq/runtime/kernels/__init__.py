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


def runs_triton(x: Tensor) -> bool:
    """Whether kernels on ``x`` run through Triton: on a GPU, or anywhere under Triton's own interpreter (for tests).
    Where ``x`` asks for a gradient they do not: only the references have one."""
    return not x.requires_grad and triton_runs_on(x.device.type)


def triton_runs_on(device: str) -> bool:
    """Whether kernels on a device of this type do."""
    return device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability of the device, (9, 0) of an H200; (0, 0) of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def is_hopper(device: torch.device) -> bool:
    """Whether the device's matrix unit is Hopper's, which no other card has: some kernels are written for it alone."""
    return capability(device)[0] == 9


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a CUDA device has, 132 an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count


# MKL before 2025 looks a function's code up at its first call. Of several threads that make it at once, one may get
# that of 11 bits (https://github.com/pytorch/pytorch/issues/188792); one number is one thread's.
for _function in (torch.cos, torch.sin, torch.log, torch.log1p, torch.tanh):
    _function(torch.ones(1))
