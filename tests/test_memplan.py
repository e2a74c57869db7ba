"""The planner: a verdict, sizes that add up, inverse questions that agree with the forward ones. No torch."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import llmq
from hypothesis import assume, given
from hypothesis import strategies as st
from known_models import LLAMA_2_7B, LLAMA_31_8B, QWEN_25_05B, config_of, write_config
from rich.console import Console
from small_configs import SMALL

from llmq import memory
from llmq.checkpoint.tensors import TensorInfo
from llmq.engine.blocks import BlockManager
from llmq.engine.options import EngineOptions
from llmq.errors import CHECK_FAILED, USAGE, LlmqError
from llmq.memory import KV_DTYPE_BYTES, format_bytes
from llmq.memplan import engines, gpu, report
from llmq.memplan.describe import describe
from llmq.memplan.engines import ENGINES
from llmq.memplan.hints import changes_that_fit
from llmq.memplan.plan import MOST, Load, MemoryPlan, plan
from llmq.memplan.quantization import QuantizationPlan, plan_quantization
from llmq.memplan.solve import QUESTIONS, solve
from llmq.memplan.source import Model, open_model
from llmq.plan import layer_groups
from llmq.quant.schemes import PRESETS
from llmq.scheme import Scheme

GIB = 2**30
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
SCHEMES = {name: preset.scheme for name, preset in PRESETS.items()}
MODELS = {
    name: Model(describe({"model_type": kind, "dtype": "bfloat16"} | fields)) for name, (kind, fields) in SMALL.items()
}
LLAMA = Model(describe(LLAMA_31_8B))


@st.composite
def plans(draw: st.DrawFn) -> MemoryPlan:
    """Plans of every architecture and engine, on GPUs of which many are too small."""
    model = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    limit = model.architecture.context_length or 4096
    return plan(
        model,
        scheme=draw(st.none() | st.sampled_from(sorted(SCHEMES)).map(SCHEMES.__getitem__)),
        load=Load(
            draw(st.integers(1, 300)), draw(st.integers(1, limit)), draw(st.sampled_from(["auto", *KV_DTYPE_BYTES]))
        ),
        options=EngineOptions(block_size=16 * draw(st.integers(1, 8)), max_num_batched_tokens=512),
        engine=draw(st.sampled_from(ENGINES)),
        num_gpus=draw(st.sampled_from([1, 2, 4, 8])),
        gpu_memory=draw(st.integers(2**20, 2**32)),
    )


# The plan


def test_the_total_is_weights_and_cache_and_reserved_block_and_activations_and_context(tmp_path: Path) -> None:
    result = plan(LLAMA, load=Load(batch_size=4, max_model_len=8192), gpu_memory=24 * GIB)
    activations = memory.activation_bytes(config_of(tmp_path, LLAMA_31_8B), 8192, 256, 2)
    assert result.weights.resident == 2 * 8_030_261_248
    assert result.kv_cache == 4 * 8192 * 131_072
    assert result.textbook_kv_cache == 4 * result.kv_cache
    assert result.reserved == 64 * 131_072
    assert result.activations.likely == activations
    assert result.total == 2 * 8_030_261_248 + 4 * 8192 * 131_072 + 64 * 131_072 + activations + engines.CONTEXT
    assert result.budget == int(0.9 * 24 * GIB)
    assert result.spare == result.budget - result.total
    assert sum(report.parts(result).values()) == result.total


@pytest.mark.parametrize(
    ("engine", "gpu_memory", "tokens"),
    [
        ("llmq", None, 2048),
        ("llmq", 24 * GIB, 8192),
        ("llmq", 80 * GIB, 8192),
        ("vllm", 24 * GIB, 8192),
        ("vllm", 80 * GIB, 16384),
    ],
)
def test_a_step_is_as_long_as_the_engine_makes_it_on_such_a_machine_unless_told_otherwise(
    engine: str, gpu_memory: int | None, tokens: int
) -> None:
    assert plan(LLAMA, engine=engine, gpu_memory=gpu_memory).max_num_batched_tokens == tokens
    told = EngineOptions(max_num_batched_tokens=100)
    assert plan(LLAMA, engine=engine, gpu_memory=gpu_memory, options=told).max_num_batched_tokens == 100


def test_a_narrower_cache_than_the_model_takes_as_much_less() -> None:
    sizes = {name: plan(LLAMA, load=Load(kv_cache_dtype=name)).kv_cache for name in KV_DTYPE_BYTES}
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 4 * sizes["fp8"]
    # 2 · (128 codes + 4 bytes of scale) for each head: 264 bytes instead of 512.
    assert sizes["int8"] * 512 == sizes["bfloat16"] * 264


def test_weights_in_fp8_do_not_mean_a_cache_in_fp8_unless_the_folder_has_its_scales() -> None:
    fields = {"quant_method": "compressed-tensors"}
    weights_only = Model(describe(LLAMA_31_8B | {"quantization_config": fields}))
    both = Model(describe(LLAMA_31_8B | {"quantization_config": fields | {"kv_cache_scheme": {"num_bits": 8}}}))
    assert [plan(model, engine="vllm").kv_dtype for model in (weights_only, both)] == ["bfloat16", "fp8"]


def test_without_a_gpu_there_are_sizes_and_no_verdict() -> None:
    result = plan(Model(describe(QWEN_25_05B)))
    assert result.total > 0
    assert (result.budget, result.spare, result.fits, result.max_concurrency, result.max_context) == (None,) * 5
    assert changes_that_fit(result, SCHEMES) == []


def test_sequences_beyond_the_models_context_are_refused_with_the_flag_that_mends_it() -> None:
    with pytest.raises(LlmqError, match="context is 32,768 tokens") as caught:
        plan(Model(describe(QWEN_25_05B)), load=Load(max_model_len=32769))
    assert caught.value.exit_code == USAGE
    assert "--max-model-len 32768" in (caught.value.hint or "")


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"max_model_len": 0}, {"kv_cache_dtype": "int4"}])
def test_a_load_that_makes_no_sense_is_a_usage_error(fields: dict[str, Any]) -> None:
    with pytest.raises(LlmqError) as caught:
        Load(**fields)
    assert caught.value.exit_code == USAGE


@pytest.mark.parametrize("fields", [{"engine": "sglang"}, {"num_gpus": 0}, {"num_gpus": 3}, {"gpu_memory": 0}])
def test_a_machine_that_makes_no_sense_is_a_usage_error(fields: dict[str, Any]) -> None:
    with pytest.raises(LlmqError) as caught:
        plan(LLAMA, **fields)
    assert caught.value.exit_code == USAGE


# Engines


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_llmq_plans_for_as_many_blocks_as_its_engine_lets_a_request_have(name: str) -> None:
    result = plan(MODELS[name], load=Load(max_model_len=100), options=EngineOptions(block_size=16))
    windows = [group.window for group in layer_groups(result.architecture.windows)]
    manager = BlockManager(10**4, 16, windows=windows)
    block_bytes = 16 * result.kv_bytes_per_token // len(windows)
    assert result.kv_cache == manager.worst_case(1, 100, 1) * block_bytes
    assert result.reserved == memory.RESERVED_BLOCKS * block_bytes


def test_ideal_keeps_a_window_vllm_also_a_step_and_llmq_all() -> None:
    """Gemma-3-27B, 32,768 tokens: 10 layers keep all; of 52 the ideal is 1,024, and vLLM's 1,023 + 2,048 and a block
    more, of as many layers as make whole groups of 10."""
    fields = {"num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}
    model = Model(describe({"model_type": "gemma3_text", "dtype": "bfloat16", "sliding_window": 1024} | fields))
    caches = {
        engine: plan(
            model,
            engine=engine,
            load=Load(max_model_len=32768),
            options=EngineOptions(block_size=16, max_num_batched_tokens=2048),
        ).kv_cache
        for engine in ENGINES
    }
    a_layer = 2 * 16 * 128 * 2
    assert caches["ideal"] == a_layer * (10 * 32768 + 52 * 1024)
    assert caches["vllm"] == a_layer * (10 * 32768 + 60 * (192 + 1) * 16)
    assert caches["llmq"] == a_layer * 62 * 32768


VLLM_LOG = {
    "w4a16": (5.39, 1.75, 970_400),
    "w8a8": (8.52, 1.96, 943_008),
    "fp8": (8.55, 1.78, 944_256),
}
"""Llama-3.1-8B on an H200 of 139.8 GiB at 0.9: GiB of weights and of activations, tokens of KV cache."""


def vllm_plan(scheme: str) -> MemoryPlan:
    options = EngineOptions(block_size=16, max_num_batched_tokens=16384)
    memory_ = int(139.8 * GIB)
    return plan(LLAMA, scheme=SCHEMES[scheme], engine="vllm", load=Load(1, 4096), options=options, gpu_memory=memory_)


@pytest.mark.parametrize("scheme", VLLM_LOG)
def test_vllm_has_as_many_tokens_of_cache_as_its_own_log_says(scheme: str) -> None:
    weights, _, tokens = VLLM_LOG[scheme]
    result = vllm_plan(scheme)
    assert result.weights.resident / GIB == pytest.approx(weights, rel=0.015)
    assert result.kv_tokens == pytest.approx(tokens, rel=0.005)


@pytest.mark.parametrize("scheme", VLLM_LOG)
def test_activations_fitted_to_two_of_vllms_schemes_predict_the_third(scheme: str) -> None:
    others = [activations for name, (_, activations, _) in VLLM_LOG.items() if name != scheme]
    result = vllm_plan(scheme)
    refitted = result.activations.likely - sum(others) / len(others) * GIB
    tokens = (result.kv_tokens or 0) + refitted / result.kv_bytes_per_token
    assert tokens == pytest.approx(VLLM_LOG[scheme][2], rel=0.015)


# Inverse questions


@given(plans())
def test_the_longest_context_fits_and_one_more_block_does_not(result: MemoryPlan) -> None:
    longest = result.max_context
    assert longest is not None
    assert longest % result.block_size == 0
    assert longest == 0 or replace(result, max_model_len=longest).fits
    if longest + result.block_size <= MOST:
        assert not replace(result, max_model_len=longest + 1).fits
        assert result.fits is (result.max_model_len <= longest)


@given(plans())
def test_as_many_sequences_as_fit_fit_and_one_more_does_not(result: MemoryPlan) -> None:
    most = result.max_concurrency
    assert most is not None
    assert most == 0 or replace(result, batch_size=most).fits
    if most < MOST:
        assert not replace(result, batch_size=most + 1).fits
        assert result.fits is (result.batch_size <= most)


@given(plans())
def test_as_many_gpus_as_are_needed_are_enough_and_half_of_them_are_not(result: MemoryPlan) -> None:
    count = result.gpus_needed
    assume(count is not None)
    assert count is not None
    assert replace(result, num_gpus=count).fits
    assert count == 1 or not replace(result, num_gpus=count // 2).fits


@given(plans())
def test_a_gpu_of_the_size_that_is_needed_is_large_enough(result: MemoryPlan) -> None:
    assert replace(result, gpu_memory=result.gpu_gib_needed * GIB).fits


@given(plans(), st.sampled_from(sorted(QUESTIONS)))
def test_what_an_answer_says_its_plan_does(result: MemoryPlan, question: str) -> None:
    answer = solve(result, question, SCHEMES)
    limit = result.architecture.context_length or MOST
    if answer.value is None:
        assert not answer.plan.fits
    elif question != "context" or answer.value != limit:
        assert answer.plan.fits
    values = {"context": answer.plan.max_model_len, "concurrency": answer.plan.batch_size, "gpus": answer.plan.num_gpus}
    assert answer.value is None or values.get(question, answer.value) == answer.value


def test_of_the_schemes_that_fit_the_one_with_most_bits_comes_first() -> None:
    on_a_3090 = plan(LLAMA, load=Load(max_model_len=8192), gpu_memory=int(14 * GIB))
    answer = solve(on_a_3090, "scheme", SCHEMES)
    assert not on_a_3090.fits
    assert answer.plan.weights.on_disk == max(
        changed.weights.on_disk for scheme in SCHEMES.values() if (changed := replace(on_a_3090, scheme=scheme)).fits
    )


# Laws


@given(plans(), st.integers(1, 100))
def test_more_of_anything_takes_no_less(result: MemoryPlan, more: int) -> None:
    cached = any(layer.token_elements for layer in result.architecture.layers)
    assert replace(result, batch_size=result.batch_size + more).total > result.total
    assert replace(result, max_model_len=result.max_model_len + more).total >= result.total
    assert replace(result, max_num_batched_tokens=result.max_num_batched_tokens + more).total >= result.total
    assert replace(result, max_num_seqs=result.max_num_seqs + more).total >= result.total
    assert replace(result, kv_dtype="float32").total >= replace(result, kv_dtype="int8").total
    assert (replace(result, kv_dtype="fp8").kv_cache < replace(result, kv_dtype="bfloat16").kv_cache) is cached


@given(plans())
def test_gpus_together_hold_no_less_than_one_and_each_no_more(result: MemoryPlan) -> None:
    alone = replace(result, num_gpus=1)
    for one, all_ in ((result.weights.resident, alone.weights.resident), (result.kv_cache, alone.kv_cache)):
        assert one <= all_ <= result.num_gpus * one


@given(plans())
def test_the_ideal_is_the_least_of_all_engines(result: MemoryPlan) -> None:
    ideal = replace(result, engine="ideal", block_size=1)
    assert all(ideal.kv_cache <= replace(result, engine=engine).kv_cache for engine in ENGINES)


@given(st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(1, 4096))
def test_grouped_queries_keep_no_more_than_the_textbook_says(kv_heads: int, tokens: int) -> None:
    model = Model(describe(LLAMA_2_7B | {"num_key_value_heads": kv_heads}))
    result = plan(model, engine="ideal", load=Load(max_model_len=tokens))
    assert result.textbook_kv_cache == 32 // kv_heads * result.kv_cache


@given(plans())
def test_the_parts_of_the_weights_are_all_of_them_and_the_bar_is_as_wide_as_the_budget(result: MemoryPlan) -> None:
    weights = result.weights
    assert weights.on_disk == weights.quantized + weights.scales + weights.unquantized
    assert report.bar(result).index("]") == report.BAR_WIDTH + 1
    assert all(size >= 0 for size in report.parts(result).values())


# What would make it fit


@given(plans())
def test_every_change_that_is_offered_makes_the_plan_fit_and_says_what_it_takes(result: MemoryPlan) -> None:
    assume(result.fits is False)
    changes = {change.flag.split()[0]: change for change in changes_that_fit(result, SCHEMES)}
    assert {"--gpu", "--gpu-memory"} & set(changes)
    if "--max-model-len" in changes:
        shorter = int(changes["--max-model-len"].flag.split()[1])
        assert 0 < shorter < result.max_model_len
        assert replace(result, max_model_len=shorter).total == changes["--max-model-len"].total
    for change in changes.values():
        assert change.price
        assert change.total <= result.total


@given(plans())
def test_a_plan_that_fits_needs_no_change(result: MemoryPlan) -> None:
    assume(result.fits)
    assert changes_that_fit(result, SCHEMES) == []


# Weights


def tensor(*shape: int, dtype: str = "BF16", num_bytes: int = 0) -> TensorInfo:
    return TensorInfo(Path("model.safetensors"), dtype, shape, num_bytes)


def test_weights_in_the_folder_are_counted_from_their_headers() -> None:
    tensors = {"a.weight": tensor(num_bytes=1000), "b.weight": tensor(num_bytes=500)}
    weights = plan(Model(describe(QWEN_25_05B), tensors)).weights
    assert (weights.on_disk, weights.parameters, weights.stored, weights.scheme) == (1500, 750, True, None)


def test_a_tied_head_that_is_stored_as_well_is_loaded_once() -> None:
    tensors = {"model.embed_tokens.weight": tensor(num_bytes=1000), "lm_head.weight": tensor(num_bytes=1000)}
    tied, untied = QWEN_25_05B, QWEN_25_05B | {"tie_word_embeddings": False}
    sizes = [(w.on_disk, w.resident) for w in (plan(Model(describe(c), tensors)).weights for c in (tied, untied))]
    assert sizes == [(2000, 1000), (2000, 2000)]


def test_codes_scales_and_the_rest_of_a_quantized_folder_are_told_apart() -> None:
    tensors = {
        "a.qweight": tensor(dtype="I32", num_bytes=400),
        "a.scales": tensor(dtype="F16", num_bytes=30),
        "a.qzeros": tensor(dtype="I32", num_bytes=20),
        "a.g_idx": tensor(dtype="I32", num_bytes=10),
        "b.weight": tensor(dtype="I8", num_bytes=200),
        "b.weight_scale": tensor(dtype="BF16", num_bytes=8),
        "c.weight": tensor(dtype="U8", num_bytes=100),
        "c.weight.absmax": tensor(dtype="F32", num_bytes=4),
        "c.weight.quant_state.bitsandbytes__nf4": tensor(dtype="U8", num_bytes=70),
        "experts.down_proj_blocks": tensor(dtype="U8", num_bytes=90),
        "experts.down_proj_scales": tensor(dtype="U8", num_bytes=9),
        "f.weight": tensor(dtype="F8_E4M3", num_bytes=10),
        "f.weight_scale_inv": tensor(dtype="F32", num_bytes=4),
        "router.per_expert_scale": tensor(num_bytes=2),
        "norm.weight": tensor(num_bytes=2),
        "c.bias": tensor(num_bytes=6),
    }
    weights = plan(Model(describe(LLAMA_31_8B | {"quantization_config": GPTQ}), tensors)).weights
    assert (weights.quantized, weights.scales, weights.unquantized) == (800, 155, 10)
    assert weights.parameters == 8_030_261_248


def test_without_files_the_size_is_computed_in_the_scheme_of_the_config() -> None:
    stored = plan(Model(describe(LLAMA_31_8B | {"quantization_config": GPTQ}))).weights
    assert stored == plan(LLAMA, scheme=Scheme(4, 128)).weights
    assert stored.on_disk / GIB == pytest.approx(5.33, abs=0.01)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "fp8"}, "'fp8'"),
        (GPTQ | {"bits": "four"}, "'four' bits"),
        (GPTQ | {"dynamic": {r"+:.*\.down_proj": {"bits": 8}}}, "not every layer has the same scheme"),
    ],
    ids=["no formula", "damaged", "several schemes"],
)
def test_without_files_what_no_formula_covers_is_refused(quantization: dict[str, Any], reason: str) -> None:
    result = plan(Model(describe(LLAMA_31_8B | {"quantization_config": quantization})))
    with pytest.raises(LlmqError, match=reason):
        _ = result.weights


@pytest.mark.parametrize("name", SCHEMES)
def test_planned_weights_are_what_the_formulas_of_the_engine_add_up_to(tmp_path: Path, name: str) -> None:
    config, scheme = config_of(tmp_path, LLAMA_31_8B), SCHEMES[name]
    weights = plan(LLAMA, scheme=scheme).weights
    assert weights.on_disk == memory.weight_bytes(config, scheme, 2)
    packed = sum(memory.resident_linear_bytes(*shape, scheme, 2) for shape in config.linears.values())
    assert weights.resident == weights.unquantized + 32 * packed


def test_long_steps_widen_weights_of_few_bits_and_those_of_folders_of_several_schemes_may_be_such(
    tmp_path: Path,
) -> None:
    mixed = GPTQ | {"dynamic": {r"+:.*\.down_proj": {"bits": 8}}}
    eight = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}, "targets": ["Linear"]}
    eight["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    rounded = {"quant_method": "compressed-tensors", "config_groups": {"group_0": eight}}

    def widened(name: str, quantization: dict[str, Any] | None, tokens: int) -> int:
        model = open_model(str(write_config(tmp_path / name, LLAMA_31_8B | {"quantization_config": quantization})))
        stored, options = replace(model, tensors={}), EngineOptions(max_num_batched_tokens=tokens)
        return plan(stored, options=options).activations.likely - plan(LLAMA, options=options).activations.likely

    gate_up = 2 * 14336 * 4096 * 2
    assert [widened("plain", None, 2048), widened("w8a8", rounded, 2048)] == [0, 0]
    assert [widened("w4", GPTQ, 2048), widened("mixed", mixed, 2048)] == [gate_up, gate_up]
    assert widened("few", GPTQ, memory.FUSED_ROWS) == 0


# Quantizing


def test_quantizing_without_data_takes_less_than_with_it_and_the_disk_the_same() -> None:
    plans_ = [
        plan_quantization(LLAMA, Scheme(), method, calibrated=method != "rtn", samples=128, seqlen=2048)
        for method in ("rtn", "gptq", "autoround")
    ]
    assert plans_[0].device < plans_[1].device < plans_[2].device
    assert plans_[0].states == 0 < plans_[1].states
    assert {plan_.disk for plan_ in plans_} == {plan(LLAMA, scheme=Scheme()).weights.on_disk}


def test_hidden_states_grow_with_the_text_and_what_is_on_the_device_does_not() -> None:
    short, long = (
        plan_quantization(LLAMA, Scheme(), "gptq", calibrated=True, samples=samples, seqlen=2048)
        for samples in (128, 256)
    )
    assert long.states == 2 * short.states
    assert long.device == short.device


def test_hidden_states_that_pass_a_gpu_are_pinned_batch_by_batch_in_powers_of_two() -> None:
    def planned(hidden_size: int, samples: int) -> QuantizationPlan:
        model = Model(describe(LLAMA_31_8B | {"hidden_size": hidden_size}))
        return plan_quantization(model, Scheme(), "gptq", calibrated=True, samples=samples, seqlen=2048)

    even, odd, short = planned(4096, 128), planned(5120, 128), planned(4096, 3)
    assert even.pinned == even.states == 2 * 128 * 2048 * 4096 * 2
    assert (
        odd.states < odd.pinned == 64 * 2 * 2**26
    )  # 64 batches of 40 MiB at the entrance, and of 40 between the steps
    assert short.pinned == 2 * 2 * 2**25  # two windows, and one


def test_what_is_quantized_already_is_not_quantized_again() -> None:
    model = Model(describe(LLAMA_31_8B | {"quantization_config": GPTQ}))
    with pytest.raises(LlmqError, match="already"):
        plan_quantization(model, Scheme(), "rtn", calibrated=False, samples=1, seqlen=1)


def test_an_empty_quantization_config_says_nothing() -> None:
    """As everywhere else: such a folder is inspected, run and quantized as a plain one."""
    assert describe(LLAMA_31_8B | {"quantization_config": {}}).quantization is None


# The GPU


def test_gpus_are_read_from_nvidia_smi_and_one_that_hides_its_memory_is_left_out() -> None:
    answer = "NVIDIA H200, 143771, 570.86.15\nGPU, with a comma, 24564, 570.86.15\nNVIDIA GB10, [N/A], 580.1\n\n"
    assert gpu.parse_gpus(answer) == [
        gpu.Gpu("NVIDIA H200", 143771 * 2**20, "570.86.15"),
        gpu.Gpu("GPU, with a comma", 24564 * 2**20, "570.86.15"),
    ]


def test_of_a_known_gpu_what_cuda_hands_out_is_counted() -> None:
    h200, other = gpu.parse_gpus("NVIDIA H200, 143771, 580\nNVIDIA X9000, 8192, 580")
    assert gpu.usable_memory(h200) == int(139.8 * GIB) < h200.memory
    assert gpu.usable_memory(other) == other.memory


@pytest.mark.parametrize(
    ("line", "gib"),
    [
        ("NVIDIA H100 80GB HBM3, 81559, 580", 79.1),
        ("NVIDIA A100-SXM4-80GB, 81920, 580", 79.1),
        ("NVIDIA A100-SXM4-40GB, 40960, 580", 39.4),
        ("Tesla V100-SXM2-32GB, 32768, 580", 31.7),
        ("NVIDIA RTX 6000 Ada Generation, 49140, 580", 47.4),
        ("NVIDIA GeForce RTX 4060 Ti, 16380, 580", 15.5),
        ("NVIDIA GeForce RTX 4090 Laptop GPU, 16376, 580", 16376 / 1024),  # is no RTX 4090
    ],
)
def test_a_gpu_is_known_by_the_name_that_nvidia_smi_gives_it(line: str, gib: float) -> None:
    assert gpu.usable_memory(*gpu.parse_gpus(line)) == int(gib * GIB)


def test_where_there_is_no_nvidia_smi_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "QUERY", ("there-is-no-such-program",))
    assert gpu.detect_gpus() == []
    assert gpu.first_gpu_memory() is None


@pytest.mark.parametrize(
    "name", ["h200", "NVIDIA H200", "H100", "NVIDIA GeForce RTX 4090", "4090", "A100-SXM-80GB", "l40s"]
)
def test_a_gpu_has_many_names(name: str) -> None:
    assert gpu.named_memory(name) in {int(gib * GIB) for gib in gpu.USABLE_GIB.values()}


@pytest.mark.parametrize(("name", "hint"), [("a100", "which"), ("h2000", "did you mean h200?"), ("", "--list-gpus")])
def test_a_name_of_no_gpu_or_of_several_is_refused(name: str, hint: str) -> None:
    with pytest.raises(LlmqError) as caught:
        gpu.named_memory(name)
    assert hint in (caught.value.hint or "")
    assert caught.value.exit_code == USAGE


# The command


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.cli.memplan.first_gpu_memory", lambda: None)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_config(tmp_path / "llama", LLAMA_31_8B)


def test_the_first_line_answers_the_question_and_the_exit_code_repeats_it(llama: Path) -> None:
    fits = llmq("memplan", llama, "--gpu-memory", "80GiB", "--max-model-len", 8192)
    too_large = llmq("memplan", llama, "--gpu", "rtx-4090")
    unknown = llmq("memplan", llama)
    assert fits.out.startswith("fits: ")
    assert too_large.out.startswith("does not fit: ")
    assert "--gpu-memory" in unknown.out.splitlines()[0]
    assert (fits.code, too_large.code, unknown.code) == (0, CHECK_FAILED, 0)


def test_what_does_not_fit_is_told_which_change_would_and_its_price(llama: Path) -> None:
    hints = llmq("memplan", llama, "--gpu-memory", "24GiB").err.splitlines()
    length = next(hint for hint in hints if "--max-model-len" in hint)
    assert "instead of 131,072" in length
    assert llmq("memplan", llama, "--gpu-memory", "24GiB", "--max-model-len", length.split()[2]).code == 0


def test_where_neither_weights_nor_cache_are_small_enough_alone_both_are_tried(llama: Path) -> None:
    hints = llmq("memplan", llama, "--gpu", "rtx-4090").err.splitlines()
    both = next(hint for hint in hints if "--scheme" in hint).split()
    assert (both[1], both[3]) == ("--scheme", "--kv-cache-dtype")
    assert llmq("memplan", llama, "--gpu", "rtx-4090", *both[1:3]).code == CHECK_FAILED
    assert llmq("memplan", llama, "--gpu", "rtx-4090", *both[3:5]).code == CHECK_FAILED
    assert llmq("memplan", llama, "--gpu", "rtx-4090", *both[1:5]).code == 0


def test_a_config_alone_will_do(llama: Path) -> None:
    folder, file = (json.loads(llmq("memplan", path, "--json").out) for path in (llama, llama / "config.json"))
    assert folder["weights"] == file["weights"]


def test_json_is_one_object_with_sizes_in_whole_bytes(llama: Path) -> None:
    result = json.loads(llmq("memplan", llama, "--gpu-memory", "80GB", "--batch-size", 2, "--json").out)
    assert result["schema"] == "llmq.memplan/2"
    assert result["fits"] is True
    assert result["parameters"] == 8_030_261_248
    assert result["gpu_memory"] == 80 * 10**9
    assert result["kv"]["bytes_per_token"] == 131_072
    assert result["kv"]["bytes_per_sequence_fixed"] == 0
    assert result["kv"]["naive_total"] == 4 * result["kv"]["total"]
    assert result["kv"]["layers"] == [
        {
            "kind": "full",
            "count": 32,
            "kv_heads": 8,
            "elements_per_token": 2048,
            "elements_per_sequence": 0,
            "window": None,
            "bytes": 131072 * 4096,
        }
    ]
    assert set(result["weights"]) >= {"on_disk", "resident", "quantized", "unquantized", "scales"}
    assert result["activations"]["low"] <= result["activations"]["likely"] <= result["activations"]["high"]
    sizes = (result["weights"]["resident"], result["kv"]["total"], result["kv"]["reserved"], result["context"])
    assert sum(sizes) + result["activations"]["likely"] == result["total"]
    assert type(result["total"]) is int
    assert result["assumptions"]


def test_schemes_are_planned_by_name_or_by_bits(llama: Path) -> None:
    def weights(*flags: object) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(llmq("memplan", llama, "--json", *flags).out)["weights"]
        return found

    assert weights("--bits", 4, "--asym")["scheme"] == "int4 g128 asym"
    assert weights("--scheme", "w4a16")["on_disk"] / GIB == pytest.approx(5.33, abs=0.01)
    assert weights("--scheme", "fp8")["on_disk"] / GIB == pytest.approx(8.46, abs=0.01)
    assert weights("--scheme", "none") == weights()


def test_concurrency_is_another_name_of_the_batch_size(llama: Path) -> None:
    assert json.loads(llmq("memplan", llama, "--concurrency", 3, "--json").out)["batch_size"] == 3


def test_the_gpu_of_the_machine_is_the_default(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.cli.memplan.first_gpu_memory", lambda: 141 * GIB)
    assert json.loads(llmq("memplan", llama, "--json").out)["gpu_memory"] == 141 * GIB


def test_the_plan_is_turned_around(llama: Path) -> None:
    solved = llmq("memplan", llama, "--gpu", "h200", "--max-model-len", 8192, "--solve", "concurrency")
    users = int(solved.out.split()[1].replace(",", ""))
    assert solved.code == 0
    at_most = ("memplan", llama, "--gpu", "h200", "--max-model-len", 8192, "--concurrency")
    assert [llmq(*at_most, users).code, llmq(*at_most, users + 1).code] == [0, CHECK_FAILED]


def test_what_no_number_of_gpus_can_hold_is_answered_with_no(tmp_path: Path) -> None:
    huge = write_config(tmp_path / "huge", LLAMA_31_8B | {"hidden_size": 2**20, "num_hidden_layers": 999})
    result = llmq("memplan", huge, "--gpu", "t4", "--solve", "gpus")
    assert (result.code, result.out.splitlines()[0].split(":")[0]) == (CHECK_FAILED, "gpus")


def test_a_table_says_how_many_fit_for_each_scheme_and_context(llama: Path) -> None:
    out = llmq("memplan", llama, "--gpu", "a100-40gb", "--max-model-len", 8192, "--table").out
    assert all(f"\n{name} " in out for name in SCHEMES)
    assert "131,072 tokens" in out


def test_json_has_the_table_too(llama: Path) -> None:
    flags = ("memplan", llama, "--gpu", "a100-40gb", "--max-model-len", 8192, "--table")
    table = json.loads(llmq(*flags, "--json").out)["table"]
    assert [row["scheme"] for row in table[::2]] == ["as it is", *SCHEMES]
    row = next(row for row in table if (row["scheme"], row["kv_dtype"]) == ("w4a16", "fp8"))
    users = row["sequences"]["16384"]
    assert f" {users:,} " in next(line for line in llmq(*flags).out.splitlines() if re.match(r"w4a16 +fp8", line))
    at_once = ("memplan", llama, "--gpu", "a100-40gb", "--scheme", "w4a16", "--kv-cache-dtype", "fp8")
    assert llmq(*at_once, "--max-model-len", 16384, "--batch-size", users).code == 0
    assert llmq(*at_once, "--max-model-len", 16384, "--batch-size", users + 1).code == CHECK_FAILED


def test_an_explanation_names_layers_engines_and_assumptions(llama: Path) -> None:
    out = llmq("memplan", llama, "--explain").out
    assert "32 layers with keys and values of 8 × 128" in out
    assert all(f"KV cache of {engine}" in out for engine in ENGINES)
    in_json = json.loads(llmq("memplan", llama, "--json").out)["kv"]["engines"]
    assert all(f"KV cache of {engine}: {format_bytes(in_json[engine])}" in out for engine in ENGINES)
    assert "CUDA graphs" in out


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (("--num-gpus", 2), "llmq's engine runs on one GPU today"),
        (("--kv-cache-dtype", "fp8"), ""),
        (("--kv-cache-dtype", "float32"), "llmq keeps keys and values in bfloat16, fp8 or int8"),
        (("--num-gpus", 2, "--kv-cache-dtype", "fp8", "--engine", "vllm"), ""),
    ],
    ids=str,
)
def test_what_llmqs_engine_does_not_do_yet_is_said(llama: Path, flags: tuple[object, ...], warning: str) -> None:
    result = llmq("memplan", llama, *flags)
    assert result.code == 0
    assert warning in result.err
    assert bool(result.err) is bool(warning)


def test_the_phase_of_quantizing_is_planned_by_method(llama: Path) -> None:
    result = json.loads(llmq("memplan", llama, "--phase", "quantize", "--scheme", "w4a16", "--json").out)
    assert {method["method"] for method in result["methods"]} == {"gptq", "awq", "autoround", "rtn"}


@pytest.mark.parametrize(
    ("memory", "first", "code"),
    [
        ("512MiB", "does not fit, by any method: the device has 512.00 MiB", CHECK_FAILED),
        ("2GiB", "fits, by rtn: the device has 2.00 GiB", 0),
        ("24GiB", "fits, by gptq, awq, autoround or rtn: the device has 24.00 GiB", 0),
    ],
)
def test_which_methods_fit_a_device_is_said(llama: Path, memory: str, first: str, code: int) -> None:
    result = llmq("memplan", llama, "--phase", "quantize", "--gpu-memory", memory)
    assert (result.out.splitlines()[0], result.code) == (first, code)
    assert bool(code) is ("hint: " in result.err)
    as_json = json.loads(llmq("memplan", llama, "--phase", "quantize", "--gpu-memory", memory, "--json").out)
    assert as_json["fits"] is not bool(code)
    assert all(method["fits"] is (method["method"] in first) for method in as_json["methods"])


def test_gpus_are_listed_without_a_model() -> None:
    listed = llmq("memplan", "--list-gpus")
    assert listed.code == 0
    assert all(name in listed.out for name in gpu.USABLE_GIB)


def test_an_unknown_architecture_is_planned_with_a_warning(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "new", LLAMA_31_8B | {"model_type": "llama9"})
    result = llmq("memplan", folder, "--gpu", "h200", "--max-model-len", 4096)
    assert result.code == 0
    assert result.err.startswith("warning: 'llama9' is not known")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"model_type": "llama", "architectures": ["NewForCausalLM"]},
            "the architecture NewForCausalLM is not supported",
        ),
        ({"rope_scaling": "yarn"}, "field 'rope_scaling'"),
    ],
    ids=str,
)
def test_what_the_engine_does_not_run_is_planned_and_the_reason_given(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    result = llmq("memplan", write_config(tmp_path / "m", LLAMA_31_8B | fields), "--gpu", "h200")
    assert result.code == 0
    assert result.err.startswith("warning: llmq does not run llama")
    assert reason in result.err


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--solve", "everything", "--gpu", "h200"), USAGE),
        (("--solve", "context"), 1),
        (("--phase", "train"), USAGE),
        (("--scheme", "w5a5"), USAGE),
        (("--gpu", "h200", "--gpu-memory", "24GiB"), USAGE),
        (("--gpu-memory", "24 bananas"), USAGE),
        (("--gpu-memory", "24"), USAGE),
        (("--block-size", 0), USAGE),
        (("--max-num-batched-tokens", 0), USAGE),
        (("--load-format", "none"), USAGE),
        (("--phase", "quantize", "--table"), USAGE),
        (("--phase", "quantize", "--num-gpus", 2), USAGE),
        (("--phase", "quantize", "--concurrency", 8), USAGE),
        (("--phase", "quantize", "--max-model-len", 1024), USAGE),
        (("--phase", "quantize", "--scheme", "none"), USAGE),
        (("--scheme", "none", "--bits", 4), USAGE),
        (("--concurrency", 0), USAGE),
        (("--engine", "vllm", "--verify"), USAGE),
        (("--plot", "plan.exe"), USAGE),
    ],
    ids=str,
)
def test_flags_that_make_no_sense_end_in_an_error_and_a_hint(llama: Path, flags: tuple[object, ...], code: int) -> None:
    result = llmq("memplan", llama, *flags)
    assert result.code == code
    assert [line.split(":")[0] for line in result.err.splitlines()] == ["error", "hint"]


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = tmp_path / "no model"
    assert "there is no folder /nowhere" in llmq("memplan", nothing, "--plot", "/nowhere/plan.png").err
    monkeypatch.setattr("llmq.cli.options.find_spec", lambda name: None)
    assert "llmq[plots]" in llmq("memplan", nothing, "--plot", tmp_path / "plan.png").err


def test_a_plan_is_drawn(llama: Path, tmp_path: Path) -> None:
    assert llmq("memplan", llama, "--gpu", "h200", "--plot", tmp_path / "plan.png").code == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_no_figure_is_cut_off_in_a_narrow_terminal(llama: Path) -> None:
    assert "…" not in llmq("memplan", llama, "--gpu-memory", "80GiB", "--max-model-len", 8192).out


def test_planning_needs_no_torch(llama: Path) -> None:
    program = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import llmq.cli; llmq.cli.main()"
    arguments = ["memplan", str(llama), "--gpu-memory", "80GiB", "--solve", "scheme", "--explain", "--table"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout


# Against the engine


@pytest.mark.parametrize(
    "command", [("generate", "-p", "x", "--max-tokens", 1), ("quantize", "--method", "rtn", "-o", "q")]
)
def test_a_run_at_a_terminal_begins_with_its_plan(
    command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    talk = io.StringIO()
    terminal = Console(file=talk, force_terminal=True, color_system=None, width=200)
    monkeypatch.setattr(f"llmq.cli.{command[0]}.err", terminal)
    assert llmq(command[0], "demo", *command[1:]).code == 0
    plan_ = "weights 19.01 MiB, KV cache" if command[0] == "generate" else "about "
    assert any(line.startswith(plan_) for line in re.split(r"[\r\n]+", talk.getvalue())[:3])


@pytest.mark.parametrize("flags", [(), ("--block-size", 16, "--max-num-batched-tokens", 64)], ids=str)
def test_a_plan_of_demo_is_what_a_running_engine_holds(flags: tuple[object, ...]) -> None:
    result = llmq("memplan", "demo", "--verify", "--json", "--concurrency", 3, "--max-model-len", 100, *flags)
    lines = {line["name"]: line for line in json.loads(result.out)["verify"]}
    assert result.code == 0, result.err
    assert all(lines[name]["predicted"] == lines[name]["measured"] for name in ("weights", "KV cache"))
