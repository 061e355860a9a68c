"""`snapshot_old`: the learner scores from its own history of published versions (exact).

The history is that of `shared/weights`: one full copy and the deltas, followed back from the bus,
so that a restarted learner has it again. A second model takes the versions in turn.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from services.learner.routes.base import OldLogprobs, RouteBase, RouteContext, RouteCost
from services.learner.routes.forwards import forward_members
from services.learner.staging import Scored
from shared.algo.batching import balance
from shared.algo.route_health import snapshot_health
from shared.backends.base import Backend
from shared.backends.trajectory_scoring import (
    LayoutKind,
    Piece,
    TrajectoryScore,
    pieces_of,
    score_pieces,
)
from shared.runtime.errors import Fatal
from shared.weights.assembly import make_follower, make_history
from shared.weights.canary import backend_scorer, check_canary
from shared.weights.errors import MissingVersion
from shared.wire.weights import Manifest

State = Mapping[str, torch.Tensor]

_ASK_AGAIN_S = 0.5
"""Between two attempts to bring back a version that no way led to."""


@dataclass(frozen=True, slots=True)
class _Work:
    """One piece to score, and where its numbers go."""

    ticket_id: str
    score: TrajectoryScore
    index: int
    piece: Piece


class SnapshotOld(RouteBase):
    """Every token under its own version, on the learner's critical path."""

    name = "snapshot_old"
    exact = True
    stores_scores = True

    def __init__(self, context: RouteContext) -> None:
        super().__init__(context)
        self._layout: LayoutKind = context.section.layout
        self._history = make_history(context.weights, keep_past=True)
        self._follower = make_follower(context.weights, context.bus, self._history, context.log)
        self._scorer: Backend | None = None
        self._following: asyncio.Task[None] | None = None
        self._gone: set[int] = set()
        """Versions asked for in vain for the whole bound: not waited for a second time."""

    @property
    def keyframe_wanted(self) -> bool:
        return self._follower.keyframe_wanted

    async def start(self) -> None:
        self._scorer = await asyncio.to_thread(self._context.make_scorer)
        self._following = asyncio.create_task(
            self._follower.run(self._on_head, start="oldest_needed")
        )

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    async def at_step(self, members: Sequence[Scored], version: int) -> OldLogprobs:
        """Score every token under its stamped version.

        Raises:
            Fatal: a version is gone from the bus and no fallback is configured, or a version does
                not reproduce its canary.
        """
        started = time.perf_counter()
        scores = {m.ticket_id: self._empty(m) for m in members}
        by_version: defaultdict[int, list[_Work]] = defaultdict(list)
        for ticket_id, score in scores.items():
            for index, piece in enumerate(score.pieces):
                by_version[piece.version].append(_Work(ticket_id, score, index, piece))
        missing = [v for v in sorted(by_version) if not await self._score(v, by_version[v])]
        lost = [work for v in missing for work in by_version[v]]
        if missing:
            await self._fall_back(members, missing, lost)
        return OldLogprobs(
            {ticket_id: score.sequences() for ticket_id, score in scores.items()},
            RouteCost(
                time.perf_counter() - started,
                sum(score.forward_tokens for score in scores.values()),
                self._history.bytes_held + _bytes_of(self._model),
            ),
            fallback_tokens=sum(len(work.piece.positions) for work in lost),
            health=snapshot_health(
                len(by_version) - len(missing),
                len(missing),
                resident_bytes=self._history.bytes_held,
            ),
        )

    async def stepped(self, version: int, scalars: Mapping[str, float]) -> None:
        # also as a shadow that was not asked at this step
        self._history.evict_below(version - 1 - self._context.max_staleness)

    @property
    def _model(self) -> Backend:
        assert self._scorer is not None, "call start() first"
        return self._scorer

    def _empty(self, member: Scored) -> TrajectoryScore:
        pieces = pieces_of(
            member.trajectory,
            kind=self._layout,
            temperature=self._context.temperature,
            replays=self._context.replays,
        )
        return TrajectoryScore(member.trajectory, pieces, self._context.backend.dtype)

    async def _score(self, version: int, work: list[_Work]) -> bool:
        """Score one version's pieces; False when it is gone for good."""
        if not await self._hold(version):
            return False
        async with self._history.at(version) as state:
            manifest = self._history.manifest(version)
            await asyncio.to_thread(self._load, manifest, state)
        await asyncio.to_thread(self._forward, manifest, work)
        return True

    async def _hold(self, version: int) -> bool:
        """Wait for a version, asking the bus again; False when it is still gone at the bound.

        Raises:
            Fatal: it was not even published by then.
        """
        if version in self._gone:
            return False
        bound_s = self._context.section.version_timeout_s
        try:
            async with asyncio.timeout(bound_s):
                while True:
                    try:
                        await self._follower.ensure(version, bound_s)
                        self._gone.discard(version)
                        return True
                    except MissingVersion as error:
                        if version not in self._gone:
                            self._context.log.warning("version_missing", reason=str(error))
                        self._gone.add(version)
                    await asyncio.sleep(_ASK_AGAIN_S)
        except TimeoutError as error:
            if version in self._gone:
                return False
            raise Fatal(
                f"old_logprobs.route {self.name}: version {version} did not arrive within "
                f"{bound_s:g} s (old_logprobs.version_timeout_s)"
            ) from error

    def _load(self, manifest: Manifest, state: State) -> None:
        self._model.load_state(state)
        result = check_canary(manifest.canary, backend_scorer(self._model))
        if not result.ok:
            raise Fatal(
                f"version {manifest.version} does not reproduce its canary "
                f"(off by {result.max_error:g}): the learner's own history is not to be trusted"
            )

    def _forward(self, manifest: Manifest, work: list[_Work]) -> None:
        lengths = [len(one.piece.token_ids) for one in work]
        for pack in balance(lengths, self._context.pack_tokens):
            chosen = [work[index] for index in pack]
            values = score_pieces(self._model, [one.piece for one in chosen], self._layout)
            for one, logprobs in zip(chosen, values, strict=True):
                one.score.settle(
                    one.index, logprobs, verified=True, digest=manifest.digest, compute_s=0.0
                )

    async def _fall_back(
        self, members: Sequence[Scored], missing: list[int], lost: list[_Work]
    ) -> None:
        fallback = self._context.section.fallback
        if not fallback:
            raise Fatal(
                f"old_logprobs.route {self.name}: version {missing[0]} is gone from the bus, "
                f"asked for in vain for {self._context.section.version_timeout_s:g} s "
                "(old_logprobs.version_timeout_s), and tokens of it are to be trained; nothing is "
                "substituted unless old_logprobs.fallback says so (fallback: current_recompute)"
            )
        found, _ = await asyncio.to_thread(
            forward_members,
            self._context.backend,
            members,
            temperature=self._context.temperature,
            pack_tokens=self._context.pack_tokens,
        )
        for one in lost:
            values = found[one.ticket_id][one.piece.sequence][one.piece.positions]
            one.score.substitute(one.index, values)
        self._context.log.error("versions_missing", versions=missing, fallback=fallback)

    async def _on_head(self, manifest: Manifest, changed: frozenset[str] | None) -> None:
        return


def _bytes_of(backend: Backend) -> int:
    return sum(t.numel() * t.element_size() for t in backend.state().values())
