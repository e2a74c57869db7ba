"""Perplexity: the protocol by small cases, the number by transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from command_line import llmq
from packed_folders import linear_names, rounded, write_packed
from tiny_models import VARIANTS, save_tiny, save_variant

from llmq.checkpoint.folder import demo_folder, resolve
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.errors import FAILED, USAGE, LlmqError
from llmq.evals import perplexity
from llmq.evals.held_out import DEMO_TEXT
from llmq.evals.perplexity import cut, evaluate_perplexity
from llmq.runtime.decoder import DecoderLayer
from llmq.scheme import E4M3, INT, NF4, WHOLE_ROW, Scheme
from llmq.texts import read_text

TEXT = "".join(chr(32 + number * 37 % 90) for number in range(400))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def round_inputs(linear: torch.nn.Linear, weight: QuantizedWeight) -> None:
    """Let ``linear`` multiply its inputs, each token to 8 bits as ``kernels.quantize_rows`` defines it, by ``weight``.

    An input that lies between two codes falls to either side by the last bit of the sums that it comes from, and the
    layers behind it see that: the perplexity of ``demo`` moves by 1e-3 with the order of summation. So codes are
    multiplied here before they are scaled, as the matrix unit does, integers exactly, floats in fp32.
    """
    number, scales = weight.scheme.number, weight.scales.float().flatten()
    codes = weight.dequantize().double() / scales.double()[:, None]
    wide, largest = (torch.float64, 127.0) if number == INT else (torch.float32, 448.0)

    def forward(x: torch.Tensor) -> torch.Tensor:
        most = x.abs().amax(-1, keepdim=True)
        inputs = x * (torch.tensor(largest) / most)
        inputs = inputs.round() if number == INT else inputs.to(torch.float8_e4m3fn)
        return (inputs.to(wide) @ codes.to(wide).t()).float() * (most / largest) * scales

    linear.forward = forward  # type: ignore[method-assign]


def transformers_perplexity(folder: Path, text: str, window: int, scheme: Scheme | None = None) -> float:
    """exp of the mean of the losses that transformers gives for each window, with the decoder's weights as ``scheme``
    rounds them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name in linear_names(folder) if scheme is not None else ():
        linear = model.get_submodule(name)
        weight = rounded(linear.weight.data, scheme)
        linear.weight.data = weight.dequantize()
        if scheme.activation_bits == 8:
            round_inputs(linear, weight)
    token_ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    windows = token_ids[: len(token_ids) // window * window].view(-1, window)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


# The number


@pytest.mark.parametrize("variant", VARIANTS)
def test_perplexity_is_that_of_transformers(tmp_path: Path, text: Path, variant: str) -> None:
    folder = save_variant(tmp_path, variant)
    result = evaluate_perplexity(str(folder), data=text, window=64, device="cpu")
    assert result.perplexity == pytest.approx(transformers_perplexity(folder, TEXT, 64), rel=1e-4)


PACKED = {
    "gptq w4a16": ("gptq", Scheme(4, 128)),
    "awq w4a16": ("awq", Scheme(4, 128, symmetric=False)),
    "compressed-tensors w4a16": ("compressed-tensors", Scheme(4, 128)),
    "w8a8": ("compressed-tensors", Scheme(8, WHOLE_ROW, activation_bits=8)),
    "fp8": ("compressed-tensors", Scheme(8, WHOLE_ROW, number=E4M3, activation_bits=8)),
    "nf4": ("bitsandbytes", Scheme(4, 64, number=NF4)),
}


@pytest.mark.parametrize(("form", "scheme"), PACKED.values(), ids=PACKED)
def test_perplexity_of_a_quantized_model_is_that_of_transformers_with_what_its_codes_stand_for(
    tiny: Path, tmp_path: Path, text: Path, form: str, scheme: Scheme
) -> None:
    folder = write_packed(tiny, tmp_path / "packed", form, dict.fromkeys(linear_names(tiny), scheme))
    result = evaluate_perplexity(str(folder), data=text, window=64, device="cpu")
    expected = transformers_perplexity(tiny, TEXT, 64, scheme)
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    assert abs(expected / transformers_perplexity(tiny, TEXT, 64) - 1) > 1e-3


def test_neither_batches_of_windows_nor_pieces_of_logits_change_the_number(
    tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = evaluate_perplexity(str(tiny), data=text, window=50, device="cpu").perplexity
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 100)
    monkeypatch.setattr(perplexity, "LOGITS_BYTES", 7 * 4 * 258)
    apart = evaluate_perplexity(str(tiny), data=text, window=50, device="cpu").perplexity
    assert apart == pytest.approx(together, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "scheme"), [("", None), *PACKED.values()], ids=["bf16", *PACKED])
def test_perplexity_of_the_demo_model_is_that_of_transformers_to_four_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, scheme: Scheme | None
) -> None:
    start = (demo_folder() / DEMO_TEXT).read_text(encoding="utf-8")[:15_000]
    (tmp_path / "start.txt").write_text(start, encoding="utf-8")
    folder = resolve("demo")
    if scheme is not None:
        schemes = dict.fromkeys(linear_names(folder), scheme)
        folder = write_packed(folder, tmp_path / "packed", form, schemes)
    # Products of the shapes that transformers has: the library's order of summation depends on them.
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 512)
    monkeypatch.setattr(DecoderLayer, "merge", lambda _: None)
    result = evaluate_perplexity(str(folder), data=tmp_path / "start.txt", window=512, device="cpu")
    assert result.windows >= 4
    assert result.perplexity == pytest.approx(transformers_perplexity(resolve("demo"), start, 512, scheme), rel=1e-5)


@pytest.mark.slow
def test_the_demo_model_has_learned_to_write_python(tmp_path: Path) -> None:
    """Of 4,096 tokens it would know nothing of, it would be as unsure as of 4,096 equal ones."""
    start = (demo_folder() / DEMO_TEXT).read_text(encoding="utf-8")[:30_000]
    (tmp_path / "start.txt").write_text(start, encoding="utf-8")
    result = evaluate_perplexity("demo", data=tmp_path / "start.txt", device="cpu")
    assert result.windows >= 2
    assert result.perplexity < 20


def test_progress_is_told_and_ends_with_all_windows(tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 100)
    told: list[tuple[int, int]] = []
    evaluate_perplexity(str(tiny), data=text, window=50, device="cpu", progress=lambda *seen: told.append(seen))
    assert told == [(2, 8), (4, 8), (6, 8), (8, 8)]


# The protocol


def test_windows_do_not_overlap_and_the_incomplete_last_one_is_dropped() -> None:
    assert cut(list(range(11)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(list(range(8)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_first_token_of_a_window_is_not_scored(tiny: Path, text: Path) -> None:
    result = evaluate_perplexity(str(tiny), data=text, window=100, device="cpu")
    assert (result.window, result.windows, result.tokens) == (100, 4, 4 * 99)


def test_a_bos_stands_before_the_text_and_nowhere_else(tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def record(decoder: object, windows: list[list[int]], device: str, progress: object) -> list[float]:
        seen.extend(windows)
        return [1.0]

    monkeypatch.setattr(perplexity, "window_losses", record)
    evaluate_perplexity(str(tiny), data=text, window=100, device="cpu")
    bos = 256
    assert [window.count(bos) for window in seen] == [1, 0, 0, 0]
    assert seen[0][0] == bos


def test_a_window_is_never_longer_than_the_models_context(tmp_path: Path, text: Path) -> None:
    folder = save_tiny(tmp_path, max_position_embeddings=128)
    assert evaluate_perplexity(str(folder), data=text, device="cpu").window == 128


def test_the_interval_holds_what_other_windows_of_the_text_give(tiny: Path, text: Path) -> None:
    result = evaluate_perplexity(str(tiny), data=text, window=40, device="cpu")
    low, high = result.interval
    assert low < result.perplexity < high
    assert result.interval == evaluate_perplexity(str(tiny), data=text, window=40, device="cpu").interval


def test_lines_of_a_jsonl_file_are_one_text(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": half}) + "\n" for half in (TEXT, TEXT[::-1])))
    (tmp_path / "text.txt").write_text(f"{TEXT}\n\n{TEXT[::-1]}")
    lines, whole = (
        evaluate_perplexity(str(tiny), data=tmp_path / name, window=64, device="cpu")
        for name in ("text.jsonl", "text.txt")
    )
    assert (lines.perplexity, lines.windows) == (whole.perplexity, whole.windows)


# Failures


@pytest.mark.parametrize(("name", "content"), [("t.txt", "one"), ("t.jsonl", '{"text": "one"}')])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_text(tmp_path / name, "") == "one"


def test_a_line_without_text_is_numbered(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(LlmqError, match="line 2"):
        evaluate_perplexity(str(tiny), data=tmp_path / "text.jsonl")


def test_a_dataset_that_the_hub_does_not_give_is_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(LlmqError, match="Salesforce/wikitext, and the hub gives no such dataset: Couldn't reach"):
        evaluate_perplexity(str(tiny), data="Salesforce/wikitext:wikitext-2-raw-v1")


def test_the_documents_of_a_dataset_are_joined_by_empty_lines(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [TEXT, TEXT]})
    asked: list[object] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *wanted, **more: asked.append((wanted, more)) or rows)
    (tmp_path / "text.txt").write_text(f"{TEXT}\n\n{TEXT}")
    found = evaluate_perplexity(str(tiny), data="Salesforce/wikitext:wikitext-2-raw-v1", window=64, device="cpu")
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]
    assert found.perplexity == evaluate_perplexity(str(tiny), data=tmp_path / "text.txt", window=64).perplexity


def test_a_text_shorter_than_a_window_is_refused_and_a_window_that_fits_is_named(tiny: Path, text: Path) -> None:
    with pytest.raises(LlmqError, match="401 tokens, fewer than one window of 512") as caught:
        evaluate_perplexity(str(tiny), data=text, device="cpu")
    assert "--window 401" in (caught.value.hint or "")


def test_an_empty_text_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(LlmqError, match="1 tokens, fewer"):
        evaluate_perplexity(str(tiny), data=tmp_path / "empty.txt", device="cpu")


def test_a_window_of_one_token_is_a_usage_error(tiny: Path) -> None:
    with pytest.raises(LlmqError) as caught:
        evaluate_perplexity(str(tiny), window=1)
    assert caught.value.exit_code == USAGE


@pytest.mark.parametrize("flags", [("--limit", 3), ("--task-folder", "x"), ("--tasks", "x", "--limit", 0)])
def test_flags_of_tasks_are_not_ignored(tiny: Path, flags: tuple[object, ...]) -> None:
    result = llmq("eval", tiny, *flags, "--device", "cpu")
    assert (result.code, result.out) == (USAGE, "")
    assert "--limit" in result.err


def test_a_model_that_computes_nan_is_an_error_and_not_a_perplexity(tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmqError, match="not a number"):
        evaluate_perplexity(str(folder), data=text, window=64, device="cpu")


# The command


def test_the_first_line_is_the_perplexity(tiny: Path, text: Path) -> None:
    result = llmq("eval", tiny, "--data", text, "--window", 64, "--device", "cpu")
    expected = evaluate_perplexity(str(tiny), data=text, window=64, device="cpu").perplexity
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == f"perplexity {expected:.4f}"


def test_json_says_what_was_scored(tiny: Path, text: Path) -> None:
    result = llmq("eval", tiny, "--data", text, "--window", 64, "--device", "cpu", "--json")
    report = json.loads(result.out)
    assert report["schema"] == "llmq.eval/1"
    assert {"perplexity", "tokens", "windows", "window", "seconds", "model", "data"} <= set(report)
    assert (report["model"], report["data"], report["windows"]) == (str(tiny), "text.txt", 6)


def test_a_text_that_cannot_be_read_is_an_error_that_names_it(tiny: Path, tmp_path: Path) -> None:
    missing = llmq("eval", tiny, "--data", tmp_path / "missing.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    binary = llmq("eval", tiny, "--data", tmp_path / "binary.txt")
    assert (missing.code, binary.code) == (FAILED, FAILED)
    assert "missing.txt" in missing.err
    assert "not UTF-8" in binary.err
