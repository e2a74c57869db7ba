"""Divergence: the definition by transformers' logits, in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from llmq.evals import perplexity
from llmq.evals.divergence import predict, window_divergences
from llmq.evals.perplexity import window_losses
from llmq.runtime.loader import load_decoder, open_source

WINDOWS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_tiny(root / "one", seed=1), save_tiny(root / "other", seed=2)


def log_probabilities(folder: Path) -> torch.Tensor:
    """Of every token after the first, by transformers: [windows, tokens, vocabulary]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(WINDOWS)).logits[:, :-1].double().log_softmax(-1)


def test_it_is_the_mean_over_tokens_of_the_divergence_of_transformers_predictions(models: tuple[Path, Path]) -> None:
    one, other = models
    p, q = log_probabilities(one), log_probabilities(other)
    expected = (p.exp() * (p - q)).sum(-1).mean(-1)
    found = window_divergences(predict(one, WINDOWS), predict(other, WINDOWS))
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert min(found) > 0.1


def test_a_model_does_not_diverge_from_itself(models: tuple[Path, Path]) -> None:
    predictions = predict(models[0], WINDOWS)
    assert window_divergences(predictions, predict(models[0], WINDOWS)) == [0.0] * 3


def test_losses_are_those_of_perplexity(models: tuple[Path, Path]) -> None:
    predictions = predict(models[0], WINDOWS)
    decoder = load_decoder(open_source(models[0], "cpu", torch.float32))
    assert predictions.losses == window_losses(decoder, WINDOWS, "cpu")


def test_neither_batches_of_windows_nor_pieces_of_logits_change_it(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = window_divergences(*(predict(folder, WINDOWS) for folder in models))
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 40)
    monkeypatch.setattr(perplexity, "LOGITS_BYTES", 7 * 4 * 258)
    apart = window_divergences(*(predict(folder, WINDOWS) for folder in models))
    assert apart == pytest.approx(together, rel=1e-5)
