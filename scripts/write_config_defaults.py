"""Write src/llmq/memplan/defaults.json: what transformers' configuration classes mean by fields that are not there.

python scripts/write_config_defaults.py
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from llmq.memplan import blocks, describe, families, fields, parameters, widths

SOURCES = [Path(module.__file__ or "") for module in (blocks, describe, families, parameters, widths)]
TARGET = Path(fields.__file__).with_name("defaults.json")


def read_names() -> set[str]:
    """The fields that the planner reads, under all their names."""
    quoted = {name for source in SOURCES for name in re.findall(r'"(\w+)"', source.read_text(encoding="utf-8"))}
    return quoted | {other for name in quoted for other in fields.OTHER_NAMES.get(name, ())}


def defaults_of(model_type: str, names: set[str]) -> dict[str, Any]:
    """The defaults of the configuration class, None and computed ones left out."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    aliases = getattr(config_class, "attribute_map", {})
    found = {
        field.name: field.default
        for field in dataclasses.fields(config_class)
        if field.name in names and field.name not in aliases and field.default not in (None, dataclasses.MISSING)
    }
    return dict(sorted(found.items()))


def main() -> None:
    names = read_names() - {"dtype", "is_encoder_decoder", "model_type"}
    lines = [
        f"  {json.dumps(model_type)}: {json.dumps(defaults_of(model_type, names))}"
        for model_type in sorted(families.FAMILIES)
    ]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
