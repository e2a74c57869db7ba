"""transformers, with compressed-tensors and gptqmodel, reads the folders that llmq writes, to the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import save_tiny

from llmq.scheme import Scheme

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


@pytest.mark.parametrize(
    ("architecture", "scheme", "ignore"),
    [
        ("llama", Scheme(4, 128, True), ()),
        ("qwen2", Scheme(8, -1, True), ("down_proj",)),
        ("qwen3", Scheme(8, 32, True), (ONE, "re:.*layers.0.*q_proj")),
        ("mistral", Scheme(4, 32, False), (ONE,)),
        ("llama", Scheme(8, -1, False), ()),
    ],
    ids=str,
)
def test_transformers_reads_compressed_tensors(
    tmp_path: Path, architecture: str, scheme: Scheme, ignore: tuple[str, ...]
) -> None:
    pytest.importorskip("compressed_tensors")
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    folder = quantized(tmp_path, architecture, scheme, "compressed-tensors", ignore)
    # Packed asymmetric layers are loaded in no other way: the library expects zero points of another shape.
    # It then has the weights in the scales' fp16.
    how = {} if scheme.symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    ours, theirs = both_logits(folder, peer)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 if scheme.symmetric else 0.02)


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

    from llmq.runtime.loader import load_decoder, open_source

    folder = quantized(tmp_path, architecture, scheme, "awq", ignore, "float16")
    # Its plain kernel, which keeps the weights as they are in the folder.
    plain = AwqConfig(backend="torch_awq")
    peer = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map="cpu", quantization_config=plain
    )
    layers = {name: module for name, module in peer.named_modules() if hasattr(module, "qweight")}
    assert len(layers) == packed
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    ours = load_decoder(open_source(folder, "cpu", torch.float32))
    for name, layer in layers.items():
        weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size).t().float()
        expected = ours.get_submodule(name.removeprefix("model.")).weight
        torch.testing.assert_close(weight, expected, rtol=2**-10, atol=0)
    logits, theirs = both_logits(folder, peer)
    torch.testing.assert_close(logits, theirs, rtol=0, atol=0.1)  # it computes in fp16


@pytest.mark.parametrize("bits", [4, 8])
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
@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 32, False), Scheme(8, -1), Scheme(8, -1, False)], ids=str)
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
