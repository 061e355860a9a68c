"""What is particular to the torch engine: mutations, bfloat16, its independence of transformers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from services.rollout.qwen3_config import parse_config
from services.rollout.qwen3_weights import cast_digest
from services.rollout.torch_engine import TorchEngine
from tests.rollout.engines import (
    Versions,
    ids_of,
    make_prompt,
    make_spec,
    stamps_of,
    started,
    when_sampled,
)
from tests.rollout.models import CONFIG


class KeepsStaleKeysAndValues(TorchEngine):
    """The mutant of offpolicy.md 9.2: goes on over the cache of the older weights."""

    def _forget_keys_and_values(self) -> None:
        return


class StampsLate(TorchEngine):
    """The mutant that stamps with the version at the end of the turn."""

    def _finish(self, row, finish) -> None:  # type: ignore[no-untyped-def]
        row.spans = [(self.version, 0, row.num_sampled)] if row.num_sampled else []
        super()._finish(row, finish)


async def _error_across_an_update(engine: TorchEngine, versions: Versions) -> float:
    async with started(engine):
        await engine.update(0, versions[0], None)
        spec = make_spec("r", make_prompt(1, 30), new=8)
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(engine.sample(spec))
            await asyncio.sleep(0)
            await when_sampled(engine, "r", 4)
            await engine.update(1, versions[1], None)
        return versions.error(spec, answer.result())


@pytest.mark.parametrize("mutant", [KeepsStaleKeysAndValues, StampsLate])
async def test_the_exactness_test_sees_the_mutant(
    untied_dir: Path, mutant: type[TorchEngine]
) -> None:
    versions = Versions(tied=False, dtype=torch.float64)
    sound = TorchEngine(untied_dir, dtype="float64", context_tokens=96)
    assert await _error_across_an_update(sound, versions) < 1e-10
    mutated = mutant(untied_dir, dtype="float64", context_tokens=96)
    assert await _error_across_an_update(mutated, versions) > 1e-2


async def test_a_prefix_kept_across_an_update_would_be_seen(untied_dir: Path) -> None:
    versions = Versions(tied=False, dtype=torch.float64)
    for engine_class, exact in ((TorchEngine, True), (KeepsStaleKeysAndValues, False)):
        async with started(engine_class(untied_dir, dtype="float64", context_tokens=96)) as engine:
            await engine.update(0, versions[0], None)
            prompt = make_prompt(1, 30)
            first = await engine.sample(make_spec("turn0", prompt))
            await engine.update(1, versions[1], None)
            spec = make_spec("turn1", (*prompt, *ids_of(first), 1, 2, 3))
            error = versions.error(spec, await engine.sample(spec))
            assert (error < 1e-10) == exact


async def test_bfloat16_is_really_computed_in(untied_dir: Path) -> None:
    versions = Versions(tied=False, dtype=torch.float32)
    small = {n: t * 0.3 if t.dim() > 1 else t for n, t in versions[0].items()}
    versions.states[0] = small
    async with started(TorchEngine(untied_dir, dtype="bfloat16", context_tokens=96)) as engine:
        await engine.update(0, small, None)
        specs = [make_spec(f"r{i}", make_prompt(i, 30), new=20, seed=i) for i in range(8)]
        results = await asyncio.gather(*[engine.sample(spec) for spec in specs])
        errors = np.concatenate(
            [
                result.sampled.logprobs.numpy() - versions.expected(spec, result, 0)
                for spec, result in zip(specs, results, strict=True)
            ]
        )
        assert np.abs(errors).max() < 0.2
        assert np.abs(errors).mean() > 1e-3
        assert engine._weights.layers[0].qkv.dtype == torch.bfloat16
        assert engine.device_digest() == cast_digest(small, torch.bfloat16)


async def test_slots_are_reused_and_evicted_without_mixing_rows(untied_dir: Path) -> None:
    versions = Versions(tied=False, dtype=torch.float64)
    engine = TorchEngine(
        untied_dir, dtype="float64", context_tokens=96, max_running=3, kv_slots=4, step_tokens=16
    )
    async with started(engine):
        await engine.update(0, versions[0], None)

        async def episode(index: int) -> None:
            ids = make_prompt(index, 18 + index)
            for turn in range(4):
                spec = make_spec(f"{index}.{turn}", ids, new=3, seed=index)
                result = await engine.sample(spec)
                assert versions.error(spec, result) < 1e-10
                assert stamps_of(result) == [0, 0, 0]
                ids = (*ids, *ids_of(result), *make_prompt(turn, 4))

        async with asyncio.TaskGroup() as group:
            for index in range(10):
                group.create_task(episode(index))
        assert engine.load().kv_used_ratio == 1.0
        assert engine.load().counters["sampled_tokens"] == 120


def test_the_engine_needs_neither_transformers_nor_the_training_backends() -> None:
    script = (
        "import sys, services.rollout.torch_engine\n"
        "print([m for m in sys.modules if m.startswith(('transformers', 'shared.backends'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model_type": "qwen2_moe"}, "'qwen2_moe'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope type 'yarn'"),
        ({"num_key_value_heads": 3}, "4 heads over 3"),
    ],
)
def test_a_model_with_another_forward_is_refused(changes: dict, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        parse_config(CONFIG | changes)


def test_both_spellings_of_the_rotary_base_are_read() -> None:
    old = {k: v for k, v in CONFIG.items() if k != "rope_parameters"} | {"rope_theta": 5000.0}
    assert parse_config(old).rope_theta == 5000.0
    assert parse_config(CONFIG).rope_theta == 10000.0
