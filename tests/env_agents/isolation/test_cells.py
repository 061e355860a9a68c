"""An episode in a process of its own: whatever the environment does, it costs this episode."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.env_agents.environment import EnvironmentLost
from services.env_agents.isolation.confinement import children
from services.env_agents.isolation.isolated import EnvironmentRaised, IsolatedEnvironment
from shared.runtime.errors import ConfigError
from tests.env_agents.isolation.isolated_world import (
    alive,
    gone,
    noted,
    ready,
    running,
    task,
)

ROOT = Path(__file__).parents[3]


async def test_an_episode_is_the_same_as_without_a_process(tmp_path: Path) -> None:
    async with running({"folder": str(tmp_path)}) as cells:
        environment = IsolatedEnvironment(cells)
        assert (await environment.reset(task("x"))).text == "@00>"
        assert environment.task_digest() == "digest of x"
        result = await environment.step("left")
        assert (result.observation.text, result.reward, result.terminated) == ("@01>", 1.0, True)
        assert result.rewards == {"answered": 4.0}
        await environment.close()
        (pid,) = noted(tmp_path, "pid")
        assert pid not in (os.getpid(), cells.zygote_pid)
        assert noted(tmp_path, "closed") == [pid]
        assert await gone(pid)


@pytest.mark.parametrize(
    ("do", "said"),
    [
        ("raise", "ZeroDivisionError: as asked"),
        ("exit", "SystemExit: 3"),
        ("leak", r"MemoryError: beyond isolation\.memory_mb \(64 MiB\)"),
        ("leak to the last byte", r"MemoryError: beyond isolation\.memory_mb \(64 MiB\)"),
        ("flood", r"an observation of 2097\d+ bytes, isolation\.max_message_bytes is 1048576"),
    ],
)
async def test_what_the_environment_raises_or_overdraws_is_named(do: str, said: str) -> None:
    async with running(memory_mb=64, max_message_bytes=1 << 20) as cells:
        environment = await ready(cells, do)
        with pytest.raises(EnvironmentRaised, match=said):
            await environment.step("left")
        await environment.close()
        assert (await (await ready(cells)).step("left")).reward == 1.0, "the next one plays"


@pytest.mark.parametrize(
    ("do", "said"),
    [
        ("die", "the environment's process exited with status 7"),
        ("crash", "the environment's process was ended by SIGSEGV"),
        ("lose its server", "server 7 hung up"),
        ("fork", r"started more than isolation\.processes \(8\)"),
    ],
)
async def test_a_process_that_ends_is_a_lost_environment_with_the_cause(do: str, said: str) -> None:
    async with running() as cells:
        other = await ready(cells)
        environment = await ready(cells, do)
        with pytest.raises(EnvironmentLost, match=said):
            await environment.step("left")
        await environment.close()
        assert (await other.step("left")).reward == 1.0, "the neighbour plays on"


async def test_a_hanging_environment_is_killed_with_everything_it_started(tmp_path: Path) -> None:
    async with running({"folder": str(tmp_path)}, processes=1000) as cells:
        environment = await ready(cells, "fork")
        (pid,) = noted(tmp_path, "pid")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await environment.step("left")
        started = list(children(pid))
        assert started
        assert all(map(alive, started))
        await environment.close()
        assert await gone(pid)
        assert all([await gone(one) for one in started])
        assert not noted(tmp_path, "closed"), "it is not asked: it does not answer"


async def test_a_daemon_in_a_session_of_its_own_does_not_survive_its_episode(
    tmp_path: Path,
) -> None:
    async with running({"folder": str(tmp_path)}) as cells:
        environment = await ready(cells, "daemonise")
        await environment.step("left")
        (daemon,) = noted(tmp_path, "daemon")
        assert os.getsid(daemon) != os.getsid(noted(tmp_path, "pid")[0])
        assert alive(daemon), "while the episode lives, so does what it started"
        await environment.close()
        assert await gone(daemon)


async def test_what_an_environment_prints_reaches_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    async with running() as cells:
        await (await ready(cells, "print")).step("left")
    assert "{" not in "".join(capfd.readouterr())


async def test_episodes_do_not_share_their_random_numbers() -> None:
    async with running() as cells:
        drawn = [(await (await ready(cells, "draw")).step("")).observation.text for _ in range(4)]
    assert len(set(drawn)) == 4


async def test_a_killed_zygote_costs_the_open_episodes_and_the_next_one_starts_another() -> None:
    async with running() as cells:
        environment = await ready(cells, "await forever")
        assert cells.zygote_pid is not None
        os.kill(cells.zygote_pid, signal.SIGKILL)
        with pytest.raises(EnvironmentLost, match="ended with the process that forks"):
            await environment.step("left")
        await environment.close()
        assert (await (await ready(cells)).step("left")).reward == 1.0


async def test_an_environment_that_refuses_its_options_is_a_config_error_as_without_isolation() -> (
    None
):
    with pytest.raises(ConfigError, match=r"refuses task\.options: ValueError: refused as asked"):
        async with running({"refuse": 1}):
            raise AssertionError("unreachable")


def test_no_process_outlives_a_killed_service(tmp_path: Path) -> None:
    script = f"""
import asyncio
from tests.env_agents.isolation.isolated_world import ready, running
async def main():
    async with running({{"folder": {str(tmp_path)!r}}}) as cells:
        environment = await ready(cells, "hang")
        print(cells.zygote_pid, flush=True)
        await environment.step("left")
asyncio.run(main())
"""
    service = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    zygote = int(service.stdout.readline())
    (pid,) = noted(tmp_path, "pid")
    assert alive(zygote)
    assert alive(pid)
    service.kill()
    service.wait()
    service.stdout.close()
    assert asyncio.run(gone(zygote))
    assert asyncio.run(gone(pid))
