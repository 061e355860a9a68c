"""Restarting and stopping, as lists of events and actions."""

import pytest

from shared.cli.supervision import (
    Action,
    Child,
    Exited,
    Finished,
    Policy,
    RestartPlanned,
    Signal,
    Start,
    StopAsked,
    Supervision,
    Tick,
)

RUN = (
    Child("nats", "nats"),
    Child("learner-0", "learner"),
    Child("rollout-0", "rollout"),
    Child("rollout-1", "rollout"),
    Child("env-agents-0", "env_agents"),
    Child("logit-oracle-0", "logit_oracle"),
    Child("recorder", "recorder"),
)


def begun(policy: Policy | None = None) -> Supervision:
    supervision = Supervision(RUN, policy)
    assert supervision.begin() == [Start(child.pod) for child in RUN]
    return supervision


def exited(pod: str, code: int = -9, at: float = 0.0, lived_s: float = 60.0, detail: str = ""):
    return Exited(pod, code, at, lived_s, detail)


def test_a_killed_child_comes_back_after_the_shortest_delay_and_is_counted() -> None:
    supervision = begun()
    assert supervision.handle(exited("rollout-1", at=100.0)) == [
        RestartPlanned("rollout-1", "signal 9", 0.2)
    ]
    assert supervision.wake_at() == pytest.approx(100.2)
    assert supervision.handle(Tick(100.1)) == []
    assert supervision.handle(Tick(100.2)) == [Start("rollout-1", 1)]
    assert supervision.restarts == {
        "nats": 0, "learner": 0, "rollout": 1, "env_agents": 0, "logit_oracle": 0, "recorder": 0,
    }  # fmt: skip
    assert supervision.wake_at() is None


def test_back_off_doubles_to_its_bound_and_a_stable_life_resets_it() -> None:
    supervision = begun(Policy(give_up_after=100))
    at, delays = 0.0, []
    for _ in range(9):
        [planned] = supervision.handle(exited("rollout-0", 1, at, lived_s=0.1))
        assert isinstance(planned, RestartPlanned)
        delays.append(planned.delay_s)
        at += planned.delay_s
        assert supervision.handle(Tick(at))[0] == Start("rollout-0", len(delays))
    assert delays == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0])
    [planned] = supervision.handle(exited("rollout-0", 1, at, lived_s=10.0))
    assert planned == RestartPlanned("rollout-0", "exit code 1", 0.2)


def test_the_bus_never_stays_away_for_long() -> None:
    supervision = begun(Policy(give_up_after=100))
    for number in range(8):
        [planned] = supervision.handle(exited("nats", 1, 100.0 * number, lived_s=0.1))
        assert isinstance(planned, RestartPlanned)
        supervision.handle(Tick(100.0 * number + planned.delay_s))
    assert planned.delay_s == 2.0


@pytest.mark.parametrize("pod", [child.pod for child in RUN])
def test_every_child_is_restarted_nats_and_recorder_included(pod: str) -> None:
    supervision = begun()
    assert supervision.handle(exited(pod)) == [RestartPlanned(pod, "signal 9", 0.2)]


def stop_everything(supervision: Supervision, actions: list[Action], at: float) -> list[Action]:
    """Answer every SIGTERM with a clean exit and return all actions."""
    seen = list(actions)
    queue = list(actions)
    while queue:
        action = queue.pop(0)
        if isinstance(action, Signal):
            more = supervision.handle(exited(action.pod, 0, at))
            seen += more
            queue += more
    return seen


ORDERLY: list[Action] = [
    Signal("env-agents-0", "term"),
    Signal("rollout-0", "term"),
    Signal("rollout-1", "term"),
    Signal("logit-oracle-0", "term"),
    Signal("recorder", "term"),
    Signal("nats", "term"),
]
AT_ONCE: list[Action] = [
    Signal("rollout-0", "term"),
    Signal("rollout-1", "term"),
    Signal("env-agents-0", "term"),
    Signal("logit-oracle-0", "term"),
]
AT_THE_END: list[Action] = [*AT_ONCE, *ORDERLY[4:], Finished(0, "done")]


def test_the_run_ends_when_the_learner_exits_zero_and_the_recorder_reads_to_the_end() -> None:
    supervision = begun()
    first = supervision.handle(exited("learner-0", 0, 50.0))
    assert first == AT_ONCE
    assert stop_everything(supervision, first, 50.0) == AT_THE_END
    assert supervision.restarts["learner"] == 0


def test_a_learner_that_was_only_asked_to_leave_comes_back() -> None:
    supervision = begun()
    left = Exited("learner-0", 0, 50.0, 60.0, done=False)
    assert supervision.handle(left) == [RestartPlanned("learner-0", "exit code 0", 0.2)]


def test_ctrl_c_stops_the_learner_first_then_the_others_in_order() -> None:
    supervision = begun()
    first = supervision.handle(StopAsked(5.0, "interrupted"))
    assert stop_everything(supervision, first, 5.0) == [
        Signal("learner-0", "term"), *ORDERLY, Finished(130, "interrupted"),
    ]  # fmt: skip


@pytest.mark.parametrize("code", [2, 3])
def test_bad_configuration_and_a_fence_stop_the_run_with_the_childs_own_words(code: int) -> None:
    supervision = begun()
    first = supervision.handle(exited("rollout-0", code, 1.0, 0.5, "no such model"))
    actions = stop_everything(supervision, first, 1.0)
    assert actions[-1] == Finished(code, "rollout-0: no such model")
    assert not any(isinstance(action, Start | RestartPlanned) for action in actions)


def test_a_child_that_keeps_dying_stops_the_run_with_the_reason() -> None:
    supervision = begun(Policy(give_up_after=2))
    at = 0.0
    for _ in range(2):
        supervision.handle(exited("logit-oracle-0", 1, at, 0.1, "disk full"))
        at += 20
        supervision.handle(Tick(at))
    first = supervision.handle(exited("logit-oracle-0", 1, at, 0.1, "disk full"))
    assert stop_everything(supervision, first, at)[-1] == Finished(
        1, "logit-oracle-0 died 3 times in a row: exit code 1: disk full"
    )


def test_whoever_ignores_sigterm_is_killed_after_its_bound() -> None:
    supervision = begun(Policy(stop_bound_s=3.0))
    supervision.handle(StopAsked(9.0, "interrupted"))
    assert supervision.handle(exited("learner-0", 0, 10.0)) == [Signal("env-agents-0", "term")]
    assert supervision.wake_at() == 13.0
    assert supervision.handle(Tick(12.9)) == []
    assert supervision.handle(Tick(13.0)) == [Signal("env-agents-0", "kill")]
    assert supervision.handle(exited("env-agents-0", -9, 13.1)) == ORDERLY[1:4]


def test_a_second_ctrl_c_kills_everything_at_once() -> None:
    supervision = begun()
    supervision.handle(StopAsked(1.0, "interrupted"))
    assert supervision.handle(StopAsked(1.5, "interrupted")) == [
        Signal(child.pod, "kill") for child in RUN
    ]
    actions = [a for child in RUN for a in supervision.handle(exited(child.pod, -9, 1.6))]
    assert actions == [Finished(130, "interrupted twice: killed")]


def test_while_stopping_only_the_bus_and_the_recorder_come_back() -> None:
    supervision = begun()
    supervision.handle(exited("learner-0", 0, 1.0))
    assert supervision.handle(exited("rollout-0", -9, 1.1)) == []
    assert supervision.handle(exited("nats", -9, 1.1)) == [RestartPlanned("nats", "signal 9", 0.2)]
    assert supervision.handle(Tick(1.4)) == [Start("nats", 1)]


def test_a_child_waiting_for_its_restart_does_not_hold_up_the_end() -> None:
    supervision = begun()
    supervision.handle(exited("env-agents-0", -9, 0.9))
    first = supervision.handle(exited("learner-0", 0, 1.0))
    assert stop_everything(supervision, first, 1.0) == [
        action for action in AT_THE_END if action != Signal("env-agents-0", "term")
    ]
    assert supervision.handle(Tick(99.0)) == []
