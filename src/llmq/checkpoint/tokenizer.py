"""The tokenizer and the chat template of a model folder. Code in the folder is never run.

A folder whose tokenizer.json says everything is read with ``tokenizers`` and ``jinja2`` alone, in milliseconds; any
other through transformers, whose tokenizer classes add rules of their own, and whose import takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmq.errors import LlmqError

if TYPE_CHECKING:
    import jinja2


class Tokenizer(Protocol):
    """The part of transformers' tokenizers that llmq uses."""

    bos_token_id: int | None
    chat_template: str | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def apply_chat_template(self, conversation: Sequence[dict[str, Any]], **options: Any) -> Any: ...


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` brings a tokenizer at all."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


GENERIC_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}
"""Classes of transformers that do what tokenizer.json says and no more."""
OWN_RULES = ("add_bos_token", "add_eos_token", "auto_map", "split_special_tokens")
"""Settings in tokenizer_config.json that change what tokenizer.json says."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of ``folder``. LlmqError when its files are missing or damaged."""
    return _load_generic(folder) or _load_with_transformers(folder)


class GenericTokenizer:
    """A tokenizer.json and a chat template."""

    def __init__(self, core: Any, config: dict[str, Any]) -> None:
        """``core``: a ``tokenizers.Tokenizer``. ``config``: tokenizer_config.json, its chat_template a text."""
        self._core = core
        self._special = {
            name: text
            for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
            if (text := _token_text(config.get(name))) is not None
        }
        bos = self._special.get("bos_token")
        self.bos_token_id: int | None = None if bos is None else core.token_to_id(bos)
        self.chat_template: str | None = config.get("chat_template")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # Unlike ``encode``, a batch leaves Python to other threads meanwhile, which of a long text is seconds.
        encodings = self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encodings[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self._core.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, conversation: Sequence[dict[str, Any]], **options: Any) -> str:
        """The text that the template makes of a conversation. Raises whatever the template does."""
        values = self._special | {name: value for name, value in options.items() if name != "tokenize"}
        return self._template.render(messages=list(conversation), **values)

    @cached_property
    def _template(self) -> jinja2.Template:
        """The environment that templates are written for: transformers.utils.chat_template_utils."""
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.chat_template or "")


def _load_generic(folder: Path) -> GenericTokenizer | None:
    """None when the folder's tokenizer takes more than this, or cannot be read: transformers knows why."""
    from tokenizers import Tokenizer as Core
    from tokenizers.models import BPE

    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if config.get("tokenizer_class") not in GENERIC_CLASSES or any(name in config for name in OWN_RULES):
            return None
        core = Core.from_file(str(folder / "tokenizer.json"))
        template = folder / "chat_template.jinja"
        if template.exists():
            config["chat_template"] = template.read_text(encoding="utf-8")
    except Exception:  # tokenizers raises plain Exception
        return None
    if not isinstance(core.model, BPE) or not isinstance(config.get("chat_template", ""), str | None):
        return None
    core.no_truncation()
    core.no_padding()
    return GenericTokenizer(core, config)


def _token_text(token: Any) -> str | None:
    """A special token of tokenizer_config.json, which is a text or an object with its text in it."""
    return token.get("content") if isinstance(token, dict) else token


def _load_with_transformers(folder: Path) -> Tokenizer:
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


def encode_text(tokenizer: Tokenizer, text: str, special_tokens: bool = True) -> list[int]:
    """The token ids of ``text``. LlmqError when halves of characters are in it, as JSON and bytes of another encoding
    in arguments can spell them."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=special_tokens))
    except TypeError:  # tokenizers takes it for no text at all
        raise LlmqError("the prompt is not Unicode text", "write it in UTF-8, with no surrogates alone") from None


def encode_chat(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The token ids of a conversation by the model's own chat template, ending where the answer begins."""
    if not tokenizer.chat_template:
        raise LlmqError("the model has no chat template", "pass plain prompts, without --chat")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs, and raise what they like
        raise LlmqError(f"the chat template refuses these messages: {error}") from error
    # The template writes the special tokens itself: adding them again would double the BOS.
    return encode_text(tokenizer, text, special_tokens=False)
