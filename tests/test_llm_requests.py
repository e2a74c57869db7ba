"""What a request may ask for, and what the engine may do to it, on a real model: the tokens stay the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import llmq
from tiny_models import save_tiny, save_variant

from llmq import LLM, LlmqError, SamplingParams
from llmq.checkpoint.folder import demo_folder
from llmq.engine.options import EngineOptions
from llmq.engine.request import Request
from llmq.engine.scheduler import Scheduler
from llmq.llm import RequestOutput, TextDelta

BLOCK = 16 * 2 * 2 * 2 * 32 * 4
"""Bytes of 16 tokens of a tiny model."""
MIXED = ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1})
START = [7] * 40


def prompts() -> list[list[int]]:
    chance = random.Random(0)
    lengths = [1, 15, 16, 17, 33, 48]
    unlike = [[chance.randrange(250) for _ in range(length)] for length in lengths]
    return [*unlike, [*START, 1], [*START, 2, 3], START[:32]]


def params() -> list[SamplingParams]:
    greedy = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    several = SamplingParams(max_tokens=20, seed=5, n=3, ignore_eos=True)
    beams = SamplingParams(max_tokens=20, beam_width=2, n=2)
    return [greedy, several, greedy, beams, greedy, greedy, several, greedy, beams]


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    assert all(output.error is None for output in outputs), outputs
    return [[completion.token_ids for completion in output.completions] for output in outputs]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture(scope="module")
def llm(tiny: Path) -> LLM:
    return LLM(str(tiny), device="cpu", options=EngineOptions(block_size=16))


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[list[int]]]:
    return tokens(llm.generate(prompts(), params()))


SETTINGS: dict[str, dict[str, Any]] = {
    "smallest pool": {"kv_cache_memory": 10 * BLOCK},
    "recompute": {"kv_cache_memory": 14 * BLOCK, "preemption": "recompute"},
    "recompute, no prefix cache": {
        "kv_cache_memory": 14 * BLOCK, "preemption": "recompute", "prefix_caching": False
    },
    "swap": {"kv_cache_memory": 14 * BLOCK, "preemption": "swap", "swap_space": 60 * BLOCK},
    "swap space for little": {"kv_cache_memory": 14 * BLOCK, "preemption": "swap", "swap_space": 4 * BLOCK},
    "no prefix cache": {"prefix_caching": False},
    "chunks of 3": {"max_num_batched_tokens": 3},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "blocks of 32": {"block_size": 32},
    "blocks of 64": {"block_size": 64},
    "prefill first": {"scheduler": "prefill-first", "max_num_batched_tokens": 64},
    "prefill first, smallest pool": {"scheduler": "prefill-first", "kv_cache_memory": 10 * BLOCK},
    "skips": {"kv_cache_memory": 14 * BLOCK, "max_skips": 4},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_no_setting_changes_a_token(tiny: Path, expected: list[list[list[int]]], settings: str) -> None:
    options = EngineOptions(**{"block_size": 16} | SETTINGS[settings])
    small = LLM(str(tiny), device="cpu", options=options)
    assert tokens(small.generate(prompts(), params())) == expected
    if "kv_cache_memory" in SETTINGS[settings]:
        assert small.stats.preemptions > 0
    if SETTINGS[settings].get("preemption") == "swap":
        assert small.stats.swapped_in == small.stats.swapped_out > 0


def some_of(rate: float, seed: int) -> Callable[[list[Request]], Request | None]:
    chance = random.Random(seed)
    return lambda running: chance.choice(running) if running and chance.random() < rate else None


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix cache", "no prefix cache"])
def test_preemption_at_random_changes_no_token(
    tiny: Path, expected: list[list[list[int]]], preemption: Any, prefix_caching: bool
) -> None:
    options = EngineOptions(
        block_size=16, preemption=preemption, swap_space=200 * BLOCK, prefix_caching=prefix_caching
    )  # fmt: skip
    pressed = LLM(str(tiny), device="cpu", options=options)
    pressed._scheduler.pressure = some_of(0.4, seed=1)
    assert tokens(pressed.generate(prompts(), params())) == expected
    assert pressed.stats.preemptions > 4


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_steps_planned_ahead_give_what_steps_that_wait_give(
    tiny: Path, preemption: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 0.5, "frequency_penalty": -1.5},
        {"logprobs": 2, "stop_token_ids": tuple(range(0, 250, 20))},
        {"min_tokens": 12, "stop_token_ids": tuple(range(0, 250, 3))},
        {"n": 3, "stop_token_ids": tuple(range(0, 250, 10))},
        {"n": 2, "best_of": 4, "repetition_penalty": 0.7},
        {"prompt_logprobs": 1, "presence_penalty": 2.0, "temperature": 0.0},
        {"n": 3, "ignore_eos": True},
    ]
    asked = [SamplingParams(max_tokens=24, seed=seed, **kind) for seed, kind in enumerate(kinds)]

    def run() -> tuple[list[Any], list[float], int]:
        small = LLM(
            str(tiny),
            device="cpu",
            options=EngineOptions(
                block_size=16,
                max_num_batched_tokens=16,
                kv_cache_memory=20 * BLOCK,
                preemption=preemption,
                swap_space=60 * BLOCK,
            ),
        )
        small._scheduler.pressure = some_of(0.1, seed=6)
        outputs = small.generate(prompts()[: len(kinds)], asked)
        found = [(one.token_ids, one.finish_reason) for output in outputs for one in output.completions]
        scores = [
            token.logprob
            for output in outputs
            for part in (output.prompt_logprobs, *(one.logprobs for one in output.completions))
            for token in part
        ]
        assert len(outputs[5].prompt_logprobs) == len(prompts()[5]) - 1
        return found, scores, small.stats.preemptions

    found, scores, preemptions = run()
    assert preemptions > 4
    monkeypatch.setattr(Scheduler, "foresees", False)
    expected, expected_scores, _ = run()
    assert found == expected
    assert scores == pytest.approx(expected_scores, abs=1e-4)


@pytest.mark.parametrize("variant", ["mistral-window", "full and sliding"])
def test_layers_behind_a_window_give_the_same_tokens_under_any_pressure(variant: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if variant == "mistral-window":
        save_variant(folder, variant)
    else:
        save_tiny(folder, MIXED[0], **MIXED[1])
    large = LLM(str(folder), device="cpu", options=EngineOptions(block_size=64, prefix_caching=False))
    assert len(large._blocks.windows) == (1 if variant == "mistral-window" else 2)
    expected = tokens(large.generate(prompts(), params()))
    for options in ({}, {"preemption": "swap", "swap_space": 100 * BLOCK}, {"prefix_caching": False}):
        small = LLM(
            str(folder),
            device="cpu",
            options=EngineOptions(**{"block_size": 16, "kv_cache_memory": 19 * BLOCK} | options),  # type: ignore[arg-type]
        )
        small._scheduler.pressure = some_of(0.1, seed=2)
        assert tokens(small.generate(prompts(), params())) == expected
        assert small.stats.preemptions > 0


@pytest.mark.parametrize("variant", ["llama-biases", "llama-rope", "mistral", "qwen2", "qwen3"])
def test_no_architecture_minds_pressure(variant: str, tmp_path: Path) -> None:
    folder = save_variant(tmp_path / "model", variant)
    block = BLOCK * 2 if variant == "qwen3" else BLOCK
    expected = tokens(LLM(str(folder), device="cpu").generate(prompts()[2:], params()[2:]))
    small = LLM(
        str(folder),
        device="cpu",
        options=EngineOptions(
            block_size=16, kv_cache_memory=14 * block, swap_space=60 * block, max_num_batched_tokens=24
        ),
    )
    small._scheduler.pressure = some_of(0.1, seed=3)
    assert tokens(small.generate(prompts()[2:], params()[2:])) == expected
    assert small.stats.preemptions > 0


def test_full_and_sliding_layers_give_transformers_tokens(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny(tmp_path / "model", MIXED[0], **MIXED[1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([prompts()[5]])
    full = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    ours = LLM(str(folder), device="cpu", options=EngineOptions(block_size=16)).generate(
        prompt.tolist(), SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    )
    assert ours[0].completions[0].token_ids == full[0, prompt.shape[1] :].tolist()


@pytest.mark.slow
def test_demo_says_the_same_under_any_pressure_and_in_any_batch() -> None:
    text = (demo_folder() / "evaluation.txt").read_text()
    lengths = [1, 40, 64, 200, 500, 900]
    starts = [text[1000 * number : 1000 * number + length] for number, length in enumerate(lengths)]
    asked = [*starts, starts[4][:400], starts[5]]
    greedy = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    kinds = [greedy, SamplingParams(max_tokens=24, seed=1, n=3), greedy, SamplingParams(max_tokens=24, beam_width=3)]
    large = LLM("demo", device="cpu")
    expected = tokens(large.generate(asked, kinds * 2))
    block = large._block_bytes // 4
    for options in (
        {"preemption": "recompute", "prefix_caching": False},
        {"preemption": "swap", "swap_space": 200 * block},
        {"scheduler": "prefill-first", "max_num_batched_tokens": 512, "swap_space": 200 * block},
    ):
        small = LLM(
            "demo",
            device="cpu",
            options=EngineOptions(**{"block_size": 16, "kv_cache_memory": 40 * block} | options),  # type: ignore[arg-type]
        )
        small._scheduler.pressure = some_of(0.1, seed=4)
        assert tokens(small.generate(asked, kinds * 2)) == expected
        assert small.stats.preemptions > 0
    for batching in ("static", "dynamic"):
        assert tokens(large.generate(asked, kinds * 2, batching=batching)) == expected  # type: ignore[arg-type]


# Sharing


def test_samples_share_the_prompt_s_blocks(llm: LLM) -> None:
    llm.reset_stats()
    llm.generate([[9] * 64], SamplingParams(max_tokens=8, n=4, seed=1, ignore_eos=True))
    assert llm.stats.peak_blocks == 4 + 4


def test_a_second_request_finds_the_first_one_s_prompt(llm: LLM) -> None:
    prompt = [11] * 50
    first = tokens(llm.generate([prompt], SamplingParams(max_tokens=8, temperature=0)))
    llm.reset_stats()
    outputs = llm.generate([prompt], SamplingParams(max_tokens=8, temperature=0))
    assert (llm.stats.prefix_queries, llm.stats.prefix_hits, outputs[0].cached_tokens) == (50, 48, 48)
    assert tokens(outputs) == first


def test_a_request_that_scores_its_prompt_computes_all_of_it(llm: LLM) -> None:
    prompt = [12] * 50
    llm.generate([prompt], SamplingParams(max_tokens=1))
    llm.reset_stats()
    output = llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    assert llm.stats.prefix_hits == 0
    assert len(output.prompt_logprobs) == 49


# What a request may ask for


@pytest.mark.parametrize("chunk", [5, 2048])
def test_prompt_logprobs_are_those_of_the_model(tiny: Path, chunk: int) -> None:
    from transformers import AutoModelForCausalLM

    prompt = prompts()[4]
    own = LLM(str(tiny), device="cpu", options=EngineOptions(max_num_batched_tokens=chunk))
    output = own.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=2))[0]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = [logprobs[place, token].item() for place, token in enumerate(prompt[1:])]
    assert [token.logprob for token in output.prompt_logprobs] == pytest.approx(expected, abs=1e-4)
    assert [one.top[0][0] for one in output.prompt_logprobs] == logprobs[:-1].argmax(-1).tolist()


def test_best_of_keeps_the_likeliest_samples(llm: LLM) -> None:
    prompt = prompts()[3]
    every = llm.generate([prompt], SamplingParams(max_tokens=8, n=6, seed=1, logprobs=0, ignore_eos=True))[0]
    ranked = sorted(every.completions, key=lambda one: -sum(token.logprob for token in one.logprobs))
    best = llm.generate([prompt], SamplingParams(max_tokens=8, n=2, best_of=6, seed=1, ignore_eos=True))[0]
    assert [one.token_ids for one in best.completions] == [one.token_ids for one in ranked[:2]]
    assert all(one.logprobs == [] and len(one.token_times) == 8 for one in best.completions)


def test_a_ranked_sample_has_a_time_for_each_token_whenever_the_others_end(llm: LLM) -> None:
    asked = SamplingParams(max_tokens=24, n=2, best_of=3, seed=1, ignore_eos=True)
    first = llm.generate([[1, 2, 3]], replace(asked, best_of=None))[0].completions[0]
    ended = replace(asked, n=3, best_of=4, stop_token_ids=(first.token_ids[2],))
    ranked = llm.generate([[1, 2, 3]], ended)[0].completions
    assert len({len(one.token_ids) for one in ranked}) > 1
    assert all(len(one.token_times) == len(one.token_ids) for one in ranked)


def test_penalties_are_those_of_transformers_greedy(llm: LLM, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    prompt = torch.tensor([prompts()[4]])
    full = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, eos_token_id=None,
        pad_token_id=0, repetition_penalty=1.5,
    )  # fmt: skip
    asked = SamplingParams(max_tokens=16, temperature=0, repetition_penalty=1.5, ignore_eos=True)
    assert tokens(llm.generate(prompt.tolist(), asked))[0][0] == full[0, prompt.shape[1] :].tolist()


def test_a_stop_token_ends_the_completion_after_min_tokens(llm: LLM) -> None:
    prompt = prompts()[2]
    plain = tokens(llm.generate([prompt], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)))[0][0]
    stop = plain[2]
    ended = llm.generate([prompt], SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(stop,)))[0]
    assert ended.completions[0].token_ids == plain[: plain.index(stop) + 1]
    assert ended.completions[0].finish_reason == "stop"
    later = llm.generate(
        [prompt], SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(stop,), min_tokens=10, ignore_eos=True)
    )[0].completions[0]
    assert stop not in later.token_ids[:10]


@pytest.mark.parametrize("cut", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}], ids=str)
def test_the_coldest_draw_is_the_likeliest_token_and_the_hottest_is_what_is_not_cut(
    llm: LLM, cut: dict[str, Any]
) -> None:
    asked = SamplingParams(max_tokens=4, temperature=0, logprobs=5, seed=3, ignore_eos=True, **cut)
    greedy = llm.generate([[5, 6]], asked)[0].completions[0]
    for cold in (1e-300, 1e-46, 1e-39):
        assert tokens(llm.generate([[5, 6]], replace(asked, temperature=cold)))[0][0] == greedy.token_ids
    hot = llm.generate([[5, 6]], replace(asked, temperature=1e300, n=20))[0].completions
    first = {one.token_ids[0] for one in hot}
    assert len(first) > 3
    if cut:
        assert first <= {token for token, _ in greedy.logprobs[0].top}


def test_priorities_of_a_file_s_lines_order_the_answers(tiny: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "a", "priority": 2}, {"prompt": "b", "priority": 0}, {"prompt": "c", "priority": 1}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--max-num-seqs", 1, "--queue", "priority", "--max-tokens", 2, "--ignore-eos")
    result = llmq("generate", tiny, "-i", tmp_path / "in.jsonl", *flags)
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["b", "c", "a"]


def test_one_text_is_no_tuple_of_stop_texts() -> None:
    with pytest.raises(LlmqError, match="stop must be a tuple of texts, none of them empty, not END"):
        SamplingParams(stop="END")  # type: ignore[arg-type]


def test_the_stop_text_is_kept_where_asked() -> None:
    demo = LLM("demo", device="cpu")
    whole = demo.generate(["def "], SamplingParams(max_tokens=24, temperature=0))[0].completions[0].text
    stop = whole[10:13]
    asked = SamplingParams(max_tokens=24, temperature=0, stop=(stop,), include_stop=True)
    assert demo.generate(["def "], asked)[0].completions[0].text == whole[: whole.index(stop) + 3]


@pytest.mark.parametrize("kind", [{}, {"best_of": 2}], ids=str)
@pytest.mark.parametrize("before", [1, 2])
def test_a_stop_text_ends_the_completion_after_min_tokens(kind: dict[str, Any], before: int) -> None:
    demo = LLM("demo", device="cpu")
    asked = SamplingParams(max_tokens=12, temperature=0, **kind)
    whole = demo.generate(["def "], asked)[0].completions[0]
    texts = [demo.tokenizer.decode(whole.token_ids[:count], skip_special_tokens=True) for count in range(13)]
    stop = texts[3][len(texts[before]) :]  # one token, or two
    assert whole.text.count(stop) == 1
    ended, ended_too, goes_on = (
        demo.generate(["def "], replace(asked, stop=(stop,), min_tokens=count))[0].completions[0].text
        for count in (1, 2, 3)
    )
    assert (ended, ended_too, goes_on) == (texts[before], texts[before], whole.text)


@pytest.mark.parametrize(("truncate", "kept"), [("left", slice(-502, None)), ("right", slice(0, 502))])
def test_a_long_prompt_is_cut_only_where_asked(llm: LLM, truncate: Any, kept: slice) -> None:
    prompt = [number % 250 for number in range(600)]
    output = llm.generate([prompt], SamplingParams(max_tokens=10, truncate=truncate, ignore_eos=True))[0]
    assert output.prompt_token_ids == prompt[kept]
    assert len(output.completions[0].token_ids) == 10
    assert llm.generate([prompt], SamplingParams(max_tokens=10))[0].error is not None


def test_unset_max_tokens_are_what_fits_the_pool(tiny: Path) -> None:
    small = LLM(str(tiny), device="cpu", options=EngineOptions(block_size=16, kv_cache_memory=6 * BLOCK))
    completion = small.generate([[3] * 20], SamplingParams(max_tokens=None, ignore_eos=True))[0].completions[0]
    assert (len(completion.token_ids), completion.finish_reason) == (60, "length")


def test_max_model_len_bounds_prompt_and_completion(tiny: Path) -> None:
    short = LLM(str(tiny), device="cpu", options=EngineOptions(max_model_len=30))
    fits, too_long = short.generate([[3] * 25, [3] * 30], SamplingParams(max_tokens=50, ignore_eos=True))
    assert len(fits.completions[0].token_ids) == 5
    assert "context is 30" in str(too_long.error)
    assert short.stats.rejected == 1


# Requests and their ids


def test_a_request_with_an_id_that_is_taken_fails_alone(llm: LLM) -> None:
    asked = SamplingParams(max_tokens=3, ignore_eos=True)
    outputs = llm.generate([[1], [2], [3]], asked, request_ids=["a", "a", "b"])
    assert [output.error is None for output in outputs] == [True, False, True]
    assert "request 'a' already" in str(outputs[1].error)


@pytest.mark.parametrize("kind", [{}, {"n": 2}, {"beam_width": 2}, {"best_of": 3}], ids=str)
def test_an_aborted_request_hands_out_what_it_has_and_the_others_go_on(llm: LLM, kind: dict[str, Any]) -> None:
    asked = SamplingParams(max_tokens=10, seed=1, ignore_eos=True, **kind)
    other = SamplingParams(max_tokens=10, seed=1, ignore_eos=True)
    finished: dict[int, RequestOutput] = {}
    for event in llm.stream([[1, 2, 3], [4, 5, 6]], [asked, other], request_ids=["gone", "stays"]):
        if isinstance(event, RequestOutput):
            finished[event.index] = event
        elif isinstance(event, TextDelta) and event.request_index == 1:
            llm.abort("gone")
            llm.abort("gone")
    assert {one.finish_reason for one in finished[0].completions} == {"abort"}
    assert all(len(one.token_ids) < 10 for one in finished[0].completions)
    assert len(finished[1].completions[0].token_ids) == 10
    assert llm._blocks.used == 0


def test_the_command_line_has_a_flag_for_everything(tiny: Path) -> None:
    flags = (
        *("--min-p", 0.01, "--repetition-penalty", 1.1, "--presence-penalty", 0.1, "--frequency-penalty", 0.1),
        *("--min-tokens", 2, "--stop-token-id", 3, "--include-stop", "--n", 2, "--best-of", 3, "--seed", 1),
        *("--prompt-logprobs", 1, "--truncate", "left", "--max-model-len", 64, "--no-prefix-caching"),
        *("--swap-space", 0.001, "--scheduler", "prefill-first", "--delay-factor", 0.5, "--max-prefill-steps", 2),
        *("--max-skips", 1, "--preemption", "swap", "--queue", "priority", "--max-tokens", 4, "--json"),
    )
    result = llmq("generate", tiny, "-p", "x" * 100, *flags)
    assert result.code == 0, result.err
    outputs = json.loads(result.out)["outputs"]
    assert len(outputs) == 2
    assert outputs[0]["prompt_tokens"] == 60
    assert len(outputs[0]["prompt_logprobs"]) == 59
    assert outputs[0]["score"] >= outputs[1]["score"]


def test_beams_on_the_command_line_come_best_first_with_their_scores(tiny: Path) -> None:
    flags = ("--beam-width", 3, "--n", 3, "--length-penalty", 0.5, "--early-stopping", "never", "--max-tokens", 4)
    outputs = json.loads(llmq("generate", tiny, "-p", "x", *flags, "--json").out)["outputs"]
    scores = [output["score"] for output in outputs]
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(output["token_ids"]) for output in outputs}) == 3


def test_a_trace_has_a_line_for_each_step(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.jsonl"
    monkeypatch.setenv("LLMQ_TRACE", str(path))
    traced = LLM(str(tiny), device="cpu", options=EngineOptions(block_size=16, kv_cache_memory=12 * BLOCK))
    traced.generate(prompts(), params()[0])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == traced.stats.steps
    assert sum(len(line["preempted"]) for line in lines) == traced.stats.preemptions > 0
    assert {line["wait"] for line in lines} >= {"", "blocks"}
    assert all(0 <= line["blocks_free"] <= line["blocks_total"] for line in lines)
