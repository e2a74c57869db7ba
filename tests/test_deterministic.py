"""--deterministic: what a request gets, to the last bit, whatever else runs and however it is cut into steps.

On a CPU through Triton's interpreter, which is chosen by an environment variable that Triton reads when it is imported:
without it the tests run again in a process that has it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq import LLM, SamplingParams
from llmq.engine.options import EngineOptions
from llmq.errors import LlmqError

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_tokens_depend_on_the_request_alone() -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr

    def test_a_cpu_refuses_before_it_loads_anything() -> None:
        with pytest.raises(LlmqError, match="needs a GPU"):
            LLM("demo", device="cpu", options=EngineOptions(deterministic=True))

else:
    from tiny_models import save_tiny

    from llmq.runtime.kernels.invariant import invariant_matmul

    PROMPTS = [[5, 6] * 7, [9, 10, 11] * 5]
    """With four tokens more, each takes two blocks of the cache."""
    PARAMS = SamplingParams(max_tokens=4, temperature=1.5, seed=1, logprobs=1, ignore_eos=True)

    @pytest.fixture(scope="module")
    def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        few: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 64}
        folder = tmp_path_factory.mktemp("models")
        return {
            "llama": save_tiny(folder / "llama", "llama", **few),
            "qwen3-moe": save_tiny(folder / "qwen3-moe", "qwen3-moe", **few | experts),
        }

    def answers(folder: Path, prompts: list[list[int]], **options: Any) -> tuple[list[object], LLM]:
        """Tokens and their log-probabilities."""
        settings = EngineOptions(deterministic=True, block_size=16, prefix_caching=False, **options)
        llm = LLM(str(folder), device="cpu", dtype="float32", options=settings, text=False)
        outputs = llm.generate(prompts, PARAMS)
        return [(one.completions[0].token_ids, one.completions[0].logprobs) for one in outputs], llm

    @pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
    def test_answers_are_the_same_alone_and_together_and_in_chunks(architecture: str, folders: dict[str, Path]) -> None:
        together, _ = answers(folders[architecture], PROMPTS)
        assert answers(folders[architecture], PROMPTS[1:])[0] == together[1:]
        assert answers(folders[architecture], PROMPTS[::-1], max_num_batched_tokens=9)[0] == together[::-1]

    @pytest.mark.parametrize("preemption", ["recompute", "swap"])
    def test_answers_are_the_same_after_a_preemption(preemption: str, folders: dict[str, Path]) -> None:
        roomy, llm = answers(folders["llama"], PROMPTS)
        room = {"kv_cache_memory": 4 * llm.limits.block_bytes, "swap_space": 2**20}  # one is reserved
        pressed, llm = answers(folders["llama"], PROMPTS, preemption=preemption, watermark=0.0, **room)
        assert llm.stats.preemptions > 0
        assert (llm.stats.swapped_out > 0) == (preemption == "swap")
        assert pressed == roomy

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_a_row_of_a_product_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        weight, bias, x = torch.randn(40, 300).to(dtype), torch.randn(40).to(dtype), torch.randn(150, 300).to(dtype)
        together = invariant_matmul(x, weight, bias, dtype)
        for rows in (1, 16, 17, 40, 70):
            assert invariant_matmul(x[:rows], weight, bias, dtype).equal(together[:rows])
        exact = x.double() @ weight.double().t() + bias.double()
        assert (together - exact).norm() <= 4e-4 * exact.norm()
