"""config.json → facts: the defaults of transformers, and errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llmq.checkpoint.config import ARCHITECTURES, ModelConfig, read_config
from llmq.checkpoint.rope import Rope
from llmq.errors import LlmqError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def read(tmp_path: Path, **fields: Any) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | fields))
    return read_config(tmp_path)


def test_missing_heads_are_derived(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.num_kv_heads, config.head_dim) == (4, 16)


def test_null_means_missing(tmp_path: Path) -> None:
    config = read(tmp_path, head_dim=None, num_key_value_heads=None, rope_scaling=None)
    assert (config.num_kv_heads, config.head_dim, config.ropes) == (4, 16, (Rope(),) * 4)


def test_a_head_dim_unlike_hidden_over_heads_is_taken_as_it_is(tmp_path: Path) -> None:
    assert read(tmp_path, head_dim=32).head_dim == 32


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_rope_is_read_the_old_way_and_the_new(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert read(tmp_path, **fields).ropes[0] == Rope(
        5e5, "llama3", factor=8.0, original_context=64, low_freq_factor=1.0, high_freq_factor=4.0
    )


@pytest.mark.parametrize(
    ("architecture", "fields", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 8}, (None,) * 4),
        ("MistralForCausalLM", {"sliding_window": 8}, (8,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (None,) * 4),
        ("MistralForCausalLM", {}, (4096,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": False}, (None,) * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 8),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_windows_follow_the_rules_of_each_architecture(
    tmp_path: Path, architecture: str, fields: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert read(tmp_path, architectures=[architecture], num_key_value_heads=2, **fields).windows == windows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    """Whatever transformers writes for an architecture, we read to the same facts."""
    theirs = getattr(transformers, architecture).config_class(num_hidden_layers=4, max_window_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(theirs.to_dict() | {"architectures": [architecture]}))
    ours = read_config(tmp_path)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.context_length == theirs.max_position_embeddings


def test_every_eos_of_generation_config_counts(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read(tmp_path, eos_token_id=4).eos_token_ids == (5, 6)


def test_without_generation_config_the_eos_is_that_of_config(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=4).eos_token_ids == (4,)
    assert read(tmp_path).eos_token_ids == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported"),
        ({"hidden_size": -1}, "'hidden_size'"),
        ({"num_hidden_layers": "many"}, "'num_hidden_layers'"),
        ({"vocab_size": None}, "'vocab_size'"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, "RoPE scaling 'spiral'"),
        ({"dtype": "int7"}, "dtype 'int7'"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmqError, match=message):
        read(tmp_path, **fields)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LlmqError):
        read_config(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    field=st.sampled_from([*LLAMA, "rope_scaling", "rope_parameters", "layer_types", "eos_token_id"]), value=json_values
)
def test_any_hostile_value_is_read_or_refused_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "config.json").write_text(json.dumps(LLAMA | {field: value}))
    try:
        config = read_config(folder)
    except LlmqError:
        return
    assert config.head_dim > 0
