"""Checkpoints: atomic, retained, damaged ones skipped; terminals that cannot be read."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from services.learner import takeover
from services.learner.checkpoint import CheckpointStore
from services.learner.checkpoint_files import Facts
from services.learner.checkpoint_writer import CheckpointWriter
from services.learner.takeover import load_newest, terminal_event
from shared.runtime.bus import Record
from shared.runtime.errors import Fatal
from shared.runtime.logs import JsonFormatter, Log
from shared.wire.codec import encode
from shared.wire.errors import ForeignMajor
from shared.wire.messages import Terminal
from shared.wire.trajectory import Failure
from tests.learner import make


class Weights:
    """Stands for a backend's snapshot: two files, one in a folder of a route's."""

    def __init__(self, content: bytes = b"weights", error: OSError | None = None) -> None:
        self.content = content
        self.error = error

    def write(self, folder: Path) -> None:
        (folder / "weights").write_bytes(self.content)
        (folder / "anchor").mkdir()
        (folder / "anchor/optimizer").write_bytes(self.content * 2)
        if self.error:
            raise self.error


def store(folder: Path, keep: int = 2, run: str = "run") -> CheckpointStore:
    opened = CheckpointStore(folder / "checkpoints", keep, Log("learner"))
    opened.open(run)
    return opened


def facts(version: int, run: str = "run") -> Facts:
    return Facts(run, version, f"d{version}", 2 * version, {"terminals": version})


def save(checkpoints: CheckpointStore, version: int, snapshot: Weights | None = None) -> None:
    checkpoints.write([snapshot or Weights()], facts(version))


def on_disk(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for version in (5, 10, 15):
        save(checkpoints, version)
    kept = [(c.version, c.facts.optimizer_steps) for c in checkpoints.all()]
    assert kept == [(10, 20), (15, 30)]
    assert store(tmp_path).all() == checkpoints.all()
    assert on_disk(tmp_path) == ["v000010", "v000015"]


def test_versions_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for version in (999_999, 1_000_000):
        save(checkpoints, version)
    assert [c.version for c in store(tmp_path).all()] == [999_999, 1_000_000]


def test_copies_that_somebody_made_are_neither_used_nor_deleted(tmp_path: Path) -> None:
    save(store(tmp_path), 5)
    for name in ("v000005.bak", "vacation"):
        shutil.copytree(tmp_path / "checkpoints/v000005", tmp_path / "checkpoints" / name)
    shutil.copytree(tmp_path / "checkpoints/v000005", tmp_path / "checkpoints/v000007")
    checkpoints = store(tmp_path)
    assert [c.path.name for c in checkpoints.all()] == ["v000005"]
    save(checkpoints, 10)
    assert on_disk(tmp_path) == ["v000005", "v000005.bak", "v000010", "vacation"]


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 5)
    full = Weights(error=OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(Fatal, match=r"No space left on device: free some space") as raised:
        save(checkpoints, 10, full)
    assert "\n" not in str(raised.value)
    assert [c.version for c in store(tmp_path).all()] == [5]
    assert on_disk(tmp_path) == ["v000005"]


def test_a_file_too_large_for_the_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    """safetensors has an error of its own for it, which nobody would take for a full disk."""
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from shared.backends.hf_files import write_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    write_tensors(Path(sys.argv[1]), [('a', torch.zeros(9999))], stem='weights')\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("weights.safetensors: ")
    assert "File too large" in result.stdout


FACTS = "learner.json"


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        (FACTS, lambda path: path.write_text(""), "learner.json: Expecting value"),
        (FACTS, lambda path: path.write_text("{"), "learner.json: Expecting property"),
        (FACTS, lambda path: path.write_text('{"version": 10}'), "learner.json: 'sha256'"),
        (FACTS, lambda path: path.write_text("[]"), "learner.json: "),
        (FACTS, lambda path: path.unlink(), "learner.json: No such file"),
        (FACTS, lambda path: flip(path, b'"version": 10', b'"version": 11'), "learner.json: its"),
        ("weights", lambda path: path.write_bytes(b"weight"), "weights: its content"),
        ("weights", lambda path: path.write_bytes(b"weightz"), "weights: its content"),
        ("weights", lambda path: path.unlink(), "weights: No such file"),
        ("anchor/optimizer", lambda path: path.write_bytes(b""), "anchor/optimizer: its content"),
        ("anchor/optimizer", lambda path: path.unlink(), "anchor/optimizer: No such file"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_one_warning_and_then_replaced(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
    damage: Callable[[Path], object],
    reason: str,
) -> None:
    for version in (5, 10):
        save(store(tmp_path), version)
    damage(tmp_path / "checkpoints/v000010" / file)
    checkpoints = store(tmp_path)
    loaded = load_newest(checkpoints, Standing("d5"), "d0", load=lambda _: None, reload=never)
    assert loaded is not None
    assert loaded.version == 5
    assert [c.version for c in checkpoints.all()] == [5]
    [warning] = [r for r in caplog.records if r.levelname == "WARNING"]
    assert warning.getMessage() == "checkpoint_skipped"
    assert reason in fields(warning)["reason"]
    assert fields(warning)["path"].endswith("v000010")
    save(checkpoints, 12)
    assert [c.version for c in checkpoints.all()] == [5, 12]
    assert on_disk(tmp_path) == ["v000005", "v000012"]


def test_of_another_run_is_skipped_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(tmp_path).write([Weights()], facts(100, run="earlier"))
    checkpoints = store(tmp_path)
    assert checkpoints.all() == []
    assert "of another run" in fields(caplog.records[-1])["reason"]
    for version in (5, 10, 15):
        save(checkpoints, version)
    assert on_disk(tmp_path) == ["v000010", "v000015", "v000100"]


def test_after_a_load_that_failed_the_source_model_is_brought_back(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 5)
    model = Standing("d0")

    def half(_: Path) -> None:
        model.digest = "half"
        raise ValueError("optimizer state lacks master/a")

    def reload() -> None:
        model.digest = "d0"

    assert load_newest(checkpoints, model, "d0", load=half, reload=reload) is None
    assert checkpoints.all() == []
    with pytest.raises(Fatal, match="not the one this run started from") as raised:
        load_newest(store(tmp_path), model, "other", load=half, reload=reload)
    assert "\n" not in str(raised.value)


def test_weights_that_are_not_the_promised_version_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for version in (5, 10):
        save(store(tmp_path), version)
    model = Standing("d5")
    found = load_newest(store(tmp_path), model, "d0", load=lambda _: None, reload=never)
    assert found is not None
    assert found.version == 5
    assert fields(caplog.records[-1])["reason"] == "its weights are not version 10"


class Killed(BaseException):
    """Stands for kill -9 between two calls to the file system."""


CALLS = (
    (os, "fsync"), (os, "open"), (shutil, "rmtree"), (Path, "mkdir"), (Path, "rename"),
    (Path, "write_text"), (Path, "write_bytes"),
)  # fmt: skip


def test_a_kill_at_any_call_to_the_disk_leaves_a_whole_checkpoint_to_go_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was there before stays usable until the new one is; afterwards all goes on."""

    def attempt(folder: Path, kill_at: int) -> int:
        """Overwrite version 10 and write 15, dying at a call; return the number of calls."""
        seen = 0

        def dying(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == kill_at:
                    raise Killed
                return call(*arguments, **options)

            return wrapped

        with monkeypatch.context() as patch, suppress(Killed):
            for owner, name in CALLS:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            reopened = store(folder)
            save(reopened, 10, Weights(b"again"))
            save(reopened, 15)
        return seen

    monkeypatch.setattr(os, "fsync", lambda handle: None)  # it takes milliseconds, and is counted
    for version in (5, 10):
        save(store(tmp_path / "calls"), version)
    shutil.copytree(tmp_path / "calls", tmp_path / "before")
    num_calls = attempt(tmp_path / "calls", 0)
    assert num_calls > 20
    for kill_at in range(1, num_calls + 1):
        folder = tmp_path / str(kill_at)
        shutil.copytree(tmp_path / "before", folder)
        attempt(folder, kill_at)
        after = store(folder)
        assert after.all(), kill_at
        for checkpoint in after.all():
            checkpoint.check()
        save(after, 20)
        assert [c.version for c in store(folder).all()][-1] == 20
        assert len(on_disk(folder)) == 2, kill_at


class Held(Weights):
    """Writes when it is let."""

    def __init__(self, error: OSError | None = None) -> None:
        super().__init__(error=error)
        self.let = threading.Event()

    def write(self, folder: Path) -> None:
        assert self.let.wait(10)
        super().write(folder)


async def test_a_writing_in_flight_counts_only_when_it_is_complete(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 5)
    writer, held = CheckpointWriter(checkpoints), Held()
    writer.start([held], facts(10))
    assert writer.settle() is None
    assert writer.busy
    assert [c.version for c in checkpoints.all()] == [5]
    held.let.set()
    written = await writer.wait()
    assert written is not None
    assert written.checkpoint.version == 10
    assert [c.version for c in checkpoints.all()] == [5, 10]
    assert not writer.busy
    assert await writer.wait() is None
    writer.close()


async def test_a_writing_that_failed_is_told_once_and_leaves_the_older_one(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 5)
    writer, held = CheckpointWriter(checkpoints), Held(OSError(errno.ENOSPC, "No space left"))
    writer.start([held], facts(10))
    held.let.set()
    with pytest.raises(Fatal, match="No space left: free some space"):
        await writer.wait()
    assert [c.version for c in checkpoints.all()] == [5]
    assert on_disk(tmp_path) == ["v000005"]
    writer.close()


class Standing:
    """Stands for a backend: what its weights are, as a digest."""

    def __init__(self, digest: str) -> None:
        self.digest = digest


@pytest.fixture(autouse=True)
def _digests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "state_digest", lambda standing: standing.digest)


def never() -> None:
    raise AssertionError("nothing was loaded")


def flip(path: Path, before: bytes, after: bytes) -> None:
    content = path.read_bytes()
    assert content.count(before) == 1
    path.write_bytes(content.replace(before, after))


def fields(record: logging.LogRecord) -> dict[str, Any]:
    return json.loads(JsonFormatter().format(record))


def test_a_terminal_that_cannot_be_read_ends_its_ticket_as_failed() -> None:
    event = terminal_event(Record(7, "lagwise.run.terminal.t0000003", b"\x00garbage", 0.0))
    assert (event.ticket_id, event.seq) == ("t0000003", 7)
    assert isinstance(event.outcome, Failure)
    assert event.outcome.reason == "undecodable"


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_no_number_ends_its_ticket_instead_of_every_learner(reward: float) -> None:
    terminal = Terminal(
        ticket_id="t0000003", attempt_id="a", purpose="train", group_id="g", member=0,
        issue_version=0, producer="env", outcome=make.trajectory(reward),
    )  # fmt: skip
    event = terminal_event(Record(7, "lagwise.run.terminal.t0000003", encode(terminal), 0.0))
    assert isinstance(event.outcome, Failure)
    assert (event.outcome.reason, event.outcome.detail) == ("undecodable", "a reward is not finite")


def test_a_terminal_of_another_major_is_not_garbage() -> None:
    payload = b"\x83\xa1w\x92\x09\x00\xa1t\xa8Terminal\xa1b\x80"
    with pytest.raises(ForeignMajor):
        terminal_event(Record(7, "lagwise.run.terminal.t0000003", payload, 0.0))
