"""What the in-process server can do that no client asks of it."""

from __future__ import annotations

import pytest

from shared.runtime.bus import Record
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.wire.subjects import Subjects


async def test_restored_records_keep_their_sequences_and_later_ones_follow() -> None:
    server, subjects = MemoryServer(max_payload=1024), Subjects("run")
    bus = MemoryBus(subjects, server)
    await bus.create_streams()
    name, large = subjects.stream("terminals"), b"x" * 5000
    server.restore(name, Record(3, subjects.terminal("a"), b"one", 1.0))
    server.restore(name, Record(7, subjects.terminal("b"), large, 2.0))
    with pytest.raises(ValueError, match="at 7 already"):
        server.restore(name, Record(7, subjects.terminal("c"), b"", 2.0))
    assert await bus.get("terminals", 1) is None
    assert (await bus.last(subjects.terminal("a"))).payload == b"one"  # type: ignore[union-attr]
    assert (await bus.get("terminals", 7)).payload == large  # type: ignore[union-attr]
    state = await bus.stream_state("terminals")
    assert (state.first_seq, state.last_seq, state.num_messages) == (3, 7, 2)
    assert await bus.append(subjects.terminal("c"), b"", expect_last_subject_seq=0) == 8
