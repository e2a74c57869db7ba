"""Divergence: the definition by transformers' logits, in fp64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import llmq
from packed_folders import linear_names, write_packed
from tiny_models import save_tiny

from llmq.errors import CHECK_FAILED, USAGE, LlmqError
from llmq.evals import perplexity
from llmq.evals.bootstrap import interval
from llmq.evals.divergence import compare_tokens, compare_with, predict, window_divergences
from llmq.evals.perplexity import window_losses
from llmq.runtime.loader import load_decoder, open_source
from llmq.scheme import Scheme

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


def test_models_agree_where_transformers_finds_both_the_same_token_the_likeliest(models: tuple[Path, Path]) -> None:
    expected = log_probabilities(models[0]).argmax(-1) == log_probabilities(models[1]).argmax(-1)
    _, agreements = compare_tokens(*(predict(folder, WINDOWS) for folder in models))
    assert torch.equal(agreements.bool(), expected)


# With a reference


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(32 + number * 37 % 90) for number in range(600)))
    return path


@pytest.fixture(scope="module")
def quantized(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    schemes = dict.fromkeys(linear_names(models[0]), Scheme(3, 128))
    return write_packed(models[0], tmp_path_factory.mktemp("packed") / "model", "gptq", schemes)


def test_a_model_is_its_own_reference_to_the_bit(models: tuple[Path, Path], text: Path) -> None:
    own, compared = compare_with(str(models[0]), str(models[0]), data=text, window=50, device="cpu")
    assert (compared.kl.value, compared.kl.interval, compared.kl_p99.value) == (0.0, (0.0, 0.0), 0.0)
    assert (compared.increase.value, compared.agreement.value) == (0.0, 1.0)
    assert own.perplexity == compared.reference.perplexity


def test_the_increase_is_that_of_the_two_perplexities_and_lies_in_its_interval(
    models: tuple[Path, Path], quantized: Path, text: Path
) -> None:
    own, compared = compare_with(str(quantized), str(models[0]), data=text, window=50, device="cpu")
    alone = [
        perplexity.evaluate_perplexity(str(one), data=text, window=50, device="cpu").perplexity
        for one in (quantized, models[0])
    ]
    assert (own.perplexity, compared.reference.perplexity) == pytest.approx(alone)
    assert compared.increase.value == pytest.approx(alone[0] / alone[1] - 1)
    for figure in (compared.increase, compared.kl, compared.agreement):
        assert figure.interval[0] < figure.value < figure.interval[1]
    assert compared.kl.value < compared.kl_p99.value


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    """Of 400 windows, by the central limit theorem."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = interval(lambda drawn: values[drawn].mean(), 400)
    expected = 1.96 * values.std().item() / 20
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean().item(), abs=0.02)


def test_models_with_other_tokens_are_not_compared(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "wide", vocab_size=300)
    with pytest.raises(LlmqError, match="different tokens") as caught:
        compare_with(str(models[0]), str(other), data=text, window=50, device="cpu")
    assert caught.value.exit_code == USAGE


def test_a_perplexity_that_rose_too_far_is_exit_code_3_after_the_figures(
    models: tuple[Path, Path], quantized: Path, text: Path
) -> None:
    arguments = ("eval", quantized, "--reference", models[0], "--data", text, "--window", 50, "--device", "cpu")
    _, compared = compare_with(str(quantized), str(models[0]), data=text, window=50, device="cpu")
    increase = 100 * compared.increase.value
    assert increase > 1
    below = llmq(*arguments, "--max-ppl-increase", f"{increase - 0.5:.3f}%", "--json")
    above = llmq(*arguments, "--max-ppl-increase", f"{increase + 0.5:.3f}%")
    assert (below.code, above.code) == (CHECK_FAILED, 0)
    assert f"{increase:.2f}% above" in below.err
    report = json.loads(below.out)
    assert report["reference"]["increase"] == pytest.approx(compared.increase.value)
    assert {"kl", "kl_interval", "kl_p99", "agreement", "perplexity", "model"} <= set(report["reference"])
    assert "same likeliest token" in above.out


def test_a_bound_needs_a_reference_and_a_percent_sign(models: tuple[Path, Path]) -> None:
    alone = llmq("eval", models[0], "--max-ppl-increase", "1%")
    bare = llmq("eval", models[0], "--reference", models[1], "--max-ppl-increase", "0.01")
    assert (alone.code, bare.code) == (USAGE, USAGE)
    assert "--reference" in alone.err
    assert "1%" in bare.err
