"""What can be chosen: schemes by name, the methods and formats that go with them, and layers with their own schemes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from command_line import Result, llmq
from tiny_models import save_tiny

from llmq import quantize
from llmq.checkpoint.formats import FORMATS
from llmq.errors import LlmqError
from llmq.quant.options import Calibration, Rule
from llmq.quant.schemes import AUTOROUND, PRESETS, RTN, choose, formats_for, methods_for, preset_table
from llmq.runtime.decoder import CausalAttention
from llmq.runtime.loader import load_decoder, open_source
from llmq.scheme import Scheme

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
MADE = [(name, method) for name, preset in PRESETS.items() for method in preset.methods if method != AUTOROUND]
"""Learned rounding has tests of its own, and takes its time."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{n}(x):\n    return x * {n} + {n * n}\n\n\n" for n in range(100)))
    return path


def logits(folder: Path) -> torch.Tensor:
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model = load_decoder(open_source(folder, "cpu", torch.float32))
        return model.logits(model(ids, torch.arange(40), CausalAttention(40)))


def schemes(folder: Path) -> dict[str, str]:
    """layer → scheme, as ``llmq inspect`` tells it"""
    return {layer["name"]: layer["scheme"] for layer in json.loads(llmq("inspect", folder, "--json").out)["layers"]}


@pytest.mark.parametrize(("name", "method"), MADE)
def test_every_preset_is_made_by_its_methods_and_computes_nearly_the_same(
    tmp_path: Path, tiny: Path, text: Path, name: str, method: str
) -> None:
    if method == "bnb":
        pytest.importorskip("bitsandbytes")
    calibration = Calibration(str(text), samples=4, seqlen=64)
    report = quantize(str(tiny), tmp_path / "out", scheme=name, method=method, calibration=calibration, device="cpu")
    assert {layer.method for layer in report.layers} == {method}
    assert report.left_out == ()
    bits = PRESETS[name].scheme.bits
    assert all(layer.error < {2: 0.4, 3: 0.1, 4: 0.03, 8: 1e-3}[bits] for layer in report.layers)
    before, after = logits(tiny), logits(tmp_path / "out")
    assert (after - before).square().mean() < {2: 2, 3: 1, 4: 0.4, 8: 0.05}[bits] * before.square().mean()
    assert set(schemes(tmp_path / "out").values()) == {report.scheme}


def test_what_the_table_says_exists_and_is_the_table_of_the_readme() -> None:
    table = preset_table()
    assert table in README
    for name, preset in PRESETS.items():
        assert any(line.startswith(f"| `{name}` |") for line in table.splitlines())
        assert set(preset.methods) <= set(methods_for(preset.scheme))
        for method in preset.methods:
            formats = formats_for(preset.scheme, method)
            assert [choose(name, method, format).format for format in formats] == list(formats)
            for other in set(FORMATS) - set(formats):
                with pytest.raises(LlmqError):
                    choose(name, method, other)


def test_a_scheme_is_changed_by_whatever_else_is_asked() -> None:
    assert choose("w4a16", bits=5).scheme == Scheme(5, 128)
    assert choose("w4a16", bits=5).format == "compressed-tensors"
    assert choose("w4a16", group_size=32, symmetric=False).scheme == Scheme(4, 32, False)
    assert choose("w8a8", group_size=0).scheme == Scheme(8, 0, activation_bits=8)
    assert choose(Scheme(4, 32), method=RTN).scheme == Scheme(4, 32)


def test_awq_fits_zero_points_in_its_own_format_unless_told_otherwise() -> None:
    assert choose("w4a16", "awq").format == "awq"
    assert not choose("w4a16", "awq").scheme.symmetric
    assert choose("w4a16", "awq", symmetric=True).scheme.symmetric
    assert choose("w4a16", "awq", "gptq").scheme.symmetric
    assert choose("w3a16", "awq").scheme.symmetric


def refused(result: Result, message: str, hint: str, code: int = 2) -> None:
    error, hinted = result.err.strip().splitlines()
    assert result.code == code
    assert message in error
    assert hint in hinted


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (("--scheme", "w9a16"), "no scheme 'w9a16'", "w4a16, w3a16"),
        (("--scheme", "w8a8", "--method", "awq"), "awq does not make int8", "--method smoothquant, gptq or rtn"),
        (("--scheme", "fp8", "--method", "gptq"), "gptq does not make e4m3", "--method rtn"),
        (("--scheme", "nf4", "--method", "rtn"), "rtn does not make nf4", "--method bnb"),
        (("--scheme", "w8a8", "--format", "gptq"), "8-bit activations", "--format compressed-tensors"),
        (("--bits", 5, "--format", "gptq"), "have 5", "--format compressed-tensors"),
        (("--scheme", "w8a8", "--bits", 4), "activations of 8 bits", "leave out --bits"),
        (("--override", "down_proj"), "--override down_proj", "re:.*down_proj=w8a16"),
        (("--override", "down_proj=w9"), "--override down_proj=w9", "w8a16"),
        (("--override", "re:(=w8a16"), "not a regular expression", "re"),
        (("--override", "dwon_proj=w8a16"), "dwon_proj matches no layer", "down_proj"),
        (("--override", "down_proj=fp8"), "gptq does not make e4m3", "--method rtn"),
        (("--method", "rtn", "--format", "awq", "--override", "down_proj=w8a16"), "4 bits", "--format gptq"),
        (("--alpha", "0.5"), "--alpha is a setting of smoothquant", "--method smoothquant"),
        (("--scheme", "w8a8", "--alpha", "2"), "--alpha is 2.0", "from 0 to 1"),
        (("--scheme", "w8a8", "--alpha", "much"), "--alpha is much", "auto"),
        (("--method", "rtn", "--act-order", "off"), "--act-order is a setting of gptq", "--method gptq"),
        (("--act-order", "sideways"), "no order 'sideways'", "static, dynamic, off"),
        (("--act-order", "dynamic", "--format", "compressed-tensors"), "dynamic order", "--format gptq"),
        (("--kv-cache-scheme", "fp8"), "no place for scales of the KV cache", "--format compressed-tensors"),
        (("--scheme", "fp8", "--kv-cache-scheme", "int4"), "KV cache of 'int4'", "--kv-cache-scheme fp8"),
        (("--clip",), "--clip is a setting of rtn", "--method rtn"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_does_not_exist_is_refused_with_what_comes_nearest(
    tmp_path: Path, tiny: Path, options: tuple[object, ...], message: str, hint: str
) -> None:
    refused(llmq("quantize", tiny, "-o", tmp_path / "out", *options), message, hint)
    assert not list(tmp_path.iterdir())


def test_layers_have_the_schemes_of_the_rules_that_cover_them(tmp_path: Path, tiny: Path) -> None:
    out = tmp_path / "out"
    options = ("--override", "re:.*down_proj=w8a16", "--override", "layers.0.mlp.down_proj=w3a16")
    result = llmq(
        "quantize", tiny, "-o", out, "--scheme", "w4a16", "--method", "rtn", *options, "--ignore", "v_proj", "--json"
    )
    assert result.code == 0, result.err
    found = schemes(out)
    assert found["model.layers.0.mlp.down_proj"] == "int3 g128 sym"
    assert found["model.layers.1.mlp.down_proj"] == "int8 g128 sym"
    assert Counter(found.values()) == {"int4 g128 sym": 10, "int3 g128 sym": 1, "int8 g128 sym": 1, "F32": 2}
    report = json.loads(result.out)
    assert {layer["name"]: layer["scheme"] for layer in report["layers"]}.items() <= found.items()
    assert report["left_out"] == [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)]
    card = (out / "README.md").read_text()
    assert "| re:.*down_proj | int8 g128 sym |" in card
    assert "--override 're:.*down_proj=w8a16' --override layers.0.mlp.down_proj=w3a16" in card
    assert logits(out).isfinite().all()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_the_head_is_quantized_only_when_asked(tmp_path: Path, tiny: Path, text: Path, method: str) -> None:
    calibration = Calibration(str(text), samples=4, seqlen=64)
    chosen = {
        "scheme": "w4a16",
        "method": method,
        "format": "compressed-tensors",
        "calibration": calibration,
        "device": "cpu",
    }
    plain = quantize(str(tiny), tmp_path / "plain", **chosen)  # type: ignore[arg-type]
    asked = quantize(str(tiny), tmp_path / "asked", overrides={"lm_head": Scheme(8, 128)}, **chosen)  # type: ignore[arg-type]
    assert [layer.name for layer in asked.layers] == [*(layer.name for layer in plain.layers), "lm_head"]
    assert asked.layers[-1].scheme == "int8 g128 sym"
    assert asked.layers[-1].error < 1e-3
    before, after = logits(tmp_path / "plain"), logits(tmp_path / "asked")
    assert (after - before).square().mean() < 1e-3 * before.square().mean()


def test_a_head_that_is_the_embedding_is_not_quantized(tmp_path: Path) -> None:
    tied = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    refused(
        llmq("quantize", tied, "-o", tmp_path / "out", "--override", "lm_head=w8a16"),
        "lm_head is the embedding",
        "--override lm_head=none",
        code=1,
    )


def test_rules_are_read_back_as_they_are_written() -> None:
    for text in ("re:.*down_proj=w8a16", "lm_head=none", "re:a=b=fp8"):
        assert str(Rule.parse(text)) == text
    assert Rule.parse("v_proj=16").scheme is None
    assert Rule.parse("v_proj=none").covers("model.layers.0.self_attn.v_proj")
    assert not Rule.parse("proj=none").covers("model.layers.0.self_attn.v_proj")
