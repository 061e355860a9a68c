"""`lagwise status`: what a live run says about itself, asked over the bus."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import msgpack
from pydantic import ValidationError

from shared.cli.run_folder import read_facts
from shared.runtime.bus import Bus, CoreMessage
from shared.runtime.config import describe
from shared.runtime.errors import BusUnavailable, ConfigError
from shared.runtime.logs import Log
from shared.runtime.nats_bus import connect
from shared.runtime.sections import BusSection
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.journal import Batch, Disposed, Issued, JournalBody, JournalEntry
from shared.wire.subjects import STREAMS, Subjects
from shared.wire.telemetry import Lease
from shared.wire.weights import Control, Manifest

_STREAMS_BOUND_S = 2.0


@dataclass(frozen=True)
class Status:
    """One look at a run."""

    run: str
    nats_url: str
    phase: str
    head_version: int
    oldest_needed: int
    services: list[dict[str, Any]]
    """One per live process, by pod."""
    streams: dict[str, dict[str, int]]
    """Messages and bytes by stream."""
    ledger: dict[str, int]
    """Training tickets: issued, trained, dropped, failed, open."""
    archived: dict[str, int] = field(default_factory=dict[str, int])


def address(run_dir: Path | None, nats_url: str | None, run: str | None) -> tuple[str, str]:
    """Return (NATS URL, run name) from what was given; flags win over the run folder.

    Raises:
        ConfigError: neither a run folder nor both flags, or the folder's run has ended.
    """
    if nats_url and run:
        return nats_url, run
    folder = run_dir or newest_run()
    facts = read_facts(folder) if folder else {}
    if not facts:
        where = f"{folder} is no run folder" if folder else "there is no run under runs/"
        raise ConfigError(f"status: {where}: give --run-dir, or --nats URL and --run NAME")
    if facts.get("exit") and not nats_url:
        raise ConfigError(
            f"status: {folder} is not running (its end: {facts['exit']}): look at its report "
            "(lagwise report), or go on with it (lagwise up --resume)"
        )
    return nats_url or facts["nats_url"], run or facts["run"]


def access(url: str, user: str, password_file: str) -> BusSection:
    """Return how to reach NATS.

    Raises:
        ConfigError: a user without a password file, or the other way round.
    """
    try:
        return BusSection(url=url, user=user, password_file=password_file)
    except ValidationError as error:
        raise ConfigError(f"status: {describe(error)}") from error


def newest_run(root: Path = Path("runs")) -> Path | None:
    """Return the run folder that was written to last, None when there is none."""
    found = sorted(root.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


async def ask(access: BusSection, run: str, *, listen_s: float, timeout_s: float) -> Status:
    """Listen to leases for a while and read what is stored; waits as `timeout_s` says.

    Raises:
        ConfigError: NATS does not answer, or has no such run.
    """
    try:
        subjects = Subjects(run)
    except ValueError as error:
        raise ConfigError(f"status: {error}") from error
    bounds = {"connect_timeout_s": timeout_s, "retry_s": timeout_s}
    section = access.model_copy(update=bounds)
    try:
        bus = await connect(section, subjects, "status", Log("status"))
    except BusUnavailable as error:
        raise ConfigError(f"status: {error}") from error
    try:
        await bus.wait_for_streams(_STREAMS_BOUND_S)
        return await _look(bus, access.url, listen_s)
    except BusUnavailable as error:
        raise ConfigError(f"status: run {run!r} on {access.url}: {error}") from error
    finally:
        await bus.close()


async def _look(bus: Bus, nats_url: str, listen_s: float) -> Status:
    leases: dict[str, Lease] = {}

    async def take(message: CoreMessage) -> None:
        try:
            lease = decode(message.payload, Lease)
        except WireError:
            return  # another version of the software: it shows as silent
        leases[lease.pod] = lease

    subscription = await bus.subscribe(bus.subjects.leases, take)
    until = time.monotonic() + listen_s
    control_bytes = await bus.get_control("control")
    control = None if control_bytes is None else decode(control_bytes, Control)
    head = await bus.last(bus.subjects.manifest)
    archived = await bus.get_control("archived")
    ledger = count_ledger(await _journal(bus))
    streams = {spec.name: await bus.stream_state(spec.name) for spec in STREAMS}
    await asyncio.sleep(max(0.0, until - time.monotonic()))
    await subscription.close()
    return Status(
        run=bus.subjects.run,
        nats_url=nats_url,
        phase="starting" if control is None else control.phase,
        head_version=-1 if head is None else decode(head.payload, Manifest).version,
        oldest_needed=0 if control is None else control.oldest_needed,
        services=[_service(leases[pod]) for pod in sorted(leases)],
        streams={
            name: {"messages": state.num_messages, "bytes": state.num_bytes}
            for name, state in streams.items()
        },
        ledger=ledger,
        archived={} if archived is None else cast("dict[str, int]", msgpack.unpackb(archived)),
    )


async def _journal(bus: Bus) -> list[JournalBody]:
    last = (await bus.stream_state("journal")).last_seq
    bodies: list[JournalBody] = []
    if not last:
        return bodies
    async with aclosing(bus.read("journal", 1)) as batches:
        async for batch in batches:
            bodies += [decode(record.payload, JournalEntry).body for record in batch]
            if batch[-1].seq >= last:
                break
    return bodies


def count_ledger(bodies: Iterable[JournalBody]) -> dict[str, int]:
    """Count training tickets by where they are; a version trained again counts once."""
    issued: set[str] = set()
    trained_by_version: dict[int, set[str]] = {}
    failed_by_version: dict[int, set[str]] = {}
    disposed: dict[str, str] = {}
    for body in bodies:
        match body:
            case Issued():
                issued |= {t.ticket_id for t in body.tickets if t.purpose == "train"}
            case Batch():
                trained_by_version[body.version] = {
                    member.ticket_id for group in body.groups for member in group.members
                }
                failed_by_version[body.version] = {
                    ticket_id for group in body.groups for ticket_id in group.failed
                }
            case Disposed():
                disposed |= dict.fromkeys(body.ticket_ids, body.outcome)
            case _:
                pass
    trained = set[str]().union(*trained_by_version.values())
    failed = set[str]().union(*failed_by_version.values())
    outcomes = Counter(outcome for ticket_id, outcome in disposed.items() if ticket_id in issued)
    failed |= {t for t, outcome in disposed.items() if outcome == "failed" and t in issued}
    dropped = outcomes["dropped"]
    return {
        "issued": len(issued),
        "trained": len(trained),
        "dropped": dropped,
        "failed": len(failed),
        "open": len(issued) - len(trained) - dropped - len(failed),
    }


def table(status: Status) -> str:
    """Return the look as text."""
    lines = [
        f"run {status.run} on {status.nats_url}: {status.phase}, version {status.head_version}, "
        f"weights kept from version {status.oldest_needed}",
        "training tickets: " + ", ".join(f"{k} {v:,}" for k, v in status.ledger.items()),
        "streams: "
        + ", ".join(
            f"{name} {s['messages']:,} ({s['bytes'] / 1e6:.1f} MB)"
            for name, s in status.streams.items()
        ),
    ]
    if not status.services:
        lines.append("no live service was heard")
    for service in status.services:
        state = "ready" if service["ready"] else f"not ready: {service['reason']}"
        version = f"v{service['version']}" if service["version"] >= 0 else ""
        gauges = " ".join(f"{k}={v:g}" for k, v in service["gauges"].items())
        lines.append(f"  {service['pod']:<18} {version:<6} {state}  {gauges}".rstrip())
    return "\n".join(lines)


def as_dict(status: Status) -> dict[str, Any]:
    """Return the look as JSON-like content."""
    return asdict(status)


def _service(lease: Lease) -> dict[str, Any]:
    return {
        "pod": lease.pod,
        "role": lease.role,
        "pid": lease.pid,
        "version": lease.version,
        "ready": lease.ready,
        "reason": lease.reason,
        "gauges": lease.gauges,
        "counters": lease.counters,
        "busy_s": lease.busy_s,
    }
