"""Large reads of safetensors files: every byte where it belongs, whatever lies where, and however it is cut up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmq.checkpoint import staging
from llmq.checkpoint.staging import read_to_device
from llmq.checkpoint.tensors import DTYPES, Tensors
from llmq.errors import LlmqError

KINDS = st.tuples(st.sampled_from(sorted(DTYPES.values())), st.sampled_from([(), (0,), (3,), (7, 5), (2, 3, 4), (64,)]))


def write(folder: Path, files: list[list[tuple[str, tuple[int, ...]]]]) -> dict[str, torch.Tensor]:
    """Files of tensors of these types and shapes; what safetensors reads of them."""
    noise = torch.Generator().manual_seed(0)
    for number, kinds in enumerate(files):
        drawn = [torch.randint(0, 100, shape, generator=noise).to(getattr(torch, dtype)) for dtype, shape in kinds]
        save_file(
            {f"file{number}.{index}": tensor for index, tensor in enumerate(drawn)}, folder / f"{number}.safetensors"
        )
    return {name: tensor for file in folder.iterdir() for name, tensor in load_file(file).items()}


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(st.lists(KINDS, min_size=1, max_size=8), min_size=1, max_size=3),
    piece_bytes=st.integers(1, 200),
    every=st.integers(1, 3),
)
def test_what_is_read_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[tuple[str, tuple[int, ...]]]],
    piece_bytes: int,
    every: int,
) -> None:
    folder = tmp_path_factory.mktemp("folder")
    expected = write(folder, files)
    infos = Tensors(folder).infos
    wanted = sorted(infos)[::every]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "PIECE_BYTES", piece_bytes)
        read = read_to_device({name: infos[name] for name in wanted}, "cpu")
    assert sorted(read) == wanted
    for name, tensor in read.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))


@pytest.mark.gpu
def test_a_gpu_gets_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through buffers that are used again and again."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 1000)
    expected = write(tmp_path, [[(dtype, (50, number)) for number in range(20)] for dtype in sorted(DTYPES.values())])
    tensors = Tensors(tmp_path)
    tensors.fetch("file3", "cuda")
    for name, tensor in expected.items():
        read = tensors.load(name, "cuda")
        assert (read.is_cuda, read.dtype, read.shape) == (True, tensor.dtype, tensor.shape)
        assert torch.equal(read.cpu().reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_neighbours_share_a_read_and_long_tensors_take_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", 100)
    write(tmp_path, [[("float32", (10,)), ("float32", (10,)), ("float32", (60,))]])
    infos = Tensors(tmp_path).infos
    pieces = staging._pieces(infos, read_to_device(infos, "cpu"))
    assert [(piece.num_bytes, len(piece.places)) for piece in pieces] == [(80, 2), (100, 1), (100, 1), (40, 1)]


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    write(tmp_path, [[("float32", (64,))]])
    infos = Tensors(tmp_path).infos
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LlmqError, match=r"0\.safetensors became shorter"):
        read_to_device(infos, "cpu")


def test_what_was_fetched_is_handed_out_once(tmp_path: Path) -> None:
    expected = write(tmp_path, [[("float32", (3,)), ("bfloat16", (3,))], [("float16", (3,))]])
    tensors = Tensors(tmp_path)
    tensors.fetch("file0", "cpu")
    for file in tmp_path.iterdir():
        file.rename(file.with_suffix(".moved"))
    assert all(torch.equal(tensors.load(name), expected[name]) for name in ("file0.0", "file0.1"))
    for name in ("file0.0", "file1.0"):
        with pytest.raises(FileNotFoundError):
            tensors.load(name)
