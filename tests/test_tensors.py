"""Safetensors: what headers promise is checked before anything is read, and shards come back as they went."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmq.checkpoint.tensors import INDEX, ShardWriter, Tensors
from llmq.errors import LlmqError


def some_tensors(count: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{number}.weight": torch.randn(16, 8, generator=generator) for number in range(count)}


def write(folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int) -> None:
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


@pytest.mark.parametrize(("shard_bytes", "shards"), [(10**6, 1), (1100, 3), (1, 5)])
def test_tensors_come_back_from_as_many_shards_as_they_fill(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors, shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    assert (tmp_path / INDEX).exists() == (shards > 1)
    read = Tensors(tmp_path)
    assert read.num_bytes == 5 * 16 * 8 * 4
    assert all(torch.equal(read.load(name), tensor) for name, tensor in tensors.items())


def test_shards_are_named_and_indexed_as_transformers_expects(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(), 1100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 5 * 16 * 8 * 4


def test_a_name_is_written_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.zeros(1))
    with pytest.raises(ValueError, match="twice"):
        writer.add("a", torch.zeros(1))


@pytest.mark.parametrize("keep", [0, 7, 50, -1])
def test_a_shard_cut_short_is_found_from_its_header(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file(some_tensors(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(LlmqError, match="cut short or damaged"):
        Tensors(tmp_path)


def test_a_header_that_claims_absurd_lengths_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(LlmqError, match="cut short or damaged"):
        Tensors(tmp_path)


@pytest.mark.parametrize(("dtype", "shape"), [("F32", [3, 8]), ("BF16", [2, 8]), ("F32", "no shape")])
def test_a_tensor_whose_bytes_are_not_those_of_its_shape_is_refused(tmp_path: Path, dtype: str, shape: object) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 64]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(64)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(LlmqError, match="cut short or damaged"):
        Tensors(tmp_path)


def test_a_shard_that_the_index_names_and_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(), 1100)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(LlmqError, match="model-00002-of-00003.safetensors is missing"):
        Tensors(tmp_path)


def test_beside_model_safetensors_nothing_else_is_of_the_model(tmp_path: Path) -> None:
    """As in transformers: adapters and the same weights by other names may lie there."""
    save_file(some_tensors(2), tmp_path / "model.safetensors")
    save_file({"lora_A.weight": torch.zeros(4, 4)}, tmp_path / "adapter_model.safetensors")
    assert set(Tensors(tmp_path).infos) == set(some_tensors(2))


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": ["x.safetensors"]}])
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(LlmqError, match="has no weight_map") as caught:
        Tensors(tmp_path)
    assert caught.value.hint


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(LlmqError, match="pickled") as caught:
        Tensors(tmp_path)
    assert "safetensors" in str(caught.value.hint)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(LlmqError, match="has no weights"):
        Tensors(tmp_path)


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(LlmqError, match="no tensor model.norm.weight"):
        Tensors(tmp_path).load("model.norm.weight")
