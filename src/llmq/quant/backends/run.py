"""Quantize a model by a backend: give it a folder and tokens, and check what it hands back like anybody's folder.

Only tensors and their quantization_config are taken from the backend. All else in the folder is the original's: an old
library would save an old config, and a tokenizer that others cannot read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmq.checkpoint.config import read_json
from llmq.errors import LlmqError

CONFIG_FILES = ("config.json", "quantize_config.json", "quant_config.json")
"""Where backends say how they quantized; the first that does has the word."""


def written_quantization(folder: Path) -> dict[str, Any]:
    """The quantization_config of what a backend wrote in ``folder``, by today's names."""
    for name in CONFIG_FILES:
        if not (folder / name).is_file():
            continue
        fields = read_json(folder / name)
        found = fields.get("quantization_config") if name == "config.json" else fields
        if isinstance(found, dict) and found:
            return _renamed(found)
    raise LlmqError(f"{folder} says nowhere how it was quantized", "try --backend native")


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """Old names of fields → those that transformers reads; paths of this machine are left out."""
    fields = {key: value for key, value in fields.items() if key not in ("model_name_or_path", "model_file_base_name")}
    if "w_bit" in fields:  # AutoAWQ's own
        fields = {
            "quant_method": "awq",
            "bits": fields["w_bit"],
            "group_size": fields["q_group_size"],
            "zero_point": fields["zero_point"],
            "version": str(fields.get("version", "gemm")).lower(),
            "modules_to_not_convert": fields.get("modules_to_not_convert"),
        }
    elif "quant_method" not in fields:  # auto-gptq's own
        fields = {"quant_method": "gptq", "checkpoint_format": "gptq"} | fields
    return fields
