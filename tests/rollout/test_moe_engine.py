"""Mixtures of experts in the torch engine: what it computes, and what it records of its routing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from services.rollout.engine import SampleResult, SampleSpec
from services.rollout.qwen3_config import parse_config
from services.rollout.qwen3_weights import cast_digest
from services.rollout.torch_engine import TorchEngine
from shared.backends.torch_backend import TorchBackend
from shared.backends.trajectory_scoring import Piece, score_pieces
from tests.rollout.engines import (
    CONTEXT,
    ids_of,
    make_prompt,
    make_spec,
    stamps_of,
    started,
    when_sampled,
)
from tests.rollout.models import CONFIG, TOLERANCE, State
from tests.rollout.moe_models import (
    CHOICES,
    LAYERS,
    MOE,
    make_moe_state,
    moe_reference,
    write_moe_dir,
)

Tokens = dict[int, np.ndarray]


@pytest.fixture
def moe_dir(tmp_path: Path) -> Path:
    return write_moe_dir(tmp_path / "moe")


@pytest.fixture(scope="module")
def states() -> list[State]:
    """Of versions 0 to 3, in float64."""
    return [make_moe_state(seed, torch.float64) for seed in range(4)]


def make_engine(path: Path, dtype: Any = "float64", **options: Any) -> TorchEngine:
    defaults = {"context_tokens": CONTEXT, "max_running": 8, "kv_slots": 16}
    return TorchEngine(path, dtype=dtype, **defaults | {"record_routing": True} | options)


def recorded(result: SampleResult, version: int) -> Tokens:
    """Rows [L, K] by token, of one version; none of them twice."""
    rows: Tokens = {}
    for record in result.sampled.routing:
        if record.version == version:
            assert record.experts.shape == (record.stop - record.start, LAYERS, CHOICES)
            tokens = range(record.start, record.stop)
            assert rows.keys().isdisjoint(tokens)
            rows.update(zip(tokens, record.experts.numpy(), strict=True))
    return rows


def check(
    spec: SampleSpec, result: SampleResult, states: list[State], tolerance: float = 1e-9
) -> None:
    """Hold log-probs and routing of an answer against transformers', under every stamp."""
    ids, stamps = [*spec.token_ids, *ids_of(result)], stamps_of(result)
    first = len(spec.token_ids)
    assert {record.version for record in result.sampled.routing} <= set(stamps)
    for version in sorted(set(stamps)):
        mine = np.array(stamps) == version
        last = first + int(np.flatnonzero(mine)[-1])
        logprobs, experts = moe_reference(states[version], ids)
        error = np.abs(result.sampled.logprobs.numpy() - logprobs[first:])[mine].max()
        assert error <= tolerance
        held_version, held = spec.routing_held or (-1, 0)
        rows = recorded(result, version)
        assert sorted(rows) == list(range(held if held_version == version else 0, last))
        for token, row in rows.items():
            assert row.tolist() == experts[token].tolist()


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
async def test_logprobs_are_the_reference_forwards_at_start_and_after_every_update(
    tmp_path: Path, dtype: torch.dtype, renormalised: bool
) -> None:
    path = write_moe_dir(tmp_path / "moe", norm_topk_prob=renormalised)
    async with started(make_engine(path, str(dtype).removeprefix("torch."))) as engine:
        for version in range(2):
            state = make_moe_state(version, dtype, renormalised=renormalised)
            await engine.update(version, state, None)
            assert engine.device_digest() == cast_digest(state, dtype)
            specs = [make_spec(f"{version}-{i}", make_prompt(i, 3 + 7 * i)) for i in range(6)]
            results = await asyncio.gather(*[engine.sample(spec) for spec in specs])
            for spec, result in zip(specs, results, strict=True):
                ids = [*spec.token_ids, *ids_of(result)]
                expected, _ = moe_reference(state, ids, renormalised=renormalised)
                found = result.sampled.logprobs.numpy()
                assert np.abs(found - expected[len(spec.token_ids) :]).max() <= TOLERANCE[dtype]


async def test_it_is_the_forward_of_the_training_side(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    fields = {k: v for k, v in (CONFIG | MOE).items() if k != "model_type"}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["experts_implementation"] = "eager"  # transformers' default knows no float64
    (tmp_path / "config.json").write_text(json.dumps(config))
    backend = TorchBackend(torch.float64)
    backend.load_hf(tmp_path)
    async with started(make_engine(tmp_path)) as engine:
        await engine.update(0, backend.state(), None)
        spec = make_spec("r", make_prompt(4, 23), new=9)
        result = await engine.sample(spec)
        ids = np.array([*spec.token_ids, *ids_of(result)], dtype=np.int64)
        piece = Piece(
            sequence=0,
            version=0,
            temperature=1.0,
            token_ids=ids,
            positions=np.arange(23, 32),
            can_be_exact=True,
        )
        (expected,) = score_pieces(backend, [piece], "packed")
        assert np.abs(result.sampled.logprobs.numpy() - expected).max() < 1e-9
        (scored,) = await engine.score([ids])
        assert np.abs(scored[23:] - expected).max() < 1e-9


async def test_only_changed_experts_are_an_update_too(moe_dir: Path, states: list[State]) -> None:
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    changed = states[0] | {name: states[1][name]}
    async with started(make_engine(moe_dir)) as engine:
        await engine.update(0, states[0], None)
        await engine.update(1, changed, frozenset({name}))
        assert engine.device_digest() == cast_digest(changed, torch.float64)


async def test_routing_is_that_of_every_token_that_was_forwarded(
    moe_dir: Path, states: list[State]
) -> None:
    async with started(make_engine(moe_dir, step_tokens=16)) as engine:
        await engine.update(0, states[0], None)
        specs = [make_spec(f"r{i}", make_prompt(i, 2 + 9 * i), new=1 + i) for i in range(6)]
        for spec, result in zip(
            specs, await asyncio.gather(*[engine.sample(spec) for spec in specs]), strict=True
        ):
            check(spec, result, states)
            (record,) = result.sampled.routing
            assert (record.start, record.stop) == (0, len(spec.token_ids) + spec.max_new_tokens - 1)


@pytest.mark.parametrize("index", range(7))
async def test_an_update_after_any_token_leaves_the_routing_of_both_versions(
    moe_dir: Path, states: list[State], index: int
) -> None:
    async with started(make_engine(moe_dir)) as engine:
        await engine.update(0, states[0], None)
        spec = make_spec("r", make_prompt(3, 17), new=7)
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(engine.sample(spec))
            await asyncio.sleep(0)
            await when_sampled(engine, "r", index)
            await engine.update(1, states[1], None)
        result = answer.result()
        assert stamps_of(result) == [0] * index + [1] * (7 - index)
        check(spec, result, states)
        expected = [(0, 0, 16 + index)] * (index > 0) + [(1, 0, 23)]
        assert [(r.version, r.start, r.stop) for r in result.sampled.routing] == expected


async def test_an_interrupted_turn_has_the_routing_of_what_it_sampled_and_joins_what_follows(
    moe_dir: Path, states: list[State]
) -> None:
    prompt = make_prompt(5, 20)
    async with started(make_engine(moe_dir)) as one, started(make_engine(moe_dir)) as other:
        for engine in (one, other):
            await engine.update(0, states[0], None)
        whole_spec = make_spec("whole", prompt, new=9)
        whole = await one.sample(whole_spec)
        for cut in (0, 1, 5, 8):
            spec = make_spec("part", prompt, new=9)
            async with asyncio.TaskGroup() as group:
                answer = group.create_task(one.sample(spec))
                await asyncio.sleep(0)
                await when_sampled(one, "part", cut)
                one.interrupt("part")
            partial = answer.result()
            assert len(ids_of(partial)) == cut
            check(spec, partial, states)
            assert bool(partial.sampled.routing) == (cut > 0)
            held = (0, 20 + cut - 1) if cut else None
            rest_spec = make_spec(
                "rest",
                (*prompt, *ids_of(partial)),
                new=9 - cut,
                seed_offset=cut,
                routing_held=held,
            )
            rest = await other.sample(rest_spec)
            check(rest_spec, rest, states)
            joined = recorded(partial, 0) | recorded(rest, 0)
            assert {t: r.tolist() for t, r in joined.items()} == {
                t: r.tolist() for t, r in recorded(whole, 0).items()
            }


async def test_a_reused_prefix_brings_its_routing_and_an_update_forbids_it(
    moe_dir: Path, states: list[State]
) -> None:
    async with started(make_engine(moe_dir)) as engine:
        await engine.update(0, states[0], None)
        ids, held = make_prompt(1, 36), None
        for turn, version in enumerate((0, 0, 1, 1)):
            if version != engine.version:
                await engine.update(version, states[version], None)
            before = engine.load().counters["prefix_hit_tokens"]
            # Once with what the caller holds left out, once from the start.
            for given in (held, None):
                spec = make_spec(f"turn{turn}", ids, new=5, routing_held=given)
                result = await engine.sample(spec)
                check(spec, result, states)
                assert recorded(result, version)
            reused = engine.load().counters["prefix_hit_tokens"] - before
            assert (reused > len(ids)) == (turn in (1, 3))
            held = (version, len(ids) + 4)
            ids = (*ids, *ids_of(result), *make_prompt(turn, 6))


async def test_a_member_that_reuses_anothers_prompt_gets_the_prompts_routing(
    moe_dir: Path, states: list[State]
) -> None:
    prompt = make_prompt(8, 30)
    async with started(make_engine(moe_dir)) as engine:
        await engine.update(0, states[0], None)
        await engine.sample(make_spec("first", prompt, new=1))
        before = engine.load().counters["prefix_hit_tokens"]
        spec = make_spec("second", prompt, new=6, seed=12)
        check(spec, await engine.sample(spec), states)
        assert engine.load().counters["prefix_hit_tokens"] - before == 29


async def test_what_is_held_of_another_version_is_sent_again(
    moe_dir: Path, states: list[State]
) -> None:
    async with started(make_engine(moe_dir)) as engine:
        await engine.update(1, states[1], None)
        spec = make_spec("r", make_prompt(3, 17), routing_held=(0, 12))
        result = await engine.sample(spec)
        check(spec, result, states)
        assert result.sampled.routing[0].start == 0


async def test_what_is_held_is_left_out_of_its_version_only(
    moe_dir: Path, states: list[State]
) -> None:
    async with started(make_engine(moe_dir)) as engine:
        await engine.update(0, states[0], None)
        spec = make_spec("r", make_prompt(3, 17), new=7, routing_held=(0, 12))
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(engine.sample(spec))
            await asyncio.sleep(0)
            await when_sampled(engine, "r", 4)
            await engine.update(1, states[1], None)
        check(spec, answer.result(), states)
        found = [(r.version, r.start, r.stop) for r in answer.result().sampled.routing]
        assert found == [(0, 12, 20), (1, 0, 23)]


async def test_updates_interruptions_and_reuse_of_slots_leave_every_row_exact(
    moe_dir: Path, states: list[State]
) -> None:
    random = Random(3)
    engine = make_engine(moe_dir, max_running=3, kv_slots=4, step_tokens=24)
    async with started(engine):
        await engine.update(0, states[0], None)
        specs = [
            make_spec(f"r{i}", make_prompt(i, random.randrange(1, 50)), new=12, seed=i)
            for i in range(16)
        ]
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(engine.sample(spec)) for spec in specs]
            while not all(answer.done() for answer in answers):
                for _ in range(random.randrange(4, 60)):
                    await asyncio.sleep(0)
                if engine.version < 3:
                    await engine.update(engine.version + 1, states[engine.version + 1], None)
                engine.interrupt(f"r{random.randrange(16)}")
        results = [answer.result() for answer in answers]
        assert max(len(set(stamps_of(result))) for result in results) > 1
        assert {result.finish for result in results} == {"length", "interrupted"}
        for spec, result in zip(specs, results, strict=True):
            check(spec, result, states)


async def test_nothing_is_recorded_unless_it_is_asked_for(
    moe_dir: Path, states: list[State]
) -> None:
    async with started(make_engine(moe_dir, record_routing=False)) as engine:
        await engine.update(0, states[0], None)
        result = await engine.sample(make_spec("r", make_prompt(1, 9)))
        assert result.sampled.routing == ()


async def test_more_than_256_experts_keep_their_ids(tmp_path: Path) -> None:
    changes = {"num_experts": 300, "moe_intermediate_size": 2, "num_hidden_layers": 1}
    path = write_moe_dir(tmp_path / "moe", **changes, mlp_only_layers=[], num_experts_per_tok=300)
    async with started(make_engine(path)) as engine:
        weights = engine._weights
        state = {n: torch.randn(t.shape, dtype=torch.float64) for n, t in weights._views.items()}
        await engine.update(0, state, None)
        result = await engine.sample(make_spec("r", make_prompt(1, 9)))
        (record,) = result.sampled.routing
        assert record.experts.dtype == "u2"
        assert np.array_equal(np.sort(record.experts.numpy(), -1)[0, 0], np.arange(300))


async def test_bfloat16_is_computed_in(moe_dir: Path) -> None:
    state = make_moe_state(0, torch.float32)
    small = {n: t * 0.3 if t.dim() > 1 else t for n, t in state.items()}
    async with started(make_engine(moe_dir, "bfloat16")) as engine:
        await engine.update(0, small, None)
        spec = make_spec("r", make_prompt(1, 30), new=20)
        result = await engine.sample(spec)
        expected, _ = moe_reference(small, [*spec.token_ids, *ids_of(result)])
        errors = np.abs(result.sampled.logprobs.numpy() - expected[30:])
        assert 1e-3 < errors.mean() < errors.max() < 0.2


def test_routing_of_a_model_without_experts_cannot_be_recorded(untied_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.routing: replay: .*untied has no experts"):
        make_engine(untied_dir)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 of 8 experts"),
        ({"shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size 24"),
        ({"n_shared_experts": 1}, "n_shared_experts 1"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ({"decoder_sparse_step": 0}, "config.json: "),
        ({"moe_intermediate_size": None}, "config.json: "),
    ],
)
def test_experts_of_another_kind_are_refused(changes: dict, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        parse_config(CONFIG | MOE | changes)


def test_the_published_config_of_a_large_mixture_is_read() -> None:
    config = parse_config(
        {
            "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
            "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
            "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
            "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
            "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
            "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
            "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        }
    )  # fmt: skip
    assert config.expert_layers == tuple(range(48))
    assert (config.num_experts, config.experts_per_token, config.expert_size) == (128, 8, 768)
    assert config.renormalised


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ValueError, match="key 'moe_intermediate_size' is missing"):
        parse_config({k: v for k, v in (CONFIG | MOE).items() if k != "moe_intermediate_size"})


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (0, 2)),
        ({"mlp_only_layers": None}, (0, 1, 2)),
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, (1,)),
        ({"num_experts": 0}, ()),
        ({"num_local_experts": 4}, (0, 2)),
    ],
)
def test_which_layers_have_experts_is_read_as_transformers_does(
    changes: dict, layers: tuple[int, ...]
) -> None:
    assert parse_config(CONFIG | MOE | changes).expert_layers == layers
