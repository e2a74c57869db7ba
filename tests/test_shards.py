"""Weights laid out before they are known: safetensors reads what was filled in, whenever that was."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from llmq.checkpoint.shards import Place, Shards, lay_out
from llmq.checkpoint.tensors import INDEX, SINGLE, Tensors

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32,
          "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}  # fmt: skip
TENSORS = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    min_size=1,
    max_size=8,
)


def place(dtype: str, shape: tuple[int, ...]) -> Place:
    return Place(dtype, shape, torch.Size(shape).numel() * DTYPES[dtype].itemsize)


def draw(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.randn(shape) * 10).to(DTYPES[dtype])


@settings(max_examples=40)
@given(kinds=TENSORS, shard_bytes=st.integers(1, 400), order=st.randoms(use_true_random=False))
def test_what_is_filled_in_any_order_is_what_safetensors_reads(
    kinds: list[tuple[str, tuple[int, ...]]], shard_bytes: int, order: object
) -> None:
    torch.manual_seed(0)
    values = {f"tensor.{number}": draw(*kind) for number, kind in enumerate(kinds)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder, {f"tensor.{number}": place(*kind) for number, kind in enumerate(kinds)}, shard_bytes)
        names = list(values)
        order.shuffle(names)  # type: ignore[attr-defined]
        half = len(names) // 2
        for some in (names[:half], names[half:]):  # by two processes, as it were
            with Shards(folder) as shards:
                shards.fill((each, values[each]) for each in some)
                shards.sync()
        files = sorted(folder.glob("*.safetensors"))
        assert (folder / INDEX).exists() == (len(files) > 1) == ((folder / SINGLE) not in files)
        read = {key: value for file in files for key, value in load_file(file).items()}
        assert read.keys() == values.keys()
        for key, value in values.items():
            assert (read[key].dtype, read[key].shape) == (value.dtype, value.shape)
            assert torch.equal(read[key].float(), value.float())


def test_a_folder_is_whole_before_it_is_filled_and_has_its_room_on_the_disk(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a": place("F32", (1000, 100)), "b": place("U8", (3,))})
    assert (tmp_path / SINGLE).stat().st_blocks * 512 >= 400_003
    assert Tensors(tmp_path).num_bytes == 400_003
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert not file.get_tensor("a").any()


@pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(3, dtype=torch.int32)])
def test_a_tensor_that_does_not_fit_its_place_is_refused(tmp_path: Path, wrong: torch.Tensor) -> None:
    lay_out(tmp_path, {"a": place("F32", (3,))})
    with Shards(tmp_path) as shards, pytest.raises(ValueError, match="a is torch"):
        shards.fill([("a", wrong)])
