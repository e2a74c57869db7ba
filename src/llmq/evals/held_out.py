"""The text that a model is scored on: a file, a dataset of the hub, or the one that comes with the demo model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmq.checkpoint.folder import HUB_ID, demo_folder
from llmq.errors import LlmqError
from llmq.texts import SEPARATOR, read_text

DEMO_TEXT = "evaluation.txt"
DATA_HINT = 'check --data: a text, a .jsonl file with a "text" in each line, or a dataset: OWNER/NAME[:CONFIG]'
SPLIT = "test"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A text, and what it is called."""

    name: str
    text: str


def held_out(data: str | None = None) -> HeldOut:
    """``data`` is a file or the ``OWNER/NAME`` or ``OWNER/NAME:CONFIG`` of a dataset on the hub, of which the test
    split's ``text`` is taken; None: the demo's text. LlmqError when there is no such text."""
    path = demo_folder() / DEMO_TEXT if data is None else Path(data).expanduser()
    if data is None or path.exists() or path.suffix or "/" not in data:
        return HeldOut(path.name, read_text(path, DATA_HINT))
    name, _, config = data.partition(":")
    if not HUB_ID.fullmatch(name):
        return HeldOut(path.name, read_text(path, DATA_HINT))
    return HeldOut(data, _dataset_text(name, config or None))


def _dataset_text(name: str, config: str | None) -> str:
    try:
        import datasets
    except ImportError:
        raise LlmqError(f"{name}: a dataset of the hub needs datasets", "install it: pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, config, split=SPLIT)
    except Exception as error:  # it raises whatever its many readers raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LlmqError(f"there is no file {name}, and the hub gives no such dataset: {reason[0]}", DATA_HINT) from None
    if "text" not in rows.column_names:
        raise LlmqError(f'{name} has no column "text", but {", ".join(rows.column_names)}', "write a text file of it")
    return SEPARATOR.join(rows["text"])
