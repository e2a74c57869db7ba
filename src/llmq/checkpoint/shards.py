"""A folder's weights laid out before they are known: every header is written first, and each tensor fills its place.

A safetensors file may be filled in any order once its header stands. So tensors go to the disk as they are made, none
waits in memory for its shard to be full, the disk's space is taken before the work begins, and a run that was stopped
finds what it wrote where it left it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmq.checkpoint.tensors import DEFAULT_SHARD_BYTES, DTYPES, INDEX, SINGLE, Tensors, write_json

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Room for one tensor. ``dtype`` is safetensors' name for it."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def lay_out(folder: Path, places: Mapping[str, Place], shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
    """Make the files for tensors of these names in ``folder``, full of zeros, in shards of about ``shard_bytes`` with
    an index when there are several. OSError when the disk has no room for them."""
    shards = list(_shards(places, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _start(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(place.num_bytes for place in places.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


class Shards(ExitStack):
    """The files of a folder that was laid out, open to be filled. A context manager that closes them.

    tensors  what is in them, or will be
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tensors = Tensors(folder)
        self._files: dict[Path, BinaryIO] = {}

    def fill(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Write ``values`` into their places. ValueError for a tensor that does not fit its place."""
        import torch

        for name, value in values:
            info = self.tensors.infos[name]
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            dtype = str(value.dtype).removeprefix("torch.")
            if tuple(value.shape) != info.shape or DTYPES.get(info.dtype, dtype) != dtype:
                raise ValueError(
                    f"{name} is {value.dtype} {list(value.shape)}, and its place {info.dtype} {info.shape}"
                )
            if info.file not in self._files:
                self._files[info.file] = self.enter_context(info.file.open("r+b"))
            file = self._files[info.file]
            file.seek(info.offset)
            file.write(raw.numpy().data)

    def sync(self) -> None:
        """Have the disk hold all that was written."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())


def reserve(descriptor: int, num_bytes: int) -> None:
    """Make a file so long, of zeros that the disk has room for. OSError when it has not."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:
        os.truncate(descriptor, num_bytes)


def _shards(places: Mapping[str, Place], shard_bytes: int) -> Iterator[dict[str, Place]]:
    shard: dict[str, Place] = {}
    size = 0
    for name, place in places.items():
        if shard and size + place.num_bytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = place
        size += place.num_bytes
    yield shard


def _start(file: Path, places: Mapping[str, Place]) -> None:
    """The header, and as much of the disk as it speaks of. Wide elements come first, so that all are aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(places, key=lambda name: (-_element_bytes(places[name]), name)):
        place = places[name]
        header[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": (end, end + place.num_bytes)}
        end += place.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.flush()
        reserve(stream.fileno(), 8 + len(text) + end)


def _element_bytes(place: Place) -> int:
    return place.num_bytes // max(prod(place.shape), 1)
