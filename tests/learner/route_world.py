"""Versions really published on a MemoryBus, trajectories stamped with them, and every route."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.learner.completing import Completer
from services.learner.credit import make_credit
from services.learner.decision import decide_batch
from services.learner.items import BatchItems, build_items, pack_items
from services.learner.partials import PartialBook
from services.learner.routes.base import OldLogprobRoute, OldLogprobs, RouteContext
from services.learner.routes.registry import ROUTES
from services.learner.staging import CompleteGroup, Scored, TerminalArrived
from services.logit_oracle.config import LogitOracleConfig
from services.logit_oracle.service import serve
from shared.algo.batching import pack
from shared.algo.objective import Objective
from shared.algo.policy_loss import PolicyLoss, count
from shared.backends.torch_backend import TorchBackend
from shared.runtime.algo_section import AlgoSection
from shared.runtime.context import Context
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.runtime.sections import OldLogprobsSection, WeightsSection
from shared.weights.canary import backend_scorer, canary_tokens, make_canary
from shared.weights.publisher import Publisher
from shared.wire.base import Array
from shared.wire.codec import decode, encode
from shared.wire.fencing import PartialScores
from shared.wire.messages import Layout, Score, Terminal
from shared.wire.subjects import Subjects
from shared.wire.trajectory import Sequence as TokenSequence
from shared.wire.trajectory import Span, Trajectory
from tests.learner.route_trajectories import (
    HEAD,
    MIXED,
    TEMPERATURE,
    VOCAB,
    Reference,
    Stamps,
    State,
    as_of,
    partial_at,
)  # fmt: skip

SUBJECTS = Subjects("routes")


class Versions:
    """One learner's weights at every published version, and the bus that they were published on."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.server = MemoryServer()
        self.bus = MemoryBus(SUBJECTS, self.server, name="learner", retry_s=1.0)
        self.states: dict[int, State] = {}
        self.backend = self.scorer()
        self._reference = Reference(model_dir, self.states)
        self._truth: dict[tuple[bytes, int], np.ndarray] = {}

    async def publish(self, versions: int = HEAD + 1, keyframe_every: int = 16) -> None:
        """Train and publish versions 0, 1, ..; AdamW moves every weight at every step."""
        await self.bus.create_streams()
        self.publisher = Publisher(
            self.bus,
            model_id="policy",
            producer="learner-0",
            keyframe_every=keyframe_every,
            log=Log("test"),
        )
        await self.publisher.start()
        for _ in range(versions):
            await self.publish_next()

    async def publish_next(self) -> None:
        version = len(self.states)
        if version:
            rng = np.random.default_rng(version)
            batch = pack([rng.integers(0, VOCAB, 20) for _ in range(4)])
            self.backend.forward_backward(
                batch, lambda o, _b: -o.logprobs_T.mean(), temperature=1.0, with_entropy=False
            )
            self.backend.step(4e-3, max_grad_norm=1.0)
        canary = make_canary(
            backend_scorer(self.backend), canary_tokens(VOCAB, 16, 0), torch.float64
        )
        state = self.backend.state()
        await self.publisher.publish(state, canary=canary, epoch=0, optimizer_steps=version)
        if self.publisher.keyframe_due:
            await self.publisher.publish_keyframe(reason="due")
        self.states[version] = {name: tensor.clone() for name, tensor in state.items()}

    def stand_at(self, version: int) -> None:
        """Put the learner's weights to a version."""
        self.backend.load_state(self.states[version])

    def scorer(self) -> TorchBackend:
        backend = TorchBackend(torch.float64)
        backend.load_hf(self.model_dir)
        return backend

    # --- trajectories
    def play(
        self, layouts: Sequence[Stamps] = MIXED, *, noise: float = 0.0, seed: int = 7
    ) -> list[Scored]:
        """Trajectories of random tokens; the sampler is off the truth by `noise` nats."""
        rng = np.random.default_rng(seed)
        found: list[Scored] = []
        for number, stamps in enumerate(layouts):
            length = stamps[-1][2] + 2
            mask = np.zeros(length, np.uint8)
            for _, start, stop in stamps:
                mask[start:stop] = 1
            drawn = TokenSequence(
                token_ids=Array.of(rng.integers(0, VOCAB, length), "i4"),
                loss_mask=Array.of(mask, "u1"),
                spans=tuple(Span(version=v, start=a, stop=b) for v, a, b in stamps),
                arrays={"sampler_logprobs": Array.of(np.zeros(length), "f4")},
            )
            sampled = self.true_row(drawn) + noise * rng.normal(size=length) * mask
            drawn = drawn.model_copy(
                update={"arrays": {"sampler_logprobs": Array.of(sampled, "f4")}}
            )
            played = Trajectory(
                status="done", reward=float(number % 2), sequences=(drawn,), task_digest="d"
            )
            found.append(Scored(f"t{number}", number + 1, "", 0, played, ()))
        return found

    def logprobs(self, token_ids: np.ndarray, version: int) -> np.ndarray:
        """A whole sequence under one version, by the independent forward."""
        key = (np.asarray(token_ids, np.int64).tobytes(), version)
        if key not in self._truth:
            self._truth[key] = self._reference.logprobs(token_ids, version)
        return self._truth[key]

    def true_row(self, sequence: TokenSequence) -> np.ndarray:
        """ℓ*: every token under its own version."""
        ids = sequence.token_ids.numpy()
        row = np.zeros(len(ids))
        for span in sequence.spans:
            row[span.start : span.stop] = self.logprobs(ids, span.version)[span.start : span.stop]
        return row

    # --- routes
    def context(
        self, section: Mapping[str, Any] | None = None, temperature: float = TEMPERATURE
    ) -> RouteContext:
        return RouteContext(
            backend=self.backend,
            make_scorer=self.scorer,
            bus=MemoryBus(SUBJECTS, self.server, name="route", retry_s=1.0),
            log=Log("test"),
            weights=WeightsSection(),
            section=OldLogprobsSection.model_validate(
                {"version_timeout_s": 10.0} | (section or {})
            ),
            temperature=temperature,
            pack_tokens=64,
            max_staleness=HEAD,
        )

    @asynccontextmanager
    async def route(
        self, name: str, *, temperature: float = TEMPERATURE, **section: Any
    ) -> AsyncIterator[Any]:
        """A started route, its anchor (if it has one) led here from version 0."""
        made: OldLogprobRoute = ROUTES[name](
            self.context({"route": name} | section, temperature=temperature)
        )
        self.stand_at(0)
        await made.start()
        try:
            yield made
        finally:
            await made.close()
            self.stand_at(HEAD)

    async def old(
        self, name: str, members: Sequence[Scored], *, temperature: float = TEMPERATURE,
        **section: Any,
    ) -> OldLogprobs:  # fmt: skip
        """What a route says of members when the step leaves HEAD."""
        if name == "oracle":
            members = await self.scored_by_oracle(members, section.get("layout", "packed"))
        if name == "interrupt":
            members = self.scored_by_fences(members, section.get("layout", "packed"))
        async with self.route(name, temperature=temperature, **section) as route:
            if hasattr(route, "state"):  # an anchor: it moves once per step
                for version in range(1, HEAD):
                    self.stand_at(version)
                    await route.stepped(version, {})
                    await route.at_step(as_of(members, version), version)
                await route.stepped(HEAD, {})
            self.stand_at(HEAD)
            return await route.at_step(members, HEAD)

    async def scored_by_oracle(
        self, members: Sequence[Scored], layout: str = "packed"
    ) -> list[Scored]:
        """Through the oracle's service: terminals on the bus, scores from the bus."""
        bus = MemoryBus(SUBJECTS, self.server, name="oracle")
        context = Context("logit_oracle", "oracle-0", "oracle-0", bus, Log("test"))
        config = LogitOracleConfig.model_validate(
            {
                "model": {"source": str(self.model_dir), "dtype": "float64"},
                "sampling": {"temperature": TEMPERATURE},
                "logit_oracle": {
                    "layout": layout, "pack_tokens": 64, "max_wait_s": 0.02, "drain_s": 1.0,
                    "fetch_timeout_s": 0.05, "control_poll_s": 0.05,
                },
            }
        )  # fmt: skip
        stored = {m.ticket_id: await self._store_terminal(m, layout) for m in members}
        async with asyncio.TaskGroup() as group:
            group.create_task(serve(context, config))
            scores = {t: await self._score_of(ticket) for t, ticket in stored.items()}
            context.stop.set()
        return [replace(m, scores=scores[m.ticket_id].sequences) for m in members]

    def scored_by_fences(self, members: Sequence[Scored], layout: str = "packed") -> list[Scored]:
        """Through the fences of route `interrupt`: one per version, before it is left."""
        completer = Completer(self.backend, VOCAB, layout, TEMPERATURE, 64)  # type: ignore[arg-type]
        book = PartialBook()
        terminals = [
            TerminalArrived(m.ticket_id, m.terminal_seq, "", m.trajectory, "a") for m in members
        ]
        for version in range(HEAD):
            self.stand_at(version)
            partials = [partial_at(m, version) for m in members]
            result = completer.complete(
                [], [p for p in partials if p], book, version=version, digest=f"v{version}"
            )
            book.take_scores(
                PartialScores(
                    version=version,
                    digest=f"v{version}",
                    scores=tuple(result.partials),
                    layout=Layout(backend="torch", dtype="float64", kind="packed", num_threads=1),
                    producer="learner-0",
                ),
                version + 1,
            )
        self.stand_at(HEAD)
        result = completer.complete(terminals, [], book, version=HEAD, digest=f"v{HEAD}")
        assert result.unscorable_tokens == 0
        scores = {one.event.ticket_id: one.score.sequences() for one in result.terminals}
        return [replace(m, scores=scores[m.ticket_id]) for m in members]

    async def _store_terminal(self, member: Scored, layout: str) -> str:
        ticket_id = f"{layout}-{member.ticket_id}-{len(self.states)}"
        terminal = Terminal(
            ticket_id=ticket_id, attempt_id="a", purpose="train", group_id="g", member=0,
            issue_version=0, producer="env-0", outcome=member.trajectory,
        )  # fmt: skip
        await self.bus.append(
            SUBJECTS.terminal(ticket_id), encode(terminal), expect_last_subject_seq=0
        )
        return ticket_id

    async def _score_of(self, ticket_id: str) -> Score:
        async with asyncio.timeout(20):
            while (found := await self.bus.last(SUBJECTS.score(ticket_id))) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return decode(found.payload, Score)

    # --- training on what a route said
    def items(self, members: Sequence[Scored], old: OldLogprobs) -> BatchItems:
        """The batch as the learner decides and arranges it: one group, Dr. GRPO."""
        batch = decide_batch(
            [CompleteGroup("g", 0, tuple(members), ())],
            version=HEAD,
            epoch=0,
            seed=0,
            credit=make_credit(AlgoSection()),
            max_staleness=HEAD,
        )
        return build_items(batch, {m.ticket_id: m for m in members}, old.by_ticket)

    def train(
        self, name: str, members: Sequence[Scored], old: OldLogprobs, objective: Objective
    ) -> Trained:
        """Loss, gradients and report of the first minibatch from HEAD; no weight is changed."""
        self.stand_at(HEAD)
        micro = pack_items(self.items(members, old).items)
        proxy = ROUTES[name](self.context({"route": name})).proxy
        minibatch = PolicyLoss(objective, proxy=proxy).minibatch(count([micro]), version_now=HEAD)
        self.backend.forward_backward(micro, minibatch, temperature=TEMPERATURE, with_entropy=False)
        grads = [p.grad.clone() for p in self.backend._at.model.parameters()]
        self.backend.step(0.0, max_grad_norm=1.0)
        scalars, arrays = minibatch.report(num_ages=HEAD + 1)
        return Trained(minibatch.loss, grads, scalars, arrays)


@dataclass(frozen=True)
class Trained:
    """What one minibatch left."""

    loss: float
    grads: list[torch.Tensor]
    scalars: dict[str, float]
    arrays: dict[str, np.ndarray]

    @property
    def k3_d_by_age(self) -> np.ndarray:
        return self.arrays["age_k3_d_sum"] / self.arrays["age_count"]
