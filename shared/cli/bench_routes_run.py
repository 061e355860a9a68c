"""One cell of `make bench-routes`: a training run through the product's own parts, in one process.

Per version: episodes under the simulated lag, the product's decision, exact scores where the route
waits for them, the route, the trainer. What is measured beside it costs its run no time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from services.env_agents.text_renderer import TextRenderer
from services.learner.credit import make_credit
from services.learner.decision import decide_batch
from services.learner.items import BatchItems, build_items
from services.learner.routes.base import OldLogprobRoute, OldLogprobs
from services.learner.staging import CompleteGroup, Scored
from services.learner.ticketing import derive_seed
from services.learner.trainer import Trainer
from services.rollout.engine import EngineDead
from shared.algo.policy_loss import PolicyLoss
from shared.backends.adamw import AdamWSettings
from shared.cli.bench_routes_book import Book
from shared.cli.bench_routes_cells import Cell, Size
from shared.cli.bench_routes_episodes import (
    MAX_TURNS,
    Episode,
    Play,
    Player,
    oldest_age,
    turn_versions,
)
from shared.cli.bench_routes_errors import added, arrival, differences
from shared.cli.bench_routes_exact import ExactScorer, Ring
from shared.cli.bench_routes_sides import PACK_TOKENS, Published, learner_section, make_route
from shared.cli.bench_routes_world import base_policy, open_backend, sampler_state
from shared.wire.journal import Batch
from shared.wire.messages import TaskRef

ALWAYS_ASKED = ("ewma_prox", "ppo_ewma_async")
"""Their anchors move when they are asked."""


class Run:
    """One cell under way."""

    def __init__(self, cell: Cell, size: Size, bases: Path) -> None:
        self._cell, self._size = cell, size
        self._section = learner_section(cell, size)
        self._base = base_policy(bases, size, cell.seed)
        self._backend = open_backend(self._base, AdamWSettings(betas=self._section.optimizer.betas))
        self._num_ages = oldest_age(cell.lag) + 1
        self._ring = Ring(self._num_ages)
        self._player = Player(self._base, TextRenderer(str(self._base), {}))
        self._scorer = ExactScorer(open_backend(self._base), self._ring, pack_tokens=PACK_TOKENS)
        self._published = Published(self._backend, self._backend.vocab_size)
        self._routes = {
            name: make_route(name, cell, self._backend, self._base, self._published.bus)
            for name in dict.fromkeys((cell.route, *cell.shadows, "current_recompute"))
        }
        self._losses = {
            name: PolicyLoss(self._section.algo.settings(), proxy=route.proxy)
            for name, route in self._routes.items()
        }
        self._trainer = Trainer(
            self._backend,
            self._section,
            temperature=1.0,
            num_ages=self._num_ages,
            proxy=self._route.proxy,
        )
        rng = random.Random(cell.seed)
        self._episodes = [self._planned(v, rng) for v in range(self._section.versions)]
        """By the version that they are trained at."""
        self._credit = make_credit(self._section.algo)
        self._book = Book()

    @property
    def _route(self) -> OldLogprobRoute:
        return self._routes[self._cell.route]

    async def run(self) -> dict[str, Any]:
        """Train to the end, or to where the weights are no longer finite."""
        wall, cpu = time.perf_counter(), time.process_time()
        failure = ""
        await self._published.start()
        await self._player.start()
        await self._publish(0)
        for route in self._routes.values():
            await route.start()
        try:
            await self._evaluate(0)
            for version in range(self._section.versions):
                await self._step(version)
                if version + 1 in self._points:
                    await self._evaluate(version + 1)
        except (EngineDead, FloatingPointError, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"
        finally:
            for route in self._routes.values():
                await route.close()
            await self._player.close()
            await self._published.close()
        return {
            "key": self._cell.key,
            "cell": asdict(self._cell),
            "num_parameters": self._backend.num_parameters,
            **self._book.outcome(self._points, failure),
            "seconds": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
        }

    # --- one version
    async def _step(self, version: int) -> None:
        groups = self._played(version)
        rewards = [m.trajectory.reward for group in groups for m in group.members]
        self._book.trained.append(sum(rewards) / len(rewards))
        mixed = [g for g in groups if len({m.trajectory.reward for m in g.members}) > 1]
        self._book.mixed.append(len(mixed) / len(groups))
        if self._size.lean:
            groups = mixed
        if not groups:
            await self._publish(version + 1)
            return
        measured = (bool(self._cell.shadows) or self._cell.measured) and (
            version % self._size.measure_every == 0
        )
        if measured or any(self._routes[n].waits_for_scores for n in self._asked):
            groups = self._scored(groups)
        batch = decide_batch(
            groups,
            version=version,
            epoch=0,
            seed=derive_seed(self._cell.seed, "batch", version),
            credit=self._credit,
            max_staleness=self._num_ages - 1,
        )
        members = {m.ticket_id: m for group in groups for m in group.members}
        old = await self._ask(self._cell.route, members, version)
        items = build_items(batch, members, old.by_ticket)
        scalars = await self._compare(batch, members, items, version, measured=measured)
        started = time.process_time()
        outcome = self._trainer.step(items, version=version, seed=batch.seed)
        self._book.cost("training", cpu_s=time.process_time() - started)
        self._book.steps.append(outcome.scalars)
        await self._publish(version + 1)
        for name in self._asked:
            await self._routes[name].stepped(version + 1, scalars.get(name, outcome.scalars))

    @property
    def _asked(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self._cell.route, *self._cell.shadows)))

    def _planned(self, version: int, rng: random.Random) -> list[Episode]:
        size, last = self._size, self._section.versions
        plays: list[Play] = []
        for number in range(version * size.groups, (version + 1) * size.groups):
            task = TaskRef(dataset="frozen_lake", split="train", index=number, seed=self._cell.seed)
            for member in range(size.group_size):
                seed = derive_seed(self._cell.seed, "train", number * size.group_size + member)
                plays.append(Play(task, seed, turn_versions(self._cell.lag, version, last, rng)))
        return [self._player.episode(play) for play in plays]

    async def _sample(self, version: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Go on with whatever is due to a version that was just published."""
        started = time.process_time()
        flying = self._episodes[version : version + self._num_ages]
        if flying:
            await self._player.advance([e for es in flying for e in es], version, weights)
            self._book.cost("sampling", cpu_s=time.process_time() - started)

    def _played(self, version: int) -> list[CompleteGroup]:
        size = self._size
        members = [
            Scored(f"t{version}-{index}", 1, "", 0, episode.trajectory(), ())
            for index, episode in enumerate(self._episodes[version])
        ]
        self._episodes[version] = []
        return [
            CompleteGroup(f"g{start}", version, tuple(members[start : start + size.group_size]), ())
            for start in range(0, len(members), size.group_size)
        ]

    def _scored(self, groups: Sequence[CompleteGroup]) -> list[CompleteGroup]:
        before = self._scorer.cpu_s, self._scorer.forward_tokens, self._scorer.loads
        scored = self._scorer.scored([m for group in groups for m in group.members])
        self._book.cost(
            "scoring",
            cpu_s=self._scorer.cpu_s - before[0],
            forward_tokens=self._scorer.forward_tokens - before[1],
            loads=self._scorer.loads - before[2],
        )
        size = self._size.group_size
        return [
            CompleteGroup(g.group_id, g.issue_version, tuple(scored[i * size : (i + 1) * size]), ())
            for i, g in enumerate(groups)
        ]

    async def _ask(self, name: str, members: Mapping[str, Scored], version: int) -> OldLogprobs:
        started = time.process_time()
        old = await self._routes[name].at_step(list(members.values()), version)
        self._book.cost(
            name,
            critical_s=old.cost.seconds,
            cpu_s=time.process_time() - started,
            forward_tokens=float(old.cost.forward_tokens),
            held_bytes=float(old.cost.held_bytes),
        )
        if old.health:
            self._book.health.setdefault(name, []).append(dict(old.health))
        return old

    # --- beside the run
    async def _compare(
        self,
        batch: Batch,
        members: Mapping[str, Scored],
        items: BatchItems,
        version: int,
        *,
        measured: bool,
    ) -> dict[str, Mapping[str, float]]:
        """Ask the shadows; return by route what its loss would have reported."""
        due = [n for n in self._cell.shadows if measured or n in ALWAYS_ASKED]
        if not (due or measured):
            return {}
        given: dict[str, BatchItems] = {self._cell.route: items}
        for name in due:
            if name not in given:
                old = await self._ask(name, members, version)
                given[name] = build_items(batch, members, old.by_ticket)
        if not items.ages.size:
            return {}
        if "current_recompute" in given:
            start = given["current_recompute"]
        else:
            now = await self._routes["current_recompute"].at_step(list(members.values()), version)
            start = build_items(batch, members, now.by_ticket)
        arrivals = {
            name: arrival(self._losses[name], one, start, version=version)
            for name, one in given.items()
        }
        if measured:
            exact_items = build_items(batch, members, {t: m.scores for t, m in members.items()})
            loss = PolicyLoss(self._section.algo.settings())
            exact = arrival(loss, exact_items, start, version=version)
            for name, one in arrivals.items():
                scalars, by_age = differences(one, exact, version=version, num_ages=self._num_ages)
                self._book.errors.setdefault(name, []).append(scalars)
                self._book.by_age[name] = added(self._book.by_age.get(name, {}), by_age)
        return {n: one.scalars for n, one in arrivals.items() if n != self._cell.route}

    async def _publish(self, version: int) -> None:
        state = self._backend.state()
        self._ring.put(version, state)
        if "snapshot_old" in self._routes:
            await self._published.publish(version)
        await self._sample(version, sampler_state(state, self._cell.sampler))

    @property
    def _points(self) -> list[int]:
        """Versions that are evaluated, the base apart."""
        last, every = self._section.versions, self._size.eval_every
        return [v for v in range(1, last + 1) if v % every == 0 or v == last]

    async def _evaluate(self, version: int) -> None:
        last = version == self._section.versions
        count = self._size.final_episodes if last else self._size.eval_episodes
        episodes = [
            self._player.episode(
                Play(
                    TaskRef(dataset="frozen_lake", split="eval", index=i, seed=self._cell.seed),
                    derive_seed(self._cell.seed, "eval", i),
                    (version,) * MAX_TURNS,
                )
            )
            for i in range(count)
        ]
        state = self._backend.state()
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise FloatingPointError(f"weights of version {version} are not finite")
        await self._player.advance(episodes, version, state)
        self._book.evals.append((version, sum(e.reward for e in episodes) / count))
