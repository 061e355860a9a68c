"""The service on a bus where things go missing, die and come back."""

from __future__ import annotations

import asyncio

import msgpack
import numpy as np
import pytest

from services.logit_oracle.versions import Versions
from shared.runtime.errors import ConfigError
from shared.wire.base import Array
from shared.wire.codec import decode
from shared.wire.telemetry import DeadLetter
from shared.wire.trajectory import Failure


def spoiled(canary):
    """The canary of other weights: log-probs that no follower reproduces."""
    return canary.model_copy(
        update={"logprobs": Array.of(canary.logprobs.numpy() - 0.5, canary.logprobs.dtype)}
    )


def statuses(score) -> list[tuple[int, str]]:
    return [(entry.version, entry.status) for entry in score.sequences[0].versions]


async def test_it_is_ready_once_a_canary_agrees_and_not_before(rig, eventually) -> None:
    async with rig.oracle() as context:
        await asyncio.sleep(0.2)
        assert context.health.reason == "no policy version yet"
        await rig.publish(1)
        await eventually(lambda: context.health.ready)
        assert context.version == 0
    assert not context.health.ready


async def test_a_version_that_arrives_late_is_waited_for(
    rig, sequence, trajectory, reference, eventually
) -> None:
    await rig.publish(1)
    async with rig.oracle() as context:
        await eventually(lambda: context.health.ready)
        terminal = await rig.play(trajectory(sequence([(0, 4, 8), (2, 8, 12)])))
        await asyncio.sleep(0.3)
        assert await rig.bus.last(rig.bus.subjects.score(terminal.ticket_id)) is None
        await rig.publish(2)
        score = await rig.score(terminal)
    assert statuses(score) == [(0, "exact"), (2, "exact")]
    wanted = reference(rig.states[2], terminal.outcome.sequences[0].token_ids.numpy())
    found = score.sequences[0].old_logprobs.numpy()
    assert np.abs(found[8:12] - wanted[8:12]).max() <= 1e-10


async def test_a_version_gone_for_good_leaves_zeros_and_no_other_versions_numbers(
    rig, sequence, trajectory, eventually
) -> None:
    await rig.open(keyframe_every=2)
    await rig.publish(6)
    await rig.publisher.purge_below(4)
    await rig.control(oldest_needed=0)
    async with rig.oracle() as context:
        await eventually(lambda: context.health.ready)
        terminal = await rig.play(trajectory(sequence([(1, 4, 8), (5, 8, 12)])))
        score = await rig.score(terminal)
    assert statuses(score) == [(1, "unscorable"), (5, "exact")]
    found = score.sequences[0].old_logprobs.numpy()
    assert not found[4:8].any()
    assert found[8:12].all()
    assert context.counters["unscorable_tokens"] == 4


async def test_a_version_that_was_never_published_is_unscorable_after_a_bounded_wait(
    rig, sequence, trajectory
) -> None:
    await rig.publish(1)
    terminal = await rig.play(trajectory(sequence([(0, 4, 8), (99, 8, 12)])))
    async with rig.oracle(absent_after_s=0.2, ensure_timeout_s=0.1):
        score = await rig.score(terminal)
    assert statuses(score) == [(0, "exact"), (99, "unscorable")]


async def test_versions_are_evicted_with_the_low_water_mark_and_fetched_back_on_demand(
    rig, sequence, trajectory, eventually
) -> None:
    await rig.publish(6)
    async with rig.oracle() as context:
        await eventually(lambda: context.gauges.get("held_versions") == 6)
        held_bytes = context.gauges["held_bytes"]
        await rig.control(oldest_needed=4)
        await eventually(lambda: context.gauges["held_versions"] == 2)
        assert context.gauges["held_bytes"] < held_bytes / 2
        old = await rig.play(trajectory(sequence([(1, 4, 8)])))
        kept = await rig.play(trajectory(sequence([(4, 4, 8)])))
        assert statuses(await rig.score(kept)) == [(4, "exact")]
        assert statuses(await rig.score(old)) == [(1, "unscorable")]
        assert context.gauges["held_versions"] == 2


async def test_a_restarted_oracle_rebuilds_its_history_from_the_low_water_mark(
    rig, sequence, trajectory, eventually
) -> None:
    await rig.publish(8)
    await rig.control(oldest_needed=5)
    async with rig.oracle() as context:
        await eventually(lambda: context.gauges.get("held_versions") == 3)
        terminal = await rig.play(trajectory(sequence([(5, 4, 8), (7, 8, 12)])))
        assert statuses(await rig.score(terminal)) == [(5, "exact"), (7, "exact")]


async def test_a_canary_that_disagrees_withholds_the_version(
    rig, sequence, trajectory, eventually
) -> None:
    await rig.publish(1)
    await rig.publish(1, spoil=spoiled)
    async with rig.oracle(canary_retries=1) as context:
        await rig.publish(1)
        terminal = await rig.play(trajectory(sequence([(0, 4, 8), (1, 8, 12), (2, 12, 16)])))
        score = await rig.score(terminal)
    assert statuses(score) == [(0, "exact"), (1, "unverified"), (2, "exact")]
    assert context.counters["canary_failures"] >= 2
    assert context.counters["unverified_tokens"] == 4


async def test_it_is_unready_while_the_only_version_disagrees(rig, eventually) -> None:
    await rig.publish(1, spoil=spoiled)
    async with rig.oracle(canary_retries=1) as context:
        await eventually(lambda: context.counters.get("canary_failures") == 2)
        await eventually(lambda: "canary" in context.health.reason)
        await rig.publish(1)
        await eventually(lambda: context.health.ready)


async def test_failures_and_evaluations_are_acknowledged_without_a_score(
    rig, sequence, trajectory
) -> None:
    await rig.publish(1)
    failed = await rig.play(Failure(reason="env_error"))
    evaluated = await rig.play(trajectory(sequence([(0, 4, 8)])), purpose="eval")
    trained = await rig.play(trajectory(sequence([(0, 4, 8)])))
    async with rig.oracle():
        await rig.score(trained)
        await rig.all_acknowledged()
    for terminal in (failed, evaluated):
        assert await rig.bus.last(rig.bus.subjects.score(terminal.ticket_id)) is None


async def test_a_malformed_terminal_is_a_dead_letter_and_the_service_goes_on(
    rig, sequence, trajectory
) -> None:
    await rig.publish(1)
    await rig.bus.append(rig.bus.subjects.terminal("broken"), b"\xc1 not a message")
    terminal = await rig.play(trajectory(sequence([(0, 4, 8)])))
    async with rig.oracle():
        assert statuses(await rig.score(terminal)) == [(0, "exact")]
        await rig.all_acknowledged()
    record = await rig.bus.last(rig.bus.subjects.dead("logit_oracle"))
    assert decode(record.payload, DeadLetter).origin.endswith("terminal.broken")


async def test_a_terminal_of_a_foreign_major_is_handed_back_and_makes_the_service_unready(
    rig, sequence, trajectory, eventually
) -> None:
    await rig.publish(1)
    foreign = msgpack.packb({"w": (99, 0), "t": "Terminal", "b": {}})
    await rig.bus.append(rig.bus.subjects.terminal("foreign"), foreign)
    terminal = await rig.play(trajectory(sequence([(0, 4, 8)])))
    async with rig.oracle() as context:
        assert statuses(await rig.score(terminal)) == [(0, "exact")]
        await eventually(lambda: "rolling upgrade" in context.health.reason)
    consumer = rig.server.streams["lagwise-test-terminals"].consumers["logit_oracle"]
    assert list(consumer.pending) == [1]
    assert await rig.bus.last(rig.bus.subjects.dead("logit_oracle")) is None


@pytest.mark.parametrize("token_id", [41, -1])
async def test_a_token_outside_the_vocabulary_spoils_only_its_own_trajectory(
    rig, sequence, trajectory, token_id
) -> None:
    await rig.publish(1)
    good = sequence([(0, 4, 8)])
    token_ids = good.token_ids.numpy().copy()
    token_ids[2] = token_id
    bad = good.model_copy(update={"token_ids": Array.of(token_ids, "i4")})
    first, second = await rig.play(trajectory(bad)), await rig.play(trajectory(good))
    async with rig.oracle():
        assert statuses(await rig.score(first)) == [(0, "unscorable")]
        assert statuses(await rig.score(second)) == [(0, "exact")]


async def test_a_sampled_token_without_a_prefix_is_never_exact(rig, sequence, trajectory) -> None:
    await rig.publish(1)
    terminal = await rig.play(trajectory(sequence([(0, 0, 4)])))
    async with rig.oracle():
        assert statuses(await rig.score(terminal)) == [(0, "unscorable")]


async def test_two_oracles_share_the_load_and_no_terminal_has_two_scores(
    rig, sequence, trajectory, eventually
) -> None:
    await rig.publish(2)
    async with rig.oracle(max_in_flight=8, fetch_batch=4) as one:
        await eventually(lambda: one.health.ready)
        async with rig.oracle(max_in_flight=8, fetch_batch=4) as two:
            await eventually(lambda: two.health.ready)
            terminals = [
                await rig.play(trajectory(sequence([(0, 4, 8), (1, 8, 12)], seed=seed)))
                for seed in range(60)
            ]
            scores = [await rig.score(terminal) for terminal in terminals]
            await rig.all_acknowledged()
    assert len({score.ticket_id for score in scores}) == 60
    assert (await rig.bus.stream_state("scores")).num_messages == 60
    shares = [context.counters["trajectories"] for context in (one, two)]
    assert sum(shares) == 60
    assert min(shares) > 0


async def test_a_crash_between_the_score_and_its_acknowledgement_is_harmless(
    rig, sequence, trajectory, monkeypatch
) -> None:
    from shared.runtime import memory_queue

    await rig.publish(1)
    ack, lost = memory_queue.MemoryJob.ack, []

    async def die_once(job) -> None:
        if not lost:
            lost.append(job.record.seq)
            raise RuntimeError("killed before the acknowledgement")
        await ack(job)

    monkeypatch.setattr(memory_queue.MemoryJob, "ack", die_once)
    terminal = await rig.play(trajectory(sequence([(0, 4, 8)])))
    with pytest.raises(ExceptionGroup):
        async with rig.oracle(ack_wait_s=0.3):
            await asyncio.sleep(5)
    before = await rig.score(terminal)
    async with rig.oracle(ack_wait_s=0.3) as context:
        await rig.all_acknowledged()
    assert context.counters["score_conflicts"] == 1
    assert await rig.score(terminal) == before
    assert (await rig.bus.stream_state("scores")).num_messages == 1


async def test_a_score_of_an_earlier_terminal_under_the_same_ticket_is_superseded(
    rig, sequence, trajectory
) -> None:
    await rig.publish(1)
    first = await rig.play(trajectory(sequence([(0, 4, 8)], seed=1)))
    async with rig.oracle():
        old = await rig.score(first)
        await rig.all_acknowledged()
        await rig.bus.purge("terminals", old.terminal_seq + 1)
        rig.num_tickets = 0
        second = await rig.play(trajectory(sequence([(0, 4, 8)], seed=2)))
        assert second.ticket_id == first.ticket_id
        await rig.all_acknowledged()
        new = await rig.score(second)
    assert new.terminal_seq > old.terminal_seq
    assert new.terminal_digest != old.terminal_digest


async def test_work_held_for_long_is_not_delivered_to_another(
    rig, sequence, trajectory, eventually
) -> None:
    await rig.publish(1)
    async with rig.oracle(ack_wait_s=0.3) as context:
        await eventually(lambda: context.health.ready)
        terminal = await rig.play(trajectory(sequence([(1, 4, 8)])))
        await asyncio.sleep(1.0)
        await rig.publish(1)
        assert statuses(await rig.score(terminal)) == [(1, "exact")]
        assert context.bus.counters["redeliveries"] == 0


async def test_a_stop_scores_what_it_can_and_hands_back_the_rest(
    rig, sequence, trajectory, eventually
) -> None:
    await rig.publish(1)
    async with rig.oracle(max_wait_s=60.0, drain_s=0.5) as context:
        await eventually(lambda: context.health.ready)
        scorable = await rig.play(trajectory(sequence([(0, 4, 8)])))
        waiting = await rig.play(trajectory(sequence([(1, 4, 8)])))
        await eventually(lambda: context.gauges["in_flight"] == 2)
    assert statuses(await rig.score(scorable)) == [(0, "exact")]
    assert await rig.bus.last(rig.bus.subjects.score(waiting.ticket_id)) is None
    await rig.publish(1)
    async with rig.oracle():
        assert statuses(await rig.score(waiting)) == [(1, "exact")]


async def test_a_bus_that_comes_back_is_picked_up_again(rig, sequence, trajectory, eventually):
    await rig.publish(1)
    async with rig.oracle() as context:
        await eventually(lambda: context.health.ready)
        rig.server.set_up(False)
        await asyncio.sleep(0.2)
        rig.server.set_up(True)
        terminal = await rig.play(trajectory(sequence([(0, 4, 8)])))
        assert statuses(await rig.score(terminal)) == [(0, "exact")]


async def test_an_unusable_model_directory_is_a_configuration_error(rig, tmp_path) -> None:
    rig.model_dir = tmp_path / "nowhere"
    with pytest.raises(ExceptionGroup) as raised:
        async with rig.oracle():
            await asyncio.sleep(1)
    assert raised.group_contains(ConfigError, match="no such directory")


async def test_held_bytes_that_went_bad_are_fetched_afresh(
    rig, sequence, trajectory, eventually, monkeypatch
) -> None:
    """Bytes altered in memory after their digest was checked: only the canary can see it."""
    await rig.publish(1)
    on_version = Versions._on_version
    corrupted: list[int] = []

    async def corrupt_once(self, manifest) -> None:
        if manifest.version == 1 and not corrupted:
            corrupted.append(1)
            async with self._history.at(1) as state:
                state["model.norm.weight"].mul_(1.5)
        await on_version(self, manifest)

    monkeypatch.setattr(Versions, "_on_version", corrupt_once)
    async with rig.oracle() as context:
        await eventually(lambda: context.health.ready)
        await rig.publish(1)
        terminal = await rig.play(trajectory(sequence([(1, 4, 8)])))
        assert statuses(await rig.score(terminal)) == [(1, "exact")]
    assert context.counters["canary_failures"] == 1
