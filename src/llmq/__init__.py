"""llmq: quantize a language model, then serve it.

    from llmq import LLM, SamplingParams
    LLM("demo").generate(["def "], SamplingParams(max_tokens=32))

Importing the package imports no torch: each name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmq.checkpoint.folder import resolve
    from llmq.engine.request import SamplingParams
    from llmq.errors import LlmqError
    from llmq.llm import LLM, RequestOutput
    from llmq.quant.pipeline import quantize
    from llmq.scheme import Scheme

__version__ = "0.1.0"
__all__ = ["LLM", "LlmqError", "RequestOutput", "SamplingParams", "Scheme", "quantize", "resolve"]

_HOMES = {
    "LLM": "llmq.llm",
    "LlmqError": "llmq.errors",
    "RequestOutput": "llmq.llm",
    "SamplingParams": "llmq.engine.request",
    "Scheme": "llmq.scheme",
    "quantize": "llmq.quant.pipeline",
    "resolve": "llmq.checkpoint.folder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmq' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
