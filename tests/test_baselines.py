"""Static and dynamic batching, and generation without a KV cache: what they compute, waste and give."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulated_model import BLOCK, SimulatedModel, answers, drain, make_request, make_scheduler
from tiny_models import save_variant

from llmq import LLM, SamplingParams
from llmq.engine.baselines import BATCHINGS, PADDING, BaselineScheduler, Batching
from llmq.engine.blocks import BlockManager
from llmq.engine.options import EngineOptions
from llmq.engine.request import Request
from llmq.errors import LlmqError
from llmq.plan import StepPlan


def make_baseline(blocks: int = 200, batching: Batching = "static", **fields: object) -> BaselineScheduler:
    extra = {name: fields.pop(name) for name in ("kv_cache", "window", "clock", "sleep") if name in fields}
    options = EngineOptions(**{"max_num_seqs": 4, "max_num_batched_tokens": 100, "block_size": BLOCK} | fields)  # type: ignore[arg-type]
    manager = BlockManager(blocks + 1, BLOCK, prefix_caching=False)
    return BaselineScheduler(options, manager, batching=batching, **extra)  # type: ignore[arg-type]


def steps(scheduler: BaselineScheduler) -> list[StepPlan]:
    model = SimulatedModel(scheduler)
    plans = []
    while not scheduler.idle:
        plans.append(scheduler.schedule())
        scheduler.update(plans[-1], model.run(plans[-1]))
        scheduler.check_integrity()
    assert scheduler.blocks.used == 0
    return plans


def tokens_of(plan: StepPlan) -> tuple[int, int]:
    """Tokens that somebody waits for, and padding."""
    wasted = sum(len(row.tokens) for row in plan.rows if row.sequence_id == PADDING)
    return plan.num_tokens - wasted, wasted


def test_a_static_batch_is_a_rectangle_that_waits_for_its_slowest_member() -> None:
    scheduler = make_baseline()
    for number, (prompt, new) in enumerate([(10, 2), (4, 5), (7, 1)]):
        scheduler.add(make_request(number, prompt, new))
    assert [tokens_of(plan) for plan in steps(scheduler)] == [(21, 9), (2, 1), (1, 2), (1, 2), (1, 2)]


def test_the_next_static_batch_starts_when_the_whole_one_before_is_done() -> None:
    scheduler = make_baseline(max_num_seqs=2)
    for number, new in enumerate([1, 3, 1]):
        scheduler.add(make_request(number, 4, new))
    assert [tokens_of(plan) for plan in steps(scheduler)] == [(8, 0), (1, 1), (1, 1), (4, 0)]


def test_a_rectangle_larger_than_a_step_is_computed_column_by_column() -> None:
    scheduler = make_baseline(max_num_batched_tokens=8)
    scheduler.add(make_request(0, 10, 1))
    scheduler.add(make_request(1, 3, 1))
    assert [plan.num_tokens for plan in steps(scheduler)] == [8, 8, 4]


def test_a_batch_is_as_large_as_surely_fits_the_pool() -> None:
    scheduler = make_baseline(blocks=5)
    for number in range(3):
        scheduler.add(make_request(number, 20, 10))
    assert [len(plan.rows) for plan in steps(scheduler) if plan.rows[0].start == 0] == [2, 1]


def test_dynamic_batching_collects_for_a_window_and_no_longer() -> None:
    now, slept = [0.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds
        if len(slept) == 1:
            scheduler.add(make_request(1, 4, 1))

    scheduler = make_baseline(batching="dynamic", window=0.5, clock=lambda: now[0], sleep=sleep)
    scheduler.add(make_request(0, 4, 1))
    now[0] = 0.2
    plan = scheduler.schedule()
    assert len(plan.rows) == 2
    assert slept == pytest.approx([0.3])


def test_a_full_dynamic_batch_waits_for_nobody() -> None:
    scheduler = make_baseline(batching="dynamic", window=9.0, max_num_seqs=2, sleep=lambda _: pytest.fail("waited"))
    for number in range(3):
        scheduler.add(make_request(number, 4, 1))
    assert len(scheduler.schedule().rows) == 2


def test_without_a_cache_every_step_computes_every_token() -> None:
    scheduler = make_baseline(batching="continuous", kv_cache=False)
    scheduler.add(make_request(0, 10, 3))
    assert [plan.num_tokens for plan in steps(scheduler)] == [10, 11, 12]


def test_without_a_cache_a_request_too_long_for_a_step_is_refused() -> None:
    with pytest.raises(LlmqError, match="computes up to 120 tokens"):
        make_baseline(kv_cache=False).add(make_request(0, 20, 10, n=4))


def test_without_a_cache_samples_that_share_no_prompt_and_then_do_not_fit_the_pool_are_refused() -> None:
    scheduler = make_baseline(blocks=12, batching="continuous", kv_cache=False, max_num_batched_tokens=1000)
    with pytest.raises(LlmqError, match="without a KV cache the request takes 16 blocks, and there are 12"):
        scheduler.add(make_request(0, 3 * BLOCK, 8, n=4))


def mixture() -> list[Request]:
    kinds: list[dict[str, object]] = [{}, {"n": 3}, {"beam_width": 2}, {}, {}]
    return [make_request(number, 3 + 5 * number, 9, **kind) for number, kind in enumerate(kinds)]


@pytest.mark.parametrize("kv_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_all_ways_give_the_same_answers(batching: Batching, kv_cache: bool) -> None:
    continuous = make_scheduler(200)
    expected = mixture()
    for request in expected:
        continuous.add(request)
    drain(continuous, SimulatedModel(continuous))
    other = make_baseline(20, batching, kv_cache=kv_cache, sleep=lambda _: None)
    found = mixture()
    for request in found:
        other.add(request)
    if batching != "continuous" or not kv_cache:
        steps(other)
        assert answers(found) == answers(expected)


@pytest.fixture(scope="module", params=["llama", "mistral-window"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder: Path = save_variant(tmp_path_factory.mktemp("tiny") / "model", request.param)
    return LLM(str(folder), device="cpu", options=EngineOptions(block_size=16, max_num_seqs=4))


PROMPTS = [[5], [7] * 20, [1, 2, 3], [9] * 33, [4] * 16, [8, 8]]
NEW = [4, 12, 1, 7, 9, 3]


@pytest.mark.parametrize("kv_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_a_model_says_the_same_in_all_of_them(llm: LLM, batching: Batching, kv_cache: bool) -> None:
    params = [SamplingParams(max_tokens=new, temperature=0, ignore_eos=True) for new in NEW]
    expected = [output.completions[0].token_ids for output in llm.generate(PROMPTS, params)]
    found = llm.generate(PROMPTS, params, batching=batching, kv_cache=kv_cache)
    assert [output.completions[0].token_ids for output in found] == expected
    assert [output.completions[0].token_ids for output in llm.generate(PROMPTS, params)] == expected


def test_a_long_prompt_beside_a_long_answer_pads_nobody_beyond_the_context(llm: LLM) -> None:
    prompts = [[3] * 500, [4] * 5]
    params = [SamplingParams(max_tokens=new, temperature=0, ignore_eos=True) for new in (2, 20)]
    expected = [output.completions[0].token_ids for output in llm.generate(prompts, params)]
    found = llm.generate(prompts, params, batching="static")
    assert [output.completions[0].token_ids for output in found] == expected


def test_a_batching_that_there_is_not(llm: LLM) -> None:
    with pytest.raises(LlmqError, match="no batching 'hourly'"):
        llm.generate(PROMPTS, batching="hourly")  # type: ignore[arg-type]
