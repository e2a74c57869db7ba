"""Third-party quantizers: what becomes of a worker that dies, hangs or talks nonsense, and of half an environment."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from command_line import llmq

from llmq.errors import LlmqError, either
from llmq.quant.backends import BACKENDS, Backend, environment, find_backend
from llmq.quant.backends.driver import run_worker
from llmq.quant.schemes import Choice
from llmq.scheme import Scheme

BACKEND = BACKENDS["gptqmodel"]
HEAD = """
import json, os, subprocess, sys, time
request = json.loads(os.fdopen(int(sys.argv[1])).readline())
events = os.fdopen(int(sys.argv[2]), "w", buffering=1)
"""


def run(tmp_path: Path, body: str, *, silence: float = 60.0, **request: object) -> list[str]:
    """The stages that a worker of our own, which does ``body``, goes through."""
    worker, stages = tmp_path / "worker.py", []
    worker.write_text(HEAD + body)
    run_worker(BACKEND, Path(sys.executable), request, tmp_path / "log", stages.append, worker=worker, silence=silence)
    return stages


def tell(stage: str) -> str:
    return f'print(json.dumps({{"stage": "{stage}"}}), file=events)\n'


DONE = 'print(json.dumps({"done": True}), file=events)\n'


# The worker


def test_a_worker_gets_the_request_and_tells_its_stages_whatever_it_prints(tmp_path: Path) -> None:
    body = 'print("noise"); print("{}", file=sys.stderr)\n' + tell("loading") + 'assert request["bits"] == 4\n' + DONE
    assert run(tmp_path, body, bits=4) == ["loading"]


def test_a_worker_sees_no_package_of_the_environment_that_starts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run(tmp_path, "assert 'PYTHONPATH' not in os.environ\n" + DONE)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit('out of luck')", "exit code 1: out of luck"),
        ("os.kill(os.getpid(), 9)", "signal 9"),
        ("sys.exit(0)", "exit code 0: it printed nothing"),
        ("events.write('progress: 10 %\\n'); time.sleep(60)", "'progress: 10 %' where an event was expected"),
        ("events.write('[1]\\n'); time.sleep(60)", "where an event was expected"),
        ("open('/dev/full', 'w').write('x' * 10000)", "No space left on device"),
    ],
)
def test_a_worker_that_fails_ends_in_an_error_with_its_last_lines(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(LlmqError) as caught:
        run(tmp_path, body)
    assert said in caught.value.message
    assert caught.value.hint
    assert ("space" in caught.value.hint) == ("space" in said)


def test_a_worker_that_hangs_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    body = f"""
child = subprocess.Popen([sys.executable, "-c", {child!r}])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
{tell("quantizing")}
time.sleep(600)
"""
    with pytest.raises(LlmqError, match="has said nothing for 1 s"):
        run(tmp_path, body, silence=1.0)
    assert_dead(int((tmp_path / "pid").read_text()))


def test_printing_is_a_sign_of_life(tmp_path: Path) -> None:
    body = "for _ in range(8): print('.', flush=True); time.sleep(0.3)\n"
    assert run(tmp_path, body + DONE, silence=1.5) == []


def test_ctrl_c_ends_the_worker(tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{tell('loading')}time.sleep(600)\n"

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    worker = tmp_path / "worker.py"
    worker.write_text(HEAD + body)
    with pytest.raises(KeyboardInterrupt):
        run_worker(BACKEND, Path(sys.executable), {}, tmp_path / "log", interrupt, worker=worker)
    assert_dead(int((tmp_path / "pid").read_text()))


def assert_dead(process: int) -> None:
    """That ``process`` is gone, or about to be: a killed one takes a moment to go."""
    status, patience = Path(f"/proc/{process}/status"), time.monotonic() + 10
    while status.exists() and "\nState:\tZ" not in status.read_text():
        assert time.monotonic() < patience
        os.sched_yield()


# The environment


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path))
    return tmp_path


def test_an_environment_counts_once_it_is_whole_and_of_these_pins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "pins", lambda backend: "# nothing\n")
    backend = Backend("none", "pip", "json", ("gptq",), (4,), ("gptq",), ("cpu",))
    folder = cache / "backends" / "none"
    folder.mkdir(parents=True)
    (folder / "half").touch()
    assert not environment.is_installed(backend)
    lines: list[str] = []
    environment.install(backend, lines.append)
    assert environment.is_installed(backend)
    assert environment.installed_version(backend)
    assert not (folder / "half").exists()
    monkeypatch.setattr(environment, "pins", lambda backend: "# something else\n")
    assert not environment.is_installed(backend)
    assert environment.remove(backend)
    assert not environment.remove(backend)


def test_what_pip_cannot_install_is_not_installed_and_the_error_has_its_reason(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "pins", lambda backend: "/no/such/package\n")
    backend = Backend("none", "none", "json", ("gptq",), (4,), ("gptq",), ("cpu",))
    with pytest.raises(LlmqError, match="no/such/package"):
        environment.install(backend, lambda line: None)
    assert not environment.is_installed(backend)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=list(BACKENDS))
def test_the_pins_name_the_backend_and_torch(backend: Backend) -> None:
    pinned = [line.partition("==")[0].replace("_", "-") for line in environment.pins(backend).splitlines()]
    assert {backend.package, "torch"} <= set(pinned)


# The command line


def test_a_backend_that_is_not_installed_names_the_command(cache: Path) -> None:
    with pytest.raises(LlmqError) as caught:
        environment.python_of(BACKEND)
    assert caught.value.hint == "llmq backends install gptqmodel"


def test_the_list_says_what_there_is(cache: Path) -> None:
    done = llmq("backends", "list")
    assert done.code == 0
    assert all(f"{name} " in done.out for name in BACKENDS)


@pytest.mark.parametrize("name", ["exllama", "native"])
def test_a_backend_without_an_environment_is_a_usage_error_whose_hint_names_those_that_have_one(name: str) -> None:
    done = llmq("backends", "remove", name)
    assert done.code == 2
    assert f"hint: there are those of {either(BACKENDS)}\n" in done.err


def test_an_unknown_backend_is_a_usage_error(tmp_path: Path) -> None:
    done = llmq("quantize", "demo", "-o", tmp_path / "out", "--backend", "exllama")
    assert done.code == 2
    assert "hint: choose --backend native, auto-gptq" in done.err


@pytest.mark.parametrize(
    ("name", "method", "scheme", "format", "hint"),
    [
        ("auto-gptq", "awq", Scheme(), "gptq", "--method gptq"),
        ("autoawq", "awq", Scheme(8), "awq", "--bits 4"),
        ("autoawq", "awq", Scheme(4, 128), "awq", "--asym"),
        ("autoawq", "awq", Scheme(4, -1, False), "awq", "--group-size"),
        ("gptqmodel", "gptq", Scheme(), "awq", "--format gptq"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_with_what_it_can(
    name: str, method: str, scheme: Scheme, format: str, hint: str
) -> None:
    with pytest.raises(LlmqError) as caught:
        find_backend(name).check(Choice(scheme, method, format), "cpu")
    assert hint in str(caught.value.hint)


def test_bitsandbytes_is_a_backend_that_shares_llmq_s_environment(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    done = llmq("quantize", "demo", "-o", tmp_path / "out", "--backend", "bitsandbytes", "--device", "cpu")
    assert done.code == 0, done.err
    assert "nf4 g64 by bnb" in done.out


def test_a_backend_has_no_rules_for_single_layers(cache: Path, tmp_path: Path) -> None:
    done = llmq("quantize", "demo", "-o", tmp_path / "out", "--backend", "gptqmodel", "--ignore", "o_proj")
    assert (done.code, "backends treat all layers alike" in done.err) == (2, True)
