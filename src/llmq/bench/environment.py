"""What this machine and this installation are: for ``llmq env``, and beside every measurement.

Names, versions and sizes only: no paths, no names of users or hosts. Nothing here fails because something is missing.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq import __version__
from llmq.bench.nvml import Card
from llmq.memplan.gpu import detect_gpus

if TYPE_CHECKING:
    from llmq.runtime.device import GPU

REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "typer", "rich", "pydantic")
MEMINFO = Path("/proc/meminfo")
CPUINFO = Path("/proc/cpuinfo")
PACKAGE = Path(__file__).resolve().parents[1]
GIT_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Feature:
    """What needs a package that llmq otherwise runs without, and the extra of llmq's that brings it, if one does."""

    package: str
    purpose: str
    extra: str | None

    @property
    def install(self) -> str:
        return f"pip install 'llmq[{self.extra}]'" if self.extra else "comes with PyTorch's CUDA builds"


FEATURES = (
    Feature("triton", "kernels on a GPU", None),
    Feature("bitsandbytes", "quantizing by bitsandbytes", "bitsandbytes"),
    Feature("datasets", "texts of the hub", "datasets"),
    Feature("matplotlib", "plots", "plots"),
    Feature("fastapi", "the HTTP server", "serve"),
    Feature("uvicorn", "the HTTP server", "serve"),
    Feature("llguidance", "structured outputs", "serve"),
    Feature("lm-eval", "tasks of llmq eval", "lm-eval"),
    Feature("gptqmodel", "tests against its reader", "test"),
    Feature("compressed-tensors", "tests against its reader", "test"),
)


def describe() -> dict[str, Any]:
    """Everything that ``llmq env`` shows. What cannot be found out is None."""
    total, free = main_memory()
    torch_cuda, devices = cuda_devices()
    return {
        "versions": {
            "llmq": __version__,
            "python": platform.python_version(),
            **{package: installed(package) for package in (*REQUIRED, *(feature.package for feature in FEATURES))},
        },
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": usable_cpus(),
        "memory_total_bytes": total,
        "memory_free_bytes": free,
        "disk_free_bytes": disk_free(),
        "driver": next((gpu.driver for gpu in detect_gpus()), None),
        "torch_cuda": torch_cuda,
        "devices": devices,
        "missing": [
            {"package": feature.package, "purpose": feature.purpose, "install": feature.install}
            for feature in FEATURES
            if installed(feature.package) is None
        ],
    }


def setting(name: str, card: Card | None) -> dict[str, Any]:
    """What a measurement on the device called ``name``, which is ``card`` if it is one, has beside its figures."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "llmq": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "triton": installed("triton"),
        "device_name": name,
        "driver": next((gpu.driver for gpu in detect_gpus()), None) if card else None,
        "sm_clock_mhz": card.sm_clock if card else None,
        "memory_clock_mhz": card.memory_clock if card else None,
        "power_limit_w": card.power_limit if card else None,
    }


def commit() -> str | None:
    """Of the checkout that llmq runs from, with a + where files differ from it; None where it is installed."""
    if not (PACKAGE.parents[1] / ".git").exists():
        return None
    command = ("git", "-C", str(PACKAGE), "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def installed(package: str) -> str | None:
    """The version of ``package``, or None. Imports nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """The product that ``device`` (``cpu``, ``cuda``, ``cuda:1``) is."""
    if device == "cpu":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(torch.device(device))


def cpu_name() -> str:
    """The processor's model, as the system names it."""
    for line in _lines(CPUINFO):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main_memory() -> tuple[int | None, int | None]:
    """Bytes in all, and bytes that a program could have now. Known on Linux."""
    sizes = {name: rest.split() for name, _, rest in (line.partition(":") for line in _lines(MEMINFO))}

    def size(name: str) -> int | None:
        field = sizes.get(name, [""])[0]
        return int(field) * 1024 if field.isdigit() else None

    return size("MemTotal"), size("MemAvailable")


def disk_free() -> int | None:
    """Bytes free where the command runs."""
    try:
        return shutil.disk_usage(".").free
    except OSError:
        return None


def cuda_devices() -> tuple[str | None, list[dict[str, Any]]]:
    """The CUDA version that torch is built for, and the devices it sees."""
    try:
        import torch

        from llmq.runtime.device import GPU, gpu

        found = {index: gpu(f"cuda:{index}") for index in range(torch.cuda.device_count())}
        return torch.version.cuda, [_cuda_device(index, one) for index, one in found.items() if isinstance(one, GPU)]
    except (ImportError, OSError, RuntimeError):  # no torch, one that cannot be loaded, a driver that refuses
        return None, []


def _cuda_device(index: int, card: GPU) -> dict[str, Any]:
    import torch

    return {
        "name": card.name,
        "compute_capability": ".".join(map(str, card.capability)),
        "memory_free_bytes": torch.cuda.mem_get_info(index)[0],
        "memory_total_bytes": card.memory,
    }


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
