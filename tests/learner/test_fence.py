"""The fence as lists: events in, actions out."""

from __future__ import annotations

from services.learner.fence import (
    Announce,
    EnvAgent,
    Fence,
    Fenced,
    Lower,
    Raise,
    Resume,
    Seen,
)


def agent(pod: str, generation: int, incarnation: str = "i", interrupted: int = 0) -> EnvAgent:
    return EnvAgent(pod, incarnation, generation, interrupted)


def raised(timeout_s: float = 10.0, deaf_until: float = 0.0) -> Fence:
    fence = Fence(timeout_s=timeout_s, deaf_until=deaf_until)
    assert fence.handle(Raise(4), 0.0) == [Announce(1, 5)]
    return fence


def fenced(*acknowledged: str, excluded=(), silent=(), interrupted: int = 0) -> list[Fenced]:
    return [Fenced(acknowledged, tuple(excluded), tuple(silent), interrupted)]


def test_the_fence_is_complete_when_every_live_env_agent_has_acknowledged() -> None:
    fence = raised()
    assert fence.handle(Seen([agent("a", 0), agent("b", 0)]), 1.0) == []
    assert fence.handle(Seen([agent("a", 1, interrupted=3), agent("b", 0)]), 2.0) == []
    both = [agent("a", 1, interrupted=3), agent("b", 1, interrupted=2)]
    assert fence.handle(Seen(both), 3.0) == fenced("a", "b", interrupted=5)
    assert fence.handle(Seen(both), 4.0) == [], "once"


def test_one_whose_lease_runs_out_is_excluded() -> None:
    fence = raised()
    assert fence.handle(Seen([agent("a", 1), agent("b", 0)]), 1.0) == []
    assert fence.handle(Seen([agent("a", 1)]), 7.0) == fenced("a", excluded=["b"])


def test_one_that_dies_after_its_acknowledgement_is_not_excluded() -> None:
    fence = raised()
    assert fence.handle(Seen([agent("a", 0), agent("b", 1)]), 1.0) == []
    assert fence.handle(Seen([agent("a", 1)]), 7.0) == fenced("a", "b")


def test_one_that_joins_has_to_acknowledge_too() -> None:
    fence = raised()
    assert fence.handle(Seen([agent("a", 0)]), 1.0) == []
    assert fence.handle(Seen([agent("a", 1), agent("b", -1)]), 2.0) == []
    assert fence.handle(Seen([agent("a", 1), agent("b", 1)]), 3.0) == fenced("a", "b")


def test_an_acknowledgement_is_of_a_process_and_not_of_a_name() -> None:
    fence = raised()
    assert fence.handle(Seen([agent("a", 0, "first")]), 1.0) == []
    assert fence.handle(Seen([agent("a", 0, "second")]), 2.0) == []
    assert fence.handle(Seen([agent("a", 1, "second")]), 3.0) == fenced("a", excluded=["a"])


def test_one_that_comes_back_from_an_expired_lease_is_waited_for_again() -> None:
    fence = raised()
    assert fence.handle(Seen([agent("a", 0), agent("b", 0)]), 1.0) == []
    assert fence.handle(Seen([agent("b", 0)]), 2.0) == []
    assert fence.handle(Seen([agent("a", 0), agent("b", 1)]), 3.0) == []
    assert fence.handle(Seen([agent("a", 1), agent("b", 1)]), 4.0) == fenced("a", "b")


def test_the_bound_ends_it_and_names_who_was_silent() -> None:
    fence = raised(timeout_s=10.0)
    assert fence.handle(Seen([agent("a", 1), agent("b", 0), agent("c", 0)]), 9.0) == []
    seen = Seen([agent("a", 1), agent("b", 0)])
    assert fence.handle(seen, 10.0) == fenced("a", excluded=["c"], silent=["b"])


def test_nobody_is_taken_for_absent_before_a_lease_had_time_to_be_heard() -> None:
    fence = raised(deaf_until=6.0)
    assert fence.handle(Seen([]), 5.9) == []
    assert fence.handle(Seen([]), 6.0) == fenced()


def test_every_fence_has_a_generation_of_its_own() -> None:
    fence = raised()
    assert fence.handle(Seen([agent("a", 1)]), 1.0) == fenced("a")
    assert fence.handle(Raise(5), 2.0) == [Announce(2, 6)]
    assert fence.handle(Seen([agent("a", 1)]), 3.0) == [], "the old acknowledgement does not count"
    assert fence.handle(Seen([agent("a", 2)]), 4.0) == fenced("a")


def test_a_restarted_learner_lets_its_version_be_sampled_again_until_its_own_fence() -> None:
    fence = Fence(timeout_s=10.0, deaf_until=0.0)
    assert fence.handle(Resume(4, generation=7, min_version=5), 0.0) == [Announce(8, 4)]
    assert fence.handle(Raise(4), 1.0) == [Announce(9, 5)]


def test_a_restarted_learner_that_has_left_the_version_announces_nothing() -> None:
    fence = Fence(timeout_s=10.0, deaf_until=0.0)
    assert fence.handle(Resume(5, generation=7, min_version=5), 0.0) == []
    assert (fence.generation, fence.min_version) == (7, 5)
    assert fence.handle(Raise(5), 1.0) == [Announce(8, 6)]


def test_a_version_that_is_not_left_may_be_sampled_again() -> None:
    fence = raised()
    fence.handle(Seen([agent("a", 1)]), 1.0)
    assert fence.handle(Lower(4), 2.0) == [Announce(2, 4)]
    assert fence.handle(Seen([agent("a", 2)]), 3.0) == [], "nobody waits for it"
