"""A text → the windows of tokens that calibrate a model.

``--calib-data`` is one of

    FILE.txt     a text
    FILE.jsonl   lines with a ``text``, a ``prompt``, or the ``messages`` of a conversation, which the model's own chat
                 template makes a text of
    OWNER/NAME   a dataset of the hub, or OWNER/NAME:CONFIG, or the folder of one: rows as such lines are
    demo         the Python sources shipped with llmq
    self         what the model itself writes: see ``quant.self_calibration``
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.config import ModelConfig
from llmq.checkpoint.folder import DEMO, HUB_ID, demo_folder
from llmq.checkpoint.tokenizer import Tokenizer, load_tokenizer
from llmq.errors import LlmqError
from llmq.quant.options import SELF, Calibration
from llmq.quant.self_calibration import OnStage, self_text
from llmq.texts import checked, join, read_text

CHARACTERS_PER_TOKEN = 32
"""Characters read for each token wanted: several times what a token takes, so that there is a choice of windows."""
COLUMNS = "text", "prompt", "messages"
DATA_HINT = '--calib-data takes a .txt file, a .jsonl file with "text", "prompt" or "messages" in each line, or self'


def draw_windows(
    folder: Path,
    config: ModelConfig,
    calibration: Calibration,
    device: str = "cpu",
    on_stage: OnStage = lambda what: None,
) -> Tensor:
    """Token ids int64 [windows, tokens] of windows that do not overlap, in random order.

    There are fewer than ``calibration.samples`` when the text has no more. Where the tokenizer begins a text with the
    beginning-of-sequence token, so does every window, as every prompt will. ``device`` and ``on_stage`` are for a text
    that the model has to write first. Raises LlmqError when the text or the tokenizer cannot be read, or the text is
    shorter than one window.
    """
    data = calibration.data or SELF
    length = min(calibration.seqlen, config.context_length)
    tokenizer = load_tokenizer(folder)
    if data == SELF:
        ids = self_text(folder, config, calibration, device, on_stage)
    else:
        ids = tokenizer.encode(_read_text(data, tokenizer, calibration.samples * length * CHARACTERS_PER_TOKEN))
    prefix = [ids.pop(0)] if ids[:1] == [tokenizer.bos_token_id] else []
    if ids and max(ids) >= config.vocab_size:
        raise LlmqError(
            f"{folder}: the tokenizer gives the token {max(ids)}, and the model has {config.vocab_size}",
            "the folder's tokenizer is another model's",
        )
    body = max(length - len(prefix), 1)
    available = len(ids) // body
    if not available:
        raise LlmqError(
            f"{Path(data).name} has {len(ids)} tokens, fewer than one window of {body}",
            "give a longer text by --calib-data, or shorter windows by --calib-seqlen",
        )
    generator = torch.Generator().manual_seed(calibration.seed)
    first = int(torch.randint(len(ids) - available * body + 1, (), generator=generator))
    chosen = torch.randperm(available, generator=generator)[: calibration.samples]
    bodies = torch.tensor(ids)[first : first + available * body].view(available, body)[chosen]
    return torch.cat((torch.tensor(prefix, dtype=torch.int64).expand(len(chosen), -1), bodies), dim=1)


def _read_text(data: str, tokenizer: Tokenizer, most: int) -> str:
    """The text that ``data`` names, about ``most`` characters of it if it is longer."""
    path, to_text = Path(data).expanduser(), partial(_row_text, tokenizer)
    if data == DEMO:
        path = demo_folder() / "calibration.txt"
    if path.suffix in (".txt", ".jsonl"):
        return read_text(path, DATA_HINT, most, to_text)
    name, _, config = data.partition(":")
    if path.is_dir() or ("/" in name and HUB_ID.fullmatch(name) and not path.exists()):
        rows = enumerate(_dataset(name, config or None), start=1)
        return join((to_text(row, f"{data}, row {number}") for number, row in rows), most)
    raise LlmqError(f"{path.name} is neither .txt nor .jsonl, nor a dataset of the hub", DATA_HINT)


def _row_text(tokenizer: Tokenizer, row: Any, where: str) -> str:
    value = next((row[name] for name in COLUMNS if name in row), None) if isinstance(row, Mapping) else None
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        value = _conversation_text(value, tokenizer, where)
    if isinstance(value, str):
        return checked(value, where, DATA_HINT)
    raise LlmqError(f'{where}: not a JSON object with a "text", a "prompt" or "messages"', DATA_HINT)


def _conversation_text(messages: list[Any], tokenizer: Tokenizer, where: str) -> str:
    """By the chat template, without the beginning-of-sequence token: every window gets its own."""
    if not tokenizer.chat_template:
        raise LlmqError(f'{where} has "messages", and the model has no chat template', 'give lines with a "text"')
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs, and raise what they like
        raise LlmqError(f"{where}: the chat template refuses the messages: {error}", DATA_HINT) from error
    if tokenizer.bos_token_id is None:
        return text
    return text.removeprefix(tokenizer.decode([tokenizer.bos_token_id], skip_special_tokens=False))


def _dataset(name: str, config: str | None) -> Iterable[Any]:
    """The rows of the training split, or else of the first, read as they are asked for."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise LlmqError(
            "datasets of the hub are read by the library datasets", "pip install 'llmq[datasets]', or give a file"
        ) from None
    try:
        splits = load_dataset(name, config, streaming=True)
        split = "train" if "train" in splits else next(iter(splits))
        yield from splits[split]
    except Exception as error:  # the library raises whatever its many readers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LlmqError(
            f"the dataset {name} cannot be read: {reason}", "check its name and the network, or give a file"
        ) from error
