"""Tasks on the engine: the numbers that lm-evaluation-harness gets from transformers for the same folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import llmq
from tiny_models import save_tiny

from llmq.errors import FAILED, USAGE

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.peer

QUESTIONS = [
    {"q": "def add(a, b):\n    return", "choices": [" a + b", " elephant"], "gold": 0},
    {"q": "import", "choices": [" zzqx", " os", " sys.path"], "gold": 1},
    {"q": "for i in ", "choices": [" range(10):", ";;;;"], "gold": 0},
    {"q": "class Stack:", "choices": ["\n    pass", "%%%$"], "gold": 1},
]
TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
"""
CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}{{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GENERATE = """
task: tiny_generate
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
NAMES = ("tiny_choice", "tiny_rolling")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for text in (CHOICE, ROLLING, GENERATE):
        name = text.split("task: ")[1].split("\n")[0]
        (folder / f"{name}.yaml").write_text(TASK.format(data=data) + text)
    return folder


@pytest.fixture(scope="module")
def theirs(model: Path) -> Any:
    """transformers behind lm-eval's own adapter."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(scope="module")
def ours(model: Path) -> Any:
    from llmq import LLM
    from llmq.evals.lm_eval import EngineLM

    return EngineLM(LLM(str(model), device="cpu"))


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=argument) for argument in arguments]


def test_scores_of_tasks_are_those_of_transformers(model: Path, tasks: Path, theirs: Any) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from llmq.evals.lm_eval import evaluate_tasks

    found = {result.task: result for result in evaluate_tasks(str(model), NAMES, folder=tasks, device="cpu")}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(theirs, tasks=list(NAMES), task_manager=manager, bootstrap_iters=0)["results"]
    for name in NAMES:
        assert found[name].examples == len(QUESTIONS)
        assert found[name].metrics
        for metric, (value, _) in found[name].metrics.items():
            assert value == pytest.approx(expected[name][f"{metric},none"], rel=1e-4), (name, metric)


def test_continuations_have_the_likelihood_that_transformers_gives_them(ours: Any, theirs: Any) -> None:
    pairs = requests(("def add(a, b):", " return"), ("x = ", "1"), ("", "import os"), ("a " * 400, "b c"))
    for (found, greedy), (expected, also) in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
        assert greedy == also


def test_what_greedy_decoding_writes_is_recognized_as_greedy(ours: Any) -> None:
    context = "def add(a, b):"
    ids = ours.tok_encode(context)
    written = ours._generate([ids], [ours_params(4)])[0].completions[0].token_ids
    (_, greedy), (_, other) = ours._loglikelihood_tokens([(None, ids, written), (None, ids, [*written[:-1], 7])])
    assert (greedy, other) == (True, written[-1] == 7)


def ours_params(tokens: int) -> Any:
    from llmq import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


def test_a_text_longer_than_the_context_is_scored_once_token_by_token(ours: Any, theirs: Any) -> None:
    """The windows of lm-eval's adapter are two tokens longer: its numbers agree within one context only."""
    text = requests(("def add(a, b):\n    return a + b\n" * 8,))
    assert ours.loglikelihood_rolling(text) == pytest.approx(theirs.loglikelihood_rolling(text), rel=1e-4)
    scored: list[int] = []
    inner = ours._loglikelihood_tokens

    def count(windows: Any) -> Any:
        scored.extend(len(window[2]) for window in windows)
        return inner(windows)

    ours._loglikelihood_tokens = count
    try:
        ours.loglikelihood_rolling(requests(("x" * 1300,)))
    finally:
        del ours._loglikelihood_tokens
    assert len(scored) == 3
    assert sum(scored) == 1301  # the BOS among them


def test_text_is_generated_up_to_a_stop_text_as_transformers_does(ours: Any, theirs: Any) -> None:
    greedy = {"until": [], "max_gen_toks": 8, "do_sample": False}
    whole = theirs.generate_until(requests(("import ", greedy)), disable_tqdm=True)[0]
    found = ours.generate_until(requests(("import ", greedy)))[0]
    assert found.strip("\ufffd") == whole.strip("\ufffd")
    stop = found[2]
    assert ours.generate_until(requests(("import ", greedy | {"until": [stop]})))[0] == found[: found.index(stop)]


def test_the_command_prints_a_row_for_each_metric(model: Path, tasks: Path) -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    arguments = ("eval", model, "--tasks", "tiny_choice,tiny_generate", "--task-folder", tasks, "--device", "cpu")
    result = llmq(*arguments, "--limit", 3, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["schema"] == "llmq.eval.tasks/1"
    assert [(task["task"], task["examples"]) for task in report["tasks"]] == [("tiny_choice", 3), ("tiny_generate", 3)]
    rows = llmq(*arguments).out
    assert {"acc", "acc_norm", "exact_match"} <= set(rows.split())


def test_a_task_that_there_is_not(model: Path) -> None:
    result = llmq("eval", model, "--tasks", "no_such_task", "--device", "cpu")
    assert result.code == USAGE
    assert "no task 'no_such_task'" in result.err


def test_tasks_bring_their_own_text(model: Path) -> None:
    assert llmq("eval", model, "--tasks", "tiny_choice", "--reference", "demo").code == USAGE


def test_data_that_cannot_be_had_is_an_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(TASK.format(data=tmp_path / "missing.jsonl") + CHOICE)
    result = llmq("eval", model, "--tasks", "tiny_choice", "--task-folder", tmp_path, "--device", "cpu")
    assert result.code == FAILED
    assert "error: " in result.err
