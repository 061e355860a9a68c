"""`lagwise replay`: a run trained again from its archive, version by version.

The journal says what was decided, the archived terminals and scores what it was decided on; the
learner's own code executes it offline and must come to the bytes that were published.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.learner.checkpoint_files import read as read_checkpoint
from services.learner.config import LearnerConfig
from services.learner.replay_plan import gaps, plan
from services.learner.replaying import Stretch
from shared.cli import records, replay_ranks
from shared.cli.records import RunRecords
from shared.cli.replay_part import OnEqual, Part, Replayed, make, parts_of
from shared.runtime.config import load, resolve
from shared.runtime.errors import ConfigError
from shared.wire.journal import RunStarted


def run(
    run_dir: Path,
    *,
    versions: int | None = None,
    start: int = 0,
    overrides: Sequence[str] = (),
    progress: OnEqual = lambda version: None,
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
        Fatal: the run's learner had several ranks, and those of the replay refused or were lost.
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
    digests = {version: found.manifests[version].digest for version in range(start, end + 1)}
    with tempfile.TemporaryDirectory(prefix="lagwise-replay-") as folder:
        parts = parts_of(run_dir, Path(folder), stretches, digests)
        _provide_checkpoint(run_dir, start, Path(folder))
        result = _make(parts, progress)
    if gap is not None and not result.problem:
        return Replayed(result.versions, f"version {gap.version}: {gap.reason}")
    return result


def _make(parts: Sequence[Part], progress: OnEqual) -> Replayed:
    versions = 0
    for part in parts:
        if part.ranks == 1:
            result = asyncio.run(make(part, progress))
        else:
            result = replay_ranks.replay(part, progress)
        versions += result.versions
        if result.problem:
            return Replayed(versions, result.problem)
    return Replayed(versions)


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
