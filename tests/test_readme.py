"""The README's commands work as pasted, one after another, in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_commands_of_the_readme_work_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # one command runs at a time
    script = "".join(block for block in blocks("bash") if "scripts/" not in block)
    assert script.count("llmq ") > 10
    run = subprocess.run(["bash", "-euxo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_the_python_of_the_readme_works_as_pasted(tmp_path: Path) -> None:
    (script,) = blocks("python")
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
