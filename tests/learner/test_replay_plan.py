"""Which configuration made which version, and what an archive lacks."""

from __future__ import annotations

from typing import Any

import pytest

from services.learner.replay_plan import gaps, plan
from shared.wire.journal import Batch, JournalBody, Member, RunStarted, TrainedGroup
from shared.wire.weights import Manifest


def started(at: float, **config: Any) -> tuple[float, JournalBody]:
    return at, RunStarted(incarnation="i", seed=0, model_digest="d", config=config)


def manifests(*published_at: float) -> dict[int, Manifest]:
    return {
        version: Manifest.model_construct(version=version, published_at=at)
        for version, at in enumerate(published_at)
    }


@pytest.mark.parametrize(
    ("journal", "expected"),
    [
        ([started(0, a=1)], [(1, 3)]),
        # a restart, on another port and in another folder: nothing that weights depend on
        ([started(0, a=1, bus=1, run={"dir": "x"}), started(2.5, a=1, bus=2, run={"dir": "y"})],
         [(1, 3)]),
        ([started(0, a=1), started(2.5, a=2)], [(1, 1), (2, 3)]),
        ([started(0, a=1), started(2.5, a=2), started(3.5, a=1)], [(1, 1), (2, 2), (1, 3)]),
        # begun twice before a version was published: what published it counts
        ([started(0, a=1), started(0.5, a=2)], [(2, 3)]),
    ],
)  # fmt: skip
def test_a_version_is_made_under_the_configuration_journalled_before_its_manifest(
    journal: list[tuple[float, JournalBody]], expected: list[tuple[int, int]]
) -> None:
    phases = plan(journal, manifests(1, 2, 3, 4), first=0, last=3)
    assert [(phase.config["a"], phase.stop) for phase in phases] == expected


def batch(version: int, terminal_seq: int, score_seq: int = 0) -> tuple[float, JournalBody]:
    member = Member(
        ticket_id=f"t{version}", terminal_seq=terminal_seq, terminal_digest="d",
        score_seq=score_seq, reward=0.0, advantage=0.0,
    )  # fmt: skip
    group = TrainedGroup(group_id="g", issue_version=0, members=(member,))
    return 0.0, Batch(version=version, groups=(group,), seed=0)


def test_everything_that_is_missing_is_named_oldest_first() -> None:
    journal = [batch(0, 1, 5), batch(1, 2, 6), batch(3, 4)]
    found = list(gaps(journal, {1: "d", 2: "other"}, {5: "t0"}, first=0, last=4))
    assert [(gap.version, gap.tampered) for gap in found] == [
        (2, True), (2, False), (3, False), (4, False),
    ]  # fmt: skip
    assert [gap.reason for gap in found] == [
        "archive/terminals.bin: record 2 of ticket t1, trained in version 2, is not the one that "
        "was trained",
        "archive/scores.bin lacks record 6 of ticket t1, trained in version 2",
        "archive/journal.bin lacks the batch of version 3",
        "archive/terminals.bin lacks record 4 of ticket t3, trained in version 4",
    ]
    assert not list(gaps(journal, {1: "d"}, {5: "t0"}, first=0, last=1))
    assert not list(gaps(journal, {4: "d"}, {}, first=3, last=4))
