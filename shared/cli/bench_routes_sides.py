"""What surrounds a training run in one process: configuration, routes, published weights."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from services.learner.config import LearnerSection, OptimizerSection
from services.learner.routes.base import OldLogprobRoute, RouteContext
from services.learner.routes.registry import ROUTES
from shared.algo.correction_specs import IcePop
from shared.algo.ewma_control import ASYNC, EwmaSettings
from shared.algo.objective_specs import Ppo
from shared.backends.base import Backend
from shared.backends.torch_backend import TorchBackend
from shared.cli.bench_routes_cells import Cell, Size
from shared.cli.bench_routes_episodes import oldest_age
from shared.cli.bench_routes_world import CONTEXT_TOKENS, open_backend
from shared.runtime.algo_section import AlgoSection
from shared.runtime.bus import Bus
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.sections import OldLogprobsSection, WeightsSection
from shared.weights.assembly import make_publisher
from shared.weights.canary import backend_scorer, canary_tokens, make_canary
from shared.wire.subjects import Subjects

PACK_TOKENS = 8192
WEIGHTS = WeightsSection(threads=1)


def learner_section(cell: Cell, size: Size) -> LearnerSection:
    """Return how a cell trains."""
    low, high = cell.setting.mask
    clip = cell.setting.clip
    return LearnerSection(
        versions=cell.versions or size.versions,
        optimizer=OptimizerSection(
            lr=cell.setting.lr,
            final_ratio=0.1,
            betas=(0.9, 0.99),
            minibatches=2,
            micro_batch_tokens=PACK_TOKENS,
        ),
        algo=AlgoSection(
            corrections=(IcePop(low=low, high=high),),
            objective=Ppo(low=clip, high=clip, dual=3.0),
        ),
    )


def make_route(
    name: str, cell: Cell, backend: TorchBackend, base: Path, bus: Bus
) -> OldLogprobRoute:
    """Build a product route around the weights being trained."""
    return ROUTES[name](
        RouteContext(
            backend=backend,
            make_scorer=partial(open_backend, base),
            bus=bus,
            log=Log("learner", "bench"),
            weights=WEIGHTS,
            section=OldLogprobsSection(ewma=_ewma(name, cell)),
            temperature=1.0,
            pack_tokens=PACK_TOKENS,
            max_staleness=oldest_age(cell.lag),
        )
    )


def _ewma(name: str, cell: Cell) -> EwmaSettings | None:
    """Return settings other than the route's own, None where it keeps them."""
    settings = ASYNC if name == "ppo_ewma_async" else EwmaSettings()
    if cell.beta is not None:
        settings = replace(settings, beta=cell.beta)
    if cell.auto_reset is not None:
        settings = replace(settings, auto_reset=cell.auto_reset)
    return settings if (cell.beta, cell.auto_reset) != (None, None) else None


class Published:
    """The weights on an in-memory bus, for routes that follow them there."""

    def __init__(self, backend: Backend, vocab_size: int) -> None:
        self.bus = MemoryBus(Subjects("bench"))
        self.cpu_s = 0.0
        self._backend = backend
        self._publisher = make_publisher(
            WEIGHTS, self.bus, Log("learner", "bench"), model_id="policy", producer="bench"
        )
        self._canary_ids = canary_tokens(vocab_size, CONTEXT_TOKENS, seed=0)

    async def start(self) -> None:
        await self.bus.create_streams()
        await self._publisher.start()

    async def publish(self, optimizer_steps: int) -> None:
        """Publish the backend's weights as the next version."""
        started = time.process_time()
        score = backend_scorer(self._backend)
        await self._publisher.publish(
            self._backend.state(),
            canary=make_canary(score, self._canary_ids, self._backend.dtype),
            epoch=0,
            optimizer_steps=optimizer_steps,
        )
        self.cpu_s += time.process_time() - started

    async def close(self) -> None:
        await self.bus.close()
