"""Probes, metric names, and the parts of the bus that are plain functions."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from shared.runtime import blobs
from shared.runtime.context import Context
from shared.runtime.errors import ConfigError
from shared.runtime.http import HttpServer, Pulse, respond
from shared.runtime.jetstream import ApiError, Delivery, parse_delivery
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.metrics import metric_name, register
from shared.runtime.nats_reader import Step, after_status
from shared.runtime.streams import matches, stream_of
from shared.wire.codec import encode
from shared.wire.subjects import STREAMS, Subjects
from shared.wire.telemetry import BlobRef


def samples(registry: CollectorRegistry) -> dict[str, float]:
    text = generate_latest(registry).decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_counters_gauges_busy_time_and_bus_are_exported_under_their_names(
    memory_bus: MemoryBus,
):
    context = Context("logit_oracle", "o1", "i1", memory_bus, Log("logit_oracle"))
    register(context, context.registry)
    context.count("tokens", 12)
    context.count("scores_total", 2)
    context.gauges["backlog"] = 3.0
    context.busy_s = 1.5
    context.version = 9
    memory_bus.counters["publish_retries"] += 4
    got = samples(context.registry)
    expected = {
        "lagwise_logit_oracle_tokens_total": 12.0,
        "lagwise_logit_oracle_scores_total": 2.0,
        "lagwise_logit_oracle_backlog": 3.0,
        "lagwise_logit_oracle_busy_seconds_total": 1.5,
        "lagwise_logit_oracle_policy_version": 9.0,
        "lagwise_logit_oracle_bus_publish_retries_total": 4.0,
        "lagwise_logit_oracle_bus_connected": 1.0,
        "lagwise_logit_oracle_ready": 0.0,
        "lagwise_build_info": 1.0,
    }
    assert {name: got.get(name) for name in expected} == expected
    memory_bus.server.set_up(False)
    assert samples(context.registry)["lagwise_logit_oracle_bus_connected"] == 0.0


def test_odd_characters_never_reach_a_metric_name():
    assert metric_name("learner", "Queue Depth/s_total") == "lagwise_learner_queue_depth_s"


def test_probes_answer_ok_or_the_reason():
    def ask(path: str, alive: str = "", ready: str = "") -> tuple[int, bytes]:
        status, _, body = respond(path, alive, ready, lambda: b"metrics")
        return status, body

    assert ask("/healthz", ready="no weights yet") == (200, b"ok\n")
    assert ask("/readyz", ready="no weights yet") == (503, b"no weights yet\n")
    assert ask("/readyz") == (200, b"ok\n")
    assert ask("/healthz", alive="stuck")[0] == ask("/readyz", alive="stuck")[0] == 503
    assert ask("/metrics?x=1", alive="stuck") == (200, b"metrics")
    assert ask("/other")[0] == 404


def test_the_startup_probe_turns_once_and_the_readiness_probe_goes_back_and_forth():
    def ask(path: str, started: bool, alive: str = "", ready: str = "") -> tuple[int, bytes]:
        status, _, body = respond(path, alive, ready, lambda: b"", started=started)
        return status, body

    assert ask("/startupz", False, ready="loading") == (503, b"loading\n")
    assert ask("/startupz", True, ready="no bus") == (200, b"ok\n")
    assert ask("/readyz", True, ready="no bus") == (503, b"no bus\n")
    problem = "loading"
    server = HttpServer("127.0.0.1", 0, CollectorRegistry(), Pulse(30), lambda: problem)

    def get(path: str) -> int:
        try:
            url = f"http://127.0.0.1:{server.port}{path}"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    try:
        assert (get("/startupz"), get("/readyz"), get("/healthz")) == (503, 503, 200)
        problem = ""
        assert (get("/startupz"), get("/readyz"), get("/healthz")) == (200, 200, 200)
        problem = "the bus is away"
        assert (get("/startupz"), get("/readyz"), get("/healthz")) == (200, 503, 200)
    finally:
        server.close()


async def test_seconds_are_spelled_out_for_prometheus(memory_bus):
    context = Context("logit_oracle", "o1", "i1", memory_bus, Log("logit_oracle"))
    register(context, context.registry)
    context.count("swap_s", 2.5)
    context.gauges["wait_s"] = 1.0
    got = samples(context.registry)
    assert got["lagwise_logit_oracle_swap_seconds_total"] == 2.5
    assert got["lagwise_logit_oracle_wait_seconds"] == 1.0


def test_the_pulse_is_lost_after_its_bound_and_found_with_the_next_beat():
    now = [0.0]
    pulse = Pulse(30.0, clock=lambda: now[0])
    now[0] = 30.0
    assert pulse.problem() == ""
    now[0] = 31.0
    assert "31 s" in pulse.problem()
    pulse.beat()
    assert pulse.problem() == ""


def test_the_http_server_takes_a_free_port_and_refuses_a_taken_one_by_name():
    first = HttpServer("127.0.0.1", 0, CollectorRegistry(), Pulse(30), lambda: "")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{first.port}/readyz", timeout=5) as answer:
            assert answer.read() == b"ok\n"
        with pytest.raises(ConfigError, match=f"telemetry.port {first.port}"):
            HttpServer("127.0.0.1", first.port, CollectorRegistry(), Pulse(30), lambda: "")
    finally:
        first.close()


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.*", "a", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        ("*.b.*", "a.b.c", True),
        ("*.b.*", "a.x.c", False),
    ],
)
def test_filters_match_like_the_server_does(pattern, subject, expected):
    assert matches(pattern, subject) is expected


def test_every_stored_subject_of_a_run_has_exactly_its_stream():
    subjects = Subjects("x")
    named = {
        "tickets": subjects.ticket("t"), "terminals": subjects.terminal("t"),
        "scores": subjects.score("t"), "journal": subjects.journal,
        "manifests": subjects.manifest, "chunks": subjects.chunk("u", 0),
        "blobs": subjects.blob("d", 0), "stats": subjects.stats("step"),
        "dead": subjects.dead("learner"), "partials": subjects.partial("t"),
    }  # fmt: skip
    assert set(named) == {spec.name for spec in STREAMS}
    for name, subject in named.items():
        assert stream_of(subjects, subject) == name
        [spec] = [spec for spec in STREAMS if spec.name == name]
        assert matches(f"{subjects.prefix}.{spec.subject}", subject)
    with pytest.raises(ValueError, match="no stream"):
        stream_of(Subjects("y"), subjects.journal)


def test_deliveries_are_read_in_the_short_and_the_long_form():
    expected = Delivery(2, 30, 4, 1.5, 6)
    assert parse_delivery("$JS.ACK.stream.consumer.2.30.4.1500000000.6") == expected
    long = "$JS.ACK.hub.account.stream.consumer.2.30.4.1500000000.6.random"
    assert parse_delivery(long) == expected
    assert parse_delivery("") is None
    assert parse_delivery("_INBOX.x.1") is None


@pytest.mark.parametrize(
    ("status", "description", "step"),
    [
        ("100", "Idle Heartbeat", Step.WAIT),
        ("404", "No Messages", Step.PULL),
        ("408", "Request Timeout", Step.PULL),
        ("409", "Message Size Exceeds MaxBytes", Step.PULL),
        ("409", "Batch Completed", Step.PULL),
        ("409", "Consumer Deleted", Step.REBUILD),
        ("409", "Server Shutdown", Step.REBUILD),
        ("503", "", Step.REBUILD),
    ],
)
def test_a_reader_knows_what_each_status_asks_of_it(status, description, step):
    assert after_status(status, description) is step


def test_a_full_store_is_told_from_one_that_is_closing():
    full = ApiError(503, 10077, "maximum bytes exceeded")
    closing = ApiError(503, 10077, "store is closed")
    assert (full.is_full, full.is_transient) == (True, False)
    assert (closing.is_full, closing.is_transient) == (False, True)


def test_only_a_pointer_is_taken_for_one():
    ref = encode(BlobRef(digest="d" * 32, num_bytes=10**9, num_chunks=99))
    assert blobs.is_ref(ref)
    assert not blobs.is_ref(b"")
    assert not blobs.is_ref(ref + bytes(300))


async def test_a_chunk_with_other_bytes_than_its_digest_says_is_never_handed_out():
    subjects = Subjects("x")
    kept: dict[str, bytes] = {}

    async def append(subject: str, chunk: bytes, msg_id: str) -> int:
        kept[subject] = chunk
        return len(kept)

    async def fetch(subject: str) -> bytes | None:
        return kept.get(subject)

    pointer = await blobs.store(b"0123456789", subjects, 6, append)
    assert [len(chunk) for chunk in kept.values()] == [3, 3, 3, 1]
    assert await blobs.resolve(pointer, subjects, fetch) == b"0123456789"
    name = next(iter(kept))
    kept[name] = b"xxx"
    assert await blobs.resolve(pointer, subjects, fetch) is None
