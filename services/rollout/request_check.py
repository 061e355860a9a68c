"""What no engine can sample, said before it tries. Pure, no torch."""

from __future__ import annotations

from services.rollout.engine import SampleSpec
from services.rollout.sampling import check_sampling


def check_spec(spec: SampleSpec, *, context_tokens: int, vocab_size: int) -> None:
    """Refuse a turn that cannot be sampled.

    Raises:
        ValueError: truncated sampling, an empty prefix, nothing to sample, a prefix whose answer
            does not fit the context, or a token that the model does not know.
    """
    check_sampling(spec.sampling)
    ids = spec.token_ids
    if not ids:
        raise ValueError("the prefix is empty: give at least one token")
    if spec.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {spec.max_new_tokens}: ask for at least one")
    if len(ids) + spec.max_new_tokens > context_tokens:
        raise ValueError(
            f"{len(ids)} prefix + {spec.max_new_tokens} new tokens exceed the context of "
            f"{context_tokens}"
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        odd = next(i for i in ids if not 0 <= i < vocab_size)
        raise ValueError(f"token id {odd} is not in the vocabulary of {vocab_size}")
