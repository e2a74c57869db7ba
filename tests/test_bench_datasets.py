"""Requests from files: what is read of each form, and the number of the line that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import llmq

from llmq.bench.datasets import items_of
from llmq.bench.workload import Item, Vocabulary, Workload
from llmq.errors import FAILED, USAGE, LlmqError

LETTERS = Vocabulary(1000, encode=lambda text: [ord(one) for one in str(text)])
"""A token a letter."""


def written(folder: Path, name: str, *lines: object) -> Path:
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def read(path: Path, dataset: Any, vocabulary: Vocabulary | None = LETTERS, cell: int = 0, **fields: Any) -> list[Item]:
    return items_of(Workload(dataset=dataset, path=path, **fields), vocabulary, cell)


def refused(path: Path, dataset: Any, **fields: Any) -> str:
    with pytest.raises(LlmqError) as caught:
        read(path, dataset, **fields)
    return caught.value.message


# jsonl


def test_json_lines_are_texts_token_ids_or_messages_each_with_a_length_or_the_one_asked_for(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    path = written(
        tmp_path, "p.jsonl", {"prompt": "one"}, "", {"prompt": [1, 2], "output_len": 9}, {"messages": messages}
    )
    assert read(path, "jsonl", output_len=5) == [Item("one", 5), Item([1, 2], 9), Item(messages, 5)]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "{}",
        '{"prompt": ""}',
        '{"prompt": 5}',
        '{"prompt": [1, -1]}',
        '{"prompt": [1, "two"]}',
        '{"prompt": "a", "messages": []}',
        '{"messages": [{"role": "user"}]}',
        '{"prompt": "a", "output_len": 0}',
        '{"prompt": "a", "output_len": "many"}',
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    assert "p.jsonl, line 3 " in refused(written(tmp_path, "p.jsonl", {"prompt": "fine"}, "", line), "jsonl")


def test_what_only_python_takes_for_the_end_of_a_line_is_a_character(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False))
    assert [item.prompt for item in read(path, "jsonl")] == ["a\u2028b\x85c"]


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}', encoding="utf-8-sig")
    assert [item.prompt for item in read(path, "jsonl")] == ["one"]


def test_each_measurement_has_its_own_part_of_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", *({"prompt": f"number {number}"} for number in range(5)))
    first, second = (read(path, "jsonl", cell=cell, num_prompts=2) for cell in (0, 1))
    assert [item.prompt for item in first + second] == [f"number {number}" for number in range(4)]
    assert "5 prompts" in refused(path, "jsonl", cell=2, num_prompts=2)


def test_a_file_shorter_than_asked_for_is_taken_whole(tmp_path: Path) -> None:
    assert len(read(written(tmp_path, "p.jsonl", {"prompt": "one"}), "jsonl", num_prompts=64)) == 1


@pytest.mark.parametrize(("dataset", "content"), [("jsonl", ""), ("sharegpt", "[]"), ("trace", "")])
def test_a_file_without_prompts_is_refused(tmp_path: Path, dataset: str, content: str) -> None:
    assert "no prompts" in refused(written(tmp_path, "empty.jsonl", content), dataset)


# sharegpt


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def test_of_a_conversation_the_first_turn_is_asked_and_the_second_gives_the_length(tmp_path: Path) -> None:
    path = written(tmp_path, "s.json", json.dumps([conversation("why?", "because of this")]))
    assert read(path, "sharegpt") == [Item("why?", len("because of this"))]


def test_conversations_that_vllms_benchmark_leaves_out_are_left_out(tmp_path: Path) -> None:
    others = [conversation("why", "because"), conversation("question", "no"), conversation("a" * 1025, "long")]
    others += [conversation("a" * 1024, "b" * 1025), {"conversations": [{"from": "human", "value": "alone"}]}]
    path = written(tmp_path, "s.json", json.dumps([*others, conversation("question", "answer")]))
    assert [item.prompt for item in read(path, "sharegpt")] == ["question"]


def test_conversations_come_in_an_order_that_the_seed_gives(tmp_path: Path) -> None:
    path = written(tmp_path, "s.json", json.dumps([conversation(f"question {n}", "answer") for n in range(20)]))
    first, again, other = (read(path, "sharegpt", seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("entry", ["text", {}, {"conversations": 5}, {"conversations": [{"from": "human"}, {}]}])
def test_a_malformed_conversation_is_named_by_its_number(tmp_path: Path, entry: Any) -> None:
    path = written(tmp_path, "s.json", json.dumps([conversation("question", "answer"), entry]))
    assert "s.json, entry 2 " in refused(path, "sharegpt")


def test_what_is_no_list_of_conversations_is_refused(tmp_path: Path) -> None:
    assert "no list" in refused(written(tmp_path, "s.json", "{}"), "sharegpt")
    assert "no JSON" in refused(written(tmp_path, "s.json", "{"), "sharegpt")


# trace


def shapes(items: list[Item]) -> list[tuple[int, int, float | None]]:
    return [(len(item.prompt), item.output_len, item.due) for item in items]


def test_mooncakes_traces_are_in_milliseconds(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 27482, "input_length": 6, "output_length": 52, "hash_ids": [46, 47]},
        {"timestamp": 30535, "input_length": 9, "output_length": 3, "hash_ids": [46]},
    ]
    found = read(written(tmp_path, "mooncake.jsonl", *rows), "trace")
    assert shapes(found) == [(6, 52, 0.0), (9, 3, pytest.approx(3.053))]


def test_azures_traces_are_dates(tmp_path: Path) -> None:
    lines = (
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
    )
    found = read(written(tmp_path, "azure.csv", *lines), "trace")
    assert shapes(found) == [(374, 44, 0.0), (396, 109, pytest.approx(4.314579))]


def test_other_tables_are_in_seconds(tmp_path: Path) -> None:
    found = read(written(tmp_path, "t.csv", "timestamp,input_length,output_length", "5,3,1", "5.5,2,2"), "trace")
    assert shapes(found) == [(3, 1, 0.0), (2, 2, 0.5)]


def test_a_trace_has_fresh_prompts_in_every_measurement(tmp_path: Path) -> None:
    path = written(tmp_path, "t.csv", "timestamp,input_length,output_length", "0,30,1", "1,30,1")
    first, again, other = (read(path, "trace", cell=cell) for cell in (0, 0, 1))
    assert first == again
    assert not {str(item.prompt) for item in first} & {str(item.prompt) for item in other}


@pytest.mark.parametrize("row", ["1,two,1", "soon,1,1", "1,1", "1,1,0", "-1,1,1", "nan,1,1", "inf,1,1"])
def test_a_malformed_row_is_named_by_its_number(tmp_path: Path, row: str) -> None:
    path = written(tmp_path, "t.csv", "timestamp,input_length,output_length", "0,1,1", row)
    assert "t.csv, line 3 " in refused(path, "trace")


# The flags


def test_a_malformed_line_ends_the_command_before_the_model_is_loaded(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", {"prompt": "fine"}, "nonsense")
    result = llmq("bench", "throughput", "demo", "--dataset", "jsonl", "--dataset-path", path)
    assert (result.code, result.out) == (FAILED, "")
    assert "line 2" in result.err
    assert "hint: " in result.err


@pytest.mark.parametrize(
    "flags",
    [
        ("--dataset", "other"),
        ("--dataset", "jsonl"),
        ("--dataset-path", "file.jsonl"),
        ("--dataset", "prefix", "--prefix-len", 128),
        ("--range-ratio", 1),
        ("--num-prompts", 0),
    ],
    ids=str,
)
def test_a_workload_that_is_none_is_a_usage_error(flags: tuple[object, ...]) -> None:
    assert llmq("bench", "throughput", "demo", *flags).code == USAGE
