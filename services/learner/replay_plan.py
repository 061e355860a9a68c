"""Which configuration made which version, and whether an archive has all that it was made of. Pure.

A learner journals its configuration when it takes over. A version is made under the one that was
journalled last before its manifest was published: earlier versions are re-derived under it too, to
the same bytes, or the learner refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.wire.journal import Batch, JournalBody, RunStarted
from shared.wire.weights import Manifest

_IRRELEVANT = ("bus", "telemetry")
"""Sections that no weight depends on."""


@dataclass(frozen=True)
class Phase:
    """Versions in a row that were made under one configuration."""

    config: Mapping[str, Any]
    """As journalled."""
    stop: int
    """Newest of them."""


@dataclass(frozen=True)
class Gap:
    """Why a version cannot be made again."""

    version: int
    reason: str
    """One line."""
    tampered: bool = False
    """The record is there, and is not what was trained."""


def plan(
    journal: Sequence[tuple[float, JournalBody]],
    manifests: Mapping[int, Manifest],
    *,
    first: int,
    last: int,
) -> list[Phase]:
    """Return the phases that lead from version `first` to `last`.

    Args:
        journal: (Unix seconds written at, decision), in order.
        manifests: by version, `first` to `last` among them.
        first: the version to stand at in the beginning.
        last: the newest one wanted.
    """
    starts = [(at, body) for at, body in journal if isinstance(body, RunStarted)]
    phases: list[Phase] = []
    for version in range(first, last + 1):
        published_at = manifests[version].published_at
        before = [body for at, body in starts if at <= published_at] or [starts[0][1]]
        config = before[-1].config
        if phases and _relevant(phases[-1].config) == _relevant(config):
            phases[-1] = Phase(phases[-1].config, version)
        else:
            phases.append(Phase(config, version))
    return phases


def gaps(
    journal: Sequence[tuple[float, JournalBody]],
    terminals: Mapping[int, str],
    scores: Mapping[int, str],
    *,
    first: int,
    last: int,
) -> Iterator[Gap]:
    """Yield what is missing to make the versions after `first`, up to `last`, oldest first.

    Args:
        journal: (Unix seconds written at, decision), in order.
        terminals: sequence -> digest of the archived payload.
        scores: sequence -> ticket of the archived score.
        first: the version to stand at in the beginning.
        last: the newest one wanted.
    """
    batches = {body.version: body for _, body in journal if isinstance(body, Batch)}
    for version in range(first, last):
        if version not in batches:
            yield Gap(version + 1, f"archive/journal.bin lacks the batch of version {version + 1}")
            continue
        for member in (m for group in batches[version].groups for m in group.members):
            of = f"of ticket {member.ticket_id}, trained in version {version + 1}"
            digest = terminals.get(member.terminal_seq)
            if digest is None:
                yield Gap(
                    version + 1, f"archive/terminals.bin lacks record {member.terminal_seq} {of}"
                )
            elif digest != member.terminal_digest:
                reason = f"record {member.terminal_seq} {of}, is not the one that was trained"
                yield Gap(version + 1, f"archive/terminals.bin: {reason}", tampered=True)
            if member.score_seq and member.score_seq not in scores:
                yield Gap(version + 1, f"archive/scores.bin lacks record {member.score_seq} {of}")


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: section for name, section in config.items() if name not in _IRRELEVANT}
    run = {name: value for name, value in kept.get("run", {}).items() if name != "dir"}
    return {**kept, "run": run}
