from __future__ import annotations

import asyncio

import pytest
import torch

from shared.runtime.errors import BusUnavailable, Conflict, Fatal, Fenced
from shared.weights.digests import sha256_of, specs, version_digest
from shared.weights.manifest_log import read_log
from shared.weights.orphans import ORPHAN_AGE_S


async def _log(bus) -> list[tuple[int, str]]:
    return [(e.manifest.version, e.manifest.digest) for e in (await read_log(bus)).manifests]


async def test_the_slower_of_two_publishers_is_fenced(new_publisher, make_state, new_bus) -> None:
    stalled = await new_publisher()
    await stalled.put(make_state(0))
    other = await new_publisher()
    assert other.head.version == 0
    await other.put(make_state(1), previous_state=make_state(0))
    with pytest.raises(Fenced, match="version 1"):
        await stalled.put(make_state(2))
    assert len(await _log(new_bus())) == 2
    await other.put(make_state(3))
    assert [v for v, _ in await _log(new_bus())] == [0, 1, 2]


async def test_two_publishers_of_a_fresh_run_allocate_version_zero_once(
    new_publisher, make_state
) -> None:
    a, b = await new_publisher(), await new_publisher()
    await b.put(make_state(1))
    with pytest.raises(Fenced):
        await a.put(make_state(1))


async def test_a_lost_acknowledgement_is_a_success_after_reading_back(
    new_publisher, make_state, faulty
) -> None:
    p = await new_publisher(faulty)
    faulty.fault = "lost acknowledgement"
    first = await p.put(make_state(0))
    assert first.version == 0
    assert (await p.put(make_state(1))).version == 1
    assert [v for v, _ in await _log(faulty)] == [0, 1]


async def test_publishing_again_after_an_unknown_outcome_adopts_what_was_stored(
    new_publisher, make_state, faulty
) -> None:
    p = await new_publisher(faulty)
    await p.put(make_state(0))
    faulty.fault = "crash after"
    with pytest.raises(BusUnavailable):
        await p.put(make_state(1))
    again = await p.put(make_state(1))
    assert again.version == 1
    assert len(await _log(faulty)) == 2
    faulty.fault = "crash after"
    with pytest.raises(BusUnavailable):
        await p.put(make_state(2))
    with pytest.raises(Fatal, match="never reused"):
        await p.put(make_state(3))


@pytest.mark.parametrize("fault", ["crash before", "crash after"])
async def test_a_restart_sees_nothing_or_the_version_and_reuses_no_number(
    new_publisher, make_state, faulty, following, fault: str
) -> None:
    p = await new_publisher(faulty)
    await p.put(make_state(0))
    faulty.fault = fault
    with pytest.raises(BusUnavailable):
        await p.put(make_state(1))
    q = await new_publisher()
    seen = version_digest(specs(make_state(1)))
    if fault == "crash after":
        assert (q.head.version, q.head.digest) == (1, seen)
        assert await q.publisher.manifest(1) == q.head
        following_version = await q.put(make_state(5), previous_state=make_state(1))
        assert following_version.version == 2
        assert following_version.delta is not None
    else:
        assert q.head.version == 0
        following_version = await q.put(make_state(5), previous_state=make_state(0))
        assert following_version.version == 1
    digests = dict(await _log(faulty))
    assert len(digests) == len(await _log(faulty))
    async with following() as f:
        await f.until_head(following_version.version)


async def test_publishing_goes_on_after_a_cancelled_publication(run_of, new_bus, following) -> None:
    """Wherever it was cancelled: with and without the version having been stored."""
    p = await run_of(1)
    async with following("oldest_needed") as f:
        for awaits in range(0, 60, 3):
            state = p.states[-1]
            publishing = asyncio.create_task(p.put(state))
            for _ in range(awaits):
                await asyncio.sleep(0)
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            await p.more(1)
        await f.until_head(p.publisher.head.version)
        assert f.follower.resyncs == 0
        assert await f.sha256(f.heads[-1]) == sha256_of(p.states[-2])
    versions = [v for v, _ in await _log(new_bus())]
    assert versions == list(range(len(versions)))


async def test_an_upload_that_sweepers_may_have_taken_is_not_committed(
    new_publisher, make_state, new_bus
) -> None:
    now = [1000.0]

    def clock() -> float:
        now[0] += ORPHAN_AGE_S
        return now[0]

    p = await new_publisher(clock=clock)
    with pytest.raises(BusUnavailable, match="too long"):
        await p.put(make_state(0))
    assert await _log(new_bus()) == []


async def test_a_conflict_that_is_not_ours_names_the_other_producer(
    new_publisher, make_state
) -> None:
    a, b = await new_publisher(), await new_publisher(producer="learner-7")
    await b.put(make_state(0))
    with pytest.raises(Fenced, match="learner-7") as caught:
        await a.put({"w": torch.zeros(2)})
    assert isinstance(caught.value.__cause__, Conflict)
