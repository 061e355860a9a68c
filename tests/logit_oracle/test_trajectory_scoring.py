"""What is forwarded, where the numbers go, and what they may be called."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from shared.algo.batching import PackedBatch
from shared.backends.expert_layers import ExpertLayers
from shared.backends.objection import objection
from shared.backends.torch_backend import TorchBackend
from shared.backends.trajectory_scoring import (
    TrajectoryScore,
    pieces_of,
    score_pieces,
    whole_pieces,
)
from shared.wire.base import Array
from shared.wire.trajectory import RoutingRecord, SamplingParams, Span, Turn


@pytest.fixture
def backend(model_dir) -> TorchBackend:
    backend = TorchBackend(torch.float64)
    backend.load_hf(model_dir)
    return backend


def as_lists(pieces) -> list[tuple[int, int, int, list[int]]]:
    return [(p.sequence, p.version, len(p.token_ids), p.positions.tolist()) for p in pieces]


SPANS = [(4, 3, 5), (2, 6, 7), (4, 9, 10)]


def test_every_version_forwards_the_prefix_up_to_its_last_token(sequence, trajectory) -> None:
    played = trajectory(sequence(SPANS, length=15), sequence([(2, 1, 2)], length=4))
    assert as_lists(pieces_of(played, kind="packed", temperature=1.0)) == [
        (0, 2, 7, [6]),
        (0, 4, 10, [3, 4, 9]),
        (1, 2, 2, [1]),
    ]


def test_the_single_layout_forwards_whole_sequences(sequence, trajectory) -> None:
    played = trajectory(sequence(SPANS, length=15))
    assert as_lists(pieces_of(played, kind="single", temperature=1.0)) == [
        (0, 2, 15, [6]),
        (0, 4, 15, [3, 4, 9]),
    ]


def test_a_version_drawn_at_two_temperatures_is_forwarded_once_for_each(
    sequence, trajectory
) -> None:
    turns = (
        Turn(start=3, stop=5, finish="stop", sampling=SamplingParams(temperature=0.5)),
        Turn(start=9, stop=10, finish="stop"),
    )
    played = trajectory(sequence([(4, 3, 5), (4, 9, 10)], length=15, turns=turns))
    pieces = pieces_of(played, kind="packed", temperature=0.7)
    assert [(p.temperature, p.positions.tolist()) for p in pieces] == [(0.5, [3, 4]), (0.7, [9])]


def test_the_configured_temperature_holds_where_turns_say_nothing(sequence, trajectory) -> None:
    (piece,) = pieces_of(trajectory(sequence([(4, 3, 5)])), kind="packed", temperature=0.7)
    assert piece.temperature == 0.7


def test_only_the_versions_touched_by_a_mixed_cache_lose_exactness(sequence, trajectory) -> None:
    mixed = (Span(version=4, start=4, stop=5),)
    played = trajectory(sequence(SPANS, length=15, mixed_kv=mixed))
    pieces = pieces_of(played, kind="packed", temperature=1.0)
    assert [(p.version, p.can_be_exact) for p in pieces] == [(2, True), (4, False)]


def test_a_piece_replays_what_its_version_recorded_and_a_gap_costs_exactness(
    sequence, trajectory
) -> None:
    def record(version: int, start: int, stop: int) -> RoutingRecord:
        experts = np.full((stop - start, 2, 1), version)
        return RoutingRecord(
            version=version, start=start, stop=stop, experts=Array.of(experts, "u1")
        )

    # Version 4 sampled tokens 3, 4 and 9: context rows 0..8. Version 2 token 6: rows 0..5.
    records = (record(4, 0, 4), record(2, 0, 5), record(4, 4, 9))
    played = trajectory(sequence(SPANS, length=15, routing=records))
    two, four = pieces_of(played, kind="packed", temperature=1.0)
    assert two.routing[:, 0, 0].tolist() == [2] * 5 + [-1] * 2
    assert four.routing[:, 1, 0].tolist() == [4] * 9 + [-1]
    assert (two.can_be_exact, four.can_be_exact) == (False, True)
    bare = trajectory(sequence(SPANS, length=15))
    for replays in (False, True):
        pieces = pieces_of(bare, kind="packed", temperature=1.0, replays=replays)
        assert {piece.can_be_exact for piece in pieces} == {not replays}
    (now,) = whole_pieces(played, temperature=1.0)
    assert now.routing[:, 0, 0].tolist() == [4] * 4 + [2] + [4] * 4 + [-1]


def test_what_waits_to_be_scored_holds_no_rows_of_its_own(sequence, trajectory) -> None:
    experts = Array.of(np.zeros((1000, 16, 8), dtype=np.uint8), "u1")
    records = tuple(
        RoutingRecord(version=version, start=0, stop=1000, experts=experts) for version in range(4)
    )
    spans = [(version, 990 + version, 991 + version) for version in range(4)]
    played = trajectory(sequence(spans, length=1000, routing=records))
    tracemalloc.start()
    try:
        pieces = pieces_of(played, kind="packed", temperature=1.0)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [piece.can_be_exact for piece in pieces] == [True] * 4
    assert held < experts.numpy().nbytes / 2
    assert pieces[2].routing.shape == (993, 16, 8)


def test_pieces_without_records_are_packed_with_those_that_have_some(sequence, trajectory) -> None:
    experts = Array.of(np.full((6, 1, 2), 7), "u1")
    recorded = sequence(
        [(2, 3, 7)], routing=(RoutingRecord(version=2, start=0, stop=6, experts=experts),)
    )
    seen: list[PackedBatch] = []

    class Scorer:
        def score(self, batch: PackedBatch, *, temperature: float) -> torch.Tensor:
            seen.append(batch)
            return torch.zeros(batch.num_tokens)

    pieces = pieces_of(trajectory(recorded, sequence([(2, 3, 5)])), kind="packed", temperature=1.0)
    score_pieces(Scorer(), pieces, "packed")
    score_pieces(Scorer(), pieces[1:], "packed")
    assert seen[0].per_token["routing"][:, 0, 0].tolist() == [7] * 6 + [-1] * 6
    assert "routing" not in seen[1].per_token


def test_an_empty_trajectory_has_nothing_to_score(sequence, trajectory) -> None:
    assert pieces_of(trajectory(sequence([])), kind="packed", temperature=1.0) == ()


def test_numbers_land_on_their_stamped_positions_and_nowhere_else(sequence, trajectory) -> None:
    played = trajectory(sequence(SPANS, length=12), sequence([(2, 1, 2)], length=4))
    pieces = pieces_of(played, kind="packed", temperature=1.0)
    score = TrajectoryScore(played, pieces, torch.float32)
    settled = {"verified": True, "digest": "d", "compute_s": 0.5}
    score.settle(1, np.array([-1.0, -2.0, -3.0]), **settled)
    score.settle(0, np.array([-4.0]), **settled)
    assert score.give_up(2) == 1
    first, second = score.sequences()
    assert first.old_logprobs.numpy().tolist() == [0, 0, 0, -1, -2, 0, -4, 0, 0, -3, 0, 0]
    assert [(v.version, v.status, v.digest) for v in first.versions] == [
        (2, "exact", "d"),
        (4, "exact", "d"),
    ]
    assert second.old_logprobs.numpy().tolist() == [0, 0, 0, 0]
    assert [(v.version, v.status, v.digest) for v in second.versions] == [(2, "unscorable", "")]
    assert (score.forward_tokens, score.compute_s) == (17, 1.0)


@pytest.mark.parametrize(("verified", "value"), [(False, -1.0), (True, np.nan), (True, -np.inf)])
def test_an_unverified_or_not_finite_number_is_never_exact(
    sequence, trajectory, verified, value
) -> None:
    played = trajectory(sequence([(4, 3, 4)]))
    pieces = pieces_of(played, kind="packed", temperature=1.0)
    score = TrajectoryScore(played, pieces, torch.float64)
    status = score.settle(0, np.array([value]), verified=verified, digest="d", compute_s=0.0)
    assert status == score.sequences()[0].versions[0].status == "unverified"


def test_one_inexact_piece_spoils_its_version_in_that_sequence(sequence, trajectory) -> None:
    turns = (Turn(start=3, stop=5, finish="stop", sampling=SamplingParams(temperature=0.5)),)
    played = trajectory(sequence([(4, 3, 5), (4, 9, 10)], turns=turns))
    pieces = pieces_of(played, kind="packed", temperature=1.0)
    score = TrajectoryScore(played, pieces, torch.float64)
    score.settle(0, np.zeros(2), verified=False, digest="d", compute_s=0.0)
    score.settle(1, np.zeros(1), verified=True, digest="d", compute_s=0.0)
    assert [v.status for v in score.sequences()[0].versions] == ["unverified"]


def test_packs_mix_temperatures_without_mixing_numbers(backend, sequence, trajectory) -> None:
    pieces = []
    for seed, temperature in enumerate((1.0, 0.5, 1.0, 2.0)):
        played = trajectory(sequence([(0, 3, 9)], seed=seed))
        pieces += pieces_of(played, kind="packed", temperature=temperature)
    together = score_pieces(backend, pieces, "packed")
    for piece, found in zip(pieces, together, strict=True):
        (alone,) = score_pieces(backend, [piece], "single")
        assert np.abs(found - alone).max() <= 1e-10


def test_what_no_version_can_score_is_named(sequence, trajectory) -> None:
    assert objection(trajectory(sequence([(0, 3, 9)])), 41) == ""
    assert "vocabulary of 10" in objection(trajectory(sequence([(0, 3, 9)])), 10)
    assert "no prefix" in objection(trajectory(sequence([(0, 0, 2)])), 41)


@pytest.mark.parametrize(
    ("experts", "has", "problem"),
    [
        ([[[0, 5]]], ExpertLayers(1, 2, 6), ""),
        ([[[0, 6]]], ExpertLayers(1, 2, 6), "names expert 6, the model has 6 a layer"),
        ([[[5, 5]]], ExpertLayers(1, 2, 6), "names an expert twice"),
        (
            [[[0, 5]]],
            ExpertLayers(2, 2, 6),
            "1 layers and 2 experts a token, the model has 2",
        ),
        ([[[0, 5]]], None, "experts are not replayed here"),
    ],
)
def test_routing_that_the_model_cannot_have_chosen_is_named(
    sequence, trajectory, experts, has, problem
) -> None:
    record = RoutingRecord(version=0, start=0, stop=1, experts=Array.of(experts, "u1"))
    named = objection(trajectory(sequence([(0, 3, 9)], routing=(record,))), 41, has)
    assert problem in named
    assert bool(named) == bool(problem)


def test_a_sequence_without_routing_is_refused_where_routing_is_replayed(
    sequence, trajectory
) -> None:
    """Its sampler took experts that nobody knows: what the router says now would pass as exact."""
    has, record = (
        ExpertLayers(1, 2, 6),
        RoutingRecord(version=0, start=0, stop=1, experts=Array.of([[[0, 5]]], "u1")),
    )
    recorded, unrecorded = sequence([(0, 3, 9)], routing=(record,)), sequence([(0, 3, 9)])
    nothing_sampled = sequence([])
    assert objection(trajectory(recorded, nothing_sampled), 41, has) == ""
    named = objection(trajectory(recorded, unrecorded), 41, has)
    assert named.startswith("sequence 1: no routing was recorded")
    assert objection(trajectory(unrecorded), 41, None) == ""


def _segment_only(piece):
    start = int(piece.positions[0]) - 1
    return piece.token_ids[start:], piece.positions - start


MISTAKES = {
    "positions shifted by one": lambda piece: (piece.token_ids, piece.positions - 1),
    "the segment without its prefix": _segment_only,
    "an environment token altered": lambda piece: (
        np.where(np.arange(len(piece.token_ids)) == 1, 40, piece.token_ids),
        piece.positions,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_tolerance_sees_every_mistake(
    backend, reference, sequence, trajectory, mistake
) -> None:
    """Mutations of `offpolicy.md` 10.4 T5: each moves the numbers by far more than is allowed."""
    from dataclasses import replace

    played = trajectory(sequence([(0, 6, 12)]))
    (piece,) = pieces_of(played, kind="packed", temperature=1.0)
    state = dict(backend.state())
    wanted = reference(state, piece.token_ids)[piece.positions]
    (right,) = score_pieces(backend, [piece], "packed")
    assert np.abs(right - wanted).max() <= 1e-10
    token_ids, positions = MISTAKES[mistake](piece)
    (wrong,) = score_pieces(
        backend, [replace(piece, token_ids=token_ids, positions=positions)], "packed"
    )
    assert np.abs(wrong - wanted).max() >= 1e-3
    (hot,) = score_pieces(backend, [replace(piece, temperature=1.01)], "packed")
    assert np.abs(hot - wanted).max() >= 1e-3
