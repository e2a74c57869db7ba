"""Perplexity by the protocol of the GPTQ and AWQ papers, on any text.

The whole text is tokenized once, with a BOS at its start if the tokenizer puts one there, and cut into windows of
equal length that do not overlap; what is left at the end is dropped. Each window is scored on its own, from its second
token on:

    perplexity = exp(mean over windows of the mean −ln p(token | tokens before it in the window))
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from llmq.checkpoint.config import ModelConfig, read_config
from llmq.checkpoint.folder import resolve
from llmq.errors import USAGE, LlmqError
from llmq.evals.held_out import held_out

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmq.runtime.decoder import Decoder

WINDOW = 2048
BATCH_TOKENS = 4096
"""Tokens of the windows that run together."""
LOGITS_BYTES = 2**28
"""fp32 logits that exist at once."""
DEFINITION = "exp of the mean −ln p of each token, given those before it in its window"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """interval  by ``evals.bootstrap``
    tokens    scored tokens: one fewer than its length in each window
    seconds   scoring alone, without loading
    """

    perplexity: float
    interval: tuple[float, float]
    tokens: int
    windows: int
    window: int
    seconds: float
    model: str
    data: str
    device: str
    dtype: str

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__} | {"definition": DEFINITION}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and the windows that it is to be scored on: all checked, and nothing loaded. ``data`` names the text."""

    model: str
    folder: Path
    config: ModelConfig
    device: str
    dtype: torch.dtype
    data: str
    windows: list[Sequence[int]]

    def load(self) -> Decoder:
        from llmq.runtime.loader import load_decoder, open_source

        return load_decoder(open_source(self.folder, self.device, self.dtype, len(self.windows[0])))

    def perplexity(self, losses: Sequence[float], seconds: float) -> Perplexity:
        """Of the mean loss of each window. LlmqError when the model gives no numbers."""
        import torch

        from llmq.evals.bootstrap import interval

        dtype = str(self.dtype).removeprefix("torch.")
        loss, each = fmean(losses), torch.tensor(losses, dtype=torch.float64)
        if not math.isfinite(loss):
            raise LlmqError(
                f"the model's output in {dtype} is not a number",
                "try --dtype float32; if it stays so, the weights are damaged",
            )
        length = len(self.windows[0])
        return Perplexity(
            perplexity=math.exp(loss),
            interval=interval(lambda drawn: each[drawn].mean().exp(), len(losses)),
            tokens=len(losses) * (length - 1),
            windows=len(losses),
            window=length,
            seconds=seconds,
            model=self.model,
            data=self.data,
            device=self.device,
            dtype=dtype,
        )


def prepare(
    model: str,
    *,
    data: str | Path | None = None,
    window: int = WINDOW,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
) -> Subject:
    """``model`` on the text ``data`` (see ``held_out``), in windows of ``window`` tokens, or of the model's context.

    Raises LlmqError when the text is shorter than one window, or the tokenizer is another model's.
    """
    if window < 2:
        raise LlmqError(f"a window of {window} has no token to predict", "pass --window 2 or more", exit_code=USAGE)
    folder = resolve(model, revision)
    config = read_config(folder)
    text = held_out(None if data is None else str(data))

    from llmq.checkpoint.tokenizer import load_tokenizer
    from llmq.runtime.device import resolve_device, resolve_dtype

    device = resolve_device(device)
    token_ids = load_tokenizer(folder).encode(text.text)
    windows = cut(token_ids, min(window, config.context_length))
    if max(token_ids) >= config.vocab_size:
        raise LlmqError(
            f"the tokenizer gives token {max(token_ids)} and the model knows {config.vocab_size}",
            "the folder's tokenizer is another model's",
        )
    return Subject(model, folder, config, device, resolve_dtype(dtype, config, device), text.name, windows)


def evaluate_perplexity(
    model: str,
    *,
    data: str | Path | None = None,
    window: int = WINDOW,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """The perplexity of ``model`` on a text; None: the text that comes with the demo model.

    ``progress`` is told, from time to time, how many windows of how many have been scored.
    Raises LlmqError when the text is shorter than one window, or the model gives no numbers.
    """
    subject = prepare(model, data=data, window=window, dtype=dtype, device=device, revision=revision)
    decoder = subject.load()
    started = time.perf_counter()
    losses = window_losses(decoder, subject.windows, subject.device, progress)
    return subject.perplexity(losses, time.perf_counter() - started)


def cut(token_ids: Sequence[int], window: int) -> list[Sequence[int]]:
    """Windows of ``window`` tokens that do not overlap, without the incomplete last one."""
    if len(token_ids) < window:
        raise LlmqError(
            f"the text has {len(token_ids)} tokens, fewer than one window of {window}",
            f"give a longer --data, or --window {len(token_ids)} or less"
            if len(token_ids) > 1
            else "give a longer --data",
        )
    return [token_ids[start : start + window] for start in range(0, len(token_ids) - window + 1, window)]


def window_losses(
    decoder: Decoder, windows: Sequence[Sequence[int]], device: str, progress: Progress | None = None
) -> list[float]:
    """For each window, all of one length, the mean of −ln p over its tokens but the first."""
    losses: list[float] = []
    for token_ids, hidden in last_hidden(decoder, windows, device):
        losses += mean_losses(decoder, token_ids, hidden)
        if progress is not None:
            progress(len(losses), len(windows))
    return losses


def last_hidden(decoder: Decoder, windows: Sequence[Sequence[int]], device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids [windows, tokens] and what ``decoder`` makes of them before its head, [windows, tokens, hidden]: some
    of ``windows``, all of one length, at a time."""
    import torch

    from llmq.runtime.decoder import CausalAttention

    length = len(windows[0])
    together = max(1, BATCH_TOKENS // length)
    attend = CausalAttention(length)
    for first in range(0, len(windows), together):
        token_ids = torch.tensor(windows[first : first + together], device=device)
        positions = torch.arange(length, device=device).repeat(len(token_ids))
        with torch.inference_mode():
            hidden = decoder(token_ids.flatten(), positions, attend)
        yield token_ids, hidden.view(*token_ids.shape, -1)


def mean_losses(decoder: Decoder, token_ids: Tensor, hidden: Tensor) -> list[float]:
    """``window_losses`` of windows that ``last_hidden`` has run."""
    from torch.nn.functional import cross_entropy

    losses = [
        cross_entropy(decoder.logits(piece), targets, reduction="none").double()
        for piece, targets in zip(in_pieces(hidden[:, :-1], decoder), in_pieces(token_ids[:, 1:], decoder), strict=True)
    ]
    return window_means(losses, len(token_ids))


def in_pieces(tokens: Tensor, decoder: Decoder) -> tuple[Tensor, ...]:
    """What [windows, tokens, …] holds of each token, in one row and in pieces whose logits may exist at once."""
    import torch

    return torch.split(tokens.flatten(0, 1), max(1, LOGITS_BYTES // (4 * decoder.config.vocab_size)))


def window_means(pieces: Sequence[Tensor], windows: int) -> list[float]:
    """The means over each of ``windows`` of numbers [tokens], which come in ``pieces``."""
    import torch

    means: list[float] = torch.cat(list(pieces)).view(windows, -1).mean(dim=1).tolist()
    return means
