"""The formats hold what they are given: every bit comes back, in the places where other readers look for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from known_models import LLAMA_2_7B, config_of

from llmq.checkpoint.formats import FORMATS, Format, format_for, open_format, packed_bytes
from llmq.checkpoint.formats.awq import OCTET, Awq
from llmq.checkpoint.formats.compressed_tensors import CompressedTensors
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import ShardWriter, Tensors
from llmq.errors import USAGE, LlmqError
from llmq.scheme import Scheme

NAME = "model.layers.0.mlp.up_proj"
SCATTERED = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32


def random_quantized(scheme: Scheme, out_features: int, in_features: int, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = (out_features, scheme.num_groups(in_features))
    zeros = torch.full(groups, scheme.middle_code)
    if not scheme.symmetric:
        zeros = torch.randint(0, scheme.max_code + 1, groups, generator=generator)
    return QuantizedWeight(
        scheme,
        torch.randint(0, scheme.max_code + 1, (out_features, in_features), generator=generator).to(torch.uint8),
        torch.rand(groups, generator=generator).half() + 0.01,
        zeros.to(torch.uint8),
    )


def write(folder: Path, weight: QuantizedWeight, form: Format) -> Tensors:
    writer = ShardWriter(folder)
    writer.add_all(form.pack(NAME, weight))
    writer.close()
    return Tensors(folder)


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)
    assert a.scales.dtype == b.scales.dtype
    assert torch.equal(a.zero_points, b.zero_points)
    assert (a.group_index is None) == (b.group_index is None)
    assert torch.equal(a.dequantize(), b.dequantize())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(FORMATS)),
    st.builds(Scheme, st.sampled_from((4, 8)), st.sampled_from((32, 64, -1)), st.booleans()),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_unpack_gives_back_what_was_packed(
    tmp_path: Path, name: str, scheme: Scheme, outs: int, groups: int, seed: int
) -> None:
    if FORMATS[name].why_not(scheme):
        scheme = Scheme(4, scheme.group_size, scheme.symmetric)
    form = format_for(name, {NAME: scheme})
    shape = outs * form.multiple, groups * (form.multiple if scheme.group_size == -1 else scheme.group_size)
    weight = random_quantized(scheme, *shape, seed)
    tensors = write(tmp_path, weight, form)
    assert_same(form.unpack(NAME, tensors), weight)
    assert tensors.num_bytes == packed_bytes(form, shape, scheme)
    assert {name: info.shape for name, info in tensors.infos.items()} == {
        f"{NAME}.{suffix}": stored.shape for suffix, stored in form.layout(shape, scheme).items()
    }


def test_awq_has_every_field_in_its_place(tmp_path: Path) -> None:
    scheme = Scheme(4, 32, False)
    weight = random_quantized(scheme, 64, 96)
    tensors = write(tmp_path, weight, Awq(scheme))
    qweight, qzeros = tensors.load(f"{NAME}.qweight"), tensors.load(f"{NAME}.qzeros")
    assert qweight.dtype == qzeros.dtype == torch.int32
    assert (qweight.shape, qzeros.shape) == ((96, 8), (3, 8))
    assert OCTET == (0, 2, 4, 6, 1, 3, 5, 7)
    for inp, word, nibble in ((0, 0, 0), (95, 7, 7), (40, 3, 4), (41, 5, 1)):
        out = 8 * word + OCTET[nibble]
        assert int(qweight[inp, word]) % 2**32 >> 4 * nibble & 15 == weight.codes[out, inp]
        assert int(qzeros[inp // 32, word]) % 2**32 >> 4 * nibble & 15 == weight.zero_points[out, inp // 32]
    assert torch.equal(tensors.load(f"{NAME}.scales"), weight.scales.t())


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_has_every_field_in_its_place(tmp_path: Path, bits: int) -> None:
    scheme, per_word = Scheme(bits, 32, False), 32 // bits
    weight = random_quantized(scheme, 63, 96)
    tensors = write(tmp_path, weight, CompressedTensors.for_schemes({NAME: scheme}))
    packed, zeros = tensors.load(f"{NAME}.weight_packed"), tensors.load(f"{NAME}.weight_zero_point")
    assert packed.dtype == zeros.dtype == torch.int32
    assert (packed.shape, zeros.shape) == ((63, 96 // per_word), (-(-63 // per_word), 3))
    for out, inp in ((0, 0), (62, 95), (17, 40)):
        word, zero = int(packed[out, inp // per_word]) % 2**32, int(zeros[out // per_word, inp // 32]) % 2**32
        assert word >> bits * (inp % per_word) & scheme.max_code == weight.codes[out, inp]
        assert zero >> bits * (out % per_word) & scheme.max_code == weight.zero_points[out, inp // 32]
    assert torch.equal(tensors.load(f"{NAME}.weight_scale"), weight.scales)
    assert tensors.load(f"{NAME}.weight_shape").tolist() == [63, 96]


def test_compressed_tensors_keeps_scales_of_any_type_and_reads_scattered_groups(tmp_path: Path) -> None:
    scheme = Scheme(4, 32)
    weight, form = random_quantized(scheme, 32, 64), CompressedTensors.for_schemes({NAME: scheme})
    wide = QuantizedWeight(scheme, weight.codes, weight.scales.bfloat16(), weight.zero_points)
    writer = ShardWriter(tmp_path)
    writer.add_all(form.pack(NAME, wide))
    writer.add(f"{NAME}.weight_g_idx", SCATTERED.int())
    writer.close()
    restored = form.unpack(NAME, Tensors(tmp_path))
    assert restored.scales.dtype == torch.bfloat16
    assert restored.group_index is not None
    assert torch.equal(restored.group_index, SCATTERED)


@pytest.mark.parametrize("name", ["awq", "compressed-tensors"])
def test_scattered_groups_are_not_written_where_they_cannot_be_said(name: str) -> None:
    scheme = Scheme(4, 32)
    weight = random_quantized(scheme, 32, 64)
    weight = QuantizedWeight(scheme, weight.codes, weight.scales, weight.zero_points, SCATTERED)
    with pytest.raises(LlmqError, match="scattered by activation order") as caught:
        list(format_for(name, {NAME: scheme}).pack(NAME, weight))
    assert caught.value.hint


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_scales_that_fp16_does_not_have_are_refused(name: str) -> None:
    weight = random_quantized(Scheme(4, 32), 32, 64)
    for scale, fine in ((0.5, True), (1e-6, False), (1e5, False)):
        scales = torch.full_like(weight.scales, scale, dtype=torch.bfloat16)
        same = QuantizedWeight(weight.scheme, weight.codes, scales, weight.zero_points)
        if fine:
            assert list(format_for(name, {NAME: weight.scheme}).pack(NAME, same))
            continue
        with pytest.raises(LlmqError, match="have no equal in fp16"):
            list(format_for(name, {NAME: weight.scheme}).pack(NAME, same))


def test_zero_points_that_are_not_in_the_middle_are_not_dropped() -> None:
    weight = random_quantized(Scheme(4, 32, False), 32, 64)
    lying = QuantizedWeight(Scheme(4, 32), weight.codes, weight.scales, weight.zero_points)
    with pytest.raises(LlmqError, match="said to be symmetric"):
        list(CompressedTensors.for_schemes({NAME: lying.scheme}).pack(NAME, lying))


# Configs


@pytest.mark.parametrize("scheme", [Scheme(4, 128), Scheme(8, -1, False), Scheme(8, 32), Scheme(4, 64, False)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_config_is_read_as_it_was_written(tmp_path: Path, name: str, scheme: Scheme) -> None:
    if FORMATS[name].why_not(scheme):
        pytest.skip("the format cannot hold it")
    fields = format_for(name, {NAME: scheme}).config_dict(
        quantized=[NAME], ignored=["model.layers.1.mlp.up_proj"], writer="llmq:0"
    )
    read = open_format(config_of(tmp_path, LLAMA_2_7B | {"quantization_config": json.loads(json.dumps(fields))}))
    assert read is not None
    assert read.name == name == fields["quant_method"]
    expected = Scheme(4, scheme.group_size, False) if name == "awq" else scheme
    assert read.scheme == read.scheme_of(NAME) == expected
    assert read.scheme_of("model.layers.1.mlp.up_proj") is None


def weights(**fields: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | fields


def ct(*groups: dict[str, Any], **fields: Any) -> dict[str, Any]:
    named = {f"group_{number}": {"targets": ["Linear"]} | group for number, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": named} | fields


def test_compressed_tensors_targets_are_matched_as_the_library_does() -> None:
    """A name before a regular expression before a class; and the ignore list before all."""
    form = CompressedTensors.read(
        ct(
            {"weights": weights(strategy="channel", group_size=None)},
            {"targets": ["re:.*down_proj"], "weights": weights(num_bits=8)},
            {"targets": ["model.layers.1.mlp.down_proj"], "weights": weights(group_size=64, symmetric=False)},
            ignore=["lm_head", "re:.*layers[.]0[.].*q_proj$"],
        )
    )
    assert form.scheme is None
    assert form.scheme_of("model.layers.0.mlp.up_proj") == Scheme(4, -1)
    assert form.scheme_of("model.layers.0.mlp.down_proj") == Scheme(8, 32)
    assert form.scheme_of("model.layers.1.mlp.down_proj") == Scheme(4, 64, False)
    assert form.scheme_of("model.layers.0.self_attn.q_proj") is None
    assert form.scheme_of("model.layers.1.self_attn.q_proj") == Scheme(4, -1)
    assert form.caveat is not None


def test_autoawq_s_own_names_are_read() -> None:
    form = Awq.read({"w_bit": 4, "q_group_size": 64, "version": "GEMM", "modules_to_not_convert": ["self_attn"]})
    assert form == Awq(Scheme(4, 64, False), ("self_attn",))
    assert form.scheme_of("model.layers.0.self_attn.q_proj") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes', which is not supported"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "of 8 bits"),
        ({"quant_method": "awq"}, "states None bits"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "without zero points"),
        ({"quant_method": "gptq", "bits": 5}, "codes of 2, 3, 4 or 8 bits, and these have 5"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}}, "not a regular expression"),
        ({"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": 3}, "quantization_config"),
        (ct({"weights": weights()}, format="int-quantized"), "'int-quantized'"),
        (ct({"weights": weights()}, format="float-quantized"), "'float-quantized'"),
        (ct({"weights": weights(), "format": "nvfp4-pack-quantized"}), "'nvfp4-pack-quantized'"),
        (ct({"weights": weights(num_bits=8), "input_activations": {"num_bits": 8}}), "a dynamic scale for each token"),
        (ct({"weights": weights(num_bits=8), "output_activations": {"num_bits": 8}}), "quantized outputs"),
        (ct({"weights": weights(num_bits=7)}), "codes of 7 bits"),
        (ct({"weights": weights(type="float")}), "4 bits of 'float'"),
        (ct({"weights": weights(strategy="block")}), "for each 'block'"),
        (ct({"weights": weights(group_size=16)}), "a group size of 16"),
        (ct({"weights": None}), "no usable config_groups"),
        (ct({"weights": weights(), "targets": ["re:("]}), "not a regular expression"),
        (ct(), "names no layers"),
        (ct({"weights": weights()}, kv_cache_scheme={"num_bits": 8}), "a KV cache quantized otherwise"),
    ],
    ids=str,
)
def test_configs_that_llmq_does_not_read_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmqError) as caught:
        open_format(config_of(tmp_path, LLAMA_2_7B | {"quantization_config": fields}))
    assert message in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 1


def test_a_format_that_cannot_hold_a_scheme_names_those_that_can() -> None:
    with pytest.raises(LlmqError, match="AWQ format holds codes of 4 bits, and these have 8") as caught:
        format_for("awq", {NAME: Scheme(8)})
    assert caught.value.exit_code == USAGE
    assert "--format gptq or compressed-tensors" in str(caught.value.hint)


@pytest.mark.parametrize("name", FORMATS)
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, name: str) -> None:
    tensors = write(tmp_path, random_quantized(Scheme(4, 32), 32, 64), format_for(name, {NAME: Scheme(4, 32)}))
    with pytest.raises(LlmqError, match=r"int4 g64 a?sym makes it"):
        format_for(name, {NAME: Scheme(4, 64)}).unpack(NAME, tensors)
