"""How far a model's predictions are from those of the model that it was made from, on the windows of ``perplexity``.

    KL(original ‖ quantized) = Σ p · (ln p − ln q)   over the vocabulary, in nats, for each token that is scored

No error is forgiven for being lucky, as perplexity forgives it: fewer tokens tell methods apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmq.evals.perplexity import in_pieces, last_hidden, mean_losses, window_means

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.runtime.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model makes of windows of text: its head and the last hidden states, from which come the logits, many
    times as large. ``batches`` are those of ``last_hidden``."""

    decoder: Decoder
    batches: list[tuple[Tensor, Tensor]]

    @property
    def losses(self) -> list[float]:
        """``window_losses``"""
        return [loss for token_ids, hidden in self.batches for loss in mean_losses(self.decoder, token_ids, hidden)]


def predict(folder: Path, windows: Sequence[Sequence[int]], device: str = "cpu", dtype: str = "auto") -> Predictions:
    """Run the model in ``folder`` on ``windows``, all of one length."""
    from llmq.checkpoint.config import read_config
    from llmq.runtime.device import resolve_dtype
    from llmq.runtime.loader import load_decoder, open_source

    decoder = load_decoder(open_source(folder, device, resolve_dtype(dtype, read_config(folder), device)))
    return Predictions(decoder, list(last_hidden(decoder, windows, device)))


def window_divergences(original: Predictions, other: Predictions) -> list[float]:
    """For each window the mean divergence over its scored tokens, of predictions on the same windows."""
    divergences: list[float] = []
    for (token_ids, expected), (_, found) in zip(original.batches, other.batches, strict=True):
        pieces = (in_pieces(hidden[:, :-1], original.decoder) for hidden in (expected, found))
        tokens = [
            _divergences(original.decoder.logits(before), other.decoder.logits(after))
            for before, after in zip(*pieces, strict=True)
        ]
        divergences += window_means(tokens, len(token_ids))
    return divergences


def _divergences(expected: Tensor, found: Tensor) -> Tensor:
    """Of each row of logits [tokens, vocabulary], fp64 [tokens]."""
    from torch.nn.functional import kl_div

    return kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1).double()
