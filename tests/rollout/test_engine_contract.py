"""What every engine must do, whatever is inside: run for each entry of `ENGINES`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from services.rollout.engine import EngineDead, ScoringEngine
from services.rollout.qwen3_weights import cast_digest
from shared.wire.trajectory import SamplingParams
from tests.rollout.engines import (
    EngineKind,
    Versions,
    ids_of,
    make_prompt,
    make_spec,
    stamps_of,
    started,
    stepwise,
    when_sampled,
)
from tests.rollout.models import reference_logprobs


async def test_logprobs_are_the_reference_forwards_at_start_and_after_every_update(
    kind: EngineKind, model_dir: Path, versions: Versions
) -> None:
    async with started(kind.make(model_dir)) as engine:
        for version, temperature in ((0, 1.0), (1, 0.7), (2, 1.3)):
            await engine.update(version, versions[version], None)
            specs = [
                make_spec(f"{version}-{i}", make_prompt(i, 3 + 7 * i), temperature=temperature)
                for i in range(6)
            ]
            results = await asyncio.gather(*[engine.sample(spec) for spec in specs])
            for spec, result in zip(specs, results, strict=True):
                assert stamps_of(result) == [version] * 6
                assert versions.error(spec, result) <= kind.tolerance


async def test_going_from_a_to_b_and_back_to_a_gives_the_first_answer_again(
    kind: EngineKind, model_dir: Path, versions: Versions
) -> None:
    async with started(kind.make(model_dir)) as engine:
        answers = []
        for number, state in enumerate((versions[0], versions[1], versions[0])):
            await engine.update(number, state, None)
            answers.append(await engine.sample(make_spec("r", make_prompt(1, 20))))
        assert ids_of(answers[0]) == ids_of(answers[2]) != ids_of(answers[1])
        assert np.array_equal(
            answers[0].sampled.logprobs.numpy(), answers[2].sampled.logprobs.numpy()
        )


async def test_updating_only_the_changed_tensors_is_a_full_update(
    kind: EngineKind, model_dir: Path, versions: Versions
) -> None:
    changed = dict(versions[0])
    name = "model.layers.1.self_attn.q_norm.weight"
    changed[name] = versions[1][name]
    versions.states[1] = changed
    async with started(kind.make(model_dir)) as engine:
        await engine.update(0, versions[0], None)
        await engine.update(1, changed, {name})
        spec = make_spec("r", make_prompt(1, 20))
        assert versions.error(spec, await engine.sample(spec)) <= kind.tolerance


@pytest.mark.parametrize("index", range(7))
async def test_an_update_after_any_token_stamps_and_recomputes_from_there_on(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions, index: int
) -> None:
    versions = untied_versions
    async with started(kind.make(untied_dir)) as engine:
        await engine.update(0, versions[0], None)
        spec = make_spec("r", make_prompt(3, 17), new=7)
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(engine.sample(spec))
            with stepwise(engine):
                await asyncio.sleep(0)
                await when_sampled(engine, "r", index)
                await engine.update(1, versions[1], None)
        result = answer.result()
        assert stamps_of(result) == [0] * index + [1] * (7 - index)
        assert not result.sampled.mixed_kv
        assert versions.error(spec, result) <= kind.tolerance
        # Version confusion: under the other version every stretch is far off.
        reported = result.sampled.logprobs.numpy()
        for version, stretch in ((1, slice(0, index)), (0, slice(index, 7))):
            other = np.abs(reported - versions.expected(spec, result, version))[stretch]
            assert other.max(initial=1.0 if other.size == 0 else 0.0) > 100 * kind.tolerance


async def test_an_update_after_the_last_token_does_not_touch_the_answer(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    async with started(kind.make(untied_dir)) as engine:
        await engine.update(0, untied_versions[0], None)
        spec = make_spec("r", make_prompt(3, 17))
        result = await engine.sample(spec)
        await engine.update(1, untied_versions[1], None)
        assert stamps_of(result) == [0] * 6
        assert untied_versions.error(spec, result) <= kind.tolerance


async def test_a_version_for_every_token_leaves_every_token_exact(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    versions = untied_versions
    async with started(kind.make(untied_dir)) as engine:
        await engine.update(0, versions[0], None)
        specs = [make_spec(f"r{i}", make_prompt(i, 5 + 9 * i), new=8) for i in range(4)]
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(engine.sample(spec)) for spec in specs]
            with stepwise(engine):
                for version in range(1, 8):
                    await asyncio.sleep(0)
                    for spec in specs:
                        await when_sampled(engine, spec.request_id, version)
                    await engine.update(version, versions[version], None)
        for spec, answer in zip(specs, answers, strict=True):
            assert stamps_of(answer.result()) == list(range(8))
            assert versions.error(spec, answer.result()) <= kind.tolerance


async def test_an_interrupted_turn_resumed_elsewhere_continues_identically(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    prompt = make_prompt(5, 20)
    async with started(kind.make(untied_dir)) as one, started(kind.make(untied_dir)) as other:
        await one.update(0, untied_versions[0], None)
        await other.update(0, untied_versions[0], None)
        whole = await one.sample(make_spec("whole", prompt, new=9))
        for cut in (0, 1, 5, 8):
            async with asyncio.TaskGroup() as group:
                answer = group.create_task(one.sample(make_spec("part", prompt, new=9)))
                with stepwise(one):
                    await asyncio.sleep(0)
                    await when_sampled(one, "part", cut)
                    one.interrupt("part")
                    await asyncio.wait([answer])
            partial = answer.result()
            assert partial.finish == "interrupted"
            assert len(ids_of(partial)) == cut
            rest = await other.sample(
                make_spec("rest", (*prompt, *ids_of(partial)), new=9 - cut, seed_offset=cut)
            )
            assert ids_of(partial) + ids_of(rest) == ids_of(whole)
            assert rest.finish == "length"


async def test_what_is_sampled_does_not_depend_on_who_else_is_in_the_batch(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    specs = [make_spec(f"r{i}", make_prompt(i, 2 + 5 * i), new=12, seed=i) for i in range(12)]
    async with started(kind.make(untied_dir)) as engine:
        await engine.update(0, untied_versions[0], None)
        alone = [ids_of(await engine.sample(spec)) for spec in specs]
        together = await asyncio.gather(*[engine.sample(spec) for spec in specs])
        assert [ids_of(result) for result in together] == alone
        assert len({tuple(ids) for ids in alone}) == len(alone)


async def test_a_following_turn_reuses_the_prefix_and_an_update_forbids_it(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    versions = untied_versions
    async with started(kind.make(untied_dir)) as engine:
        await engine.update(0, versions[0], None)
        ids = make_prompt(1, 36)
        for turn, version in enumerate((0, 0, 1, 1)):
            if version != engine.version:
                await engine.update(version, versions[version], None)
            before = engine.load().counters["prefix_hit_tokens"]
            spec = make_spec(f"turn{turn}", ids, new=5)
            result = await engine.sample(spec)
            assert versions.error(spec, result) <= kind.tolerance
            assert stamps_of(result) == [version] * 5
            reused = engine.load().counters["prefix_hit_tokens"] - before
            # The last sampled token of a turn is not in the cache yet.
            cached = len(ids) - 6 - 1 if turn in (1, 3) else 0
            assert reused == cached // kind.reuse_tokens * kind.reuse_tokens
            ids = (*ids, *ids_of(result), *make_prompt(turn, 6))


async def test_a_stop_token_ends_the_turn_and_is_part_of_it(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    async with started(kind.make(untied_dir)) as engine:
        await engine.update(0, untied_versions[0], None)
        prompt = make_prompt(2, 20)
        free = ids_of(await engine.sample(make_spec("free", prompt, new=10)))
        stop = free[4]
        result = await engine.sample(make_spec("stop", prompt, new=10, stop_ids=(stop,)))
        assert ids_of(result) == free[: free.index(stop) + 1]
        assert result.finish == "stop"


async def test_a_hundred_interruptions_under_load_lose_and_double_no_token(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    random = Random(11)
    prompts = {f"e{i}": make_prompt(i, random.randrange(3, 40)) for i in range(20)}
    seeds = {name: len(name) + int(name[1:]) for name in prompts}
    new = 40
    num_requests = num_interrupted = 0
    running: set[str] = set()

    async def play(engine, name: str) -> list[int]:  # type: ignore[no-untyped-def]
        nonlocal num_requests, num_interrupted
        got: list[int] = []
        while len(got) < new:
            num_requests += 1
            spec = make_spec(
                f"{name}.{num_requests}",
                (*prompts[name], *got),
                new=new - len(got),
                seed=seeds[name],
                seed_offset=len(got),
            )
            running.add(spec.request_id)
            result = await engine.sample(spec)
            running.discard(spec.request_id)
            num_interrupted += result.finish == "interrupted"
            got += ids_of(result)
        return got

    async def play_on(engine, name: str) -> list[list[int]]:  # type: ignore[no-untyped-def]
        """The load lasts as long as the interruptions, however fast the engine is."""
        answers = [await play(engine, name)]
        while num_interrupted < 100:
            answers.append(await play(engine, name))
        return answers

    async with started(kind.make(untied_dir, step_tokens=40)) as engine:
        await engine.update(0, untied_versions[0], None)
        undisturbed = {
            name: ids_of(await engine.sample(make_spec(name, prompts[name], new=new, seed=seed)))
            for name, seed in seeds.items()
        }
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(play_on(engine, name)) for name in prompts}
            while num_interrupted < 100:
                for _ in range(random.randrange(1, 4)):
                    await asyncio.sleep(kind.tick_s)
                if running:
                    engine.interrupt(random.choice(sorted(running)))
        for name, task in tasks.items():
            assert all(answer == undisturbed[name] for answer in task.result())
        load = engine.load()
        assert (load.running, load.waiting) == (0, 0)


async def test_updates_and_interruptions_together_leave_every_token_exact(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    versions, random = untied_versions, Random(3)
    async with started(kind.make(untied_dir, step_tokens=64)) as engine:
        await engine.update(0, versions[0], None)
        specs = [
            make_spec(f"r{i}", make_prompt(i, random.randrange(1, 50)), new=12, seed=i)
            for i in range(24)
        ]
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(engine.sample(spec)) for spec in specs]
            while not all(answer.done() for answer in answers):
                for _ in range(random.randrange(4, 24)):
                    await asyncio.sleep(kind.tick_s)
                if engine.version < 6:
                    version = engine.version + 1
                    await engine.update(version, versions[version], None)
                engine.interrupt(f"r{random.randrange(24)}")
        finished = {answer.result().finish for answer in answers}
        assert finished == {"length", "interrupted"}
        for spec, answer in zip(specs, answers, strict=True):
            result = answer.result()
            assert stamps_of(result) == sorted(stamps_of(result))
            assert versions.error(spec, result) <= kind.tolerance


async def test_a_state_that_does_not_fit_is_refused_and_the_old_weights_stay(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    versions = untied_versions
    name = "model.layers.0.mlp.up_proj.weight"
    without = {n: t for n, t in versions[1].items() if n != name}
    misshapen = versions[1] | {name: versions[1][name].T}
    integer = versions[1] | {name: versions[1][name].long()}
    surplus = versions[1] | {"model.layers.9.mlp.up_proj.weight": torch.zeros(1)}
    async with started(kind.make(untied_dir)) as engine:
        await engine.update(0, versions[0], None)
        for state, pattern in (
            (without, rf"{name}.*only in the model"),
            (misshapen, rf"{name}.*published \[32, 48\], model \[48, 32\]"),
            (integer, rf"{name}.*published torch.int64"),
            (surplus, r"layers.9.*only in the published state"),
        ):
            with pytest.raises(ValueError, match=pattern):
                await engine.update(1, state, None)
        assert engine.version == 0
        spec = make_spec("r", make_prompt(1, 20))
        assert versions.error(spec, await engine.sample(spec)) <= kind.tolerance


async def test_the_device_digest_is_that_of_the_cast_source(
    kind: EngineKind, model_dir: Path, versions: Versions
) -> None:
    async with started(kind.make(model_dir)) as engine:
        await engine.update(0, versions[0], None)
        assert engine.device_digest() == cast_digest(versions[0], kind.dtype)
        assert engine.device_digest() != cast_digest(versions[1], kind.dtype)
        await engine.update(1, versions[1], None)
        assert engine.device_digest() == cast_digest(versions[1], kind.dtype)


async def test_given_text_is_scored_as_the_reference_does_and_sampling_does_not_notice(
    kind: EngineKind, model_dir: Path, versions: Versions
) -> None:
    texts = [np.array(make_prompt(seed, length)) for seed, length in enumerate((16, 1, 40, 2))]
    async with started(kind.make(model_dir)) as engine:
        if not isinstance(engine, ScoringEngine):
            pytest.skip("scoring is optional")
        await engine.update(0, versions[0], None)
        spec = make_spec("r", make_prompt(9, 11), new=8)
        undisturbed = await engine.sample(spec)
        for version in (0, 1):
            await engine.update(version, versions[version], None)
            async with asyncio.TaskGroup() as group:
                with stepwise(engine):
                    answer = group.create_task(engine.sample(spec))
                    await asyncio.sleep(0)
                    await when_sampled(engine, "r", 3)
                    scored = await engine.score(texts)
            assert [len(row) for row in scored] == [16, 1, 40, 2]
            for text, row in zip(texts, scored, strict=True):
                expected = reference_logprobs(versions[version], text.tolist(), tied=versions.tied)
                assert np.abs(row - np.array(expected)).max() <= kind.tolerance
            if version == 0:
                assert ids_of(answer.result()) == ids_of(undisturbed)
        assert await engine.score([]) == []


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"prompt": ()}, "prefix is empty"),
        ({"prompt": (1,) * 95}, r"95 prefix \+ 6 new tokens exceed the context of 96"),
        ({"prompt": (3, 29)}, "token id 29 is not in the vocabulary of 29"),
        ({"prompt": (3, -1)}, "token id -1"),
        ({"sampling": SamplingParams(top_p=0.9)}, "keep-set"),
        ({"sampling": SamplingParams(top_k=5)}, "keep-set"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_with_the_reason(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions, changes: dict, pattern: str
) -> None:
    async with started(kind.make(untied_dir)) as engine:
        await engine.update(0, untied_versions[0], None)
        with pytest.raises(ValueError, match=pattern):
            await engine.sample(make_spec("r", **{"prompt": (1, 2)} | changes))
        assert len(ids_of(await engine.sample(make_spec("r", (1, 2))))) == 6


async def test_weights_that_give_nan_kill_the_engine_with_the_reason(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    broken = untied_versions[1]
    broken["model.norm.weight"][0] = float("nan")
    async with started(kind.make(untied_dir)) as engine:
        await engine.update(0, untied_versions[0], None)
        await engine.update(1, broken, None)
        with pytest.raises(EngineDead, match="version 1 are not finite"):
            await engine.sample(make_spec("r", (1, 2)))
        with pytest.raises(EngineDead):
            await engine.sample(make_spec("again", (1, 2)))
        with pytest.raises(EngineDead):
            await engine.update(2, untied_versions[0], None)
        assert engine.version == -1


async def test_a_request_before_the_first_weights_waits_for_them(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    async with started(kind.make(untied_dir)) as engine:
        assert engine.version == -1
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(engine.sample(make_spec("r", (1, 2))))
            for _ in range(20):
                await asyncio.sleep(0)
            assert engine.num_sampled("r") == 0
            await engine.update(4, untied_versions[4], None)
        assert stamps_of(answer.result()) == [4] * 6


async def test_a_caller_that_goes_away_frees_its_place(
    kind: EngineKind, untied_dir: Path, untied_versions: Versions
) -> None:
    async with started(kind.make(untied_dir, max_running=1, kv_slots=1)) as engine:
        await engine.update(0, untied_versions[0], None)
        async with asyncio.TaskGroup() as group:
            gone = group.create_task(engine.sample(make_spec("gone", (1, 2), new=80)))
            waiting = group.create_task(engine.sample(make_spec("waiting", (1, 2), new=80)))
            answer = group.create_task(engine.sample(make_spec("r", (1, 2))))
            with stepwise(engine):
                await when_sampled(engine, "gone", 2)
                gone.cancel()
                waiting.cancel()
        assert len(ids_of(answer.result())) == 6
        load = engine.load()
        assert (load.running, load.waiting) == (0, 0)
