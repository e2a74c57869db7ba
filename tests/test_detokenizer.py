"""Streaming text: whole characters only, stop texts never seen, and the pieces add up to the text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq.engine.detokenizer import Detokenizer


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are the bytes of UTF-8."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def stream(text: str, stop: Sequence[str] = ()) -> list[str]:
    detokenizer = Detokenizer(decode_bytes, b"prompt: ", stop)
    pieces = [detokenizer.push([byte]) for byte in text.encode()]
    pieces.append(detokenizer.push([], last=True))
    assert "".join(pieces) == detokenizer.text
    return pieces


@given(st.text())
def test_the_pieces_add_up_to_the_text(text: str) -> None:
    assert "".join(stream(text)) == text


@pytest.mark.parametrize("text", ["é", "日本", "🙂👩‍👩‍👧", "a\N{COMBINING ACUTE ACCENT}"])
def test_no_piece_holds_half_a_character(text: str) -> None:
    assert not any("\ufffd" in piece for piece in stream(text))


def decode_words(token_ids: Sequence[int]) -> str:
    """As Llama 2's tokenizer: each word brings its space, a text begins with none, and special tokens have no text."""
    return "".join(("", " a", " b", "c")[token] for token in token_ids).removeprefix(" ")


@given(st.lists(st.integers(0, 3), min_size=1), st.lists(st.integers(0, 3)))
def test_a_special_token_between_words_takes_no_space_along(prompt: list[int], token_ids: list[int]) -> None:
    detokenizer = Detokenizer(decode_words, prompt, ())
    pieces = [detokenizer.push([token]) for token in token_ids]
    assert "".join(pieces) == decode_words(prompt[-6:] + token_ids).removeprefix(decode_words(prompt[-6:]))


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    detokenizer = Detokenizer(decode_bytes, b"", ())
    assert detokenizer.push([0xF0, 0x9F]) == ""
    assert "\ufffd" in detokenizer.push([], last=True)


def test_the_text_ends_before_the_stop_text() -> None:
    assert "".join(stream("one two three", stop=[" three", "two"])) == "one "


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_part_of_a_stop_text_is_ever_let_out(text: str, stop: list[str]) -> None:
    """Byte by byte, the first stop text to be complete ends the text; of two complete at once, the longer."""
    expected = text
    for end in range(1, len(text) + 1):
        starts = [end - len(one) for one in stop if text[:end].endswith(one)]
        if starts:
            expected = text[: min(starts)]
            break
    assert "".join(stream(text, stop)) == expected


def test_what_might_begin_a_stop_text_is_held_back_until_it_does_not() -> None:
    assert stream("a\n\nb", stop=["\n\n\n"]) == ["a", "", "", "\n\nb", ""]


def test_a_stop_text_that_is_kept_ends_the_text() -> None:
    detokenizer = Detokenizer(decode_bytes, b"", ["two", "tw"], include_stop=True)
    assert detokenizer.push(b"one two three", last=True) == "one tw"


def test_a_stop_text_that_comes_too_soon_does_not_count() -> None:
    detokenizer = Detokenizer(decode_bytes, b"", ["b"])
    assert detokenizer.push(b"ab", may_stop=False) == "ab"
    assert detokenizer.push(b"cb", last=True) == "c"
    assert detokenizer.stopped


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1), st.integers(0, 12))
def test_a_stop_text_counts_that_begins_too_soon_and_ends_in_time(text: str, stop: list[str], soonest: int) -> None:
    """The first to be complete ends the text that is at least ``soonest`` long by then."""
    ends = [(end, -len(one)) for one in stop for end in range(1, len(text) + 1) if text[:end].endswith(one)]
    cuts = [end + minus_length for end, minus_length in sorted(ends) if end >= soonest]
    detokenizer = Detokenizer(decode_bytes, b"", stop)
    for place, byte in enumerate(text.encode(), 1):
        detokenizer.push([byte], may_stop=place >= soonest)
    detokenizer.push([], last=True)
    assert detokenizer.text == (text[: cuts[0]] if cuts else text)
