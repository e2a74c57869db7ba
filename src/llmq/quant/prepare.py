"""What can be found out before the first layer is quantized: the job, or what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from llmq.checkpoint.config import EMBEDDING, FINAL_NORM, HEAD, ModelConfig, block_name, read_config
from llmq.checkpoint.formats import FORMATS, format_for, kept_layers
from llmq.checkpoint.formats.merged import merged_layers
from llmq.checkpoint.tensors import Tensors
from llmq.errors import USAGE, LlmqError
from llmq.quant.backends.environment import python_of
from llmq.quant.job import Job, shape_of
from llmq.quant.methods import bnb
from llmq.quant.options import QuantizeOptions
from llmq.quant.schemes import BNB
from llmq.runtime.decoder import DecoderLayer
from llmq.runtime.device import resolve_device, resolve_dtype
from llmq.runtime.loader import Source
from llmq.scheme import GROUP_SIZES, WHOLE_ROW, Scheme


def prepare(model: str, folder: Path, options: QuantizeOptions) -> Job:
    """The job of quantizing ``model``, which is ``folder``, but for its calibration windows, which may take long to
    come by. Raises LlmqError for what is wrong."""
    config, tensors, device = read_config(folder), Tensors(folder), resolve_device(options.device)
    if config.quantization is not None:
        raise LlmqError(
            f"{model} is quantized already",
            "quantize the model that it was made from; to change only its format: llmq convert",
        )
    _check_tensors(config, tensors)
    if options.choice.method == BNB:
        bnb.check_installed()
    notes: list[str] = []
    backend = options.third_party
    if backend is not None:
        python_of(backend)
        if device.partition(":")[0] not in backend.devices:
            device = backend.devices[0]
            notes.append(f"{backend.name} runs on {device} only, with the versions that llmq installs it in")
    every = list(config.all_linears)
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
    return Job(
        model,
        folder,
        options,
        Source(config, None, tensors, device, resolve_dtype("auto", config, device)),
        fitting,
        tuple(kept_layers(tensors, fitting)),
        (*notes, *_misfit_notes(misfits), *_merge_notes(every, fitting)),
        None,
        (device,),
    )


def _check_tensors(config: ModelConfig, tensors: Tensors) -> None:
    """Raise LlmqError unless the folder has every tensor of the model, in its shape: some are looked at last."""
    with torch.device("meta"):
        block = DecoderLayer(config, 0)
    shapes = {
        f"{block_name(layer)}.{name}": tuple(parameter.shape)
        for layer in range(config.num_layers)
        for name, parameter in block.named_parameters()
    }
    shapes |= {f"{EMBEDDING}.weight": (config.vocab_size, config.hidden_size)}
    shapes |= {f"{FINAL_NORM}.weight": (config.hidden_size,)}
    if not config.tied_embeddings:
        shapes[f"{HEAD}.weight"] = config.vocab_size, config.hidden_size
    for name, shape in shapes.items():
        info = tensors.infos.get(name)
        if info is None:
            raise LlmqError(
                f"{tensors.folder} has no tensor {name}", "the folder is incomplete, or its config.json is another's"
            )
        if info.shape != shape:
            raise LlmqError(
                f"{name} is {list(info.shape)}, and config.json makes it {list(shape)}",
                "the folder's config.json is another model's",
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


def _misfit(name: str, scheme: Scheme, tensors: Tensors, options: QuantizeOptions) -> str | None:
    """Why a layer has to stay as it is: scheme or format cannot hold its shape. None when they can."""
    out_features, in_features = shape = shape_of(name, tensors)
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


def _merge_notes(names: Sequence[str], schemes: Mapping[str, Scheme]) -> Iterator[str]:
    """A sentence when layers that other runtimes compute as one have not all the same scheme."""
    split = [whole for whole, parts in merged_layers(names) if len({schemes.get(part) for part in parts}) > 1]
    if split:
        yield (
            f"vLLM and SGLang cannot load this folder: the parts of {split[0]}, which they compute as one layer, "
            f"differ in scheme, as do those of {len(split)} layers in all"
        )


def _fitting_groups(names: Iterable[str], tensors: Tensors) -> str:
    """The hint that says in what groups, or formats, the layers would fit."""
    inputs = [shape_of(name, tensors)[1] for name in names]
    sizes = [size for size in GROUP_SIZES if size > 0 and not any(count % size for count in inputs)]
    return f"choose --group-size {', '.join(map(str, (*sizes, WHOLE_ROW)))}, or --format compressed-tensors"
