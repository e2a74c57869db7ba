"""Beam search: transformers' answers, and their blocks shared, whatever the pool."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_model import SimulatedModel, drain, make_request, make_scheduler
from tiny_models import save_tiny

from llmq import LLM, SamplingParams
from llmq.engine.beam import BeamSearch, Continuation
from llmq.engine.options import EngineOptions

NEW = 12
PROMPTS = [[5, 17, 99, 3], [200, 1, 1, 64, 7, 23, 88], [42] * 17]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama", seed=3)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def eos(folder: Path) -> int:
    """A token that beams say often, so that many of them end."""
    params = SamplingParams(max_tokens=NEW, beam_width=4, n=4, ignore_eos=True)
    outputs = LLM(str(folder), device="cpu").generate(PROMPTS, params)
    said = [token for output in outputs for one in output.completions for token in one.token_ids[2:9]]
    return max(set(said), key=said.count)


@pytest.fixture(scope="module")
def llm(folder: Path, eos: int) -> LLM:
    made = LLM(str(folder), device="cpu", options=EngineOptions(block_size=16))
    made.config = replace(made.config, eos_token_ids=(eos,))
    return made


def transformers_beams(
    model: Any, prompt: list[int], eos: int, width: int, early_stopping: str, penalty: float, **others: float
) -> list[list[int]]:
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        early_stopping={"true": True, "false": False, "never": "never"}[early_stopping],
        length_penalty=penalty,
        eos_token_id=eos,
        pad_token_id=eos,
        **others,
    )
    return [cut(row[len(prompt) :].tolist(), eos) for row in found]


def cut(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.parametrize("penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", ["true", "false", "never"])
@pytest.mark.parametrize("width", [2, 4])
def test_the_answers_are_those_of_transformers(
    llm: LLM, reference: Any, eos: int, width: int, early_stopping: str, penalty: float
) -> None:
    params = SamplingParams(
        max_tokens=NEW, beam_width=width, n=width, early_stopping=early_stopping, length_penalty=penalty  # type: ignore[arg-type]
    )  # fmt: skip
    outputs = llm.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ours = [completion.token_ids for completion in output.completions]
        assert ours == transformers_beams(reference, prompt, eos, width, early_stopping, penalty)
    assert any(completion.finish_reason == "stop" for output in outputs for completion in output.completions)


@pytest.mark.parametrize("theirs", [{"repetition_penalty": 1.5}, {"min_new_tokens": 6}], ids=str)
def test_penalties_and_bans_change_log_probabilities_as_in_transformers(
    llm: LLM, reference: Any, eos: int, theirs: dict[str, Any]
) -> None:
    ours = {{"min_new_tokens": "min_tokens"}.get(name, name): value for name, value in theirs.items()}
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=NEW, beam_width=4, n=4, **ours))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        answers = [completion.token_ids for completion in output.completions]
        assert answers == transformers_beams(reference, prompt, eos, 4, "false", 1.0, **theirs)


def test_a_small_pool_swapping_and_recomputing_change_no_beam(llm: LLM, folder: Path, eos: int) -> None:
    params = SamplingParams(max_tokens=40, beam_width=4, n=4, early_stopping="never", ignore_eos=True)
    expected = [[one.token_ids for one in output.completions] for output in llm.generate(PROMPTS, params)]
    block = 16 * 2 * 2 * 2 * 32 * 4
    for swap in (0, 64 * block):
        small = LLM(
            str(folder),
            device="cpu",
            options=EngineOptions(block_size=16, kv_cache_memory=18 * block, swap_space=swap, preemption="auto"),
        )
        assert [[one.token_ids for one in output.completions] for output in small.generate(PROMPTS, params)] == expected
        assert small.stats.preemptions > 0
        assert (small.stats.swapped_out > 0) == bool(swap)


def test_scores_are_log_probability_by_generated_length_to_the_penalty_the_end_counted(llm: LLM) -> None:
    output = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=NEW, beam_width=4, n=4, length_penalty=0.0))[0]
    plain = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=NEW, temperature=0, logprobs=0))[0].completions[0]
    scores = [completion.score for completion in output.completions]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
    greedy = sum(token.logprob for token in plain.logprobs)
    assert scores[0] is not None
    assert scores[0] >= greedy - 1e-4


def test_each_token_of_an_answer_has_a_time(llm: LLM) -> None:
    output = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=NEW, beam_width=2, n=2, ignore_eos=True))[0]
    times = [one.token_times for one in output.completions]
    assert [len(each) for each in times] == [NEW, NEW]
    assert times[0] == sorted(times[0])


def test_one_beam_is_greedy(llm: LLM) -> None:
    beam = llm.generate(PROMPTS, SamplingParams(max_tokens=NEW, beam_width=1))
    greedy = llm.generate(PROMPTS, SamplingParams(max_tokens=NEW, temperature=0))
    assert [one.completions[0].token_ids for one in beam] == [one.completions[0].token_ids for one in greedy]


def advance(search: BeamSearch, **changes: Any) -> list[Continuation]:
    fields: dict[str, Any] = {
        "outputs": [[1], [2]],
        "log_probabilities": [-1.0, -2.0],
        "candidates": [[(5, -0.1), (0, -0.2), (6, -3.0), (7, -4.0)], [(5, -0.3), (8, -0.4), (0, -0.5), (9, -5.0)]],
        "width": 2,
        "stop_ids": frozenset([0]),
        "max_length": 10,
        "length_penalty": 1.0,
        "early_stopping": "false",
    }
    return search.advance(**fields | changes)


def test_the_best_that_do_not_end_live_on_and_those_that_end_are_answers() -> None:
    search = BeamSearch()
    assert advance(search) == [Continuation(0, 5, -1.1), Continuation(1, 5, -2.3)]
    assert [(answer.token_ids, answer.score) for answer in search.answers] == [([1, 0], -0.6)]


def test_an_end_below_the_best_width_is_no_answer() -> None:
    search = BeamSearch()
    advance(search, candidates=[[(5, -0.1), (6, -0.2), (0, -0.3)], [(7, -9.0)]])
    assert search.answers == []


def test_at_the_longest_length_all_of_the_best_are_answers_and_the_search_ends() -> None:
    search = BeamSearch()
    assert advance(search, max_length=2) == []
    assert [(answer.token_ids, answer.reason) for answer in search.answers] == [([1, 5], "length"), ([1, 0], "stop")]


def test_early_stopping_ends_the_search_with_as_many_answers_as_beams() -> None:
    ends = [[(0, -0.1), (5, -3.2)], [(0, -0.1), (5, -3.2)]]
    assert advance(BeamSearch(), candidates=ends, early_stopping="true") == []


def test_without_it_the_search_goes_on_while_a_live_beam_scores_better_now() -> None:
    ends = [[(0, -9.0), (5, -9.9)], [(0, -8.2), (5, -9.9)]]
    assert advance(BeamSearch(), candidates=ends, early_stopping="false") == []
    assert advance(BeamSearch(), candidates=ends, early_stopping="never") != []


def test_beams_share_what_they_have_in_common_and_free_what_nobody_continues() -> None:
    scheduler = make_scheduler(40, prefix_caching=False)
    scheduler.add(make_request(0, 5 * 16, 40, beam_width=4))
    model = SimulatedModel(scheduler)
    most = 0
    while not scheduler.idle:
        plan = scheduler.schedule()
        scheduler.update(plan, model.run(plan))
        scheduler.check_integrity()
        most = max(most, scheduler.blocks.used)
    assert most <= 5 + 4 * 3
    assert scheduler.stats.copies > 0


def test_beams_without_room_for_all_wait_together() -> None:
    scheduler = make_scheduler(14, max_num_batched_tokens=4, max_num_seqs=4)
    requests = [make_request(number, 20, 20, beam_width=4) for number in range(3)]
    for request in requests:
        scheduler.add(request)
    drain(scheduler, SimulatedModel(scheduler))
    assert all(len(request.beams.answers) == 4 for request in requests if request.beams)
