"""Tickets, deadlines, schedules, evaluation rounds, publication slack."""

from __future__ import annotations

from types import ModuleType

import pytest

from services.learner.config import EvalSection, LearnerConfig, OptimizerSection
from services.learner.deadlines import Pauses, overdue
from services.learner.evaluation import EvaluationRound, figures
from services.learner.journal import JournalState
from services.learner.publication import within_slack
from services.learner.schedule import learning_rate
from services.learner.task_source import SeededTaskSource
from services.learner.ticketing import evaluation_tickets, training_groups
from shared.runtime.sections import AdmissionSection
from shared.wire.journal import Issued
from shared.wire.telemetry import Lease
from shared.wire.trajectory import Failure

CONFIG = LearnerConfig(admission=AdmissionSection(group_size=3))


def test_ticket_numbers_and_seeds_go_on_where_the_journal_stands() -> None:
    state, source = JournalState(), SeededTaskSource(CONFIG.task, 7)
    first = training_groups(2, state, source, CONFIG, version=0, now=10.0)
    state.apply(Issued(version=0, tickets=first, cursor=source.cursor()))
    resumed = SeededTaskSource(CONFIG.task, 7)
    resumed.restore(state.cursor)
    second = training_groups(1, state, resumed, CONFIG, version=1, now=11.0)
    tickets = [*first, *second]
    assert [t.ticket_id for t in tickets] == [f"t{i:07d}" for i in range(9)]
    assert [t.task.index for t in tickets] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({t.seed for t in tickets}) == 9
    assert {t.min_version for t in second} == {1}


def test_evaluations_pair_the_same_tasks_with_the_same_seeds() -> None:
    state, source = JournalState(), SeededTaskSource(CONFIG.task, 7)
    tasks = source.evaluation(4)
    base = evaluation_tickets("base", tasks, state, CONFIG, version=0, deadline=1.0)
    state.apply(Issued(version=0, tickets=base))
    final = evaluation_tickets(
        "final", source.evaluation(4), state, CONFIG, version=9, deadline=1.0
    )
    assert [(t.task, t.seed) for t in base] == [(t.task, t.seed) for t in final]
    assert not {t.ticket_id for t in base} & {t.ticket_id for t in final}
    assert EvaluationRound.of(final).version == 9


def test_an_evaluation_leaves_failures_out_instead_of_counting_zeros(make: ModuleType) -> None:
    tickets = [make.ticket(f"e{i}", "eval-base-v0", i, purpose="eval") for i in range(3)]
    round_ = EvaluationRound.of(tickets)
    round_.record("e0", make.trajectory(1.0), 1)
    round_.record("e1", Failure(reason="env_error"), 2)
    assert not round_.complete
    round_.record("e2", make.trajectory(0.0), 3)
    round_.record("e2", make.trajectory(1.0), 4)  # a second outcome changes nothing
    result = round_.result()
    assert (result.rewards, result.num_failed) == ((1.0, 0.0), 1)


def test_a_deadline_moves_by_outages_before_it_and_not_by_those_after(make: ModuleType) -> None:
    ticket, pauses = make.ticket("a", deadline=100.0), Pauses()  # issued at 40

    def is_overdue(now: float) -> bool:
        return overdue([ticket], now, pauses, lifetime_s=60.0) == [ticket]

    assert is_overdue(101.0)
    pauses.add(ended_at=39.0, seconds=30.0)
    assert is_overdue(101.0), "an outage before it was issued does not count"
    pauses.add(ended_at=50.0, seconds=30.0)
    assert not is_overdue(109.0)
    assert is_overdue(111.0), "only the ten seconds since its issue"
    pauses.add(ended_at=200.0, seconds=10.0)
    assert is_overdue(111.0)


@pytest.mark.parametrize(
    ("version", "expected"), [(0, 0.5), (1, 1.0), (6, 0.6), (11, 0.2)], ids=str
)
def test_the_learning_rate_warms_up_and_decays_linearly(version: int, expected: float) -> None:
    section = OptimizerSection(lr=1.0, warmup_versions=1, final_ratio=0.2)
    assert learning_rate(section, version, 11) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("version", "expected"), [(0, 0.5), (1, 1.0), (6, 0.6), (11, 0.2), (3, 0.92360)], ids=str
)
def test_a_cosine_schedule_ends_where_the_linear_one_does(version: int, expected: float) -> None:
    section = OptimizerSection(lr=1.0, schedule="cosine", warmup_versions=1, final_ratio=0.2)
    assert learning_rate(section, version, 11) == pytest.approx(expected, abs=1e-5)


def lease(version: int) -> Lease:
    return Lease(
        role="rollout", pod=f"p{version}", incarnation="i", pid=1, sent_at=0.0, ready=True,
        version=version,
    )  # fmt: skip


def test_publication_waits_while_every_live_rollout_is_far_behind() -> None:
    assert within_slack(10, [lease(3), lease(8)], 2)
    assert not within_slack(10, [lease(3), lease(7)], 2)
    assert within_slack(10, [], 2)


def test_samples_of_a_task_have_seeds_of_their_own_and_the_first_is_that_of_a_single_one() -> None:
    state, source = JournalState(), SeededTaskSource(CONFIG.task, 7)
    tasks = source.evaluation(3)
    once = evaluation_tickets("base", tasks, state, CONFIG, version=0, deadline=1.0)
    four = evaluation_tickets("base", tasks, state, CONFIG, version=0, deadline=1.0, samples=4)
    assert [t.task.index for t in four] == [i for i in range(3) for _ in range(4)]
    assert len({t.seed for t in four}) == 12
    assert [t.seed for t in four[::4]] == [t.seed for t in once]
    assert {t.group_size for t in four} == {12}


def test_an_evaluation_tells_which_versions_sampled_it(make: ModuleType) -> None:
    tickets = [make.ticket(f"e{i}", "eval-progress-v3", i, purpose="eval") for i in range(2)]
    round_ = EvaluationRound.of(tickets)
    round_.record("e0", make.trajectory(1.0, (3, 3)), 1)
    round_.record("e1", make.trajectory(0.0, (3, 4)), 2)
    assert round_.versions() == (3, 4)
    found = figures(round_.result(), 2, 1.0)  # both are samples of task 0
    assert found["avg"] == 0.5
    assert found["pass"] == 1.0
    assert found["all_pass"] == 0.0
    assert figures(round_.result(), 3, 1.0) == {}


def test_episodes_that_are_no_whole_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="episodes 6 is no multiple of samples 4"):
        EvalSection(episodes=6, samples=4)
