"""What the planner reads from a config.json: against transformers' models and caches, published figures, nonsense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_models import LLAMA_2_7B, LLAMA_31_8B, MISTRAL_7B, QWEN_25_05B, config_of
from small_configs import SMALL
from tiny_models import VARIANTS, save_variant

from llmq import memory
from llmq.checkpoint.config import read_config, read_json
from llmq.errors import LlmqError
from llmq.memplan.architecture import Architecture
from llmq.memplan.describe import describe
from llmq.memplan.families import FAMILIES
from llmq.memplan.fields import class_defaults

BF16 = {"torch_dtype": "bfloat16"}
GEMMA_3_27B = BF16 | {
    "model_type": "gemma3_text",
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "sliding_window": 1024,
}
TOKENS = 11
every_small = pytest.mark.parametrize("name", SMALL)


def class_config(name: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, fields = SMALL[name]
    return CONFIG_MAPPING[model_type](**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def small(name: str) -> Architecture:
    model_type, fields = SMALL[name]
    return describe({"model_type": model_type} | fields)


# Against transformers


@every_small
def test_parameters_and_cache_are_those_of_transformers(name: str) -> None:
    """The model is built and run: its parameters are counted, and the numbers in its cache after some tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    architecture = small(name)
    model = AutoModelForCausalLM.from_config(class_config(name)).eval()
    assert architecture.parameters == sum(parameter.numel() for parameter in model.parameters())
    with torch.inference_mode():
        out = model(torch.arange(3, 3 + TOKENS)[None], use_cache=True)
    cache = out["cache_params"] if "cache_params" in out else out["past_key_values"]
    # transformers' Falcon keeps keys and values once for each query head that reads them. vLLM does not.
    repeated = model.config.num_attention_heads // model.config.num_kv_heads if name == "falcon-40b" else 1
    expected = [
        (repeated * TOKENS * layer.token_elements, layer.conv_elements, layer.state_elements)
        for layer in architecture.layers
    ]
    assert [tuple(held(layer)) for layer in cache.layers] == expected


def held(layer: Any) -> Iterator[int]:
    """Numbers in one layer of a cache: keys and values, convolutions' inputs, states."""
    yield sum(x.numel() for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None)
    for states in ("conv_states", "recurrent_states"):
        yield sum(x.numel() for x in getattr(layer, states, {}).values() if x is not None)


@every_small
def test_fields_that_are_not_there_mean_what_the_configuration_class_means(name: str) -> None:
    whole = describe(json.loads(class_config(name).to_json_string(use_diff=False)))
    sparse = small(name)
    assert (sparse.layers, sparse.weights) == (whole.layers, whole.weights)


def test_every_architecture_is_tried() -> None:
    assert {model_type for model_type, _ in SMALL.values()} == set(FAMILIES)


def test_the_defaults_are_those_of_the_installed_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type, defaults in class_defaults().items():
        fields = CONFIG_MAPPING[model_type].__dataclass_fields__
        assert {name: fields[name].default for name in defaults} == defaults, model_type


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [pytest.param(5, 5, id="short"), pytest.param(15, 15, id="up to it"), pytest.param(40, 15, id="longer")],
)
def test_a_sliding_layer_keeps_its_window_of_which_the_newest_token_is_one(tokens: int, kept: int) -> None:
    """transformers keeps what the next token will see, and not yet that token."""
    import torch
    from transformers.cache_utils import DynamicSlidingWindowLayer

    window = next(layer.window for layer in small("mistral").layers)
    layer = DynamicSlidingWindowLayer(sliding_window=window)
    layer.update(torch.zeros(1, 2, tokens, 4), torch.zeros(1, 2, tokens, 4))
    assert layer.keys.shape[2] == kept == min(tokens, window - 1)


# Against the engine


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_engine_runs_is_described_as_it_runs_it(tmp_path: Path, variant: str) -> None:
    folder = save_variant(tmp_path / variant, variant)
    config, architecture = read_config(folder), describe(read_json(folder / "config.json"))
    assert 4 * architecture.parameters == memory.weight_bytes(config, None, 4)
    assert sum(layer.token_elements for layer in architecture.layers) == memory.kv_bytes_per_token(config, "fp8")
    assert architecture.windows == config.windows
    assert architecture.context_length == config.context_length
    assert architecture.mlp_elements == config.mlp_elements
    assert architecture.dtype == config.dtype


# Against published figures


@pytest.mark.parametrize(
    ("fields", "parameters", "kv_bytes_per_token"),
    [
        pytest.param(LLAMA_2_7B, 6_738_415_616, 524_288, id="Llama-2-7B"),
        pytest.param(LLAMA_31_8B, 8_030_261_248, 131_072, id="Llama-3.1-8B"),
        pytest.param(QWEN_25_05B, 494_032_768, 12_288, id="Qwen2.5-0.5B"),
        pytest.param(MISTRAL_7B, 7_241_732_096, 131_072, id="Mistral-7B-v0.1"),
        pytest.param(GEMMA_3_27B, 27_009_346_304, 507_904, id="Gemma-3-27B"),
        pytest.param({"model_type": "deepseek_v3"} | BF16, 671_026_404_352, 70_272, id="DeepSeek-V3"),
    ],
)
def test_known_models_have_their_known_sizes(fields: dict[str, Any], parameters: int, kv_bytes_per_token: int) -> None:
    architecture = describe(fields)
    assert architecture.parameters == parameters
    assert 2 * sum(layer.token_elements for layer in architecture.layers) == kv_bytes_per_token


def test_of_deepseek_v3_a_token_meets_37_of_671_billion() -> None:
    assert describe({"model_type": "deepseek_v3"}).active_parameters // 10**9 == 37


def test_gemma_3_27b_has_52_layers_that_slide_and_10_that_do_not() -> None:
    kinds = {layer.kind: count for layer, count in describe(GEMMA_3_27B).kinds.items()}
    assert kinds == {"sliding": 52, "full": 10}


def test_a_block_of_qwen_35_keeps_548_864_numbers() -> None:
    """Of its default dimensions; vLLM keeps one tap of the convolution less."""
    state = next(layer for layer in describe({"model_type": "qwen3_5_text"}).layers if layer.kind == "state")
    assert state.state_elements + state.conv_elements * 3 // 4 == 548_864


# Traps


def test_null_is_no_number_of_heads_or_channels() -> None:
    fields = LLAMA_2_7B | {"head_dim": None, "num_key_value_heads": None}
    assert describe(fields).layers == describe(LLAMA_2_7B).layers


def test_a_window_that_is_null_is_none_and_one_that_is_not_used_neither() -> None:
    assert {layer.kind for layer in describe(MISTRAL_7B | {"sliding_window": None}).layers} == {"full"}
    assert {layer.kind for layer in describe(QWEN_25_05B).layers} == {"full"}
    listed = QWEN_25_05B | {"layer_types": ["sliding_attention"] * 24}
    assert {layer.kind for layer in describe(listed).layers} == {"full"}


def test_a_language_model_within_a_larger_one_is_found_and_the_rest_said_to_be_left_out() -> None:
    """google/gemma-3-4b-it: its text_config leaves out the heads, which are then those of the class: 8, 4, 256."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    architecture = describe({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}})
    full = next(layer for layer in architecture.layers if layer.kind == "full")
    assert (full.kv_heads, full.token_elements) == (4, 2 * 4 * 256)
    assert sum(layer.kind == "sliding" for layer in architecture.layers) == 29
    assert "only the language model" in architecture.assumptions[0]
    del text["model_type"]
    assert describe({"model_type": "gemma3", "text_config": text}).layers == architecture.layers


def test_a_tied_head_is_counted_once() -> None:
    untied = describe(QWEN_25_05B | {"tie_word_embeddings": False})
    assert untied.parameters - describe(QWEN_25_05B).parameters == 151936 * 896


def test_further_tokens_heads_are_left_out_and_said_to_be() -> None:
    plain = describe({"model_type": "deepseek_v3"})
    more = describe({"model_type": "deepseek_v3", "num_nextn_predict_layers": 1})
    assert more.parameters == plain.parameters
    assert any("MTP" in line for line in more.assumptions)


@pytest.mark.parametrize("dtype", [{"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"dtype": "torch.bfloat16"}])
def test_a_dtype_has_two_names(dtype: dict[str, str]) -> None:
    fields = {name: value for name, value in LLAMA_2_7B.items() if name != "torch_dtype"}
    assert describe(fields | dtype).dtype == "bfloat16"


def test_an_unknown_architecture_is_counted_as_a_llama_and_marked(tmp_path: Path) -> None:
    fields = LLAMA_31_8B | {"model_type": "llama9", "architectures": ["Llama9ForCausalLM"]}
    architecture = describe(fields)
    assert not architecture.known
    assert architecture.parameters == memory.weight_bytes(config_of(tmp_path, LLAMA_31_8B), None, 1)
    assert "'llama9' is not known" in architecture.assumptions[0]


@pytest.mark.parametrize(
    "fields", [{"model_type": "t5"}, {"model_type": "new", "is_encoder_decoder": True}, {"model_type": "mllama"}]
)
def test_cross_attention_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(LlmqError, match=f"{fields['model_type']} attends to an encoder"):
        describe(LLAMA_2_7B | fields)


# Nonsense


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", -1),
        ("hidden_size", "4096"),
        ("hidden_size", 4096.0),
        ("hidden_size", True),
        ("hidden_size", 10**30),
        ("hidden_size", None),
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", [32]),
        ("num_attention_heads", 5000),
        ("num_key_value_heads", 5),
        ("head_dim", {}),
        ("vocab_size", 0),
        ("max_position_embeddings", -5),
        ("torch_dtype", "float7"),
        ("torch_dtype", 16),
        ("tie_word_embeddings", "yes"),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["strange_attention"] * 32),
        ("layer_types", "full_attention"),
        ("text_config", [1]),
        ("quantization_config", "gptq"),
        ("model_type", 3),
        ("per_layer_config", {"0": 1}),
    ],
)
def test_a_field_that_cannot_be_is_named(field: str, value: object) -> None:
    with pytest.raises(LlmqError, match=f"'?{field}'?"):
        describe(LLAMA_31_8B | {"model_type": "llama", field: value})


def test_more_experts_for_a_token_than_there_are_is_a_contradiction() -> None:
    with pytest.raises(LlmqError, match="num_experts_per_tok"):
        describe({"model_type": "mixtral", "num_experts_per_tok": 9})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


NAMES = sorted({name for defaults in class_defaults().values() for name in defaults})


@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_whatever_stands_in_a_config_it_is_described_or_refused(model_type: str, fields: dict[str, Any]) -> None:
    with suppress(LlmqError):
        assert describe({"model_type": model_type} | fields).parameters > 0
