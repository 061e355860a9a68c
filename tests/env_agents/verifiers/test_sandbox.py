"""Code that nobody trusts: what it may not do, tried by code that does it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.env_agents.verifiers import sandbox as module
from services.env_agents.verifiers.sandbox import (
    Ran,
    Sandbox,
    SandboxLimits,
    SandboxUnavailable,
    unavailable,
)

LIMITS = SandboxLimits(wall_s=20.0, cpu_s=5.0, memory_mb=256, processes=8, disk_mb=8)

isolates = pytest.mark.skipif(
    bool(unavailable()), reason=f"this machine cannot isolate: {unavailable()}"
)


async def run(code: str, given: bytes = b"", *, isolate: bool = True, **limits: float) -> Ran:
    changed = SandboxLimits(**{**{n: getattr(LIMITS, n) for n in LIMITS.__slots__}, **limits})
    return await Sandbox(changed, isolate=isolate).run([sys.executable, "-I", "-c", code], given)


@isolates
async def test_a_program_reads_its_input_and_its_output_and_status_are_reported() -> None:
    ran = await run("import sys; print(sys.stdin.read()[::-1]); sys.exit(5)", b"abc")
    assert (ran.end, ran.status, ran.output) == ("exited", 5, b"cba\n")


@pytest.fixture
def listening() -> Iterator[int]:
    """A TCP server of this machine that accepts."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            try:
                while True:
                    server.accept()[0].close()
            except OSError:
                return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@isolates
async def test_there_is_no_network_not_even_this_machine(listening: int) -> None:
    code = (
        f"import socket; socket.create_connection(('127.0.0.1', {listening}), 3); print('reached')"
    )
    shut_in = await run(code)
    assert shut_in.output == b""
    assert b"unreachable" in shut_in.errors
    free = await run(code, isolate=False)
    assert free.output == b"reached\n", "the control: without isolation it is reached"


@isolates
async def test_files_of_this_machine_are_neither_read_nor_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    shut_in = await run(f"print(open({str(secret)!r}).read())")
    assert shut_in.output == b""
    assert b"No such file" in shut_in.errors
    written = await run("open('/usr/lagwise', 'w')")
    assert b"Read-only file system" in written.errors
    made = await run("open('/tmp/own', 'w').write('x'); print(open('/tmp/own').read())")
    assert made.output == b"x\n"
    assert not os.path.exists("/tmp/own")  # noqa: ASYNC240
    assert (await run(f"print(open({str(secret)!r}).read())", isolate=False)).output == b"s3cret\n"


@isolates
async def test_it_sees_no_variable_and_no_process_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_OURS", "s3cret")
    ran = await run(
        "import os; print('TOKEN_OF_OURS' in os.environ);"
        "print([p for p in os.listdir('/proc') if p.isdigit()] if os.path.exists('/proc/1') else 1)"
    )
    first, second = ran.output.decode().splitlines()
    assert first == "False"
    assert second in ("['1', '2']", "1")


@isolates
async def test_it_holds_no_capability_and_cannot_gain_one() -> None:
    ran = await run(
        "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True);"
        "print(os.getuid() != 0, libc.mount(b'a', b'/tmp', b'tmpfs', 0, None),"
        " libc.prctl(39, 0, 0, 0, 0))"
    )
    assert ran.output == b"True -1 1\n", "39: PR_GET_NO_NEW_PRIVS"


@isolates
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("bytearray(1 << 30)", b"MemoryError"),
        ("open('/tmp/big', 'wb').write(bytes(16 << 20))", b"File too large"),
        (
            "import os\nfor _ in range(64):\n  if os.fork() == 0:\n    os.read(os.pipe()[0], 1)\n",
            b"Resource temporarily unavailable",
        ),
    ],
)
async def test_memory_disk_and_processes_are_bounded(code: str, said: bytes) -> None:
    if b"temporarily" in said and os.getuid() == 0 and not _own_users():
        pytest.skip("this container has no further user ids")
    ran = await run(code)
    assert ran.status == 1
    assert said in ran.errors


def _own_users() -> bool:
    """May root here become a user of its own making?"""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    rows = [list(map(int, line.split())) for line in lines]
    return any(inside <= 100_000 and inside + count > 4_300_000 for inside, _, count in rows)


@isolates
@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
async def test_time_is_bounded_and_everything_it_started_ends_with_it(code: str) -> None:
    sleeper = f"sleep {3_000_000 + os.getpid()}"
    started = asyncio.get_running_loop().time()
    ran = await run(f"import subprocess; subprocess.Popen({sleeper.split()!r})\n{code}", wall_s=2.0)
    assert (ran.end, ran.status) == ("timeout", -1)
    assert asyncio.get_running_loop().time() - started < 10
    for _ in range(100):
        if not _running(sleeper):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it outlived its sandbox")


def _running(command: str) -> bool:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().replace(b"\0", b" ").strip() == command.encode():
                return True
        except OSError:
            continue
    return False


@isolates
async def test_more_output_than_allowed_ends_it() -> None:
    ran = await run("while True: print('x' * 1000)", output_bytes=10_000)
    assert ran.end == "output"
    assert len(ran.output) <= 10_000


@isolates
async def test_cpu_time_is_bounded() -> None:
    ran = await run("while True: pass", cpu_s=1.0)
    assert (ran.end, ran.status) in {("exited", 128 + 24), ("exited", 128 + 9)}


async def test_where_isolation_is_impossible_it_refuses_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "unavailable", lambda: "unshare: Operation not permitted")
    with pytest.raises(SandboxUnavailable, match="unshare"):
        Sandbox(LIMITS)
    assert (await run("print(1)", isolate=False)).output == b"1\n"


async def test_further_runs_wait_for_a_place() -> None:
    box = Sandbox(LIMITS, isolate=False, concurrency=2)
    running, most = 0, 0
    watch = box._watch

    async def counted(process: asyncio.subprocess.Process, given: bytes) -> Ran:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        try:
            return await watch(process, given)
        finally:
            running -= 1

    box._watch = counted  # type: ignore[method-assign]
    argv = [sys.executable, "-I", "-S", "-c", "print(1)"]
    await asyncio.gather(*(box.run(argv, b"") for _ in range(6)))
    assert most == 2
