"""What a well-formed message may not say: stamps, masks, arrays, names."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from shared.wire.base import Array
from shared.wire.messages import SampledTokens
from shared.wire.subjects import STREAMS, Subjects
from shared.wire.trajectory import RoutingRecord, Sequence, Span, Trajectory

F4 = Array.of(np.zeros(5), "f4")


def sequence(mask=(0, 1, 1, 0, 1), spans=((3, 1, 3), (4, 4, 5)), **changes) -> Sequence:
    fields = {
        "token_ids": Array.of(range(5), "i4"),
        "loss_mask": Array.of(mask, "u1"),
        "spans": tuple(Span(version=v, start=a, stop=b) for v, a, b in spans),
        "arrays": {"sampler_logprobs": F4},
        **changes,
    }
    return Sequence(**fields)


def test_spans_that_cover_exactly_the_sampled_tokens_are_accepted():
    assert len(sequence().spans) == 2
    assert sequence(mask=(0,) * 5, spans=()).spans == ()
    assert sequence(mask=(1,) * 5, spans=((1, 0, 2), (2, 2, 5))).spans[1].start == 2


@pytest.mark.parametrize(
    ("spans", "problem"),
    [
        (((3, 1, 3),), "do not cover"),
        (((3, 0, 3), (4, 4, 5)), "do not cover"),
        (((3, 1, 3), (4, 3, 5)), "do not cover"),
        (((4, 4, 5), (3, 1, 3)), "overlaps or is out of range"),
        (((3, 1, 3), (4, 2, 5)), "overlaps or is out of range"),
        (((3, 1, 3), (4, 4, 6)), "overlaps or is out of range"),
        (((3, 1, 1), (3, 1, 3), (4, 4, 5)), "overlaps or is out of range"),
        ((), "do not cover"),
    ],
)
def test_an_unstamped_doubly_stamped_or_wrongly_stamped_token_is_refused(spans, problem):
    with pytest.raises(ValidationError, match=problem):
        sequence(spans=spans)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"token_ids": Array.of(range(5), "i8")}, "token_ids must be"),
        ({"token_ids": Array.of([list(range(5))], "i4")}, "token_ids must be"),
        ({"loss_mask": Array.of([0, 1, 1, 0], "u1")}, "loss_mask must be"),
        ({"loss_mask": Array.of([0, 1, 1, 0, 1], "i4")}, "loss_mask must be"),
        ({"loss_mask": Array.of([0, 2, 2, 0, 2], "u1")}, "do not cover"),
        ({"arrays": {}}, "sampler_logprobs are missing"),
        ({"arrays": {"sampler_logprobs": Array.of(np.zeros(4), "f4")}}, "not of length T"),
        (
            {"arrays": {"sampler_logprobs": F4, "values": Array.of(np.zeros(6), "f4")}},
            "'values' is not of length T",
        ),
    ],
)
def test_arrays_of_another_length_or_type_are_refused(changes, problem):
    with pytest.raises(ValidationError, match=problem):
        sequence(**changes)


def routing(start=0, stop=2, shape=(2, 3, 2), dtype="u1") -> RoutingRecord:
    experts = Array.of(np.zeros(shape), dtype)
    return RoutingRecord(version=3, start=start, stop=stop, experts=experts)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stop": 3}, r"routing of 2 tokens for \[0, 3\)"),
        ({"start": 1}, r"routing of 2 tokens for \[1, 2\)"),
        ({"dtype": "i4"}, "must be u1 or u2"),
        ({"shape": (2, 3)}, "must be u1 or u2"),
        ({"shape": (2, 0, 2)}, "none of them 0"),
    ],
)
def test_routing_is_expert_ids_by_token_layer_and_choice(changes, problem):
    assert routing().experts.shape == (2, 3, 2)
    assert routing(dtype="u2").stop == 2
    with pytest.raises(ValidationError, match=problem):
        routing(**changes)


def test_routing_stays_inside_its_sequence_and_is_that_of_one_model():
    assert len(sequence(routing=(routing(), routing(3, 5))).routing) == 2
    with pytest.raises(ValidationError, match="routing up to token 6 of 5"):
        sequence(routing=(routing(4, 6),))
    with pytest.raises(ValidationError, match="several shapes"):
        sequence(routing=(routing(), routing(shape=(2, 3, 4))))
    with pytest.raises(ValidationError, match="several shapes"):
        SampledTokens(
            token_ids=Array.of([1], "i4"),
            logprobs=Array.of([0.0], "f4"),
            spans=(Span(version=3, start=0, stop=1),),
            routing=(routing(), routing(shape=(2, 1, 2))),
        )


def test_a_trajectory_has_at_least_one_sequence():
    with pytest.raises(ValidationError, match="sequences"):
        Trajectory(status="done", reward=0.0, sequences=(), task_digest="d")


def sampled(ids, logprobs, *spans) -> SampledTokens:
    return SampledTokens(
        token_ids=ids, logprobs=logprobs,
        spans=tuple(Span(version=v, start=a, stop=b) for v, a, b in spans),
    )  # fmt: skip


def test_spans_of_an_answer_tile_it():
    ids, logprobs = Array.of([1, 2, 3], "i4"), Array.of([0.0] * 3, "f4")
    assert sampled(ids, logprobs, (1, 0, 2), (2, 2, 3)).spans[1].version == 2
    assert sampled(Array.of([], "i4"), Array.of([], "f4")).spans == ()
    for spans in ([(1, 0, 2)], [(1, 0, 2), (2, 1, 3)], [(1, 1, 3)], [(1, 0, 4)]):
        with pytest.raises(ValidationError):
            sampled(ids, logprobs, *spans)


@pytest.mark.parametrize(
    ("ids", "logprobs"),
    [
        (Array.of([1], "i4"), Array.of([0.0, 0.0], "f4")),
        (Array(dtype="i4", shape=(), data=bytes(4)), Array(dtype="f4", shape=(), data=bytes(4))),
        (Array.of([1.0], "f4"), Array.of([0.0], "f4")),
        (Array.of([1], "i4"), Array.of([0], "i4")),
    ],
)
def test_tokens_and_logprobs_of_an_answer_are_arrays_of_one_length_and_their_types(ids, logprobs):
    with pytest.raises(ValidationError):
        sampled(ids, logprobs, (1, 0, 1))


@pytest.mark.parametrize(
    ("shape", "data"),
    [((2,), b"abc"), ((-1,), b""), ((), b""), ((1,) * 40, b"a"), ((2**60, 0), b"")],
)
def test_an_array_whose_bytes_do_not_fit_or_that_numpy_cannot_hold_is_refused(shape, data):
    with pytest.raises(ValidationError):
        Array(dtype="u1", shape=shape, data=data)


@pytest.mark.parametrize("run", ["", "A", "-a", "a-", "a.b", "a*", "a" * 41, "a b"])
def test_a_run_name_that_cannot_be_part_of_a_subject_is_refused(run):
    with pytest.raises(ValueError, match="run name"):
        Subjects(run)


@pytest.mark.parametrize("name", ["", "a.b", "*", ">", "a b", "é"])
def test_an_id_that_would_change_the_shape_of_a_subject_is_refused(name):
    subjects = Subjects("x")
    for build in (subjects.ticket, subjects.terminal, subjects.score, subjects.sample_pod):
        with pytest.raises(ValueError, match="subject"):
            build(name)


def test_two_runs_share_no_subject_stream_or_bucket():
    one, two = Subjects("a"), Subjects("a-b")
    assert not two.ticket("t").startswith(one.prefix + ".")
    assert {one.stream(s.name) for s in STREAMS}.isdisjoint(two.stream(s.name) for s in STREAMS)
    assert one.control_bucket != two.control_bucket
