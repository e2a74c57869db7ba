"""Grammars: which tokens may come next, for a completion to become JSON that fits a schema.

llguidance (https://github.com/guidance-ai/llguidance) parses the bytes of tokens, whatever the tokenizer makes of them,
and marks all tokens of the vocabulary that lead on. What it does not know of JSON Schema, it refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from llmq.errors import LlmqError

ANY_OBJECT = '{"type": "object"}'
"""The schema of whatever is an object."""
WHITESPACE = r"[ \t\r\n]{1,32}"
"""Between two parts: room to indent, and an end to it, which small models do not always find."""
COMPILED = 256
"""Schemas whose grammars are kept."""


class Matcher(Protocol):
    """Where a completion stands in its grammar: an ``llguidance.LLMatcher``."""

    def compute_bitmask(self) -> bytes:
        """Bit t % 8 of byte t // 8: whether token t may come next. A whole number of 32-bit words."""
        ...

    def consume_token(self, token_id: int, /) -> bool:
        """Go on by a token. False when it was none of those, or the grammar became too large to follow."""
        ...

    def deep_copy(self) -> Matcher:
        """Another that stands at the same place."""
        ...


class Grammars:
    """The grammars of one model's vocabulary, each compiled once; nothing is done before the first is asked for."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """``folder``: with the model's tokenizer.json. ``vocab_size``: of its logits."""
        self._tokenizer = folder / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._start = lru_cache(COMPILED)(self._compile)

    def matcher(self, schema: str) -> Matcher:
        """At the beginning of a completion that is to fit ``schema``, a text of JSON Schema.

        LlmqError when it cannot be followed, llguidance is missing, or the model has no tokenizer.json that llguidance
        reads or no end-of-text token.
        """
        return self._start(schema).deep_copy()

    def _compile(self, schema: str) -> Matcher:
        vocabulary = self._vocabulary
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
        except ValueError as error:
            raise _refusal(str(error)) from None
        matcher: Any = LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        start: Matcher = matcher
        return start

    @cached_property
    def _vocabulary(self) -> Any:
        if not self._tokenizer.exists():
            raise LlmqError(f"structured outputs need a tokenizer.json, and {self._tokenizer.parent} has none")
        if not self._eos_token_ids:
            raise LlmqError("structured outputs end with an end-of-text token, and the model has none")
        try:
            from llguidance import LLTokenizer

            text = self._tokenizer.read_text(encoding="utf-8")
            return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        except ImportError:
            raise LlmqError("structured outputs need llguidance", "pip install 'llmq[serve]'") from None
        except ValueError as error:
            raise LlmqError(f"{self._tokenizer} cannot be used for structured outputs: {error}") from None


def _refusal(reason: str) -> LlmqError:
    # Behind its reason llguidance shows its state.
    return LlmqError(f"the JSON schema cannot be followed: {' '.join(reason.partition('<state>')[0].split())}")
