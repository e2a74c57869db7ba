"""What an NVIDIA driver tells of a card: energy, clocks, the limit on its power. By NVML, the library under nvidia-smi.

Interface: https://docs.nvidia.com/deploy/nvml-api. Called through ctypes: the driver brings it,
and no package is needed. Whatever is not there, or not told, is None.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
SM_CLOCK, MEMORY_CLOCK = 1, 2


@dataclass(frozen=True, slots=True)
class Card:
    """A handle of NVML's."""

    library: Any
    handle: ctypes.c_void_p

    @property
    def joules(self) -> float | None:
        """Spent since the driver was loaded."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong())
        return None if millijoules is None else millijoules / 1000

    @property
    def sm_clock(self) -> int | None:
        """MHz, now."""
        return self._ask("nvmlDeviceGetClockInfo", ctypes.c_uint(), SM_CLOCK)

    @property
    def memory_clock(self) -> int | None:
        """MHz, now."""
        return self._ask("nvmlDeviceGetClockInfo", ctypes.c_uint(), MEMORY_CLOCK)

    @property
    def power_limit(self) -> float | None:
        """Watts."""
        milliwatts = self._ask("nvmlDeviceGetEnforcedPowerLimit", ctypes.c_uint())
        return None if milliwatts is None else milliwatts / 1000

    def _ask(self, function: str, answer: Any, *arguments: int) -> int | None:
        failed = getattr(self.library, function)(self.handle, *arguments, ctypes.byref(answer))
        return None if failed else int(answer.value)


@dataclass(frozen=True, slots=True)
class Meter:
    """What ``card`` spends from now on; None where there is no card."""

    card: Card | None
    start: float | None

    @property
    def joules(self) -> float | None:
        """So far."""
        now = None if self.card is None else self.card.joules
        return None if now is None or self.start is None else now - self.start


def start_meter(card: Card | None) -> Meter:
    return Meter(card, None if card is None else card.joules)


def open_card(uuid: str | None = None) -> Card | None:
    """The card of this id, as CUDA gives it; without one, the machine's only card."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    handle, cards = ctypes.c_void_p(), ctypes.c_uint()
    if library.nvmlInit_v2():
        return None
    if uuid is not None:
        failed = library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}".encode(), ctypes.byref(handle))
    elif library.nvmlDeviceGetCount_v2(ctypes.byref(cards)) or cards.value != 1:
        return None
    else:
        failed = library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
    return None if failed else Card(library, handle)


def card_of(device: str) -> Card | None:
    """The card that ``device``, as torch names it, is."""
    if device == "cpu":
        return None
    import torch

    return open_card(str(torch.cuda.get_device_properties(torch.device(device)).uuid))
