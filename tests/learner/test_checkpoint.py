"""Checkpoints: atomic, retained, damaged ones skipped; terminals that cannot be read."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from services.learner.checkpoint import CheckpointStore
from services.learner.takeover import terminal_event
from shared.runtime.bus import Record
from shared.runtime.errors import Fatal
from shared.runtime.logs import Log
from shared.wire.errors import ForeignMajor
from shared.wire.trajectory import Failure


class Weights:
    """Stands for a backend: one file."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error = error

    def save(self, path: Path) -> None:
        (path / "weights").write_bytes(b"x")
        if self.error:
            raise self.error


def store(folder: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", keep, Log("learner"))


def save(checkpoints: CheckpointStore, version: int, backend: Weights | None = None) -> None:
    checkpoints.save(
        [backend or Weights()],
        version=version,
        digest=f"d{version}",
        optimizer_steps=2 * version,
        floors={"terminals": version},
    )


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for version in (5, 10, 15):
        save(checkpoints, version)
    assert [(c.version, c.optimizer_steps) for c in checkpoints.all()] == [(10, 20), (15, 30)]


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 5)
    full = Weights(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(Fatal, match=r"No space left on device: free some space") as raised:
        save(checkpoints, 10, full)
    assert "\n" not in str(raised.value)
    assert [c.version for c in store(tmp_path).all()] == [5]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["v000005"]


@pytest.mark.parametrize("damage", ["", "{", '{"version": 10}'])
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, damage: str) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 5)
    save(checkpoints, 10)
    (tmp_path / "checkpoints/v000010/learner.json").write_text(damage)
    assert [c.version for c in store(tmp_path).all()] == [5]


def test_a_terminal_that_cannot_be_read_ends_its_ticket_as_failed() -> None:
    event = terminal_event(Record(7, "lagwise.run.terminal.t0000003", b"\x00garbage", 0.0))
    assert (event.ticket_id, event.seq) == ("t0000003", 7)
    assert isinstance(event.outcome, Failure)
    assert event.outcome.reason == "undecodable"


def test_a_terminal_of_another_major_is_not_garbage() -> None:
    payload = b"\x83\xa1w\x92\x09\x00\xa1t\xa8Terminal\xa1b\x80"
    with pytest.raises(ForeignMajor):
        terminal_event(Record(7, "lagwise.run.terminal.t0000003", payload, 0.0))
