"""The learner's journal: one subject, one writer (compare-and-set), replayed on restart.

Replay reads decisions, it never recomputes them.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from shared.wire.base import Message, Part
from shared.wire.messages import Ticket


class RunStarted(Part):
    """A learner took over the journal: first entry of a run, and one per restart."""

    kind: Literal["run_started"] = "run_started"
    incarnation: str
    seed: int
    model_digest: str
    """Of version 0."""
    resumed_from: int | None = None
    """Version of the checkpoint restored, None for a fresh run."""
    config: dict[str, Any] = {}


class Issued(Part):
    """These tickets exist: written before they are published."""

    kind: Literal["issued"] = "issued"
    version: int
    tickets: tuple[Ticket, ...]
    cursor: dict[str, Any] = {}
    """State of the task source after them."""


class Member(Part):
    """One trained trajectory and where its records are."""

    ticket_id: str
    terminal_seq: int
    terminal_digest: str
    score_seq: int
    reward: float
    advantage: float
    """Of every token, unless `turn_advantages` says otherwise."""
    turn_advantages: tuple[float | None, ...] = ()
    """Of the tokens of each turn, sequences after one another; None: they leave the loss. (): one
    advantage for all."""


class TrainedGroup(Part):
    """A group that takes its place in a batch."""

    group_id: str
    issue_version: int
    members: tuple[Member, ...]
    """Members whose tokens are in the loss, or would be but for `no_loss`."""
    failed: tuple[str, ...] = ()
    """Ticket ids of members that failed: never a zero reward."""
    no_loss: Literal["", "zero_variance", "too_few_members"] = ""
    """Counts as trained, contributes no loss and leaves the denominator."""
    masked_versions: tuple[int, ...] = ()
    """Token versions masked as over-age or unscorable."""


class Batch(Part):
    """The step from `version` to `version + 1`: written before it is computed."""

    kind: Literal["batch"] = "batch"
    version: int
    epoch: int = 0
    groups: tuple[TrainedGroup, ...]
    seed: int


class Disposed(Part):
    """Tickets that leave without being trained."""

    kind: Literal["disposed"] = "disposed"
    ticket_ids: tuple[str, ...]
    outcome: Literal["dropped", "failed", "evaluated"]
    cause: str


class Evaluated(Part):
    """Result of one evaluation at one version; its tickets have a ledger of their own."""

    kind: Literal["evaluated"] = "evaluated"
    version: int
    name: str
    """`base`, `final` or `progress`."""
    task_indices: tuple[int, ...]
    rewards: tuple[float, ...]
    """One per task index; failed episodes are left out of both."""
    num_failed: int = 0


class RunFinished(Part):
    """The learner is done; what it leaves behind is named."""

    kind: Literal["run_finished"] = "run_finished"
    version: int
    unfinished: tuple[str, ...]
    """Training tickets issued and neither trained, dropped nor failed."""


JournalBody = Annotated[
    RunStarted | Issued | Batch | Disposed | Evaluated | RunFinished, Field(discriminator="kind")
]


class JournalEntry(Message):
    """Learner -> learner (restart), audit: one decision, before its effect.

    Single writer: appended with the expected last sequence of the stream; a retried append whose
    acknowledgement was lost reads back and compares `entry_id`; another's entry means fenced.
    """

    subject: ClassVar[str] = "journal"

    entry_id: str
    written_at: float
    body: JournalBody
