"""config.json → facts: the defaults of transformers, and errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llmq.checkpoint.config import ARCHITECTURES, ModelConfig, read_config
from llmq.checkpoint.rope import Rope
from llmq.errors import LlmqError
from llmq.runtime.decoder import DecoderLayer

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


@pytest.mark.parametrize(
    ("architecture", "fields", "kinds"),
    [
        ("Phi3ForCausalLM", {"sliding_window": 8}, "llll"),
        ("Phi3ForCausalLM", {}, "gggg"),
        ("MixtralForCausalLM", {"sliding_window": None}, "gggg"),
        ("Qwen3MoeForCausalLM", {"sliding_window": 8, "use_sliding_window": True}, "llll"),
        ("Gemma2ForCausalLM", {"sliding_window": 8}, "lglg"),
        ("Gemma3ForCausalLM", {"sliding_window": 8, "sliding_window_pattern": 3}, "llgl"),
        (
            "Gemma3ForCausalLM",
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"] * 2},
            "glgl",
        ),
    ],
)
def test_local_and_global_layers_follow_the_rules_of_each_architecture(
    tmp_path: Path, architecture: str, fields: dict[str, Any], kinds: str
) -> None:
    config = read(tmp_path, architectures=[architecture], num_key_value_heads=2, **fields)
    assert config.windows == tuple(8 if kind == "l" else None for kind in kinds)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ],
    ids=["old", "new"],
)
def test_gemma_3_rotates_its_local_layers_otherwise(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = read(tmp_path, architectures=["Gemma3ForCausalLM"], sliding_window_pattern=2, **fields)
    far = Rope(5e5, "linear", factor=8.0, original_context=131_072)
    assert config.ropes == (Rope(2e4), far, Rope(2e4), far)


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 512),  # says nothing of what max_position_embeddings counts
        ({"rope_type": "dynamic", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 512),
    ],
)
def test_the_context_is_as_long_as_the_scaling_reaches(tmp_path: Path, scaling: dict[str, Any], context: int) -> None:
    assert read(tmp_path, max_position_embeddings=512, rope_scaling=scaling).context_length == context


@pytest.mark.parametrize("said", ["all", "what differs"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_are_those_of_transformers(tmp_path: Path, architecture: str, said: str) -> None:
    """Whatever transformers writes for an architecture, we read to the same facts, and what it leaves out too."""
    theirs = getattr(transformers, architecture).config_class(num_hidden_layers=7, max_window_layers=2)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    written = theirs.to_dict()
    if said == "what differs":
        written = {"num_hidden_layers": 7} | {name: written[name] for name in sizes}
    (tmp_path / "config.json").write_text(json.dumps(written | {"architectures": [architecture]}))
    ours = read_config(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.context_length == theirs.max_position_embeddings
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 7
    windows = tuple(getattr(theirs, "sliding_window", None) if kind == "sliding_attention" else None for kind in kinds)
    assert ours.windows == windows
    for kind, rope in zip(kinds, ours.ropes, strict=True):
        assert rope.theta == theirs.rope_parameters.get(kind, theirs.rope_parameters)["rope_theta"]
    assert ours.attention_softcap == (50.0 if architecture == "Gemma2ForCausalLM" else None)
    assert ours.logits_softcap == getattr(theirs, "final_logit_softcapping", None)
    assert (ours.attention_scale or head_dim**-0.5) == getattr(theirs, "query_pre_attn_scalar", head_dim) ** -0.5
    if ours.experts is not None:
        inner = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert (ours.experts.count, ours.experts.per_token) == (theirs.num_local_experts, theirs.num_experts_per_tok)
        assert ours.experts.intermediate_size == inner
        assert ours.experts.renormalized == getattr(theirs, "norm_topk_prob", True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linears_are_the_matrices_of_a_block_in_the_order_of_computation(tmp_path: Path, architecture: str) -> None:
    fields = {"head_dim": 16, "num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2}
    config = read(tmp_path, architectures=[architecture], **fields)
    staged = [name for stage in config.linear_stages for group in stage.groups for name in group]
    assert staged == list(config.linears)
    with torch.device("meta"):
        block = DecoderLayer(config, 0)
    matrices = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    routers = {f"{config.names.feed_forward}.gate"} if config.experts else set()
    assert set(matrices) - routers == set(staged)
    for name, (out_features, in_features) in config.linears.items():
        assert (matrices[name].out_features, matrices[name].in_features) == (out_features, in_features)
    for stage in config.linear_stages:
        for group in stage.groups:
            assert len({config.linears[name][1] for name in group}) == 1


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
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' has no factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}}, "beta_slow 2.0 of yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4}}, "low_freq_factor 4.0 of llama3"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2, "long_factor": [1.0]}}, "0 short and 1 long factors"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "'factor'"),
        ({"partial_rotary_factor": 0.2}, "heads of 16 channels, 3 of them rotated"),
        ({"dtype": "int7"}, "dtype 'int7'"),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention"]}, "1 layer_types for 4 layers"),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["chunked_attention"] * 4}, "'chunked_attention'"),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "see later ones"),
        ({"architectures": ["MixtralForCausalLM"], "num_key_value_heads": 2, "num_experts_per_tok": 9}, "of 8 in all"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [1]}, "layers without experts"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"architectures": []}, "does not name one"),
        ({"eos_token_id": "</s>"}, "'eos_token_id"),
        ({"rms_norm_eps": float("inf")}, "'rms_norm_eps'"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmqError, match=message) as caught:
        read(tmp_path, **fields)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"hidden_size": 1' + 5000 * "0" + "}"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LlmqError):
        read_config(tmp_path)


OTHER_FIELDS = (
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "partial_rotary_factor",
    "layer_types",
    "sliding_window",
    "sliding_window_pattern",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "num_experts",
    "num_experts_per_tok",
    "mlp_only_layers",
    "eos_token_id",
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    architecture=st.sampled_from(list(ARCHITECTURES)),
    field=st.sampled_from([*LLAMA, *OTHER_FIELDS]),
    value=json_values,
)
def test_any_hostile_value_is_read_or_refused_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, architecture: str, field: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    fields = LLAMA | {"architectures": [architecture], "num_key_value_heads": 2} | {field: value}
    (folder / "config.json").write_text(json.dumps(fields))
    try:
        config = read_config(folder)
    except LlmqError:
        return
    assert config.head_dim > 0
