"""Versions in a row that one set of processes trains again, and how they came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from services.learner.building import meet_ranks
from services.learner.config import LearnerConfig
from services.learner.replaying import Meet, Replay, Stretch
from shared.cli import archive
from shared.cli.archive import ArchivedStream, archive_dir, read_stream
from shared.runtime.bus import Record
from shared.runtime.errors import ConfigError, Fatal
from shared.runtime.service import cause_of
from shared.wire.codec import decode
from shared.wire.subjects import StreamName
from shared.wire.weights import Keyframe, Manifest

AGAIN = "the replay ends here; start it again"
OnEqual = Callable[[int], None]
"""Takes a version whose digest is the archived one."""


@dataclass(frozen=True)
class Replayed:
    """What came out."""

    versions: int
    """Whose digests are the archived ones; the one it began with is not counted."""
    problem: str = ""
    """One line; empty when everything is equal."""


@dataclass(frozen=True)
class Part:
    """What one set of processes is to do."""

    run_dir: Path
    folder: Path
    """Of the replay: a checkpoint of version `start` lies in it, unless that is 0."""
    start: int
    stretches: tuple[Stretch, ...]
    digests: Mapping[int, str]
    """By version, from `start` to the last one."""
    more: bool
    """Another part goes on from the checkpoint that this one leaves in the folder."""

    @property
    def config(self) -> LearnerConfig:
        """What all stretches agree on: ranks, and how several of them hold the model."""
        return self.stretches[0].config

    @property
    def ranks(self) -> int:
        return self.config.learner.ranks

    def write(self, path: Path) -> None:
        """Write it for other processes."""
        stretches = [
            {"config": stretch.config.model_dump(mode="json"), "stop": stretch.stop}
            for stretch in self.stretches
        ]
        told = {
            "run_dir": str(self.run_dir.resolve()),
            "folder": str(self.folder),
            "start": self.start,
            "stretches": stretches,
            "digests": list(self.digests.items()),
            "more": self.more,
        }
        path.write_text(json.dumps(told))

    @classmethod
    def read(cls, path: Path) -> Part:
        """Read what `write` wrote."""
        told: dict[str, Any] = json.loads(path.read_text())
        stretches = tuple(
            Stretch(LearnerConfig.model_validate(stretch["config"]), stretch["stop"])
            for stretch in told["stretches"]
        )
        return cls(
            run_dir=Path(told["run_dir"]),
            folder=Path(told["folder"]),
            start=told["start"],
            stretches=stretches,
            digests=dict(told["digests"]),
            more=told["more"],
        )


def parts_of(
    run_dir: Path, folder: Path, stretches: Sequence[Stretch], digests: Mapping[int, str]
) -> list[Part]:
    """Return what each set of processes is to do, in order.

    Args:
        run_dir: of the run.
        folder: of the replay.
        stretches: in order.
        digests: by version; the lowest is the one to begin with.

    Raises:
        ConfigError: a route needs what another set of processes has made.
    """
    start = min(digests)
    groups = [tuple(group) for _, group in groupby(stretches, _processes)]
    if len(groups) > 1 and groups[0][-1].stop == start:
        del groups[0]
    for stretch in chain(*groups[1:]):
        if stretch.config.old_logprobs.route == "snapshot_old":
            raise ConfigError(
                "old_logprobs.route snapshot_old needs the versions before, which other ranks "
                f"made: --versions {groups[0][-1].stop} replays those"
            )
    parts: list[Part] = []
    for number, group in enumerate(groups):
        stop = group[-1].stop
        own = {version: digests[version] for version in range(start, stop + 1)}
        more = number < len(groups) - 1
        parts.append(Part(run_dir, folder, start, group, own, more))
        start = stop
    return parts


def _processes(stretch: Stretch) -> tuple[object, ...]:
    """Return what of a configuration one set of processes cannot change."""
    ranks = stretch.config.learner.ranks
    return (ranks,) if ranks == 1 else (ranks, stretch.config.model)


async def make(part: Part, on_equal: OnEqual, meet: Meet = meet_ranks) -> Replayed:
    """Train the versions of a part again and compare each digest.

    Raises:
        ConfigError: the model is not the one the run began with.
        RanksFailed: a rank was lost.
    """
    result = Replayed(0)

    def compare(version: int, digest: str) -> bool:
        nonlocal result
        archived = part.digests[version]
        if digest != archived:
            line = f"version {version} differs: digest {digest}, archived {archived}"
            result = Replayed(result.versions, line)
            return False
        result = Replayed(version - part.start)
        on_equal(version)
        return True

    streams = _streams(part.run_dir, part.start)
    replay = Replay(part.config.run.name, streams, part.folder, meet)
    try:
        await replay.run(part.stretches, compare, more=part.more)
    except (Fatal, ExceptionGroup) as error:
        cause = cause_of(error)
        if not isinstance(cause, Fatal):
            raise
        return Replayed(result.versions, f"version {part.start + result.versions + 1}: {cause}")
    return result


def _streams(run_dir: Path, start: int) -> dict[StreamName, list[Record]]:
    names: tuple[ArchivedStream, ...] = ("journal", "terminals", "scores")
    streams: dict[StreamName, list[Record]] = {
        name: [_record(archived) for archived in read_stream(archive_dir(run_dir), name)]
        for name in names
    }
    if start:
        streams["manifests"] = list(_manifests(run_dir, start))
    return streams


def _manifests(run_dir: Path, start: int) -> Iterator[Record]:
    """Yield the manifest log up to a version's manifest."""
    for archived in read_stream(archive_dir(run_dir), "manifests"):
        yield _record(archived)
        message = decode(archived.payload, Manifest, Keyframe)
        if isinstance(message, Manifest) and message.version == start:
            return


def _record(archived: archive.Record) -> Record:
    return Record(archived.seq, archived.subject, archived.payload, archived.stored_at)
