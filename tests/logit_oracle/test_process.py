"""The process on a real nats-server: it scores, survives a kill, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.runtime import nats_server
from shared.runtime.logs import Log
from shared.runtime.nats_bus import NatsBus, connect
from shared.runtime.sections import BusSection
from shared.wire.subjects import Subjects

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]  # imports torch in fresh processes


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[tuple[str, NatsBus]]:
    port = nats_server.free_port()
    nats_server.write_config(tmp_path / "nats.conf", port=port, store_dir=tmp_path / "store")
    server = nats_server.start(tmp_path / "nats.conf", tmp_path / "nats.log")
    url = f"nats://127.0.0.1:{port}"
    try:
        nats_server.wait_healthy(url, 10, server)
        link = await connect(BusSection(url=url), Subjects("test"), "learner", Log("test"))
        yield url, link
        await link.close()
    finally:
        server.kill()
        server.wait()


def start_oracle(url: str, model: Path, *overrides: str) -> subprocess.Popen[bytes]:
    settings = (f"bus.url={url}", "run.name=test", f"model.source={model}", *overrides)
    command = [sys.executable, "-m", "services.logit_oracle"]
    for setting in settings:
        command += ["--set", setting]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


async def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, errors = await asyncio.to_thread(process.communicate, None, 90)
    return process.returncode, errors.decode()


async def test_a_killed_oracle_loses_nothing_and_a_stopped_one_exits_cleanly(
    bus, rig, sequence, trajectory
) -> None:
    url, link = bus
    await rig.open(bus=link)
    await rig.publish(3)
    shared = ("model.dtype=float64", "logit_oracle.ack_wait_s=2")
    first = start_oracle(url, rig.model_dir, *shared, "logit_oracle.max_wait_s=30")
    try:
        held = await rig.play(trajectory(sequence([(0, 4, 8), (2, 8, 12)])))
        queue = await link.work_queue(
            "terminals", "logit_oracle", ack_wait_s=2, max_ack_pending=16384
        )
        async with asyncio.timeout(90):
            while await queue.pending() != (0, 1):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        first.kill()
        first.communicate()
    assert await link.last(link.subjects.score(held.ticket_id)) is None
    second = start_oracle(url, rig.model_dir, *shared)
    try:
        score = await rig.score(held, timeout_s=90)
        assert [v.status for v in score.sequences[0].versions] == ["exact", "exact"]
        second.send_signal(signal.SIGTERM)
        code, errors = await ended(second)
        assert code == 0, errors
        assert await queue.pending() == (0, 0)
    finally:
        second.kill()


async def test_a_missing_model_exits_with_code_2_and_one_plain_line(bus, tmp_path) -> None:
    url, link = bus
    await link.create_streams()
    code, errors = await ended(start_oracle(url, tmp_path / "nowhere"))
    assert code == 2
    assert "no such directory" in errors.splitlines()[-1]


async def test_a_typo_in_the_configuration_exits_with_code_2_before_torch_is_imported(
    tmp_path,
) -> None:
    process = start_oracle("nats://127.0.0.1:1", tmp_path, "logit_oracle.pak_tokens=1")
    code, errors = await ended(process)
    assert code == 2
    assert "pak_tokens" in errors.splitlines()[-1]
