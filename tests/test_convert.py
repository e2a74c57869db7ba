"""``llmq convert`` and ``llmq inspect``: the same numbers in another format, and what a folder holds, to the layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Result, llmq
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from llmq.checkpoint.convert import convert
from llmq.checkpoint.inspect import inspect
from llmq.checkpoint.tensors import Tensors
from llmq.quant.pipeline import quantize
from llmq.runtime.loader import load_decoder, open_source
from llmq.scheme import Scheme

FIXTURES = Path(__file__).parent / "fixtures"
LINEARS = 7 * 2
ONE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, so that those are seen to survive."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "qwen2")


@pytest.fixture
def w4(tmp_path: Path, tiny: Path) -> Path:
    return quantized(tiny, tmp_path / "w4", Scheme(4, 32))


def quantized(tiny: Path, folder: Path, scheme: Scheme, **options: Any) -> Path:
    quantize(str(tiny), folder, method="rtn", scheme=scheme, device="cpu", **options)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    stored = Tensors(folder)
    return {name: stored.load(name) for name in stored.infos}


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, layer: str = ONE, **changes: torch.Tensor) -> None:
    """Change tensors of a layer."""
    stored = load_file(folder / "model.safetensors")
    stored |= {f"{layer}.{suffix}": tensor for suffix, tensor in changes.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def assert_refused(result: Result, message: str, code: int = 1) -> None:
    lines = result.err.strip().splitlines()
    assert result.code == code, result.err
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], result.err
    assert message in lines[0]
    assert result.out == ""


# Convert


@pytest.mark.parametrize(
    ("scheme", "through"),
    [
        (Scheme(4, 32), "awq"),
        (Scheme(4, 128, False), "awq"),
        (Scheme(4, 64), "compressed-tensors"),
        (Scheme(4, -1, False), "compressed-tensors"),
        (Scheme(8, 32), "compressed-tensors"),
        (Scheme(8, -1, False), "compressed-tensors"),
    ],
    ids=str,
)
def test_there_and_back_every_tensor_has_the_same_bytes(
    tmp_path: Path, tiny: Path, scheme: Scheme, through: str
) -> None:
    source = quantized(tiny, tmp_path / "source", scheme, ignore=[ONE])
    there, back = tmp_path / "there", tmp_path / "back"
    assert llmq("convert", source, "-o", there, "--format", through).code == 0
    assert llmq("convert", there, "-o", back, "--format", "gptq").code == 0
    assert_same_tensors(source, back)
    first, last = (json.loads((folder / "quantize_config.json").read_text()) for folder in (source, back))
    assert first == last


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 64, False)], ids=str)
def test_all_formats_are_the_same_weights(tmp_path: Path, tiny: Path, scheme: Scheme) -> None:
    """Quantized into each directly, and converted to each: one set of numbers."""
    models = {}
    for name in ("gptq", "awq", "compressed-tensors"):
        direct, converted = tmp_path / name, tmp_path / f"to-{name}"
        quantized(tiny, direct, scheme, format=name)
        source = tmp_path / ("awq" if name == "compressed-tensors" else "gptq")
        if name != "gptq":
            assert llmq("convert", source, "-o", converted, "--format", name).code == 0
            assert_same_tensors(direct, converted)
            assert not (converted / "quantize_config.json").exists()
        models[name] = load_decoder(open_source(direct, "cpu", torch.float32)).state_dict()
    for name, weights in models.items():
        for key, weight in weights.items():
            assert torch.equal(weight, models["gptq"][key]), (name, key)


def test_everything_else_in_the_folder_comes_along(tmp_path: Path, w4: Path) -> None:
    (w4 / "NOTICE").write_text("keep me")
    (w4 / "modeling.py").write_text("never me")
    out = tmp_path / "out"
    result = llmq("convert", w4, "-o", out, "--format", "awq", "--json")
    report = json.loads(result.out)
    assert (report["schema"], report["source_format"], report["format"]) == ("llmq.convert/1", "gptq", "awq")
    assert (report["layers"], report["bytes_after"]) == (LINEARS, Tensors(out).num_bytes)
    assert (out / "NOTICE").read_text() == "keep me"
    assert (out / "tokenizer.json").read_bytes() == (w4 / "tokenizer.json").read_bytes()
    assert not (out / "modeling.py").exists()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (w4, out))
    assert after.pop("quantization_config")["quant_method"] == "awq"
    before.pop("quantization_config")
    assert before == after
    assert "From the GPTQ format to AWQ" in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "README.md").read_text()


def test_an_asymmetric_folder_says_how_transformers_reads_it(tmp_path: Path, tiny: Path) -> None:
    source = quantized(tiny, tmp_path / "source", Scheme(4, 32, False), format="awq")
    result = llmq("convert", source, "-o", tmp_path / "out", "--format", "compressed-tensors")
    assert result.code == 0
    assert "warning: transformers reads asymmetric" in result.err


def test_a_model_that_is_not_quantized_is_not_converted(tmp_path: Path, tiny: Path) -> None:
    assert_refused(llmq("convert", tiny, "-o", tmp_path / "out", "--format", "awq"), "is not quantized")


def test_the_format_that_it_has_is_refused(tmp_path: Path, w4: Path) -> None:
    assert_refused(llmq("convert", w4, "-o", tmp_path / "out", "--format", "gptq"), "in the GPTQ format already")


def test_8_bits_do_not_fit_awq(tmp_path: Path, tiny: Path) -> None:
    w8 = quantized(tiny, tmp_path / "w8", Scheme(8, 32))
    result = llmq("convert", w8, "-o", tmp_path / "out", "--format", "awq")
    assert_refused(result, "the AWQ format holds codes of 4 bits, and these have 8", code=2)
    result = llmq("quantize", tiny, "-o", tmp_path / "out", "--bits", 8, "--format", "awq")
    assert_refused(result, "the AWQ format holds codes of 4 bits, and these have 8", code=2)
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_a_usage_error(tmp_path: Path, tiny: Path, w4: Path) -> None:
    assert_refused(llmq("convert", w4, "-o", tmp_path / "out", "--format", "gguf"), "no format 'gguf'", code=2)
    assert_refused(llmq("quantize", tiny, "-o", tmp_path / "out", "--format", "gguf"), "no format 'gguf'", code=2)


def test_an_output_that_exists_is_kept(tmp_path: Path, w4: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert_refused(llmq("convert", w4, "-o", tmp_path / "out", "--format", "awq"), "exists already")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("form", ["awq", "compressed-tensors"])
def test_groups_in_activation_order_stay_gptq(tmp_path: Path, w4: Path, form: str) -> None:
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    edit_tensors(w4, g_idx=(order // 32).int())
    result = llmq("convert", w4, "-o", tmp_path / "out", "--format", form)
    assert_refused(result, f"{ONE}: its groups are scattered by activation order")
    assert [path.name for path in tmp_path.iterdir()] == ["w4"]


def test_gptq_announces_groups_that_compressed_tensors_has_scattered(tmp_path: Path, tiny: Path) -> None:
    """Without ``desc_act``, fast kernels take the groups to be in their places, whatever the index says."""
    source, out = quantized(tiny, tmp_path / "source", Scheme(4, 32), format="compressed-tensors"), tmp_path / "out"
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    edit_tensors(source, weight_g_idx=(order // 32).int())
    assert llmq("convert", source, "-o", out, "--format", "gptq").code == 0
    for name in ("config.json", "quantize_config.json"):
        fields = json.loads((out / name).read_text())
        assert fields.get("quantization_config", fields)["desc_act"] is True
    before, after = (open_source(folder, "cpu", torch.float32) for folder in (source, out))
    assert torch.equal(*(one.format.unpack(ONE, one.tensors).dequantize() for one in (before, after) if one.format))


def test_scales_that_the_format_cannot_hold_are_refused(tmp_path: Path, tiny: Path) -> None:
    source = quantized(tiny, tmp_path / "source", Scheme(4, 32), format="compressed-tensors")
    edit_tensors(source, weight_scale=torch.full((128, 8), 1e-30, dtype=torch.bfloat16))
    result = llmq("convert", source, "-o", tmp_path / "out", "--format", "gptq")
    assert_refused(result, f"{ONE}: scales in bfloat16 have no equal in fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_config_that_denies_a_packed_layer_is_refused(tmp_path: Path, w4: Path) -> None:
    edit_config(w4, dynamic={f"-:{ONE}": {}})
    result = llmq("convert", w4, "-o", tmp_path / "out", "--format", "awq")
    assert_refused(result, f"{ONE} is packed, and quantization_config says that it is not")


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, w4: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(str(w4), tmp_path / "out", "awq", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["w4"]


@pytest.mark.parametrize(
    ("writer", "case", "form", "scheme"),
    [
        ("gptqmodel", "mixed-v2", "compressed-tensors", "int4 g32 sym, int4 g64 asym, int8 g128 sym"),
        ("gptqmodel", "w4-head", "compressed-tensors", "int4 g32 sym, int8 g32 sym"),
        ("auto_gptq", "w4-asym", "awq", "int4 g32 asym"),
        ("auto_gptq", "w3", "compressed-tensors", "int3 g32 sym"),
        ("autoawq", "w4", "gptq", "int4 g32 asym"),
        ("llmcompressor", "w4-asym", "gptq", "int4 g32 asym"),
        ("bitsandbytes", "int8", "compressed-tensors", "int8 row sym"),
    ],
)
def test_what_others_wrote_becomes_the_same_numbers(
    tmp_path: Path, writer: str, case: str, form: str, scheme: str
) -> None:
    source, out = FIXTURES / writer / case, tmp_path / "out"
    result = llmq("convert", source, "-o", out, "--format", form, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["scheme"] == scheme
    assert inspect(str(out)).problems == ()
    before, after = (load_decoder(open_source(folder, "cpu", torch.float32)).state_dict() for folder in (source, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize(
    ("writer", "case", "form", "message", "code"),
    [
        ("gptqmodel", "mixed-v2", "awq", "holds codes of 4 bits, and these have 8", 2),
        ("llmcompressor", "w8a8", "gptq", "and not int8 row sym, 8-bit activations", 2),
        ("llmcompressor", "w5", "gptq", "codes of 2, 3, 4 or 8 bits, and these have 5", 2),
        ("llmcompressor", "w4", "bitsandbytes", "and not int4 g32 sym", 2),
        ("bitsandbytes", "nf4", "compressed-tensors", "integers and e4m3, and not nf4 g64", 2),
        ("llmcompressor", "w4", "gptq", "scales in bfloat16 have no equal in fp16", 1),
    ],
)
def test_numbers_that_a_format_does_not_have_are_refused(
    tmp_path: Path, writer: str, case: str, form: str, message: str, code: int
) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / writer / case, source)
    if form == "gptq" and case == "w4":
        edit_tensors(source, "model.layers.0.mlp.down_proj", weight_scale=torch.full((64, 4), 1e-30).bfloat16())
    assert_refused(llmq("convert", source, "-o", tmp_path / "out", "--format", form), message, code)
    assert not (tmp_path / "out").exists()


def test_the_scales_of_a_kv_cache_are_not_lost(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "llmcompressor" / "fp8-kv", source)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    shutil.copyfile(FIXTURES / "llmcompressor" / "w4" / "model.safetensors", source / "model.safetensors")
    edit_config(source, format="pack-quantized", config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})
    edit_tensors(source, "model.layers.0.self_attn", k_scale=torch.ones(1), v_scale=torch.ones(1))
    assert llmq("inspect", source).code == 0
    result = llmq("convert", source, "-o", tmp_path / "out", "--format", "gptq")
    assert_refused(result, "scales a KV cache of 8 bits, for which the GPTQ format has no place")


@pytest.mark.parametrize(
    ("writer", "name", "fields"),
    [
        ("autoawq", "quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
        ("auto_gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
    ],
)
def test_what_stands_in_a_file_of_its_own_is_read_as_if_in_config_json(
    tmp_path: Path, writer: str, name: str, fields: dict[str, Any]
) -> None:
    """As AutoAWQ and AutoGPTQ began, without the method's name."""
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / writer / "w4", source)
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    (source / name).write_text(json.dumps(fields))
    assert inspect(str(source)) == replace(inspect(str(FIXTURES / writer / "w4")), folder=str(source))
    assert llmq("convert", source, "-o", tmp_path / "out", "--format", "compressed-tensors").code == 0
    assert not (tmp_path / "out" / name).exists()


# Inspect


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_every_layer_is_told_with_its_scheme_and_bytes(tmp_path: Path, tiny: Path, form: str) -> None:
    folder = quantized(tiny, tmp_path / "out", Scheme(4, 32, False), format=form, ignore=[ONE])
    result = llmq("inspect", folder, "--json")
    assert result.code == 0, result.out
    facts = json.loads(result.out)
    assert (facts["schema"], facts["format"]) == ("llmq.inspect/1", form)
    assert facts["written_by"].startswith("llmq:")
    assert facts["num_bytes"] == Tensors(folder).num_bytes
    assert facts["problems"] == []
    schemes = {layer["name"]: layer["scheme"] for layer in facts["layers"]}
    assert len(schemes) == LINEARS
    assert schemes.pop(ONE) == "F32"
    assert set(schemes.values()) == {"int4 g32 asym"}
    extra = {"gptq": 32 / 160, "awq": 0, "compressed-tensors": 0}[form]  # the group index, over the outputs
    assert 4 + (16 + 4) / 32 <= facts["effective_bits"] <= 4 + (16 + 4) / 32 + 2 * extra + 0.02


def test_a_plain_model_is_told_too(tiny: Path) -> None:
    result = llmq("inspect", tiny)
    assert result.code == 0
    assert "not quantized" in result.out
    assert "F32" in result.out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_config(folder, group_size=64), "int4 g64 sym makes it"),
        (lambda folder: edit_config(folder, bits=8), "int8 g32 sym makes it"),
        (lambda folder: edit_config(folder, sym=False), "sym is False in config.json and True in quantize_config.json"),
        (lambda folder: edit_tensors(folder, weight=torch.zeros(128, 256)), f"{ONE} is there twice"),
        (lambda folder: edit_config(folder, dynamic={f"-:{ONE}": {}}), "quantization_config says that it is not"),
        (lambda folder: edit_tensors(folder, scales=torch.zeros(8, 64).half()), f"{ONE}.scales is F16 [8, 64]"),
    ],
)
def test_what_does_not_fit_together_is_said(w4: Path, damage: Any, message: str) -> None:
    damage(w4)
    result = llmq("inspect", w4)
    assert result.code == 3
    assert message in result.out
    assert any(message in problem for problem in inspect(str(w4)).problems)


def test_missing_and_surplus_layers_are_said(w4: Path) -> None:
    stored = load_file(w4 / "model.safetensors")
    stored["lm_head.qweight"] = stored.pop(f"{ONE}.qweight")
    del stored["lm_head.weight"]
    save_file(stored, w4 / "model.safetensors", metadata={"format": "pt"})
    problems = "\n".join(inspect(str(w4)).problems)
    for part in (f"{ONE}.weight is missing", "lm_head is packed, and quantization_config says that it is not"):
        assert part in problems


def test_tensors_are_not_walked_for_each_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of experts has tens of thousands of both."""

    class Counted(dict[str, Any]):
        walks = 0

        def items(self) -> Any:
            self.walks += 1
            return super().items()

    def walks(layers: int) -> int:
        folder = save_tiny(tmp_path / str(layers), num_hidden_layers=layers)
        infos = Counted(Tensors(folder).infos)
        monkeypatch.setattr("llmq.checkpoint.inspect.Tensors", lambda _: stand_in(folder, infos))
        inspect(str(folder))
        return infos.walks

    def stand_in(folder: Path, infos: Counted) -> Tensors:
        opened = Tensors(folder)
        opened.infos = infos
        return opened

    assert walks(1) == walks(3) > 0


def test_a_format_that_llmq_does_not_read_is_an_error(tmp_path: Path, w4: Path) -> None:
    edit_config(w4, quant_method="exl2")
    assert_refused(llmq("inspect", w4), "'exl2', which is not supported")
    assert_refused(llmq("generate", w4, "-p", "x"), "'exl2', which is not supported")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(llmq("inspect", "./nowhere"), "there is no folder ./nowhere")
    assert_refused(
        llmq("convert", "./nowhere", "-o", tmp_path / "x", "--format", "awq"), "there is no folder ./nowhere"
    )
    assert not (tmp_path / "x").exists()
