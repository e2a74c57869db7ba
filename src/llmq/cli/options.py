"""Options that several commands share, so that they are named, explained and read alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from llmq.engine.options import BATCHED_TOKENS, EngineOptions
from llmq.errors import USAGE, LlmqError
from llmq.memory import parse_bytes

PICTURES = (".png", ".svg", ".pdf")


def check_writable(path: Path | None) -> Path | None:
    """``path``. LlmqError when it cannot be written: what takes long ends in a file."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise LlmqError(f"{path} cannot be written: {reason}", "choose another path", exit_code=USAGE)
    return path


def check_plot(path: Path | None) -> Path | None:
    """The same of a picture, which is one of PICTURES. LlmqError without matplotlib, too."""
    if path is None:
        return None
    check_writable(path)
    if path.suffix not in PICTURES:
        raise LlmqError(f"{path} names no kind of picture", f"end it in {', '.join(PICTURES)}", exit_code=USAGE)
    if find_spec("matplotlib") is None:
        raise LlmqError("a plot needs matplotlib", 'install it: pip install "llmq[plots]"')
    return path


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or 'demo'.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, float16 or bfloat16.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
MaxNumSeqs = Annotated[int, typer.Option(help="Sequences that may run at once.")]
GpuMemoryUtilization = Annotated[float, typer.Option(help="Share of the GPU's whole memory to use.")]
MaxModelLen = Annotated[
    int | None,
    typer.Option(help="Tokens of a sequence, prompt and completion.", show_default="the model's context"),
]
LoadFormat = Annotated[
    str, typer.Option(help="auto, or dummy: random weights of config.json's shapes, to measure speed with.")
]

ENGINE_FLAGS: dict[str, Any] = {
    "max_num_seqs": MaxNumSeqs,
    "max_num_batched_tokens": Annotated[
        int | None,
        typer.Option(
            help="Tokens that one step may compute.",
            show_default=f"{BATCHED_TOKENS['cuda']} on a GPU, {BATCHED_TOKENS['cpu']} on a CPU",
        ),
    ],
    "block_size": Annotated[int, typer.Option(help="Tokens in a block of the KV cache.")],
    "kv_cache_memory": Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="KV cache, e.g. 512MiB.", show_default="what is free"),
    ],
    "kv_cache_dtype": Annotated[
        str, typer.Option(help="Of keys and values: auto (the type that is computed in), fp8 or int8.")
    ],
    "gpu_memory_utilization": GpuMemoryUtilization,
    "max_model_len": MaxModelLen,
    "prefix_caching": Annotated[
        bool,
        typer.Option("--prefix-caching/--no-prefix-caching", help="Share what prompts that begin alike have computed."),
    ],
    "swap_space": Annotated[
        float, typer.Option(metavar="GIB", help="Main memory, in GiB, that preempted requests are moved to.")
    ],
    "scheduler": Annotated[
        str, typer.Option(help="mixed, or prefill-first: prompts and next tokens in steps of their own.")
    ],
    "delay_factor": Annotated[
        float, typer.Option(help="prefill-first: hold prompts back this many times the last prompt step's time.")
    ],
    "max_prefill_steps": Annotated[
        int, typer.Option(help="prefill-first: prompt steps in a row while others wait for their next token.")
    ],
    "max_skips": Annotated[int, typer.Option(help="Requests that may pass one that came first and does not fit yet.")],
    "preemption": Annotated[str, typer.Option(help="When blocks run out: auto, recompute or swap.")],
    "queue": Annotated[str, typer.Option(help="fcfs: by arrival; priority: by a prompt's priority, then by arrival.")],
    "load_format": LoadFormat,
    "enforce_eager": Annotated[bool, typer.Option("--enforce-eager", help="Run without CUDA graphs.")],
    "deterministic": Annotated[
        bool, typer.Option("--deterministic", help="The same tokens whatever else runs, on a GPU; slower.")
    ],
}
"""The fields of EngineOptions that are flags, in the order of ``--help``."""


def with_engine_flags(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, which takes EngineOptions as ``engine``, as one that takes each of ENGINE_FLAGS in that place."""
    defaults = {name: _default(name) for name in ENGINE_FLAGS}
    return with_flags(command, "engine", ENGINE_FLAGS, defaults, _engine_options)


def with_flags(
    command: Callable[..., None],
    parameter: str,
    flags: dict[str, Any],
    defaults: dict[str, Any],
    make: Callable[[dict[str, Any]], Any],
) -> Callable[..., None]:
    """``command`` as one that takes ``flags`` where it has ``parameter``, which ``make`` makes of their values."""
    signature = inspect.signature(command, eval_str=True)
    expanded = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name], annotation=flag) for name, flag in flags.items()
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        made = make({name: given.pop(name) for name in flags})
        command(**given, **{parameter: made})

    parameters = [
        one for own in signature.parameters.values() for one in (expanded if own.name == parameter else [own])
    ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _default(name: str) -> Any:
    value = getattr(EngineOptions(), name)
    return value / 2**30 if name == "swap_space" else value


def _engine_options(flags: dict[str, Any]) -> EngineOptions:
    cache = flags["kv_cache_memory"]
    sizes = {
        "kv_cache_memory": None if cache is None else parse_bytes(cache),
        "swap_space": parse_bytes(f"{flags['swap_space']:f}GiB"),
    }
    return EngineOptions(**flags | sizes)
