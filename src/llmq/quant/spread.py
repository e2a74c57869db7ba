"""Work on several devices at once, by a thread for each: one that waits for its device holds up no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(work: Callable[[str, Item], Result], items: Sequence[Item], devices: Sequence[str]) -> Iterator[Result]:
    """``work(device, item)`` of each of ``items``, in their order. They are dealt to ``devices`` in turn, each of which
    does its own one after another. Raises what ``work`` raises, and does not begin then what has not begun."""
    if len(devices) == 1:
        yield from (work(devices[0], item) for item in items)
        return
    # torch loads its linear algebra at the first call, which must not be two threads' at once.
    torch.linalg.cholesky_ex(torch.ones(1, 1, device=devices[0]))
    with ExitStack() as stack:
        threads = []
        for device in devices:
            threads.append(ThreadPoolExecutor(1, initializer=_settle, initargs=(device,)))
            stack.callback(threads[-1].shutdown, cancel_futures=True)
        places = [number % len(devices) for number in range(len(items))]
        results = [threads[place].submit(work, devices[place], item) for place, item in zip(places, items, strict=True)]
        for result in results:
            yield result.result()


def _settle(device: str) -> None:
    """What torch keeps for each thread: here, too, there are no gradients, and kernels start on ``device``."""
    torch.set_grad_enabled(False)
    if device != "cpu":
        torch.cuda.set_device(device)
