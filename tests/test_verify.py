"""The plan against what a running engine holds, line by line: to the byte what is counted, nearly what is estimated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import llmq
from tiny_models import save_variant

from llmq.bench.memory import Line, verify
from llmq.checkpoint.formats import format_for
from llmq.checkpoint.tensors import TensorInfo
from llmq.engine.options import EngineOptions
from llmq.errors import LlmqError
from llmq.memplan.engines import LLMQ
from llmq.memplan.plan import Load, plan
from llmq.memplan.source import open_model, weights_of, widened_weight_bytes
from llmq.runtime.dummy import dummy_decoder
from llmq.runtime.linear import resident_bytes
from llmq.runtime.loader import load_decoder, open_source
from llmq.scheme import E4M3, Scheme

BASE: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "eos_token_id": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "qwen3-tied": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "gemma3-windows": {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "sliding_window": 32,
    },
    "qwen2-biases": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "mixtral-experts": {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
}
REAL_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "gemma3-1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "vocab_size": 262144,
    },
}
"""As wide as these models are, and a few layers deep."""
SCHEMES = {
    "bf16": None,
    "w4a16": ("gptq", Scheme(4, 32)),
    "w8a8": ("compressed-tensors", Scheme(8, -1, activation_bits=8)),
    "fp8": ("compressed-tensors", Scheme(8, -1, number=E4M3, activation_bits=8)),
}


def config_alone(folder: Path, shape: str, scheme: str) -> Path:
    folder.mkdir()
    fields = BASE | (SHAPES | REAL_SHAPES)[shape]
    (folder / "config.json").write_text(json.dumps(fields))
    found, config = SCHEMES[scheme], open_model(str(folder)).config
    if found is not None and config is not None:
        name, kind = found
        layers = dict.fromkeys(config.all_linears, kind)
        quantization = format_for(name, layers).config_dict(quantized=list(layers), ignored=[], writer="test")
        (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}))
    return folder


def compare(
    folder: Path, *, tokens: int, device: str, kv_dtype: str = "auto", options: EngineOptions | None = None
) -> list[Line]:
    result = plan(
        open_model(str(folder)),
        load=Load(batch_size=3, max_model_len=tokens, kv_cache_dtype=kv_dtype),
        options=options or EngineOptions(block_size=16, max_num_seqs=4, max_num_batched_tokens=256),
    )
    return verify(str(folder), result, device=device, load_format="dummy")


@pytest.mark.parametrize(("tokens", "kv_dtype"), [(16, "auto"), (50, "fp8"), (50, "int8"), (200, "auto")])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_pool_are_as_planned_to_the_byte(
    tmp_path: Path, shape: str, scheme: str, tokens: int, kv_dtype: str
) -> None:
    found = compare(config_alone(tmp_path / "m", shape, scheme), tokens=tokens, device="cpu", kv_dtype=kv_dtype)
    lines = {line.name: line for line in found}
    for name in ("weights", "KV cache"):
        assert lines[name].predicted == lines[name].measured, name


RTN = ("--method", "rtn")
CT = (*RTN, "--format", "compressed-tensors")


@pytest.mark.parametrize(
    ("variant", "flags"),
    [
        ("gemma3", ()),
        ("llama-biases", (*RTN, "--scheme", "w4a16")),
        ("llama", (*CT, "--scheme", "w8a8", "--override", "down_proj=none")),
        ("llama", (*CT, "--scheme", "w4a16", "--override", "down_proj=w8a8")),
        ("qwen3", (*CT, "--scheme", "fp8", "--override", "lm_head=fp8", "--kv-cache-scheme", "fp8")),
        ("mixtral", (*CT, "--scheme", "w8a8")),
        ("qwen2", (*CT, "--scheme", "w8a8")),
        ("qwen2", ("--scheme", "nf4")),
        ("llama", ("--scheme", "bnb-int8")),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_is_loaded_from_files_is_as_planned_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, flags: tuple[object, ...], device: str
) -> None:
    folder = save_variant(tmp_path / "original", variant)
    if flags:
        done = llmq(
            "quantize", folder, "-o", tmp_path / "quantized", "--calib-samples", 2, "--calib-seqlen", 32, *flags
        )
        assert done.code == 0, done.err
        folder = tmp_path / "quantized"
    model = open_model(str(folder))
    if device == "gpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # which packs as for a GPU
        decoder = load_decoder(open_source(folder, "cpu", torch.float32))
        assert weights_of(model, None, LLMQ, 1).resident == resident_bytes(decoder)
        return
    for dtype in (torch.float32, torch.bfloat16):
        decoder = load_decoder(open_source(folder, "cpu", dtype))
        assert widened_weight_bytes(model, dtype.itemsize) == resident_bytes(decoder)


def test_what_no_engine_loads_is_not_counted(tmp_path: Path) -> None:
    folder = save_variant(tmp_path / "m", "llama")
    model = open_model(str(folder))
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": TensorInfo(folder, "F32", (16,), 64)}
    older = replace(model, tensors={**(model.tensors or {}), **angles})
    assert widened_weight_bytes(older, 4) == widened_weight_bytes(model, 4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_packed_for_a_gpu_as_planned_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, scheme: str
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = open_model(str(config_alone(tmp_path / "m", shape, scheme)))
    assert model.config is not None
    decoder = dummy_decoder(model.config, "cpu", torch.bfloat16)
    assert weights_of(model, None, LLMQ, 1).resident == resident_bytes(decoder)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("tokens", [200, 2000, 8000])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", REAL_SHAPES)
def test_on_a_gpu_every_line_of_a_plan_holds(
    tmp_path: Path, shape: str, scheme: str, tokens: int, kv_dtype: str
) -> None:
    folder = config_alone(tmp_path / "m", shape, scheme)
    lines = compare(folder, tokens=tokens, device="cuda", kv_dtype=kv_dtype, options=EngineOptions())
    assert [(line.name, line.predicted, line.measured) for line in lines if not line.holds] == []


def test_a_line_that_is_counted_may_not_be_off_by_a_byte_and_an_estimate_by_a_share_or_some_mib() -> None:
    assert Line("", 100, 100, exact=True).holds
    assert not Line("", 100, 101, exact=True).holds
    assert Line("", 0, 200 * 2**20, exact=False).holds
    assert not Line("", 0, 200 * 2**20 + 1, exact=False).holds
    assert Line("", 85 * 2**30, 100 * 2**30, exact=False).holds
    assert Line("", 1, None, exact=True).holds


def test_a_config_alone_is_verified_with_random_weights_or_not_at_all(tmp_path: Path) -> None:
    folder = config_alone(tmp_path / "m", "llama", "bf16")
    flags = ("memplan", folder, "--verify", "--max-model-len", 64)
    refused, verified = llmq(*flags), llmq(*flags, "--load-format", "dummy")
    assert (refused.code, verified.code) == (1, 0)
    assert "--load-format dummy" in refused.err


def test_what_the_engine_does_not_run_is_not_verified(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "dtype": "bfloat16"}))
    result = plan(open_model(str(tmp_path)), load=Load(max_model_len=10))
    with pytest.raises(LlmqError, match="does not run mamba"):
        verify(str(tmp_path), result)
