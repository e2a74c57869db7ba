"""What the weights of a model folder take: as its headers say, or by formula where there are none yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmq import memory
from llmq.checkpoint.config import ModelConfig
from llmq.checkpoint.formats import open_format
from llmq.checkpoint.tensors import Tensors
from llmq.errors import LlmqError
from llmq.scheme import Scheme

HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Weights:
    """``scheme`` is None for weights that are not quantized, or of which only the size is known: they have several
    schemes, or a format that llmq does not run."""

    num_bytes: int
    scheme: Scheme | None
    stored: bool
    """Counted from the files of the folder, not computed from its config."""


def stored_weights(folder: Path, config: ModelConfig) -> Weights:
    """The weights as ``folder`` has them; computed from its config when it holds no safetensors (yet).

    Raises LlmqError when a shard is missing or cut short, or there are no files and no formula for their format.
    """
    scheme = _stored_scheme(config)
    if any(folder.glob("*.safetensors")):
        tensors = Tensors(folder)
        num_bytes = tensors.num_bytes
        if config.tied_embeddings and HEAD in tensors:
            num_bytes -= tensors.infos[HEAD].num_bytes  # stored beside the embedding that it is, but loaded once
        return Weights(num_bytes, scheme, stored=True)
    if config.quantization is not None and scheme is None:
        raise LlmqError(
            f"{folder} has no weights, and llmq cannot compute their size: it does not run the format "
            f"{config.quantization.get('quant_method')!r}, or not every layer has the same scheme",
            "download the *.safetensors files as well, or plan llmq's own quantization with --bits 4",
        )
    return planned_weights(config, scheme)


def planned_weights(config: ModelConfig, scheme: Scheme | None) -> Weights:
    """The weights as ``llmq quantize`` would write them."""
    return Weights(memory.weight_bytes(config, scheme, config.dtype_bytes), scheme, stored=False)


def _stored_scheme(config: ModelConfig) -> Scheme | None:
    try:
        format = open_format(config)
    except LlmqError:  # llmq does not run the folder, but can plan by its size
        return None
    return None if format is None else format.scheme
