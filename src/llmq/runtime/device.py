"""Which device, which dtype, how many bytes are there for the KV cache, and the ways there and back."""

from __future__ import annotations

import ctypes
import resource
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.config import DTYPE_BYTES, ModelConfig
from llmq.errors import CHECK_FAILED, USAGE, LlmqError, note
from llmq.memory import format_bytes
from llmq.runtime.kernels import triton_runs_on

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}
KV_DTYPES = DTYPES | {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
CPU_KV_CACHE_BYTES = 2**30
LIBC = ctypes.CDLL(None)
OLDEST = (8, 0)
"""Ampere: the first whose matrix unit takes bf16, and the oldest that Triton compiles for."""
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class GPU:
    """What is asked of a card: ``capability`` is CUDA's, (8, 0) of an A100 and (9, 0) of an H200; ``memory`` bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


def gpu(device: torch.device | str) -> GPU | str:
    """The card that ``device`` is, or why there is none: the only place that asks."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    try:
        found = torch.cuda.get_device_properties(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # no driver, or one that is too old: torch says which
        return str(error).strip().split(". ")[0]
    return GPU(found.name, (found.major, found.minor), found.total_memory)


def resolve_device(device: str) -> str:
    """``auto`` is a CUDA device where there is one that the kernels run on, and else the CPU.

    LlmqError when ``cuda`` is asked for and missing, or too old.
    """
    if device not in ("auto", "cpu") and not device.startswith("cuda"):
        raise LlmqError(f"there is no device {device!r}", "choose --device auto, cpu or cuda")
    if device == "cpu":
        return device
    found = gpu("cuda" if device == "auto" else device)
    if isinstance(found, GPU) and found.capability >= OLDEST:
        return "cuda" if device == "auto" else device
    if isinstance(found, GPU):
        reason = f"{found.name} has compute capability {_dotted(found.capability)}, and kernels need {_dotted(OLDEST)}"
    else:
        reason = found
    if device != "auto":
        raise LlmqError(f"no CUDA device: {reason}", "see: llmq env; or pass --device cpu")
    if isinstance(found, GPU) or "too old" in found:  # there is a card, but not for us
        note(f"running on the CPU: {reason}")
    return "cpu"


def cards_like(device: str) -> tuple[str, ...]:
    """All that ``device`` stands for: ``cuda`` is every visible card like the first, anything else itself."""
    if device != "cuda":
        return (device,)
    every = (f"cuda:{number}" for number in range(torch.cuda.device_count()))
    return tuple(name for name in every if gpu(name) == gpu("cuda:0"))


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device's matrix unit takes FP8, as Ada's and Hopper's do; a CPU computes what it would."""
    found = gpu(device) if device.type == "cuda" else None
    if not isinstance(found, GPU) or found.capability >= FP8_CAPABILITY:
        return True
    note(
        f"{found.name} has compute capability {_dotted(found.capability)}, and products of FP8 need "
        f"{_dotted(FP8_CAPABILITY)}: FP8 weights are multiplied by activations of 16 bits"
    )
    return False


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def check_weights_fit(device: str, weights: int, utilization: float) -> None:
    """LlmqError, before anything is loaded, when so many bytes of weights are more than the card may give."""
    found = gpu(device) if device != "cpu" else None
    if isinstance(found, GPU) and weights > found.memory * utilization:
        raise LlmqError(
            f"the weights take {format_bytes(weights)}, and {found.name} has {format_bytes(found.memory)}, of which "
            f"--gpu-memory-utilization leaves {format_bytes(found.memory * utilization)}",
            "quantize the model to fewer bits; llmq memplan says what would fit",
            exit_code=CHECK_FAILED,
        )


def check_deterministic(device: str) -> None:
    """LlmqError where products are the library's, which choose their order of summation by the size of the batch."""
    if not triton_runs_on(torch.device(device).type):
        raise LlmqError(
            "--deterministic needs a GPU: on a CPU the last bits of a product depend on the batch",
            "drop --deterministic, or run where llmq env shows a GPU",
            exit_code=USAGE,
        )


def resolve_dtype(dtype: str, config: ModelConfig, device: str) -> torch.dtype:
    """``auto`` is the dtype of the folder on a GPU, and fp32 on a CPU, where it is both exact and fast."""
    if dtype == "auto":
        return torch.float32 if device == "cpu" else DTYPES[config.dtype]
    if dtype not in DTYPES:
        raise LlmqError(f"there is no dtype {dtype!r}", f"choose --dtype auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def resolve_kv_dtype(kv_cache_dtype: str, dtype: torch.dtype, device: str) -> str:
    """The name, of ``KV_DTYPES``, of what keys and values are kept in; ``auto`` is the ``dtype`` that is computed in.

    LlmqError for fp8 on a GPU that cannot convert it.
    """
    if kv_cache_dtype == "auto":
        return str(dtype).removeprefix("torch.")
    if kv_cache_dtype == "fp8" and device != "cpu":
        found = gpu(device)
        if isinstance(found, GPU) and found.capability < FP8_CAPABILITY:
            raise LlmqError(
                f"{found.name} has no instructions for fp8", "pass --kv-cache-dtype int8, which takes as little memory"
            )
    return kv_cache_dtype


def free_kv_cache_bytes(device: str, utilization: float, reserve: int) -> int:
    """Bytes for the KV cache once the weights are loaded.

    On a GPU: ``utilization`` of its whole memory, less what is taken now and ``reserve`` for activations. On a CPU a
    fixed gibibyte, which costs nothing until it is written.
    """
    if device == "cpu":
        return CPU_KV_CACHE_BYTES
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return max(0, int(total * utilization) - (total - free) - reserve)


def host_memory_bytes() -> int:
    """Main memory of this machine."""
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes() -> int:
    """Main memory that can be had without taking it from another process; where that is not said, all there is."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return host_memory_bytes()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def available_bytes(device: str) -> int:
    """Memory that can be had now: of a card, as its driver says, or of the machine for a CPU."""
    return available_memory_bytes() if device == "cpu" else torch.cuda.mem_get_info(torch.device(device))[0]


def free_memory() -> None:
    """Give back what the allocators of the C library keep for later: between blocks, that can be as much as one."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def free_device_memory(device: str) -> None:
    """Give the driver back what torch keeps of tensors that are gone: after loading, as much as half the weights."""
    if device != "cpu":
        torch.cuda.empty_cache()


def peak_memory_bytes(device: str) -> int:
    """The most memory this process has had: on the device, or resident in main memory for a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(torch.device(device))
    return _peak_resident(resource.RUSAGE_SELF)


def peak_memory_of_children() -> int:
    """The most main memory that a process started by this one, and waited for, has had."""
    return _peak_resident(resource.RUSAGE_CHILDREN)


def _peak_resident(whose: int) -> int:
    peak = resource.getrusage(whose).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def on_device(values: Sequence[Any] | array[Any], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """``values`` as a tensor on ``device``. The host does not wait until they are there."""
    tensor = torch.frombuffer(values, dtype=dtype) if isinstance(values, array) else torch.tensor(values, dtype=dtype)
    return tensor if torch.device(device).type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class ToHost:
    """A tensor on its way to the host, behind all that its device was given to do before."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def tolist(self) -> list[Any]:
        """Its values, once they have come."""
        if self._event is not None:
            self._event.synchronize()
        values: list[Any] = self._tensor.tolist()
        return values
