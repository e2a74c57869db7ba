"""What the hub says of a model before it is downloaded: its config.json, and the headers of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError


def fetch_config(hub_id: str, revision: str | None = None) -> Path:
    """The folder of the hub's cache that has the model's config.json. LlmqError when the hub does not hand it out."""
    from huggingface_hub import snapshot_download

    with explained(hub_id, revision):  # a download of the file alone would try for half a minute without a network
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=["config.json"]))
    if not (folder / "config.json").exists():
        raise LlmqError(f"{hub_id} has no config.json", "is it a model of transformers' kind?")
    return folder


def fetch_headers(hub_id: str, revision: str | None = None) -> Mapping[str, TensorInfo] | None:
    """The tensors of its safetensors files, by range requests for their headers alone; None where it has no such
    files. LlmqError when the hub does not hand them out."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    with explained(hub_id, revision):
        try:
            metadata = get_safetensors_metadata(hub_id, revision=revision)
        except NotASafetensorsRepoError:
            return None
    return {
        name: TensorInfo(Path(file), info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
        for file, content in metadata.files_metadata.items()
        for name, info in content.tensors.items()
    }


@contextmanager
def explained(hub_id: str, revision: str | None) -> Iterator[None]:
    """Whatever the hub answers instead of a model, as an LlmqError that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    not_found = f"there is no folder {hub_id}, and "
    try:
        yield
        return
    except GatedRepoError:
        reason, hint = f"{hub_id} is gated on the hub", "accept its licence there, then: hf auth login"
    except RevisionNotFoundError:
        reason, hint = f"{hub_id} has no revision {revision}", "check --revision"
    except (RepositoryNotFoundError, HFValidationError):
        reason, hint = not_found + "no such model on the hub", "check the name; private models: hf auth login"
    except (LocalEntryNotFoundError, OSError):
        reason, hint = not_found + "the hub cannot be reached", "check the path; the built-in model: demo"
    raise LlmqError(reason, hint)
