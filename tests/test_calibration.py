"""Calibration windows: whole, not overlapping, the same for the same seed, and begun as the model's prompts begin."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import BYTES, save_tiny

from llmq.checkpoint.config import read_config
from llmq.errors import LlmqError
from llmq.quant.calibration import draw_windows
from llmq.quant.options import Calibration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """999 characters, each a token, of which no nine in a row occur twice."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number:02x}z" for number in range(333))[:999])
    return path


def draw(folder: Path, path: Path, samples: int = 8, seqlen: int = 17, seed: int = 0) -> torch.Tensor:
    return draw_windows(folder, read_config(folder), Calibration(str(path), samples, seqlen, seed))


def readable(folder: Path, window: torch.Tensor) -> str:
    from llmq.checkpoint.tokenizer import load_tokenizer

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
        ("text.jsonl", b'{"prompt": "no text"}', "line 1"),
        ("text.jsonl", b'"a string"', "line 1"),
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
