"""Every message of the trajectory path: tickets, sampling, terminals, scores."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from shared.wire.base import Array, Message, Part
from shared.wire.trajectory import Outcome, RoutingRecord, SamplingParams, Span, check_routing

Purpose = Literal["train", "eval"]


class TaskRef(Part):
    """Which task to play. `seed` and `split` determine it, or `payload` carries it."""

    dataset: str
    split: str
    index: int = Field(ge=0)
    """Position in the split."""
    seed: int
    payload: dict[str, Any] = {}
    """JSON-like content for task sources that ship their tasks."""


class Ticket(Message):
    """Learner -> env_agents: one episode to play.

    Idempotent by `ticket_id`: appended with expected last subject sequence 0. Order is free.
    Acknowledged only after the ticket's terminal is stored.
    """

    subject: ClassVar[str] = "ticket.<ticket_id>"

    ticket_id: str
    purpose: Purpose
    group_id: str
    member: int = Field(ge=0)
    """Index inside the group."""
    group_size: int = Field(gt=0)
    task: TaskRef
    issue_version: int = Field(ge=0)
    min_version: int = Field(ge=0)
    """No token of this episode may be sampled below it."""
    deadline: float
    """Unix seconds after which the learner writes the failed terminal."""
    sampling: SamplingParams
    seed: int
    model_id: str = "policy"
    adapter_id: str | None = None


class Terminal(Message):
    """Env_agents (or the learner, at the deadline) -> learner and logit_oracle: how it ended.

    One per ticket, success or failure: appended with expected last subject sequence 0, so the
    first writer wins and later ones adopt what is stored. Order is free.
    """

    subject: ClassVar[str] = "terminal.<ticket_id>"

    ticket_id: str
    attempt_id: str
    """Unique per delivery of the ticket; two attempts never share it."""
    purpose: Purpose
    group_id: str
    member: int = Field(ge=0)
    issue_version: int = Field(ge=0)
    producer: str
    """Pod that wrote it."""
    outcome: Outcome


class VersionScore(Part):
    """Provenance of the old log-probs of one version inside one sequence."""

    version: int = Field(ge=0)
    status: Literal["exact", "unverified", "unscorable", "approximate"]
    """exact: under the stamped, canary-verified version. unscorable: that version is gone.
    approximate: by a route that does not use the stamped version, or by its fallback."""
    digest: str = ""
    """The version's digest, from its manifest."""


class SequenceScore(Part):
    """Old log-probs of one sequence of a trajectory."""

    old_logprobs: Array
    """f4[T] (f8[T] in float64 runs): log-prob of token t under its own version; 0 where the loss
    mask is 0 or the version is unscorable."""
    versions: tuple[VersionScore, ...]


class Layout(Part):
    """How the forward was run; bitwise comparisons hold only inside one layout."""

    backend: str
    dtype: str
    kind: Literal["packed", "single"]
    num_threads: int


class Score(Message):
    """Logit_oracle -> learner: old log-probs of one terminal.

    Idempotent by ticket: appended with expected last subject sequence 0; two oracles may compute
    it, the first stored one counts. Joined on terminal sequence *and* digest.
    """

    subject: ClassVar[str] = "score.<ticket_id>"

    ticket_id: str
    terminal_seq: int = Field(gt=0)
    terminal_digest: str
    model_id: str = "policy"
    sequences: tuple[SequenceScore, ...]
    """One per sequence of the trajectory, in order; empty for failed and evaluation terminals."""
    layout: Layout
    producer: str
    forward_tokens: int = 0
    """Tokens forwarded for this score: Σ over versions of the prefix length."""
    compute_s: float = 0.0


class RoutingHeld(Part):
    """Rows of routing that the caller has: tokens [0, stop) under one version."""

    version: int = Field(ge=0)
    stop: int = Field(gt=0)


class SampleRequest(Message):
    """Env_agents -> rollout: continue these token ids by one turn.

    Core request on a queue group, or straight to the pod that holds the prefix. Idempotent: a
    retry carries a new `request_id`, late replies to the old one are discarded by id.
    """

    subject: ClassVar[str] = "sample.<model_id> | sample.pod.<pod>"

    request_id: str
    ticket_id: str
    model_id: str = "policy"
    adapter_id: str | None = None
    token_ids: Array
    """i4[T]: the whole prefix, prompt and partial answer included."""
    sampling: SamplingParams
    max_new_tokens: int = Field(gt=0)
    """What is left of the turn's budget: a resumed turn asks for less."""
    min_version: int = Field(ge=0)
    seed: int
    """Of the turn; token i of the answer draws its uniform number from (seed, i)."""
    seed_offset: int = Field(default=0, ge=0)
    """i of the first token asked for: > 0 when a partial turn is resumed."""
    expires: float
    """Unix seconds after which nobody waits for the answer."""
    routing_held: RoutingHeld | None = None
    """Routing that need not be sent again."""


class CancelRequest(Message):
    """Env_agents -> rollout: nobody waits for this request any more. Best effort, idempotent."""

    subject: ClassVar[str] = "cancel.<pod>"

    request_id: str


class SampledTokens(Part):
    """Tokens of one (partial) answer, each stamped where it was sampled."""

    token_ids: Array
    """i4[N]."""
    logprobs: Array
    """f4[N] (or f8[N]): log-prob under the distribution sampled from."""
    spans: tuple[Span, ...]
    """Over [0, N)."""
    mixed_kv: bool = False
    routing: tuple[RoutingRecord, ...] = ()
    """Of the forwards that sampled, `routing_held` left out. Positions count from the first token
    of the *prefix*; under each version of `spans` every token is covered but the last one sampled,
    which was not forwarded any more."""

    @model_validator(mode="after")
    def _spans_tile(self) -> Self:
        if self.token_ids.dtype != "i4" or len(self.token_ids.shape) != 1:
            raise ValueError("token_ids must be i4[N]")
        if self.logprobs.dtype not in ("f4", "f8"):
            raise ValueError("logprobs must be f4[N] or f8[N]")
        num_tokens = self.token_ids.shape[0]
        end = 0
        for span in self.spans:
            if span.start != end:
                raise ValueError("spans do not tile the answer")
            end = span.stop
        if end != num_tokens or self.logprobs.shape != (num_tokens,):
            raise ValueError("tokens, log-probs and spans differ in length")
        check_routing(self.routing, None)
        return self


class Accepted(Part):
    """The pod has the request and will answer; sent at once."""

    kind: Literal["accepted"] = "accepted"
    version: int


class Heartbeat(Part):
    """The pod is still at it."""

    kind: Literal["heartbeat"] = "heartbeat"
    num_sampled: int = 0


class Behind(Part):
    """The pod's version is below the request's `min_version`: ask elsewhere or again."""

    kind: Literal["behind"] = "behind"
    version: int
    """-1: no weights yet."""


class Partial(Part):
    """Interrupted: what there is so far. The caller resumes with prompt + partial, anywhere."""

    kind: Literal["partial"] = "partial"
    sampled: SampledTokens
    reason: Literal["drain", "interrupt", "cancelled"]


class Done(Part):
    """The turn is complete."""

    kind: Literal["done"] = "done"
    sampled: SampledTokens
    finish: Literal["stop", "length"]


class Refused(Part):
    """The request can never be (retryable: cannot now be) served by this pod."""

    kind: Literal["refused"] = "refused"
    reason: str
    retryable: bool = False


class SampleReply(Message):
    """Rollout -> env_agents: one tagged union; `accepted`, heartbeats, then exactly one final."""

    subject: ClassVar[str] = "(reply inbox)"

    request_id: str
    pod: str
    body: Annotated[
        Accepted | Heartbeat | Behind | Partial | Done | Refused, Field(discriminator="kind")
    ]
