"""Which trained tokens the audit rescores: at random, stratified over the batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.cli.records import TerminalFacts
from shared.wire.journal import Batch, Member


@dataclass(frozen=True, slots=True)
class Pick:
    """One trained trajectory, and how many of its tokens to rescore."""

    batch_version: int
    member: Member
    masked_versions: tuple[int, ...]
    num_tokens: int


def choose(
    lineage: Sequence[Batch],
    terminals: Mapping[int, TerminalFacts],
    *,
    tokens: int,
    rng: np.random.Generator,
    per_trajectory: int = 8,
) -> list[Pick]:
    """Pick trajectories that are in the loss until `tokens` of their tokens are covered.

    Every batch gives one random trajectory per round, so that early and late versions are audited
    alike. Where a run has too few trajectories, more of each one's tokens are taken.
    """
    rounds: list[list[tuple[Batch, Member, tuple[int, ...], int]]] = []
    for batch in lineage:
        candidates = [
            (batch, member, group.masked_versions, trained)
            for group in batch.groups
            if not group.no_loss
            for member in group.members
            if (trained := _num_trained(terminals.get(member.terminal_seq), group.masked_versions))
        ]
        for number, index in enumerate(rng.permutation(len(candidates))):
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(candidates[index])
    ordered = [row for one_round in rounds for row in _shuffled(one_round, rng)]
    while _covered(ordered, per_trajectory) < tokens and per_trajectory < max(
        (trained for *_, trained in ordered), default=0
    ):
        per_trajectory *= 2
    picks: list[Pick] = []
    covered = 0
    for batch, member, masked, trained in ordered:
        if covered >= tokens:
            break
        taken = min(trained, per_trajectory)
        picks.append(Pick(batch.version, member, masked, taken))
        covered += taken
    return picks


def _num_trained(terminal: TerminalFacts | None, masked: tuple[int, ...]) -> int:
    if terminal is None:
        return 0
    return sum(count for version, count in terminal.version_tokens if version not in masked)


def _covered(rows: list[tuple[Batch, Member, tuple[int, ...], int]], per_trajectory: int) -> int:
    return sum(min(trained, per_trajectory) for *_, trained in rows)


def _shuffled(
    rows: list[tuple[Batch, Member, tuple[int, ...], int]], rng: np.random.Generator
) -> list[tuple[Batch, Member, tuple[int, ...], int]]:
    return [rows[i] for i in rng.permutation(len(rows))]
