"""config.json, field by field: other names, what a missing one means, and no value that cannot be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from llmq.checkpoint.config import MEND
from llmq.errors import LlmqError

LARGEST = 2**31 - 1
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model", "n_embed"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "head_dim": ("attention_head_dim", "kv_channels", "d_kv"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "block_ff_dim"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length", "n_ctx", "model_max_length"),
    "sliding_window": ("attention_window_size", "window_size"),
    "layer_types": ("layers_block_type",),
    "tie_word_embeddings": ("tie_embedding",),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"),
    "moe_intermediate_size": ("expert_ffn_hidden_size",),
    "n_shared_experts": ("num_shared_experts", "moe_num_shared_experts"),
    "shared_expert_intermediate_size": ("shared_intermediate_size", "moe_shared_expert_intermediate_size"),
    "num_nextn_predict_layers": ("num_mtp_layers",),
    "sliding_window_pattern": ("_sliding_window_pattern",),
    "full_attn_idxs": ("attn_layer_indices",),
    "state_size": ("mamba_d_state", "ssm_state_size"),
    "conv_kernel": ("mamba_d_conv",),
    "expand": ("mamba_expand",),
    "time_step_rank": ("mamba_dt_rank",),
    "mamba_n_heads": ("mamba_num_heads", "n_mamba_heads", "num_heads"),
    "mamba_d_head": ("mamba_head_dim",),
    "mamba_n_groups": ("mamba_ngroups", "n_groups"),
    "use_conv_bias": ("mamba_conv_bias",),
    "mamba_proj_bias": ("use_bias",),
    "dtype": ("torch_dtype",),
}
"""What architectures call the same thing, our name for it first."""


@cache
def class_defaults() -> dict[str, dict[str, Any]]:
    """model_type → what its configuration class in transformers means by the fields that a config.json leaves out.

    Written by ``scripts/write_config_defaults.py``.
    """
    text = files("llmq.memplan").joinpath("defaults.json").read_text(encoding="utf-8")
    defaults: dict[str, dict[str, Any]] = json.loads(text)
    return defaults


class Fields:
    """The fields of one config.json. Whatever is read is checked; what is wrong is an LlmqError that names it.

    A field that is missing has the value that the architecture's class gives it; one that is null has none.
    """

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any], path: str) -> None:
        self._raw, self._defaults, self._path = dict(raw), defaults, path

    def value(self, name: str) -> Any:
        return self._find(name)[1]

    def size(self, name: str) -> int:
        """A number above 0 that must be there."""
        found = self.maybe_size(name)
        if found is None:
            raise LlmqError(f"{self._path}: field {name!r} is missing", "point at the config.json of a language model")
        return found

    def maybe_size(self, name: str) -> int | None:
        """A number above 0; None where there is none, which some write as 0."""
        found, value = self._find(name)
        if value is None or value == "auto" or (type(value) is int and value == 0):
            return None
        if type(value) is not int or not 0 < value <= LARGEST:
            raise self.wrong(found, f"must be a whole number from 1 to {LARGEST:,}", value)
        return value

    def flag(self, name: str) -> bool:
        found, value = self._find(name)
        if value is None:
            return False
        if type(value) is not bool:
            raise self.wrong(found, "must be true or false", value)
        return value

    def text(self, name: str) -> str | None:
        found, value = self._find(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(found, "must be a text", value)
        return value

    def list_of(self, kind: type, name: str) -> list[Any] | None:
        """A list of ``kind`` (int or str); None where there is none."""
        found, value = self._find(name)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.wrong(found, f"must be a list of {'whole numbers' if kind is int else 'texts'}", value)
        return value

    def within(self, name: str) -> Fields:
        """The fields of an object in a field; of none, where it is missing."""
        found, value = self._find(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(found, "must be an object", value)
        return Fields(value or {}, {}, f"{self._path}: {found}")

    def of_layer(self, layer: int) -> Fields:
        """The fields as one layer has them: with what ``per_layer_config`` says of it, and of a list its entry."""
        own = self.within("per_layer_config").within(str(layer))._raw
        widths = self.value("intermediate_size")
        if isinstance(widths, list):
            if layer >= len(widths):
                raise self.wrong("intermediate_size", "must have an entry for each layer", widths)
            own = {"intermediate_size": widths[layer]} | own
        return Fields(self._raw | own, self._defaults, self._path) if own else self

    def wrong(self, name: str, rule: str, value: object) -> LlmqError:
        """What to raise for a ``value`` that cannot be."""
        shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:39]}…"
        return LlmqError(f"{self._path}: field {self._find(name)[0]!r} {rule}, not {shown}", MEND)

    def _find(self, name: str) -> tuple[str, Any]:
        names = (name, *OTHER_NAMES.get(name, ()))
        for source in (self._raw, self._defaults):
            for other in names:
                if other in source:
                    return other, source[other]
        return name, None
