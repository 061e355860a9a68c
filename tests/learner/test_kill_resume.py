"""Twenty kills of one run at random moments: the learner resumes each time, to the same bytes."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from services.learner.config import LearnerConfig
from shared.cli import ledger, records, replay
from shared.cli.archive import archive_dir
from shared.cli.recording import Recording
from shared.runtime.bus import Bus
from shared.runtime.logs import Log
from shared.runtime.memory_server import MemoryServer
from shared.runtime.nats_bus import connect
from shared.runtime.sections import BusSection
from shared.wire.codec import decode
from shared.wire.subjects import Subjects
from shared.wire.weights import Manifest
from tests.learner import killed_learner
from tests.learner.crash_world import (
    archive,
    config_for,
    digests_of,
    learn,
    play,
    players,
)

KILLS = 20
SUBJECTS = Subjects("crash")


def long(model_dir: Path, run_dir: Path, versions: int, route: str) -> LearnerConfig:
    config = config_for(model_dir, run_dir, route)
    learner = config.learner.model_copy(update={"versions": versions})
    return config.model_copy(update={"learner": learner})


def assert_sound(run_dir: Path, versions: int) -> None:
    """Nothing lost, nothing twice, and all of it is derived once more from the archive."""
    found = records.load(run_dir)
    book = ledger.of_run(found)
    assert not book.problems
    assert (book.training.lost, book.training.duplicated) == (0, 0)
    assert [batch.version for batch in book.lineage] == list(range(versions))
    trained = Counter(m.ticket_id for b in book.lineage for g in b.groups for m in g.members)
    assert max(trained.values()) == 1
    result = replay.run(run_dir)
    assert (result.versions, result.problem) == (versions, "")


@pytest.mark.parametrize("seed", [0, 1])
async def test_a_learner_that_dies_at_twenty_random_calls_to_the_bus_repeats_and_loses_nothing(
    seed: int, model_dir: Path, tmp_path: Path
) -> None:
    rng, server = random.Random(seed), MemoryServer()
    config = long(model_dir, tmp_path, 12, ("oracle", "ppo_ewma_async")[seed])
    deaths, known = 0, dict[int, str]()
    async with players(server):
        for number in range(KILLS):
            deaths += await learn(server, config, f"life {number}", rng.randint(1, 150))
            published = await digests_of(server) if server.streams else {}
            assert {v: published[v] for v in known} == known, "a version changed its bytes"
            known = published
        assert not await learn(server, config, "the last life", None)
    assert deaths > KILLS // 2, "it was done too early for most of the kills"
    await archive(server, tmp_path)
    await asyncio.to_thread(assert_sound, tmp_path, 12)


@pytest.mark.chaos
async def test_a_learner_that_dies_at_any_call_to_the_bus_is_continued(
    model_dir: Path, tmp_path: Path
) -> None:
    """Every one of them in turn, each in a run of its own."""
    calls, outcome = 0, dict[int, str]()
    while calls < 1000:
        calls += 1
        server = MemoryServer()
        config = long(model_dir, tmp_path / str(calls), 3, "ppo_ewma_async")
        async with players(server):
            if not await learn(server, config, "first", calls):
                break
            before = await digests_of(server) if server.streams else {}
            assert not await learn(server, config, "second", None)
        outcome = await digests_of(server)
        assert {v: outcome[v] for v in before} == before, calls
        assert list(outcome) == [0, 1, 2, 3], calls
        await archive(server, tmp_path / str(calls))
        book = ledger.of_run(records.load(tmp_path / str(calls)))
        assert not book.problems, calls
    assert 100 < calls < 1000


class Learners:
    """One learner process after another."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([killed_learner.__name__, "transformers"])
        self._process: BaseProcess | None = None

    @property
    def process(self) -> BaseProcess:
        assert self._process is not None
        return self._process

    def start(self) -> None:
        arguments = (str(self._run_dir / "resolved.yaml"), str(self._run_dir / "learner.log"))
        self._process = self._context.Process(target=killed_learner.main, args=arguments)
        self._process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def log(self) -> str:
        return (self._run_dir / "learner.log").read_text()

    def events(self, name: str) -> list[dict[str, object]]:
        lines = (line for line in self.log().splitlines() if f'"event": "{name}"' in line)
        return [json.loads(line) for line in lines]


@asynccontextmanager
async def recorded(run_dir: Path, bus: Bus) -> AsyncIterator[None]:
    """Archive everything, and play whatever is asked for, until the end of the block."""
    stop = asyncio.Event()
    recording = Recording(bus, archive_dir(run_dir), Log("recorder"), sync_s=0.2)
    tasks = [asyncio.create_task(recording.run(stop)), asyncio.create_task(play(bus))]
    try:
        yield
        stop.set()
        await asyncio.wait_for(tasks[0], 30)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool], learners: Learners, poll_s: float = 0.002) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert learners.process.is_alive(), learners.log()[-3000:]
        assert time.monotonic() < deadline, learners.log()[-3000:]
        await asyncio.sleep(poll_s)


@pytest.mark.chaos
@pytest.mark.timeout(280)
async def test_kill_9_at_twenty_random_moments_gives_every_committed_digest_again(
    mortal_nats_server, model_dir: Path, tmp_path: Path
) -> None:
    """In turn: any time after the start, in or after a step, and while a checkpoint is written."""
    run_dir, rng = tmp_path / "run", random.Random(7)
    run_dir.mkdir()
    versions = 4 * KILLS
    config = long(model_dir, run_dir, versions, "oracle")
    config = config.model_copy(update={"bus": BusSection(url=mortal_nats_server.url)})
    (run_dir / "resolved.yaml").write_text(
        yaml.safe_dump({"config": config.model_dump(mode="json")})
    )
    bus = await connect(config.bus, SUBJECTS, "test", Log("test"))
    await bus.create_streams()
    learners, interrupted = Learners(run_dir), 0
    checkpoints = run_dir / "checkpoints"

    async def head() -> int:
        record = await bus.last(bus.subjects.manifest)
        return -1 if record is None else decode(record.payload, Manifest).version

    async def steps(number: int) -> None:
        wanted = await head() + number
        while await head() < wanted:
            assert learners.process.is_alive(), learners.log()[-3000:]
            await asyncio.sleep(0.002)

    async with recorded(run_dir, bus):
        for number in range(KILLS):
            learners.start()
            match number % 4:
                case 0:
                    await asyncio.sleep(rng.uniform(0.0, 2.0))
                case 1 | 2:
                    await asyncio.wait_for(steps(rng.randint(1, 4)), 30)
                    await asyncio.sleep(rng.uniform(0.0, 0.1))
                case _:
                    await asyncio.wait_for(steps(1), 30)
                    await until(
                        lambda: any(checkpoints.glob(".v*.partial")), learners, poll_s=0.0005
                    )
            learners.kill()
            interrupted += any(checkpoints.glob(".v*.partial"))
        assert interrupted, "no kill hit a checkpoint while it was written"
        assert await head() < versions, "it was done too early for some of the kills"
        learners.start()
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(learners.process.join), 60)
        assert learners.process.exitcode == 0, learners.log()[-3000:]
    await bus.close()
    assert len(learners.events("run_taken_over")) > KILLS // 2
    confirmed = learners.events("version_confirmed")
    assert len({event["version"] for event in confirmed}) > KILLS // 2
    assert "other bytes" not in learners.log()
    await asyncio.to_thread(assert_sound, run_dir, versions)
