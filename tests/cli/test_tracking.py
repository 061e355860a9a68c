"""Trackers get each version once, in order, and cost the run nothing when they fail or hang."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.cli.config_cmd import check_model_directory, read
from shared.cli.tracked_points import Point, flat, of_evaluation, of_step
from shared.cli.trackers import Wanted, check_installed
from shared.cli.tracking import Tracking
from shared.runtime.errors import ConfigError
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.sections import CommonConfig
from shared.wire.codec import encode
from shared.wire.journal import Evaluated, Issued, JournalEntry
from shared.wire.telemetry import StepReport

EVALUATED = Evaluated(
    version=2, name="progress", task_indices=(0, 0, 1, 1), rewards=(1, 0, 0, 0), num_failed=3
)


class Recorded:
    """A destination that outlives its processes; `trouble` raises or blocks."""

    def __init__(self) -> None:
        self.points: list[tuple[int, Point]] = []
        self.opened = self.closed = 0
        self.trouble = lambda point: None

    def open(self) -> "Recorded":
        self.opened += 1
        return self

    def write(self, point: Point, number: int) -> None:
        self.trouble(point)
        self.points.append((number, point))

    def close(self) -> None:
        self.closed += 1

    @property
    def versions(self) -> list[int]:
        return [p.version for _, p in self.points if "train/loss" in p.scalars]


@asynccontextmanager
async def tracking(
    bus: MemoryBus, folder: Path, *targets: Recorded, **options: float
) -> AsyncIterator[Tracking]:
    """Track until the block ends, then to the ends of the logs."""
    stop = asyncio.Event()
    wanted = [Wanted(f"t{number}", target.open) for number, target in enumerate(targets)]
    made = Tracking(bus, wanted, folder, Log("recorder"), samples=2, **options)
    async with asyncio.TaskGroup() as group:
        group.create_task(made.run(stop))
        await asyncio.sleep(0)
        yield made
        stop.set()


async def step(bus: MemoryBus, version: int) -> None:
    report = StepReport(
        version=version, started_at=1.0, trained_at=2.0, published_at=3.0,
        scalars={"loss": version / 10, "success": 0.5},
    )  # fmt: skip
    await bus.append(bus.subjects.stats("step"), encode(report))


async def journal(bus: MemoryBus, body: Evaluated | Issued) -> None:
    entry = JournalEntry(entry_id="e", written_at=1.0, body=body)
    await bus.append(bus.subjects.journal, encode(entry))


def counts(folder: Path) -> dict[str, int]:
    return json.loads((folder / "t0.json").read_text())


async def test_every_step_and_evaluation_arrives_by_version(bus: MemoryBus, tmp_path: Path) -> None:
    target = Recorded()
    async with tracking(bus, tmp_path, target):
        for version in (1, 2, 3):
            await step(bus, version)
        await journal(bus, Issued(version=2, tickets=()))
        await journal(bus, EVALUATED)
    assert target.versions == [1, 2, 3]
    assert sorted(number for number, _ in target.points) == [1, 2, 3, 4]
    [evaluation] = [p for _, p in target.points if "train/loss" not in p.scalars]
    assert evaluation.version == 2
    assert evaluation.scalars["eval_progress/avg_at_2"] == 0.25
    assert evaluation.scalars["eval_progress/pass_at_2"] == 0.5
    assert evaluation.scalars["eval_progress/all_pass_at_2"] == 0.0
    assert evaluation.scalars["eval_progress/failed"] == 3
    first = next(p for _, p in target.points if p.version == 1)
    assert first == Point(1, 2.0, {"train/loss": 0.1, "train/success": 0.5})
    assert (target.opened, target.closed) == (1, 1)


async def test_a_resumed_run_writes_no_version_twice(bus: MemoryBus, tmp_path: Path) -> None:
    target = Recorded()
    async with tracking(bus, tmp_path, target):
        await step(bus, 1)
        await journal(bus, EVALUATED)
        await step(bus, 2)
    async with tracking(bus, tmp_path, target):
        await step(bus, 2)  # a report appended again after its duplicate window
        await step(bus, 3)
    assert target.versions == [1, 2, 3]
    assert sorted(number for number, _ in target.points) == [1, 2, 3, 4]


async def test_a_process_killed_inside_a_write_does_not_repeat_it(
    bus: MemoryBus, tmp_path: Path
) -> None:
    target, inside, release = Recorded(), threading.Event(), threading.Event()

    def blocked(point: Point) -> None:
        if point.version == 2:
            inside.set()
            release.wait(30)

    target.trouble = blocked
    async with tracking(bus, tmp_path, target, catch_up_s=0.1) as first:
        await step(bus, 1)
        await step(bus, 2)
        await asyncio.to_thread(inside.wait, 10)
    assert first.hanging == ["t0"]
    again = Recorded()
    async with tracking(bus, tmp_path, again):
        await step(bus, 3)
    release.set()
    assert target.versions[:1] == [1]
    assert again.versions == [3]


async def test_a_failing_tracker_is_counted_and_goes_on(
    bus: MemoryBus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target, other = Recorded(), Recorded()

    def refuses(point: Point) -> None:
        if point.version in (2, 3):
            raise OSError("No space left on device")

    target.trouble = refuses
    with caplog.at_level("INFO", logger="lagwise"):
        async with tracking(bus, tmp_path, target, other):
            for version in (1, 2, 3, 4):
                await step(bus, version)
    assert target.versions == [1, 4]
    assert other.versions == [1, 2, 3, 4]
    assert counts(tmp_path)["failures"] == 2
    told = [r.lagwise_fields for r in caplog.records if r.message == "tracker_fails"]
    assert [(t["tracker"], t["at"]) for t in told] == [("t0", "version 2")]
    assert "No space left" in told[0]["reason"]
    assert [r for r in caplog.records if r.message == "tracker_writes_again"]


async def test_a_tracker_that_cannot_be_opened_is_tried_again(
    bus: MemoryBus, tmp_path: Path
) -> None:
    target = Recorded()
    attempts: list[int] = []

    def flaky() -> Recorded:
        attempts.append(1)
        if len(attempts) < 3:
            raise RuntimeError("no network")
        return target.open()

    stop = asyncio.Event()
    made = Tracking(bus, [Wanted("t0", flaky)], tmp_path, Log("recorder"))
    for version in (1, 2, 3):
        await step(bus, version)
    stop.set()
    await made.run(stop)
    assert target.versions == [3]
    assert counts(tmp_path)["failures"] == 2


async def test_a_hanging_tracker_holds_up_nobody(
    bus: MemoryBus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target, other, release = Recorded(), Recorded(), threading.Event()
    target.trouble = lambda point: release.wait(100) and None
    done = threading.Event()
    other.trouble = lambda point: done.set() if point.version == 39 else None
    async with tracking(bus, tmp_path, target, other, timeout_s=0.05, catch_up_s=1.0) as made:
        for version in range(1, 40):
            await step(bus, version)
        await asyncio.to_thread(done.wait, 30)  # long before the other one is released
    assert other.versions == list(range(1, 40))
    assert target.versions == []
    assert other.closed == 1
    assert made.hanging == ["t0"]
    assert counts(tmp_path)["hangs"] == 1
    assert [r for r in caplog.records if r.message == "tracker_fails"]
    release.set()


async def test_what_cannot_be_read_is_skipped(bus: MemoryBus, tmp_path: Path) -> None:
    target = Recorded()
    await bus.append(bus.subjects.stats("step"), b"not a report")
    async with tracking(bus, tmp_path, target):
        await step(bus, 1)
    assert target.versions == [1]


def test_a_missing_package_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shared.cli.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"`trackers.wandb`.*pip install 'lagwise\[wandb\]'"):
        check_installed(CommonConfig.model_validate({"trackers": {"wandb": {"project": "p"}}}))
    check_installed(CommonConfig())


def test_a_run_is_not_started_without_its_trackers_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shared.cli.trackers.find_spec", lambda name: None)
    values = read(Path("examples/frozen_lake/values.yaml"), ["trackers.tensorboard={}"])
    with pytest.raises(ConfigError, match=r"values.yaml: `trackers.tensorboard`.*\[tensorboard\]"):
        check_model_directory(values)


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ({"trackers": {"wandb": {}}}, "project"),
        ({"trackers": {"tensorbord": {}}}, "tensorbord"),
        ({"trackers": {"tensorboard": {}}, "run": {"archive": False}}, "run.archive"),
        ({"trackers": {"wandb": {"project": "p", "mode": "on"}}}, "mode"),
    ],
)
def test_a_wrong_section_is_refused(section: dict, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        CommonConfig.model_validate(section)


def test_points_are_named_and_configurations_flattened() -> None:
    none = Evaluated(version=1, name="base", task_indices=(), rewards=(), num_failed=2)
    point = of_evaluation(none, 1.0, samples=4, success=1.0)
    assert point.scalars == {"eval_base/episodes": 0.0, "eval_base/failed": 2.0}
    report = StepReport(version=5, started_at=0, trained_at=1, published_at=2, scalars={"b": 1.0})
    assert of_step(report) == Point(5, 1, {"train/b": 1.0})
    assert dict(flat({"a": {"b": 1, "c": {}}, "d": [2]})) == {"a.b": 1, "a.c": {}, "d": [2]}
