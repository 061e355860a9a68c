"""The life of a service, as processes: exit codes, lines, signals, drain, leases, probes."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from shared.runtime import nats_server as server_module
from shared.runtime.errors import BusUnavailable, ConfigError, Fatal, Fenced
from shared.runtime.leases import STOPPED, LeaseBoard
from shared.runtime.logs import Log
from shared.runtime.nats_bus import NatsBus, connect
from shared.runtime.sections import BusSection
from shared.runtime.service import cause_of, exit_code, line_of
from shared.wire.subjects import Subjects

TOY = Path(__file__).with_name("toy_service.py")
ROOT = TOY.parents[2]

Start = Callable[..., "Toy"]


class Toy:
    """A running toy service."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TOY), *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def finish(self, timeout_s: float = 30) -> tuple[int, list[dict], list[str]]:
        """Exit code, JSON events and plain lines of stderr."""
        _, stderr = self.process.communicate(timeout=timeout_s)
        lines = stderr.splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        return self.process.returncode, events, [x for x in lines if not x.startswith("{")]


@pytest.fixture
def start(nats_server, subjects: Subjects) -> Iterator[Start]:
    """Starts a toy service against the session's server."""
    toys: list[Toy] = []

    def start_one(mode: str, *options: str, url: str = "") -> Toy:
        toy = Toy(
            [
                mode,
                *("--set", f"bus.url={url or nats_server.url}"),
                *("--set", f"run.name={subjects.run}"),
                *("--pod", "toy-1"),
                *options,
            ]
        )
        toys.append(toy)
        return toy

    yield start_one
    for toy in toys:
        if toy.process.poll() is None:
            toy.process.kill()
            toy.process.communicate()


@pytest.fixture
async def bus(nats_server, subjects: Subjects) -> AsyncIterator[NatsBus]:
    client = await connect(BusSection(url=nats_server.url), subjects, "watcher", Log("test"))
    yield client
    await client.close()


@pytest.fixture
async def board(bus: NatsBus) -> AsyncIterator[LeaseBoard]:
    listening = LeaseBoard(bus, 6.0)
    await listening.start()
    yield listening
    await listening.close()


async def eventually(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "condition not reached in time"
        await asyncio.sleep(0.02)


async def alive(board: LeaseBoard) -> int:
    """Wait for a ready lease; return the HTTP port it tells."""
    await eventually(lambda: any(lease.ready for lease in board.live("env_agents")))
    [lease] = board.live("env_agents")
    return int(lease.gauges["http_port"])


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_service_that_returns_exits_clean_with_its_configuration_logged_once(start, subjects):
    code, events, lines = start("return").finish()
    assert (code, lines) == (0, [])
    [logged] = [event for event in events if event["event"] == "config"]
    assert logged["config"]["run"]["name"] == subjects.run
    assert (logged["service"], logged["pod"]) == ("env_agents", "toy-1")


@pytest.mark.parametrize(
    ("mode", "code", "line"),
    [
        ("fenced", 3, "lagwise env_agents: another learner owns run 'x'"),
        ("fatal", 1, "lagwise env_agents: the floor is lava"),
        ("bug", 1, "lagwise env_agents: ZeroDivisionError: oops"),
        (
            "disk",
            1,
            "lagwise env_agents: the disk is full: runs/x/checkpoint; free space and start again",
        ),
    ],
)
def test_a_failure_has_its_code_and_exactly_one_plain_line(start, mode, code, line):
    got, events, lines = start(mode).finish()
    assert (got, lines) == (code, [line])
    [failed] = [event for event in events if event["event"] == "failed"]
    assert failed["code"] == code
    assert ("traceback" in failed) == (mode in ("bug", "disk"))


def test_configuration_mistakes_exit_2_with_one_line_naming_the_offender(start, tmp_path):
    missing = tmp_path / "nowhere.yaml"
    toys = {
        "learnr": start("return", "--set", "learnr.lr=1"),
        "max_turns": start("return", "--set", "task.max_turns=-1"),
        str(missing): start("return", "--config", str(missing)),
        "run.name": start("return", "--set", "run.name=No Good"),
        "--pod": start("return", "--pod", "a.b"),
        "--colour": start("return", "--colour"),
    }
    for offender, toy in toys.items():
        code, _, lines = toy.finish()
        assert code == 2
        assert len(lines) == 1
        assert offender in lines[0]


def test_a_values_file_is_read_and_overridden(start, tmp_path):
    values = tmp_path / "values.yaml"
    values.write_text("config:\n  task: {max_turns: 3}\n  model: {model_id: m1}\n")
    toy = start("return", "--config", str(values), "--set", "task.max_turns=4")
    code, events, _ = toy.finish()
    assert code == 0
    [logged] = [event for event in events if event["event"] == "config"]
    assert logged["config"]["task"]["max_turns"] == 4
    assert logged["config"]["model"]["model_id"] == "m1"


def test_the_version_is_told_without_a_bus():
    toy = Toy(["return", "--version"])
    stdout, _ = toy.process.communicate(timeout=30)
    assert toy.process.returncode == 0
    assert stdout.startswith("lagwise ")


def test_an_unreachable_bus_exits_2_naming_the_url_and_what_to_do(start):
    url = f"nats://127.0.0.1:{server_module.free_port()}"
    code, _, lines = start("return", "--set", "bus.connect_timeout_s=0.5", url=url).finish()
    assert code == 2
    assert len(lines) == 1
    assert url in lines[0]
    assert "bus.url" in lines[0]


def test_a_port_in_use_exits_2_naming_it(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, lines = start("return", "--set", f"telemetry.port={port}").finish()
    assert code == 2
    assert len(lines) == 1
    assert f"telemetry.port {port}" in lines[0]
    assert "in use" in lines[0]


async def test_a_running_service_leases_answers_probes_and_drains_at_the_first_signal(start, board):
    toy = start("wait")
    port = await alive(board)
    [lease] = board.live("env_agents")
    assert (lease.pod, lease.version, lease.pid) == ("toy-1", 3, toy.process.pid)
    assert await asyncio.to_thread(get, port, "/healthz") == (200, "ok\n")
    assert await asyncio.to_thread(get, port, "/readyz") == (200, "ok\n")
    status, text = await asyncio.to_thread(get, port, "/metrics")
    assert status == 200
    assert "lagwise_env_agents_policy_version 3.0" in text
    assert "lagwise_env_agents_bus_connected 1.0" in text
    assert "process_cpu_seconds_total" in text
    assert (await asyncio.to_thread(get, port, "/"))[0] == 404
    toy.process.send_signal(signal.SIGTERM)
    code, events, lines = await asyncio.to_thread(toy.finish)
    assert (code, lines) == (0, [])
    [served] = [event for event in events if event["event"] == "served"]
    assert served["drained"] == 1
    await eventually(lambda: not board.live("env_agents"))
    [last] = board.latest()
    assert (last.ready, last.reason) == (False, STOPPED)


async def test_a_service_deaf_to_the_stop_signal_is_cancelled_after_its_bound(start, board):
    toy = start("deaf", "--set", "telemetry.drain_s=0.5")
    await alive(board)
    started = time.monotonic()
    toy.process.send_signal(signal.SIGINT)
    code, _, lines = await asyncio.to_thread(toy.finish)
    assert time.monotonic() - started < 10
    assert code == 1
    [line] = lines
    assert "did not drain within 0.5 s" in line


async def test_a_second_signal_ends_the_process_at_once(start, board):
    toy = start("deaf")
    await alive(board)
    toy.process.send_signal(signal.SIGINT)
    await asyncio.sleep(0.3)
    assert toy.process.poll() is None
    toy.process.send_signal(signal.SIGINT)
    assert (await asyncio.to_thread(toy.finish, 5))[0] == 128 + signal.SIGINT


async def test_a_thread_that_hangs_does_not_keep_the_process(start, board):
    toy = start("hung-thread")
    await alive(board)
    started = time.monotonic()
    toy.process.send_signal(signal.SIGTERM)
    code, _, _ = await asyncio.to_thread(toy.finish, 20)
    assert code == 0
    assert time.monotonic() - started < 12


async def test_a_blocked_loop_shows_in_healthz_and_heals(start, board):
    toy = start("stall", "--set", "telemetry.stall_s=1", "--set", "telemetry.port=0")
    port = await asyncio.to_thread(_port_from_log, toy)
    seen: list[int] = []
    async with asyncio.timeout(20):
        while seen[-2:] != [503, 200]:
            try:
                status = (await asyncio.to_thread(get, port, "/healthz"))[0]
            except OSError:
                status = 0
            if not seen or seen[-1] != status:
                seen.append(status)
            await asyncio.sleep(0.05)
    toy.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(toy.finish)


def _port_from_log(toy: Toy) -> int:
    assert toy.process.stderr is not None
    for line in toy.process.stderr:
        event = json.loads(line)
        if event["event"] == "http":
            return int(event["port"])
    raise AssertionError("no http event")


async def test_a_service_that_loses_the_bus_is_not_ready_and_comes_back(
    start, mortal_nats_server, subjects
):
    toy = start("wait", url=mortal_nats_server.url)
    port = await asyncio.to_thread(_port_from_log, toy)

    async def until(status: int) -> str:
        async with asyncio.timeout(20):
            while True:
                got, text = await asyncio.to_thread(get, port, "/readyz")
                if got == status:
                    return text
                await asyncio.sleep(0.05)

    await until(200)
    mortal_nats_server.kill()
    assert "bus" in await until(503)
    assert (await asyncio.to_thread(get, port, "/healthz"))[0] == 200
    await asyncio.to_thread(mortal_nats_server.start)
    await until(200)
    toy.process.send_signal(signal.SIGTERM)
    assert (await asyncio.to_thread(toy.finish))[0] == 0


# --- the decisions, as values


def test_what_was_raised_on_purpose_decides_over_what_it_drew_along():
    inner = ExceptionGroup("inner", [ValueError("v"), Fenced("f")])
    assert cause_of(ExceptionGroup("outer", [KeyError("k"), inner])) is inner.exceptions[1]
    assert exit_code(cause_of(ExceptionGroup("g", [Fatal("x")]))) == 1
    only = ValueError("v")
    assert cause_of(ExceptionGroup("g", [only])) is only


def test_every_error_becomes_one_line():
    assert line_of(ConfigError("a\n  b")) == "a b"
    assert "\n" not in line_of(ValueError("one\ntwo"))
    full = OSError(errno.ENOSPC, "No space left on device", "x.bin")
    assert line_of(full).startswith("the disk is full: x.bin")


def test_each_class_of_error_has_its_exit_code():
    codes = [exit_code(e) for e in (ConfigError("x"), Fenced("x"), Fatal("x"), BusUnavailable("x"))]
    assert codes == [2, 3, 1, 1]
