"""The tokenizer and the chat template of a model folder, through transformers. Code in the folder is never run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from llmq.errors import LlmqError


class Tokenizer(Protocol):
    """The part of transformers' tokenizers that llmq uses."""

    bos_token_id: int | None
    chat_template: str | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def apply_chat_template(self, conversation: Sequence[dict[str, Any]], **options: Any) -> Any: ...


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` brings a tokenizer at all."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of ``folder``. LlmqError when its files are missing or damaged."""
    import transformers
    from transformers import AutoTokenizer

    transformers.logging.set_verbosity_error()  # "sequence longer than the maximum": we check lengths ourselves
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its many readers raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LlmqError(
            f"{folder}: the tokenizer cannot be loaded: {reason}", "does it hold tokenizer.json?"
        ) from error
    return tokenizer


def encode_chat(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The token ids of a conversation by the model's own chat template, ending where the answer begins."""
    if not tokenizer.chat_template:
        raise LlmqError("the model has no chat template", "pass plain prompts, without --chat")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs, and raise what they like
        raise LlmqError(f"the chat template refuses these messages: {error}") from error
    # The template writes the special tokens itself: adding them again would double the BOS.
    encode: Any = tokenizer.encode
    token_ids: list[int] = encode(text, add_special_tokens=False)
    return token_ids
