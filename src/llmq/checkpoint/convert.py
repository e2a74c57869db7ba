"""From one format of quantized weights to another that holds the same numbers: no code, scale or zero point changes.

Layer by layer, from shard to shard: at any moment the memory holds one layer and the shard that is being filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmq.checkpoint import folder as folders
from llmq.checkpoint.config import HEAD, ModelConfig, read_config
from llmq.checkpoint.formats import (
    WRITER,
    Format,
    check_shape,
    format_for,
    is_packed,
    kept_layers,
    open_format,
    packed_layers,
    write_configs,
)
from llmq.checkpoint.formats.gptq import Gptq
from llmq.checkpoint.formats.packed import stated_scheme
from llmq.checkpoint.tensors import ShardWriter, Tensors
from llmq.errors import LlmqError
from llmq.scheme import Scheme

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was done. ``bytes_before`` and ``bytes_after`` count tensors; ``scheme`` is as the new folder says it,
    or several."""

    model: str
    output: str
    source_format: str
    format: str
    scheme: str
    layers: int
    bytes_before: int
    bytes_after: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    model: str,
    output: str | Path,
    format: str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the quantized ``model`` (a folder or a hub id) to the folder ``output`` in ``format``.

    Raises LlmqError when the format cannot hold the same numbers; ``output`` is then as it was.
    """
    output = Path(output)
    folders.check_output(output, overwrite=overwrite)
    folder = folders.resolve(model, revision)
    folders.check_keeps(folder, output)
    config, tensors = read_config(folder), Tensors(folder)
    source = open_format(config)
    if source is None:
        raise LlmqError(f"{model} is not quantized", f"quantize it: llmq quantize {model} -o FOLDER --format {format}")
    shapes = _layers(config, tensors, source)
    schemes = _schemes(list(shapes), tensors, source)
    target = format_for(format, schemes)
    if target.name == source.name:
        raise LlmqError(
            f"{model} is in the {target.title} format already", "choose another --format, or copy the folder"
        )
    for name, shape in shapes.items():
        check_shape(format, name, shape, "choose --format compressed-tensors, which packs any size")
    of_packed = {name for layer in shapes for name in tensors.infos if name.startswith(f"{layer}.")}
    kept = [name for name in tensors.infos if name not in of_packed or name.endswith(".bias")]
    _check_kept(kept, target)
    folders.check_disk_space(output, tensors.num_bytes)

    with folders.write_folder(output, overwrite=overwrite) as partial:
        writer = ShardWriter(partial)
        for done, name in enumerate(shapes, start=1):
            weight = replace(source.unpack(name, tensors), scheme=schemes[name])
            writer.add_all(target.pack(name, weight))
            if weight.group_index is not None and isinstance(target, Gptq):
                target = replace(target, act_order=True)  # or loaders would not look at the index
            if progress is not None:
                progress(done, len(shapes))
        for name in kept:
            writer.add(name, tensors.load(name))
        writer.close()
        folders.copy_side_files(folder, partial)
        ignored = kept_layers(tensors, shapes)
        quantization = target.config_dict(quantized=list(shapes), ignored=ignored, writer=WRITER)
        write_configs(folder, partial, target, quantization)
        _write_card(folder, partial, source, target)
    return Conversion(
        model=model,
        output=str(output),
        source_format=source.name,
        format=target.name,
        scheme=", ".join(sorted(set(map(str, schemes.values())))),
        layers=len(shapes),
        bytes_before=tensors.num_bytes,
        bytes_after=writer.num_bytes,
        warnings=() if target.caveat is None else (target.caveat,),
    )


def _layers(config: ModelConfig, tensors: Tensors, source: Format) -> dict[str, tuple[int, int]]:
    """The packed layers → (out_features, in_features). LlmqError for packed ones that the model does not have."""
    everywhere = config.all_linears
    if not config.tied_embeddings:
        everywhere[HEAD] = config.vocab_size, config.hidden_size
    packed = {name: shape for name, shape in everywhere.items() if is_packed(source, name, tensors)}
    for name in sorted(packed_layers(source, tensors) - set(packed)):
        raise LlmqError(
            f"{name} is packed, and is no linear layer of a decoder block, nor an untied {HEAD}",
            "the folder's config.json is another model's",
        )
    if not packed:
        raise LlmqError(
            f"{tensors.folder} has no layer packed in the {source.title} format",
            "its quantization_config is another folder's",
        )
    return packed


def _schemes(packed: Sequence[str], tensors: Tensors, source: Format) -> dict[str, Scheme]:
    """The scheme of each packed layer: symmetric where all layers of a scheme have the middle code for every zero
    point, declared or not."""
    schemes = {name: stated_scheme(name, source.scheme_of(name)) for name in packed}
    for scheme in set(schemes.values()):
        names = [name for name in packed if schemes[name] == scheme]
        if not scheme.symmetric and all(
            bool((source.unpack(name, tensors).zero_points == scheme.middle_code).all()) for name in names
        ):  # asymmetric ones end this at their first layer
            schemes |= dict.fromkeys(names, replace(scheme, symmetric=True))
    return schemes


def _check_kept(names: Sequence[str], target: Format) -> None:
    """Raise LlmqError for tensors beside the layers that mean nothing in another format."""
    for name in names:
        if name.endswith((".k_scale", ".v_scale")):
            raise LlmqError(
                f"{name} scales a KV cache of 8 bits, for which the {target.title} format has no place",
                "keep the folder as it is, or quantize the original model by llmq",
            )


def _write_card(source_folder: Path, target_folder: Path, source: Format, target: Format) -> None:
    """README.md: the source's, and what was done to it."""
    card = source_folder / "README.md"
    before = card.read_text(encoding="utf-8", errors="replace").rstrip() + "\n\n" if card.exists() else ""
    after = (
        f"## Converted\n\nFrom the {source.title} format to {target.title} by {WRITER}: the same codes, scales and "
        f"zero points, packed otherwise.\n\n```\nllmq convert FOLDER -o OUTPUT --format {target.name}\n```\n"
    )
    (target_folder / "README.md").write_text(before + after, encoding="utf-8")
