"""The whole path of a token, from the scheduler through the real cache and attention: every answer counts on."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from counting_model import counting_decoder
from simulated_model import make_request, make_scheduler
from torch import Tensor

from llmq.engine.request import Request
from llmq.errors import LlmqError
from llmq.plan import PlanRow, StepPlan
from llmq.runtime.batch import Batch, fill, view
from llmq.runtime.graphs import padded_shape
from llmq.runtime.kv_cache import KVCache
from llmq.runtime.runner import Result, Runner

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"max_num_batched_tokens": 9},
    "recompute": {"preemption": "recompute", "prefix_caching": False},
    "swap": {"preemption": "swap", "cpu_blocks": 60},
    "swap, little room": {"preemption": "swap", "cpu_blocks": 5, "prefix_caching": False},
    "prefill first": {"scheduler": "prefill-first", "max_num_batched_tokens": 120},
    "window": {"windows": (24,)},
    "full and window": {"windows": (None, 24), "preemption": "swap", "cpu_blocks": 60},
    "8 bits, and their scales": {"preemption": "swap", "cpu_blocks": 60, "dtype": torch.int8},
}


def requests(chance: random.Random) -> list[Request]:
    """Counting prompts; every third begins where another did, and some are several samples."""
    made = []
    for number in range(30):
        first = 100 * chance.randint(1, 8 if number % 3 else 2)
        prompt = list(range(first, first + chance.choice([1, 15, 16, 17, 40, chance.randint(1, 70)])))
        kind: dict[str, Any] = {"n": chance.choice([1, 1, 2, 3])} if number % 4 else {"beam_width": 1}
        made.append(make_request(number, prompt, chance.randint(1, 40), temperature=0, **kind))
    return made


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_answer_counts_on(settings: str) -> None:
    options = dict(SETTINGS[settings])
    windows, dtype = options.pop("windows", (None,)), options.pop("dtype", torch.float32)
    blocks = 22 * len(windows)
    scheduler = make_scheduler(blocks, windows=windows, **options)
    decoder = counting_decoder(windows)
    cache = KVCache(decoder.config, blocks + 1, 16, dtype, "cpu", options.get("cpu_blocks", 0))
    runner = Runner(decoder, cache, "cpu", max_sequences=64, max_tokens=2048)
    chance = random.Random(settings)
    asked = requests(chance)
    scheduler.pressure = lambda running: chance.choice(running) if running and chance.random() < 0.05 else None
    queue = list(asked)
    while queue or not scheduler.idle:
        while queue and chance.random() < 0.4:
            scheduler.add(queue.pop(0))
        if not scheduler.idle:
            plan = scheduler.schedule()
            scheduler.update(plan, runner.launch(plan)())
            scheduler.check_integrity()
    for request in asked:
        start = request.prompt_ids[-1] + 1
        found = request.beams.answers if request.beams else request.sequences
        for answer in found:
            said = list(getattr(answer, "output_ids", None) or answer.token_ids)  # type: ignore[union-attr]
            assert said == list(range(start, start + len(said)))
            assert len(said) == request.params.max_tokens
    assert scheduler.stats.preemptions > 0


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_answer_counts_on_when_each_step_is_planned_while_the_last_one_runs(settings: str) -> None:
    """Through preemption, swapping, and ends by length, by a stop token that nobody knows of yet, and from outside."""
    options = dict(SETTINGS[settings])
    windows, dtype = options.pop("windows", (None,)), options.pop("dtype", torch.float32)
    blocks = 22 * len(windows)
    scheduler = make_scheduler(blocks, windows=windows, **options)
    decoder = counting_decoder(windows)
    cache = KVCache(decoder.config, blocks + 1, 16, dtype, "cpu", options.get("cpu_blocks", 0))
    runner = Runner(decoder, cache, "cpu", max_sequences=64, max_tokens=2048)
    chance = random.Random(settings)
    asked: list[Request] = []
    for number in range(30):
        prompt = list(range(100 + number, 100 + number + chance.choice([1, 15, 16, 17, 40, chance.randint(1, 70)])))
        stop = (prompt[-1] + chance.randint(1, 60),)
        asked.append(make_request(number, prompt, chance.randint(1, 40), temperature=0, stop_token_ids=stop))
    scheduler.pressure = lambda running: chance.choice(running) if running and chance.random() < 0.05 else None
    queue, flights = list(asked), list[tuple[StepPlan, Result]]()
    while queue or flights or not scheduler.idle:
        while queue and chance.random() < 0.4:
            scheduler.add(queue.pop(0))
        if chance.random() < 0.02:
            scheduler.abort(chance.choice(asked).request_id)
        if flights:
            scheduler.presume(flights[-1][0])
        if scheduler.has_work:
            plan = scheduler.schedule()
            flights.append((plan, runner.launch(plan)))
        if len(flights) > 1 or (flights and not scheduler.has_work):
            plan, result = flights.pop(0)
            scheduler.update(plan, result())
    scheduler.check_integrity()
    assert scheduler.blocks.used == 0
    for request in asked:
        (answer,) = request.sequences
        start = request.prompt_ids[-1] + 1
        length = len(answer.output_ids)
        assert answer.output_ids == list(range(start, start + length))
        if not request.aborted:
            assert length == min(request.params.max_tokens or 0, request.params.stop_token_ids[0] - start + 1)
    assert any(one.sequences[0].finish_reason == "stop" for one in asked)
    assert scheduler.stats.preemptions > 0


class Padded:
    """What a GPU's graphs make of a step, without the graphs."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.drawn, self.mixed = runner, runner._drawn, 0

    def take(self, tokens: int) -> bool:
        return True

    def run(self, rows: list[PlanRow], block_size: int, draws: bool) -> tuple[Tensor, Tensor | None]:
        shape = padded_shape(rows, len(self.drawn))
        self.mixed += shape.max_query_length > 1
        ints = torch.frombuffer(fill(rows, shape, block_size), dtype=torch.int32)
        return self.runner._step(view(torch.cat((self.drawn, ints)), shape), draws)


@pytest.mark.parametrize("kind", ["padded", "out of memory"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_answer_counts_on_in_padded_steps_and_in_parts_of_steps(settings: str, kind: str) -> None:
    options = dict(SETTINGS[settings])
    windows, dtype = options.pop("windows", (None,)), options.pop("dtype", torch.float32)
    blocks = 22 * len(windows)
    scheduler = make_scheduler(blocks, windows=windows, **options)
    decoder = counting_decoder(windows)
    cache = KVCache(decoder.config, blocks + 1, 16, dtype, "cpu", options.get("cpu_blocks", 0))
    runner = Runner(decoder, cache, "cpu", max_sequences=64, max_tokens=2048)
    graphs = Padded(runner)
    largest = 0
    if kind == "padded":
        runner._graphs = graphs  # type: ignore[assignment]
    else:
        forward = runner._forward

        def with_little_memory(batch: Batch, whole: bool) -> Tensor:
            nonlocal largest
            if batch.shape.tokens > 5:
                raise torch.OutOfMemoryError("5 tokens are what there is room for")
            largest = max(largest, batch.shape.tokens)
            return forward(batch, whole)

        runner._forward = with_little_memory  # type: ignore[method-assign]
    asked = requests(random.Random(settings))
    for request in asked:
        scheduler.add(request)
    while not scheduler.idle:
        plan = scheduler.schedule()
        scheduler.update(plan, runner.launch(plan)())
    for request in asked:
        start = request.prompt_ids[-1] + 1
        for answer in request.beams.answers if request.beams else request.sequences:
            said = list(getattr(answer, "output_ids", None) or answer.token_ids)  # type: ignore[union-attr]
            assert said == list(range(start, start + request.params.max_tokens))  # type: ignore[operator]
    assert graphs.mixed > 0 if kind == "padded" else 1 < largest <= 5


def test_no_memory_for_one_token_is_an_error_that_says_what_to_lower() -> None:
    scheduler, decoder = make_scheduler(10), counting_decoder()
    cache = KVCache(decoder.config, 11, 16, torch.float32, "cpu")
    runner = Runner(decoder, cache, "cpu", max_sequences=64, max_tokens=2048)

    def without_memory(batch: Batch, whole: bool) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    runner._forward = without_memory  # type: ignore[method-assign]
    scheduler.add(make_request(0, [1, 2, 3], 4))
    with pytest.raises(LlmqError, match="one token") as caught:
        runner.launch(scheduler.schedule())
    assert "--gpu-memory-utilization" in str(caught.value.hint)


def test_the_count_breaks_when_a_block_is_misread() -> None:
    scheduler = make_scheduler(10)
    decoder = counting_decoder()
    cache = KVCache(decoder.config, 11, 16, torch.float32, "cpu")
    runner = Runner(decoder, cache, "cpu", max_sequences=64, max_tokens=2048)
    request = make_request(0, list(range(500, 540)), 20, temperature=0)
    scheduler.add(request)
    for step in range(20):
        if step == 3:
            cache.pool[0, 1, request.live[0].tables[0][0]] += 1
        plan = scheduler.schedule()
        scheduler.update(plan, runner.launch(plan)())
    assert request.sequences[0].output_ids != list(range(540, 560))
