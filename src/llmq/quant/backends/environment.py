"""The virtual environments of backends: made from the pins shipped with llmq, found again, removed.

    CACHE/backends/NAME/         bin/python …, made by ``python -m venv`` and pip
    CACHE/backends/NAME/stamp    written last: the pins it was made from. Without it, or with others, it is not there

CACHE is ``$LLMQ_CACHE``, or ``llmq`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path

from llmq.errors import LlmqError
from llmq.quant.backends import Backend

STAMP = "stamp"
NEEDED_BYTES = 3 * 2**30
"""Of disk, for an environment and what pip unpacks on the way; one with CUDA takes more, and says so when it fails."""

Echo = Callable[[str], None]
"""Called with each line that pip says."""


def cache_folder() -> Path:
    """Where llmq keeps what can be made again."""
    named = os.environ.get("LLMQ_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmq"


def environment_folder(backend: Backend) -> Path:
    return cache_folder() / "backends" / backend.name


def python_of(backend: Backend) -> Path:
    """The interpreter of the environment. LlmqError when it is not installed."""
    if not is_installed(backend):
        raise LlmqError(f"the backend {backend.name} is not installed", f"llmq backends install {backend.name}")
    return environment_folder(backend) / "bin" / "python"


def is_installed(backend: Backend) -> bool:
    """Whether the environment is whole, and of the pins that this llmq has."""
    stamp = environment_folder(backend) / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == pins(backend)


def installed_version(backend: Backend) -> str | None:
    """The version of the backend in its environment, as its metadata says; nothing is run."""
    if not is_installed(backend):
        return None
    packages = environment_folder(backend).glob("lib/python3*/site-packages")
    found = distributions(name=backend.package, path=list(map(str, packages)))
    return next((distribution.version for distribution in found), None)


def pins(backend: Backend) -> str:
    """Requirements, one a line, of every package in the environment."""
    return (files("llmq.quant.backends") / "pins" / f"{backend.name}.txt").read_text(encoding="utf-8")


def install(backend: Backend, echo: Echo) -> None:
    """Make the environment, anew if it is there. Raises LlmqError when it cannot be made; what is half made does not
    count, and the next try starts from nothing."""
    folder = environment_folder(backend)
    base = _base_python(backend)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise LlmqError(
            f"an environment takes about {NEEDED_BYTES / 2**30:.0f} GiB, and the disk has {free / 2**30:.1f} GiB free",
            "free some space, or name another folder in $LLMQ_CACHE",
        )
    with _locked(folder):
        shutil.rmtree(folder, ignore_errors=True)
        _run([base, "-m", "venv", str(folder)], backend, echo)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        requirements = folder / "pins.txt"
        requirements.write_text(pins(backend), encoding="utf-8")
        pip += ["--constraint", str(requirements)]
        for torch in (line for line in pins(backend).splitlines() if line.startswith("torch==")):
            # A machine without a GPU does well without gigabytes of CUDA libraries, where a CPU build is on offer.
            if _has_gpu() or not _succeeds([*pip, f"{torch}+cpu"], echo):
                _run([*pip, torch], backend, echo)
        if not backend.isolated:
            _run([*pip, "setuptools", "wheel"], backend, echo)
            pip.append("--no-build-isolation")
        _run([*pip, "--requirement", str(requirements)], backend, echo)
        _run([str(folder / "bin" / "python"), "-c", f"import {backend.module}"], backend, echo)
        (folder / STAMP).write_text(pins(backend), encoding="utf-8")


def remove(backend: Backend) -> bool:
    """Remove the environment; False when there is none."""
    folder = environment_folder(backend)
    if not folder.exists():
        return False
    with _locked(folder):
        (folder / STAMP).unlink(missing_ok=True)  # first: from here on it is not installed
        shutil.rmtree(folder)
    return True


def _base_python(backend: Backend) -> str:
    """A Python outside of any environment, of a version that the pins run on."""
    if sys.version_info[1] in backend.pythons:
        return getattr(sys, "_base_executable", sys.executable)
    for minor in backend.pythons:
        found = shutil.which(f"python3.{minor}")
        if found and _succeeds([found, "-c", "import venv"], lambda line: None):
            return found
    versions = " or ".join(f"3.{minor}" for minor in backend.pythons)
    raise LlmqError(f"{backend.name} runs on Python {versions}, which is not here", f"install Python {versions}")


def _run(command: list[str], backend: Backend, echo: Echo) -> None:
    last: list[str] = []

    def keep(line: str) -> None:
        last[:] = [*last[-2:], line]
        echo(line)

    if not _succeeds(command, keep):
        reason = next((line for line in reversed(last) if line.strip()), "it said nothing")
        raise LlmqError(
            f"{backend.name} could not be installed: {reason.removeprefix('ERROR: ')}",
            f"see above; then again: llmq backends install {backend.name}",
        )


def _succeeds(command: list[str], echo: Echo) -> bool:
    # A variable that leads Python to other packages would lead it out of the environment.
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=clean
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            echo(line.rstrip())
    return process.returncode == 0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One at a time: a second run waits until the first has made, or removed, the environment."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists()
