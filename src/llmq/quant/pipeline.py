"""Quantize a model folder, decoder block by decoder block, into a folder of packed codes.

At any moment the memory holds one block and the calibration windows' hidden states at its entrance, never the model.
A block is quantized in two steps. Some methods first scale its channels, so that less is lost (``fold``), which
leaves what it computes as it is. Then its linears are rounded in the order in which they compute: each sees its inputs
as those before it will really produce them, quantized (true-sequential). Methods without data stream tensor by tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from llmq.checkpoint import folder as folders
from llmq.checkpoint.config import LinearStage, read_config
from llmq.checkpoint.formats import FORMATS, WRITER, Format, format_for, kept_layers, packed_bytes, write_configs
from llmq.checkpoint.formats.compressed_tensors import CompressedTensors
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import ShardWriter, Tensors
from llmq.errors import USAGE, LlmqError
from llmq.quant.activations import HiddenStates, NotFinite, moments_at_once
from llmq.quant.affine import MAX_E4M3, MAX_WEIGHT, energy, group_blocks
from llmq.quant.backends import Backend, preferences
from llmq.quant.backends.environment import python_of
from llmq.quant.backends.run import run_backend
from llmq.quant.calibration import draw_windows
from llmq.quant.check import check_generates
from llmq.quant.folding import linear, round_inputs
from llmq.quant.methods import autoround, awq, bnb, gptq, rtn, smoothquant
from llmq.quant.model_card import model_card
from llmq.quant.options import DEFAULTS, DYNAMIC, Calibration, QuantizeOptions, Rule
from llmq.quant.plot import write_plot
from llmq.quant.recipe import RECIPE, recipe_text
from llmq.quant.report import LayerReport, QuantizationReport, write_report
from llmq.quant.schemes import AUTOROUND, AWQ, BNB, GPTQ, RTN, SMOOTHQUANT, choose
from llmq.runtime.decoder import DecoderLayer
from llmq.runtime.device import peak_memory_bytes, peak_memory_of_children, resolve_device, resolve_dtype
from llmq.runtime.loader import HEAD, Source, block_name, load_layer
from llmq.scheme import GROUP_SIZES, WHOLE_ROW, Scheme

Progress = Callable[[int, int, str], None]
"""Called with (layers done, layers in all, name of the layer just done), and with what is going on before the first."""


def quantize(
    model: str,
    output: str | Path,
    *,
    scheme: Scheme | str | None = None,
    method: str | None = None,
    format: str | None = None,
    calibration: Calibration = DEFAULTS.calibration,
    overrides: Mapping[str, Scheme | None] | None = None,
    ignore: Sequence[str] = (),
    clip: bool = DEFAULTS.clip,
    act_order: str = DEFAULTS.act_order,
    alpha: float | str | None = DEFAULTS.alpha,
    kv_cache: str | None = DEFAULTS.kv_cache,
    device: str = DEFAULTS.device,
    backend: str = DEFAULTS.backend,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Write ``model`` (a folder, a hub id, or ``demo``), quantized, to the folder ``output``.

    What may be chosen: ``QuantizeOptions``; ``overrides`` are its rules, by their patterns, and ``ignore`` patterns of
    layers that stay as they are, whatever the rules. The folder gets its name once it is complete and has been loaded
    and generated from. Raises LlmqError for whatever the user can mend, most of it before any work is done; ``output``
    is then as it was.
    """
    output = Path(output)
    rules = [*(overrides or {}).items(), *((pattern, None) for pattern in ignore)]
    options = QuantizeOptions(
        choose(*preferences(backend, scheme, method, format)),
        calibration.of(model),
        tuple(Rule(pattern, exception) for pattern, exception in rules),
        clip,
        act_order,
        alpha,
        kv_cache,
        device,
        backend,
    )
    folders.check_output(output, overwrite=overwrite)
    tell = progress or _silent
    job = _prepare(model, folders.resolve(model, revision), options, lambda stage: tell(0, 1, stage))
    folders.check_disk_space(output, job.predicted_bytes)
    try:
        return _run(job, output, overwrite=overwrite, progress=progress)
    except NotFinite:
        if job.source.dtype == torch.float32:
            raise
    note = f"activations are not finite in {job.source.dtype}: calibrated in fp32".replace("torch.", "")
    wide = replace(job, source=replace(job.source, dtype=torch.float32), notes=(*job.notes, note))
    return _run(wide, output, overwrite=overwrite, progress=progress)


def _silent(done: int, total: int, what: str) -> None:
    """Nobody asked."""


def _run(job: Job, output: Path, *, overwrite: bool, progress: Progress | None) -> QuantizationReport:
    started = time.monotonic()
    format = job.format
    layers: list[LayerReport] = []
    changed: dict[str, Tensor] = {}
    with folders.write_folder(output, overwrite=overwrite) as partial, torch.no_grad(), _full_fp32():
        writer = ShardWriter(partial)
        tell = progress or _silent
        backend = job.options.third_party
        if backend is None:
            made = job.quantized_layers(changed)
        else:
            made = job.layers_by(backend, changed, partial, lambda stage: tell(0, len(job.schemes), stage))
        for weight, layer in made:
            writer.add_all(format.pack(layer.name, weight))
            layers.append(layer)
            tell(len(layers), len(job.schemes), layer.name)
        for name in job.kept_tensors:
            tensor = job.source.tensors.load(name)
            writer.add(name, changed.pop(name).to(tensor.dtype) if name in changed else tensor)
        writer.add_all(changed.items())
        writer.close()
        folders.copy_side_files(job.folder, partial)
        quantization = format.config_dict(
            quantized=list(job.schemes),
            ignored=job.left_out,
            writer=WRITER,
            damp_percent=gptq.DAMP_PERCENT if job.options.choice.method == GPTQ else None,
            act_order=job.options.act_order == DYNAMIC,
        )
        write_configs(job.folder, partial, format, quantization)
        check_generates(partial, job.source.device, job.source.dtype)
        report = _report(job, output, layers, writer.num_bytes, time.monotonic() - started)
        card = model_card(report, job.options, job.folder / "README.md", from_hub=_is_hub_id(job.model), writer=WRITER)
        (partial / "README.md").write_text(card, encoding="utf-8")
        write_report(partial, report)
        write_plot(partial, report)
        (partial / RECIPE).write_text(recipe_text(job.options), encoding="utf-8")
    return report


@dataclass(frozen=True, slots=True)
class Job:
    """A quantization that has passed its checks.

    model     as it was asked for
    schemes   of the layers to quantize, in order
    left_out  the other matrices of the decoder blocks, routers among them
    notes     what the user should know of the choice of layers
    windows   token ids [windows, tokens], for a method that learns from data
    """

    model: str
    folder: Path
    options: QuantizeOptions
    source: Source
    schemes: dict[str, Scheme]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    windows: Tensor | None

    @property
    def format(self) -> Format:
        format = format_for(self.options.choice.format, self.schemes)
        if self.options.kv_cache is not None and isinstance(format, CompressedTensors):
            return replace(format, kv_scales=True)
        return format

    @property
    def kept_tensors(self) -> list[str]:
        """Every tensor of the source folder that no packed one replaces."""
        return [name for name in self.source.tensors.infos if name.removesuffix(".weight") not in self.schemes]

    @property
    def packed_bytes(self) -> int:
        format = self.format
        return sum(
            packed_bytes(format, _shape(name, self.source.tensors), scheme) for name, scheme in self.schemes.items()
        )

    @property
    def predicted_bytes(self) -> int:
        """Of all tensors that will be written."""
        infos = self.source.tensors.infos
        return self.packed_bytes + sum(infos[name].num_bytes for name in self.kept_tensors)

    def quantized_layers(self, changed: dict[str, Tensor]) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
        """Do the work, layer by layer. Tensors beside the layers that are new, or not as they were, come into
        ``changed``."""
        if self.windows is None:
            for name in self.schemes:
                yield from self._round({name: self._weight(name)}, None)
            return
        config = self.source.config
        states = HiddenStates(self.source, self.windows)
        # As they pass the model that is quantized: what learned rounding brings the others back to.
        original = states.sample(states.tokens) if self.options.choice.method == AUTOROUND else None
        for number in range(config.num_layers):
            prefix, block = block_name(number), load_layer(self.source, number)
            for name in self._local(prefix):
                _check_weight(f"{prefix}.{name}", linear(block, name).weight)
            if original is not None:
                original.mix(block)
                original.finish(block)
            for name, tensor in self._fold(prefix, block, states).items():
                changed[f"{prefix}.{name}"] = tensor
            learned: Mapping[str, QuantizedWeight] = {}
            if original is not None:
                seed = self.options.calibration.seed
                learned = autoround.quantize_block(block, self._local(prefix), states, original.inputs, seed=seed)
            for stage in config.linear_stages:
                if stage.half == "finish" and not states.mixed:
                    if self.options.kv_cache is not None:
                        for letter, largest in zip("kv", states.kv_ranges(block), strict=True):
                            changed[f"{prefix}.self_attn.{letter}_scale"] = _e4m3_scale(largest)
                    states.mix(block)
                yield from self._quantize_stage(prefix, block, stage, states, learned)
            if number + 1 < config.num_layers or HEAD in self.schemes:
                states.finish(block)
        if HEAD in self.schemes:
            yield from self._round({HEAD: self._weight(HEAD)}, states.head_moment(self.source))

    def _weight(self, name: str) -> Tensor:
        weight = self.source.tensors.load(f"{name}.weight", self.source.device).float()
        _check_weight(name, weight)
        return weight

    def layers_by(
        self, backend: Backend, changed: dict[str, Tensor], folder: Path, on_stage: Callable[[str], None]
    ) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
        """Have ``backend`` do the work, in a folder within ``folder``. What it hands back stands for itself: of layers
        that it has scaled as well as rounded, nothing says how much of the difference is which."""
        options, windows = self.options, self.windows
        assert windows is not None
        with TemporaryDirectory(dir=folder, prefix=".backend-") as scratch:
            written = run_backend(
                backend, self.folder, options.choice, windows, self.source.device, Path(scratch), on_stage
            )
            if options.choice.method == AWQ:
                changed |= {name: written.tensors.load(name) for name in self.kept_tensors if name in written.tensors}
            for name, scheme in self.schemes.items():
                quantized = written.layer(name, _shape(name, self.source.tensors), scheme)
                weight = self._weight(name).cpu()  # where what the backend wrote has been read to
                plain, whole = rtn.quantize_weight(weight, scheme), energy(weight, None) or 1.0
                error, rtn_error = (
                    nan if options.choice.method == AWQ else energy(each.dequantize().sub_(weight), None) / whole
                    for each in (quantized, plain)
                )
                yield quantized, LayerReport(name, options.choice.method, str(scheme), error, rtn_error)

    def _local(self, prefix: str) -> dict[str, Scheme]:
        """The schemes of the layers of a block that are to be quantized, by their names within it."""
        names = {name: f"{prefix}.{name}" for name in self.source.config.linears}
        return {name: self.schemes[full] for name, full in names.items() if full in self.schemes}

    def _fold(self, prefix: str, block: DecoderLayer, states: HiddenStates) -> dict[str, Tensor]:
        """Scale channels of ``block`` as the method does. Returns what changed beside the linears to be quantized."""
        config, method, alpha = self.source.config, self.options.choice.method, self.options.alpha
        schemes = self._local(prefix)
        if method in (AWQ, AUTOROUND):  # without, learned rounding would not reach the channels of outliers
            return awq.fold(block, config, states, schemes)
        if method == SMOOTHQUANT:
            alpha = smoothquant.default_alpha(config.model_type) if alpha is None else alpha
            return smoothquant.fold(block, config, states, schemes, alpha)
        return {}

    def _quantize_stage(
        self,
        prefix: str,
        block: DecoderLayer,
        stage: LinearStage,
        states: HiddenStates,
        learned: Mapping[str, QuantizedWeight],
    ) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
        """Quantize those layers of ``stage`` that are to be, in ``block`` too: what follows sees what was lost."""
        wanted = [[name for name in group if f"{prefix}.{name}" in self.schemes] for group in stage.groups]
        groups = [group for group in wanted if group]
        hessians: dict[str, Tensor] = {}
        for number, group in enumerate(groups):
            together = moments_at_once(linear(block, group[0]).in_features)
            if number % together == 0:
                hessians.clear()
                some = [group[0] for group in groups[number : number + together]]
                hessians = states.second_moments(block, some, prefix)
            modules = {f"{prefix}.{name}": linear(block, name) for name in group}
            weights = {name: module.weight.float() for name, module in modules.items()}
            made = {f"{prefix}.{name}": learned[name] for name in group if name in learned}
            for quantized, report in self._round(weights, hessians.pop(group[0], None), made):
                module = modules[report.name]
                module.weight.copy_(quantized.dequantize())
                if quantized.scheme.activation_bits == 8:
                    round_inputs(module, quantized.scheme.number)
                yield quantized, report

    def _round(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, made: Mapping[str, QuantizedWeight] | None = None
    ) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
        """Round ``weights``, fp32 by the names of their layers, whose inputs are the same; or take what is ``made``."""
        method, made = self.options.choice.method, made or self._made(weights, hessian)
        for name, weight in weights.items():
            plain = made[name] if method == BNB else rtn.quantize_weight(weight, self.schemes[name])
            used, quantized = (method, made[name]) if name in made else (RTN, plain)
            error, rtn_error = (energy(rounded.dequantize().sub_(weight), hessian) for rounded in (quantized, plain))
            if used == GPTQ and error > rtn_error:
                used, quantized, error = RTN, plain, rtn_error
            whole = energy(weight, hessian) or 1.0
            yield quantized, LayerReport(name, used, str(quantized.scheme), error / whole, rtn_error / whole)

    def _made(self, weights: Mapping[str, Tensor], hessian: Tensor | None) -> dict[str, QuantizedWeight]:
        """What the method's rounding makes of ``weights``; nothing where it has to give up."""
        method, schemes = self.options.choice.method, self.schemes
        if method == GPTQ:
            return {} if hessian is None else self._made_by_gptq(weights, hessian)
        if method == BNB:
            return {name: bnb.quantize_weight(weight, schemes[name]) for name, weight in weights.items()}
        return {
            name: rtn.quantize_weight(weight, schemes[name], self._clipping(name, weight, hessian))
            for name, weight in weights.items()
        }

    def _made_by_gptq(self, weights: Mapping[str, Tensor], hessian: Tensor) -> dict[str, QuantizedWeight]:
        together: dict[Scheme, list[str]] = {}
        for name in weights:
            together.setdefault(self.schemes[name], []).append(name)
        made: dict[str, QuantizedWeight] = {}
        with suppress(gptq.NotPositiveDefinite):
            for scheme, names in together.items():
                layers = [weights[name] for name in names]
                made |= zip(names, gptq.quantize_weights(layers, scheme, hessian, self.options.act_order), strict=True)
        return made

    def _clipping(self, name: str, weight: Tensor, hessian: Tensor | None) -> Tensor | None:
        """By what clipping is judged; None: there is none."""
        if self.options.clip:
            return weight.new_ones(weight.shape[1])
        if self.options.choice.method == AWQ and hessian is not None and not name.endswith(awq.UNCLIPPED):
            return group_blocks(hessian, self.schemes[name])
        return None


def _e4m3_scale(largest: Tensor) -> Tensor:
    """fp32 [1], by which numbers up to ``largest`` fill the range of e4m3."""
    return (largest / MAX_E4M3).clamp(min=torch.finfo(torch.float32).tiny).view(1)


# Checks


def _prepare(model: str, folder: Path, options: QuantizeOptions, on_stage: Callable[[str], None]) -> Job:
    """Everything that can be found out before the first layer is quantized. Raises LlmqError for what is wrong."""
    config, tensors, device = read_config(folder), Tensors(folder), resolve_device(options.device)
    if config.quantization is not None:
        raise LlmqError(
            f"{model} is quantized already",
            "quantize the model that it was made from; to change only its format: llmq convert",
        )
    if options.choice.method == BNB:
        bnb.check_installed()
    notes: list[str] = []
    backend = options.third_party
    if backend is not None:
        python_of(backend)
        if device.partition(":")[0] not in backend.devices:
            device = backend.devices[0]
            notes.append(f"{backend.name} runs on {device} only, with the versions that llmq installs it in")
    every = [f"{block_name(layer)}.{linear}" for layer in range(config.num_layers) for linear in config.linears]
    wanted = _wanted(every, options)
    if HEAD in wanted and config.tied_embeddings:
        raise LlmqError(
            f"{HEAD} is the embedding of {model}, which stays as it is", f"leave it out: --override {HEAD}=none"
        )
    misfits = {name: reason for name, scheme in wanted.items() if (reason := _misfit(name, scheme, tensors, options))}
    fitting = {name: wanted[name] for name in wanted if name not in misfits}
    if wanted and not fitting:
        name, reason = next(iter(misfits.items()))
        raise LlmqError(f"no layer can be quantized: {name} {reason}", _fitting_groups(misfits, tensors))
    if not fitting:
        raise LlmqError("every linear layer is ignored: nothing is left to quantize", "ignore fewer by --ignore")
    format_for(options.choice.format, fitting)
    windows = draw_windows(folder, config, options.calibration, device, on_stage) if options.calibrated else None
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    return Job(
        model,
        folder,
        options,
        Source(config, None, tensors, device, resolve_dtype("auto", config, device)),
        fitting,
        tuple(kept_layers(tensors, fitting)),
        (*notes, *_misfit_notes(misfits)),
        windows,
    )


def _wanted(names: Sequence[str], options: QuantizeOptions) -> dict[str, Scheme]:
    """The schemes of those of ``names``, and of the head, that are to be quantized. LlmqError for a rule that covers
    nothing."""
    schemes: dict[str, Scheme | None] = dict.fromkeys(names, options.choice.scheme) | {HEAD: None}
    for rule in options.rules:
        covered = [name for name in schemes if rule.covers(name)]
        if not covered:
            raise LlmqError(
                f"{rule.pattern} matches no layer",
                f"give a layer's name or a part of it between dots, such as {names[0]} or down_proj, or re:REGEX",
                exit_code=USAGE,
            )
        schemes |= dict.fromkeys(covered, rule.scheme)
    return {name: scheme for name, scheme in schemes.items() if scheme is not None}


def _shape(name: str, tensors: Tensors) -> tuple[int, int]:
    """(out_features, in_features) of a layer. LlmqError when the folder does not have it."""
    info = tensors.infos.get(f"{name}.weight")
    if info is None or len(info.shape) != 2:
        raise LlmqError(
            f"{tensors.folder} has no matrix {name}.weight", "the folder is incomplete, or its config.json is another's"
        )
    return info.shape[0], info.shape[1]


def _misfit(name: str, scheme: Scheme, tensors: Tensors, options: QuantizeOptions) -> str | None:
    """Why a layer has to stay as it is: scheme or format cannot hold its shape. None when they can."""
    out_features, in_features = shape = _shape(name, tensors)
    if not scheme.divides(in_features):
        return f"has {in_features} inputs, which groups of {scheme.group_size} do not divide"
    multiple = FORMATS[options.choice.format].multiple
    if any(size % multiple for size in shape):
        return f"is {out_features} × {in_features}, and the format packs multiples of {multiple}"
    return None


def _misfit_notes(misfits: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each reason, with the layers that it is of."""
    for reason in dict.fromkeys(misfits.values()):
        names = [name for name in misfits if misfits[name] == reason]
        yield f"{len(names)} layers keep 16 bits: each {reason}: {', '.join(names)}"


def _fitting_groups(names: Iterable[str], tensors: Tensors) -> str:
    """The hint that says in what groups, or formats, the layers would fit."""
    inputs = [_shape(name, tensors)[1] for name in names]
    sizes = [size for size in GROUP_SIZES if size > 0 and not any(count % size for count in inputs)]
    return f"choose --group-size {', '.join(map(str, (*sizes, WHOLE_ROW)))}, or --format compressed-tensors"


def _check_weight(name: str, weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise LlmqError(f"{name}.weight holds NaN or infinite numbers", "download or copy the model again")
    if weight.abs().max() > MAX_WEIGHT:
        raise LlmqError(
            f"{name}.weight holds {weight.abs().max():.3g}, more than fp16 can: its scales would overflow",
            f"--ignore {name}",
        )


def _is_hub_id(model: str) -> bool:
    return model != folders.DEMO and not Path(model).expanduser().is_dir()


def _public_name(model: str) -> str:
    """The model's name without the paths of this machine."""
    return model if model == folders.DEMO or _is_hub_id(model) else Path(model).expanduser().resolve().name


# Writing


def _report(
    job: Job, output: Path, layers: Sequence[LayerReport], num_bytes: int, seconds: float
) -> QuantizationReport:
    choice, windows, tensors = job.options.choice, job.windows, job.source.tensors
    native = job.options.third_party is None
    outputs = native and windows is not None
    weights = sum(out_features * in_features for out_features, in_features in (_shape(x, tensors) for x in job.schemes))
    return QuantizationReport(
        model=_public_name(job.model),
        output=str(output),
        method=choice.method,
        backend=job.options.backend,
        format=choice.format,
        scheme=str(choice.scheme),
        device=job.source.device,
        calibration_samples=0 if windows is None else windows.shape[0],
        calibration_seqlen=0 if windows is None else windows.shape[1],
        layers=tuple(layers),
        error_of="layers' outputs on the calibration text" if outputs else "weights",
        left_out=job.left_out,
        bytes_before=tensors.num_bytes,
        bytes_after=num_bytes,
        effective_bits=8 * job.packed_bytes / weights,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(job.source.device) if native else peak_memory_of_children(),
        warnings=tuple(_warnings(job, layers)),
    )


def _warnings(job: Job, layers: Sequence[LayerReport]) -> Iterator[str]:
    yield from job.notes
    if job.format.caveat is not None:
        yield job.format.caveat
    wanted = job.options.calibration.samples
    if job.windows is not None and len(job.windows) < wanted:
        yield f"the calibration text has {len(job.windows)} windows, and {wanted} were asked for"
    fallen = [layer.name for layer in layers if layer.method != job.options.choice.method]
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
