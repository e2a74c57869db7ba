"""Generation end to end: transformers' tokens, whatever the batch, the pool, the chunks and the pressure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import VARIANTS, save_tiny, save_variant

from llmq import LLM, LlmqError, SamplingParams
from llmq.checkpoint.folder import demo_folder
from llmq.engine.baselines import Batching
from llmq.engine.options import EngineOptions
from llmq.llm import RequestOutput, TextDelta

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def transformers_greedy(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        full = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(full[0, len(prompt) :].tolist())
    return answers


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    assert all(output.error is None for output in outputs), outputs
    return [output.completions[0].token_ids for output in outputs]


def random_prompts(lengths: list[int], vocabulary: int = 250) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


LENGTHS = [1, 2, 15, 16, 17, 31, 33, 64, 100, 200]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:
    return transformers_greedy(tiny, random_prompts(LENGTHS), 24)


def run(folder: Path, **options: int) -> tuple[list[list[int]], LLM]:
    llm = LLM(str(folder), options=EngineOptions(**options), device="cpu")
    return tokens(llm.generate(random_prompts(LENGTHS), GREEDY)), llm


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    folder = save_variant(tmp_path / variant, variant)
    prompts = random_prompts(LENGTHS)
    ours = tokens(LLM(str(folder), device="cpu").generate(prompts, GREEDY))
    assert ours == transformers_greedy(folder, prompts, 24)


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_the_size_of_prompt_chunks_changes_no_token(tiny: Path, expected: list[list[int]], chunk: int) -> None:
    assert run(tiny, max_num_batched_tokens=chunk)[0] == expected


def test_on_a_gpu_a_step_computes_8192_tokens_and_on_a_cpu_2048_unless_told_otherwise(tiny: Path) -> None:
    steps = {device: EngineOptions().on(device).batched_tokens for device in ("cpu", "cuda", "cuda:1")}
    assert steps == {"cpu": 2048, "cuda": 8192, "cuda:1": 8192}
    assert EngineOptions(max_num_batched_tokens=100).on("cuda").batched_tokens == 100
    assert LLM(str(tiny), device="cpu").options.max_num_batched_tokens == 2048


@pytest.mark.parametrize("block_size", [16, 32, 64, 512])
def test_the_block_size_changes_no_token(tiny: Path, expected: list[list[int]], block_size: int) -> None:
    assert run(tiny, block_size=block_size)[0] == expected


@pytest.mark.parametrize("max_num_seqs", [1, 3, 256])
def test_the_number_of_sequences_at_once_changes_no_token(
    tiny: Path, expected: list[list[int]], max_num_seqs: int
) -> None:
    assert run(tiny, max_num_seqs=max_num_seqs)[0] == expected


def test_preemption_changes_no_token(tiny: Path, expected: list[list[int]]) -> None:
    block = 16 * 2 * 2 * 2 * 32 * 4
    answers, llm = run(tiny, block_size=16, kv_cache_memory=16 * block)
    assert llm.stats.preemptions > 0
    assert llm.stats.peak_blocks <= 15
    assert answers == expected


def test_any_order_of_arrival_changes_no_token(tiny: Path, expected: list[list[int]]) -> None:
    llm = LLM(str(tiny), device="cpu")
    backwards = tokens(llm.generate(random_prompts(LENGTHS)[::-1], GREEDY))
    assert backwards[::-1] == expected


@pytest.mark.slow
def test_demo_greedy_tokens_are_those_of_transformers_in_a_pool_too_small_for_all() -> None:
    """32 prompts of 1 to over 900 tokens, 64 new tokens each, in one continuous batch."""
    folder = demo_folder() / "model"
    text_ids = LLM("demo", device="cpu").tokenizer.encode((demo_folder() / "evaluation.txt").read_text()[:200_000])
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 63, 64, 65, 89, 127, 128, 129, *range(150, 950, 50)]
    prompts = [text_ids[1000 * number : 1000 * number + length] for number, length in enumerate(lengths)]
    llm = LLM("demo", device="cpu", options=EngineOptions(kv_cache_memory=24 * 2**20))
    assert sum(lengths) + 64 * len(lengths) > llm.stats.total_blocks * 64
    ours = tokens(llm.generate(prompts, SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)))
    assert len(prompts) == 32
    assert ours == transformers_greedy(folder, prompts, 64)


def test_demo_writes_python() -> None:
    output = LLM("demo", device="cpu").generate(["def "], SamplingParams(max_tokens=16, temperature=0))[0]
    assert "(" in output.completions[0].text


def test_seeded_samples_are_the_same_alone_and_in_a_batch(tiny: Path) -> None:
    llm = LLM(str(tiny), device="cpu")
    prompts = random_prompts(LENGTHS)
    params = [SamplingParams(max_tokens=8, seed=number, top_p=0.9, temperature=0.8) for number in range(len(prompts))]
    together = tokens(llm.generate(prompts, params))
    assert together == [tokens(llm.generate([prompt], one))[0] for prompt, one in zip(prompts, params, strict=True)]


def test_n_samples_are_n_seeded_single_ones(tiny: Path) -> None:
    llm = LLM(str(tiny), device="cpu")
    prompt = random_prompts([20])
    several = llm.generate(prompt, SamplingParams(max_tokens=8, seed=5, n=4))[0].completions
    singles = [tokens(llm.generate(prompt, SamplingParams(max_tokens=8, seed=5 + i)))[0] for i in range(4)]
    assert [completion.token_ids for completion in several] == singles
    assert len({tuple(single) for single in singles}) == 4


def test_without_a_seed_two_runs_differ(tiny: Path) -> None:
    llm = LLM(str(tiny), device="cpu")
    first, second = (tokens(llm.generate(["x"], SamplingParams(max_tokens=16))) for _ in range(2))
    assert first != second


def test_streamed_pieces_add_up_to_the_text_and_end_with_the_reason(tiny: Path) -> None:
    llm = LLM(str(tiny), device="cpu")
    events = list(llm.stream(["one", "two"], SamplingParams(max_tokens=12, seed=3)))
    for output in (event for event in events if isinstance(event, RequestOutput)):
        pieces = [event for event in events if isinstance(event, TextDelta) and event.request_index == output.index]
        assert "".join(piece.text for piece in pieces) == output.completions[0].text
        assert [piece.finish_reason for piece in pieces][-1] == output.completions[0].finish_reason


def test_streaming_changes_no_text(tiny: Path) -> None:
    llm = LLM(str(tiny), device="cpu")
    params = SamplingParams(max_tokens=12, seed=3)
    streamed = next(event for event in llm.stream(["one"], params) if isinstance(event, RequestOutput))
    assert streamed.completions[0].text == llm.generate(["one"], params)[0].completions[0].text


def test_a_stop_text_ends_the_completion_and_is_no_part_of_it() -> None:
    llm = LLM("demo", device="cpu")
    whole = llm.generate(["def "], SamplingParams(max_tokens=24, temperature=0))[0].completions[0].text
    stop = whole[10:13]
    stopped = llm.generate(["def "], SamplingParams(max_tokens=24, temperature=0, stop=(stop,)))[0].completions[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole[: whole.index(stop)]


def test_eos_ends_the_completion_and_is_no_part_of_the_text(tiny: Path) -> None:
    llm = LLM(str(tiny), device="cpu")
    first = tokens(llm.generate(["x"], GREEDY))[0]
    llm.config = replace(llm.config, eos_token_ids=(first[3],))
    ended = llm.generate(["x"], SamplingParams(max_tokens=24, temperature=0))[0].completions[0]
    assert ended.finish_reason == "stop"
    assert ended.token_ids == first[: first.index(first[3]) + 1]


def test_max_tokens_ends_the_completion(tiny: Path) -> None:
    completion = (
        LLM(str(tiny), device="cpu").generate(["x"], SamplingParams(max_tokens=3, ignore_eos=True))[0].completions[0]
    )
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")


def test_a_full_context_ends_the_completion(tiny: Path) -> None:
    prompt = random_prompts([505])
    completion = (
        LLM(str(tiny), device="cpu")
        .generate(prompt, SamplingParams(max_tokens=None, ignore_eos=True))[0]
        .completions[0]
    )
    assert (len(completion.token_ids), completion.finish_reason) == (512 - 505, "length")


def test_a_refused_prompt_leaves_the_others_alone(tiny: Path) -> None:
    outputs = LLM(str(tiny), device="cpu").generate(["good", "", "x" * 600, [999], "\ud800"], GREEDY)
    assert [output.error is None for output in outputs] == [True, False, False, False, False]
    assert "empty" in str(outputs[1].error)
    assert len(outputs[0].completions[0].token_ids) == 24


def test_leaving_a_stream_early_empties_the_engine(tiny: Path, expected: list[list[int]]) -> None:
    llm = LLM(str(tiny), device="cpu")
    stream = llm.stream(random_prompts(LENGTHS), GREEDY)
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    assert llm._blocks.used == 0
    assert tokens(llm.generate(random_prompts(LENGTHS), GREEDY)) == expected


@pytest.mark.parametrize("batching", ["continuous", "static"])
def test_a_stream_that_is_under_way_loses_nothing_to_another_call(
    tiny: Path, expected: list[list[int]], batching: Batching
) -> None:
    llm = LLM(str(tiny), device="cpu")
    answers = llm.as_completed(random_prompts(LENGTHS), GREEDY)
    first = next(answers)
    with pytest.raises(LlmqError, match="the engine works on other requests"):
        llm.generate(["x"], GREEDY, batching=batching)
    assert tokens(sorted([first, *answers], key=lambda output: output.index)) == expected


def test_an_iterator_that_was_read_to_its_last_answer_leaves_later_calls_alone(tiny: Path) -> None:
    llm = LLM(str(tiny), device="cpu")
    before = llm.as_completed(["x"], GREEDY)
    next(before)
    stream = llm.stream(["y"], GREEDY)
    next(stream)
    before.close()  # type: ignore[attr-defined]
    *_, last = stream
    assert isinstance(last, RequestOutput)


def test_messages_go_through_the_chat_template(tiny: Path) -> None:
    llm = LLM(str(tiny), device="cpu")
    output = llm.generate([[{"role": "user", "content": "hi"}]], GREEDY)[0]
    assert llm.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=True) == "user: hi\nassistant:"


def test_token_times_never_run_backwards(tiny: Path) -> None:
    output = LLM(str(tiny), device="cpu").generate(["x"], GREEDY)[0]
    times = [output.arrival_time, *output.completions[0].token_times]
    assert len(times) == 25
    assert times == sorted(times)
