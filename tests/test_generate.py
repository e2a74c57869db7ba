"""``llmq generate`` as a user has it: files in and out, streams, chat, and runs that were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import llmq
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read_lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_prompts(count: int, path: str = "in.jsonl") -> None:
    lines = [json.dumps({"prompt": f"prompt {number} " + "x" * (number % 7), "id": number}) for number in range(count)]
    Path(path).write_text("\n".join(lines))


SEEDED = ("--seed", 1, "--max-tokens", 6, "--ignore-eos")


def test_an_output_line_holds_the_input_line_and_the_answer(tiny: Path) -> None:
    Path("in.jsonl").write_text('{"prompt": "héllo", "id": "a7", "tags": [1]}\n')
    assert llmq("generate", tiny, "-i", "in.jsonl", "-o", "out.jsonl", *SEEDED).code == 0
    (line,) = read_lines("out.jsonl")
    assert (line["prompt"], line["id"], line["tags"], line["index"]) == ("héllo", "a7", [1], 0)
    assert (line["finish_reason"], line["prompt_tokens"], line["completion_tokens"]) == ("length", 7, 6)
    assert len(line["token_ids"]) == 6
    assert isinstance(line["text"], str)
    assert "error" not in line


def test_lines_come_in_the_order_of_the_prompts(tiny: Path) -> None:
    write_prompts(20)
    llmq("generate", tiny, "-i", "in.jsonl", "-o", "out.jsonl", "--max-num-seqs", 3, *SEEDED)
    assert [line["index"] for line in read_lines("out.jsonl")] == list(range(20))


def test_a_text_file_is_a_prompt_a_line(tiny: Path) -> None:
    Path("in.txt").write_text("one\n\ntwo\n")
    llmq("generate", tiny, "-i", "in.txt", "-o", "out.jsonl", *SEEDED)
    assert [line["prompt"] for line in read_lines("out.jsonl")] == ["one", "two"]


@pytest.mark.parametrize(("path", "text"), [("in.txt", "one"), ("in.jsonl", '{"prompt": "one"}'), ("-", "one")])
def test_a_byte_order_mark_is_no_part_of_a_prompt(tiny: Path, path: str, text: str) -> None:
    Path(path).write_text(text, encoding="utf-8-sig")
    llmq("generate", tiny, "-i", path, "-o", "out.jsonl", *SEEDED, stdin="\ufeff" + text)
    assert read_lines("out.jsonl")[0]["prompt"] == "one"


@pytest.mark.parametrize("stdin", ["one\ntwo\n", '{"prompt": "one"}\n{"prompt": "two"}\n'])
def test_stdin_and_stdout_are_files_too(tiny: Path, stdin: str) -> None:
    result = llmq("generate", tiny, "-i", "-", "-o", "-", *SEEDED, stdin=stdin)
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert sorted(line["prompt"] for line in lines) == ["one", "two"]


def test_json_prints_one_object_with_a_schema(tiny: Path) -> None:
    result = llmq("generate", tiny, "-p", "one", "-p", "two", "--json", *SEEDED)
    answer = json.loads(result.out)
    assert answer["schema"] == "llmq.generate/1"
    assert [line["index"] for line in answer["outputs"]] == [0, 1]


@pytest.mark.parametrize("output", ["out.jsonl", "-"])
def test_json_prints_one_object_beside_an_output_file_too(tiny: Path, output: str) -> None:
    write_prompts(3)
    found = json.loads(llmq("generate", tiny, "-i", "in.jsonl", "-o", output, "--json", *SEEDED).out)
    assert found["schema"] == "llmq.generate/1"
    assert [line["index"] for line in found["outputs"]] == [0, 1, 2]
    if output != "-":
        assert read_lines(output) == found["outputs"]


def test_a_lone_prompt_prints_its_text_and_nothing_else(tiny: Path) -> None:
    text = json.loads(llmq("generate", tiny, "-p", "one", "--json", *SEEDED).out)["outputs"][0]["text"]
    for mode in ("--stream", "--no-stream"):
        assert llmq("generate", tiny, "-p", "one", mode, *SEEDED).out == text + "\n"


def test_n_samples_are_n_lines(tiny: Path) -> None:
    llmq("generate", tiny, "-p", "one", "--n", 3, "-o", "out.jsonl", *SEEDED)
    lines = read_lines("out.jsonl")
    assert [(line["index"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (0, 2)]
    assert len({tuple(line["token_ids"]) for line in lines}) == 3


def test_logprobs_are_given_for_every_token(tiny: Path) -> None:
    llmq("generate", tiny, "-p", "one", "--logprobs", 3, "-o", "out.jsonl", *SEEDED)
    (line,) = read_lines("out.jsonl")
    assert [len(token["top"]) for token in line["logprobs"]] == [3] * 6
    assert all(token["logprob"] <= token["top"][0][1] for token in line["logprobs"])


def test_messages_use_the_chat_template_and_chat_makes_a_message_of_a_prompt(tiny: Path) -> None:
    Path("in.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    llmq("generate", tiny, "-i", "in.jsonl", "-o", "messages.jsonl", *SEEDED)
    llmq("generate", tiny, "-p", "hi", "--chat", "-o", "chat.jsonl", *SEEDED)
    (by_message,), (by_flag,) = read_lines("messages.jsonl"), read_lines("chat.jsonl")
    assert by_message["token_ids"] == by_flag["token_ids"]
    assert by_message["prompt_tokens"] == len("user: hi\nassistant:")


def test_resume_answers_just_what_is_missing(tiny: Path) -> None:
    write_prompts(12)
    llmq("generate", tiny, "-i", "in.jsonl", "-o", "whole.jsonl", *SEEDED)
    lines = Path("whole.jsonl").read_text().splitlines(keepends=True)
    Path("part.jsonl").write_text("".join([lines[7], lines[2], lines[9], lines[4][:20]]))
    result = llmq("generate", tiny, "-i", "in.jsonl", "-o", "part.jsonl", "--resume", *SEEDED)
    assert "3 of 12 prompts are answered already" in result.err
    assert Path("part.jsonl").read_text() == Path("whole.jsonl").read_text()


def test_resume_tries_again_what_failed(tiny: Path) -> None:
    Path("in.txt").write_text("good\n" + "x" * 600)
    assert llmq("generate", tiny, "-i", "in.txt", "-o", "out.jsonl", *SEEDED).code == 1
    again = llmq("generate", tiny, "-i", "in.txt", "-o", "out.jsonl", "--resume", *SEEDED)
    assert "1 of 2 prompts are answered already" in again.err
    assert ["error" in line for line in read_lines("out.jsonl")] == [False, True]


def test_what_failed_first_is_named_by_its_place_among_all_prompts(tiny: Path) -> None:
    Path("in.txt").write_text("\n".join(["good", "fine", "x" * 600, "y" * 600]))
    command = ("generate", tiny, "-i", "in.txt", "-o", "out.jsonl", *SEEDED)
    assert "2 of 4 prompts failed; the first, 2:" in llmq(*command).err
    assert "2 of 2 prompts failed; the first, 2:" in llmq(*command, "--resume").err


def test_resume_refuses_the_answers_to_other_prompts(tiny: Path) -> None:
    llmq("generate", tiny, "-p", "one", "-o", "out.jsonl", *SEEDED)
    before = Path("out.jsonl").read_text()
    result = llmq("generate", tiny, "-p", "other", "-o", "out.jsonl", "--resume", *SEEDED)
    assert (result.code, Path("out.jsonl").read_text()) == (1, before)
    assert "holds answers to other prompts" in result.err


def test_what_only_python_takes_for_the_end_of_a_line_is_a_character(tiny: Path) -> None:
    prompt = "a\u2028b\u2029c\x85d"
    Path("in.jsonl").write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n", encoding="utf-8")
    command = ("generate", tiny, "-i", "in.jsonl", "-o", "out.jsonl", *SEEDED)
    assert llmq(*command).code == 0
    assert json.loads(Path("out.jsonl").read_text(encoding="utf-8"))["prompt"] == prompt
    assert "1 of 1 prompts are answered already" in llmq(*command, "--resume").err


@pytest.mark.parametrize("own", [{"error": "TypeError: …"}, {"custom_id": "a", "response": "what a human said"}])
def test_fields_of_the_users_say_nothing_about_the_answer(tiny: Path, own: dict[str, str]) -> None:
    Path("in.jsonl").write_text(json.dumps({"prompt": "x"} | own))
    command = ("generate", tiny, "-i", "in.jsonl", "-o", "out.jsonl", *SEEDED)
    assert llmq(*command).code == 0
    (line,) = read_lines("out.jsonl")
    assert own.items() <= line.items()
    assert "1 of 1 prompts are answered already" in llmq(*command, "--resume").err


@pytest.mark.parametrize(
    "content", ["my notes\n", "my notes", '{"prompt": "one"}', '{"prompt": "one"}\n', "[1]\n", "7"]
)
def test_resume_leaves_a_file_alone_that_is_no_output(tiny: Path, content: str) -> None:
    Path("mine").write_text(content)
    result = llmq("generate", tiny, "-p", "one", "-o", "mine", "--resume", *SEEDED)
    assert (result.code, Path("mine").read_text()) == (1, content)
    assert "mine, line 1 is no answer of llmq generate" in result.err


def test_a_run_that_fails_before_its_first_answer_leaves_the_output_as_it_was(tiny: Path) -> None:
    Path("out.jsonl").write_text("of yesterday\n")
    for path, left in (("out.jsonl", ["of yesterday\n"]), ("new.jsonl", [])):
        assert llmq("generate", "nowhere", "-p", "x", "-o", path, "--overwrite").code == 1
        assert [one.read_text() for one in Path().glob(path)] == left


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",)])
def test_an_output_that_is_no_file_is_not_replaced_by_one(tiny: Path, flags: tuple[str, ...]) -> None:
    os.mkfifo("pipe")
    result = llmq("generate", tiny, "-p", "one", "-o", "pipe", *flags, *SEEDED)
    assert "pipe is no file" in result.err
    assert (result.code, Path("pipe").is_fifo()) == (1, True)


def test_an_output_that_is_a_link_stays_one(tiny: Path) -> None:
    Path("elsewhere").mkdir()
    Path("out.jsonl").symlink_to("elsewhere/out.jsonl")
    Path("elsewhere/out.jsonl").touch()
    assert llmq("generate", tiny, "-p", "one", "-o", "out.jsonl", "--overwrite", *SEEDED).code == 0
    assert Path("out.jsonl").is_symlink()
    assert len(read_lines("elsewhere/out.jsonl")) == 1


def test_resume_with_nothing_left_changes_nothing(tiny: Path) -> None:
    write_prompts(3)
    llmq("generate", tiny, "-i", "in.jsonl", "-o", "out.jsonl", *SEEDED)
    before = Path("out.jsonl").read_text()
    assert llmq("generate", tiny, "-i", "in.jsonl", "-o", "out.jsonl", "--resume", *SEEDED).code == 0
    assert Path("out.jsonl").read_text() == before


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_where_it_was(tiny: Path) -> None:
    write_prompts(40)
    flags = ["--seed", "1", "--max-tokens", "40", "--ignore-eos", "--max-num-seqs", "2"]
    llmq("generate", tiny, "-i", "in.jsonl", "-o", "whole.jsonl", *flags)
    command = [sys.executable, "-m", "llmq", "generate", str(tiny), "-i", "in.jsonl", "-o", "out.jsonl", *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (Path("out.jsonl").exists() and len(read_whole_lines("out.jsonl")) >= 4):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 4 <= len(read_whole_lines("out.jsonl")) < 40
    assert llmq("generate", tiny, "-i", "in.jsonl", "-o", "out.jsonl", "--resume", *flags).code == 0
    assert Path("out.jsonl").read_text() == Path("whole.jsonl").read_text()


def read_whole_lines(path: str) -> list[str]:
    return [line for line in Path(path).read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_a_full_disk_is_said_and_what_was_written_stays(tiny: Path) -> None:
    command = [sys.executable, "-m", "llmq", "generate", str(tiny), "-p", "x", "-o", "-", *map(str, SEEDED)]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert "error: stdout cannot be written: No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_reader_that_leaves_ends_the_run_quietly(tiny: Path) -> None:
    write_prompts(100)
    flags = ["--max-num-seqs", "1", *map(str, SEEDED)]
    command = [sys.executable, "-m", "llmq", "generate", str(tiny), "-i", "in.jsonl", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 1
    assert "Traceback" not in process.stderr.read()


def test_ctrl_c_ends_with_130_and_keeps_what_is_done(tiny: Path) -> None:
    write_prompts(400)
    command = [
        sys.executable,
        "-m",
        "llmq",
        "generate",
        str(tiny),
        "-i",
        "in.jsonl",
        "-o",
        "out.jsonl",
        "--max-num-seqs",
        "1",
    ]
    # What a shell runs in the background ignores Ctrl-C, and so would its children.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    while process.poll() is None and not (Path("out.jsonl").exists() and read_whole_lines("out.jsonl")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in talk
    assert 0 < len(read_lines("out.jsonl")) < 400


# OpenAI's batch files

BATCH: list[dict[str, Any]] = [
    {"custom_id": "c", "method": "POST", "url": "/v1/completions",
     "body": {"model": "m", "prompt": "one", "max_tokens": 5, "seed": 1, "n": 2, "logprobs": 1, "ignore_eos": True}},
    {"custom_id": "a", "url": "/v1/chat/completions",
     "body": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "seed": 1, "ignore_eos": True}},
    {"prompt": "a plain line", "mine": 1},
    {"custom_id": "long", "url": "/v1/completions", "body": {"prompt": "x" * 600}},
]  # fmt: skip


def write_batch(path: str = "batch.jsonl") -> None:
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in BATCH))


def test_openai_batch_lines_have_openai_answers_among_plain_ones(tiny: Path) -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    write_batch()
    assert llmq("generate", tiny, "-i", "batch.jsonl", "-o", "out.jsonl", *SEEDED).code == 1
    completion, chat, plain, long = read_lines("out.jsonl")
    assert [line.get("custom_id") for line in (completion, chat, plain, long)] == ["c", "a", None, "long"]
    assert (plain["mine"], plain["index"], plain["finish_reason"]) == (1, 2, "length")
    first = Completion.model_validate(completion["response"]["body"], strict=True)
    assert [(choice.index, choice.finish_reason) for choice in first.choices] == [(0, "length"), (1, "length")]
    assert first.usage is not None
    assert first.usage.completion_tokens == 10
    assert first.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    second = ChatCompletion.model_validate(chat["response"]["body"], strict=True)
    llmq("generate", tiny, "-p", "hi", "--chat", "-o", "chat.jsonl", *SEEDED)
    assert second.choices[0].message.content == read_lines("chat.jsonl")[0]["text"]
    assert long["response"]["status_code"] == 400
    assert "context" in long["response"]["body"]["error"]["message"]


def test_resume_finds_openai_answers_by_their_ids(tiny: Path) -> None:
    write_batch()
    llmq("generate", tiny, "-i", "batch.jsonl", "-o", "whole.jsonl", *SEEDED)
    lines = Path("whole.jsonl").read_text().splitlines(keepends=True)
    Path("part.jsonl").write_text(lines[1] + lines[3])
    result = llmq("generate", tiny, "-i", "batch.jsonl", "-o", "part.jsonl", "--resume", *SEEDED)
    assert "1 of 4 prompts are answered already" in result.err
    whole, part = read_lines("whole.jsonl"), read_lines("part.jsonl")
    assert [line.get("custom_id") for line in part] == [line.get("custom_id") for line in whole]
    texts = [[choice["text"] for choice in lines[0]["response"]["body"]["choices"]] for lines in (whole, part)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"url": "/v1/completions", "body": {"prompt": "x"}}, "custom_id"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {}}, "there is no /v1/embeddings"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {}}, "prompt"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "top_p": 7}}, "top_p must be"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": ["x", "y"]}}, "one prompt"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "stream": True}}, "stream"),
        ({"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [], "tools": [1]}}, "messages"),
    ],
)
def test_a_batch_line_that_cannot_be_run_is_found_before_any_is(tiny: Path, line: dict[str, Any], reason: str) -> None:
    Path("batch.jsonl").write_text(json.dumps(BATCH[2]) + "\n" + json.dumps(line))
    result = llmq("generate", tiny, "-i", "batch.jsonl", "-o", "out.jsonl")
    assert (result.code, result.out) == (1, "")
    assert "batch.jsonl, line 2" in result.err
    assert reason in result.err
    assert not Path("out.jsonl").exists()


def test_two_requests_of_one_custom_id_are_refused(tiny: Path) -> None:
    Path("batch.jsonl").write_text(json.dumps(BATCH[0]) + "\n" + json.dumps(BATCH[0]))
    assert "several requests with custom_id 'c'" in llmq("generate", tiny, "-i", "batch.jsonl").err
