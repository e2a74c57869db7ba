"""The laws of the house, read off the source: who may import whom, what stays free of torch, what is never called."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from llmq.cli import app

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "src" / "llmq"

FLOORS = (
    {"__main__"},
    {"cli"},
    {"batchfile"},
    {"bench"},
    {"evals", "quant", "serve"},
    {"llm", "memplan"},
    {"engine", "runtime"},
    {"checkpoint"},
    {"errors", "memory", "plan", "scheme", "texts"},
)
"""From the top down: a room imports what is on the floors below it. Those on the ground may import each other."""

TORCH_FREE = {"engine", "memplan", "checkpoint", "errors", "memory", "plan", "scheme", "texts"}
USES_TORCH_IN_FUNCTIONS = (
    "checkpoint.tensors",
    "checkpoint.shards",
    "checkpoint.staging",
    "checkpoint.quantized_weight",
    "checkpoint.formats",
)
TORCH = {"torch", "triton", "safetensors.torch"}
HEAVY = {"torch", "triton", "transformers"}

TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "src", "tests", "recipes", "scripts"}

CODE_LOADERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "torch.load", "torch.hub.load", "yaml.load", "os.system"}
FORBIDDEN_FLAGS = {"trust_remote_code", "shell"}


def modules() -> dict[str, Path]:
    """``checkpoint.tensors`` → its file; the package itself is the empty name."""
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in sorted(SOURCE.rglob("*.py"))
    }


MODULES = modules()
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda name: name or "llmq")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def nodes(root: ast.AST, *, functions: bool = True) -> Iterator[ast.AST]:
    """All that runs: what stands under ``if TYPE_CHECKING`` does not. Without ``functions``, what runs at import."""
    for child in ast.iter_child_nodes(root):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            children: list[ast.AST] = [*child.orelse]
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not functions:
            continue
        else:
            children = [child]
        for node in children:
            yield node
            yield from nodes(node, functions=functions)


def imported(module: str, *, functions: bool = True) -> Iterator[str]:
    """Full names of the modules that ``module`` imports: ``torch.nn``, ``llmq.memory``."""
    for node in nodes(tree(module), functions=functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where a name comes from"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name.removeprefix("llmq.") in MODULES else str(node.module)


def room(module: str) -> str:
    return module.split(".", 1)[0]


def floor(room: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
            return number
    pytest.fail(f"src/llmq/{room} has no floor: give it one in this file's FLOORS")


def within(name: str, packages: set[str] | tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@every_module
def test_imports_run_downward_only(module: str) -> None:
    rooms = {
        room(name.removeprefix("llmq.")) for name in imported(module) if name.startswith("llmq.")
    }  # `from llmq import __version__` names no room
    if module == "":
        assert not rooms, "the package finds its names when they are used"
        return
    here = room(module)
    others = rooms - {here}
    if here in FLOORS[-1]:
        assert others <= FLOORS[-1]
    else:
        assert {other for other in others if floor(other) <= floor(here)} == set()


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in TORCH_FREE])
def test_the_host_side_never_imports_torch(module: str) -> None:
    in_functions = not within(module, USES_TORCH_IN_FUNCTIONS)
    assert [name for name in imported(module, functions=in_functions) if within(name, TORCH)] == []


def test_importing_the_host_side_and_the_command_line_loads_no_torch() -> None:
    """What the source does not show: a package in between that imports torch by itself."""
    names = ["llmq", *(f"llmq.{name}" for name in MODULES if room(name) in TORCH_FREE | {"cli"})]
    code = f"import sys\nfor name in {names}: __import__(name)\nprint(*sorted({HEAVY} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert loaded.stdout.split() == []


@every_module
def test_nothing_can_run_code_from_a_model_folder(module: str) -> None:
    assert [name for name in imported(module) if within(name, CODE_LOADERS)] == []
    calls = [node for node in nodes(tree(module)) if isinstance(node, ast.Call)]
    assert [name for call in calls if (name := ast.unparse(call.func)) in FORBIDDEN_CALLS] == []
    flags = [keyword for call in calls for keyword in call.keywords if keyword.arg in FORBIDDEN_FLAGS]
    assert [ast.unparse(flag) for flag in flags if ast.unparse(flag.value) != "False"] == []


def explains_itself(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """A docstring; or a single statement, which says it shorter; or a kernel, which its reference speaks for."""
    if ast.get_docstring(node) or any(
        ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
    ):
        return True
    return (
        not isinstance(node, ast.ClassDef) and len(node.body) == 1 and isinstance(node.body[0], ast.Return | ast.Expr)
    )


@every_module
def test_everything_public_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(tree(module)), "the module"
    defined = (
        node for node in tree(module).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    )
    public = [node for node in defined if not node.name.startswith("_")]
    assert [node.name for node in public if not explains_itself(node)] == []


def test_the_top_level_holds_nothing_else() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    entries = {line.strip('"').split("/", 1)[0] for line in listing.stdout.splitlines()}
    assert {entry for entry in entries if not entry.startswith(".")} <= TOP_LEVEL


def test_the_readme_shows_every_command() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    group: Any = typer.main.get_command(app)
    assert [name for name in group.commands if f"llmq {name}" not in readme] == []
