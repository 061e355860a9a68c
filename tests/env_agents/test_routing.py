"""Routing on its way from answers into the sequences of an episode."""

from __future__ import annotations

import numpy as np
import pytest

from services.env_agents.episode_events import (
    Ask,
    End,
    Event,
    Observed,
    Replied,
    Started,
    StepEnv,
    Stepped,
)
from services.env_agents.episodes import Episode, Limits
from services.env_agents.routing_records import flaw, held, joined, lacking
from shared.backends.routing import routing_rows
from shared.wire.base import Array
from shared.wire.messages import Done, Partial, RoutingHeld, SampledTokens, TaskRef, Ticket
from shared.wire.trajectory import RoutingRecord, SamplingParams, Span, Trajectory

STOP = 9
LIMITS = Limits(max_turns=4, context_tokens=32, backoff_s=0.1, backoff_max_s=0.5)
PROMPT = [1, 2, 3]


def record(version: int, start: int, stop: int, mark: int = 0, layers: int = 2) -> RoutingRecord:
    """Expert ids name the version and the token they are of."""
    rows = [[[10 * version + mark, token]] * layers for token in range(start, stop)]
    return RoutingRecord(version=version, start=start, stop=stop, experts=Array.of(rows, "u1"))


def sampled(*ids: int, version: int = 4, routing: tuple[RoutingRecord, ...] = ()) -> SampledTokens:
    return SampledTokens(
        token_ids=Array.of(list(ids), "i4"),
        logprobs=Array.of([-0.5] * len(ids), "f4"),
        spans=(Span(version=version, start=0, stop=len(ids)),),
        routing=routing,
    )


def begun() -> Episode:
    ticket = Ticket(
        ticket_id="t1", purpose="train", group_id="g", member=0, group_size=8,
        task=TaskRef(dataset="d", split="train", index=0, seed=0),
        issue_version=4, min_version=4, deadline=1000.0,
        sampling=SamplingParams(max_new_tokens=6, stop_ids=(STOP,)), seed=11,
    )  # fmt: skip
    episode = Episode(ticket, "a", LIMITS, (STOP,), jitter=lambda: 1.0)
    the(Ask, episode, Started(), Observed(PROMPT, "digest"))
    return episode


def the(kind: type, episode: Episode, *events: Event):  # type: ignore[no-untyped-def]
    """The one action that the last event leads to."""
    actions: list[object] = []
    for event in events:
        actions = list(episode.handle(event, 10.0))
    (action,) = actions
    assert isinstance(action, kind), action
    return action


def done(request: str, tokens: SampledTokens) -> Replied:
    return Replied(request, "p1", Done(sampled=tokens, finish="stop"))


def end(episode: Episode) -> Trajectory:
    outcome = the(End, episode, Stepped([], 1.0, True, False)).outcome
    assert isinstance(outcome, Trajectory)
    return outcome


def test_a_first_request_holds_nothing_and_a_following_one_what_the_answers_brought() -> None:
    ticketless = begun()
    the(StepEnv, ticketless, done("a-1", sampled(5, STOP)))
    assert the(Ask, ticketless, Stepped([7], 0.0, False, False)).request.routing_held is None

    episode = begun()
    first = sampled(5, STOP, routing=(record(4, 0, 4),))
    the(StepEnv, episode, done("a-1", first))
    ask = the(Ask, episode, Stepped([7, 8], 0.0, False, False))
    assert ask.request.routing_held == RoutingHeld(version=4, stop=4)
    the(StepEnv, episode, done("a-2", sampled(6, STOP, routing=(record(4, 4, 8),))))
    (sequence,) = end(episode).sequences
    assert sequence.routing == (record(4, 0, 8),), "one stretch of one version is one record"


def test_a_resumed_turn_holds_what_its_part_brought() -> None:
    episode = begun()
    part = Partial(sampled=sampled(5, 6, routing=(record(4, 0, 4),)), reason="drain")
    ask = the(Ask, episode, Replied("a-1", "p1", part))
    assert ask.request.routing_held == RoutingHeld(version=4, stop=4)
    rest = sampled(STOP, version=5, routing=(record(5, 0, 5),))
    the(StepEnv, episode, done("a-2", rest))
    (sequence,) = end(episode).sequences
    assert sequence.routing == (record(4, 0, 4), record(5, 0, 5))


def test_a_rewritten_history_starts_without_routing_and_leaves_the_old_sequences_alone() -> None:
    episode = begun()
    the(StepEnv, episode, done("a-1", sampled(5, STOP, routing=(record(4, 0, 4),))))
    ask = the(Ask, episode, Stepped([3, 2], 0.0, False, False, rewrites=True))
    assert ask.request.routing_held is None
    the(StepEnv, episode, done("a-2", sampled(STOP, routing=(record(4, 0, 2, mark=1),))))
    first, second = end(episode).sequences
    assert first.routing == (record(4, 0, 4),)
    assert second.routing == (record(4, 0, 2, mark=1),)


def test_a_partial_trajectory_has_the_routing_so_far() -> None:
    episode = begun()
    part = Partial(sampled=sampled(5, 6, routing=(record(4, 0, 4),)), reason="interrupt")
    the(Ask, episode, Replied("a-1", "p1", part))
    sequences = episode.partial(5)
    assert sequences is not None
    assert sequences[0].routing == (record(4, 0, 4),)


@pytest.mark.parametrize(
    ("routing", "problem"),
    [
        ((record(4, 0, 6),), "p1 answered with routing up to token 6 of 5"),
        ((record(4, 0, 2), record(4, 7, 8)), "p1 answered with routing up to token 8 of 5"),
    ],
)
def test_routing_beyond_the_answer_is_asked_for_again(
    routing: tuple[RoutingRecord, ...], problem: str
) -> None:
    episode = begun()
    ask = the(Ask, episode, done("a-1", sampled(5, STOP, routing=routing)))
    assert ask.request.request_id == "a-2"
    assert ask.request.token_ids.numpy().tolist() == PROMPT
    assert ask.request.routing_held is None
    assert episode._last_setback == problem


def test_routing_of_another_model_than_before_is_asked_for_again() -> None:
    episode = begun()
    the(StepEnv, episode, done("a-1", sampled(5, STOP, routing=(record(4, 0, 4),))))
    the(Ask, episode, Stepped([7], 0.0, False, False))
    other = sampled(5, STOP, routing=(record(4, 0, 7, layers=3),))
    ask = the(Ask, episode, done("a-2", other))
    assert ask.request.request_id == "a-3"
    assert episode._last_setback == "p1 answered with routing of another model than before"
    the(StepEnv, episode, done("a-3", sampled(5, STOP, routing=(record(4, 4, 7),))))
    assert end(episode).sequences[0].routing == (record(4, 0, 7),)


@pytest.mark.parametrize(
    ("records", "version", "stop"),
    [
        ([record(4, 0, 4)], 4, 4),
        ([record(4, 0, 4), record(4, 4, 9)], 4, 9),
        ([record(4, 4, 9), record(4, 0, 5)], 4, 9),
        ([record(4, 0, 4), record(4, 5, 9)], 4, 4),
        ([record(4, 0, 9), record(5, 0, 3)], 5, 3),
        ([record(5, 0, 3), record(4, 0, 9)], 5, 3),
        ([record(4, 0, 9), record(4, 2, 5)], 4, 9),
    ],
)
def test_held_is_the_newest_version_up_to_its_first_gap(
    records: list[RoutingRecord], version: int, stop: int
) -> None:
    assert held(records) == RoutingHeld(version=version, stop=stop)


def test_without_the_first_token_nothing_is_held() -> None:
    assert held([]) is None
    assert held([record(4, 0, 4), record(5, 2, 6)]) is None


def test_only_what_continues_the_record_before_it_is_joined() -> None:
    apart = (record(4, 0, 3), record(5, 3, 4), record(5, 5, 6), record(4, 3, 5))
    assert joined(apart) == apart
    run = (record(4, 0, 3), record(4, 3, 4), record(4, 4, 8), record(5, 0, 9))
    assert joined(run) == (record(4, 0, 8), record(5, 0, 9))
    assert joined(()) == ()


def test_records_that_fit_have_no_flaw() -> None:
    assert flaw((record(4, 0, 5),), 5, (record(4, 0, 3),)) == ""
    assert flaw((), 0, ()) == ""


def test_a_version_that_comes_back_adds_only_rows_that_it_has_not_recorded() -> None:
    """A pod that lags behind knows nothing of what its version recorded before: it sends all."""
    episode = begun()
    for turn, version in enumerate((4, 5, 4, 5)):
        stop = len(PROMPT) + 3 * turn + 1
        answer = sampled(5, STOP, version=version, routing=(record(version, 0, stop, mark=turn),))
        the(StepEnv, episode, done(f"a-{turn + 1}", answer))
        if turn < 3:
            the(Ask, episode, Stepped([7], 0.0, False, False))
    (sequence,) = end(episode).sequences
    assert sequence.routing == (
        record(4, 0, 4), record(5, 0, 7, mark=1), record(4, 4, 10, mark=2),
        record(5, 7, 13, mark=3),
    )  # fmt: skip


def test_what_is_left_out_never_changes_which_record_of_a_token_counts() -> None:
    known = (record(4, 0, 3), record(5, 2, 6), record(4, 2, 5, mark=1))
    new = (record(4, 1, 5, mark=2), record(4, 3, 8, mark=3), record(5, 0, 4, mark=4))
    kept = lacking(new, known)
    assert kept == (record(4, 5, 8, mark=3), record(5, 0, 4, mark=4))
    for version in (None, 4, 5):
        both = [routing_rows((*known, *some), 8, version) for some in (new, kept)]
        assert np.array_equal(*both)
