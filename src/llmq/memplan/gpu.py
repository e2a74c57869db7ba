"""GPUs: of this machine, as nvidia-smi tells in milliseconds and without torch; and the common ones by name."""

from __future__ import annotations

import difflib
import re
import subprocess
from dataclasses import dataclass

from llmq.errors import USAGE, LlmqError

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
TIMEOUT_SECONDS = 10
GIB = 2**30
USABLE_GIB = {
    "a10": 22.0,
    "a10g": 22.0,
    "a100-40gb": 39.4,
    "a100-80gb": 79.1,
    "a40": 44.3,
    "b200": 178.3,
    "gh200": 94.4,
    "h100": 79.1,
    "h100-80gb": 79.1,
    "h100-nvl": 93.1,
    "h200": 139.8,
    "l4": 22.0,
    "l40": 44.3,
    "l40s": 44.3,
    "rtx-3060": 11.6,
    "rtx-3090": 23.6,
    "rtx-4060-ti-16gb": 15.5,
    "rtx-4080": 15.6,
    "rtx-4090": 23.5,
    "rtx-5090": 31.3,
    "rtx-6000-ada": 47.4,
    "rtx-a6000": 47.4,
    "rtx-pro-6000": 94.9,
    "t4": 14.5,
    "v100-16gb": 15.7,
    "v100-32gb": 31.7,
}
"""What CUDA hands out of each, in GiB, rounded down: less than its name says, which counts in other units, and less
than nvidia-smi's total, some of which the driver keeps."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """``memory`` is the whole of it, in bytes."""

    name: str
    memory: int
    driver: str


def detect_gpus() -> list[Gpu]:
    """The machine's GPUs in nvidia-smi's order; none where it is missing, or does not answer."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(answer)


def first_gpu_memory() -> int | None:
    """Usable bytes of the first GPU, or None where there is none."""
    return next((usable_memory(gpu) for gpu in detect_gpus()), None)


def usable_memory(gpu: Gpu) -> int:
    """What CUDA hands out of a GPU, where its name is a known one; else all of it."""
    words = set(_words(gpu.name))  # NVIDIA H100 80GB HBM3
    names = (*_matches(gpu.name), *(name for name in USABLE_GIB if set(name.split("-")) <= words))
    known = [name for name in names if abs(USABLE_GIB[name] * GIB / gpu.memory - 1) < 0.1]
    return min(gpu.memory, int(USABLE_GIB[known[0]] * GIB)) if known else gpu.memory


def named_memory(name: str) -> int:
    """Usable bytes of the GPU that is commonly called ``name``: h100, RTX 4090, a100-40gb.

    LlmqError when there is none, or several of different sizes.
    """
    found = _matches(name)
    if len({USABLE_GIB[gpu] for gpu in found}) == 1:
        return int(USABLE_GIB[found[0]] * GIB)
    if found:
        raise LlmqError(f"{name!r} is one of {', '.join(found)}", "say which; see --list-gpus", exit_code=USAGE)
    close = difflib.get_close_matches(name.lower(), USABLE_GIB, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise LlmqError(
        f"there is no GPU {name!r} in the table", f"{hint}see --list-gpus, or pass --gpu-memory 24GiB", exit_code=USAGE
    )


def parse_gpus(answer: str) -> list[Gpu]:
    """One GPU a line, ``name, MiB, driver``; a line whose memory is no number (``[N/A]``) is left out."""
    rows = ([field.strip() for field in line.rsplit(",", 2)] for line in answer.splitlines())
    return [Gpu(row[0], int(row[1]) * 2**20, row[2]) for row in rows if len(row) == 3 and row[1].isdigit()]


def _matches(name: str) -> list[str]:
    """The GPUs of the table that a name may mean: its own, else those that have all of its words."""
    words = [word for word in _words(name) if word not in ("nvidia", "geforce", "tesla", "gpu", "sxm", "pcie")]
    exact = [gpu for gpu in USABLE_GIB if gpu.replace("-", "") == "".join(words)]
    return exact or [gpu for gpu in USABLE_GIB if words and set(words) <= set(gpu.split("-"))]


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())
