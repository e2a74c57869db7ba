"""The server as OpenAI's own client has it: the same answers as ``llmq generate``, whole, in chunks, many at once."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from serving import PATIENCE, Server, served
from tiny_models import BOS, save_tiny

from llmq import LLM, SamplingParams
from llmq.engine.options import EngineOptions

KEYS = ("first-key", "second-key")
BLOCK = 16 * 2 * 2 * 2 * 32 * 4
POOL = 20 * 3 + 1
"""Blocks for twenty sequences of up to 48 tokens, and the reserved one."""
SEEDED = SamplingParams(max_tokens=24, seed=7, ignore_eos=True)
ASKED: dict[str, Any] = {"max_tokens": 24, "seed": 7, "extra_body": {"ignore_eos": True}}

HISTOGRAMS = (
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_inference_time_seconds", "iteration_tokens_total", "request_prompt_tokens"),
    *("request_generation_tokens", "request_params_n", "request_params_max_tokens"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture(scope="module")
def llm(tiny: Path) -> LLM:
    return LLM(str(tiny), device="cpu", options=EngineOptions(block_size=16))


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Server]:
    flags = ("--block-size", 16, "--kv-cache-memory", POOL * BLOCK, "--served-model-name", "tiny")
    keys = [flag for key in KEYS for flag in ("--api-key", key)]
    with served(tiny, *flags, *keys) as running:
        assert running.url, running.log
        running.http.headers["Authorization"] = f"Bearer {KEYS[1]}"
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0], max_retries=0, timeout=PATIENCE)


@pytest.fixture
def async_client(server: Server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0], max_retries=0, timeout=PATIENCE)


def texts(llm: LLM, prompts: list[Any], params: SamplingParams) -> list[str]:
    return [one.text for output in llm.generate(prompts, params) for one in output.completions]


def is_quiet(server: Server) -> bool:
    """Whether the engine has nothing, and owns no block."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(server.metric(name) == 0 for name in names)


# The same answers


def test_a_completion_is_that_of_generate(client: OpenAI, llm: LLM) -> None:
    answer = client.completions.create(model="tiny", prompt="a prompt", **ASKED)
    (choice,) = answer.choices
    assert choice.text == texts(llm, ["a prompt"], SEEDED)[0]
    assert (choice.index, choice.finish_reason, answer.object, answer.model) == (0, "length", "text_completion", "tiny")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 24, 33)


def test_the_pieces_of_a_stream_add_up_to_the_whole_answer(client: OpenAI, llm: LLM) -> None:
    chunks = list(client.completions.create(model="tiny", prompt="a prompt", stream=True, **ASKED))
    assert "".join(chunk.choices[0].text for chunk in chunks) == texts(llm, ["a prompt"], SEEDED)[0]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_those_of_generate(server: Server, llm: LLM, stream: bool) -> None:
    expected = llm.generate(["a prompt"], SEEDED)[0].completions[0].token_ids
    asked = {"prompt": "a prompt", "max_tokens": 24, "seed": 7, "ignore_eos": True, "return_token_ids": True}
    answer = server.http.post("/v1/completions", json={**asked, "stream": stream}).text
    events = answer.split("\n\n")[:-2] if stream else [answer]
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert [token for choice in choices for token in choice["token_ids"]] == expected


def test_a_chat_goes_through_the_model_s_template(client: OpenAI, llm: LLM) -> None:
    messages: Any = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hé"}]}]
    answer = client.chat.completions.create(model="tiny", messages=messages, **ASKED)
    plain = [{"role": "system", "content": "be"}, {"role": "user", "content": "hé"}]
    assert answer.choices[0].message.content == texts(llm, [plain], SEEDED)[0]
    assert (answer.choices[0].message.role, answer.object) == ("assistant", "chat.completion")


def test_a_streamed_chat_begins_with_the_role_and_ends_with_usage(client: OpenAI, llm: LLM) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    stream = client.chat.completions.create(
        model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}, **ASKED
    )
    first, *middle, last = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == texts(llm, [messages], SEEDED)[0]
    assert middle[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in middle)


@pytest.mark.parametrize("way", [{}, {"stream": True}, {"n": 2}, {"best_of": 3}, {"stop": "\n"}], ids=str)
def test_usage_says_how_much_of_the_prompt_was_in_the_prefix_cache(client: OpenAI, way: dict[str, Any]) -> None:
    """Whole blocks of 16 tokens, of each prompt once."""
    prompts = [f"{way} and so forth for more than two blocks", "short"]
    found: list[int] = []
    for _ in range(2):
        options = {"stream_options": {"include_usage": True}} if "stream" in way else {}
        answer: Any = client.completions.create(model="tiny", prompt=prompts, **way, **options, **ASKED)
        usage = (list(answer)[-1] if "stream" in way else answer).usage
        assert usage.prompt_tokens == sum(map(len, prompts)) + 2
        found.append(usage.prompt_tokens_details.cached_tokens)
    assert found == [0, len(prompts[0]) // 16 * 16]


@pytest.mark.parametrize("stream", [False, True])
def test_the_async_client_gets_the_same(async_client: AsyncOpenAI, llm: LLM, stream: bool) -> None:
    async def ask() -> str:
        async with async_client:
            answer: Any = await async_client.completions.create(model="tiny", prompt="x", stream=stream, **ASKED)
            if not stream:
                return str(answer.choices[0].text)
            return "".join([chunk.choices[0].text async for chunk in answer])

    assert asyncio.run(ask()) == texts(llm, ["x"], SEEDED)[0]


def test_prompts_are_texts_or_token_ids_one_or_several(client: OpenAI, llm: LLM) -> None:
    forms: list[Any] = ["ab", [256, 97, 98], ["ab", "c"], [[256, 97, 98], [256, 99]]]
    for form in forms:
        several = isinstance(form, list) and not isinstance(form[0], int)
        prompts = form if several else [form]
        answer = client.completions.create(model="tiny", prompt=form, **ASKED)
        assert [choice.text for choice in answer.choices] == texts(llm, prompts, SEEDED)
        assert [choice.index for choice in answer.choices] == list(range(len(prompts)))


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_have_seeds_and_numbers_of_their_own(client: OpenAI, llm: LLM, stream: bool) -> None:
    prompts: list[str] = ["one", "two"]
    answer: Any = client.completions.create(model="tiny", prompt=prompts, n=4, stream=stream, **ASKED)
    found: dict[int, str] = {}
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + choice.text
    assert [found[index] for index in range(8)] == texts(llm, prompts, replace(SEEDED, n=4))


def test_sampling_is_what_is_asked_for(client: OpenAI, llm: LLM) -> None:
    fields: dict[str, Any] = {
        "top_k": 20,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "min_tokens": 3,
        "ignore_eos": True,
    }
    asked = {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    params = replace(SEEDED, **asked, **fields)
    answer = client.completions.create(model="tiny", prompt="x", seed=7, max_tokens=24, **asked, extra_body=fields)
    assert answer.choices[0].text == texts(llm, ["x"], params)[0]


def test_best_of_returns_the_likeliest(client: OpenAI, llm: LLM) -> None:
    answer = client.completions.create(model="tiny", prompt="x", n=2, best_of=5, **ASKED)
    assert [choice.text for choice in answer.choices] == texts(llm, ["x"], replace(SEEDED, n=2, best_of=5))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_text_across_tokens_ends_the_answer(client: OpenAI, llm: LLM, n: int, include: bool) -> None:
    """Tokens are bytes here: a stop text of three characters always comes in pieces."""
    whole = texts(llm, ["stop"], replace(SEEDED, n=n))[0]
    stop = next(whole[at : at + 3] for at in range(4, len(whole)) if "\ufffd" not in whole[at : at + 3])
    params = replace(SEEDED, n=n, stop=(stop, "never"), include_stop=include)
    expected = llm.generate(["stop"], params)[0].completions
    extra = {"ignore_eos": True, "include_stop_str_in_output": include}
    asked: dict[str, Any] = {"max_tokens": 24, "seed": 7, "n": n, "stop": [stop, "never"], "extra_body": extra}
    answer = client.completions.create(model="tiny", prompt="stop", **asked)
    assert [(one.text, one.finish_reason) for one in answer.choices] == [(e.text, e.finish_reason) for e in expected]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(len(one.token_ids) for one in expected)
    pieces = [choice for chunk in client.completions.create(model="tiny", prompt="stop", stream=True, **asked)
              for choice in chunk.choices]  # fmt: skip
    assert ["".join(piece.text for piece in pieces if piece.index == index) for index in range(n)] == [
        one.text for one in expected
    ]


def test_no_chunk_holds_half_a_character(client: OpenAI, llm: LLM) -> None:
    """An emoji is four tokens here, and what a random model says holds broken ones."""
    prompts = [f"🙂👩‍👩‍👧 {number}" for number in range(8)]
    expected = texts(llm, prompts, SEEDED)
    pieces: dict[int, list[str]] = {}
    for chunk in client.completions.create(model="tiny", prompt=prompts, stream=True, **ASKED):
        for choice in chunk.choices:
            pieces.setdefault(choice.index, []).append(choice.text)
    assert ["".join(pieces[index]) for index in range(8)] == expected
    echoed = client.completions.create(model="tiny", prompt="🙂é", echo=True, max_tokens=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in echoed).startswith("🙂é")


def test_logprobs_are_those_of_generate(client: OpenAI, llm: LLM) -> None:
    expected = llm.generate(["ab"], replace(SEEDED, logprobs=2, prompt_logprobs=2))[0]
    answer = client.completions.create(model="tiny", prompt="ab", logprobs=2, echo=True, **ASKED)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    scores = [one.logprob for one in (*expected.prompt_logprobs, *expected.completions[0].logprobs)]
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(scores, abs=1e-4)
    assert found.tokens is not None
    assert found.tokens[:3] == [BOS, "a", "b"]
    assert all(set(top) >= {token} for token, top in zip(found.tokens[1:], found.top_logprobs[1:], strict=True))
    assert found.text_offset[:3] == [0, 3, 4]


def test_chat_logprobs_name_tokens_bytes_and_the_likeliest(client: OpenAI, llm: LLM) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    expected = llm.generate([messages], replace(SEEDED, logprobs=3))[0].completions[0]
    for stream in (False, True):
        answer: Any = client.chat.completions.create(
            model="tiny", messages=messages, logprobs=True, top_logprobs=3, stream=stream, **ASKED
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        content = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        assert [entry.logprob for entry in content] == pytest.approx(
            [one.logprob for one in expected.logprobs], abs=1e-4
        )
        assert all(len(entry.top_logprobs) == 3 for entry in content)
        assert all(entry.bytes is None or bytes(entry.bytes).decode() == entry.token for entry in content)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_shows_a_stream_as_it_comes(server: Server, llm: LLM) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 24, "seed": 7, "ignore_eos": True, "stream": True})
    headers = ["-H", f"Authorization: Bearer {KEYS[0]}", "-H", "Content-Type: application/json"]
    command = ["curl", "-sSN", f"{server.url}/v1/completions", *headers, "-d", body]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    *events, done, end = shown.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    assert len(pieces) > 1
    assert "".join(pieces) == texts(llm, ["x"], SEEDED)[0]


# Many at once


def test_two_hundred_requests_at_once_on_a_pool_for_twenty(async_client: AsyncOpenAI, llm: LLM, server: Server) -> None:
    prompts = [f"prompt {number}" for number in range(200)]

    async def ask(prompt: str, stream: bool) -> str:
        answer: Any = await async_client.completions.create(model="tiny", prompt=prompt, stream=stream, **ASKED)
        return "".join([chunk.choices[0].text async for chunk in answer]) if stream else str(answer.choices[0].text)

    async def ask_all() -> list[str]:
        async with async_client:
            return await asyncio.gather(*(ask(prompt, number % 2 == 0) for number, prompt in enumerate(prompts)))

    assert asyncio.run(ask_all()) == texts(llm, prompts, SEEDED)
    assert is_quiet(server)


# Beside them


def test_the_model_is_listed_under_the_name_it_is_served_by(client: OpenAI, tiny: Path) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.model_extra) == ("tiny", "model", {"root": str(tiny), "max_model_len": 512})
    assert client.models.retrieve("tiny") == model


def test_tokenize_and_detokenize_are_the_model_s(server: Server) -> None:
    tokens = server.http.post("/tokenize", json={"prompt": "hé"}).json()
    assert (tokens["count"], tokens["max_model_len"]) == (len("hé".encode()) + 1, 512)
    assert server.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": f"{BOS}hé"}
    bare = server.http.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False}).json()
    assert bare["tokens"] == tokens["tokens"][1:]
    chat = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
    assert chat["count"] == len("user: x\nassistant:")


def test_metrics_are_prometheus_s_and_count_what_happened(server: Server, client: OpenAI) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    before = server.metric("generation_tokens_total")
    ended = server.metric("request_success_total", finished_reason="length")
    client.completions.create(model="tiny", prompt="x", **ASKED)
    families = {family.name: family for family in text_string_to_metric_families(server.http.get("/metrics").text)}
    assert server.metric("generation_tokens_total") == before + 24
    assert server.metric("request_success_total", finished_reason="length") == ended + 1
    assert families["llmq:kv_cache_usage_perc"].type == "gauge"
    for name in HISTOGRAMS:
        family = families[f"llmq:{name}"]
        buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
        (count,) = [sample.value for sample in family.samples if sample.name.endswith("_count")]
        assert family.type == "histogram"
        assert buckets == sorted(buckets)
        assert buckets[-1] == count > 0


def test_metrics_split_a_request_into_its_phases_and_a_step_into_tokens(server: Server, client: OpenAI) -> None:
    def sums() -> dict[str, float]:
        return {name: server.metric(f"{name}_sum") for name in HISTOGRAMS}

    before = sums()
    client.completions.create(model="tiny", prompt="xy", **ASKED)
    now = {name: value - before[name] for name, value in sums().items()}
    waited, inference = now["request_queue_time_seconds"], now["request_inference_time_seconds"]
    assert waited >= 0
    assert inference == pytest.approx(now["request_prefill_time_seconds"] + now["request_decode_time_seconds"])
    assert waited + inference <= now["e2e_request_latency_seconds"]
    # Of the answer, the last token is not computed any more.
    assert now["iteration_tokens_total"] == now["request_prompt_tokens"] + now["request_generation_tokens"] - 1
    assert (now["request_params_n"], now["request_params_max_tokens"]) == (1, 24)


SERVER = "from llmq.serve.app import create_app; load_tokenizer(resolve('demo'))"
ENGINE = "from llmq.serve import worker; from llmq import LLM; LLM('demo', device='cpu', text=False)"


@pytest.mark.parametrize(
    ("process", "spared"), [(SERVER, "torch transformers"), (ENGINE, "torch._dynamo transformers")]
)
def test_neither_process_imports_what_takes_seconds(process: str, spared: str) -> None:
    code = f"""
import sys
from llmq.checkpoint.folder import resolve
from llmq.checkpoint.tokenizer import load_tokenizer
{process}
print(sorted(set({spared.split()!r}) & sys.modules.keys()))"""
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert loaded.stdout == "[]\n"


def test_the_log_has_a_json_line_a_request_and_no_prompt(server: Server, client: OpenAI) -> None:
    client.completions.create(model="tiny", prompt="a secret text", **ASKED)
    records = [json.loads(line) for line in server.lines if line.startswith("{")]
    last = [record for record in records if record["path"] == "/v1/completions"][-1]
    assert (last["method"], last["status"], last["completion_tokens"]) == ("POST", 200, 24)
    assert "secret" not in server.log


def test_the_ready_line_says_what_fits_and_how_to_begin(server: Server) -> None:
    assert f"room for {(POOL - 1) // 32} × 512 tokens at once, or {(POOL - 1) // 8} × 128 tokens" in server.log
    assert f'base_url="{server.url}/v1"' in server.log


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic first-key", "first-key"])
def test_a_wrong_key_is_an_authentication_error(server: Server, header: str | None) -> None:
    import httpx

    headers = {} if header is None else {"Authorization": header}
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_openai_s_client_knows_the_errors(client: OpenAI, server: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as caught:
        client.completions.create(model="tiny", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="top_p must be above 0") as caught:
        client.completions.create(model="tiny", prompt="x", top_p=2)
    assert (caught.value.param, caught.value.type) == ("top_p", "invalid_request_error")
