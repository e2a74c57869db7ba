"""Keys and values in 8 bits: what the model then says, what the pool takes, and whose scales are used."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from known_models import LLAMA_31_8B, config_of
from tiny_models import save_tiny, save_variant
from torch import Tensor

from llmq import LLM, LlmqError, SamplingParams, memory
from llmq.checkpoint.folder import demo_folder
from llmq.engine.options import EngineOptions
from llmq.runtime.device import GPU, resolve_kv_dtype

GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
PROMPTS = [list(range(length, 2 * length)) for length in (1, 15, 16, 17, 40, 70)]


def load(folder: Path | str, kv_cache_dtype: str, **options: Any) -> LLM:
    options = {"block_size": 16, "kv_cache_memory": 2**22} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no scales")
        return LLM(
            str(folder), device="cpu", options=EngineOptions(kv_cache_dtype=kv_cache_dtype, **options)  # type: ignore[arg-type]
        )  # fmt: skip


def generate(llm: LLM) -> list[list[int]]:
    return [output.completions[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


def log_probabilities(folder: Path | str, kv_cache_dtype: str, token_ids: list[int]) -> Tensor:
    """Of every next token of a text, read with such a cache: [tokens, vocabulary]."""
    llm = load(folder, kv_cache_dtype)
    seen: list[Tensor] = []
    logits = llm.decoder.logits

    def watch(hidden: Tensor) -> Tensor:
        seen.append(logits(hidden))
        return seen[-1]

    llm.decoder.logits = watch  # type: ignore[method-assign]
    llm.generate([token_ids], SamplingParams(max_tokens=1, prompt_logprobs=0))
    return torch.cat(seen)[: len(token_ids) - 1].double().log_softmax(-1)


def divergence(folder: Path | str, kv_cache_dtype: str, token_ids: list[int]) -> float:
    """Mean Kullback-Leibler divergence from the model with an unrounded cache, in nats a token."""
    exact, ours = (log_probabilities(folder, name, token_ids) for name in ("auto", kv_cache_dtype))
    return float((exact.exp() * (exact - ours)).sum(-1).mean())


@pytest.mark.parametrize(("kv_cache_dtype", "most"), [("int8", 1e-3), ("fp8", 2e-2)])
def test_the_model_says_nearly_the_same(kv_cache_dtype: str, most: float) -> None:
    text = (demo_folder() / "calibration.txt").read_text()[:3000]
    token_ids = list(load("demo", "auto").tokenizer.encode(text))[:500]
    assert 0 < divergence("demo", kv_cache_dtype, token_ids) < most


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("variant", ["llama", "gemma2", "qwen3"])
def test_chunks_preemption_and_prefix_hits_change_no_token(tmp_path: Path, variant: str, kv_cache_dtype: str) -> None:
    """A step reads its own tokens, too, as they are stored."""
    folder = save_variant(tmp_path / "model", variant)
    expected = generate(load(folder, kv_cache_dtype, prefix_caching=False))
    roomy = load(folder, kv_cache_dtype)
    assert generate(roomy) == generate(roomy) == expected
    assert roomy.stats.prefix_hits > 0
    tight = (9 * len(roomy._cache.groups) + 1) * roomy._block_bytes
    for preemption in ("recompute", "swap"):
        pressed = load(
            folder, kv_cache_dtype, preemption=preemption, swap_space=2**22, kv_cache_memory=tight,
            max_num_batched_tokens=24,
        )  # fmt: skip
        assert generate(pressed) == expected
        assert pressed.stats.preemptions > 0


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    """A folder with scales for an fp8 KV cache, as llm-compressor stores them, of 0.02 · (layer + 1) and 0.03."""
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path / "calibrated", "llama")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(json.loads((folder / "config.json").read_text())["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor([0.02 * (layer + 1)])
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor(0.03)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_keys_and_values_are_rounded_by_the_scales_of_the_folder(calibrated: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = LLM(str(calibrated), device="cpu", options=EngineOptions(kv_cache_dtype="fp8", kv_cache_memory=2**20))
    scales = llm._cache.layer(1)[2]
    assert scales is not None
    assert [float(scale) for scale in scales] == pytest.approx([0.04, 0.03])
    plain = load(calibrated, "auto", block_size=64)
    for each in (llm, plain):
        each.generate([PROMPTS[-1]], SamplingParams(max_tokens=1, temperature=0))
    keys, values, _ = llm._cache.layer(0)
    for codes, scale, exact in zip((keys, values), (0.02, 0.03), plain._cache.layer(0)[:2], strict=True):
        kept = codes.float() * scale
        assert exact.abs().max() < 448 * scale
        # Half a step: a sixteenth of the number, or of the smallest that is normal.
        assert ((kept - exact).abs() <= exact.abs().clamp_min(2**-6 * scale) / 15.9).all()


def test_a_folder_without_scales_gets_one_for_all_and_a_warning(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    with pytest.warns(UserWarning, match="no scales for an fp8 KV cache"):
        llm = LLM(str(folder), device="cpu", options=EngineOptions(kv_cache_dtype="fp8", kv_cache_memory=2**20))
    scales = llm._cache.layer(0)[2]
    assert scales is not None
    assert [float(scale) for scale in scales] == [1.0, 1.0]


def test_a_folder_with_scales_for_some_layers_is_damaged(calibrated: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(calibrated / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_scale"]
    save_file(tensors, calibrated / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmqError, match=r"layers\.1\.self_attn\.v_scale"):
        load(calibrated, "fp8")


@pytest.mark.parametrize(("kv_cache_dtype", "times"), [("fp8", 2.0), ("int8", 512 / 264)])
def test_twice_the_tokens_have_room_in_the_same_memory(tmp_path: Path, kv_cache_dtype: str, times: float) -> None:
    config = config_of(tmp_path, LLAMA_31_8B)
    wide, narrow = (memory.pool_blocks(64 * 2**30, config, 64, name) for name in ("bfloat16", kv_cache_dtype))
    assert narrow / wide == pytest.approx(times, rel=1e-3)
    assert narrow > 1.9 * wide


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "int8"])
def test_the_pool_is_of_as_many_bytes_as_its_formula_says(tmp_path: Path, kv_cache_dtype: str) -> None:
    llm = load(save_tiny(tmp_path / "model", "llama"), kv_cache_dtype, kv_cache_memory=123_456)
    assert llm.kv_cache_bytes == 123_456 // llm._block_bytes * llm._block_bytes


def test_a_gpu_that_cannot_convert_fp8_is_told_what_can_be_had_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmq.runtime.device.gpu", lambda device: GPU("NVIDIA A100", (8, 0), 80 * 2**30))
    with pytest.raises(LlmqError, match="A100 has no instructions for fp8") as caught:
        resolve_kv_dtype("fp8", torch.bfloat16, "cuda")
    assert "int8" in (caught.value.hint or "")
    assert resolve_kv_dtype("int8", torch.bfloat16, "cuda") == "int8"
    assert resolve_kv_dtype("auto", torch.bfloat16, "cuda") == "bfloat16"


def test_another_type_is_a_usage_error_that_names_those_there_are() -> None:
    with pytest.raises(LlmqError, match="kv_cache_dtype must be one of auto, fp8, int8, not fp4"):
        EngineOptions(kv_cache_dtype="fp4")  # type: ignore[arg-type]
