"""The bytes of every message type, kept: whoever changes one changes the wire version."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

import shared.wire
from shared.wire.base import Array, Message
from shared.wire.codec import content_digest, decode, encode
from shared.wire.errors import ForeignMajor, Malformed, Oversized, UnexpectedType
from shared.wire.fencing import PartialScores, PartialTrajectory, TokenScores
from shared.wire.journal import (
    Batch,
    Disposed,
    Evaluated,
    Issued,
    JournalBody,
    JournalEntry,
    Member,
    RunFinished,
    RunStarted,
    TrainedGroup,
)
from shared.wire.messages import (
    Accepted,
    Behind,
    CancelRequest,
    Done,
    Heartbeat,
    Layout,
    Partial,
    Refused,
    RoutingHeld,
    SampledTokens,
    SampleReply,
    SampleRequest,
    Score,
    SequenceScore,
    TaskRef,
    Terminal,
    Ticket,
    VersionScore,
)
from shared.wire.telemetry import BlobRef, DeadLetter, Lease, StepReport
from shared.wire.trajectory import (
    Failure,
    Outcome,
    RoutingRecord,
    SamplingParams,
    Sequence,
    Span,
    Trajectory,
    Turn,
)
from shared.wire.versioning import WIRE_VERSION
from shared.wire.weights import Artefact, Canary, Control, Keyframe, Manifest, TensorSpec

GOLDEN = Path(__file__).with_name("golden.json")

I4 = Array.of([1, 2, 3, 4], "i4")
F4 = Array.of([0.0, -0.5, -0.25, 0.0], "f4")
MASK = Array.of([0, 1, 1, 0], "u1")
SPANS = (Span(version=3, start=1, stop=2), Span(version=4, start=2, stop=3))
SAMPLING = SamplingParams(max_new_tokens=8, stop_ids=(10,))
TICKET = Ticket(
    ticket_id="t-1", purpose="train", group_id="g-1", member=0, group_size=8,
    task=TaskRef(dataset="frozen_lake", split="train", index=5, seed=7, payload={"map": "SF"}),
    issue_version=3, min_version=3, deadline=1700000060.5, sampling=SAMPLING, seed=11,
)  # fmt: skip
ROUTING = (RoutingRecord(version=3, start=0, stop=2, experts=Array.of([[[1, 0]], [[2, 7]]], "u1")),)
SAMPLED = SampledTokens(
    token_ids=Array.of([5, 6], "i4"), logprobs=Array.of([-0.5, -1.0], "f4"),
    spans=(Span(version=3, start=0, stop=1), Span(version=4, start=1, stop=2)), routing=ROUTING,
)  # fmt: skip
TRAJECTORY = Trajectory(
    status="done", reward=1.0, rewards={"goal": 1.0}, task_digest="d" * 32, played_s=0.5,
    metrics={"turns": 1.0},
    sequences=(
        Sequence(
            token_ids=I4, loss_mask=MASK, spans=SPANS, arrays={"sampler_logprobs": F4},
            routing=ROUTING,
            turns=(Turn(start=1, stop=3, finish="stop", rewards={"r": 1.0}, pods=("rollout-1",)),),
        ),
    ),
)  # fmt: skip
DELTA = Artefact(
    kind="delta", upload_id="u1", num_chunks=2, num_bytes=99, digest="x", encoding="plain"
)


def terminal(outcome: Outcome) -> Terminal:
    return Terminal(
        ticket_id="t-1", attempt_id="env-1-a", purpose="train", group_id="g-1", member=0,
        issue_version=3, producer="env-1", outcome=outcome,
    )  # fmt: skip


def reply(body: Any) -> SampleReply:
    return SampleReply(request_id="r-1", pod="rollout-1", body=body)


def entry(body: JournalBody) -> JournalEntry:
    return JournalEntry(entry_id="e-1", written_at=1700000000.25, body=body)


MEMBER = Member(
    ticket_id="t-1", terminal_seq=5, terminal_digest="d" * 32, score_seq=6, reward=1.0,
    advantage=0.5,
)  # fmt: skip

SAMPLES: dict[str, Message] = {
    "ticket": TICKET,
    "terminal/trajectory": terminal(TRAJECTORY),
    "terminal/failure": terminal(Failure(reason="env_timeout", detail="10 s")),
    "score": Score(
        ticket_id="t-1", terminal_seq=5, terminal_digest="d" * 32,
        sequences=(
            SequenceScore(
                old_logprobs=F4,
                versions=(
                    VersionScore(version=3, status="exact", digest="v3"),
                    VersionScore(version=4, status="unscorable"),
                ),
            ),
        ),
        layout=Layout(backend="torch", dtype="float32", kind="packed", num_threads=1),
        producer="oracle-1", forward_tokens=7, compute_s=0.125,
    ),
    "partial_trajectory": PartialTrajectory(
        ticket_id="t-1", attempt_id="env-1-a", generation=4, producer="env-1", incarnation="i",
        sequences=TRAJECTORY.sequences,
    ),
    "partial_scores": PartialScores(
        version=3, digest="v3",
        scores=(
            TokenScores(
                ticket_id="t-1", attempt_id="env-1-a", sequence=0,
                positions=Array.of([1], "i4"), old_logprobs=Array.of([-0.5], "f8"),
                prefix_digest="d" * 32,
            ),
        ),
        layout=Layout(backend="torch", dtype="float64", kind="packed", num_threads=1),
        producer="learner-0",
    ),
    "sample_request": SampleRequest(
        request_id="r-1", ticket_id="t-1", token_ids=I4, sampling=SAMPLING, max_new_tokens=8,
        min_version=3, seed=11, seed_offset=2, expires=1700000030.0,
        routing_held=RoutingHeld(version=3, stop=2),
    ),
    "cancel": CancelRequest(request_id="r-1"),
    "reply/accepted": reply(Accepted(version=3)),
    "reply/heartbeat": reply(Heartbeat(num_sampled=2)),
    "reply/behind": reply(Behind(version=-1)),
    "reply/partial": reply(Partial(sampled=SAMPLED, reason="drain")),
    "reply/done": reply(Done(sampled=SAMPLED, finish="length")),
    "reply/refused": reply(Refused(reason="too long", retryable=False)),
    "journal/run_started": entry(
        RunStarted(incarnation="i", seed=1, model_digest="m", resumed_from=None, config={"a": 1})
    ),
    "journal/issued": entry(Issued(version=3, tickets=(TICKET,), cursor={"next": 6})),
    "journal/batch": entry(
        Batch(
            version=3, seed=2,
            groups=(
                TrainedGroup(
                    group_id="g-1", issue_version=3, members=(MEMBER,), failed=("t-2",),
                    masked_versions=(1,),
                ),
            ),
        )
    ),
    "journal/disposed": entry(
        Disposed(ticket_ids=("t-2",), outcome="failed", cause="deadline")
    ),
    "journal/evaluated": entry(
        Evaluated(version=3, name="base", task_indices=(0, 1), rewards=(0.0, 1.0))
    ),
    "journal/run_finished": entry(RunFinished(version=9, unfinished=("t-9",))),
    "keyframe": Keyframe(
        version=4,
        artefact=Artefact(
            kind="keyframe",
            upload_id="ee",
            num_chunks=0,
            num_bytes=2048,
            digest="0" * 32,
            location="ee/model.safetensors",
        ),
        digest="1" * 32,
        sha256="2" * 64,
        published_at=1700000000.25,
        producer="learner-0",
    ),
    "manifest": Manifest(
        version=4, parent=3, upload_id="u1", delta=DELTA, keyframe=None,
        tensors=(TensorSpec(name="w", dtype="F32", shape=(2, 2), digest="0" * 16),),
        digest="v4", sha256=None,
        canary=Canary(
            token_ids=Array.of([[1, 2]], "i4"), logprobs=Array.of([[-0.5]], "f4"), tolerance=1e-5
        ),
        optimizer_steps=8, published_at=1700000000.5, producer="learner-1",
    ),
    "control": Control(
        phase="running", head_version=4, oldest_needed=1, updated_at=1700000000.5
    ),
    "lease": Lease(
        role="rollout", pod="rollout-1", incarnation="i", pid=42, sent_at=1700000000.5, ready=True,
        version=4, counters={"tokens": 100.0}, gauges={"waiting": 2.0}, busy_s=1.5,
    ),
    "step_report": StepReport(
        version=4, started_at=1.0, trained_at=2.0, published_at=3.0, scalars={"kl": 0.01},
        arrays={"age": Array.of([1, 2], "i8")},
    ),
    "dead_letter": DeadLetter(
        service="learner", origin="lagwise.x.terminal.t-1", origin_seq=5, reason="not msgpack",
        payload=b"\xff", num_bytes=1, dropped_at=1700000000.5,
    ),
    "blob_ref": BlobRef(digest="d" * 32, num_bytes=10, num_chunks=2),
}  # fmt: skip

FREE_FORM = {"rewards", "arrays", "config", "payload", "cursor", "counters", "gauges", "scalars",
             "metrics"}  # fmt: skip
"""Maps whose keys belong to the sender: an unknown key there is content, not a newer field."""


def message_types() -> set[type[Message]]:
    for module in pkgutil.iter_modules(shared.wire.__path__, "shared.wire."):
        importlib.import_module(module.name)
    return set(Message.__subclasses__())


@pytest.fixture(scope="module")
def golden() -> dict[str, bytes]:
    if os.environ.get("WRITE_GOLDEN"):
        written = {name: encode(message).hex() for name, message in SAMPLES.items()}
        GOLDEN.write_text(json.dumps(written, indent=1) + "\n")
    return {name: bytes.fromhex(text) for name, text in json.loads(GOLDEN.read_text()).items()}


def test_every_message_type_and_every_branch_of_a_union_has_golden_bytes(golden):
    assert {type(message) for message in SAMPLES.values()} == message_types()
    assert set(golden) == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_bytes_of_a_message_do_not_change(golden, name):
    assert encode(SAMPLES[name]) == golden[name], "a wire change: raise the version, then rewrite"


@pytest.mark.parametrize("name", SAMPLES)
def test_golden_bytes_decode_to_the_same_message(golden, name):
    assert decode(golden[name], type(SAMPLES[name])) == SAMPLES[name]


def newer(value: Any) -> Any:
    """What a later minor version might send: one more field in every part."""
    if isinstance(value, dict):
        kept = {k: v if k in FREE_FORM else newer(v) for k, v in value.items()}
        return {**kept, "zz_added_in_a_later_minor": {"x": 1}}
    if isinstance(value, tuple):
        return tuple(newer(one) for one in value)
    return value


@pytest.mark.parametrize("name", SAMPLES)
def test_fields_of_a_newer_minor_are_ignored_at_every_level(golden, name):
    envelope = msgpack.unpackb(golden[name], use_list=False)
    envelope = {**envelope, "w": (WIRE_VERSION[0], 99), "b": newer(envelope["b"]), "zz": 1}
    assert decode(msgpack.packb(envelope), type(SAMPLES[name])) == SAMPLES[name]


@pytest.mark.parametrize("major", [0, WIRE_VERSION[0] - 1, WIRE_VERSION[0] + 1])
def test_another_major_is_refused_as_foreign_whatever_its_body(golden, major):
    envelope = {"w": (major, 0), "t": "Ticket", "b": "quite another body"}
    with pytest.raises(ForeignMajor) as caught:
        decode(msgpack.packb(envelope), Ticket)
    assert caught.value.theirs == (major, 0)


def test_a_type_not_asked_for_is_refused_by_name(golden):
    with pytest.raises(UnexpectedType, match=r"'Lease'.*Ticket, Terminal"):
        decode(golden["lease"], Ticket, Terminal)


def test_a_payload_above_the_bound_is_refused_before_it_is_parsed():
    with pytest.raises(Oversized) as caught:
        decode(b"\xc1" * 101, Ticket, bound_bytes=100)
    assert (caught.value.num_bytes, caught.value.bound_bytes) == (101, 100)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"\x80", msgpack.packb([1]), msgpack.packb({"t": "Ticket", "b": {}}),
     msgpack.packb({"w": [1], "t": "Ticket", "b": {}}),
     msgpack.packb({"w": WIRE_VERSION, "t": "Ticket"}),
     msgpack.packb({"w": ["1", "0"], "t": "Ticket", "b": {}})],
)  # fmt: skip
def test_what_is_no_message_is_malformed(payload):
    with pytest.raises(Malformed):
        decode(payload, Ticket)


def test_a_missing_field_is_named(golden):
    envelope = msgpack.unpackb(golden["ticket"], use_list=False)
    del envelope["b"]["task"]["seed"]
    with pytest.raises(Malformed, match=r"task\.seed"):
        decode(msgpack.packb(envelope), Ticket)


def test_numbers_are_not_guessed_from_text(golden):
    envelope = msgpack.unpackb(golden["ticket"], use_list=False)
    envelope["b"]["seed"] = "11"
    with pytest.raises(Malformed, match="seed"):
        decode(msgpack.packb(envelope), Ticket)


def test_the_content_digest_is_a_fixed_function_of_the_bytes():
    assert content_digest(b"lagwise") == "32a6bd8408e2c0a08e582a12d3e910ce"


def test_arrays_travel_bit_for_bit_also_when_they_are_not_numbers():
    odd = np.array([np.nan, np.inf, -0.0, 1e-45], dtype=np.float32)
    assert Array.of(odd, "f4").numpy().tobytes() == odd.tobytes()
