"""The journal's fold, and the single writer on a bus."""

from __future__ import annotations

import asyncio
from types import ModuleType

import pytest

from services.learner.journal import JournalState
from services.learner.journal_log import JournalLog
from shared.runtime.errors import Fenced
from shared.runtime.memory_bus import MemoryBus
from shared.wire.journal import Batch, Disposed, Evaluated, Issued, Member, TrainedGroup


def member(ticket_id: str) -> Member:
    return Member(
        ticket_id=ticket_id, terminal_seq=1, terminal_digest="d", score_seq=1, reward=1.0,
        advantage=0.5,
    )  # fmt: skip


def issued(make: ModuleType) -> Issued:
    tickets = tuple(
        make.ticket(f"{group}{i}", group, i) for group in ("a", "b", "c") for i in range(2)
    )
    return Issued(version=2, tickets=tickets, cursor={"next_index": 3})


def test_every_ticket_is_open_until_it_is_trained_dropped_or_failed(make: ModuleType) -> None:
    state = JournalState()
    state.apply(issued(make))
    trained = TrainedGroup(group_id="a", issue_version=2, members=(member("a0"),), failed=("a1",))
    state.apply(Batch(version=0, groups=(trained,), seed=1))
    state.apply(Disposed(ticket_ids=("b0", "b1"), outcome="failed", cause="all"))
    assert list(state.open_tickets) == ["c0", "c1"]
    assert state.issue_versions == {"c": 2}
    assert state.open_groups().keys() == {"c"}
    assert (state.num_train_tickets, state.num_train_groups) == (6, 3)
    assert state.cursor == {"next_index": 3}


def test_a_group_that_leaves_in_two_entries_is_open_between_them(make: ModuleType) -> None:
    state = JournalState()
    state.apply(issued(make))
    state.apply(Disposed(ticket_ids=("b0",), outcome="dropped", cause="stale"))
    assert state.open_groups().keys() == state.issue_versions.keys() == {"a", "b", "c"}
    state.apply(Disposed(ticket_ids=("b1",), outcome="failed", cause="member failed"))
    assert state.open_groups().keys() == state.issue_versions.keys() == {"a", "c"}


async def test_a_cancelled_write_is_still_applied(
    make: ModuleType, memory_bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await memory_bus.create_streams()
    journal, append = JournalLog(memory_bus), memory_bus.append

    async def slow(subject: str, payload: bytes, **fields: int) -> int:
        seq = await append(subject, payload, **fields)
        await asyncio.sleep(0.05)
        return seq

    monkeypatch.setattr(memory_bus, "append", slow)
    writing = asyncio.create_task(journal.write(issued(make)))
    await asyncio.sleep(0.01)
    writing.cancel()
    monkeypatch.setattr(memory_bus, "append", append)
    await journal.write(Disposed(ticket_ids=("b0", "b1"), outcome="failed", cause="x"))
    assert list(journal.state.open_tickets) == ["a0", "a1", "c0", "c1"]


def test_evaluation_tickets_have_a_ledger_of_their_own(make: ModuleType) -> None:
    state = JournalState()
    ticket = make.ticket("e0", "eval-base-v0", purpose="eval")
    state.apply(Issued(version=0, tickets=(ticket,)))
    assert state.num_train_tickets == 0
    assert state.open_evaluations().keys() == {"eval-base-v0"}
    state.apply(Evaluated(version=0, name="base", task_indices=(0,), rewards=(1.0,)))
    assert state.open_tickets == {}
    assert state.evaluation("base", 0) is not None


async def test_replay_folds_to_the_same_state(make: ModuleType, memory_bus: MemoryBus) -> None:
    await memory_bus.create_streams()
    first = JournalLog(memory_bus)
    await first.write(issued(make))
    await first.write(Disposed(ticket_ids=("b0", "b1"), outcome="dropped", cause="stale"))
    second = JournalLog(memory_bus)
    assert await second.replay() == 2
    assert second.state == first.state


async def test_a_second_writer_fences_the_first(make: ModuleType, memory_bus: MemoryBus) -> None:
    await memory_bus.create_streams()
    first, second = JournalLog(memory_bus), JournalLog(memory_bus)
    await first.write(issued(make))
    await second.replay()
    await second.write(Disposed(ticket_ids=("b0", "b1"), outcome="failed", cause="x"))
    before = dict(first.state.open_tickets)
    with pytest.raises(Fenced, match="another learner"):
        await first.write(Disposed(ticket_ids=("c0", "c1"), outcome="failed", cause="x"))
    assert first.state.open_tickets == before, "a refused decision must have no effect"


async def test_a_lost_acknowledgement_is_read_back_as_success(
    make: ModuleType, memory_bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await memory_bus.create_streams()
    journal = JournalLog(memory_bus)
    append = memory_bus.append

    async def stored_but_unacknowledged(subject: str, payload: bytes, **fields: int) -> int:
        await append(subject, payload, **fields)
        return await append(subject, payload, **fields)  # the retry meets its own first attempt

    monkeypatch.setattr(memory_bus, "append", stored_but_unacknowledged)
    await journal.write(issued(make))
    assert len(journal.state.open_tickets) == 6
    monkeypatch.undo()
    await journal.write(Disposed(ticket_ids=("b0", "b1"), outcome="failed", cause="x"))
    assert (await memory_bus.stream_state("journal")).last_seq == 2
