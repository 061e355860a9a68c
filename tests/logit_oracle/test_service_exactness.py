"""Through the service: every token meets the numbers of its own version and of no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.wire.trajectory import SamplingParams, Span, Turn

TOLERANCE = {"float64": 1e-10, "float32": 5e-5}
SPANS = [
    [(0, 4, 8), (1, 8, 11), (1, 14, 16), (3, 16, 20)],  # a switch inside a generation
    [(2, 1, 2), (0, 5, 9), (2, 12, 24)],  # versions in any order, first and last token
    [(3, 10, 11)],
]


@pytest.mark.parametrize("rig", ["float64", "float32"], indirect=True)
@pytest.mark.parametrize("layout", ["packed", "single"])
async def test_multi_version_trajectories_match_an_independent_forward(
    rig, layout, sequence, trajectory, reference
) -> None:
    await rig.publish(4)
    played = []
    async with rig.oracle(layout=layout, pack_tokens=64) as context:
        for seed in range(12):
            one = sequence(SPANS[seed % 3], seed=seed, length=24)
            other = sequence(SPANS[(seed + 1) % 3], seed=100 + seed, length=30)
            played.append(await rig.play(trajectory(one, other)))
        scores = [await rig.score(terminal) for terminal in played]
    worst = 0.0
    for terminal, score in zip(played, scores, strict=True):
        for stamped, scored in zip(terminal.outcome.sequences, score.sequences, strict=True):
            token_ids, found = stamped.token_ids.numpy(), scored.old_logprobs.numpy()
            assert found.dtype == ("<f8" if rig.dtype == "float64" else "<f4")
            assert not found[stamped.loss_mask.numpy() == 0].any()
            for span in stamped.spans:
                wanted = reference(rig.states[span.version], token_ids)[span.start : span.stop]
                error = np.abs(found[span.start : span.stop] - wanted).max()
                worst = max(worst, float(error))
            versions = sorted({span.version for span in stamped.spans})
            assert [entry.version for entry in scored.versions] == versions
            assert {entry.status for entry in scored.versions} == {"exact"}
        assert score.layout.kind == layout
    assert worst <= TOLERANCE[rig.dtype]
    assert context.counters["trajectories"] == 12
    assert context.counters["canary_failures"] == 0
    assert context.counters["moves"] <= context.counters["canary_checks"] + 1


@pytest.mark.parametrize("rig", ["float64", "float32"], indirect=True)
async def test_no_other_version_explains_the_numbers(rig, sequence, trajectory, reference) -> None:
    await rig.publish(4)
    async with rig.oracle():
        terminals = [
            await rig.play(trajectory(sequence(spans, seed=seed)))
            for seed, spans in enumerate(SPANS)
        ]
        scores = [await rig.score(terminal) for terminal in terminals]
    for terminal, score in zip(terminals, scores, strict=True):
        (stamped,), (scored,) = terminal.outcome.sequences, score.sequences
        by_version = [reference(state, stamped.token_ids.numpy()) for state in rig.states]
        for span in stamped.spans:
            found = scored.old_logprobs.numpy()[span.start : span.stop]
            errors = [np.abs(found - v[span.start : span.stop]).max() for v in by_version]
            assert int(np.argmin(errors)) == span.version
            assert sorted(errors)[1] >= 100 * TOLERANCE[rig.dtype]


async def test_large_forwards_run_in_a_thread_with_the_same_bits(
    rig, sequence, trajectory, monkeypatch
) -> None:
    from services.logit_oracle import bench

    await rig.publish(2)
    stamped = sequence([(0, 4, 8), (1, 8, 20)])
    scores = []
    for inline_flop in (1e18, 0.0):
        monkeypatch.setattr(bench, "INLINE_FLOP", inline_flop)
        terminal = await rig.play(trajectory(stamped))
        async with rig.oracle():
            scores.append((await rig.score(terminal)).sequences[0].old_logprobs)
    assert scores[0] == scores[1]


async def test_packed_and_single_layout_agree_and_single_is_bitwise_the_backend_alone(
    rig, sequence, trajectory
) -> None:
    from shared.algo.batching import pack

    await rig.publish(2)
    stamped = sequence([(0, 4, 8), (1, 8, 20)], length=29)
    terminal = await rig.play(trajectory(stamped))
    async with rig.oracle(layout="single"):
        single = (await rig.score(terminal)).sequences[0].old_logprobs.numpy()
    terminal = await rig.play(trajectory(stamped))
    async with rig.oracle(layout="packed"):
        packed = (await rig.score(terminal)).sequences[0].old_logprobs.numpy()
    assert np.abs(single - packed).max() <= 1e-10
    for span in stamped.spans:
        rig.backend.load_state(rig.states[span.version])
        mask = np.zeros(29, np.uint8)
        mask[span.start : span.stop] = 1
        batch = pack([stamped.token_ids.numpy()], {"loss_mask": [mask]})
        alone = rig.backend.score(batch, temperature=1.0).numpy()
        assert np.array_equal(single[span.start : span.stop], alone[span.start : span.stop])


async def test_turns_are_scored_at_the_temperature_they_were_drawn_at(
    rig, sequence, trajectory, reference
) -> None:
    await rig.publish(1)
    hot = SamplingParams(temperature=2.0)
    turns = (
        Turn(start=4, stop=8, finish="stop"),
        Turn(start=10, stop=14, finish="stop", sampling=hot),
    )
    stamped = sequence([(0, 4, 8), (0, 10, 14)], turns=turns)
    terminal = await rig.play(trajectory(stamped))
    async with rig.oracle():
        scored = (await rig.score(terminal)).sequences[0]
    found, ids = scored.old_logprobs.numpy(), stamped.token_ids.numpy()
    assert np.abs(found[4:8] - reference(rig.states[0], ids)[4:8]).max() <= 1e-10
    assert np.abs(found[10:14] - reference(rig.states[0], ids, 2.0)[10:14]).max() <= 1e-10
    assert [(entry.version, entry.status) for entry in scored.versions] == [(0, "exact")]


async def test_tokens_without_a_training_side_twin_are_scored_but_never_exact(
    rig, sequence, trajectory, reference
) -> None:
    await rig.publish(3)
    truncated = Turn(start=12, stop=16, finish="stop", sampling=SamplingParams(top_k=5))
    stamped = sequence(
        [(0, 4, 8), (1, 8, 12), (2, 12, 16)],
        mixed_kv=(Span(version=1, start=10, stop=12),),
        turns=(truncated,),
    )
    terminal = await rig.play(trajectory(stamped))
    async with rig.oracle() as context:
        scored = (await rig.score(terminal)).sequences[0]
    assert [(entry.version, entry.status) for entry in scored.versions] == [
        (0, "exact"),
        (1, "unverified"),
        (2, "unverified"),
    ]
    ids = stamped.token_ids.numpy()
    for span in stamped.spans:
        wanted = reference(rig.states[span.version], ids)[span.start : span.stop]
        found = scored.old_logprobs.numpy()[span.start : span.stop]
        assert np.abs(found - wanted).max() <= 1e-10
    assert context.counters["scored_tokens"] == 4
    assert context.counters["unverified_tokens"] == 8


async def test_provenance_names_the_bytes_and_the_terminal(rig, sequence, trajectory) -> None:
    from shared.wire.codec import content_digest

    await rig.publish(2)
    terminal = await rig.play(trajectory(sequence([(0, 4, 8), (1, 8, 10)])))
    async with rig.oracle() as context:
        score = await rig.score(terminal)
    record = await rig.bus.last(rig.bus.subjects.terminal(terminal.ticket_id))
    assert (score.terminal_seq, score.terminal_digest) == (
        record.seq,
        content_digest(record.payload),
    )
    manifests = [await rig.publisher.manifest(version) for version in (0, 1)]
    assert [v.digest for v in score.sequences[0].versions] == [m.digest for m in manifests]
    assert score.forward_tokens == 8 + 10
    assert context.counters["forward_tokens"] == 18
    assert score.compute_s > 0
    assert score.producer == context.pod
    assert score.layout.dtype == "float64"
    assert score.layout.num_threads == torch.get_num_threads()
