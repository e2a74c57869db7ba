"""``llmq.quantize``: what it writes, what it leaves alone, what it says, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, save_tiny, save_variant

from llmq import quantize
from llmq.checkpoint.config import read_config
from llmq.checkpoint.formats.gptq import Gptq
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import Tensors
from llmq.errors import LlmqError
from llmq.quant import activations, pipeline, prepare
from llmq.quant.activations import HiddenStates
from llmq.quant.calibration import draw_windows
from llmq.quant.methods import autoround, gptq
from llmq.quant.options import Calibration
from llmq.quant.pipeline import Step
from llmq.quant.report import QuantizationReport
from llmq.quant.schemes import AUTOROUND, AWQ, GPTQ, RTN, SMOOTHQUANT
from llmq.runtime.decoder import CausalAttention, DecoderLayer
from llmq.runtime.kernels.rope import norm_and_rotate
from llmq.runtime.loader import load_decoder, load_layer, open_source
from llmq.scheme import Scheme

W4, W8, W8A8 = Scheme(4, 32), Scheme(8, 32), Scheme(8, -1, activation_bits=8)
FP8 = Scheme(8, -1, number="e4m3", activation_bits=8)
LINEARS = 7 * 2


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small lose more by waiting for a second thread than they win, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{n}(x):\n    return x * {n} + {n * n}\n\n\n" for n in range(200)))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def calibration(text: Path) -> Calibration:
    return Calibration(str(text), samples=8, seqlen=64)


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = load_decoder(open_source(folder, "cpu", torch.float32))
    hidden = model(ids.flatten(), torch.arange(ids.shape[1]).repeat(len(ids)), CausalAttention(ids.shape[1]))
    return model.logits(hidden)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = Tensors(folder)
    return {name: tensors.load(name) for name in tensors.infos}


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("method", "scheme"),
    [(RTN, W8), (GPTQ, W8), (AWQ, W8), (SMOOTHQUANT, W8A8)],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_computes_nearly_the_same_in_8_bits(
    tmp_path: Path, variant: str, method: str, scheme: Scheme, calibration: Calibration
) -> None:
    source, output = save_variant(tmp_path / "model", variant), tmp_path / "out"
    quantize(str(source), output, method=method, scheme=scheme, calibration=calibration, device="cpu")
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    before, after = logits(source, ids), logits(output, ids)
    # A token on the border between two experts may be sent to the other one.
    tolerance = 2e-3 if read_config(source).experts is None else 1e-2
    assert (after - before).square().mean() < tolerance * before.square().mean()


def test_an_expert_that_no_token_is_sent_to_is_rounded_and_named(tmp_path: Path, text: Path) -> None:
    source = save_tiny(tmp_path / "model", "mixtral", num_local_experts=8, num_experts_per_tok=1)
    calibration = Calibration(str(text), samples=1, seqlen=6)
    report = quantize(str(source), tmp_path / "out", scheme=W4, calibration=calibration, device="cpu")
    rounded = {layer.name.rpartition(".")[0] for layer in report.layers if layer.method == RTN}
    assert len(rounded) >= 2 * (8 - 6)
    assert all(".experts." in name and name in report.warnings[-1] for name in rounded)


def test_an_expert_that_saw_too_few_tokens_to_learn_from_is_rounded_and_named(tmp_path: Path, text: Path) -> None:
    source = save_tiny(tmp_path / "model", "mixtral", num_local_experts=32, num_experts_per_tok=1, num_hidden_layers=1)
    calibration = Calibration(str(text), samples=16, seqlen=64)
    opened = open_source(source, "cpu", torch.float32)
    states, block = HiddenStates(opened, draw_windows(source, opened.config, calibration)), load_layer(opened, 0)
    states.mix(block)
    tokens: Counter[str] = Counter()
    for (down,) in opened.config.linear_stages[3].groups:
        states.show_inputs(block, {down: lambda x, name=down: tokens.update({f"model.layers.0.{name}": len(x)})})
    report = quantize(str(source), tmp_path / "out", scheme=W4, calibration=calibration, device="cpu")
    rounded = {layer.name for layer in report.layers if layer.method == RTN}
    few = {name for name, count in tokens.items() if count < 0.005 * 16 * 64}
    assert few
    assert few <= rounded
    assert all(name in report.warnings[-1] for name in few)
    assert max(tokens, key=tokens.__getitem__) not in rounded


@pytest.mark.parametrize("method", [GPTQ, AWQ])
def test_experts_are_quantized_alike_however_many_at_a_time(
    tmp_path: Path, calibration: Calibration, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "model", "mixtral", num_local_experts=4, num_hidden_layers=1)
    digests = []
    for moments in (activations.MOMENT_BYTES, 1):
        monkeypatch.setattr(activations, "MOMENT_BYTES", moments)
        out = tmp_path / "out"
        quantize(str(source), out, method=method, scheme=W4, calibration=calibration, device="cpu", overwrite=True)
        digests.append(digest(out))
    assert digests[0] == digests[1]


def test_routers_stay_as_they_are(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "qwen3-moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    quantize(str(source), tmp_path / "out", method=RTN, scheme=W4, device="cpu")
    router = "model.layers.1.mlp.gate.weight"
    assert torch.equal(weights(source)[router], weights(tmp_path / "out")[router])


def test_gptq_keeps_the_outputs_closer_than_rtn(tmp_path: Path, tiny: Path, text: Path) -> None:
    unseen = draw_windows(tiny, read_config(tiny), Calibration(str(text), samples=8, seqlen=128, seed=1))
    before, losses = logits(tiny, unseen), {}
    for method in (RTN, GPTQ):
        calibration = Calibration(str(text), samples=16, seqlen=128)
        quantize(str(tiny), tmp_path / method, method=method, scheme=W4, calibration=calibration, device="cpu")
        losses[method] = float((logits(tmp_path / method, unseen) - before).square().mean())
    assert losses[GPTQ] < 0.7 * losses[RTN]


@pytest.mark.parametrize("act_order", ["static", "dynamic", "off"])
def test_every_column_order_is_written_as_its_readers_expect_it(
    tmp_path: Path, tiny: Path, calibration: Calibration, act_order: str
) -> None:
    out = tmp_path / "out"
    report = quantize(str(tiny), out, scheme=W8, act_order=act_order, calibration=calibration, device="cpu")
    assert all(layer.method == GPTQ and layer.error < layer.rtn_error for layer in report.layers)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["desc_act"] == (act_order == "dynamic")
    natural = torch.arange(128) // 32
    in_place = [
        torch.equal(value.long(), natural) for name, value in weights(out).items() if name.endswith("q_proj.g_idx")
    ]
    assert in_place == [act_order != "dynamic"] * 2
    before, after = logits(tiny, torch.arange(40)[None]), logits(out, torch.arange(40)[None])
    assert (after - before).square().mean() < 5e-3 * before.square().mean()


def test_learned_rounding_goes_from_block_to_block(
    tmp_path: Path, tiny: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[QuantizedWeight] = []

    def quantize_block(*arguments: Any, **options: Any) -> dict[str, QuantizedWeight]:
        made = original(*arguments, **options, steps=5)
        learned.extend(made.values())
        return made

    original, out = autoround.quantize_block, tmp_path / "out"
    monkeypatch.setattr(autoround, "quantize_block", quantize_block)
    report = quantize(str(tiny), out, method=AUTOROUND, scheme=W4, calibration=calibration, device="cpu")
    assert len(learned) == LINEARS
    for layer, weight in zip(report.layers, learned, strict=True):
        assert layer.method == AUTOROUND
        written = Gptq.for_schemes({layer.name: W4}).unpack(layer.name, Tensors(out))
        assert torch.equal(written.dequantize(), weight.dequantize())


def test_the_report_tells_each_layer_s_error_and_what_became_of_the_bytes(
    tmp_path: Path, tiny: Path, calibration: Calibration
) -> None:
    seen: list[Step] = []
    output = tmp_path / "out"
    report = quantize(
        str(tiny),
        output,
        scheme=W4,
        calibration=calibration,
        device="cpu",
        progress=seen.append,
    )
    assert [step.layer for step in seen if step.layer] == list(report.layers)
    assert [step.layers for step in seen if step.layer] == list(range(1, LINEARS + 1))
    assert [(step.parts, step.layers) for step in seen if not step.layer] == [
        (1, LINEARS // 2),
        (2, LINEARS),
        (3, LINEARS),
    ]
    assert {(step.of_parts, step.of_layers) for step in seen} == {(3, LINEARS)}
    assert all(layer.method == GPTQ and 0 < layer.error < layer.rtn_error < 0.05 for layer in report.layers)
    assert (report.calibration_samples, report.calibration_seqlen) == (8, 64)
    assert report.bytes_before == Tensors(tiny).num_bytes
    assert report.bytes_after == Tensors(output).num_bytes < report.bytes_before
    packed = {name: value for name, value in weights(output).items() if name.rpartition(".")[2] in PACKED}
    elements = sum(out * inp for out, inp in read_config(tiny).linears.values()) * 2
    bits = 8 * sum(value.numel() * value.element_size() for value in packed.values())
    assert report.effective_bits == pytest.approx(bits / elements)
    assert report.seconds > 0
    assert report.peak_memory_bytes > 0
    assert report.warnings == ()
    json.dumps(report.to_json())


PACKED = ("qweight", "qzeros", "scales", "g_idx")


def test_rtn_reads_no_text_and_reports_the_error_of_the_weights(tmp_path: Path, tiny: Path) -> None:
    nowhere = Calibration(str(tmp_path / "missing.txt"))
    report = quantize(str(tiny), tmp_path / "out", method=RTN, scheme=W4, calibration=nowhere, device="cpu")
    assert report.calibration_samples == 0
    assert all(layer.method == RTN and layer.error == layer.rtn_error for layer in report.layers)
    before = weights(tiny)
    for layer in report.layers:
        restored = Gptq.for_schemes({layer.name: W4}).unpack(layer.name, Tensors(tmp_path / "out")).dequantize()
        error, whole = (restored - before[f"{layer.name}.weight"]), before[f"{layer.name}.weight"]
        assert layer.error == pytest.approx(float(error.square().sum() / whole.square().sum()), rel=1e-4)


def test_what_is_not_quantized_is_copied_to_the_bit(tmp_path: Path, calibration: Calibration) -> None:
    source = save_tiny(tmp_path / "model", "qwen2", dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    tensors["something.the_decoder.does_not_know"] = torch.arange(5)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "NOTICE.txt").write_text("keep me")
    (source / "modeling.py").write_text("never me")
    output = tmp_path / "out"
    quantize(str(source), output, scheme=W4, calibration=calibration, ignore=["v_proj"], device="cpu")
    after = weights(output)
    kept = {name for name in after if name.rpartition(".")[2] not in PACKED}
    assert {name for name in tensors if not name.endswith("_proj.weight") or "v_proj" in name} == kept
    for name in kept:
        assert after[name].dtype == tensors[name].dtype
        assert torch.equal(after[name], tensors[name])
    assert (output / "NOTICE.txt").read_text() == "keep me"
    assert not (output / "modeling.py").exists()
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma2", "phi3-partial"])
def test_scales_of_the_kv_cache_reach_what_the_model_caches(
    tmp_path: Path, calibration: Calibration, variant: str
) -> None:
    source, out = save_variant(tmp_path / "model", variant), tmp_path / "out"
    quantize(str(source), out, scheme=FP8, kv_cache="fp8", calibration=calibration, device="cpu")
    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (quantization["kv_cache_scheme"]["num_bits"], quantization["kv_cache_scheme"]["dynamic"]) == (8, False)
    windows = draw_windows(source, read_config(source), calibration)
    largest: dict[str, float] = {}

    class Watch(CausalAttention):
        def __call__(self, attention: Any, query: Any, key: Any, value: Any, rotation: Any) -> torch.Tensor:
            _, rotated = norm_and_rotate(query, key, rotation, attention.norms, attention.eps)
            largest[f"model.layers.{attention.layer}.self_attn.k_scale"] = float(rotated.abs().max())
            largest[f"model.layers.{attention.layer}.self_attn.v_scale"] = float(value.abs().max())
            return super().__call__(attention, query, key, value, rotation)

    count, length = windows.shape
    model = load_decoder(open_source(out, "cpu", torch.float32, length))
    model(windows.flatten(), torch.arange(length).repeat(count), Watch(length))
    written = weights(out)
    assert largest
    for name, most in largest.items():
        assert written[name].shape == (1,)
        assert float(written[name]) == pytest.approx(most / 448, rel=0.02)


def test_configs_say_how_it_was_quantized_and_no_file_says_where(
    tmp_path: Path, tiny: Path, calibration: Calibration
) -> None:
    source = tmp_path / "secret-place" / "base"
    save_tiny(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": str(source)}))
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [old]\n---\n# Base\n")
    output = tmp_path / "secret-place" / "out"
    quantize(str(source), output, scheme=Scheme(8, 64, False), calibration=calibration, device="cpu")
    written = json.loads((output / "config.json").read_text())
    quantization = written.pop("quantization_config")
    assert written == config
    assert quantization == json.loads((output / "quantize_config.json").read_text())
    assert (quantization["bits"], quantization["group_size"], quantization["sym"]) == (8, 64, False)
    card = (output / "README.md").read_text()
    for fact in ("license: apache-2.0", "base model | base", "int8 g64 asym", "8 windows of 64 tokens", "q_proj"):
        assert fact in card
    assert "llmq quantize base -o out --scheme w8a16 --group-size 64 --asym --method gptq" in card
    for path in output.iterdir():
        assert b"secret-place" not in path.read_bytes(), path.name


@pytest.mark.parametrize(("method", "scheme"), [(GPTQ, W4), (AWQ, W4), (SMOOTHQUANT, W8A8)])
def test_the_same_run_writes_the_same_bytes(
    tmp_path: Path, tiny: Path, calibration: Calibration, method: str, scheme: Scheme
) -> None:
    for _ in range(2):
        quantize(str(tiny), tmp_path / "out", scheme=scheme, method=method, calibration=calibration, device="cpu")
        (tmp_path / "out").rename(tmp_path / f"out-{len(list(tmp_path.iterdir()))}")
    first, second = (digest(folder) for folder in sorted(tmp_path.iterdir()))
    assert first == second


def test_micro_batches_of_any_size_give_the_same_hessian(tiny: Path) -> None:
    source = open_source(tiny, "cpu", torch.float32)
    windows = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))
    block, seen = load_layer(source, 0), []
    with torch.inference_mode():
        for tokens in (1, 192, 4096):  # one window at a time; three, and two at last; all at once
            states = HiddenStates(source, windows, tokens)
            assert all(len(batch) <= max(tokens, 64) for batch in states.inputs)
            assert len(states.sample(states.tokens).inputs) == len(states.inputs)
            states.mix(block)
            seen.append(states.second_moments(block, ["mlp.down_proj"], "")["mlp.down_proj"])
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[1], seen[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "gemma2", "qwen3-moe"])
def test_hessians_are_those_of_the_inputs_that_layers_have_in_the_model(tmp_path: Path, variant: str) -> None:
    """2/n Σ x xᵀ, where x is what a hook on the whole model sees."""
    source = open_source(save_variant(tmp_path, variant), "cpu", torch.float32)
    model = load_decoder(source)
    for number in range(source.config.num_layers):
        model.layers[number] = load_layer(source, number)  # its layers one by one, not merged
    windows = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    states = HiddenStates(source, windows)

    def check(block: DecoderLayer, linear: str) -> None:
        inputs: list[torch.Tensor] = []
        hook = block.get_submodule(linear).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model(windows.flatten(), torch.arange(32).repeat(2), CausalAttention(32))
        hook.remove()
        expected = 2 / len(inputs[0]) * inputs[0].t() @ inputs[0]
        seen = states.second_moments(block, [linear], "")[linear]
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)

    with torch.inference_mode():
        for block in model.layers:
            for stage in source.config.linear_stages:
                if stage.half == "finish" and not states.mixed:
                    states.mix(block)
                for group in stage.groups:
                    check(block, group[0])
            states.finish(block)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_gives_the_errors_that_a_cpu_gives(tmp_path: Path, calibration: Calibration, dtype: str) -> None:
    model = save_tiny(tmp_path / "model", dtype=dtype)
    cpu, gpu = (
        quantize(str(model), tmp_path / device, scheme=W4, calibration=calibration, device=device)
        for device in ("cpu", "cuda")
    )
    assert [layer.error for layer in gpu.layers] == pytest.approx([layer.error for layer in cpu.layers], rel=0.1)
    assert gpu.bytes_after == cpu.bytes_after


@pytest.mark.gpu
def test_a_gpu_sums_products_of_16_bits_in_fp32() -> None:
    x = torch.randn(5000, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double().t() @ x.double()
    assert (activations.moment(x.cuda()).cpu() - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "scheme"), [(AWQ, W4), (SMOOTHQUANT, W8A8)])
def test_a_gpu_folds_as_a_cpu_does(
    tmp_path: Path, calibration: Calibration, method: str, scheme: Scheme, tiny: Path
) -> None:
    cpu, gpu = (
        quantize(str(tiny), tmp_path / device, method=method, scheme=scheme, calibration=calibration, device=device)
        for device in ("cpu", "cuda")
    )
    assert [layer.error for layer in gpu.layers] == pytest.approx([layer.error for layer in cpu.layers], rel=0.3)


@pytest.mark.parametrize(
    ("ignore", "count"),
    [
        ("down_proj", 2),
        ("model.layers.1.mlp.up_proj", 1),
        ("layers.0", 7),
        ("self_attn", 8),
        ("re:.*[qk]_proj$", 4),
        ("lm_head", 0),
    ],
)
def test_ignored_layers_stay_as_they_are(tmp_path: Path, tiny: Path, ignore: str, count: int) -> None:
    output = tmp_path / "out"
    report = quantize(str(tiny), output, method=RTN, scheme=W4, ignore=[ignore], device="cpu")
    assert len(report.layers) == LINEARS - count
    before, after = weights(tiny), weights(output)
    kept = [name for name in after if name.endswith("_proj.weight")]
    assert len(kept) == count
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert ("dynamic" in json.loads((output / "quantize_config.json").read_text())) == (count > 0)


def test_a_layer_whose_hessian_cannot_be_used_is_rounded_and_named(
    tmp_path: Path, tiny: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gptq.quantize_weight

    def refuse_down(weight: torch.Tensor, scheme: Scheme, hessian: torch.Tensor, act_order: str) -> object:
        if weight.shape[1] == 256:
            raise gptq.NotPositiveDefinite
        return original(weight, scheme, hessian, act_order)

    monkeypatch.setattr(gptq, "quantize_weight", refuse_down)
    report = quantize(str(tiny), tmp_path / "out", scheme=W4, calibration=calibration, device="cpu")
    rounded = [layer.name for layer in report.layers if layer.method == RTN]
    assert rounded == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert len(report.warnings) == 1
    assert all(name in report.warnings[0] for name in rounded)


def test_a_text_with_fewer_windows_than_asked_is_said(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "short.txt").write_text("just a few words, and no more than that")
    calibration = Calibration(str(tmp_path / "short.txt"), samples=100, seqlen=16)
    report = quantize(str(tiny), tmp_path / "out", scheme=W4, calibration=calibration, device="cpu")
    assert report.calibration_samples == 2
    assert "has 2 windows, and 100 were asked for" in report.warnings[0]


def refused(message: str, model: object, output: Path, **options: object) -> LlmqError:
    """The error that ``quantize`` raises, having written nothing."""
    beside = sorted(output.parent.iterdir())
    with pytest.raises(LlmqError, match=message) as caught:
        quantize(str(model), output, **{"device": "cpu", "method": RTN, **options})  # type: ignore[arg-type]
    assert caught.value.hint
    assert sorted(output.parent.iterdir()) == beside
    return caught.value


def test_an_output_that_exists_is_kept(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert "--overwrite" in str(refused("exists already", tiny, tmp_path / "out").hint)
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_the_folder_that_the_model_lies_in_is_not_overwritten(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "models" / "tiny")
    refused("tiny lies in it", model, tmp_path / "models", overwrite=True)
    assert (model / "config.json").exists()


@pytest.mark.parametrize(("width", "reason"), [(224, "has 224 inputs, which groups of 128"), (240, "multiples of 32")])
def test_a_layer_that_scheme_or_format_cannot_hold_stays_as_it_is_and_is_named(
    tmp_path: Path, width: int, reason: str
) -> None:
    source = save_tiny(tmp_path / "model", intermediate_size=width)
    scheme = Scheme(4, 128 if width == 224 else -1)
    report = quantize(str(source), tmp_path / "out", method=RTN, scheme=scheme, ignore=["up_proj"], device="cpu")
    kept = [f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in ("gate_proj", "down_proj")]
    kept = [name for name in kept if width == 240 or "down" in name]
    assert all(name in report.left_out for name in kept)
    assert all(
        any(name in warning for warning in report.warnings if reason in warning or width == 240) for name in kept
    )
    before, after = weights(source), weights(tmp_path / "out")
    assert all(torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in kept)
    ids = torch.randint(0, 256, (1, 8), generator=torch.Generator().manual_seed(0))
    assert logits(tmp_path / "out", ids).isfinite().all()


def test_a_model_of_which_no_layer_fits(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", hidden_size=96, intermediate_size=160, head_dim=24)
    error = refused("no layer can be quantized: .* has 96 inputs, which groups of 128", source, tmp_path / "out")
    assert "--group-size 32, -1" in str(error.hint)


def test_a_model_that_is_quantized_already(tmp_path: Path, tiny: Path) -> None:
    quantize(str(tiny), tmp_path / "once", method=RTN, scheme=W4, device="cpu")
    refused("quantized already", tmp_path / "once", tmp_path / "twice")


def test_an_ignore_that_matches_nothing(tmp_path: Path, tiny: Path) -> None:
    assert refused("dwon_proj matches no layer", tiny, tmp_path / "out", ignore=["dwon_proj"]).exit_code == 2
    assert refused("not a regular expression", tiny, tmp_path / "out", ignore=["re:("]).exit_code == 2
    refused("nothing is left", tiny, tmp_path / "out", ignore=["mlp", "self_attn"], scheme=W4)


def test_options_that_do_not_exist(tmp_path: Path, tiny: Path) -> None:
    refused("no method 'magic'", tiny, tmp_path / "out", method="magic")
    refused("no device 'tpu'", tiny, tmp_path / "out", device="tpu")


def test_a_calibration_text_that_is_missing(tmp_path: Path, tiny: Path) -> None:
    missing = Calibration(str(tmp_path / "missing.txt"))
    refused("cannot be read", tiny, tmp_path / "out", method=GPTQ, calibration=missing)


def test_a_disk_without_room(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 1000))
    refused("takes about", tiny, tmp_path / "out")


def damage(source: Path, name: str, value: float) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[name][0, 0] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("method", "scheme"), [(RTN, W4), (GPTQ, W4), (AWQ, W4), (SMOOTHQUANT, W8A8)])
@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN or infinite"), (1e6, "more than fp16 can")])
def test_weights_that_cannot_be_quantized_are_named(
    tmp_path: Path, calibration: Calibration, value: float, message: str, method: str, scheme: Scheme
) -> None:
    source = save_tiny(tmp_path / "model")
    damage(source, "model.layers.1.mlp.up_proj.weight", value)
    refused(
        f"model.layers.1.mlp.up_proj.weight holds .*{message}",
        source,
        tmp_path / "out",
        method=method,
        scheme=scheme,
        calibration=calibration,
    )


def test_inputs_that_are_not_finite_are_named(tmp_path: Path, calibration: Calibration) -> None:
    source = save_tiny(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(
        r"layers\.1\.self_attn\.q_proj: its inputs",
        source,
        tmp_path / "out",
        method=GPTQ,
        calibration=calibration,
        scheme=W4,
    )


def test_activations_beyond_fp16_are_calibrated_in_fp32(
    tmp_path: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(prepare, "resolve_dtype", lambda *_: torch.float16)  # as a GPU would have it
    report = quantize(str(source), tmp_path / "out", scheme=W4, calibration=calibration, device="cpu")
    assert "not finite in float16: calibrated in fp32" in report.warnings[0]
    assert all(layer.method == GPTQ and 0 < layer.error < 0.05 for layer in report.layers)


def test_a_model_that_does_not_run_is_not_kept(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    damage(source, "lm_head.weight", float("nan"))
    refused("computes NaN or infinite logits", source, tmp_path / "out", scheme=W4)


def test_a_tensor_that_is_missing_is_noticed_before_any_work(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(r"no tensor model\.layers\.1\.mlp\.down_proj\.weight", source, tmp_path / "out", scheme=W4)


def test_defaults_are_known_without_torch() -> None:
    code = "import sys, llmq.quant.options, llmq.quant.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_quantize_is_part_of_the_package() -> None:
    assert quantize is pipeline.quantize
    assert QuantizationReport.__name__ in pipeline.quantize.__annotations__["return"]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("lm_head.weight", 0),
        ("model.norm.weight", 0),
        ("model.embed_tokens.weight", 200),
        ("model.layers.1.post_attention_layernorm.weight", 0),
    ],
)
def test_tensors_that_are_looked_at_last_are_missed_before_the_work(
    tmp_path: Path, tiny: Path, name: str, rows: int
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    stored = load_file(folder / "model.safetensors")
    tensor = stored.pop(name)
    if rows:
        stored[name] = tensor[:rows].clone()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    steps: list[Any] = []
    with pytest.raises(LlmqError, match=re.escape(name)) as caught:
        quantize(str(folder), tmp_path / "out", method="rtn", device="cpu", progress=steps.append)
    assert caught.value.hint
    assert not steps
