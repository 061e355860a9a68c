"""A mixture of experts on real vLLM: every part can change alone, and what the router chose."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.rollout.engine import SampleResult, SampleSpec
from services.rollout.vllm_engine import VllmEngine
from services.rollout.vllm_names import ROUTING
from services.rollout.vllm_options import ServerOptions
from services.rollout.vllm_port import Sync
from services.rollout.vllm_server import VllmServer
from shared.wire.trajectory import RoutingRecord
from tests.rollout.engines import (
    ids_of,
    make_prompt,
    make_spec,
    stamps_of,
    started,
    stepwise,
    when_sampled,
)
from tests.rollout.mixtures import CHOICES, LAYERS, Expected, make_mixture_state, write_mixture_dir
from tests.rollout.models import TOLERANCE, State, write_model_dir
from tests.rollout.vllm.pool import DTYPES, Borrowed

EXPERT = "model.layers.2.mlp.experts.5."
PARTS = {
    "one matrix of one expert": lambda name: name == f"{EXPERT}up_proj.weight",
    "one expert": lambda name: name.startswith(EXPERT),
    "a router": lambda name: name == "model.layers.0.mlp.gate.weight",
    "a dense layer": lambda name: name.startswith("model.layers.1.mlp."),
    "everything": lambda name: True,
}
TIE = 1e-5
"""Closer probabilities may fall either way in two float32 forwards."""


@pytest.fixture
def mixture_dir(tmp_path: Path) -> Path:
    return write_mixture_dir(tmp_path / "mixture")


def rows_of(records: Sequence[RoutingRecord], version: int) -> npt.NDArray[Any]:
    """[T, L, K] of a version's records, which must follow each other from token 0."""
    mine = [record for record in records if record.version == version]
    assert [record.start for record in mine] == [0, *[record.stop for record in mine[:-1]]]
    return np.concatenate([record.experts.numpy() for record in mine])


def check_rows(spec: SampleSpec, result: SampleResult, version: int, state: State) -> None:
    """Every token before the last one that the version sampled took the reference's experts."""
    context = len(spec.token_ids) + len(stamps_of(result)) - 1
    context -= stamps_of(result)[::-1].index(version)
    expected = Expected(state, [*spec.token_ids, *ids_of(result)][:context])
    rows = rows_of(result.sampled.routing, version)
    assert rows.shape == (context, len(LAYERS), CHOICES)
    differ_TL = (np.sort(rows, -1) != expected.experts).any(-1)
    assert not (differ_TL & (expected.gaps > TIE)).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_every_part_of_a_mixture_can_change_alone_and_all_come_back(
    mixture_dir: Path, dtype: str
) -> None:
    """Against a reference that takes the recorded experts: in bfloat16 near ties fall both ways."""
    first, other = (make_mixture_state(seed, DTYPES[dtype]) for seed in (0, 1))
    async with started(Borrowed(mixture_dir, dtype)) as engine:
        await engine.update(0, first, None)
        start = await engine.sample(make_spec("start", make_prompt(1, 40)))
        version, current = 0, dict(first)
        for what, chosen in PARTS.items():
            changed = {name for name in first if chosen(name)}
            current = current | {name: other[name] for name in changed}
            version += 1
            await engine.update(version, current, changed)
            spec = make_spec(f"r{version}", make_prompt(version, 40), new=12)
            result = await engine.sample(spec)
            ids, rows = [*spec.token_ids, *ids_of(result)], rows_of(result.sampled.routing, version)
            expected = Expected(current, ids, np.concatenate([rows, rows[-1:]]))
            error = np.abs(result.sampled.logprobs.numpy() - expected.logprobs[40:])
            assert error.max() <= TOLERANCE[DTYPES[dtype]], what
        await engine.update(version + 1, first, None)
        again = await engine.sample(make_spec("start", make_prompt(1, 40)))
        assert ids_of(again) == ids_of(start)
        assert np.array_equal(again.sampled.logprobs.numpy(), start.sampled.logprobs.numpy())


async def test_recorded_experts_are_those_of_the_reference_also_where_the_prefix_was_cached(
    mixture_dir: Path,
) -> None:
    state = make_mixture_state(7)
    async with started(Borrowed(mixture_dir, "float32")) as engine:
        await engine.update(0, state, None)
        specs = [make_spec(f"r{i}", make_prompt(i, 20 + 7 * i), new=12) for i in range(6)]
        results = await asyncio.gather(*[engine.sample(spec) for spec in specs])
        for spec, result in zip(specs, results, strict=True):
            check_rows(spec, result, 0, state)
        # The engine may be a step ahead of the token that ends a turn.
        stop = ids_of(results[4])[6]
        short = make_spec("short", specs[4].token_ids, new=12, stop_ids=(stop,))
        result = await engine.sample(short)
        assert (result.finish, ids_of(result)[-1]) == ("stop", stop)
        check_rows(short, result, 0, state)
        prefix = (*specs[5].token_ids, *ids_of(results[5]), 3, 1, 4)
        before = engine.load().counters["prefix_hit_tokens"]
        spec = make_spec("next", prefix, new=5)
        result = await engine.sample(spec)
        assert engine.load().counters["prefix_hit_tokens"] - before >= 32
        check_rows(spec, result, 0, state)
        held = make_spec("held", prefix, new=5, routing_held=(0, 61))
        (record,) = (await engine.sample(held)).sampled.routing
        assert (record.start, record.stop) == (61, len(prefix) + 4)
        rows = rows_of(result.sampled.routing, 0)
        assert np.array_equal(record.experts.numpy(), rows[61:])
        assert await engine.server._llm.collective_rpc(ROUTING, args=("1",)) == [[]]


@pytest.mark.parametrize("mode", ["keep", "interrupt"])
async def test_an_update_in_mid_turn_leaves_the_rows_of_both_versions(
    mixture_dir: Path, mode: Any
) -> None:
    first, second = make_mixture_state(4), make_mixture_state(5)
    async with started(Borrowed(mixture_dir, "float32")) as engine:
        await engine.update(0, first, None)
        engine._engine._sync = Sync(mode=mode)
        spec, other = make_spec("r", make_prompt(4, 45)), make_spec("s", make_prompt(5, 33), new=4)
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(engine.sample(spec))
            with stepwise(engine):
                await asyncio.sleep(0)
                await when_sampled(engine, "r", 3)
                await engine.update(1, second, None)
                # Takes blocks that the first turn had under the version before.
                beside = group.create_task(engine.sample(other))
        result = answer.result()
        check_rows(spec, result, 0, first)
        check_rows(other, beside.result(), 1, second)
        if mode == "keep":
            assert stamps_of(result) == [0] * 3 + [1] * 3
            check_rows(spec, result, 1, second)
            assert {record.version for record in result.sampled.routing} == {0, 1}
        else:
            assert (result.finish, stamps_of(result)) == ("interrupted", [0] * 3)
            rest = make_spec(
                "rest", (*spec.token_ids, *ids_of(result)), new=3, routing_held=(0, 47)
            )
            check_rows(rest, await engine.sample(rest), 1, second)


async def test_over_a_kept_cache_each_version_has_the_rows_that_it_computed(
    mixture_dir: Path,
) -> None:
    first, second = make_mixture_state(4), make_mixture_state(5)
    async with started(Borrowed(mixture_dir, "float32")) as engine:
        await engine.update(0, first, None)
        engine._engine._sync = Sync(mode="keep", keep_kv=True)
        spec = make_spec("r", make_prompt(4, 45))
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(engine.sample(spec))
            with stepwise(engine):
                await asyncio.sleep(0)
                await when_sampled(engine, "r", 3)
                await engine.update(1, second, None)
        result = answer.result()
    check_rows(spec, result, 0, first)
    ranges = [(r.version, r.start, r.stop) for r in result.sampled.routing]
    assert ranges == [(0, 0, 47), (1, 47, 50)]


async def test_rows_are_right_while_turns_are_preempted_cancelled_and_updated(
    mixture_dir: Path,
) -> None:
    """The cache is so small that turns lose their blocks to each other all the time."""
    states, block_bytes = [make_mixture_state(seed) for seed in range(8)], 3 * 2 * 2 * 32 * 32 * 4
    options = ServerOptions(
        mixture_dir, "float32", 96, 8, 64, kv_cache_bytes=9 * block_bytes, record_routing=True
    )
    engine = VllmEngine(VllmServer(options), dtype=torch.float32, context_tokens=96, sync=Sync())
    async with started(engine):
        await engine.update(0, states[0], None)
        specs = [make_spec(f"r{i}", make_prompt(i % 5, 20 + i), new=45) for i in range(24)]
        turns = [asyncio.ensure_future(engine.sample(spec)) for spec in specs]
        for version, state in enumerate(states[1:], 1):
            await asyncio.sleep(0.05)
            turns[3 * version].cancel()
            await engine.update(version, state, None)
        results = await asyncio.gather(*turns, return_exceptions=True)
        assert engine.load().counters["preemptions"] > 0
    crossed = 0
    for spec, result in zip(specs, results, strict=True):
        if isinstance(result, asyncio.CancelledError):
            continue
        assert isinstance(result, SampleResult)
        crossed += len(set(stamps_of(result))) > 1
        for version in set(stamps_of(result)):
            check_rows(spec, result, version, states[version])
    assert crossed


async def test_turns_that_ended_keep_their_rows_until_a_busy_rollout_takes_them(
    mixture_dir: Path,
) -> None:
    options = ServerOptions(mixture_dir, "float32", 96, 2, 64, record_routing=True)
    engine = VllmEngine(VllmServer(options), dtype=torch.float32, context_tokens=96, sync=Sync())
    state = make_mixture_state(3)
    async with started(engine):
        await engine.update(0, state, None)
        specs = [make_spec(f"r{i}", make_prompt(i, 20), new=2) for i in range(24)]
        turns = [asyncio.ensure_future(engine.sample(spec)) for spec in specs]
        await asyncio.sleep(0.01)
        time.sleep(1.0)  # noqa: ASYNC251 - the rollout is busy; its engine is not
        results = await asyncio.gather(*turns)
    for spec, result in zip(specs, results, strict=True):
        check_rows(spec, result, 0, state)


async def test_two_ranks_hold_their_parts_of_every_expert_and_the_first_records(
    mixture_dir: Path,
) -> None:
    options = ServerOptions(
        mixture_dir,
        "float32",
        96,
        8,
        64,
        tensor_parallel_size=2,
        kv_cache_bytes=16 << 20,
        record_routing=True,
    )
    engine = VllmEngine(VllmServer(options), dtype=torch.float32, context_tokens=96, sync=Sync())
    async with started(engine):
        for version, seed in enumerate((7, 8)):
            state = make_mixture_state(seed)
            await engine.update(version, state, None)
            spec = make_spec(f"r{version}", make_prompt(version, 40), new=12)
            result = await engine.sample(spec)
            expected = Expected(state, [*spec.token_ids, *ids_of(result)])
            error = np.abs(result.sampled.logprobs.numpy() - expected.logprobs[40:])
            assert error.max() <= TOLERANCE[torch.float32]
            check_rows(spec, result, version, state)


def test_a_dense_model_has_nothing_to_record(tmp_path: Path) -> None:
    model_dir = write_model_dir(tmp_path, tied=False)
    with pytest.raises(ValueError, match=r"no experts to record: take model\.routing: recompute"):
        VllmServer(ServerOptions(model_dir, "float32", 96, 8, 64, record_routing=True))
