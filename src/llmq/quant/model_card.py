"""The model card: what was made of what, and how, for those who find the folder. No torch."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from statistics import fmean
from typing import Any

import yaml

from llmq.checkpoint.config import HEAD
from llmq.checkpoint.folder import DEMO
from llmq.checkpoint.formats import FORMATS
from llmq.memory import format_bytes
from llmq.quant.options import SELF, QuantizeOptions
from llmq.quant.recipe import data_name, settings, words
from llmq.quant.report import QuantizationReport, errors_by_kind


def model_card(
    report: QuantizationReport, options: QuantizeOptions, source_card: Path, *, from_hub: bool, writer: str
) -> str:
    """README.md of the written folder. It names no path of this machine, and is the same for the same run."""
    front: dict[str, Any] = _licence(source_card)
    if from_hub:
        front |= {"base_model": report.model, "base_model_relation": "quantized"}
    scheme = options.choice.scheme
    front |= {"library_name": "transformers", "tags": ["llmq", report.method, report.format, f"{scheme.bits}-bit"]}
    front["tags"] = list(dict.fromkeys(front["tags"]))
    calibrated = report.calibration_samples > 0
    windows = f"{report.calibration_samples} windows of {report.calibration_seqlen} tokens"
    exceptions = "".join(f"| {_escaped(rule.pattern)} | {rule.scheme or 'not quantized'} |\n" for rule in options.rules)
    rows = "\n".join(
        f"| {kind} | {len(layers)} | {fmean(x.error for x in layers):.2e} | {max(x.error for x in layers):.2e} "
        f"| {fmean(x.rtn_error for x in layers):.2e} |"
        for kind, layers in errors_by_kind(report.layers).items()
    )
    header = "| layers | number | mean | worst | mean if rounded to nearest |\n|---|---|---|---|---|"
    table = f"Relative squared error of the {report.error_of}:\n\n{header}\n{rows}\n" if rows else ""
    return (
        f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {report.model}, quantized to {scheme.bits} bits

| | |
|---|---|
| base model | {report.model} |
| method | {report.method}{f", by {report.backend}" if options.third_party else ""} |
| scheme | {scheme} |
{exceptions}| embeddings, norms{"" if any(x.name == HEAD for x in report.layers) else f", {HEAD}"} | not quantized |
| format | {FORMATS[report.format].title} |
| calibration | {f"{windows} of {_text_name(options)}, seed {options.calibration.seed}" if calibrated else "none"} |
| size | {format_bytes(report.bytes_before)} → {format_bytes(report.bytes_after)} |
| bits a quantized weight | {report.effective_bits:.2f} |
| made by | {writer} |

```
llmq quantize {quote(report.model)} -o {quote(Path(report.output).name)} {" ".join(words(settings(options)))}
```

{table}{"".join(f"{chr(10)}- {warning}" for warning in report.warnings)}
""".rstrip()
        + "\n"
    )


def _escaped(pattern: str) -> str:
    """As the cell of a table has it."""
    return pattern.replace("|", "\\|")


def _text_name(options: QuantizeOptions) -> str:
    named = {DEMO: "the text shipped with llmq", SELF: "text that the model wrote itself"}
    data = options.calibration.data or SELF
    return named.get(data, data_name(data))


def _licence(card: Path) -> dict[str, Any]:
    """The licence that the base model's card states: it binds what is made from the model."""
    if not card.exists():
        return {}
    _, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    front, end, _ = rest.partition("\n---")
    try:
        fields = yaml.safe_load(front) if end else None
    except yaml.YAMLError:
        return {}
    if not isinstance(fields, dict):
        return {}
    return {key: fields[key] for key in ("license", "license_name", "license_link") if key in fields}
