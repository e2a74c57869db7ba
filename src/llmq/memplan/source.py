"""What is known of a model before anything is loaded: from a folder, a config.json, the hub, or ``demo``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llmq.checkpoint import hub
from llmq.checkpoint.config import ModelConfig
from llmq.checkpoint.folder import DEMO, HUB_ID, resolve
from llmq.checkpoint.tensors import TensorInfo
from llmq.errors import LlmqError
from llmq.memplan.architecture import Architecture
from llmq.memplan.describe import read_architecture
from llmq.memplan.engines import LLMQ
from llmq.memplan.weights import Weights, planned_weights, read_headers, runnable_config, stored_scheme, stored_weights
from llmq.scheme import Scheme

CONFIG = "config.json"


@dataclass(frozen=True, eq=False, slots=True)
class Model:
    """``tensors``: by the headers of its files, None where there are none; ``config``: of one that the engine runs."""

    architecture: Architecture
    tensors: Mapping[str, TensorInfo] | None = None
    config: ModelConfig | None = None


def open_model(model: str, revision: str | None = None) -> Model:
    """The model of a folder, of a config.json, of a hub id (of which only config.json and the files' headers are
    fetched), or ``demo``. LlmqError when it cannot be found, reached or understood."""
    path = Path(model).expanduser()
    if path.is_file():
        return Model(read_architecture(path), config=runnable_config(path.parent) if path.name == CONFIG else None)
    if model == DEMO or path.is_dir() or not HUB_ID.fullmatch(model):
        folder = resolve(model, revision)
        return Model(read_architecture(folder / CONFIG), read_headers(folder), runnable_config(folder))
    folder = hub.fetch_config(model, revision)
    try:
        tensors = hub.fetch_headers(model, revision)
    except LlmqError:  # config.json came from the cache: what else is there will have to do
        tensors = read_headers(folder)
    return Model(read_architecture(folder / CONFIG), tensors, runnable_config(folder))


@lru_cache(maxsize=256)
def weights_of(model: Model, scheme: Scheme | None, engine: str, num_gpus: int) -> Weights:
    """The weights of ``model`` as they are, or as they would be in ``scheme``, where ``engine`` runs them.

    LlmqError when they are quantized in a way of which neither files nor a formula say how large it is.
    """
    architecture, packed = model.architecture, engine == LLMQ
    if scheme is not None:
        return planned_weights(architecture, scheme, packed=packed, num_gpus=num_gpus)
    if model.tensors is not None:
        return stored_weights(model.tensors, architecture, model.config, packed=packed, num_gpus=num_gpus)
    own = stored_scheme(architecture.quantization)
    if architecture.quantization is not None and own is None:
        raise LlmqError(
            "the model has no weights here, and llmq cannot compute their size: it does not run the format "
            f"{architecture.quantization.get('quant_method')!r}, or not every layer has the same scheme",
            "point at the folder with its *.safetensors files, or plan a scheme of llmq's: --scheme w4a16",
        )
    return planned_weights(architecture, own, packed=packed, num_gpus=num_gpus)
