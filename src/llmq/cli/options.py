"""Options that several commands share, so that they are named, explained and read alike."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or 'demo'.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32, float16 or bfloat16.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
MaxNumSeqs = Annotated[int, typer.Option(help="Sequences that may run at once.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Tokens that one step may compute.")]
BlockSize = Annotated[int, typer.Option(help="Tokens in a block of the KV cache.")]
KVCacheMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="KV cache, e.g. 512MiB. [default: what is free]", show_default=False)
]
KVCacheDtype = Annotated[
    str, typer.Option("--kv-cache-dtype", help="Keys and values: auto (the type computed in), fp8 or int8.")
]
GpuMemoryUtilization = Annotated[float, typer.Option(help="Share of the GPU's whole memory to use.")]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a sequence, prompt and completion. [default: the model's context]", show_default=False
    ),
]
PrefixCaching = Annotated[
    bool,
    typer.Option("--prefix-caching/--no-prefix-caching", help="Share what prompts that begin alike have computed."),
]
SwapSpace = Annotated[
    float, typer.Option(metavar="GIB", help="Main memory, in GiB, that preempted requests are moved to.")
]
Scheduler = Annotated[str, typer.Option(help="mixed, or prefill-first: prompts and next tokens in steps of their own.")]
DelayFactor = Annotated[
    float, typer.Option(help="prefill-first: hold prompts back this many times the last prompt step's time.")
]
MaxPrefillSteps = Annotated[
    int, typer.Option(help="prefill-first: prompt steps in a row while others wait for their next token.")
]
MaxSkips = Annotated[int, typer.Option(help="Requests that may pass one that came first and does not fit yet.")]
Preemption = Annotated[str, typer.Option(help="When blocks run out: auto, recompute or swap.")]
Queue = Annotated[str, typer.Option(help="fcfs: by arrival; priority: by a prompt's priority, then by arrival.")]
LoadFormat = Annotated[
    str, typer.Option(help="auto, or dummy: random weights of config.json's shapes, to measure speed with.")
]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="Run without CUDA graphs.")]
