"""Rotary position embedding as config.json has it: base, rotated channels, scaling beyond the trained context.

transformers 5 keeps everything under ``rope_parameters``, nested by the kind of layer where kinds differ. Before,
``rope_theta`` and ``partial_rotary_factor`` stood beside ``rope_scaling``, whose kind was first called ``type``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from llmq.errors import LlmqError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
SUPPORTED = get_args(RopeKind)


@dataclass(frozen=True, slots=True)
class Rope:
    """How the angles of one kind of layer grow with the position. ``runtime.rotary`` has the formulas.

    theta             base of the frequencies
    fraction          of a head's channels that are rotated, the first ones
    factor            of the scaling: how many times the original context is to be reached
    original_context  tokens of the context that the model was first trained on
    attention_factor  multiplies cos and sin (yarn, longrope)
    low_freq_factor   llama3: wavelengths beyond original_context / low_freq_factor are scaled in full,
    high_freq_factor  and those within original_context / high_freq_factor not at all
    beta_fast         yarn: channels that turn more often than this within the original context are not scaled,
    beta_slow         and those that turn less often than this are scaled in full
    truncate          yarn: that range of channels is widened to whole ones
    short_factors     longrope: what each frequency is divided by in contexts up to the original one,
    long_factors      and in longer ones
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    fraction: float = 1.0
    factor: float = 1.0
    original_context: int = 8192
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def reach(self, max_position_embeddings: int) -> int:
        """Tokens of the longest sequence that the scaling is made for. Of dynamic scaling and yarn,
        ``max_position_embeddings`` may be the original context still."""
        scaled = self.original_context * self.factor if self.kind in ("dynamic", "yarn") else 0
        return max(max_position_embeddings, int(scaled))

    def rotated(self, head_dim: int) -> int:
        """Channels of a head that are rotated."""
        return int(head_dim * self.fraction)


Theta = Annotated[float, Field(gt=1, allow_inf_nan=False)]
_Factor = Annotated[float, Field(gt=0, le=1e9)]


class _RawRope(BaseModel):
    model_config = ConfigDict(extra="ignore")

    rope_theta: Theta | None = None
    rope_type: str = "default"
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    factor: _Factor | None = None
    original_max_position_embeddings: Annotated[int, Field(strict=True, gt=0, lt=2**31)] | None = None
    attention_factor: _Factor | None = None
    mscale: _Factor | None = None
    mscale_all_dim: _Factor | None = None
    low_freq_factor: _Factor = 1.0
    high_freq_factor: _Factor = 4.0
    beta_fast: _Factor | None = None
    beta_slow: _Factor | None = None
    truncate: bool = True
    short_factor: tuple[_Factor, ...] = ()
    long_factor: tuple[_Factor, ...] = ()


def read_rope(fields: Mapping[str, Any], *, theta: float, fraction: float, context: int, head_dim: int) -> Rope:
    """The ``Rope`` that ``rope_parameters`` or ``rope_scaling`` describes.

    theta, fraction  where ``fields`` do not say
    context          max_position_embeddings

    Raises pydantic's ValidationError for a field that is no such number, and LlmqError for a scaling that llmq does not
    know, that lacks a field, or whose fields contradict each other.
    """
    raw = _RawRope.model_validate({"rope_type": fields.get("type", "default"), **fields})
    base = Rope(raw.rope_theta or theta, fraction=raw.partial_rotary_factor or fraction)
    rotated = base.rotated(head_dim)
    if rotated < 2 or rotated % 2:
        raise LlmqError(
            f"heads of {head_dim} channels, {rotated} of them rotated, cannot be rotated in pairs",
            "check head_dim and partial_rotary_factor in config.json",
        )
    if raw.rope_type == "default":
        return base
    original = raw.original_max_position_embeddings or context
    # Where the factor is left out, transformers takes the ratio of the two contexts.
    factor = raw.factor or (context / original if raw.original_max_position_embeddings else None)
    if factor is None:
        raise LlmqError(f"the RoPE scaling {raw.rope_type!r} has no factor", "the folder's config.json is damaged")
    scaled = replace(base, factor=factor, original_context=original)
    match raw.rope_type:
        case "linear":
            return replace(scaled, kind="linear")
        case "dynamic":
            _check(rotated > 2, "dynamic scaling leaves the only pair of channels as it is")
            return replace(scaled, kind="dynamic", original_context=context)
        case "llama3":
            low, high = raw.low_freq_factor, raw.high_freq_factor
            _check(low < high, f"low_freq_factor {low} of llama3 is not below high_freq_factor {high}")
            return replace(scaled, kind="llama3", low_freq_factor=low, high_freq_factor=high)
        case "yarn":
            fast, slow = raw.beta_fast or base.beta_fast, raw.beta_slow or base.beta_slow
            _check(slow <= fast, f"beta_slow {slow} of yarn is above beta_fast {fast}")
            attention = raw.attention_factor or _yarn_attention_factor(factor, raw.mscale, raw.mscale_all_dim)
            return replace(
                scaled,
                kind="yarn",
                attention_factor=attention,
                beta_fast=fast,
                beta_slow=slow,
                truncate=raw.truncate,
            )
        case "longrope":
            short, long = raw.short_factor, raw.long_factor
            lengths = f"{len(short)} short and {len(long)} long factors"
            _check(
                len(short) == len(long) == rotated // 2,
                f"longrope has {lengths}, and {rotated} rotated channels take {rotated // 2}",
            )
            attention = raw.attention_factor or _longrope_attention_factor(factor, original)
            return replace(scaled, kind="longrope", attention_factor=attention, short_factors=short, long_factors=long)
        case other:
            raise LlmqError(f"the RoPE scaling {other!r} is not supported", f"llmq runs {', '.join(SUPPORTED)}")


def _check(holds: bool, contradiction: str) -> None:
    if not holds:
        raise LlmqError(contradiction, "the folder's config.json is damaged")


def _yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """Peng et al., "YaRN", 2023, equation 22; with the two exponents, as DeepSeek-V2 has it."""

    def grown(exponent: float) -> float:
        return 0.1 * exponent * math.log(factor) + 1 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return grown(mscale) / grown(mscale_all_dim)
    return grown(1.0)


def _longrope_attention_factor(factor: float, original_context: int) -> float:
    """Ding et al., "LongRoPE", 2024, as Phi-3 has it."""
    if factor <= 1 or original_context <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_context))
