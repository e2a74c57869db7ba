"""What happened to each layer, in numbers. No torch.

OUT/quantization_report.json     of every layer: method, scheme, error. The same for the same run
OUT/quantization_report.png      the errors, where matplotlib is installed: see ``quant.plot``
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

REPORT = "quantization_report.json"
SCHEMA = "llmq.quantization_report/1"
OF_THE_RUN = ("output", "seconds", "peak_memory_bytes", "peak_host_bytes")
"""What another run of the same would have otherwise: no part of the file."""


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
    peak_memory_bytes  of the device, or on a CPU of the process, as of a third-party backend's
    peak_host_bytes    of the process, what it has mapped of files among them
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
    peak_host_bytes: int
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


def write_report(folder: Path, report: QuantizationReport) -> None:
    """The report as a file of ``folder``."""
    fields = {name: value for name, value in report.to_json().items() if name not in OF_THE_RUN}
    text = json.dumps({"schema": SCHEMA, **fields}, indent=2, ensure_ascii=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
