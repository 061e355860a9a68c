"""What no version of a model can have sampled, so that no forward of it is asked for. Pure."""

from __future__ import annotations

from shared.backends.expert_layers import ExpertLayers, check_records
from shared.backends.trajectory_scoring import Played


def objection(trajectory: Played, num_vocab: int, experts: ExpertLayers | None = None) -> str:
    """Return why no version can score this trajectory, empty when nothing speaks against it.

    Args:
        trajectory: what was played.
        num_vocab: token ids of the model are below it.
        experts: what is replayed; None where nothing is.
    """
    for index, sequence in enumerate(trajectory.sequences):
        token_ids = sequence.token_ids.numpy()
        if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < num_vocab:
            return (
                f"sequence {index}: token ids {token_ids.min()}..{token_ids.max()} are outside "
                f"the model's vocabulary of {num_vocab}"
            )
        if sequence.spans and sequence.spans[0].start == 0:
            return f"sequence {index}: its first token is stamped as sampled, but has no prefix"
        if experts is not None and sequence.spans and not sequence.routing:
            return (
                f"sequence {index}: no routing was recorded, but model.routing is replay: do all "
                "rollouts record it?"
            )
        if problem := check_records(sequence.routing, experts):
            return f"sequence {index}: {problem}"
    return ""
