"""What there is to choose from: schemes by name, the methods that make each, the formats that hold it. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from llmq.checkpoint.formats import FORMATS
from llmq.errors import USAGE, LlmqError, either
from llmq.scheme import E4M3, FP4, INT, NF4, WHOLE_ROW, WHOLE_TENSOR, Scheme

METHODS = RTN, GPTQ, AWQ, SMOOTHQUANT, AUTOROUND, BNB = "rtn", "gptq", "awq", "smoothquant", "autoround", "bnb"
CALIBRATED = (GPTQ, AWQ, SMOOTHQUANT, AUTOROUND)
"""The methods that learn from a text."""


@dataclass(frozen=True, slots=True)
class Preset:
    """``--scheme NAME``, and the methods that make it, the default first."""

    scheme: Scheme
    methods: tuple[str, ...]


WEIGHT_ONLY = (GPTQ, AWQ, AUTOROUND, RTN)
PRESETS = {
    "w4a16": Preset(Scheme(4, 128), WEIGHT_ONLY),
    "w3a16": Preset(Scheme(3, 128), WEIGHT_ONLY),
    "w2a16": Preset(Scheme(2, 64), WEIGHT_ONLY),
    "w8a16": Preset(Scheme(8, 128), WEIGHT_ONLY),
    "w8a8": Preset(Scheme(8, WHOLE_ROW, activation_bits=8), (SMOOTHQUANT, GPTQ, RTN)),
    "fp8": Preset(Scheme(8, WHOLE_ROW, number=E4M3, activation_bits=8), (RTN,)),
    "nf4": Preset(Scheme(4, 64, number=NF4), (BNB,)),
    "fp4": Preset(Scheme(4, 64, number=FP4), (BNB,)),
    "bnb-int8": Preset(Scheme(8, WHOLE_ROW), (BNB,)),
}
DEFAULT = "w4a16"
PREFERRED_FORMATS = {AWQ: ("awq", "gptq", "compressed-tensors"), BNB: ("bitsandbytes",)}
OTHERS_PREFER = ("gptq", "compressed-tensors", "awq")


@dataclass(frozen=True, slots=True)
class Choice:
    """A scheme, the method that makes it and the format that holds it."""

    scheme: Scheme
    method: str
    format: str


def choose(
    scheme: Scheme | str = DEFAULT,
    method: str | None = None,
    format: str | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
) -> Choice:
    """What is meant by a scheme or its name, changed by whatever else is given.

    AWQ's own format has zero points fitted, unless ``symmetric`` says otherwise. Raises LlmqError, with what comes
    nearest, when there is no such scheme, method or format, or they do not go together.
    """
    _check_name("method", method, METHODS)
    _check_name("format", format, FORMATS)
    named = isinstance(scheme, str)
    if isinstance(scheme, str):
        _check_name("scheme", scheme, PRESETS)
        preset = PRESETS[scheme]
        scheme, method = preset.scheme, method or preset.methods[0]
    asked: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    scheme = replace(scheme, **{name: value for name, value in asked.items() if value is not None})
    methods = methods_for(scheme)
    method = method or methods[0]
    if method not in methods:
        raise LlmqError(f"{method} does not make {scheme}", f"choose --method {either(methods)}", exit_code=USAGE)
    formats = formats_for(scheme, method)
    format = format or formats[0]
    if named and symmetric is None and (method, format) == (AWQ, "awq"):
        scheme = replace(scheme, symmetric=False)
    if format not in formats:
        reason = FORMATS[format].why_not(scheme) or f"what {method} makes is not written in the format {format}"
        raise LlmqError(reason, f"{scheme} by {method} fits --format {either(formats)}", exit_code=USAGE)
    return Choice(scheme, method, format)


def methods_for(scheme: Scheme) -> tuple[str, ...]:
    """The methods that make ``scheme``, the default first: those of the presets of its numbers, if a format holds it.

    Raises LlmqError when there are none.
    """
    alike = [
        preset.methods
        for preset in PRESETS.values()
        if (preset.scheme.number, preset.scheme.activation_bits) == (scheme.number, scheme.activation_bits)
    ]
    methods = [method for methods in alike for method in methods if formats_for(scheme, method)]
    if scheme.group_size == WHOLE_TENSOR:  # learned rounding has a scale of its own for each group
        methods = [method for method in methods if method != AUTOROUND]
    if not methods:
        raise LlmqError(f"no format holds {scheme}", f"choose --scheme {either(PRESETS)}", exit_code=USAGE)
    return tuple(dict.fromkeys(methods))


def formats_for(scheme: Scheme, method: str) -> tuple[str, ...]:
    """The formats in which ``scheme``, made by ``method``, is written, the default first."""
    preferred = PREFERRED_FORMATS.get(method, OTHERS_PREFER)
    return tuple(name for name in preferred if name in FORMATS and FORMATS[name].why_not(scheme) is None)


def scheme_settings(scheme: Scheme) -> dict[str, Any]:
    """The flags that ask for ``scheme``: a preset of its numbers, and in what it differs."""
    kind = [
        (name, preset.scheme)
        for name, preset in PRESETS.items()
        if (preset.scheme.number, preset.scheme.activation_bits) == (scheme.number, scheme.activation_bits)
    ]
    name, named = next((pair for pair in kind if pair[1].bits == scheme.bits), kind[0])
    found: dict[str, Any] = {"scheme": name}
    if scheme.bits != named.bits:
        found["bits"] = scheme.bits
    if scheme.group_size != named.group_size:
        found["group-size"] = scheme.group_size
    if scheme.number == INT and scheme.activation_bits == 16:
        found["sym"] = scheme.symmetric
    return found


def preset_table() -> str:
    """Every preset with its methods and their formats, as a table in Markdown."""
    rows = []
    for name, preset in PRESETS.items():
        formats = dict.fromkeys(form for method in preset.methods for form in formats_for(preset.scheme, method))
        if formats:
            rows.append(f"| `{name}` | {preset.scheme} | {', '.join(preset.methods)} | {', '.join(formats)} |")
    return "\n".join(("| `--scheme` | weights | `--method` | `--format` |", "|---|---|---|---|", *rows))


def _check_name(kind: str, name: str | None, names: Iterable[str]) -> None:
    if name is not None and name not in names:
        raise LlmqError(f"there is no {kind} {name!r}", f"choose --{kind} {either(names)}", exit_code=USAGE)
