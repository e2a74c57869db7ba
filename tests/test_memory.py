"""Byte formulas, against sizes that others counted or published, and by the laws they obey."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from known_models import LLAMA_2_7B, LLAMA_31_8B, MISTRAL_7B, QWEN_25_05B, config_of, model_configs
from tiny_models import VARIANTS, save_variant

from llmq import memory
from llmq.checkpoint.config import ModelConfig, read_config
from llmq.checkpoint.tensors import Tensors
from llmq.errors import USAGE, LlmqError
from llmq.scheme import E4M3, GROUP_SIZES, NF4, Scheme

GIB = 2**30
BATCHES, TOKENS, KV_DTYPES = (
    st.integers(1, 512),
    st.integers(1, 200_000),
    st.sampled_from(sorted(memory.KV_DTYPE_BYTES)),
)
BLOCK_SIZES = st.integers(1, 16).map(lambda number: 16 * number)
SCHEMES = st.builds(Scheme, st.sampled_from([4, 8]), st.sampled_from(GROUP_SIZES), st.booleans())


# Known sizes


@pytest.mark.parametrize(
    ("fields", "parameters", "kv_bytes_per_token", "textbook_ratio"),
    [
        # Parameters as transformers counts them; bf16 keys and values of one token in all layers.
        pytest.param(LLAMA_2_7B, 6_738_415_616, 524_288, 1, id="Llama-2-7B"),
        pytest.param(LLAMA_31_8B, 8_030_261_248, 131_072, 4, id="Llama-3.1-8B"),
        pytest.param(QWEN_25_05B, 494_032_768, 12_288, 7, id="Qwen2.5-0.5B"),
        pytest.param(MISTRAL_7B, 7_241_732_096, 131_072, 4, id="Mistral-7B"),
    ],
)
def test_known_models_have_their_known_sizes(
    tmp_path: Path, fields: dict[str, Any], parameters: int, kv_bytes_per_token: int, textbook_ratio: int
) -> None:
    config = config_of(tmp_path, fields)
    assert memory.weight_bytes(config, None, config.dtype_bytes) == 2 * parameters
    assert memory.kv_bytes_per_token(config, "bfloat16") == kv_bytes_per_token
    textbook = memory.textbook_kv_bytes(3, 1024, config.num_layers, config.hidden_size, 2)
    assert textbook == textbook_ratio * memory.kv_bytes(config, 3, 1024, 64, "bfloat16")


def test_llama_2_7b_caches_two_gibibytes_of_4096_tokens_by_the_textbook() -> None:
    assert memory.textbook_kv_bytes(batch=1, max_tokens=4096, layers=32, d_model=4096, dtype_bytes=2) == 2 * GIB


@pytest.mark.parametrize(("scheme", "gib"), [(Scheme(4, 128), 5.33), (Scheme(8, -1), 8.46)])
def test_quantized_llama_31_8b_has_its_known_size(tmp_path: Path, scheme: Scheme, gib: float) -> None:
    config = config_of(tmp_path, LLAMA_31_8B)
    assert memory.weight_bytes(config, scheme, 2) / GIB == pytest.approx(gib, abs=0.01)


@pytest.mark.parametrize(
    "extra",
    [
        {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
        {"architectures": ["MistralForCausalLM"], "head_dim": 32},
        {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
        {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "attention_bias": True},
        {"architectures": ["Phi3ForCausalLM"], "pad_token_id": None},
        {"architectures": ["Gemma2ForCausalLM"], "head_dim": 32},
        {"architectures": ["Gemma3ForCausalLM"], "head_dim": 32, "tie_word_embeddings": False},
        {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
        {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 10, "moe_intermediate_size": 32},
    ],
    ids=lambda extra: extra["architectures"][0],
)
def test_weights_are_as_many_as_transformers_makes(tmp_path: Path, extra: dict[str, Any]) -> None:
    import torch
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 50}
    fields = sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16} | extra
    model_class = getattr(transformers, extra["architectures"][0])
    with torch.device("meta"):
        model = model_class(model_class.config_class(**fields))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert memory.weight_bytes(config_of(tmp_path, fields), None, 2) == 2 * parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_as_many_bytes_as_transformers_writes(tmp_path: Path, variant: str) -> None:
    folder = save_variant(tmp_path, variant)
    config = read_config(folder)
    assert memory.weight_bytes(config, None, config.dtype_bytes) == Tensors(folder).num_bytes


def test_a_quantized_linear_is_codes_scales_zero_points_and_group_index() -> None:
    codes, scales, zero_points, group_index = 256 * 512 // 2, 4 * 256 * 2, 4 * 256 // 2, 512 * 4
    size = memory.linear_bytes(out_features=256, in_features=512, scheme=Scheme(4, 128), dtype_bytes=2)
    assert size == codes + scales + zero_points + group_index


def test_a_linear_whose_inputs_the_groups_do_not_divide_stays_dense() -> None:
    assert memory.linear_bytes(8, 100, Scheme(4, 32), 2) == 8 * 100 * 2


# Blocks


def test_sequences_take_whole_blocks_and_a_budget_holds_whole_blocks(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA_31_8B)
    block = memory.block_bytes(config, 64, "bfloat16")
    assert block == 64 * 131_072
    assert memory.kv_bytes(config, 2, 64, 64, "bfloat16") == 2 * block
    assert memory.kv_bytes(config, 2, 65, 64, "bfloat16") == 4 * block
    assert memory.pool_blocks(5 * block - 1, config, 64, "bfloat16") == 4
    assert memory.pool_blocks(5 * block, config, 64, "bfloat16") == 5


# Laws


@given(model_configs(), BATCHES, TOKENS, BLOCK_SIZES, KV_DTYPES)
def test_kv_cache_grows_with_batch_tokens_layers_and_bytes(
    config: ModelConfig, batch: int, tokens: int, block_size: int, kv_dtype: str
) -> None:
    size = memory.kv_bytes(config, batch, tokens, block_size, kv_dtype)
    deeper = replace(config, num_layers=config.num_layers + 1)
    assert memory.kv_bytes(config, batch + 1, tokens, block_size, kv_dtype) > size
    assert memory.kv_bytes(config, batch, tokens + 1, block_size, kv_dtype) >= size
    assert memory.kv_bytes(config, batch, tokens + block_size, block_size, kv_dtype) > size
    assert memory.kv_bytes(deeper, batch, tokens, block_size, kv_dtype) > size
    assert memory.kv_bytes(config, batch, tokens, block_size, "float32") >= size
    assert memory.kv_bytes(config, batch, tokens, block_size, "fp8") <= size


@given(model_configs(), BATCHES, TOKENS, BLOCK_SIZES, KV_DTYPES)
def test_a_sequence_wastes_less_than_a_block(
    config: ModelConfig, batch: int, tokens: int, block_size: int, kv_dtype: str
) -> None:
    content = batch * tokens * memory.kv_bytes_per_token(config, kv_dtype)
    waste = memory.kv_bytes(config, batch, tokens, block_size, kv_dtype) - content
    assert 0 <= waste < batch * memory.block_bytes(config, block_size, kv_dtype)


@given(model_configs(), BATCHES, st.integers(1, 1000), BLOCK_SIZES, st.sampled_from(["fp8", "bfloat16", "float32"]))
def test_grouped_query_attention_never_caches_more_than_the_textbook(
    config: ModelConfig, batch: int, blocks: int, block_size: int, kv_dtype: str
) -> None:
    assert config.num_kv_heads * config.head_dim <= config.hidden_size
    tokens = blocks * block_size
    textbook = memory.textbook_kv_bytes(
        batch, tokens, config.num_layers, config.hidden_size, memory.KV_DTYPE_BYTES[kv_dtype]
    )
    real = memory.kv_bytes(config, batch, tokens, block_size, kv_dtype)
    assert real * (config.num_heads // config.num_kv_heads) == textbook


@given(model_configs(), SCHEMES)
def test_a_quantized_model_is_smaller_and_fewer_bits_are_smaller_still(config: ModelConfig, scheme: Scheme) -> None:
    assume(all(scheme.divides(inp) for _, inp in config.linears.values()))
    assume(min(out for out, _ in config.linears.values()) >= 64)
    dense = memory.weight_bytes(config, None, 2)
    eight = memory.weight_bytes(config, replace(scheme, bits=8), 2)
    four = memory.weight_bytes(config, replace(scheme, bits=4), 2)
    assert four < eight < dense


@given(model_configs(), st.integers(1, 10_000), BATCHES, st.sampled_from([2, 4]))
def test_activations_grow_with_tokens_and_rows(config: ModelConfig, tokens: int, rows: int, dtype_bytes: int) -> None:
    size = memory.activation_bytes(config, tokens, rows, dtype_bytes)
    assert memory.activation_bytes(config, tokens + 1, rows, dtype_bytes) > size
    assert memory.activation_bytes(config, tokens, rows + 1, dtype_bytes) >= size
    assert size >= rows * config.vocab_size * 4


@pytest.mark.parametrize("variant", ["llama", "gemma2", "gemma3"])
def test_norms_with_an_offset_are_kept_in_fp32(tmp_path: Path, variant: str) -> None:
    import torch

    from llmq.runtime.linear import resident_bytes
    from llmq.runtime.loader import load_decoder, open_source

    folder = save_variant(tmp_path, variant)
    config = read_config(folder)
    loaded = resident_bytes(load_decoder(open_source(folder, "cpu", torch.bfloat16)))
    assert loaded == memory.weight_bytes(config, None, 2) + memory.offset_norm_bytes(config, 2)


# Units


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 2**20),
        ("512MiB", 512 * 2**20),
        ("80GB", 80 * 10**9),
        ("80gib", 80 * 2**30),
        ("1.5 KiB", 1536),
        ("24G", 24 * 2**30),
        ("7b", 7),
    ],
)
def test_sizes_are_read_in_units_of_1000_and_1024(text: str, size: int) -> None:
    assert memory.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1.2.3", "12 parsecs", "1e9", "nan", "9" * 400, "8388608TiB"])
def test_what_is_no_size_is_a_usage_error_that_shows_how_to_write_one(text: str) -> None:
    with pytest.raises(LlmqError, match="not a size") as caught:
        memory.parse_bytes(text)
    assert caught.value.exit_code == USAGE
    assert "512MiB" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (-(3 * 2**30), "-3.00 GiB"), (2**50, "1048576.00 GiB")],
)
def test_sizes_are_written_in_the_unit_that_fits(size: int, text: str) -> None:
    assert memory.format_bytes(size) == text


# On the device


PACKED = [
    Scheme(4, 128),
    Scheme(4, 32, symmetric=False),
    Scheme(3, 64),
    Scheme(8, -1),
    Scheme(8, -1, activation_bits=8),
    Scheme(8, -1, number=E4M3, activation_bits=8),
    Scheme(4, 64, number=NF4),
]


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [(scheme, shape) for scheme in PACKED for shape in ((96, 256), (32, 192)) if scheme.divides(shape[1])],
    ids=str,
)
def test_a_linear_layer_takes_what_the_kernels_pack_it_into(scheme: Scheme, shape: tuple[int, int]) -> None:
    from dataclasses import astuple

    import torch

    from llmq.checkpoint.quantized_weight import QuantizedWeight
    from llmq.runtime.kernels.w8a8 import pack_w8a8
    from llmq.runtime.kernels.wna16 import pack_wna16

    groups = shape[0], scheme.num_groups(shape[1])
    codes, zero_points = torch.zeros(shape, dtype=torch.uint8), torch.zeros(groups, dtype=torch.uint8)
    weight = QuantizedWeight(scheme, codes, torch.ones(groups), zero_points)
    packed = pack_w8a8(weight) if scheme.activation_bits == 8 else pack_wna16(weight, torch.bfloat16)
    size = sum(value.nbytes for value in astuple(packed) if isinstance(value, torch.Tensor))
    assert memory.resident_linear_bytes(*shape, scheme, 2) == size
