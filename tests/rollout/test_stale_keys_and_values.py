"""Why an engine recomputes keys and values at a swap: what keeping them does to D.

Tokens sampled over a cache of older weights are stamped with the new version, but no single version
is the policy that sampled them: D differs from 1 in float64, from the first token after the swap on
(`offpolicy.md` 9.2).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import torch

from services.rollout.torch_engine import TorchEngine
from shared.algo.diagnostics import k3
from tests.rollout.engines import Versions, make_prompt, make_spec, stamps_of, started, when_sampled

REQUESTS, NEW = 24, 15
SWAPS = (5, 10)
"""Sampled tokens of the first request when a version arrives."""


class KeepsKeysAndValues(TorchEngine):
    """A test double that goes on over the cache of the older weights, and stamps as ever."""

    def _forget_keys_and_values(self) -> None:
        return


def _versions() -> Versions:
    """Three versions on a line, as far apart as a large optimizer step."""
    versions = Versions(tied=False, dtype=torch.float64)
    start, other = versions[0], Versions(tied=False, dtype=torch.float64)[1]
    for number in range(1, 3):
        share = 0.1 * number
        versions.states[number] = {n: torch.lerp(start[n], other[n], share) for n in start}
    return versions


async def _k3_around_swaps(engine: TorchEngine) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean k3(D): before the first swap, and just before and after each swap."""
    versions = _versions()
    specs = [
        make_spec(f"r{i}", make_prompt(i, 20), new=NEW, seed=i, stop_ids=())
        for i in range(REQUESTS)
    ]
    async with started(engine):
        await engine.update(0, versions[0], None)
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(engine.sample(spec)) for spec in specs]
            await asyncio.sleep(0)
            for version, position in enumerate(SWAPS, start=1):
                await when_sampled(engine, "r0", position)
                await engine.update(version, versions[version], None)
    untouched: list[float] = []
    around: list[list[tuple[float, float]]] = [[] for _ in SWAPS]
    for spec, answer in zip(specs, answers, strict=True):
        stamps = np.array(stamps_of(answer.result()))
        assert len(stamps) == NEW
        of_stamp = np.stack([versions.expected(spec, answer.result(), v) for v in range(3)])
        log_d = of_stamp[stamps, np.arange(NEW)] - answer.result().sampled.logprobs.numpy()
        found = k3(torch.from_numpy(log_d)).numpy()
        untouched.extend(found[stamps == 0])
        for version in range(1, 3):
            first = int(np.argmax(stamps == version))
            assert stamps[first - 1] == version - 1
            around[version - 1].append((found[first - 1], found[first]))
    means = np.array([np.mean(pairs, axis=0) for pairs in around])
    return np.array(untouched), means[:, 0], means[:, 1]


def _engine(kind: type[TorchEngine], model_dir: Path) -> TorchEngine:
    return kind(
        model_dir, dtype="float64", context_tokens=64, max_running=REQUESTS, kv_slots=REQUESTS
    )


async def test_with_keys_and_values_recomputed_the_discrepancy_is_none_across_swaps(
    untied_dir: Path,
) -> None:
    untouched, before, after = await _k3_around_swaps(_engine(TorchEngine, untied_dir))
    for found in (untouched, before, after):
        assert np.abs(found).max() < 1e-18


async def test_with_keys_and_values_kept_the_discrepancy_rises_at_the_first_token_after_each_swap(
    untied_dir: Path,
) -> None:
    untouched, before, after = await _k3_around_swaps(_engine(KeepsKeysAndValues, untied_dir))
    assert np.abs(untouched).max() < 1e-18
    assert before[0] < 1e-18
    assert after[0] > 1e-4
    assert after[1] > 1.5 * before[1] > 1e-4
