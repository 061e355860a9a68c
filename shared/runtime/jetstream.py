"""What is said to JetStream and how its answers read. Pure: no connection, no clock.

Subjects and payloads of the JetStream API (docs.nats.io, ADR-1, ADR-13, ADR-31, ADR-37); spoken
directly because the client library's helpers hang or stall in the failures that matter here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from shared.runtime.bus import Record
from shared.wire.subjects import StreamSpec, Subjects

API = "$JS.API"
NS = 1_000_000_000

HEADER_MSG_ID = "Nats-Msg-Id"
HEADER_EXPECTED = "Nats-Expected-Last-Subject-Sequence"

DUPLICATE_WINDOW_S = 120
"""How long the server remembers message ids; must exceed the retry bound of an append."""

WRONG_LAST_SEQUENCE = (10071, 10164)
STORE_FAILED = 10077
"""Any refusal of the store: the description tells a full stream from one that is closing."""
NO_STORAGE = (10023, 10047)
STREAM_EXISTS_DIFFERENTLY = 10058
STREAM_NOT_FOUND = 10059
CONSUMER_NOT_FOUND = 10014


@dataclass(frozen=True, slots=True)
class ApiError:
    """An error the server answered."""

    code: int
    """HTTP-like: 5xx may pass."""
    err_code: int
    description: str

    @property
    def is_full(self) -> bool:
        """The stream, the server's quota or its disk has no room."""
        text = self.description
        return self.err_code in NO_STORAGE or (
            self.err_code == STORE_FAILED and ("maximum" in text or "no space" in text)
        )

    @property
    def is_transient(self) -> bool:
        return self.code >= 500 and not self.is_full


def parse_answer(data: bytes) -> dict[str, Any] | ApiError:
    """Read the JSON answer of an API call or of a stored publish."""
    answer = cast("dict[str, Any]", json.loads(data))
    error = answer.get("error")
    if error is None:
        return answer
    return ApiError(
        int(error.get("code", 500)),
        int(error.get("err_code", 0)),
        str(error.get("description", "")),
    )


def stream_config(subjects: Subjects, spec: StreamSpec, max_bytes: int) -> dict[str, Any]:
    """One stream of a run: file storage, one replica, refusing (not evicting) when full."""
    return {
        "name": subjects.stream(spec.name),
        "description": spec.why,
        "subjects": [f"{subjects.prefix}.{spec.subject}"],
        "retention": spec.retention,
        "storage": "file",
        "num_replicas": 1,
        "max_bytes": max_bytes,
        "discard": "new",
        "duplicate_window": DUPLICATE_WINDOW_S * NS,
        "allow_direct": True,
    }


def bucket_config(bucket: str) -> dict[str, Any]:
    """The stream behind a key-value bucket that keeps the latest value of a key."""
    return {
        "name": f"KV_{bucket}",
        "subjects": [f"$KV.{bucket}.>"],
        "retention": "limits",
        "storage": "file",
        "num_replicas": 1,
        "max_msgs_per_subject": 1,
        "max_bytes": 64 * 1024 * 1024,
        "discard": "new",
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "allow_direct": True,
    }


def reader_config(
    name: str, start_seq: int, subject: str | None, inactive_s: float
) -> dict[str, Any]:
    """An ephemeral consumer that reads in order and acknowledges nothing."""
    config: dict[str, Any] = {
        "name": name,
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": max(1, start_seq),
        "ack_policy": "none",
        "replay_policy": "instant",
        "inactive_threshold": int(inactive_s * NS),
        "mem_storage": True,
        "num_replicas": 1,
    }
    if subject is not None:
        config["filter_subject"] = subject
    return config


def queue_config(name: str, ack_wait_s: float, max_ack_pending: int) -> dict[str, Any]:
    """The durable consumer of a work queue; jobs are delivered for ever."""
    return {
        "name": name,
        "durable_name": name,
        "deliver_policy": "all",
        "ack_policy": "explicit",
        "ack_wait": int(ack_wait_s * NS),
        "max_deliver": -1,
        "max_ack_pending": max_ack_pending,
        "replay_policy": "instant",
    }


def pull_request(
    batch: int,
    *,
    expires_s: float = 0.0,
    no_wait: bool = False,
    max_bytes: int = 0,
    heartbeat_s: float = 0.0,
) -> bytes:
    """Ask a consumer for its next messages."""
    request: dict[str, Any] = {"batch": batch}
    if expires_s:
        request["expires"] = int(expires_s * NS)
    if no_wait:
        request["no_wait"] = True
    if max_bytes:
        request["max_bytes"] = max_bytes
    if heartbeat_s:
        request["idle_heartbeat"] = int(heartbeat_s * NS)
    return json.dumps(request).encode()


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the reply subject of a delivered message says."""

    num_delivered: int
    stream_seq: int
    consumer_seq: int
    stored_at: float
    num_pending: int
    """Messages of the consumer's filter still behind this one."""


def parse_delivery(reply: str) -> Delivery | None:
    """Read `$JS.ACK.…` in its short and its long form; None for anything else."""
    tokens = reply.split(".")
    if tokens[:2] != ["$JS", "ACK"] or len(tokens) < 9:
        return None
    # Long form: two further tokens (domain, account hash) before the stream, one random at the end.
    numbers = tokens[4:9] if len(tokens) == 9 else tokens[6:11]
    delivered, stream_seq, consumer_seq, timestamp_ns, pending = map(int, numbers)
    return Delivery(delivered, stream_seq, consumer_seq, timestamp_ns / NS, pending)


def parse_direct(headers: dict[str, str], data: bytes) -> Record:
    """Read the answer of a direct get."""
    return Record(
        int(headers["Nats-Sequence"]),
        headers["Nats-Subject"],
        data,
        datetime.fromisoformat(headers["Nats-Time-Stamp"]).timestamp(),
    )
