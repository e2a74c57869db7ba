"""Quantize a model folder, part by part, into a folder of packed codes.

A part is a decoder block; the last is what is in none. At any moment the memory holds one block and the calibration
windows' hidden states at its entrance, never the model. Methods without data stream tensor by tensor. A part that is
done is on the disk, and a run that is stopped can go on behind it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint import folder as folders
from llmq.checkpoint.config import HEAD
from llmq.checkpoint.formats import WRITER, write_configs
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.shards import Shards, lay_out
from llmq.checkpoint.tensors import Tensors
from llmq.errors import LlmqError
from llmq.quant.activations import NotFinite
from llmq.quant.backends import preferences
from llmq.quant.blocks import Walk
from llmq.quant.calibration import draw_windows
from llmq.quant.check import check_runs
from llmq.quant.job import REST, Job
from llmq.quant.journal import Journal
from llmq.quant.model_card import model_card
from llmq.quant.needs import Needs, needs_of
from llmq.quant.options import DEFAULTS, Calibration, QuantizeOptions, Rule
from llmq.quant.plot import write_plot
from llmq.quant.prepare import prepare
from llmq.quant.recipe import RECIPE, recipe_text
from llmq.quant.report import LayerReport, QuantizationReport, write_report
from llmq.quant.rounding import load_weight, round_layers
from llmq.quant.schemes import choose
from llmq.quant.third_party import quantize_by
from llmq.runtime.device import free_memory, peak_memory_bytes, peak_memory_of_children
from llmq.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Step:
    """How far a run is.

    parts   done, of ``of_parts``; a decoder block each, and the rest
    layers  done, of ``of_layers``
    what    the name of the layer just done, or what else there is to say
    layer   the report of that layer
    """

    parts: int
    of_parts: int
    layers: int
    of_layers: int
    what: str
    layer: LayerReport | None = None


Progress = Callable[[Step], None]
"""Called whenever a layer or a part is done, and with what is going on where that takes long."""


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
    max_memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_needs: Callable[[Needs], None] | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Write ``model`` (a folder, a hub id, or ``demo``), quantized, to the folder ``output``.

    What may be chosen: ``QuantizeOptions``; ``overrides`` are its rules, by their patterns, and ``ignore`` patterns of
    layers that stay as they are, whatever the rules. The folder gets its name once it is complete, and has been loaded
    and run.

    max_memory  bytes of main memory that the run may have; None: what is available
    resume      go on with a run that was stopped, if there is one; what comes out has the same bytes as if it had not
    on_needs    called with what the run will take, before it starts

    Raises LlmqError for whatever the user can mend, most of it before any work is done; ``output`` is then as it was.
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
    tell = progress or (lambda step: None)
    folder = folders.resolve(model, revision)
    folders.check_keeps(folder, output)
    job = prepare(model, folder, options)
    needs = needs_of(job, output, max_memory)
    if on_needs is not None:
        on_needs(needs)
    needs.check()
    job = replace(job, batch_tokens=needs.batch_tokens, devices=needs.devices)
    spill = output.resolve().parent if needs.spills else None
    try:
        with folders.write_folder(output, overwrite=overwrite, resume=resume) as partial:
            job = replace(job, windows=_windows(job, tell))
            if job.source.device != "cpu":
                torch.cuda.reset_peak_memory_stats(job.source.device)  # not of the model that wrote its own text
            journal = Journal(folders.journal_of(output), job.settings, job.dtype)
            try:
                return _run_at_any_width(job, output, partial, journal, spill, tell)
            except LlmqError:
                journal.forget()  # whoever goes on with the same settings ends here again
                raise
    except OSError as error:
        raise LlmqError(
            f"{error.filename or output}: {error.strerror}",
            "what is done is kept: once there is room, go on by --resume",
        ) from error


def _windows(job: Job, tell: Progress) -> Tensor | None:
    options, source = job.options, job.source
    if not options.calibrated:
        return None
    return draw_windows(
        job.folder, source.config, options.calibration, source.device, lambda stage: tell(Step(0, 1, 0, 1, stage))
    )


def _run_at_any_width(
    job: Job, output: Path, partial: Path, journal: Journal, spill: Path | None, tell: Progress
) -> QuantizationReport:
    """In the type that the job says, or in fp32 where activations, now or before, turned out not to fit."""
    if job.dtype == journal.dtype:
        try:
            return _run(job, output, partial, journal, spill, tell)
        except NotFinite:
            if job.source.dtype == torch.float32:
                raise
            journal.forget()
    job = job.in_fp32()
    journal.dtype = job.dtype
    return _run(job, output, partial, journal, spill, tell)


def _run(
    job: Job, output: Path, partial: Path, journal: Journal, spill: Path | None, tell: Progress
) -> QuantizationReport:
    backend = job.options.third_party
    with torch.no_grad(), _full_fp32():
        if backend is None:
            if not journal.parts:
                lay_out(partial, job.layout())
            with Shards(partial) as shards:
                _do_parts(job, shards, journal, spill, tell)
        elif not journal.parts:
            quantize_by(backend, job, partial, journal, _say(job, journal, tell))
    started = time.monotonic()
    folders.copy_side_files(job.folder, partial)
    format = job.format
    quantization = format.config_dict(quantized=list(job.schemes), ignored=job.left_out, writer=WRITER)
    write_configs(job.folder, partial, format, quantization)
    check_runs(partial, job.source.device, job.source.dtype)
    report = _report(
        job, output, journal.layers, Tensors(partial).num_bytes, journal.seconds + time.monotonic() - started
    )
    card = model_card(report, job.options, job.folder / "README.md", from_hub=job.from_hub, writer=WRITER)
    (partial / "README.md").write_text(card, encoding="utf-8")
    write_report(partial, report)
    write_plot(partial, report)
    (partial / RECIPE).write_text(recipe_text(job.options), encoding="utf-8")
    return report


def _say(job: Job, journal: Journal, tell: Progress) -> Callable[[str, LayerReport | None], None]:
    """What tells how far the run is: the words for where, and the layer just done."""
    layers = len(journal.layers)

    def say(what: str, layer: LayerReport | None) -> None:
        nonlocal layers
        layers += layer is not None
        tell(Step(len(journal.parts), len(job.parts), layers, len(job.schemes), what, layer))

    return say


def _do_parts(job: Job, shards: Shards, journal: Journal, spill: Path | None, tell: Progress) -> None:
    """Do, and write, what is not done yet."""
    parts, done, layers, format = job.parts, len(journal.parts), journal.layers, job.format
    kept, wanted = job.by_part(job.kept_tensors), job.by_part(job.schemes)
    say = _say(job, journal, tell)
    looks = any(part != REST or HEAD in job.schemes for part in parts[done:])  # at hidden states
    walk = Walk(job, spill) if job.windows is not None and looks else None
    for number, part in enumerate(parts):
        if number < done:
            if walk is not None:
                say(f"passing {part} again", None)
                walk.replay(number, shards.tensors)
            continue
        started, first = time.monotonic(), len(layers)
        changed: dict[str, Tensor] = {}
        if walk is not None and part != REST:
            made = walk.quantize(number, changed)
        else:
            made = _quantized_alone(job, wanted[part], walk)
        for weight, layer in made:
            shards.fill(format.pack(layer.name, weight))
            layers.append(layer)
            say(layer.name, layer)
        shards.fill((name, job.source.tensors.load(name)) for name in kept[part] if name not in changed)
        shards.fill(changed.items())
        shards.sync()
        journal.add(part, layers[first:], time.monotonic() - started)
        free_memory()
        say(_summary(part, layers[first:]), None)


def _summary(part: str, layers: Sequence[LayerReport]) -> str:
    known = [layer for layer in layers if not math.isnan(layer.error)]
    if not known:
        return f"{part} written"
    worst = max(known, key=lambda layer: layer.error)
    return f"{part} quantized, largest error {worst.error:.1e} of {worst.name.removeprefix(f'{part}.')}"


def _quantized_alone(
    job: Job, names: Sequence[str], walk: Walk | None
) -> Iterator[tuple[QuantizedWeight, LayerReport]]:
    """Layers that do not need the others of their block: all, where there are no data; the head, where there are."""
    for name in names:
        hessian = None if walk is None else walk.states.head_moment(job.source)
        yield from round_layers({name: load_weight(job.source, name)}, job.schemes[name], hessian, job.options)


def _report(
    job: Job, output: Path, layers: Sequence[LayerReport], num_bytes: int, seconds: float
) -> QuantizationReport:
    choice, windows = job.options.choice, job.windows
    native = job.options.third_party is None
    peaks = [peak_memory_bytes(place) if native else peak_memory_of_children() for place in (job.source.device, "cpu")]
    outputs = native and windows is not None
    weights = sum(math.prod(job.shape(name)) for name in job.schemes)
    return QuantizationReport(
        model=job.public_name,
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
        bytes_before=job.source.tensors.num_bytes,
        bytes_after=num_bytes,
        effective_bits=8 * job.packed_bytes / weights,
        seconds=seconds,
        peak_memory_bytes=peaks[0],
        peak_host_bytes=peaks[1],
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
        reason = "where GPTQ did no better, or too few tokens came"
        yield f"{len(fallen)} layers were rounded to nearest, {reason}: {', '.join(fallen)}"


@contextmanager
def _full_fp32() -> Iterator[None]:
    """fp32 products in fp32: TF32's ten bits of mantissa would drown what GPTQ compensates."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
