"""The bus: what services may ask of it, whatever carries it.

Three shapes of communication: core messages (nobody stores them), logs (appended with
compare-and-set, read in order from a position), one work queue. `NatsBus` and `MemoryBus`
implement this and pass the same contract suite (`tests/runtime/test_bus_contract.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from shared.wire.subjects import StreamName, Subjects


@dataclass(frozen=True, slots=True)
class Record:
    """A stored message."""

    seq: int
    """Sequence in its stream, from 1."""
    subject: str
    payload: bytes
    stored_at: float
    """Unix seconds, by the server's clock."""


@dataclass(frozen=True, slots=True)
class CoreMessage:
    """A message nobody stored."""

    subject: str
    payload: bytes
    reply: str
    """Inbox to answer to; empty when no answer is expected."""


class Subscription(Protocol):
    """A running core subscription."""

    async def close(self) -> None: ...


class Job(Protocol):
    """One delivery from a work queue; exactly one of ack, nak, term ends it."""

    record: Record
    num_delivered: int
    """1 on first delivery."""

    async def ack(self) -> None:
        """Acknowledge and wait for the server's confirmation (bounded).

        A server that was killed may have forgotten the delivery and never confirm; the job is
        then let go, counted in `unconfirmed_acks`, and delivered again as if for the first time.
        """
        ...

    async def nak(self, delay_s: float = 0.0) -> None: ...

    async def term(self) -> None:
        """Never deliver again."""
        ...

    async def in_progress(self) -> None:
        """Reset the redelivery timer."""
        ...


class WorkQueue(Protocol):
    """A shared durable consumer: every job goes to one of its readers."""

    async def next(self, max_jobs: int, timeout_s: float) -> list[Job]:
        """Return as soon as at least one job is there, at most `max_jobs`; empty on timeout."""
        ...

    async def pending(self) -> tuple[int, int]:
        """(jobs never delivered, jobs delivered and not acknowledged)."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a stream stands."""

    first_seq: int
    last_seq: int
    num_messages: int
    num_bytes: int


class Bus(Protocol):
    """Everything a service may ask. Every wait is bounded by the bus configuration."""

    subjects: Subjects
    max_payload: int
    counters: Counter[str]
    """Monotonic, for `/metrics`: reconnects, publish_retries, redeliveries, handler_errors, ..."""

    @property
    def connected(self) -> bool: ...

    # --- life cycle
    async def create_streams(self) -> None:
        """Create streams and the control bucket (idempotent; learner and supervisor only)."""
        ...

    async def wait_for_streams(self, timeout_s: float) -> None:
        """Wait until somebody created them.

        Raises:
            BusUnavailable: not within `timeout_s`.
        """
        ...

    async def close(self) -> None:
        """Drain with a bound and disconnect."""
        ...

    # --- core
    async def publish(self, subject: str, payload: bytes) -> None:
        """Fire and forget."""
        ...

    async def subscribe(
        self,
        subject: str,
        handler: Callable[[CoreMessage], Awaitable[None]],
        *,
        queue: str = "",
    ) -> Subscription:
        """Call `handler` per message, in order. It must not block for long: hand work over.

        An exception of the handler is logged and counted, never ends the subscription.
        """
        ...

    def new_inbox(self) -> str:
        """A fresh subject for replies; one wildcard subscription per bus serves all of them."""
        ...

    async def open_inbox(
        self, inbox: str, handler: Callable[[CoreMessage], Awaitable[None]]
    ) -> Subscription:
        """Receive replies to `inbox` until closed."""
        ...

    async def publish_request(self, subject: str, payload: bytes, reply: str) -> None:
        """Publish with a reply inbox. With no subscriber the inbox receives an empty payload."""
        ...

    # --- logs
    async def append(
        self,
        subject: str,
        payload: bytes,
        *,
        expect_last_subject_seq: int | None = None,
        msg_id: str | None = None,
    ) -> int:
        """Store and return the sequence; retries within the bound on lost acknowledgements.

        A retry after a lost acknowledgement of a compare-and-set append can raise `Conflict`
        though the first attempt was stored: callers read back with `last` and compare.
        Payloads above half of `max_payload` are stored as blobs and a pointer, transparently.

        Raises:
            Conflict: the subject's last sequence differs from `expect_last_subject_seq`
                (0 = the subject has no message).
            StreamFull, BusUnavailable, PayloadTooLarge, Denied.
        """
        ...

    async def last(self, subject: str) -> Record | None:
        """Return the newest stored message of a subject, blobs resolved, or None."""
        ...

    async def get(self, stream: StreamName, seq: int) -> Record | None:
        """Return one stored message, blobs resolved, or None when it is gone."""
        ...

    async def blob_of(self, stream: StreamName, seq: int) -> str | None:
        """Return the digest of the blob that a stored message points at.

        None when the message is whole, or gone.
        """
        ...

    def read(
        self, stream: StreamName, start_seq: int, *, subject: str | None = None
    ) -> AsyncGenerator[list[Record], None]:
        """Read in order from `start_seq` on, for ever; yields non-empty batches, in order, no gap.

        Survives reconnects and server restarts by re-reading from the last position. Sequences
        purged before they were read are skipped. `subject` filters (wildcards allowed). Close it
        (`contextlib.aclosing`) when leaving the loop early.
        """
        ...

    async def stream_state(self, stream: StreamName) -> StreamState: ...

    async def subjects_of(self, stream: StreamName, pattern: str) -> list[str]:
        """Return the subjects that hold messages and match `pattern`, sorted; reads no payload.

        One that comes or goes while this runs may be there or not.
        """
        ...

    async def purge(
        self, stream: StreamName, below_seq: int, *, subject: str | None = None
    ) -> None:
        """Delete messages with a sequence < `below_seq` (of `subject` only, when given)."""
        ...

    # --- work queue
    async def work_queue(
        self, stream: StreamName, durable: str, *, ack_wait_s: float, max_ack_pending: int
    ) -> WorkQueue:
        """Join (or create) the durable consumer; `max_deliver` is unlimited."""
        ...

    # --- control bucket
    async def put_control(self, key: str, payload: bytes) -> None: ...

    async def get_control(self, key: str) -> bytes | None: ...
