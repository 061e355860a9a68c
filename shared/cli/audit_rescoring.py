"""The picked tokens, their log-probs as trained, and the same under archived versions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.cli.archive import version_path
from shared.cli.audit_picks import Pick
from shared.cli.ledger_members import STORED_AFTERWARDS
from shared.cli.records import RunRecords
from shared.cli.reference_forward import (
    Query,
    ReferenceConfig,
    ReferencePolicy,
    StoredTensor,
    read_safetensors,
)
from shared.runtime.sections import EXACT_ROUTES
from shared.wire.errors import WireError
from shared.wire.journal import Issued, Member
from shared.wire.messages import Score, Terminal
from shared.wire.trajectory import SamplingParams, Sequence, Trajectory

F8 = npt.NDArray[np.float64]


@dataclass(slots=True)
class Probe:
    """The audited tokens of one version in one sequence; arrays are [n], in nats."""

    ticket_id: str
    version: int
    query: Query
    old: F8 | None
    """As scored and trained on; None under an approximate route, which promises no version's."""
    sampler: F8
    own: F8 | None = None
    """Under `version`, by the reference forward."""
    previous: F8 | None = None
    """Under `version - 1`."""
    following: F8 | None = None
    """Under `version + 1`, of probes without `old`."""


def version_sha256(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the SHA-256 over a version's canonical bytes, as manifests carry it.

    Per tensor in name order: the line `name dtype d0,d1,...` and a newline, then its elements.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        shape = ",".join(str(n) for n in tensor.shape)
        digest.update(f"{name} {tensor.dtype} {shape}\n".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


class Rescoring:
    """Makes probes from records and fills in what the archived versions say."""

    def __init__(self, records: RunRecords, config: ReferenceConfig) -> None:
        self.problems: list[str] = []
        self.disclaimed_tokens = 0
        """Picked ones that their own score does not claim to be exact."""
        self._records = records
        self._config = config
        self._score_of = {score.ticket_id: seq for seq, score in records.scores.items()}
        self._sampling = {
            ticket.ticket_id: ticket.sampling
            for body in records.bodies
            if isinstance(body, Issued)
            for ticket in body.tickets
        }

    def probes(self, pick: Pick, rng: np.random.Generator, route: str) -> list[Probe]:
        """Draw the tokens of one picked trajectory, split by sequence and version."""
        try:
            terminal = self._records.terminal(pick.member.terminal_seq)
            score = self._score(pick.member, route)
        except (KeyError, WireError):
            return []  # the ledger has named it
        if score is not None and not _fits(terminal, score):
            self.problems.append(f"{terminal.ticket_id}: its score does not fit its tokens")
            return []
        assert isinstance(terminal.outcome, Trajectory)
        sequences = terminal.outcome.sequences
        tokens = [
            (number, position, span.version)
            for number, sequence in enumerate(sequences)
            for span in sequence.spans
            if span.version not in pick.masked_versions
            and not (route == STORED_AFTERWARDS and _disclaimed(score, number, span.version))
            for position in range(span.start, span.stop)
        ]
        by_place: dict[tuple[int, int, float], list[int]] = {}
        size = min(len(tokens), pick.num_tokens)
        self.disclaimed_tokens += pick.num_tokens - size
        for index in sorted(rng.choice(len(tokens), size=size, replace=False) if size else ()):
            number, position, version = tokens[index]
            temperature = self.temperature(terminal.ticket_id, sequences[number], position)
            by_place.setdefault((number, version, temperature), []).append(position)
        return [
            _probe(terminal.ticket_id, version, temperature, sequences[number], score, number, at)
            for (number, version, temperature), at in by_place.items()
        ]

    def _score(self, member: Member, route: str) -> Score | None:
        if route not in EXACT_ROUTES:
            return None
        seq = member.score_seq
        if not seq and route == STORED_AFTERWARDS:
            seq = self._score_of[member.ticket_id]
        return self._records.score(seq)

    def temperature(self, ticket_id: str, sequence: Sequence, position: int) -> float:
        """Return the temperature a token was sampled at: its turn's, or its ticket's."""
        for turn in sequence.turns:
            if turn.start <= position < turn.stop and turn.sampling is not None:
                return turn.sampling.temperature
        return self._sampling.get(ticket_id, SamplingParams()).temperature

    def fill(self, probes: list[Probe]) -> int:
        """Fill in what versions say, reading each one once; return how many were used."""
        needed = {p.version for p in probes} | {p.version - 1 for p in probes if p.version > 0}
        beyond = {p.version + 1 for p in probes if p.old is None} & self._records.manifests.keys()
        num_versions = 0
        for version in sorted(needed | beyond):
            policy = self.policy(version)
            if policy is None:
                continue
            num_versions += 1
            own = [p for p in probes if p.version == version]
            later = [p for p in probes if p.version == version + 1]
            earlier = [p for p in probes if p.version == version - 1 and p.old is None]
            answers = iter(policy.logprobs([p.query for p in own + later + earlier]))
            for probe in own:
                probe.own = next(answers)
            for probe in later:
                probe.previous = next(answers)
            for probe in earlier:
                probe.following = next(answers)
        return num_versions

    def policy(self, version: int) -> ReferencePolicy | None:
        """Return a version whose archived bytes are its manifest's, or None and note why not."""
        manifest = self._records.manifests.get(version)
        if manifest is None:
            self.problems.append(f"version {version} has no manifest in the log")
            return None
        try:
            tensors = read_safetensors(version_path(self._records.archive, version))
            policy = ReferencePolicy(self._config, tensors)
        except ValueError as error:
            self.problems.append(f"version {version} cannot be read: {error}")
            return None
        if manifest.sha256 is not None and version_sha256(tensors) != manifest.sha256:
            self.problems.append(f"version {version}: the archived bytes are not its manifest's")
            return None
        return policy


def _fits(terminal: Terminal, score: Score) -> bool:
    outcome = terminal.outcome
    return isinstance(outcome, Trajectory) and [s.token_ids.shape for s in outcome.sequences] == [
        s.old_logprobs.shape for s in score.sequences
    ]


def _disclaimed(score: Score | None, number: int, version: int) -> bool:
    """Whether a score says itself that a version's numbers are not exact: fallback, mixed KV."""
    claims = score.sequences[number].versions if score is not None else ()
    return any(c.version == version and c.status != "exact" for c in claims)


def query_of(
    sequence: Sequence, version: int | None, positions: npt.NDArray[np.int64], temperature: float
) -> Query:
    """Ask about positions as a version sampled them: with the experts that it recorded.

    None: as the present policy is forwarded, with those that any version recorded first.
    """
    token_ids = sequence.token_ids.numpy()
    routing = None
    for record in sequence.routing:
        experts = record.experts.numpy().astype(np.int64)
        if routing is None:
            routing = np.full((len(token_ids), *experts.shape[1:]), -1, dtype=np.int64)
        if version is None or record.version == version:
            own = routing[record.start : record.stop]
            own[:] = np.where(own < 0, experts, own)  # the first record of a token counts
    return Query(token_ids, positions, temperature, routing)


def _probe(
    ticket_id: str,
    version: int,
    temperature: float,
    sequence: Sequence,
    score: Score | None,
    number: int,
    positions: list[int],
) -> Probe:
    where = np.array(positions)
    old = None
    if score is not None:
        old = score.sequences[number].old_logprobs.numpy()[where].astype(np.float64)
    return Probe(
        ticket_id=ticket_id,
        version=version,
        query=query_of(sequence, version, where, temperature),
        old=old,
        sampler=sequence.arrays["sampler_logprobs"].numpy()[where].astype(np.float64),
    )
