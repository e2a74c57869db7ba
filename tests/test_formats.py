"""The formats hold what they are given: every bit comes back, in the places where other readers look for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from known_models import LLAMA_2_7B, config_of

from llmq import memory
from llmq.checkpoint.formats import (
    FORMATS,
    Format,
    format_for,
    is_packed,
    kept_layers,
    open_format,
    packed_bytes,
    packed_layers,
)
from llmq.checkpoint.formats.awq import OCTET, Awq
from llmq.checkpoint.formats.bitsandbytes import BitsAndBytes
from llmq.checkpoint.formats.compressed_tensors import CompressedTensors
from llmq.checkpoint.formats.gptq import Gptq
from llmq.checkpoint.formats.packed import num_words, pack_words, unpack_words
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import ShardWriter, Tensors
from llmq.errors import USAGE, LlmqError
from llmq.scheme import ACTIVATION_BITS, BITS, E4M3, FP4, INT, NF4, WHOLE, WHOLE_TENSOR, Scheme

NAME = "model.layers.0.mlp.up_proj"
FIXTURES = Path(__file__).parent / "fixtures"
NF = Scheme(4, 64, number=NF4)
SCATTERED = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32


HOLDS = {
    "gptq": [
        *(
            Scheme(bits, size, symmetric)
            for bits in (2, 3, 4, 8)
            for size in (32, 64, -1)
            for symmetric in (True, False)
        )
    ],
    "awq": [Scheme(4, size, symmetric) for size in (32, 64, -1) for symmetric in (True, False)],
    "compressed-tensors": [
        *(Scheme(bits, size, sym) for bits in BITS[INT] for size in (32, 64, -1, 0) for sym in (True, False)),
        *(Scheme(8, size, number=INT, activation_bits=8) for size in (-1, 0)),
        *(Scheme(8, size, number=E4M3, activation_bits=bits) for size in (-1, 0) for bits in ACTIVATION_BITS),
    ],
    "bitsandbytes": [Scheme(4, 64, number=NF4), Scheme(4, 64, number=FP4), Scheme(8, -1)],
}
"""What each format is said to hold."""
ALL = [(name, scheme) for name, schemes in HOLDS.items() for scheme in schemes]


def random_quantized(scheme: Scheme, out_features: int, in_features: int, seed: int = 0) -> QuantizedWeight:
    """Any codes, but of e4m3 those that are numbers; scales and zero points alike in all rows where there is one."""
    generator = torch.Generator().manual_seed(seed)
    groups = (1 if scheme.group_size == WHOLE_TENSOR else out_features, scheme.num_groups(in_features))
    zeros = torch.full(groups, scheme.middle_code)
    if not scheme.symmetric:
        zeros = torch.randint(0, scheme.max_code + 1, groups, generator=generator)
    codes = torch.randint(0, scheme.max_code + 1, (out_features, in_features), generator=generator)
    if scheme.number == E4M3:
        codes[codes & 127 == 127] = 0
    return QuantizedWeight(
        scheme,
        codes.to(torch.uint8),
        (torch.rand(groups, generator=generator).half() + 0.01).expand(out_features, -1).contiguous(),
        zeros.to(torch.uint8).expand(out_features, -1).contiguous(),
    )


def write(folder: Path, weight: QuantizedWeight, form: Format) -> Tensors:
    writer = ShardWriter(folder)
    writer.add_all(form.pack(NAME, weight))
    writer.close()
    return Tensors(folder)


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)
    assert torch.equal(a.zero_points, b.zero_points)
    assert (a.group_index is None) == (b.group_index is None)
    assert torch.equal(a.dequantize(), b.dequantize())


@given(
    st.sampled_from(BITS[INT]),
    st.integers(1, 131),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_unpacked_words_are_the_values_that_were_packed(bits: int, rows: int, columns: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack_words(values, bits)
    assert words.shape == (num_words(rows, bits), columns)
    assert torch.equal(unpack_words(words, bits, rows), values)
    # One stream of bits: the number that the words are, lowest first, is that of the values.
    stream = sum(int(word) % 2**32 << 32 * i for i, word in enumerate(words[:, 0]))
    assert stream == sum(int(value) << bits * i for i, value in enumerate(values[:, 0]))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(ALL), st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_unpack_gives_back_what_was_packed(
    tmp_path: Path, held: tuple[str, Scheme], outs: int, groups: int, seed: int
) -> None:
    name, scheme = held
    form = format_for(name, {NAME: scheme})
    shape = outs * form.multiple, groups * (form.multiple if scheme.group_size in WHOLE else scheme.group_size)
    weight = random_quantized(scheme, *shape, seed)
    tensors = write(tmp_path, weight, form)
    assert is_packed(form, NAME, tensors)
    assert packed_layers(form, tensors) == {NAME}
    assert_same(form.unpack(NAME, tensors), weight)
    assert tensors.num_bytes == packed_bytes(form, shape, scheme)
    assert {name: info.shape for name, info in tensors.infos.items()} == {
        f"{NAME}.{suffix}": stored.shape for suffix, stored in form.layout(shape, scheme).items()
    }


def test_every_format_holds_what_it_is_said_to_and_nothing_else() -> None:
    schemes = {scheme for _, scheme in ALL}
    for name, kind in FORMATS.items():
        assert {scheme for scheme in schemes if kind.why_not(scheme) is None} == set(HOLDS[name])
    assert kinds_of(Scheme(4, 32), Scheme(8, -1)) == {"gptq", "compressed-tensors"}
    assert kinds_of(Scheme(4, 32), Scheme(8, -1, activation_bits=8)) == {"compressed-tensors"}
    assert kinds_of(Scheme(4, 64, number=NF4), Scheme(8, -1)) == set()


def kinds_of(*schemes: Scheme) -> set[str]:
    return {name for name, kind in FORMATS.items() if kind.why_not(*schemes) is None}


@pytest.mark.parametrize(("scheme", "name"), {scheme: name for name, scheme in reversed(ALL)}.items(), ids=str)
def test_the_planner_counts_the_bytes_that_are_written(scheme: Scheme, name: str) -> None:
    """To the byte in the first format that holds the scheme, but for the JSON beside nf4 and fp4."""
    shape = (96, 256)
    written = packed_bytes(format_for(name, {NAME: scheme}), shape, scheme)
    assert 0 <= written - memory.linear_bytes(*shape, scheme, 2) <= (100 if name == "bitsandbytes" else 0)


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


@pytest.mark.parametrize(("suffix", "name"), [("g_idx", "gptq"), ("weight_g_idx", "compressed-tensors")])
@pytest.mark.parametrize(
    "index", [torch.full((64,), 2), torch.full((64,), -1), torch.zeros(5).int()], ids=["too large", "negative", "few"]
)
def test_an_index_of_groups_that_are_not_there_is_refused(
    tmp_path: Path, name: str, suffix: str, index: torch.Tensor
) -> None:
    """On a GPU it would be read from somewhere else in memory."""
    scheme = Scheme(4, 32)
    form = format_for(name, {NAME: scheme})
    tensors = dict(form.pack(NAME, random_quantized(scheme, 32, 64))) | {f"{NAME}.{suffix}": index.int()}
    writer = ShardWriter(tmp_path)
    writer.add_all(tensors.items())
    writer.close()
    with pytest.raises(LlmqError, match=suffix) as caught:
        form.unpack(NAME, Tensors(tmp_path))
    assert caught.value.hint


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


@pytest.mark.parametrize(("name", "scheme"), ALL, ids=str)
def test_a_config_is_read_as_it_was_written(tmp_path: Path, name: str, scheme: Scheme) -> None:
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


def test_the_scales_of_a_kv_cache_are_announced_as_llm_compressor_does() -> None:
    form = replace(CompressedTensors.for_schemes({NAME: Scheme(4, 32)}), kv_scales=True)
    fields = form.config_dict(quantized=[NAME], ignored=[], writer="llmq:0")
    written = json.loads((FIXTURES / "llmcompressor" / "fp8-kv" / "config.json").read_text())
    assert fields["kv_cache_scheme"].items() <= written["quantization_config"]["kv_cache_scheme"].items()
    assert CompressedTensors.read(fields).kv_scales
    assert not CompressedTensors.read(fields | {"kv_cache_scheme": None}).kv_scales


def test_autoawq_s_own_names_are_read() -> None:
    form = Awq.read({"w_bit": 4, "q_group_size": 64, "version": "GEMM", "modules_to_not_convert": ["self_attn"]})
    assert form == Awq(Scheme(4, 64, False), ("self_attn",))
    assert form.scheme_of("model.layers.0.self_attn.q_proj") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "exl2"}, "'exl2', which is not supported"),
        ({"quant_method": ["awq"]}, "['awq']"),
        ({"quant_method": "bitsandbytes"}, "4 bits: False, 8 bits: False"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": 5}, "no list of names"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "type: 'int4'"),
        ({"quant_method": "gptq", "bits": 4, "format": "gptq_v2", "checkpoint_format": "gptq"}, "states two formats"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "packed in int16"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": 3}}, "quantization_config"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": {"bits": 5}}}, "and these have 5"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 8}, "of 8 bits"),
        ({"quant_method": "awq"}, "states None bits"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "without zero points"),
        ({"quant_method": "awq", "bits": 4, "modules_to_not_convert": "lm_head"}, "no list of names"),
        ({"quant_method": "gptq", "bits": 5}, "codes of 2, 3, 4 or 8 bits, and these have 5"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}}, "not a regular expression"),
        ({"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": 3}, "quantization_config"),
        (ct({"weights": weights()}, format="int-quantized"), "int4 g32 sym in the format 'int-quantized'"),
        (ct({"weights": weights()}, format="naive-quantized"), "int4 g32 sym in the format 'naive-quantized'"),
        (ct({"weights": weights(num_bits=8, type="float")}), "e4m3 by row or tensor, and not e4m3 g32"),
        (ct({"weights": weights(), "format": "nvfp4-pack-quantized"}), "'nvfp4-pack-quantized'"),
        (ct({"weights": weights(num_bits=8), "input_activations": {"num_bits": 8}}), "a dynamic scale for each token"),
        (ct({"weights": weights(num_bits=8), "output_activations": {"num_bits": 8}}), "quantized outputs"),
        (ct({"weights": weights(num_bits=7)}), "codes of 7 bits"),
        (ct({"weights": weights(type="float")}), "4 bits of 'float'"),
        (ct({"weights": weights(strategy="block")}), "for each 'block'"),
        (ct({"weights": weights(group_size=16)}), "a group size of 16"),
        (ct({"weights": None}), "no usable config_groups"),
        (ct({"weights": weights(), "targets": "Linear"}), "targets is 'Linear', and no list"),
        (ct({"weights": weights()}, ignore="lm_head"), "ignore is 'lm_head', and no list"),
        (ct({"weights": weights(), "targets": ["re:("]}), "not a regular expression"),
        (ct(), "names no layers"),
        (ct({"weights": weights()}, transform_config={"config_groups": {"v": {}}}), "rotated or sparse"),
        (ct({"weights": weights()}, sparsity_config={"format": "sparse-24-bitmask"}), "rotated or sparse"),
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


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path: Path, name: str) -> None:
    tensors = write(tmp_path, random_quantized(Scheme(4, 32), 32, 64), format_for(name, {NAME: Scheme(4, 32)}))
    with pytest.raises(LlmqError, match=r"int4 g64 a?sym makes it"):
        format_for(name, {NAME: Scheme(4, 64)}).unpack(NAME, tensors)


def test_a_folder_of_another_number_than_its_config_says_is_refused(tmp_path: Path) -> None:
    tensors = write(tmp_path, random_quantized(NF, 32, 64), BitsAndBytes(NF))
    with pytest.raises(LlmqError, match="no tensor .*quant_state.bitsandbytes__fp4"):
        BitsAndBytes(replace(NF, number=FP4)).unpack(NAME, tensors)
    with pytest.raises(LlmqError, match="no matrix .*weight_packed"):
        CompressedTensors.for_schemes({NAME: Scheme(8, -1)}).unpack(NAME, tensors)


# Several schemes in one folder


def test_what_other_runtimes_merge_is_named_as_its_parts_are() -> None:
    """vLLM and SGLang ask about ``qkv_proj``, of which no folder has a tensor, and about a layer's class before that
    of its parts."""
    attention = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"]
    others = [
        *(f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        "model.layers.1.mlp.down_proj",
    ]
    schemes = dict.fromkeys(attention, Scheme(8, 128)) | dict.fromkeys(others, Scheme(4, 128))
    ignored = [f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj")]

    def config(name: str, schemes: dict[str, Scheme]) -> dict[str, Any]:
        return format_for(name, schemes).config_dict(quantized=list(schemes), ignored=ignored, writer="llmq:0")

    merged = Gptq.read(config("gptq", schemes))
    assert merged.scheme_of("model.layers.0.self_attn.qkv_proj") == Scheme(8, 128)
    assert merged.scheme_of("model.layers.1.mlp.gate_up_proj") is None
    awq = config("awq", dict.fromkeys(schemes, Scheme(4, 128, False)))
    assert "model.layers.1.mlp.gate_up_proj" in awq["modules_to_not_convert"]
    groups = config("compressed-tensors", schemes)["config_groups"].values()
    assert sorted(target for group in groups for target in group["targets"]) == sorted(schemes)
    alone = config("compressed-tensors", dict.fromkeys(schemes, Scheme(4, 128)))["config_groups"]
    assert [group["targets"] for group in alone.values()] == [["Linear"]]


def test_gptq_rules_are_matched_as_gptqmodel_does() -> None:
    """In the order in which they stand; what a rule does not say is as in the rest of the folder."""
    form = Gptq.read(
        {
            "bits": 4,
            "group_size": 32,
            "dynamic": {
                r"-:.*\.o_proj": {},
                r"+:.*\.down_proj": {"bits": 8},
                r".*layers\.1\..*": {"group_size": -1, "sym": False},
            },
        }
    )
    assert form.scheme is None
    assert form.scheme_of("model.layers.1.self_attn.o_proj") is None
    assert form.scheme_of("model.layers.1.mlp.down_proj") == Scheme(8, 32)
    assert form.scheme_of("model.layers.1.mlp.up_proj") == Scheme(4, -1, False)
    assert form.scheme_of("model.layers.0.mlp.up_proj") == Scheme(4, 32)
    assert form.scheme_of("lm_head") is None


@pytest.mark.parametrize(
    ("name", "schemes"),
    [
        ("gptq", [Scheme(4, 32), Scheme(8, -1), Scheme(3, 64)]),
        ("gptq", [Scheme(4, 32), Scheme(4, 32, False)]),
        ("compressed-tensors", [Scheme(4, 32), Scheme(3, 64, False), Scheme(8, -1)]),
        (
            "compressed-tensors",
            [
                Scheme(4, 128),
                Scheme(8, -1, activation_bits=8),
                Scheme(8, -1, number=E4M3, activation_bits=8),
                Scheme(8, 0, number=E4M3),
            ],
        ),
    ],
    ids=str,
)
def test_several_schemes_are_told_by_full_names(tmp_path: Path, name: str, schemes: list[Scheme]) -> None:
    """The first is that of most layers; of each other there is one layer, and one like-named layer that is ignored."""
    layers = {f"model.layers.{layer}.mlp.up_proj": schemes[0] for layer in range(10, 13)}
    layers |= {f"model.layers.{layer}.mlp.down_proj": scheme for layer, scheme in enumerate(schemes)}
    layers["lm_head"] = schemes[-1]
    ignored = "model.layers.100.mlp.down_proj"
    fields = format_for(name, layers).config_dict(quantized=list(layers), ignored=[ignored], writer="llmq:0")
    read = open_format(config_of(tmp_path, LLAMA_2_7B | {"quantization_config": json.loads(json.dumps(fields))}))
    assert read is not None
    assert read.scheme is None
    assert {layer: read.scheme_of(layer) for layer in layers} == layers
    assert read.scheme_of(ignored) is None


@pytest.mark.parametrize("name", ["awq", "bitsandbytes"])
def test_formats_without_names_for_several_schemes_refuse_them(name: str) -> None:
    one, other = {"awq": (Scheme(4, 32), Scheme(4, 64)), "bitsandbytes": (NF, replace(NF, number=FP4))}[name]
    with pytest.raises(LlmqError, match="holds one scheme a folder") as caught:
        format_for(name, {NAME: one, "other": other})
    assert caught.value.exit_code == USAGE


def test_whatever_stays_a_matrix_is_named_routers_too(tmp_path: Path) -> None:
    shapes = {
        "model.embed_tokens.weight": (32, 64),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.mlp.gate.weight": (8, 64),
        "model.layers.0.mlp.experts.0.up_proj.weight": (64, 64),
        "model.layers.0.self_attn.q_proj.qweight": (8, 64),
    }
    writer = ShardWriter(tmp_path)
    for tensor, shape in shapes.items():
        writer.add(tensor, torch.zeros(shape))
    writer.close()
    kept = kept_layers(Tensors(tmp_path), ["model.layers.0.mlp.experts.0.up_proj"])
    assert kept == ["model.layers.0.mlp.gate"]


@pytest.mark.parametrize("name", ["awq", "bitsandbytes"])
def test_a_packed_head_is_refused_where_readers_do_not_look_for_it(name: str) -> None:
    with pytest.raises(LlmqError, match="expect lm_head as it is"):
        format_for(name, dict.fromkeys((NAME, "lm_head"), HOLDS[name][0]))


# Hazards


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_the_layout_of_older_compressed_tensors_is_refused_by_its_shape(tmp_path: Path, bits: int) -> None:
    """Up to version 0.17, codes of these widths did not go from word to word; read as they do now, they are noise."""
    scheme = Scheme(bits, 32)
    form = CompressedTensors.for_schemes({NAME: scheme})
    writer = ShardWriter(tmp_path)
    for name, tensor in form.pack(NAME, random_quantized(scheme, 32, 64)):
        old = torch.zeros(32, -(-64 // (32 // bits)), dtype=torch.int32)
        writer.add(name, old if name.endswith("weight_packed") else tensor)
    writer.close()
    with pytest.raises(LlmqError, match="up to version 0.17") as caught:
        form.unpack(NAME, Tensors(tmp_path))
    assert caught.value.hint


def test_scales_of_bitsandbytes_are_refused_where_they_would_change() -> None:
    weight = random_quantized(Scheme(8, -1), 32, 64)
    scales = torch.full_like(weight.scales, 3e38, dtype=torch.float32)  # 127 of them are beyond fp32
    form = BitsAndBytes(weight.scheme)
    with pytest.raises(LlmqError, match="the 127th part"):
        list(form.pack(NAME, replace(weight, scales=scales)))
