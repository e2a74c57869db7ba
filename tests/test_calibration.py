"""Calibration windows: whole, not overlapping, the same for the same seed, and begun as the model's prompts begin;
from files, datasets, conversations, and what the model writes itself."""

from __future__ import annotations

import builtins
import json
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from command_line import llmq
from tiny_models import BYTES, save_tiny

from llmq.checkpoint.config import read_config
from llmq.checkpoint.folder import DEMO, resolve
from llmq.checkpoint.tokenizer import load_tokenizer
from llmq.errors import LlmqError
from llmq.evals.divergence import predict, window_divergences
from llmq.evals.held_out import held_out
from llmq.evals.perplexity import cut
from llmq.quant import self_calibration
from llmq.quant.calibration import draw_windows
from llmq.quant.options import SELF, Calibration
from llmq.quant.pipeline import quantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """999 characters, each a token, of which no nine in a row occur twice."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number:02x}z" for number in range(333))[:999])
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


def draw(folder: Path, data: Path | str, samples: int = 8, seqlen: int = 17, seed: int = 0) -> torch.Tensor:
    return draw_windows(folder, read_config(folder), Calibration(str(data), samples, seqlen, seed))


def readable(folder: Path, window: torch.Tensor) -> str:
    return load_tokenizer(folder).decode(window.tolist(), skip_special_tokens=True)


def test_windows_are_pieces_of_the_text_behind_the_beginning_of_sequence(folder: Path, text: Path) -> None:
    windows = draw(folder, text)
    assert windows.shape == (8, 17)
    assert (windows[:, 0] == BYTES).all()
    pieces = [readable(folder, window) for window in windows]
    starts = sorted(text.read_text().index(piece) for piece in pieces)
    assert all(later - earlier >= 16 for earlier, later in pairwise(starts))


def test_the_seed_decides_which(folder: Path, text: Path) -> None:
    assert torch.equal(draw(folder, text), draw(folder, text))
    assert not torch.equal(draw(folder, text), draw(folder, text, seed=1))


def test_a_short_text_gives_the_windows_it_has(folder: Path, text: Path) -> None:
    assert draw(folder, text, samples=1000, seqlen=101).shape == (9, 101)


def test_windows_are_no_longer_than_the_model_s_context(folder: Path, text: Path) -> None:
    assert draw(folder, text, seqlen=100_000).shape == (1, read_config(folder).context_length)


def test_jsonl_texts_are_joined(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "two")) + "\n\n")
    assert readable(folder, draw(folder, path, seqlen=9)[0]) == "one\n\ntwo"


def test_prompts_are_texts(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two", "max_tokens": 3}\n')
    assert readable(folder, draw(folder, path, seqlen=9)[0]) == "one\n\ntwo"


def test_messages_are_what_the_chat_template_makes_of_them(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    assert readable(folder, draw(folder, path, seqlen=26)[0]) == "user: hi\nassistant: yes?\n"


def test_a_template_s_beginning_of_sequence_stands_at_the_beginning_only(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    windows = draw(resolve(DEMO), path, samples=1, seqlen=3)
    assert (windows == load_tokenizer(resolve(DEMO)).bos_token_id).nonzero().tolist() == [[0, 0]]


def test_the_rows_of_a_dataset_are_read_as_lines_are(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "rows").mkdir()
    lines = [json.dumps({"text": text, "id": 1}) for text in ("one", "two")]
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(lines))
    assert readable(folder, draw(folder, tmp_path / "rows", seqlen=9)[0]) == "one\n\ntwo"


def test_a_dataset_that_the_hub_does_not_hand_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(LlmqError, match="the dataset someone/chats cannot be read") as caught:
        draw(folder, "someone/chats")
    assert "give a file" in str(caught.value.hint)


def test_without_the_library_a_dataset_of_the_hub_is_refused_with_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LlmqError, match="read by the library datasets") as caught:
        draw(folder, "someone/chats")
    assert "llmq[datasets]" in str(caught.value.hint)


def test_a_long_file_is_not_read_to_its_end(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "x" * 10_000}) + "\nnot json\n")
    assert draw(folder, path, samples=1, seqlen=16).shape == (1, 16)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "No such file"),
        ("text.csv", b"a,b", "neither .txt nor .jsonl"),
        ("text.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("text.txt", b"too short", "fewer than one window of 16"),
        ("text.jsonl", b'{"text": "fine"}\n{"text": ', "line 2"),
        ("text.jsonl", b'{"answer": "no text"}', "line 1"),
        ("text.jsonl", b'{"text": 7}', "line 1"),
        ("text.jsonl", b'{"messages": [7]}', "line 1"),
        ("text.jsonl", b'"a string"', "line 1"),
        ("text.jsonl", b"[" * 100_000, "line 1"),
        ("text.jsonl", b'{"text": "half a pair: \\ud83d"}', "line 1"),
        ("text.jsonl", b'{"messages": [{"role": "user", "content": "half a pair: \\ud83d"}]}', "line 1"),
    ],
)
def test_texts_that_cannot_be_used(
    folder: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LlmqError, match=message) as caught:
        draw(folder, path)
    assert caught.value.hint
    assert "--calib" in caught.value.hint


def test_the_tokenizer_of_another_model_is_noticed(text: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", vocab_size=64, bos_token_id=None, eos_token_id=None)
    with pytest.raises(LlmqError, match="the tokenizer gives the token"):
        draw(folder, text, seqlen=16)


@pytest.mark.parametrize("field", ["samples", "seqlen"])
def test_numbers_that_are_not_positive_are_a_usage_error(field: str) -> None:
    with pytest.raises(LlmqError) as caught:
        Calibration(**{field: 0})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("seed", [-1, 2**31, 10**20])
def test_a_seed_that_nothing_can_be_drawn_by_is_a_usage_error(folder: Path, tmp_path: Path, seed: int) -> None:
    done = llmq("quantize", folder, "-o", tmp_path / "out", "--calib-seed", seed)
    assert done.code == 2
    assert "error: --calib-seed is" in done.err
    assert not (tmp_path / "out").exists()


# What the model writes itself


def test_a_model_has_its_own_text_by_default_and_demo_that_of_the_package() -> None:
    assert Calibration().of("some/model").data == SELF
    assert Calibration().of(DEMO).data == DEMO
    assert Calibration("mine.txt").of(DEMO).data == "mine.txt"


@pytest.mark.parametrize("template", [True, False], ids=["conversations", "texts"])
def test_windows_of_the_model_s_own_text_are_whole_and_the_same_for_the_same_seed(
    tmp_path: Path, cache: Path, template: bool
) -> None:
    folder = save_tiny(tmp_path / "model")
    if not template:
        (folder / "chat_template.jinja").unlink()
    windows = draw(folder, SELF, samples=3, seqlen=64)
    assert windows.shape == (3, 64)
    assert (windows[:, 0] == BYTES).all()
    assert ("assistant:" in "".join(readable(folder, window) for window in windows)) == template
    (kept,) = cache.iterdir()
    kept.unlink()
    assert torch.equal(draw(folder, SELF, samples=3, seqlen=64), windows)
    assert not torch.equal(draw(folder, SELF, samples=3, seqlen=64, seed=1), windows)


def test_whoever_waits_is_told_how_far_the_model_is(tmp_path: Path) -> None:
    folder, told = save_tiny(tmp_path / "model"), []
    draw_windows(folder, read_config(folder), Calibration(SELF, 8, 64), on_stage=told.append)
    assert told[0] == "writing calibration text: 0 %"
    assert told[-1] == "writing calibration text: 100 %"
    assert len(told) == len(set(told)) <= 21


def test_a_model_without_a_beginning_of_sequence_writes_too(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", bos_token_id=None)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.json").write_text(
        json.dumps(json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None})
    )
    assert draw(folder, SELF, samples=2, seqlen=32).shape == (2, 32)


def test_what_is_written_is_kept_for_the_same_model_seed_and_size(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model")
    first = draw(folder, SELF, samples=2, seqlen=32)
    monkeypatch.setattr(self_calibration, "_write", lambda *arguments: pytest.fail("written again"))
    assert torch.equal(draw(folder, SELF, samples=2, seqlen=32), first)
    with pytest.raises(pytest.fail.Exception):
        draw(folder, SELF, samples=2, seqlen=33)
    save_tiny(folder, seed=1)
    with pytest.raises(pytest.fail.Exception):
        draw(folder, SELF, samples=2, seqlen=32)


def test_a_model_that_does_not_fit_is_told_of_other_texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_calibration, "available_bytes", lambda device: 1000)
    with pytest.raises(LlmqError, match="to write its own calibration text the model takes") as caught:
        draw(folder, SELF)
    assert caught.value.exit_code == 3
    assert "--calib-data FILE" in str(caught.value.hint)


def test_a_large_model_on_a_cpu_is_told_how_long_it_will_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration(SELF, 8, 64)
    assert self_calibration.expected_seconds(folder, calibration) is None
    monkeypatch.setattr(self_calibration, "LARGE", 1000)
    few, many = (self_calibration.expected_seconds(folder, Calibration(SELF, count, 64)) for count in (8, 8000))
    assert few is not None
    assert many is not None
    assert 0 < few < many
    draw(folder, SELF, samples=8, seqlen=64)
    assert self_calibration.expected_seconds(folder, calibration) is None


def test_quantize_calibrates_a_model_on_its_own_text_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_calibration, "LARGE", 1000)
    small = ("--calib-samples", 2, "--calib-seqlen", 32, "--device", "cpu")
    done = llmq("quantize", folder, "-o", tmp_path / "out", *small)
    assert done.code == 0, done.err
    assert "to write its own calibration text will take the model about 0 minutes here; --calib-data FILE" in done.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 windows of 32 tokens of text that the model wrote itself, seed 0" in card
    assert "--calib-data self" in card


@pytest.mark.slow
def test_demo_s_own_text_calibrates_within_10_percent_of_real_text(tmp_path: Path) -> None:
    """KL from the original on held-out text, at 3 bits by GPTQ, from 16 windows of 512 tokens of either."""
    token_ids = load_tokenizer(resolve(DEMO)).encode(held_out().text)
    windows = [list(window) for window in cut(token_ids, 512)][:16]
    original = predict(resolve(DEMO), windows)
    kl = {}
    for data in (DEMO, SELF):
        calibration = Calibration(data, samples=16, seqlen=512)
        quantize(DEMO, tmp_path / data, scheme="w3a16", method="gptq", calibration=calibration, device="cpu")
        kl[data] = fmean(window_divergences(original, predict(tmp_path / data, windows)))
    assert kl[SELF] < 1.1 * kl[DEMO]


def test_a_dry_run_has_no_model_write_its_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("this is what takes long")

    monkeypatch.setattr("llmq.quant.pipeline.draw_windows", refuse)
    arguments = ("quantize", "demo", "-o", tmp_path / "out", "--calib-data", "self", "--device", "cpu")
    assert llmq(*arguments, "--dry-run").code == 0
    with pytest.raises(AssertionError, match="takes long"):
        llmq(*arguments)
