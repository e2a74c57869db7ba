"""On-disk formats of quantized weights: one file each, whose description both reader and writer follow.

A ``Format`` is what one folder's ``quantization_config`` says, or will say. It unpacks layers to ``QuantizedWeight``
and packs them from it, so that whoever loads, quantizes or converts a model knows no format by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from llmq import __version__
from llmq.checkpoint.config import HEAD, ModelConfig, read_json
from llmq.checkpoint.formats.awq import Awq
from llmq.checkpoint.formats.bitsandbytes import BitsAndBytes
from llmq.checkpoint.formats.compressed_tensors import CompressedTensors
from llmq.checkpoint.formats.gptq import Gptq
from llmq.checkpoint.formats.packed import Layout
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import Tensors, write_json
from llmq.errors import USAGE, LlmqError, either
from llmq.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = "model.layers."
WRITER = f"llmq:{__version__}"


class Format(Protocol):
    """name          as ``--format`` and ``quant_method`` have it
    title         as people have it
    markers       the tensors by which a packed layer is known: ``NAME.marker``
    multiple      both sides of a packed layer are multiples of it
    packs_head    whether its readers find a packed ``lm_head``
    config_files  further files that repeat the quantization_config
    """

    name: ClassVar[str]
    title: ClassVar[str]
    markers: ClassVar[tuple[str, ...]]
    multiple: ClassVar[int]
    packs_head: ClassVar[bool]
    config_files: ClassVar[tuple[str, ...]]

    @staticmethod
    def why_not(*schemes: Scheme) -> str | None:
        """Why one folder cannot hold layers of all these schemes; None when it can."""

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme]) -> Format:
        """The format as it is written for layers, by their full names, of schemes that it holds."""

    @classmethod
    def read(cls, quantization: Mapping[str, Any]) -> Format:
        """The format of a folder. LlmqError on what llmq does not read."""

    @property
    def scheme(self) -> Scheme | None:
        """Of all quantized layers; None when they have several."""

    @property
    def caveat(self) -> str | None:
        """What whoever writes such a folder should know of its readers."""

    def scheme_of(self, name: str) -> Scheme | None:
        """What the folder's config says of layer ``name``; None: it is not quantized."""

    def layout(self, shape: tuple[int, int], scheme: Scheme) -> Layout:
        """The tensors of a layer of ``shape`` (out_features, in_features)."""

    def pack(self, name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
        """The tensors of layer ``name``, as (tensor name, tensor). LlmqError when they cannot hold it exactly."""

    def unpack(self, name: str, tensors: Tensors, device: str = "cpu") -> QuantizedWeight:
        """Read layer ``name``. LlmqError when its tensors contradict the config."""

    def config_dict(self, *, quantized: Sequence[str], ignored: Sequence[str], writer: str) -> dict[str, Any]:
        """``quantization_config`` of a folder that is written: the names of the decoder blocks' quantized and other
        linear layers, and the program."""


FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (Gptq, Awq, CompressedTensors, BitsAndBytes)}


def open_format(config: ModelConfig) -> Format | None:
    """The format of a folder; None when it is not quantized. LlmqError on what llmq does not read."""
    if config.quantization is None:
        return None
    method = str(config.quantization.get("quant_method"))
    if method not in FORMATS:
        raise LlmqError(
            f"the folder is quantized by {method!r}, which is not supported", f"llmq reads {either(FORMATS)}"
        )
    return FORMATS[method].read(config.quantization)


def format_for(name: str, schemes: Mapping[str, Scheme]) -> Format:
    """The format ``name``, to write layers in: full name → scheme. LlmqError when it cannot hold them."""
    check_holds(name, *schemes.values())
    kind = FORMATS[name]
    if HEAD in schemes and not kind.packs_head:
        fitting = [other for other, kind in FORMATS.items() if kind.packs_head and not kind.why_not(*schemes.values())]
        raise LlmqError(
            f"readers of the {kind.title} format expect {HEAD} as it is, and not quantized",
            _fitting(fitting, {schemes[HEAD]}),
            exit_code=USAGE,
        )
    return kind.for_schemes(schemes)


def check_holds(name: str, *schemes: Scheme) -> None:
    """Raise LlmqError unless there is a format ``name``, and one folder of it can hold layers of all ``schemes``."""
    if name not in FORMATS:
        raise LlmqError(f"there is no format {name!r}", f"choose --format {either(FORMATS)}", exit_code=USAGE)
    reason = FORMATS[name].why_not(*schemes)
    if reason is not None:
        fitting = [other for other, kind in FORMATS.items() if kind.why_not(*schemes) is None]
        raise LlmqError(reason, _fitting(fitting, set(schemes)), exit_code=USAGE)


def _fitting(formats: Sequence[str], schemes: Collection[Scheme]) -> str:
    """The hint that names the formats that hold ``schemes``."""
    if not formats:
        return "no format holds them in one folder: choose fewer schemes"
    return f"--format {either(formats)} can hold {' and '.join(sorted(map(str, schemes)))}"


def is_packed(format: Format | None, name: str, tensors: Tensors) -> bool:
    """Are the weights of layer ``name`` in the folder's format? Else they are as in the original."""
    return format is not None and any(f"{name}.{marker}" in tensors for marker in format.markers)


def packed_layers(format: Format, tensors: Tensors) -> set[str]:
    """The names of all layers in the folder's format."""
    return {
        name.removesuffix(f".{marker}")
        for name in tensors.infos
        for marker in format.markers
        if name.endswith(f".{marker}")
    }


def kept_layers(tensors: Tensors, packed: Collection[str]) -> list[str]:
    """The layers of decoder blocks that stay as they are beside those that are ``packed``: all that have a matrix for
    their weight, the routers of experts among them."""
    return [
        name
        for tensor, info in tensors.infos.items()
        if tensor.startswith(BLOCKS) and tensor.endswith(".weight") and len(info.shape) == 2
        if (name := tensor.removesuffix(".weight")) not in packed
    ]


def check_shape(format: str, name: str, shape: tuple[int, int], hint: str) -> None:
    """Raise LlmqError, with ``hint``, unless ``format`` can pack a layer of ``shape`` (out_features, in_features)."""
    kind = FORMATS[format]
    if any(size % kind.multiple for size in shape):
        raise LlmqError(
            f"{name} is {shape[0]} × {shape[1]}, and the {kind.title} format packs multiples of {kind.multiple}", hint
        )


def packed_bytes(format: Format, shape: tuple[int, int], scheme: Scheme) -> int:
    """What a layer of ``shape`` takes, without its bias, as llmq writes it."""
    return sum(stored.num_bytes for stored in format.layout(shape, scheme).values())


def write_configs(source: Path, target: Path, format: Format, quantization: dict[str, Any]) -> None:
    """config.json: that of ``source``, with ``quantization``, which the format's other files repeat."""
    config = read_json(source / "config.json")
    config.pop("_name_or_path", None)  # often a path of the machine that saved it
    write_json(target / "config.json", config | {"quantization_config": quantization})
    for name in format.config_files:
        write_json(target / name, quantization)
