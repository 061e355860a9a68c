"""What every route must give: per token an old log-prob, its provenance, its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from services.learner.routes.carried import NOTHING
from services.learner.staging import Scored
from shared.algo.proximal import Proxy
from shared.backends.base import Backend, Snapshot
from shared.runtime.bus import Bus
from shared.runtime.logs import Log
from shared.runtime.sections import OldLogprobsSection, WeightsSection
from shared.wire.messages import SequenceScore


@dataclass(frozen=True, slots=True)
class RouteCost:
    """What a route cost the learner in one step, on its critical path."""

    seconds: float = 0.0
    forward_tokens: int = 0
    """Tokens forwarded for it, prefixes included."""
    held_bytes: int = 0
    """Weights it keeps beyond the learner's own: copies, patches, anchors."""


@dataclass(frozen=True, slots=True)
class OldLogprobs:
    """The old log-probs of one batch."""

    by_ticket: Mapping[str, tuple[SequenceScore, ...]]
    """With provenance per version: `exact`, `approximate` or `unverified`."""
    cost: RouteCost
    fallback_tokens: int = 0
    """Tokens of an exact route whose version is gone and whose number is the fallback's."""
    health: Mapping[str, float] = field(default_factory=dict[str, float])
    """Further scalars of the route, for the step's report."""


@dataclass(frozen=True)
class RouteContext:
    """What a route may use of the learner."""

    backend: Backend
    """The weights being trained; at `at_step` they are exactly the version stepped from."""
    make_scorer: Callable[[], Backend]
    """A second model of the same architecture, for weights that are not the current ones."""
    bus: Bus
    log: Log
    weights: WeightsSection
    section: OldLogprobsSection
    temperature: float
    pack_tokens: int
    max_staleness: int
    replays: bool = False
    """Whether experts are those that the sampler recorded, or nothing is exact."""


class OldLogprobRoute(Protocol):
    """Where the old log-probs of a batch come from.

    A route either waits for scores that another service stores (`waits_for_scores`), or computes
    them when the step begins (`at_step`). A missing version is an error or a tagged, counted
    fallback, never silently the current weights. The same journalled batch must give the same
    numbers on replay: whatever a route carries from step to step goes into the checkpoint.
    """

    name: str
    exact: bool
    """Whether every number is that of the version stamped on the token."""
    waits_for_scores: bool
    stores_scores: bool
    """Whether what it computed at a step belongs on the log, for audits: exact numbers."""
    needs_fence: bool
    """Whether everything sampled from a version must be scored before the learner leaves it."""
    proxy: Proxy | None
    """Computed by the loss from ℓ^inf and ℓ instead of what `at_step` returns."""

    @property
    def keyframe_wanted(self) -> bool:
        """Whether it follows the published versions itself and has no way left to one of them."""
        ...

    async def start(self) -> None:
        """Begin, after the learner knows which version it stands at."""
        ...

    async def close(self) -> None: ...

    async def advance(self, members: Sequence[Scored], version: int) -> None:
        """Move what it carries from step to step to the step from `version`.

        `members` are all that the step trains on. `at_step` begins with it; a shadow that is not
        asked at a step, or only about some of its members, is moved by it alone. Idempotent.
        """
        ...

    async def at_step(self, members: Sequence[Scored], version: int) -> OldLogprobs:
        """Compute old log-probs before the first optimizer step leaves `version`."""
        ...

    async def stepped(self, version: int, scalars: Mapping[str, float]) -> None:
        """Take note that the backend's weights are now those of `version`, not yet published.

        `scalars` are the step's: of its first minibatch, as in `policy_loss`.
        """
        ...

    def snapshot(self) -> Snapshot:
        """Copy what `load` needs of a checkpoint to go on identically."""
        ...

    def load(self, folder: Path) -> None:
        """Take up what a snapshot wrote; where there is nothing of this route, it starts afresh.

        Raises:
            ValueError: it belongs to another model, or cannot be read.
        """
        ...


class RouteBase:
    """A route that carries nothing from step to step."""

    waits_for_scores = False
    stores_scores = False
    needs_fence = False
    proxy: Proxy | None = None

    def __init__(self, context: RouteContext) -> None:
        self._context = context

    @property
    def keyframe_wanted(self) -> bool:
        return False

    async def start(self) -> None:
        return

    async def close(self) -> None:
        return

    async def advance(self, members: Sequence[Scored], version: int) -> None:
        return

    async def stepped(self, version: int, scalars: Mapping[str, float]) -> None:
        return

    def snapshot(self) -> Snapshot:
        return NOTHING

    def load(self, folder: Path) -> None:
        return
