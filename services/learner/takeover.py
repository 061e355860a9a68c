"""Taking over a run: from nothing, or from what an earlier learner process journalled.

A restored learner goes back to its newest readable checkpoint, executes the journalled batches
again, and finds that every re-derived version has the digest of its committed manifest.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from services.learner.checkpoint import CheckpointStore
from services.learner.checkpoint_files import Checkpoint
from services.learner.desk import Desk
from services.learner.evaluation import EvaluationRound
from services.learner.journal_log import JournalLog
from services.learner.score_records import score_event
from services.learner.staging import Scored, TerminalArrived
from shared.backends.base import Backend
from shared.runtime.bus import Bus, Record
from shared.runtime.context import Context
from shared.runtime.errors import Fatal
from shared.runtime.sections import WeightsSection
from shared.weights.assembly import make_follower, make_history
from shared.weights.canary import backend_scorer
from shared.weights.digests import specs, version_digest
from shared.weights.history import State
from shared.wire.codec import content_digest, decode
from shared.wire.errors import ForeignMajor, Malformed, WireError
from shared.wire.journal import Batch, Member
from shared.wire.messages import Score, Terminal, Ticket
from shared.wire.trajectory import Failure, Trajectory
from shared.wire.weights import Manifest

_WINDOW = 32
"""Look-ups in flight."""


def state_digest(backend: Backend) -> str:
    """Digest of the version that the backend's weights are."""
    return version_digest(specs(backend.state()))


def load_newest(
    store: CheckpointStore,
    backend: Backend,
    model_digest: str,
    *,
    load: Callable[[Path], None],
    reload: Callable[[], None],
) -> Checkpoint | None:
    """Load the newest checkpoint that is whole and of this model; None: start from version 0.

    Args:
        store: opened.
        backend: holds the model that `model.source` names.
        model_digest: of the run's version 0.
        load: takes a checkpoint's folder into the backend and whatever else carries state.
        reload: brings the source model back after a load that failed half-way.

    Raises:
        Fatal: there is no usable checkpoint and the model is not the one the run began with.
    """
    tried = False
    for checkpoint in reversed(store.all()):
        try:
            checkpoint.check()
            tried = True
            load(checkpoint.path)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            store.skip(checkpoint, " ".join(str(error).split()))
            continue
        if state_digest(backend) == checkpoint.facts.digest:
            return checkpoint
        store.skip(checkpoint, f"its weights are not version {checkpoint.version}")
    if tried:
        reload()
    if state_digest(backend) != model_digest:
        raise Fatal(
            "no usable checkpoint, and the model directory is not the one this run started from: "
            "restore it, or start a fresh run"
        )
    return None


async def check_own_publication(
    bus: Bus, backend: Backend, context: Context, weights: WeightsSection
) -> None:
    """Fetch the newest version as any follower would and forward it: every bit must agree.

    Raises:
        Fatal: the published bytes do not reproduce this learner's own forward.
    """
    history = make_history(weights, keep_past=False)
    follower = make_follower(weights, bus, history, context.log)
    shown: asyncio.Future[Manifest] = asyncio.get_running_loop().create_future()

    async def on_head(manifest: Manifest, _changed: frozenset[str] | None) -> None:
        if not shown.done():
            shown.set_result(manifest)

    following = asyncio.create_task(follower.run(on_head))
    try:
        await asyncio.wait((following, shown), return_when=asyncio.FIRST_COMPLETED, timeout=60.0)
        if not shown.done():
            raise Fatal("the learner cannot read back its own publication: is the bus healthy?")
        manifest = shown.result()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    async with history.at(manifest.version) as state:
        _must_reproduce(backend, manifest, state)
    context.log.info("own_publication_reproduced", version=manifest.version)


def _must_reproduce(backend: Backend, manifest: Manifest, state: State) -> None:
    score = backend_scorer(backend)
    rows = list(manifest.canary.token_ids.numpy())
    before = score(rows)
    own: Mapping[str, torch.Tensor] = {n: t.clone() for n, t in backend.state().items()}
    backend.load_state(state)
    after = score(rows)
    if version_digest(specs(own)) != manifest.digest or any(
        not np.array_equal(a, b) for a, b in zip(before, after, strict=True)
    ):
        raise Fatal(
            f"version {manifest.version} read back from the bus does not reproduce the learner's "
            "own forward bit for bit: the published bytes are not the policy"
        )


class Recovery:
    """Reads back what the open tickets and the journalled batches refer to."""

    def __init__(
        self, context: Context, desk: Desk, journal: JournalLog, *, with_scores: bool
    ) -> None:
        self._context = context
        self._bus = context.bus
        self._desk = desk
        self._journal = journal
        self._with_scores = with_scores

    async def adopt_open_tickets(self) -> None:
        """Hand open groups and evaluations to the desk, with whatever is stored of them.

        Tickets without a terminal are published again unless they are still queued.
        """
        state = self._journal.state
        for group_id, tickets in state.open_groups().items():
            self._desk.adopt(group_id, tickets, state.issue_versions[group_id])
        for group_id, tickets in state.open_evaluations().items():
            self._desk.rounds[group_id] = EvaluationRound.of(tickets)
        tickets = list(state.open_tickets.values())
        window = asyncio.Semaphore(_WINDOW)
        async with asyncio.TaskGroup() as group:
            lookups = [group.create_task(self._look_up(t, window)) for t in tickets]
        unplayed = [t for t, done in zip(tickets, lookups, strict=True) if not done.result()]
        await self._desk.publish_tickets(unplayed)
        self._context.log.info("tickets_adopted", open=len(tickets), unplayed=len(unplayed))

    async def members(self, batch: Batch) -> dict[str, Scored]:
        """Read the trajectories and scores of a journalled batch.

        Raises:
            Fatal: a record is gone or is not the one that was journalled.
        """
        window = asyncio.Semaphore(_WINDOW)

        async def read(member: Member) -> Scored:
            async with window:
                return await self._read_member(member)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read(member)) for g in batch.groups for member in g.members]
        return {task.result().ticket_id: task.result() for task in tasks}

    async def _look_up(self, ticket: Ticket, window: asyncio.Semaphore) -> bool:
        subjects = self._bus.subjects
        async with window:
            record = await self._bus.last(subjects.terminal(ticket.ticket_id))
            if record is None:
                return False
            terminal = terminal_event(record)
            self._desk.terminal(terminal)
            training = self._with_scores and ticket.purpose == "train"
            if training and isinstance(terminal.outcome, Trajectory):
                stored = await self._bus.last(subjects.score(ticket.ticket_id))
                if stored is not None:
                    self._hand_score(ticket.ticket_id, stored)
            return True

    def _hand_score(self, ticket_id: str, stored: Record) -> None:
        try:
            message = decode(stored.payload, Score)
        except ForeignMajor:
            raise
        except WireError as error:
            self._desk.score_lost(ticket_id, str(error))
        else:
            self._desk.score(score_event(message, stored.seq))

    async def _read_member(self, member: Member) -> Scored:
        terminal = await self._bus.get("terminals", member.terminal_seq)
        score = await self._bus.get("scores", member.score_seq) if member.score_seq else None
        if terminal is None or (member.score_seq and score is None):
            raise Fatal(
                f"ticket {member.ticket_id} was trained but its records are gone from the bus: "
                "this run cannot be resumed; start a fresh one"
            )
        event = terminal_event(terminal)
        if event.digest != member.terminal_digest:
            raise Fatal(f"terminal {member.terminal_seq} is not the one that was trained")
        assert isinstance(event.outcome, Trajectory)
        scores = ()
        if score is not None:
            scores = decode(score.payload, Score).sequences
        return Scored(
            ticket_id=member.ticket_id,
            terminal_seq=event.seq,
            terminal_digest=event.digest,
            score_seq=member.score_seq,
            trajectory=event.outcome,
            scores=scores,
        )


def _must_have_finite_rewards(outcome: Trajectory | Failure) -> None:
    """Env agents check what environments say; whoever else writes terminals may not."""
    if isinstance(outcome, Failure):
        return
    of_turns = [r for s in outcome.sequences for turn in s.turns for r in turn.rewards.values()]
    if not all(map(math.isfinite, (outcome.reward, *of_turns))):
        raise Malformed("a reward is not finite")


def terminal_event(record: Record) -> TerminalArrived:
    """Decode a stored terminal; one that cannot be read ends its ticket as failed.

    Raises:
        ForeignMajor: another major version wrote it: an upgrade is under way, not garbage.
    """
    digest = content_digest(record.payload)
    ticket_id = record.subject.rpartition(".")[2]
    try:
        terminal = decode(record.payload, Terminal)
        if terminal.ticket_id != ticket_id:
            raise Malformed(f"terminal of {terminal.ticket_id} on the subject of {ticket_id}")
        _must_have_finite_rewards(terminal.outcome)
    except ForeignMajor:
        raise
    except WireError as error:
        failure = Failure(reason="undecodable", detail=str(error))
        return TerminalArrived(ticket_id, record.seq, digest, failure)
    return TerminalArrived(ticket_id, record.seq, digest, terminal.outcome, terminal.attempt_id)
