"""What is known of a model before anything is loaded: from a folder, a config.json, the hub, or ``demo``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llmq.checkpoint import hub
from llmq.checkpoint.config import ModelConfig, read_config
from llmq.checkpoint.folder import DEMO, HUB_ID, resolve
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.memplan.architecture import Architecture
from llmq.memplan.describe import read_architecture
from llmq.memplan.engines import LLMQ
from llmq.memplan.weights import (
    Weights,
    loaded_bytes,
    planned_weights,
    planned_widened_bytes,
    read_headers,
    stored_scheme,
    stored_weights,
)
from llmq.scheme import Scheme

CONFIG = "config.json"


@dataclass(frozen=True, eq=False, slots=True)
class Model:
    """tensors   by the headers of its files; None where there are none
    config    of one that llmq's engine runs; else ``obstacle`` says why it does not
    """

    architecture: Architecture
    tensors: Mapping[str, TensorInfo] | None = None
    config: ModelConfig | None = None
    obstacle: str = ""


def open_model(model: str, revision: str | None = None) -> Model:
    """The model of a folder, of a config.json, of a hub id (of which only config.json and the files' headers are
    fetched), or ``demo``. LlmqError when it cannot be found, reached or understood."""
    path = Path(model).expanduser()
    if path.is_file():
        return _read(path, None)
    if model == DEMO or path.is_dir() or not HUB_ID.fullmatch(model):
        folder = resolve(model, revision)
        return _read(folder / CONFIG, read_headers(folder))
    folder = hub.fetch_config(model, revision)
    try:
        tensors = hub.fetch_headers(model, revision)
    except LlmqError:  # config.json came from the cache: what else is there will have to do
        tensors = read_headers(folder)
    return _read(folder / CONFIG, tensors)


def _read(path: Path, tensors: Mapping[str, TensorInfo] | None) -> Model:
    architecture = read_architecture(path)
    if path.name != CONFIG:
        return Model(architecture, tensors, obstacle=f"{path.name} is not called {CONFIG}")
    try:
        return Model(architecture, tensors, read_config(path.parent))
    except LlmqError as error:
        return Model(architecture, tensors, obstacle=str(error))


@lru_cache(maxsize=256)
def weights_of(model: Model, scheme: Scheme | None, engine: str, num_gpus: int) -> Weights:
    """The weights of ``model`` as they are, or as they would be in ``scheme``, where ``engine`` runs them.

    LlmqError when they are quantized in a way of which neither files nor a formula say how large it is.
    """
    architecture, packed = model.architecture, engine == LLMQ
    if scheme is not None:
        return planned_weights(architecture, scheme, model.config, packed=packed, num_gpus=num_gpus)
    if model.tensors is not None:
        return stored_weights(model.tensors, architecture, model.config, packed=packed, num_gpus=num_gpus)
    own = stored_scheme(architecture.quantization)
    return planned_weights(architecture, own, model.config, packed=packed, num_gpus=num_gpus)


def widened_weight_bytes(model: Model, dtype_bytes: int) -> int:
    """The weights on a CPU, where numbers of ``dtype_bytes`` are computed with: see ``loaded_bytes``."""
    if model.tensors is not None and model.config is not None:
        return loaded_bytes(model.tensors, model.config, dtype_bytes, widened=True)
    return planned_widened_bytes(model.architecture, stored_scheme(model.architecture.quantization), dtype_bytes)
