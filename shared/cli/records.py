"""What a finished (or interrupted) run left on disk, read once for ledger, audit and report.

Only `shared/wire` and the archive's reader are used: no code of the learner or the oracle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from shared.cli.archive import ArchiveName, archive_dir, read_stream, read_tickets_final
from shared.cli.run_folder import read_facts
from shared.runtime.errors import ConfigError
from shared.wire.base import Message
from shared.wire.codec import content_digest, decode
from shared.wire.errors import WireError
from shared.wire.journal import JournalBody, JournalEntry
from shared.wire.messages import Purpose, Score, Terminal
from shared.wire.telemetry import Lease, StepReport
from shared.wire.trajectory import Trajectory
from shared.wire.weights import Artefact, Keyframe, Manifest

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class TerminalFacts:
    """What the ledger needs of one stored terminal."""

    seq: int
    ticket_id: str
    digest: str
    """Of the payload as stored."""
    purpose: Purpose
    failed: bool
    reason: str = ""
    """Of a failure."""
    reward: float = 0.0
    """Of a trajectory."""
    version_tokens: tuple[tuple[int, int], ...] = ()
    """(version, sampled tokens), ascending by version."""
    num_mixed_kv: int = 0
    """Sampled tokens that no single version produced."""
    task_digest: str = ""
    length: int = 0
    """Tokens of all sequences, prompts and observations included."""

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of the trajectory."""
        return sum(count for _, count in self.version_tokens)


@dataclass(frozen=True, slots=True)
class ScoreFacts:
    """What the ledger needs of one stored score."""

    seq: int
    ticket_id: str
    terminal_seq: int
    terminal_digest: str
    exact_versions: frozenset[tuple[int, str]]
    """(version, digest) that every sequence holding it scored `exact`."""
    forward_tokens: int = 0
    """Tokens forwarded for it."""


@dataclass(frozen=True)
class RunRecords:
    """One run's archive in memory; terminals and scores are decoded on demand."""

    run_dir: Path
    values: dict[str, Any]
    """`resolved.yaml`: the values file of the run."""
    facts: dict[str, Any]
    """`run.json`."""
    journal: list[tuple[float, JournalBody]] = field(
        default_factory=list[tuple[float, JournalBody]]
    )
    """(unix seconds written at, decision), in order."""
    manifests: dict[int, Manifest] = field(default_factory=dict[int, Manifest])
    keyframes: list[Keyframe] = field(default_factory=list[Keyframe])
    """Announced after their manifests."""
    steps: dict[int, StepReport] = field(default_factory=dict[int, StepReport])
    """By version published; of a repeated step the last report."""
    leases: list[Lease] = field(default_factory=list[Lease])
    terminals: dict[int, TerminalFacts] = field(default_factory=dict[int, TerminalFacts])
    """By sequence."""
    scores: dict[int, ScoreFacts] = field(default_factory=dict[int, ScoreFacts])
    """By sequence."""
    queued: frozenset[str] = frozenset()
    """Tickets still in the ticket stream at the end."""
    num_dead_letters: int = 0
    unreadable: Counter[str] = field(default_factory=Counter[str])
    """Archived payloads that could not be decoded, by stream and reason."""
    payloads: dict[tuple[str, int], bytes] = field(default_factory=dict[tuple[str, int], bytes])

    def full_copies(self) -> list[tuple[int, Artefact]]:
        """Return every keyframe with its version, in the order of versions."""
        inside = [(m.version, m.keyframe) for m in self.manifests.values() if m.keyframe]
        return sorted(inside + [(k.version, k.artefact) for k in self.keyframes], key=itemgetter(0))

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration: the `config:` subtree."""
        return cast("dict[str, Any]", self.values.get("config") or {})

    def setting(self, path: str, default: Any) -> Any:
        """Return one configured value by dotted path, `default` where it is not written."""
        node: Any = self.config
        for part in path.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = cast("dict[str, Any]", node)[part]
        return node

    @property
    def bodies(self) -> list[JournalBody]:
        return [body for _, body in self.journal]

    @property
    def archive(self) -> Path:
        return archive_dir(self.run_dir)

    def terminal(self, seq: int) -> Terminal:
        return decode(self.payloads["terminals", seq], Terminal)

    def score(self, seq: int) -> Score:
        return decode(self.payloads["scores", seq], Score)

    def model_dir(self) -> Path:
        """Return the folder that holds the model's `config.json` and tokenizer.

        Raises:
            ConfigError: neither the run's own copy nor `model.source` can be found.
        """
        source = str(self.setting("model.source", "examples/frozen_lake/base"))
        candidates = (self.archive / "model", self.run_dir / "model", Path(source))
        for candidate in candidates:
            if (candidate / "config.json").is_file():
                return candidate
        raise ConfigError(
            f"run folder {self.run_dir}: no config.json of the model in {source} (model.source); "
            "run this from the directory the run was started in"
        )


def load(run_dir: Path) -> RunRecords:
    """Read a run folder. Audit, summary and report of one process share one reading.

    Raises:
        ConfigError: it holds no archive, or its resolved configuration cannot be read.
    """
    directory = archive_dir(run_dir)
    if not (directory / "journal.bin").is_file():
        raise ConfigError(f"run folder {run_dir}: no archive/journal.bin; is it a run's folder?")
    state = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in directory.iterdir())
    return replace(
        _read_archive(run_dir, tuple(state)),
        values=_read_values(run_dir / "resolved.yaml"),
        facts=read_facts(run_dir),
    )


@lru_cache(maxsize=1)
def _read_archive(run_dir: Path, state: tuple[tuple[str, int, int], ...]) -> RunRecords:
    """Read the archive; `state` tells one state of its files from another."""
    del state
    directory = archive_dir(run_dir)
    records = RunRecords(run_dir, {}, {})
    for _, entry in _messages(records, "journal", JournalEntry):
        records.journal.append((entry.written_at, entry.body))
    for _, published in _messages(records, "manifests", Manifest, Keyframe):
        if isinstance(published, Manifest):
            records.manifests[published.version] = published
        else:
            records.keyframes.append(published)
    for _, step in _messages(records, "stats", StepReport):
        records.steps[step.version] = step
    records.leases.extend(lease for _, lease in _messages(records, "leases", Lease))
    for seq, terminal in _messages(records, "terminals", Terminal, keep=True):
        digest = content_digest(records.payloads["terminals", seq])
        records.terminals[seq] = terminal_facts(seq, digest, terminal)
    for seq, score in _messages(records, "scores", Score, keep=True):
        records.scores[seq] = score_facts(seq, score)
    return replace(
        records,
        queued=frozenset(read_tickets_final(directory) or ()),
        num_dead_letters=sum(1 for _ in read_stream(directory, "dead")),
    )


def terminal_facts(seq: int, digest: str, terminal: Terminal) -> TerminalFacts:
    """Reduce a terminal to what the ledger needs."""
    outcome = terminal.outcome
    common = (seq, terminal.ticket_id, digest, terminal.purpose)
    if not isinstance(outcome, Trajectory):
        return TerminalFacts(*common, failed=True, reason=outcome.reason)
    tokens: Counter[int] = Counter()
    for sequence in outcome.sequences:
        for span in sequence.spans:
            tokens[span.version] += span.stop - span.start
    return TerminalFacts(
        *common,
        failed=False,
        reward=outcome.reward,
        version_tokens=tuple(sorted(tokens.items())),
        num_mixed_kv=sum(s.stop - s.start for q in outcome.sequences for s in q.mixed_kv),
        task_digest=outcome.task_digest,
        length=sum(s.token_ids.shape[0] for s in outcome.sequences),
    )


def score_facts(seq: int, score: Score) -> ScoreFacts:
    """Reduce a score to what the ledger needs."""
    claims = [claim for sequence in score.sequences for claim in sequence.versions]
    inexact = {claim.version for claim in claims if claim.status != "exact"}
    exact = frozenset((c.version, c.digest) for c in claims if c.version not in inexact)
    return ScoreFacts(
        seq, score.ticket_id, score.terminal_seq, score.terminal_digest, exact, score.forward_tokens
    )


def _messages(
    records: RunRecords, name: ArchiveName, *kinds: type[M], keep: bool = False
) -> Iterator[tuple[int, M]]:
    for record in read_stream(records.archive, name):
        try:
            message = decode(record.payload, *kinds)
        except WireError as error:
            records.unreadable[f"{name}: {type(error).__name__}: {error}"] += 1
            continue
        if keep:
            records.payloads[name, record.seq] = record.payload
        yield record.seq, message


def _read_values(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text()) if path.exists() else {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: not a mapping")
    return cast("dict[str, Any]", loaded)
