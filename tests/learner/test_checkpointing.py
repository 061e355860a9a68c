"""A learner and its checkpoints: written beside training, damaged ones passed over at a restart."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from services.learner import checkpoint, checkpoint_writer
from services.learner.checkpoint import CheckpointStore
from services.learner.checkpoint_files import Checkpoint
from services.learner.config import LearnerConfig
from shared.runtime.errors import Fatal
from shared.runtime.logs import JsonFormatter
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.runtime.service import cause_of
from shared.wire.codec import decode
from shared.wire.journal import RunStarted
from shared.wire.subjects import Subjects
from shared.wire.telemetry import StepReport
from tests.learner.crash_world import (
    NUM_VERSIONS,
    config_for,
    digests_of,
    journal_of,
    learn,
    players,
    save_model,
)

ROUTE = "ppo_ewma_async"
"""It carries an anchor, so that a checkpoint has files of three kinds."""


class AtOnce:
    """An executor without a thread: what is begun is done."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(call(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self, *, wait: bool) -> None: ...


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the disk when a learner dies does not depend on how fast a thread was."""
    monkeypatch.setattr(checkpoint_writer, "ThreadPoolExecutor", AtOnce)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit in the weights": (lambda at: flip(at / "weights.safetensors"), "weights."),
    "a flipped bit in the optimizer": (lambda at: flip(at / "optimizer.safetensors"), "optimizer."),
    "a flipped bit in the anchor": (lambda at: flip(at / "anchor.safetensors"), "anchor."),
    "a truncated file": (
        lambda at: (at / "weights.safetensors").write_bytes(b"short"), "weights.safetensors"),
    "a missing file": (lambda at: (at / "optimizer.safetensors").unlink(), "No such file"),
    "empty facts": (lambda at: (at / "learner.json").write_text(""), "learner.json"),
}  # fmt: skip


async def resumed_from(server: MemoryServer) -> list[int | None]:
    bodies = [entry.body for entry in await journal_of(server)]
    return [body.resumed_from for body in bodies if isinstance(body, RunStarted)]


def skipped(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [json.loads(JsonFormatter().format(r)) for r in caplog.records]
    return [line for line in lines if line["event"] == "checkpoint_skipped"]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(
    damage: str, model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hurt, reason = DAMAGES[damage]
    server, config = MemoryServer(), config_for(model_dir, tmp_path, ROUTE)
    async with players(server):
        assert await learn(server, config, "first", ("manifest", 6, "after"))
        before = await digests_of(server)
        hurt(tmp_path / "checkpoints/v000004")
        caplog.clear()
        assert not await learn(server, config, "second", None)
    assert await resumed_from(server) == [None, 2]
    [told] = skipped(caplog)
    assert told["path"].endswith("v000004")
    assert reason in told["reason"]
    after = await digests_of(server)
    assert {v: after[v] for v in before} == before
    assert len(set(after.values())) == NUM_VERSIONS + 1
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["v000002", f"v{NUM_VERSIONS:06d}"]


@pytest.mark.usefixtures("at_once")
async def test_with_every_checkpoint_damaged_it_begins_at_the_model_that_the_run_began_with(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, config = MemoryServer(), config_for(model_dir, tmp_path / "run", ROUTE)
    other = config.model_copy(
        update={
            "model": config.model.model_copy(
                update={"source": str(save_model(tmp_path / "other", seed=1))}
            )
        }
    )
    async with players(server):
        assert await learn(server, config, "first", ("manifest", 6, "after"))
        before = await digests_of(server)
        for folder in (tmp_path / "run/checkpoints").iterdir():
            flip(folder / "optimizer.safetensors")
        with pytest.raises(Fatal, match="no usable checkpoint, and the model directory") as raised:
            await learn(server, other, "of another model", None)
        assert "\n" not in str(raised.value)
        caplog.clear()
        assert not await learn(server, config, "second", None)
    assert await resumed_from(server) == [None, None]
    assert len(skipped(caplog)) == 2
    after = await digests_of(server)
    assert {v: after[v] for v in before} == before


@pytest.mark.usefixtures("at_once")
async def test_checkpoints_of_a_run_that_is_gone_from_the_bus_are_not_this_one_s(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Streams deleted, folder kept: the new run neither begins nor ends in the old one's state."""
    config = config_for(model_dir, tmp_path)
    first, second = MemoryServer(), MemoryServer()
    async with players(first):
        assert not await learn(first, config, "of the old run", None)
    async with players(second):
        assert await learn(second, config, "first", ("manifest", 4, "after"))
        caplog.clear()
        assert not await learn(second, config, "second", None)
    assert await resumed_from(second) == [None, 2]
    assert {line["reason"] for line in skipped(caplog)} == {"of another run"}


def slowly(config: LearnerConfig, **changes: Any) -> LearnerConfig:
    learner = config.learner.model_copy(update=changes)
    return config.model_copy(update={"learner": learner})


async def test_training_goes_on_while_a_checkpoint_is_written_and_waits_for_it_at_the_end(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let, write, begun = threading.Event(), CheckpointStore.write, list[int]()

    def held(store: CheckpointStore, snapshots: Any, facts: Any) -> Checkpoint:
        begun.append(facts.version)
        assert let.wait(60)
        return write(store, snapshots, facts)

    monkeypatch.setattr(CheckpointStore, "write", held)
    server = MemoryServer()
    bus = MemoryBus(Subjects("crash"), server)

    async def let_go() -> None:
        await bus.wait_for_streams(60)
        async for records in bus.read("manifests", 1):
            if any(record.seq == NUM_VERSIONS + 1 for record in records):
                assert not [*(tmp_path / "checkpoints").glob("v*")]
                let.set()
                return

    async with players(server), asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(let_go())
        assert not await learn(server, config_for(model_dir, tmp_path), "first", None)
    assert begun == [2, NUM_VERSIONS], "at most one in flight; the last version always"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["v000002", "v000005"]


async def test_what_the_loop_paid_and_what_the_thread_needed_are_reported_apart(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = checkpoint.seal

    def slow(folder: Path, facts: Any) -> Checkpoint:
        time.sleep(0.2)
        return seal(folder, facts)

    monkeypatch.setattr(checkpoint, "seal", slow)
    server = MemoryServer()
    config = slowly(config_for(model_dir, tmp_path), versions=60)
    async with players(server):
        assert not await learn(server, config, "first", None)
    bus = MemoryBus(Subjects("crash"), server)
    end = (await bus.stream_state("stats")).last_seq
    records = [await bus.get("stats", seq) for seq in range(1, end + 1)]
    scalars = [decode(record.payload, StepReport).scalars for record in records if record]
    assert 0 < min(s["checkpoint_s"] for s in scalars if s["checkpoint_s"]) < 0.2
    assert max(s["checkpoint_write_s"] for s in scalars) >= 0.2


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("versions", [2, 20])
async def test_a_full_disk_stops_the_run_in_one_line_and_a_restart_goes_on(
    versions: int, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next step, or when the run ends before it."""
    server = MemoryServer()
    config = slowly(config_for(model_dir, tmp_path), versions=versions)
    async with players(server):
        with monkeypatch.context() as patch:
            full = OSError(errno.ENOSPC, "No space left on device")
            patch.setattr(checkpoint, "seal", lambda *_: (_ for _ in ()).throw(full))
            with pytest.raises((Fatal, ExceptionGroup)) as raised:
                await learn(server, config, "first", None)
        line = str(cause_of(raised.value))
        assert line.endswith("v000002: No space left on device: free some space and restart")
        assert not [*(tmp_path / "checkpoints").iterdir()]
        assert len(await digests_of(server)) <= 6
        assert not await learn(server, config, "second", None)
    assert list(await digests_of(server)) == list(range(versions + 1))
