"""What each service may say and hear on NATS: least privilege, derived from what it does. Pure.

A grant lists acts of the bus (append to a subject, read a stream, ...); `permissions` turns it
into the subjects a nats-server checks. Denied is what no line grants: a rollout appends to no
stream of the policy, an env agent to no scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from shared.runtime.jetstream import API
from shared.wire.subjects import STREAMS, StreamName, Subjects

Account = Literal["learner", "rollout", "env_agents", "logit_oracle", "recorder", "operator"]
ACCOUNTS: tuple[Account, ...] = (
    "learner", "rollout", "env_agents", "logit_oracle", "recorder", "operator",
)  # fmt: skip

INBOX_NAMES: dict[Account, tuple[str, ...]] = {
    "learner": ("learner",),
    "rollout": ("rollout",),
    "env_agents": ("env_agents",),
    "logit_oracle": ("logit_oracle",),
    "recorder": ("recorder",),
    "operator": ("status", "check", "costs"),
}
"""Names a process connects under (`_INBOX.<name>.>` is its own), by account."""

ALL: tuple[StreamName, ...] = tuple(spec.name for spec in STREAMS)


@dataclass(frozen=True, slots=True)
class Grant:
    """What one account does on the bus, in the words of `shared/runtime/bus.py`."""

    why: str
    appends: tuple[str, ...] = ()
    """Stored subjects below the run's prefix."""
    reads: tuple[StreamName, ...] = ()
    """Streams read in order: ephemeral consumers."""
    gets: tuple[StreamName, ...] = ()
    """Streams of which single messages are fetched."""
    infos: tuple[StreamName, ...] = ()
    queues: tuple[tuple[StreamName, str], ...] = ()
    """Work queues: (stream, durable consumer)."""
    purges: tuple[StreamName, ...] = ()
    creates: tuple[StreamName, ...] = ()
    puts: tuple[str, ...] = ()
    """Keys of the control bucket it writes; every account reads the bucket."""
    says: tuple[str, ...] = ()
    """Core subjects below the prefix it publishes to."""
    hears: tuple[str, ...] = ()
    """Core subjects below the prefix it subscribes to."""
    answers: tuple[Account, ...] = ()
    """Accounts whose inboxes it replies to."""


GRANTS: dict[Account, Grant] = {
    "learner": Grant(
        "owns the run: tickets, journal, weights, purges; fails overdue tickets; scores at a fence",
        appends=("ticket.*", "terminal.*", "score.*", "partial.scores.*", "journal", "manifest.*",
                 "chunk.*.*", "blob.*.*", "stats.*", "dead.learner"),
        reads=("terminals", "scores", "partials", "journal", "manifests"),
        gets=ALL,
        infos=ALL,
        purges=("terminals", "scores", "partials", "manifests", "chunks"),
        creates=ALL,
        puts=("control",),
        says=("control", "lease.learner.*"),
        hears=("lease.*.*",),
    ),
    "rollout": Grant(
        "samples on request and follows the weights; stores nothing but dead letters",
        appends=("blob.*.*", "dead.rollout"),
        reads=("manifests",),
        gets=("manifests", "chunks", "blobs"),
        infos=("manifests",),
        says=("lease.rollout.*",),
        hears=("sample.>", "cancel.*"),
        answers=("env_agents",),
    ),
    "env_agents": Grant(
        "plays tickets: asks rollouts, stores terminals and, at a fence, partials",
        appends=("terminal.*", "partial.tokens.*", "blob.*.*", "dead.env_agents"),
        gets=("terminals", "blobs"),
        queues=(("tickets", "env_agents"),),
        says=("sample.>", "cancel.*", "lease.env_agents.*"),
        hears=("control",),
    ),
    "logit_oracle": Grant(
        "scores terminals under the weights it follows",
        appends=("score.*", "blob.*.*", "dead.logit_oracle"),
        reads=("manifests",),
        gets=("scores", "manifests", "chunks", "blobs"),
        infos=("manifests",),
        queues=(("terminals", "logit_oracle"),),
        says=("lease.logit_oracle.*",),
    ),
    "recorder": Grant(
        "archives: reads everything, writes how far it got",
        reads=("terminals", "scores", "journal", "manifests", "stats", "dead"),
        gets=("tickets", "manifests", "chunks", "blobs"),
        infos=ALL,
        puts=("archived",),
        hears=("lease.*.*",),
    ),
    "operator": Grant(
        "looks: `lagwise status`, `helm test`, the deletion-cost annotator; changes nothing",
        reads=("journal",),
        gets=("journal", "manifests", "blobs"),
        infos=ALL,
        hears=("lease.*.*",),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Permissions:
    """Subjects a nats-server allows one user; whatever is not listed is denied."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...] = field(default=())


def permissions(account: Account, subjects: Subjects) -> Permissions:
    """Return what the server has to allow, sorted."""
    grant, prefix, bucket = GRANTS[account], subjects.prefix, f"KV_{subjects.control_bucket}"
    inboxes = [f"_INBOX.{name}.>" for name in INBOX_NAMES[account]]

    def api(act: str, streams: Iterable[StreamName], tail: str = "") -> list[str]:
        return [f"{API}.{act}.{subjects.stream(stream)}{tail}" for stream in streams]

    publish = [
        *inboxes,  # a barrier is a message to oneself
        f"{API}.STREAM.INFO.{bucket}",
        f"{API}.DIRECT.GET.{bucket}.>",
        *(f"{prefix}.{subject}" for subject in (*grant.appends, *grant.says)),
        *(f"$KV.{subjects.control_bucket}.{key}" for key in grant.puts),
        *api("STREAM.INFO", grant.infos),
        *api("DIRECT.GET", grant.gets),
        *api("DIRECT.GET", grant.gets, ".>"),
        *api("STREAM.PURGE", grant.purges),
        *(f"_INBOX.{name}.>" for other in grant.answers for name in INBOX_NAMES[other]),
    ]
    for act in ("CONSUMER.CREATE", "CONSUMER.MSG.NEXT", "CONSUMER.DELETE"):
        publish += api(act, grant.reads, ".>" if act == "CONSUMER.CREATE" else ".*")
    for stream, durable in grant.queues:
        publish += [
            f"{API}.CONSUMER.{act}.{subjects.stream(stream)}.{durable}"
            for act in ("CREATE", "INFO", "MSG.NEXT")
        ]
        publish.append(f"$JS.ACK.{subjects.stream(stream)}.{durable}.>")
    if grant.creates:
        publish += api("STREAM.CREATE", grant.creates) + api("STREAM.UPDATE", grant.creates)
        publish += [f"{API}.STREAM.{act}.{bucket}" for act in ("CREATE", "UPDATE")]
    subscribe = [*inboxes, *(f"{prefix}.{subject}" for subject in grant.hears)]
    return Permissions(tuple(sorted(set(publish))), tuple(sorted(set(subscribe))))
