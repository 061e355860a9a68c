"""Credit per trajectory and per turn: from rewards to what each token's loss is multiplied by."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from pydantic import ValidationError

from services.learner.credit import make_credit, turn_rewards
from services.learner.decision import decide_batch
from services.learner.items import BatchItems, build_items, pack_items
from services.learner.staging import CompleteGroup, Scored
from shared.runtime.algo_section import AlgoSection
from shared.wire.trajectory import Trajectory, Turn


def played(make: ModuleType, reward: float, *rewards: float) -> Trajectory:
    """Turns of two sampled tokens; `make.sequence` puts them after a prompt of two."""
    sequence = make.sequence((4,) * (2 * len(rewards)))
    turns = tuple(
        Turn(
            start=2 + 2 * k,
            stop=4 + 2 * k,
            finish="stop",
            rewards={"step": given} if given else {},
        )
        for k, given in enumerate(rewards)
    )
    return Trajectory(
        status="done",
        reward=reward,
        sequences=(sequence.model_copy(update={"turns": turns}),),
        task_digest="d",
    )


def scored(make: ModuleType, ticket_id: str, trajectory: Trajectory) -> Scored:
    terminal = make.terminal(ticket_id, 1, trajectory)
    score = make.score_of(terminal, 2, "exact")
    return Scored(ticket_id, 1, terminal.digest, 2, trajectory, score.sequences)


def items_of(section: AlgoSection, *groups: CompleteGroup) -> BatchItems:
    batch = decide_batch(
        groups, version=5, epoch=0, seed=1, credit=make_credit(section), max_staleness=4
    )
    members = {m.ticket_id: m for g in groups for m in g.members}
    return build_items(batch, members, {t: m.scores for t, m in members.items()})


def test_a_reward_of_no_turn_in_particular_is_the_last_ones(make: ModuleType) -> None:
    assert turn_rewards(played(make, 1.0, 0.0, 0.0, 0.0)) == (0.0, 0.0, 1.0)
    assert turn_rewards(played(make, 1.5, 0.5, 0.0)) == (0.5, 1.0)


def test_tokens_of_a_turn_get_what_follows_from_it_relative_to_the_group(make: ModuleType) -> None:
    group = CompleteGroup(
        "g",
        4,
        (
            scored(make, "a", played(make, 3.0, 1.0, 2.0)),
            scored(make, "b", played(make, 1.0, 1.0, 0.0, 0.0)),
        ),
        failed=(),
    )
    items = items_of(AlgoSection(credit="turn", gamma=0.5), group)
    # returns 1 + 2/2, 2 | 1, 0, 0; by turn (2, 1), (2, 0), and a third turn that only one has
    want = [[0, 0, 0.5, 0.5, 1, 1], [0, 0, -0.5, -0.5, -1, -1, 0, 0]]
    packed = pack_items(items.items).per_token
    mask = packed["loss_mask"].bool().numpy()
    np.testing.assert_allclose(packed["advantages"].numpy()[mask], np.concatenate(want)[mask])
    assert [int(item.loss_mask.sum()) for item in items.items] == [4, 4]
    assert items.should_train_tokens == 8
    assert items.exact_tokens == 8
    assert items.sampled_tokens == 10


def test_one_reward_at_the_end_and_no_discount_is_credit_per_trajectory(make: ModuleType) -> None:
    group = CompleteGroup(
        "g",
        4,
        tuple(
            scored(make, name, played(make, reward, 0.0, 0.0))
            for name, reward in (("a", 1.0), ("b", 0.0), ("c", 0.0))
        ),
        failed=(),
    )
    whole, turns = (items_of(AlgoSection(credit=c), group) for c in ("trajectory", "turn"))
    for one, other in zip(whole.items, turns.items, strict=True):
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
        np.testing.assert_allclose(
            one.advantages[one.loss_mask], other.advantages[other.loss_mask], atol=1e-7
        )


def test_a_group_in_which_no_turn_differs_has_no_loss(make: ModuleType) -> None:
    same = tuple(scored(make, name, played(make, 1.0, 0.0, 0.0)) for name in "ab")
    credit = make_credit(AlgoSection(credit="turn"))
    [found] = credit([CompleteGroup("g", 4, same, ())])
    assert found.verdict == "zero_variance"
    [alone] = credit([CompleteGroup("g", 4, same[:1], ())])
    assert alone.verdict == "too_few"
    assert items_of(AlgoSection(credit="turn"), CompleteGroup("g", 4, same, ())).items == ()


def test_turns_are_told_apart_across_the_sequences_of_a_trajectory(make: ModuleType) -> None:
    first = played(make, 0.0, 0.0)
    both = first.model_copy(
        update={
            "sequences": (*first.sequences, *played(make, 0.0, 0.0).sequences),
            "reward": 1.0,
        }
    )
    other = both.model_copy(update={"reward": 0.0})
    group = CompleteGroup("g", 4, (scored(make, "a", both), scored(make, "b", other)), ())
    items = items_of(AlgoSection(credit="turn", gamma=0.5), group)
    of_a = [item.advantages[item.loss_mask][0] for item in items.items[:2]]
    assert of_a == pytest.approx([0.25, 0.5])


def test_the_deviation_of_the_batch_scales_every_group(make: ModuleType) -> None:
    def group(name: str, *rewards: float) -> CompleteGroup:
        members = tuple(
            scored(make, f"{name}{i}", played(make, r, 0.0)) for i, r in enumerate(rewards)
        )
        return CompleteGroup(name, 4, members, ())

    groups = [group("g", 0.0, 1.0), group("h", 0.0, 4.0)]
    deviation = np.std([0, 1, 0, 4], ddof=1) + 1e-6
    found = make_credit(AlgoSection(advantage="batch_std"))(groups)
    assert found[0].advantages == pytest.approx((-0.5 / deviation, 0.5 / deviation))
    assert found[1].advantages == pytest.approx((-2 / deviation, 2 / deviation))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"credit": "turn", "advantage": "batch_std"}, "dr_grpo, grpo or rloo"),
        ({"gamma": 0.9}, "set credit: turn"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(keys: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AlgoSection(**keys)


def test_the_journal_keeps_what_was_decided_for_each_turn(make: ModuleType) -> None:
    group = CompleteGroup(
        "g",
        4,
        (
            scored(make, "a", played(make, 1.0, 0.0, 1.0)),
            scored(make, "b", played(make, 0.0, 0.0)),
        ),
        (),
    )
    batch = decide_batch(
        [group],
        version=5,
        epoch=0,
        seed=1,
        credit=make_credit(AlgoSection(credit="turn")),
        max_staleness=4,
    )
    [decided] = batch.groups
    assert [m.turn_advantages for m in decided.members] == [(0.5, None), (-0.5,)]
    members = {m.ticket_id: m for m in group.members}
    old = {t: m.scores for t, m in members.items()}
    again = build_items(type(batch).model_validate(batch.model_dump()), members, old)
    assert [int(item.loss_mask.sum()) for item in again.items] == [2, 2]
