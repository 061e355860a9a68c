"""SIGTERM from a process's first moment: what PID 1 of a container must handle itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.runtime import nats_server as server_module
from shared.runtime.signals import unless_stopped

ROOT = Path(__file__).resolve().parents[2]
TOY = str(ROOT / "tests/runtime/toy_service.py")
BASE = "examples/frozen_lake/base"

AT_ONCE_S = 20.0
"""A busy machine's; whoever ignores the signal goes on for the 60 s that every test configures."""

Start = Callable[..., subprocess.Popen[str]]


def ignore_like_pid_1() -> None:
    """The kernel drops what PID 1 does not handle; an ignored signal is dropped the same way."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def one(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT,
            preexec_fn=ignore_like_pid_1, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        started.append(process)
        return process

    yield one
    for process in started:
        process.kill()
        process.communicate()


def hear(process: subprocess.Popen[str], event: str) -> dict:
    """Wait for an event of its log."""
    assert process.stderr is not None
    heard = ""
    while line := process.stderr.readline():
        heard += line
        if line.startswith("{") and (found := json.loads(line))["event"] == event:
            return found
    raise AssertionError(heard)


def stop(process: subprocess.Popen[str]) -> tuple[int, float, str]:
    """Send SIGTERM: exit code, seconds until then, what it said meanwhile."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - began, rest


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


def nobody() -> str:
    return f"bus.url=nats://127.0.0.1:{server_module.free_port()}"


def test_a_service_that_waits_for_the_bus_leaves_cleanly_and_at_once(start: Start):
    toy = start(TOY, "wait", "--set", nobody(), "--set", "bus.connect_timeout_s=60")
    hear(toy, "bus_error")
    code, seconds, rest = stop(toy)
    assert code == 0
    assert seconds < AT_ONCE_S
    assert "failed" not in rest


@pytest.mark.parametrize("role", ["rollout", "env_agents", "logit_oracle"])
def test_a_service_that_waits_for_the_learners_streams_leaves_cleanly(
    start: Start, role: str, nats_server, subjects
):
    service = start(
        "-m", f"services.{role}", "--set", f"bus.url={nats_server.url}",
        "--set", f"run.name={subjects.run}", "--set", f"model.source={BASE}",
        "--set", f"{role}.streams_timeout_s=60", "--set", "telemetry.drain_s=30",
    )  # fmt: skip
    port = hear(service, "http")["port"]
    connected = f"lagwise_{role}_bus_connected 1.0"
    deadline = time.monotonic() + 60
    while connected not in scrape(port):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)  # the model is loaded, as a rule
    code, seconds, rest = stop(service)
    assert code == 0, rest
    assert "did not drain" not in rest
    assert seconds < AT_ONCE_S


def test_the_recorder_that_waits_for_the_bus_leaves_cleanly(start: Start, tmp_path: Path):
    values = tmp_path / "values.yaml"
    values.write_text(
        f"config: {{bus: {{url: '{nobody().removeprefix('bus.url=')}', connect_timeout_s: 60}}}}"
    )
    recorder = start("-m", "shared.cli.recorder", "--config", str(values))
    hear(recorder, "bus_error")
    code, seconds, _ = stop(recorder)
    assert (code, seconds < AT_ONCE_S) == (0, True)


async def test_work_goes_on_until_the_stop_and_its_failure_is_raised():
    told = asyncio.Event()
    assert await unless_stopped(told, asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ZeroDivisionError):
        await unless_stopped(told, _fail())
    cancelled = asyncio.Event()

    async def endless() -> str:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return "never"

    asyncio.get_running_loop().call_later(0.01, told.set)
    assert await unless_stopped(told, endless()) is None
    assert cancelled.is_set()


async def test_work_that_loses_a_cancellation_is_cancelled_again():
    told = asyncio.Event()

    async def loses_one() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    asyncio.get_running_loop().call_soon(told.set)
    async with asyncio.timeout(5):
        assert await unless_stopped(told, loses_one()) is None


async def _fail() -> None:
    raise ZeroDivisionError


def test_after_the_last_word_a_signal_ends_the_process_with_its_code_and_no_other(start: Start):
    process = start(
        "-c",
        "import asyncio, os, signal\n"
        "from shared.runtime.signals import end_at_signals, stop_on_signals\n"
        "async def main():\n"
        "    stop_on_signals(asyncio.Event(), lambda name: os.write(2, name.encode()))\n"
        "    end_at_signals(7)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    await asyncio.sleep(10)\n"
        "asyncio.run(main())\n",
    )
    _, said = process.communicate(timeout=20)
    assert process.returncode == 7
    assert said == ""
