"""Load a server with many clients at once, and look whether they get every token once, and what is left behind.

    python scripts/load_serve.py
    python scripts/load_serve.py --clients 100 --seconds 20 --model demo-w4

Each client asks for one stream after another; every tenth stream is left in the middle. The others must have the text
that the same request has alone, its finish reason and its end. Exits with 1 when one has not, or when the engine is not
empty afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

PROMPTS = [
    "def ",
    "import ",
    "class Stack:",
    "# sort a list\ndef ",
    "for i in range(",
    "return ",
    "with open(",
    "x = [",
]
LEAVES = 10
"""One stream in so many is left by its client."""
EMPTY = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


@dataclass
class Results:
    """Seconds to the first token and between pieces; what became of the streams."""

    ends: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def body(number: int, max_tokens: int, *, stream: bool) -> bytes:
    prompt = PROMPTS[number % len(PROMPTS)]
    fields = {"prompt": prompt, "max_tokens": max_tokens, "seed": number % len(PROMPTS), "ignore_eos": True}
    return json.dumps({**fields, "stream": stream}).encode()


def ask(url: str, path: str, data: bytes | None = None) -> str:
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return str(reply.read().decode())


async def stream(host: str, port: int, number: int, max_tokens: int, expected: str, results: Results) -> None:
    """One request on a connection of its own; ``results.ends`` gets what became of it."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        content = body(number, max_tokens, stream=True)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        leaving = number % LEAVES == LEAVES - 1
        last, text = time.perf_counter(), ""
        reason: str | None = None
        if not (await reader.readline()).startswith(b"HTTP/1.1 200 "):
            results.ends["refused"] += 1
            return
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                results.ends["whole" if text == expected and reason == "length" else "wrong"] += 1
                return
            now = time.perf_counter()
            (results.between if text else results.first).append(now - last)
            last = now
            choice = json.loads(line[6:])["choices"][0]
            text += choice["text"]
            reason = reason or choice["finish_reason"]
            if leaving and len(text) > len(expected) // 3:
                results.ends["left"] += 1
                return
        results.ends["cut off"] += 1
    finally:
        writer.close()


async def load(arguments: argparse.Namespace, url: str, expected: list[str], server: int) -> tuple[Results, list[Any]]:
    """Run all clients for ``seconds``; returns what they saw, and memory over time."""
    host, port = url.removeprefix("http://").split(":")
    results, memory = Results(), []
    deadline = time.perf_counter() + arguments.seconds
    chance = random.Random(0)

    async def client() -> None:
        while time.perf_counter() < deadline:
            number = chance.randrange(1000)
            await stream(host, int(port), number, arguments.max_tokens, expected[number % len(PROMPTS)], results)

    async def watch() -> None:
        while time.perf_counter() < deadline:
            memory.append([resident(process) for process in (server, *children(server))])
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client() for _ in range(arguments.clients)))
    return results, memory


def children(process: int) -> list[int]:
    ids = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in ids if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def resident(process: int) -> float:
    """MiB of main memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def metrics(url: str) -> dict[str, float]:
    lines = [line for line in ask(url, "/metrics").splitlines() if not line.startswith("#")]
    return {line.partition("{")[0].removeprefix("llmq:"): float(line.rsplit(" ", 1)[1]) for line in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "llmq", "serve", arguments.model, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        started = time.perf_counter()
        url = server.stdout.readline().strip()
        print(f"ready after {time.perf_counter() - started:.1f} s")
        alone = [
            ask(url, "/v1/completions", body(number, arguments.max_tokens, stream=False))
            for number in range(len(PROMPTS))
        ]
        expected = [json.loads(answer)["choices"][0]["text"] for answer in alone]
        before, started = metrics(url)["generation_tokens_total"], time.perf_counter()
        results, memory = asyncio.run(load(arguments, url, expected, server.pid))
        seconds = time.perf_counter() - started
        time.sleep(1)  # the last ones to leave are noticed
        after = metrics(url)
    finally:
        server.terminate()
        code = server.wait()
    tokens = after["generation_tokens_total"] - before
    print(f"{arguments.clients} clients, {seconds:.0f} s: {dict(results.ends)}; {tokens / seconds:.0f} tokens/s")
    for name, times in (("first token", results.first), ("between pieces", results.between)):
        cuts = quantiles(times, n=100)
        print(f"{name}: p50 {cuts[49] * 1000:.0f} ms, p99 {cuts[98] * 1000:.0f} ms")
    settled = memory[len(memory) // 3]
    for name, then, now in zip(("HTTP process", "engine process"), settled, memory[-1], strict=True):
        print(f"{name}: {then:.0f} MiB after a third of the time, {now:.0f} MiB at the end")
    left = {name: after[name] for name in EMPTY}
    print(f"left behind: {left}; exit code {code}")
    return int(any(left.values()) or set(results.ends) - {"whole", "left"} != set() or code != 0)


if __name__ == "__main__":
    sys.exit(main())
