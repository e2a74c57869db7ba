"""On a GPU, through its own kernels: the tokens and logits of a CPU, and of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels_reference import draw_weight
from tiny_models import VARIANTS, save_tiny, save_variant

from llmq import LLM, SamplingParams, Scheme, quantize
from llmq.checkpoint.folder import demo_folder
from llmq.engine.options import EngineOptions
from llmq.runtime.decoder import CausalAttention
from llmq.runtime.graphs import StepGraphs
from llmq.runtime.linear import input_number, merge, quantized_linear
from llmq.runtime.loader import load_decoder, open_source
from llmq.scheme import E4M3, NF4

pytestmark = pytest.mark.gpu

LENGTHS = [1, 2, 15, 16, 17, 31, 33, 64, 100, 200, 450]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def random_prompts(vocabulary: int = 250) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def greedy(folder: Path | str, device: str, dtype: str = "float32", **options: Any) -> list[list[int]]:
    llm = LLM(str(folder), device=device, dtype=dtype, options=EngineOptions(**options))
    return [output.completions[0].token_ids for output in llm.generate(random_prompts(), GREEDY)]


def logits(folder: Path, device: str, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    model = load_decoder(open_source(folder, device, dtype))
    with torch.inference_mode():
        hidden = model(ids.to(device), torch.arange(len(ids), device=device), CausalAttention(len(ids)))
        return model.logits(hidden).double().cpu()


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_greedy_tokens_are_those_of_a_cpu(variant: str, tmp_path: Path) -> None:
    """Which are those of transformers, by ``test_llm``; here in chunks of 100 and a pool for a few at a time."""
    folder = save_variant(tmp_path / variant, variant)
    pressed = greedy(folder, "cuda", max_num_batched_tokens=100, block_size=16, kv_cache_memory=2 * 2**20)
    assert greedy(folder, "cuda") == pressed == greedy(folder, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replayed_graph_gives_the_tokens_of_its_kernels_launched_one_by_one(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_variant(tmp_path / "model", "qwen3")
    replayed = greedy(folder, "cuda", dtype)
    run = StepGraphs.run

    def launched(graphs: StepGraphs, *arguments: Any) -> Any:
        graphs._met.clear()  # a shape that comes for the first time is launched, and captured when it comes again
        return run(graphs, *arguments)

    monkeypatch.setattr(StepGraphs, "run", launched)
    assert greedy(folder, "cuda", dtype) == replayed


def test_a_step_gives_the_fp32_tokens_of_one_that_is_not_padded(tmp_path: Path) -> None:
    """In bf16 a tie may fall otherwise: the bound of a graph's contexts makes more splits of a row's attention."""
    folder = save_variant(tmp_path / "model", "qwen3")
    assert greedy(folder, "cuda") == greedy(folder, "cuda", enforce_eager=True)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preemption_changes_no_token(preemption: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    llm = LLM(
        str(folder),
        device="cuda",
        options=EngineOptions(
            block_size=16,
            kv_cache_memory=400_000,
            swap_space=2**24,
            preemption=preemption,  # type: ignore[arg-type]
        ),
    )
    params = SamplingParams(max_tokens=24, temperature=0.7, seed=3, n=3, ignore_eos=True)
    pressed = llm.generate(random_prompts()[:8], params)
    assert (llm.stats.swapped_out > 0) == (preemption == "swap")
    assert llm.stats.preemptions > 0
    roomy = LLM(str(folder), device="cpu").generate(random_prompts()[:8], params)
    for one, other in zip(pressed, roomy, strict=True):
        assert [sample.token_ids for sample in one.completions] == [sample.token_ids for sample in other.completions]


def deterministic(folder: Path, dtype: str = "bfloat16", **options: Any) -> LLM:
    settings = EngineOptions(deterministic=True, **{"block_size": 16, "prefix_caching": False} | options)
    return LLM(str(folder), device="cuda", dtype=dtype, options=settings)


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
def test_deterministic_tokens_depend_on_the_request_alone(architecture: str, tmp_path: Path) -> None:
    """And their log-probabilities: alone, with others, in chunks, and after a preemption."""
    folder = save_tiny(tmp_path / "model", architecture)
    params = SamplingParams(max_tokens=24, temperature=1.2, top_p=0.9, seed=3, logprobs=1, ignore_eos=True)

    def answers(prompts: list[list[int]], **options: Any) -> list[object]:
        llm = deterministic(folder, **options)
        outputs = llm.generate(prompts, params)
        assert (llm.stats.preemptions > 0) == ("preemption" in options)
        return [(one.completions[0].token_ids, one.completions[0].logprobs) for one in outputs]

    prompts = random_prompts()[:9]
    together = answers(prompts)
    assert answers(prompts[::-1])[::-1] == together
    assert answers(prompts[5:6]) == together[5:6]
    assert answers(prompts, max_num_batched_tokens=50) == together
    assert answers(prompts, prefix_caching=True, enforce_eager=True) == together
    for preemption in ("recompute", "swap"):
        pressed = {"kv_cache_memory": 200_000, "swap_space": 2**24, "preemption": preemption}
        assert answers(prompts, **pressed) == together


def test_penalties_and_beams_are_those_of_a_cpu(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    penalized = SamplingParams(
        max_tokens=24, seed=1, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2
    )
    for params in (penalized, SamplingParams(max_tokens=12, beam_width=4, n=2, temperature=0)):
        drawn = [
            [
                [sample.token_ids for sample in output.completions]
                for output in LLM(str(folder), device=device).generate(random_prompts()[:6], params)
            ]
            for device in ("cpu", "cuda")
        ]
        assert drawn[0] == drawn[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_logits_err_no_more_than_those_of_transformers(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_variant(tmp_path / variant, variant)
    ids = torch.tensor(random_prompts()[-1])
    exact = logits(folder, "cpu", torch.float32, ids)
    ours = logits(folder, "cuda", torch.bfloat16, ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    with torch.inference_mode():
        theirs = model(ids[None].cuda()).logits[0].double().cpu()
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


@pytest.mark.parametrize(
    "scheme",
    [Scheme(4, 128), Scheme(4, 32), Scheme(4, -1), Scheme(4, 64, False), Scheme(8, 128), Scheme(8, 32, False)],
    ids=str,
)
def test_quantized_logits_are_those_of_a_cpu(scheme: Scheme, tmp_path: Path) -> None:
    quantize("demo", tmp_path / "out", method="rtn", scheme=scheme, device="cpu")
    ids = torch.tensor(random_prompts(4000)[-1])
    exact = logits(tmp_path / "out", "cpu", torch.float32, ids)
    for rows in (ids[:7], ids):  # the fused kernel, and the one that widens the weight first
        ours = logits(tmp_path / "out", "cuda", torch.float32, rows)
        assert (ours - exact[: len(rows)]).norm() < 1e-5 * exact.norm()
        halves = logits(tmp_path / "out", "cuda", torch.bfloat16, rows)
        dense = logits(demo_folder() / "model", "cuda", torch.bfloat16, rows)
        dense_exact = logits(demo_folder() / "model", "cpu", torch.float32, rows)
        assert (halves - exact[: len(rows)]).norm() < 1.5 * (dense - dense_exact).norm()


@pytest.mark.parametrize(
    "scheme",
    [Scheme(3, 32, False), Scheme(6, 128), Scheme(8, 128, number=E4M3), Scheme(4, 64, number=NF4),
     Scheme(8, -1, activation_bits=8), Scheme(8, -1, number=E4M3, activation_bits=8)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 20, 100, 300])
def test_a_quantized_layer_is_that_of_a_cpu(scheme: Scheme, rows: int) -> None:
    torch.manual_seed(0)
    weight = draw_weight((192, 512), scheme)
    there = replace(
        weight, codes=weight.codes.cuda(), scales=weight.scales.cuda(), zero_points=weight.zero_points.cuda()
    )
    x, bias = torch.randn(rows, 512), torch.randn(192)
    expected = quantized_linear(weight, bias, torch.float32)(x)
    layers = [quantized_linear(there, bias.cuda(), torch.float32) for _ in range(2)]
    # Hopper's matrix unit has fewer bits than fp32 for sums of FP8.
    most = 4e-4 if input_number(layers[0]) == E4M3 else 1e-5
    assert (layers[0](x.cuda()).cpu() - expected).norm() <= most * expected.norm()
    merged = merge(layers)
    assert merged is not None
    assert (merged(x.cuda()).cpu() - torch.cat([expected, expected], dim=1)).norm() <= 2 * most * expected.norm()


def test_demo_generates_the_same_on_a_gpu_and_a_cpu() -> None:
    prompts = ["def ", "import os\n", "class Stack:\n    def push(self, item):\n        "]
    params = SamplingParams(max_tokens=48, temperature=0)
    texts = [
        [output.completions[0].text for output in LLM("demo", device=device, dtype="float32").generate(prompts, params)]
        for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]


def test_a_seed_draws_the_same_tokens_on_a_gpu_and_a_cpu(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    params = SamplingParams(max_tokens=16, seed=7, top_k=20, top_p=0.9)
    drawn = [
        [
            out.completions[0].token_ids
            for out in LLM(str(folder), device=device, dtype="float32").generate(["one", "two"], params)
        ]
        for device in ("cpu", "cuda")
    ]
    assert drawn[0] == drawn[1]


def test_gptq_on_a_gpu_is_gptq_on_a_cpu(tmp_path: Path) -> None:
    """The same layers, as well approximated: the order of sums differs, so codes may."""
    folder = save_tiny(tmp_path / "model", "llama")
    text = tmp_path / "text.txt"
    text.write_text((demo_folder() / "calibration.txt").read_text()[:20_000])
    from llmq.quant.options import Calibration

    calibration = Calibration(str(text), samples=16, seqlen=128)
    errors = [
        [
            layer.error
            for layer in quantize(str(folder), tmp_path / device, calibration=calibration, device=device).layers
        ]
        for device in ("cpu", "cuda")
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
