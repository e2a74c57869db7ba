"""The GPTQ format: packing loses nothing, and puts every bit where other readers look for it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmq import memory
from llmq.checkpoint.formats import gptq
from llmq.checkpoint.quantized_weight import QuantizedWeight
from llmq.checkpoint.tensors import ShardWriter, Tensors
from llmq.errors import LlmqError
from llmq.scheme import Scheme

NAME = "model.layers.0.mlp.up_proj"


def random_quantized(scheme: Scheme, out_features: int, in_features: int, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = (out_features, scheme.num_groups(in_features))
    zeros = torch.full(groups, scheme.middle_code)
    if not scheme.symmetric:
        zeros = torch.randint(0, scheme.max_code + 1, groups, generator=generator)
        zeros[0, 0] = 0
    return QuantizedWeight(
        scheme,
        torch.randint(0, scheme.max_code + 1, (out_features, in_features), generator=generator).to(torch.uint8),
        torch.rand(groups, generator=generator).half() + 0.01,
        zeros.to(torch.uint8),
    )


def write(folder: Path, weight: QuantizedWeight, config: gptq.Gptq) -> Tensors:
    writer = ShardWriter(folder)
    writer.add_all(config.pack(NAME, weight))
    writer.close()
    return Tensors(folder)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(Scheme, st.sampled_from((2, 3, 4, 8)), st.sampled_from((32, 64, -1)), st.booleans()),
    st.sampled_from((32, 96)),
    st.sampled_from((64, 192)),
    st.integers(0, 1000),
)
def test_unpack_gives_back_what_was_packed(
    tmp_path: Path, scheme: Scheme, out_features: int, in_features: int, seed: int
) -> None:
    weight, config = random_quantized(scheme, out_features, in_features, seed), gptq.Gptq.for_schemes({NAME: scheme})
    tensors = write(tmp_path, weight, config)
    restored = config.unpack(NAME, tensors)
    assert torch.equal(restored.codes, weight.codes)
    assert torch.equal(restored.scales, weight.scales)
    assert torch.equal(restored.zero_points, weight.zero_points)
    assert restored.group_index is None
    assert torch.equal(restored.dequantize(), weight.dequantize())
    assert tensors.num_bytes == memory.linear_bytes(out_features, in_features, scheme, dtype_bytes=4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [gptq.V1, gptq.V2])
def test_every_field_is_in_its_place(tmp_path: Path, bits: int, version: str) -> None:
    scheme, per_word = Scheme(bits, 32), 32 // bits
    weight = random_quantized(scheme, 64, 96, 0)
    config = gptq.Gptq(scheme, version)
    tensors = write(tmp_path, weight, config)
    qweight, qzeros = tensors.load(f"{NAME}.qweight"), tensors.load(f"{NAME}.qzeros")
    assert qweight.dtype == qzeros.dtype == torch.int32
    assert qweight.shape == (96 // per_word, 64)
    assert qzeros.shape == (3, 64 // per_word)
    for out, inp in ((0, 0), (63, 95), (17, 40)):
        word = int(qweight[inp // per_word, out]) % 2**32
        assert word >> bits * (inp % per_word) & scheme.max_code == weight.codes[out, inp]
    middle = {gptq.V1: scheme.middle_code - 1, gptq.V2: scheme.middle_code}[version]
    assert {int(word) % 2**32 for word in qzeros.flatten()} == {sum(middle << bits * i for i in range(per_word))}
    assert torch.equal(tensors.load(f"{NAME}.scales"), weight.scales.t())
    assert tensors.load(f"{NAME}.g_idx").tolist() == [channel // 32 for channel in range(96)]


@pytest.mark.parametrize("version", [gptq.V1, gptq.V2])
def test_groups_scattered_by_activation_order_are_read(tmp_path: Path, version: str) -> None:
    scheme = Scheme(4, 32)
    weight = random_quantized(scheme, 32, 64, 1)
    scattered = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32
    weight = QuantizedWeight(scheme, weight.codes, weight.scales, weight.zero_points, scattered)
    config = gptq.Gptq(scheme, version)
    restored = config.unpack(NAME, write(tmp_path, weight, config))
    assert restored.group_index is not None
    assert torch.equal(restored.group_index, scattered)
    assert torch.equal(restored.dequantize(), weight.dequantize())


def test_three_bits_are_where_auto_gptq_has_them(tmp_path: Path) -> None:
    """32 codes in three words: 10 and 21 stand in two, low bits first."""
    scheme = Scheme(3, 32)
    weight = random_quantized(scheme, 32, 32, 0)
    qweight = write(tmp_path, weight, gptq.Gptq(scheme, gptq.V1)).load(f"{NAME}.qweight")
    assert qweight.shape == (3, 32)
    codes, (w0, w1, w2) = weight.codes[5].tolist(), (int(word) % 2**32 for word in qweight[:, 5])
    assert [w0 >> 3 * i & 7 for i in range(10)] == codes[:10]
    assert w0 >> 30 | (w1 & 1) << 2 == codes[10]
    assert [w1 >> 3 * i + 1 & 7 for i in range(10)] == codes[11:21]
    assert w1 >> 31 | (w2 & 3) << 1 == codes[21]
    assert [w2 >> 3 * i + 2 & 7 for i in range(10)] == codes[22:]


@pytest.mark.parametrize("stored", [0xFFFFFFFF, 0x7777777F, 0x67777F77], ids=hex)
def test_zero_points_of_0_in_version_1_are_refused(tmp_path: Path, stored: int) -> None:
    """Stored less one, they wrap in their field, or borrow from the next: programs differ, and nothing says which."""
    scheme = Scheme(4, 32, False)
    weight, config = random_quantized(scheme, 32, 32, 0), gptq.Gptq(scheme, gptq.V1)
    writer = ShardWriter(tmp_path)
    for name, tensor in config.pack(NAME, weight):
        if name.endswith("qzeros"):
            tensor = torch.full_like(tensor, stored - 2**32 if stored >= 2**31 else stored)
        writer.add(name, tensor)
    writer.close()
    with pytest.raises(LlmqError, match="zero points of 0") as caught:
        config.unpack(NAME, Tensors(tmp_path))
    assert caught.value.hint


def test_version_2_holds_zero_points_of_0(tmp_path: Path) -> None:
    scheme = Scheme(4, 32, False)
    weight = random_quantized(scheme, 32, 32, 0)
    zeros = torch.zeros_like(weight.zero_points)
    weight = QuantizedWeight(scheme, weight.codes, weight.scales, zeros)
    config = gptq.Gptq.for_schemes({NAME: scheme})
    assert torch.equal(config.unpack(NAME, write(tmp_path, weight, config)).zero_points, zeros)


def test_symmetric_weights_are_version_1_and_asymmetric_ones_version_2() -> None:
    assert gptq.Gptq.for_schemes({NAME: Scheme(symmetric=True)}).checkpoint_format == gptq.V1
    assert gptq.Gptq.for_schemes({NAME: Scheme(symmetric=False)}).checkpoint_format == gptq.V2


@pytest.mark.parametrize("scheme", [Scheme(4, 128, True), Scheme(8, -1, False)], ids=str)
def test_the_config_is_read_as_it_was_written(scheme: Scheme) -> None:
    config = gptq.Gptq.for_schemes({NAME: scheme})
    fields = replace(config, damp_percent=0.01).config_dict(quantized=[NAME], ignored=[], writer="llmq:0")
    assert gptq.Gptq.read(fields) == config
    assert fields["damp_percent"] == 0.01
    assert fields["desc_act"] is False
    assert "dynamic" not in fields
    assert "modules_in_block_to_quantize" not in fields


def test_scattered_groups_are_announced_where_readers_look() -> None:
    """Without ``desc_act``, fast kernels take the groups to be in their places, whatever the index says."""
    config = gptq.Gptq.for_schemes({NAME: Scheme()})
    for scattered in (True, False):
        written = replace(config, act_order=scattered)
        fields = written.config_dict(quantized=[NAME], ignored=[], writer="llmq:0")
        assert fields["desc_act"] is scattered


def names(*layers: str) -> list[str]:
    return [f"model.layers.{layer}" for layer in layers]


def test_layers_ignored_in_all_blocks_are_named_within_the_block() -> None:
    fields = gptq.Gptq.for_schemes({NAME: Scheme()}).config_dict(
        quantized=names("0.mlp.up_proj", "1.mlp.up_proj"),
        ignored=names("0.mlp.down_proj", "1.mlp.down_proj"),
        writer="llmq:0",
    )
    assert fields["dynamic"] == {r"-:.*\.mlp\.down_proj$": {}}
    assert fields["modules_in_block_to_quantize"] == [["mlp.up_proj"]]


def test_layers_ignored_in_some_blocks_are_named_in_full() -> None:
    fields = gptq.Gptq.for_schemes({NAME: Scheme()}).config_dict(
        quantized=names("0.mlp.up_proj", "1.mlp.up_proj", "1.mlp.down_proj"),
        ignored=names("0.mlp.down_proj"),
        writer="llmq:0",
    )
    assert fields["dynamic"] == {r"-:model\.layers\.0\.mlp\.down_proj$": {}}
    assert fields["modules_in_block_to_quantize"] == [names("0.mlp.up_proj", "1.mlp.down_proj", "1.mlp.up_proj")]


@pytest.mark.parametrize(
    "fields", [{}, {"bits": "four"}, {"bits": 6}, {"bits": 4, "group_size": 48}, {"bits": 4, "checkpoint_format": "x"}]
)
def test_configs_that_llmq_does_not_read_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(LlmqError):
        gptq.Gptq.read(fields)


def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    tensors = write(tmp_path, random_quantized(Scheme(4, 32), 32, 64, 0), gptq.Gptq.for_schemes({NAME: Scheme(4, 32)}))
    with pytest.raises(LlmqError, match=r"qzeros is I32 .* int4 g64 sym makes it"):
        gptq.Gptq.for_schemes({NAME: Scheme(4, 64)}).unpack(NAME, tensors)


def test_more_rules_than_re_keeps_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of experts has a rule for each of tens of thousands of layers, and as many ask."""
    names = [f"model.layers.0.mlp.experts.{number}.down_proj" for number in range(600)]
    config = gptq.Gptq(Scheme(4, 128), gptq.V1, tuple((f"{name}$", Scheme(8, 128)) for name in names))
    compiled, compile_ = [], re._compiler.compile  # type: ignore[attr-defined]

    def counted(pattern: str, flags: int) -> object:
        compiled.append(pattern)
        return compile_(pattern, flags)

    monkeypatch.setattr("re._compiler.compile", counted)
    for _ in range(3):
        assert config.scheme_of(names[-1]) == Scheme(8, 128)
        assert config.scheme_of(NAME) == Scheme(4, 128)
    assert len(compiled) == len(names)
