"""What a fence scores, what it joins, and what can never be scored."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from services.learner.completing import Completer, Completion
from services.learner.decision import unusable_versions
from services.learner.partials import PartialBook
from services.learner.staging import Scored, TerminalArrived
from shared.algo.batching import PackedBatch
from shared.wire.fencing import PartialScores, PartialTrajectory
from shared.wire.messages import Layout
from shared.wire.trajectory import Trajectory


class Weights:
    """A stand-in for a backend: token t of version v has the log-prob -(v + t/100)."""

    name = "stand-in"
    dtype = torch.float64

    def __init__(self, version: int) -> None:
        self.version = version
        self.forwarded: list[int] = []

    def score(self, batch: PackedBatch, *, temperature: float) -> torch.Tensor:
        lengths = list(batch.lengths)
        self.forwarded += lengths
        parts = [-(self.version + np.arange(length) / 100) for length in lengths]
        return torch.from_numpy(np.concatenate(parts))


def complete(version: int, terminals: Any, partials: Any, book: PartialBook) -> Completion:
    weights: Any = Weights(version)
    completer = Completer(weights, num_vocab=64, layout="packed", temperature=1.0, pack_tokens=99)
    result = completer.complete(terminals, partials, book, version=version, digest=f"d{version}")
    assert sum(weights.forwarded) == result.forward_tokens
    return result


def partial(sequence: Any, attempt: str = "x", ticket: str = "t") -> PartialTrajectory:
    return PartialTrajectory(
        ticket_id=ticket, attempt_id=attempt, generation=1, producer="env", incarnation="i",
        sequences=(sequence,),
    )  # fmt: skip


def stored(result: Completion, version: int) -> PartialScores:
    return PartialScores(
        version=version, digest=f"d{version}", scores=tuple(result.partials), producer="learner",
        layout=Layout(backend="b", dtype="float64", kind="packed", num_threads=1),
    )  # fmt: skip


def ended(trajectory: Trajectory, attempt: str = "x") -> TerminalArrived:
    return TerminalArrived("t", 1, "digest", trajectory, attempt)


def outcome(result: Completion) -> tuple[list[float], dict[int, tuple[str, str]]]:
    [completed] = result.terminals
    [scores] = completed.score.sequences()
    statuses = {entry.version: (entry.status, entry.digest) for entry in scores.versions}
    return scores.old_logprobs.numpy().tolist(), statuses


def expected(versions: tuple[int, ...], unscorable: tuple[int, ...] = ()) -> list[float]:
    numbers = [0.0 if v in unscorable else -(v + (2 + i) / 100) for i, v in enumerate(versions)]
    return [0.0, 0.0, *numbers]


@pytest.fixture
def book(make: ModuleType) -> PartialBook:
    """Two tokens of version 0 are scored, at its fence."""
    book = PartialBook()
    book.take_partial(partial(make.sequence((0, 0))), 1)
    book.take_scores(stored(complete(0, [], book.partials, book), 0), 2)
    return book


def test_scores_of_three_fences_are_joined_with_the_terminal(
    make: ModuleType, book: PartialBook
) -> None:
    book.take_partial(partial(make.sequence((0, 0, 1))), 3)
    second = complete(1, [], book.partials, book)
    assert (second.partial_tokens, second.scored_tokens) == (1, 1)
    assert second.forward_tokens == 5, "the whole prefix, for one token"
    book.take_scores(stored(second, 1), 4)
    third = complete(2, [ended(make.trajectory(versions=(0, 0, 1, 2)))], (), book)
    assert outcome(third) == (
        pytest.approx(expected((0, 0, 1, 2)), abs=1e-12),
        {0: ("exact", "d0"), 1: ("exact", "d1"), 2: ("exact", "d2")},
    )
    assert (third.scored_tokens, third.partial_tokens, third.unscorable_tokens) == (1, 0, 0)


def test_nothing_is_scored_twice(make: ModuleType, book: PartialBook) -> None:
    book.take_partial(partial(make.sequence((0, 0))), 3)
    assert complete(0, [], book.partials, book).scored_tokens == 0
    book.take_scores(stored(complete(0, [], book.partials, book), 0), 4)
    again = complete(0, [ended(make.trajectory(versions=(0, 0)))], book.partials, book)
    assert (again.scored_tokens, again.unscorable_tokens) == (0, 0)


def test_an_episode_that_ended_meanwhile_is_scored_as_a_terminal_only(make: ModuleType) -> None:
    book = PartialBook()
    book.take_partial(partial(make.sequence((0, 0))), 1)
    result = complete(0, [ended(make.trajectory(versions=(0, 0)))], book.partials, book)
    assert (result.scored_tokens, result.partials) == (2, [])


@pytest.mark.parametrize("case", ["other attempt", "other tokens", "late"])
def test_tokens_of_a_version_that_is_left_without_a_score_are_unscorable(
    make: ModuleType, book: PartialBook, case: str
) -> None:
    versions = (0, 0, 0, 1) if case == "late" else (0, 0, 1)
    prompt = 2
    played = make.trajectory(versions=versions)
    if case == "other tokens":
        [sequence] = played.sequences
        ids = sequence.token_ids.numpy().copy()
        ids[0] = 9
        array = sequence.token_ids.model_copy(update={"data": ids.tobytes()})
        changed = sequence.model_copy(update={"token_ids": array})
        played = played.model_copy(update={"sequences": (changed,)})
    event = ended(played, attempt="y" if case == "other attempt" else "x")
    result = complete(1, [event], (), book)
    numbers, statuses = outcome(result)
    assert statuses == {0: ("unscorable", ""), 1: ("exact", "d1")}
    assert numbers == pytest.approx(expected(versions, unscorable=(0,)), abs=1e-12)
    assert result.unscorable_tokens == len(versions) - 1
    assert len(numbers) == prompt + len(versions)
    scores = tuple(result.terminals[0].score.sequences())
    member = Scored("t", 1, "digest", 2, played, scores)
    assert unusable_versions(member, oldest_usable=0) == {0}, "they leave the loss"


def test_a_trajectory_outside_the_vocabulary_is_never_forwarded(make: ModuleType) -> None:
    long = make.trajectory(versions=(0,) * 80)
    result = complete(0, [ended(long)], [partial(long.sequences[0], ticket="u")], PartialBook())
    assert (result.forward_tokens, result.unscorable_tokens) == (0, 80)


def test_the_longest_partial_of_an_attempt_counts_in_any_order(make: ModuleType) -> None:
    short, long = partial(make.sequence((0,))), partial(make.sequence((0, 0)))
    for order in ((short, long), (long, short), (long, long)):
        book = PartialBook()
        for seq, one in enumerate(order, 1):
            book.take_partial(one, seq)
        assert book.partials == (long,)


def test_what_is_still_needed_bounds_what_may_be_purged(
    make: ModuleType, book: PartialBook
) -> None:
    assert book.floor(9) == 1
    book.keep_only({"t"}, 0)
    assert book.partials == ()
    assert book.floor(9) == 2, "the scores wait for their terminal"
    book.take_partial(partial(make.sequence((0, 0, 1))), 5)
    book.keep_only({"t"}, 0)
    assert len(book.partials) == 1, "it holds tokens of the next version"
    book.keep_only(set(), 0)
    assert book.floor(9) == 9
