"""`lagwise replay`: a run trained again from its archive, version by version.

The journal says what was decided, the archived terminals and scores what it was decided on; the
learner's own code executes it offline and must come to the bytes that were published.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.learner.checkpoint_files import read as read_checkpoint
from services.learner.config import LearnerConfig
from services.learner.replay_plan import gaps, plan
from services.learner.replaying import Replay, Stretch
from shared.cli import archive, records
from shared.cli.archive import ArchivedStream, archive_dir, read_stream
from shared.cli.records import RunRecords
from shared.runtime.bus import Record
from shared.runtime.config import load, resolve
from shared.runtime.errors import ConfigError, Fatal
from shared.runtime.service import cause_of
from shared.wire.codec import decode
from shared.wire.journal import RunStarted
from shared.wire.subjects import StreamName
from shared.wire.weights import Keyframe, Manifest


@dataclass(frozen=True)
class Replayed:
    """What came out."""

    versions: int
    """Whose digests are the archived ones; the one it began with is not counted."""
    problem: str = ""
    """One line; empty when everything is equal."""


def run(
    run_dir: Path,
    *,
    versions: int | None = None,
    start: int = 0,
    overrides: Sequence[str] = (),
    progress: Callable[[int], None] = lambda version: None,
) -> Replayed:
    """Train a run again and compare every version's digest with its archived manifest.

    Args:
        run_dir: of the run.
        versions: stop at this one; None: at the newest that is archived.
        start: begin from the checkpoint of this version; 0: from the model.
        overrides: settings that differ from the run's, as in `--set`.
        progress: called with each version that was compared.

    Raises:
        ConfigError: the archive lacks a record, or the request cannot be met.
    """
    found = records.load(run_dir)
    last = _newest(found, versions, start)
    terminals = {seq: facts.digest for seq, facts in found.terminals.items()}
    scores = {seq: facts.ticket_id for seq, facts in found.scores.items()}
    gap = next(gaps(found.journal, terminals, scores, first=start, last=last), None)
    if gap is not None and not gap.tampered:
        raise ConfigError(f"{run_dir}: {gap.reason}")
    end = last if gap is None else gap.version - 1
    phases = plan(found.journal, found.manifests, first=start, last=end)
    stretches = [Stretch(_config(phase.config, overrides), phase.stop) for phase in phases]
    if start and any(s.config.old_logprobs.route == "snapshot_old" for s in stretches):
        raise ConfigError("--from: old_logprobs.route snapshot_old needs the versions before, too")
    ranks = max(stretch.config.learner.ranks for stretch in stretches)
    if ranks > 1:
        raise ConfigError(
            f"{run_dir}: trained by {ranks} ranks, whose sums one process does not repeat bit for "
            "bit; to see how far it comes: --set learner.ranks=1"
        )
    result = _replay(found, stretches, start, progress)
    if gap is not None and not result.problem:
        return Replayed(result.versions, f"version {gap.version}: {gap.reason}")
    return result


def _replay(
    found: RunRecords, stretches: Sequence[Stretch], start: int, progress: Callable[[int], None]
) -> Replayed:
    result = Replayed(0)

    def compare(version: int, digest: str) -> bool:
        nonlocal result
        archived = found.manifests[version].digest
        if digest != archived:
            line = f"version {version} differs: digest {digest}, archived {archived}"
            result = Replayed(result.versions, line)
            return False
        result = Replayed(version - start)
        progress(version)
        return True

    with tempfile.TemporaryDirectory(prefix="lagwise-replay-") as folder:
        _provide_checkpoint(found.run_dir, start, Path(folder))
        streams = _streams(found.run_dir, start)
        replay = Replay(stretches[0].config.run.name, streams, Path(folder))
        try:
            asyncio.run(replay.run(stretches, compare))
        except (Fatal, ExceptionGroup) as error:
            cause = cause_of(error)
            if not isinstance(cause, Fatal):
                raise
            return Replayed(result.versions, f"version {start + result.versions + 1}: {cause}")
    return result


def line(result: Replayed) -> str:
    """Return what to tell, in one line."""
    told = f"replayed {result.versions} versions: "
    if result.problem:
        return f"{told}{result.versions} digests equal, then {result.problem}"
    return f"{told}{result.versions} digests equal"


def _newest(found: RunRecords, wanted: int | None, start: int) -> int:
    """Return the version to end at.

    Raises:
        ConfigError: a manifest up to it is not archived, or there is nothing to replay.
    """
    newest = max(found.manifests, default=-1)
    last = newest if wanted is None else wanted
    if last > newest or last <= start:
        raise ConfigError(
            f"{found.run_dir}: versions {start + 1} to {last} cannot be replayed: "
            f"archive/manifests.bin has versions up to {newest}"
        )
    for version in range(start, last + 1):
        if version not in found.manifests:
            raise ConfigError(f"{found.run_dir}: archive/manifests.bin lacks version {version}")
    if not any(isinstance(body, RunStarted) for body in found.bodies):
        raise ConfigError(f"{found.run_dir}: archive/journal.bin lacks the beginning of the run")
    return last


def _config(journalled: Mapping[str, Any], overrides: Sequence[str]) -> LearnerConfig:
    tree = resolve(journalled, overrides, environ={})
    return load(LearnerConfig, tree, origin="archive/journal.bin: the run's configuration")


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


def _provide_checkpoint(run_dir: Path, version: int, folder: Path) -> None:
    """Copy a checkpoint of the run to where the replay looks for it.

    Raises:
        ConfigError: there is none of this version, or it is damaged.
    """
    if not version:
        return
    name = f"v{version:06d}"
    path = run_dir / "checkpoints" / name
    try:
        read_checkpoint(path).check()
    except ValueError as error:
        there = ", ".join(str(int(p.name[1:])) for p in sorted(path.parent.glob("v" + 6 * "[0-9]")))
        raise ConfigError(
            f"--from {version}: checkpoint {path}: {error}; there are: {there or 'none'}"
        ) from error
    shutil.copytree(path, folder / "checkpoints" / name)
