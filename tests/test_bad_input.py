"""A user's mistake ends in one sentence, a way to mend it, and the right exit code; nothing is written or lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from command_line import Result, llmq
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))


def assert_refused(result: Result, message: str, code: int = 1) -> None:
    lines = result.err.strip().splitlines()
    assert result.code == code, result.err
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.err
    assert message in lines[0]
    assert result.out == ""


COMMANDS = [
    ("generate", "-p", "x"),
    ("memplan",),
    ("eval",),
    ("bench", "throughput"),
    ("bench", "latency"),
    ("quantize", "-o", "never-written"),
    ("convert", "-o", "never-written", "--format", "awq"),
    ("inspect",),
]


def call(command: tuple[str, ...], model: object) -> Result:
    verbs = 2 if command[0] == "bench" else 1
    return llmq(*command[:verbs], model, *command[verbs:])


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def nothing_was_written() -> bool:
    return not list(Path.cwd().iterdir())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_such_folder(command: tuple[str, ...]) -> None:
    assert_refused(call(command, "./nowhere"), "there is no folder ./nowhere")
    assert nothing_was_written()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command[0] != "memplan"], ids=" ".join)
def test_an_unknown_architecture(command: tuple[str, ...], broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"architectures": ["RwkvForCausalLM"]}))
    assert_refused(call(command, broken), "architecture RwkvForCausalLM is not supported")
    assert nothing_was_written()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_truncated_shard(command: tuple[str, ...], broken: Path) -> None:
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_refused(call(command, broken), "cut short or damaged")
    assert nothing_was_written()


NEEDING_WEIGHTS = [command for command in COMMANDS if command[0] != "memplan"]


@pytest.mark.parametrize("command", NEEDING_WEIGHTS, ids=" ".join)
def test_a_folder_with_no_weights(command: tuple[str, ...], broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    assert_refused(call(command, broken), "has no weights")


@pytest.mark.parametrize("command", NEEDING_WEIGHTS, ids=" ".join)
def test_pickled_weights(command: tuple[str, ...], broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    assert_refused(call(command, broken), "pickled weights")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_damaged_config(command: tuple[str, ...], broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    result = call(command, broken)
    assert (result.code, result.out) == (1, "")
    assert "'hidden_size'" in result.err
    assert "Traceback" not in result.err


def test_weights_of_another_shape_than_the_config(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert_refused(llmq("generate", broken, "-p", "x"), "config.json makes it")


def test_a_missing_tensor_is_named(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert_refused(llmq("generate", broken, "-p", "x"), "no tensor model.layers.2.")


def test_a_group_size_that_divides_no_layer(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "odd", "llama", hidden_size=96, intermediate_size=160, head_dim=24)
    assert_refused(llmq("quantize", model, "-o", "out", "--group-size", 64), "has 96 inputs, which groups of 64 do not")
    assert nothing_was_written()


@pytest.mark.parametrize("option", [("--bits", 7), ("--group-size", 77), ("--method", "magic"), ("--calib-samples", 0)])
def test_an_unsupported_scheme_is_a_usage_error(tiny: Path, option: tuple[str, object]) -> None:
    assert_refused(llmq("quantize", tiny, "-o", "out", *option), "", code=2)
    assert nothing_was_written()


def test_an_output_folder_that_exists_is_kept(tiny: Path) -> None:
    Path("out").mkdir()
    Path("out/mine").touch()
    assert_refused(llmq("quantize", tiny, "-o", "out", "--method", "rtn"), "exists already")
    assert [path.name for path in Path("out").iterdir()] == ["mine"]


def test_a_model_that_is_quantized_already(tiny: Path) -> None:
    assert llmq("quantize", tiny, "-o", "once", "--method", "rtn", "--group-size", 64).code == 0
    assert_refused(llmq("quantize", "once", "-o", "twice", "--method", "rtn"), "quantized already")
    assert not Path("twice").exists()


def test_an_empty_prompt(tiny: Path) -> None:
    assert_refused(llmq("generate", tiny, "-p", ""), "the prompt is empty")


def test_a_prompt_of_another_encoding(tiny: Path) -> None:
    assert_refused(llmq("generate", tiny, "-p", os.fsdecode("é".encode("latin-1"))), "the prompt is not Unicode text")


def test_a_prompt_longer_than_the_context(tiny: Path) -> None:
    result = llmq("generate", tiny, "-p", "x" * 5000, "-o", "out.jsonl")
    assert result.code == 1
    assert "the prompt has 5001 tokens and the model's context is" in result.err
    assert nothing_was_written()


def test_in_a_batch_one_bad_prompt_fails_alone(tiny: Path) -> None:
    Path("in.txt").write_text("good\n" + "x" * 5000 + "\nalso good\n")
    result = llmq("generate", tiny, "-i", "in.txt", "-o", "out.jsonl", "--max-tokens", 3)
    assert result.code == 1
    assert "error: 1 of 3 prompts failed; the first, 1:" in result.err
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [line["finish_reason"] == "error" for line in lines] == [False, True, False]
    assert lines[1]["error"].startswith("the prompt has 5001 tokens")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2"),
        pytest.param('{"prompt": "x", "mine": ' + "9" * 5000 + "}", "line 2 is JSON that cannot be read", id="digits"),
        pytest.param("[" * 200_000, "line 2 is JSON that cannot be read", id="brackets"),
        ('{"text": "x"}', "line 2"),
        ('{"prompt": ""}', "line 2: prompt"),
        ('{"prompt": 7}', "line 2: prompt"),
        ('{"prompt": "x", "messages": []}', "line 2"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 2 is not Unicode text"),
        ('{"prompt": "x", "note": "\\ud800"}', "line 2 is not Unicode text"),
        ('{"prompt": "x", "priority": "soon"}', "line 2: priority"),
        ('{"messages": [{"content": "no role"}]}', "line 2: messages.0.role"),
    ],
)
def test_a_malformed_line_is_named_by_number(tiny: Path, line: str, message: str) -> None:
    Path("in.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    assert_refused(llmq("generate", tiny, "-i", "in.jsonl", "-o", "out.jsonl"), message)
    assert not Path("out.jsonl").exists()


def test_an_input_file_that_is_not_there(tiny: Path) -> None:
    assert_refused(llmq("generate", tiny, "-i", "gone.jsonl"), "gone.jsonl cannot be read")


def test_an_input_that_is_not_text(tiny: Path) -> None:
    Path("in.txt").write_bytes(b"\xff\xfe\x00")
    assert_refused(llmq("generate", tiny, "-i", "in.txt"), "not UTF-8")


def test_a_completions_file_that_exists_is_kept(tiny: Path) -> None:
    Path("out.jsonl").write_text("mine\n")
    assert_refused(llmq("generate", tiny, "-p", "x", "-o", "out.jsonl"), "out.jsonl exists already")
    assert Path("out.jsonl").read_text() == "mine\n"


def test_a_pool_that_cannot_hold_the_answer_says_what_would(tiny: Path) -> None:
    result = llmq("generate", tiny, "-p", "x", "--max-tokens", 300, "--kv-cache-memory", "256KiB")
    assert_refused(result, "may take 302 tokens and the whole KV cache holds", code=3)
    enough = result.err.split("--kv-cache-memory to ")[1].strip()
    assert llmq("generate", tiny, "-p", "x", "--max-tokens", 300, "--seed", 1, "--kv-cache-memory", enough).code == 0


@pytest.mark.parametrize(
    "option",
    [
        ("--temperature", -1),
        ("--temperature", "nan"),
        ("--top-p", 0),
        ("--top-p", 1.5),
        ("--top-k", -1),
        ("--max-tokens", 0),
        ("--n", 0),
        ("--stop", ""),
        ("--seed", -1),
        ("--logprobs", 1000),
        ("--prompt-logprobs", -1),
        ("--best-of", 0),
        ("--beam-width", -1),
        ("--beam-width", 5000),
        ("--early-stopping", "maybe"),
        ("--length-penalty", "nan"),
        ("--min-p", 1.5),
        ("--repetition-penalty", 0),
        ("--presence-penalty", "inf"),
        ("--frequency-penalty", "nan"),
        ("--min-tokens", 1000),
        ("--stop-token-id", -1),
        ("--truncate", "middle"),
        ("--max-model-len", 1),
        ("--max-model-len", 100000),
        ("--swap-space", -1),
        ("--swap-space", "nan"),
        ("--scheduler", "magic"),
        ("--delay-factor", -1),
        ("--max-prefill-steps", 0),
        ("--max-skips", -1),
        ("--preemption", "never"),
        ("--queue", "lifo"),
        ("--block-size", 17),
        ("--max-num-seqs", 0),
        ("--max-num-batched-tokens", 0),
        ("--kv-cache-memory", "lots"),
        ("--gpu-memory-utilization", 2),
        ("-i", "both.txt"),
        ("--resume",),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_a_usage_error(tiny: Path, option: tuple[object, ...]) -> None:
    assert_refused(llmq("generate", tiny, "-p", "x", *option), "", code=2)


@pytest.mark.parametrize("option", [("--best-of", 2), ("--beam-width", 2)], ids=str)
def test_fewer_samples_or_beams_than_answers_is_a_usage_error(tiny: Path, option: tuple[object, ...]) -> None:
    assert_refused(llmq("generate", tiny, "-p", "x", "--n", 3, *option), "n (3) or more, not 2", code=2)


def test_a_swap_space_larger_than_main_memory(tiny: Path) -> None:
    assert_refused(
        llmq("generate", tiny, "-p", "x", "--swap-space", 10_000_000), "more main memory than there is", code=3
    )


def test_a_pool_larger_than_main_memory(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**9}))
    result = llmq("generate", broken, "-p", "x", "--kv-cache-memory", "100TB")
    assert_refused(result, "is more memory than there is", code=3)


def test_seats_for_more_sequences_than_a_step_has_tokens(tiny: Path) -> None:
    result = llmq("generate", tiny, "-p", "x", "--max-num-seqs", 10**10, "--max-tokens", 2)
    assert result.code == 0, result.err


def test_a_pool_that_cannot_hold_one_sequence_of_the_length_asked_for(tiny: Path) -> None:
    result = llmq("generate", tiny, "-p", "x", "--max-model-len", 300, "--kv-cache-memory", "256KiB")
    assert_refused(result, "a sequence of --max-model-len 300 does not fit", code=3)


def test_more_samples_than_may_run_at_once(tiny: Path) -> None:
    result = llmq("generate", tiny, "-p", "x", "--n", 9, "--max-num-seqs", 8)
    assert_refused(result, "the request is 9 sequences and 8 may run at once")


def test_samples_that_the_pool_can_never_hold_together(tiny: Path) -> None:
    result = llmq("generate", tiny, "-p", "x", "--n", 4, "--max-tokens", 100, "--kv-cache-memory", "256KiB")
    assert_refused(result, "the whole KV cache holds", code=3)
    enough = result.err.split("--kv-cache-memory to ")[1].strip()
    run = llmq("generate", tiny, "-p", "x", "--n", 4, "--max-tokens", 100, "--kv-cache-memory", enough, "--seed", 1)
    assert run.code == 0, run.err


def test_a_prompt_longer_than_a_step_where_prompts_are_not_cut(tiny: Path) -> None:
    flags = ("--scheduler", "prefill-first", "--max-num-batched-tokens", 50)
    assert_refused(llmq("generate", tiny, "-p", "x" * 60, *flags), "the prompt has 61 tokens and a step computes 50")


def test_a_stop_token_outside_the_vocabulary(tiny: Path) -> None:
    assert_refused(llmq("generate", tiny, "-p", "x", "--stop-token-id", 5000), "outside the vocabulary of 258")


def test_a_trace_that_cannot_be_written(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQ_TRACE", "nowhere/trace.jsonl")
    assert_refused(llmq("generate", tiny, "-p", "x"), "nowhere/trace.jsonl cannot be written")


def test_an_unknown_flag_is_a_usage_error(tiny: Path) -> None:
    assert llmq("generate", tiny, "--turbo").code == 2


def test_cuda_where_there_is_none_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(llmq("generate", tiny, "-p", "x", "--device", "cuda"), "no CUDA device")


def test_code_in_a_model_folder_never_runs(broken: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    for name in ("modeling_trap.py", "tokenization_trap.py", "configuration_trap.py"):
        (broken / name).write_text(f"open({str(trap)!r}, 'w')\n")
    config = json.loads((broken / "config.json").read_text())
    classes = {"AutoConfig": "configuration_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"}
    (broken / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    tokenizer = json.loads((broken / "tokenizer_config.json").read_text())
    tokens = {"AutoTokenizer": ["tokenization_trap.Trap", None]}
    (broken / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": tokens}))
    llmq("generate", broken, "-p", "x", "--max-tokens", 2)
    llmq("quantize", broken, "-o", "out", "--method", "rtn", "--group-size", 64)
    assert not trap.exists()


def test_debug_shows_the_traceback(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQ_DEBUG", "1")
    with pytest.raises(Exception, match="the prompt is empty"):
        llmq("generate", tiny, "-p", "")
