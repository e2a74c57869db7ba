"""A tokenizer that is read without transformers gives what transformers gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import byte_tokenizer

from llmq.checkpoint.folder import demo_folder
from llmq.checkpoint.tokenizer import GenericTokenizer, encode_chat, load_tokenizer
from llmq.errors import LlmqError

DEMO = demo_folder() / "model"


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


OURS = load_tokenizer(DEMO)


@given(text=st.text())
def test_texts_have_transformers_tokens(text: str, theirs: Any) -> None:
    assert OURS.encode(text) == theirs.encode(text)


def test_a_long_text_leaves_python_to_other_threads_meanwhile() -> None:
    done = threading.Event()

    def encode() -> None:
        OURS.encode("x " * 300_000)
        done.set()

    threading.Thread(target=encode).start()
    turns = 0
    while not done.wait(0.001):
        turns += 1
    assert turns > 10, "one or two, where they must wait for the text"


@given(token_ids=st.lists(st.integers(0, 4095), max_size=20), skip=st.booleans())
def test_tokens_have_transformers_text(token_ids: list[int], skip: bool, theirs: Any) -> None:
    assert OURS.decode(token_ids, skip_special_tokens=skip) == theirs.decode(token_ids, skip_special_tokens=skip)


@given(turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text()), min_size=1, max_size=4))
def test_conversations_have_transformers_tokens(turns: list[tuple[str, str]], theirs: Any) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encode_chat(OURS, messages) == theirs.encode(expected, add_special_tokens=False)


TEMPLATES = [
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ bos_token }}{{ eos_token }}",
    "{%- set ns = namespace(a=1) -%}\n  {% if ns.a %}\n  x\n  {% endif %}\n{{ add_generation_prompt }}",
    "{{ strftime_now('%Y') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_rendered_as_by_transformers(template: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    ours, messages = load_tokenizer(tmp_path), [{"role": "user", "content": "é <&>"}, {"role": "user", "content": "2"}]
    assert isinstance(ours, GenericTokenizer)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}"])
def test_what_a_template_refuses_is_the_user_s_mistake(template: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(LlmqError, match="chat template refuses"):
        encode_chat(load_tokenizer(tmp_path), [{"role": "user", "content": "x"}])


@pytest.mark.parametrize("change", [{"tokenizer_class": "LlamaTokenizer"}, {"add_bos_token": True}])
def test_a_class_with_rules_of_its_own_is_left_to_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | change))
    assert not isinstance(load_tokenizer(folder), GenericTokenizer)


def test_the_generic_tokenizer_needs_no_transformers() -> None:
    code = (
        "import sys; from pathlib import Path; from llmq.checkpoint.tokenizer import encode_chat, load_tokenizer\n"
        f"encode_chat(load_tokenizer(Path({str(DEMO)!r})), [dict(role='user', content='x')])\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "set()"
