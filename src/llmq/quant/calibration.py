"""A text → the windows of tokens that calibrate a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint.config import ModelConfig
from llmq.checkpoint.folder import demo_folder
from llmq.checkpoint.tokenizer import load_tokenizer
from llmq.errors import LlmqError
from llmq.quant.options import Calibration
from llmq.texts import read_text

CHARACTERS_PER_TOKEN = 32
"""Characters read for each token wanted: several times what a token takes, so that there is a choice of windows."""
DATA_HINT = '--calib-data takes a .txt file, or a .jsonl file with a "text" in each line'


def draw_windows(folder: Path, config: ModelConfig, calibration: Calibration) -> Tensor:
    """Token ids int64 [windows, tokens] of windows that do not overlap, in random order.

    There are fewer than ``calibration.samples`` when the text has no more. Where the tokenizer begins a text with the
    beginning-of-sequence token, so does every window, as every prompt will. Raises LlmqError when the text or the
    tokenizer cannot be read, or the text is shorter than one window.
    """
    path = demo_folder() / "calibration.txt" if calibration.data is None else Path(calibration.data).expanduser()
    length = min(calibration.seqlen, config.context_length)
    if path.suffix not in (".txt", ".jsonl"):
        raise LlmqError(f"{path.name} is neither .txt nor .jsonl", DATA_HINT)
    text = read_text(path, DATA_HINT, calibration.samples * length * CHARACTERS_PER_TOKEN)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text)
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
            f"{path.name} has {len(ids)} tokens, fewer than one window of {body}",
            "give a longer text by --calib-data, or shorter windows by --calib-seqlen",
        )
    generator = torch.Generator().manual_seed(calibration.seed)
    first = int(torch.randint(len(ids) - available * body + 1, (), generator=generator))
    chosen = torch.randperm(available, generator=generator)[: calibration.samples]
    bodies = torch.tensor(ids)[first : first + available * body].view(available, body)[chosen]
    return torch.cat((torch.tensor(prefix, dtype=torch.int64).expand(len(chosen), -1), bodies), dim=1)
