"""Staging as lists: events in, actions out."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest

from services.learner.staging import (
    GroupCompleted,
    GroupFailed,
    GroupIssued,
    GroupRemoved,
    Refused,
    ScoreLost,
    Staging,
)
from shared.wire.trajectory import Failure

FAILED = Failure(reason="env_error")


def staged(*tickets: str) -> Staging:
    staging = Staging()
    assert staging.handle(GroupIssued("g", 3, tickets)) == []
    return staging


def test_a_group_completes_with_its_last_score_in_any_order_of_arrival(make: ModuleType) -> None:
    terminals = [
        make.terminal("a", 1, make.trajectory()),
        make.terminal("b", 2, make.trajectory(0)),
    ]
    events = [*terminals, make.score_of(terminals[0], 7), make.score_of(terminals[1], 8)]
    for order in itertools.permutations(events):
        staging = staged("a", "b")
        actions = [staging.handle(event) for event in order]
        assert actions[:3] == [[], [], []]
        [completed] = actions[3]
        assert isinstance(completed, GroupCompleted)
        assert [m.ticket_id for m in completed.group.members] == ["a", "b"]
        assert [m.score_seq for m in completed.group.members] == [7, 8]
        assert completed.group.issue_version == 3


def test_a_failed_member_needs_no_score_and_is_named(make: ModuleType) -> None:
    staging = staged("a", "b")
    played = make.terminal("a", 1, make.trajectory())
    assert staging.handle(make.terminal("b", 2, FAILED)) == []
    assert staging.handle(played) == []
    [completed] = staging.handle(make.score_of(played, 5))
    assert isinstance(completed, GroupCompleted)
    assert [m.ticket_id for m in completed.group.members] == ["a"]
    assert completed.group.failed == ("b",)


def test_a_group_of_failures_is_failed(make: ModuleType) -> None:
    staging = staged("a", "b")
    staging.handle(make.terminal("a", 1, FAILED))
    assert staging.handle(make.terminal("b", 2, FAILED)) == [GroupFailed("g", ("a", "b"))]


@pytest.mark.parametrize(
    "changes", [{"terminal_seq": 9}, {"terminal_digest": "other"}], ids=["sequence", "digest"]
)
def test_a_score_of_another_terminal_is_refused(
    make: ModuleType, changes: dict[str, object]
) -> None:
    staging = staged("a")
    played = make.terminal("a", 1, make.trajectory())
    staging.handle(played)
    refused = staging.handle(make.score_of(played, 5, **changes))
    assert refused == [Refused("a", "score_of_another_terminal")]
    [completed] = staging.handle(make.score_of(played, 6))
    assert isinstance(completed, GroupCompleted)


def test_a_score_of_another_length_ends_its_ticket_as_failed(make: ModuleType) -> None:
    staging = staged("a")
    played = make.terminal("a", 1, make.trajectory())
    longer = make.terminal("a", 1, make.trajectory(versions=(0, 0, 0)))
    staging.handle(played)
    assert staging.handle(make.score_of(longer, 5)) == [
        Refused("a", "score_does_not_fit"),
        GroupFailed("g", ("a",)),
    ]


@pytest.mark.parametrize("lost_first", [True, False])
def test_a_lost_score_ends_its_ticket_as_failed_and_never_as_scored(
    make: ModuleType, lost_first: bool
) -> None:
    staging = staged("a", "b")
    played = [make.terminal("a", 1, make.trajectory()), make.terminal("b", 2, make.trajectory())]
    events = [ScoreLost("a"), played[0]] if lost_first else [played[0], ScoreLost("a")]
    for event in (*events, played[1]):
        assert staging.handle(event) == []
    assert staging.unscored_tickets == ("b",)
    assert staging.handle(make.score_of(played[0], 5)) == [Refused("a", "second_score")]
    [completed] = staging.handle(make.score_of(played[1], 6))
    assert isinstance(completed, GroupCompleted)
    assert completed.group.failed == ("a",)
    assert staging.handle(ScoreLost("b")) == []


def test_repeated_and_unknown_records_are_refused(make: ModuleType) -> None:
    staging = staged("a", "b")
    played = make.terminal("a", 1, make.trajectory())
    staging.handle(played)
    staging.handle(make.score_of(played, 5))
    assert staging.handle(make.terminal("a", 2, FAILED)) == [Refused("a", "second_terminal")]
    assert staging.handle(make.score_of(played, 6)) == [Refused("a", "second_score")]
    assert staging.handle(make.terminal("x", 3, FAILED)) == [
        Refused("x", "terminal_of_unknown_ticket")
    ]


def test_a_removed_group_leaves_nothing_behind_and_is_refused_afterwards(make: ModuleType) -> None:
    staging = staged("a")
    played = make.terminal("a", 1, make.trajectory())
    staging.handle(played)
    staging.handle(make.score_of(played, 5))
    assert staging.floors(10, 20) == {"terminals": 1, "scores": 5}
    staging.handle(GroupRemoved("g"))
    assert staging.floors(10, 20) == {"terminals": 10, "scores": 20}
    assert staging.handle(played) == [Refused("a", "terminal_of_unknown_ticket")]


def test_routes_that_score_at_the_step_wait_for_terminals_only(make: ModuleType) -> None:
    staging = Staging(needs_scores=False)
    staging.handle(GroupIssued("g", 0, ("a",)))
    [completed] = staging.handle(make.terminal("a", 1, make.trajectory()))
    assert isinstance(completed, GroupCompleted)
    assert completed.group.members[0].scores == ()


def test_where_no_score_is_needed_none_is_missing(make: ModuleType) -> None:
    """A group that is still open must not settle a member twice when a score is given up."""
    staging = Staging(needs_scores=False)
    staging.handle(GroupIssued("g", 0, ("a", "b")))
    staging.handle(make.terminal("a", 1, make.trajectory()))
    assert staging.unscored_tickets == ()


def test_what_is_still_missing_is_known(make: ModuleType) -> None:
    staging = staged("a", "b")
    staging.handle(make.terminal("a", 1, make.trajectory()))
    assert staging.unsettled_tickets == ("b",)
    assert staging.unscored_tickets == ("a",)
