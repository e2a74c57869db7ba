"""What of a run is done, so that one that was stopped goes on where it was. No torch.

A file of JSON lines beside the folder that is being written (``checkpoint.folder.journal_of``):

    {"journal": 1, "dtype": "bfloat16", "settings": {"--bits": "4", …}}
    {"part": "model.layers.0", "seconds": 5.1, "layers": [{"name": "model.layers.0.self_attn.q_proj", …}, …]}

A part is written down once its tensors are on the disk. The first line comes with the first part: where there is a
journal, there is something to go on with. A last line that was cut short does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.quant.report import LayerReport

VERSION = 1


@dataclass(frozen=True, slots=True)
class Part:
    """What is finished of a model: a decoder block, or all that is in none.

    layers   its quantized layers
    seconds  that it took
    """

    name: str
    layers: tuple[LayerReport, ...]
    seconds: float


class Journal:
    """The journal of one run.

    dtype  that activations are computed in
    parts  that are done, in order
    """

    def __init__(self, path: Path, settings: Mapping[str, str], dtype: str) -> None:
        """Read the file, if it is there. LlmqError, which names the difference, when ``settings`` were others then."""
        self._path = path
        self._settings = dict(settings)
        self.dtype = dtype
        self.parts: list[Part] = []
        lines = _lines(path) if path.exists() else []
        if not lines:
            return
        head = lines.pop(0)
        _check_settings(head, self._settings)
        self.dtype = str(head["dtype"])
        for line in lines:
            layers = tuple(LayerReport(**layer) for layer in line["layers"])
            self.parts.append(Part(line["part"], layers, line["seconds"]))

    @property
    def layers(self) -> list[LayerReport]:
        return [layer for part in self.parts for layer in part.layers]

    @property
    def seconds(self) -> float:
        """What all parts took, in all runs."""
        return sum(part.seconds for part in self.parts)

    def add(self, name: str, layers: Sequence[LayerReport], seconds: float) -> None:
        """Write down that a part is done. It is on the disk when this returns."""
        part = Part(name, tuple(layers), seconds)
        lines = [{"part": name, "seconds": seconds, "layers": [asdict(layer) for layer in layers]}]
        if not self.parts:
            self._path.unlink(missing_ok=True)
            lines.insert(0, {"journal": VERSION, "dtype": self.dtype, "settings": self._settings})
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        self.parts.append(part)

    def forget(self) -> None:
        """Nothing is done any more."""
        self._path.unlink(missing_ok=True)
        self.parts = []


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of ``path``, which is cut to them: what was cut short is to be written again."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    os.truncate(path, len(whole.encode()))
    lines = [json.loads(line) for line in whole.splitlines()]
    if lines and lines[0].get("journal") != VERSION:
        raise LlmqError(f"{path.name} is not a journal that this version reads", "start over by --overwrite")
    return lines


def _check_settings(head: Mapping[str, Any], now: Mapping[str, str]) -> None:
    before: dict[str, str] = head["settings"]
    changes = [
        f"{name} is {now.get(name)} now, and was {before.get(name)}"
        for name in dict.fromkeys((*before, *now))
        if now.get(name) != before.get(name)
    ]
    if changes:
        raise LlmqError(
            f"the run that was stopped is another one: {'; '.join(changes)}",
            "go on with the settings that it had, or start over by --overwrite",
        )
