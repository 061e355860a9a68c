"""Publishing one version: canary from the published bytes, slack for the rollouts, the append."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shared.backends.base import Backend
from shared.runtime.context import Context
from shared.runtime.errors import Fatal
from shared.runtime.leases import LeaseBoard
from shared.weights.canary import backend_scorer, canary_tokens, make_canary
from shared.weights.digests import verify_same
from shared.weights.publisher import Published, Publisher
from shared.wire.telemetry import Lease
from shared.wire.weights import Canary, Manifest

_POLL_S = 0.02


def within_slack(version: int, rollouts: Sequence[Lease], sync_slack: int) -> bool:
    """Return whether `version` may be published: a live rollout is close behind, or none lives."""
    return not rollouts or max(lease.version for lease in rollouts) >= version - sync_slack


@dataclass(frozen=True)
class Slack:
    """How far rollouts may be behind, and how long a publication waits for them."""

    versions: int
    wait_s: float


class Publication:
    """The learner's side of the manifest log."""

    def __init__(
        self,
        context: Context,
        backend: Backend,
        publisher: Publisher,
        board: LeaseBoard,
        slack: Slack,
        *,
        vocab_size: int,
        context_tokens: int,
    ) -> None:
        self._context = context
        self._backend = backend
        self._publisher = publisher
        self._board = board
        self._slack = slack
        self._canary_ids = canary_tokens(vocab_size, context_tokens, seed=0)
        self._scorer = backend_scorer(backend)

    @property
    def head(self) -> int:
        """Newest committed version, -1 when nothing is published."""
        manifest = self._publisher.head
        return -1 if manifest is None else manifest.version

    @property
    def head_digest(self) -> str:
        """Digest of the newest committed version, empty when nothing is published."""
        manifest = self._publisher.head
        return "" if manifest is None else manifest.digest

    async def start(self) -> None:
        """Read the head of the manifest log: what the next version is appended to."""
        await self._publisher.start()

    async def hold(self) -> None:
        """Give the publisher the head's bytes, as keyframes and the next delta need them.

        Without them a follower that has lost its way would wait for the next version.
        """
        manifest = self._publisher.head
        if manifest is not None and not self._publisher.holds:
            state = await self._state()
            await self._publisher.hold({n: t.clone() for n, t in state.items()})

    async def commit(
        self, version: int, *, epoch: int, optimizer_steps: int, previous: dict[str, torch.Tensor]
    ) -> Published | Manifest:
        """Make the backend's weights version `version`.

        A version that is already committed (a restored learner re-derives it) keeps its number and
        is not published again: its manifest is returned.

        Raises:
            Fatal: the re-derived bytes differ from the committed ones.
            Fenced: another learner published.
        """
        if version <= self.head:
            return await self._confirm(version)
        assert version == self.head + 1
        canary = await asyncio.to_thread(self._canary)
        await self._wait_for_rollouts(version)
        return await self._publisher.publish(
            await self._state(),
            canary=canary,
            epoch=epoch,
            optimizer_steps=optimizer_steps,
            previous_state=previous or None,
        )

    async def _state(self) -> Mapping[str, torch.Tensor]:
        """Gathering it from several ranks takes its time: not on the event loop."""
        return await asyncio.to_thread(self._backend.state)

    def _canary(self) -> Canary:
        return make_canary(self._scorer, self._canary_ids, self._backend.dtype)

    async def _confirm(self, version: int) -> Manifest:
        committed = await self._publisher.manifest(version)
        if committed is None:
            raise Fatal(
                f"version {version} was committed but its manifest is purged: cannot resume"
            )
        if not verify_same(committed, await self._state()):
            raise Fatal(
                f"version {version}: replaying the journal gave other bytes than the committed "
                f"digest {committed.digest}; forking is not supported yet: start a fresh run"
            )
        self._context.log.info("version_confirmed", version=version, digest=committed.digest)
        return committed

    async def _wait_for_rollouts(self, version: int) -> None:
        deadline = time.monotonic() + self._slack.wait_s
        while not within_slack(version, self._board.live("rollout"), self._slack.versions):
            if time.monotonic() > deadline:
                self._context.log.warning("rollouts_behind", version=version)
                self._context.count("publications_without_rollouts")
                return
            if self._context.stop.is_set():
                return
            await asyncio.sleep(_POLL_S)
