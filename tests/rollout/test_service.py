"""The service on a MemoryBus: every reply a caller can get, and what makes the pod (un)ready."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.rollout import engine_host
from services.rollout.config import RolloutConfig
from services.rollout.engine import EngineDead, SampleResult, SampleSpec
from services.rollout.qwen3_weights import cast_digest
from services.rollout.service import make_engine, serve
from services.rollout.torch_engine import TorchEngine
from shared.runtime.config import load
from shared.runtime.errors import ConfigError, Fatal
from shared.runtime.service import cause_of
from shared.wire.trajectory import SamplingParams
from tests.rollout.models import make_state, reference_logprobs
from tests.rollout.pods import SUBJECTS, World, eventually, make_config, make_request


@pytest.fixture
async def world(untied_dir: Path) -> AsyncIterator[World]:
    world = World(untied_dir)
    await world.publish_seed(0)
    yield world
    await world.bus.close()


class SlowEngine(TorchEngine):
    """Steps only while `gate` is open."""

    gate: asyncio.Event

    def _step(self) -> None:
        if self.gate.is_set():
            super()._step()


def slow(gate: asyncio.Event) -> Any:
    def make(config: RolloutConfig) -> SlowEngine:
        engine = SlowEngine(
            Path(config.model.source), dtype="float32", context_tokens=96, max_running=8, kv_slots=8
        )
        engine.gate = gate
        return engine

    return make


async def test_a_request_is_accepted_and_answered_with_exact_stamped_tokens(world: World) -> None:
    async with world.pod() as context:
        request = make_request()
        body = await world.answer(request)
        assert world.said("r") == ["accepted", "done"]
        assert world.replies["r"][0].pod == "pod-a"
        assert world.replies["r"][0].body.version == 0
        assert body.finish == "length"
        ids = body.sampled.token_ids.numpy().tolist()
        assert len(ids) == 5
        assert [(s.version, s.start, s.stop) for s in body.sampled.spans] == [(0, 0, 5)]
        state = make_state(0, tied=False, dtype=torch.float32)
        expected = reference_logprobs(state, [1, 2, 3, *ids], tied=False)[3:]
        assert body.sampled.logprobs.dtype == "f4"
        assert np.abs(body.sampled.logprobs.numpy() - expected).max() < 5e-5
        assert context.version == 0


async def test_a_float64_engine_answers_with_f4_on_the_wire(world: World) -> None:
    async with world.pod(dtype="float64"):
        assert (await world.answer(make_request())).sampled.logprobs.dtype == "f4"


async def test_a_stop_token_ends_the_answer(world: World) -> None:
    async with world.pod():
        free = (await world.answer(make_request("free"))).sampled.token_ids.numpy().tolist()
        params = SamplingParams(max_new_tokens=5, stop_ids=(free[2],))
        body = await world.answer(make_request("stop", sampling=params))
        assert body.finish == "stop"
        assert body.sampled.token_ids.numpy().tolist() == free[: free.index(free[2]) + 1]


async def test_a_request_straight_to_the_pod_is_served_by_it(world: World) -> None:
    async with world.pod("pod-a"), world.pod("pod-b"):
        for pod in ("pod-a", "pod-b"):
            await world.answer(make_request(pod), pod=pod)
            assert {reply.pod for reply in world.replies[pod]} == {pod}


async def test_the_pod_is_ready_and_listens_only_once_it_has_weights(untied_dir: Path) -> None:
    world = World(untied_dir)
    await world.bus.create_streams()
    async with world.pod(wait=False) as context:
        await asyncio.sleep(0.05)
        assert context.health.reason == "no weights yet"
        await world.ask(make_request("early"))
        await eventually(lambda: world.unheard == 1)
        await world.publish_seed(0)
        await eventually(lambda: context.health.ready)
        assert (await world.answer(make_request())).kind == "done"
    await world.bus.close()


async def test_new_versions_are_followed_and_counted(world: World) -> None:
    async with world.pod() as context:
        for seed in (1, 2, 3):
            version = await world.publish_seed(seed)
            await eventually(lambda v=version: context.version == v)
            body = await world.answer(make_request(f"r{seed}", min_version=version))
            assert {span.version for span in body.sampled.spans} == {version}
        await eventually(lambda: context.counters.get("sampled_tokens") == 15)
        assert context.counters["swaps"] >= 4
        assert context.counters["weight_bytes"] > 0
        assert 0 <= context.counters["sync_lag_s"] < 5
        assert context.busy_s > 0
        assert context.gauges["running"] == 0


async def test_a_pod_below_the_wanted_version_answers_behind(world: World) -> None:
    async with world.pod():
        started = time.monotonic()
        body = await world.answer(make_request(min_version=1))
        assert time.monotonic() - started >= 0.045
        assert (body.kind, body.version) == ("behind", 0)
        assert world.said("r") == ["accepted", "behind"]


async def test_a_version_on_its_way_is_waited_for(world: World) -> None:
    async with world.pod(behind_wait_s=5.0):
        await world.ask(make_request(min_version=1))
        await eventually(lambda: world.kinds("r")[:2] == ["accepted", "heartbeat"])
        await world.publish_seed(1)
        body = await world.final("r")
        assert body.kind == "done"
        assert {span.version for span in body.sampled.spans} == {1}


async def test_heartbeats_flow_while_a_request_runs(world: World) -> None:
    gate = asyncio.Event()
    async with world.pod(make=slow(gate)):
        await world.ask(make_request())
        await eventually(lambda: world.kinds("r").count("heartbeat") >= 3)
        gate.set()
        assert (await world.final("r")).kind == "done"
        kinds = world.kinds("r")
        assert kinds[0] == "accepted"
        assert set(kinds[1:-1]) == {"heartbeat"}


async def test_heartbeats_flow_while_a_versions_digest_is_computed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun, goes_on = asyncio.Event(), threading.Event(), threading.Event()

    def slowly(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> str:
        begun.set()
        assert goes_on.wait(20), "the event loop stood still"
        return cast_digest(state, dtype)

    async with world.pod(make=slow(gate)) as context:
        monkeypatch.setattr(engine_host, "cast_digest", slowly)
        await world.ask(make_request())
        await world.publish_seed(1)
        await eventually(begun.is_set)
        before = world.kinds("r").count("heartbeat")
        await eventually(lambda: world.kinds("r").count("heartbeat") >= before + 3)
        assert context.version == 0, "nothing is swapped before its digest is known"
        goes_on.set()
        gate.set()
        await eventually(lambda: context.version == 1)


async def test_a_request_that_arrives_twice_while_running_is_answered_once(world: World) -> None:
    gate = asyncio.Event()
    async with world.pod(make=slow(gate)) as context:
        for _ in range(3):
            await world.ask(make_request())
        await eventually(lambda: context.counters.get("duplicate_requests") == 2)
        gate.set()
        await world.final("r")
        await asyncio.sleep(0.05)
        assert world.said("r") == ["accepted", "done"]


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"token_ids": range(3), "new": 94}, "exceed the context of 96"),
        ({"token_ids": (3, 29)}, "token id 29"),
        ({"token_ids": ()}, "prefix is empty"),
        ({"sampling": SamplingParams(top_p=0.5)}, "keep-set"),
        ({"model_id": "critic"}, "'critic' is not 'policy'"),
        ({"adapter_id": "x"}, "no adapters"),
    ],
)
async def test_what_can_never_be_served_is_refused_for_good(
    world: World, changes: dict[str, Any], pattern: str
) -> None:
    async with world.pod():
        body = await world.answer(make_request(**changes), pod="pod-a")
        assert body.kind == "refused"
        assert pattern in body.reason
        assert not body.retryable
        assert (await world.answer(make_request("good"))).kind == "done"


async def test_beyond_max_concurrency_requests_are_refused_for_now(world: World) -> None:
    gate = asyncio.Event()
    async with world.pod(make=slow(gate), max_concurrency=2):
        for name in ("a", "b", "c"):
            await world.ask(make_request(name))
        body = await world.final("c")
        assert (body.kind, body.retryable) == ("refused", True)
        assert "max_concurrency is 2" in body.reason
        gate.set()
        assert (await world.final("a")).kind == (await world.final("b")).kind == "done"


async def test_an_expired_request_is_dropped_unanswered_and_counted(world: World) -> None:
    gate = asyncio.Event()
    async with world.pod(make=slow(gate)) as context:
        await world.ask(make_request("late", expires=time.time() - 1))
        await world.ask(make_request("soon", expires=time.time() + 0.1))
        await eventually(lambda: context.counters.get("expired_requests") == 2)
        assert world.kinds("late") == []
        assert not set(world.kinds("soon")) & {"done", "partial", "refused", "behind"}


async def test_a_cancelled_request_returns_what_there_is(world: World) -> None:
    gate = asyncio.Event()
    async with world.pod(make=slow(gate)) as context:
        await world.ask(make_request(new=60))
        await eventually(lambda: "heartbeat" in world.kinds("r"))
        gate.set()
        await asyncio.sleep(0)
        await world.cancel("r")
        await world.cancel("unknown")
        body = await world.final("r")
        assert (body.kind, body.reason) == ("partial", "cancelled")
        assert body.sampled.token_ids.shape[0] < 60
        assert context.counters["cancelled_requests"] == 1


async def test_a_draining_pod_sends_partials_and_takes_nothing_more(world: World) -> None:
    gate = asyncio.Event()
    gate.set()
    async with world.pod(make=slow(gate)) as context, world.pod("pod-b"):
        for i in range(12):
            await world.ask(make_request(f"r{i}", new=90), pod="pod-a")
        await eventually(lambda: context.counters.get("requests") == 12)
        context.stop.set()
        bodies = [await world.final(f"r{i}") for i in range(12)]
        assert {(b.kind, b.reason) for b in bodies} == {("partial", "drain")}
        assert context.health.reason == "draining"
        assert (await world.answer(make_request("next"))).kind == "done"
        assert {reply.pod for reply in world.replies["next"]} == {"pod-b"}
        # The other pod resumes with prompt + partial: nothing is lost, nothing doubled.
        for i, body in enumerate(bodies[:3]):
            part = body.sampled.token_ids.numpy().tolist()
            rest = await world.answer(
                make_request(
                    f"rest{i}", (1, 2, 3, *part), new=90 - len(part), seed_offset=len(part)
                )
            )
            whole = await world.answer(make_request(f"whole{i}", new=90))
            resumed = part + rest.sampled.token_ids.numpy().tolist()
            assert resumed == whole.sampled.token_ids.numpy().tolist()


class _DiesOnce(TorchEngine):
    deaths = 0

    async def sample(self, spec: SampleSpec) -> SampleResult:
        if type(self).deaths == 0:
            type(self).deaths += 1
            self._die("the accelerator fell off")
        return await super().sample(spec)


async def test_a_dead_engine_is_rebuilt_under_the_same_version(world: World) -> None:
    _DiesOnce.deaths = 0

    def make(config: RolloutConfig) -> TorchEngine:
        return _DiesOnce(Path(config.model.source), dtype="float32", context_tokens=96)

    async with world.pod(make=make) as context:
        body = await world.answer(make_request("first"))
        assert (body.kind, body.retryable) == ("refused", True)
        assert "fell off" in body.reason
        await eventually(lambda: context.health.ready)
        assert (await world.answer(make_request("second"))).kind == "done"
        assert context.version == 0


async def test_weights_that_kill_every_engine_leave_the_pod_unready_until_the_next_version(
    world: World,
) -> None:
    # In bfloat16 no canary is scored, which would refuse such a version before it is sampled from.
    async with world.pod(dtype="bfloat16") as context:
        right = make_state(1, tied=False, dtype=torch.float32)
        broken = {name: tensor.clone() for name, tensor in right.items()}
        broken["model.norm.weight"][3] = float("nan")
        await world.publish(broken, canary_of=right)
        await eventually(lambda: context.version == 1)
        for name in ("a", "b", "c"):
            body = await world.answer(make_request(name))
            assert (body.kind, body.retryable) == ("refused", True)
            await asyncio.sleep(0.05)
        assert "not finite" in context.health.reason
        await world.publish_seed(2)
        await eventually(lambda: context.health.ready)
        body = await world.answer(make_request("healed"))
        assert {span.version for span in body.sampled.spans} == {2}


async def test_a_device_copy_that_differs_from_its_source_is_not_used(world: World) -> None:
    class Corrupting(TorchEngine):
        async def update(self, version, state, changed) -> None:  # type: ignore[no-untyped-def]
            await super().update(version, state, changed)
            if version == 1:
                self._weights.layers[0].down.view(-1)[5] += 1e-3

    def make(config: RolloutConfig) -> TorchEngine:
        return Corrupting(Path(config.model.source), dtype="float32", context_tokens=96)

    async with world.pod(make=make) as context:
        await world.publish_seed(1)
        await eventually(lambda: "device copy" in context.health.reason)
        assert (await world.answer(make_request())).kind == "refused"
        await world.publish_seed(2)
        await eventually(lambda: context.health.ready)
        assert context.version == 2


async def test_who_waits_for_a_version_gets_nothing_from_a_wrong_device_copy_of_it(
    world: World,
) -> None:
    class Corrupting(TorchEngine):
        async def update(self, version, state, changed) -> None:  # type: ignore[no-untyped-def]
            await super().update(version, state, changed)
            if version == 1:
                self._weights.layers[0].down.view(-1)[5] += 1e-3

    def make(config: RolloutConfig) -> TorchEngine:
        return Corrupting(Path(config.model.source), dtype="float32", context_tokens=96)

    async with world.pod(make=make, behind_wait_s=0.5) as context:
        await world.ask(make_request("waiting", min_version=1))
        await eventually(lambda: world.kinds("waiting"))
        await world.publish_seed(1)
        body = await world.final("waiting")
        assert (body.kind, body.version) == ("behind", -1)
        assert "device copy" in context.health.reason
        assert context.version == -1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
async def test_a_version_that_does_not_reproduce_its_canary_is_withheld(
    world: World, dtype: str
) -> None:
    """Digests agree all along: the bytes are right, and what the engine makes of them is not."""
    async with world.pod(dtype=dtype, heartbeat_s=0.01) as context:
        assert context.version == 0
        other = make_state(7, tied=False, dtype=torch.float32)
        await world.publish(make_state(1, tied=False, dtype=torch.float32), canary_of=other)
        await eventually(lambda: "canary" in context.health.reason)
        assert context.version == -1
        assert (await world.answer(make_request())).kind == "refused"
        await world.publish_seed(2)
        await eventually(lambda: context.health.ready)
        assert context.version == 2
        # Version 1 once more by an engine built afresh: it is the version, not the engine.
        await eventually(lambda: context.counters.get("canary_checks", 0) >= 4)
        assert context.counters["canary_failures"] == 2


async def test_a_derived_tensor_that_no_digest_covers_is_caught_by_the_canary(world: World) -> None:
    class Stale(TorchEngine):
        """Forgets once to derive what the forward reads from the published norms."""

        async def update(self, version, state, changed) -> None:  # type: ignore[no-untyped-def]
            before = [layer.qk_norm.clone() for layer in self._weights.layers]
            await super().update(version, state, changed)
            if version == 1:
                for layer, old in zip(self._weights.layers, before, strict=True):
                    layer.qk_norm.copy_(old)

    def make(config: RolloutConfig) -> TorchEngine:
        return Stale(Path(config.model.source), dtype="float32", context_tokens=96)

    async with world.pod(make=make) as context:
        await world.publish_seed(1)
        await eventually(lambda: "canary is off" in context.health.reason)
        await world.publish_seed(2)
        await eventually(lambda: context.health.ready)


async def test_a_rollout_in_a_lower_dtype_is_not_held_to_a_floor_it_cannot_reach(
    world: World,
) -> None:
    async with world.pod(dtype="bfloat16", heartbeat_s=0.01) as context:
        await world.publish_seed(1)
        await eventually(lambda: context.version == 1)
        assert context.health.ready
        await eventually(lambda: context.counters.get("swaps", 0) == 2)
        assert "canary_checks" not in context.counters


async def test_an_engine_that_cannot_score_is_checked_by_digests_alone(world: World) -> None:
    class Mute(TorchEngine):
        score = None  # type: ignore[assignment]

    def make(config: RolloutConfig) -> TorchEngine:
        return Mute(Path(config.model.source), dtype="float32", context_tokens=96)

    async with world.pod(make=make) as context:
        assert context.version == 0
        assert (await world.answer(make_request())).kind == "done"


async def test_weights_of_another_model_end_the_service_with_both_sides_named(
    untied_dir: Path,
) -> None:
    world = World(untied_dir)
    await world.publish(make_state(0, tied=True, dtype=torch.float32))
    with pytest.raises(ExceptionGroup) as caught:
        await serve(world.context(), make_config(untied_dir))
    cause = cause_of(caught.value)
    assert isinstance(cause, Fatal)
    assert "lm_head.weight" in str(cause)
    assert "only in the model" in str(cause)


@pytest.mark.parametrize("payload", [b"", b"junk", b"\x93\x01\x02\x03"])
async def test_garbage_is_dead_lettered_and_the_pod_goes_on(world: World, payload: bytes) -> None:
    async with world.pod() as context:
        await world.bus.publish(SUBJECTS.sample("policy"), payload)
        await world.bus.publish(SUBJECTS.cancel("pod-a"), payload)
        await eventually(lambda: context.counters.get("dead_letters") == 2)
        assert (await world.answer(make_request())).kind == "done"
        assert (await world.bus.stream_state("dead")).num_messages == 2


async def test_two_hundred_turns_at_once_are_each_answered_once(world: World) -> None:
    async with world.pod() as context:
        for i in range(200):
            await world.ask(make_request(f"r{i}", [i % 29, *range(i % 29)], new=1 + i % 7, seed=i))
        bodies = [await world.final(f"r{i}", 20) for i in range(200)]
        assert [b.sampled.token_ids.shape[0] for b in bodies] == [1 + i % 7 for i in range(200)]
        finals = [k for i in range(200) for k in world.kinds(f"r{i}") if k == "done"]
        assert len(finals) == 200
        assert context.counters["requests"] == 200


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (None, "no readable config.json"),
        ("{", "not JSON"),
        ('{"model_type": "llama"}', "'llama'"),
        ('{"model_type": "qwen3"}', "'num_attention_heads' is missing"),
    ],
)
async def test_a_model_directory_that_cannot_be_used_is_a_configuration_error(
    tmp_path: Path, content: str | None, pattern: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    world = World(tmp_path)
    with pytest.raises(ConfigError, match=pattern):
        await serve(world.context(), make_config(tmp_path))


def test_a_context_beyond_the_models_positions_is_refused(untied_dir: Path) -> None:
    config = RolloutConfig.model_validate(
        {"model": {"source": str(untied_dir)}, "sampling": {"context_tokens": 500}}
    )
    with pytest.raises(ValueError, match="500 exceeds the model's 128 positions"):
        make_engine(config)


@pytest.mark.parametrize(
    ("section", "pattern"),
    [
        ({"engine": "vllm", "dtype": "float64"}, "float64: vLLM computes in bfloat16 and float32"),
        ({"sync": {"mode": "wait"}}, "sync.mode wait: the torch engine swaps with `keep`"),
        ({"sync": {"keep_kv": True}}, "keep_kv: the torch engine always computes prefixes anew"),
        (
            {"engine": "vllm", "sync": {"mode": "interrupt", "keep_kv": True}},
            "sync.keep_kv needs sync.mode: keep, not interrupt",
        ),
        ({"sync": {"mod": "keep"}}, "`rollout.sync.mod` is not a known key"),
    ],
)
def test_what_an_engine_cannot_do_is_a_configuration_error(
    section: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern):
        load(RolloutConfig, {"rollout": section})


def test_an_engine_that_is_not_installed_is_named_with_what_to_do(
    untied_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    config = make_config(untied_dir, engine="vllm")
    with pytest.raises(ValueError, match=r"rollout.engine vllm: .*make install-vllm"):
        make_engine(config)


async def test_an_engine_that_dies_while_idle_is_noticed_and_rebuilt(world: World) -> None:
    made: list[TorchEngine] = []

    def make(config: RolloutConfig) -> TorchEngine:
        made.append(TorchEngine(Path(config.model.source), dtype="float32", context_tokens=96))
        return made[-1]

    async with world.pod(make=make, heartbeat_s=0.02) as context:
        made[0]._die("the process is gone")
        await eventually(lambda: len(made) == 2)
        await eventually(lambda: context.health.ready)
        assert (await world.answer(make_request())).kind == "done"


async def test_an_engine_that_cannot_be_started_ends_the_service_with_the_reason(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(_: TorchEngine) -> None:
        raise EngineDead("no memory")

    monkeypatch.setattr(TorchEngine, "start", start)
    with pytest.raises(Fatal, match="no memory"):
        await serve(world.context(), make_config(world.model_dir))


async def test_a_stop_while_the_engine_starts_is_obeyed_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(_: TorchEngine) -> None:
        await asyncio.sleep(1000)

    monkeypatch.setattr(TorchEngine, "start", start)
    context = world.context()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(serve(context, make_config(world.model_dir)))
        await asyncio.sleep(0.05)
        context.stop.set()


async def test_a_pod_reports_what_its_prefixes_saved_and_who_came_for_them(world: World) -> None:
    async with world.pod() as context:
        first = await world.answer(make_request("a", range(20)))
        ids = [*range(20), *first.sampled.token_ids.numpy().tolist(), 1]
        await world.answer(make_request("b", ids), pod="pod-a")
        await eventually(lambda: context.counters.get("prefix_hit_tokens"))
        await eventually(lambda: context.gauges.get("affine_requests_ratio") == 0.5)
        # 24 of the second prefix's 26 tokens, of 46 in all.
        assert context.gauges["prefix_hit_ratio"] == pytest.approx(24 / 46, abs=0.08)


def test_fewer_slots_than_running_turns_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="kv_slots 4 is below max_running 8"):
        load(RolloutConfig, {"rollout": {"kv_slots": 4, "max_running": 8}})
