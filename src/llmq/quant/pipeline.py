"""Quantize a model folder, decoder block by decoder block, into a folder of packed integers.

At any moment the memory holds one block and the calibration windows' hidden states at its entrance, never the model.
GPTQ sees each layer's inputs as the layers before it will really produce them: quantized (true-sequential). RTN needs
no inputs and streams tensor by tensor.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmq.checkpoint import folder as folders
from llmq.checkpoint.config import read_config
from llmq.checkpoint.formats import WRITER, Format, check_shape, format_for, packed_bytes, write_configs
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import ShardWriter, Tensors
from llmq.errors import USAGE, LlmqError
from llmq.quant.activations import HiddenStates
from llmq.quant.affine import MAX_WEIGHT
from llmq.quant.calibration import draw_windows
from llmq.quant.check import check_generates
from llmq.quant.methods import gptq, rtn
from llmq.quant.options import DEFAULTS, GPTQ, RTN, Calibration, QuantizeOptions
from llmq.quant.report import LayerReport, QuantizationReport, model_card
from llmq.runtime.decoder import DecoderLayer
from llmq.runtime.device import peak_memory_bytes, resolve_device, resolve_dtype
from llmq.runtime.loader import HEAD, Source, block_name, load_layer
from llmq.scheme import GROUP_SIZES, Scheme

Progress = Callable[[int, int, str], None]
"""Called with (layers done, layers in all, name of the layer just done)."""


def quantize(
    model: str,
    output: str | Path,
    *,
    method: str = DEFAULTS.method,
    scheme: Scheme = DEFAULTS.scheme,
    calibration: Calibration | None = None,
    format: str = DEFAULTS.format,
    ignore: Sequence[str] = DEFAULTS.ignore,
    device: str = DEFAULTS.device,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Write ``model`` (a folder, a hub id, or ``demo``), quantized, to the folder ``output``.

    The folder gets its name once it is complete and has been loaded and generated from. Raises LlmqError for whatever
    the user can mend, most of it before any work is done; ``output`` is then as it was.
    """
    started = time.monotonic()
    output = Path(output)
    options = QuantizeOptions(method, scheme, calibration or DEFAULTS.calibration, format, tuple(ignore), device)
    folders.check_output(output, overwrite=overwrite)
    job = _prepare(model, folders.resolve(model, revision), options)
    folders.check_disk_space(output, job.predicted_bytes)
    layers: list[LayerReport] = []
    with folders.write_folder(output, overwrite=overwrite) as partial, torch.inference_mode(), _full_fp32():
        writer = ShardWriter(partial)
        for weight, layer in job.quantized_layers():
            writer.add_all(job.format.pack(layer.name, weight))
            layers.append(layer)
            if progress is not None:
                progress(len(layers), len(job.shapes), layer.name)
        for name in job.kept_tensors:
            writer.add(name, job.source.tensors.load(name))
        writer.close()
        folders.copy_side_files(job.folder, partial)
        quantization = job.format.config_dict(
            quantized=list(job.shapes),
            ignored=job.ignored,
            writer=WRITER,
            damp_percent=gptq.DAMP_PERCENT if method == GPTQ else None,
        )
        write_configs(job.folder, partial, job.format, quantization)
        check_generates(partial, job.source.device, job.source.dtype)
        report = _report(job, output, layers, writer.num_bytes, time.monotonic() - started)
        card = model_card(report, options, job.folder / "README.md", from_hub=_is_hub_id(model), writer=WRITER)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return report


@dataclass(frozen=True, slots=True)
class Job:
    """A quantization that has passed its checks.

    name     of the model, as others may read it: a hub id, or the last part of a path
    shapes   the layers to quantize, in order → (out_features, in_features)
    ignored  the layers of the decoder blocks that stay as they are
    windows  token ids [windows, tokens], for a method that learns from data
    """

    name: str
    folder: Path
    options: QuantizeOptions
    source: Source
    shapes: dict[str, tuple[int, int]]
    ignored: tuple[str, ...]
    windows: Tensor | None

    @property
    def format(self) -> Format:
        return format_for(self.options.format, self.options.scheme)

    @property
    def kept_tensors(self) -> list[str]:
        """Every tensor of the source folder that no packed one replaces."""
        return [name for name in self.source.tensors.infos if name.removesuffix(".weight") not in self.shapes]

    @property
    def packed_bytes(self) -> int:
        return sum(packed_bytes(self.format, shape, self.options.scheme) for shape in self.shapes.values())

    @property
    def predicted_bytes(self) -> int:
        """Of all tensors that will be written."""
        infos = self.source.tensors.infos
        return self.packed_bytes + sum(infos[name].num_bytes for name in self.kept_tensors)

    def quantized_layers(self) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
        """Do the work, layer by layer."""
        if self.windows is None:
            for name in self.shapes:
                weight = self.source.tensors.load(f"{name}.weight", self.source.device).float()
                yield self._quantize(name, weight, None)
            return
        states = HiddenStates(self.source, self.windows)
        for number in range(self.source.config.num_layers):
            block = load_layer(self.source, number)
            for stage in self.source.config.linear_stages:
                if stage.half == "finish" and not states.mixed:
                    states.mix(block)
                for group in stage.groups:
                    yield from self._quantize_group(block_name(number), block, group, states)
            if number + 1 < self.source.config.num_layers:
                states.finish(block)

    def _quantize_group(
        self, prefix: str, block: DecoderLayer, group: Sequence[str], states: HiddenStates
    ) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
        """Quantize those layers of ``group`` that are to be, in ``block`` too: what follows sees what was lost."""
        linears = [linear for linear in group if f"{prefix}.{linear}" in self.shapes]
        hessian = states.second_moment(block, linears[0], f"{prefix}.{linears[0]}") if linears else None
        for linear in linears:
            name = f"{prefix}.{linear}"
            module = block.get_submodule(linear)
            assert isinstance(module, nn.Linear)
            quantized, report = self._quantize(name, module.weight.float(), hessian)
            module.weight.copy_(quantized.dequantize())
            yield quantized, report

    def _quantize(self, name: str, weight: Tensor, hessian: Tensor | None) -> tuple[QuantizedWeight, LayerReport]:
        if not weight.isfinite().all():
            raise LlmqError(f"{name}.weight holds NaN or infinite numbers", "download or copy the model again")
        if weight.abs().max() > MAX_WEIGHT:
            raise LlmqError(
                f"{name}.weight holds {weight.abs().max():.3g}, more than fp16 can: its scales would overflow",
                f"--ignore {name}",
            )
        scheme, used = self.options.scheme, RTN
        quantized = rtn.quantize_weight(weight, scheme)
        error = rtn_error = relative_error(weight, quantized, hessian)
        if hessian is not None:
            try:
                candidate = gptq.quantize_weight(weight, scheme, hessian)
            except gptq.NotPositiveDefinite:
                pass
            else:
                gptq_error = relative_error(weight, candidate, hessian)
                if gptq_error <= rtn_error:
                    quantized, error, used = candidate, gptq_error, GPTQ
        return quantized, LayerReport(name, used, scheme.bits, scheme.group_size, error, rtn_error)


def relative_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor | None) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ) for the rounding error E of ``weight`` W; without a Hessian H, ‖E‖² / ‖W‖²."""
    error = quantized.dequantize() - weight

    def energy(matrix: Tensor) -> float:
        return float(((matrix if hessian is None else matrix @ hessian) * matrix).sum())

    whole = energy(weight)
    return energy(error) / whole if whole > 0 else 0.0


# Checks


def _prepare(model: str, folder: Path, options: QuantizeOptions) -> Job:
    """Everything that can be found out before the first layer is quantized. Raises LlmqError for what is wrong."""
    config, tensors, device = read_config(folder), Tensors(folder), resolve_device(options.device)
    if config.quantization is not None:
        raise LlmqError(
            f"{model} is quantized already",
            "quantize the model that it was made from; to change only its format: llmq convert",
        )
    every = [f"{block_name(layer)}.{linear}" for layer in range(config.num_layers) for linear in config.linears]
    ignored = _ignored(every, options.ignore)
    shapes: dict[str, tuple[int, int]] = {}
    for name in every:
        if name not in ignored:
            shapes[name] = _checked_shape(name, tensors, options)
    if not shapes:
        raise LlmqError("every linear layer is ignored: nothing is left to quantize", "ignore fewer by --ignore")
    windows = draw_windows(folder, config, options.calibration) if options.method == GPTQ else None
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    return Job(
        _public_name(model),
        folder,
        options,
        Source(config, None, tensors, device, resolve_dtype("auto", config, device)),
        shapes,
        tuple(name for name in every if name in ignored),
        windows,
    )


def _ignored(names: Sequence[str], patterns: Iterable[str]) -> set[str]:
    """The ``names`` that ``patterns`` cover. LlmqError for a pattern that covers none."""
    ignored: set[str] = set()
    for pattern in patterns:
        matching = {name for name in (*names, HEAD) if _matches(pattern, name)}
        if not matching:
            raise LlmqError(
                f"--ignore {pattern} matches no layer",
                f"give a layer's name or a part of it between dots, such as {names[0]} or down_proj, or re:REGEX",
                exit_code=USAGE,
            )
        ignored |= matching
    return ignored


def _matches(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return f".{pattern}." in f".{name}."
    try:
        return re.match(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise LlmqError(
            f"--ignore {pattern} is not a regular expression: {error}", "see Python's re", exit_code=USAGE
        ) from None


def _checked_shape(name: str, tensors: Tensors, options: QuantizeOptions) -> tuple[int, int]:
    """(out_features, in_features) of a layer, which scheme and format must be able to hold."""
    scheme, leave_out = options.scheme, f"--ignore {name.rpartition('.')[2]}"
    info = tensors.infos.get(f"{name}.weight")
    if info is None or len(info.shape) != 2:
        raise LlmqError(
            f"{tensors.folder} has no matrix {name}.weight", "the folder is incomplete, or its config.json is another's"
        )
    out_features, in_features = info.shape
    if not scheme.divides(in_features):
        fitting = ", ".join(
            str(size) for size in GROUP_SIZES if size and Scheme(scheme.bits, size).divides(in_features)
        )
        raise LlmqError(
            f"groups of {scheme.group_size} do not divide the {in_features} inputs of {name}",
            f"--group-size {fitting} would, or leave such layers out: {leave_out}",
        )
    check_shape(
        format_for(options.format, scheme),
        name,
        (out_features, in_features),
        f"leave such layers out: {leave_out}, or choose --format compressed-tensors",
    )
    return out_features, in_features


def _is_hub_id(model: str) -> bool:
    return model != folders.DEMO and not Path(model).expanduser().is_dir()


def _public_name(model: str) -> str:
    """The model's name without the paths of this machine."""
    return model if model == folders.DEMO or _is_hub_id(model) else Path(model).expanduser().resolve().name


# Writing


def _report(
    job: Job, output: Path, layers: Sequence[LayerReport], num_bytes: int, seconds: float
) -> QuantizationReport:
    options, windows = job.options, job.windows
    weights = sum(out_features * in_features for out_features, in_features in job.shapes.values())
    return QuantizationReport(
        model=job.name,
        output=str(output),
        method=options.method,
        format=options.format,
        bits=options.scheme.bits,
        group_size=options.scheme.group_size,
        symmetric=options.scheme.symmetric,
        device=job.source.device,
        calibration_samples=0 if windows is None else windows.shape[0],
        calibration_seqlen=0 if windows is None else windows.shape[1],
        layers=tuple(layers),
        bytes_before=job.source.tensors.num_bytes,
        bytes_after=num_bytes,
        effective_bits=8 * job.packed_bytes / weights,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(job.source.device),
        warnings=tuple(_warnings(job, layers)),
    )


def _warnings(job: Job, layers: Sequence[LayerReport]) -> Iterator[str]:
    if job.format.caveat is not None:
        yield job.format.caveat
    wanted = job.options.calibration.samples
    if job.windows is not None and len(job.windows) < wanted:
        yield f"the calibration text has {len(job.windows)} windows, and {wanted} were asked for"
    fallen = [layer.name for layer in layers if layer.method != job.options.method]
    if fallen:
        yield f"{len(fallen)} layers were rounded to nearest, where GPTQ did no better: {', '.join(fallen)}"


@contextmanager
def _full_fp32() -> Iterator[None]:
    """fp32 products in fp32: TF32's ten bits of mantissa would drown what GPTQ compensates."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
