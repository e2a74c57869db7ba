"""lm-evaluation-harness against a server, by its ``local-completions``: the numbers that it gets from transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from serving import served
from tiny_models import save_tiny

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason="lm-eval[api]")
pytestmark = pytest.mark.peer

QUESTIONS = [
    {"text": "def add(a, b):\n    return", "choices": [" a + b", " elephant"], "answer": 0},
    {"text": "import", "choices": [" zzqx", " os", " sys.path"], "answer": 1},
    {"text": "for i in", "choices": [" range(10):", " é🙂"], "answer": 0},
]
TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{text}}"
target_delimiter: ""
"""
CHOICE = """
task: choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
GENERATE = """
task: generate
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def evaluate(model: Any, folder: Path, **arguments: Any) -> dict[str, Any]:
    """For each example what the model answered: log-likelihoods of the choices, or a text."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model,
        tasks=["choice", "generate"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **arguments,
    )
    return {
        name: [answer for sample in samples for answer in sample["filtered_resps"]]
        for name, samples in found["samples"].items()
    }


def test_a_task_file_of_our_own_gets_the_answers_of_transformers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (tmp_path / f"{name}.yaml").write_text(TASK.replace("DATA", str(data)) + text)
    expected = evaluate("hf", tmp_path, model_args=f"pretrained={folder},dtype=float32", device="cpu")
    with served(folder, "--served-model-name", "tiny") as server:
        assert server.url, server.log
        address = f"base_url={server.url}/v1/completions,num_concurrent=2,max_retries=1,add_bos_token=True"
        found = evaluate(
            "local-completions",
            tmp_path,
            model_args=f"model=tiny,{address},tokenizer_backend=huggingface,tokenizer={folder}",
        )
    assert found["generate"] == expected["generate"]
    for (score, greedy), (expected_score, expected_greedy) in zip(found["choice"], expected["choice"], strict=True):
        assert score == pytest.approx(expected_score, abs=1e-3)
        assert greedy == expected_greedy
