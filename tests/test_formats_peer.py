"""transformers, with compressed-tensors, gptqmodel and bitsandbytes, reads what llmq writes, to the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import save_tiny

from llmq.scheme import E4M3, FP4, NF4, Scheme

pytestmark = [pytest.mark.peer, pytest.mark.slow]

LINEARS = 7 * 2
ONE = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import torch

    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # its default refuses machines of two cores
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # it compiles its kernels, which takes longer than running them
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quantized(
    tmp_path: Path, architecture: str, scheme: Scheme, form: str, ignore: tuple[str, ...], dtype: str = "float32"
) -> Path:
    """A tiny model, quantized into the format ``form``."""
    from llmq.quant.pipeline import quantize

    source = save_tiny(tmp_path / "model", architecture, dtype=dtype)
    folder = tmp_path / "quantized"
    quantize(str(source), folder, method="rtn", scheme=scheme, format=form, ignore=ignore, device="cpu")
    return folder


def both_logits(folder: Path, peer: object) -> tuple[object, object]:
    """What ``peer`` and llmq compute from the same tokens."""
    import torch

    from llmq.runtime.decoder import CausalAttention
    from llmq.runtime.loader import load_decoder, open_source

    ours = load_decoder(open_source(folder, "cpu", torch.float32))
    ids = torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = peer(ids[None]).logits[0]  # type: ignore[operator]
        return ours.logits(ours(ids, torch.arange(len(ids)), CausalAttention(len(ids)))), theirs.float()


def label(value: object) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


W8A8 = Scheme(8, -1, activation_bits=8)
FP8 = Scheme(8, -1, number=E4M3, activation_bits=8)


def assert_same_weights(folder: Path, layers: dict[str, object]) -> None:
    """``layers``, by their full names, are those that the folder has packed, and hold the numbers that llmq reads."""
    import torch

    from llmq.checkpoint.config import read_config
    from llmq.checkpoint.formats import open_format, packed_layers
    from llmq.checkpoint.tensors import Tensors

    tensors, form = Tensors(folder), open_format(read_config(folder))
    assert form is not None
    assert set(layers) == packed_layers(form, tensors)
    for name, weight in layers.items():
        assert isinstance(weight, torch.Tensor)
        ours = form.unpack(name, tensors).dequantize().to(weight.dtype)
        torch.testing.assert_close(ours, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("architecture", "schemes"),
    [
        ("llama", [Scheme(4, 128)]),
        ("qwen2", [Scheme(2, 32)]),
        ("qwen3", [Scheme(3, 64)]),
        ("llama", [Scheme(5, -1)]),
        ("mistral", [Scheme(6, 32)]),
        ("llama", [Scheme(8, -1)]),
        ("llama", [Scheme(4, 0, False)]),
        ("qwen2", [W8A8]),
        ("llama", [Scheme(8, 0, activation_bits=8)]),
        ("qwen3", [FP8]),
        ("llama", [Scheme(8, 0, number=E4M3, activation_bits=8)]),
        ("llama", [Scheme(8, -1, number=E4M3)]),
        ("llama", [Scheme(4, 32), Scheme(8, -1), Scheme(3, 64)]),
        ("qwen2", [Scheme(4, 32), W8A8, FP8, Scheme(8, 0, number=E4M3)]),
    ],
    ids=label,
)
def test_transformers_reads_compressed_tensors(tmp_path: Path, architecture: str, schemes: list[Scheme]) -> None:
    """The first scheme is that of most layers; one is left as it is; a head of its own is packed too."""
    pytest.importorskip("compressed_tensors")
    import torch
    from packed_folders import linear_names, write_packed
    from transformers import AutoModelForCausalLM

    source = save_tiny(tmp_path / "model", architecture)
    layers = dict.fromkeys([*linear_names(source), "lm_head"], schemes[0])
    layers |= dict(zip(layers, schemes[1:], strict=False))
    del layers[ONE]
    folder = write_packed(source, tmp_path / "packed", "compressed-tensors", layers)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, theirs = both_logits(folder, peer)  # it widens the weights when it is first called
    assert_same_weights(folder, {name: peer.get_submodule(name).weight for name in layers})
    # Activations of 8 bits round where they stand at the middle of two codes: one code more or less moves the rest.
    exact = all(scheme.activation_bits == 16 for scheme in schemes)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 if exact else 1.0)


@pytest.mark.parametrize("scheme", [Scheme(4, 32, False), Scheme(3, -1, False), Scheme(8, 64, False)], ids=str)
def test_transformers_reads_asymmetric_compressed_tensors_as_the_caveat_says(tmp_path: Path, scheme: Scheme) -> None:
    """Packed asymmetric layers are loaded in no other way: the library expects zero points of another shape. It then
    has the weights in the scales' fp16."""
    pytest.importorskip("compressed_tensors")
    import torch
    from packed_folders import linear_names, write_packed
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = save_tiny(tmp_path / "model")
    layers = dict.fromkeys(linear_names(source), scheme)
    folder = write_packed(source, tmp_path / "packed", "compressed-tensors", layers)
    how = CompressedTensorsConfig(dequantize=True)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)
    ours, theirs = both_logits(folder, peer)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("architecture", "scheme", "left_out"),
    [
        ("llama", Scheme(4, 64, number=NF4), ()),
        ("qwen2", Scheme(4, 64, number=FP4), (ONE,)),
        ("qwen3", Scheme(8, -1), (ONE, "model.layers.0.self_attn.q_proj")),
    ],
    ids=str,
)
def test_transformers_reads_bitsandbytes(
    tmp_path: Path, architecture: str, scheme: Scheme, left_out: tuple[str, ...]
) -> None:
    pytest.importorskip("bitsandbytes")
    import torch
    from bitsandbytes import functional
    from packed_folders import linear_names, write_packed
    from transformers import AutoModelForCausalLM

    source = save_tiny(tmp_path / "model", architecture)
    layers = {name: scheme for name in linear_names(source) if name not in left_out}
    folder = write_packed(source, tmp_path / "packed", "bitsandbytes", layers)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    weights = {}
    for name, layer in peer.named_modules():
        if type(layer).__name__ == "Linear8bitLt":
            weights[name] = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        elif type(layer).__name__ == "Linear4bit":
            state = layer.weight.quant_state
            assert state.dtype == torch.float16
            state.dtype = torch.float32  # to be compared to the bit
            weights[name] = functional.dequantize_4bit(layer.weight.data, state)
    assert_same_weights(folder, weights)
    # It computes with weights in 16 bits; when not in training, on some processors, in bf16. LLM.int8() rounds
    # activations to 8 bits.
    ours, theirs = both_logits(folder, peer.train())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 if scheme.bits == 4 else 1.0)


@pytest.mark.parametrize(
    "how",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
    ids=str,
)
def test_what_the_library_makes_of_a_model_is_what_llmq_makes_of_it(tmp_path: Path, how: dict[str, object]) -> None:
    """By the method, through the format: tensor by tensor the same bytes as transformers saves, scales of int8 to the
    last bit, as they are divided by 127 and multiplied again."""
    pytest.importorskip("bitsandbytes")
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from llmq.checkpoint.config import read_config
    from llmq.checkpoint.formats import open_format, packed_layers
    from llmq.checkpoint.tensors import Tensors
    from llmq.quant.methods import bnb

    source = save_tiny(tmp_path / "model", dtype="float16")
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**how), device_map="cpu", dtype=torch.float16
    )
    model.save_pretrained(tmp_path / "theirs")
    original, theirs = Tensors(source), Tensors(tmp_path / "theirs")
    form = open_format(read_config(tmp_path / "theirs"))
    assert form is not None
    assert len(packed_layers(form, theirs)) == LINEARS
    for name in packed_layers(form, theirs):
        scheme = form.scheme_of(name)
        assert scheme is not None
        weight = bnb.quantize_weight(original.load(f"{name}.weight").float(), scheme)
        for tensor, value in form.pack(name, weight):
            if tensor.endswith("SCB"):
                torch.testing.assert_close(value, theirs.load(tensor), rtol=2**-23, atol=0)
            else:
                assert torch.equal(value, theirs.load(tensor)), tensor


@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(3, 64), Scheme(3, -1, False)], ids=str)
def test_transformers_reads_gptq_of_few_bits(tmp_path: Path, scheme: Scheme) -> None:
    pytest.importorskip("gptqmodel")
    import torch
    from packed_folders import linear_names, write_packed
    from transformers import AutoModelForCausalLM, GPTQConfig

    source = save_tiny(tmp_path / "model")
    layers = {name: scheme for name in linear_names(source) if name != ONE}
    folder = write_packed(source, tmp_path / "packed", "gptq", layers)
    # Its plain kernel, as the fast ones compute in fewer bits than are to be compared.
    plain = GPTQConfig(bits=scheme.bits, backend="torch")
    peer = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=plain
    )
    modules = {name: module for name, module in peer.named_modules() if hasattr(module, "qweight")}
    assert_same_weights(folder, {name: module.dequantize_weight().t() for name, module in modules.items()})
    ours, theirs = both_logits(folder, peer)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "schemes",
    [[Scheme(4, 32), Scheme(8, -1), Scheme(3, 64)], [Scheme(4, 32), Scheme(8, 128, False)]],
    ids=label,
)
def test_gptqmodel_reads_gptq_of_several_schemes(tmp_path: Path, schemes: list[Scheme]) -> None:
    """The first scheme is that of most layers, the last that of a packed head; one layer is left as it is."""
    pytest.importorskip("gptqmodel")
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from packed_folders import linear_names, write_packed

    source = save_tiny(tmp_path / "model", vocab_size=288)  # a multiple of 32, as the head is packed
    layers = dict.fromkeys(linear_names(source), schemes[0]) | {"lm_head": schemes[-1]}
    layers |= dict(zip(layers, schemes[1:], strict=False))
    del layers[ONE]
    folder = write_packed(source, tmp_path / "packed", "gptq", layers)
    peer = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    modules = {name: module for name, module in peer.model.named_modules() if hasattr(module, "qweight")}
    assert_same_weights(folder, {name: module.dequantize_weight().t() for name, module in modules.items()})


@pytest.mark.parametrize(
    ("architecture", "scheme", "ignore", "packed"),
    [
        ("llama", Scheme(4, 128, True), (), LINEARS),
        ("qwen2", Scheme(4, 32, False), ("down_proj",), LINEARS - 2),
        ("qwen3", Scheme(4, -1, False), ("self_attn",), LINEARS - 8),
        ("mistral", Scheme(4, 64, True), (ONE, "re:.*layers.0.*q_proj"), LINEARS - 2),
    ],
    ids=str,
)
def test_transformers_reads_awq(
    tmp_path: Path, architecture: str, scheme: Scheme, ignore: tuple[str, ...], packed: int
) -> None:
    pytest.importorskip("gptqmodel")
    import torch
    from transformers import AutoModelForCausalLM, AwqConfig

    from llmq.runtime.loader import open_source

    folder = quantized(tmp_path, architecture, scheme, "awq", ignore, "float16")
    # Its plain kernel, which keeps the weights as they are in the folder.
    plain = AwqConfig(backend="torch_awq")
    peer = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map="cpu", quantization_config=plain
    )
    layers = {name: module for name, module in peer.named_modules() if hasattr(module, "qweight")}
    assert len(layers) == packed
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    source = open_source(folder, "cpu", torch.float32)
    assert source.format is not None
    for name, layer in layers.items():
        weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size).t().float()
        expected = source.format.unpack(name, source.tensors).dequantize()
        torch.testing.assert_close(weight, expected, rtol=2**-10, atol=0)
    logits, theirs = both_logits(folder, peer)
    torch.testing.assert_close(logits, theirs, rtol=0, atol=0.1)  # it computes in fp16


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", [(64, 96), (33, 37)], ids=str)
def test_the_library_s_own_helpers_pack_the_same_words(bits: int, shape: tuple[int, int]) -> None:
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    from llmq.checkpoint.formats.packed import pack_words, unpack_words

    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    along_rows, along_columns = pack_words(codes, bits), pack_words(codes.t(), bits).t()
    assert torch.equal(along_columns, pack_to_int32(signed, bits))
    assert torch.equal(along_rows, pack_to_int32(signed, bits, packed_dim=0))
    assert torch.equal(unpack_from_int32(along_columns, bits, torch.Size(shape)), signed)
    assert torch.equal(unpack_words(along_rows, bits, shape[0]), codes)


@pytest.mark.parametrize("shape", [(64, 128), (33, 96)], ids=str)
@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 32, False), Scheme(6, -1), Scheme(8, -1, False)], ids=str)
def test_what_the_library_compresses_is_read_to_the_bit(tmp_path: Path, scheme: Scheme, shape: tuple[int, int]) -> None:
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import save_file

    from llmq.checkpoint.formats.compressed_tensors import CompressedTensors
    from llmq.checkpoint.tensors import Tensors

    channel = scheme.group_size == -1
    weights = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="channel" if channel else "group",
        group_size=None if channel else scheme.group_size,
    )
    generator = torch.Generator().manual_seed(0)
    groups = (shape[0], scheme.num_groups(shape[1]))
    state = {
        "weight": torch.randn(shape, generator=generator),
        "weight_scale": torch.rand(groups, generator=generator) * 0.1 + 0.01,
        "weight_zero_point": torch.zeros(groups, dtype=torch.int8)
        if scheme.symmetric
        else torch.randint(-8, 8, groups, generator=generator, dtype=torch.int8),
    }
    theirs = QuantizationScheme(targets=["Linear"], weights=weights)
    stored = PackedQuantizationCompressor.compress(state, theirs)
    save_file({f"layer.{name}": tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    restored = CompressedTensors.for_schemes({"layer": scheme}).unpack("layer", Tensors(tmp_path))
    assert torch.equal(restored.dequantize(), PackedQuantizationCompressor.decompress(stored, theirs)["weight"])
