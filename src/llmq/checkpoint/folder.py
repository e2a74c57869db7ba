"""Model folders as a whole: find one by path, hub id or the name ``demo``; write one whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from llmq.checkpoint.hub import explained
from llmq.errors import LlmqError
from llmq.memory import format_bytes

DEMO = "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
WRITTEN_ANEW = {
    "config.json", "README.md", "quantize_config.json", "quant_config.json",
    "recipe.yaml", "quantization_report.json", "quantization_report.png",
}  # fmt: skip
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*"]
"""What is fetched from the hub: no pickles, no code."""


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder of ``model``: a path, a hub id (downloaded once, then cached), or ``demo``.

    Raises LlmqError when there is no such folder, or the hub does not hand it out.
    """
    if model == DEMO:
        return demo_folder() / "model"
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise LlmqError(f"{model} is a file, not a model folder", f"point at its folder: {path.parent}")
    if not HUB_ID.fullmatch(model):
        raise LlmqError(f"there is no folder {model}", "check the path, or try the built-in model: demo")
    return _download(model, revision)


def demo_folder() -> Path:
    """Where the package keeps the demo model and the texts that go with it."""
    return Path(str(files("llmq"))) / "demo"


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with explained(hub_id, revision):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_PATTERNS))


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and every other file that holds neither weights nor code.

    The configs and the model card are left out: whoever writes the folder writes its own.
    """
    for path in sorted(source.iterdir()):
        written_anew = path.name in WRITTEN_ANEW or path.name.endswith(".index.json")
        if path.is_file() and not written_anew and path.suffix not in WEIGHT_SUFFIXES | {".py"}:
            shutil.copyfile(path, target / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise LlmqError unless a folder may be written at ``output``."""
    if output.exists() and not overwrite:
        raise LlmqError(f"{output} exists already", "choose another --output, or pass --overwrite")
    parent = _existing_parent(output)
    if not os.access(parent, os.W_OK):
        raise LlmqError(f"{parent} is not writable", "choose another --output")


def check_disk_space(output: Path, needed: int) -> None:
    """Raise LlmqError when the disk under ``output`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(_existing_parent(output)).free
    if free < needed:
        raise LlmqError(
            f"writing {output} takes about {format_bytes(needed)} and the disk has {format_bytes(free)} free",
            "free some space, or choose another --output",
        )


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


@contextmanager
def write_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the name ``output`` once the block ends without an error.

    Until then it stands beside it as ``.NAME.partial-PID``; what a killed run left there is removed by the next.
    """
    output = output.absolute()
    check_output(output, overwrite=overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    check_output(output, overwrite=overwrite)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            _sync(path)
        replaced = output.with_name(f".{output.name}.partial-{os.getpid()}-replaced")
        if output.exists():
            check_output(output, overwrite=overwrite)
            output.rename(replaced)
        partial.rename(output)
        _sync(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(output: Path) -> None:
    for path in output.parent.glob(f".{output.name}.partial-*"):
        owner, _, role = path.name.rpartition("partial-")[2].partition("-")
        if owner.isdigit() and _is_running(int(owner)):
            continue
        if role == "replaced" and not output.exists():
            path.rename(output)  # killed between the two renames: what stood here before comes back
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Have the disk hold what was written, so that a power cut cannot leave a named but empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
