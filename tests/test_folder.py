"""Model folders: found or explained, and written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmq.checkpoint.folder import check_disk_space, check_keeps, copy_side_files, resolve, write_folder
from llmq.errors import LlmqError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_gets_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "model"
    with write_folder(output) as partial:
        (partial / "config.json").write_text("{}")
        assert not output.exists()
    assert names(output) == {"config.json"}
    assert names(tmp_path) == {"model"}


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), write_folder(tmp_path / "model") as partial:
        (partial / "config.json").write_text("{}")
        raise RuntimeError
    assert names(tmp_path) == set()


def test_a_folder_that_exists_is_kept_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(LlmqError, match="exists already"), write_folder(output):
        pass
    with pytest.raises(RuntimeError), write_folder(output, overwrite=True):
        raise RuntimeError
    assert names(output) == {"old"}
    with write_folder(output, overwrite=True) as partial:
        (partial / "new").touch()
    assert names(output) == {"new"}
    assert names(tmp_path) == {"model"}


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib\n"
        "from llmq.checkpoint.folder import write_folder\n"
        "with write_folder(pathlib.Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').touch()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    output = tmp_path / "model"
    assert subprocess.run([sys.executable, "-c", script, str(output)]).returncode == -9
    assert not output.exists()
    assert names(tmp_path) == {".model.partial", ".model.lock"}
    with write_folder(output) as partial:
        assert names(partial) == set()
        (partial / "whole").touch()
    assert names(tmp_path) == {"model"}


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    replaced = tmp_path / ".model.replaced"
    replaced.mkdir()
    (replaced / "old").touch()
    with pytest.raises(LlmqError, match="exists already"), write_folder(tmp_path / "model"):
        pass
    assert names(tmp_path / "model") == {"old"}


def test_a_kill_after_the_two_renames_is_cleared_away(tmp_path: Path) -> None:
    for name in ("model", ".model.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    with write_folder(tmp_path / "model", overwrite=True) as partial:
        (partial / "new").touch()
    assert names(tmp_path) == {"model"}
    assert names(tmp_path / "model") == {"new"}


def test_a_link_stands_for_the_folder_that_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "disk" / "model")
    for number in range(3):  # the first makes the folder
        with write_folder(link, overwrite=number > 0) as partial:
            assert partial.parent == tmp_path / "disk"
            (partial / str(number)).touch()
        assert link.is_symlink()
        assert names(link) == {str(number)}
    assert names(tmp_path) == {"disk", "model"}
    assert names(tmp_path / "disk") == {"model"}


@pytest.mark.parametrize("output", [".", "..", "/", ""])
def test_the_folder_that_it_runs_in_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(LlmqError, match="runs in"), write_folder(Path(output), overwrite=True):
        pass
    assert names(tmp_path) == {"here"}


def test_a_model_is_not_overwritten_with_the_folder_that_it_lies_in(tmp_path: Path) -> None:
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models")
    for output in (tmp_path, tmp_path / "models", tmp_path / "link"):
        with pytest.raises(LlmqError, match="tiny lies in it"):
            check_keeps(model, output)
    for output in (model, model / "quantized", tmp_path / "others"):
        check_keeps(model, output)


def test_a_file_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LlmqError, match="file is a file"), write_folder(tmp_path / "file" / "model"):
        pass


def test_side_files_are_copied_but_neither_weights_nor_code(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = {"tokenizer.json", "generation_config.json", "chat_template.jinja", "merges.txt", "LICENSE"}
    left = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "modeling.py", "config.json"}
    for name in kept | left:
        (source / name).touch()
    copy_side_files(source, target)
    assert names(target) == kept


def test_side_files_that_a_stopped_run_has_copied_are_copied_again(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    templates = source / "additional_chat_templates"
    templates.mkdir(parents=True)
    target.mkdir()
    (templates / "tools.jinja").write_text("{{ tools }}")
    for _ in range(2):
        copy_side_files(source, target)
    assert names(target / "additional_chat_templates") == {"tools.jinja"}


def test_demo_is_a_folder_that_ships_with_the_package() -> None:
    assert (resolve("demo") / "config.json").exists()


def test_a_path_that_does_not_exist_says_so(tmp_path: Path) -> None:
    with pytest.raises(LlmqError, match="there is no folder") as caught:
        resolve(str(tmp_path / "nowhere"))
    assert caught.value.hint is not None


def test_a_file_is_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(LlmqError, match="is a file"):
        resolve(str(tmp_path / "config.json"))


def test_a_hub_id_that_cannot_be_reached_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LlmqError, match="there is no folder no-such-org/no-such-model, and the hub"):
        resolve("no-such-org/no-such-model")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written_is_refused_before_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LlmqError, match="not writable"), write_folder(tmp_path / "model"):
        pass


def test_a_disk_too_full_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(LlmqError, match=r"takes about 1048576.00 GiB and the disk has .* free"):
        check_disk_space(tmp_path / "model", 2**50)
