"""Requests that come as they like, step by step: the tokens of ``generate``, and nothing held by what has ended."""

from __future__ import annotations

import pytest
from tiny_models import save_tiny

from llmq import LLM, LlmqError, SamplingParams
from llmq.engine.options import EngineOptions
from llmq.engine.outputs import TokenDelta
from llmq.llm import RequestOutput

PROMPTS = [[1, 2, 3], [4] * 40, [5, 6], [7] * 17]
PARAMS = [SamplingParams(max_tokens=12, seed=3, n=1 + number % 2, ignore_eos=True) for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama")
    return LLM(str(folder), device="cpu", options=EngineOptions(block_size=16), text=False)


class Reader:
    """All tokens by (request, sample), and the whole answers by request."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.tokens: dict[tuple[int, int], list[TokenDelta]] = {}
        self.outputs: dict[int, RequestOutput] = {}

    def step(self) -> None:
        for event in self.llm.step():
            if isinstance(event, TokenDelta):
                self.tokens.setdefault((event.request_index, event.sample), []).append(event)
            else:
                self.outputs[event.index] = event

    def read_on(self) -> None:
        while not self.llm.idle:
            self.step()


def test_steps_bring_the_tokens_of_generate_one_by_one(llm: LLM) -> None:
    expected = {
        (output.index, one.index): one.token_ids
        for output in llm.generate(PROMPTS, PARAMS)
        for one in output.completions
    }
    reader = Reader(llm)
    for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        llm.submit(index, prompt, params)
        reader.step()  # the next one comes while this one runs
        if index == 0:
            assert (llm.occupancy.running, llm.occupancy.waiting, llm.occupancy.swapped) == (1, 0, 0)
            assert llm.occupancy.used_blocks > 0
    llm.abort(0)
    reader.read_on()
    assert reader.outputs[0].completions[0].finish_reason == "abort"
    for (index, sample), token_ids in expected.items():
        if index:
            deltas = reader.tokens[index, sample]
            assert [delta.token_id for delta in deltas] == token_ids
            assert [delta.finish_reason for delta in deltas] == [None] * 11 + ["length"]
            assert reader.outputs[index].completions[sample].token_ids == token_ids
    assert llm.occupancy.used_blocks == 0


def test_one_answer_can_be_ended_before_the_others(llm: LLM) -> None:
    llm.submit(9, PROMPTS[1], SamplingParams(max_tokens=40, seed=3, n=2, ignore_eos=True))
    reader = Reader(llm)
    while len(reader.tokens.get((9, 0), [])) < 5:
        reader.step()
    llm.finish(9, 0)
    llm.finish(9, 0)  # it stays as it is
    llm.finish(10, 0)  # nobody knows this one
    reader.read_on()
    ended, whole = reader.outputs[9].completions
    assert (len(ended.token_ids), ended.finish_reason) == (5, "stop")
    assert (len(whole.token_ids), whole.finish_reason) == (40, "length")
    assert llm.occupancy.used_blocks == 0


def test_what_can_never_run_is_refused_when_it_is_submitted(llm: LLM) -> None:
    with pytest.raises(LlmqError, match="context is 512"):
        llm.submit(1, [1] * 600, SamplingParams())
    assert llm.idle
