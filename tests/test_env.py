"""llmq env: what is here, what is missing and for what, and never a failure."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import llmq

from llmq import __version__
from llmq.bench import environment
from llmq.bench.environment import FEATURES, Feature

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_versions_are_of_llmq_and_of_everything_it_builds_on() -> None:
    versions = json.loads(llmq("env", "--json").out)["versions"]
    assert versions["llmq"] == __version__
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert all(versions[package] for package in environment.REQUIRED)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.package)
def test_the_extra_that_is_recommended_brings_the_package(feature: Feature) -> None:
    if feature.extra is not None:
        assert any(
            requirement.startswith(feature.package) for requirement in PYPROJECT["optional-dependencies"][feature.extra]
        )


def test_every_extra_is_there_to_be_missing() -> None:
    assert {feature.extra for feature in FEATURES} - {None} == set(PYPROJECT["optional-dependencies"])


def test_what_is_missing_is_named_with_its_purpose_and_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "FEATURES", (Feature("no-such-package", "dreams", "night"),))
    assert json.loads(llmq("env", "--json").out)["missing"] == [
        {"package": "no-such-package", "purpose": "dreams", "install": "pip install 'llmq[night]'"}
    ]
    assert "pip install 'llmq[night]'" in llmq("env").out


def test_nothing_fails_on_a_machine_that_has_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(environment, "MEMINFO", tmp_path / "missing")
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(environment, "detect_gpus", list)
    monkeypatch.setattr(environment, "version", raise_not_found)
    facts = json.loads(llmq("env", "--json").out)
    assert (facts["memory_total_bytes"], facts["driver"], facts["torch_cuda"], facts["devices"]) == (
        None,
        None,
        None,
        [],
    )
    assert len(facts["missing"]) == len(FEATURES)
    assert llmq("env").code == 0


def raise_not_found(package: str) -> str:
    raise environment.PackageNotFoundError(package)


def test_memory_is_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  2048 kB\nMemFree:  1 kB\nMemAvailable:  1024 kB\n")
    monkeypatch.setattr(environment, "MEMINFO", tmp_path / "meminfo")
    assert environment.main_memory() == (2 * 2**20, 2**20)


def test_no_path_and_no_host_name_is_shown() -> None:
    import platform

    for result in (llmq("env"), llmq("env", "--json")):
        for private in (str(Path.home()), str(Path.cwd()), platform.node()):
            assert private not in result.out
