"""The planner: a verdict, sizes that add up, inverse questions that agree with the forward ones. No torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import llmq
from hypothesis import assume, given
from hypothesis import strategies as st
from known_models import LLAMA_31_8B, QWEN_25_05B, config_of, model_configs, write_config

from llmq import memory
from llmq.engine.options import EngineOptions
from llmq.errors import CHECK_FAILED, USAGE, LlmqError
from llmq.memplan import gpu
from llmq.memplan.plan import Load, MemoryPlan, changes_that_fit, plan
from llmq.memplan.weights import planned_weights, stored_weights
from llmq.scheme import Scheme

GIB = 2**30
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}


@st.composite
def plans(draw: st.DrawFn) -> MemoryPlan:
    config = draw(model_configs())
    return plan(
        config,
        load=Load(draw(st.integers(1, 300)), draw(st.integers(1, config.context_length))),
        options=EngineOptions(block_size=16 * draw(st.integers(1, 8))),
        gpu_memory=draw(st.integers(2**20, 2**37)),
    )


def write_weights(folder: Path, sizes: dict[str, int]) -> None:
    """A safetensors file of zeros: tensors of so many bytes each."""
    header, offset = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(offset))


# The plan


def test_the_total_is_weights_and_cache_and_reserved_block_and_activations(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA_31_8B)
    result = plan(config, load=Load(batch_size=4, max_model_len=8192), gpu_memory=24 * GIB)
    assert result.weights.num_bytes == 2 * 8_030_261_248
    assert result.kv_cache == 4 * 8192 * 131_072
    assert result.textbook_kv_cache == 4 * result.kv_cache
    assert result.reserved_blocks == 64 * 131_072
    assert result.activations == memory.activation_bytes(config, 2048, 256, 2)
    assert result.total == sum((2 * 8_030_261_248, 4 * 8192 * 131_072, 64 * 131_072, result.activations))
    assert result.budget == int(0.9 * 24 * GIB)
    assert result.spare == result.budget - result.total


def test_a_narrower_cache_than_the_model_halves_its_bytes(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA_31_8B | {"torch_dtype": "float32"})
    assert plan(config).kv_cache == 2 * plan(config, load=Load(kv_cache_dtype="bfloat16")).kv_cache


def test_without_a_gpu_there_are_sizes_and_no_verdict(tmp_path: Path) -> None:
    result = plan(config_of(tmp_path, QWEN_25_05B))
    assert result.total > 0
    assert (result.budget, result.spare, result.fits, result.max_sequences, result.max_context) == (None,) * 5
    assert changes_that_fit(result) == []


def test_sequences_beyond_the_models_context_are_refused_with_the_flag_that_mends_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, QWEN_25_05B)
    with pytest.raises(LlmqError, match="context is 32,768 tokens") as caught:
        plan(config, load=Load(max_model_len=32769))
    assert caught.value.exit_code == USAGE
    assert "--max-model-len 32768" in (caught.value.hint or "")


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"max_model_len": 0}, {"kv_cache_dtype": "int4"}])
def test_a_load_that_makes_no_sense_is_a_usage_error(fields: dict[str, Any]) -> None:
    with pytest.raises(LlmqError) as caught:
        Load(**fields)
    assert caught.value.exit_code == USAGE


# Inverse questions


@given(plans())
def test_the_longest_context_fits_and_one_more_block_does_not(result: MemoryPlan) -> None:
    longest = result.max_context
    assert longest is not None
    assert longest % result.block_size == 0
    assert longest == 0 or replace(result, max_model_len=longest).fits
    assert not replace(result, max_model_len=longest + 1).fits
    assert result.fits is (result.max_model_len <= longest)


@given(plans())
def test_as_many_sequences_as_fit_fit_and_one_more_does_not(result: MemoryPlan) -> None:
    most = result.max_sequences
    assert most is not None
    assert most == 0 or replace(result, batch_size=most).fits
    assert not replace(result, batch_size=most + 1).fits
    assert result.fits is (result.batch_size <= most)


@given(plans())
def test_a_gpu_of_the_size_that_is_needed_is_large_enough(result: MemoryPlan) -> None:
    assert replace(result, gpu_memory=result.gpu_gib_needed * GIB).fits


@given(plans(), st.integers(1, 100))
def test_more_of_anything_takes_no_less(result: MemoryPlan, more: int) -> None:
    assert replace(result, batch_size=result.batch_size + more).total > result.total
    assert replace(result, max_model_len=result.max_model_len + more).total >= result.total
    assert replace(result, kv_dtype="float32").total >= replace(result, kv_dtype="float16").total


@given(plans())
def test_every_change_that_is_offered_makes_the_plan_fit_and_says_what_it_takes(result: MemoryPlan) -> None:
    assume(result.fits is False)
    changes = {change.flag.split()[0]: change for change in changes_that_fit(result)}
    assert "--gpu-memory" in changes
    if "--max-model-len" in changes:
        shorter = int(changes["--max-model-len"].flag.split()[1])
        assert 0 < shorter < result.max_model_len
        assert replace(result, max_model_len=shorter).total == changes["--max-model-len"].total
    for change in changes.values():
        assert change.total <= result.total


@given(plans())
def test_a_plan_that_fits_needs_no_change(result: MemoryPlan) -> None:
    assume(result.fits)
    assert changes_that_fit(result) == []


# Weights


def test_weights_in_the_folder_are_counted_from_their_headers(tmp_path: Path) -> None:
    config = config_of(tmp_path, QWEN_25_05B)
    write_weights(tmp_path, {"a": 1000, "b": 500})
    weights = stored_weights(tmp_path, config)
    assert (weights.num_bytes, weights.stored, weights.scheme) == (1500, True, None)


def test_a_tied_head_that_is_stored_as_well_is_counted_once(tmp_path: Path) -> None:
    write_weights(tmp_path, {"model.embed_tokens.weight": 1000, "lm_head.weight": 1000})
    tied, untied = QWEN_25_05B, QWEN_25_05B | {"tie_word_embeddings": False}
    assert stored_weights(tmp_path, config_of(tmp_path, tied)).num_bytes == 1000
    assert stored_weights(tmp_path, config_of(tmp_path, untied)).num_bytes == 2000


def test_a_gptq_folder_is_counted_as_stored_and_says_its_scheme(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA_31_8B | {"quantization_config": GPTQ})
    write_weights(tmp_path, {"a": 4000})
    weights = stored_weights(tmp_path, config)
    assert (weights.num_bytes, weights.stored, weights.scheme) == (4000, True, Scheme(4, 128))


def test_a_format_that_llmq_does_not_run_is_planned_by_its_size(tmp_path: Path) -> None:
    fields = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    config = config_of(tmp_path, LLAMA_31_8B | {"quantization_config": fields})
    write_weights(tmp_path, {"a": 4000})
    weights = stored_weights(tmp_path, config)
    assert (weights.num_bytes, weights.scheme) == (4000, None)


def test_without_files_the_size_is_computed_in_the_scheme_of_the_config(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA_31_8B | {"quantization_config": GPTQ})
    weights = stored_weights(tmp_path, config)
    assert weights == planned_weights(config, Scheme(4, 128))
    assert weights.num_bytes == memory.weight_bytes(config, Scheme(4, 128), 2)
    assert not weights.stored


def test_without_files_several_schemes_are_refused(tmp_path: Path) -> None:
    several = GPTQ | {"dynamic": {r"+:.*\.down_proj": {"bits": 8}}}
    config = config_of(tmp_path, LLAMA_31_8B | {"quantization_config": several})
    with pytest.raises(LlmqError, match="not every layer has the same scheme"):
        stored_weights(tmp_path, config)


def test_without_files_a_format_without_a_formula_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA_31_8B | {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(LlmqError, match="'fp8'"):
        stored_weights(tmp_path, config)


# The GPU


def test_gpus_are_read_from_nvidia_smi_and_one_that_hides_its_memory_is_left_out() -> None:
    answer = "NVIDIA H200, 143771, 570.86.15\nGPU, with a comma, 24564, 570.86.15\nNVIDIA GB10, [N/A], 580.1\n\n"
    assert gpu.parse_gpus(answer) == [
        gpu.Gpu("NVIDIA H200", 143771 * 2**20, "570.86.15"),
        gpu.Gpu("GPU, with a comma", 24564 * 2**20, "570.86.15"),
    ]


def test_where_there_is_no_nvidia_smi_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "QUERY", ("there-is-no-such-program",))
    assert gpu.detect_gpus() == []
    assert gpu.first_gpu_memory() is None


# The command


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.cli.memplan.first_gpu_memory", lambda: None)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_config(tmp_path / "llama", LLAMA_31_8B)


def test_the_first_line_answers_the_question_and_the_exit_code_repeats_it(llama: Path) -> None:
    fits = llmq("memplan", llama, "--gpu-memory", "80GiB", "--max-model-len", 8192)
    too_large = llmq("memplan", llama, "--gpu-memory", "24GiB")
    unknown = llmq("memplan", llama)
    assert fits.out.startswith("fits: ")
    assert too_large.out.startswith("does not fit: ")
    assert "--gpu-memory" in unknown.out.splitlines()[0]
    assert (fits.code, too_large.code, unknown.code) == (0, CHECK_FAILED, 0)


def test_what_does_not_fit_is_told_which_change_would(llama: Path) -> None:
    hints = llmq("memplan", llama, "--gpu-memory", "24GiB").err.splitlines()
    length = next(hint for hint in hints if "--max-model-len" in hint).split()[2]
    assert llmq("memplan", llama, "--gpu-memory", "24GiB", "--max-model-len", length).code == 0


def test_json_is_one_object_with_sizes_in_whole_bytes(llama: Path) -> None:
    result = json.loads(llmq("memplan", llama, "--gpu-memory", "80GB", "--batch-size", 2, "--json").out)
    assert result["schema"] == "llmq.memplan/1"
    assert result["fits"] is True
    assert result["gpu_memory_bytes"] == 80 * 10**9
    assert result["kv_cache"]["bytes_per_token"] == 131_072
    assert result["kv_cache"]["textbook_ratio"] == 4.0

    def sizes(value: dict[str, Any]) -> list[Any]:
        own = [field for name, field in value.items() if name.endswith("bytes")]
        return own + [size for field in value.values() if isinstance(field, dict) for size in sizes(field)]

    assert len(sizes(result)) == 10
    assert all(type(size) is int for size in sizes(result))


def test_bits_plan_a_quantized_version(llama: Path) -> None:
    weights = json.loads(llmq("memplan", llama, "--bits", 4, "--asym", "--json").out)["weights"]
    assert weights["scheme"] == "int4 g128 asym"
    assert weights["bytes"] / GIB == pytest.approx(5.33, abs=0.01)


def test_concurrency_is_another_name_of_the_batch_size(llama: Path) -> None:
    assert json.loads(llmq("memplan", llama, "--concurrency", 3, "--json").out)["batch_size"] == 3


def test_the_gpu_of_the_machine_is_the_default(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.cli.memplan.first_gpu_memory", lambda: 141 * GIB)
    assert json.loads(llmq("memplan", llama, "--json").out)["gpu_memory_bytes"] == 141 * GIB


def test_no_figure_is_cut_off_in_a_narrow_terminal(llama: Path) -> None:
    assert "…" not in llmq("memplan", llama, "--gpu-memory", "80GiB", "--max-model-len", 8192).out


def test_planning_needs_no_torch(llama: Path) -> None:
    program = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import llmq.cli; llmq.cli.main()"
    arguments = ["memplan", str(llama), "--gpu-memory", "80GiB"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fits: ")
