"""The check at submission: what can never run is refused, with both numbers and the flag that mends it."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from simulated_model import BLOCK

from llmq.engine.admission import Limits, Rejected
from llmq.engine.blocks import BlockManager
from llmq.engine.options import EngineOptions
from llmq.engine.request import SamplingParams
from llmq.engine.scheduler import Scheduler
from llmq.errors import LlmqError


def make_limits(
    blocks: int = 10, context: int = 1000, windows: tuple[int | None, ...] = (None,), **options: object
) -> Limits:
    made = EngineOptions(**{"block_size": BLOCK} | options)  # type: ignore[arg-type]
    return Limits(context, 2**20, made, BlockManager(blocks + 1, BLOCK, windows=windows))


def ask(new: int | None = 10, **params: object) -> SamplingParams:
    return SamplingParams(max_tokens=new, **params)  # type: ignore[arg-type]


def test_a_request_that_just_fits_the_pool_is_let_in_and_one_token_more_is_never() -> None:
    limits = make_limits()
    assert limits.max_total(100, ask(60)) == 160
    with pytest.raises(LlmqError, match="may take 161 tokens and the whole KV cache holds 160") as refusal:
        limits.max_total(100, ask(61))
    assert refusal.value.hint == "lower --max-tokens, or raise --kv-cache-memory to 12MiB"


def test_max_tokens_beyond_the_context_end_there() -> None:
    assert make_limits(context=120).max_total(100, ask(60)) == 120


def test_unset_max_tokens_are_what_fits_context_and_pool() -> None:
    assert make_limits(context=120).max_total(100, ask(None)) == 120
    assert make_limits(context=1000).max_total(100, ask(None)) == 160


def test_unset_max_tokens_of_several_samples_leave_room_for_all() -> None:
    limits = make_limits()
    assert limits.max_total(48, ask(None, n=2)) == (3 + 3) * BLOCK
    assert limits.blocks.worst_case(48, 96, 2) == 9


def test_a_prompt_that_fills_the_pool_leaves_no_room_for_an_answer() -> None:
    with pytest.raises(LlmqError, match="may take 161 tokens"):
        make_limits().max_total(160, ask(None))


@pytest.mark.parametrize(
    ("check", "prompt", "params", "options"),
    [
        ("context", 1000, ask(), {}),
        ("step", 100, ask(), {"scheduler": "prefill-first", "max_num_batched_tokens": 99}),
        ("sequences", 10, ask(n=5), {"max_num_seqs": 4}),
        ("blocks", 100, ask(61), {}),
    ],
)
def test_each_limit_has_a_counter_of_its_own(
    check: str, prompt: int, params: SamplingParams, options: dict[str, object]
) -> None:
    limits = make_limits(**options)
    with pytest.raises(Rejected) as refusal:
        limits.max_total(prompt, params)
    scheduler = Scheduler(limits.options, limits.blocks)
    scheduler.reject(refusal.value.check)
    counts = asdict(scheduler.stats)
    assert {name: count for name, count in counts.items() if "rejected" in name and count} == {
        "rejected": 1,
        f"rejected_{check}": 1,
    }


@pytest.mark.parametrize("prompt", [1000, 1001, 5000])
def test_a_prompt_as_long_as_the_context_is_refused(prompt: int) -> None:
    with pytest.raises(LlmqError, match=f"the prompt has {prompt} tokens and the model's context is 1000"):
        make_limits().max_total(prompt, ask())


def test_samples_share_their_prompt_when_what_they_need_is_counted() -> None:
    limits = make_limits()
    assert limits.max_total(128, ask(16, n=2)) == 144
    with pytest.raises(LlmqError, match="holds 128 in each of 4 sequences"):
        limits.max_total(128, ask(16, n=4))


def test_behind_a_window_samples_are_counted_as_if_they_shared_nothing() -> None:
    with pytest.raises(LlmqError, match="in each of 2 sequences"):
        make_limits(windows=(32,)).max_total(128, ask(16, n=2))


@pytest.mark.parametrize("kind", [{"n": 5}, {"best_of": 5}, {"beam_width": 5}], ids=str)
@pytest.mark.parametrize("option", [{"max_num_seqs": 4}, {"max_num_batched_tokens": 4}], ids=str)
def test_a_request_of_more_sequences_than_may_run_is_refused(kind: dict[str, int], option: dict[str, int]) -> None:
    with pytest.raises(LlmqError, match="the request is 5 sequences and 4 may run at once"):
        make_limits(100, **option).max_total(10, ask(**kind))


def test_where_prompts_are_not_cut_they_fit_a_step() -> None:
    options = {"scheduler": "prefill-first", "max_num_batched_tokens": 50}
    assert make_limits(**options).max_total(50, ask()) == 60
    with pytest.raises(LlmqError, match="the prompt has 51 tokens and a step computes 50"):
        make_limits(**options).max_total(51, ask())


@pytest.mark.parametrize(
    ("truncate", "new", "kept"),
    [("left", 4, range(4, 20)), ("right", 4, range(16)), ("left", None, range(1, 20)), ("error", 4, range(20))],
)
def test_a_prompt_is_cut_so_that_the_answer_has_room(truncate: str, new: int | None, kept: range) -> None:
    limits = make_limits(context=20)
    assert limits.truncated(list(range(20)), ask(new, truncate=truncate)) == list(kept)


@pytest.mark.parametrize(
    ("truncate", "new", "hint"),
    [
        ("error", 20, "shorten the prompt to 19 tokens or fewer, or pass --truncate left"),
        ("left", 20, "lower --max-tokens to 19 or less: the prompt is cut to what the answer leaves"),
        ("right", 50, "lower --max-tokens to 19 or less: the prompt is cut to what the answer leaves"),
    ],
)
def test_a_prompt_that_is_not_cut_because_the_answer_may_fill_the_context(truncate: str, new: int, hint: str) -> None:
    params, limits = ask(new, truncate=truncate), make_limits(context=20)
    with pytest.raises(Rejected) as refused:
        limits.max_total(len(limits.truncated([1] * 30, params)), params)
    assert refused.value.hint == hint


def test_a_prompt_that_fits_is_never_cut() -> None:
    assert make_limits(context=20).truncated([1] * 19, ask(10, truncate="left")) == [1] * 19
