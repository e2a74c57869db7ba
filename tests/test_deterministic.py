"""--deterministic: what a request gets, to the last bit, whatever else runs and however it is cut into steps.

On a CPU through Triton's interpreter, which is chosen by an environment variable that Triton reads when it is imported:
without it the tests run again in a process that has it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
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
    from test_kernels_reference import draw_paged
    from tiny_models import save_tiny
    from torch import Tensor

    from llmq.runtime.kernels.attention import paged_attention, paged_attention_reference
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

    def answers(
        folder: Path, prompts: list[list[int]], params: SamplingParams = PARAMS, **options: Any
    ) -> tuple[list[object], LLM]:
        """Tokens and their log-probabilities."""
        settings = EngineOptions(deterministic=True, block_size=16, prefix_caching=False, **options)
        llm = LLM(str(folder), device="cpu", dtype="float32", options=settings, text=False)
        outputs = llm.generate(prompts, params)
        return [(one.completions[0].token_ids, one.completions[0].logprobs) for one in outputs], llm

    @pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
    def test_answers_are_the_same_alone_and_together_and_in_chunks(architecture: str, folders: dict[str, Path]) -> None:
        together, _ = answers(folders[architecture], PROMPTS)
        assert answers(folders[architecture], PROMPTS[1:])[0] == together[1:]
        assert answers(folders[architecture], PROMPTS[::-1], max_num_batched_tokens=9)[0] == together[::-1]

    def test_a_request_without_a_seed_has_the_same_answer_every_time(folders: dict[str, Path]) -> None:
        seedless = replace(PARAMS, seed=None)
        once, again = (answers(folders["llama"], PROMPTS, seedless)[0] for _ in range(2))
        assert once == again
        assert once != answers(folders["llama"], PROMPTS, replace(PARAMS, temperature=0))[0]

    @pytest.mark.parametrize("preemption", ["recompute", "swap"])
    def test_answers_are_the_same_after_a_preemption(preemption: str, folders: dict[str, Path]) -> None:
        roomy, llm = answers(folders["llama"], PROMPTS)
        room = {"kv_cache_memory": 4 * llm.limits.block_bytes, "swap_space": 2**20}  # one is reserved
        pressed, llm = answers(folders["llama"], PROMPTS, preemption=preemption, watermark=0.0, **room)
        assert llm.stats.preemptions > 0
        assert (llm.stats.swapped_out > 0) == (preemption == "swap")
        assert pressed == roomy

    @pytest.mark.parametrize("window", [None, 20])
    def test_a_query_has_the_same_bits_in_a_step_of_any_number_of_queries(window: int | None) -> None:
        torch.manual_seed(0)
        whole = draw_paged([(70, 70), (18, 33)], 4, 2, 16, 16)
        query, keys, values, tables, starts, lengths = (x.float() if x.is_floating_point() else x for x in whole)

        def attend(query: Tensor, starts: list[int], most: int) -> Tensor:
            return paged_attention(
                query, keys, values, tables, torch.tensor(starts, dtype=torch.int32), lengths, window=window,
                max_query_length=most, max_kv_length=70, batch_invariant=True,
            )  # fmt: skip

        together = attend(query, starts.tolist(), 70)
        for last in (1, 7):
            at = [*range(70 - last, 70), *range(88 - last, 88)]
            assert attend(query[at], [0, last, 2 * last], last).equal(together[at])
        bounds = {"max_query_length": 70, "max_kv_length": 70}
        exact = paged_attention_reference(*whole, window=window, **bounds)
        assert (together - exact).norm() <= 1e-6 * exact.norm()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_a_row_of_a_product_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        weight, bias, x = torch.randn(40, 300).to(dtype), torch.randn(40).to(dtype), torch.randn(150, 300).to(dtype)
        together = invariant_matmul(x, weight, bias, dtype)
        for rows in (1, 16, 17, 40, 70):
            assert invariant_matmul(x[:rows], weight, bias, dtype).equal(together[:rows])
        exact = x.double() @ weight.double().t() + bias.double()
        assert (together - exact).norm() <= 4e-4 * exact.norm()
