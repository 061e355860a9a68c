"""The archive keeps what was stored, in order, and survives a torn end."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cli.archive import (
    ArchiveWriter,
    Record,
    archived_versions,
    read_stream,
    read_tickets_final,
    stream_path,
    version_path,
)


def records(count: int, start: int = 1) -> list[Record]:
    return [
        Record(seq, f"lagwise.r.terminal.t{seq}", bytes([seq % 256]) * (seq % 7), 10.0 + seq)
        for seq in range(start, start + count)
    ]


def write(directory: Path, items: list[Record]) -> None:
    with ArchiveWriter(directory) as writer:
        writer.append("terminals", items)


def test_records_come_back_in_order_and_whole(tmp_path: Path) -> None:
    write(tmp_path, records(20))
    assert list(read_stream(tmp_path, "terminals")) == records(20)
    assert list(read_stream(tmp_path, "scores")) == []


@pytest.mark.parametrize("cut", range(1, 30))
def test_any_torn_end_costs_only_the_last_records_and_writing_goes_on(
    tmp_path: Path, cut: int
) -> None:
    write(tmp_path, records(5))
    path = stream_path(tmp_path, "terminals")
    path.write_bytes(path.read_bytes()[:-cut])
    kept = list(read_stream(tmp_path, "terminals"))
    assert kept == records(len(kept))
    assert len(kept) < 5
    with ArchiveWriter(tmp_path) as writer:
        assert writer.last_seq("terminals") == len(kept)
        writer.append("terminals", records(9))
    assert list(read_stream(tmp_path, "terminals")) == records(9)


@given(tail=st.binary(min_size=1, max_size=40))
def test_garbage_after_a_crash_never_reaches_a_reader_of_whole_records(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes
) -> None:
    directory = tmp_path_factory.mktemp("archive")
    write(directory, records(3))
    path = stream_path(directory, "terminals")
    path.write_bytes(path.read_bytes() + tail)
    assert list(read_stream(directory, "terminals"))[:3] == records(3)


def test_a_sequence_already_archived_is_not_written_again(tmp_path: Path) -> None:
    write(tmp_path, records(5))
    write(tmp_path, records(8))
    assert [r.seq for r in read_stream(tmp_path, "terminals")] == list(range(1, 9))


def test_positions_name_every_stream_the_learner_may_purge(tmp_path: Path) -> None:
    with ArchiveWriter(tmp_path) as writer:
        writer.append("scores", records(4))
        assert writer.positions() == {
            "terminals": 0, "scores": 4, "journal": 0, "manifests": 0, "stats": 0, "dead": 0,
        }  # fmt: skip


def test_leases_are_numbered_across_restarts(tmp_path: Path) -> None:
    for _ in range(2):
        with ArchiveWriter(tmp_path) as writer:
            writer.append_line("leases", Record(0, "lagwise.r.lease.rollout.rollout-0", b"x", 1.0))
    assert [r.seq for r in read_stream(tmp_path, "leases")] == [1, 2]


def test_versions_and_final_tickets_are_found_again(tmp_path: Path) -> None:
    with ArchiveWriter(tmp_path) as writer:
        assert read_tickets_final(tmp_path) is None
        writer.write_version(12, [b"wei", b"ghts"])
        writer.write_version(3, [b"weights"])
        writer.write_tickets_final(["b", "a"])
    assert archived_versions(tmp_path) == [3, 12]
    assert version_path(tmp_path, 12).read_bytes() == b"weights"
    assert read_tickets_final(tmp_path) == ("a", "b")
