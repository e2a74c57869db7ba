"""How far a model's predictions are from those of the model that it was made from, on the windows of ``perplexity``.

    KL(original ‖ quantized) = Σ p · (ln p − ln q)   over the vocabulary, in nats, for each token that is scored
    top-1 agreement          = share of these tokens for which both find the same token the likeliest

No error is forgiven for being lucky, as perplexity forgives it: fewer tokens tell methods apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.errors import USAGE, LlmqError
from llmq.evals.perplexity import (
    WINDOW,
    Perplexity,
    Progress,
    Subject,
    in_pieces,
    last_hidden,
    mean_losses,
    prepare,
)

if TYPE_CHECKING:
    from torch import Tensor

    from llmq.evals.bootstrap import Interval
    from llmq.runtime.decoder import Decoder

TAIL = 0.99
"""The percentile of the tokens' divergences that is reported beside their mean."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model makes of windows of text: its head and the last hidden states, from which come the logits, many
    times as large.

    decoder  without its blocks
    batches  those of ``last_hidden``
    """

    decoder: Decoder
    batches: list[tuple[Tensor, Tensor]]

    @property
    def losses(self) -> list[float]:
        """``window_losses``"""
        return [loss for token_ids, hidden in self.batches for loss in mean_losses(self.decoder, token_ids, hidden)]


@dataclass(frozen=True, slots=True)
class Scored:
    """A model that has been run on its windows. ``losses``: the mean −ln p of each."""

    predictions: Predictions
    losses: list[float]
    perplexity: Perplexity


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure and its interval by ``evals.bootstrap``."""

    value: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model beside its reference, on the same windows.

    reference  the reference's perplexity
    increase   perplexity / the reference's − 1
    kl         mean over tokens, in nats
    kl_p99     the divergence that 99 % of the tokens do not exceed
    agreement  top-1, a share of the tokens
    """

    reference: Perplexity
    increase: Figure
    kl: Figure
    kl_p99: Figure
    agreement: Figure

    def as_json(self) -> dict[str, Any]:
        figures = {name: getattr(self, name) for name in ("increase", "kl", "kl_p99", "agreement")}
        return {
            "model": self.reference.model,
            "perplexity": self.reference.perplexity,
            "perplexity_interval": self.reference.interval,
            **{name: figure.value for name, figure in figures.items()},
            **{f"{name}_interval": figure.interval for name, figure in figures.items()},
        }


def compare_with(
    model: str,
    reference: str,
    *,
    data: str | Path | None = None,
    window: int = WINDOW,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    progress: Progress | None = None,
) -> tuple[Perplexity, Comparison]:
    """The perplexity of ``model``, and its predictions beside those of ``reference``; for the rest see
    ``evaluate_perplexity``. LlmqError unless both have one tokenizer and vocabulary."""
    subject = prepare(model, data=data, window=window, dtype=dtype, device=device, revision=revision)
    base = prepare(reference, data=data, window=len(subject.windows[0]), dtype=dtype, device=device)
    if base.windows != subject.windows or base.config.vocab_size != subject.config.vocab_size:
        raise LlmqError(
            f"{model} and {reference} cut the text into different tokens, which cannot be compared",
            "give as --reference the model that it was quantized from",
            exit_code=USAGE,
        )
    tell = progress or (lambda done, total: None)
    original = score(base, lambda done, total: tell(done, 2 * total))
    found = score(subject, lambda done, total: tell(total + done, 2 * total))
    return found.perplexity, compare(original, found)


def score(subject: Subject, progress: Progress | None = None) -> Scored:
    """Load a model and run it on its windows."""
    decoder = subject.load()
    started = time.perf_counter()
    predictions = _predict(decoder, subject.windows, subject.device, progress)
    losses = predictions.losses
    return Scored(predictions, losses, subject.perplexity(losses, time.perf_counter() - started))


def compare(original: Scored, found: Scored) -> Comparison:
    """Of two models on the same windows."""
    import torch

    from llmq.evals.bootstrap import interval

    divergences, agreements = compare_tokens(original.predictions, found.predictions)
    differences = torch.tensor(found.losses, dtype=torch.float64) - torch.tensor(original.losses, dtype=torch.float64)

    def figure(of: Callable[[Tensor], Tensor]) -> Figure:
        every = torch.arange(len(differences))
        return Figure(of(every).item(), interval(of, len(differences)))

    return Comparison(
        reference=original.perplexity,
        increase=figure(lambda drawn: differences[drawn].mean().expm1()),
        kl=figure(lambda drawn: divergences[drawn].mean()),
        kl_p99=figure(lambda drawn: _percentile(divergences[drawn].flatten(), TAIL)),
        agreement=figure(lambda drawn: agreements[drawn].mean()),
    )


def predict(folder: Path, windows: Sequence[Sequence[int]], device: str = "cpu", dtype: str = "auto") -> Predictions:
    """Run the model in ``folder`` on ``windows``, all of one length."""
    from llmq.checkpoint.config import read_config
    from llmq.runtime.device import resolve_dtype
    from llmq.runtime.loader import load_decoder, open_source

    decoder = load_decoder(open_source(folder, device, resolve_dtype(dtype, read_config(folder), device)))
    return _predict(decoder, windows, device)


def _predict(
    decoder: Decoder, windows: Sequence[Sequence[int]], device: str, progress: Progress | None = None
) -> Predictions:
    batches: list[tuple[Tensor, Tensor]] = []
    done = 0
    for batch in last_hidden(decoder, windows, device):
        batches.append(batch)
        done += len(batch[0])
        if progress is not None:
            progress(done, len(windows))
    decoder.layers = type(decoder.layers)()  # only the head is needed from here on, and two models would have to fit
    return Predictions(decoder, batches)


def window_divergences(original: Predictions, other: Predictions) -> list[float]:
    """For each window the mean divergence over its scored tokens, of predictions on the same windows."""
    divergences, _ = compare_tokens(original, other)
    means: list[float] = divergences.mean(dim=1).tolist()
    return means


def compare_tokens(original: Predictions, other: Predictions) -> tuple[Tensor, Tensor]:
    """Of predictions on the same windows, fp64 [windows, scored tokens] on the CPU: divergences, and 1 where both find
    the same token the likeliest, else 0."""
    import torch
    from torch.nn.functional import kl_div

    divergences: list[Tensor] = []
    agreements: list[Tensor] = []
    windows = 0
    for (token_ids, expected), (_, found) in zip(original.batches, other.batches, strict=True):
        windows += len(token_ids)
        pieces = (in_pieces(hidden[:, :-1], original.decoder) for hidden in (expected, found))
        for before, after in zip(*pieces, strict=True):
            p, q = original.decoder.logits(before).log_softmax(-1), other.decoder.logits(after).log_softmax(-1)
            divergences.append(kl_div(q, p, log_target=True, reduction="none").sum(-1).double().cpu())
            agreements.append((p.argmax(-1) == q.argmax(-1)).double().cpu())
    return torch.cat(divergences).view(windows, -1), torch.cat(agreements).view(windows, -1)


def _percentile(values: Tensor, share: float) -> Tensor:
    """The smallest of ``values`` [n] that a ``share`` of them does not exceed."""
    return values.kthvalue(math.ceil(share * len(values))).values
