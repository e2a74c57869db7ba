"""The GPUs of this machine, asked of nvidia-smi: an answer in milliseconds, without torch."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
TIMEOUT_SECONDS = 10


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
    """Bytes of the first GPU, or None where there is none."""
    return next((gpu.memory for gpu in detect_gpus()), None)


def parse_gpus(answer: str) -> list[Gpu]:
    """One GPU a line, ``name, MiB, driver``; a line whose memory is no number (``[N/A]``) is left out."""
    rows = ([field.strip() for field in line.rsplit(",", 2)] for line in answer.splitlines())
    return [Gpu(row[0], int(row[1]) * 2**20, row[2]) for row in rows if len(row) == 3 and row[1].isdigit()]
