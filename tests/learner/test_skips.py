"""A loss or gradient that is not finite: skipped, counted, and in a row only up to a bound."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.learner import step_inputs
from services.learner.config import LearnerConfig
from services.learner.items import BatchItems, build_items
from services.learner.skips import SkipBound
from services.learner.trainer import OrNotFinite
from shared.algo.batching import pack
from shared.algo.losses import Denominators
from shared.algo.policy_loss import PolicyLoss
from shared.backends.rank_commands import noted
from shared.backends.torch_backend import TorchBackend
from shared.runtime.algo_section import AlgoSection
from shared.runtime.errors import Fatal
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.runtime.service import cause_of
from shared.wire.codec import decode
from shared.wire.journal import Batch
from shared.wire.subjects import Subjects
from shared.wire.telemetry import StepReport
from tests.learner.crash_world import (
    NUM_VERSIONS,
    config_for,
    digests_of,
    journal_of,
    learn,
    players,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("limit", "norms", "in_a_row"),
    [
        (2, [1.0, 2.0], 0),
        (2, [NAN, INF], 2),
        (2, [NAN, INF, 1.0, NAN], 1),
        (2, [NAN, INF, NAN], None),
        (0, [1.0], 0),
        (0, [NAN], None),
        (1, [], 0),
    ],
)
def test_more_than_so_many_skips_in_a_row_stop_the_run(
    limit: int, norms: list[float], in_a_row: int | None
) -> None:
    bound = SkipBound(limit)
    if in_a_row is None:
        with pytest.raises(Fatal, match=r"in a row .* raise learner.max_skipped_steps") as raised:
            bound.observe(7, norms)
        assert "\n" not in str(raised.value)
        assert "from version 7" in str(raised.value)
    else:
        bound.observe(7, norms)
        assert bound.in_a_row == in_a_row


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_loss_that_is_not_finite_is_not_applied_though_its_gradient_is_finite(
    model_dir: Path, value: float
) -> None:
    backend = TorchBackend(torch.float32)
    backend.load_hf(model_dir)
    before = {name: tensor.clone() for name, tensor in backend.state().items()}
    batch = pack([np.arange(8), np.arange(5)])
    sound = OrNotFinite(lambda o, _: o.logprobs_T.sum())
    poisoned = OrNotFinite(lambda o, _: o.logprobs_T.sum() + value)
    for loss_fn in (sound, poisoned, sound):  # one micro-batch of three
        backend.accumulate([batch], loss_fn, temperature=1.0, with_entropy=False)
    assert not math.isfinite(backend.step(1e-2, max_grad_norm=1.0))
    assert all(torch.equal(before[n], tensor) for n, tensor in backend.state().items())
    backend.accumulate([batch], sound, temperature=1.0, with_entropy=False)
    assert math.isfinite(backend.step(1e-2, max_grad_norm=1.0))
    assert not all(torch.equal(before[n], tensor) for n, tensor in backend.state().items())


def test_the_check_goes_to_other_ranks_with_its_loss_and_what_they_noted_comes_back() -> None:
    loss = PolicyLoss(AlgoSection().settings()).minibatch(
        Denominators(3.0, 1.0, 0.0), version_now=2
    )
    there = pickle.loads(pickle.dumps(OrNotFinite(loss)))
    there.merge([(None, 0.5), (None, 0.25)])
    assert there.loss_fn.loss == 0.75
    there.merge([])
    assert noted(there) == []


def poison(monkeypatch: pytest.MonkeyPatch, *versions: int) -> None:
    """Let the advantages of the steps that leave these versions be infinite."""

    def build(batch: Batch, *arguments: Any) -> BatchItems:
        items = build_items(batch, *arguments)
        if batch.version not in versions:
            return items
        bad = [replace(i, advantages=np.full_like(i.advantages, INF)) for i in items.items]
        return replace(items, items=tuple(bad))

    monkeypatch.setattr(step_inputs, "build_items", build)


def tolerant(config: LearnerConfig, max_skipped_steps: int) -> LearnerConfig:
    learner = config.learner.model_copy(update={"max_skipped_steps": max_skipped_steps})
    return config.model_copy(update={"learner": learner})


async def test_a_poisoned_batch_changes_no_weight_and_training_goes_on(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2)
    server = MemoryServer()
    async with players(server):
        assert not await learn(server, config_for(model_dir, tmp_path), "first", None)
    digests = await digests_of(server)
    assert digests[2] == digests[3]
    assert len({*digests.values()}) == NUM_VERSIONS
    bus = MemoryBus(Subjects("crash"), server)
    records = [await bus.get("stats", version) for version in range(1, NUM_VERSIONS + 1)]
    reports = [decode(record.payload, StepReport) for record in records if record]
    assert [r.scalars["skipped_steps"] for r in reports] == [0, 0, 2, 0, 0]


async def test_beyond_the_bound_the_run_stops_and_what_is_published_stays(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also over restarts: a checkpoint knows how many were skipped, and the journal the batch."""
    poison(monkeypatch, 2, 3, 4)
    server, config = MemoryServer(), tolerant(config_for(model_dir, tmp_path), 5)
    async with players(server):
        for incarnation in ("first", "a restart changes nothing"):
            with pytest.raises((Fatal, ExceptionGroup)) as raised:
                await learn(server, config, incarnation, None)
            line = str(cause_of(raised.value))
            assert line.startswith("6 optimizer steps in a row")
            assert "in the step from version 4: none was applied" in line
            digests = await digests_of(server)
            assert list(digests) == [0, 1, 2, 3, 4]
            assert digests[2] == digests[3] == digests[4]
        assert not await learn(server, tolerant(config, 6), "allowed to", None)
    batches = [e.body for e in await journal_of(server) if isinstance(e.body, Batch)]
    assert [batch.version for batch in batches] == list(range(NUM_VERSIONS))
    assert (await digests_of(server))[NUM_VERSIONS] == digests[2]
