"""Safetensors in and out: headers without torch, tensors one at a time, shards as they fill.

A safetensors file is 8 bytes (little-endian length of the header), the header (JSON: name → dtype, shape, byte
range), then the bytes of the tensors.  https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.checkpoint.config import read_json
from llmq.errors import LlmqError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
DEFAULT_SHARD_BYTES = 4 * 2**30
MAX_HEADER_BYTES = 100 * 2**20
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F16": "float16", "BF16": "bfloat16", "F32": "float32",
    "F64": "float64",
}  # fmt: skip
"""torch's names of safetensors' dtypes."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor. ``dtype`` is safetensors' name for it: F32, BF16, I32, …

    ``offset`` is where in the file its bytes begin; of a file on the hub it is not known.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    offset: int = 0


class Tensors:
    """The tensors of a model folder, known by their headers, read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Read every header, and check that every shard is as long as its header says.

        Raises LlmqError when there are no weights, only pickled ones, or a shard is missing or cut short.
        """
        self.folder = folder
        self.infos: dict[str, TensorInfo] = {}
        self._fetched: dict[tuple[str, str], Tensor] = {}
        for file in _weight_files(folder):
            self.infos.update(_read_header(file))

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.infos.values())

    def fetch(self, module: str, device: str) -> None:
        """Read all tensors of ``module`` and below at once, in place of those of the last call: ``load`` has each of
        them ready then, once."""
        from llmq.checkpoint.staging import read_to_device

        self._fetched.clear()
        infos = {
            name: info for name, info in self.infos.items() if name.startswith(f"{module}.") and info.dtype in DTYPES
        }
        self._fetched = {(name, device): tensor for name, tensor in read_to_device(infos, device).items()}

    def load(self, name: str, device: str = "cpu") -> Tensor:
        """One tensor, as stored. Raises LlmqError when the folder does not have it."""
        from safetensors import safe_open

        from llmq.checkpoint.staging import read_to_device

        info = self.infos.get(name)
        if info is None:
            raise LlmqError(
                f"{self.folder} has no tensor {name}", "the folder is incomplete, or its config.json is another's"
            )
        if (name, device) in self._fetched:
            return self._fetched.pop((name, device))
        if device != "cpu" and info.dtype in DTYPES:
            return read_to_device({name: info}, device)[name]
        with safe_open(info.file, framework="pt", device=device) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else ()
        if not names or not all(isinstance(name, str) for name in names):
            raise LlmqError(f"{folder / INDEX} has no weight_map", "download or copy it again")
        files = [folder / Path(name).name for name in sorted(set(names))]
    elif (folder / SINGLE).exists():  # adapters and other layouts of the same may lie beside it
        files = [folder / SINGLE]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise LlmqError(
            f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are read",
            "save the model as safetensors: model.save_pretrained(folder, safe_serialization=True)",
        )
    raise LlmqError(f"{folder} has no weights", "it should hold *.safetensors files")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    truncated = LlmqError(f"{file} is cut short or damaged", "download or copy it again")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise truncated
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        infos = {
            name: TensorInfo(
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                entry["data_offsets"][1] - entry["data_offsets"][0],
                8 + header_bytes + entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if any(8 * info.num_bytes != prod(info.shape) * element_bits(info.dtype) for info in infos.values()):
            raise truncated
    except FileNotFoundError:
        raise LlmqError(f"{file} is missing", "download or copy it again") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise truncated from None
    if 8 + header_bytes + end != size:
        raise truncated
    return infos


def element_bits(dtype: str) -> int:
    """Of a number of safetensors' ``dtype``, as the name says: 8 of F8_E4M3. ValueError where it says nothing."""
    return 8 if dtype == "BOOL" else int("".join(filter(str.isdigit, dtype.split("_")[0])))


class ShardWriter:
    """Writes tensors into ``folder`` as safetensors shards of about ``shard_bytes``, with an index when several.

    Tensors that share no storage may be added in any order; a name may be added once. Call ``close`` at the end.
    """

    def __init__(self, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.num_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self._names:
            raise ValueError(f"{name} is written twice")
        self._names.add(name)
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous().cpu()
        self._pending_bytes += size
        self.num_bytes += size

    def add_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            self.add(name, tensor)

    def close(self) -> None:
        """Write what is pending, give the shards their final names, and write the index."""
        self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self.folder / SINGLE)
            return
        total = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            self._part(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / INDEX, index)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if not self._pending:
            return
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending = {}
        self._pending_bytes = 0


def write_json(path: Path, value: object) -> None:
    """Write ``value`` to ``path`` whole: under another name first, then renamed."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
