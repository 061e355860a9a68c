"""Trajectories of the synthetic run with D and S of one's choice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shared.cli.explained import Explained, Token
from shared.cli.reference_forward import Query, ReferenceConfig, ReferencePolicy
from shared.wire.base import Array
from shared.wire.journal import Batch, Member, TrainedGroup
from tests.cli.synthetic_run import CONFIG, SyntheticRun, _stored


def pick(
    run: SyntheticRun, wanted: Callable[[Batch, TrainedGroup, Member], bool]
) -> tuple[Batch, TrainedGroup, Member]:
    """Return the first member in the loss that is wanted."""
    return next(
        (b, g, m)
        for b in run.batches()
        for g in b.groups
        if not g.no_loss
        for m in g.members
        if wanted(b, g, m)
    )


def sampled_at(run: SyntheticRun, member: Member) -> np.ndarray:
    sequence = run.terminals[member.terminal_seq].outcome.sequences[0]
    return np.flatnonzero(sequence.loss_mask.numpy())


def under(run: SyntheticRun, version: int, member: Member) -> np.ndarray:
    """Return log-probs [T] under one version, 0 where nothing was sampled."""
    ids = run.terminals[member.terminal_seq].outcome.sequences[0].token_ids.numpy()
    where = sampled_at(run, member)
    policy = ReferencePolicy(ReferenceConfig.of(CONFIG), _stored(run.weights[version]))
    values = np.zeros(len(ids))
    values[where] = policy.logprobs([Query(ids, where)])[0]
    return values


def falsify(run: SyntheticRun, member: Member, old: np.ndarray, sampler: np.ndarray) -> None:
    """Give a member other log-probs; its digests are left as they were."""
    terminal = run.terminals[member.terminal_seq]
    sequence = terminal.outcome.sequences[0]
    sequence = sequence.model_copy(update={"arrays": {"sampler_logprobs": Array.of(sampler, "f4")}})
    outcome = terminal.outcome.model_copy(update={"sequences": (sequence,)})
    run.terminals[member.terminal_seq] = terminal.model_copy(update={"outcome": outcome})
    score = run.scores[member.score_seq]
    scored = score.sequences[0].model_copy(update={"old_logprobs": Array.of(old, "f4")})
    run.scores[member.score_seq] = score.model_copy(update={"sequences": (scored,)})


def configure(run_dir: Path, **sections: dict[str, Any]) -> Path:
    path = run_dir / "resolved.yaml"
    values = yaml.safe_load(path.read_text())
    for name, settings in sections.items():
        values["config"].setdefault(name, {}).update(settings)
    path.write_text(yaml.safe_dump(values))
    return run_dir


def loss_tokens(run: SyntheticRun, batch: Batch) -> int:
    return sum(
        len(sampled_at(run, m)) for g in batch.groups if not g.no_loss for m in g.members
    )  # fmt: skip


def sampled(explained: Explained) -> list[Token]:
    return [token for token in explained.tokens if token.sampled]


def crafted(run: SyntheticRun, member: Member, version: int, ds: list[float], ss: list[float]):
    """Set D and S of a member's first tokens, the rest to 1, at what the version makes of ℓ."""
    where = sampled_at(run, member)
    d, s = np.ones(len(where)), np.ones(len(where))
    d[: len(ds)], s[: len(ss)] = ds, ss
    old = under(run, version, member)
    old[where] -= np.log(s)
    sampler = old.copy()
    sampler[where] -= np.log(d)
    falsify(run, member, old, sampler)
