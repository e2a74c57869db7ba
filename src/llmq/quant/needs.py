"""Does a quantization fit this machine, on which devices, and do its hidden states go into memory or into files?"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.checkpoint.folder import existing_parent, partial_of
from llmq.errors import CHECK_FAILED, LlmqError
from llmq.memory import MICRO_BATCH_TOKENS, format_bytes
from llmq.memplan.quantization import QuantizationPlan, plan_quantization
from llmq.memplan.source import open_model
from llmq.quant.job import Job
from llmq.quant.schemes import AUTOROUND
from llmq.runtime.device import available_bytes, available_memory_bytes, cards_like

MEMORY, DISK = "main memory", "the disk"


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a run takes of one place, and that there are for it."""

    where: str
    needed: int
    free: int
    hint: str

    @property
    def fits(self) -> bool:
        return self.needed <= self.free


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run takes of each place that it needs some of.

    batch_tokens  that pass a block at once: fewer, where memory is short
    devices       that layers are rounded on: the job's, and those like it that have the room
    spills        hidden states go into files
    """

    places: tuple[Need, ...]
    batch_tokens: int
    devices: tuple[str, ...]
    spills: bool

    @property
    def fits(self) -> bool:
        return all(place.fits for place in self.places)

    def lines(self) -> list[str]:
        """For a person."""
        spilled = " (hidden states in files)" if self.spills else ""
        return [
            f"about {format_bytes(place.needed)} of {place.where}{spilled * (place.where == DISK)}, which has "
            f"{format_bytes(place.free)}"
            for place in self.places
        ]

    def to_json(self) -> dict[str, Any]:
        places = [{"where": place.where, "needed": place.needed, "free": place.free} for place in self.places]
        return {"fits": self.fits, "spills": self.spills, "batch_tokens": self.batch_tokens, "places": places}

    def check(self) -> None:
        """Raise LlmqError unless all is there."""
        for place in self.places:
            if not place.fits:
                raise LlmqError(
                    f"quantizing takes about {format_bytes(place.needed)} of {place.where}, and there are "
                    f"{format_bytes(place.free)}",
                    place.hint,
                    exit_code=CHECK_FAILED,
                )


def needs_of(job: Job, output: Path, max_memory: int | None) -> Needs:
    """What ``job`` will take. ``max_memory``: bytes of main memory that it may have; None: what is available.

    Of main memory, only what belongs to the run counts: what is read is mapped, and the system may drop it.
    """
    device, on_cpu, choice = job.source.device, job.source.device == "cpu", job.options.choice
    samples = job.options.calibration.samples
    seqlen = min(job.options.calibration.seqlen, job.source.config.context_length)
    calibrated = job.options.calibrated and job.options.third_party is None
    memory = available_memory_bytes() if max_memory is None else max_memory
    room = memory if on_cpu else available_bytes(device)
    model, batch_tokens = open_model(str(job.folder)), MICRO_BATCH_TOKENS
    while True:
        plan = plan_quantization(
            model,
            choice.scheme,
            choice.method,
            calibrated=calibrated,
            samples=samples,
            seqlen=seqlen,
            dtype_bytes=job.source.dtype.itemsize,
            batch_tokens=batch_tokens,
        )
        if not calibrated or plan.device <= room or batch_tokens <= seqlen:
            break
        batch_tokens //= 2
    ways = 2 if choice.method == AUTOROUND else 1  # that of the model as it was, too
    host = plan.device if on_cpu else plan.stack  # what is packed on a GPU passes through main memory
    in_memory = host + ways * (plan.states if on_cpu else plan.pinned)
    spills = in_memory > memory
    disk = shutil.disk_usage(existing_parent(output)).free + _taken(partial_of(output))
    on_disk = job.predicted_bytes + ways * plan.states * spills
    cards = () if on_cpu else tuple(_cards(device, room, plan, several=calibrated))
    places = (
        *cards,
        Need(
            MEMORY, host if spills else in_memory, memory, "a block has to fit: raise --max-memory, or free some of it"
        ),
        Need(DISK, on_disk, disk, "free some space, or choose another --output"),
    )
    return Needs(places, batch_tokens, tuple(card.where for card in cards) or job.devices, spills)


def _cards(device: str, room: int, plan: QuantizationPlan, *, several: bool) -> Iterator[Need]:
    """The card that the work is done on, which has ``room``, and, if ``several`` may round, others that can as well."""
    first, *others = cards_like(device)
    yield Need(first, plan.device, room, "free some of it, or pass --device cpu")
    for other in others if several else ():
        need = Need(other, plan.rounding, available_bytes(other), "free some of it")
        if need.fits:
            yield need


def _taken(folder: Path) -> int:
    """What a run that was stopped has taken of the disk already."""
    return sum(path.stat().st_size for path in folder.glob("*"))
