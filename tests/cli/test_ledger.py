"""The ledger sees every loss, every duplicate and every tampered record."""

from collections.abc import Callable

import pytest

from shared.cli.ledger import Ledger, balance
from shared.cli.records import score_facts, terminal_facts
from shared.wire.journal import Batch, Disposed, Issued, RunFinished, RunStarted
from shared.wire.messages import Score
from tests.cli.synthetic_run import SyntheticRun, build


def books(run: SyntheticRun, digests: dict[int, str] | None = None) -> Ledger:
    by_claim = {
        claim.version: claim.digest
        for score in run.scores.values()
        for sequence in score.sequences
        for claim in sequence.versions
    }
    return balance(
        run.journal,
        {seq: terminal_facts(seq, run.digest(seq), t) for seq, t in run.terminals.items()},
        {seq: score_facts(seq, s) for seq, s in run.scores.items()},
        queued=run.queued,
        digests=by_claim if digests is None else digests,
        max_staleness=run.spec.max_staleness,
    )


@pytest.fixture
def run() -> SyntheticRun:
    return build()


def edit_batch(run: SyntheticRun, index: int, edit: Callable[[Batch], Batch]) -> None:
    batch = run.batches()[index]
    run.replace(batch, edit(batch))


def with_groups(batch: Batch, *groups: object) -> Batch:
    return batch.model_copy(update={"groups": groups})


def with_member(batch: Batch, **update: object) -> Batch:
    group = batch.groups[0]
    member = group.members[0].model_copy(update=update)
    group = group.model_copy(update={"members": (member, *group.members[1:])})
    return with_groups(batch, group, *batch.groups[1:])


def test_an_honest_run_balances(run: SyntheticRun) -> None:
    ledger = books(run)
    counts = ledger.training
    assert ledger.problems == ()
    assert counts.issued == 6 * 3 * 4 + 2
    assert (counts.trained, counts.failed, counts.unfinished) == (71, 1, 2)
    assert (counts.dropped, counts.lost, counts.duplicated) == (0, 0, 0)
    assert (ledger.evaluation.issued, ledger.evaluation.evaluated) == (48, 48)
    assert ledger.exact_ratio == 1.0
    assert 0 < ledger.tokens_trained <= ledger.tokens_admitted == sum(ledger.age_tokens.values())


def test_staleness_is_counted_per_token_against_the_batch(run: SyntheticRun) -> None:
    expected: dict[int, int] = {}
    for batch in run.batches():
        for member in (m for g in batch.groups for m in g.members):
            for span in run.terminals[member.terminal_seq].outcome.sequences[0].spans:
                age = batch.version - span.version
                expected[age] = expected.get(age, 0) + span.stop - span.start
    ledger = books(run)
    assert ledger.age_tokens == dict(sorted(expected.items()))
    assert ledger.staleness_max == max(expected) > 0


def test_a_terminal_that_vanished_before_the_end_is_a_loss(run: SyntheticRun) -> None:
    unfinished = next(b for b in run.journal if isinstance(b, RunFinished)).unfinished
    seq = next(s for s, t in run.terminals.items() if t.ticket_id == unfinished[0])
    del run.terminals[seq]
    ledger = books(run)
    assert ledger.lost == (unfinished[0],)
    assert ledger.training.lost == 1
    assert ledger.training.unfinished == 1


def test_a_ticket_that_nobody_declared_unfinished_is_a_loss(run: SyntheticRun) -> None:
    finished = next(b for b in run.journal if isinstance(b, RunFinished))
    run.replace(finished, finished.model_copy(update={"unfinished": ()}))
    assert books(run).training.lost == 2


def test_a_member_that_its_group_left_behind_is_a_loss_even_in_an_open_run(
    run: SyntheticRun,
) -> None:
    run.journal.pop()
    left = run.batches()[2].groups[0].members[-1]

    def without_last(batch: Batch) -> Batch:
        group = batch.groups[0]
        return with_groups(
            batch, group.model_copy(update={"members": group.members[:-1]}), *batch.groups[1:]
        )

    edit_batch(run, 2, without_last)
    assert books(run).lost == (left.ticket_id,)


def test_tickets_of_an_interrupted_run_are_unfinished_where_there_is_evidence(
    run: SyntheticRun,
) -> None:
    run.journal = [b for b in run.journal if not isinstance(b, RunFinished)]
    run.journal = [b for b in run.journal if not isinstance(b, Batch) or b.version < 5]
    counts = books(run).training
    assert (counts.unfinished, counts.lost) == (12 + 2, 0)
    run.queued.clear()
    assert books(run).training.lost == 1


def test_a_resumed_run_is_open_again(run: SyntheticRun) -> None:
    run.journal.append(RunStarted(incarnation="i2", seed=0, model_digest="d0", resumed_from=5))
    assert books(run).problems == ()


def test_a_ticket_trained_in_two_versions_is_a_duplicate(run: SyntheticRun) -> None:
    again = run.batches()[3].groups[0]
    edit_batch(run, 4, lambda b: with_groups(b, again, *b.groups[1:]))
    ledger = books(run)
    assert set(ledger.duplicated) == {m.ticket_id for m in again.members}
    assert ledger.training.duplicated == len(again.members)
    # the groups it displaced were issued, played, and trained by nobody
    assert ledger.training.lost > 0


def test_a_batch_journalled_twice_is_a_duplicate(run: SyntheticRun) -> None:
    run.journal.insert(-1, run.batches()[3])
    ledger = books(run)
    assert ledger.training.duplicated == 12
    assert any(p.startswith("two batches of one epoch") for p in ledger.problems)


def test_a_fork_supersedes_the_batch_of_its_version(run: SyntheticRun) -> None:
    run.journal.insert(-1, run.batches()[3].model_copy(update={"epoch": 1}))
    ledger = books(run)
    assert ledger.problems == ()
    assert [b.epoch for b in ledger.lineage] == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("update", "problem"),
    [
        ({"terminal_digest": "0" * 32}, "terminal of another ticket or content"),
        ({"terminal_seq": 10_000}, "terminal that is not in the log"),
        ({"score_seq": 10_000}, "score that is not in the log"),
        ({"score_seq": 1}, "score of another terminal"),
        ({"reward": 7.0}, "another reward than its terminal's"),
        ({"ticket_id": "t404"}, "trained but never issued"),
    ],
)
def test_a_tampered_member_is_seen(
    run: SyntheticRun, update: dict[str, object], problem: str
) -> None:
    edit_batch(run, 2, lambda b: with_member(b, **update))
    assert any(problem in line for line in books(run).problems)


def test_a_terminal_changed_after_training_is_seen(run: SyntheticRun) -> None:
    seq = run.batches()[0].groups[0].members[0].terminal_seq
    run.terminals[seq] = run.terminals[seq].model_copy(update={"producer": "mallory"})
    problems = books(run).problems
    assert problems == (
        "trained on a terminal of another ticket or content: 1 "
        f"(first: {run.terminals[seq].ticket_id})",
    )


def test_two_terminals_of_one_ticket_are_seen(run: SyntheticRun) -> None:
    run.terminals[len(run.terminals) + 1] = run.terminals[3]
    assert any("more than one terminal" in line for line in books(run).problems)


def test_tokens_older_than_the_bound_are_seen_unless_masked(run: SyntheticRun) -> None:
    bound = books(run).staleness_max - 1
    run.spec.max_staleness = bound
    assert any(f"token age outside 0..{bound}" in line for line in books(run).problems)
    for batch in run.batches():
        old = tuple(range(batch.version - bound))
        groups = [g.model_copy(update={"masked_versions": old}) for g in batch.groups]
        run.replace(batch, with_groups(batch, *groups))
    ledger = books(run)
    assert ledger.problems == ()
    assert ledger.staleness_max == bound
    assert ledger.tokens_admitted > sum(ledger.age_tokens.values())


def test_tokens_of_a_version_below_the_tickets_minimum_are_seen(run: SyntheticRun) -> None:
    issued = [b for b in run.journal if isinstance(b, Issued) and b.tickets[0].purpose == "train"]
    tickets = tuple(t.model_copy(update={"min_version": 6}) for t in issued[0].tickets)
    run.replace(issued[0], issued[0].model_copy(update={"tickets": tickets}))
    assert any("below the ticket's min_version" in line for line in books(run).problems)


def test_unverified_tokens_and_foreign_digests_are_not_exact(run: SyntheticRun) -> None:
    def unverified(score: Score) -> Score:
        claims = tuple(
            c.model_copy(update={"status": "unverified"}) for c in score.sequences[0].versions
        )
        sequence = score.sequences[0].model_copy(update={"versions": claims})
        return score.model_copy(update={"sequences": (sequence,)})

    member = run.batches()[0].groups[0].members[0]
    run.scores[member.score_seq] = unverified(run.scores[member.score_seq])
    tokens = run.terminals[member.terminal_seq].outcome.sequences[0].loss_mask.numpy().sum()
    ledger = books(run)
    assert ledger.tokens_admitted - ledger.tokens_exact == tokens
    assert books(run, digests={}).exact_ratio == 0.0


def test_dropped_and_failed_groups_are_counted_with_their_cause(run: SyntheticRun) -> None:
    dropped = run.batches()[4].groups[0]
    ids = tuple(m.ticket_id for m in dropped.members)
    edit_batch(run, 4, lambda b: with_groups(b, *b.groups[1:]))
    run.journal.insert(-1, Disposed(ticket_ids=ids[:3], outcome="dropped", cause="stale"))
    run.journal.insert(-1, Disposed(ticket_ids=ids[3:], outcome="failed", cause="deadline"))
    ledger = books(run)
    assert (ledger.training.dropped, ledger.training.failed) == (3, 2)
    assert ledger.drop_causes == {"stale": 3, "deadline": 1, "failed in a trained group": 1}
    assert ledger.problems == ()


def test_a_ticket_both_trained_and_dropped_is_seen(run: SyntheticRun) -> None:
    ticket_id = run.batches()[4].groups[0].members[0].ticket_id
    run.journal.append(Disposed(ticket_ids=(ticket_id,), outcome="dropped", cause="stale"))
    assert any("ended in more than one way" in line for line in books(run).problems)


def test_an_evaluation_reward_that_no_terminal_has_is_seen(run: SyntheticRun) -> None:
    final = next(b for b in run.journal if getattr(b, "name", "") == "final")
    rewards = tuple(1.0 for _ in final.rewards)
    run.replace(final, final.model_copy(update={"rewards": rewards}))
    assert any("evaluation reward is no terminal's" in line for line in books(run).problems)
