"""Model folders as a whole: find one by path, hub id or the name ``demo``; write one whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
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
HUB_DUPLICATES = ["consolidated*", "original/*"]
"""What is not: the same weights by the names of those who trained them."""


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
        fetched = snapshot_download(
            hub_id, revision=revision, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_DUPLICATES
        )
        return Path(fetched)


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
        # A run that was stopped may have copied them.
        shutil.copytree(templates, target / templates.name, dirs_exist_ok=True)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise LlmqError unless a folder may be written at ``output``."""
    if Path.cwd().is_relative_to(output.resolve()):
        raise LlmqError(f"{output} is the folder that this runs in, or one above it", "choose another --output")
    if output.exists() and not overwrite:
        raise LlmqError(f"{output} exists already", "choose another --output, or pass --overwrite")
    parent = existing_parent(output)
    if not parent.is_dir():
        raise LlmqError(f"{parent} is a file, and no folder to write in", "choose another --output")
    if not os.access(parent, os.W_OK):
        raise LlmqError(f"{parent} is not writable", "choose another --output")


def check_keeps(model: Path, output: Path) -> None:
    """Raise LlmqError where the folder ``output`` has that of the model in it, and would be overwritten with it."""
    if output.resolve() in model.resolve().parents:
        raise LlmqError(f"{output} is overwritten, and {model} lies in it", "choose another --output")


def check_disk_space(output: Path, needed: int) -> None:
    """Raise LlmqError when the disk under ``output`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(existing_parent(output)).free
    if free < needed:
        raise LlmqError(
            f"writing {output} takes about {format_bytes(needed)} and the disk has {format_bytes(free)} free",
            "free some space, or choose another --output",
        )


def existing_parent(path: Path) -> Path:
    """What is there nearest above ``path``: a folder, if one can be made at ``path``."""
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def partial_of(output: Path) -> Path:
    """The folder beside ``output`` that it is until it is complete."""
    return _beside(output, "partial")


def journal_of(output: Path) -> Path:
    """The file beside ``output`` that says what of it is done. Where there is one, a run that was stopped can go on."""
    return _beside(output, "journal")


def _beside(output: Path, what: str) -> Path:
    """A link stands for where it leads to: that may be another disk."""
    output = output.resolve()
    return output.with_name(f".{output.name}.{what}")


@contextmanager
def write_folder(output: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the name ``output`` once the block ends without an error.

    Until then it is ``partial_of(output)``. What a run leaves there that fails or is killed is removed; but with a
    journal beside it, it is kept, and handed out again with ``resume``. Raises LlmqError when ``output`` exists, or
    could go on, or is being written by another process.
    """
    check_output(output, overwrite=overwrite)
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial, journal, replaced = partial_of(output), journal_of(output), _beside(output, "replaced")
    with _locked(output):
        if replaced.exists() and not output.exists():
            replaced.rename(output)  # killed between the two renames below: what stood here before comes back
        _remove(replaced)
        check_output(output, overwrite=overwrite)
        stopped = partial.exists() and journal.exists()
        if stopped and not (resume or overwrite):
            raise LlmqError(
                f"a run that was to write {output} was stopped, and can go on",
                "go on with it by --resume, or start over by --overwrite",
            )
        if stopped and resume:
            _remove(*partial.glob(".*"))  # what was being written: everything there has a plain name once it is whole
        else:
            _remove(journal, partial)
        try:
            partial.mkdir(exist_ok=True)
            yield partial
            for path in partial.rglob("*"):
                _sync(path)
            if output.exists():
                check_output(output, overwrite=overwrite)
                output.rename(replaced)
            partial.rename(output)
            _sync(output.parent)
            _remove(journal, replaced)
        finally:
            if not journal.exists():
                _remove(partial)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Nobody else writes ``output`` meanwhile. The lock goes with the process, however it ends."""
    path = _beside(output, "lock")
    while True:
        file = path.open("a+")
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read()
            file.close()
            raise LlmqError(
                f"{output} is being written by another process, {owner}", "wait for it, or choose another --output"
            ) from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()  # whoever had it before has just removed it
    with file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink()


def _remove(*paths: Path) -> None:
    """Remove files and folders, as far as they are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the disk hold what was written, so that a power cut cannot leave a named but empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
