"""Against the real tensorboard and wandb packages (make test-trackers); no network."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared.cli.trackers import wanted
from shared.cli.tracking import Tracking
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.sections import CommonConfig
from shared.wire.codec import encode
from shared.wire.journal import Evaluated, JournalEntry
from shared.wire.subjects import Subjects
from shared.wire.telemetry import StepReport

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

CONFIG = {"run": {"name": "r", "seed": 7}, "learner": {"optimizer": {"lr": 1e-6}}}


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    bus = MemoryBus(Subjects("r"))
    await bus.create_streams()
    yield bus
    await bus.close()


async def steps(bus: MemoryBus, versions: range) -> None:
    for version in versions:
        report = StepReport(
            version=version, started_at=1.0, trained_at=100.0 + version, published_at=3.0,
            scalars={"loss": version / 8, "k3_d": float("nan") if version == 2 else 0.25},
        )  # fmt: skip
        await bus.append(bus.subjects.stats("step"), encode(report))


async def evaluation(bus: MemoryBus, version: int, rewards: tuple[float, ...]) -> None:
    result = Evaluated(version=version, name="progress", task_indices=(0, 0), rewards=rewards)
    entry = JournalEntry(entry_id=f"e{version}", written_at=1.0, body=result)
    await bus.append(bus.subjects.journal, encode(entry))


async def track(bus: MemoryBus, folder: Path, trackers: dict[str, Any]) -> None:
    """As one recorder process does from its start to its stop."""
    common = CommonConfig.model_validate(
        {"run": {"name": "r", "dir": str(folder)}, "trackers": trackers}
    )
    stop = asyncio.Event()
    stop.set()
    tracking = Tracking(
        bus, wanted(common, CONFIG), folder / "trackers", Log("recorder"), samples=2, catch_up_s=60
    )
    await tracking.run(stop)
    assert tracking.hanging == []
    for name in trackers:
        progress = json.loads((folder / "trackers" / f"{name}.json").read_text())
        assert progress["failures"] == 0


async def test_event_files_hold_every_version_once_over_a_restart(
    bus: MemoryBus, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    await steps(bus, range(1, 4))
    await evaluation(bus, 3, (1.0, 0.0))
    await track(bus, tmp_path, {"tensorboard": {}})
    await steps(bus, range(4, 6))
    await evaluation(bus, 5, (1.0, 1.0))
    await track(bus, tmp_path, {"tensorboard": {}})
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    loss = events.Scalars("train/loss")
    assert [(e.step, e.value, e.wall_time) for e in loss] == [
        (version, version / 8, 100.0 + version) for version in range(1, 6)
    ]
    assert [(e.step, e.value) for e in events.Scalars("eval_progress/avg_at_2")] == [
        (3, 0.5), (5, 1.0),
    ]  # fmt: skip
    assert [e.value for e in events.Scalars("eval_progress/all_pass_at_2")] == [0.0, 1.0]
    [text] = events.Tensors("config/text_summary")
    assert "learner.optimizer.lr: 1e-06" in text.tensor_proto.string_val[0].decode()


async def test_offline_wandb_files_hold_every_version_once_over_a_restart(
    bus: MemoryBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # whoever asks the network fails
    section = {"wandb": {"project": "p", "tags": ["x"]}}
    await steps(bus, range(1, 4))
    await evaluation(bus, 3, (1.0, 0.0))
    await track(bus, tmp_path, section)
    await steps(bus, range(4, 6))
    await track(bus, tmp_path, section)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    rows, ids, configs = [], set(), []
    for file in files:
        for record in scan(file):
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.project))
                configs.append({c.key: c.value_json for c in record.run.config.update})
            elif record.WhichOneof("record_type") == "history":
                rows.append(values(record.history))
    assert len(ids) == 1
    assert {project for _, project in ids} == {"p"}
    assert json.loads(configs[0]["learner"])["optimizer"]["lr"] == 1e-6
    assert [r["_step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    trained = {r["version"]: r["train/loss"] for r in rows if "train/loss" in r}
    assert trained == {version: version / 8 for version in range(1, 6)}
    assert len([r for r in rows if "train/loss" in r]) == 5
    assert [r["eval_progress/avg_at_2"] for r in rows if "eval_progress/avg_at_2" in r] == [0.5]


def scan(file: Path) -> list[Any]:
    """Read a run file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, data = 32768, file.read_bytes()
    assert data[:4] == b":W&B"
    records, partial, at = [], b"", 7
    while at + 7 <= len(data):
        if block - at % block < 7:  # no header fits: the block's end is padding
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        partial += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(partial))
            partial = b""
    return records


def values(history: Any) -> dict[str, Any]:
    found: dict[str, Any] = defaultdict(dict)
    for item in history.item:
        found[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return dict(found)


def test_a_process_whose_tracker_hangs_ends(tmp_path: Path) -> None:
    """What `recorder` does at its end, with a wandb server that never answers."""
    code = f"""
import asyncio, sys
from pathlib import Path
import tests.extras.test_trackers as t
from shared.cli.tracking import leave

async def main():
    bus = t.MemoryBus(t.Subjects("r"))
    await bus.create_streams()
    await t.steps(bus, range(1, 4))
    common = t.CommonConfig.model_validate(
        {{"run": {{"name": "r", "dir": {str(tmp_path)!r}}},
          "trackers": {{"wandb": {{"project": "p", "mode": "online"}}}}}})
    stop = asyncio.Event(); stop.set()
    tracking = t.Tracking(bus, t.wanted(common, t.CONFIG), Path({str(tmp_path)!r}) / "trackers",
                          t.Log("recorder"), catch_up_s=3, timeout_s=1)
    await tracking.run(stop)
    return tracking.hanging

hanging = asyncio.run(main())
print("hanging", hanging, flush=True)
sys.exit(leave(0, hanging))
"""
    import socket

    with socket.socket() as silent:  # accepts connections, answers nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hanging ['wandb']" in done.stdout
