"""Trajectories stamped with versions, and an independent forward of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from services.learner.routes.base import OldLogprobs
from services.learner.staging import Scored
from shared.wire.base import Array
from shared.wire.fencing import PartialTrajectory
from shared.wire.messages import SequenceScore
from shared.wire.trajectory import Sequence as TokenSequence
from shared.wire.trajectory import Span

VOCAB = 37
HEAD = 4
"""The version that is trained from; 0 to HEAD are published."""
TEMPERATURE = 0.9

Stamps = tuple[tuple[int, int, int], ...]
"""(version, start, stop)"""
State = dict[str, torch.Tensor]
Rows = dict[str, list[np.ndarray]]
"""By ticket, per sequence: one log-prob per token, 0 where nothing was sampled."""

MIXED: tuple[Stamps, ...] = (
    ((0, 4, 7), (1, 7, 9), (1, 12, 15), (4, 17, 20)),  # switches inside a turn and between turns
    ((1, 5, 9), (2, 11, 12), (3, 12, 16), (3, 18, 20)),
    ((2, 3, 8),),
    ((0, 6, 8), (3, 8, 11)),
    ((3, 2, 6), (4, 9, 13)),
    ((4, 3, 9),),
    ((0, 2, 9), (2, 12, 18)),
    ((1, 3, 6), (4, 6, 12)),
)


def write_model(path: Path) -> Path:
    """A tiny Qwen3 that is far from uniform."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    model.save_pretrained(path)
    return path


class Reference:
    """Plain transformers with all logits, one whole sequence per call: nothing of our backend.

    transformers rounds norms to float32 inside a float64 model; here they stay in float64.
    """

    def __init__(self, model_dir: Path, states: Mapping[int, State]) -> None:
        from transformers import Qwen3ForCausalLM

        self._states = states
        self._model = Qwen3ForCausalLM.from_pretrained(
            model_dir, dtype=torch.float64, attn_implementation="sdpa"
        )
        for module in self._model.modules():
            if type(module).__name__ == "Qwen3RMSNorm":
                module.forward = lambda x, m=module: (
                    m.weight * x / (x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon).sqrt()
                )

    @torch.no_grad()
    def logprobs(self, token_ids: np.ndarray, version: int) -> np.ndarray:
        self._model.load_state_dict(self._states[version], strict=False)
        ids_T = torch.from_numpy(np.asarray(token_ids, np.int64))
        logprobs_TV = torch.log_softmax(self._model(ids_T[None]).logits[0] / TEMPERATURE, -1)
        found = logprobs_TV[:-1].gather(1, ids_T[1:, None])[:, 0]
        return np.concatenate([[0.0], found.numpy()])


def rows_of(found: OldLogprobs | Sequence[Scored]) -> Rows:
    """Log-probs as arrays."""
    scores: Mapping[str, tuple[SequenceScore, ...]] = (
        found.by_ticket
        if isinstance(found, OldLogprobs)
        else {m.ticket_id: m.scores for m in found}
    )
    return {t: [s.old_logprobs.numpy() for s in own] for t, own in scores.items()}


def restamp(member: Scored, *stamps: tuple[int, int, int]) -> Scored:
    """The same tokens with other stamps."""
    [sequence] = member.trajectory.sequences
    spans = tuple(Span(version=v, start=a, stop=b) for v, a, b in stamps)
    changed = sequence.model_copy(update={"spans": spans})
    played = member.trajectory.model_copy(update={"sequences": (changed,)})
    return replace(member, trajectory=played)


def as_of(members: Sequence[Scored], version: int) -> list[Scored]:
    """Trajectories as old at `version` as these are at HEAD: an anchor reads nothing but ages."""
    shifted = version - HEAD
    return [
        restamp(m, *((max(0, s.version + shifted), s.start, s.stop) for s in q.spans))
        for m in members
        for q in m.trajectory.sequences
    ]


def partial_at(member: Scored, version: int) -> PartialTrajectory | None:
    """What a fence at `version` finds of a trajectory: the tokens sampled up to then."""
    [sequence] = member.trajectory.sequences
    spans = tuple(s for s in sequence.spans if s.version <= version)
    if not spans:
        return None
    stop = spans[-1].stop
    cut = TokenSequence(
        token_ids=Array.of(sequence.token_ids.numpy()[:stop], "i4"),
        loss_mask=Array.of(sequence.loss_mask.numpy()[:stop], "u1"),
        spans=spans,
        arrays={
            "sampler_logprobs": Array.of(sequence.arrays["sampler_logprobs"].numpy()[:stop], "f4")
        },
    )
    return PartialTrajectory(
        ticket_id=member.ticket_id,
        attempt_id="a",
        generation=version + 1,
        producer="env-0",
        incarnation="i",
        sequences=(cut,),
    )
