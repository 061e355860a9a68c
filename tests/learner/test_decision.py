"""What goes into a batch, and what of it into the loss."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from services.learner.credit import make_credit
from services.learner.decision import decide_batch
from services.learner.items import build_items, pack_items, shuffled_minibatches
from services.learner.staging import CompleteGroup, Scored
from shared.runtime.algo_section import AlgoSection
from shared.wire.journal import Batch

CREDIT = make_credit(AlgoSection())


def scored(
    make: ModuleType,
    ticket_id: str,
    reward: float,
    versions: tuple[int, ...],
    status: str = "exact",
) -> Scored:
    terminal = make.terminal(ticket_id, 1, make.trajectory(reward, versions))
    score = make.score_of(terminal, 2, status)
    return Scored(ticket_id, 1, terminal.digest, 2, terminal.outcome, score.sequences)


def decide(*groups: CompleteGroup, version: int = 5, eta: int = 4) -> Batch:
    return decide_batch(groups, version=version, epoch=0, seed=1, credit=CREDIT, max_staleness=eta)


def members_of(*groups: CompleteGroup) -> dict[str, Scored]:
    return {m.ticket_id: m for g in groups for m in g.members}


def items_of(batch: Batch, *groups: CompleteGroup):
    members = members_of(*groups)
    return build_items(batch, members, {t: m.scores for t, m in members.items()})


def test_advantages_are_relative_to_the_group_and_failures_are_no_zero(make: ModuleType) -> None:
    group = CompleteGroup(
        "g", 4, (scored(make, "a", 1.0, (4,)), scored(make, "b", 0.0, (4,))), failed=("c",)
    )
    [decided] = decide(group).groups
    assert [m.advantage for m in decided.members] == [0.5, -0.5]
    assert decided.failed == ("c",)
    assert decided.no_loss == ""


def test_a_zero_variance_group_takes_its_place_but_leaves_loss_and_denominator(
    make: ModuleType,
) -> None:
    same = CompleteGroup(
        "s", 4, (scored(make, "a", 1.0, (4, 4)), scored(make, "b", 1.0, (4,))), failed=()
    )
    mixed = CompleteGroup(
        "m", 4, (scored(make, "c", 1.0, (4,)), scored(make, "d", 0.0, (5, 5))), failed=()
    )
    batch = decide(same, mixed)
    assert [g.no_loss for g in batch.groups] == ["zero_variance", ""]
    items = items_of(batch, same, mixed)
    assert len(items.items) == 2
    assert items.sampled_tokens == 6
    assert items.should_train_tokens == 3
    assert sorted(items.ages) == [0, 0, 1]


def test_a_lone_survivor_has_no_baseline(make: ModuleType) -> None:
    group = CompleteGroup("g", 4, (scored(make, "a", 1.0, (4,)),), failed=("b",))
    assert decide(group).groups[0].no_loss == "too_few_members"


def test_over_age_tokens_leave_the_loss_and_count_against_exactness(make: ModuleType) -> None:
    group = CompleteGroup(
        "g", 0, (scored(make, "a", 1.0, (0, 1, 5)), scored(make, "b", 0.0, (5,))), failed=()
    )
    batch = decide(group, version=5, eta=4)
    assert batch.groups[0].masked_versions == (0,)
    items = items_of(batch, group)
    assert items.should_train_tokens == 4
    assert items.exact_tokens == 3
    assert items.items[0].loss_mask.tolist() == [False, False, False, True, True]
    assert items.items[0].sampled_mask.tolist() == [False, False, True, True, True]


def test_tokens_without_an_exact_old_log_prob_are_never_trained(make: ModuleType) -> None:
    for status in ("unverified", "unscorable"):
        group = CompleteGroup(
            "g", 4, (scored(make, "a", 1.0, (4, 5), status), scored(make, "b", 0.0, (3,))), ()
        )
        items = items_of(decide(group), group)
        assert items.exact_tokens == 1
        assert items.items[0].loss_mask.sum() == 0


def test_packed_arrays_stand_at_their_tokens(make: ModuleType) -> None:
    group = CompleteGroup(
        "g", 4, (scored(make, "a", 1.0, (4, 5)), scored(make, "b", 0.0, (3,))), ()
    )
    packed = pack_items(items_of(decide(group), group).items)
    assert packed.lengths == (4, 3)
    assert packed.per_token["versions"].tolist() == [-1, -1, 4, 5, -1, -1, 3]
    assert packed.per_token["loss_mask"].tolist() == [False, False, True, True, False, False, True]
    assert packed.per_token["advantages"].tolist() == [0.5] * 4 + [-0.5] * 3
    assert packed.per_token["trajectory"].tolist() == [1] * 4 + [2] * 3


def test_minibatches_are_a_partition_fixed_by_the_seed(make: ModuleType) -> None:
    members = tuple(scored(make, f"t{i}", float(i % 2), (5,) * (i + 1)) for i in range(7))
    group = CompleteGroup("g", 5, members, ())
    items = items_of(decide(group), group).items
    first = shuffled_minibatches(items, 2, seed=3)
    again = shuffled_minibatches(items, 2, seed=3)
    other = shuffled_minibatches(items, 2, seed=4)
    lengths = [[i.num_tokens for i in part] for part in first]
    assert lengths == [[i.num_tokens for i in part] for part in again]
    assert lengths != [[i.num_tokens for i in part] for part in other]
    assert sorted(np.concatenate(lengths)) == sorted(i.num_tokens for i in items)
