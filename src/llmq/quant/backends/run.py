"""Have a backend quantize a folder, and read what it wrote like anybody's folder.

Codes, scales and zero points are taken from it, and, where the method folds scales into them, the tensors around; llmq
writes them itself. An old library would save an old config, names that others do not look for, and a tokenizer that
they cannot read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.checkpoint.config import read_json
from llmq.checkpoint.formats import FORMATS, Format
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import Tensors
from llmq.errors import LlmqError
from llmq.quant.backends import Backend
from llmq.quant.backends.driver import run_worker
from llmq.quant.backends.environment import python_of
from llmq.quant.schemes import Choice
from llmq.scheme import Scheme

CONFIG_FILES = ("config.json", "quantize_config.json", "quant_config.json")
"""Where backends say how they quantized; the first that does has the word."""
NATIVE_HINT = "--backend native needs no other library"


@dataclass(frozen=True, slots=True)
class Written:
    """What a backend wrote."""

    backend: Backend
    format: Format
    tensors: Tensors

    def layer(self, name: str, shape: tuple[int, int], scheme: Scheme) -> QuantizedWeight:
        """The layer ``name``. LlmqError unless it is there, of ``shape`` and ``scheme``, with finite scales."""
        try:
            weight = self.format.unpack(name, self.tensors)
        except LlmqError as error:
            raise LlmqError(f"{self.backend.name} wrote a folder in which {error.message}", NATIVE_HINT) from None
        if weight.shape != shape or weight.scheme != scheme:
            raise LlmqError(
                f"{self.backend.name} made {name} {list(weight.shape)} of {weight.scheme}, and not {list(shape)} of "
                f"{scheme}",
                NATIVE_HINT,
            )
        if not weight.scales.isfinite().all():
            raise LlmqError(f"{self.backend.name} made scales of {name} that are not finite", NATIVE_HINT)
        return weight


def run_backend(
    backend: Backend,
    model: Path,
    choice: Choice,
    windows: Tensor,
    device: str,
    scratch: Path,
    on_stage: Callable[[str], None],
) -> Written:
    """Quantize the folder ``model`` by ``backend``, on ``windows``, token ids [windows, tokens], within the empty
    folder ``scratch``. LlmqError when it is not installed, fails, or writes what llmq cannot read."""
    python = python_of(backend)
    tokens, output = scratch / "windows.json", scratch / "output"
    tokens.write_text(json.dumps(windows.tolist()), encoding="utf-8")
    scheme = choice.scheme
    request: dict[str, Any] = {
        "backend": backend.name,
        "model": str(model.absolute()),
        "output": str(output.absolute()),
        "method": choice.method,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "device": device,
        "windows": str(tokens.absolute()),
    }
    run_worker(backend, python, request, scratch / "log", on_stage)
    quantization = _quantization(backend, output)
    return Written(backend, FORMATS[str(quantization.get("quant_method"))].read(quantization), Tensors(output))


def _quantization(backend: Backend, folder: Path) -> Mapping[str, Any]:
    """The quantization_config of what a backend wrote in ``folder``, by the names that transformers has."""
    for name in CONFIG_FILES:
        fields = read_json(folder / name) if (folder / name).is_file() else {}
        found = fields.get("quantization_config") if name == "config.json" else fields
        if isinstance(found, dict) and found:
            # auto-gptq says neither what it is nor which version of the layout it writes: there was one.
            return {"quant_method": "gptq"} | found
    raise LlmqError(f"{backend.name} says nowhere how it quantized", NATIVE_HINT)
