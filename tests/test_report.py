"""What a folder says of how it was made: the report and its picture, beside the weights."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import llmq
from tiny_models import save_tiny

from llmq.quant import plot
from llmq.quant.pipeline import quantize
from llmq.quant.plot import PLOT, by_block
from llmq.quant.report import OF_THE_RUN, REPORT, SCHEMA, LayerReport
from llmq.scheme import Scheme


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def layer(name: str, error: float) -> LayerReport:
    return LayerReport(name, "gptq", "int4 g128 sym", error, 2 * error)


def test_the_folder_has_the_report_but_for_what_another_run_would_have_otherwise(tmp_path: Path, tiny: Path) -> None:
    report = quantize(str(tiny), tmp_path / "out", method="rtn", device="cpu")
    kept = json.loads((tmp_path / "out" / REPORT).read_text())
    assert kept.pop("schema") == SCHEMA
    assert kept.keys().isdisjoint(OF_THE_RUN)
    assert kept | {name: getattr(report, name) for name in OF_THE_RUN} == json.loads(json.dumps(report.to_json()))


def test_the_picture_is_a_png_and_the_same_for_the_same_run(tmp_path: Path, tiny: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = set()
    for name in ("a", "b"):
        quantize(str(tiny), tmp_path / name, method="rtn", device="cpu")
        pictures.add((tmp_path / name / PLOT).read_bytes())
    (picture,) = pictures
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) > 10_000


def test_without_matplotlib_there_is_a_note_and_no_picture(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(plot, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    done = llmq("quantize", tiny, "-o", tmp_path / "out", "--method", "rtn")
    assert done.code == 0, done.err
    assert "pip install 'llmq[plots]'" in done.err
    assert not (tmp_path / "out" / PLOT).exists()
    assert (tmp_path / "out" / REPORT).exists()


def test_a_curve_has_the_mean_of_each_block_s_experts_and_the_head_ahead_of_all() -> None:
    experts = [layer(f"model.layers.{block}.mlp.experts.{expert}.up_proj", block + expert) for block, expert in
               ((10, 0), (10, 2), (2, 0), (2, 1))]  # fmt: skip
    assert by_block(experts) == {2: 2.5, 10: 11.0}
    assert list(by_block(experts)) == [2, 10]
    assert by_block([layer("lm_head", 3.0)]) == {-1: 3.0}


def test_what_is_quantized_again_leaves_no_older_report_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source")
    (source / PLOT).write_bytes(b"of another")
    (source / REPORT).write_bytes(b"of another")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    quantize(str(source), tmp_path / "out", method="rtn", device="cpu")
    assert not (tmp_path / "out" / PLOT).exists()
    assert json.loads((tmp_path / "out" / REPORT).read_text())["schema"] == SCHEMA


def test_a_pattern_s_bars_do_not_break_the_table_of_the_card(tmp_path: Path, tiny: Path) -> None:
    overrides = {"re:.*(q_proj|k_proj)": Scheme(8, 128)}
    quantize(str(tiny), tmp_path / "out", method="rtn", overrides=overrides, device="cpu")
    assert r"| re:.*(q_proj\|k_proj) | int8 g128 sym |" in (tmp_path / "out" / "README.md").read_text()


def test_the_command_of_the_card_is_one_that_a_shell_reads(tmp_path: Path, tiny: Path) -> None:
    source = tmp_path / "a model"
    shutil.copytree(tiny, source)
    quantize(str(source), tmp_path / "its codes", method="rtn", ignore=["re:.*(q|k)_proj"], device="cpu")
    card = (tmp_path / "its codes" / "README.md").read_text()
    command = next(shlex.split(line) for line in card.splitlines() if line.startswith("llmq quantize"))
    assert command[2:5] == ["a model", "-o", "its codes"]
    assert "re:.*(q|k)_proj=none" in command
