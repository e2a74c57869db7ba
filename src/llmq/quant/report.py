"""What happened to each layer, in numbers; and the model card that says so to others. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from llmq.checkpoint.formats import FORMATS
from llmq.checkpoint.formats.packed import HEAD
from llmq.memory import format_bytes
from llmq.quant.backends import NATIVE
from llmq.quant.options import DEFAULTS, QuantizeOptions
from llmq.quant.schemes import PRESETS, formats_for
from llmq.scheme import INT, Scheme


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One linear layer.

    method     the method really used: a layer falls back to rtn where gptq does not do better
    error      of the layer's output on the calibration inputs, tr(E H Eᵀ) / tr(W H Wᵀ); without calibration, of its
               weights, ‖E‖² / ‖W‖²
    rtn_error  the same of plain rounding to nearest, of the weights as the method has scaled them before. Both are NaN
               where a third-party quantizer has scaled them: nothing says by how much
    """

    name: str
    method: str
    scheme: str
    error: float
    rtn_error: float


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """A whole run.

    left_out           the linear layers of the decoder blocks that stay as they were
    bytes_before       of all tensors; ``bytes_after`` likewise
    error_of           what the layers' errors are errors of
    effective_bits     what a quantized weight takes, with its share of scales and zero points
    peak_memory_bytes  of the device, or on a CPU of the process
    """

    model: str
    output: str
    method: str
    backend: str
    format: str
    scheme: str
    device: str
    calibration_samples: int
    calibration_seqlen: int
    layers: tuple[LayerReport, ...]
    error_of: str
    left_out: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    effective_bits: float
    seconds: float
    peak_memory_bytes: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """NaN, which JSON does not have, becomes null."""
        fields = asdict(self)
        for layer in fields["layers"]:
            layer |= {name: None for name in ("error", "rtn_error") if isnan(layer[name])}
        return fields


def errors_by_kind(layers: Iterable[LayerReport]) -> dict[str, list[LayerReport]]:
    """Layers with known errors by the last part of their names (``q_proj``, …), in the order in which the kinds first
    appear."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        if isnan(layer.error):
            continue
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    return kinds


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
    data = options.calibration.data
    text = "the text shipped with llmq" if data is None else Path(data).name
    exceptions = "".join(f"| {rule.pattern} | {rule.scheme or 'not quantized'} |\n" for rule in options.rules)
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
| calibration | {f"{windows} of {text}, seed {options.calibration.seed}" if calibrated else "none"} |
| size | {format_bytes(report.bytes_before)} → {format_bytes(report.bytes_after)} |
| bits a quantized weight | {report.effective_bits:.2f} |
| made by | {writer} |

```
{_command(report, options)}
```

{table}{"".join(f"{chr(10)}- {warning}" for warning in report.warnings)}
""".rstrip()
        + "\n"
    )


def _command(report: QuantizationReport, options: QuantizeOptions) -> str:
    choice, calibration = options.choice, options.calibration
    words = ["llmq quantize", report.model, "-o", Path(report.output).name, *_scheme_words(choice.scheme)]
    words += ["--method", choice.method]
    if options.backend != NATIVE:
        words += ["--backend", options.backend]
    if choice.format != formats_for(choice.scheme, choice.method)[0]:
        words += ["--format", choice.format]
    if options.clip:
        words += ["--clip"]
    if options.act_order != DEFAULTS.act_order:
        words += ["--act-order", options.act_order]
    if options.alpha is not None:
        words += ["--alpha", str(options.alpha)]
    if options.kv_cache is not None:
        words += ["--kv-cache-scheme", options.kv_cache]
    if report.calibration_samples:
        if calibration.data is not None:
            words += ["--calib-data", Path(calibration.data).name]
        words += ["--calib-samples", str(calibration.samples), "--calib-seqlen", str(calibration.seqlen)]
    for rule in options.rules:
        words += ["--override", f"'{rule}'"]
    return " ".join(words)


def _scheme_words(scheme: Scheme) -> list[str]:
    """The flags that ask for ``scheme``: a preset of its numbers, and in what it differs."""
    kind = [
        (name, preset.scheme)
        for name, preset in PRESETS.items()
        if (preset.scheme.number, preset.scheme.activation_bits) == (scheme.number, scheme.activation_bits)
    ]
    name, named = next((pair for pair in kind if pair[1].bits == scheme.bits), kind[0])
    words = ["--scheme", name]
    if scheme.bits != named.bits:
        words += ["--bits", str(scheme.bits)]
    if scheme.group_size != named.group_size:
        words += ["--group-size", str(scheme.group_size)]
    if scheme.number == INT and scheme.activation_bits == 16:
        words += ["--sym" if scheme.symmetric else "--asym"]
    return words


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
