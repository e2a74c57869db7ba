"""From safetensors files straight into a GPU's memory, in large reads through pinned memory.

    files ──▶ READERS threads ──▶ pinned buffers of PIECE_BYTES, one a thread ──▶ tensors on the device

While one buffer is copied on, the others are read into. Mapping a file instead costs a page fault every few KiB, and
the driver copies what is not pinned twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.checkpoint.tensors import DTYPES, TensorInfo
from llmq.errors import LlmqError

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES = 16 * 2**20
READERS = 8


@dataclass(slots=True)
class Piece:
    """Bytes that are read at once, and where they go: uint8 views of tensors that lie side by side in the file."""

    file: Path
    offset: int
    places: list[Tensor] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(place.numel() for place in self.places)


def read_to_device(infos: Mapping[str, TensorInfo], device: str) -> dict[str, Tensor]:
    """The tensors of ``infos``, which have dtypes of DTYPES, as stored. LlmqError when a file has become shorter."""
    import torch

    tensors = {
        name: torch.empty(info.shape, dtype=getattr(torch, DTYPES[info.dtype]), device=device)
        for name, info in infos.items()
    }
    pinned = torch.device(device).type == "cuda"
    reads: deque[tuple[Piece, Tensor, Future[None]]] = deque()

    def copy_oldest() -> Tensor:
        """Returns the buffer, which is free then."""
        piece, buffer, read = reads.popleft()
        read.result()
        sizes = [place.numel() for place in piece.places]
        for place, part in zip(piece.places, torch.split(buffer[: sum(sizes)], sizes), strict=True):
            place.copy_(part, non_blocking=True)
        if pinned:
            torch.cuda.current_stream(device).synchronize()
        return buffer

    with ThreadPoolExecutor(READERS) as readers:
        for piece in _pieces(infos, tensors):
            if len(reads) == READERS:
                buffer = copy_oldest()
            else:
                buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned)
            reads.append((piece, buffer, readers.submit(_read, piece, buffer)))
        while reads:
            copy_oldest()
    return tensors


def _pieces(infos: Mapping[str, TensorInfo], tensors: Mapping[str, Tensor]) -> list[Piece]:
    """In the order of the files. No part of a tensor is longer than a piece, and short neighbours share one."""
    import torch

    pieces: list[Piece] = []
    for name, info in sorted(infos.items(), key=lambda item: (item[1].file, item[1].offset)):
        start = info.offset
        for part in torch.split(tensors[name].reshape(-1).view(torch.uint8), PIECE_BYTES):
            last = pieces[-1] if pieces else None
            if (
                last is None
                or (last.file, last.offset + last.num_bytes) != (info.file, start)
                or last.num_bytes + part.numel() > PIECE_BYTES
            ):
                last = Piece(info.file, start)
                pieces.append(last)
            last.places.append(part)
            start += part.numel()
    return pieces


def _read(piece: Piece, buffer: Tensor) -> None:
    view = buffer.numpy().data[: piece.num_bytes]
    with piece.file.open("rb", buffering=0) as file:
        file.seek(piece.offset)
        while view:
            num_bytes = file.readinto(view)
            if not num_bytes:
                raise LlmqError(f"{piece.file} became shorter while it was read", "download or copy it again")
            view = view[num_bytes:]
