"""A folder made by a third-party backend: all parts at once, laid out once it is seen what the backend stores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.shards import Shards, lay_out
from llmq.checkpoint.tensors import DTYPES
from llmq.quant.affine import energy
from llmq.quant.backends import Backend
from llmq.quant.backends.run import Written, run_backend
from llmq.quant.job import REST, Job
from llmq.quant.journal import Journal
from llmq.quant.methods import rtn
from llmq.quant.report import LayerReport
from llmq.quant.rounding import load_weight
from llmq.quant.schemes import AWQ


def quantize_by(
    backend: Backend, job: Job, partial: Path, journal: Journal, say: Callable[[str, LayerReport | None], None]
) -> None:
    """Have ``backend`` do the work, in a folder within ``partial``, which is then filled with what it made. That stands
    for itself: of layers that it has scaled as well as rounded, nothing says how much of the difference is which."""
    started, windows, format = time.monotonic(), job.windows, job.format
    assert windows is not None
    layers: list[LayerReport] = []
    with TemporaryDirectory(dir=partial, prefix=".backend-") as scratch:
        written = run_backend(
            backend,
            job.folder,
            job.options.choice,
            windows,
            job.source.device,
            Path(scratch),
            lambda what: say(what, None),
        )
        lay_out(partial, job.layout(_stored_dtypes(job, written)))
        with Shards(partial) as shards:
            for weight, layer in _layers(job, written):
                shards.fill(format.pack(layer.name, weight))
                layers.append(layer)
                say(layer.name, layer)
            for name in job.kept_tensors:
                tensor = job.source.tensors.load(name)
                scaled = job.options.choice.method == AWQ and name in written.tensors
                shards.fill([(name, written.tensors.load(name).to(tensor.dtype) if scaled else tensor)])
            shards.sync()
    journal.add(REST, layers, time.monotonic() - started)


def _stored_dtypes(job: Job, written: Written) -> dict[str, str]:
    """safetensors' names of the types of a layer's tensors, by their names within it: backends differ in what they
    keep scales in, and none does so between layers."""
    name, scheme = next(iter(job.schemes.items()))
    packed = job.format.pack(name, written.layer(name, job.shape(name), scheme))
    names = {value: key for key, value in DTYPES.items()}
    return {full.removeprefix(f"{name}."): names[str(tensor.dtype).removeprefix("torch.")] for full, tensor in packed}


def _layers(job: Job, written: Written) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
    method = job.options.choice.method
    for name, scheme in job.schemes.items():
        quantized = written.layer(name, job.shape(name), scheme)
        weight = load_weight(job.source, name).cpu()  # where what the backend wrote has been read to
        plain, whole = rtn.quantize_weight(weight, scheme), energy(weight, None) or 1.0
        error, rtn_error = (
            math.nan if method == AWQ else energy(each.dequantize().sub_(weight), None) / whole
            for each in (quantized, plain)
        )
        yield quantized, LayerReport(name, method, str(scheme), error, rtn_error)
