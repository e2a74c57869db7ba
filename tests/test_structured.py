"""Completions that are to be JSON of a schema are: jsonschema's own verdict, whatever is drawn, from any tokenizer."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
import torch
from command_line import llmq
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema_rs import is_valid
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from serving import PATIENCE, Server, served
from tiny_models import EOS, byte_tokenizer, save_tiny

from llmq import LLM, SamplingParams
from llmq.engine.grammar import ANY_OBJECT, Grammars, Matcher
from llmq.engine.options import EngineOptions
from llmq.errors import LlmqError
from llmq.plan import PlanRow, RowSampling
from llmq.runtime.sampler import restrict

Schema = dict[str, Any]
TREE: Schema = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 99},
                "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/tree",
}
PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "role": {"enum": ["user", "admin", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{1,3}$"}, "maxItems": 2},
        "point": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 9}, {"const": "unknown"}]},
    },
    "required": ["name", "role", "tags"],
    "additionalProperties": False,
}
DEEP: Schema = {"type": "boolean"}
for _ in range(12):
    DEEP = {"type": "object", "properties": {"in": DEEP}, "required": ["in"], "additionalProperties": False}
SCHEMAS = {
    "tree": TREE,
    "person": PERSON,
    "deep": DEEP,
    "object": json.loads(ANY_OBJECT),
    "integer": {"type": "integer"},
}
BOUNDED = {name: SCHEMAS[name] for name in ("person", "deep")}
"""Those whose texts have an end."""
LONGEST = 120


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def llm(tiny: Path) -> LLM:
    return LLM(str(tiny), device="cpu", options=EngineOptions(block_size=16))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served("demo") as running:
        assert running.url, running.log
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def fits(text: str, schema: Schema) -> bool:
    try:
        return bool(is_valid(schema, json.loads(text)))
    except ValueError:
        return False


def as_format(schema: Schema) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


# The grammar


def sentencepiece_tokenizer() -> Any:
    """As Llama-2's: ▁ for a blank, bytes for what has no token of its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = [
        "<unk>",
        "<s>",
        EOS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *'{}[]:,"0123456789abcinrtue',
        "é",
        "▁▁",
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "▁")], byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", "<s>", EOS])
    return core


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Grammars]:
    core = byte_tokenizer().backend_tokenizer if request.param == "byte-level" else sentencepiece_tokenizer()
    folder = tmp_path_factory.mktemp(request.param)
    core.save(str(folder / "tokenizer.json"))
    return core, Grammars(folder, core.get_vocab_size(), [core.token_to_id(EOS)])


def allowed(matcher: Matcher) -> list[int]:
    mask = matcher.compute_bitmask()
    return [8 * place + bit for place, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(SCHEMAS)), st.integers(0, 2**32))
def test_the_end_is_allowed_exactly_where_the_text_fits(vocabulary: tuple[Any, Grammars], name: str, seed: int) -> None:
    core, grammars = vocabulary
    eos, schema, draw = core.token_to_id(EOS), SCHEMAS[name], random.Random(seed)
    matcher = grammars.matcher(json.dumps(schema))
    token_ids: list[int] = []
    while len(token_ids) < 60:
        tokens = allowed(matcher)
        assert (eos in tokens) == fits(core.decode(token_ids), schema)
        token = draw.choice(tokens)
        if token == eos:
            break
        assert matcher.consume_token(token)
        token_ids.append(token)


def test_a_row_draws_only_what_its_grammar_allows(tiny: Path) -> None:
    logits = torch.randn(2, 258, generator=torch.Generator().manual_seed(0))
    sampling = RowSampling(temperature=1.0, top_k=0, top_p=1.0, seed=0, logprobs=None)
    matcher = Grammars(tiny, 258, [257]).matcher('{"enum": ["a", 1, null]}')
    rows = [
        PlanRow(0, 0, (1,), ((1,),), sampling),
        PlanRow(1, 0, (1,), ((1,),), sampling, allowed=matcher.compute_bitmask()),
    ]
    restricted = restrict(logits, rows)
    assert torch.equal(restricted[0], logits[0])
    kept = restricted[1].isfinite().nonzero()[:, 0].tolist()
    assert kept == allowed(matcher)
    assert torch.equal(restricted[1, kept], logits[1, kept])


# The engine


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_drawn_fits_the_schema(llm: LLM, name: str) -> None:
    schema = BOUNDED[name]
    asked = [SamplingParams(json_schema=json.dumps(schema), seed=seed, max_tokens=None) for seed in range(20)]
    answers = [output.completions[0] for output in llm.generate(["x"] * 20, asked)]
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert all(fits(answer.text, schema) for answer in answers)
    assert len({answer.text for answer in answers}) > 10


def test_a_grammar_changes_nothing_for_its_neighbours_nor_they_for_it(llm: LLM) -> None:
    guided = SamplingParams(json_schema=json.dumps(PERSON), seed=1, max_tokens=None)
    penalized = SamplingParams(repetition_penalty=1.3, seed=2, max_tokens=40, ignore_eos=True)
    params = [guided, SamplingParams(seed=3, max_tokens=60, ignore_eos=True), penalized, guided]
    together = [output.completions[0].token_ids for output in llm.generate(["a", "b", "c", "d"], params)]
    alone = [
        llm.generate([prompt], one)[0].completions[0].token_ids for prompt, one in zip("abcd", params, strict=True)
    ]
    assert together == alone


def test_preemption_loses_no_place_in_a_grammar(llm: LLM, tiny: Path) -> None:
    small = LLM(str(tiny), device="cpu", options=EngineOptions(block_size=16, kv_cache_memory=10 * 16 * 2**10))
    params = [SamplingParams(json_schema=json.dumps(DEEP), seed=seed, max_tokens=60) for seed in range(6)]
    crowded = [output.completions[0].token_ids for output in small.generate(["x"] * 6, params)]
    assert crowded == [output.completions[0].token_ids for output in llm.generate(["x"] * 6, params)]
    assert small.stats.preemptions > 0


def test_each_of_several_samples_follows_the_grammar_by_itself(llm: LLM) -> None:
    params = SamplingParams(json_schema=json.dumps(PERSON), seed=0, max_tokens=None, n=4, best_of=6)
    answers = llm.generate(["x"], params)[0].completions
    assert len({answer.text for answer in answers}) == 4
    assert all(fits(answer.text, PERSON) for answer in answers)


def test_a_token_budget_and_a_stop_text_cut_it_short(llm: LLM) -> None:
    schema = json.dumps(PERSON)
    cut = llm.generate(["x"], SamplingParams(json_schema=schema, seed=0, max_tokens=5))[0].completions[0]
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 5)
    stopped = llm.generate(["x"], SamplingParams(json_schema=schema, seed=0, stop=("role",)))[0].completions[0]
    assert stopped.finish_reason == "stop"
    assert '"name"' in stopped.text
    assert "role" not in stopped.text


@pytest.mark.parametrize("field", [{"beam_width": 2}, {"min_tokens": 3}, {"ignore_eos": True}])
def test_what_contradicts_a_grammar_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(LlmqError, match="json_schema must be left out where"):
        SamplingParams(json_schema=ANY_OBJECT, **field)


def test_a_model_that_cannot_have_grammars_says_so(tmp_path: Path) -> None:
    def reason(vocab_size: int = 258, eos_token_ids: Sequence[int] = (257,)) -> str:
        with pytest.raises(LlmqError) as refused:
            Grammars(tmp_path, vocab_size, eos_token_ids).matcher(ANY_OBJECT)
        return refused.value.message

    assert "need a tokenizer.json" in reason()
    byte_tokenizer().save_pretrained(tmp_path)
    assert "an end-of-text token, and the model has none" in reason(eos_token_ids=())
    assert "vocab size too small" in reason(vocab_size=100)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "cannot be used for structured outputs" in reason()


def test_lines_of_a_batch_file_may_ask_for_it(tiny: Path, tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "seed": 4, "response_format": as_format(PERSON)}
    lines = [{"custom_id": "good", "url": "/v1/chat/completions", "body": body}]
    lines += [{**lines[0], "custom_id": "bad", "body": body | {"response_format": as_format({"not": {}})}}]
    (tmp_path / "batch.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = llmq("generate", tiny, "-i", tmp_path / "batch.jsonl", "--device", "cpu")
    answers = {line["custom_id"]: line["response"] for line in map(json.loads, result.out.splitlines())}
    assert fits(answers["good"]["body"]["choices"][0]["message"]["content"], PERSON)
    assert (answers["bad"]["status_code"], "not" in answers["bad"]["body"]["error"]["message"]) == (400, True)
    assert result.code == 1


# The server


@pytest.mark.parametrize(
    ("form", "schema"),
    [({"type": "json_object"}, {"type": "object"}), (as_format(PERSON), PERSON), (as_format(TREE), TREE)],
    ids=["json_object", "person", "tree"],
)
def test_every_answer_is_what_was_asked_for(server: Server, form: Any, schema: Schema) -> None:
    async def ask(client: AsyncOpenAI, seed: int) -> tuple[str, str]:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "a dictionary"}], "response_format": form}
        answer: Any = await client.chat.completions.create(
            model="demo", seed=seed, max_tokens=LONGEST, temperature=1.0, stream=seed % 2 == 1, **asked
        )
        if seed % 2 == 0:
            return answer.choices[0].finish_reason, answer.choices[0].message.content
        choices = [chunk.choices[0] async for chunk in answer]
        return choices[-1].finish_reason, "".join(choice.delta.content or "" for choice in choices)

    async def ask_all() -> list[tuple[str, str]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(20)))

    answers = asyncio.run(ask_all())
    assert {reason for reason, _ in answers} <= {"stop", "length"}
    whole = [text for reason, text in answers if reason == "stop"]
    assert whole
    assert all(fits(text, schema) for text in whole)


def test_openai_s_client_makes_objects_of_a_class_s_own(client: OpenAI) -> None:
    class Point(BaseModel):
        label: Literal["a", "b"]
        x: Annotated[int, Field(ge=0, le=9)]
        colors: Annotated[list[Literal["red", "blue"]], Field(max_length=2)]

    answer = client.chat.completions.parse(
        model="demo", messages=[{"role": "user", "content": "a point"}], response_format=Point, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


def test_completions_take_a_format_too(client: OpenAI) -> None:
    more: Any = {"response_format": as_format({"enum": ["yes", "no"]})}
    answer = client.completions.create(model="demo", prompt="x = ", n=3, seed=1, extra_body=more)
    assert {choice.text for choice in answer.choices} <= {'"yes"', '"no"'}


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema"},
        {"type": "yaml"},
        as_format({"type": "strnig"}),
        as_format({"not": {"type": "string"}}),
        as_format({"$ref": "http://localhost/schema"}),
        as_format({"type": "string", "pattern": "(?=x)"}),
        as_format({"type": "integer", "minimum": 2, "maximum": 1}),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_followed_is_refused_before_the_answer_begins(client: OpenAI, form: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "hi"}], response_format=form, stream=True
        )
    assert "response_format" in str(refused.value.param)
