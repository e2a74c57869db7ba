"""Dummy weights: any shape and scheme from a config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import llmq

from llmq import LLM, SamplingParams, Scheme
from llmq.checkpoint.config import read_config
from llmq.checkpoint.formats import format_for
from llmq.engine.options import EngineOptions
from llmq.errors import LlmqError
from llmq.runtime.decoder import CausalAttention
from llmq.runtime.dummy import DEVIATION, dummy_decoder, dummy_weight
from llmq.scheme import E4M3, NF4

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 500,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
DUMMY = EngineOptions(load_format="dummy")


def config_alone(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    return folder


def test_token_ids_are_completed_from_a_config_alone(tmp_path: Path) -> None:
    folder = config_alone(tmp_path / "model")
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    first, second = (LLM(str(folder), device="cpu", options=DUMMY).generate([[3, 4, 5]], params) for _ in range(2))
    assert len(first[0].completions[0].token_ids) == 5
    assert first[0].completions[0].text == ""
    assert first[0].completions[0].token_ids == second[0].completions[0].token_ids


def test_a_text_needs_a_tokenizer(tmp_path: Path) -> None:
    output = LLM(str(config_alone(tmp_path / "model")), device="cpu", options=DUMMY).generate(["text"])[0]
    assert isinstance(output.error, LlmqError)
    assert "no tokenizer" in output.error.message


def test_the_random_workload_runs_on_a_config_alone(tmp_path: Path) -> None:
    run = llmq(
        "bench", "throughput", config_alone(tmp_path / "model"), "--load-format", "dummy", "--num-prompts", 2,
        "--input-len", 8, "--output-len", 4, "--device", "cpu", "--json",
    )  # fmt: skip
    assert json.loads(run.out)["total_output_tokens"] == 8


def test_the_logits_of_a_deep_quantized_dummy_are_finite(tmp_path: Path) -> None:
    schemes = {"self_attn.q_proj": Scheme(4, 64)}
    quantization = format_for("gptq", schemes).config_dict(quantized=list(schemes), ignored=[], writer="w")
    config = read_config(config_alone(tmp_path / "model", num_hidden_layers=8, quantization_config=quantization))
    model = dummy_decoder(config, "cpu", torch.float32)
    assert not any(parameter.is_meta for parameter in model.parameters())

    hidden = model(torch.arange(64), torch.arange(64), CausalAttention(64))
    assert model.logits(hidden).isfinite().all()


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(8, -1, activation_bits=8), Scheme(8, -1, number=E4M3), Scheme(4, 64, number=NF4)],
    ids=str,
)  # fmt: skip
def test_a_dummy_weight_of_any_scheme_has_the_deviation_of_a_dense_one(scheme: Scheme) -> None:
    weight = dummy_weight(scheme, (256, 128), torch.float32, torch.Generator().manual_seed(0)).dequantize()
    assert weight.isfinite().all()
    assert weight.std().item() == pytest.approx(DEVIATION, rel=0.05)
    assert abs(weight.mean().item()) < DEVIATION / 8
