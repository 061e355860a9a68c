"""What only real vLLM can show: dtypes, tied heads, modes, deaths of the engine's process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.rollout.config import RolloutConfig
from services.rollout.engine import EngineDead
from services.rollout.vllm_metrics import VllmCollector
from services.rollout.vllm_options import ServerOptions
from services.rollout.vllm_port import Sync
from services.rollout.vllm_server import VllmServer
from tests.rollout.engines import (
    Versions,
    ids_of,
    make_prompt,
    make_spec,
    stamps_of,
    started,
    stepwise,
    when_sampled,
)
from tests.rollout.models import TOLERANCE, make_state, reference_logprobs, write_model_dir
from tests.rollout.pods import World, eventually, make_request
from tests.rollout.vllm.pool import DTYPES, Borrowed

EXACT = TOLERANCE[torch.float32]
ROOT = Path(__file__).resolve().parents[3]


def pid_of(engine: Any) -> int:
    return engine.server._llm.engine_core.resources.engine_manager.processes[0].pid


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_every_tensor_can_change_alone_and_then_all_come_back(
    model_dir: Path, tied: bool, dtype: str
) -> None:
    """Fused parts, norms, the tied table: each alone would leave stale or undefined neighbours."""
    versions = Versions(tied=tied, dtype=DTYPES[dtype])
    first, other = versions[0], versions[1]
    tolerance = TOLERANCE[DTYPES[dtype]]
    names = [n for n in first if ".layers.0." not in n]
    async with started(Borrowed(model_dir, dtype)) as engine:
        await engine.update(0, first, None)
        start = await engine.sample(make_spec("start", make_prompt(1, 20)))
        current = dict(first)
        for version, name in enumerate(names, 1):
            current = current | {name: other[name]}
            versions.states[version] = current
            await engine.update(version, current, {name})
            spec = make_spec(f"r{version}", make_prompt(version, 20))
            result = await engine.sample(spec)
            assert versions.error(spec, result) <= tolerance, name
        last = len(names) + 1
        versions.states[last] = first
        await engine.update(last, first, set(names))
        again = await engine.sample(make_spec("start", make_prompt(1, 20)))
        assert ids_of(again) == ids_of(start)
        assert np.array_equal(again.sampled.logprobs.numpy(), start.sampled.logprobs.numpy())


async def test_bfloat16_tells_versions_apart(model_dir: Path, tied: bool) -> None:
    versions = Versions(tied=tied, dtype=torch.bfloat16)
    async with started(Borrowed(model_dir, "bfloat16")) as engine:
        for version in (0, 1):
            await engine.update(version, versions[version], None)
            specs = [make_spec(f"{version}.{i}", make_prompt(i, 12), new=12) for i in range(4)]
            results = await asyncio.gather(*[engine.sample(spec) for spec in specs])
            errors = {0: 0.0, 1: 0.0}
            for spec, result in zip(specs, results, strict=True):
                reported = result.sampled.logprobs.numpy()
                for other in errors:
                    expected = versions.expected(spec, result, other)
                    errors[other] += float(np.abs(reported - expected).mean()) / len(specs)
            assert errors[version] < 0.03
            assert errors[1 - version] > 0.5


@pytest.mark.parametrize(
    ("sync", "finish", "stamps"),
    [
        (Sync(mode="keep"), "length", [0] * 3 + [1] * 3),
        (Sync(mode="interrupt"), "interrupted", [0] * 3),
        (Sync(mode="wait"), "length", [0] * 6),
        (Sync(mode="wait", wait_s=0.2), "interrupted", [0] * 3),
    ],
    ids=["keep", "interrupt", "wait", "wait_bound"],
)
async def test_each_mode_stamps_exactly_and_loses_nothing(
    untied_dir: Path, sync: Sync, finish: str, stamps: list[int]
) -> None:
    versions = Versions(tied=False, dtype=torch.float32)
    async with started(Borrowed(untied_dir, "float32")) as engine:
        await engine.update(0, versions[0], None)
        engine._engine._sync = sync
        spec = make_spec("r", make_prompt(4, 30))
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(engine.sample(spec))
            with stepwise(engine):
                await asyncio.sleep(0)
                await when_sampled(engine, "r", 3)
                update = group.create_task(engine.update(1, versions[1], None))
                if finish == "length" and sync.mode == "wait":
                    await asyncio.sleep(0.1)
                else:
                    await update
            await update
        result = answer.result()
        assert (result.finish, stamps_of(result)) == (finish, stamps)
        assert versions.error(spec, result) <= EXACT
        rest = make_spec("rest", (*spec.token_ids, *ids_of(result)), new=2)
        after = await engine.sample(rest)
        assert stamps_of(after) == [1, 1]
        assert versions.error(rest, after) <= EXACT


async def test_kept_keys_and_values_are_marked_and_really_are_inexact(untied_dir: Path) -> None:
    versions = Versions(tied=False, dtype=torch.float32)
    async with started(Borrowed(untied_dir, "float32")) as engine:
        await engine.update(0, versions[0], None)
        engine._engine._sync = Sync(mode="keep", keep_kv=True)
        spec = make_spec("r", make_prompt(4, 40))
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(engine.sample(spec))
            with stepwise(engine):
                await asyncio.sleep(0)
                await when_sampled(engine, "r", 3)
                await engine.update(1, versions[1], None)
        result = answer.result()
        assert stamps_of(result) == [0] * 3 + [1] * 3
        assert result.sampled.mixed_kv
        assert versions.error(spec, result) > 100 * EXACT
        # The salt keeps the older prefix from whoever comes later.
        later = make_spec("later", spec.token_ids)
        clean = await engine.sample(later)
        assert not clean.sampled.mixed_kv
        assert versions.error(later, clean) <= EXACT


async def test_tokens_are_drawn_from_the_distribution_that_is_reported(untied_dir: Path) -> None:
    state = make_state(0, tied=False, dtype=torch.float32)
    prompt, draws, temperature = make_prompt(3, 10), 1200, 1.4
    async with started(Borrowed(untied_dir, "float32")) as engine:
        await engine.update(0, state, None)
        specs = [
            make_spec(f"r{i}", prompt, new=1, seed=i, temperature=temperature) for i in range(draws)
        ]
        results = await asyncio.gather(*[engine.sample(spec) for spec in specs])
    counts = np.zeros(29)
    for result in results:
        counts[ids_of(result)[0]] += 1
    expected = draws * np.exp(
        [
            reference_logprobs(state, (*prompt, i), tied=False, temperature=temperature)[-1]
            for i in range(29)
        ]
    )
    frequent = expected >= 5
    deviation = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
    # Chi-squared: mean n, standard deviation sqrt(2 n).
    assert deviation < frequent.sum() + 5 * (2 * frequent.sum()) ** 0.5
    assert frequent.sum() > 3


async def test_given_text_is_scored_as_the_reference_does(model_dir: Path, tied: bool) -> None:
    texts = [np.array(make_prompt(seed, length)) for seed, length in enumerate((16, 1, 40, 2))]
    async with started(Borrowed(model_dir, "float32")) as engine:
        for version in (0, 1):
            state = make_state(version, tied=tied, dtype=torch.float32)
            await engine.update(version, state, None)
            for text, row in zip(texts, await engine.score(texts), strict=True):
                expected = reference_logprobs(state, text.tolist(), tied=tied)
                assert np.abs(row - np.array(expected)).max() <= EXACT


async def test_an_engine_process_killed_under_load_is_an_engine_dead_for_everybody(
    untied_dir: Path,
) -> None:
    state = make_state(0, tied=False, dtype=torch.float32)
    async with started(Borrowed(untied_dir, "float32")) as engine:
        await engine.update(0, state, None)
        with stepwise(engine):
            tasks = [
                asyncio.ensure_future(engine.sample(make_spec(f"r{i}", make_prompt(i, 9))))
                for i in range(12)
            ]
            await when_sampled(engine, "r0", 2)
            os.kill(pid_of(engine), signal.SIGKILL)
            answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 15)
        assert {type(answer) for answer in answers} == {EngineDead}
        assert engine.failure
        with pytest.raises(EngineDead):
            await engine.update(1, state, None)


async def test_an_engine_process_killed_during_a_swap_ends_the_swap(untied_dir: Path) -> None:
    state = make_state(0, tied=False, dtype=torch.float32)
    async with started(Borrowed(untied_dir, "float32")) as engine:
        await engine.update(0, state, None)
        pid = pid_of(engine)
        os.kill(pid, signal.SIGSTOP)  # the pause is asked for and not answered
        update = asyncio.ensure_future(engine.update(1, state, None))
        await asyncio.sleep(0.3)
        assert not update.done()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDead):
            await asyncio.wait_for(update, 15)
        assert engine.version == -1


async def test_a_pod_whose_engine_process_dies_while_idle_goes_unready_and_comes_back(
    untied_dir: Path,
) -> None:
    world, made = World(untied_dir), []

    def make(_: RolloutConfig) -> Any:
        made.append(Borrowed(untied_dir, "float32"))
        return made[-1]

    await world.publish_seed(0)
    async with asyncio.timeout(200), world.pod(make=make, wait=False) as context:
        await eventually(lambda: context.health.ready, 100)
        assert (await world.answer(make_request("before"))).kind == "done"
        os.kill(pid_of(made[0]), signal.SIGKILL)
        await eventually(lambda: not context.health.ready, 15)
        assert "engine" in context.health.reason
        refused = await world.answer(make_request("meanwhile"))
        assert (refused.kind, refused.retryable) == ("refused", True)
        await eventually(lambda: context.health.ready, 100)
        assert (await world.answer(make_request("after"))).kind == "done"
        assert context.version == 0
        assert len(made) == 2
    await world.bus.close()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("before", ["", "    import numba\n"], ids=["forked", "spawned_for_numba"])
async def test_an_engine_ends_with_its_rollout_and_not_with_ctrl_c(
    untied_dir: Path, before: str
) -> None:
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from services.rollout.vllm_options import ServerOptions\n"
        "from services.rollout.vllm_server import VllmServer\n"
        "async def main():\n"
        "    options = ServerOptions(Path(sys.argv[1]), 'bfloat16', 96, 8, 64,\n"
        "                            kv_cache_bytes=16 << 20)\n"
        "    server = VllmServer(options)\n"
        "    await server.start()\n"
        "    manager = server._llm.engine_core.resources.engine_manager\n"
        "    print('pid', manager.processes[0].pid, flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        f"if __name__ == '__main__':\n{before}"
        "    asyncio.run(main())\n"
    )
    program = untied_dir / "program.py"
    program.write_text(script)
    rollout = await asyncio.create_subprocess_exec(
        sys.executable,
        str(program),
        str(untied_dir),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert rollout.stdout is not None
    engine = 0
    async with asyncio.timeout(300):
        while not engine and not rollout.stdout.at_eof():
            words = (await rollout.stdout.readline()).split()
            engine = int(words[1]) if words[:1] == [b"pid"] else 0
    assert engine, "it did not start"
    os.kill(engine, signal.SIGINT)
    await asyncio.sleep(0.5)
    assert _lives(engine)
    rollout.kill()
    await rollout.wait()
    await eventually(lambda: not _lives(engine), 15)


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


async def test_vllms_own_metrics_are_exported_with_bounded_labels(untied_dir: Path) -> None:
    async with started(Borrowed(untied_dir, "float32")) as engine:
        await engine.update(0, make_state(0, tied=False, dtype=torch.float32), None)
        await engine.sample(make_spec("r", make_prompt(1, 9)))
        families = {family.name: family for family in VllmCollector().collect()}
    assert "vllm:generation_tokens" in families
    labels = {name for f in families.values() for s in f.samples for name in s.labels}
    assert not labels & {"model_name", "engine", "request_id"}
    values = {tuple(s.labels.items()) for f in families.values() for s in f.samples}
    assert len(values) < 200


def test_a_head_size_that_vllm_cannot_compute_is_refused_by_name(tmp_path: Path) -> None:
    model_dir = write_model_dir(tmp_path, tied=False, head_dim=24)
    with pytest.raises(ValueError, match=r"head_dim 24: vLLM on CPUs computes 32, 64"):
        VllmServer(ServerOptions(model_dir, "float32", 96, 8, 64))


def test_a_model_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    model_dir = write_model_dir(tmp_path, tied=False, model_type="llama")
    with pytest.raises(ValueError, match="'llama' has another layout"):
        VllmServer(ServerOptions(model_dir, "float32", 96, 8, 64))
