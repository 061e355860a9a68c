"""The rendered accounts on a real server: each does its work, and nothing else."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress

import pytest

from shared.runtime.errors import BusUnavailable, Conflict, Denied
from shared.runtime.logs import Log
from shared.runtime.nats_bus import NatsBus, connect
from shared.runtime.nats_permissions import ACCOUNTS, Account
from shared.wire.subjects import STREAMS, Subjects
from tests.charts.conftest import RUN, Dial, Guarded

pytestmark = pytest.mark.chart

S = Subjects(RUN)
ALLOWED_APPENDS: dict[Account, set[str]] = {
    "learner": {
        "tickets",
        "terminals",
        "scores",
        "journal",
        "manifests",
        "chunks",
        "blobs",
        "stats",
    },
    "rollout": {"blobs"},
    "env_agents": {"terminals", "partials", "blobs"},
    "logit_oracle": {"scores", "blobs"},
    "recorder": set(),
    "operator": set(),
}
"""Of `SAMPLES`, by hand from the design: not derived from the code under test."""
SAMPLES = {
    "tickets": S.ticket("t1"),
    "terminals": S.terminal("t1"),
    "scores": S.score("t1"),
    "partials": S.partial("t1"),
    "journal": S.journal,
    "manifests": S.manifest,
    "chunks": S.chunk("u1", 0),
    "blobs": S.blob("d1", 0),
    "stats": S.stats("step"),
}


@pytest.fixture
async def learner(dial: Dial) -> NatsBus:
    bus = await dial("learner")
    await bus.create_streams()
    return bus


async def test_every_append_that_the_design_does_not_grant_is_denied(learner: NatsBus, dial: Dial):
    for account in ACCOUNTS:
        bus = learner if account == "learner" else await dial(account)
        accepted: set[str] = set()
        for stream, subject in SAMPLES.items():
            with suppress(Denied):
                await bus.append(subject, b"x")
                accepted.add(stream)
        assert accepted == ALLOWED_APPENDS[account], account


async def test_a_rollout_cannot_publish_weights_nor_an_env_scores(learner: NatsBus, dial: Dial):
    rollout, env = await dial("rollout"), await dial("env_agents")
    for subject in (S.manifest, S.keyframe, S.chunk("u9", 0)):
        with pytest.raises(Denied):
            await rollout.append(subject, b"poison")
    with pytest.raises(Denied):
        await env.append(S.score("t9"), b"made up")
    assert await learner.last(S.chunk("u9", 0)) is None
    assert rollout.counters["denied"] == 3


@pytest.mark.parametrize("account", [a for a in ACCOUNTS if a != "learner"])
async def test_only_the_learner_creates_and_purges_and_writes_the_control_document(
    learner: NatsBus, dial: Dial, account: Account
):
    bus = await dial(account)
    for stream in ("terminals", "chunks", "manifests"):
        with pytest.raises((Denied, BusUnavailable)):
            await bus.purge(stream, 2)
    with pytest.raises((Denied, BusUnavailable)):
        await bus.create_streams()
    with pytest.raises((Denied, BusUnavailable)):
        await bus.put_control("control", b"{}")


async def test_what_rollouts_and_env_agents_say_to_each_other_goes_through(
    dial: Dial, learner: NatsBus
):
    env, rollout = await dial("env_agents"), await dial("rollout")
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def answer(message) -> None:
        for word in (b"accepted", b"heartbeat", b"done"):
            await rollout.publish(message.reply, word)

    async def take(message) -> None:
        await heard.put(message.payload)

    await rollout.subscribe(S.sample("policy"), answer, queue="rollout")
    await rollout.subscribe(S.cancel("pod-1"), answer)
    await rollout.subscribe(S.sample_pod("pod-1"), answer)
    inbox = env.new_inbox()
    await env.open_inbox(inbox, take)
    for subject in (S.sample("policy"), S.sample_pod("pod-1")):
        await env.publish_request(subject, b"ask", inbox)
        words = [await asyncio.wait_for(heard.get(), 5) for _ in range(3)]
        assert words == [b"accepted", b"heartbeat", b"done"]
    await env.subscribe(S.control, take)
    await learner.publish(S.control, b"control")
    assert await asyncio.wait_for(heard.get(), 5) == b"control"
    assert not env.counters["denied"]
    assert not rollout.counters["denied"]


async def test_nobody_overhears_anothers_requests_replies_or_leases(dial: Dial, learner: NatsBus):
    async def ignore(_message) -> None: ...

    rollout, env = await dial("rollout"), await dial("env_agents")
    for bus, subject in (
        (rollout, S.leases), (env, S.leases), (env, S.sample("policy")),
        (rollout, "_INBOX.env_agents.>"), (env, ">"), (rollout, f"{S.prefix}.terminal.*"),
    ):  # fmt: skip
        with pytest.raises(Denied):
            await bus.subscribe(subject, ignore)


@pytest.mark.parametrize(
    ("account", "stream", "durable"),
    [("env_agents", "tickets", "env_agents"), ("logit_oracle", "terminals", "logit_oracle")],
)
async def test_work_queues_work_with_their_own_account_and_no_other(
    dial: Dial, learner: NatsBus, account: Account, stream, durable: str
):
    subject = S.ticket(f"q-{durable}") if stream == "tickets" else S.terminal(f"q-{durable}")
    await learner.append(subject, b"job")
    bus, other = await dial(account), await dial("rollout")
    queue = await bus.work_queue(stream, durable, ack_wait_s=5, max_ack_pending=10)
    seen = []
    while subject not in seen:
        for job in await queue.next(8, 2):
            seen.append(job.record.subject)
            await job.in_progress()
            await job.ack()
    assert await queue.pending() == (0, 0)
    await queue.close()
    with pytest.raises((Denied, BusUnavailable)):
        await other.work_queue(stream, durable, ack_wait_s=5, max_ack_pending=10)
    assert not bus.counters["denied"]


@pytest.mark.parametrize(
    ("account", "streams"),
    [
        ("rollout", ["manifests"]),
        ("logit_oracle", ["manifests"]),
        ("recorder", ["terminals", "scores", "journal", "manifests", "stats", "dead"]),
        ("operator", ["journal"]),
    ],
)
async def test_readers_read_their_streams(dial: Dial, learner: NatsBus, account: Account, streams):
    appended = {
        "terminals": S.terminal(f"r-{account}"), "scores": S.score(f"r-{account}"),
        "journal": S.journal, "manifests": S.manifest, "stats": S.stats("step"),
        "dead": S.dead("learner"),
    }  # fmt: skip
    bus = await dial(account)
    for stream in streams:
        seq = await learner.append(appended[stream], b"record")
        async with aclosing(bus.read(stream, seq)) as batches:
            async for batch in batches:
                assert batch[0].seq == seq
                break
        assert (await bus.stream_state(stream)).last_seq >= seq
    assert not bus.counters["denied"]


async def test_followers_fetch_weights_and_everybody_reads_the_control_document(
    dial: Dial, learner: NatsBus
):
    await learner.append(S.chunk("up1", 0), b"weights")
    await learner.put_control("control", b"document")
    for account in ACCOUNTS:
        bus = await dial(account)
        assert await bus.get_control("control") == b"document"
        await bus.wait_for_streams(1)
        if account in ("rollout", "logit_oracle", "recorder"):
            record = await bus.last(S.chunk("up1", 0))
            assert record is not None
            assert record.payload == b"weights"
        else:
            continue
    recorder = await dial("recorder")
    await recorder.put_control("archived", b"positions")
    assert await learner.get_control("archived") == b"positions"


async def test_the_fence_of_terminals_holds_for_env_agents(dial: Dial, learner: NatsBus):
    env = await dial("env_agents")
    await env.append(S.terminal("fenced"), b"first", expect_last_subject_seq=0)
    with pytest.raises(Conflict):
        await env.append(S.terminal("fenced"), b"second", expect_last_subject_seq=0)
    record = await env.last(S.terminal("fenced"))
    assert record is not None
    assert record.payload == b"first"


async def test_a_payload_beyond_the_limit_travels_as_a_blob_with_the_writers_own_account(
    dial: Dial, learner: NatsBus
):
    env, oracle = await dial("env_agents"), await dial("logit_oracle")
    large = bytes(range(256)) * (learner.max_payload // 256)
    await env.append(S.terminal("large"), large)
    await oracle.append(S.score("large"), large)
    for subject in (S.terminal("large"), S.score("large")):
        record = await learner.last(subject)
        assert record is not None
        assert record.payload == large


async def test_a_wrong_password_gets_nobody_in(guarded: Guarded, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text("pWrong")
    access = guarded.access("learner").model_copy(
        update={"password_file": str(wrong), "connect_timeout_s": 1.5}
    )
    with pytest.raises(BusUnavailable, match="Authorization"):
        await connect(access, Subjects(RUN), "learner", Log("test"))


async def test_another_runs_streams_are_out_of_reach(dial: Dial, learner: NatsBus):
    elsewhere = Subjects("other-run")
    with pytest.raises(Denied):
        await learner._calls.append(
            elsewhere.stream("journal"), elsewhere.journal, b"x", None, None
        )


def test_the_table_covers_every_stream():
    streams = {spec.name for spec in STREAMS}
    assert set(SAMPLES) == streams - {"dead"}
