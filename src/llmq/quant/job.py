"""A quantization that has passed its checks: what is to be done, in which parts, and what will be written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.config import block_name
from llmq.checkpoint.folder import DEMO
from llmq.checkpoint.formats import WRITER, Format, format_for, packed_bytes
from llmq.checkpoint.formats.compressed_tensors import CompressedTensors
from llmq.checkpoint.formats.gptq import Gptq
from llmq.checkpoint.shards import Place
from llmq.checkpoint.tensors import Tensors
from llmq.memory import MICRO_BATCH_TOKENS
from llmq.quant.methods.gptq import DAMP_PERCENT
from llmq.quant.options import DYNAMIC, QuantizeOptions
from llmq.quant.schemes import GPTQ
from llmq.runtime.loader import Source
from llmq.scheme import Scheme

REST = "the rest"
"""The part of a model that is in no decoder block: embedding, last norm, head."""
FLAGS = {
    "symmetric": "--sym",
    "number": "--scheme, numbers",
    "activation_bits": "--scheme, bits of activations",
    "rules": "--override and --ignore",
    "kv_cache": "--kv-cache-scheme",
    "data": "--calib-data",
    "samples": "--calib-samples",
    "seqlen": "--calib-seqlen",
    "seed": "--calib-seed",
}
"""The flags of options that are not named as they are."""


@dataclass(frozen=True, slots=True)
class Job:
    """model         as it was asked for
    schemes       of the layers to quantize, in order
    left_out      the other matrices of the decoder blocks, routers among them
    notes         what the user should know of the choice of layers
    windows       token ids [windows, tokens], for a method that learns from data
    batch_tokens  of the windows that pass a block at once
    devices       that layers are rounded on: the source's, and others like it
    """

    model: str
    folder: Path
    options: QuantizeOptions
    source: Source
    schemes: dict[str, Scheme]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    windows: Tensor | None
    devices: tuple[str, ...]
    batch_tokens: int = MICRO_BATCH_TOKENS

    @property
    def format(self) -> Format:
        format, options = format_for(self.options.choice.format, self.schemes), self.options
        if isinstance(format, CompressedTensors):
            return replace(format, kv_scales=options.kv_cache is not None)
        if isinstance(format, Gptq):
            damp_percent = DAMP_PERCENT if options.choice.method == GPTQ else None
            return replace(format, damp_percent=damp_percent, act_order=options.act_order == DYNAMIC)
        return format

    @property
    def parts(self) -> list[str]:
        """What is done and written at once: the decoder blocks, by their names, and then the rest. Third-party backends
        do all at once."""
        if self.options.third_party is not None:
            return [REST]
        return [*map(block_name, range(self.source.config.num_layers)), REST]

    def by_part(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The names of the layers or tensors of each part."""
        parts: dict[str, list[str]] = {part: [] for part in self.parts}
        for name in names:
            prefix = ".".join(name.split(".")[:3])
            parts.get(prefix, parts[REST]).append(name)
        return parts

    @property
    def kept_tensors(self) -> list[str]:
        """Every tensor of the source folder that no packed one replaces."""
        return [name for name in self.source.tensors.infos if name.removesuffix(".weight") not in self.schemes]

    def shape(self, name: str) -> tuple[int, int]:
        """(out_features, in_features) of a layer."""
        return shape_of(name, self.source.tensors)

    def layout(self, dtypes: Mapping[str, str] = MappingProxyType({})) -> dict[str, Place]:
        """Every tensor that will be written, part by part. ``dtypes``: safetensors' names for what tensors of layers
        are stored in, by their names within a layer, where that is not what llmq stores them in."""
        places: dict[str, Place] = {}
        format, infos = self.format, self.source.tensors.infos
        layers, kept = self.by_part(self.schemes), self.by_part(self.kept_tensors)
        for part in self.parts:
            for name in layers[part]:
                for suffix, stored in format.layout(self.shape(name), self.schemes[name]).items():
                    as_stored = replace(stored, dtypes=(dtypes.get(suffix, stored.dtypes[0]),))
                    places[f"{name}.{suffix}"] = Place(as_stored.dtypes[0], as_stored.shape, as_stored.num_bytes)
            for name in kept[part]:
                places[name] = Place(infos[name].dtype, infos[name].shape, infos[name].num_bytes)
            if self.options.kv_cache is not None and part != REST:
                places |= {f"{part}.self_attn.{letter}_scale": Place("F32", (1,), 4) for letter in "kv"}
        return places

    @property
    def packed_bytes(self) -> int:
        """Of the quantized layers."""
        format = self.format
        return sum(packed_bytes(format, self.shape(name), scheme) for name, scheme in self.schemes.items())

    @property
    def predicted_bytes(self) -> int:
        """Of all tensors that will be written."""
        infos = self.source.tensors.infos
        return self.packed_bytes + sum(infos[name].num_bytes for name in self.kept_tensors)

    @property
    def settings(self) -> dict[str, str]:
        """All that the result depends on, by the flags that say it: what a run has to share with one that it is to go
        on with. Files stand for what is in them by their sizes and times."""
        files = sorted({info.file for info in self.source.tensors.infos.values()})
        stats = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        config = (self.folder / "config.json").read_bytes()
        return {
            "the model": _digest(config, repr(stats).encode()),
            "the calibration text": "none" if self.windows is None else _digest(self.windows.numpy().tobytes()),
            **dict(_flags(self.options)),
            "--max-memory, tokens that pass a block at once": str(self.batch_tokens),
            "--device": self.source.device.partition(":")[0],
            "llmq": WRITER,
            "torch": torch.__version__,
        }

    @property
    def from_hub(self) -> bool:
        return self.model != DEMO and not Path(self.model).expanduser().is_dir()

    @property
    def public_name(self) -> str:
        """The model's name without the paths of this machine."""
        named = self.model == DEMO or self.from_hub
        return self.model if named else Path(self.model).expanduser().resolve().name

    @property
    def dtype(self) -> str:
        """That activations are computed in."""
        return str(self.source.dtype).removeprefix("torch.")

    def in_fp32(self) -> Job:
        """The same with activations in fp32, for those that overflow what is narrower."""
        note = f"activations are not finite in {self.dtype}: calibrated in fp32"
        return replace(self, source=replace(self.source, dtype=torch.float32), notes=(*self.notes, note))


def shape_of(name: str, tensors: Tensors) -> tuple[int, int]:
    """(out_features, in_features) of a layer that is there."""
    out_features, in_features = tensors.infos[f"{name}.weight"].shape
    return out_features, in_features


def _flags(options: Any) -> Iterator[tuple[str, str]]:
    """Every field of nested dataclasses: flag → value."""
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            yield from _flags(value)
        elif isinstance(value, tuple):
            yield FLAGS[field.name], ", ".join(map(str, value)) or "none"
        else:
            yield FLAGS.get(field.name, f"--{field.name.replace('_', '-')}"), str(value)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
